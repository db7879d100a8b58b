"""Demonstrations of the tabletop experts, as plain dicts. No TensorFlow: worker processes import this module only.

Seeds: dataset k (0 to 3, in the order of `EMBODIMENTS`) of data seed s uses 1e7 k + 1e5 s + i for training and
5e8 + 1e7 k + 1e5 s + i for validation, i = 0, 1, 2... Evaluation uses seeds of 1e9 and above, so no evaluated scene was
demonstrated. Scenes that ask for a pair of `language.HELD_OUT_PAIRS`, or what else `Colors` excludes, are passed over.
"""

import collections
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from octo_like.envs.colors import Colors
from octo_like.envs.embodiments import EMBODIMENTS
from octo_like.envs.pool import EPISODES_PER_CALL, Attempt, SeedPool
from octo_like.envs.tabletop import EVALUATION_SEEDS, TabletopEnv

IMAGE_SIZE, WRIST_SIZE = 64, 32
JPEG_QUALITY = 95
SEEDS_PER_DATASET, SEEDS_PER_RUN = 10_000_000, 100_000
FIRST_SEED = {"train": 0, "val": 500_000_000}
assert max(FIRST_SEED.values()) + len(EMBODIMENTS) * SEEDS_PER_DATASET <= EVALUATION_SEEDS


def first_seed(embodiment: str, split: str, seed: int = 0) -> int:
    """Environment seed of the first episode of a split. `seed`: of the data; others give other episodes.

    Raises:
      ValueError: a seed that has no range of its own.
    """
    most = SEEDS_PER_DATASET // SEEDS_PER_RUN
    if not 0 <= seed < most:
        raise ValueError(f"data seed {seed}; valid: 0 to {most - 1}")
    return FIRST_SEED[split] + SEEDS_PER_DATASET * list(EMBODIMENTS).index(embodiment) + SEEDS_PER_RUN * seed


@functools.cache
def _environment(embodiment: str, render: bool = True) -> TabletopEnv:
    return TabletopEnv(embodiment, IMAGE_SIZE, WRIST_SIZE, bumps=True, render_images=render)


def is_held_out(
    embodiment: str,
    seed: int,
    colors: Colors = Colors(),  # noqa: B008  (frozen)
) -> bool:
    """Whether the scene of an environment seed asks for what no demonstration may: a block, or a block and a plate."""
    env = _environment(embodiment, render=False)
    if not env.embodiment.grasps and not colors.unnamed:
        return False
    env.reset(seed=seed, options={"palette": colors.palette})
    return not colors.may_name(env.goal.target, env.goal.plate)


def jpeg(image: np.ndarray) -> bytes:
    """An image as the datasets store it."""
    buffer = io.BytesIO()
    # Full chroma resolution: at 64 x 64 a block is six pixels wide and its colour is what the words are about.
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def points(env: TabletopEnv) -> dict[str, np.ndarray]:
    """Where the things named in the instruction are in the primary image: {name: (2,) float32}, column and row as
    fractions of the image; NaN for a plate that is not named."""
    places: dict[str, Any] = {"target_point": env.world.block(env.goal.target).xy}
    places["plate_point"] = env.world.plate(env.goal.plate).xy if env.goal.plate else (np.nan, np.nan)
    return {name: np.array(env.project(*xy), np.float32) / env.image_size for name, xy in places.items()}


def simulate(
    embodiment: str,
    seed: int,
    encode: Callable[[np.ndarray], Any] = jpeg,
    palette: Sequence[str] | None = None,
) -> dict[str, Any] | None:
    """One expert episode in RLDS form, or None when the expert failed.

    The last step holds the final observation, and the action with which the expert would go on from there.

    Args:
      encode: of each image, (h, w, 3) uint8 to what the step holds.
      palette: see the reset option of this name.
    """
    return record(_environment(embodiment), seed, encode, {"palette": palette})


