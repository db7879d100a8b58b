"""Token groups: the currency of the model. A group is a named run of tokens that share one attention rule."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TokenGroup:
    """Tokens with their validity.

    Attributes:
      tokens: (B, n, D) for a task group, (B, W, n, D) for a timestep group.
      mask: tokens.shape[:-1] bool; False tokens are never attended to.
    """

    tokens: jax.Array
    mask: jax.Array

    @classmethod
    def concatenate(cls, groups: Sequence["TokenGroup"]) -> "TokenGroup":
        """Joins groups along the token axis."""
        return cls(
            jnp.concatenate([g.tokens for g in groups], axis=-2), jnp.concatenate([g.mask for g in groups], axis=-1)
        )


def present(group: TokenGroup, *, compat: bool = False) -> TokenGroup:
    """The group as one part hands it to the next: zeros in place of tokens that are not valid.

    Attention gives such a token the weight zero, but zero times NaN is NaN, forwards and in the gradient of every
    matrix that multiplies it. So whatever a part computes where it says that nothing is, it ends here, and no gradient
    goes back to it.

    Args:
      compat: the releases' masked tokens keep their values, which are part of the reference; only NaN and infinity go.
    """
    keep = group.mask[..., None]
    if compat:
        keep = keep | jnp.isfinite(group.tokens)
    return TokenGroup(jnp.where(keep, group.tokens, 0), group.mask)


def masked_mean(group: TokenGroup) -> jax.Array:
    """Mean over the valid tokens: (..., n, D) to (..., D); zero where no token is valid."""
    weight = group.mask[..., None].astype(group.tokens.dtype)
    # Padded tokens are selected away, not multiplied: nothing of them may leak, not even an infinity.
    total = jnp.sum(jnp.where(group.mask[..., None], group.tokens, 0), axis=-2)
    return total / jnp.maximum(jnp.sum(weight, axis=-2), 1)


def valid_mask(tree: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> jax.Array:
    """pad_mask_dict[key], or all True where the tree does not say: `shape` bool, (B,) of a task, (B, W) else."""
    mask = tree.get("pad_mask_dict", {}).get(key)
    return jnp.ones(shape, bool) if mask is None else jnp.asarray(mask, bool)
