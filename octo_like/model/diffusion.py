"""Denoising diffusion: schedule, forward process, network, and the DDPM and DDIM samplers.

x, noise and velocities are arrays of one shape, whatever it is; times are integers that broadcast against them.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octo_like.model.guidance import Pull
from octo_like.model.resized import Size, entries
from octo_like.model.transformer import dropout, fold_in_all


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """beta_t, alpha_t = 1 - beta_t and alpha_hat_t = prod alpha, t = 0..T-1 (Ho et al. 2020), each (T,) float32."""

    betas: jax.Array
    alphas: jax.Array
    alpha_hats: jax.Array

    @property
    def num_steps(self) -> int:
        return self.betas.shape[0]


def cosine_schedule(num_steps: int, s: float = 0.008) -> NoiseSchedule:
    """The cosine schedule (Nichol & Dhariwal 2021, eq. 17), betas clipped to [0, 0.999]."""
    t = jnp.arange(num_steps + 1, dtype=jnp.float32) / num_steps
    f = jnp.cos((t + s) / (1 + s) * jnp.pi * 0.5) ** 2
    f = f / f[0]
    betas = jnp.clip(1 - f[1:] / f[:-1], 0, 0.999)
    alphas = 1 - betas
    return NoiseSchedule(betas, alphas, jnp.cumprod(alphas))


def add_noise(schedule: NoiseSchedule, x: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
    """q(x_t | x_0): sqrt(alpha_hat_t) x + sqrt(1 - alpha_hat_t) noise; `time` broadcasts against x."""
    level = schedule.alpha_hats[time]
    return jnp.sqrt(level) * x + jnp.sqrt(1 - level) * noise


def velocity(schedule: NoiseSchedule, x: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
    """sqrt(alpha_hat_t) noise - sqrt(1 - alpha_hat_t) x (Salimans & Ho 2022, appendix D)."""
    level = schedule.alpha_hats[time]
    return jnp.sqrt(level) * noise - jnp.sqrt(1 - level) * x


def noise_from_velocity(schedule: NoiseSchedule, x_t: jax.Array, v: jax.Array, time: jax.Array) -> jax.Array:
    """The noise that `add_noise` put into x_t, given its velocity."""
    level = schedule.alpha_hats[time]
    return jnp.sqrt(level) * v + jnp.sqrt(1 - level) * x_t


def noise_from_action(schedule: NoiseSchedule, x_t: jax.Array, x0: jax.Array, time: jax.Array) -> jax.Array:
    """The noise that `add_noise` put into x_t, given what it was put into."""
    level = schedule.alpha_hats[time]
    return (x_t - jnp.sqrt(level) * x0) / jnp.sqrt(1 - level)


def action_from_noise(schedule: NoiseSchedule, x_t: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
    """What `add_noise` put the noise into to get x_t: the estimate of x_0."""
    level = schedule.alpha_hats[time]
    return (x_t - jnp.sqrt(1 - level) * noise) / jnp.sqrt(level)


def ddpm_step(schedule: NoiseSchedule, x: jax.Array, eps: jax.Array, z: jax.Array, t: jax.Array) -> jax.Array:
    """One ancestral step x_t to x_{t-1} (Ho et al. 2020, algorithm 2, sigma_t^2 = beta_t); no noise at t = 0."""
    alpha, alpha_hat = schedule.alphas[t], schedule.alpha_hats[t]
    mean = (x - (1 - alpha) / jnp.sqrt(1 - alpha_hat) * eps) / jnp.sqrt(alpha)
    return mean + jnp.where(t > 0, jnp.sqrt(schedule.betas[t]), 0.0) * z


def ddpm_sample(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: NoiseSchedule,
    initial_noise: jax.Array,
    step_noise: jax.Array,
    *,
    max_action: float,
    clip: str = "sample",
    valid: jax.Array | None = None,
    pull: Pull | None = None,
) -> jax.Array:
    """Runs the whole reverse chain.

    Args:
      denoise: (x, t) to predicted noise; t is a scalar int32.
      initial_noise: x_T, any shape.
      step_noise: (T, *x.shape) standard normal, in the order t = T-1 ... 0.
      max_action: the bound of clipping.
      clip: "sample" clips x after every step, as the Octo releases do. That cuts off the tails of the noise itself
        where it is large. "x0" clips the estimate of the action that each step is made from, and the result with it.
      valid: broadcastable bool; entries that are False are padding: they carry noise of the current level, as they did
        in training.
      pull: what the estimate of the action is pulled towards at every step, see `octo_like.model.guidance`.
    """
    _check_clip(clip)

    def step(x, inputs):
        t, z = inputs
        if pull is None:
            eps = denoise(x, t)
        else:
            eps = noise_from_action(schedule, x, _pulled(denoise, schedule, x, t, pull), t)
        if clip == "x0":
            x0 = jnp.clip(action_from_noise(schedule, x, eps, t), -max_action, max_action)
            eps = noise_from_action(schedule, x, x0, t)
        x = ddpm_step(schedule, x, eps, z, t)
        if clip == "sample":
            x = jnp.clip(x, -max_action, max_action)
        if valid is not None:
            x = jnp.where(valid, x, jnp.sqrt(1 - schedule.alpha_hats[t]) * z)
        return x, None

    times = jnp.arange(schedule.num_steps - 1, -1, -1, dtype=jnp.int32)
    x = jax.lax.scan(step, initial_noise, (times, step_noise))[0]
    return (
        jnp.clip(x, -max_action, max_action) if clip == "x0" else x
    )  # an estimate recovered from its noise is rounded


def ddim_times(num_train_steps: int, num_steps: int) -> np.ndarray:
    """(num_steps + 1,) int32 times from T-1 down to -1 (clean), as evenly spaced as integers can be."""
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(f"sampling in {num_steps} steps, but the schedule has {num_train_steps}: valid are 1 to that")
    return np.floor(np.linspace(num_train_steps - 1, -1, num_steps + 1) + 0.5).astype(np.int32)


def ddim_sample(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: NoiseSchedule,
    initial_noise: jax.Array,
    step_noise: jax.Array | None = None,
    *,
    num_steps: int,
    eta: float = 0.0,
    max_action: float,
    clip: str = "x0",
    min_signal: float = 0.0,
    valid: jax.Array | None = None,
    pull: Pull | None = None,
) -> jax.Array:
    """Denoising diffusion implicit model (Song et al. 2021, equations 12 and 16) in `num_steps` of the schedule's T.

    x_s = sqrt(alpha_hat_s) x0 + sqrt(1 - alpha_hat_s - sigma^2) eps + sigma z for the next earlier time s, with
    sigma = eta sqrt((1 - alpha_hat_s) / (1 - alpha_hat_t)) sqrt(1 - alpha_hat_t / alpha_hat_s).

    At the noisiest times x0 = (x - sqrt(1 - alpha_hat) eps) / sqrt(alpha_hat) magnifies an error of eps by
    1 / sqrt(alpha_hat), which is 406 at the end of the cosine schedule of 20 steps (`cosine_schedule` keeps 1 - beta at
    0.001 there), and the first of few steps leads straight to where modes part. There the best x0 hardly depends on x:
    it is the mean of the actions. So the network is asked for it at a time that it can answer, see `min_signal`.

    Args:
      step_noise: (num_steps, *x.shape) standard normal; not needed at eta = 0.
      eta: 0 is deterministic given the initial noise; 1 has the posterior's variance (Ho et al. 2020, equation 7).
      clip: "x0": clip the estimate of the action to [-max_action, max_action]; "sample": clip x after every step.
      min_signal: x0 is asked for at no later time than the last whose sqrt(alpha_hat) is at least this, as if x were of
        that time; 0 asks at the time of x, as the paper.

    The others are those of `ddpm_sample`. Padding carries the level's share of the initial noise.
    """
    _check_clip(clip)
    if eta and step_noise is None:
        raise ValueError(f"DDIM with eta={eta} draws noise at every step; give step_noise")
    times = ddim_times(schedule.num_steps, num_steps)
    levels = jnp.append(schedule.alpha_hats, 1.0)  # index -1 is the clean end
    latest = jnp.maximum(jnp.sum(jnp.sqrt(schedule.alpha_hats) >= min_signal) - 1, 0)

    def step(x, inputs):
        t, s, z = inputs
        level, target = levels[t], levels[s]
        at = jnp.minimum(t, latest)
        x0 = (
            action_from_noise(schedule, x, denoise(x, at), at)
            if pull is None
            else _pulled(denoise, schedule, x, at, pull)
        )
        if clip == "x0":
            x0 = jnp.clip(x0, -max_action, max_action)
        eps = noise_from_action(schedule, x, x0, t)
        # The variance is at most that of the target's noise; rounding may not make the rest negative.
        variance = eta**2 * (1 - target) / (1 - level) * (1 - level / target)
        x = jnp.sqrt(target) * x0 + jnp.sqrt(jnp.maximum(1 - target - variance, 0.0)) * eps
        if z is not None:
            x = x + jnp.sqrt(variance) * z
        if clip == "sample":
            x = jnp.clip(x, -max_action, max_action)
        if valid is not None:
            x = jnp.where(valid, x, jnp.sqrt(1 - target) * initial_noise)
        return x, None

    # The last step ends on x0 itself: what is returned is within the bounds, whichever way of clipping.
    return jax.lax.scan(step, initial_noise, (times[:-1], times[1:], step_noise if eta else None))[0]


def _pulled(denoise, schedule: NoiseSchedule, x: jax.Array, t: jax.Array, pull: Pull) -> jax.Array:
    """The guided estimate of x_0 from x_t."""
    level = schedule.alpha_hats[t]
    estimate = lambda x: action_from_noise(schedule, x, denoise(x, t), t)  # noqa: E731
    return pull.fix(pull.clean(estimate, x, jnp.sqrt(level), jnp.sqrt(1 - level)))


def _check_clip(clip: str) -> None:
    if clip not in ("sample", "x0"):
        raise ValueError(f"unknown clip {clip!r}; valid: 'sample', 'x0'")


class FourierFeatures(nn.Module):
    """[cos 2 pi t w, sin 2 pi t w] with learned frequencies w (size/2, 1): (..., 1) to (..., size)."""

    size: int

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(0.2), (self.size // 2, t.shape[-1]))
        phase = 2 * jnp.pi * t.astype(jnp.float32) @ kernel.T
        return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


class _CondEncoder(nn.Module):
    dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        xavier = nn.initializers.xavier_uniform()
        x = jax.nn.swish(nn.Dense(2 * self.dim, kernel_init=xavier, dtype=self.dtype, name="Dense_0")(x))
        return nn.Dense(self.dim, kernel_init=xavier, dtype=self.dtype, name="Dense_1")(x)


class _ResNetBlock(nn.Module):
    hidden_dim: int
    use_layer_norm: bool
    dropout_rate: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, dropout_fn):
        h = dropout_fn(x)
        if self.use_layer_norm:
            h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="LayerNorm_0")(h)
        h = jax.nn.swish(nn.Dense(4 * self.hidden_dim, dtype=self.dtype, name="Dense_0")(h))
        return x + nn.Dense(self.hidden_dim, dtype=self.dtype, name="Dense_1")(h)


class _ReverseNetwork(nn.Module):
    out_dim: int
    num_blocks: int
    hidden_dim: int
    use_layer_norm: bool
    dropout_rate: float
    with_given: bool
    sizes: tuple[Size, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, given, dropout_keys):
        xavier = nn.initializers.xavier_uniform()
        batch_first = lambda i: lambda h: _dropout_b(h, self.dropout_rate, fold_in_all(dropout_keys, i))  # noqa: E731
        chunk, steps = entries(self.sizes), entries(tuple((horizon, 1) for horizon, _ in self.sizes))
        inputs = None if chunk is None else chunk.product_in(x.shape[-1] - self.out_dim)
        x = nn.Dense(self.hidden_dim, kernel_init=xavier, dtype=self.dtype, dot_general=inputs, name="Dense_0")(x)
        if self.with_given and given is not None:
            # Rows of Dense_0's kernel that are zero at first and kept apart: a network without them loads unchanged.
            zeros, inputs = nn.initializers.zeros_init(), None if steps is None else steps.product_in(0)
            x = x + nn.Dense(
                self.hidden_dim, use_bias=False, kernel_init=zeros, dtype=self.dtype, dot_general=inputs, name="given"
            )(given)
        for i in range(self.num_blocks):
            block = _ResNetBlock(
                self.hidden_dim, self.use_layer_norm, self.dropout_rate, self.dtype, name=f"MLPResNetBlock_{i}"
            )
            x = block(x, batch_first(i))
        outputs = None if chunk is None else chunk.product_out
        return nn.Dense(self.out_dim, kernel_init=xavier, dtype=self.dtype, dot_general=outputs, name="Dense_1")(
            jax.nn.swish(x)
        )


def _dropout_b(x_nbwf, rate, keys_b):
    """Dropout of (n, B, W, F) with a key per row of B."""
    if keys_b is None or rate == 0.0:
        return x_nbwf
    return jnp.moveaxis(dropout(jnp.moveaxis(x_nbwf, 1, 0), rate, keys_b), 0, 1)


class ScoreNetwork(nn.Module):
    """eps(embedding, x, t): an MLP residual network conditioned by concatenation (IDQL, Hansen-Estruch et al. 2023).

    Attributes:
      out_dim: H * A.
      with_given: whether it has learned to continue a chunk.
      sizes: (H, A) that the chunk has had, the last is the present one; (): it has always had the same. See
        `octo_like.model.resized`.
    """

    out_dim: int
    time_dim: int = 32
    num_blocks: int = 3
    hidden_dim: int = 256
    use_layer_norm: bool = True
    dropout_rate: float = 0.0
    with_given: bool = False
    sizes: tuple[Size, ...] = ()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        embedding: jax.Array,
        x: jax.Array,
        time: jax.Array,
        dropout_keys: jax.Array | None = None,
        given: jax.Array | None = None,
    ) -> jax.Array:
        """embedding (..., D), x `(..., H*A)`, time (..., 1) to the predicted noise `(..., H*A)`, float32.

        `given` (..., H), of a network `with_given`: 1 for steps whose entries of x are clean actions; None: no step.
        """
        c = FourierFeatures(self.time_dim, name="time_preprocess")(time)
        c = _CondEncoder(self.time_dim, self.dtype, name="cond_encoder")(c)
        lead = jnp.broadcast_shapes(c.shape[:-1], embedding.shape[:-1], x.shape[:-1])
        inputs = [jnp.broadcast_to(part, (*lead, part.shape[-1])).astype(self.dtype) for part in (c, embedding, x)]
        network = _ReverseNetwork(
            self.out_dim,
            self.num_blocks,
            self.hidden_dim,
            self.use_layer_norm,
            self.dropout_rate,
            self.with_given,
            self.sizes,
            self.dtype,
            name="reverse_network",
        )
        if given is not None:
            given = jnp.broadcast_to(given, (*lead, given.shape[-1])).astype(self.dtype)
        return network(jnp.concatenate(inputs, axis=-1), given, dropout_keys).astype(jnp.float32)
