"""What stands on the table: blocks and plates, how a scene is drawn at random, and how a robot moves things."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from octo_like.envs import language

TABLE = 0.25  # half width of the table, metres
BLOCK_SIZE = 0.06
BLOCK_HEIGHT = 0.04
PLATE_RADIUS = 0.055
PLATE_HEIGHT = 0.008
BLOCK_AREA = 0.18  # blocks start with |x|, |y| below this: every embodiment reaches all of it
PLATE_AREA = 0.17
NEAREST_MARGIN = 0.02  # the nearest block is nearest by at least this much
WRONG_NEAREST_PROBABILITY = 2 / 3


@dataclasses.dataclass
class Block:
    """A square block. `xy` is its centre, `z` the height of its underside (metres), `yaw` in radians."""

    color: str
    size: float
    yaw: float
    xy: np.ndarray
    z: float = 0.0
    start_xy: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        self.start_xy = self.xy.copy()

    @property
    def displacement(self) -> np.ndarray:
        return self.xy - self.start_xy


@dataclasses.dataclass(frozen=True)
class Plate:
    color: str
    xy: np.ndarray
    radius: float = PLATE_RADIUS


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the words ask for: colours of the block and of the plate (pick_and_place), direction (push).

    `spot`: (x, y) where the block goes, instead of the middle of a plate; for parts of long tasks.
    """

    task: str
    target: str
    plate: str | None = None
    direction: str | None = None
    spot: tuple[float, float] | None = None


@dataclasses.dataclass
class World:
    """The movable part of a scene. `held` is the index of the block in the gripper."""

    blocks: list[Block]
    plates: tuple[Plate, ...]
    held: int | None = None
    grasped: set[str] = dataclasses.field(default_factory=set)
    released: str | None = None  # colour of the block let go in the last step
    _grip: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def block(self, color: str) -> Block:
        for block in self.blocks:
            if block.color == color:
                return block
        raise ValueError(f"no {color} block on the table; there are: {', '.join(b.color for b in self.blocks)}")

    def plate(self, color: str | None) -> Plate:
        return next(p for p in self.plates if p.color == color)

    def plate_under(self, block: Block) -> Plate | None:
        """The plate whose radius contains the block's centre."""
        for plate in self.plates:
            if math.dist(plate.xy, block.xy) < plate.radius:
                return plate
        return None

    def grasp(self, xy: np.ndarray, yaw: float, radius: float) -> None:
        """Attaches the block nearest to `xy` when it is within `radius`; it keeps its place in the hand."""
        distances = [math.dist(block.xy, xy) for block in self.blocks]
        nearest = int(np.argmin(distances))
        if distances[nearest] <= radius:
            block = self.blocks[nearest]
            self.held = nearest
            self.grasped.add(block.color)
            dx, dy = block.xy - xy
            c, s = math.cos(yaw), math.sin(yaw)
            self._grip = (c * dx + s * dy, -s * dx + c * dy, block.yaw - yaw)

    def carry(self, xy: np.ndarray, yaw: float, z: float) -> None:
        """Moves the held block with the hand."""
        if self.held is None:
            return
        block = self.blocks[self.held]
        dx, dy, dyaw = self._grip
        c, s = math.cos(yaw), math.sin(yaw)
        block.xy = np.array([xy[0] + c * dx - s * dy, xy[1] + s * dx + c * dy])
        block.yaw, block.z = yaw + dyaw, z

    def release(self) -> None:
        """The held block drops straight down, on the table or on a plate."""
        if self.held is None:
            return
        block = self.blocks[self.held]
        self.held = None
        block.z = PLATE_HEIGHT if self.plate_under(block) else 0.0
        self.released = block.color

    def push(self, xy: np.ndarray, radius: float) -> None:
        """Quasi-static contact: a block that overlaps the disc at `xy` moves out of it along the contact normal."""
        moved = []
        for block in self.blocks:
            dx, dy = xy[0] - block.xy[0], xy[1] - block.xy[1]
            half = block.size / 2
            if dx * dx + dy * dy > (1.4143 * half + radius) ** 2:
                continue
            c, s = math.cos(block.yaw), math.sin(block.yaw)
            local = (c * dx + s * dy, -s * dx + c * dy)
            nearest = (min(max(local[0], -half), half), min(max(local[1], -half), half))
            nx, ny = local[0] - nearest[0], local[1] - nearest[1]
            gap = math.hypot(nx, ny)
            if gap >= radius:
                continue
            if gap > 1e-9:
                nx, ny, depth = nx / gap, ny / gap, radius - gap
            else:  # the disc's centre is inside the square: leave by the nearest face
                axis = 0 if half - abs(local[0]) < half - abs(local[1]) else 1
                sign = 1.0 if local[axis] >= 0 else -1.0
                nx, ny = (sign, 0.0) if axis == 0 else (0.0, sign)
                depth = radius + half - abs(local[axis])
            block.xy = block.xy - depth * np.array([c * nx - s * ny, s * nx + c * ny])
            moved.append(block)
        for mover in moved:  # blocks push blocks, as discs
            for other in self.blocks:
                if other is not mover:
                    offset = other.xy - mover.xy
                    distance = max(float(np.hypot(*offset)), 1e-6)
                    overlap = 0.525 * (mover.size + other.size) - distance
                    if overlap > 0:
                        other.xy = other.xy + overlap * offset / distance


