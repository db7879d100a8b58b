"""A whole update by hand, with a model so small that every number can be followed: averages, skipping, keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.training.optimizer import global_norm, make_optimizer, make_schedule
from octo_like.training.state import create_state
from octo_like.training.step import (
    StepConfig,
    _accumulated,
    make_eval_step,
    make_train_step,
    mean_terms,
    norms_by_part,
    sample_keys,
)

HEADS = {"near": 2.0, "far": 1.0}  # weights of the losses


class Line:
    """Two heads that predict action = kernel * x + bias + noise of the sample's key; what the step needs of a model."""

    heads = HEADS
    head_weights = {"near": 2.0}

    def apply(self, variables, batch, keys_b, train, *, method, mutable=()):
        assert method == "loss_terms"
        p, terms, sown = variables["params"], {}, {}
        noise = jax.vmap(jax.random.normal)(keys_b) * 0.1
        for name in HEADS:
            part = p[f"heads_{name}"]["dense"]
            error = part["kernel"] * batch["x"] + part["bias"] + noise - batch["action"]
            if train:
                error = error + 0.5
            loss = batch[name] * error**2
            terms[name] = {"loss": loss.sum(), "mse": loss.sum(), "count": batch[name].sum()}
            sown[f"heads_{name}"] = {"loss": (jax.lax.stop_gradient(loss),), "count": (batch[name],)}
        return (terms, {"by_sample": sown}) if mutable else terms

    def counts(self, batch, keys_b=None):
        return {name: batch[name].sum() for name in HEADS}


def batch(rows=4):
    rng = np.random.default_rng(0)
    return {
        "observation": {},
        "task": {},
        "x": jnp.asarray(rng.normal(size=rows), jnp.float32),
        "action": jnp.asarray(rng.normal(size=rows), jnp.float32),
        "near": jnp.asarray([1.0, 1.0, 1.0, 0.0]),
        "far": jnp.asarray([0.0, 1.0, 0.0, 0.0]),
        "sample_id": jnp.asarray([7, 3, 11, 4], jnp.int32),
        "dataset_id": jnp.asarray([0, 1, 0, 2], jnp.int32),
    }


PARAMS = {f"heads_{name}": {"dense": {"kernel": jnp.float32(0.7), "bias": jnp.float32(-0.2)}} for name in HEADS}
PATHS = [f"heads_{name}/dense/{leaf}" for name in HEADS for leaf in ("kernel", "bias")]


def make(schedule=None, clip_norm=None, weight_decay=0.0, frozen=frozenset(), **config):
    schedule = schedule or make_schedule("constant", peak=0.1, warmup_steps=0)
    tx = make_optimizer(schedule, clip_norm=clip_norm, weight_decay=weight_decay)
    return create_state(PARAMS, tx, frozen), jax.jit(make_train_step(Line(), tx, schedule, StepConfig(**config)))


