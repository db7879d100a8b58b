"""A TFDS/RLDS split as random-access episodes: where its records are, and how one becomes a standardised trajectory.

The only file that knows TFDS. One record of a TFRecord file is one episode; images stay encoded.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common.storage import may_pass, persistently
from octo_like.data.episode import RawEpisode, raw_episode
from octo_like.data.oxe import registry, vocabulary
from octo_like.data.rlds.cache_files import FILES
from octo_like.data.rlds.leaves import Selected, picture_bytes, select, text_keys, texts_of
from octo_like.data.spec import DataError, DatasetSpec, suggest
from octo_like.data.tf import error_text, tf

# Around each record of a TFRecord file: length (8 bytes) and its CRC (4) before, CRC of the data (4) after.
HEADER_BYTES, FOOTER_BYTES = 12, 4
INFO_FILE = "dataset_info.json"
DESCRIPTION = (INFO_FILE, "features.json")
STAT_THREADS = 128  # looks at files of a bucket at the same time: each is a round trip, of 50 ms or so

log = logging.getLogger(__name__)

# Operations whose result depends on how often they ran before (Stateless* do not).
_STATEFUL_RANDOM = re.compile(
    r"^(Random|Stateful|TruncatedNormal|Multinomial|ParameterizedTruncatedNormal|AnonymousRandom)"
)


@functools.cache
def damage_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged record raises."""
    kinds = tf.errors
    return (kinds.DataLossError, kinds.InvalidArgumentError, kinds.NotFoundError, kinds.OutOfRangeError)


class DamagedRecord(DataError):
    """A record that cannot be read: damaged, truncated, or in a file that is gone."""


class LostRecord(DamagedRecord):
    """A record whose file is gone."""


# ---------------------------------------------------------------- finding a dataset


@dataclasses.dataclass(frozen=True)
class RldsSplit:
    """One split of one dataset version on disk (or any TensorFlow file system, e.g. gs://).

    `file_bytes` are the files' sizes; -1 where a file is missing.
    """

    name: str
    version: str
    split: str
    directory: str
    files: tuple[str, ...]
    shard_lengths: tuple[int, ...]
    file_bytes: tuple[int, ...]
    features: Any = dataclasses.field(repr=False, compare=False)


def _subfolders(path: str) -> list[str]:
    return [entry for entry in FILES.folders(path) if not entry.startswith(".")]


def _versions(root: str) -> list[str]:
    return [entry for entry in _subfolders(root) if FILES.is_file(os.path.join(root, entry, INFO_FILE))]


def _datasets(data_dir: str) -> list[str]:
    """Folders that are datasets. Others lie beside them, e.g. `downloads`, which TFDS makes."""
    names = _subfolders(data_dir)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda name: bool(_versions(os.path.join(data_dir, name))), names)
        return [name for name, is_dataset in zip(names, found, strict=True) if is_dataset]


def _version_key(version: str) -> tuple:
    return tuple(int(part) if part.isdigit() else -1 for part in version.split("."))


def find_dataset(name: str, data_dir: str, version: str | None = None) -> str:
    """Folder with dataset_info.json and features.json: data_dir/name/version, the newest version when None.

    Raises:
      DataError: the folder, dataset or version does not exist, with what does.
      StorageError: the storage does not answer, so nothing is known of it.
    """
    data_dir = os.path.expanduser(data_dir)
    found = FILES.look(data_dir)
    if found is None or not found.is_directory:
        problem = "does not exist" if found is None else "is a file, expected the folder with the datasets"
        raise DataError(f"dataset {name!r}: data_dir {data_dir!r} {problem}")
    root = os.path.join(data_dir, name)
    if not FILES.is_folder(root):
        raise DataError(f"dataset {name!r} is not in {data_dir!r}; {suggest(name, _datasets(data_dir))}")
    versions = _versions(root)
    if version is None and not versions:
        raise DataError(
            f"dataset {name!r}: no version folder with {INFO_FILE} in {root!r} (an unfinished or interrupted build?); "
            f"it holds: {', '.join(_subfolders(root)) or 'nothing'}"
        )
    if version is None:
        version = max(versions, key=_version_key)
        others = [other for other in versions if other != version]
        log.info(
            "dataset %s: version %s%s, in %s",
            name,
            version,
            f", the newest one (older: {', '.join(others)})" if others else "",
            data_dir,
        )
    if version not in versions:
        raise DataError(f"dataset {name!r} has no version {version!r} in {root!r}; {suggest(version, versions)}")
    return os.path.join(root, version)


def _file_bytes(path: str) -> int:
    found = FILES.look(path)
    return -1 if found is None else found.size


