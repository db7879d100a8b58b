"""Executes the order: endless training batches that can be sought, and finite validation batches.

    datasets = index.prepare_datasets(specs, data_dir)
    stream = make_train_stream(datasets, batch_spec, tokenizer, seed=0, batch_size=256)
    batch = next(stream)            # this process's rows, NumPy, the schema of octo_like.common.schema
    stream.seek(stream.position)    # the next batch again

What a batch holds depends on the order spec and its number only: not on threads, memory, time, or what was read before.
"""

import concurrent.futures
import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from octo_like.common.schema import BatchSpec, Tree
from octo_like.common.text import TextTable, TextTokenizer
from octo_like.data import order as order_lib
from octo_like.data.assemble import Assembler, Request, TaskOptions, check_spec
from octo_like.data.episodes import EpisodeStore
from octo_like.data.frames import MODES
from octo_like.data.index import PreparedDataset, prepare_datasets
from octo_like.data.spec import DataError, DatasetSpec, specs_from_config, suggest

DATA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """Knobs of this machine. None of them changes a batch.

    Attributes:
      threads: threads that decode frames (and as many that read episodes).
      prefetch: batches made ahead of the consumer.
      memory_gb: encoded episodes kept in memory. Blocks that do not fit are read again; see docs/data.md.
    """

    threads: int = 2
    prefetch: int = 2
    memory_gb: float = 2.0

    def __post_init__(self):
        if self.threads < 1 or self.prefetch < 1 or self.memory_gb <= 0:
            raise DataError(f"threads and prefetch must be at least 1, memory_gb positive; got {self}")


def default_lanes(process_count: int) -> int:
    """Lanes of a new run: the process count, rounded up to a power of two."""
    return 1 << (process_count - 1).bit_length()


def _prepared(
    specs: Mapping[str, Any], data_dir: str | None, cache_dir: str | None, progress: bool
) -> dict[str, PreparedDataset]:
    if specs and all(isinstance(value, PreparedDataset) for value in specs.values()):
        return dict(specs)
    if data_dir is None:
        raise DataError("data_dir is needed to read datasets")
    return prepare_datasets(specs_from_config(specs), data_dir, cache_dir, progress)


class _Reader:
    """What training and validation share: store, table of texts, assembler, threads."""

    def __init__(
        self,
        sources: list[tuple[PreparedDataset, Any]],
        spec: BatchSpec,
        tokenizer: TextTokenizer | None,
        task: TaskOptions,
        decode: str,
        host: HostOptions,
    ):
        if decode not in MODES:
            raise DataError(f"decode mode {decode!r}; {suggest(decode, MODES)}")
        if spec.language_length is not None:
            if tokenizer is None:
                raise DataError("batches have language, but no text tokenizer was given")
            if tokenizer.max_length != spec.language_length:
                raise DataError(
                    f"the tokenizer makes {tokenizer.max_length} ids, but batches hold language_length="
                    f"{spec.language_length}"
                )
        check_spec([prepared for prepared, _ in sources], spec)
        table = TextTable(tokenizer) if tokenizer is not None else _NoText()
        # Two pools: reading ahead must not queue in front of the frames of the present batch.
        self._readers = concurrent.futures.ThreadPoolExecutor(host.threads, "octo_like-read")
        self._decoders = concurrent.futures.ThreadPoolExecutor(host.threads, "octo_like-decode")
        self.store = EpisodeStore(sources, spec.image_sizes, table, self._readers, int(host.memory_gb * 2**30))
        self.assemble = Assembler(
            sources,
            spec,
            self.store,
            table if tokenizer is not None else None,
            self._decoders,
            task=task,
            decode=decode,
            threads=host.threads,
        )

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)


class _NoText:
    """Stands for the text table in a run without language."""

    def rows(self, texts: list[str]) -> np.ndarray:
        return np.zeros(len(texts), np.int32)