def by_hand(data, seed, step):
    """(loss, gradient by path) of the first parameters."""
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), int(i)) for i in data["sample_id"]]
    noise = np.array([float(jax.random.normal(jax.random.fold_in(key, 1))) for key in keys]) * 0.1
    x, action = np.asarray(data["x"], np.float64), np.asarray(data["action"], np.float64)
    error, loss, gradient = 0.7 * x - 0.2 + noise - action + 0.5, 0.0, {}
    for name, weight in HEADS.items():
        share = np.asarray(data[name]) * weight / max(np.sum(data[name]), 1)
        loss += np.sum(share * error**2)
        gradient[f"heads_{name}/dense/kernel"] = np.sum(share * 2 * error * x)
        gradient[f"heads_{name}/dense/bias"] = np.sum(share * 2 * error)
    return loss, gradient, error


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_update_is_what_the_formulas_say(accumulate):
    data = batch()
    state, step = make(seed=5, accumulate=accumulate, clip_norm=0.25, weight_decay=0.3)
    after, metrics = step(state, data)
    loss, gradient, error = by_hand(data, 5, 0)
    norm = np.sqrt(sum(g**2 for g in gradient.values()))
    assert np.isclose(metrics["loss"], loss, rtol=1e-5) and np.isclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert norm > 0.25, "clipping is part of the test"
    moved = 0.0
    for path in PATHS:
        # Adam's first step is the sign; weight decay pulls kernels only.
        before = 0.7 if path.endswith("kernel") else -0.2
        update = -0.1 * (np.sign(gradient[path]) + (0.3 * 0.7 if path.endswith("kernel") else 0))
        assert np.isclose(after.trained[path], before + update, atol=1e-5), path
        # (1 + 0) / (10 + 0) is less than the decay.
        assert np.isclose(after.ema[path], 0.1 * before + 0.9 * (before + update), atol=1e-5), path
        moved += update**2
    assert np.isclose(metrics["update_norm"], moved**0.5, rtol=1e-4)
    assert np.isclose(metrics["learning_rate"], 0.1) and metrics["finite"] and metrics["skipped"] == 0
    assert after.step == 1 and after.skipped == 0
    whole = np.sqrt(sum(float(after.trained[path]) ** 2 for path in PATHS))
    assert np.isclose(metrics["param_norm"], whole, rtol=1e-5)
    for name in ("grad_norm", "update_norm", "param_norm"):
        parts = [value for key, value in metrics.items() if key.startswith(f"{name}/")]
        assert np.isclose(np.sqrt(sum(float(v) ** 2 for v in parts)), metrics[name], rtol=1e-4)
        assert len(parts) == 2
    samples = metrics["samples"]
    np.testing.assert_array_equal(samples["sample_id"], data["sample_id"])
    np.testing.assert_array_equal(samples["dataset_id"], data["dataset_id"])
    np.testing.assert_array_equal(samples["count"], data["near"] + data["far"])
    np.testing.assert_allclose(samples["loss"], (2 * data["near"] + data["far"]) * error**2, rtol=1e-4, atol=1e-6)
    assert np.isclose(metrics["near/loss"], np.mean(error[:3] ** 2), rtol=1e-5) and "near/count" not in metrics


@pytest.mark.parametrize("number", [1, 2, 4])
def test_micro_batches_are_one_after_the_other(number):
    """Whole batches at once would give the same sums in several times the memory."""
    part = lambda batch, keys: ({"sum": batch.sum()}, batch[:, 0])  # noqa: E731
    batch, keys = jnp.arange(16.0).reshape(8, 2), jax.random.split(jax.random.key(0), 8)
    sums, by_sample = _accumulated(part, batch, keys, number)
    assert sums["sum"] == batch.sum() and (by_sample == batch[:, 0]).all()
    program = jax.make_jaxpr(lambda: _accumulated(part, batch, keys, number))()
    loops = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    assert [loop.params["length"] for loop in loops] == ([] if number == 1 else [number])


def test_the_average_warms_up_and_then_decays_as_asked():
    """min(decay, (1 + t) / (10 + t)): the ramp is over where it reaches the decay."""
    state, step = make(ema_decay=0.8)
    for t, want in ((0, 0.1), (5, 6 / 15), (34, 35 / 44), (36, 0.8), (1000, 0.8)):
        before = state.replace(step=jnp.int32(t), ema={path: jnp.float32(3.0) for path in PATHS})
        after, _ = step(before, batch())
        for path in PATHS:
            assert np.isclose(after.ema[path], want * 3.0 + (1 - want) * float(after.trained[path]), rtol=1e-5), t
    assert StepConfig().ema_decay == 0.999 and StepConfig().accumulate == 1 and StepConfig().seed == 0


def test_keys_are_of_seed_step_and_sample():
    ids = jnp.arange(3)
    keys = jax.random.key_data(sample_keys(1, 2, ids))
    want = [jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 2), i) for i in range(3)]
    np.testing.assert_array_equal(keys, jax.random.key_data(jnp.stack(want)))
    others = [sample_keys(*args) for args in ((2, 2, ids), (1, 3, ids), (1, 2, ids + 5))]
    assert all(np.any(jax.random.key_data(other) != keys) for other in others)
    state, step = make(seed=5)
    _, second = step(state.replace(step=jnp.int32(9)), batch())
    assert np.isclose(second["loss"], by_hand(batch(), 5, 9)[0], rtol=1e-5)


