"""Where the wall time of a run goes, over all its restarts."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_IMPORTED = time.monotonic()  # close to when the process began: start-up is time, too


class Clock:
    """Where the wall time of a run went, over all its restarts.

        clock = Clock.resume(extra.get("clock"))       # counts as "startup" or "restart" until told otherwise
        clock.switch("train")
        with clock.section("eval"): ...                # exclusive: does not count as "train"
        checkpointer.save(step, state, {"clock": clock.state(), ...})

    Goodput is the share of "train" in everything. What a killed process did after its last checkpoint is done again, so
    it counts as "lost" when `resume` is told how far the killed process came. Between two processes nothing runs: that
    is "down", which is told but is no part of the total.

    Args:
      seconds: by name, of earlier processes.
      name: what the time until the first `switch` counts as.
      started: reading of `clock` when this process began; default: when this module was imported.
    """

    def __init__(
        self,
        seconds: Mapping[str, float] | None = None,
        *,
        name: str = "startup",
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._seconds = dict(seconds or {})
        self._stack = [name]
        self._now = clock
        self._mark = clock() if started is None else started

    @classmethod
    def resume(
        cls,
        state: Mapping[str, Any] | None,
        *,
        last_seen: float | None = None,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> "Clock":
        """Continues the clock of a checkpoint (None: a new run).

        Args:
          state: what `state()` gave when the checkpoint was saved.
          last_seen: time.time() of the last sign of life of the process that saved it, e.g. of its last metrics.
          started: reading of `clock` when this process began; default: when this module was imported.
        """
        started = _IMPORTED if started is None and clock is time.monotonic else started
        if state is None:
            return cls(started=started, clock=clock)
        seconds = dict(state["seconds"])
        if last_seen is not None:
            seconds["lost"] = seconds.get("lost", 0.0) + max(last_seen - state["saved_at"], 0.0)
        began = time.time() - (clock() - (clock() if started is None else started))
        gap = began - max(last_seen or 0.0, state["saved_at"])
        seconds["down"] = seconds.get("down", 0.0) + max(gap, 0.0)
        return cls(seconds, name="restart", started=started, clock=clock)

    def _charge(self) -> None:
        now = self._now()
        name = self._stack[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now

    def switch(self, name: str) -> None:
        """From now on time outside of sections counts as `name`."""
        self._charge()
        self._stack[0] = name

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time inside counts as `name` and as nothing else."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def state(self) -> dict[str, Any]:
        """JSON-able; goes into the checkpoint."""
        self._charge()
        return {"seconds": dict(self._seconds), "saved_at": time.time()}

    def seconds(self, name: str) -> float:
        """Seconds charged to `name` so far."""
        self._charge()
        return self._seconds.get(name, 0.0)

    def summary(self) -> dict[str, float]:
        """{"clock/<name>": seconds, "clock/total": seconds, "clock/goodput": share in [0, 1]}."""
        self._charge()
        total = sum(value for name, value in self._seconds.items() if name != "down")
        goodput = self._seconds.get("train", 0.0) / total if total > 0 else 0.0
        return {f"clock/{k}": v for k, v in self._seconds.items()} | {"clock/total": total, "clock/goodput": goodput}
