"""Scripted experts: they see the state of the world, not its images, and decide anew at every step, so they recover.

An expert's habits (speed, approach offset, hover height) are drawn once per episode; the actions it returns are clean
commands.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from octo_like.envs import dynamics, scene
from octo_like.envs.embodiments import Embodiment

Action = np.ndarray | Sequence[float]
OPEN, CLOSED = 1.0, 0.0
GRASP_TOLERANCE = 0.018  # metres in x and y, before closing or opening the hand


class Episode(Protocol):
    """What an expert sees of the environment."""

    embodiment: Embodiment
    effector: Any  # one of `dynamics`
    world: scene.World
    goal: scene.Goal
    success: bool


class Acting(Protocol):
    """Who moves a robot through an episode."""

    def act(self) -> np.ndarray:
        """An action in physical units, within the embodiment's limits."""


@dataclasses.dataclass(frozen=True)
class Habits:
    """Natural variation: fraction of the greatest speed; where the hand aims on a block and its heights, in metres."""

    speed: float
    offset: np.ndarray
    hover: float
    depth: float
    clearance: float


def sample_habits(rng: np.random.Generator) -> Habits:
    return Habits(
        speed=float(rng.uniform(0.85, 1.0)),
        offset=np.clip(rng.normal(0, 0.004, 2), -0.008, 0.008),
        hover=float(rng.uniform(0.085, 0.115)),
        depth=float(rng.uniform(0.026, 0.036)),
        clearance=float(rng.uniform(0.008, 0.016)),
    )


class Expert(abc.ABC):
    """Returns actions in physical units, clipped to the embodiment's limits."""

    def __init__(self, env: Episode, rng: np.random.Generator, target: str | None = None):
        self.env, self.rng = env, rng
        self.habits = sample_habits(rng)
        self.color = target or env.goal.target
        if self.color not in (colors := [block.color for block in env.world.blocks]):
            raise ValueError(f"there is no {self.color} block in this scene; valid: {', '.join(colors)}")

    @property
    def target(self) -> scene.Block:
        return self.env.world.block(self.color)

    def act(self) -> np.ndarray:
        action = np.array(self._act(), np.float64)
        return self.env.embodiment.clip(action).astype(np.float32)

    @abc.abstractmethod
    def _act(self) -> Action:
        """The command, before it is clipped."""


class GraspingExpert(Expert):
    """What to do with a hand, whatever it hangs on; subclasses know how to move.

    Pick and place is a function of the state: empty hand → over the block → close; holding → over the plate → open;
    a hand that closed on nothing, or on the wrong block, opens and tries again.
    """

    def _act(self) -> Action:
        env, effector = self.env, self.env.effector
        aim = self.target.xy + self.habits.offset
        if env.goal.task == "reach":
            return self.toward(aim, self.habits.depth + 0.012, OPEN)
        world = env.world
        if world.held is not None and world.blocks[world.held] is self.target:
            spot = world.plate(env.goal.plate).xy if env.goal.spot is None else np.array(env.goal.spot)
            hand_to_block = self.target.xy - effector.tip[:2]
            aim = spot + self.habits.offset - hand_to_block
            if self.arrived(aim, self.habits.depth + 0.015):
                return self.stay(OPEN)
            return self.toward(aim, self.habits.depth + 0.005, CLOSED)
        if env.success:
            return self.retreat()
        if effector.opening < 0.5:
            return self.retreat()
        if self.arrived(aim, self.habits.depth + 0.01):
            return self.stay(CLOSED)
        return self.toward(aim, self.habits.depth, OPEN)

    @abc.abstractmethod
    def arrived(self, aim: np.ndarray, low: float) -> bool:
        """Whether the tip is at `aim` (x, y) and, where there is a z, below `low`."""

    @abc.abstractmethod
    def toward(self, aim: np.ndarray, low: float, gripper: float) -> Action:
        """An action that brings the tip nearer to `aim` (x, y), finally at height `low`."""

    @abc.abstractmethod
    def stay(self, gripper: float) -> Action:
        """An action that only moves the fingers."""

    def retreat(self) -> Action:
        """An action that opens the hand and, where there is a z, lifts it."""
        return self.stay(OPEN)


