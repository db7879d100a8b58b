"""A stream of random batches made from a run's own spec: for smoke tests and throughput, without any data."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from octo_like.common.schema import BatchSpec, Tree, flatten, synthetic_batch, unflatten


class SyntheticStream:
    """Endless, seekable, the same on any number of processes: a `octo_like.common.streams.BatchStream`."""

    bad_counts: Mapping[str, int] = {}  # there are no records

    def __init__(
        self,
        spec: BatchSpec,
        batch_size: int,
        seed: int,
        vocab_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size % process_count:
            raise ValueError(f"{process_count} processes do not divide the batch size {batch_size}")
        self.batch_spec, self.position = spec, 0
        self._size, self._seed, self._vocab = batch_size, seed, vocab_size
        local = batch_size // process_count
        self._rows = slice(process_index * local, (process_index + 1) * local)
        self.order_spec: dict[str, Any] = {"synthetic": {"seed": seed, "batch_size": batch_size}}
        self.dataset_names: tuple[str, ...] = ("synthetic",)
        self.statistics = {"synthetic": _unit_statistics(spec)}

    def __iter__(self) -> Iterator[Tree]:
        return self

    def __next__(self) -> Tree:
        batch = self.batch(self.position // self._size)
        self.position += self._size
        return batch

    def batch(self, number: int) -> Tree:
        batch = synthetic_batch(
            self.batch_spec, self._size, self._seed * 1_000_003 + number, language_vocab=self._vocab
        )
        batch["sample_id"] = number * self._size + np.arange(self._size, dtype=np.int64)
        return unflatten({path: leaf[self._rows] for path, leaf in flatten(batch)})

    def seek(self, n: int) -> None:
        if n < 0 or n % self._size:
            raise ValueError(f"position {n} is not the beginning of a batch of {self._size}")
        self.position = n

    def adopt(self, saved: Mapping[str, Any]) -> None:
        """Nothing is derived."""

    def memory_line(self) -> str:
        return "random batches keep nothing in memory"

    def close(self) -> None:
        """Nothing to release."""


def _unit_statistics(spec: BatchSpec) -> dict[str, Any]:
    def unit(dim):
        zero, one = np.zeros(dim, np.float32), np.ones(dim, np.float32)
        return dict(mean=zero, std=one, min=-3 * one, max=3 * one, p01=-2 * one, p99=2 * one, mask=np.ones(dim, bool))

    stats: dict[str, Any] = {"action": unit(spec.action_dim), "num_transitions": 0, "num_trajectories": 0}
    if spec.proprio_dim is not None:
        stats["proprio"] = unit(spec.proprio_dim)
    if spec.extra_observations:
        stats["extra"] = {name: unit(math.prod(shape)) for name, shape in spec.extra_observations.items()}
    return stats
