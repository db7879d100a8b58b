"""Finite batches of the episodes that are held out for validation."""

from collections.abc import Iterator, Mapping

import numpy as np

from octo_like.common.lanes import ONE_PROCESS, Processes
from octo_like.common.schema import BatchSpec, Tree
from octo_like.common.text import TextTokenizer
from octo_like.common.vocabularies import NO_TARGETS, Targets
from octo_like.data.batches.assemble import Request, Substitute
from octo_like.data.batches.reader import Reader
from octo_like.data.batches.texts import Texts
from octo_like.data.order import order as order_lib
from octo_like.data.prepared import PreparedDataset
from octo_like.data.settings import Settings
from octo_like.data.spec import DataError


class ValIterator:
    """Finite batches of the validation episodes of one dataset, the same every time it is iterated.

    Frames are taken in a keyed order that depends on the data alone. All batches are full: a last partial one is left
    out, and a dataset with fewer frames than one batch repeats them. `len()` is the number of batches.
    """

    def __init__(self, dataset_id: int, reader: Reader, batch_size: int, max_batches: int | None, processes: Processes):
        if batch_size % processes.count:
            raise DataError(f"{processes.count} processes do not divide the validation batch size {batch_size}")
        prepared = reader.sets[dataset_id].prepared
        self.name, self._hash = prepared.key, prepared.val.hash
        frames = prepared.val.frames.astype(np.int64)
        self.num_frames, self.num_episodes = int(frames.sum()), len(frames)
        self._dataset_id, self._reader, self._batch_size = dataset_id, reader, batch_size
        local = batch_size // processes.count
        self._rows = processes.index * local + np.arange(local)
        episode = np.repeat(np.arange(len(frames)), frames)
        frame = np.arange(len(episode)) - np.repeat(np.cumsum(frames) - frames, frames)
        ranked = order_lib.permutation(len(episode), "validation", self._hash)
        self._episode, self._frame = episode[ranked], frame[ranked]
        available = max(1, len(episode) // batch_size)
        self._num_batches = available if max_batches is None else min(available, max_batches)
        self._key = order_lib.hash_key("validation", self._hash, np.arange(len(episode)))

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Tree]:
        for number in range(self._num_batches):
            yield self._at(number * self._batch_size + self._rows)

    def _at(self, position: np.ndarray) -> Tree:
        rows = position % len(self._episode)
        dataset = np.full(len(rows), self._dataset_id, np.int32)
        request = Request(position, dataset, self._episode[rows], self._frame[rows], self._key[rows])
        return self._reader.assemble(request, self._substitute(position))

    def whole_episode(self) -> Iterator[Tree]:
        """Full batches of the frames of one episode in the order of time: always the same one, that of the first frame.

        The last batch is filled up with the episode's last frame. A frame's sample_id is what it is in validation.
        """
        positions = np.flatnonzero(self._episode == self._episode[0])
        positions = positions[np.argsort(self._frame[positions])]
        for start in range(0, len(positions), self._batch_size):
            yield self._at(positions[np.minimum(start + self._rows, len(positions) - 1)])

    def _substitute(self, position: np.ndarray) -> Substitute:
        """Keyed substitutes from all validation frames of the dataset."""

        def substitute(row: int, attempt: int) -> tuple[int, int]:
            key = order_lib.hash_key("validation substitute", self._hash, int(position[row]), attempt)
            chosen = int(key % np.uint64(len(self._episode)))
            return int(self._episode[chosen]), int(self._frame[chosen])

        return substitute


def make_val_iterators(
    datasets: Mapping[str, PreparedDataset],
    batch_spec: BatchSpec,
    text_tokenizer: TextTokenizer | None,
    settings: Settings,
    *,
    targets: Targets = NO_TARGETS,
    max_batches: int | None = None,
    processes: Processes = ONE_PROCESS,
) -> dict[str, ValIterator]:
    """Validation data per dataset, {name: ValIterator}; datasets without validation episodes are left out.

    Nothing is dropped or paraphrased. It has a store of its own, beside `settings.host.host_memory_gb`: validating
    never moves or slows the training stream. Values are normalised with the statistics of the training episodes.

    Args:
      settings: as for training (see `Settings.for_validation`); its `batch_size` is that of validation.
      max_batches: of each dataset; None: all.
      others: as in `make_train_stream`; dataset ids are those of `datasets`.
    """
    settings = settings.for_validation()
    reader = Reader(datasets, "val", batch_spec, Texts(text_tokenizer, targets=targets), settings, processes)
    return {
        name: ValIterator(number, reader, settings.order.batch_size, max_batches, processes)
        for number, (name, prepared) in enumerate(datasets.items())
        if prepared.val.frames.sum()
    }
