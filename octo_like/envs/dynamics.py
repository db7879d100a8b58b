"""How each embodiment moves: four different laws of motion behind one small interface.

An effector has a tip (x, y, z), a gripper opening (1 open, 0 closed), and `apply(action, world, rng)`, which executes
one action with process noise: executed displacement = command * (1 + noise) + small noise.
"""

import abc
import math

import numpy as np

from octo_like.envs import scene

GAIN_NOISE = 0.03
POSITION_NOISE = 0.002  # metres
ANGLE_NOISE = 0.003  # radians


def _noisy(command: np.ndarray, rng: np.random.Generator, floor: float) -> np.ndarray:
    return command * (1 + GAIN_NOISE * rng.standard_normal(command.shape)) + floor * rng.standard_normal(command.shape)


class Pusher:
    """A disc that slides on the table and shoves blocks. Action (dx, dy), metres."""

    radius = 0.02
    contact_steps = 4  # a step is executed in parts, so that contacts are not jumped over

    def __init__(self):
        self.xy = np.zeros(2)
        self.yaw = 0.0
        self.opening = 1.0

    @property
    def tip(self) -> np.ndarray:
        return np.array([self.xy[0], self.xy[1], 0.0])

    def start(self, xy: np.ndarray, rng: np.random.Generator) -> None:
        self.xy = np.array(xy)

    def place(self, xy: np.ndarray, z: float) -> None:
        self.xy = np.array(xy)

    def apply(self, action: np.ndarray, world: scene.World, rng: np.random.Generator) -> None:
        delta = _noisy(action, rng, POSITION_NOISE) / self.contact_steps
        for _ in range(self.contact_steps):
            self.xy = np.clip(self.xy + delta, -scene.TABLE, scene.TABLE)
            world.push(self.xy, self.radius)

    def bump(self, world: scene.World, rng: np.random.Generator) -> None:
        angle, distance = rng.uniform(-math.pi, math.pi), rng.uniform(0.03, 0.07)
        moved = np.clip(self.xy + distance * np.array([math.cos(angle), math.sin(angle)]), -scene.TABLE, scene.TABLE)
        if all(math.dist(moved, block.xy) > block.size * 0.75 + self.radius for block in world.blocks):
            self.xy = moved

    def proprio(self) -> np.ndarray:
        return np.zeros(0, np.float32)


class _Grasping(abc.ABC):
    """What all embodiments with a gripper share: closing near a block takes it, opening drops it."""

    grasp_radius = 0.04

    def __init__(self):
        self.opening = 1.0

    def _low_enough(self) -> bool:
        return True

    @property
    @abc.abstractmethod
    def tip(self) -> np.ndarray:
        """(x, y, z) of the fingertips, metres."""

    @property
    @abc.abstractmethod
    def yaw(self) -> float:
        """Of the hand, radians."""

    @abc.abstractmethod
    def _carry_height(self) -> float:
        """How high its load hangs, metres."""

    def _set_gripper(self, command: float, world: scene.World) -> None:
        was_open, self.opening = self.opening >= 0.5, float(command)
        if was_open and self.opening < 0.5 and self._low_enough():
            world.grasp(self.tip[:2], self.yaw, self.grasp_radius)
        elif self.opening >= 0.5:
            world.release()
        world.carry(self.tip[:2], self.yaw, self._carry_height())

    def slip(self, world: scene.World) -> None:
        """The load falls out of the closed hand."""
        world.release()


class CartesianGripper(_Grasping):
    """A gripper that moves freely above the table. Action (dx, dy, dz, droll, dpitch, dyaw, gripper)."""

    grasp_radius = 0.035
    grasp_height = 0.05
    low = np.array([-0.25, -0.25, 0.02, -0.5, -0.5, -1.6])
    high = np.array([0.25, 0.25, 0.22, 0.5, 0.5, 1.6])

    def __init__(self):
        super().__init__()
        self.pose = np.zeros(6)

    @property
    def tip(self) -> np.ndarray:
        return self.pose[:3]

    @property
    def yaw(self) -> float:
        return float(self.pose[5])

    def start(self, xy: np.ndarray, rng: np.random.Generator) -> None:
        self.pose = np.array([xy[0], xy[1], rng.uniform(0.09, 0.15), 0.0, 0.0, rng.uniform(-0.6, 0.6)])
        self.opening = 1.0

    def place(self, xy: np.ndarray, z: float) -> None:
        self.pose[:3] = (xy[0], xy[1], z)

    def _low_enough(self) -> bool:
        return self.pose[2] < self.grasp_height

    def _carry_height(self) -> float:
        return max(0.0, self.pose[2] - 0.025)

    def apply(self, action: np.ndarray, world: scene.World, rng: np.random.Generator) -> None:
        delta = np.concatenate([_noisy(action[:3], rng, POSITION_NOISE), _noisy(action[3:6], rng, ANGLE_NOISE)])
        self.pose = np.clip(self.pose + delta, self.low, self.high)
        self._set_gripper(action[6], world)

    def bump(self, world: scene.World, rng: np.random.Generator) -> None:
        delta = rng.uniform(-1, 1, 6) * (0.06, 0.06, 0.05, 0, 0, 0.3)
        self.pose = np.clip(self.pose + delta, self.low, self.high)
        world.carry(self.tip[:2], self.yaw, self._carry_height())

    def proprio(self) -> np.ndarray:
        return np.append(self.pose, self.opening).astype(np.float32)


