"""Executes the order: endless training batches that can be sought, and finite validation batches.

    datasets = index.prepare_datasets(specs, data_dir)
    stream = make_train_stream(datasets, batch_spec, tokenizer, seed=0, batch_size=256)
    batch = next(stream)            # this process's rows, NumPy, the schema of octo_like.common.schema
    stream.seek(stream.position)    # the next batch again

What a batch holds depends on the order spec and its number only: not on threads, memory, time, or what was read before.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from octo_like.common.schema import BatchSpec, Tree
from octo_like.common.text import TextTokenizer
from octo_like.data.batches import memory
from octo_like.data.batches.assemble import Request, TaskOptions
from octo_like.data.batches.plan import OrderPlan, batch_bytes, mixed_episodes
from octo_like.data.batches.reader import HostOptions, Reader, prepare_mixture
from octo_like.data.batches.texts import Paraphrases, load_paraphrases
from octo_like.data.batches.validation import ValIterator, make_val_iterators
from octo_like.data.order import order as order_lib
from octo_like.data.order.walk import Cache
from octo_like.data.rlds.bad_records import MAX_BAD_FRACTION
from octo_like.data.rlds.prepare import PreparedDataset
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf_source import LiveSource

__all__ = ["Stream", "ValIterator", "make_train_stream", "make_val_iterators"]

log = logging.getLogger(__name__)

DATA_VERSION = 4
# Batches that have to fit into memory, whatever `prefetch` is: it must not decide whether a run goes on.
PLANNED_BATCHES = 4
AHEAD = 8  # batches whose episodes are read ahead, as far as memory allows


class Stream:
    """Endless iterator over a process's rows of the global batches. See `make_train_stream`.

    Attributes:
      order: the order (`octo_like.data.order.order.Order`).
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
        plan: "OrderPlan",
        order_spec: dict[str, Any],
        *,
        process_index: int,
        process_count: int,
        task: TaskOptions,
        decode: str,
        host: HostOptions,
        paraphrases: Paraphrases | None,
        start: int,
    ):
        self.batch_spec = batch_spec
        self.datasets = dict(datasets)
        self.dataset_names = tuple(datasets)
        self.statistics = {name: prepared.statistics for name, prepared in datasets.items()}
        self._process = (process_index, process_count)
        self._plan, self._host, self._rest_of_spec = plan, host, order_spec
        self._indices = [prepared.train for prepared in datasets.values()]
        self._worker: _Worker | None = None
        self._order_lock = threading.Lock()  # the order keeps caches, and two batches are made at a time
        self._use_order(plan.make())
        sources = [(prepared, prepared.train) for prepared in datasets.values()]
        self._one_batch = batch_bytes(batch_spec, -(-plan.batch_size // process_count))
        self._batch_bytes = self._one_batch * (host.prefetch + 2)  # of those that exist at a time
        self._check_room(self.order)
        self._reader = Reader(sources, batch_spec, tokenizer, task, decode, host, paraphrases, self._batch_bytes)
        self._live = {
            d: LiveSource(
                prepared,
                self._reader.texts,
                self._reader.store.text_lock,
                batch_spec.image_sizes,
                batch_spec.depth_sizes,
                process_index,
                process_count,
            )
            for d, prepared in enumerate(datasets.values())
            if prepared.spec.source is not None
        }
        self._batch = 0
        self.seek(start)

    def _use_order(self, order: order_lib.Order) -> None:
        self.order = order
        self.order_spec = {**self._rest_of_spec, "order": order.spec()}
        self._samples = Cache(2 * AHEAD)

    def adopt(self, saved: Mapping[str, Any]) -> None:
        """Takes over what the first start of a run derived and froze: the number of lanes, unless this stream was given
        one, and the episodes to mix, unless they were given or the memory knob is another one.

        Both are derived alike by any number of processes; this keeps a run going when the rules that derive them
        change. Everything else is left as it is, and is a difference (`order.spec_differences`) if it differs.

        Raises:
          DataError: an order of another version, or one that does not fit into this process's memory.
        """
        frozen = saved.get("order", {})
        if frozen.get("version", order_lib.VERSION) != order_lib.VERSION:
            raise DataError(
                f"the saved run's samples are in order version {frozen['version']}, this code makes version "
                f"{order_lib.VERSION}, in which they come in another order: finish that run with the version of "
                "octo_like that began it, or begin a new one from its weights (init_from) in a new --workdir"
            )
        mixed = {d["name"]: d.get("episodes_mixed") for d in frozen.get("datasets", ())}
        same = saved.get("memory") == self._rest_of_spec["memory"] and set(mixed) == set(self.datasets)
        same = same and all(mixed.values())
        lanes = frozen.get("num_lanes", self.order.num_lanes)
        now = {name: d.episodes_mixed for name, d in zip(self.datasets, self.order.datasets, strict=True)}
        derived = self._plan.mixed is None and same
        order = self._plan.make(lanes if self._plan.num_lanes is None else None, mixed if derived else now)
        if order.spec() == self.order.spec():
            return
        self._check_room(order)
        self._stop_worker()
        self._use_order(order)

    def _check_room(self, order: order_lib.Order) -> None:
        """Raises DataError when what is planned for host_memory_gb does not fit into it beside the batches."""
        need, batches = self._plan.stored_bytes(order), PLANNED_BATCHES * self._one_batch
        if self._plan.mixed is None and need + batches > self._host.memory_gb * memory.STORED * 2**30:
            enough = math.ceil((need + batches) / memory.STORED / 2**30 * 100) / 100
            raise DataError(
                f"host_memory_gb={self._host.memory_gb:g} is too small for {self._process[1]} process(es): the "
                f"episodes that each mixes take {need / 2**30:.3g} GB, batches {batches / 2**30:.3g} GB, and "
                f"{memory.STORED:.0%} of it is for both; use more processes, or for a new run a smaller batch or "
                f"host_memory_gb of about {enough:g}"
            )

    def memory_line(self) -> str:
        """What this process is going to take, in words. Raises DataError when the machine has less."""
        need, limit = self._plan.stored_bytes(self.order), self._reader.store.max_bytes
        line = memory.check_fits(min(need, limit), self._batch_bytes)
        most = max(data.visits for data in self.order.datasets)
        if need > limit:
            line += f". {need / 2**30:.3g} GB do not fit into host_memory_gb: episodes will be read again and again"
        elif most > 1:
            line += f". Memory for few episodes: a pass reads each up to {most} times, in parts, to mix them well"
        return line

    @property
    def bad_counts(self) -> dict[str, int]:
        """{dataset: damaged records met since this stream was made}."""
        return self._reader.damage.counts

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
            self._worker = _Worker(self.batch, self._batch, self._host.prefetch)
        batch = self._worker.get()
        self._batch += 1
        return batch

    def batch(self, number: int) -> Tree:
        """This process's rows of the global batch `number` (samples from number * B on). Moves nothing."""
        samples = self._samples_of(number)
        step = np.empty_like(samples.frame)
        for d, index in enumerate(self._indices):
            rows = samples.dataset == d
            step[rows] = index.step_of(samples.episode[rows], samples.frame[rows])

        def substitute(row: int, attempt: int) -> tuple[int, int]:
            with self._order_lock:
                episode, frame = self.order.substitute(int(samples.n[row]), attempt)
            index = self._indices[int(samples.dataset[row])]
            return episode, int(index.step_of(np.array([episode]), np.array([frame]))[0])

        episode, held = samples.episode.copy(), {}
        for row in np.flatnonzero(np.isin(samples.dataset, list(self._live))).tolist():
            live = self._live[int(samples.dataset[row])]
            episode[row], held[row], step[row] = live.draw(int(samples.key[row]))
        request = Request(samples.n, samples.dataset, episode, step, samples.key, held)
        batch = self._reader.assemble(request, substitute)
        self._read_ahead(number)
        return batch

    def _samples_of(self, batch: int) -> order_lib.Samples:
        with self._order_lock:
            return self._samples.fetch(batch, lambda: self.order.samples(self.order.batch_rows(batch, *self._process)))

    def _read_ahead(self, number: int) -> None:
        """Starts to load what the next batches need, as far as there is room; what is done with makes room."""
        wanted: dict[tuple[int, int], None] = {}
        for batch in range(number + 1, number + 1 + AHEAD):
            samples = self._samples_of(batch)
            pairs = zip(samples.dataset.tolist(), samples.episode.tolist(), strict=True)
            wanted.update(dict.fromkeys(pair for pair in pairs if pair[0] not in self._live))
        store = self._reader.store
        if not store.request_ahead(wanted):
            with self._order_lock:
                live = self.order.live(number, *self._process)
            store.drop_all_but({*live, *wanted})
            store.request_ahead(wanted)

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
    """Makes batches ahead of the consumer.

    Two at a time: while the frames of one are being decoded, the other's episodes are found and its arrays filled, so
    the decoding threads never wait for the next batch to begin. Batches are handed out in order all the same. The first
    one is made alone, because somebody waits for it.
    """

    MAKERS = 2

    def __init__(self, make: Any, start: int, depth: int):
        self._make, self._next, self._depth = make, start, depth
        self._pool = concurrent.futures.ThreadPoolExecutor(self.MAKERS, "octo_like-batches")
        self._waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        self._failed = False
        self._begin()

    def _begin(self) -> None:
        self._waiting.append(self._pool.submit(self._make, self._next))
        self._next += 1

    def get(self) -> Tree:
        if self._failed:
            raise RuntimeError("making batches has failed; make a new stream or seek")
        try:
            batch = self._waiting.popleft().result()
        except BaseException:
            self._failed = True
            raise
        while len(self._waiting) <= self._depth:
            self._begin()
        return batch

    def stop(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


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
    episodes_mixed: int | Mapping[str, int] | None = None,
    max_visits: int = 16,
    balance_weights: bool = False,
    decode: str = "parity",
    keep_goal_prob: float = 0.5,
    max_goal_distance: int | None = None,
    octo_compat: bool = False,
    drop_task_prob: float = 0.0,
    paraphrases: str | None = None,
    paraphrase_prob: float = 0.5,
    image_dropout_prob: float = 0.0,
    image_dropout_keep: str | None = None,
    cache_dir: str | None = None,
    exact: bool = True,
    host_threads: int = 2,
    prefetch: int = 2,
    host_memory_gb: float = 4.0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    start: int = 0,
    progress: bool = True,
) -> Stream:
    """The training stream of a run.

    Args:
      specs: the mixture, {name: DatasetSpec | its dict | PreparedDataset}; the order gives the dataset ids.
      batch_spec: schema of the batches.
      text_tokenizer: needed when the batches have language.
      data_dir: folder of the TFDS datasets (not needed for prepared ones).
      seed, batch_size, num_lanes: the order; see `octo_like.data.order.order`. `batch_size` is global.
      num_lanes: None: `octo_like.data.order.order.default_lanes`.
      episodes_mixed: episodes that are mixed at a time, by all lanes together; one number, or one for each dataset.
        None: as many as `host_memory_gb` of one process holds (`octo_like.data.batches.memory`); then that, too, is
        part of the order.
      max_visits: how often a pass may read an episode, to mix well in little memory (`memory.plan_visits`).
      balance_weights: multiply the weights by the datasets' usable frames.
      process_index, process_count: whose rows of each batch to make.
      decode: "parity" or "fast"; see `octo_like.data.batches.frames`.
      keep_goal_prob, max_goal_distance, octo_compat, drop_task_prob, paraphrase_prob, image_dropout_prob,
        image_dropout_keep: see `TaskOptions`.
      paraphrases: a JSON file; see `octo_like.data.batches.texts`.
      cache_dir: where indices are kept; default beside the data.
      exact: refuse functions with stateful randomness; False: name them in `order_spec["approximate"]` instead, beside
        the sources that are tf.data.Datasets (`octo_like.data.tf_source`).
      host_threads, prefetch, host_memory_gb, max_bad_fraction: see `HostOptions`.
      start: global sample number to begin at.

    Raises:
      DataError (a ValueError): whatever is wrong with data or settings, with the valid choices.
    """
    host = HostOptions(host_threads, prefetch, host_memory_gb, max_bad_fraction)
    datasets = prepare_mixture(
        specs, data_dir, cache_dir, progress, max_bad_fraction=max_bad_fraction, process_index=process_index
    )
    told = {name for d in datasets.values() for name, key in d.spec.point_keys.items() if key is not None}
    for name in batch_spec.points:
        if name not in told:
            log.warning("no dataset says where %r is (point_keys): model.auxiliaries learn nothing of it", name)
    approximate = [name for name, d in datasets.items() if d.function.random_ops]
    if exact and approximate:
        d = datasets[approximate[0]]
        raise DataError(
            f"{d.key}: standardize={d.spec.standardize!r} uses {', '.join(d.function.random_ops)}, whose results no "
            "resume can repeat; use tf.random.stateless_*, or accept it with exact=False"
        )
    sources = [name for name, d in datasets.items() if d.spec.source is not None]
    if sources and balance_weights:
        raise DataError(f"{sources[0]}: a source's size is not known, so balance_weights=True has no meaning for it")
    approximate += sources
    said = load_paraphrases(paraphrases) if paraphrases is not None else None
    task = TaskOptions(
        keep_goal_prob,
        max_goal_distance,
        octo_compat,
        drop_task_prob,
        paraphrase_prob if said is not None else 0.0,
        image_dropout_prob,
        image_dropout_keep,
    )
    weights = {name: d.spec.weight for name, d in datasets.items()}
    if balance_weights:
        sizes = [int(d.train.frames.sum(dtype=np.int64)) for d in datasets.values()]
        if not any(weight * size for weight, size in zip(weights.values(), sizes, strict=True)):
            counted = ", ".join(f"{name}: {w:g} x {n:,}" for (name, w), n in zip(weights.items(), sizes, strict=True))
            raise DataError(f"balance_weights: weight times usable training steps is 0 for all datasets ({counted})")
        balanced = order_lib.balanced_weights(list(weights.values()), sizes).tolist()
        weights = dict(zip(weights, balanced, strict=True))
    if not any(weights.values()):
        raise DataError(f"the weight of every dataset is 0 ({', '.join(weights)}); at least one must be positive")
    plan = OrderPlan(
        datasets=datasets,
        weights=weights,
        seed=seed,
        batch_size=batch_size,
        num_lanes=num_lanes,
        mixed=mixed_episodes(episodes_mixed, datasets),
        max_visits=max_visits,
        process_index=process_index,
        process_count=process_count,
        host_memory_gb=host_memory_gb,
        slots=tuple(batch_spec.image_sizes),
        depth_slots=tuple(batch_spec.depth_sizes),
    )
    order_spec = {
        "data_version": DATA_VERSION,
        "memory": {"host_memory_gb": float(host_memory_gb)} if episodes_mixed is None else None,
        "approximate": approximate,
        "decode": decode,
        "task": dataclasses.asdict(task),
        "batch": batch_spec.to_json(),
        "tokenizer": text_tokenizer.fingerprint if text_tokenizer is not None else None,
        "paraphrases": said.hash if said is not None else None,
        "views": {name: d.spec.view_fields() for name, d in datasets.items()},
        "normalization": {
            name: {"kind": d.spec.normalization, "mask": d.statistics["action"]["mask"].tolist(), "head": d.spec.head}
            for name, d in datasets.items()
        },
    }
    return Stream(
        datasets,
        batch_spec,
        text_tokenizer,
        plan,
        order_spec,
        process_index=process_index,
        process_count=process_count,
        task=task,
        decode=decode,
        host=host,
        paraphrases=said,
        start=start,
    )
