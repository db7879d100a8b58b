"""A dataset of trajectories, with the vocabulary of dlimp, on tf.data.

A trajectory is a dict of tensors whose first axis is the step. Pipelines are written as

    TrajectoryDataset.from_rlds("~/data/bridge_dataset/1.0.0").traj_map(relabel).flatten().frame_map(decode).batch(32)

so functions written for dlimp (dict of tensors -> dict of tensors) run with the import changed. The training stream
reads the same trajectories (`rlds.parse_episode`) and applies the same kind of functions, but in an order it can seek
in; use this class for pipelines of your own, for inspection, and for conversions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from octo_like.data import rlds
from octo_like.data.spec import DataError
from octo_like.data.tf import tf

Tensors = dict[str, Any]


def vmap(fn: Callable[[Any], Any], num_parallel_calls: int | None = None) -> Callable[[Any], Any]:
    """`fn` of one frame, applied to all frames of a trajectory (at least one)."""

    def mapped(trajectory: Any) -> Any:
        steps = tf.shape(tf.nest.flatten(trajectory)[0], tf.int64)[0]
        frames = tf.data.Dataset.from_tensor_slices(trajectory).map(fn, num_parallel_calls)
        return frames.batch(steps).get_single_element()

    return mapped


class TrajectoryDataset:
    """A tf.data.Dataset of trajectories, or of frames after `flatten`. Immutable: every operation returns a new one.

    Attributes:
      dataset: the tf.data.Dataset.
      is_flattened: elements are frames.
    """

    def __init__(self, dataset: tf.data.Dataset, *, is_flattened: bool = False):
        self.dataset = dataset
        self.is_flattened = is_flattened

    # -- sources

    @classmethod
    def from_rlds(
        cls,
        builder: Any,
        split: str = "train",
        shuffle: bool = True,
        num_parallel_reads: int = tf.data.AUTOTUNE,
    ) -> TrajectoryDataset:
        """Trajectories of an RLDS split; images stay encoded.

        Args:
          builder: a TFDS builder, or the path of a dataset version (the folder with dataset_info.json).
          split: name of a split, "a+b" for several.
          shuffle: shuffle files, and trajectories among those read together. False: the order on disk.
          num_parallel_reads: files read in turns when shuffling.

        Each trajectory also has `traj_metadata` (episode features, per step), `_len`, `_frame_index` and `_traj_index`.
        """
        directory = os.path.expanduser(os.fspath(getattr(builder, "data_path", builder)).rstrip("/"))
        root, version = os.path.split(directory)
        data_dir, name = os.path.split(root)
        opened = rlds.open_split(name, data_dir, version, split)
        files = tf.data.Dataset.from_tensor_slices(list(opened.files))
        if shuffle:
            files = files.shuffle(len(opened.files))
            records = files.interleave(
                tf.data.TFRecordDataset, num_parallel_calls=num_parallel_reads, deterministic=False
            )
        else:
            records = files.flat_map(tf.data.TFRecordDataset)

        def parse(number: tf.Tensor, record: tf.Tensor) -> Tensors:
            trajectory = rlds.parse_episode(record, opened.features)
            length = tf.shape(trajectory["_len"])[0]
            return {**trajectory, "_traj_index": tf.repeat(tf.cast(number, tf.int32), length)}

        return cls(records.enumerate().map(parse, num_parallel_calls=tf.data.AUTOTUNE))

    @staticmethod
    def sample_from_datasets(
        datasets: Sequence[TrajectoryDataset],
        weights: Sequence[float] | None = None,
        stop_on_empty_dataset: bool = False,
        seed: int | None = None,
    ) -> TrajectoryDataset:
        """Elements drawn at random from several datasets, all of trajectories or all of frames.

        For training use the stream: its mixture is exact and can be sought; this one is neither.
        """
        kinds = {dataset.is_flattened for dataset in datasets}
        if len(kinds) != 1:
            raise DataError("sample_from_datasets needs at least one dataset, all flattened or none")
        mixed = tf.data.Dataset.sample_from_datasets(
            [dataset.dataset for dataset in datasets],
            weights=None if weights is None else [float(w) for w in np.asarray(weights) / np.sum(weights)],
            stop_on_empty_dataset=stop_on_empty_dataset,
            seed=seed,
        )
        return TrajectoryDataset(mixed, is_flattened=kinds.pop())

    # -- maps

    def traj_map(
        self, fn: Callable[[Tensors], Tensors], num_parallel_calls: int | None = tf.data.AUTOTUNE
    ) -> TrajectoryDataset:
        """`fn` on whole trajectories, before `flatten`."""
        if self.is_flattened:
            raise DataError("traj_map needs trajectories, but this dataset is flattened; use frame_map")
        return self._with(self.dataset.map(fn, num_parallel_calls))

    def frame_map(
        self, fn: Callable[[Tensors], Tensors], num_parallel_calls: int | None = tf.data.AUTOTUNE
    ) -> TrajectoryDataset:
        """`fn` on single frames, before or after `flatten`."""
        if self.is_flattened:
            return self._with(self.dataset.map(fn, num_parallel_calls))
        return self.traj_map(vmap(fn), num_parallel_calls)

    def flatten(self, *, num_parallel_calls: int = tf.data.AUTOTUNE) -> TrajectoryDataset:
        """Trajectories to frames, in order."""
        if self.is_flattened:
            raise DataError("the dataset is flattened already")
        frames = self.dataset.interleave(
            tf.data.Dataset.from_tensor_slices, cycle_length=1, num_parallel_calls=num_parallel_calls
        )
        return TrajectoryDataset(frames, is_flattened=True)

    def map(self, fn: Callable[..., Any], num_parallel_calls: int | None = None) -> TrajectoryDataset:
        """`fn` on elements, whatever they are."""
        return self._with(self.dataset.map(fn, num_parallel_calls))

    def filter(self, predicate: Callable[[Tensors], tf.Tensor]) -> TrajectoryDataset:
        """Elements for which `predicate` is true."""
        return self._with(self.dataset.filter(predicate))

    def apply(self, transformation: Callable[[tf.data.Dataset], tf.data.Dataset]) -> TrajectoryDataset:
        """Any function of a tf.data.Dataset."""
        return self._with(transformation(self.dataset))

    # -- what tf.data does

    def take(self, count: int) -> TrajectoryDataset:
        return self._with(self.dataset.take(count))

    def skip(self, count: int) -> TrajectoryDataset:
        return self._with(self.dataset.skip(count))

    def repeat(self, count: int | None = None) -> TrajectoryDataset:
        return self._with(self.dataset.repeat(count))

    def shuffle(self, buffer_size: int, seed: int | None = None, **kwargs: Any) -> TrajectoryDataset:
        return self._with(self.dataset.shuffle(buffer_size, seed=seed, **kwargs))

    def batch(self, batch_size: int, drop_remainder: bool = False, **kwargs: Any) -> TrajectoryDataset:
        return self._with(self.dataset.batch(batch_size, drop_remainder=drop_remainder, **kwargs))

    def cache(self, filename: str = "") -> TrajectoryDataset:
        return self._with(self.dataset.cache(filename))

    def prefetch(self, buffer_size: int = tf.data.AUTOTUNE) -> TrajectoryDataset:
        return self._with(self.dataset.prefetch(buffer_size))

    def concatenate(self, other: TrajectoryDataset) -> TrajectoryDataset:
        if other.is_flattened != self.is_flattened:
            raise DataError("only one of the two datasets is flattened")
        return self._with(self.dataset.concatenate(other.dataset))

    def with_ram_budget(self, gigabytes: float) -> TrajectoryDataset:
        """Limits the buffers that tf.data sizes by itself."""
        options = tf.data.Options()
        options.autotune.ram_budget = int(gigabytes * 2**30)
        return self._with(self.dataset.with_options(options))

    def ignore_errors(self, log_warning: bool = True) -> TrajectoryDataset:
        """Leaves out elements that raise, with a warning each unless told otherwise."""
        return self._with(self.dataset.ignore_errors(log_warning=log_warning))

    # -- ends

    def iterator(self, prefetch: int = tf.data.AUTOTUNE) -> Iterator[Any]:
        """NumPy elements."""
        dataset = self.dataset.prefetch(prefetch) if prefetch else self.dataset
        return dataset.as_numpy_iterator()

    def as_numpy_iterator(self) -> Iterator[Any]:
        return self.dataset.as_numpy_iterator()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    @property
    def element_spec(self) -> Any:
        return self.dataset.element_spec

    def cardinality(self) -> int:
        """Number of elements, negative when unknown or infinite."""
        return int(self.dataset.cardinality())

    def __getattr__(self, name: str) -> Any:
        """Everything else that a tf.data.Dataset can do; a dataset that comes of it is a TrajectoryDataset again."""
        if name.startswith("_") or not hasattr(tf.data.Dataset, name):
            raise AttributeError(f"TrajectoryDataset has no attribute {name!r}, nor has tf.data.Dataset")
        found = getattr(self.dataset, name)
        if not callable(found):
            return found

        def method(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            return self._with(result) if isinstance(result, tf.data.Dataset) else result

        return method

    def _with(self, dataset: tf.data.Dataset) -> TrajectoryDataset:
        return TrajectoryDataset(dataset, is_flattened=self.is_flattened)


# The class's name in dlimp: `from octo_like.data import trajectory as dl` in place of `import dlimp as dl`.
DLataset = TrajectoryDataset
