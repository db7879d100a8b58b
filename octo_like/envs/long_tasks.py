"""Tasks of several parts: their scenes, what is to be done next, how much is done, and when it is done wrongly.

What is next is a function of the state of the world (and, for the order of touches, of what was touched), so that it
can be said whoever moves the hand: an expert, or a policy that is on its own way.
"""

import dataclasses
import math

import numpy as np

from octo_like.envs import scene
from octo_like.envs.language import BLOCK_COLORS, PLATE_COLORS
from octo_like.envs.long_language import DONE, MATCHING_COLORS, PICK, PLACE, PUT_DOWN, TOUCH

LARGE_PLATE = 0.08  # radius of a plate for several blocks, metres
SPOT_RADIUS = 0.044  # of the circle on a large plate on which blocks are put
CLEAR_OF = 0.03  # metres between a plate's edge and the centre of a block that is off it
STEPS = {"touch_in_order": 22}  # for each part of the task
STEPS_OF_PLACING = 48


@dataclasses.dataclass(frozen=True)
class LongGoal:
    """What the words of a long task ask for.

    Attributes:
      blocks: colours of the blocks to be served, in order where the task has one.
      plate: where they go (or, to be cleared, are). spared: the block that is left alone.
    """

    task: str
    blocks: tuple[str, ...]
    plate: str | None = None
    spared: str | None = None

    @property
    def target(self) -> str:
        """The first block."""
        return self.blocks[0]

    @property
    def max_steps(self) -> int:
        return len(self.blocks) * STEPS.get(self.task, STEPS_OF_PLACING)


@dataclasses.dataclass(frozen=True)
class Part:
    """What is to be done next.

    Attributes:
      text: in words. block: it is about; "" when all is done. plate: where it goes.
      goal: for an expert.
    """

    text: str
    block: str = ""
    plate: str | None = None
    goal: scene.Goal | None = None


class Progress:
    """How much of a long task is done. Call `update` after every step.

    Attributes:
      wrong: the order was broken, which nothing mends.
    """

    def __init__(self, goal: LongGoal):
        self.goal = goal
        self.wrong = False
        self.touched: list[str] = []  # in the order in which they were to be touched
        self._last: str | None = None
        self._laid: list[str] = []  # blocks that rest on the goal's plate, in the order in which they were laid there

    def update(self, world: scene.World, touched: str | None = None) -> None:
        """`touched`: colour of the block that the hand dwells on, if any."""
        goal = self.goal
        if goal.task == "touch_in_order" and touched is not None and touched != self._last and not self.complete(world):
            self._last = touched
            self.wrong |= touched != goal.blocks[len(self.touched)]
            if not self.wrong:
                self.touched.append(touched)
        if goal.task == "place_in_order":
            resting = [block.color for block in world.blocks if _rests_on(world, block) == goal.plate]
            if world.released in self._laid:
                self._laid.remove(world.released)  # it was taken up, and is laid down anew
            self._laid = [color for color in self._laid if color in resting]
            self._laid += [color for color in resting if color not in self._laid]
            self.wrong |= tuple(self._laid) != goal.blocks[: len(self._laid)]

    def served(self, world: scene.World) -> list[str]:
        """Blocks that are where, or have been touched when, they should."""
        goal = self.goal
        if goal.task == "touch_in_order":
            return list(self.touched)
        if goal.task == "match":
            return [color for color in goal.blocks if _rests_on(world, world.block(color)) == color]
        if goal.task == "clear":
            return [color for color in goal.blocks if _is_off(world, color, goal.plate)]
        return [color for color in goal.blocks if _rests_on(world, world.block(color)) == goal.plate]

    def fraction(self, world: scene.World) -> float:
        """Share of the blocks that are served; one that should not be on the plate or in the hand counts against it."""
        served = len(self.served(world)) - len(self.intruders(world))
        if self.wrong and self.goal.task == "place_in_order":  # those laid before the order was broken
            served = 0
            while self._laid[: served + 1] == list(self.goal.blocks[: served + 1]) and served < len(self._laid):
                served += 1
        return max(0, served) / len(self.goal.blocks)

    def intruders(self, world: scene.World) -> list[str]:
        """Blocks on the goal's plate that should not be there."""
        goal = self.goal
        if goal.task not in ("clear", "all_but_one", "place_in_order"):
            return []
        return [b.color for b in world.blocks if b.color not in goal.blocks and not _is_off(world, b.color, goal.plate)]

    def complete(self, world: scene.World) -> bool:
        """Whether everything is done, in order, and the hand is empty."""
        if self.wrong or self.intruders(world) or (world.held is not None and self.goal.task != "touch_in_order"):
            return False
        return len(self.served(world)) == len(self.goal.blocks)