class Stream:
    """Endless iterator over a process's rows of the global batches. See `make_train_stream`.

    Attributes:
      order: the order (`octo_like.data.order.Order`).
      order_spec: JSON-able; a run may be resumed iff it is unchanged (`order.spec_differences`).
      statistics: {dataset: statistics}, over the training episodes.
      dataset_names: name of each `dataset_id`.
      batch_spec: schema of the batches.
    """

    def __init__(
        self,
        datasets: Mapping[str, PreparedDataset],
        batch_spec: BatchSpec,
        tokenizer: TextTokenizer | None,
        order: order_lib.Order,
        order_spec: dict[str, Any],
        *,
        process_index: int,
        process_count: int,
        task: TaskOptions,
        decode: str,
        host: HostOptions,
        start: int,
    ):
        self.order, self.order_spec, self.batch_spec = order, order_spec, batch_spec
        self.datasets = dict(datasets)
        self.dataset_names = tuple(datasets)
        self.statistics = {name: prepared.statistics for name, prepared in datasets.items()}
        self._process = (process_index, process_count)
        order.batch_rows(0, process_index, process_count)  # raises here rather than in a thread
        sources = [(prepared, prepared.train) for prepared in datasets.values()]
        self._reader = _Reader(sources, batch_spec, tokenizer, task, decode, host)
        self._prefetch = host.prefetch
        self._ahead: dict[tuple[int, int], tuple[Any, int]] = {}  # episodes of the next block already asked for
        self._worker: _Worker | None = None
        self._batch = 0
        self.seek(start)

    def __iter__(self) -> Iterator[Tree]:
        return self

    @property
    def position(self) -> int:
        """Global number n of the next sample; always a multiple of the batch size."""
        return self._batch * self.order.batch_size

    def seek(self, n: int) -> None:
        """Makes the batch that starts at global sample `n` the next one.

        Raises:
          DataError: n is not the beginning of a batch.
        """
        if n < 0 or n % self.order.batch_size:
            raise DataError(f"position {n} is not the beginning of a batch of {self.order.batch_size}")
        self._stop_worker()
        self._batch = n // self.order.batch_size

    def __next__(self) -> Tree:
        if self._worker is None:
            self._worker = _Worker(self.batch, self._batch, self._prefetch)
        batch = self._worker.get()
        self._batch += 1
        return batch

    def batch(self, number: int) -> Tree:
        """This process's rows of the global batch `number` (samples from number * B on). Moves nothing."""
        samples = self.order.samples(self.order.batch_rows(number, *self._process))
        batch = self._reader.assemble(Request(samples.n, samples.dataset, samples.episode, samples.frame, samples.key))
        self._read_ahead(samples)
        return batch

    def _read_ahead(self, samples: order_lib.Samples) -> None:
        """Loads the next block's episodes in step with the present one: no block begins with a rush of reads."""
        lanes = sorted(set(zip(samples.dataset.tolist(), samples.lane.tolist(), strict=True)))
        for dataset, lane in lanes:
            last = np.flatnonzero((samples.dataset == dataset) & (samples.lane == lane))[-1]
            number, block = int(samples.pass_number[last]), int(samples.block[last])
            done = (int(samples.offset[last]) + 1) / self.order.block_frames(dataset, lane, number, block)
            if block + 1 < self.order.num_blocks(dataset, lane):
                following = self.order.block_episodes(dataset, lane, number, block + 1)
            else:
                following = self.order.block_episodes(dataset, lane, number + 1, 0)
            count = int(done * len(following))
            before = self._ahead.get((dataset, lane), (None, 0))
            self._ahead[dataset, lane] = ((number, block), count)
            start = before[1] if before[0] == (number, block) else 0
            self._reader.store.request([(dataset, int(e)) for e in following[start:count]])

    def close(self) -> None:
        """Stops the threads. The stream cannot be used afterwards."""
        self._stop_worker()
        self._reader.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


