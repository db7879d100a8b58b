"""Episodes made of consecutive seeds, in this process or in others; what is made does not depend on how many."""

import collections
import concurrent.futures
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any, Self

EPISODES_PER_CALL = 8  # a worker's unit of work: small enough for an even load, large enough to hide the calls

Attempt = tuple[int, dict[str, Any] | None]  # seed and its episode, or None when there is none of this seed


class SeedPool:
    """Runs a function of seeds in this process (workers=0) or in `workers` others. Use as a context manager."""

    def __init__(self, workers: int = 0):
        self.workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.workers:
            # Spawned, not forked: the parent has imported TensorFlow, whose threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self.workers, mp_context=context)
        return self

    def __exit__(self, *exc) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def attempts(self, call: Callable[[int], list[Attempt]], start: int, count: int) -> Iterator[Attempt]:
        """Yields what `call` makes of the seeds from `start` on, in their order, without end.

        Args:
          call: first of EPISODES_PER_CALL seeds -> attempts with these; importable, when there are workers.
          count: about how many will be taken, so that workers do not run far ahead.
        """
        starts = itertools.count(start, EPISODES_PER_CALL)
        if self._pool is None:
            for first in starts:
                yield from call(first)
            return
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        begun = 0
        try:
            while True:
                # Ahead of the writer by a few calls, but not far beyond what is asked for.
                while len(pending) < 4 * self.workers and (begun < count or not pending):
                    pending.append(self._pool.submit(call, next(starts)))
                    begun += EPISODES_PER_CALL
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