def _sizes(files: Sequence[str]) -> list[int]:
    """Bytes of each file, -1 where it is missing."""
    if not any("://" in path for path in files):
        return _listed_sizes(files)
    with concurrent.futures.ThreadPoolExecutor(STAT_THREADS) as pool:
        return list(pool.map(_file_bytes, files))


def _listed_sizes(files: Sequence[str]) -> list[int]:
    """The same on a disk: a listing for each folder, and one look at each file that is in it."""
    found: dict[str, int] = {}
    wanted = set(files)

    def look(folder: str) -> None:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder or ".") as entries:
            for entry in entries:
                if (path := os.path.join(folder, entry.name)) in wanted:
                    with contextlib.suppress(FileNotFoundError):  # a link to nothing, or removed just now
                        found[path] = entry.stat().st_size

    for folder in sorted({os.path.dirname(path) for path in files}):
        persistently(functools.partial(look, folder), folder)
    return [found.get(path, -1) for path in files]


def features_of(directory: str) -> Any:
    """The features of an RLDS dataset version."""
    return _checked(_builder(directory), directory).info.features


def _builder(directory: str) -> Any:
    """The TFDS builder of a dataset version.

    Raises:
      DataError: its description is not what TFDS reads.
      StorageError: the storage does not answer.
    """
    import tensorflow_datasets as tfds

    def build() -> Any:
        try:
            return tfds.builder_from_directory(directory)
        except Exception as error:  # TFDS and its JSON and protobuf readers raise many kinds
            if may_pass(error):
                raise
            # TFDS takes an error of its look at a file for the absence of that file.
            first = error
        for name in DESCRIPTION:
            FILES.read(os.path.join(directory, name))
        try:
            return tfds.builder_from_directory(directory)
        except Exception as error:
            if may_pass(error):
                raise
            raise DataError(f"{directory}: cannot read {' and '.join(DESCRIPTION)}: {first}") from error

    return persistently(build, directory)


def _checked(builder: Any, directory: str) -> Any:
    """The builder. Raises DataError when its data is not RLDS in TFRecord files."""
    if "steps" not in builder.info.features:
        raise DataError(
            f"{directory}: not an RLDS dataset: no `steps`, features are {', '.join(builder.info.features)}"
        )
    file_format = builder.info.file_format.value
    if file_format != "tfrecord":
        raise DataError(
            f"{directory}: files are {file_format}, only tfrecord can be read; build it with file_format=tfrecord"
        )
    return builder


def open_split(
    name: str, data_dir: str, version: str | None = None, split: str = "train", *, max_bad_fraction: float = 0.0
) -> RldsSplit:
    """Opens a split; "a+b" joins several.

    Args:
      max_bad_fraction: share of the episodes that may be in files that are missing.

    Raises:
      DataError: no such dataset, version or split; not RLDS; missing files; an empty split.
      StorageError: the storage does not answer.
    """
    directory = find_dataset(name, data_dir, version)
    builder = _checked(_builder(directory), directory)
    files, lengths = [], []
    for part in split.split("+"):
        if part not in builder.info.splits:
            hint = " (slices are written as val_fraction and num_demos)" if "[" in part else ""
            raise DataError(f"{directory}: no split {part!r}{hint}; {suggest(part, builder.info.splits)}")
        info = builder.info.splits[part]
        files += [os.fspath(path) for path in info.filepaths]
        lengths += list(info.shard_lengths)
    if not sum(lengths):
        raise DataError(f"{directory}: split {split!r} is empty")
    sizes = _sizes(files)
    missing = [path for path, size in zip(files, sizes, strict=True) if size < 0]
    lost = sum(length for length, size in zip(lengths, sizes, strict=True) if size < 0)
    if missing and lost > max_bad_fraction * sum(lengths):
        raise DataError(
            f"{directory}: {len(missing)} of {len(files)} files of split {split!r} are missing: {missing[0]}"
        )
    version = os.path.basename(directory)
    features = builder.info.features
    return RldsSplit(name, version, split, directory, tuple(files), tuple(lengths), tuple(sizes), features)


