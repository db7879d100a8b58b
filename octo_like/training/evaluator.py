"""How good the parameters of the moment are, measured while a run trains."""

import functools
import logging
from collections.abc import Iterable

import jax
import numpy as np

from octo_like.robot.prediction import plot_prediction
from octo_like.training import sharding
from octo_like.training.evaluation import action_error, closed_loop, predict_rows, validation_loss
from octo_like.training.metrics import MetricsWriter
from octo_like.training.run import Run
from octo_like.training.state import TrainState
from octo_like.training.step import make_eval_step, sample_keys

log = logging.getLogger(__name__)


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
