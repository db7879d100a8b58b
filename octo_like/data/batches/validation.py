"""Finite batches of the episodes that are held out."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from octo_like.common.schema import BatchSpec, Tree
from octo_like.common.text import TextTokenizer
from octo_like.data.batches.assemble import Request, TaskOptions
from octo_like.data.batches.reader import HostOptions, Reader, prepare_mixture
from octo_like.data.order import order as order_lib
from octo_like.data.rlds.bad_records import MAX_BAD_FRACTION
from octo_like.data.rlds.prepare import PreparedDataset
from octo_like.data.spec import DataError, DatasetSpec


class ValIterator:
    """Finite batches of the validation episodes of one dataset, the same every time it is iterated.

    Frames are taken in a keyed order that depends on the data alone. All batches are full: a last partial one is left
    out, and a dataset with fewer frames than one batch repeats them. `len()` is the number of batches.
    """

    def __init__(
        self,
        dataset_id: int,
        prepared: PreparedDataset,
        reader: Reader,
        batch_size: int,
        max_batches: int | None,
        process_index: int,
        process_count: int,
    ):
        if batch_size % process_count:
            raise DataError(f"{process_count} processes do not divide the validation batch size {batch_size}")
        self.name, self._index = prepared.key, prepared.val
        frames = prepared.val.frames.astype(np.int64)
        self.num_frames, self.num_episodes = int(frames.sum()), len(frames)
        self._dataset_id, self._reader, self._batch_size = dataset_id, reader, batch_size
        self._rows = np.arange(process_index, process_index + 1) * (batch_size // process_count)
        self._local = batch_size // process_count
        episode = np.repeat(np.arange(len(frames)), frames)
        frame = np.arange(len(episode)) - np.repeat(np.cumsum(frames) - frames, frames)
        ranked = order_lib.permutation(len(episode), "validation", prepared.val.hash)
        self._episode, self._frame = episode[ranked], frame[ranked]
        available = max(1, len(episode) // batch_size)
        self._num_batches = available if max_batches is None else min(available, max_batches)
        self._key = order_lib.hash_key("validation", prepared.val.hash, np.arange(len(episode)))

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Tree]:
        for number in range(self._num_batches):
            position = number * self._batch_size + int(self._rows[0]) + np.arange(self._local)
            rows = position % len(self._episode)
            dataset = np.full(self._local, self._dataset_id, np.int32)
            step = self._index.step_of(self._episode[rows], self._frame[rows])
            request = Request(position, dataset, self._episode[rows], step, self._key[rows])
            yield self._reader.assemble(request, self._substitute(position))

    def _substitute(self, position: np.ndarray) -> Callable[[int, int], tuple[int, int]]:
        """Keyed substitutes from all validation frames of the dataset."""

        def substitute(row: int, attempt: int) -> tuple[int, int]:
            key = order_lib.hash_key("validation substitute", self._index.hash, int(position[row]), attempt)
            chosen = int(key % np.uint64(len(self._episode)))
            step = self._index.step_of(self._episode[chosen : chosen + 1], self._frame[chosen : chosen + 1])
            return int(self._episode[chosen]), int(step[0])

        return substitute


def make_val_iterators(
    specs: Mapping[str, DatasetSpec | PreparedDataset | Mapping[str, Any]],
    batch_spec: BatchSpec,
    text_tokenizer: TextTokenizer | None,
    *,
    data_dir: str | None = None,
    batch_size: int,
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    decode: str = "parity",
    keep_goal_prob: float = 0.5,
    max_goal_distance: int | None = None,
    octo_compat: bool = False,
    cache_dir: str | None = None,
    host_threads: int = 2,
    host_memory_gb: float = 0.5,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    progress: bool = True,
) -> dict[str, ValIterator]:
    """Validation data per dataset, {name: ValIterator}; datasets without validation episodes are left out.

    Nothing is dropped or paraphrased. It has a store of its own: validating never moves or slows the training stream.
    Values are normalised with the statistics of the training episodes. Arguments as in `make_train_stream`; dataset ids
    are those of `specs`.
    """
    datasets = prepare_mixture(
        specs, data_dir, cache_dir, progress, max_bad_fraction=max_bad_fraction, process_index=process_index
    )
    sources = [(prepared, prepared.val) for prepared in datasets.values()]
    task = TaskOptions(keep_goal_prob, max_goal_distance, octo_compat)
    host = HostOptions(threads=host_threads, memory_gb=host_memory_gb, max_bad_fraction=max_bad_fraction)
    reader = Reader(sources, batch_spec, text_tokenizer, task, decode, host, None)
    return {
        name: ValIterator(i, prepared, reader, batch_size, max_batches, process_index, process_count)
        for i, (name, prepared) in enumerate(datasets.items())
        if prepared.val.frames.sum()
    }
