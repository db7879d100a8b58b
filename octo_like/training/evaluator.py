"""How good the parameters of the moment are, measured while a run trains."""

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from octo_like.common.config import ConfigError
from octo_like.common.dimensions import of_statistics
from octo_like.robot.prediction import plot_prediction
from octo_like.robot.rollout import gym_env_maker
from octo_like.training import distributed, sharding
from octo_like.training.evaluation import (
    EVALUATION_SEEDS,
    action_error,
    closed_loop,
    predict_rows,
    scalar_names,
    share,
    success_scalars,
    validation_loss,
)
from octo_like.training.metrics import MetricsWriter
from octo_like.training.ranking import Ranking
from octo_like.training.run import Run
from octo_like.training.state import TrainState
from octo_like.training.step import make_eval_step, sample_keys

log = logging.getLogger(__name__)

PLOTTED_SAMPLES = 3  # of each step that a picture shows
PLOTTED_ROWS = 32  # of data without episodes that could be followed
RECORDED = 2  # rollouts of which there are videos


class Evaluator:
    """Validation loss, action error in physical units, plots and rollouts, of the averaged parameters.

    Every process calls it at the same steps: batches are spread over all of them, and they share the rollouts. All of
    them get the same scalars; process 0 writes them and draws.
    """

    def __init__(self, run: Run, writer: MetricsWriter):
        self.run, self.writer = run, writer
        seed = run.config.seed
        self.terms = jax.jit(sharding.traced_on(run.mesh, make_eval_step(run.model, seed)))
        self.head_of = functools.partial(_head_of_batch, heads=list(run.model.heads))
        whole = sharding.replicated(run.mesh)  # so that every process can read them

        def sample(params, batch, draw, head):
            keys = sample_keys(seed + 1, draw, batch["sample_id"])
            return run.model.apply(
                {"params": params}, batch["observation"], batch["task"], keys, head=head, method="sample"
            )

        self.sample = jax.jit(sharding.traced_on(run.mesh, sample), static_argnames="head", out_shardings=whole)
        self.numbers = jax.jit(_numbers_of, out_shardings=whole)

    def check(self, state: TrainState, ranking: Ranking) -> None:
        """Finds before the first step what would stop the first evaluation. Nothing is computed.

        Args:
          state: or its shapes.

        Raises:
          ValueError: no metric of an evaluation is what checkpoints are ranked by, an environment cannot be found, or
            more actions of a chunk are to be executed than it has.
        """
        run, options = self.run, self.run.config.eval
        environments = run.inputs.environments if options.rollouts else {}
        for name, env in environments.items():
            try:
                gym_env_maker(env)
            except ValueError as error:
                raise ConfigError(f"data.datasets.{name}.env: {error}") from error
            horizon = run.model.heads[self._head_of_dataset(name)].action_horizon
            if options.exec_horizon is not None and options.exec_horizon > horizon:
                raise ConfigError(
                    f"eval.exec_horizon={options.exec_horizon} is more than the {horizon} actions of a chunk for {name}"
                )
        if not ranking.enabled:
            return
        names = []
        size = options.batch_size or run.config.batch_size
        like = sharding.abstract_batch(run.inputs.stream.batch_spec, size, run.mesh)
        measured = jax.eval_shape(self.terms, state.ema_params, like) if run.inputs.validation else {}
        for name in run.inputs.validation:
            for part, terms in measured.items():
                of_another = part in run.model.heads and part != self._head_of_dataset(name)
                names += [] if of_another else [f"val/{name}/{part}/{term}" for term in terms if term != "count"]
            if (statistics := run.inputs.statistics.get(name)) is not None:
                names += [f"val/{name}/{key}" for key in scalar_names(statistics)]
        said = ranking.pattern.split("/", 3)
        for name in environments:
            names += [f"rollout/{name}/{key}" for key in ("success", "success_low", "success_high", "steps")]
            if said[0] == "rollout" and said[2:3] == ["success"] and len(said) == 4:
                names.append(f"rollout/{name}/success/{said[3]}")  # environments name their tasks when they act
        ranking.chosen(names)

    def _head_of_dataset(self, name: str) -> str:
        """The head that learns from a dataset and acts for it."""
        heads, own = list(self.run.model.heads), self.run.inputs.statistics.get(name, {}).get("head")
        return own if own in heads else heads[0] if len(heads) == 1 or "action" not in heads else "action"

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Writes and returns everything that could be measured."""
        run, params = self.run, state.ema_params
        scalars: dict[str, float] = {}
        for name, batches in run.inputs.validation.items():
            # Placed once: loss, error and plot look at the same batches.
            placed = [sharding.put_batch(batch, run.mesh) for batch in batches]
            losses = validation_loss(lambda batch: self.terms(params, batch), placed)
            scalars |= {f"val/{name}/{key}": value for key, value in losses.items()}
            if (statistics := run.inputs.statistics.get(name)) is None:
                continue  # no actions
            seen = [self._predicted(params, batch) for batch in placed]
            error = action_error(lambda batch: batch["predicted"][0], seen, statistics)
            scalars |= error.scalars(f"val/{name}/")
            self._plot(step, name, params, placed)
        if run.config.eval.rollouts:
            scalars |= self._rollouts(step, params)
        self.writer.scalars(step, scalars)
        for key, value in scalars.items():
            if key.endswith(("/loss", "/success")):
                log.info("step %d  %s %.4f", step, key, value)
        return scalars

    def _predicted(self, params: Any, batch: Mapping[str, Any], samples: int = 1) -> dict[str, Any]:
        """The numbers of a placed batch on this host, all rows, and in "predicted" (samples, B, H, A) actions."""
        seen = jax.device_get(self.numbers(batch))
        head = self.head_of(seen)
        # One after the other: on CPUs, programs in flight that exchange data may wait for each other's threads.
        draws = [jax.device_get(self.sample(params, batch, draw, head=head)) for draw in range(samples)]
        return {**seen, "predicted": np.stack(draws)}

    def _plot(self, step: int, name: str, params: Any, placed: Sequence[Mapping[str, Any]]) -> None:
        """Draws what is predicted along one held-out episode; where none can be followed, for some rows."""
        run, episode = self.run, self.run.inputs.episodes.get(name)
        shown: Iterable[Mapping[str, Any]] = placed[: -(-PLOTTED_ROWS // len(placed[0]["sample_id"]))]
        if episode is not None:
            shown = (sharding.put_batch(batch, run.mesh) for batch in episode())
        seen = [self._predicted(params, batch, PLOTTED_SAMPLES) for batch in shown]
        if not distributed.is_main():
            return
        statistics = run.inputs.statistics[name]
        samplers = [lambda batch, draw=draw: batch["predicted"][draw] for draw in range(PLOTTED_SAMPLES)]
        prediction = predict_rows(samplers, seen, statistics, limit=PLOTTED_ROWS if episode is None else None)
        named = of_statistics(statistics, "action", prediction.true.shape[1])
        picture = plot_prediction(prediction, named.names, units=named.units, title=f"{name}, step {step}")
        self.writer.images(step, {f"predictions/{name}": picture})

    def _plans(self, name: str) -> bool:
        """Whether a dataset has sub-tasks, so that its robot has learned to say what it does next."""
        views = self.run.inputs.stream.order_spec.get("views") or {}
        return name not in views or views[name].get("text_keys", {}).get("subtask") is not None

    def _rollouts(self, step: int, params: Any) -> dict[str, float]:
        """Every process runs its share of the episodes, by itself; process 0 writes the videos of its own."""
        run, scalars = self.run, dict[str, float]()
        if not run.inputs.environments:
            return scalars
        policy = run.make_policy(sharding.to_local(params, run.mesh))
        for name, env in run.inputs.environments.items():
            mine = share(run.config.eval.rollouts, jax.process_index(), jax.process_count())
            outcomes: list[dict[str, Any]] = []
            if mine:
                result = closed_loop(
                    policy,
                    env,
                    name,
                    episodes=len(mine),
                    exec_horizon=run.config.eval.exec_horizon,
                    plan_every=run.config.eval.get("plan_every") if self._plans(name) else None,
                    seed=EVALUATION_SEEDS + mine.start,
                    record=RECORDED if distributed.is_main() else 0,
                )
                outcomes = [episode.summary() for episode in result.episodes]
                for number, frames in result.videos.items():
                    self.writer.video(step, f"rollouts/{name}/{number}", frames)
            everyone = distributed.from_all(f"octo_like/rollouts/{step}/{name}", outcomes)
            found = success_scalars([one for of_process in everyone for one in of_process])
            scalars |= {f"rollout/{name}/{key}": value for key, value in found.items()}
        return scalars


def _numbers_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What errors and plots need of a batch, besides the predictions."""
    observation = {key: batch["observation"][key] for key in ("timestep", "proprio") if key in batch["observation"]}
    chosen = {key: batch[key] for key in ("action", "action_pad_mask", "action_head_mask")}
    return {**chosen, "observation": observation}


def _head_of_batch(batch: Mapping[str, Any], heads: Iterable[str]) -> str:
    """The head that learns from a validation batch (all of one dataset), on this host."""
    learns = batch["action_head_mask"]
    return next((head for head in heads if np.any(learns.get(head, True))), list(heads)[0])