class _JointArm(_Grasping):
    """A planar arm above the table. Joint angles are relative, the first one to `heading`, so that none ever wraps."""

    base: tuple[float, float]
    heading: float
    links: tuple[float, ...]
    height = 0.06
    joint_limit = 3.1

    def __init__(self):
        super().__init__()
        self._set(np.zeros(len(self.links)))

    def _set(self, q: np.ndarray) -> None:
        self.q = np.clip(q, -self.joint_limit, self.joint_limit)
        self._tip = np.array([*self.joints()[-1], self.height])

    @property
    def tip(self) -> np.ndarray:
        return self._tip

    def joints(self) -> list[tuple[float, float]]:
        """Positions (x, y) of the base, of every joint and of the fingertip."""
        x, y, angle = *self.base, self.heading
        points = [(x, y)]
        for length, q in zip(self.links, self.q, strict=True):
            angle += float(q)
            x, y = x + length * math.cos(angle), y + length * math.sin(angle)
            points.append((x, y))
        return points

    @property
    def yaw(self) -> float:
        return self.heading + float(self.q.sum())

    @abc.abstractmethod
    def inverse(self, xy: np.ndarray) -> np.ndarray:
        """Joint angles that bring the fingertip to `xy`; the elbow is always on the same side."""

    def _two_links(self, x: float, y: float, first: float, second: float) -> tuple[float, float]:
        """Angles of two links that end at (x, y) relative to the base, or as near as they can."""
        distance = min(max(math.hypot(x, y), abs(first - second) + 1e-4), first + second - 1e-4)
        direction = math.atan2(y, x) - self.heading
        direction = (direction + math.pi) % (2 * math.pi) - math.pi
        bend = math.acos((distance**2 - first**2 - second**2) / (2 * first * second))
        return direction - math.atan2(second * math.sin(bend), first + second * math.cos(bend)), bend

    def start(self, xy: np.ndarray, rng: np.random.Generator) -> None:
        self._set(self.inverse(xy))
        self.opening = 1.0

    def place(self, xy: np.ndarray, z: float) -> None:
        self._set(self.inverse(xy))

    def _carry_height(self) -> float:
        return 0.03

    def _turn(self, delta: np.ndarray, rng: np.random.Generator) -> None:
        self._set(self.q + _noisy(delta, rng, ANGLE_NOISE))

    def bump(self, world: scene.World, rng: np.random.Generator) -> None:
        delta = rng.uniform(-0.15, 0.15, len(self.q))
        self._set(self.q + delta)
        world.carry(self.tip[:2], self.yaw, self._carry_height())

    def proprio(self) -> np.ndarray:
        return np.append(self.q, self.opening).astype(np.float32)


class DeltaArm(_JointArm):
    """Two links, joint increments. Action (dq1, dq2, gripper)."""

    base = (0.0, -0.42)
    heading = math.pi / 2
    links = (0.38, 0.38)

    def inverse(self, xy: np.ndarray) -> np.ndarray:
        return np.array(self._two_links(xy[0] - self.base[0], xy[1] - self.base[1], *self.links))

    def apply(self, action: np.ndarray, world: scene.World, rng: np.random.Generator) -> None:
        self._turn(action[:2], rng)
        self._set_gripper(action[2], world)


class ServoArm(_JointArm):
    """Three links, absolute joint targets followed by a rate-limited servo. Action (q1, q2, q3, gripper)."""

    base = (0.42, 0.05)
    heading = math.pi
    links = (0.32, 0.27, 0.16)
    max_turn = 0.15  # radians a step

    def inverse(self, xy: np.ndarray) -> np.ndarray:
        """As `_JointArm.inverse`, with the last link pointing away from the base: this makes the answer unique."""
        dx, dy = xy[0] - self.base[0], xy[1] - self.base[1]
        distance = math.hypot(dx, dy)
        wrist = max(distance - self.links[2], 1e-3) / max(distance, 1e-6)
        q1, q2 = self._two_links(dx * wrist, dy * wrist, *self.links[:2])
        radial = (math.atan2(dy, dx) - self.heading + math.pi) % (2 * math.pi) - math.pi
        return np.array([q1, q2, radial - q1 - q2])

    def apply(self, action: np.ndarray, world: scene.World, rng: np.random.Generator) -> None:
        self._turn(np.clip(action[:3] - self.q, -self.max_turn, self.max_turn), rng)
        self._set_gripper(action[3], world)


Effector = Pusher | CartesianGripper | DeltaArm | ServoArm
