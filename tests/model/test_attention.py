"""Every implementation of attention gives what the plain formula gives, gradients included."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from octo_like.common.schema import synthetic_batch
from octo_like.model import attention
from octo_like.model.attention import BlockMask, GroupLayout, StaticRule, attend, block_mask
from octo_like.model.octo import build_model, init_params
from octo_like.model.stems import convolve
from octo_like.policy.describe import matmul_flops
from octo_like.training import sharding
from octo_like.training.optimizer import make_optimizer, make_schedule
from octo_like.training.program import jit_train_step
from octo_like.training.state import create_state
from octo_like.training.step import StepConfig, make_train_step
from tests.model import light, tiny

N = 150


def inputs(dtype=jnp.float32):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, N, 2, 16), dtype) for i in range(3))
    valid = np.ones((2, N), bool)
    valid[0, 3], valid[1, 40:60] = False, False
    rule = np.tril(np.ones((N, N), bool))
    rule[:, 7] = False
    rule[70] = False  # a query without any key
    return q, k, v, BlockMask(StaticRule(rule), jnp.asarray(valid))


def reference(q, k, v, mask, uniform):
    """Query by query in float64."""
    q, k, v, mask = (np.asarray(x, np.float64) for x in (q, k, v, mask))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(mask[b, i])
        if not len(keys):
            out[b, i, h] = v[b, :, h].mean(0) if uniform else 0
            continue
        logits = k[b, keys, h] @ q[b, i, h] / 4.0
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights @ v[b, keys, h] / weights.sum()
    return out


@pytest.mark.parametrize("uniform", [False, True])
def test_acting_and_training_on_cpu(uniform):
    q, k, v, mask = inputs()
    run = lambda q, k, v: attend(q, k, v, mask, uniform_when_masked=uniform)  # noqa: E731
    want = reference(q, k, v, mask.dense(), uniform)
    np.testing.assert_allclose(jax.jit(run)(q, k, v), want, atol=1e-5)
    weight = jnp.cos(jnp.arange(want.size).reshape(want.shape))

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(f(*args) * weight), argnums=(0, 1, 2)))(q, k, v)

    value, grads = loss(run)
    plain_value, plain = loss(lambda q, k, v: attention._plain(q, k, v, mask.dense(), uniform))
    np.testing.assert_allclose(value, plain_value, rtol=1e-4)
    for got, expected in zip(grads, plain, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def octo_rule():
    """Two timesteps of a prefix, observations, repeated words and two readouts: 2 * (4 + 100 + 3 + 2) + 4 tokens."""
    groups = [GroupLayout("task_language", "task", 4, -1)]
    for t in range(2):
        groups += [GroupLayout("obs_primary", "obs", 100, t), GroupLayout("obs_language", "obs", 4, t)]
        groups += [GroupLayout("readout_a", "readout", 3, t), GroupLayout("readout_b", "readout", 2, t)]
    return StaticRule(block_mask(groups))


def octo_inputs(dtype=jnp.float32):
    rule = octo_rule()
    n = len(rule.allowed)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 2, 16), dtype) for i in range(3))
    valid = np.ones((2, n), bool)
    valid[0, :4] = False  # no instruction
    valid[0, 108:112] = False
    valid[1, 4:113] = False  # the first timestep is padding
    valid[1, 150:170] = False
    return q, k, v, BlockMask(rule, jnp.asarray(valid))


@pytest.mark.parametrize("rows", [None, (113, 104), (221, 1)])
def test_splash_in_the_interpreter_forward_and_backward(rows):
    """What a valid token gets, and what reaches the keys from valid tokens; whatever stands in the others."""
    q, k, v, mask = octo_inputs()
    start, count = rows or (0, q.shape[1])
    q, mask = q[:, start : start + count], mask.rows(start, count)
    read = np.asarray(mask.valid_bn)[:, start : start + count]
    weight = jnp.where(read[..., None, None], jnp.cos(jnp.arange(q.size).reshape(q.shape)), 0.0)

    def run(f):
        return jax.jit(
            jax.value_and_grad(lambda *x: (lambda out: (jnp.sum(out * weight), out))(f(*x)), (0, 1, 2), True)
        )

    (_, got), grads = run(lambda *x: attention._splash(*x, mask, interpret=True))(q, k, v)
    (_, want), expected = run(lambda *x: attention._plain(*x, mask.dense(), False))(q, k, v)
    np.testing.assert_allclose(got[read], want[read], atol=2e-5)
    np.testing.assert_allclose(want[read], reference(q, k, v, mask.dense(), False)[read], atol=2e-5)
    for name, a, b in zip("qkv", grads, expected, strict=True):
        assert np.all(np.isfinite(a)), name
        np.testing.assert_allclose(a, b, atol=5e-5, err_msg=name)
    assert not any(np.any(np.asarray(g)[~np.asarray(mask.valid_bn)]) for g in grads[1:]), "an invalid key was read"


TOPOLOGIES = {"v4": ("v4:2x2x1", dict(chip_config_name="megacore")), "v5e": ("v5e:2x2", {}), "v6e": ("v6e:2x2", {})}


def tpu_devices(name):
    pytest.importorskip("libtpu", reason="compiling for a TPU without one needs libtpu (the extra tpu)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology, options = TOPOLOGIES[name]
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


@pytest.mark.aot
@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("head_dim,dtype", [(64, jnp.bfloat16), (128, jnp.bfloat16), (64, jnp.float32)])
def test_splash_compiles_for_tpu(name, head_dim, dtype):
    """Forward and backward, and the few queries of acting; the validity is an input of the program."""
    one = jax.sharding.SingleDeviceSharding(tpu_devices(name)[0])
    mask = octo_inputs()[-1]
    n = mask.valid_bn.shape[1]
    shape = lambda dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=one)  # noqa: E731
    keys, valid = shape((2, n, 2, head_dim)), shape((2, n), bool)

    def loss(rows):
        def f(q, k, v, valid):
            given = BlockMask(mask.rule, valid).rows(*rows)
            return attend(q, k, v, given, implementation="splash").astype(jnp.float32).sum()

        return f

    compiled = jax.jit(jax.grad(loss((0, n)), argnums=(0, 1, 2))).lower(keys, keys, keys, valid).compile()
    assert "tpu_custom_call" in compiled.as_text()
    jax.jit(loss((n - 1, 1))).lower(shape((2, 1, 2, head_dim)), keys, keys, valid).compile()


@pytest.mark.aot
def test_splash_in_a_training_step_on_several_chips():
    """XLA cannot split the kernel over a mesh: every chip computes its own rows of the batch, and no other."""
    mesh = sharding.make_mesh(2, 2, devices=tpu_devices("v5e"))
    model = build_model(light.config(transformer=dict(num_layers=2, num_heads=2, mlp_dim=32, attention="splash")))
    schedule = make_schedule("constant", peak=1e-3, warmup_steps=0)
    tx = make_optimizer(schedule)
    shapes = jax.eval_shape(lambda: create_state(init_params(model, light.SPEC, jax.random.key(0)), tx, frozenset()))
    placed = sharding.infer_sharding(shapes, mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)), synthetic_batch(light.SPEC, 8)
    )
    step = jit_train_step(make_train_step(model, tx, schedule, StepConfig()), placed, mesh)
    text = step.lower(shapes, batch).compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert calls and all("[2,2," in line for line in calls), "2 of 8 rows, 2 heads"


def test_what_an_implementation_cannot_do_is_said():
    q, k, v, mask = inputs()
    for kwargs, words in (
        (dict(implementation="flash"), "'xla', 'cudnn', 'splash'"),
        (dict(implementation="cudnn"), "bfloat16"),
        (dict(implementation="splash", uniform_when_masked=True), "octo_compat"),
        (dict(implementation="cudnn", weights_fn=lambda w: w), "dropout"),
    ):
        with pytest.raises(ValueError, match=words):
            attend(q, k, v, mask, **kwargs)
    with pytest.raises(ValueError, match="static rule"):
        attend(q, k, v, mask.dense(), implementation="splash")
    model = build_model(tiny.config(transformer=tiny.config()["transformer"] | dict(attention="flash")))
    with pytest.raises(ValueError, match="unknown attention 'flash'"):
        tiny.random_params(model)


def test_flops_are_counted_as_by_hand():
    a, b = np.zeros((3, 5), np.float32), np.zeros((5, 7), np.float32)
    assert matmul_flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7
    assert matmul_flops(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), argnums=(0, 1)), a, b) == 3 * 2 * 3 * 5 * 7
    assert matmul_flops(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, None, length=4), np.zeros((6, 6))) == (
        4 * 2 * 6**3
    )
    x, kernel = np.zeros((2, 8, 8, 3), np.float32), np.zeros((3, 3, 3, 5), np.float32)
    forward = 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert matmul_flops(lambda x, k: convolve(x, k, 2, 1), x, kernel) == forward
    with pytest.raises(ValueError, match="unknown length"):
        matmul_flops(lambda a: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, a), np.zeros((6, 6)))


def test_same_padding_is_what_xla_calls_same():
    x = jax.random.normal(jax.random.key(0), (1, 9, 10, 2))
    for size, stride in ((7, 2), (3, 2), (3, 1), (1, 2)):
        kernel = jax.random.normal(jax.random.key(1), (size, size, 2, 3))
        want = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(convolve(x, kernel, stride, "same"), want, atol=1e-5)
