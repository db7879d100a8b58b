"""The T5 encoder (Raffel et al. 2020) in JAX, with the parameter tree of the released Flax checkpoints.

The parameters live in one nested tree ("shared", "encoder") and the forward pass is a function of it: the tree can be
read from a checkpoint, frozen or cast as a whole.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder. `gated` is the GELU-gated feed-forward of T5 1.1."""

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    num_buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    gated: bool = False


T5_CONFIGS = {
    "t5-small": T5Config(d_model=512, d_ff=2048, num_layers=6, num_heads=8),
    "t5-base": T5Config(),
    "t5-large": T5Config(d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
}


def relative_bucket(key_minus_query: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket index of relative positions (any shape), bidirectional: exact for short distances, logarithmic beyond."""
    half = num_buckets // 2
    distance = np.abs(key_minus_query)
    exact = half // 2
    log_ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (log_ratio * (half - exact)).astype(np.int32), half - 1)
    return np.where(distance < exact, distance, far) + np.where(key_minus_query > 0, half, 0)


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """weight * x / sqrt(mean(x^2) + epsilon), computed in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (normed * weight).astype(x.dtype)


def encode(
    params: Any, config: T5Config, input_ids: jax.Array, attention_mask: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """Last hidden state: (B, L) ids and mask to (B, L, d_model).

    A row whose mask is all zero attends uniformly. There is no 1/sqrt(d_kv): T5 folds it into its initialisation.
    """
    batch, length = input_ids.shape
    x = params["shared"]["embedding"].astype(dtype)[input_ids]
    positions = np.arange(length)
    buckets = relative_bucket(positions[None, :] - positions[:, None], config.num_buckets, config.max_distance)
    first = params["encoder"]["block"]["0"]["layer"]["0"]["SelfAttention"]
    bias = first["relative_attention_bias"]["embedding"].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]
    bias = bias + jnp.where(attention_mask[:, None, None, :] > 0, 0.0, jnp.finfo(jnp.float32).min)

    def dense(value, kernel):
        return value @ kernel["kernel"].astype(dtype)

    for i in range(config.num_layers):
        attention, feed_forward = (params["encoder"]["block"][str(i)]["layer"][j] for j in ("0", "1"))
        h = rms_norm(x, attention["layer_norm"]["weight"], config.epsilon)
        q, k, v = (
            dense(h, attention["SelfAttention"][name]).reshape(batch, length, config.num_heads, config.d_kv)
            for name in "qkv"
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) + bias
        weights = jax.nn.softmax(jnp.maximum(logits, jnp.finfo(jnp.float32).min), axis=-1).astype(dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, -1)
        x = x + dense(out, attention["SelfAttention"]["o"])
        h = rms_norm(x, feed_forward["layer_norm"]["weight"], config.epsilon)
        mlp = feed_forward["DenseReluDense"]
        if config.gated:
            hidden = jax.nn.gelu(dense(h, mlp["wi_0"])) * dense(h, mlp["wi_1"])
        else:
            hidden = jax.nn.relu(dense(h, mlp["wi"]))
        x = x + dense(hidden, mlp["wo"])
    return rms_norm(x, params["encoder"]["final_layer_norm"]["weight"], config.epsilon)


def init_params(config: T5Config, rng: jax.Array) -> dict:
    """Random parameters with T5's initial scales (Mesh TensorFlow), for tests and for training from scratch."""
    inner, count = config.num_heads * config.d_kv, iter(range(10**6))

    def normal(shape, scale):
        return jax.random.normal(jax.random.fold_in(rng, next(count)), shape) * scale

    d, f = config.d_model, config.d_ff

    def block(i):
        attention = {
            "q": {"kernel": normal((d, inner), (d * config.d_kv) ** -0.5)},
            "k": {"kernel": normal((d, inner), d**-0.5)},
            "v": {"kernel": normal((d, inner), d**-0.5)},
            "o": {"kernel": normal((inner, d), inner**-0.5)},
        }
        if i == 0:
            attention["relative_attention_bias"] = {
                "embedding": normal((config.num_buckets, config.num_heads), d**-0.5)
            }
        names = ("wi_0", "wi_1") if config.gated else ("wi",)
        mlp = {name: {"kernel": normal((d, f), d**-0.5)} for name in names} | {
            "wo": {"kernel": normal((f, d), f**-0.5)}
        }
        norm = {"weight": jnp.ones(d)}
        return {
            "layer": {
                "0": {"SelfAttention": attention, "layer_norm": norm},
                "1": {"DenseReluDense": mlp, "layer_norm": norm},
            }
        }

    return {
        "shared": {"embedding": normal((config.vocab_size, d), 1.0)},
        "encoder": {
            "block": {str(i): block(i) for i in range(config.num_layers)},
            "final_layer_norm": {"weight": jnp.ones(d)},
        },
    }


class T5Encoder(nn.Module):
    """Linen holder of the parameter tree: params/{shared, encoder}; computed in `dtype`, kept in `param_dtype`.

    (B, L) ids and mask to (B, L, d_model), see `encode`.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        def init(rng, part):
            return jax.tree.map(lambda x: x.astype(self.param_dtype), init_params(self.config, rng)[part])

        parts = {name: self.param(name, init, name) for name in ("shared", "encoder")}
        return encode(parts, self.config, input_ids, attention_mask, self.dtype)