def test_steps_that_are_skipped_are_not_counted_by_the_optimizer():
    schedule = make_schedule("rsqrt", peak=0.1, warmup_steps=4, timescale=7)
    state, step = make(schedule)
    bad = batch() | {"action": batch()["action"].at[1].set(jnp.inf)}
    after, metrics = step(state, bad)
    assert not metrics["finite"] and metrics["skipped"] == 1 and after.step == 1
    jax.tree.map(np.testing.assert_array_equal, (after.trained, after.ema, after.opt_state), (state.trained, state.ema, state.opt_state))  # noqa: E501  # fmt: skip
    for _ in range(3):
        after, metrics = step(after, batch())
    assert after.skipped == 1 and after.step == 4
    assert np.isclose(metrics["learning_rate"], schedule(2)) and np.isclose(float(schedule(2)), 0.05)


def test_frozen_leaves_stay_and_have_no_state():
    frozen = frozenset({"heads_near/dense/kernel"})
    state, step = make(frozen=frozen)
    assert set(state.trained) == set(state.ema) == set(PATHS) - frozen and set(state.frozen) == frozen
    assert state.step == 0 and state.step.dtype == jnp.int32 and state.skipped == 0
    assert all(state.ema[path] is not state.trained[path] for path in state.ema)
    after, metrics = step(state, batch())
    assert after.params["heads_near"]["dense"]["kernel"] == np.float32(0.7)
    assert after.params["heads_far"]["dense"]["kernel"] == after.trained["heads_far/dense/kernel"] != np.float32(0.7)
    assert after.ema_params["heads_far"]["dense"]["kernel"] == after.ema["heads_far/dense/kernel"]
    assert np.isclose(metrics["grad_norm"], np.sqrt(sum(g**2 for p, g in by_hand(batch(), 0, 0)[1].items() if p not in frozen)), rtol=1e-5)  # noqa: E501  # fmt: skip


def test_an_evaluation_repeats_itself():
    run = make_eval_step(Line(), 3)
    first = run(PARAMS, batch())
    x, action = np.asarray(batch()["x"]), np.asarray(batch()["action"])
    noise = jax.vmap(jax.random.normal)(sample_keys(3, 0, batch()["sample_id"])) * 0.1
    want = np.sum(((0.7 * x - 0.2 + noise - action) ** 2)[:3])
    assert np.isclose(first["near"]["loss"], want, rtol=1e-5), "without what training adds"
    jax.tree.map(np.testing.assert_array_equal, first, run(PARAMS, batch()))


def test_means_of_nothing_are_zero_and_norms_add_up():
    counts, terms = {"a": jnp.float32(0), "b": jnp.float32(4)}, {"a": {"loss": jnp.float32(0)}, "b": {"loss": 8.0, "count": 4}}  # noqa: E501  # fmt: skip
    assert {key: float(value) for key, value in mean_terms(terms, counts).items()} == {"a/loss": 0.0, "b/loss": 2.0}
    assert np.isclose(mean_terms({"a": {"loss": 0.25}}, {"a": 0.5})["a/loss"], 0.25), "a count below 1 is 1"
    flat = {"heads_x/a/kernel": jnp.array([3.0]), "heads_x/b/kernel": jnp.array([4.0]), "heads_y/a/kernel": jnp.ones(1)}
    parts = norms_by_part("n", flat)
    assert sorted(float(v) for v in parts.values()) == [1.0, 5.0] and np.isclose(global_norm(flat), 26**0.5)


def test_schedules_at_their_corners():
    plain = make_schedule("constant", peak=2.0, warmup_steps=0)
    assert plain(0) == plain(99) == 2.0
    warm = make_schedule("constant", peak=2.0, warmup_steps=4, init=1.0)
    assert [float(warm(s)) for s in (0, 1, 3, 4, 5)] == [1.0, 1.25, 1.75, 2.0, 2.0]
    rsqrt = make_schedule("rsqrt", peak=3.0, warmup_steps=4)
    assert np.isclose(rsqrt(4), 3.0) and np.isclose(rsqrt(30_004), 1.5)
    cosine = make_schedule("cosine", peak=2.0, warmup_steps=4, decay_steps=8)
    np.testing.assert_allclose([cosine(s) for s in (4, 5, 6, 8, 9)], [2, 1 + 0.5**0.5, 1, 0, 0], atol=1e-6)
    with pytest.raises(ValueError, match="decay_steps > warmup_steps, got 4 and 4"):
        make_schedule("cosine", peak=1.0, warmup_steps=4, decay_steps=4)
