"""The loop that pretraining and adaptation share: resume, step, log, evaluate, save, export.

`train.py` and `finetune.py` build a `Run` and call `run_loop`. Everything that decides what a step computes is in
`step.py`; everything here is about when things happen and where they are written.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from octo_like.common import parts
from octo_like.common.config import ConfigError, check_resume, to_dict
from octo_like.common.config import save as save_config
from octo_like.common.defaults import default_config
from octo_like.common.normalization import to_json
from octo_like.common.schema import check_batch, flatten
from octo_like.model.heads import check_datasets
from octo_like.model.octo import OctoModel
from octo_like.policy.policy import Policy
from octo_like.robot.prediction import plot_prediction
from octo_like.training import exits, provenance, sharding
from octo_like.training.attempt import Attempt
from octo_like.training.checkpoint import Checkpointer, CheckpointError, NonFiniteState
from octo_like.training.clock import Clock
from octo_like.training.distributed import Preemption, fingerprint_across_hosts, is_main, wait_for_all
from octo_like.training.early_stopping import EarlyStopping
from octo_like.training.evaluation import action_error, closed_loop, predict_rows, validation_loss
from octo_like.training.flops import step_flops
from octo_like.training.metrics import (
    METRICS_FILE,
    WANDB_ID_FILE,
    MetricsWriter,
    Progress,
    last_seen,
    memory_stats,
    mfu,
)
from octo_like.training.program import build_program
from octo_like.training.provenance import code_version
from octo_like.training.state import TrainState
from octo_like.training.step import make_eval_step, sample_keys
from octo_like.training.watch import LAG, STACKS_FOLDER, FinishedSteps, ProfileSteps, TooManyBadSteps, report_progress
from octo_like.training.workdir import Workdir

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
    """Everything a run is made of.

    Attributes:
      config: frozen run config.
      workdir: where checkpoints, metrics and the export go.
      mesh: device mesh.
      model: the network.
      init_params: makes the initial parameters from `init_from`; traced, so that they are made where they will live.
      init_from: a random key, or loaded parameters.
      inputs: `octo_like.data.inputs.Inputs`.
      make_policy: parameters to Policy, for evaluation and export.
      attempt: what holds for this process; entered.
      loaded_from: where the parameters in `init_from` were loaded from; None: from nowhere, they are made.
      frozen: paths of parameters that are not trained.
      documents: texts to keep in the workdir, by file name.
    """

    config: Any
    workdir: str
    mesh: jax.sharding.Mesh
    model: OctoModel
    init_params: Callable[[Any], Any]
    init_from: Any
    inputs: Any
    make_policy: Callable[[Any], Policy]
    attempt: Attempt
    loaded_from: str | None = None
    frozen: frozenset[str] = frozenset()
    documents: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run_loop(run: Run) -> int:
    """Trains to config.num_steps, from the newest checkpoint if there is one. Returns the process's exit status."""
    config, stream = run.config, run.inputs.stream
    for head in check_datasets(run.model.heads, run.inputs.statistics):
        log.warning("no dataset trains the action head %r: it keeps the weights it starts from", head)
    ranking = Ranking.from_config(config)
    attempt, watchdog = run.attempt, run.attempt.watchdog
    program = build_program(
        config, run.model, run.mesh, init_params=run.init_params, init_from=run.init_from, frozen=run.frozen
    )
    with contextlib.ExitStack() as stack:
        with attempt.phase("restore"):
            state = program.place(run.init_from)
            workdir = stack.enter_context(Workdir(run.workdir, continued=(METRICS_FILE, WANDB_ID_FILE)))
            watchdog.folder = workdir.local / STACKS_FOLDER
            attempt.before_leaving(workdir.sync)
            checkpointer = stack.enter_context(
                Checkpointer(
                    workdir.path,
                    keep_last=config.checkpoint.keep_last,
                    keep_every=config.checkpoint.keep_every,
                    keep_best=config.checkpoint.keep_best,
                    best_mode=config.checkpoint.best_mode,
                    metadata={"config": to_dict(config), "code": code_version()},
                )
            )
            preemption = stack.enter_context(Preemption())
            state, clock, extra = _resume(run, checkpointer, workdir, state, program.shardings)
        stopping = EarlyStopping(
            config.early_stopping.patience, config.checkpoint.best_mode, extra.get("early_stopping")
        )
        with attempt.phase("agreement"):
            check_hosts(stream.order_spec, run.inputs.statistics)
        if is_main():
            workdir.local.mkdir(parents=True, exist_ok=True)
            save_config(config, workdir.local / "config.json")
            for name, text in run.documents.items():
                (workdir.local / name).write_text(text)
        stack.callback(stream.close)
        try:
            return _train(
                run, workdir, checkpointer, preemption, ranking, stopping, program.step, state, clock, extra["began"]
            )
        except (TooManyBadSteps, NonFiniteState) as error:
            log.error("%s", error)
            return exits.NOT_FINITE


