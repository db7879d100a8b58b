"""Special paths: what is here for its speed alone, and what it is worth.

Everything would compute the same without this file. What each path saves is measured by `scripts/bench_special.py`;
docs/performance.md has the figures.
"""

import functools
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What a masked logit is replaced by: finite, so that a query without any key gives the uniform distribution, not NaN.
MASKED = float(np.finfo(np.float32).min)


def traced_once(function: Callable | None = None, **options: Any) -> Callable:
    """`jax.jit` for the sake of tracing: calls with equal shapes and static arguments share one traced program, which
    is differentiated and lowered once as well. Layers of a transformer differ in nothing but their parameters."""
    return functools.partial(traced_once, **options) if function is None else jax.jit(function, **options)


def run_once_options() -> dict[str, str]:
    """Compiler options of a program that runs once: on CPU, optimising takes longer than running ever will."""
    return {"xla_backend_optimization_level": "1"} if jax.default_backend() == "cpu" else {}


def spare_the_collector() -> None:
    """What exists by now stays: the garbage collector need not go through it again while a program is traced."""
    gc.collect()
    gc.freeze()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cpu_attention(uniform: bool, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """One head of one sample at a time: its logits stay in a core's cache (twice as fast as all heads at once). With a
    gradient, which needs the weights of all heads, all at once but heads first, and normalised at the end."""

    def head(mask_qk, inputs):
        q, k, v = inputs
        logits = jnp.where(mask_qk, (q @ k.T).astype(jnp.float32) * q.shape[-1] ** -0.5, MASKED)
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        return ((weights.astype(v.dtype) @ v).astype(jnp.float32) / weights.sum(-1)[:, None]).astype(v.dtype)

    def sample(mask_qk, inputs):
        return jax.lax.map(lambda one: head(mask_qk, one), inputs)

    heads = tuple(x.transpose(0, 2, 1, 3) for x in (q, k, v))
    if mask.shape[0] == 1:
        out = jax.lax.map(lambda one: sample(mask[0], one), heads)
    else:
        out = jax.lax.map(lambda one: sample(one[0], one[1]), (mask, heads))
    return drop_empty(out.transpose(0, 2, 1, 3), mask, uniform)


def _cpu_forward(uniform, q, k, v, mask):
    def attention(q, k, v):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        logits = jax.lax.dot_general(q, k, (((3,), (3,)), ((0, 1), (0, 1)))).astype(jnp.float32)
        logits = jnp.where(mask[:, None], logits * q.shape[-1] ** -0.5, MASKED)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        out = jax.lax.dot_general(weights.astype(v.dtype), v, (((3,), (2,)), ((0, 1), (0, 1))))
        out = (out.astype(jnp.float32) / weights.sum(-1)[..., None]).astype(v.dtype)
        return drop_empty(out.transpose(0, 2, 1, 3), mask, uniform)

    return jax.vjp(attention, q, k, v)


def _cpu_backward(uniform, pullback, gradient):
    return *pullback(gradient), None


cpu_attention.defvjp(_cpu_forward, _cpu_backward)


def drop_empty(out_bqhd: jax.Array, mask: jax.Array, uniform: bool) -> jax.Array:
    """Zero for queries without any valid key."""
    return out_bqhd if uniform else jnp.where(mask.any(-1)[..., None, None], out_bqhd, 0)