def record(
    env: TabletopEnv,
    seed: int,
    encode: Callable[[np.ndarray], Any],
    options: dict[str, Any],
    *,
    places: Callable[[Any], dict[str, np.ndarray]] = points,
    words: Callable[[Mapping[str, Any]], dict[str, str]] = lambda info: {},
) -> dict[str, Any] | None:
    """`simulate` in an environment.

    Args:
      places: observations that are computed from the environment.
      words: further texts of a step, from the environment's info.
    """
    observation, info = env.reset(seed=seed, options=options)
    expert = env.expert(np.random.default_rng([seed, 0xE4]))
    steps: list[dict[str, Any]] = []
    done, reward = False, 0.0
    while True:
        images = {"image": encode(observation["image_primary"])}
        if "image_wrist" in observation:
            images["wrist_image"] = encode(observation["image_wrist"])
        if "proprio" in observation:
            images["state"] = observation["proprio"]
        images |= places(env)
        action = expert.act()
        steps.append(
            {
                "observation": images,
                "action": action,
                "language_instruction": info["instruction"],
                **words(info),
                "is_first": not steps,
                "is_last": done,
                "is_terminal": done and info["success"],
                "reward": reward,
                "discount": 0.0 if done and info["success"] else 1.0,
            }
        )
        if done:
            break
        observation, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    if not info["success"]:
        return None
    return {"steps": steps, "episode_metadata": {"seed": seed, "task": info["task"], "success": True}}


def as_it_is(image: np.ndarray) -> np.ndarray:
    """For `simulate`: images as arrays."""
    return image


def _simulate_range(
    embodiment: str,
    start: int,
    encode: Callable,
    colors: Colors = Colors(),  # noqa: B008  (frozen)
) -> list[Attempt]:
    seeds = [seed for seed in range(start, start + EPISODES_PER_CALL) if not is_held_out(embodiment, seed, colors)]
    return [(seed, simulate(embodiment, seed, encode, colors.palette)) for seed in seeds]


class Simulator(SeedPool):
    """Makes episodes in this process (workers=0) or in `workers` others; what it makes does not depend on how many.

    Use as a context manager. `failed` counts the expert episodes that were left out, by (embodiment, split).

    Args:
      seed: of the data, see `first_seed`.
      encode: see `simulate`; importable, when there are workers.
      colors: of the blocks, and which of them are asked for.
    """

    def __init__(
        self,
        workers: int = 0,
        seed: int = 0,
        encode: Callable[[np.ndarray], Any] = jpeg,
        colors: Colors = Colors(),  # noqa: B008  (frozen)
    ):
        super().__init__(workers)
        self.seed, self.colors, self._encode = seed, colors, encode
        self.failed: collections.Counter[tuple[str, str]] = collections.Counter()

    def _call(self, embodiment: str) -> Callable[[int], list[Attempt]]:
        return functools.partial(_simulate_range, embodiment, encode=self._encode, colors=self.colors)

    def _first_seed(self, embodiment: str, split: str) -> int:
        return first_seed(embodiment, split, self.seed)

    def episodes(self, embodiment: str, split: str, count: int) -> Iterator[dict[str, Any]]:
        """Yields `count` successful episodes in the order of their seeds."""
        made = 0
        for seed, episode in self.attempts(self._call(embodiment), self._first_seed(embodiment, split), count):
            if made == count:
                return
            if episode is None:
                self.failed[embodiment, split] += 1
                if self.failed[embodiment, split] > 20 + count:
                    raise RuntimeError(f"the {embodiment} expert fails more often than not (last seed {seed})")
                continue
            made += 1
            yield episode


def generate(name: str, split: str, count: int, *, seed: int, workers: int) -> Iterator[dict[str, Any]]:
    """Episodes with their images as arrays, for `data.kind="memory"`.

    Args:
      name: of the dataset, "tabletop_<embodiment>".
      split: "train" or "val".
      seed, workers: see `Simulator`.
    """
    valid = [f"tabletop_{embodiment}" for embodiment in EMBODIMENTS]
    if name not in valid:
        raise ValueError(f"the built-in world makes no {name!r}; valid: {', '.join(valid)}")
    with Simulator(workers, seed, as_it_is) as simulator:
        yield from simulator.episodes(name.removeprefix("tabletop_"), split, count)