def split_parts(builder: Any, split: Any) -> tuple[Any, list[tuple[str, int, int]]]:
    """The features of an RLDS dataset and the parts of its files that a split is, resolved by TFDS.

    Args:
      builder: a TFDS builder, or the path of a dataset version.
      split: a name, "a+b", a slice ("train[:95%]"), "all", a `tfds.core.ReadInstruction` or another split of TFDS.

    Returns:
      (features, [(file, records to skip, records to take)]), at least one.

    Raises:
      DataError: no such dataset or split, not RLDS, missing files, or no episode in the split.
    """
    if isinstance(builder, str | os.PathLike):
        root, version = os.path.split(os.path.expanduser(os.fspath(builder)).rstrip("/"))
        data_dir, name = os.path.split(root)
        directory = find_dataset(name, data_dir, version)
        builder = _builder(directory)
    else:
        directory = os.fspath(builder.data_path)
    _checked(builder, directory)
    splits = builder.info.splits
    try:
        found = splits[split].file_instructions
    except Exception as error:  # TFDS raises several kinds
        names = re.findall(r"[A-Za-z_][\w-]*", re.sub(r"\[[^]]*\]?", "", str(split)))
        wrong = next((part for part in names if part not in splits), None)
        problem = f"no split {wrong!r}" if wrong else f"split {split!r} is not one that TFDS can read ({error})"
        raise DataError(
            f"{directory}: {problem}; {suggest(wrong or str(split), splits)}, slices and sums of them"
        ) from error
    parts = [(os.fspath(part.filename), part.skip, part.take) for part in found if part.take]
    if not parts:
        raise DataError(f"{directory}: split {split!r} is empty")
    missing = [
        path for (path, _, _), size in zip(parts, _sizes([path for path, _, _ in parts]), strict=True) if size < 0
    ]
    if missing:
        raise DataError(
            f"{directory}: {len(missing)} of {len(parts)} files of split {split!r} are missing: {missing[0]}"
        )
    return builder.info.features, parts


# ---------------------------------------------------------------- record -> trajectory -> episode


def parse_episode(serialized: tf.Tensor, features: Any) -> dict[str, Any]:
    """One record as a trajectory: a dict of tensors whose first axis is the step. Images stay encoded.

    The steps' features keep their names. Added: `traj_metadata/...` (episode features, repeated for each step), `_len`
    and `_frame_index` (int32).
    """
    import tensorflow_datasets as tfds

    episode = dict(features.deserialize_example(serialized, decoders={"steps": tfds.decode.SkipDecoding()}))
    steps = dict(episode.pop("steps"))
    length = tf.shape(tf.nest.flatten(steps)[0])[0]
    steps["traj_metadata"] = tf.nest.map_structure(lambda x: _for_each_step(x, length), episode)
    steps["_len"] = tf.fill([length], length)
    steps["_frame_index"] = tf.range(length)
    return steps


def _for_each_step(x: Any, length: tf.Tensor) -> Any:
    """(length, ...) copies of a value."""
    if isinstance(x, tf.Tensor) and x.shape.rank is not None:  # a third of the time that tracing tf.repeat takes
        return tf.tile(x[None], [length, *[1] * x.shape.rank])
    return tf.repeat(x[None], length, axis=0)


def _user_function(function: Callable) -> Callable:
    """A user's function as one that may change its argument in place and branch on tensors in plain Python."""
    return tf.function(lambda trajectory: function(tf.nest.map_structure(tf.identity, trajectory)))