def check_hosts(order_spec: Mapping[str, Any], statistics: Mapping[str, Any]) -> None:
    """Compares data, order and statistics of all processes.

    Hosts that index other files, or derive other blocks, would make batches that do not belong together; with other
    statistics (of a tf.data source that shuffles without a seed) the same action would mean something else on each.

    Raises:
      RuntimeError: they differ; names what, and the processes that differ from process 0.
    """
    fingerprint_across_hosts(json.loads(json.dumps(order_spec)), "the data or its order")
    approximate = order_spec.get("approximate", ())
    fingerprint_across_hosts(parts.used(), "the source of parts of your own")
    for name, of_dataset in sorted(to_json(statistics).items()):
        hint = " (a source must begin with the same trajectories on all hosts: give what it shuffles a seed)"
        fingerprint_across_hosts(of_dataset, f"the statistics of {name!r}{hint if name in approximate else ''}")


def _train(
    run, workdir, checkpointer, preemption, ranking, stopping, step_fn, state: TrainState, clock: Clock, began
) -> int:
    config, stream, num_steps = run.config, run.inputs.stream, run.config.num_steps
    wandb = dict(config.wandb) if config.wandb.project else None
    start = step = int(jax.device_get(state.step))
    report_progress(start, start if start else None)
    attempt, watchdog = run.attempt, run.attempt.watchdog
    with (
        MetricsWriter(workdir.local, config=to_dict(config), wandb=wandb) as writer,
        Progress(num_steps, initial=start, samples_per_step=config.batch_size) as progress,
        ProfileSteps(workdir.local, config.profile_steps) as profile,
        attempt.ends_in_time(),
    ):
        watchdog.enter("steps")
        if start >= num_steps:
            log.warning("already at step %d of %d; evaluating and exporting again", start, num_steps)
        else:
            check_batch(stream.batch(start), stream.batch_spec)
            stream.seek(start * config.batch_size)
        attempt.begun = start >= num_steps
        evaluator = Evaluator(run, writer)
        meter = Meter(run, clock)

        def on_step(done, metrics):
            watchdog.beat(done)
            shown = None
            if done % config.log_every == 0 or done == start + 1 or done == num_steps:
                values = read_scalars(metrics) | finished.losses("loss/") | meter.read(done)
                writer.scalars(done, values | clock.summary())
                shown = {"loss": values["train/loss"], "grad": values["train/grad_norm"]}
            progress.update(done, shown)

        finished = FinishedSteps(
            workdir.local, stream.dataset_names, max_bad=config.max_bad_steps, lag=LAG, on_step=on_step
        )

        def evaluate() -> dict[str, float]:
            finished.drain()
            with clock.section("eval"), watchdog.longer():
                scores = evaluator(step, state)
            stopping.update(step, ranking.metric(scores))
            return scores

        def save(scores: dict[str, float] | None = None) -> None:
            with clock.section("checkpoint"):
                extra = {
                    "position": stream.position,
                    "order_spec": json.loads(json.dumps(stream.order_spec)),
                    "clock": clock.state(),
                    "early_stopping": stopping.state(),
                    "began": began,
                }
                attempt.check_lease()
                score = ranking.metric(scores)
                checkpointer.save(step, state, extra, metric=score)
                if score is not None and checkpointer.best_step(besides=step) == step:
                    _export(run, workdir, state, "export_best")
            # This one is being written; the one before is complete.
            report_progress(start, max((s for s in checkpointer.all_steps() if s != step), default=None))

        scores = None
        while step < num_steps and not stopping.stopped:
            with meter.waiting():
                batch = sharding.put_batch(next(stream), run.mesh)
            profile.before(step + 1)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, batch)
            if step == start:
                attempt.begun = True
                clock.switch("train")  # until here: start-up, and the compilation of the step
                meter.begin(step)
            step += 1
            profile.after(step, metrics["loss"])
            finished.add(step, metrics)
            last, scores = step == num_steps, None
            if config.eval.every and step % config.eval.every == 0 and not last:
                scores = evaluate()
            if config.checkpoint.every and step % config.checkpoint.every == 0 and not last:
                save(scores)
            if preemption.should_stop(step):
                save(scores)
                checkpointer.wait()
                report_progress(start, step)
                finished.drain()
                log.warning("stopped at step %d as asked; run the same command to continue", step)
                return exits.PREEMPTED
        finished.drain()
        if stopping.stopped:
            log.warning("stopped early at step %d: %s; that one is in export_best", step, stopping)
        evaluate_last = config.eval.every is not None and not stopping.stopped  # then it has just been evaluated
        # Saved before anything else can go wrong, unless the evaluation decides whether it is kept.
        rank = ranking.enabled and evaluate_last
        if not rank:
            save()
        if evaluate_last:
            scores = evaluate()
        if rank:
            save(scores)
        with clock.section("export"), watchdog.longer() as seconds:
            checkpointer.wait()
            report_progress(start, step)
            _export(run, workdir, state, "export")
            wait_for_all("octo_like/export", 2 * seconds + 60)  # process 0 writes it; the watchdog comes first
    return exits.DONE


