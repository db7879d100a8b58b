"""Flow matching: the straight path from noise to actions, when to look at it, and its integration.

Time tau runs from 0 (noise) to 1 (actions): x_tau = tau a + (1 - tau) noise, so dx/dtau = a - noise (Lipman et al.
2023, with the optimal-transport path and no noise left at the end).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from octo_like.model.guidance import Pull


def time_from_uniform(u: jax.Array, alpha: float, cutoff: float = 0.999) -> jax.Array:
    """Times in [0, cutoff) with (cutoff - tau) / cutoff ~ Beta(alpha, 1), from u uniform in [0, 1).

    alpha > 1 looks more often at noisy times, where there is most to decide; alpha = 1 is uniform. Black et al. 2024
    (pi0, appendix B) use alpha = 1.5 and cutoff 0.999. The distribution function of Beta(alpha, 1) is y^alpha.
    """
    return cutoff * (1 - (1 - u) ** (1 / alpha))


def interpolate(action: jax.Array, noise: jax.Array, tau: jax.Array) -> jax.Array:
    """x_tau; `tau` broadcasts against the action."""
    return tau * action + (1 - tau) * noise


def euler_sample(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    num_steps: int,
    *,
    valid: jax.Array | None = None,
    pull: Pull | None = None,
) -> jax.Array:
    """Integrates dx/dtau = velocity(x, tau) from tau = 0 to 1 in equal steps.

    Args:
      velocity: (x, scalar float32 tau) to an array like x.
      noise: x at tau = 0, any shape.
      valid: broadcastable bool; entries that are False are padding: they stay on the path from their noise to zero, as
        they did in training.
      pull: what the estimate of the action, x + (1 - tau) velocity, is pulled towards, see `octo_like.model.guidance`.
    """
    taus = jnp.arange(num_steps, dtype=jnp.float32) / num_steps

    def step(x, tau):
        x = x + (velocity(x, tau) if pull is None else _pulled(velocity, x, tau, pull)) / num_steps
        if valid is not None:
            x = jnp.where(valid, x, (1 - tau - 1 / num_steps) * noise)
        return x, None

    return jax.lax.scan(step, noise, taus)[0]


def _pulled(velocity, x: jax.Array, tau: jax.Array, pull: Pull) -> jax.Array:
    """The guided velocity. The bound of the weight is on the velocity's correction (Black et al. 2025, equation 2)."""
    left = 1 - tau
    gamma = tau / left + (1 / pull.prior_std) ** 2 * left / jnp.maximum(tau, 1e-6)
    clean = pull.corrected(lambda x: x + left * velocity(x, tau), x, left * jnp.minimum(gamma, pull.max_weight))
    return (pull.fix(clean) - x) / left
