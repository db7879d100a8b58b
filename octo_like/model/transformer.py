"""Pre-LN transformer blocks. Parameter names follow the Octo releases, so that importing them is a path operation.

Training randomness is keyed per sample: `dropout_keys` is an array of B keys (None switches dropout off), so that a
sample is dropped alike whichever device or micro-batch it lands on.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octo_like.model.attention import BlockMask, attend, is_recording
from octo_like.model.special import traced_once

LN_EPSILON = 1e-6


def fold_in_all(keys_b: jax.Array | None, data: int) -> jax.Array | None:
    """`jax.random.fold_in` over a batch of keys; None stays None."""
    return None if keys_b is None else jax.vmap(jax.random.fold_in, (0, None))(keys_b, data)


def dropout(x: jax.Array, rate: float, keys_b: jax.Array | None) -> jax.Array:
    """Inverted dropout of x (B, ...) with one key per row."""
    if keys_b is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys_b)
    return jnp.where(keep, x / (1.0 - rate), 0)


class MultiHeadAttention(nn.Module):
    """Multi-head attention with biases: queries from x, keys and values from the context, or from x too.

    `qk_norm`: root-mean-square norms of queries and keys per head (Dehghani et al. 2023), which bound the logits."""

    num_heads: int
    dropout_rate: float = 0.0
    uniform_when_masked: bool = False
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x_bnd: jax.Array,
        mask_bnm: jax.Array | BlockMask | None,
        *,
        context_bmd: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        dim, heads = x_bnd.shape[-1], self.num_heads
        if dim % heads:
            raise ValueError(f"token width {dim} is not divisible by {heads} attention heads")
        head_dim = dim // heads
        xavier = nn.initializers.xavier_uniform

        def projection(name, in_dim):
            holder = _Projection(
                (in_dim, heads, head_dim), (heads, head_dim), xavier(in_axis=0, out_axis=(1, 2)), name=name
            )
            kernel, bias = holder()
            return kernel.reshape(in_dim, dim).astype(self.dtype), bias.reshape(dim).astype(self.dtype)

        context_bmd = x_bnd if context_bmd is None else context_bmd
        q, k, v = (
            tokens.astype(self.dtype) @ kernel + bias
            for tokens, (kernel, bias) in (
                (x_bnd, projection("query", dim)),
                (context_bmd, projection("key", context_bmd.shape[-1])),
                (context_bmd, projection("value", context_bmd.shape[-1])),
            )
        )
        q, k, v = (t.reshape(*t.shape[:-1], heads, head_dim) for t in (q, k, v))
        if self.qk_norm:
            norm = lambda name: nn.RMSNorm(epsilon=LN_EPSILON, dtype=self.dtype, name=name)  # noqa: E731
            q, k = norm("query_norm")(q), norm("key_norm")(k)
        drops = dropout_keys is not None and self.dropout_rate > 0
        out_bnhd = attend(
            q,
            k,
            v,
            mask_bnm,
            uniform_when_masked=self.uniform_when_masked,
            weights_fn=(lambda w: dropout(w, self.dropout_rate, dropout_keys)) if drops else None,
            implementation=self.attention,
        )
        kernel, bias = _Projection((heads, head_dim, dim), (dim,), xavier(in_axis=(0, 1), out_axis=2), name="out")()
        return out_bnhd.reshape(*x_bnd.shape[:-1], dim) @ kernel.reshape(dim, dim).astype(self.dtype) + bias.astype(
            self.dtype
        )


class _Projection(nn.Module):
    """Holds a kernel and a bias under one name."""

    kernel_shape: tuple[int, ...]
    bias_shape: tuple[int, ...]
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self):
        return (
            self.param("kernel", self.kernel_init, self.kernel_shape),
            self.param("bias", nn.initializers.zeros_init(), self.bias_shape),
        )


class Mlp(nn.Module):
    """Dense, GELU (tanh form), Dense: (B, ..., D) to the same shape."""

    hidden_dim: int
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        dense = lambda width, name: nn.Dense(  # noqa: E731
            width,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
            name=name,
        )
        h = dropout(jax.nn.gelu(dense(self.hidden_dim, "Dense_0")(x)), self.dropout_rate, fold_in_all(dropout_keys, 0))
        return dropout(dense(x.shape[-1], "Dense_1")(h), self.dropout_rate, fold_in_all(dropout_keys, 1))


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)).

    With `rows` (start, count) only for these tokens; `mask` then has as many queries."""

    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    uniform_when_masked: bool = False
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x_bnd: jax.Array,
        mask_bnn: jax.Array | BlockMask,
        dropout_keys: jax.Array | None = None,
        rows: tuple[int, int] | None = None,
    ) -> jax.Array:
        norm = lambda i: nn.LayerNorm(epsilon=LN_EPSILON, dtype=self.dtype, name=f"LayerNorm_{i}")  # noqa: E731
        h = norm(0)(x_bnd)
        context = None
        if rows is not None:
            context, (h, x_bnd) = h, (jax.lax.slice_in_dim(x, rows[0], sum(rows), axis=1) for x in (h, x_bnd))
        h = MultiHeadAttention(
            self.num_heads,
            self.attention_dropout_rate,
            self.uniform_when_masked,
            self.dtype,
            self.attention,
            self.qk_norm,
            name="MultiHeadDotProductAttention_0",
        )(h, mask_bnn, context_bmd=context, dropout_keys=fold_in_all(dropout_keys, 0))
        x_bnd = x_bnd + dropout(h, self.dropout_rate, fold_in_all(dropout_keys, 1))
        h = Mlp(self.mlp_dim, self.dropout_rate, self.dtype, name="MlpBlock_0")(
            norm(1)(x_bnd), fold_in_all(dropout_keys, 2)
        )
        return x_bnd + h


