"""One training step as a pure function (state, batch) -> (state, metrics), used by pretraining and adaptation alike.

All randomness of a sample (augmentation, dropout, diffusion time and noise) is keyed by the run's seed, the step and
the sample's id; losses are sums divided by counts over the whole batch. So neither the number of devices nor gradient
accumulation changes the mathematics.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from octo_like.model.octo import OctoModel, total_loss
from octo_like.model.parts import reported_losses
from octo_like.policy.pretrained import module_of
from octo_like.training.augment import Augmenter, augment_batch
from octo_like.training.optimizer import Schedule, global_norm, join_params, sum_of_squares
from octo_like.training.own_words import OwnSubtasks, told
from octo_like.training.state import TrainState

Metrics = dict[str, Any]
OWN_WORDS = 2**20  # of a sample's key, far from those of the heads


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step does besides the model and the optimizer.

    Attributes:
      seed: of all randomness in the step.
      accumulate: number of micro-batches the batch is split into.
      ema_decay: of the parameter average; the effective decay at step t is min(ema_decay, (1 + t) / (10 + t)).
      augmentation: by camera slot.
      own_subtasks: which samples are told the model's own words.
    """

    seed: int = 0
    accumulate: int = 1
    ema_decay: float = 0.999
    augmentation: Mapping[str, Augmenter] = dataclasses.field(default_factory=dict)
    own_subtasks: OwnSubtasks = OwnSubtasks()


def sample_keys(seed: int, step: jax.Array | int, sample_id: jax.Array | np.ndarray) -> jax.Array:
    """One key per sample: (B,) from (B,) ids."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, sample_id)


def make_train_step(
    model: OctoModel,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    config: StepConfig,
    gather: Callable[[Any, Any], tuple[Any, Any]] = lambda trained, frozen: (trained, frozen),
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]]:
    """The step to be jitted with the state donated.

    Its metrics are scalars, and under "samples" what each row of the global batch says, in the batch's order: "loss"
    (B,) float32 (weighted sum over heads of the sample's mean loss; 0 where no head learns from it), "count" (B,) the
    number of action entries learned from, "dataset_id" and "sample_id" (B,) int32.

    Args:
      gather: (trained, frozen) parameters as they are kept to the same as the model needs them, see `sharding.gather`.
    """

    def micro_loss(trained, frozen, batch, keys_b, counts):
        params = join_params(*gather(trained, frozen))
        terms, sown = model.apply({"params": params}, batch, keys_b, True, method="loss_terms", mutable=["by_sample"])
        reported = loss_by_sample(model, sown.get("by_sample", {}), keys_b.shape[0])
        return total_loss(model, terms, counts), (terms, reported)

    def train_step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        keys_b = sample_keys(config.seed, state.step, batch["sample_id"])
        batch = augment_batch(batch, config.augmentation, jax.vmap(jax.random.fold_in, (0, None))(keys_b, 0))
        keys_b = jax.vmap(jax.random.fold_in, (0, None))(keys_b, 1)
        counts = model.counts(batch, keys_b)
        gradient = jax.value_and_grad(micro_loss, has_aux=True)

        def part(batch, keys_b):
            if config.own_subtasks.prob:
                params = join_params(*gather(state.trained, state.frozen))
                own_keys = jax.vmap(jax.random.fold_in, (0, None))(keys_b, OWN_WORDS)
                batch = told(config.own_subtasks, model, params, batch, own_keys, state.step)
            (loss, (terms, by_sample)), grads = gradient(state.trained, state.frozen, batch, keys_b, counts)
            return (loss, terms, grads), by_sample

        (loss, terms, grads), by_sample = _accumulated(part, batch, keys_b, config.accumulate)
        grad_norm = global_norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        update_norm = global_norm(updates)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss) & jnp.isfinite(update_norm)
        t = state.step.astype(jnp.float32)
        updates_before = t - state.skipped.astype(jnp.float32)  # what the optimizer counts
        decay = jnp.minimum(config.ema_decay, (1 + t) / (10 + t))
        trained = optax.apply_updates(state.trained, updates)
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, trained)

        # A step whose gradient is not finite changes nothing but the counters.
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            trained=keep(trained, state.trained),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
            skipped=state.skipped + jnp.where(finite, 0, 1),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "param_norm": global_norm(state.trained),
            "learning_rate": schedule(updates_before),
            "finite": finite,
            "skipped": state.skipped,
            "samples": {**by_sample, "dataset_id": batch["dataset_id"], "sample_id": batch["sample_id"]},
        }
        norms = norms_by_part("grad_norm", grads) | norms_by_part("update_norm", updates)
        return state, metrics | norms | norms_by_part("param_norm", state.trained) | mean_terms(terms, counts)

    return train_step


def _accumulated(part: Callable[[Any, jax.Array], tuple[Any, Any]], batch: Any, keys_b: jax.Array, number: int) -> Any:
    """(sums, by_sample) of `part` on the batch, in a `number` of micro-batches one after the other."""
    if number == 1:
        return part(batch, keys_b)
    # Interleaved rows, so that every micro-batch is spread over the devices as the whole batch is.
    split = lambda x: jnp.moveaxis(x.reshape(-1, number, *x.shape[1:]), 1, 0)  # noqa: E731
    micro = jax.tree.map(split, (batch, keys_b))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), micro)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, *one)[0])

    def add(total, rows):
        sums, by_sample = part(*rows)
        return jax.tree.map(jnp.add, total, sums), by_sample

    sums, by_sample = jax.lax.scan(add, zeros, micro)
    return sums, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1), by_sample)  # the batch's order again


def make_eval_step(model: OctoModel, seed: int) -> Callable[[Any, Mapping[str, Any]], dict[str, dict[str, jax.Array]]]:
    """(params, batch) to summed loss terms with fixed keys: the same batch always gives the same numbers."""

    def eval_step(params, batch):
        return model.apply(
            {"params": params}, batch, sample_keys(seed, 0, batch["sample_id"]), False, method="loss_terms"
        )

    return eval_step


def mean_terms(terms: Mapping[str, Mapping[str, jax.Array]], counts: Mapping[str, jax.Array]) -> Metrics:
    """Sums to means, flat: {"{head}/{term}": mean}."""
    return {
        f"{head}/{name}": value / jnp.maximum(counts[head], 1.0)
        for head, part in terms.items()
        for name, value in part.items()
        if name != "count"
    }


def loss_by_sample(model: OctoModel, sown: Mapping[str, Any], rows: int) -> dict[str, jax.Array]:
    """{"loss", "count"} (B,) of what the heads offered under "by_sample"; no gradient flows through it."""
    loss: Any = 0.0
    count: Any = 0.0
    for name, head in model.heads.items():
        mean, entries = reported_losses(sown, name, head, rows)
        loss, count = loss + model.head_weights.get(name, 1.0) * mean, count + entries
    return {"loss": loss, "count": count}


def norms_by_part(name: str, flat: Mapping[str, jax.Array]) -> Metrics:
    """{"<name>/<part of the model>": L2 norm} of a flat tree by path; the squares add up to that of the whole."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in flat.items():
        part = module_of(path)
        squares[part] = squares.get(part, 0.0) + sum_of_squares(leaf)
    return {f"{name}/{part}": jnp.sqrt(value) for part, value in squares.items()}
