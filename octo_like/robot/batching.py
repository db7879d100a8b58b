"""Requests of several robots as batches of one policy.

While a batch is being computed the next requests wait; then those that fit together go as one. So a single robot never
waits for company, and many share the accelerator. Rows do not know of each other: the sampling noise of each comes from
its own (seed, step), and what fills a batch up is thrown away.

A batch of a kind that is not compiled yet would keep every robot waiting for seconds. Such a request is compiled in a
thread of its own, one batch size after the other, while the others are answered.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from octo_like.common.chunks import Continuation
from octo_like.robot.rollout import PolicyLike, sampling_keys

log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Request:
    """What one robot wants to know.

    Attributes:
      observation: arrays (1, W, ...), and "pad_mask_dict".
      task: of one row, from `create_tasks`.
      unnormalize: dataset of the units. seed, step: of the sampling noise.
      continuing: the chunk of one row that the actions go on from, or None.
      words: whether it is what to do next that is wanted, in words, and not actions.
      done: gets the actions (H, A), or the text.
      program: see `Batcher.program_of`; None where nothing was compiled beforehand.
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
    program: Hashable = None

    @property
    def kind(self) -> tuple:
        """Requests of one kind fit into one batch."""
        how = None if self.continuing is None else (*_settings(self.continuing), np.shape(self.continuing.previous))
        return self.unnormalize, self.words, _shapes((self.observation, self.task)), how


class Batcher:
    """Computes requests in a thread of its own.

    Attributes:
      sizes: batch sizes that are compiled: powers of two, and `max_batch`.
      batches: {size: number of batches}, of requests in them before filling up.
      compiled: {program: largest batch size that is compiled}; None: nothing is compiled beforehand, and every request
        is computed as it comes.
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
        self.compiled: dict[Hashable, int] | None = None
        self._waiting: collections.deque[Request] = collections.deque()
        self._uncompiled: collections.deque[Request] = collections.deque()
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._beside: threading.Thread | None = None

    def start(self) -> None:
        threading.Thread(target=self._work, name="policy-batches", daemon=True).start()
        if self.compiled is not None:
            self._beside = threading.Thread(target=self._compile_beside, name="policy-compilation", daemon=True)
            self._beside.start()

    def warm_up(self, request: Request) -> None:
        """Compiles what a request needs, for every batch size, unless it is compiled; to be called before `start`."""
        self.compiled = {} if self.compiled is None else self.compiled
        request.program = self.program_of(request)
        for size in self.sizes if request.program not in self.compiled else ():
            self.compute([request] * size)
            self.compiled[request.program] = size

    def program_of(self, request: Request) -> Hashable:
        """Equal for requests that need nothing else compiled, also of data sets that share a program.

        Raises:
          ValueError: the policy refuses the observation.
        """
        policy: Any = self.policy
        observation, of = request.observation, request.unnormalize
        if hasattr(policy, "prepare_observations"):
            observation = policy.prepare_observations(observation, request.unnormalize)
            of = None if request.words else policy.head_of(request.unnormalize)
        method = None if request.continuing is None else request.continuing.method
        return of, request.words, method, _shapes((observation, request.task))

    def submit(self, request: Request) -> concurrent.futures.Future:
        """The future of a request's actions. Raises RuntimeError after `close`, ValueError as `program_of`."""
        if self.compiled is not None:
            request.program = self.program_of(request)
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is shutting down")
            known = self.compiled is None or request.program in self.compiled
            (self._waiting if known else self._uncompiled).append(request)
            self._changed.notify_all()
        return request.done

    @property
    def queue_length(self) -> int:
        return len(self._waiting) + len(self._uncompiled)

    def close(self, timeout: float = 10.0) -> None:
        """Takes no more requests, and returns when those that were taken are answered, or after `timeout` seconds.

        Those that wait for a compilation get a RuntimeError.
        """
        end = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            while self._uncompiled:
                self._uncompiled.popleft().done.set_exception(RuntimeError("the server is shutting down"))
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)
        if self._beside is not None:
            self._beside.join(max(0.0, end - time.monotonic()))

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

    def _compile_beside(self) -> None:
        """Compiles what was not announced, while `_work` answers what is compiled."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._uncompiled or self._closed)
                if self._closed:
                    return
                request = self._uncompiled[0]
            start = time.monotonic()
            try:
                for size in self.sizes:
                    self.compute([request] * size)
                    if not self._take_compiled(request.program, size):
                        return
            except Exception as error:  # whatever a policy raises must reach who asked for it, and nobody else
                log.warning("a request that needs compilation failed: %s: %s", type(error).__name__, error)
                with self._changed:
                    if request in self._uncompiled:  # else it was answered, with smaller batches
                        self._uncompiled.remove(request)
                        request.done.set_exception(error)
            else:
                seconds = time.monotonic() - start
                log.warning(
                    "a request needed what was not compiled at the start: %.1f s beside the others. Announce it "
                    "(--continue_by), or send what the policy expects",
                    seconds,
                )

    def _take_compiled(self, program: Hashable, size: int) -> bool:
        """Lets requests of a program into batches up to a size; False: the end has come meanwhile."""
        assert self.compiled is not None
        with self._changed:
            self.compiled[program] = size
            self._waiting.extend(one for one in self._uncompiled if one.program == program)
            self._uncompiled = collections.deque(one for one in self._uncompiled if one.program != program)
            self._changed.notify_all()
            return not self._closed

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
        largest = self.max_batch if self.compiled is None else self.compiled[self._waiting[0].program]
        rest: collections.deque[Request] = collections.deque()
        for request in self._waiting:
            fits = len(batch) < largest and request.kind == kind
            (batch if fits else rest).append(request)
        self._waiting = rest
        return batch


def _shapes(tree: Any) -> str:
    return str(jax.tree.map(lambda x: (np.shape(x), np.asarray(x).dtype.str), tree))


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