@dataclasses.dataclass(frozen=True)
class Layout:
    """How far apart things start. Distances in metres between centres."""

    block_block: float
    effector_block: float
    max_yaw: float
    effector_area: float


def free_point(
    rng: np.random.Generator, half: tuple[float, float], taken: list[tuple[np.ndarray, float]]
) -> np.ndarray | None:
    """A place in a rectangle of half widths `half`, so far from each of `taken`; None when forty draws find none."""
    for _ in range(40):
        xy = rng.uniform(-1.0, 1.0, 2) * half
        if all(math.dist(xy, other) >= distance for other, distance in taken):
            return xy
    return None


def sample_scene(
    rng: np.random.Generator, layout: Layout, task: str, *, plates_allowed: bool, wrong_nearest: bool | None = None
) -> tuple[World, Goal, np.ndarray]:
    """Draws blocks, plates, the goal and the effector's start (x, y).

    A block that is not the target is nearest to the start in two thirds of the scenes, or as `wrong_nearest` says.
    """
    if wrong_nearest is None:
        wrong_nearest = bool(rng.random() < WRONG_NEAREST_PROBABILITY)
    num_blocks = int(rng.integers(2, 4))
    if task == "pick_and_place":
        num_plates = int(rng.integers(1, 3))
    else:
        num_plates = int(plates_allowed and rng.random() < 0.5)
    while True:
        scene = _try_scene(rng, layout, task, num_blocks, num_plates, wrong_nearest)
        if scene is not None:
            return scene


def _try_scene(rng, layout, task, num_blocks, num_plates, wrong_nearest) -> tuple[World, Goal, np.ndarray] | None:
    plates: list[Plate] = []
    for color in rng.permutation(language.PLATE_COLORS)[:num_plates]:
        xy = free_point(rng, (PLATE_AREA, PLATE_AREA), [(p.xy, 0.13) for p in plates])
        if xy is None:
            return None
        plates.append(Plate(str(color), xy))
    # Pushing to either side must be possible for every block without touching another: each has its own lane in y.
    half = (0.10, 0.17) if task == "push" else (BLOCK_AREA, BLOCK_AREA)
    blocks: list[Block] = []
    for color in rng.permutation(language.BLOCK_COLORS)[:num_blocks]:
        xy = free_point(rng, half, [(b.xy, layout.block_block) for b in blocks] + [(p.xy, 0.115) for p in plates])
        if xy is None or (task == "push" and any(abs(xy[1] - b.xy[1]) < 0.105 for b in blocks)):
            return None
        size = BLOCK_SIZE * rng.uniform(0.9, 1.1)
        blocks.append(Block(str(color), float(size), float(rng.uniform(-1, 1) * layout.max_yaw), xy))
    taken = [(b.xy, layout.effector_block) for b in blocks]
    start = free_point(rng, (layout.effector_area, layout.effector_area), taken)
    if start is None:
        return None
    distances = [math.dist(b.xy, start) for b in blocks]  # the target is blocks[0]: colours are already in random order
    margin = distances[0] - min(distances[1:])
    if (margin > NEAREST_MARGIN) != wrong_nearest or abs(margin) <= NEAREST_MARGIN:
        return None
    goal = Goal(
        task,
        target=blocks[0].color,
        plate=plates[0].color if task == "pick_and_place" else None,
        direction=str(rng.choice(language.DIRECTIONS)) if task == "push" else None,
    )
    order = rng.permutation(num_blocks)
    return World([blocks[i] for i in order], tuple(plates[i] for i in rng.permutation(num_plates))), goal, start


def repaint(world: World, goal: Goal, colors: Sequence[str]) -> Goal:
    """Gives the blocks these colours, one after the other. Returns the goal in new colours."""
    target = world.blocks.index(world.block(goal.target))
    for block, color in zip(world.blocks, colors, strict=True):
        block.color = color
    return dataclasses.replace(goal, target=colors[target])


def recolor(world: World, goal: Goal, target: str, plate: str | None) -> Goal:
    """Paints the goal's block and plate; who had the new colour takes the old one. Returns the goal in new colours."""
    blocks = {goal.target: target, target: goal.target}
    plates = {goal.plate: plate, plate: goal.plate}
    for block in world.blocks:
        block.color = blocks.get(block.color, block.color)
    world.plates = tuple(dataclasses.replace(p, color=plates.get(p.color) or p.color) for p in world.plates)
    return dataclasses.replace(goal, target=target, plate=plate)
