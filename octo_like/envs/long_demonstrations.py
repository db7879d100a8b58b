"""Demonstrations of the long tasks, with the sub-task of every step and the way of the hand. No TensorFlow.

Seeds: robot k (in the order of `EMBODIMENTS`) of data seed s uses 1e8 + 1e7 k + 1e5 s + i for training and as much from
6e8 on for validation. Scenes in which a block goes to a plate against `Colors` are passed over.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from octo_like.envs.colors import Colors
from octo_like.envs.demonstrations import IMAGE_SIZE, WRIST_SIZE, Simulator, first_seed, jpeg, record
from octo_like.envs.long import LongTabletopEnv, part_points, thing_points
from octo_like.envs.paths import paths_of, place
from octo_like.envs.pool import EPISODES_PER_CALL, Attempt

AFTER_SHORT = 100_000_000  # from the seeds of the short tasks' datasets to those of the long tasks'


def first_long_seed(embodiment: str, split: str, seed: int = 0) -> int:
    """As `demonstrations.first_seed`, for long tasks."""
    return first_seed(embodiment, split, seed) + AFTER_SHORT


@functools.cache
def _environment(embodiment: str, render: bool = True) -> LongTabletopEnv:
    sizes = {"image_size": IMAGE_SIZE, "wrist_size": WRIST_SIZE}
    return LongTabletopEnv(embodiment, **sizes, mishaps=True, render_images=render)


def is_excluded(embodiment: str, seed: int, colors: Colors) -> bool:
    """Whether the scene of a seed asks for a block, or a block on a plate, that `colors` excludes."""
    env = _environment(embodiment, render=False)
    env.reset(seed=seed)
    goal = env.goal
    plates = {"match": None, "clear": None}
    named = [(block, plates.get(goal.task, goal.plate)) for block in goal.blocks]
    named += [(block, block) for block in goal.blocks if goal.task == "match"]
    named += [(goal.spared, None)] if goal.spared else []
    return not all(colors.may_name(block, plate) for block, plate in named)


def simulate_long(embodiment: str, seed: int, encode: Callable[[np.ndarray], Any] = jpeg) -> dict[str, Any] | None:
    """One expert episode in RLDS form, or None when the expert failed; see `demonstrations.simulate`.

    Every step also has `subtask`, what is to be done next, and `path`, the way of the hand from there. The points are
    those of what the sub-task is about, of every thing, and `hand_point`.
    """
    env = _environment(embodiment)
    episode = record(env, seed, encode, {}, places=_points, words=lambda info: {"subtask": info["subtask"]})
    if episode is not None:
        steps = episode["steps"]
        hands, actions = zip(*((step["observation"]["hand_point"], step["action"]) for step in steps), strict=True)
        for step, path in zip(steps, paths_of(hands, actions), strict=True):
            step["path"] = path
    return episode


def _points(env: Any) -> dict[str, np.ndarray]:
    return part_points(env) | thing_points(env) | {"hand_point": place(env)}


def _simulate_range(embodiment: str, start: int, encode: Callable, colors: Colors) -> list[Attempt]:
    seeds = [s for s in range(start, start + EPISODES_PER_CALL) if not is_excluded(embodiment, s, colors)]
    return [(seed, simulate_long(embodiment, seed, encode)) for seed in seeds]


class LongSimulator(Simulator):
    """`Simulator` of the long tasks.

    Raises:
      ValueError: a palette: blocks have the colours of the plates that they belong to.
    """

    def __init__(
        self,
        workers: int = 0,
        seed: int = 0,
        encode: Callable[[np.ndarray], Any] = jpeg,
        colors: Colors = Colors(),  # noqa: B008  (frozen)
    ):
        super().__init__(workers, seed, encode, colors)
        if colors.palette is not None:
            raise ValueError("scenes of long tasks have no other palette: blocks have colours of plates")

    def _call(self, embodiment: str) -> Callable[[int], list[Attempt]]:
        return functools.partial(_simulate_range, embodiment, encode=self._encode, colors=self.colors)

    def _first_seed(self, embodiment: str, split: str) -> int:
        return first_long_seed(embodiment, split, self.seed)
