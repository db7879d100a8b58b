"""A picture of the table together with what can be seen in it: what questions are asked about."""

import dataclasses
from typing import Any

import numpy as np

from octo_like.envs import scene
from octo_like.envs.tabletop import TabletopEnv

LEAST_PIXELS = {"block": 16, "plate": 30}  # of 64 x 64: of a block that is not hidden, some 45 are seen
CLEARLY_AWAY = 0.08  # metres: a hand so far from a block has not reached it, whatever one takes reaching for


@dataclasses.dataclass(frozen=True)
class Thing:
    """A block or plate in a picture.

    Attributes:
      what: "block" or "plate".
      xy: on the table, metres.
      point: (row, column) of its centre, fractions of the image.
      box: (top, left, bottom, right), fractions; of the whole thing, cut at the image's edges.
      pixels: (h, w) bool, where it is seen.
      held: in the hand.
      plate: colour of the plate it rests on, or None.
    """

    what: str
    color: str
    xy: tuple[float, float]
    point: tuple[float, float]
    box: tuple[float, float, float, float]
    pixels: np.ndarray
    held: bool = False
    plate: str | None = None

    @property
    def name(self) -> str:
        return f"{self.color} {self.what}"


@dataclasses.dataclass(frozen=True)
class Picture:
    """Attributes:
    image: (h, w, 3) uint8 of the primary camera.
    blocks, plates: all things of the scene; each is well visible.
    tip: of the hand, (x, y) in metres.
    grasps: whether the robot has a hand that can hold something.
    instruction: what is being done. done: whether it is; None where that cannot be told from the picture.
    """

    image: np.ndarray
    blocks: tuple[Thing, ...]
    plates: tuple[Thing, ...]
    tip: tuple[float, float]
    grasps: bool
    instruction: str
    done: bool | None

    @property
    def held(self) -> Thing | None:
        return next((block for block in self.blocks if block.held), None)


def take(env: TabletopEnv, info: dict[str, Any]) -> Picture | None:
    """The present picture of an environment; None when something in it can hardly be seen."""
    image, block_pixels, plate_pixels = env.visible()
    least = (env.image_size / 64) ** 2
    blocks = [_thing(env, one, seen) for one, seen in zip(env.world.blocks, block_pixels, strict=True)]
    plates = [_thing(env, one, seen) for one, seen in zip(env.world.plates, plate_pixels, strict=True)]
    for thing in (*blocks, *plates):
        if thing.pixels.sum() < LEAST_PIXELS[thing.what] * least or not all(0 <= edge <= 1 for edge in thing.point):
            return None
    return Picture(
        image=image,
        blocks=tuple(blocks),
        plates=tuple(plates),
        tip=(float(env.effector.tip[0]), float(env.effector.tip[1])),
        grasps=env.embodiment.grasps,
        instruction=info["instruction"],
        done=_done(env, info),
    )


def _thing(env: TabletopEnv, one: scene.Block | scene.Plate, seen: np.ndarray) -> Thing:
    world, x, y = env.world, float(one.xy[0]), float(one.xy[1])
    left, top, right, bottom = (min(1.0, max(0.0, float(edge))) for edge in env.outline(one))
    if isinstance(one, scene.Plate):
        what, held, under, height = "plate", False, None, scene.PLATE_HEIGHT / 2
    else:
        what, height = "block", one.z + scene.BLOCK_HEIGHT / 2
        held = world.held is not None and world.blocks[world.held] is one
        under = None if held else world.plate_under(one)
    column, row = (float(edge) / env.image_size for edge in env.project(x, y, height))
    box = (top, left, bottom, right)
    return Thing(what, one.color, (x, y), (row, column), box, seen, held, under.color if under else None)


def _done(env: TabletopEnv, info: dict[str, Any]) -> bool | None:
    """Whether the task is clearly done or clearly not done, for somebody who sees this moment only."""
    if info["task"] in ("push", "touch_in_order"):
        return None  # how far something was pushed, or what was touched, cannot be seen afterwards
    if info["success"]:
        return True
    if "progress" in info:  # a long task
        return None if env.world.held is not None else False
    block = env.world.block(env.goal.target)
    if env.goal.plate is None:
        return False if np.hypot(*(block.xy - env.effector.tip[:2])) > CLEARLY_AWAY else None
    plate = env.world.plate(env.goal.plate)
    return False if np.hypot(*(block.xy - plate.xy)) > plate.radius + scene.BLOCK_SIZE else None
