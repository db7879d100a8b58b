"""Watching a run from inside: what finished steps say, a watchdog for steps that never finish, traces of chosen steps.

Nothing here waits for the step that was just started: a step's numbers are read when `LAG` newer ones are in flight.
"""

import collections
import contextlib
import datetime
import faulthandler
import json
import logging
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from octo_like.common.checks import parse_steps
from octo_like.common.files import write_whole
from octo_like.training import distributed, exits
from octo_like.training.metrics import tolerated

# Steps in flight while an older one's numbers are read: one runs, one is queued behind it.
LAG = 2
BAD_BATCHES_FOLDER = "bad_batches"
STACKS_FOLDER = "stacks"
PROFILE_FOLDER = "profile"

log = logging.getLogger(__name__)


class TooManyBadSteps(RuntimeError):
    """Loss, gradients or updates were not finite for too many steps in a row."""


class FinishedSteps:
    """Reads the metrics of steps once they are `lag` steps old, counts the bad ones, averages over an interval.

        finished = FinishedSteps(workdir, dataset_names, max_bad=10)
        finished.add(step, metrics)             # at most `lag` steps are held back
        loss = finished.losses()                # {"dataset": mean} since the last call

    Every process reads the same numbers at the same step, so all of them stop together.

    Args:
      workdir: reports of bad batches go to its bad_batches/ (written by process 0).
      dataset_names: name of each dataset_id.
      max_bad: consecutive bad steps after which `add` raises; None: never.
      on_step: called with the number of each step that has finished and with its metrics (on the device).
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        dataset_names: Sequence[str],
        *,
        max_bad: int | None = 10,
        lag: int = LAG,
        on_step: Callable[[int, Mapping[str, Any]], None] = lambda step, metrics: None,
    ):
        if max_bad is not None and max_bad < 1:
            raise ValueError(f"max_bad_steps must be at least 1, or None for never, got {max_bad}")
        self._folder = pathlib.Path(workdir) / BAD_BATCHES_FOLDER
        self._names, self._max_bad, self._lag, self._on_step = tuple(dataset_names), max_bad, lag, on_step
        self._waiting: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
        self._sums = np.zeros(len(self._names))
        self._counts = np.zeros(len(self._names), np.int64)
        self.bad_in_a_row = 0

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of `make_train_step`, as they are on the device, and reads those of an older step.

        Raises:
          TooManyBadSteps: with the path of the report.
        """
        self._waiting.append((step, metrics))
        while len(self._waiting) > self._lag:
            self._finish(*self._waiting.popleft())

    def drain(self) -> None:
        """Reads all that is left; waits for the newest step."""
        while self._waiting:
            self._finish(*self._waiting.popleft())

    def losses(self, prefix: str = "") -> dict[str, float]:
        """{prefix + dataset: mean loss of its samples} since the last call.

        Over the samples that some head learned from and whose loss was finite; datasets without any are left out.
        """
        means = {
            prefix + name: float(self._sums[d] / self._counts[d])
            for d, name in enumerate(self._names)
            if self._counts[d]
        }
        self._sums[:], self._counts[:] = 0, 0
        return means

    def _finish(self, step: int, metrics: Mapping[str, Any]) -> None:
        samples = metrics["samples"]
        wanted = (metrics["finite"], samples["loss"], samples["count"], samples["dataset_id"])
        finite, loss, count, dataset = (np.asarray(x) for x in jax.device_get(wanted))  # an explicit, small transfer
        use = np.isfinite(loss) & (count > 0)
        np.add.at(self._sums, dataset[use], loss[use])
        np.add.at(self._counts, dataset[use], 1)
        if bool(finite):
            self.bad_in_a_row = 0
        else:
            self.bad_in_a_row += 1
            self._report(step, metrics)
        self._on_step(step, metrics)

    def _report(self, step: int, metrics: Mapping[str, Any]) -> None:
        last = self._max_bad is not None and self.bad_in_a_row >= self._max_bad
        path = self._folder / f"{step}.json"
        summary = describe_bad_batch(step, jax.device_get(metrics), self._names)
        if jax.process_index() == 0 and (last or self.bad_in_a_row == 1):  # the first and the last of a row
            with tolerated(f"the report {path}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({**summary, "bad_in_a_row": self.bad_in_a_row}, indent=1))
            log.warning("step %d was not finite and changed nothing (%d in a row): %s", step, self.bad_in_a_row, path)
        if last:
            raise TooManyBadSteps(
                f"loss, gradient or update was not finite in {self.bad_in_a_row} steps in a row, up to step {step}. "
                f"Datasets and samples: {path}. The newest checkpoint is finite. Look at the data and the learning "
                "rate; the same command meets the same batches again (max_bad_steps may be raised)."
            )


def describe_bad_batch(step: int, metrics: Mapping[str, Any], dataset_names: Sequence[str]) -> dict[str, Any]:
    """JSON-able: which samples and which parts of the model were not finite, and what the batch was made of.

    Sample ids are those of the device, the low 31 bits of the global sample number.
    """
    samples = {name: np.asarray(value) for name, value in metrics["samples"].items()}
    name_of = [dataset_names[d] for d in samples["dataset_id"]]
    rows = np.flatnonzero(~np.isfinite(samples["loss"]))
    scalars = {name: float(value) for name, value in metrics.items() if name != "samples"}
    return {
        "step": step,
        "bad_samples": [{"sample_id": int(samples["sample_id"][i]), "dataset": name_of[i]} for i in rows],
        "not_finite": sorted(name for name, value in scalars.items() if not np.isfinite(value)),
        "metrics": {name: value if np.isfinite(value) else str(value) for name, value in scalars.items()},
        "samples_by_dataset": dict(sorted(collections.Counter(name_of).items())),
        "sample_ids": samples["sample_id"].tolist(),
    }


class Watchdog:
    """Notices that nothing has moved for too long, dumps the stacks of all threads, and (optionally) exits.

        with Watchdog(workdir, seconds=1800, limits={"data": 86400}) as watchdog:
            watchdog.enter("data")              # what follows may take this long, until the next call
            ...
            watchdog.enter("steps")
            watchdog.beat(step)                 # a step has finished
            with watchdog.longer(): evaluate()  # at most `patience` times as long

    The dump is in workdir/stacks/ and in the log; on every process that stalls, since each waits for the others. A
    process that has exited is noticed by jax.distributed; this is for those that hang in storage, data or a collective.

    Args:
      workdir: the run's directory; one in a bucket gets its stacks when `folder` is set.
      seconds: without a finished step; None or 0: steps are not watched.
      patience: factor for what takes longer than a step: the first step (which compiles), evaluation, export.
      exit: whether to end the process, with `exits.STALLED`, so that a supervisor starts it again.
      limits: seconds of everything else by its name; 0: not watched.
      leave: how the process is ended, given status and reason; default: at once.

    Attributes:
      folder: where stacks are written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        seconds: float | None,
        *,
        patience: float = 4.0,
        exit: bool = True,
        limits: Mapping[str, float] | None = None,
        leave: Callable[[int, str], Any] | None = None,
    ):
        parent = tempfile.gettempdir() if "://" in os.fspath(workdir) else workdir
        self.folder = pathlib.Path(parent) / STACKS_FOLDER
        self._seconds, self._patience, self._exit = seconds or 0, patience, exit
        self._limits = {**(limits or {}), "steps": self._seconds * patience}  # until the first step has finished
        self._leave = leave or (lambda status, reason: os._exit(status))
        self._phase, self._reported = "steps", False
        self._step: int | None = None
        self._limit, self._mark = self._limits["steps"], time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        self._mark = time.monotonic()
        if any(self._limits.values()):
            self._thread = threading.Thread(target=self._run, name="octo_like-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def enter(self, phase: str) -> float:
        """From now on the limit of this phase holds; returns its seconds, a day when it is not watched."""
        limit = self._limits[phase]  # a name that is not there is a mistake in the code
        self._phase, self._step, self._limit, self._mark, self._reported = phase, None, limit, time.monotonic(), False
        return limit or 86400.0

    def beat(self, step: int | None = None) -> None:
        """A step has finished."""
        if step is not None:
            self._step, self._limit = step, self._seconds
        self._mark, self._reported = time.monotonic(), False

    @contextlib.contextmanager
    def longer(self) -> Iterator[float]:
        """What runs inside may take `patience` times as long as a step; gives the seconds, a day when not watched."""
        before, self._limit = self._limit, self._seconds * self._patience
        self.beat()
        try:
            yield self._limit or 86400.0
        finally:
            self._limit = before
            self.beat()

    def _run(self) -> None:
        interval = min([5.0, *(limit / 10 for limit in (self._seconds, *self._limits.values()) if limit)])
        while not self._over.wait(interval):
            if self._limit and not self._reported and time.monotonic() - self._mark > self._limit:
                self._reported = True
                reason = self._reason()
                try:
                    self.dump()
                except OSError as error:  # a full disk: the stacks go where there is no disk
                    log.error("%s; the stacks cannot be written: %s", reason, error)
                    faulthandler.dump_traceback(2, all_threads=True)
                if self._exit:
                    self._leave(exits.STALLED, reason)  # the main thread hangs: nothing gentler gets through to it

    def _reason(self) -> str:
        seconds = time.monotonic() - self._mark
        if self._phase != "steps":
            return f"{self._phase} was not done within {seconds:.0f} s (watchdog.{self._phase}_minutes)"
        after = "before the first step" if self._step is None else f"after step {self._step}"
        return f"no step finished for {seconds:.0f} s, {after}"

    def dump(self) -> pathlib.Path:
        """Writes the stacks of all threads and returns the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path, reason = self.folder / f"{stamp}-process{distributed.process_id()}.txt", self._reason()
        with open(path, "w") as file:
            print(reason, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        log.error("%s; all stacks are in %s\n%s", reason, path, path.read_text())
        for handler in logging.getLogger().handlers:
            handler.flush()
        return path


class ProfileSteps:
    """Traces chosen steps with XProf into workdir/profile/ (`tensorboard --logdir WORKDIR` shows it).

    Args:
      steps: (first, stop) or "first:stop": the steps first, first + 1, ..., stop - 1 are traced; None: none.

    Raises:
      ValueError: anything else.
    """

    def __init__(self, workdir: str | os.PathLike, steps: Sequence[int] | str | None):
        self._folder = pathlib.Path(workdir) / PROFILE_FOLDER
        self._window, self._active = parse_steps(steps), False

    def before(self, step: int) -> None:
        """Call before the step `step` is started (the first is 1)."""
        if self._window is not None and not self._active and step == self._window[0]:
            self._active = True
            jax.profiler.start_trace(str(self._folder))

    def after(self, step: int, result: Any) -> None:
        """Call after it was started, with one of its results; waits for it when it is the last one."""
        if self._active and self._window is not None and step >= self._window[1] - 1:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still going on."""
        if self._active:
            self._active, self._window = False, None
            jax.profiler.stop_trace()
            log.info("trace written to %s", self._folder)

    def __enter__(self) -> "ProfileSteps":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def report_progress(start: int, saved: int | None) -> None:
    """Tells the supervisor, if there is one, where this process started and what is saved."""
    if path := os.environ.get(exits.PROGRESS_VARIABLE):
        with tolerated("the note to the supervisor"):
            write_whole(path, json.dumps({"start": start, "saved": saved}))
