"""The loop that pretraining and adaptation share: resume, step, log, evaluate, save, export.

`train.py` and `finetune.py` build a `Run` and call `run_loop`. Everything that decides what a step computes is in
`step.py`; everything here is about when things happen and where they are written.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from octo_like.common.config import check_resume, to_dict
from octo_like.common.schema import check_batch, flatten
from octo_like.model.heads import check_datasets
from octo_like.model.octo import OctoModel, run_once_options
from octo_like.model.policy import Policy
from octo_like.training import sharding
from octo_like.training.augment import Augmentation
from octo_like.training.checkpoint import Checkpointer
from octo_like.training.distributed import EXIT_PREEMPTED, Preemption, fingerprint_across_hosts, is_main
from octo_like.training.evaluation import action_error, closed_loop, plot_prediction, predict_rows, validation_loss
from octo_like.training.metrics import METRICS_FILE, Clock, MetricsWriter, Progress, read_metrics
from octo_like.training.optimizer import frozen_paths, make_optimizer, make_schedule
from octo_like.training.state import TrainState, create_state
from octo_like.training.step import StepConfig, make_eval_step, make_train_step, sample_keys

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
      frozen: paths of parameters that are not trained.
    """

    config: Any
    workdir: Path
    mesh: jax.sharding.Mesh
    model: OctoModel
    init_params: Callable[[Any], Any]
    init_from: Any
    inputs: Any
    make_policy: Callable[[Any], Policy]
    frozen: frozenset[str] = frozenset()


def step_from_config(model: OctoModel, config: Any):
    """(optimizer, step function) of a config: what train.py, finetune.py and the ahead-of-time proof all compile."""
    opt = config.optimizer
    schedule = make_schedule(
        opt.schedule,
        peak=opt.peak,
        warmup_steps=opt.warmup_steps,
        timescale=opt.timescale,
        decay_steps=opt.decay_steps or config.num_steps,
        end=opt.end,
    )
    tx = make_optimizer(schedule, weight_decay=opt.weight_decay, clip_norm=opt.clip_norm, b2=opt.b2)
    augmentation = {slot: Augmentation(**dict(fields)) for slot, fields in config.augmentation.items()}
    step = StepConfig(config.seed, config.accumulate, config.ema_decay, augmentation)
    return tx, make_train_step(model, tx, schedule, step)


def place_state(run: Run, tx) -> tuple[TrainState, Any]:
    """The initial state, made on the devices where it will live, and its shardings."""
    create = lambda source: create_state(run.init_params(source), tx, run.frozen)  # noqa: E731
    shardings = sharding.infer_sharding(jax.eval_shape(create, run.init_from), run.mesh)
    place = jax.jit(create, out_shardings=shardings, compiler_options=run_once_options())
    return place(run.init_from), shardings


def jit_train_step(train_step, shardings, mesh):
    """The step as it runs: state donated and placed as `shardings` say, batch split over the mesh."""
    return jax.jit(
        sharding.traced_on(mesh, train_step),
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )


def run_loop(run: Run) -> int:
    """Trains to config.num_steps, from the newest checkpoint if there is one. Returns the process's exit status."""
    config, stream = run.config, run.inputs.stream
    for head in check_datasets(run.model.heads, run.inputs.statistics):
        log.warning("no dataset trains the action head %r: it keeps the weights it starts from", head)
    tx, train_step = step_from_config(run.model, config)
    sharding.check_batch_size(config.batch_size, run.mesh, config.accumulate)
    state, shardings = place_state(run, tx)
    step_fn = jit_train_step(train_step, shardings, run.mesh)
    metadata = {"config": to_dict(config)}
    wandb = dict(config.wandb) if config.wandb.project else None
    with (
        Checkpointer(
            run.workdir,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            metadata=metadata,
        ) as checkpointer,
        MetricsWriter(run.workdir, config=to_dict(config), wandb=wandb) as writer,
        Preemption() as preemption,
    ):
        state, clock = _resume(run, checkpointer, state, shardings)
        # Hosts that index other files, or derive other blocks, would make batches that do not belong together.
        fingerprint_across_hosts(json.loads(json.dumps(stream.order_spec)), "the data or its order")
        start = step = int(jax.device_get(state.step))
        if start >= config.num_steps:
            log.warning("already at step %d of %d; evaluating and exporting again", start, config.num_steps)
        else:
            check_batch(stream.batch(start) if hasattr(stream, "batch") else next(stream), stream.batch_spec)
            stream.seek(start * config.batch_size)
        evaluator = Evaluator(run, writer)

        def save(step):
            with clock.section("checkpoint"):
                extra = {
                    "position": stream.position,
                    "order_spec": json.loads(json.dumps(stream.order_spec)),
                    "clock": clock.state(),
                }
                checkpointer.save(step, state, extra)

        pending = None
        clock.switch("train")
        with Progress(config.num_steps, initial=start, samples_per_step=config.batch_size) as progress:
            while step < config.num_steps:
                batch = sharding.put_batch(next(stream), run.mesh)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                step += 1
                # The metrics of an earlier step are ready: looking at them does not wait for this one.
                if pending is not None:
                    shown = _log(writer, *pending, progress, clock)
                    progress.update(step, shown)
                    pending = None
                else:
                    progress.update(step)
                if step % config.log_every == 0 or step == start + 1 or step == config.num_steps:
                    pending = (step, metrics)
                last = step == config.num_steps
                if config.eval.every and step % config.eval.every == 0 and not last:
                    with clock.section("eval"):
                        evaluator(step, state)
                if config.checkpoint.every and step % config.checkpoint.every == 0 and not last:
                    save(step)
                if preemption.should_stop(step):
                    save(step)
                    checkpointer.wait()
                    log.warning("stopped at step %d as asked; run the same command to continue", step)
                    return EXIT_PREEMPTED
            if pending is not None:
                _log(writer, *pending, progress, clock)
        save(step)
        if config.eval.every is not None:
            with clock.section("eval"):
                evaluator(step, state)
        if is_main():
            run.make_policy(jax.device_get(state.ema_params)).save_pretrained(run.workdir / "export")
            log.info("exported to %s", run.workdir / "export")
        stream.close()
    return 0


def _resume(run: Run, checkpointer: Checkpointer, state: TrainState, shardings) -> tuple[TrainState, Clock]:
    """State, data position and clock of the newest good checkpoint, or those of a new run."""
    if checkpointer.latest_step() is None:
        return state, Clock.resume(None)
    saved = checkpointer.read()
    for change in check_resume(saved.metadata["config"], to_dict(run.config)):
        log.warning("resumed with %s", change)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    state, extra = checkpointer.restore(None, abstract)
    run.inputs.resume(extra["order_spec"], extra["position"])
    log.info("resumed from step %d", int(jax.device_get(state.step)))
    rows = read_metrics(run.workdir) if (Path(run.workdir) / METRICS_FILE).exists() else []
    return state, Clock.resume(extra.get("clock"), last_seen=rows[-1]["time"] if rows else None)


def _log(
    writer: MetricsWriter, step: int, metrics: Mapping[str, Any], progress: Progress, clock: Clock
) -> dict[str, float]:
    values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}
    if (rate := progress.samples_per_second()) is not None:
        values["train/samples_per_second"] = rate
    writer.scalars(step, values | clock.summary())
    return {"loss": values["train/loss"], "grad": values["train/grad_norm"]}


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


def frozen_from_config(params: Any, config: Any) -> frozenset[str]:
    """Paths that config.optimizer.freeze names."""
    return frozen_paths(params, tuple(config.optimizer.freeze))


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
