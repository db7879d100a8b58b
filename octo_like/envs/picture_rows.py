"""Rows of pictures and words: a moment of an expert's episode, a question about it and the answer. No TensorFlow.

Seeds: data seed s uses 2e8 + 1e6 s + i for training and 7e8 + 1e6 s + i for validation, which neither robots' datasets
nor evaluation use. A seed whose picture hides something, or gives no question of its kind, is passed over.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from octo_like.envs.colors import ALL_BLOCK_COLORS, Colors
from octo_like.envs.demonstrations import IMAGE_SIZE, jpeg
from octo_like.envs.embodiments import EMBODIMENTS
from octo_like.envs.long import LONG_EMBODIMENTS, LongTabletopEnv
from octo_like.envs.picture import Picture, take
from octo_like.envs.picture_words import KINDS, Row, ask
from octo_like.envs.pool import EPISODES_PER_CALL, Attempt, SeedPool
from octo_like.envs.tabletop import EVALUATION_SEEDS, TabletopEnv

SEEDS_PER_RUN, RUNS = 1_000_000, 100
FIRST_SEED = {"train": 200_000_000, "val": 700_000_000}
assert max(FIRST_SEED.values()) + SEEDS_PER_RUN * RUNS <= EVALUATION_SEEDS

ROBOTS = ("gripper", "arm")
PICTURE_COLORS = Colors(ALL_BLOCK_COLORS, unnamed_pairs=frozenset())
LONG_SHARE = 0.25  # of pictures from episodes of long tasks, which have more plates
# Shares of moments at which a picture is taken: before the first step, after the last, soon after a block was taken up,
# at any other.
MOMENTS = {"start": 0.2, "end": 0.3, "holding": 0.25, "any": 0.25}


def first_seed(split: str, seed: int = 0) -> int:
    """Seed of the first row of a split. `seed`: of the data; others give other rows.

    Raises:
      ValueError: a seed that has no range of its own.
    """
    if not 0 <= seed < RUNS:
        raise ValueError(f"data seed {seed}; valid: 0 to {RUNS - 1}")
    return FIRST_SEED[split] + SEEDS_PER_RUN * seed


@functools.cache
def _environment(robot: str, long: bool) -> TabletopEnv:
    kind = LongTabletopEnv if long else TabletopEnv
    return kind(robot, image_size=IMAGE_SIZE, bumps=True, render_images=False)


def picture(seed: int, robots: Sequence[str] = ROBOTS, colors: Colors = PICTURE_COLORS) -> Picture | None:
    """A moment of an expert's episode; None when something in it is hidden."""
    rng = np.random.default_rng([seed, 0x91])
    robot = robots[int(rng.integers(len(robots)))]
    # Blocks of long tasks have the colours of the plates they belong to: they are not painted.
    long = robot in LONG_EMBODIMENTS and rng.random() < LONG_SHARE
    env = _environment(robot, long)
    when = rng.choice(list(MOMENTS), p=list(MOMENTS.values()))
    task = "pick_and_place" if when == "holding" and env.embodiment.grasps else None
    _, info = env.reset(seed=seed, options=None if long else {"palette": colors.palette, "task": task})
    last = {"start": 0, "end": env.max_steps, "holding": env.max_steps}.get(
        when, int(rng.integers(1, 70 if long else 24))
    )
    carried = int(rng.integers(0, 5))
    expert, done, steps = env.expert(rng), False, 0
    while not done and steps < last:
        _, _, terminated, truncated, info = env.step(expert.act())
        done, steps = terminated or truncated, steps + 1
        if when == "holding" and env.world.held is not None:
            last = min(last, steps + carried)
    if long and colors.palette and not {block.color for block in env.world.blocks} <= set(colors.palette):
        return None
    return take(env, info)


