"""Real-time chunking: a chunk of actions drawn so that it goes on where the one being executed is.

While the policy computes, the robot executes the chunk it has. The first actions of the new chunk will have been
executed by then, and the ones behind them should not contradict what is on its way: the sampler is pulled towards the
previous chunk, step by step of the chunk, with weights between 1 (it is so) and 0 (free); Black et al. 2025, "Real-time
execution of action chunking flow policies". With x the noisy chunk, f(x) the estimate of the clean one that the network
makes of it, y the previous chunk and W the weights, the estimate is replaced by

    jacobian_free   f + W (y - f)
    vjp             f + gamma J^T W (y - f),   J = df/dx

and the sampler goes on from there. J^T is the paper's; gamma J = 1 for actions that are standard normal, which is what
"jacobian_free" assumes, without differentiating the network. For x = alpha action + sigma noise the paper's weight is
gamma = sigma^2 / (alpha r^2), r^2 = sigma^2 s^2 / (alpha^2 s^2 + sigma^2), with s the standard deviation of the actions
before the policy has seen anything (1 in the paper); it is limited by `max_weight`.

An action of weight 1 is fixed. The paper's correction only approaches it, as gamma is bounded and J^T W (y - f) is not
y - f; there it does not matter, since these actions of the new chunk are never executed. Here the estimate at them is y
itself, with either method: x follows the path from its noise to y, which is what the network has learned to read before
y, and the free actions continue what is executed. The chunk that a head returns has the previous actions there,
unchanged.

"trained" is for networks that have learned it (`max_delay` of the head): the first actions are given to the network as
they are, with a mask, instead of pulling (arXiv 2512.05964).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from octo_like.common.chunks import METHODS


@struct.dataclass
class Guidance:
    """What a sampled chunk has to continue. All but `method` may change without another compilation.

    Attributes:
      previous: (B, H, A) actions in the model's numbers; step i of the new chunk is step i here.
      weights: (B, H) in [0, 1], 1: the action is fixed; for "trained" 1 where the action is given and 0 elsewhere.
      max_weight: bound of gamma.
      prior_std: s of the formula above.
      method: of `METHODS`.
    """

    previous: jax.Array
    weights: jax.Array
    max_weight: jax.Array | float = 5.0
    prior_std: jax.Array | float = 1.0
    method: str = struct.field(pytree_node=False, default="jacobian_free")

    @property
    def is_fixed(self) -> jax.Array:
        """(B, H) bool: actions that the new chunk has as they are."""
        return _is_fixed(jnp.asarray(self.weights), self.method)

    def fix(self, chunk: jax.Array, valid: jax.Array | None) -> jax.Array:
        """A drawn chunk (..., B, H, A) with the previous actions, also those beyond the model's bounds, where they are
        fixed. Padded dimensions, where `valid` (B, H * A) is False, are left alone."""
        fixed = self.is_fixed[..., None]
        if valid is not None:
            fixed = fixed & valid.reshape(self.previous.shape)
        return jnp.where(fixed, self.previous, chunk)


def _is_fixed(weight: jax.Array, method: str) -> jax.Array:
    return weight > 0.5 if method == "trained" else weight >= 1


@struct.dataclass
class Pull:
    """A guidance of flat chunks, as samplers take it: `target` and `weight` broadcast against x (..., H*A)."""

    target: jax.Array
    weight: jax.Array
    max_weight: jax.Array | float = 5.0
    prior_std: jax.Array | float = 1.0
    method: str = struct.field(pytree_node=False, default="jacobian_free")

    def clean(self, estimate: Callable[[jax.Array], jax.Array], x: jax.Array, alpha: Any, sigma: Any) -> jax.Array:
        """The guided estimate of the clean chunk at x = alpha action + sigma noise."""
        gamma = alpha + (sigma / self.prior_std) ** 2 / alpha
        return self.corrected(estimate, x, jnp.minimum(gamma, self.max_weight))

    def corrected(self, estimate: Callable[[jax.Array], jax.Array], x: jax.Array, gamma: Any) -> jax.Array:
        """`estimate` of x, corrected; "vjp" scales the correction by `gamma`."""
        if self.method == "jacobian_free":
            found = estimate(x)
            return found + self.weight * (self.target - found)
        found, transposed = jax.vjp(estimate, x)
        return found + gamma * transposed(self.weight * (self.target - found))[0]

    def fix(self, x: jax.Array) -> jax.Array:
        """x (..., H*A) with the target itself where it is fixed."""
        return jnp.where(_is_fixed(self.weight, self.method), self.target, x)


def flat_pull(guidance: Guidance, max_action: float, valid: jax.Array | None) -> Pull:
    """A `Guidance` for chunks laid flat, (B, H*A); nothing pulls on padded dimensions.

    Args:
      max_action: bound of the model's actions.
      valid: (B, H*A) bool or None.

    Raises:
      ValueError: an unknown method.
    """
    if guidance.method not in METHODS:
        raise ValueError(f"unknown guidance {guidance.method!r}; valid: {', '.join(METHODS)}")
    b, h, a = guidance.previous.shape
    target = jnp.clip(guidance.previous, -max_action, max_action).reshape(b, h * a)
    weight = jnp.broadcast_to(guidance.weights[..., None], (b, h, a)).reshape(b, h * a)
    if valid is not None:
        target = jnp.where(valid, target, 0.0)
        # A given padded dimension is 0, as in training; it pulls on nothing otherwise.
        weight = weight if guidance.method == "trained" else jnp.where(valid, weight, 0.0)
    return Pull(target, weight, guidance.max_weight, guidance.prior_std, guidance.method)
