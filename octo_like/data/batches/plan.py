"""From a mixture and its settings to an order: which numbers were given, and which are derived from this start."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from octo_like.common.lanes import default_lanes
from octo_like.common.schema import BatchSpec
from octo_like.data.batches import memory
from octo_like.data.order import order as order_lib
from octo_like.data.rlds.prepare import PreparedDataset
from octo_like.data.spec import DataError, suggest


@dataclasses.dataclass(frozen=True)
class OrderPlan:
    """What an order is made of, and which of it was given rather than derived.

    Attributes:
      weights: share of the samples of each dataset.
      num_lanes: as given; None: derived from the batch size.
      mixed: episodes to mix as given; None: derived from host_memory_gb.
      max_visits: see `memory.plan_visits`.
    """

    datasets: Mapping[str, PreparedDataset]
    weights: Mapping[str, float]
    seed: int
    batch_size: int
    num_lanes: int | None
    mixed: Mapping[str, int] | None
    max_visits: int
    process_index: int
    process_count: int
    host_memory_gb: float
    slots: Collection[str]
    depth_slots: Collection[str]

    @property
    def _cameras(self) -> dict[str, Collection[str]]:
        return {"slots": self.slots, "depth_slots": self.depth_slots}

    def make(self, num_lanes: int | None = None, mixed: Mapping[str, int] | None = None) -> order_lib.Order:
        """The order, with derived values replaced by those that are passed."""
        lanes = num_lanes or self.num_lanes or default_lanes(self.batch_size)
        mixed = mixed or self.mixed
        try:
            if mixed is None:
                mixed = memory.plan_mixed(
                    self.datasets, self.weights, host_memory_gb=self.host_memory_gb, **self._cameras
                )
            order = self._order(lanes, mixed)
            order.batch_rows(0, self.process_index, self.process_count)  # raises here rather than in a thread
        except DataError:
            raise
        except ValueError as error:
            raise DataError(str(error)) from error
        return order

    def _order(self, lanes: int, mixed: Mapping[str, int]) -> order_lib.Order:
        visits = memory.plan_visits(self.datasets, self.weights, mixed, max_visits=self.max_visits)
        frames = [
            order_lib.DatasetFrames(
                name,
                self.weights[name],
                d.train.frames,
                d.train.hash,
                mixed[name],
                d.spec.subsample_length,
                visits[name],
            )
            for name, d in self.datasets.items()
        ]
        return order_lib.Order(frames, seed=self.seed, batch_size=self.batch_size, num_lanes=lanes)

    def stored_bytes(self, order: order_lib.Order) -> float:
        """Bytes of the encoded episodes that this process mixes: those of the walks that its lanes take part in."""
        lanes = np.arange(order.num_lanes).reshape(self.process_count, -1)[self.process_index]
        here = {
            data.name: len(np.unique(order.walk_of(d, lanes))) / int(order.num_walks[d])
            for d, data in enumerate(order.datasets)
        }
        mixed = {data.name: data.episodes_mixed for data in order.datasets}
        return memory.expected_bytes(self.datasets, self.weights, mixed, here, **self._cameras)


def batch_bytes(spec: BatchSpec, rows: int) -> int:
    """Bytes of the decoded frames and the other sensors of `rows` samples."""
    frames = {slot: spec.window_size + (slot in spec.goal_images) for slot in spec.image_sizes}
    images = sum(3 * h * w * frames[slot] for slot, (h, w) in spec.image_sizes.items())
    depths = sum(4 * h * w * spec.window_size for h, w in spec.depth_sizes.values())
    sensors = sum(4 * math.prod(shape) * spec.window_size for shape in spec.extra_observations.values())
    return rows * (images + depths + sensors)


def mixed_episodes(given: int | Mapping[str, int] | None, names: Mapping[str, Any]) -> dict[str, int] | None:
    """Episodes to mix of each dataset as given; None: to be derived."""
    if given is None or isinstance(given, int):
        return None if given is None else dict.fromkeys(names, given)
    given = dict(given)
    wrong = sorted(set(given) ^ set(names))
    if wrong:
        raise DataError(f"episodes_mixed: {wrong[0]!r} is not in both it and the mixture; {suggest(wrong[0], names)}")
    return {name: int(value) for name, value in given.items()}