def _export(run: Run, workdir: Workdir, state: TrainState, name: str) -> None:
    """Writes the policy, whole or not at all: the averaged parameters, or (checkpoint.export = "raw") the last ones."""
    params = sharding.to_host(state.params if run.config.checkpoint.export == "raw" else state.ema_params, run.mesh)
    if is_main():
        target = workdir.path / name
        run.make_policy(params).push(str(target))
        log.info("exported to %s", target)


def _resume(
    run: Run, checkpointer: Checkpointer, workdir: Workdir, state: TrainState, shardings
) -> tuple[TrainState, Clock, dict[str, Any]]:
    """State and clock of the newest good checkpoint, or those of a new run, and what else a checkpoint holds.

    The log says which, and with what the run began. "began" in every checkpoint says it again.

    Raises:
      CheckpointError: it is in doubt whether the run begins with the parameters it should begin with.
    """
    wanted = run.config.get("init_from")
    began = {"loaded_from": run.loaded_from, "init_from": wanted}
    if checkpointer.latest_step() is None:
        if run.attempt.resumes or (wanted and not run.loaded_from):
            raise CheckpointError(
                f"{checkpointer.directory} held a checkpoint when this process started and holds none now: what the "
                f"run should go on from is in doubt{f', and init_from={wanted} was not loaded' if wanted else ''}. See "
                "who else writes there, then run the command again"
            )
        made = f"new ones (seed {run.config.seed})"
        log.info("starts at step 0; parameters: %s", f"loaded from {run.loaded_from}" if run.loaded_from else made)
        return state, Clock.resume(None), {"began": began}
    saved = checkpointer.read()
    for change in check_resume(comparable(saved.metadata["config"]), comparable(to_dict(run.config))):
        log.warning("resumed with %s", change)
    for change in provenance.differences(saved.metadata.get("code"), code_version()):
        log.warning("resumed by other code: %s", change)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    state, extra = checkpointer.restore(None, abstract)
    run.inputs.resume(extra["order_spec"], extra["position"])
    began = extra.get("began", {"loaded_from": "unknown", "init_from": wanted})  # older checkpoints do not say
    if wanted and began["loaded_from"] is None:
        raise CheckpointError(
            f"this run has init_from={wanted}, but its checkpoints in {checkpointer.directory} say that it began with "
            "new parameters. Train in another --workdir"
        )
    source = f"loaded from {began['loaded_from']}" if began["loaded_from"] else "new ones"
    log.info("resumed from step %d; parameters at step 0: %s", int(jax.device_get(state.step)), source)
    clock = Clock.resume(extra.get("clock"), last_seen=last_seen(workdir.local))
    return state, clock, {**extra, "began": began}


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config as resumes compare it.

    - Keys that came into being after it was saved have their default.
    - A cosine schedule ends at a step that is said (decay_steps) or is num_steps: the step itself is compared, so that
      more steps, which a resume may ask for, do not silently stretch the schedule of a run that is under way.
    """
    config = {**default_config().to_dict(), **config}
    for group in ("checkpoint", "early_stopping", "eval", "optimizer", "watchdog", "data", "mesh"):
        config[group] = {**default_config()[group].to_dict(), **config[group]}
    opt = config["optimizer"]
    decay = (opt["decay_steps"] or config["num_steps"]) if opt["schedule"] == "cosine" else None
    return {**config, "optimizer": {**opt, "decay_steps": decay}}


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Which checkpoints are the best: by the mean of the evaluation's metrics whose names match a pattern.

    Attributes:
      pattern: fnmatch, e.g. "val/*/*/loss".
      enabled: whether best checkpoints are kept at all.
    """

    pattern: str
    enabled: bool

    @classmethod
    def from_config(cls, config: Any) -> "Ranking":
        """Raises ConfigError for settings under which no step would ever have a metric."""
        options, every = config.checkpoint, config.eval.every
        if options.export not in ("ema", "raw"):
            raise ConfigError(f"checkpoint.export is {options.export!r}; valid: 'ema', 'raw'")
        if options.keep_best and every is None:
            raise ConfigError("checkpoint.keep_best needs evaluations, but eval.every is None")
        if options.keep_best and every and options.every and every % options.every and options.every % every:
            raise ConfigError(
                f"checkpoint.keep_best: evaluation every {every} steps and checkpoints every {options.every} seldom "
                "meet; make one a multiple of the other"
            )
        if config.early_stopping.patience is not None and not (options.keep_best and every):
            raise ConfigError(
                "early_stopping.patience counts evaluations and leaves the best policy behind: it needs eval.every of "
                f"at least 1 (now {every}) and checkpoint.keep_best of at least 1 (now {options.keep_best})"
            )
        return cls(options.best_metric, bool(options.keep_best))

    def metric(self, scores: Mapping[str, float] | None) -> float | None:
        """The number a step is ranked by, or None without an evaluation.

        Raises:
          ConfigError: nothing that was measured matches the pattern.
        """
        if not self.enabled or scores is None:
            return None
        chosen = [value for name, value in scores.items() if fnmatch.fnmatchcase(name, self.pattern)]
        if not chosen:
            raise ConfigError(
                f"checkpoint.best_metric {self.pattern!r} matches nothing of what was measured: "
                f"{', '.join(sorted(scores))}"
            )
        return float(np.mean(chosen))


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
    def waiting(self):
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


