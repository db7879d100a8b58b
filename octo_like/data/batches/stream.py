"""Executes the order: endless training batches that can be sought, and finite validation batches.

    datasets = prepare_datasets(specs, data_dir)
    stream = make_train_stream(datasets, batch_spec, tokenizer, Settings.of(seed=0, batch_size=256))
    batch = next(stream)            # this process's rows, NumPy, the schema of octo_like.common.schema
    stream.seek(stream.position)    # the next batch again

What a batch holds depends on the order spec and its number only: not on threads, memory, time, or what was read before.
"""

import collections
import concurrent.futures
import logging
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from octo_like.common.lanes import ONE_PROCESS, Processes
from octo_like.common.schema import BatchSpec, Tree
from octo_like.common.text import TextTokenizer
from octo_like.common.vocabularies import NO_TARGETS, Targets
from octo_like.data.batches import memory
from octo_like.data.batches.assemble import Request
from octo_like.data.batches.plan import OrderPlan
from octo_like.data.batches.reader import Reader
from octo_like.data.batches.texts import Texts, load_paraphrases
from octo_like.data.batches.validation import ValIterator, make_val_iterators
from octo_like.data.order import order as order_lib
from octo_like.data.order.walk import Cache
from octo_like.data.prepared import PreparedDataset
from octo_like.data.settings import Settings
from octo_like.data.spec import DataError

__all__ = ["Settings", "Stream", "ValIterator", "make_train_stream", "make_val_iterators"]

log = logging.getLogger(__name__)

DATA_VERSION = 4
# Batches that have to fit into memory, whatever `prefetch` is: it must not decide whether a run goes on.
PLANNED_BATCHES = 4
AHEAD = 8  # batches whose episodes are read ahead, as far as memory allows