def _rests_on(world: scene.World, block: scene.Block) -> str | None:
    if world.held is not None and world.blocks[world.held] is block:
        return None
    plate = world.plate_under(block)
    return plate.color if plate else None


def _is_off(world: scene.World, color: str, plate: str | None) -> bool:
    """Whether a block lies on the table, clear of a plate."""
    block, dish = world.block(color), world.plate(plate)
    held = world.held is not None and world.blocks[world.held] is block
    return not held and math.dist(block.xy, dish.xy) >= dish.radius + CLEAR_OF


def next_part(world: scene.World, progress: Progress, tip: np.ndarray) -> Part:
    """What is to be done next. Where the order is free, it is the turn of the block nearest to the hand.

    Args:
      tip: of the hand, (x, y) or (x, y, z) in metres.
    """
    goal = progress.goal
    if progress.complete(world):
        return Part(DONE)
    served, intruders = progress.served(world), progress.intruders(world)
    todo = [color for color in goal.blocks if color not in served]
    if goal.task == "touch_in_order":
        block = goal.blocks[min(len(progress.touched), len(goal.blocks) - 1)]
        return Part(TOUCH.format(block=block), block, None, scene.Goal("reach", block))
    held = world.blocks[world.held].color if world.held is not None else None
    if held is None:
        waiting = todo + intruders
        if goal.task == "place_in_order":
            waiting = intruders or todo[:1]
        if not waiting:  # an order that was broken
            return Part(DONE)
        block = min(waiting, key=lambda color: math.dist(world.block(color).xy, tip[:2]))
        return Part(PICK.format(block=block), block, None, scene.Goal("pick_and_place", block, spot=(0.0, 0.0)))
    if goal.task == "match":
        return _to_plate(held, held, None)
    wanted = {"clear": [], "place_in_order": todo[:1]}.get(goal.task, todo)
    if held not in wanted:
        return Part(PUT_DOWN, held, None, scene.Goal("pick_and_place", held, spot=_free_spot(world, goal.plate)))
    return _to_plate(held, str(goal.plate), _spot_on(world, str(goal.plate)))


def _to_plate(block: str, plate: str, spot: tuple[float, float] | None) -> Part:
    return Part(PLACE.format(plate=plate), block, plate, scene.Goal("pick_and_place", block, plate, spot=spot))


def spots(plate: scene.Plate) -> np.ndarray:
    """(3, 2): where blocks are put on a large plate."""
    angles = np.array([90.0, 210.0, 330.0]) * math.pi / 180
    return plate.xy + SPOT_RADIUS * np.stack([np.cos(angles), np.sin(angles)], -1)


def _others(world: scene.World) -> list[np.ndarray]:
    return [block.xy for i, block in enumerate(world.blocks) if i != world.held]


def _spot_on(world: scene.World, plate: str) -> tuple[float, float]:
    """The spot of a large plate that is farthest from what lies there."""
    free = [min((math.dist(spot, xy) for xy in _others(world)), default=1.0) for spot in spots(world.plate(plate))]
    x, y = spots(world.plate(plate))[int(np.argmax(free))]
    return float(x), float(y)


_TABLE_SPOTS = np.stack(np.meshgrid(*[np.linspace(-0.16, 0.16, 9)] * 2), -1).reshape(-1, 2)