class Evaluator:
    """Validation loss, action error in physical units, plots and rollouts, of the averaged parameters."""

    def __init__(self, run: Run, writer: MetricsWriter):
        self.run, self.writer = run, writer
        seed = run.config.seed
        self.terms = jax.jit(sharding.traced_on(run.mesh, make_eval_step(run.model, seed)))
        self.head_of = functools.partial(_head_of_batch, heads=list(run.model.heads))

        def sample(params, batch, draw, head):
            keys = sample_keys(seed + 1, draw, batch["sample_id"])
            return run.model.apply(
                {"params": params}, batch["observation"], batch["task"], keys, head=head, method="sample"
            )

        self.sample = jax.jit(sharding.traced_on(run.mesh, sample), static_argnames="head")

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Writes and returns everything that could be measured."""
        run, params = self.run, state.ema_params
        scalars: dict[str, float] = {}
        for name, batches in run.inputs.validation.items():
            statistics = run.inputs.statistics[name]
            # Placed once: loss, error and plot look at the same batches.
            placed = [sharding.put_batch(batch, run.mesh) for batch in batches]
            losses = validation_loss(lambda batch: self.terms(params, batch), placed)
            scalars |= {f"val/{name}/{key}": value for key, value in losses.items()}
            if jax.process_count() > 1:
                continue  # the rows of other hosts are not here; losses above are global
            samplers = [self._sampler(params, draw) for draw in range(3)]
            error = action_error(samplers[0], placed, statistics)
            scalars |= error.scalars(f"val/{name}/")
            prediction = predict_rows(samplers, placed, statistics, limit=32)
            self.writer.images(step, {f"predictions/{name}": plot_prediction(prediction, title=f"{name}, step {step}")})
        if run.config.eval.rollouts and jax.process_count() == 1:
            policy = run.make_policy(params)
            for name, env in run.inputs.environments.items():
                result = closed_loop(
                    policy, env, name, episodes=run.config.eval.rollouts, exec_horizon=run.config.eval.exec_horizon
                )
                scalars |= {f"rollout/{name}/{key}": value for key, value in result.scalars.items()}
                for number, frames in result.videos.items():
                    self.writer.video(step, f"rollouts/{name}/{number}", frames)
        self.writer.scalars(step, scalars)
        for key, value in scalars.items():
            if key.endswith(("/loss", "/success")):
                log.info("step %d  %s %.4f", step, key, value)
        return scalars

    def _sampler(self, params, draw: int):
        return lambda batch: self.sample(params, batch, draw, self.head_of(batch))


def _head_of_batch(batch, heads: Iterable[str]) -> str:
    """The head that learns from a validation batch (all of one dataset)."""
    learns = jax.device_get(batch["action_head_mask"])
    return next((head for head in heads if np.any(learns.get(head, True))), list(heads)[0])


def describe(run: Run) -> str:
    """One paragraph about what is going to be trained, for the log."""
    shapes = jax.eval_shape(run.init_params, run.init_from)
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flatten(shapes)}
    trained = sum(size for path, size in sizes.items() if path not in run.frozen)
    counts = {name: stats["num_transitions"] for name, stats in run.inputs.statistics.items()}
    return (
        f"{run.mesh.size} device(s) {dict(run.mesh.shape)}, {trained:,} trained of {sum(sizes.values()):,} parameters, "
        f"batch {run.config.batch_size}, {run.config.num_steps} steps; transitions {counts}"
    )