class GripperExpert(GraspingExpert):
    """Comes down along a cone above its aim and turns with the block (squares look the same every 90 degrees).

    `turns_back`: it turns the other way before the wrist is at its limit, where several grasps in a row can bring it.
    """

    turns_back = False

    def _turn(self) -> float:
        if self.env.world.held is not None:
            return 0.0
        yaw = self.env.effector.yaw
        error = (self.target.yaw - yaw + math.pi / 4) % (math.pi / 2) - math.pi / 4
        if self.turns_back and abs(yaw + error) > self.env.effector.high[5] - 0.1:
            error -= math.copysign(math.pi / 2, yaw)
        return error

    def arrived(self, aim: np.ndarray, low: float) -> bool:
        tip = self.env.effector.tip
        aligned = self.env.goal.task == "reach" or abs(self._turn()) < 0.25
        return math.dist(tip[:2], aim) < GRASP_TOLERANCE and tip[2] < low and aligned

    def toward(self, aim: np.ndarray, low: float, gripper: float) -> Action:
        tip, speed = self.env.effector.tip, self.habits.speed
        limit = 0.05 * speed
        xy = aim - tip[:2]
        distance = float(np.hypot(*xy))
        xy = xy * min(1.0, limit / max(distance, 1e-9))
        height = min(self.habits.hover, low + 1.6 * max(0.0, distance - 0.03))
        if distance - limit > 0.02 and tip[2] < 0.06 and self.env.world.held is not None:
            xy = xy * 0.4  # first up, then away: the load is still among the others
        dz = float(np.clip(height - tip[2], -limit, limit))
        turn = float(np.clip(self._turn(), -0.25 * speed, 0.25 * speed))
        return (xy[0], xy[1], dz, 0.0, 0.0, turn, gripper)

    def stay(self, gripper: float) -> Action:
        return (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gripper)

    def retreat(self) -> Action:
        rise = 0.05 * self.habits.speed if self.env.effector.tip[2] < self.habits.hover else 0.0
        return (0.0, 0.0, rise, 0.0, 0.0, 0.0, OPEN)


class DeltaArmExpert(GraspingExpert):
    """Joint increments along the straight line, in joint space, to the aim's inverse kinematics."""

    def arrived(self, aim: np.ndarray, low: float) -> bool:
        return math.dist(self.env.effector.tip[:2], aim) < GRASP_TOLERANCE

    def _increment(self, aim: np.ndarray, limit: float) -> np.ndarray:
        delta = self.env.effector.inverse(aim) - self.env.effector.q
        return delta * min(1.0, limit / max(float(np.abs(delta).max()), 1e-9))

    def toward(self, aim: np.ndarray, low: float, gripper: float) -> Action:
        return (*self._increment(aim, 0.12 * self.habits.speed), gripper)

    def stay(self, gripper: float) -> Action:
        return (0.0, 0.0, gripper)


class ServoArmExpert(DeltaArmExpert):
    """Absolute joint targets that run ahead of the arm by up to two of the servo's steps, and end at the aim."""

    lead = 2 * dynamics.ServoArm.max_turn

    def toward(self, aim: np.ndarray, low: float, gripper: float) -> Action:
        return (*(self.env.effector.q + self._increment(aim, self.lead * self.habits.speed)), gripper)

    def stay(self, gripper: float) -> Action:
        return (*self.env.effector.q, gripper)