@traced_once(static_argnames=("block", "remat", "rows"))
def _shared_block(params, x_bnd, mask_bnn, dropout_keys, *, block: Block, remat: str, rows=None) -> jax.Array:
    """One block with its own parameters. Layers differ in nothing else, so that the program of the first is traced,
    differentiated and lowered, and the others call it."""
    return _block(params, x_bnd, mask_bnn, dropout_keys, block=block, remat=remat, rows=rows)


def _block(params, x_bnd, mask_bnn, dropout_keys, *, block: Block, remat: str, rows=None) -> jax.Array:
    def apply(params, x_bnd, mask_bnn, dropout_keys):
        return block.apply({"params": params}, x_bnd, mask_bnn, dropout_keys, rows)

    if remat == "full":
        apply = jax.checkpoint(apply)
    elif remat == "dots":
        apply = jax.checkpoint(apply, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return apply(params, x_bnd, mask_bnn, dropout_keys)


class Transformer(nn.Module):
    """A stack of blocks and a final layer norm: (B, N, D) to (B, N, D).

    Attributes:
      remat: what the backward pass computes again instead of keeping: "none", "full" (everything within a block: least
        memory, about a third more work) or "dots" (all but the matrix products with parameters). True means "full".
    """

    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    uniform_when_masked: bool = False
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x_bnd: jax.Array,
        mask_bnn: jax.Array | BlockMask,
        dropout_keys: jax.Array | None = None,
        *,
        rows: tuple[int, int] | None = None,
    ) -> jax.Array:
        """With `rows` (start, count) the result is (B, count, D), of these tokens only: the last block then computes
        nothing else, and `mask_bnn` must be a BlockMask."""
        remat = "full" if self.remat is True else self.remat or "none"
        if remat not in ("none", "full", "dots"):
            raise ValueError(f"unknown remat {remat!r}; valid: 'none', 'full', 'dots', or False and True")

        def block(**place):
            return Block(
                self.num_heads,
                self.mlp_dim,
                self.dropout_rate,
                self.attention_dropout_rate,
                self.uniform_when_masked,
                self.dtype,
                self.attention,
                self.qk_norm,
                **place,
            )

        run = _block if is_recording() else _shared_block  # what a jitted function computes cannot be looked at
        for i in range(self.num_layers):
            name, keys = f"encoderblock_{i}", fold_in_all(dropout_keys, i)
            only = rows if i == self.num_layers - 1 else None
            mask = mask_bnn
            if only is not None:
                assert isinstance(mask_bnn, BlockMask), "rows are cut from a BlockMask"
                mask = mask_bnn.rows(*only)
            if self.is_initializing():
                x_bnd = block(name=name)(x_bnd, mask, keys, only)
            else:
                params: Any = self.get_variable("params", name)
                x_bnd = run(params, x_bnd, mask, keys, block=block(parent=None), remat=remat, rows=only)
        return nn.LayerNorm(epsilon=LN_EPSILON, dtype=self.dtype, name="encoder_norm")(x_bnd)


class MapPooling(nn.Module):
    """Multi-head attention pooling (Set Transformer, Lee et al. 2019): n learned probes read a set of tokens.

    (..., m, D) tokens with (..., m) mask to (..., n, D). Always eight heads, as in the Octo releases.
    """

    num_probes: int = 1
    uniform_when_masked: bool = False
    dtype: jnp.dtype = jnp.float32
    num_heads: int = 8

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        *lead, m, dim = tokens.shape
        tokens = tokens.reshape(-1, m, dim)
        mask_bnm = (
            None if mask is None else jnp.broadcast_to(mask.reshape(-1, 1, m), (tokens.shape[0], self.num_probes, m))
        )
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, self.num_probes, dim))
        probe = jnp.broadcast_to(probe, (tokens.shape[0], self.num_probes, dim)).astype(self.dtype)
        out = MultiHeadAttention(
            self.num_heads,
            uniform_when_masked=self.uniform_when_masked,
            dtype=self.dtype,
            name="MultiHeadDotProductAttention_0",
        )(probe, mask_bnm, context_bmd=tokens)
        h = nn.LayerNorm(epsilon=LN_EPSILON, dtype=self.dtype, name="LayerNorm_0")(out)
        out = out + Mlp(4 * dim, dtype=self.dtype, name="MlpBlock_0")(h)
        return out.reshape(*lead, self.num_probes, dim)
