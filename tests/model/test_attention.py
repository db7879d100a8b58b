"""Every implementation of attention gives what the plain formula gives, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.model import attention
from octo_like.model.attention import BlockMask, StaticRule, attend
from octo_like.model.describe import matmul_flops
from octo_like.model.octo import build_model
from octo_like.model.stems import convolve
from tests.model import tiny

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


def test_splash_in_the_interpreter():
    q, k, v, mask = inputs()
    rule = mask.rule.allowed.copy()
    rule[70, 70] = True  # a kernel that never meets a key divides by zero; block rules always let a token see itself
    mask = BlockMask(StaticRule(rule), mask.valid_bn)
    got = attention._splash(q, k, v, mask, interpret=True)
    valid = np.asarray(mask.valid_bn)
    np.testing.assert_allclose(got[valid], reference(q, k, v, mask.dense(), False)[valid], atol=2e-5)


def test_splash_compiles_for_tpu():
    pytest.importorskip("libtpu", reason="compiling for a TPU without one needs libtpu (the extra tpu)")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    one = jax.sharding.SingleDeviceSharding(topology.devices[0])
    q, k, v, mask = inputs(jnp.bfloat16)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)  # noqa: E731

    def loss(q, k, v, valid):
        return attend(q, k, v, BlockMask(mask.rule, valid), implementation="splash").astype(jnp.float32).sum()

    jax.jit(jax.grad(loss)).lower(*(shape(x) for x in (q, k, v, mask.valid_bn))).compile()


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