def _free_spot(world: scene.World, plate: str | None) -> tuple[float, float]:
    """The place on the table nearest to a plate at which a block is out of the way."""
    room = np.full(len(_TABLE_SPOTS), np.inf)
    for xy in _others(world):
        room = np.minimum(room, np.hypot(*(_TABLE_SPOTS - xy).T) - 0.085)
    for one in world.plates:
        room = np.minimum(room, np.hypot(*(_TABLE_SPOTS - one.xy).T) - one.radius - CLEAR_OF - 0.03)
    away = np.hypot(*(_TABLE_SPOTS - (world.plate(plate).xy if plate else 0.0)).T)
    best = int(np.argmin(np.where(room >= 0, away, np.inf))) if (room >= 0).any() else int(np.argmax(room))
    x, y = _TABLE_SPOTS[best]
    return float(x), float(y)


# Scenes


def sample_long_scene(
    rng: np.random.Generator, layout: scene.Layout, task: str
) -> tuple[scene.World, LongGoal, np.ndarray]:
    """Draws blocks, plates, the goal and the effector's start (x, y). Nothing of the task is done at the start."""
    while True:
        found = _try_scene(rng, layout, task)
        if found is not None:
            return found


def _try_scene(rng, layout: scene.Layout, task: str) -> tuple[scene.World, LongGoal, np.ndarray] | None:
    parts = int(rng.integers(2, 4))
    if task == "match":
        colors = [str(color) for color in rng.permutation(MATCHING_COLORS)[:parts]]
        sizes = [(color, scene.PLATE_RADIUS) for color in colors]
        goal = LongGoal(task, tuple(colors))
    else:
        colors = [str(color) for color in rng.permutation(BLOCK_COLORS)[:3]]
        names = [str(color) for color in rng.permutation(PLATE_COLORS)]
        sizes = [(names[0], LARGE_PLATE)] if task != "touch_in_order" else []
        if rng.random() < 0.4:
            sizes.append((names[1], scene.PLATE_RADIUS))
        if task == "clear":
            goal = LongGoal(task, tuple(colors[: parts - 1]), plate=names[0])
        elif task == "all_but_one":
            goal = LongGoal(task, tuple(colors[:2]), plate=names[0], spared=colors[2])
        else:
            goal = LongGoal(task, tuple(colors[:parts]), plate=names[0] if sizes and task != "touch_in_order" else None)
    plates: list[scene.Plate] = []
    for color, radius in sizes:
        taken = [(plate.xy, plate.radius + radius + 0.02) for plate in plates]
        xy = scene.free_point(rng, (0.225 - radius, 0.225 - radius), taken)
        if xy is None:
            return None
        plates.append(scene.Plate(color, xy, radius))
    blocks: list[scene.Block] = []
    for color in colors:
        if task == "clear" and color in goal.blocks:
            xy = spots(plates[0])[len(blocks)] + rng.uniform(-0.006, 0.006, 2)
        else:
            taken = [(b.xy, layout.block_block) for b in blocks]
            taken += [(p.xy, p.radius + 0.06) for p in plates]
            xy = scene.free_point(rng, (scene.BLOCK_AREA, scene.BLOCK_AREA), taken)
            if xy is None:
                return None
        size = scene.BLOCK_SIZE * rng.uniform(0.9, 1.1)
        block = scene.Block(color, float(size), float(rng.uniform(-1, 1) * layout.max_yaw), xy)
        blocks.append(block)
    taken = [(b.xy, layout.effector_block) for b in blocks]
    start = scene.free_point(rng, (layout.effector_area, layout.effector_area), taken)
    if start is None:
        return None
    order = rng.permutation(len(blocks))
    world = scene.World([blocks[i] for i in order], tuple(plates[i] for i in rng.permutation(len(plates))))
    for block in world.blocks:
        block.z = scene.PLATE_HEIGHT if world.plate_under(block) else 0.0
    return world, goal, start