class _Worker:
    """Makes batches ahead of the consumer in one background thread."""

    def __init__(self, make: Any, start: int, depth: int):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, start), name="octo_like-batches", daemon=True)
        self._thread.start()

    def _run(self, make: Any, number: int) -> None:
        while not self._stopped.is_set():
            try:
                item = (make(number), None)
            except Exception as error:  # noqa: BLE001 - carried to the consumer, whatever it is
                item = (None, error)
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                return
            number += 1

    def get(self) -> Tree:
        while True:
            try:
                batch, error = self._queue.get(timeout=1.0)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the batch thread has ended; make a new stream or seek") from None
        if error is not None:
            raise error
        return batch

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def make_train_stream(
    specs: Mapping[str, DatasetSpec | PreparedDataset | Mapping[str, Any]],
    batch_spec: BatchSpec,
    text_tokenizer: TextTokenizer | None,
    *,
    data_dir: str | None = None,
    seed: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_lanes: int | None = None,
    episodes_per_block: int = 256,
    decode: str = "parity",
    keep_goal_prob: float = 0.5,
    max_goal_distance: int | None = None,
    octo_compat: bool = False,
    cache_dir: str | None = None,
    exact: bool = True,
    host_threads: int = 2,
    prefetch: int = 2,
    host_memory_gb: float = 2.0,
    start: int = 0,
    progress: bool = True,
) -> Stream:
    """The training stream of a run.

    Args:
      specs: the mixture, {name: DatasetSpec | its dict | PreparedDataset}; the order gives the dataset ids.
      batch_spec: schema of the batches.
      text_tokenizer: needed when the batches have language.
      data_dir: folder of the TFDS datasets (not needed for prepared ones).
      seed, batch_size, num_lanes, episodes_per_block: the order; see `octo_like.data.order`. `batch_size` is global.
      process_index, process_count: whose rows of each batch to make.
      decode: "parity" or "fast"; see `octo_like.data.frames`.
      keep_goal_prob, max_goal_distance, octo_compat: see `TaskOptions`.
      cache_dir: where indices are kept; default beside the data.
      exact: refuse functions with stateful randomness; False: name them in `order_spec["approximate"]` instead.
      host_threads, prefetch, host_memory_gb: see `HostOptions`.
      start: global sample number to begin at.

    Raises:
      DataError (a ValueError): whatever is wrong with data or settings, with the valid choices.
    """
    datasets = _prepared(specs, data_dir, cache_dir, progress)
    approximate = [name for name, d in datasets.items() if d.function.random_ops]
    if exact and approximate:
        d = datasets[approximate[0]]
        raise DataError(
            f"{d.key}: standardize={d.spec.standardize!r} uses {', '.join(d.function.random_ops)}, whose results no "
            "resume can repeat; use tf.random.stateless_*, or accept it with exact=False"
        )
    task = TaskOptions(keep_goal_prob, max_goal_distance, octo_compat)
    host = HostOptions(host_threads, prefetch, host_memory_gb)
    frames = [
        order_lib.DatasetFrames(name, d.spec.weight, d.train.frames, d.train.hash, episodes_per_block)
        for name, d in datasets.items()
    ]
    try:
        order = order_lib.Order(
            frames, seed=seed, batch_size=batch_size, num_lanes=num_lanes or default_lanes(process_count)
        )
        order.batch_rows(0, process_index, process_count)
    except ValueError as error:
        raise DataError(str(error)) from error
    order_spec = {
        "data_version": DATA_VERSION,
        "order": order.spec(),
        "approximate": approximate,
        "decode": decode,
        "task": dataclasses.asdict(task),
        "batch": {
            **dataclasses.asdict(batch_spec),
            "image_sizes": {slot: list(size) for slot, size in batch_spec.image_sizes.items()},
            "goal_images": list(batch_spec.goal_images),
            "heads": list(batch_spec.heads),
        },
        "tokenizer": text_tokenizer.fingerprint if text_tokenizer is not None else None,
        "normalization": {
            name: {"kind": d.spec.normalization, "mask": d.statistics["action"]["mask"].tolist(), "head": d.spec.head}
            for name, d in datasets.items()
        },
    }
    return Stream(
        datasets,
        batch_spec,
        text_tokenizer,
        order,
        order_spec,
        process_index=process_index,
        process_count=process_count,
        task=task,
        decode=decode,
        host=host,
        start=start,
    )


