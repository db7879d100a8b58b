"""Episodes in memory: encoded frames, normalised numbers, instruction rows; loaded by offset, kept while they fit."""

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from octo_like.common import normalization
from octo_like.common.storage import persistently
from octo_like.data.batches import memory
from octo_like.data.episode import EncodedFrame, RawEpisode, stored_bytes
from octo_like.data.prepared import PreparedDataset
from octo_like.data.rlds import records
from octo_like.data.rlds.index import Index
from octo_like.data.rlds.records import DamagedRecord
from octo_like.data.spec import DataError

SLOW_SECONDS = 30.0  # a read that takes longer is named in the log

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Episode:
    """One standardised episode of T steps.

    Attributes:
      action: (T, A) float32, normalised; (T, N, A) when actions come in chunks.
      proprio: (T, P) float32, normalised, or None.
      text: (T,) int32 rows of the text table; 0 means no instruction.
      images: slot -> T encoded frames, or (T, h, w, 3) uint8; an empty one is missing.
      depths: slot -> T encoded depth maps, or (T, h, w) or (T, h, w, 1) numbers, as stored.
      points: name -> (T, 2) float32, column and row as fractions of the image; NaN where it is not known.
      extras: name -> (T, ...) float32, values of other sensors, normalised.
      target: (T,) int32 rows of the table of texts that are learned, 0 where there is none; or None.
      subtask: (T,) int32 rows of the text table of the same texts, where the task says them; or None.
    """

    action: np.ndarray
    proprio: np.ndarray | None
    text: np.ndarray
    images: Mapping[str, Sequence[EncodedFrame] | np.ndarray]
    depths: Mapping[str, Sequence[EncodedFrame] | np.ndarray] = dataclasses.field(default_factory=dict)
    points: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    target: np.ndarray | None = None
    subtask: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        numbers = self.action.nbytes + self.text.nbytes + (0 if self.proprio is None else self.proprio.nbytes)
        return numbers + stored_bytes(*self.extras.values(), *self.images.values(), *self.depths.values())


def normalised(raw: RawEpisode, prepared: PreparedDataset, texts: Any) -> Episode:
    """An episode as batches have it, of one in physical units.

    Args:
      texts: the table whose rows stand for instructions, `Texts` or `WordList`.
    """
    statistics, kind = prepared.statistics, prepared.spec.normalization
    action, proprio = normalization.normalize(raw.action, statistics["action"], kind), None
    if raw.proprio is not None:
        proprio = normalization.normalize(raw.proprio, statistics["proprio"], kind)
    text = np.zeros(len(action), np.int32) if raw.texts is None else texts.rows(raw.texts)
    extras = normalization.normalize_extras(raw.extras, statistics, kind)
    target = subtask = None
    if raw.target is not None:
        target = texts.target_rows(raw.target)
        if prepared.spec.text_keys.get("subtask") is not None:
            subtask = texts.subtask_rows(raw.target)
    return Episode(action, proprio, text, raw.images, raw.depths, raw.points, extras, target, subtask)


def load_episode(
    prepared: PreparedDataset,
    index: Index,
    episode: int,
    slots: Collection[str],
    texts: Any,
    depth_slots: Collection[str] = (),
) -> Episode:
    """Reads, checks and normalises one episode, keeping images of the cameras in `slots`, depth of `depth_slots`.

    Raises:
      DamagedRecord: the record is damaged, or its file gone or cut; names file and episode.
      DataError: it is another record than the one that was indexed.
      StorageError: the storage does not answer.
    """
    path, offset = index.files[index.file[episode]], int(index.offset[episode])
    try:
        raw = persistently(lambda: prepared.function.read(path, offset, slots, depth_slots), index.where(episode))
    except records.damage_errors() as error:
        raise records.damaged(path, int(index.record[episode]), offset, error) from error
    if raw.hash != index.record_hash[episode]:
        raise DataError(
            f"{index.where(episode)}: the record is not the one that was indexed: {prepared.key} has been written anew "
            f"since. Stop what writes it, delete {index.folder} and start again"
        )
    try:
        return normalised(raw, prepared, texts)
    except DataError as error:
        raise DataError(f"{index.where(episode)}: {error}") from error


class Located(NamedTuple):
    """Where N samples of a dataset are.

    Attributes:
      episode, step: (N,) int64.
      loaded: the N episodes, when they cannot be read again; empty when `EpisodeSet.load` reads them.
    """

    episode: np.ndarray
    step: np.ndarray
    loaded: Sequence[Episode] = ()


