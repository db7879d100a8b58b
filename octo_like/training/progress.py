"""A progress bar on a terminal, lines elsewhere."""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

import jax
import tqdm

# Of a bar. What tqdm itself says of rate and ETA would count evaluations and checkpoints.
BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
WINDOW, MARKS = 60.0, 100  # seconds that rate and ETA are taken over, and how finely


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
      working: seconds that only grow, and stand still while something else than steps is done (evaluation,
        checkpoints); rate and ETA are of these. Default: `clock`.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        samples_per_step: int = 1,
        enabled: bool | None = None,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        working: Callable[[], float] | None = None,
    ):
        self._total, self._samples = total, samples_per_step
        self._enabled = jax.process_index() == 0 if enabled is None else enabled
        self._stream = stream or sys.stderr
        self._interval, self._clock = interval, clock
        self._working = working or clock
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._printed: float | None = None
        self._step = initial
        self._metrics: dict[str, float] = {}
        self._bar = None
        if self._enabled and self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=total, initial=initial, file=self._stream, dynamic_ncols=True, unit="step", bar_format=BAR
            )

    @contextlib.contextmanager
    def compiling(self, every: float = 1.0, line_every: float = 60.0) -> Iterator[None]:
        """Says that the first step is being compiled, and for how long, while what is inside runs.

        Args:
          every: seconds between updates of a bar. line_every: seconds between lines elsewhere.
        """
        if not self._enabled:
            yield
            return
        begin, done = self._clock(), threading.Event()

        def tell() -> None:
            while not done.wait(every if self._bar is not None else line_every):
                self._say(f"compiling... {format_seconds(self._clock() - begin)}")

        self._say("compiling...")
        teller = threading.Thread(target=tell, name="octo_like-compiling", daemon=True)
        teller.start()
        try:
            yield
        finally:
            done.set()
            teller.join()
            if self._bar is not None:
                self._bar.set_description_str("", refresh=True)
        self._say(f"compiled in {format_seconds(self._clock() - begin)}", keep=True)

    def _say(self, text: str, *, keep: bool = False) -> None:
        """`text` in front of the bar, or above it (`keep`); a line where there is no bar."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        elif keep:
            self._bar.write(text, file=self._stream)
        else:
            self._bar.set_description_str(f"{text} ", refresh=True)

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Reports that `step` steps are done. `metrics`: a few numbers to show beside it; the last ones given stay."""
        now = self._clock()
        done, self._step = step - self._step, step
        if metrics is not None:
            self._metrics = dict(metrics)
        self._mark(self._working(), step)
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(self._tail(), refresh=False)
            self._bar.update(done)
        elif self._printed is None or now - self._printed >= self._interval or step >= self._total:
            percent = 100 * step / max(self._total, 1)
            tail = self._tail()
            line = f"step {step}/{self._total} ({percent:.0f}%)" + (f"  {tail}" if tail else "")
            print(line, file=self._stream, flush=True)
            self._printed = now

    def _mark(self, seconds: float, step: int) -> None:
        """Keeps where the window begins. The first mark is that of the first step, whose compilation it leaves out."""
        marks = self._marks
        if len(marks) > 1 and seconds - marks[-2][0] < WINDOW / MARKS:
            marks.pop()  # the last one moves along until it is far enough from the one before
        marks.append((seconds, step))
        while len(marks) > 2 and seconds - marks[1][0] >= WINDOW:
            marks.popleft()

    def samples_per_second(self) -> float | None:
        """Mean rate in the window, or None before the second step of this process."""
        if len(self._marks) < 2:
            return None
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) * self._samples / (end - begin) if end > begin else None

    def _tail(self) -> str:
        parts = []
        if (rate := self.samples_per_second()) is not None:
            left = (self._total - self._step) * self._samples / rate
            parts += [f"ETA {format_seconds(left)}", f"{rate:.4g} samples/s"]
        parts += [f"{name} {value:.4g}" for name, value in self._metrics.items()]
        return "  ".join(parts)

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