class Stream:
    """Endless iterator over a process's rows of the global batches, a `octo_like.common.streams.BatchStream`. See
    `make_train_stream`.

    Attributes:
      order: the order (`octo_like.data.order.order.Order`).
      order_spec: JSON-able; a run may be resumed iff it is unchanged (`order.spec_differences`).
      statistics: {dataset: statistics}, over the training episodes.
      dataset_names: name of each `dataset_id`.
      batch_spec: schema of the batches.
    """

    def __init__(self, plan: OrderPlan, texts: Texts, rest_of_spec: dict[str, Any]):
        self.batch_spec, self.datasets = plan.batch_spec, dict(plan.datasets)
        self.dataset_names = tuple(self.datasets)
        self.statistics = {name: prepared.statistics for name, prepared in self.datasets.items()}
        self._plan, self._host, self._rest_of_spec = plan, plan.settings.host, rest_of_spec
        self._worker: _Worker | None = None
        self._order_lock = threading.Lock()  # the order keeps caches, and two batches are made at a time
        self._use_order(plan.make())
        self._batch_bytes = plan.batch_bytes * (self._host.prefetch + 2)  # of those that exist at a time
        self._check_room(self.order)
        self._reader = Reader(
            self.datasets, "train", plan.batch_spec, texts, plan.settings, plan.processes, self._batch_bytes
        )
        self._batch = 0

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
        given = self._plan.settings.order.num_lanes
        order = self._plan.make(lanes if given is None else None, mixed if derived else now)
        if order.spec() == self.order.spec():
            return
        self._check_room(order)
        self._stop_worker()
        self._use_order(order)

    def _check_room(self, order: order_lib.Order) -> None:
        """Raises DataError when what is planned for host_memory_gb does not fit into it beside the batches."""
        need, batches = self._plan.stored_bytes(order), PLANNED_BATCHES * self._plan.batch_bytes
        memory_gb = self._host.host_memory_gb
        if self._plan.mixed is None and need + batches > memory_gb * memory.STORED * 2**30:
            enough = math.ceil((need + batches) / memory.STORED / 2**30 * 100) / 100
            raise DataError(
                f"host_memory_gb={memory_gb:g} is too small for {self._plan.processes.count} process(es): the "
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
        """This process's rows of the global batch `number` (samples from number * B on). The position stays."""
        samples = self._samples_of(number)

        def substitute(row: int, attempt: int) -> tuple[int, int]:
            with self._order_lock:
                return self.order.substitute(int(samples.n[row]), attempt)

        request = Request(samples.n, samples.dataset, samples.episode, samples.frame, samples.key)
        batch = self._reader.assemble(request, substitute)
        self._read_ahead(number)
        return batch

    def _samples_of(self, batch: int) -> order_lib.Samples:
        with self._order_lock:
            processes = self._plan.processes
            return self._samples.fetch(batch, lambda: self.order.samples(self.order.batch_rows(batch, *processes)))

    def _read_ahead(self, number: int) -> None:
        """Starts to load what the next batches need, as far as there is room; what is done with makes room."""
        store, sets = self._reader.store, self._reader.sets
        wanted: dict[tuple[int, int], None] = {}
        for batch in range(number + 1, number + 1 + AHEAD):
            samples = self._samples_of(batch)
            pairs = zip(samples.dataset.tolist(), samples.episode.tolist(), strict=True)
            wanted.update(dict.fromkeys(pair for pair in pairs if sets[pair[0]].seekable))
        if not store.request_ahead(wanted):
            with self._order_lock:
                live = self.order.live(number, *self._plan.processes)
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
    datasets: Mapping[str, PreparedDataset],
    batch_spec: BatchSpec,
    text_tokenizer: TextTokenizer | None,
    settings: Settings,
    *,
    targets: Targets = NO_TARGETS,
    processes: Processes = ONE_PROCESS,
) -> Stream:
    """The training stream of a run.

    Args:
      datasets: the mixture, by name; the order gives the dataset ids.
      batch_spec: schema of the batches.
      text_tokenizer: needed when the batches have language.
      settings: of the order, the tasks and this machine, e.g. `Settings.of(seed=0, batch_size=256)`.
      targets: what makes ids of texts and actions that the model learns to say; needed when the batches have any.
      processes: whose rows of each batch to make.

    Raises:
      DataError (a ValueError): whatever is wrong with data or settings, with the valid choices.
    """
    named = {name for d in datasets.values() for name, key in d.spec.point_keys.items() if key is not None}
    for name in batch_spec.points:
        if name not in named:
            log.warning("no dataset says where %r is (point_keys): model.auxiliaries learn nothing of it", name)
    if batch_spec.text_target is not None and all(d.spec.text_target is None for d in datasets.values()):
        log.warning("no dataset has texts to learn (text_keys): model.auxiliaries learn none")
    random = [name for name, d in datasets.items() if d.function.random_ops]
    if settings.exact and random:
        d = datasets[random[0]]
        raise DataError(
            f"{d.key}: standardize={d.spec.standardize!r} uses {', '.join(d.function.random_ops)}, whose results no "
            "resume can repeat; use tf.random.stateless_*, or accept it with exact=False"
        )
    plan = OrderPlan.of(datasets, batch_spec, settings, processes)
    paraphrases = None if settings.paraphrases is None else load_paraphrases(settings.paraphrases)
    texts = Texts(text_tokenizer, paraphrases, settings.task.paraphrase_prob, targets=targets)
    order_spec = {
        "data_version": DATA_VERSION,
        "approximate": random + [name for name, d in datasets.items() if not d.seekable],
        **settings.spec(subtasks=batch_spec.subtask),
        **texts.spec,
        # 2: what has no instruction is told its sub-task, and learned where nothing is asked.
        **({"words": 2} if batch_spec.subtask or batch_spec.text_target is not None else {}),
        "batch": batch_spec.to_json(),
        "views": {name: d.spec.view_fields() for name, d in datasets.items()},
        "normalization": {
            name: {"kind": d.spec.normalization, "mask": d.statistics["action"]["mask"].tolist(), "head": d.spec.head}
            for name, d in datasets.items()
        },
    }
    return Stream(plan, texts, order_spec)