class EpisodeSet:
    """Those episodes of a dataset that batches are made of, those of training or those of validation. They are read by
    their places in an index; `pooled.PooledEpisodes` are not.

    Attributes:
      seekable: any episode can be loaded at any time, so what the order needs next is read ahead.
      nbytes: expected bytes of each in memory.
    """

    seekable = True

    def __init__(
        self,
        prepared: PreparedDataset,
        index: Index,
        texts: Any,
        slots: Collection[str],
        depth_slots: Collection[str] = (),
    ):
        self.prepared, self.index = prepared, index
        self.nbytes = memory.each_bytes(prepared, index, slots, depth_slots)
        self._texts, self._slots, self._depth_slots = texts, frozenset(slots), frozenset(depth_slots)

    def locate(self, episode: np.ndarray, frame: np.ndarray, key: np.ndarray) -> Located:
        """Where the samples are that the order gives as usable frames (N,) of episodes (N,), with their keys (N,)."""
        return Located(episode, self.index.step_of(episode, frame))

    def load(self, episode: int) -> Episode:
        """Reads an episode. Raises DamagedRecord or DataError, see `load_episode`."""
        return load_episode(self.prepared, self.index, episode, self._slots, self._texts, self._depth_slots)

    def where(self, episode: int) -> str:
        """The place of an episode, for messages."""
        return self.index.where(episode)


class EpisodeStore:
    """Loads episodes in a few threads and keeps the most recently used ones within a limit of bytes.

    What is in memory never changes what is returned, only how fast.
    """

    def __init__(self, sets: Sequence[EpisodeSet], pool: concurrent.futures.Executor, max_bytes: int):
        self._sets, self._pool, self.max_bytes = sets, pool, max_bytes
        self._lock = threading.Lock()
        self._entries: collections.OrderedDict[tuple[int, int], concurrent.futures.Future] = collections.OrderedDict()
        self.nbytes = 0
        self._loading: dict[tuple[int, int], int] = {}  # expected bytes of what is being read

    def request(self, wanted: Iterable[tuple[int, int]]) -> list[concurrent.futures.Future]:
        """Futures of (dataset, episode) pairs; those not in memory start loading."""
        futures = []
        with self._lock:
            for key in wanted:
                if key not in self._entries:
                    self._begin(key)
                self._entries.move_to_end(key)
                futures.append(self._entries[key])
        return futures

    def request_ahead(self, wanted: Iterable[tuple[int, int]]) -> bool:
        """Starts loading in turn what is not in memory, as long as there is room for it. Whether there was for all."""
        with self._lock:
            expected = self.nbytes + sum(self._loading.values())
            for key in wanted:
                if key not in self._entries:
                    expected += self._expected_bytes(key)
                    if expected > self.max_bytes:
                        return False
                    self._begin(key)
                self._entries.move_to_end(key)
        return True

    def drop_all_but(self, kept: Collection[tuple[int, int]]) -> None:
        """Forgets episodes that are in memory and not in `kept`."""
        with self._lock:
            for key in [key for key in self._entries if key not in kept]:
                self._drop(key)

    def _begin(self, key: tuple[int, int]) -> None:
        self._loading[key] = self._expected_bytes(key)
        self._entries[key] = self._pool.submit(self._load, key)

    def _expected_bytes(self, key: tuple[int, int]) -> int:
        return int(self._sets[key[0]].nbytes[key[1]])

    def get(self, wanted: Sequence[tuple[int, int]]) -> list[Episode | DamagedRecord]:
        """Episodes of (dataset, episode) pairs; the error in place of a damaged one. Other errors are raised.

        A read that was under way before this call and failed says how the storage was then: it is done once more.
        """
        found: list[Episode | DamagedRecord] = []
        with self._lock:
            under_way = set(self._loading)
        for key, future in zip(wanted, self.request(wanted), strict=True):
            error = self._wait(key, future)
            if key in under_way and error is not None and not isinstance(error, DamagedRecord):
                (future,) = self.request([key])
                error = self._wait(key, future)
            if error is not None and not isinstance(error, DamagedRecord):
                raise error
            found.append(future.result() if error is None else error)
        self._evict()
        return found

    def _wait(self, key: tuple[int, int], future: concurrent.futures.Future) -> BaseException | None:
        """The error of a read, None when it worked. The log names a read that batches have to wait for."""
        start, patience = time.monotonic(), SLOW_SECONDS
        while True:
            try:
                return future.exception(timeout=patience)
            except concurrent.futures.TimeoutError:
                of = self._sets[key[0]]
                log.warning(
                    "%s: batches have been waiting for this read for %.0f s (%s)",
                    of.where(key[1]),
                    time.monotonic() - start,
                    of.prepared.key,
                )
                patience *= 2

    def _load(self, key: tuple[int, int]) -> Episode:
        dataset, number = key
        size, lasting = 0, False
        try:
            episode = self._sets[dataset].load(number)
            size, lasting = episode.nbytes, True
            return episode
        except DamagedRecord:
            lasting = True
            raise
        finally:
            with self._lock:
                self.nbytes += size
                self._loading.pop(key, None)
                if not lasting:  # other errors may pass: who asks again gets another read
                    self._entries.pop(key, None)

    def _evict(self) -> None:
        """Forgets the least recently used episodes while there are too many bytes."""
        with self._lock:
            for key in list(self._entries):
                if self.nbytes <= self.max_bytes:
                    break
                self._drop(key)

    def _drop(self, key: tuple[int, int]) -> None:
        future = self._entries[key]
        if key not in self._loading and future.done() and future.exception() is None:
            self.nbytes -= future.result().nbytes
            del self._entries[key]
