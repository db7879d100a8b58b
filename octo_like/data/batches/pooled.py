"""Trajectories of a tf.data.Dataset as the episodes that batches are made of, see `octo_like.data.tf_source`."""

import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from octo_like.common.lanes import Processes
from octo_like.data import tf_source
from octo_like.data.batches.episodes import Episode, EpisodeSet, Located, normalised
from octo_like.data.batches.texts import Texts
from octo_like.data.order.order import permutation
from octo_like.data.prepared import PreparedDataset
from octo_like.data.rlds.index import Index
from octo_like.data.spec import DataError
from octo_like.data.tf_source import TrajectoryFunction, checked_episode, trajectory_name


class PooledEpisodes(EpisodeSet):
    """The pool of trajectories of one source in one process; their order is the source's. Safe to use from several
    threads."""

    seekable = False

    def __init__(
        self,
        prepared: PreparedDataset,
        index: Index,
        texts: Texts,
        slots: Collection[str],
        depth_slots: Collection[str],
        processes: Processes,
    ):
        super().__init__(prepared, index, texts, slots, depth_slots)
        self._lock = threading.Lock()
        self._numbers = iter(range(processes.index, 1 << 62, processes.count))
        self._items = self._endless(processes)
        # (number of the trajectory, trajectory, steps that have not been used)
        self._pool: list[tuple[int, Episode, list[int]]] = []

    def _endless(self, processes: Processes) -> Iterator[Mapping[str, Any]]:
        function = self.prepared.function
        assert isinstance(function, TrajectoryFunction)  # of a source
        share = function.dataset.shard(processes.count, processes.index)
        while True:
            empty = True
            for item in share.as_numpy_iterator():
                empty = False
                yield item
            if empty:
                spec = self.prepared.spec
                raise DataError(
                    f"{spec.name}: source={spec.source!r} has no trajectory for process {processes.index} of "
                    f"{processes.count}; it needs at least one for each"
                )

    def locate(self, episode: np.ndarray, frame: np.ndarray, key: np.ndarray) -> Located:
        """Draws, by the samples' keys, steps that were not used before. Which `episode` and `frame` the order gives
        means nothing here."""
        with self._lock:
            drawn = [self._draw(one) for one in key.tolist()]
        numbers, episodes, steps = zip(*drawn, strict=True)
        return Located(np.array(numbers, np.int64), np.array(steps, np.int64), episodes)

    def where(self, episode: int) -> str:
        return trajectory_name(self.prepared.key, self.prepared.spec, episode)

    def _draw(self, key: int) -> tuple[int, Episode, int]:
        """(number of a trajectory, the trajectory, a step that was not used before), by a sample's 64-bit key."""
        while len(self._pool) < tf_source.POOL:
            number = next(self._numbers)
            raw = checked_episode(next(self._items), self.where(number), self._slots, self._depth_slots)
            episode = normalised(raw, self.prepared, self._texts)
            self._pool.append((number, episode, permutation(len(episode.action), "live", number).tolist()))
        place = key % tf_source.POOL
        number, episode, steps = self._pool[place]
        step = steps.pop()
        if not steps:
            del self._pool[place]
        return number, episode, step