class EpisodeFunction(Selected):
    """record -> standardised, selected episode, as one traced function per dataset.

    Attributes:
      definition: JSON-able description of everything that determines what an index of its results holds: no pictures.
      random_ops: names of stateful random operations in the user's function; empty means that it is reproducible.
    """

    def __init__(self, spec: DatasetSpec, features: Any):
        self.spec = spec
        transform, source = registry.resolve(spec.standardize, compat=spec.compat, blank_text=spec.blank_text)
        if transform is not None and not isinstance(transform, vocabulary.Standardize):
            transform = _user_function(transform)
        self.definition: dict[str, Any] = {**spec.index_fields(), "standardize_source": source}
        texts = text_keys(features)
        if spec.language_key is not None and spec.language_key not in texts:
            # An index holds the texts of all the others, and is as good for any of them.
            self.definition["language_key"] = spec.language_key
            texts.add(spec.language_key)
        keep = None
        if spec.filter is not None:
            function, self.definition["filter_source"] = registry.resolve(spec.filter)
            assert function is not None  # a name was given
            keep = _user_function(function)

        def standardised(serialized):
            trajectory = parse_episode(serialized, features)
            raw_steps = tf.size(trajectory["_len"])
            whole = self._transformed(transform, trajectory)
            chosen = select(whole, spec)
            return whole, {
                **chosen,
                "usable": self._usable(keep, trajectory, tf.shape(chosen["action"])[0]),
                "raw_steps": raw_steps,
                "hash": tf.strings.to_hash_bucket_fast(serialized, 2**62),
            }

        def indexed(serialized):
            """An episode, and of all that could be chosen besides: texts, and bytes of pictures."""
            whole, chosen = standardised(serialized)
            steps = tf.shape(chosen["action"])[0]
            return chosen, texts_of(whole, texts), picture_bytes(whole, steps)

        self.indexed = indexed
        self._from_record = tf.function(
            lambda record: standardised(record)[1], input_signature=[tf.TensorSpec([], tf.string)], autograph=False
        )
        self._from_file = tf.function(
            # Calls the traced function: what it does is traced once.
            lambda path, offset: self._from_record.get_concrete_function()(read_record(path, offset)),
            input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int64)],
            autograph=False,
        )

    def _transformed(self, transform: Any, trajectory: dict[str, Any]) -> Mapping[str, Any]:
        if transform is None:
            return trajectory
        try:
            result = transform(trajectory)
        except Exception as error:  # a user's function may raise anything
            raise DataError(f"{self.spec.name}: standardize={self.spec.standardize!r} failed: {error}") from error
        if not isinstance(result, Mapping):
            raise DataError(
                f"{self.spec.name}: standardize={self.spec.standardize!r} returned a {type(result).__name__}, "
                "not a dict of tensors"
            )
        return result

    def _usable(self, keep: Any, trajectory: dict[str, Any], steps: tf.Tensor) -> tf.Tensor:
        """(T,) bool of the user's filter."""
        if keep is None:
            return tf.ones([steps], tf.bool)
        try:
            kept = tf.convert_to_tensor(keep(trajectory))
        except Exception as error:  # a user's function may raise anything
            raise DataError(f"{self.spec.name}: filter={self.spec.filter!r} failed: {error}") from error
        if kept.dtype != tf.bool or kept.shape.rank not in (0, 1):
            raise DataError(
                f"{self.spec.name}: filter={self.spec.filter!r} returned {kept.dtype.name} {kept.shape}; valid: a bool "
                "for the episode, or one for each step"
            )
        return kept if kept.shape.rank == 1 else tf.fill([steps], kept)

    @functools.cached_property
    def output(self) -> Any:
        """Structure of tensors (shapes and dtypes) of an episode. Tracing happens here, so bad keys show here."""
        return self._from_record.get_concrete_function().structured_outputs

    @functools.cached_property
    def random_ops(self) -> tuple[str, ...]:
        definition = self._from_record.get_concrete_function().graph.as_graph_def()
        nodes = [definition.node, *(function.node_def for function in definition.library.function)]
        found = {node.op for part in nodes for node in part}
        return tuple(sorted(op for op in found if _STATEFUL_RANDOM.match(op)))

    def read(self, path: str, offset: int, slots: Collection[str], depth_slots: Collection[str] = ()) -> RawEpisode:
        """The record at a byte offset, with images of the cameras in `slots` and depth of those in `depth_slots`.
        Raises tf.errors.* for damaged records."""
        chosen = self.from_file(path, offset)
        return raw_episode(chosen, int(chosen["hash"]), slots, depth_slots)

    def from_file(self, path: str, offset: int) -> dict[str, Any]:
        """Reads and standardises the record at a byte offset.

        Raises:
          tf.errors.OpError: the record is damaged, see `damage_errors`.
          StorageError: the storage does not answer.
        """
        return persistently(lambda: self._from_file(path, tf.constant(offset, tf.int64)), f"{path} (byte {offset})")


def read_record(path: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    """The record (scalar string) at a byte offset of a TFRecord file, CRC checked."""
    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=tf.reshape(path, [1]),
        compression_type="",
        buffer_size=tf.constant(0, tf.int64),  # exact reads: no read-ahead for a single record
        byte_offsets=tf.reshape(offset, [1]),
    )
    return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string)).take(1).get_single_element()


def damaged(path: str, record: int, offset: int, error: Exception) -> DamagedRecord:
    """One readable error for a record that cannot be read. Raises StorageError when that is the storage's fault."""
    if isinstance(error, tf.errors.NotFoundError):
        if FILES.is_file(path):  # of something else: a table that a user's function reads, for instance
            return DamagedRecord(f"{path}: episode {record} (byte {offset}) cannot be read: {error_text(error)}")
        return LostRecord(f"{path}: the file is gone, with episode {record}")
    text = error_text(error)
    if text.startswith("Dataset was empty"):  # of one record, asked for by its offset
        text = "the file ends before it"
    return DamagedRecord(f"{path}: episode {record} (byte {offset}) is damaged or truncated: {text}")


def non_finite(values: np.ndarray) -> tuple[int, ...] | None:
    """Position (step, ..., dimension) of the first value that is NaN or infinite."""
    bad = np.argwhere(~np.isfinite(values))
    return tuple(int(i) for i in bad[0]) if len(bad) else None