def row(
    seed: int, kinds: Sequence[str] = KINDS, robots: Sequence[str] = ROBOTS, colors: Colors = PICTURE_COLORS
) -> tuple[Picture, Row] | None:
    """The picture and the question of a seed, or None when it has none."""
    seen = picture(seed, robots, colors)
    if seen is None:
        return None
    rng = np.random.default_rng([seed, 0x92])
    asked = ask(seen, kinds[int(rng.integers(len(kinds)))], rng, colors)
    return None if asked is None else (seen, asked)


def episode(seed: int, found: tuple[Picture, Row], encode: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """A row in RLDS form: an episode of one step, without an action. The points are those of the robots' datasets: of
    the block and the plate that are named, column and row as fractions of the image, NaN where none is."""
    seen, asked = found
    places = {"target_point": asked.block, "plate_point": asked.plate}
    nowhere = (np.nan, np.nan)
    step = {
        "observation": {
            "image": encode(seen.image),
            **{name: np.array((place or nowhere)[::-1], np.float32) for name, place in places.items()},
        },
        "language_instruction": asked.prompt,
        "answer": asked.answer,
        "is_first": True,
        "is_last": True,
        "is_terminal": True,
        "reward": 0.0,
        "discount": 0.0,
    }
    return {"steps": [step], "episode_metadata": {"kind": asked.kind, "seed": seed}}


def _rows(
    start: int, kinds: Sequence[str], robots: Sequence[str], colors: Colors, encode: Callable[[np.ndarray], Any]
) -> list[Attempt]:
    seeds = range(start, start + EPISODES_PER_CALL)
    rows = ((seed, row(seed, kinds, robots, colors)) for seed in seeds)
    return [(seed, None if found is None else episode(seed, found, encode)) for seed, found in rows]


class PictureSimulator(SeedPool):
    """Makes rows in this process (workers=0) or in `workers` others. Use as a context manager.

    `passed_over` counts the seeds that gave no row, by split.

    Args:
      seed: of the data, see `first_seed`.
      kinds: of questions, each as often.
      robots: whose hands are in the pictures.
      colors: of the blocks, and which of them the words name.
      encode: of each image, (h, w, 3) uint8 to what the step holds; importable, when there are workers.

    Raises:
      ValueError: an unknown kind or robot, or none.
    """

    def __init__(
        self,
        workers: int = 0,
        seed: int = 0,
        *,
        kinds: Sequence[str] = KINDS,
        robots: Sequence[str] = ROBOTS,
        colors: Colors = PICTURE_COLORS,
        encode: Callable[[np.ndarray], Any] = jpeg,
    ):
        super().__init__(workers)
        for what, given, valid in (("kind", kinds, KINDS), ("robot", robots, tuple(EMBODIMENTS))):
            unknown = [one for one in given if one not in valid]
            if unknown or not given:
                which = f"unknown {what} {unknown[0]!r}" if unknown else f"no {what}"
                raise ValueError(f"{which}; valid: {', '.join(valid)}")
        self.seed, self.kinds, self.robots = seed, tuple(kinds), tuple(robots)
        self.colors, self._encode = colors, encode
        self.passed_over: collections.Counter[str] = collections.Counter()

    def rows(self, split: str, count: int) -> Iterator[dict[str, Any]]:
        """Yields `count` rows in the order of their seeds."""
        made = 0
        call = functools.partial(_rows, kinds=self.kinds, robots=self.robots, colors=self.colors, encode=self._encode)
        for seed, found in self.attempts(call, first_seed(split, self.seed), count):
            if made == count:
                return
            if found is not None:
                made += 1
                yield found
                continue
            self.passed_over[split] += 1
            if self.passed_over[split] > 1000 + 20 * count:
                raise RuntimeError(f"hardly a picture gives a question of {self.kinds} (last seed {seed})")

    def record(self) -> dict[str, Any]:
        """For the dataset's metadata: what the rows depend on."""
        return {"seed": self.seed, "kinds": list(self.kinds), "robots": list(self.robots), **self.colors.record()}
