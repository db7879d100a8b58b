"""A dataset of trajectories, with the vocabulary of dlimp, on tf.data.

A trajectory is a dict of tensors whose first axis is the step. Pipelines are written as

    TrajectoryDataset.from_rlds("~/data/bridge_dataset/1.0.0").traj_map(relabel).flatten().frame_map(decode).batch(32)

so scripts written for dlimp run with the import changed. The order of the elements is the same every time (until
something shuffles), also where dlimp's depends on the number of cores. The training stream reads the same trajectories
(`rlds.records.parse_episode`), but in an order it can seek in; use this class for pipelines of your own, for
inspection, and for conversions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from octo_like.data.dlimp.tensor_records import find_files, parse_trajectory, specs_of
from octo_like.data.dlimp.transforms import vmap
from octo_like.data.rlds import records
from octo_like.data.spec import DataError
from octo_like.data.tf import tf

Tensors = dict[str, Any]


class TrajectoryDataset(tf.data.Dataset):
    """A tf.data.Dataset of trajectories, or of frames after `flatten`. Immutable: every operation returns a new one.

    Everything that a tf.data.Dataset can do is here; a dataset that comes of it is a TrajectoryDataset again.

    Attributes:
      dataset: the plain tf.data.Dataset.
      is_flattened: elements are frames.
    """

    def __init__(self, dataset: tf.data.Dataset, *, is_flattened: bool = False):
        self.dataset = dataset
        self.is_flattened = is_flattened
        super().__init__(dataset._variant_tensor)

    def _inputs(self) -> list[tf.data.Dataset]:
        return [self.dataset]

    @property
    def element_spec(self) -> Any:
        return self.dataset.element_spec

    # -- sources

    @staticmethod
    def from_rlds(
        builder: Any,
        split: Any = "train",
        shuffle: bool = True,
        num_parallel_reads: int | None = tf.data.AUTOTUNE,
    ) -> TrajectoryDataset:
        """Trajectories of an RLDS split; images stay encoded.

        Args:
          builder: a TFDS builder, or the path of a dataset version (the folder with dataset_info.json).
          split: as TFDS has it: a name, "a+b", a slice ("train[:95%]"), "all", a `tfds.core.ReadInstruction`, a part of
            `tfds.even_splits`.
          shuffle: shuffle files, and trajectories among those read together. False: the order on disk.
          num_parallel_reads: files read in turns when shuffling.

        Each trajectory also has `traj_metadata` (episode features, per step), `_len`, `_frame_index` and `_traj_index`.

        Raises:
          DataError: no such dataset or split, or a split without episodes.
        """
        features, parts = records.split_parts(builder, split)
        paths, skips, takes = zip(*parts, strict=True)
        files = tf.data.Dataset.from_tensor_slices((list(paths), np.array(skips, np.int64), np.array(takes, np.int64)))
        serialized = _read(
            files,
            len(parts),
            lambda path, skip, take: tf.data.TFRecordDataset(path).skip(skip).take(take),
            shuffle,
            num_parallel_reads,
        )
        return _numbered(serialized, lambda record: records.parse_episode(record, features))

    @staticmethod
    def from_tfrecords(
        dir_or_paths: str | Sequence[str], shuffle: bool = True, num_parallel_reads: int | None = tf.data.AUTOTUNE
    ) -> TrajectoryDataset:
        """Trajectories of TFRecord files whose features are serialised tensors, see `tensor_records`.

        Args:
          dir_or_paths: a folder with *.tfrecord files, or paths. The first file says what the features are.
          shuffle: see `from_rlds`.
          num_parallel_reads: see `from_rlds`.

        Each trajectory also has `_len`, `_frame_index` and `_traj_index`.

        Raises:
          DataError: no files, no record in the first, or features of another kind.
        """
        paths = find_files(dir_or_paths)
        specs = specs_of(paths[0])
        files = tf.data.Dataset.from_tensor_slices(paths)
        serialized = _read(files, len(paths), tf.data.TFRecordDataset, shuffle, num_parallel_reads)
        return _numbered(serialized, lambda record: parse_trajectory(record, specs))

    @staticmethod
    def sample_from_datasets(
        datasets: Sequence[TrajectoryDataset],
        weights: Any = None,
        seed: int | None = None,
        stop_on_empty_dataset: bool = False,
        rerandomize_each_iteration: bool | None = None,
    ) -> TrajectoryDataset:
        """Elements drawn at random from several datasets, all of trajectories or all of frames.

        For training use the stream: its mixture is exact and can be sought; this one is neither.
        """
        kinds: set[Any] = {getattr(dataset, "is_flattened", None) for dataset in datasets}
        if len(kinds) != 1 or None in kinds:
            raise DataError("sample_from_datasets needs at least one TrajectoryDataset, all flattened or none")
        if weights is not None and not isinstance(weights, tf.data.Dataset):
            weights = [float(w) for w in np.asarray(weights) / np.sum(weights)]
        mixed = tf.data.Dataset.sample_from_datasets(
            list(datasets), weights, seed, stop_on_empty_dataset, rerandomize_each_iteration
        )
        return TrajectoryDataset(mixed, is_flattened=kinds.pop())

    # -- maps

    def map(
        self, fn: Callable[..., Any], num_parallel_calls: int | None = tf.data.AUTOTUNE, **kwargs: Any
    ) -> TrajectoryDataset:
        """`fn` on elements, whatever they are. `kwargs`: of `tf.data.Dataset.map`, as in the other maps."""
        return self._with(super().map(fn, num_parallel_calls=num_parallel_calls, **kwargs))

    def traj_map(
        self, fn: Callable[[Tensors], Tensors], num_parallel_calls: int | None = tf.data.AUTOTUNE, **kwargs: Any
    ) -> TrajectoryDataset:
        """`fn` on whole trajectories, before `flatten`."""
        if self.is_flattened:
            raise DataError("traj_map needs trajectories, but this dataset is flattened; use frame_map")
        return self.map(fn, num_parallel_calls, **kwargs)

    def frame_map(
        self, fn: Callable[[Tensors], Tensors], num_parallel_calls: int | None = tf.data.AUTOTUNE, **kwargs: Any
    ) -> TrajectoryDataset:
        """`fn` on single frames, before or after `flatten`."""
        return self.map(fn if self.is_flattened else vmap(fn, num_parallel_calls), num_parallel_calls, **kwargs)

    def flatten(self, *, num_parallel_calls: int | None = tf.data.AUTOTUNE) -> TrajectoryDataset:
        """Trajectories to frames.

        Args:
          num_parallel_calls: N: of N trajectories at a time, one frame of each in turns, as in dlimp. AUTOTUNE, None:
            one trajectory after the other.
        """
        if self.is_flattened:
            raise DataError("the dataset is flattened already")
        if num_parallel_calls in (None, tf.data.AUTOTUNE):
            frames = self.dataset.flat_map(tf.data.Dataset.from_tensor_slices)
        else:
            frames = self.dataset.interleave(
                tf.data.Dataset.from_tensor_slices,
                cycle_length=num_parallel_calls,
                num_parallel_calls=num_parallel_calls,
            )
        return TrajectoryDataset(frames, is_flattened=True)

    # -- the rest

    def concatenate(self, dataset: tf.data.Dataset, name: str | None = None) -> TrajectoryDataset:
        """Elements of this dataset, then those of another, which are of the same kind."""
        if isinstance(dataset, TrajectoryDataset) and dataset.is_flattened != self.is_flattened:
            raise DataError("only one of the two datasets is flattened")
        return self._with(super().concatenate(dataset, name=name))

    def with_ram_budget(self, gb: float) -> TrajectoryDataset:
        """Limits the buffers that tf.data sizes by itself, in GiB."""
        options = tf.data.Options()
        options.autotune.ram_budget = int(gb * 2**30)
        return self.with_options(options)

    def iterator(self, prefetch: int = tf.data.AUTOTUNE) -> Iterator[Any]:
        """NumPy elements."""
        dataset = self.dataset.prefetch(prefetch) if prefetch else self.dataset
        return dataset.as_numpy_iterator()

    def _with(self, dataset: tf.data.Dataset) -> TrajectoryDataset:
        return TrajectoryDataset(dataset, is_flattened=self.is_flattened)


def _read(
    files: tf.data.Dataset, count: int, read: Callable[..., tf.data.Dataset], shuffle: bool, parallel: int | None
) -> tf.data.Dataset:
    """Records of `count` files."""
    if not shuffle:
        return files.flat_map(read)
    return files.shuffle(count).interleave(
        read, cycle_length=parallel, num_parallel_calls=parallel, deterministic=None if parallel is None else False
    )


def _numbered(serialized: tf.data.Dataset, parse: Callable[[tf.Tensor], Tensors]) -> TrajectoryDataset:
    def numbered(number: tf.Tensor, record: tf.Tensor) -> Tensors:
        trajectory = parse(record)
        return {**trajectory, "_traj_index": tf.repeat(number, tf.shape(trajectory["_len"])[0])}

    return TrajectoryDataset(serialized.enumerate().map(numbered, num_parallel_calls=tf.data.AUTOTUNE))


def _of_trajectories(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of tf.data.Dataset whose datasets are TrajectoryDatasets, flattened if the first it is given is."""

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not isinstance(result, tf.data.Dataset) or isinstance(result, TrajectoryDataset):
            return result
        given = (x for x in tf.nest.flatten((args, kwargs)) if isinstance(x, TrajectoryDataset))
        return TrajectoryDataset(result, is_flattened=next((x.is_flattened for x in given), False))

    return method


def _adopt() -> None:
    for name in dir(tf.data.Dataset):
        found = inspect.getattr_static(tf.data.Dataset, name)
        if name.startswith("_") or name in vars(TrajectoryDataset):
            continue
        if isinstance(found, staticmethod):
            setattr(TrajectoryDataset, name, staticmethod(_of_trajectories(found.__func__)))
        elif inspect.isfunction(found):
            setattr(TrajectoryDataset, name, _of_trajectories(found))


_adopt()
