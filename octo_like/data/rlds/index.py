"""Index of a split: one pass over its records, cached as a folder, never decoding an image.

    train-0123456789abcdef0123/
      index.npz             per episode: file, byte offset, length, hash of the record, steps, which texts it has, bytes
                            of each camera's pictures
      rows.npy              float32: standardised values of all steps of all episodes (see `columns.py`)
      bad_records.txt       every record that cannot be read or used, if there are many
      statistics-*.npz      of one choice of training episodes, exact (see `statistics.py`)
      usable-*.npz          steps that one set of filters leaves (see `filters.py`)
      parts/                of an unfinished pass: one file per TFRecord file, so that a killed pass goes on

The folder's name contains a hash of the files (names and sizes), the version and everything that defines the episodes.
What that does not see, a few records do that are read again at every start (`spot_check.py`): an index that is not as
they are is built anew. Memory holds a few numbers per episode and one file's rows for each thread, whatever the size of
the dataset.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import os
import stat
import sys
import threading
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from octo_like.data.rlds import bad_records
from octo_like.data.rlds import columns as row_columns
from octo_like.data.rlds.bad_records import MAX_BAD_FRACTION
from octo_like.data.rlds.cache_files import load_arrays, save_arrays, write_atomically
from octo_like.data.rlds.lock import build_once
from octo_like.data.rlds.records import EpisodeFunction, RldsSplit
from octo_like.data.rlds.scan import COLUMNS, PARTS, FileSummary, indexed_keys, part_name, scan_file, traced_summary
from octo_like.data.rlds.spot_check import find_stale
from octo_like.data.rlds.stall import StallWatch
from octo_like.data.rlds.statistics import RowWriter
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import error_text, tf

FORMAT = 3
CACHE_FOLDER = ".octo_like"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Index:
    """Index of one split, or of some of its episodes. Arrays have one entry per episode, except `bits`.

    Attributes:
      files: of the split; `file` is the number of each episode's.
      record: number of the record in its file.
      offset, length: bytes of the record.
      record_hash: of the record's bytes.
      raw_steps, steps: before and after standardisation.
      frames: steps that may be samples.
      first: number of the episode's first step among all steps of the split.
      bits: packed bits of all steps of the split, 1 for those that may be samples; None: all may.
      definition_hash: of everything that defines the episodes and the choice of their steps.
      folder: of the cache, for messages.
      pictures: keys below `observation` of what can be a camera's pictures or depth.
      picture_bytes: (N, pictures) of each; -1 where there is not one for each step. None: not known.
    """

    files: tuple[str, ...]
    file: np.ndarray  # int32
    record: np.ndarray  # int32
    offset: np.ndarray  # int64
    length: np.ndarray  # int64
    record_hash: np.ndarray  # int64
    raw_steps: np.ndarray  # int32
    steps: np.ndarray  # int32
    frames: np.ndarray  # int32
    has_language: np.ndarray  # bool
    first: np.ndarray  # int64
    bits: np.ndarray | None
    definition_hash: str
    folder: str = ""
    pictures: tuple[str, ...] = ()
    picture_bytes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.frames)

    def take(self, episodes: np.ndarray) -> Index:
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "bits"}
        return dataclasses.replace(self, **{k: v[episodes] for k, v in arrays.items() if isinstance(v, np.ndarray)})

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the episodes' content and their order, and their usable steps, wherever the files lie."""
        digest = hashlib.sha256(self.definition_hash.encode())
        for values in (self.record_hash, self.frames, *((self.first,) if self.bits is not None else ())):
            digest.update(values.astype("<i8").tobytes())
        if self.bits is not None:
            digest.update(self.bits.tobytes())
        return digest.hexdigest()[:16]

    def usable(self, episode: int) -> np.ndarray:
        """(frames,) sorted numbers of the episode's usable steps."""
        if self.bits is None:
            return np.arange(self.steps[episode])
        start, stop = int(self.first[episode]), int(self.first[episode]) + int(self.steps[episode])
        packed = self.bits[start // 8 : -(-stop // 8)]
        return np.flatnonzero(np.unpackbits(packed)[start % 8 :][: stop - start])

    def step_of(self, episode: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Step numbers (N,) of the `frame`-th (N,) usable steps of `episode` (N,)."""
        if self.bits is None:
            return np.asarray(frame)
        return np.array([self.usable(e)[f] for e, f in zip(episode, frame, strict=True)], np.int64)

    def where(self, episode: int) -> str:
        """'file: episode number', for messages."""
        return f"{self.files[self.file[episode]]}: episode {self.record[episode]}"


@dataclasses.dataclass(frozen=True)
class SplitIndex:
    """The index of a whole split and what is kept beside it.

    Attributes:
      index: its episodes; usable are those steps that the user's filter left.
      folder: of the cache.
      instructions: every instruction and the number of episodes that have it.
      damaged: one message per record that cannot be read or used; these are not in `index`.
      shared: folder that processes share as a whole or not at all (see `lock.build_once`).
    """

    index: Index
    folder: str
    instructions: dict[str, int]
    damaged: tuple[str, ...]
    shared: str

    @property
    def rows_path(self) -> str:
        return os.path.join(self.folder, "rows.npy")


# ---------------------------------------------------------------- the cache


def cache_folder(split: RldsSplit, function: EpisodeFunction, cache_dir: str | None) -> str:
    """Where the index of a split is kept. Beside the data, or in `cache_dir`, or in ~/.cache when that is read-only."""
    return _cache_place(split, function, cache_dir)[0]


def _cache_place(split: RldsSplit, function: EpisodeFunction, cache_dir: str | None) -> tuple[str, str]:
    """(folder of the index, folder of all caches that lie in the same place)."""
    description = {
        "format": FORMAT,
        "name": split.name,
        "version": split.version,
        "files": [(os.path.basename(path), size) for path, size in zip(split.files, split.file_bytes, strict=True)],
        "definition": function.definition,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:20]
    if cache_dir is None and can_hold_caches(split.directory):
        shared = os.path.dirname(os.path.dirname(split.directory))  # data_dir/name/version
        root = os.path.join(split.directory, CACHE_FOLDER)
    else:
        shared = os.path.expanduser("~/.cache/octo_like" if cache_dir is None else cache_dir)
        root = os.path.join(shared, split.name, split.version)
    return os.path.join(root, f"{split.split.replace('+', '-')}-{key}"), shared


def can_hold_caches(directory: str) -> bool:
    """Whether indices may be kept beside the data of a dataset version."""
    if "://" in directory:
        # Buckets have no permission bits to look at: public ones are found out by trying.
        probe = os.path.join(directory, CACHE_FOLDER, f"probe-{uuid.uuid4().hex[:8]}")
        try:
            write_atomically(probe, b"")
            tf.io.gfile.remove(probe)
        except tf.errors.OpError:
            return False
        return True
    # The superuser may write anywhere; a folder marked read-only is left alone all the same.
    return os.access(directory, os.W_OK) and bool(os.stat(directory).st_mode & stat.S_IWUSR)


def cached(
    whole: SplitIndex, file: str, make: Callable[[], dict[str, Any]], *, what: str, process_index: int = 0
) -> dict[str, Any]:
    """Arrays of a small file beside the index; made, by one process of those that share it, when it is not there.

    Args:
      file: its name, which contains a hash of all that the arrays depend on.
      what: a few words for messages.
    """
    path = os.path.join(whole.folder, file)
    if not tf.io.gfile.exists(path):
        build_once(path, lambda: save_arrays(path, make()), what=what, process_index=process_index, root=whole.shared)
    return load_arrays(path)


def digest_of(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:20]


# ---------------------------------------------------------------- one pass over the records


def default_workers() -> int:
    """Files that a process reads at the same time."""
    return min(8, os.cpu_count() or 1)


def _build(
    split: RldsSplit, function: EpisodeFunction, folder: str, progress: bool, workers: int, limit: float
) -> None:
    """Scans all files, several at a time, and writes the index; those that an earlier pass finished are not read."""
    total, numbers = sum(split.shard_lengths), range(len(split.files))
    parts = os.path.join(folder, PARTS)
    tf.io.gfile.makedirs(parts)
    part = [os.path.join(parts, part_name(number)) for number in numbers]
    done = set(tf.io.gfile.listdir(parts))
    finished = {number for number in numbers if os.path.basename(part[number]) in done}
    if finished:
        log.info("%s: %d of %d files were indexed by an earlier pass", folder, len(finished), len(part))
    traced_summary(function)  # once, before the threads ask for it
    # Files with damage are not kept as parts: once repaired, they must be read again.
    with_damage: dict[int, FileSummary] = {}
    bar_lock, damaged = threading.Lock(), 0
    # Without a terminal a bar is a line of a log every few seconds.
    bar = tqdm(
        total=total,
        initial=sum(split.shard_lengths[number] for number in finished),
        desc=f"index {split.name} {split.split}",
        unit="ep",
        disable=not progress,
        leave=False,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )

    def advance(count: int) -> None:
        with bar_lock:
            bar.update(count)

    def scan(number: int) -> tuple[int, FileSummary | None]:
        with watch.reading(split.files[number]) as moved:
            summary = scan_file(split, number, function, lambda count: (moved(), advance(count)))
        if summary.damaged:
            return number, summary
        write_atomically(part[number], summary.to_bytes())
        return number, None

    watch = StallWatch(f"index of {split.name} {split.split}")
    with bar, watch, concurrent.futures.ThreadPoolExecutor(workers, "octo_like-index") as pool:
        try:
            futures = [pool.submit(scan, number) for number in numbers if number not in finished]
            for future in concurrent.futures.as_completed(futures):
                number, summary = future.result()
                if summary is not None:
                    with_damage[number] = summary
                    damaged += len(summary.damaged)
                    if damaged > limit * total + bad_records.STOP_AFTER:
                        break
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    found = [message for number in sorted(with_damage) for message in with_damage[number].damaged]
    bad_records.report(f"{split.name} {split.split}", folder, found, total, limit)

    def summary_of(number: int) -> FileSummary:
        if number in with_damage:
            return with_damage[number]
        with tf.io.gfile.GFile(part[number], "rb") as file:
            return FileSummary.from_bytes(file.read())

    _assemble(folder, len(part), summary_of, function)
    tf.io.gfile.rmtree(parts)


def _assemble(folder: str, count: int, summary_of: Callable[[int], FileSummary], function: EpisodeFunction) -> None:
    """Joins the files' summaries, one at a time in memory, to index.npz (written last) and rows.npy."""
    columns: dict[str, list[np.ndarray]] = {key: [] for key in (*COLUMNS, "file")}
    usable: list[np.ndarray] = []
    text_keys, picture_keys = indexed_keys(function)
    instructions: dict[str, collections.Counter[str]] = {key: collections.Counter() for key in text_keys}
    damaged: list[str] = []
    for number in range(count):
        summary = summary_of(number)
        for key in COLUMNS:
            columns[key].append(summary.episodes[key])
        columns["file"].append(np.full(len(summary.episodes["steps"]), number, np.int32))
        usable.append(summary.usable)
        for key in text_keys:
            instructions[key].update(summary.instructions[key])
        damaged += summary.damaged
    arrays = {key: np.concatenate(values) for key, values in columns.items()}
    chosen = np.concatenate(usable)
    rows_path = os.path.join(folder, "rows.npy")
    temporary = f"{rows_path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        writer = RowWriter(temporary, int(arrays["steps"].sum(dtype=np.int64)), row_columns.width(function))
        for number in range(count):
            writer.write(summary_of(number).rows)
        writer.close()
        tf.io.gfile.rename(temporary, rows_path, overwrite=True)
    finally:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)
    arrays["bits"] = np.packbits(chosen) if not chosen.all() else np.zeros(0, np.uint8)
    arrays["text"] = np.array(json.dumps({"damaged": damaged, "texts": text_keys, "pictures": picture_keys}))
    for number, key in enumerate(text_keys):
        arrays[f"instructions_{number}"] = np.array(json.dumps(dict(sorted(instructions[key].items()))))
    save_arrays(os.path.join(folder, "index.npz"), arrays)


def load_index(
    split: RldsSplit,
    function: EpisodeFunction,
    cache_dir: str | None = None,
    progress: bool = True,
    *,
    workers: int | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    process_index: int = 0,
) -> SplitIndex:
    """Index of a split from the cache, or built and cached; by one process where several share the cache.

    Args:
      workers: files read at the same time; None: up to 8, by the number of cores.
      max_bad_fraction: share of the records that may be damaged, or hold numbers that are not finite or leaves of
        unequal length; they are left out, and named in the log.

    Raises:
      TooManyBadRecords (a DataError): there are more, all of them named.
      DataError: more episodes than the dataset says, or the storage does not answer.
    """
    function.output  # noqa: B018 - traces: wrong keys are reported before any file is read
    folder, shared = _cache_place(split, function, cache_dir)
    path = os.path.join(folder, "index.npz")
    workers = workers or default_workers()
    found = None
    for _ in range(3):
        if not tf.io.gfile.exists(path):
            tf.io.gfile.makedirs(folder)
            build_once(
                path,
                lambda: _build(split, function, folder, progress, workers, max_bad_fraction),
                what=f"index of {split.name} {split.split}",
                process_index=process_index,
                root=shared,
            )
        try:
            made, arrays = tf.io.gfile.stat(path).mtime_nsec, load_arrays(path)
        except tf.errors.NotFoundError:  # another process has just found it stale
            continue
        whole = _split_index(split, function, folder, shared, max_bad_fraction, arrays)
        stale = find_stale(whole.index, whole.rows_path, function)
        if stale is None:
            return whole
        if found is not None:
            break
        found = stale
        log.warning("%s %s: %s. Its index and statistics are made anew: %s", split.name, split.split, stale, folder)
        _discard(folder, made)
    raise DataError(
        f"{found or path}: still so after the index was made anew. The files are being written at the moment, or the "
        f"functions of {split.name} do not give the same values twice. Mend that, then delete {folder}"
    )


def _discard(folder: str, made: int) -> None:
    """Removes the index that was made at `made` (ns) and what was derived from it, unless another process has.

    Raises:
      DataError: this user may not.
    """
    path = os.path.join(folder, "index.npz")
    try:
        if tf.io.gfile.stat(path).mtime_nsec != made:
            return
        for file in tf.io.gfile.listdir(folder):
            if file.startswith(("statistics-", "usable-")) and file.endswith(".npz"):
                tf.io.gfile.remove(os.path.join(folder, file))
        tf.io.gfile.remove(path)  # last: who is killed before begins again
    except tf.errors.NotFoundError:
        pass  # by another process
    except tf.errors.PermissionDeniedError as error:
        raise DataError(f"{folder}: out of date, and is not ours to remove ({error_text(error)}); remove it") from error


def _split_index(
    split: RldsSplit,
    function: EpisodeFunction,
    folder: str,
    shared: str,
    max_bad_fraction: float,
    arrays: dict[str, Any],
) -> SplitIndex:
    """The index of a split from the arrays of its file; names what was damaged."""
    text = json.loads(str(arrays.pop("text")))
    damaged = tuple(text["damaged"])
    if damaged:
        label = f"{split.name} {split.split}"
        named = tuple(dict.fromkeys(damaged))  # a file that is gone says the same of each of its episodes
        total = sum(split.shard_lengths)
        bad_records.check(label, len(damaged), total, max_bad_fraction, bad_records.listed(named, folder))
        log.warning(
            "%s: %d of %d records were damaged or invalid when it was indexed and are left out: %s%s. If the files "
            "have been restored since, delete %s",
            label,
            len(damaged),
            sum(split.shard_lengths),
            "; ".join(named[:3]),
            " ..." if len(named) > 3 else "",
            folder,
        )
    bits, key = arrays.pop("bits"), function.spec.language_key
    has_text, instructions = (
        arrays.pop("has_text"),
        [arrays.pop(f"instructions_{i}") for i in range(len(text["texts"]))],
    )
    arrays["has_language"], counts = np.zeros(len(has_text), bool), {}
    if key is not None:
        number = text["texts"].index(key)
        arrays["has_language"], counts = has_text[:, number], json.loads(str(instructions[number]))
    arrays["first"] = np.cumsum(arrays["steps"], dtype=np.int64) - arrays["steps"]
    index = Index(
        files=split.files,
        frames=arrays["steps"],
        bits=None,
        definition_hash=digest_of(function.definition),
        folder=folder,
        pictures=tuple(text["pictures"]),
        **arrays,
    )
    _check_pictures(index, function.spec)
    if len(bits):
        index = with_usable(index, np.unpackbits(bits)[: int(arrays["steps"].sum())].astype(bool), {})
    return SplitIndex(index, folder, counts, damaged, shared)


def _check_pictures(index: Index, spec: DatasetSpec) -> None:
    """Raises DataError when an episode has another number of pictures than of actions."""
    for what, keys in (("camera", spec.image_keys), ("depth of", spec.depth_keys)):
        for slot, key in keys.items():
            if key is not None:
                counts = index.picture_bytes[:, index.pictures.index(key.removeprefix("observation/"))]
                if (counts < 0).any():
                    where = index.where(int(np.argmax(counts < 0)))
                    raise DataError(f"{where}: {what} {slot} ({key!r}) has another number of steps than the action")


def with_usable(index: Index, usable: np.ndarray, definition: dict[str, Any]) -> Index:
    """The index of a whole split with a choice of its steps, (all steps,) bool."""
    sums = np.concatenate([[0], np.cumsum(usable, dtype=np.int64)])
    frames = (sums[index.first + index.steps] - sums[index.first]).astype(np.int32)
    digest = digest_of(index.definition_hash, definition)
    return dataclasses.replace(index, frames=frames, bits=np.packbits(usable), definition_hash=digest)