class PusherExpert(Expert):
    """Walks around blocks by the shortest way, to the target's near side (reach) or to its far side, then pushes."""

    def _act(self) -> Action:
        target, pusher = self.target, self.env.effector
        if self.env.goal.task == "reach":
            away = pusher.xy - target.xy
            away = away / max(float(np.hypot(*away)), 1e-9)
            goal = target.xy + away * (target.size / 2 + pusher.radius + 0.004)
            others = [block for block in self.env.world.blocks if block is not target]
            # Farther off than what counts as reaching them.
            return self._walk(goal, others, self.env.embodiment.reach_radius + self.habits.clearance)
        sign = 1.0 if self.env.goal.direction == "right" else -1.0
        standoff = self._keep_off(target)
        behind = target.xy - (sign * (standoff + 0.003), 0.0)
        lead, aside = sign * (target.xy[0] - pusher.xy[0]), pusher.xy[1] - target.xy[1]
        limit = 0.05 * self.habits.speed
        if lead > target.size / 2 and abs(aside) < 0.014:
            return (sign * limit, float(np.clip(-0.8 * aside, -0.3 * limit, 0.3 * limit)))
        return self._walk(behind, self.env.world.blocks, 0.0)

    def _keep_off(self, block: scene.Block) -> float:
        """Distance from a block's centre at which the disc is clear of its corners."""
        return block.size * 0.6 + self.env.effector.radius + self.habits.clearance

    def _walk(self, goal: np.ndarray, obstacles: list[scene.Block], keep_off: float) -> np.ndarray:
        start, limit = self.env.effector.xy, 0.05 * self.habits.speed
        centers = np.array([block.xy for block in obstacles])
        radii = np.array([max(keep_off, self._keep_off(block)) for block in obstacles])
        waypoint = _first_waypoint(start, goal, centers, radii)
        step = waypoint - start
        distance = float(np.hypot(*step))
        if distance < limit and not np.array_equal(waypoint, goal):  # round a corner at full speed
            rest = goal - waypoint
            step = step + rest / max(float(np.hypot(*rest)), 1e-9) * (limit - distance) * 0.5
            distance = float(np.hypot(*step))
        return step * min(1.0, limit / max(distance, 1e-9))


def _first_waypoint(start: np.ndarray, goal: np.ndarray, centers: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """The first corner of the shortest path from start to goal that stays out of the circles (visibility graph)."""
    # Where the start or the goal is already inside a circle, the circle shrinks to let it out.
    for point in (start, goal):
        radii = np.minimum(radii, np.hypot(*(centers - point).T) * 0.98)
    if _clear(start[None], goal[None], centers, radii)[0]:
        return goal
    angles = np.arange(12) * (2 * math.pi / 12)
    ring = np.stack([np.cos(angles), np.sin(angles)], -1)
    corners = (centers[:, None] + ring[None] * radii[:, None, None] * 1.06).reshape(-1, 2)
    corners = corners[(np.abs(corners) <= scene.TABLE).all(-1)]
    outside = (np.hypot(*(corners[:, None] - centers[None]).transpose(2, 0, 1)) >= radii * 1.01).all(-1)
    nodes = np.concatenate([start[None], goal[None], corners[outside]])
    n = len(nodes)
    i, j = np.triu_indices(n, 1)
    free = _clear(nodes[i], nodes[j], centers, radii)
    lengths = np.full((n, n), np.inf)
    i, j = i[free], j[free]
    lengths[i, j] = lengths[j, i] = np.hypot(*(nodes[i] - nodes[j]).T)
    cost = lengths[1].copy()  # Dijkstra backwards from the goal
    cost[1] = 0.0
    done = np.zeros(n, bool)
    done[1] = True
    for _ in range(n):
        node = int(np.argmin(np.where(done, np.inf, cost)))
        if done[node] or not np.isfinite(cost[node]):
            break
        done[node] = True
        cost = np.minimum(cost, cost[node] + lengths[node])
    total = lengths[0] + cost
    best = int(np.argmin(total))
    return nodes[best] if np.isfinite(total[best]) else goal


def _clear(starts: np.ndarray, ends: np.ndarray, centers: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """(N,) bool: which segments (N, 2) to (N, 2) touch no circle."""
    if not len(centers):
        return np.ones(len(starts), bool)
    along = ends - starts
    length2 = np.maximum((along**2).sum(-1), 1e-12)
    t = np.clip(((centers[None] - starts[:, None]) * along[:, None]).sum(-1) / length2[:, None], 0, 1)
    nearest = starts[:, None] + t[..., None] * along[:, None]
    return (((nearest - centers[None]) ** 2).sum(-1) >= radii**2 - 1e-9).all(-1)


_EXPERTS: dict[type, Callable[..., Expert]] = {
    dynamics.Pusher: PusherExpert,
    dynamics.CartesianGripper: GripperExpert,
    dynamics.DeltaArm: DeltaArmExpert,
    dynamics.ServoArm: ServoArmExpert,
}


def make_expert(env: Episode, rng: np.random.Generator, target: str | None = None) -> Expert:
    """The expert of the environment's embodiment, for its present episode."""
    return _EXPERTS[type(env.effector)](env, rng, target)
