"""Who attends to whom: the block-causal rule as one static mask, and masked dot-product attention."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from octo_like.model.special import MASKED, cpu_attention, drop_empty


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """One group of the token sequence.

    Attributes:
      name: e.g. "task_language", "obs_primary", "readout_action".
      role: "task" (prefix), "obs" (observations and repeated task tokens) or "readout".
      size: number of tokens.
      timestep: position in the window, -1 for the prefix.
    """

    name: str
    role: Literal["task", "obs", "readout"]
    size: int
    timestep: int


def may_attend(query: GroupLayout, key: GroupLayout) -> bool:
    """The rule of Octo (2024), section III: readouts read without writing, nothing looks into the future.

    Task tokens see the task; observations see the task and observations; a readout sees both and itself.
    """
    if key.timestep > query.timestep:
        return False
    if key.role == "task":
        return True
    if key.role == "obs":
        return query.role in ("obs", "readout")
    return query.role == "readout" and query.name == key.name


def block_mask(layouts: Sequence[GroupLayout], *, legacy: bool = False) -> np.ndarray:
    """The rule expanded to tokens: (N, N) bool, row = query, column = key.

    Args:
      layouts: groups in sequence order.
      legacy: reproduce the first Octo releases, where (within the prefix and within each timestep) a token is looked up
        one place too early, so that the first token of a group follows the rule of the group before it.
    """
    rule = np.array([[may_attend(query, key) for key in layouts] for query in layouts])
    owner = np.repeat(np.arange(len(layouts)), [layout.size for layout in layouts])
    section = np.array([layout.timestep for layout in layouts])[owner]
    if legacy:
        shifted = np.concatenate([owner[:1], owner[:-1]])
        owner = np.where(np.concatenate([[True], section[1:] != section[:-1]]), owner, shifted)
    allowed = rule[np.ix_(owner, owner)]
    return allowed & (section[None, :] <= section[:, None])


class StaticRule:
    """A (n, N) bool rule that is known when the program is traced; hashable, so that it can be part of a structure."""

    def __init__(self, allowed: np.ndarray):
        self.allowed = np.asarray(allowed, bool)
        self._key = (self.allowed.shape, self.allowed.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticRule) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@flax.struct.dataclass
class BlockMask:
    """What may be attended: the static rule, and which tokens are valid.

    Attributes:
      rule: (n, N), row = query: all N tokens, or the n from `start` on.
      valid_bn: (B, N) bool; tokens that are False are attended by none.
      start: the token that the first query is.
    """

    rule: StaticRule = flax.struct.field(pytree_node=False)
    valid_bn: jax.Array
    start: int = flax.struct.field(pytree_node=False, default=0)

    def dense(self) -> jax.Array:
        """(B, n, N) bool."""
        return jnp.bitwise_and(self.rule.allowed[None], self.valid_bn[:, None, :])

    def rows(self, start: int, count: int) -> "BlockMask":
        """The same for `count` queries from `start` on."""
        return BlockMask(StaticRule(self.rule.allowed[start : start + count]), self.valid_bn, self.start + start)


def attend(
    q_bqhd: jax.Array,
    k_bkhd: jax.Array,
    v_bkhd: jax.Array,
    mask: "jax.Array | BlockMask | None",
    *,
    uniform_when_masked: bool = False,
    weights_fn: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Softmax attention in float32, scaled by 1/sqrt(d).

    Args:
      q_bqhd, k_bkhd, v_bkhd: queries (B, q, h, d), keys and values (B, k, h, d); the result is (B, q, h, d).
      mask: (B or 1, q, k) True where a key may be attended, or the same as a BlockMask; None allows all.
      uniform_when_masked: a query without any valid key gives the mean of all values (as upstream), not zero.
      weights_fn: applied to the (B, h, q, k) weights, for dropout; only "xla" can.
      implementation: "xla" (any device), "cudnn" (NVIDIA, 16 bit) or "splash" (TPU). The fused ones never write the
        weights to memory; what they give for a token that is not valid itself is not specified, and nobody reads it.

    Raises:
      ValueError: the implementation is unknown, or cannot do what is asked.
    """
    if implementation not in ("xla", "cudnn", "splash"):
        raise ValueError(f"unknown attention {implementation!r}; valid: 'xla', 'cudnn', 'splash'")
    if implementation != "xla" and (weights_fn is not None or uniform_when_masked):
        what = "octo_compat" if uniform_when_masked else "attention dropout"
        raise ValueError(f"attention {implementation!r} cannot do {what}; use 'xla'")
    if implementation == "splash":
        return _splash(q_bqhd, k_bkhd, v_bkhd, mask)
    dense = mask.dense() if isinstance(mask, BlockMask) else mask
    if _recording is not None:
        _recording.append(_weights(q_bqhd, k_bkhd, dense, uniform_when_masked))
    if dense is None:
        dense = jnp.ones((1, q_bqhd.shape[1], k_bkhd.shape[1]), bool)
    if implementation == "cudnn":
        return _cudnn(q_bqhd, k_bkhd, v_bkhd, dense)
    if weights_fn is not None:
        return _plain(q_bqhd, k_bkhd, v_bkhd, dense, uniform_when_masked, weights_fn)
    # Decided when the program is compiled, so that a CPU machine compiles the right one for an accelerator.
    return jax.lax.platform_dependent(
        q_bqhd,
        k_bkhd,
        v_bkhd,
        dense,
        cpu=lambda *args: cpu_attention(uniform_when_masked, *args),
        default=lambda q, k, v, mask: _plain(q, k, v, mask, uniform_when_masked),
    )


