"""Requests of several robots as batches of one policy.

While a batch is being computed the next requests wait; then those that fit together go as one. So a single robot never
waits for company, and many share the accelerator. Rows do not know of each other: the sampling noise of each comes from
its own (seed, step), and what fills a batch up is thrown away.
"""

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from octo_like.common.chunks import Continuation
from octo_like.robot.rollout import PolicyLike, sampling_keys


@dataclasses.dataclass
class Request:
    """What one robot wants to know.

    Attributes:
      observation: arrays (1, W, ...), and "pad_mask_dict".
      task: of one row, from `create_tasks`.
      unnormalize: dataset of the units. seed, step: of the sampling noise.
      continuing: the chunk of one row that the actions go on from, or None.
      words: whether it is what to do next that is wanted, in words, and not actions.
      done: gets the actions (H, A), or the text.
    """

    observation: Mapping[str, Any]
    task: Any
    unnormalize: str | None
    seed: int
    step: int
    continuing: Continuation | None = None
    words: bool = False
    done: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)
    arrived: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def kind(self) -> tuple:
        """Requests of one kind fit into one batch."""
        shapes = jax.tree.map(lambda x: (np.shape(x), np.asarray(x).dtype.str), (self.observation, self.task))
        how = None if self.continuing is None else (*_settings(self.continuing), np.shape(self.continuing.previous))
        return self.unnormalize, self.words, str(shapes), how


class Batcher:
    """Computes requests in a thread of its own.

    Attributes:
      sizes: batch sizes that are compiled: powers of two, and `max_batch`.
      batches: {size: number of batches}, of requests in them before filling up.
      latencies: seconds from arrival to the answer on the host, of the last requests.

    Args:
      policy: see `octo_like.robot.rollout.PolicyLike`.
      rng_seed: of the sampling noise.
      max_batch: requests in one batch.
    """

    def __init__(self, policy: PolicyLike, rng_seed: int = 0, max_batch: int = 8):
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        self.policy, self.rng_seed, self.max_batch = policy, rng_seed, max_batch
        self.sizes = sorted({2**i for i in range(max_batch.bit_length()) if 2**i <= max_batch} | {max_batch})
        self.batches: collections.Counter[int] = collections.Counter()
        self.latencies: collections.deque[float] = collections.deque(maxlen=2048)
        self._waiting: collections.deque[Request] = collections.deque()
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="policy-batches", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> concurrent.futures.Future:
        """The future of a request's actions. Raises RuntimeError after `close`."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is shutting down")
            self._waiting.append(request)
            self._changed.notify_all()
        return request.done

    @property
    def queue_length(self) -> int:
        return len(self._waiting)

    def close(self, timeout: float = 10.0) -> None:
        """Takes no more requests, and returns when those that were taken are answered, or after `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def compute(self, requests: Sequence[Request]) -> np.ndarray | list[str]:
        """Actions (N, H, A) of requests of one kind, or N texts."""
        size = next(size for size in self.sizes if size >= len(requests))
        rows = [*requests, *[requests[-1]] * (size - len(requests))]
        observation, task = (_stacked([getattr(row, part) for row in rows]) for part in ("observation", "task"))
        if requests[0].words:
            speaker: Any = self.policy
            return speaker.predict_text(observation, task, unnormalize=requests[0].unnormalize)[: len(requests)]
        rng = sampling_keys(self.rng_seed, [row.seed for row in rows], [row.step for row in rows])
        options: dict[str, Any] = {"unnormalize": requests[0].unnormalize}
        if requests[0].continuing is not None:
            options["continuing"] = _together([row.continuing for row in rows if row.continuing is not None])
        actions = self.policy.sample_actions(observation, task, rng=rng, **options)
        return np.asarray(actions)[: len(requests)]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                batch = self._next()
                self._busy = True
            self._answer(batch)

    def _answer(self, batch: Sequence[Request]) -> None:
        try:
            answers = self.compute(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].done.set_exception(error)
                return
            for request in batch:  # one may be to blame: the others must not pay for it
                self._answer([request])
            return
        self.batches[len(batch)] += 1
        for request, each in zip(batch, answers, strict=True):
            self.latencies.append(time.monotonic() - request.arrived)
            request.done.set_result(each)

    def _next(self) -> list[Request]:
        """The oldest request, and those behind it that fit into its batch."""
        kind, batch = self._waiting[0].kind, list[Request]()
        rest: collections.deque[Request] = collections.deque()
        for request in self._waiting:
            fits = len(batch) < self.max_batch and request.kind == kind
            (batch if fits else rest).append(request)
        self._waiting = rest
        return batch


def _settings(one: Continuation) -> tuple[Any, ...]:
    return one.method, one.schedule, one.max_weight, one.prior_std


def _together(each: Sequence[Continuation]) -> Continuation:
    """Continuations of single rows with the same settings as one of rows."""
    previous = np.concatenate([np.asarray(one.previous) for one in each])
    executed, delay = (np.concatenate(counts) for counts in zip(*[one.counts() for one in each], strict=True))
    return Continuation(previous, executed, delay, *_settings(each[0]))


def _stacked(trees: Sequence[Any]) -> Any:
    """Trees of single rows as one tree of rows."""
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *trees)
