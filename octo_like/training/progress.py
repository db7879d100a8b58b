"""A progress bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

import jax
import tqdm


class Progress:
    """Progress with rate and ETA: a bar on a terminal, elsewhere one line at most every `interval` seconds.

    Args:
      total: number of steps of the whole run.
      initial: steps done before this process started.
      samples_per_step: global batch size.
      enabled: default: only on process 0.
      stream: where to write; default stderr.
      interval: seconds between lines when `stream` is no terminal.
      clock: seconds that only grow.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        samples_per_step: int = 1,
        label: str = "step",
        enabled: bool | None = None,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._samples, self._label = total, samples_per_step, label
        self._enabled = jax.process_index() == 0 if enabled is None else enabled
        self._stream = stream or sys.stderr
        self._interval, self._clock = interval, clock
        self._begun: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None
        self._step = initial
        self._metrics: dict[str, float] = {}
        self._bar = None
        if self._enabled and self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=total, initial=initial, file=self._stream, dynamic_ncols=True, unit=label, smoothing=0.1
            )

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Reports that `step` steps are done. `metrics`: a few numbers to show beside it; the last ones given stay."""
        now = self._clock()
        done, self._step = step - self._step, step
        if metrics is not None:
            self._metrics = dict(metrics)
        if self._begun is None:
            # The first step compiles: it would spoil the rate.
            self._begun = self._last = (now, step)
        assert self._last is not None  # set together with _begun
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(self._tail(now), refresh=False)
            self._bar.update(done)
        elif now - self._last[0] >= self._interval or step >= self._total or self._begun == (now, step):
            self._print(now)
            self._last = (now, step)

    def samples_per_second(self) -> float | None:
        """Mean rate since the first step of this process, or None before the second."""
        if self._begun is None or self._step <= self._begun[1]:
            return None
        seconds = self._clock() - self._begun[0]
        return (self._step - self._begun[1]) * self._samples / seconds if seconds > 0 else None

    def _tail(self, now: float) -> str:
        parts = []
        if (rate := self.samples_per_second()) is not None:
            parts.append(f"{rate:.4g} samples/s")
        parts += [f"{name} {value:.4g}" for name, value in self._metrics.items()]
        return "  ".join(parts)

    def _print(self, now: float) -> None:
        percent = 100 * self._step / max(self._total, 1)
        line = f"{self._label} {self._step}/{self._total} ({percent:.0f}%)"
        if (rate := self.samples_per_second()) is not None:
            left = (self._total - self._step) * self._samples / rate
            line += f"  ETA {format_seconds(left)}"
        tail = self._tail(now)
        print(line + (f"  {tail}" if tail else ""), file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def format_seconds(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40", 200000 -> "2d 7:33:20"."""
    whole = max(round(seconds), 0)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    text = f"{hours}:{minutes:02d}:{secs:02d}" if hours or days else f"{minutes}:{secs:02d}"
    return f"{days}d {text}" if days else text
