"""Who attends to whom: the block-causal rule as one static mask, and masked dot-product attention."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


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
    section = np.array([layouts[i].timestep for i in owner])
    if legacy:
        shifted = np.concatenate([owner[:1], owner[:-1]])
        owner = np.where(np.concatenate([[True], section[1:] != section[:-1]]), owner, shifted)
    allowed = rule[np.ix_(owner, owner)]
    return allowed & (section[None, :] <= section[:, None])


def attend(
    q_bqhd: jax.Array,
    k_bkhd: jax.Array,
    v_bkhd: jax.Array,
    mask_bqk: jax.Array | None,
    *,
    uniform_when_masked: bool = False,
    weights_fn=None,
) -> jax.Array:
    """Softmax attention in float32, scaled by 1/sqrt(d).

    Args:
      mask_bqk: True where a key may be attended; None allows all. The batch dimension may be 1.
      uniform_when_masked: a query without any valid key gives the mean of all values (as upstream), not zero.
      weights_fn: applied to the (B, h, q, k) weights, for dropout.
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", q_bqhd, k_bkhd).astype(jnp.float32) * q_bqhd.shape[-1] ** -0.5
    if mask_bqk is not None:
        mask = mask_bqk[:, None]
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if mask_bqk is not None and not uniform_when_masked:
        weights = jnp.where(mask, weights, 0.0)
    if weights_fn is not None:
        weights = weights_fn(weights)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v_bkhd.dtype), v_bkhd)
