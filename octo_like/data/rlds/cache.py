"""The cache of indices: one pass over the records of a split, kept as a folder, never decoding an image.

    train-0123456789abcdef0123/
      index.npz             per episode: file, byte offset, length, hash of the record, steps, which texts it has, bytes
                            of each camera's pictures
      rows.npy              float32: standardised values of all steps of all episodes (see `columns.py`); index.npz has
                            its SHA-256
      bad_records.txt       every record that cannot be read or used, if there are many
      statistics-*.npz      of one choice of training episodes, exact (see `statistics.py`)
      usable-*.npz          steps that one set of filters leaves (see `filters.py`)
      parts/                of an unfinished pass: one file per TFRecord file, so that a killed pass goes on

An index is used while it says what files and functions say (docs/data.md, "Index and statistics"): the folder's name
has a hash of what is declared, and a few records are read again at every start (`spot_check.py`) for what nobody
declares. A file of it that is damaged is made anew. While a pass runs, memory holds one file's rows for each thread,
whatever the size of the dataset.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
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

from octo_like.common.storage import Kind, StorageError, kind_of, persistently
from octo_like.data.rlds import bad_records
from octo_like.data.rlds import columns as row_columns
from octo_like.data.rlds.bad_records import MAX_BAD_FRACTION
from octo_like.data.rlds.cache_files import (
    FILES,
    DamagedCache,
    load_arrays,
    make_folder,
    remove,
    remove_folder,
    save_arrays,
    write_atomically,
)
from octo_like.data.rlds.index import Index, SplitIndex, digest_of, with_usable
from octo_like.data.rlds.lock import build_once
from octo_like.data.rlds.records import EpisodeFunction, RldsSplit
from octo_like.data.rlds.scan import COLUMNS, PARTS, FileSummary, indexed_keys, part_name, scan_file, traced_summary
from octo_like.data.rlds.spot_check import find_stale
from octo_like.data.rlds.stall import StallWatch
from octo_like.data.rlds.statistics import RowWriter, sha256_of
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf

FORMAT = 3
CACHE_FOLDER = ".octo_like"

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- the cache


def cache_folder(split: RldsSplit, function: EpisodeFunction, cache_dir: str | None) -> str:
    """Where the index of a split is kept. Beside the data, or in `cache_dir`, or in ~/.cache when that is read-only."""
    description = {
        "format": FORMAT,
        "name": split.name,
        "version": split.version,
        "files": [(os.path.basename(path), size) for path, size in zip(split.files, split.file_bytes, strict=True)],
        "definition": function.definition,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:20]
    if cache_dir is None and can_hold_caches(split.directory):
        root = os.path.join(split.directory, CACHE_FOLDER)
    else:
        caches = os.path.expanduser("~/.cache/octo_like" if cache_dir is None else cache_dir)
        root = os.path.join(caches, split.name, split.version)
    return os.path.join(root, f"{split.split.replace('+', '-')}-{key}")


def can_hold_caches(directory: str) -> bool:
    """Whether indices may be kept beside the data of a dataset version."""
    if "://" not in directory:
        # The superuser may write anywhere; a folder marked read-only is left alone all the same.
        if not persistently(lambda: os.stat(directory), directory).st_mode & stat.S_IWUSR:
            return False
        if os.access(directory, os.W_OK):
            return True
    # Buckets have no permission bits to look at, and `access` does not say why not: found out by trying.
    probe = os.path.join(directory, CACHE_FOLDER, f"probe-{uuid.uuid4().hex[:8]}")
    try:
        write_atomically(probe, b"")
        remove(probe)
    except StorageError as error:
        if error.__cause__ is not None and kind_of(error.__cause__) is Kind.DENIED:
            return False
        raise
    return True


def cached(whole: SplitIndex, file: str, make: Callable[[], dict[str, Any]], *, what: str) -> dict[str, Any]:
    """Arrays of a small file beside the index; made, by one process of those that share it, when it is not there.

    Args:
      file: its name, which contains a hash of all that the arrays depend on.
      what: a few words for messages.
    """
    path = os.path.join(whole.folder, file)
    for _ in range(2):
        if not FILES.is_file(path):
            build_once(path, lambda: save_arrays(path, make()), what=what)
        try:
            return load_arrays(path)
        except DamagedCache as error:
            log.warning("%s; made anew", error)
            remove(path)
    return load_arrays(path)


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
    make_folder(parts)
    part = [os.path.join(parts, part_name(number)) for number in numbers]
    done = set(FILES.names(parts) or ())
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

            def progressed(count: int) -> None:
                moved()
                advance(count)

            summary = scan_file(split, number, function, progressed)
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
        content = FILES.read(part[number])
        if content is not None:
            try:
                return FileSummary.from_bytes(content)
            except Exception as error:  # zipfile, NumPy and json raise many kinds
                log.warning("%s is damaged: %s; %s is read again", part[number], error, split.files[number])
        summary = scan_file(split, number, function, lambda count: None)
        write_atomically(part[number], summary.to_bytes())
        return summary

    _assemble(folder, len(part), summary_of, function)
    remove_folder(parts)


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

    def write_rows() -> str:
        temporary = f"{rows_path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            writer = RowWriter(temporary, int(arrays["steps"].sum(dtype=np.int64)), row_columns.width(function))
            for number in range(count):
                writer.write(summary_of(number).rows)
            digest = writer.close()
            tf.io.gfile.rename(temporary, rows_path, overwrite=True)
        except BaseException:
            with contextlib.suppress(tf.errors.OpError):  # the first error counts
                tf.io.gfile.remove(temporary)
            raise
        return digest

    digest = persistently(write_rows, rows_path)
    arrays["bits"] = np.packbits(chosen) if not chosen.all() else np.zeros(0, np.uint8)
    texts = {"damaged": damaged, "texts": text_keys, "pictures": picture_keys, "rows_sha256": digest}
    arrays["text"] = np.array(json.dumps(texts))
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
) -> SplitIndex:
    """Index of a split from the cache, or built and cached; by one process where several share the cache.

    Args:
      workers: files read at the same time; None: up to 8, by the number of cores.
      max_bad_fraction: share of the records that may be damaged, or hold numbers that are not finite or leaves of
        unequal length; they are left out, and named in the log.

    Raises:
      TooManyBadRecords (a DataError): there are more, all of them named.
      DataError: more episodes than the dataset says.
      StorageError: the storage does not answer.
    """
    function.output  # noqa: B018 - traces: wrong keys are reported before any file is read
    folder = cache_folder(split, function, cache_dir)
    path = os.path.join(folder, "index.npz")
    workers = workers or default_workers()
    found: str | None = None
    stale: str | None
    for _ in range(3):
        if not FILES.is_file(path):
            build_once(
                path,
                lambda: _build(split, function, folder, progress, workers, max_bad_fraction),
                what=f"index of {split.name} {split.split}",
            )
        seen = FILES.look(path)
        try:
            arrays = load_arrays(path)
        except FileNotFoundError:  # another process has just found it stale
            continue
        except DamagedCache as error:
            stale = str(error)
        else:
            whole = _split_index(split, function, folder, max_bad_fraction, arrays, 0 if seen is None else seen.changed)
            stale = find_stale(whole.index, whole.rows_path, function)
            if stale is None:
                return whole
        if found is not None:
            break
        found = stale
        log.warning("%s %s: %s. Its index and statistics are made anew: %s", split.name, split.split, stale, folder)
        discard(folder, 0 if seen is None else seen.changed)
    raise DataError(
        f"{found or path}: still so after the index was made anew. The files are being written at the moment, or the "
        f"functions of {split.name} do not give the same values twice. Mend that, then delete {folder}"
    )


def discard(folder: str, made: int) -> None:
    """Removes the index that was made at `made` (ns) and what was derived from it, unless another process has.

    Raises:
      DataError: this user may not.
    """
    path = os.path.join(folder, "index.npz")
    try:
        seen = FILES.look(path)
        if seen is None or seen.changed != made:
            return
        for file in FILES.names(folder) or []:
            if file.startswith(("statistics-", "usable-", "rows.sha256")):
                remove(os.path.join(folder, file))
        remove(path)  # last: who is killed before begins again
    except StorageError as error:
        if error.__cause__ is None or kind_of(error.__cause__) is not Kind.DENIED:
            raise
        raise DataError(f"{folder}: out of date, and is not ours to remove ({error}); remove it") from None


def _split_index(
    split: RldsSplit,
    function: EpisodeFunction,
    folder: str,
    max_bad_fraction: float,
    arrays: dict[str, Any],
    made: int,
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
            total,
            "; ".join(named[:3]),
            " ..." if len(named) > 3 else "",
            folder,
        )
    bits, key = arrays.pop("bits"), function.spec.language_key
    has_text = arrays.pop("has_text")
    instructions = [arrays.pop(f"instructions_{i}") for i in range(len(text["texts"]))]
    arrays["has_language"], counts = np.zeros(len(has_text), bool), {}
    if key is not None:
        number = text["texts"].index(key)
        arrays["has_language"], counts = has_text[:, number], json.loads(str(instructions[number]))
    learned = None if function.spec.text_target is None else function.spec.text_target[1]
    targets = json.loads(str(instructions[text["texts"].index(learned)])) if learned in text["texts"] else ()
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
    digest = text["rows_sha256"] if "rows_sha256" in text else _adopted_digest(folder)
    return SplitIndex(index, folder, counts, damaged, tuple(targets), made, digest)


def _adopted_digest(folder: str) -> str | None:
    """The SHA-256 of the rows of an index that was made before they had one; taken now, and kept."""
    path, rows = os.path.join(folder, "rows.sha256"), os.path.join(folder, "rows.npy")
    if (content := FILES.read(path)) is not None and len(content) == 64:
        return content.decode(errors="replace")
    if not FILES.is_file(rows):
        return None
    digest = sha256_of(rows)
    log.info("%s was written without a checksum, and has one from now on", rows)
    try:
        write_atomically(path, digest.encode())
    except StorageError as error:
        log.warning("%s could not be kept: %s", path, error)
    return digest


def _check_pictures(index: Index, spec: DatasetSpec) -> None:
    """Raises DataError when an episode has another number of pictures than of actions."""
    assert index.picture_bytes is not None  # an index of files has them
    for what, keys in (("camera", spec.image_keys), ("depth of", spec.depth_keys)):
        for slot, key in keys.items():
            if key is not None:
                counts = index.picture_bytes[:, index.pictures.index(key.removeprefix("observation/"))]
                if (counts < 0).any():
                    where = index.where(int(np.argmax(counts < 0)))
                    raise DataError(f"{where}: {what} {slot} ({key!r}) has another number of steps than the action")
