"""What the steps of a run say and cost: its metrics and its progress."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from octo_like.training.clock import Clock
from octo_like.training.flops import step_flops
from octo_like.training.hardware import memory_stats, mfu
from octo_like.training.metrics import MetricsWriter
from octo_like.training.progress import Progress
from octo_like.training.run import Run
from octo_like.training.watch import FinishedSteps

log = logging.getLogger(__name__)


def read_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of a finished step, as {"train/<name>": number}."""
    scalars = {name: value for name, value in metrics.items() if name not in ("samples", "finite")}
    return {f"train/{name}": float(value) for name, value in jax.device_get(scalars).items()}


class Meter:
    """What an interval between two log lines cost: seconds per step, waiting for data, FLOP/s, memory."""

    def __init__(self, run: Run, clock: Clock):
        self._run, self._clock = run, clock
        shapes = jax.eval_shape(run.init_params, run.init_from)
        spec, self._flops = run.inputs.stream.batch_spec, None
        try:
            self._flops = step_flops(run.model, spec, shapes, run.frozen, run.config.batch_size)
        except ValueError as error:  # a part whose products cannot be counted is no reason not to train
            log.warning("no MFU: %s", error)
        self._wait, self._waits = 0.0, 0
        self._last: tuple[int, float] | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside is spent waiting for the next batch."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._wait, self._waits = self._wait + time.monotonic() - begin, self._waits + 1

    def begin(self, step: int) -> None:
        """The first step is compiled: what came before does not count."""
        self._last = (step, self._clock.seconds("train"))
        self._wait, self._waits = 0.0, 0

    def read(self, step: int) -> dict[str, float]:
        """Numbers of the steps since the last call; evaluation and checkpoints in between are left out."""
        before, now = self._last, self._clock.seconds("train")
        wait = self._wait / max(self._waits, 1)
        self._last, self._wait, self._waits = (step, now), 0.0, 0
        values = memory_stats()
        if before is None or step <= before[0]:
            return values
        seconds = (now - before[1]) / (step - before[0])
        values |= {"time/step": seconds, "time/data_wait": wait}
        if seconds > 0:
            values["train/samples_per_second"] = self._run.config.batch_size / seconds
            if self._flops is not None:
                values["train/model_tflops_per_second"] = self._flops / seconds / 1e12
                if (share := mfu(self._flops, seconds)) is not None:
                    values["train/mfu"] = share
        for name, count in self._run.inputs.stream.bad_counts.items():
            values[f"data/bad_records/{name}"] = count
        return values


class StepLog:
    """Reads steps once they have finished: metrics every `config.log_every` steps, progress at every one.

        with StepLog(run, writer, clock, start) as steps:
            with steps.meter.waiting():
                batch = next(stream)
            ...
            steps.add(step, metrics)  # reads those of an older step

    Args:
      start: the step that this process starts at.
    """

    def __init__(self, run: Run, writer: MetricsWriter, clock: Clock, start: int):
        config = run.config
        self.meter = Meter(run, clock)
        self._run, self._writer, self._clock, self._start = run, writer, clock, start
        self._finished = FinishedSteps(
            writer.workdir, run.inputs.stream.dataset_names, max_bad=config.max_bad_steps, on_step=self._on_step
        )
        self._progress = Progress(
            config.num_steps,
            initial=start,
            samples_per_step=config.batch_size,
            working=lambda: clock.seconds("train"),  # neither evaluations nor checkpoints
        )

    def compiling(self, first: bool) -> contextlib.AbstractContextManager[None]:
        """Around the start of a step: tells that the `first` one is being compiled."""
        return self._progress.compiling() if first else contextlib.nullcontext()

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step that was started. Raises TooManyBadSteps as `FinishedSteps`."""
        self._finished.add(step, metrics)

    def drain(self) -> None:
        """Waits for the newest step and reads all that is left."""
        self._finished.drain()

    def _on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        config, shown = self._run.config, None
        self._run.attempt.watchdog.beat(step)
        if step % config.log_every == 0 or step in (self._start + 1, config.num_steps):
            values = read_scalars(metrics) | self._finished.losses("loss/") | self.meter.read(step)
            self._writer.scalars(step, values | self._clock.summary())
            shown = {"loss": values["train/loss"], "grad": values["train/grad_norm"]}
        self._progress.update(step, shown)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *exc_info) -> None:
        self._progress.close()