def recorded_weights(run: Callable[[], object], *, tokens: int) -> list[jax.Array]:
    """The (B, h, N, N) attention weights of every call with N = `tokens` queries and keys while `run()` runs.

    `run` must not be jitted: the weights are taken out on the way. In order of the calls, so layer by layer.
    """
    global _recording
    _recording = []
    try:
        run()
        return [weights for weights in _recording if weights.shape[-2:] == (tokens, tokens)]
    finally:
        _recording = None


_recording: list[jax.Array] | None = None


def is_recording() -> bool:
    """Whether this runs inside `recorded_weights`: nothing may then be jitted on the way to `attend`."""
    return _recording is not None


def _weights(q, k, mask, uniform):
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, MASKED), axis=-1)
    # Where there is a valid key, the masked ones already have weight 0.
    return weights if uniform else jnp.where(mask.any(-1)[:, None, :, None], weights, 0.0)


def _plain(q, k, v, mask, uniform, weights_fn=None):
    weights = _weights(q, k, mask, uniform)
    if weights_fn is not None:
        weights = weights_fn(weights)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


# -- accelerators ------------------------------------------------------------------------------------------------------


def _cudnn(q, k, v, mask):
    """NVIDIA's fused kernel (Ampere and later): float16 or bfloat16, head_dim a multiple of 8 up to 128."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention 'cudnn' computes in bfloat16 or float16, the model in {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        raise ValueError(f"attention 'cudnn' needs a head_dim that is a multiple of 8 up to 128, got {q.shape[-1]}")
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    return drop_empty(out, mask, False)


SPLASH_BLOCK = 128


def _splash(q, k, v, mask, *, interpret=False):
    """The TPU kernel for sparse masks: blocks that the static rule forbids are not computed at all; which tokens are
    valid at run time goes in as segment ids, valid tokens being one segment and all others another.

    The sequence is padded to whole blocks, head_dim to whole registers of 128.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if not isinstance(mask, BlockMask):
        raise ValueError("attention 'splash' needs a static rule (a BlockMask), got a mask known at run time only")
    b, rows, heads, head_dim = q.shape
    extra, extra_rows, wide = -k.shape[1] % SPLASH_BLOCK, -rows % SPLASH_BLOCK, -head_dim % SPLASH_BLOCK
    pad = lambda x, n: jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, n), (0, wide)))  # noqa: E731
    allowed = np.pad(mask.rule.allowed, ((0, extra_rows), (0, extra)))
    # A row without any key would divide by zero: what is padding sees the first key; nobody reads it.
    allowed[rows:, 0] = True
    splash = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.NumpyMask(allowed)] * heads), head_shards=1, q_seq_shards=1, interpret=interpret
    )
    valid = mask.valid_bn.astype(jnp.int32)
    queries = jax.lax.slice_in_dim(valid, mask.start, mask.start + rows, axis=1)
    ids = kernel.SegmentIds(jnp.pad(queries, ((0, 0), (0, extra_rows))), jnp.pad(valid, ((0, 0), (0, extra))))
    run = _by_rows(lambda q, k, v, ids: jax.vmap(splash)(q, k, v, segment_ids=ids))
    out = run(pad(q * head_dim**-0.5, extra_rows), pad(k, extra), pad(v, extra), ids)
    return out[:, :, :rows, :head_dim].transpose(0, 2, 1, 3).astype(v.dtype)


_split: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("how_kernels_are_split", default=None)


@contextlib.contextmanager
def kernels_split_by(split: Callable[[Callable], Callable] | None) -> Iterator[None]:
    """While this is open, kernels that XLA did not write, and so cannot divide among devices, are traced as
    `split(kernel)`: it lets every device run the kernel on its own rows (the first dimension of all arguments and
    results). The model knows no mesh; its caller does."""
    token = _split.set(split)
    try:
        yield
    finally:
        _split.reset(token)


def _by_rows(kernel):
    split = _split.get()
    return kernel if split is None else split(kernel)