class ValIterator:
    """Finite batches of the validation episodes of one dataset, the same every time it is iterated.

    Frames are taken in a keyed order that depends on the data alone. All batches are full: a last partial one is left
    out, and a dataset with fewer frames than one batch repeats them. `len()` is the number of batches.
    """

    def __init__(
        self,
        dataset_id: int,
        prepared: PreparedDataset,
        reader: _Reader,
        batch_size: int,
        max_batches: int | None,
        process_index: int,
        process_count: int,
    ):
        if batch_size % process_count:
            raise DataError(f"{process_count} processes do not divide the validation batch size {batch_size}")
        self.name = prepared.key
        frames = prepared.val.frames.astype(np.int64)
        self.num_frames, self.num_episodes = int(frames.sum()), len(frames)
        self._dataset_id, self._reader, self._batch_size = dataset_id, reader, batch_size
        self._rows = np.arange(process_index, process_index + 1) * (batch_size // process_count)
        self._local = batch_size // process_count
        episode = np.repeat(np.arange(len(frames)), frames)
        frame = np.arange(len(episode)) - np.repeat(np.cumsum(frames) - frames, frames)
        ranked = order_lib.permutation(len(episode), "validation", prepared.val.hash)
        self._episode, self._frame = episode[ranked], frame[ranked]
        available = max(1, len(episode) // batch_size)
        self._num_batches = available if max_batches is None else min(available, max_batches)
        self._key = order_lib.hash_key("validation", prepared.val.hash, np.arange(len(episode)))

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Tree]:
        for number in range(self._num_batches):
            position = number * self._batch_size + int(self._rows[0]) + np.arange(self._local)
            rows = position % len(self._episode)
            dataset = np.full(self._local, self._dataset_id, np.int32)
            yield self._reader.assemble(
                Request(position, dataset, self._episode[rows], self._frame[rows], self._key[rows])
            )


def make_val_iterators(
    specs: Mapping[str, DatasetSpec | PreparedDataset | Mapping[str, Any]],
    batch_spec: BatchSpec,
    text_tokenizer: TextTokenizer | None,
    *,
    data_dir: str | None = None,
    batch_size: int,
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    decode: str = "parity",
    keep_goal_prob: float = 0.5,
    max_goal_distance: int | None = None,
    octo_compat: bool = False,
    cache_dir: str | None = None,
    host_threads: int = 2,
    host_memory_gb: float = 0.5,
    progress: bool = True,
) -> dict[str, ValIterator]:
    """Validation data per dataset, {name: ValIterator}; datasets without validation episodes are left out.

    It has a store of its own: validating never moves or slows the training stream's position. Values are normalised
    with the statistics of the training episodes. Arguments as in `make_train_stream`; dataset ids are those of `specs`.
    """
    datasets = _prepared(specs, data_dir, cache_dir, progress)
    sources = [(prepared, prepared.val) for prepared in datasets.values()]
    task = TaskOptions(keep_goal_prob, max_goal_distance, octo_compat)
    host = HostOptions(threads=host_threads, memory_gb=host_memory_gb)
    reader = _Reader(sources, batch_spec, text_tokenizer, task, decode, host)
    return {
        name: ValIterator(i, prepared, reader, batch_size, max_batches, process_index, process_count)
        for i, (name, prepared) in enumerate(datasets.items())
        if prepared.val.frames.sum()
    }
