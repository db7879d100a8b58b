"""Demonstrations of the tabletop experts, as plain dicts. No TensorFlow: worker processes import this module only.

Seeds: dataset k (0 to 3, in the order of `EMBODIMENTS`) uses 1e7 k + i for training and 5e8 + 1e7 k + i
for validation, i = 0, 1, 2... Evaluation uses seeds of 1e9 and above, so no evaluated scene was demonstrated.
"""

import collections
import concurrent.futures
import functools
import io
import itertools
import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from octo_like.envs import EMBODIMENTS, EVALUATION_SEEDS, TabletopEnv

IMAGE_SIZE, WRIST_SIZE = 64, 32
JPEG_QUALITY = 95
SEEDS_PER_DATASET = 10_000_000
FIRST_SEED = {"train": 0, "val": 500_000_000}
assert max(FIRST_SEED.values()) + len(EMBODIMENTS) * SEEDS_PER_DATASET <= EVALUATION_SEEDS

EPISODES_PER_CALL = 8  # a worker's unit of work: small enough for an even load, large enough to hide the calls


def first_seed(embodiment: str, split: str) -> int:
    """Seed of the first episode of a split."""
    return FIRST_SEED[split] + SEEDS_PER_DATASET * list(EMBODIMENTS).index(embodiment)


@functools.cache
def _environment(embodiment: str) -> TabletopEnv:
    return TabletopEnv(embodiment, IMAGE_SIZE, WRIST_SIZE, bumps=True)


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Full chroma resolution: at 64 x 64 a block is six pixels wide and its colour is what the words are about.
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def simulate(embodiment: str, seed: int) -> dict[str, Any] | None:
    """One expert episode in RLDS form, or None when the expert failed.

    The last step holds the final observation, and the action with which the expert would go on from there.
    """
    env = _environment(embodiment)
    observation, info = env.reset(seed=seed)
    expert = env.expert(np.random.default_rng([seed, 0xE4]))
    steps, done, reward = [], False, 0.0
    while True:
        images = {"image": _jpeg(observation["image_primary"])}
        if "image_wrist" in observation:
            images["wrist_image"] = _jpeg(observation["image_wrist"])
        if "proprio" in observation:
            images["state"] = observation["proprio"]
        action = expert.act()
        steps.append(
            {
                "observation": images,
                "action": action,
                "language_instruction": info["instruction"],
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


def _simulate_range(embodiment: str, start: int) -> list[tuple[int, dict[str, Any] | None]]:
    return [(seed, simulate(embodiment, seed)) for seed in range(start, start + EPISODES_PER_CALL)]


class Simulator:
    """Makes episodes in this process (workers=0) or in `workers` others; what it makes does not depend on how many.

    Use as a context manager. `failed` counts the expert episodes that were left out, by (embodiment, split).
    """

    def __init__(self, workers: int = 0):
        self.workers = workers
        self.failed: collections.Counter[tuple[str, str]] = collections.Counter()
        self._pool = None

    def __enter__(self) -> "Simulator":
        if self.workers:
            # Spawned, not forked: the parent has imported TensorFlow, whose threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self.workers, mp_context=context)
        return self

    def __exit__(self, *exc) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def episodes(self, embodiment: str, split: str, count: int) -> Iterator[dict[str, Any]]:
        """Yields `count` successful episodes in the order of their seeds."""
        made = 0
        for seed, episode in self._attempts(embodiment, first_seed(embodiment, split), count):
            if made == count:
                return
            if episode is None:
                self.failed[embodiment, split] += 1
                if self.failed[embodiment, split] > 20 + count:
                    raise RuntimeError(f"the {embodiment} expert fails more often than not (last seed {seed})")
                continue
            made += 1
            yield episode

    def _attempts(self, embodiment: str, start: int, count: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
        starts = itertools.count(start, EPISODES_PER_CALL)
        if self._pool is None:
            for first in starts:
                for seed in range(first, first + EPISODES_PER_CALL):
                    yield seed, simulate(embodiment, seed)
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        asked = taken = 0
        try:
            while True:
                # Ahead of the writer by a few calls, but not far beyond what is asked for.
                while len(pending) < 4 * self.workers and (asked < count or not pending):
                    pending.append(self._pool.submit(_simulate_range, embodiment, next(starts)))
                    asked += EPISODES_PER_CALL
                for item in pending.popleft().result():
                    yield item
                    taken += 1
        finally:
            for future in pending:
                future.cancel()
