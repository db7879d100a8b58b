"""From a mixture and its settings to an order: which numbers were given, and which are derived from this start."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from octo_like.common.lanes import Processes, default_lanes
from octo_like.common.schema import BatchSpec
from octo_like.data.batches import memory
from octo_like.data.order import order as order_lib
from octo_like.data.prepared import PreparedDataset
from octo_like.data.settings import Settings
from octo_like.data.spec import DataError, suggest


@dataclasses.dataclass(frozen=True)
class OrderPlan:
    """What an order is made of. `settings.order` says which of it was given rather than derived.

    Attributes:
      weights: share of the samples of each dataset.
      mixed: episodes to mix of each dataset as given; None: derived from host_memory_gb.
    """

    datasets: Mapping[str, PreparedDataset]
    weights: Mapping[str, float]
    mixed: Mapping[str, int] | None
    batch_spec: BatchSpec
    settings: Settings
    processes: Processes

    @classmethod
    def of(
        cls,
        datasets: Mapping[str, PreparedDataset],
        batch_spec: BatchSpec,
        settings: Settings,
        processes: Processes,
    ) -> "OrderPlan":
        """Raises DataError when the weights or `episodes_mixed` are not valid for the datasets."""
        mixed = _mixed_episodes(settings.order.episodes_mixed, datasets)
        weights = _weights(datasets, settings.order.balance_weights)
        return cls(datasets, weights, mixed, batch_spec, settings, processes)

    @property
    def _cameras(self) -> dict[str, tuple[str, ...]]:
        return {"slots": tuple(self.batch_spec.image_sizes), "depth_slots": tuple(self.batch_spec.depth_sizes)}

    @property
    def batch_bytes(self) -> int:
        """Bytes of the decoded frames and the other sensors of this process's rows of a batch."""
        spec, rows = self.batch_spec, -(-self.settings.order.batch_size // self.processes.count)
        frames = {slot: spec.window_size + (slot in spec.goal_images) for slot in spec.image_sizes}
        images = sum(3 * h * w * frames[slot] for slot, (h, w) in spec.image_sizes.items())
        depths = sum(4 * h * w * spec.window_size for h, w in spec.depth_sizes.values())
        sensors = sum(4 * math.prod(shape) * spec.window_size for shape in spec.extra_observations.values())
        return rows * (images + depths + sensors)

    def make(self, num_lanes: int | None = None, mixed: Mapping[str, int] | None = None) -> order_lib.Order:
        """The order, with derived values replaced by those that are passed."""
        options = self.settings.order
        lanes = num_lanes or options.num_lanes or default_lanes(options.batch_size)
        mixed = mixed or self.mixed
        try:
            if mixed is None:
                memory_gb = self.settings.host.host_memory_gb
                mixed = memory.plan_mixed(self.datasets, self.weights, host_memory_gb=memory_gb, **self._cameras)
            order = self._order(lanes, mixed)
            order.batch_rows(0, *self.processes)  # raises here rather than in a thread
        except DataError:
            raise
        except ValueError as error:
            raise DataError(str(error)) from error
        return order

    def _order(self, lanes: int, mixed: Mapping[str, int]) -> order_lib.Order:
        options = self.settings.order
        visits = memory.plan_visits(self.datasets, self.weights, mixed, max_visits=options.max_visits)
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
        return order_lib.Order(frames, seed=options.seed, batch_size=options.batch_size, num_lanes=lanes)

    def stored_bytes(self, order: order_lib.Order) -> float:
        """Bytes of the encoded episodes that this process mixes: those of the walks that its lanes take part in."""
        lanes = np.arange(order.num_lanes).reshape(self.processes.count, -1)[self.processes.index]
        here = {
            data.name: len(np.unique(order.walk_of(d, lanes))) / int(order.num_walks[d])
            for d, data in enumerate(order.datasets)
        }
        mixed = {data.name: data.episodes_mixed for data in order.datasets}
        return memory.expected_bytes(self.datasets, self.weights, mixed, here, **self._cameras)


def _mixed_episodes(given: int | Mapping[str, int] | None, names: Mapping[str, Any]) -> dict[str, int] | None:
    """Episodes to mix of each dataset as given; None: to be derived."""
    if given is None or isinstance(given, int):
        return None if given is None else dict.fromkeys(names, given)
    given = dict(given)
    wrong = sorted(set(given) ^ set(names))
    if wrong:
        raise DataError(f"episodes_mixed: {wrong[0]!r} is not in both it and the mixture; {suggest(wrong[0], names)}")
    return {name: int(value) for name, value in given.items()}


def _weights(datasets: Mapping[str, PreparedDataset], balance: bool) -> dict[str, float]:
    """The share of the samples of each dataset; times its usable frames when they are balanced."""
    weights = {name: d.spec.weight for name, d in datasets.items()}
    if balance:
        if unknown := [name for name, d in datasets.items() if not d.seekable]:
            raise DataError(
                f"{unknown[0]}: a source's size is not known, so balance_weights=True has no meaning for it"
            )
        sizes = [int(d.train.frames.sum(dtype=np.int64)) for d in datasets.values()]
        if not any(weight * size for weight, size in zip(weights.values(), sizes, strict=True)):
            counted = ", ".join(f"{name}: {w:g} x {n:,}" for (name, w), n in zip(weights.items(), sizes, strict=True))
            raise DataError(f"balance_weights: weight times usable training steps is 0 for all datasets ({counted})")
        balanced = order_lib.balanced_weights(list(weights.values()), sizes).tolist()
        weights = dict(zip(weights, balanced, strict=True))
    if not any(weights.values()):
        raise DataError(f"the weight of every dataset is 0 ({', '.join(weights)}); at least one must be positive")
    return weights
