"""Index and statistics of a split: one pass over its records, cached as one file, never decoding an image.

The cache holds, per episode: file, byte offset, length, hash of the record, steps before and after standardisation,
whether it has an instruction; and the standardised actions and proprioception of all steps, so that the statistics of
any subset of episodes are exact. Its name contains a hash of the files (names and sizes), the version and everything
that defines the episodes, so a changed dataset or function never meets old numbers.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import stat
import sys
import uuid
from typing import Any

import numpy as np
from tqdm import tqdm

from octo_like.common import normalization
from octo_like.data import order, rlds
from octo_like.data.oxe import registry
from octo_like.data.rlds import EpisodeFunction, RldsSplit
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf

FORMAT = 1
CACHE_FOLDER = ".octo_like"


@dataclasses.dataclass(frozen=True)
class Index:
    """Index of one split, or of some of its episodes. Arrays have one entry per episode."""

    files: tuple[str, ...]
    file: np.ndarray  # int32, which of `files`
    offset: np.ndarray  # int64, bytes
    length: np.ndarray  # int64, bytes of the record
    record_hash: np.ndarray  # int64, of the record's bytes
    raw_steps: np.ndarray  # int32, before standardisation
    frames: np.ndarray  # int32, usable steps
    has_language: np.ndarray  # bool
    record: np.ndarray  # int32, number of the record in its file
    definition_hash: str

    def __len__(self) -> int:
        return len(self.frames)

    def take(self, episodes: np.ndarray) -> "Index":
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Index(**{k: v[episodes] if isinstance(v, np.ndarray) else v for k, v in arrays.items()})

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the episodes' content and their order, wherever the files lie."""
        digest = hashlib.sha256(self.definition_hash.encode())
        digest.update(self.record_hash.astype("<i8").tobytes() + self.frames.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def where(self, episode: int) -> str:
        """'file: episode number', for messages."""
        return f"{self.files[self.file[episode]]}: episode {self.record[episode]}"


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A dataset of a mixture, ready to be read: episodes of training and validation, statistics of training.

    Attributes:
      key: name in the mixture (and of its statistics).
      train, val: their episodes; `val` is empty when the spec holds none out.
      statistics: see `octo_like.common.normalization`; over the training episodes only.
      instructions: every instruction of the split(s) and the number of episodes that have it.
    """

    key: str
    spec: DatasetSpec
    function: EpisodeFunction
    train: Index
    val: Index
    statistics: dict[str, Any]
    instructions: dict[str, int]
    directory: str
    version: str


# ---------------------------------------------------------------- the cache


def cache_path(split: RldsSplit, function: EpisodeFunction, cache_dir: str | None) -> str:
    """Where the index of a split is kept. Beside the data, or in `cache_dir`, or in ~/.cache when that is read-only."""
    description = {
        "format": FORMAT,
        "name": split.name,
        "version": split.version,
        "files": [(os.path.basename(path), tf.io.gfile.stat(path).length) for path in split.files],
        "definition": function.definition,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:20]
    if cache_dir is not None:
        root = os.path.join(os.path.expanduser(cache_dir), split.name, split.version)
    elif _writable(split.directory):
        root = os.path.join(split.directory, CACHE_FOLDER)
    else:
        root = os.path.join(os.path.expanduser("~/.cache/octo_like"), split.name, split.version)
    return os.path.join(root, f"{split.split.replace('+', '-')}-{key}.npz")


def _writable(directory: str) -> bool:
    if "://" in directory:
        return True
    # The superuser may write anywhere; a folder marked read-only is left alone all the same.
    return os.access(directory, os.W_OK) and bool(os.stat(directory).st_mode & stat.S_IWUSR)


def _write_atomically(path: str, content: bytes) -> None:
    tf.io.gfile.makedirs(os.path.dirname(path))
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with tf.io.gfile.GFile(temporary, "wb") as file:
            file.write(content)
        tf.io.gfile.rename(temporary, path, overwrite=True)
    finally:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)


def _read(path: str) -> dict[str, Any] | None:
    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path, "rb") as file:
        content = file.read()
    try:
        with np.load(io.BytesIO(content)) as arrays:
            return {key.removeprefix("index_"): arrays[key] for key in arrays.files}
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: the cached index cannot be read ({error}); delete it and it is built again"
        ) from error


# ---------------------------------------------------------------- one pass over the records


def _scan_file(split: RldsSplit, number: int, function: EpisodeFunction, advance: Any) -> list[dict[str, Any]]:
    """Summaries of all episodes of one file, in order."""
    path = split.files[number]

    @tf.autograph.experimental.do_not_convert
    def summary(serialized):
        episode = function.episode(serialized)
        language = episode.get("language", tf.constant([], tf.string))
        return {
            "length": tf.strings.length(serialized),
            "hash": episode["hash"],
            "raw_steps": episode["raw_steps"],
            "action": episode["action"],
            "proprio": episode.get("proprio", tf.zeros([tf.shape(episode["action"])[0], 0])),
            "language": tf.unique(language)[0],
            # Leaves that a user's function cut differently are found here, before training starts.
            "lengths": {
                **{f"camera {slot}": tf.shape(image)[0] for slot, image in episode["images"].items()},
                **{key: tf.shape(episode[key])[0] for key in ("proprio", "language") if key in episode},
            },
        }

    dataset = tf.data.TFRecordDataset(path, buffer_size=8 << 20).map(summary).prefetch(2)
    episodes, offset = [], 0
    iterator = iter(dataset)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            break
        except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
            raise rlds.damaged(path, len(episodes), offset, error) from error
        item = tf.nest.map_structure(lambda x: x.numpy(), item)
        item |= {"offset": offset, "file": number, "record": len(episodes)}
        offset += int(item["length"]) + rlds.HEADER_BYTES + rlds.FOOTER_BYTES
        _check_episode(item, f"{path}: episode {len(episodes)}", function.spec)
        episodes.append(item)
        advance(1)
    if len(episodes) != split.shard_lengths[number]:
        raise DataError(
            f"{path}: {len(episodes)} episodes, but {rlds.INFO_FILE} says {split.shard_lengths[number]}: truncated, "
            "or not from this build"
        )
    return episodes


def _check_episode(item: dict[str, Any], where: str, spec: DatasetSpec) -> None:
    steps = len(item["action"])
    wrong = [f"{key} has {count}" for key, count in item["lengths"].items() if count != steps]
    if wrong:
        raise DataError(f"{where}: action has {steps} steps, but {', '.join(wrong)}")
    for key, name in (("action", spec.action_key), ("proprio", ", ".join(spec.proprio_keys))):
        bad = rlds.non_finite(item[key])
        if bad is not None:
            value = item[key][bad]
            raise DataError(f"{where}: {key} ({name!r}) is {value} at step {bad[0]}, dimension {bad[1]}")


def _build(split: RldsSplit, function: EpisodeFunction, progress: bool) -> dict[str, Any]:
    episodes: list[dict[str, Any]] = []
    label = f"index {split.name} {split.split}"
    # Without a terminal a bar is a line of a log every few seconds.
    every = 0.2 if sys.stderr.isatty() else 10.0
    total = sum(split.shard_lengths)
    with tqdm(total=total, desc=label, unit="ep", disable=not progress, leave=False, mininterval=every) as bar:
        for number in range(len(split.files)):
            episodes += _scan_file(split, number, function, bar.update)
    instructions = collections.Counter(
        text.decode("utf-8", "replace") for e in episodes for text in e["language"].tolist()
    )
    arrays: dict[str, Any] = {
        key: np.array([e[key] for e in episodes], dtype)
        for key, dtype in [
            ("file", np.int32),
            ("record", np.int32),
            ("offset", np.int64),
            ("length", np.int64),
            ("raw_steps", np.int32),
        ]
    }
    arrays["record_hash"] = np.array([e["hash"] for e in episodes], np.int64)
    arrays["frames"] = np.array([len(e["action"]) for e in episodes], np.int32)
    arrays["has_language"] = np.array([any(text for text in e["language"].tolist()) for e in episodes], bool)
    arrays["action"] = np.concatenate([e["action"] for e in episodes])
    arrays["proprio"] = np.concatenate([e["proprio"] for e in episodes])
    arrays["instructions"] = np.array(json.dumps(dict(sorted(instructions.items()))))
    return arrays


def load_index(
    split: RldsSplit, function: EpisodeFunction, cache_dir: str | None = None, progress: bool = True
) -> tuple[Index, dict[str, np.ndarray]]:
    """Index of a split from the cache, or built and cached.

    Returns:
      (index, {"action": (sum of frames, A), "proprio": (sum of frames, P), "instructions": JSON}).

    Raises:
      DataError: a damaged or truncated file, non-finite actions or proprioception, leaves of unequal length.
    """
    function.output  # noqa: B018 - traces: wrong keys are reported before any file is read
    path = cache_path(split, function, cache_dir)
    arrays = _read(path)
    if arrays is None:
        arrays = _build(split, function, progress)
        buffer = io.BytesIO()
        np.savez(buffer, **{f"index_{key}": value for key, value in arrays.items()})
        _write_atomically(path, buffer.getvalue())
    steps = {key: arrays.pop(key) for key in ("action", "proprio", "instructions")}
    definition = hashlib.sha256(json.dumps(function.definition, sort_keys=True).encode()).hexdigest()[:16]
    return Index(files=split.files, definition_hash=definition, **arrays), steps


# ---------------------------------------------------------------- training, validation, statistics


def hold_out(record_hash: np.ndarray, fraction: float) -> np.ndarray:
    """Keyed validation episodes, sorted: a share of all, at least one. Depends on the records, on no seed."""
    if fraction == 0:
        return np.zeros(0, np.int64)
    count = max(1, round(fraction * len(record_hash)))
    ranked = np.argsort(order.hash_key("validation", record_hash), kind="stable")
    return np.sort(ranked[:count])


def first_demos(record_hash: np.ndarray, count: int) -> np.ndarray:
    """Keyed subset of `count` episodes, sorted; a smaller count gives a subset of a larger one."""
    ranked = np.argsort(order.hash_key("demos", record_hash), kind="stable")
    return np.sort(ranked[:count])


def prepare_dataset(
    key: str, spec: DatasetSpec, data_dir: str, cache_dir: str | None = None, progress: bool = True
) -> PreparedDataset:
    """Finds, indexes and splits a dataset, and computes the statistics of its training episodes.

    Raises:
      DataError: whatever is wrong with the files or the spec, with what would be valid.
    """
    split = rlds.open_split(spec.name, data_dir, spec.version, spec.split)
    _caution(key, spec, split)
    function = EpisodeFunction(spec, split.features)
    index, steps = load_index(split, function, cache_dir, progress)
    instructions = collections.Counter(json.loads(str(steps["instructions"])))
    everything = np.arange(len(index))
    if spec.val_split is not None:
        val_split = rlds.open_split(spec.name, data_dir, spec.version, spec.val_split)
        val, val_steps = load_index(val_split, function, cache_dir, progress)
        instructions.update(json.loads(str(val_steps["instructions"])))
        chosen = everything
    else:
        held = hold_out(index.record_hash, spec.val_fraction)
        chosen = np.setdiff1d(everything, held)
        if not len(chosen):
            raise DataError(
                f"{key}: split {spec.split!r} has {len(index)} episode(s), none left to train on after holding "
                "out validation; set val_fraction=0 or name a val_split"
            )
        val = index.take(held)
    if spec.num_demos is not None:
        if spec.num_demos > len(chosen):
            raise DataError(f"{key}: num_demos={spec.num_demos}, but only {len(chosen)} training episodes exist")
        chosen = chosen[first_demos(index.record_hash[chosen], spec.num_demos)]
    if not index.frames[chosen].sum():
        raise DataError(
            f"{key}: split {spec.split!r} of {split.directory} has no usable steps in {len(chosen)} episodes"
        )
    statistics = _statistics(key, spec, index, steps, chosen)
    return PreparedDataset(
        key, spec, function, index.take(chosen), val, statistics, dict(instructions), split.directory, split.version
    )


def _caution(key: str, spec: DatasetSpec, split: RldsSplit) -> None:
    """Logs what the registry knows about a dataset's traps."""
    if spec.from_registry:
        for said in registry.cautions(
            spec.standardize, spec.compat, split.version, sum(split.shard_lengths), spec.bgr_slots
        ):
            logging.warning("%s: %s", key, said)


def _statistics(key: str, spec: DatasetSpec, index: Index, steps: dict[str, Any], chosen: np.ndarray) -> dict[str, Any]:
    selected = np.zeros(len(index), bool)
    selected[chosen] = True
    rows = np.repeat(selected, index.frames)
    mask, width = spec.action_normalization_mask, steps["action"].shape[1]
    if mask is not None and len(mask) != width:
        raise DataError(
            f"{key}: action_normalization_mask has {len(mask)} entries, but {spec.action_key!r} has {width} dimensions"
        )
    statistics: dict[str, Any] = {"action": normalization.compute_statistics(steps["action"][rows], mask)}
    if spec.proprio_keys:
        statistics["proprio"] = normalization.compute_statistics(steps["proprio"][rows])
    statistics["num_transitions"] = int(rows.sum())
    statistics["num_trajectories"] = len(chosen)
    return statistics


def prepare_datasets(
    specs: dict[str, DatasetSpec], data_dir: str, cache_dir: str | None = None, progress: bool = True
) -> dict[str, PreparedDataset]:
    """`prepare_dataset` for a whole mixture, in its order."""
    return {key: prepare_dataset(key, spec, data_dir, cache_dir, progress) for key, spec in specs.items()}
