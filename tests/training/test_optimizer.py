"""Optimizers by name: their formulas, what they keep, where it lies, and what a user may get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octo_like.common.config import ConfigError, load_config
from octo_like.training import sharding
from octo_like.training.adaptation import check_settings
from octo_like.training.checkpoint import Checkpointer
from octo_like.training.leaves import named_leaves
from octo_like.training.optimizer import OPTIMIZERS, decay_mask, make_optimizer, make_schedule
from octo_like.training.program import optimizer_from_config, own_parts
from octo_like.training.state import create_state
from octo_like.training.step import StepConfig, make_train_step
from tests.training.test_update import PARAMS, Line, batch

SHAPES = {"a/kernel": (6, 4), "a/bias": (4,), "b/query/kernel": (6, 2, 3), "b/out/kernel": (2, 3, 6), "c/scale": ()}
SCHEDULE = dict(name="cosine", peak=0.1, warmup_steps=2, decay_steps=6, init=0.01, end=0.02)
OWN = """
import optax

def momentum(learning_rate, decay=0.5):
    return optax.chain(optax.trace(decay), optax.scale_by_learning_rate(learning_rate))

def nothing(learning_rate):
    return learning_rate(0)

def noisy(learning_rate):
    return optax.chain(optax.add_noise(0.1, 0.5, 3), optax.scale_by_learning_rate(learning_rate))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Name of a module outside of the repository."""
    (tmp_path / "own_optimizers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_optimizers"


def arrays(rng) -> dict:
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}


def run(tx, updates=5):
    """[(parameters before, gradient, parameters after), ...] of some updates."""
    rng = np.random.default_rng(0)
    params = arrays(rng)
    state, trace = tx.init(params), []
    for _ in range(updates):
        gradient = arrays(rng)
        change, state = jax.jit(tx.update)(gradient, state, params)
        after = optax.apply_updates(params, change)
        trace.append((params, gradient, after))
        params = after
    return trace


def clipped(gradient, clip_norm):
    norm = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in gradient.values()))
    return {path: np.asarray(g, np.float64) * min(1.0, (clip_norm or norm) / norm) for path, g in gradient.items()}


@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
def test_adamw_by_its_formula(clip_norm):
    """Loshchilov & Hutter 2019, algorithm 2, with clipping before and decay of kernels alone."""
    schedule = make_schedule(**SCHEDULE)
    tx = make_optimizer(schedule, weight_decay=0.2, clip_norm=clip_norm, b2=0.95, arguments=dict(b1=0.8))
    m, v = ({path: np.zeros(shape) for path, shape in SHAPES.items()} for _ in range(2))
    for t, (before, gradient, after) in enumerate(run(tx)):
        for path, g in clipped(gradient, clip_norm).items():
            m[path] = 0.8 * m[path] + 0.2 * g
            v[path] = 0.95 * v[path] + 0.05 * g**2
            direction = m[path] / (1 - 0.8 ** (t + 1)) / (np.sqrt(v[path] / (1 - 0.95 ** (t + 1))) + 1e-8)
            decay = 0.2 if "kernel" in path else 0.0
            want = before[path] - float(schedule(t)) * (direction + decay * np.asarray(before[path]))
            np.testing.assert_allclose(after[path], want, rtol=1e-5, atol=1e-6, err_msg=path)
    assert decay_mask(before) == {path: "kernel" in path for path in SHAPES}


def test_a_checkpoint_of_before_holds_these_names():
    """Runs that were begun when clipping and AdamW were written out by hand go on: the state has the same arrays."""
    params = {"a/kernel": jnp.ones((3, 2)), "a/bias": jnp.ones(2)}
    for clip_norm in (None, 1.0):
        state = make_optimizer(make_schedule(**SCHEDULE), weight_decay=0.2, clip_norm=clip_norm).init(params)
        moments = [f"1/0/{moment}/{path}" for moment in ("mu", "nu") for path in params]
        assert sorted(named_leaves(state)[0]) == sorted(["1/0/count", *moments, "1/2/count"])


@pytest.mark.parametrize("name", ["sgd", "lion", "adafactor", "muon"])
def test_decay_is_learning_rate_times_weight_for_every_optimizer(name):
    schedule = make_schedule("constant", peak=0.1, warmup_steps=4, init=0.02)
    plain, decayed = (run(make_optimizer(schedule, name=name, weight_decay=d), 4) for d in (0.0, 0.3))
    for path in SHAPES:
        start = np.asarray(plain[0][0][path])
        difference = np.asarray(plain[0][2][path]) - np.asarray(decayed[0][2][path])
        want = 0.02 * 0.3 * start if "kernel" in path else 0 * start
        np.testing.assert_allclose(difference, want, atol=1e-6, err_msg=path)


def test_sgd_and_lion_by_their_formulas():
    schedule = make_schedule(**SCHEDULE)
    sgd = make_optimizer(schedule, name="sgd", clip_norm=0.5, arguments=dict(momentum=0.7))
    lion = make_optimizer(schedule, name="lion", clip_norm=0.5, arguments=dict(b1=0.8, b2=0.6))
    for tx, of_lion in ((sgd, False), (lion, True)):
        m = {path: np.zeros(shape) for path, shape in SHAPES.items()}
        for t, (before, gradient, after) in enumerate(run(tx)):
            for path, g in clipped(gradient, 0.5).items():
                if of_lion:
                    direction = np.sign(0.8 * m[path] + 0.2 * g)
                    m[path] = 0.6 * m[path] + 0.4 * g
                else:
                    direction = m[path] = 0.7 * m[path] + g
                want = before[path] - float(schedule(t)) * direction
                np.testing.assert_allclose(after[path], want, rtol=1e-5, atol=1e-6, err_msg=path)


def test_muon_moves_kernels_by_orthogonal_matrices_and_the_rest_by_adam():
    schedule = make_schedule("constant", peak=0.1, warmup_steps=0)
    options = dict(consistent_rms=0.2, nesterov=False)
    ((before, gradient, after),) = run(make_optimizer(schedule, name="muon", arguments=options), 1)
    for path, inputs in {"a/kernel": 6, "b/query/kernel": 6, "b/out/kernel": 6}.items():
        moved = np.asarray(before[path] - after[path]).reshape(inputs, -1)
        singular = np.linalg.svd(moved / (0.1 * 0.2 * np.sqrt(max(moved.shape))), compute_uv=False)
        assert np.all((singular > 0.5) & (singular < 1.3)), (path, singular)  # Newton-Schulz comes that close to 1
    for path in ("a/bias", "c/scale"):  # Adam's first update
        np.testing.assert_allclose(after[path] - before[path], -0.1 * np.sign(gradient[path]), rtol=1e-4)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "own_optimizers:momentum", "own_optimizers:noisy"])
def test_every_optimizer_goes_on_from_a_checkpoint_bit_by_bit_and_skips_what_is_not_finite(name, own, tmp_path):
    """Frozen leaves have no state; four steps are two, a save, a restore and two more; a bad batch changes nothing."""
    schedule = make_schedule("constant", peak=0.01, warmup_steps=0)
    tx = make_optimizer(schedule, name=name, weight_decay=0.1)
    frozen = frozenset({"heads_near/dense/kernel"})
    state = create_state(PARAMS, tx, frozen)
    assert not [leaf for leaf in named_leaves(state.opt_state)[0] if leaf.endswith("heads_near/dense/kernel")]
    step = jax.jit(make_train_step(Line(), tx, schedule, StepConfig()))
    bad = batch() | {"action": batch()["action"].at[1].set(jnp.inf)}
    skipped, metrics = step(state, bad)
    assert not metrics["finite"]
    assert_equal(skipped.opt_state, state.opt_state)
    for _ in range(2):
        state, _ = step(state, batch())
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {})
        checkpointer.wait()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        restored, _ = checkpointer.restore(None, abstract)
    assert_equal(restored, state)
    for _ in range(2):
        state, restored = step(state, batch())[0], step(restored, batch())[0]
    assert_equal(restored, state)
    assert state.trained["heads_far/dense/kernel"] != PARAMS["heads_far"]["dense"]["kernel"]


def assert_equal(a, b):
    bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


def test_where_the_state_of_an_optimizer_lies():
    """Moments lie where their parameter lies; what has another shape (Adafactor's factors) no override can fit."""
    mesh = jax.sharding.AbstractMesh((1, 4), sharding.BATCH_AXES)
    params = {"a/kernel": jnp.zeros((256, 128)), "b/kernel": jnp.zeros((128, 512)), "b/bias": jnp.zeros(512)}
    for name in OPTIMIZERS:
        tx = make_optimizer(make_schedule(**SCHEDULE), name=name, weight_decay=0.1)
        state = jax.eval_shape(lambda tx=tx: create_state(params, tx, frozenset()))
        overrides = (("a/kernel", (None, "fsdp")),)
        placed = sharding.infer_sharding(state, mesh, min_size=200, overrides=overrides, params=state.trained)
        shapes = named_leaves(state.opt_state)[0]
        for path, where in named_leaves(placed.opt_state)[0].items():
            parameter = next((key for key in params if path.endswith(key)), None)
            if parameter and shapes[path].shape == params[parameter].shape:
                assert where == placed.trained[parameter], (name, path)
            where.shard_shape(shapes[path].shape)  # raises where they do not fit
        assert placed.trained["a/kernel"].shard_shape((256, 128)) == (256, 32)
        assert not placed.trained["b/kernel"].is_fully_replicated
    kept = named_leaves(jax.eval_shape(optax.adafactor(1.0).init, params))[0]
    assert (256,) in {leaf.shape for leaf in kept.values()}, "Adafactor has factors to place"


def config(**optimizer):
    overrides = [(f"optimizer.{key.replace('__', '.')}", str(value)) for key, value in optimizer.items()]
    return load_config("tests/training/tiny_config.py:synthetic", overrides)


def test_an_optimizer_of_ones_own(own):
    run_config = config(name=f"{own}:momentum", arguments__decay=0.7, weight_decay=0.3, clip_norm=0.5)
    schedule, tx = optimizer_from_config(run_config)
    m = {path: np.zeros(shape) for path, shape in SHAPES.items()}
    for t, (before, gradient, after) in enumerate(run(tx)):
        for path, g in clipped(gradient, 0.5).items():
            m[path] = 0.7 * m[path] + g
            decay = 0.3 if "kernel" in path else 0.0
            want = before[path] - float(schedule(t)) * (m[path] + decay * np.asarray(before[path]))
            np.testing.assert_allclose(after[path], want, rtol=1e-5, atol=1e-6, err_msg=path)
    assert list(own_parts(run_config)) == [own]  # its source is part of what a checkpoint says about its code


@pytest.mark.parametrize(
    "optimizer,message",
    [
        (dict(name="adam"), r"unknown optimizer.name 'adam'; valid: adamw, lion, muon, adafactor, sgd, or 'module:fun"),
        (dict(name="lion", arguments__beta=1), r"optimizer.arguments \(lion\): unknown option 'beta'.*valid: b1, b2"),
        (dict(arguments__nesterof=True), r"optimizer.arguments \(adamw\).*did you mean 'nesterov'"),
        (dict(arguments__weight_decay=1.0), r"unknown option 'weight_decay'"),
        (
            dict(name="own_optimizers:momentun"),
            r"has no function 'momentun'; it has \['momentum', 'noisy', 'nothing'\]",
        ),
        (dict(name="not_there:make"), r"there is no module 'not_there' here"),
        (dict(name="own_optimizers:momentum", arguments__dekay=1), r"momentum\(learning_rate, decay=0.5\).*'dekay'"),
        (dict(arguments__b1="abc"), r"optimizer.arguments.b1 must be at least 0 and less than 1; got 'abc'"),
        (dict(arguments__b1=2), r"optimizer.arguments.b1 must be at least 0 and less than 1; got 2"),
        (dict(arguments__eps=-1), r"optimizer.arguments.eps must be a number of at least 0; got -1"),
        (dict(arguments__nesterov="yes"), r"optimizer.arguments.nesterov must be True or False; got 'yes'"),
        (dict(arguments__mu_dtype="bfloat17"), r"optimizer.arguments.mu_dtype must be .*'bfloat16'.*got 'bfloat17'"),
        (dict(name="muon", arguments__ns_steps=1.5), r"optimizer.arguments.ns_steps must be a whole number"),
        (dict(name="sgd", arguments__momentum=1), r"optimizer.arguments.momentum must be .*, or None; got 1"),
        (dict(name="own_optimizers:nothing"), r"nothing returned .*expected an optax.GradientTransformation"),
    ],
)
def test_mistakes_are_named(optimizer, message, own):
    with pytest.raises(ValueError, match=message):
        optimizer_from_config(config(**optimizer))


def test_adaptation_finds_a_misspelt_optimizer_before_it_loads_anything():
    with pytest.raises((ConfigError, ValueError), match="unknown optimizer.name 'adam'"):
        check_settings(load_config("configs/finetune.py", [("optimizer.name", "adam")]))
