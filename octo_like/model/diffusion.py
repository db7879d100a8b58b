"""Denoising diffusion: schedule, forward process, network and the DDPM sampler."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from octo_like.model.transformer import dropout, fold_in_all


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """beta_t, alpha_t = 1 - beta_t and alpha_hat_t = prod alpha, t = 0..T-1 (Ho et al. 2020), float32."""

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


def ddpm_step(schedule: NoiseSchedule, x: jax.Array, eps: jax.Array, z: jax.Array, t: jax.Array) -> jax.Array:
    """One ancestral step x_t to x_{t-1} (Ho et al. 2020, algorithm 2, sigma_t^2 = beta_t); no noise at t = 0."""
    alpha, alpha_hat = schedule.alphas[t], schedule.alpha_hats[t]
    mean = (x - (1 - alpha) / jnp.sqrt(1 - alpha_hat) * eps) / jnp.sqrt(alpha)
    return mean + jnp.where(t > 0, jnp.sqrt(schedule.betas[t]), 0.0) * z


def ddpm_sample(
    denoise,
    schedule: NoiseSchedule,
    initial_noise: jax.Array,
    step_noise: jax.Array,
    *,
    max_action: float,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Runs the whole reverse chain.

    Args:
      denoise: (x, t) to predicted noise; t is a scalar int32.
      initial_noise: x_T, any shape.
      step_noise: (T, *x.shape) standard normal, in the order t = T-1 ... 0.
      max_action: x is clipped to [-max_action, max_action] after every step.
      valid: broadcastable bool; entries that are False are padding: they carry noise of the current level, as they did
        in training.
    """

    def step(x, inputs):
        t, z = inputs
        x = ddpm_step(schedule, x, denoise(x, t), z, t)
        x = jnp.clip(x, -max_action, max_action)
        if valid is not None:
            x = jnp.where(valid, x, jnp.sqrt(1 - schedule.alpha_hats[t]) * z)
        return x, None

    times = jnp.arange(schedule.num_steps - 1, -1, -1, dtype=jnp.int32)
    return jax.lax.scan(step, initial_noise, (times, step_noise))[0]


class FourierFeatures(nn.Module):
    """[cos 2 pi t w, sin 2 pi t w] with learned frequencies w (size/2, 1)."""

    size: int

    @nn.compact
    def __call__(self, t):
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
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, dropout_keys):
        xavier = nn.initializers.xavier_uniform()
        batch_first = lambda i: lambda h: _dropout_b(h, self.dropout_rate, fold_in_all(dropout_keys, i))  # noqa: E731
        x = nn.Dense(self.hidden_dim, kernel_init=xavier, dtype=self.dtype, name="Dense_0")(x)
        for i in range(self.num_blocks):
            block = _ResNetBlock(
                self.hidden_dim, self.use_layer_norm, self.dropout_rate, self.dtype, name=f"MLPResNetBlock_{i}"
            )
            x = block(x, batch_first(i))
        return nn.Dense(self.out_dim, kernel_init=xavier, dtype=self.dtype, name="Dense_1")(jax.nn.swish(x))


def _dropout_b(x_nbwf, rate, keys_b):
    """Dropout of (n, B, W, F) with a key per row of B."""
    if keys_b is None or rate == 0.0:
        return x_nbwf
    return jnp.moveaxis(dropout(jnp.moveaxis(x_nbwf, 1, 0), rate, keys_b), 0, 1)


class ScoreNetwork(nn.Module):
    """eps(embedding, x, t): an MLP residual network conditioned by concatenation (IDQL, Hansen-Estruch et al. 2023)."""

    out_dim: int
    time_dim: int = 32
    num_blocks: int = 3
    hidden_dim: int = 256
    use_layer_norm: bool = True
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, embedding, x, time, dropout_keys=None):
        """embedding (..., D), x (..., H*A), time (..., 1) to the predicted noise (..., H*A), float32."""
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
            self.dtype,
            name="reverse_network",
        )
        return network(jnp.concatenate(inputs, axis=-1), dropout_keys).astype(jnp.float32)
