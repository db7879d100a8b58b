"""Demonstrations of the simulators' scripted experts, as RLDS episodes. No TensorFlow here, no simulator either.

Seeds: task k (counted over all groups in the order of `GROUPS`) uses 1e6 k + i for training and 5e8 + 1e6 k + i for
validation, i = 0, 1, 2... Evaluation uses seeds of 1e9 and above. The first n episodes of a task are the same whatever
number is asked for, so 5 demonstrations are among the 50.
"""

import collections
import concurrent.futures
import io
import itertools
import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from octo_like.envs import EVALUATION_SEEDS
from octo_like.envs.sims import GROUPS
from octo_like.envs.sims.remote import SimulatorPool

JPEG_QUALITY = 95
SEEDS_PER_TASK = 1_000_000
FIRST_SEED = {"train": 0, "val": 500_000_000}
# Standard deviation of what is added to executed motions (not to the recorded actions), in units of the action space.
NOISE = {"metaworld": 0.1, "fetch": 0.05}
SPREAD = {"metaworld": 0.15, "fetch": 0.1}  # metres by which the hand's starting place varies, see `demonstrate`

_TASKS = [(group, task) for group, (_, tasks) in GROUPS.items() for task in tasks]
assert max(FIRST_SEED.values()) + len(_TASKS) * SEEDS_PER_TASK <= EVALUATION_SEEDS


def first_seed(group: str, task: str, split: str) -> int:
    """Seed of the first episode of a task in a split."""
    return FIRST_SEED[split] + SEEDS_PER_TASK * _TASKS.index((group, task))


def image_key(slot: str) -> str:
    """Name of a camera's images in the dataset: "image", "secondary_image"."""
    return "image" if slot == "primary" else f"{slot}_image"


def to_rlds(demonstration: dict[str, Any]) -> dict[str, Any]:
    """An episode of `simulation.demonstrate` with the steps and metadata of RLDS; images become JPEG files."""
    last = len(demonstration["observations"]) - 1
    steps = []
    for t, (seen, action) in enumerate(zip(demonstration["observations"], demonstration["actions"], strict=True)):
        images = {
            image_key(key.removeprefix("image_")): _jpeg(value)
            for key, value in seen.items()
            if key.startswith("image_")
        }
        steps.append(
            {
                "observation": {**images, "state": seen["proprio"]},
                "action": action,
                "language_instruction": demonstration["instruction"],
                "is_first": t == 0,
                "is_last": t == last,
                "is_terminal": t == last,
                "reward": float(t == last),
                "discount": float(t != last),
            }
        )
    metadata = {"seed": demonstration["seed"], "task": demonstration["task"], "success": True}
    return {"steps": steps, "episode_metadata": metadata}


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Full chroma resolution: at 64 x 64 a coloured marker is two pixels wide.
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


class Demonstrator:
    """Makes episodes in `processes` simulator processes; what it makes does not depend on how many.

    Use as a context manager. `failed` counts the expert episodes that were left out, by (group, task, split).
    """

    def __init__(self, processes: int = 1):
        self._count = processes
        self.failed: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self._pool: SimulatorPool | None = None

    def __enter__(self) -> "Demonstrator":
        self._pool = SimulatorPool(self._count)
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        for process in self._pool.processes:
            self._free.put(process)
        self._threads = concurrent.futures.ThreadPoolExecutor(self._count)
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()

    def episodes(self, group: str, split: str, per_task: int) -> Iterator[dict[str, Any]]:
        """Yields `per_task` successful episodes of every task of a group, in RLDS form, task by task.

        Raises:
          RuntimeError: an expert fails more often than not.
        """
        for task in GROUPS[group][1]:
            yield from self._of_task(group, task, split, per_task)

    def _of_task(self, group: str, task: str, split: str, count: int) -> Iterator[dict[str, Any]]:
        seeds = itertools.count(first_seed(group, task, split))
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        made = 0
        try:
            while made < count:
                # A little ahead of the writer, in the order of the seeds.
                while len(pending) < min(2 * self._count, count - made):
                    pending.append(self._threads.submit(self._demonstrate, group, task, next(seeds)))
                demonstration = pending.popleft().result()
                if demonstration["success"]:
                    made += 1
                    yield to_rlds(demonstration)
                    continue
                self.failed[group, task, split] += 1
                if self.failed[group, task, split] > 20 + count:
                    raise RuntimeError(f"{group}: the expert of {task!r} fails more often than not")
        finally:
            for future in pending:
                future.cancel()

    def _demonstrate(self, group: str, task: str, seed: int) -> dict[str, Any]:
        process = self._free.get()
        try:
            simulator = GROUPS[group][0]
            return process.call("demonstrate", group, task, seed, NOISE[simulator], SPREAD[simulator])
        finally:
            self._free.put(process)
