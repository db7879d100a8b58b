"""From a dataset's spec to what a run reads: index, training and validation episodes, statistics, usable steps."""

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from octo_like.common.lanes import ONE_PROCESS, Processes
from octo_like.data.order import order
from octo_like.data.oxe import registry
from octo_like.data.prepared import PreparedDataset, check_mask, check_names, laid_flat
from octo_like.data.rlds import beam_pass, columns, filters, records, shared_pass
from octo_like.data.rlds.bad_records import TooManyBadRecords
from octo_like.data.rlds.cache import cache_folder, cached, can_hold_caches, default_workers, discard, load_index
from octo_like.data.rlds.cache_files import DamagedCache
from octo_like.data.rlds.index import Index, SplitIndex, digest_of, with_usable
from octo_like.data.rlds.records import EpisodeFunction, RldsSplit
from octo_like.data.rlds.statistics import read_rows, streamed_statistics
from octo_like.data.settings import INDEX_DEFAULTS, IndexOptions
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf_source import prepare_source

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- training, validation, statistics, filters


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


def choose_episodes(key: str, spec: DatasetSpec, index: Index, val_index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training episodes in the index of a split, and of the validation episodes in `val_index`.

    What the user's filter refused and what has no step is as if it were not there: an empty episode would take a place
    in validation or among num_demos and show nothing.

    Args:
      val_index: of the split for validation; `index` itself when that is a share of the training split.

    Raises:
      DataError: nothing is left to train on, or fewer episodes than num_demos.
    """
    usable = np.flatnonzero(index.frames > 0)
    split_inside = spec.val_split is None and spec.num_demos_of == "all"
    if spec.num_demos is not None and split_inside:
        if spec.num_demos > len(usable):
            raise DataError(f"{key}: num_demos={spec.num_demos}, but only {len(usable)} episodes exist")
        usable = usable[first_demos(index.record_hash[usable], spec.num_demos)]
    if spec.val_split is not None:
        chosen, validation = usable, np.flatnonzero(val_index.frames > 0)
    else:
        validation = usable[hold_out(index.record_hash[usable], spec.val_fraction)] if len(usable) else usable
        chosen = np.setdiff1d(usable, validation)
        if len(usable) and not len(chosen):
            few = "" if spec.num_demos is None else f" (num_demos={spec.num_demos})"
            raise DataError(
                f"{key}: split {spec.split!r} has {len(usable)} episode(s) with usable steps, none left to train on "
                f"after holding out validation{few}; set val_fraction=0 or name a val_split"
            )
    if spec.num_demos is not None and not split_inside:
        if spec.num_demos > len(chosen):
            raise DataError(f"{key}: num_demos={spec.num_demos}, but only {len(chosen)} training episodes exist")
        chosen = chosen[first_demos(index.record_hash[chosen], spec.num_demos)]
    return chosen, validation


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A dataset whose files were found and whose function was traced; no record has been read.

    Attributes:
      split: of training (and of a validation that is a share of it). val_split: another one for validation, or None.
      cache_dir: where its indices are kept; None: beside the data, or where the user's caches are.
    """

    key: str
    split: RldsSplit
    val_split: RldsSplit | None
    function: EpisodeFunction
    cache_dir: str | None

    @classmethod
    def find(
        cls,
        key: str,
        spec: DatasetSpec,
        data_dir: str,
        cache_dir: str | None,
        options: IndexOptions = INDEX_DEFAULTS,
    ) -> "_Opened":
        def opened(name: str) -> RldsSplit:
            limit = options.max_bad_fraction
            return records.open_split(spec.name, data_dir, spec.version, name, max_bad_fraction=limit)

        split = opened(spec.split)
        _caution(key, spec, split)
        function = EpisodeFunction(spec, split.features)
        check_names(key, spec, function)
        function.output  # noqa: B018 - traces: wrong keys are reported before any file is read
        if cache_dir is None and options.pod_dir is not None and not can_hold_caches(split.directory):
            cache_dir = options.pod_dir
        val_split = None if spec.val_split is None else opened(spec.val_split)
        return cls(key, split, val_split, function, cache_dir)

    def jobs(self) -> list[shared_pass.Job]:
        """Splits that are not indexed yet."""
        found = []
        for split in (self.split, self.val_split):
            if split is not None:
                folder = cache_folder(split, self.function, self.cache_dir)
                job = shared_pass.Job(self.function.spec, split, folder)
                job.function = self.function  # traced already
                if not job.indexed():
                    found.append(job)
        return found

    def prepare(self, progress: bool, options: IndexOptions) -> PreparedDataset:
        """Loads or builds the indices, chooses the episodes and computes what belongs to them."""
        for last in (False, True):
            whole = self._index(self.split, progress, options)
            val_whole = whole if self.val_split is None else self._index(self.val_split, progress, options)
            try:
                return self._prepared(whole, val_whole)
            except DamagedCache as error:  # found when the rows were read from their first to their last
                if last:
                    raise
                log.warning("%s. The index of %s is made anew", error, self.key)
                for one in (whole, val_whole):
                    discard(one.folder, one.made)
        raise AssertionError("the last attempt returns or raises")

    def _prepared(self, whole: SplitIndex, val_whole: SplitIndex) -> PreparedDataset:
        key, spec, split = self.key, self.function.spec, self.split
        index, instructions, damaged = whole.index, collections.Counter(whole.instructions), whole.damaged
        targets = tuple(dict.fromkeys(whole.targets + val_whole.targets))
        if val_whole is not whole:
            instructions.update(val_whole.instructions)
            damaged += val_whole.damaged
        chosen, validation = choose_episodes(key, spec, index, val_whole.index)
        if not index.steps[chosen].sum():
            left = f" after filter={spec.filter!r}" if spec.filter else ""
            raise DataError(
                f"{key}: split {spec.split!r} of {split.directory} has no usable steps in {len(index)} episodes{left}"
            )
        statistics = self._statistics(whole, chosen)
        train = self._filtered(whole, statistics).take(chosen)
        val = self._filtered(val_whole, statistics).take(validation)
        if not train.frames.sum():
            used = {name: value for name, value in spec.filter_fields().items() if value not in (None, False)}
            raise DataError(
                f"{key}: the filters leave none of the {int(index.steps[chosen].sum())} steps of {len(chosen)} "
                "training episodes: " + ", ".join(f"{name}={value}" for name, value in used.items())
            )
        where = (split.directory, split.version)
        return PreparedDataset(
            key, spec, self.function, train, val, statistics, dict(instructions), *where, damaged, targets
        )

    def _index(self, split: RldsSplit, progress: bool, options: IndexOptions) -> SplitIndex:
        return load_index(
            split,
            self.function,
            self.cache_dir,
            progress,
            workers=options.workers,
            max_bad_fraction=options.max_bad_fraction,
        )

    def _statistics(self, whole: SplitIndex, chosen: np.ndarray) -> dict[str, Any]:
        key, spec, function = self.key, self.function.spec, self.function
        index, mask = whole.index, check_mask(key, spec, function.action_dim)
        selected = np.zeros(len(index), bool)
        selected[chosen] = True
        ends = index.first + index.steps

        widths = {"action": function.action_dim}
        if function.proprio_dim is not None:
            widths["proprio"] = function.proprio_dim
        prefixes = {part: f"{part}_" for part in widths}
        for name, shape in function.extra_shapes.items():
            widths[name], prefixes[name] = math.prod(shape), f"extra:{name}:"

        def values(part: str) -> Iterator[np.ndarray]:
            for first, chunk in read_rows(whole.rows_path, whole.rows_digest):
                episode = np.searchsorted(ends, np.arange(first, first + len(chunk)), side="right")
                yield laid_flat(columns.from_rows(chunk[selected[episode]], function)[part], widths[part])

        def make() -> dict[str, Any]:
            computed = {part: streamed_statistics(functools.partial(values, part)) for part in widths}
            return {f"{prefixes[part]}{k}": v for part, stats in computed.items() for k, v in stats.items()}

        digest = digest_of(chosen.astype(np.int64), index.record_hash[chosen])
        what = f"statistics of {key}"
        arrays = cached(whole, f"statistics-{digest}.npz", make, what=what)
        parts = {
            part: {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            for part, prefix in prefixes.items()
        }
        statistics: dict[str, Any] = {part: parts.pop(part) for part in ("action", "proprio") if part in parts}
        if mask is not None:
            statistics["action"]["mask"] = mask
        if parts:
            statistics["extra"] = parts
        statistics["num_transitions"] = int(index.steps[chosen].sum(dtype=np.int64))
        statistics["num_trajectories"] = len(chosen)
        return statistics

    def _filtered(self, whole: SplitIndex, statistics: dict[str, Any]) -> Index:
        """The index of the whole split with the steps that the spec's filters leave."""
        spec, index = self.function.spec, whole.index
        if not filters.has_filters(spec):
            return index
        definition = {"normalization": spec.normalization, **spec.filter_fields()}
        parts = [statistics[part] for part in ("action", "proprio") if part in statistics]
        numbers = [values for of_part in parts for values in of_part.values()]

        def make() -> dict[str, Any]:
            usable = np.zeros(int(index.steps.sum(dtype=np.int64)), bool)
            episodes = _episodes(whole) if filters.needs_values(spec) else _no_values(index, self.function)
            for number, rows in enumerate(episodes):
                values = columns.from_rows(rows, self.function)
                labeled = bool(index.has_language[number])
                start = index.first[number]
                usable[start : start + len(rows)] = filters.usable_steps(
                    spec, statistics, values["action"], values["proprio"], labeled
                )
            return {"bits": np.packbits(usable)}

        file = f"usable-{digest_of(definition, *numbers)}.npz"
        what = f"filtered steps of {self.key}"
        bits = cached(whole, file, make, what=what)["bits"]
        if index.bits is not None:
            bits = bits & index.bits
        usable = np.unpackbits(bits)[: int(index.steps.sum(dtype=np.int64))].astype(bool)
        return with_usable(index, usable, definition)


def unindexed(specs: dict[str, DatasetSpec], data_dir: str, cache_dir: str | None = None) -> list[shared_pass.Job]:
    """The splits of RLDS datasets that have no index yet: what `prepare_datasets` would read."""
    return [job for key, spec in specs.items() for job in _Opened.find(key, spec, data_dir, cache_dir).jobs()]


def prepare_dataset(
    key: str,
    spec: DatasetSpec,
    data_dir: str,
    cache_dir: str | None = None,
    progress: bool = True,
    options: IndexOptions = INDEX_DEFAULTS,
    hosts: Processes = ONE_PROCESS,
) -> PreparedDataset:
    """Finds, indexes, splits and filters a dataset, and computes the statistics of its training episodes.

    Arguments are those of `prepare_datasets`.

    Raises:
      DataError: whatever is wrong with the files or the spec, with what would be valid.
    """
    return prepare_datasets({key: spec}, data_dir, cache_dir, progress, options, hosts)[key]


def _caution(key: str, spec: DatasetSpec, split: RldsSplit) -> None:
    """Logs what the registry knows about a dataset's traps."""
    if spec.standardize is not None and spec.from_registry:
        for caution in registry.cautions(
            spec.standardize, spec.compat, split.version, sum(split.shard_lengths), spec.bgr_slots, spec.image_keys
        ):
            log.warning("%s: %s", key, caution)


def whole_split(prepared: PreparedDataset, split: str, data_dir: str, cache_dir: str | None = None) -> SplitIndex:
    """The index of all episodes of a split, also of those that are not used."""
    files = records.open_split(prepared.spec.name, data_dir, prepared.spec.version, split, max_bad_fraction=1.0)
    assert isinstance(prepared.function, EpisodeFunction)  # of files
    return load_index(files, prepared.function, cache_dir, False, max_bad_fraction=1.0)


def values_of(
    prepared: PreparedDataset, index: Index, whole: SplitIndex
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number in `index`, action (T, A) or (T, N, A), proprio (T, P)) of the episodes of `index`, some of `whole`.

    In physical units, read from the index: no record is read and no image decoded. P is 0 without proprioception.
    """
    place = {key: number for number, key in enumerate(zip(index.file.tolist(), index.offset.tolist(), strict=True))}
    keys = zip(whole.index.file.tolist(), whole.index.offset.tolist(), strict=True)
    for key, rows in zip(keys, _episodes(whole), strict=True):
        if key in place:
            values = columns.from_rows(rows, prepared.function)
            yield place[key], values["action"], values["proprio"]


def _episodes(whole: SplitIndex) -> Iterator[np.ndarray]:
    """Rows of each episode in turn."""
    number, steps, left = 0, whole.index.steps, None
    for _, chunk in read_rows(whole.rows_path, whole.rows_digest):
        left = chunk if left is None or not len(left) else np.concatenate([left, chunk])
        while number < len(steps) and len(left) >= steps[number]:
            yield left[: steps[number]]
            left, number = left[steps[number] :], number + 1
    # Episodes without a step, when there is no row at all.
    width = 0 if left is None else left.shape[1]
    yield from (np.zeros((0, width), np.float32) for _ in range(number, len(steps)))


def _no_values(index: Index, function: EpisodeFunction) -> Iterator[np.ndarray]:
    width = columns.width(function)
    return (np.broadcast_to(np.float32(0), (int(steps), width)) for steps in index.steps)


def prepare_datasets(
    specs: Mapping[str, DatasetSpec],
    data_dir: str | None,
    cache_dir: str | None = None,
    progress: bool = True,
    options: IndexOptions = INDEX_DEFAULTS,
    hosts: Processes = ONE_PROCESS,
) -> dict[str, PreparedDataset]:
    """Finds, indexes, splits and filters the datasets of a mixture, and computes statistics; in the mixture's order.

    What has no index is read in one pass over the files of all datasets. What it will read is logged before.

    Args:
      data_dir: folder of the TFDS datasets; None when all datasets are a tf.data.Dataset.
      cache_dir: where indices are kept; None: beside the data, or in ~/.cache/octo_like when that is read-only.
      options: how files without an index are read.
      hosts: those that prepare the same datasets at the same time; they share the files to read.

    Raises:
      DataError: whatever is wrong with files or specs, with what would be valid. Bad records of all datasets are in one
        error (TooManyBadRecords).
      StorageError: the storage does not answer: nothing is known to be wrong.
    """
    if hosts.count == 1:
        options = dataclasses.replace(options, pod_dir=None)
    of_files = {key: spec for key, spec in specs.items() if spec.source is None}
    if data_dir is None and of_files:
        raise DataError("data_dir is needed to read datasets")
    opened = {key: _Opened.find(key, spec, data_dir or "", cache_dir, options) for key, spec in of_files.items()}
    jobs = [job for dataset in opened.values() for job in dataset.jobs()]
    if jobs:
        log.info(shared_pass.estimate(jobs))
        processes = options.processes or shared_pass.default_processes(jobs)
        if options.beam is not None:
            beam_pass.run(jobs, options.beam)
        elif processes > 1 or hosts.count > 1:
            shared = dict(process_index=hosts.index, process_count=hosts.count)
            threads = options.workers or default_workers()
            shared_pass.take_part(jobs, threads=threads, processes=processes, progress=progress, **shared)
    prepared, bad = {}, []
    for key, spec in specs.items():
        try:
            prepared[key] = opened[key].prepare(progress, options) if key in opened else prepare_source(key, spec)
        except TooManyBadRecords as error:  # raised after the others were looked at
            bad.append(error)
    if bad:
        raise bad[0] if len(bad) == 1 else TooManyBadRecords("\n\n".join(map(str, bad)))
    return prepared
