"""Action heads behind one interface: `loss_terms` (sums, so that any split of a batch adds up) and `sample`.

Shapes: embedding (B, W, D); actions (B, W, H, A); sampled actions (*sample_shape, B, H, A), of the last timestep only.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from octo_like.model.diffusion import (
    ScoreNetwork,
    add_noise,
    cosine_schedule,
    ddpm_sample,
    noise_from_action,
    noise_from_velocity,
    velocity,
)
from octo_like.model.tokenizers import bin_index, bin_thresholds
from octo_like.model.tokens import TokenGroup
from octo_like.model.transformer import MapPooling, fold_in_all


def action_mask(batch: Mapping, head: str, horizon: int, dim: int) -> jax.Array:
    """Which entries of (B, W, H, A) head `head` learns from: valid timestep, dimension, step and sample."""
    mask = jnp.asarray(batch["action_pad_mask"], bool)[:, :, :horizon, :dim]
    mask &= jnp.asarray(batch["observation"]["timestep_pad_mask"], bool)[:, :, None, None]
    learns = batch.get("action_head_mask", {}).get(head)
    return mask if learns is None else mask & jnp.asarray(learns, bool)[:, None, None, None]


def _row_normal(keys_b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal (B, *shape), one key per row."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_b)


class ActionHead(nn.Module):
    """What the heads share.

    Attributes:
      readout: token group that is read ("readout_action", or "obs" with `use_map`).
      use_map: pool the group by attention; otherwise by its mean.
      action_horizon, action_dim: H and A.
      max_action: bound on the magnitude of normalised actions.
    """

    readout: str
    use_map: bool = False
    action_horizon: int = 1
    action_dim: int = 7
    max_action: float = 5.0
    compat: bool = False
    dtype: jnp.dtype = jnp.float32

    num_probes = 1

    def setup(self):
        if self.use_map:
            self.map_head = MapPooling(self.num_probes, self.compat, self.dtype)

    def embed(self, groups: Mapping[str, TokenGroup], *, last_only: bool = False) -> jax.Array:
        """(B, W, D) or, with several probes, (B, W, n, D)."""
        if self.readout not in groups:
            raise ValueError(f"head reads group {self.readout!r}, but the transformer has {sorted(groups)}")
        group = groups[self.readout]
        tokens, mask = (x[:, -1:] if last_only else x for x in (group.tokens, group.mask))
        if self.use_map:
            pooled = self.map_head(tokens, mask)
            return pooled[..., 0, :] if self.num_probes == 1 else pooled
        if self.num_probes > 1:
            if tokens.shape[-2] != self.num_probes:
                raise ValueError(f"head needs {self.num_probes} tokens, {self.readout!r} has {tokens.shape[-2]}")
            return tokens
        return tokens.mean(axis=-2)

    def _chunk(self, flat: jax.Array) -> jax.Array:
        return flat.reshape(*flat.shape[:-1], self.action_horizon, self.action_dim)


class RegressionHead(ActionHead):
    """Deterministic actions, squashed to [-max_action, max_action], with squared ("mse") or absolute ("l1") error."""

    loss: str = "mse"

    def setup(self):
        super().setup()
        self.mean_proj = nn.Dense(self.action_horizon * self.action_dim, dtype=self.dtype)

    def predict(self, groups, *, last_only: bool = False) -> jax.Array:
        """(B, W, H, A) float32."""
        raw = self._chunk(self.mean_proj(self.embed(groups, last_only=last_only))).astype(jnp.float32)
        return jnp.tanh(raw / self.max_action) * self.max_action

    def loss_terms(self, groups, action, mask, keys_b=None) -> dict[str, jax.Array]:
        """Masked sums of "loss" and "mse", times A as upstream; divide by the mask's count."""
        error = self.predict(groups) - action
        squared, weight = error**2, mask * self.action_dim
        loss = jnp.abs(error) if self.loss == "l1" else squared
        return {"loss": jnp.sum(loss * weight), "mse": jnp.sum(squared * weight)}

    def sample(self, groups, keys_b, *, sample_shape=(), valid=None, noise=None) -> jax.Array:
        action = self.predict(groups, last_only=True)[:, -1]
        return jnp.broadcast_to(action, (*sample_shape, *action.shape))


class DiffusionHead(ActionHead):
    """Denoising diffusion over whole chunks (Ho et al. 2020; Chi et al. 2023), DDPM sampling.

    Attributes:
      num_samples: noise draws per example; one transformer pass serves all of them.
      prediction: "noise" (as the Octo releases) or "velocity", sqrt(alpha_hat) noise - sqrt(1 - alpha_hat) action
        (Salimans & Ho 2022), or "action", the clean chunk itself ("x-prediction" there). Where there is almost only
        noise, predicting it asks nothing of the observation, and the sampler magnifies its errors; there the velocity
        is the action itself. Where there is little noise, the velocity is mostly noise that nothing explains, and its
        gradient drowns the rest; the action asks for what the observation tells at every level, and learns fastest.
      loss: "mse" or "l1" on what is predicted.
    """

    num_steps: int = 20
    num_samples: int = 1
    time_dim: int = 32
    num_blocks: int = 3
    hidden_dim: int = 256
    use_layer_norm: bool = True
    dropout_rate: float = 0.0
    prediction: str = "noise"
    loss: str = "mse"

    def setup(self):
        super().setup()
        if self.prediction not in ("noise", "velocity", "action"):
            raise ValueError(f"unknown prediction {self.prediction!r}; valid: 'noise', 'velocity', 'action'")
        self.diffusion_model = ScoreNetwork(
            self.action_horizon * self.action_dim,
            self.time_dim,
            self.num_blocks,
            self.hidden_dim,
            self.use_layer_norm,
            self.dropout_rate,
            self.dtype,
        )
        self.schedule = cosine_schedule(self.num_steps)

    def predict_noise(self, embedding, x, time) -> jax.Array:
        """The noise in x (..., H*A) at integer times (..., 1)."""
        out = self.diffusion_model(embedding, x, time)
        if self.prediction == "velocity":
            return noise_from_velocity(self.schedule, x, out, time)
        return out if self.prediction == "noise" else noise_from_action(self.schedule, x, out, time)

    def loss_terms(self, groups, action, mask, keys_b, *, draws=None) -> dict[str, jax.Array]:
        """Masked sums of "loss" and "mse" over what is predicted, averaged over draws, times A as upstream.

        Args:
          keys_b: (B,) keys; time and noise of a sample depend on its key only.
          draws: (time (n, B, W, 1) int, noise (n, B, W, H*A)) instead of random ones.
        """
        b, w = action.shape[:2]
        x0 = jnp.clip(action, -self.max_action, self.max_action).reshape(b, w, -1)
        if draws is None:
            n, flat = self.num_samples, x0.shape[-1]
            time = jax.vmap(lambda key: jax.random.randint(key, (n, w, 1), 0, self.num_steps))(fold_in_all(keys_b, 0))
            noise = _row_normal(fold_in_all(keys_b, 1), (n, w, flat))
            draws = jnp.moveaxis(time, 1, 0), jnp.moveaxis(noise, 1, 0)
        time, noise = draws
        noisy = add_noise(self.schedule, x0[None], noise, time)
        pred = self.diffusion_model(self.embed(groups)[None], noisy, time, fold_in_all(keys_b, 2))
        target = {"noise": lambda *_: noise, "velocity": velocity, "action": lambda *_: x0[None]}[self.prediction](
            self.schedule, x0[None], noise, time
        )
        squared = (pred - target) ** 2
        loss = jnp.abs(pred - target) if self.loss == "l1" else squared
        weight = mask.reshape(b, w, -1) * self.action_dim / noise.shape[0]
        return {"loss": jnp.sum(loss * weight), "mse": jnp.sum(squared * weight)}

    def sample(self, groups, keys_b, *, sample_shape=(), valid=None, noise=None) -> jax.Array:
        """
        Args:
          keys_b: (B,) keys; a row's actions depend on its own key only.
          valid: (A,) or (B, A) bool, False for padded action dimensions.
          noise: (initial (*sample_shape, B, H*A), steps (T, *sample_shape, B, H*A)) instead of random ones.
        """
        embedding = self.embed(groups, last_only=True)[:, -1]
        b, flat = embedding.shape[0], self.action_horizon * self.action_dim
        if noise is None:
            drawn = jnp.moveaxis(_row_normal(keys_b, (self.num_steps + 1, *sample_shape, flat)), 0, -2)
            noise = drawn[0], drawn[1:]
        if valid is not None:
            valid = jnp.broadcast_to(jnp.asarray(valid, bool)[..., None, :], (b, self.action_horizon, self.action_dim))
            valid = valid.reshape(b, flat)

        def denoise(x, t):
            return self.predict_noise(embedding, x, jnp.broadcast_to(t, (1,) * x.ndim))

        out = ddpm_sample(denoise, self.schedule, *noise, max_action=self.max_action, valid=valid)
        return self._chunk(out)


class DiscreteHead(ActionHead):
    """Actions as classes, one per dimension and step (RT-1, Brohan et al. 2022).

    Attributes:
      token_per: "" (one embedding for the chunk), "action_horizon" or "action_dim_and_action_horizon".
      bin_type, low, high: see `tokenizers.bin_thresholds`; uniform bins span [-max_action, max_action] unless given.
    """

    num_bins: int = 256
    bin_type: str = "uniform"
    low: float | None = None
    high: float | None = None
    token_per: str = "action_dim_and_action_horizon"
    temperature: float = 1.0

    @property
    def num_probes(self):
        sizes = {
            "": 1,
            "action_horizon": self.action_horizon,
            "action_dim_and_action_horizon": self.action_horizon * self.action_dim,
        }
        if self.token_per not in sizes:
            raise ValueError(f"unknown token_per {self.token_per!r}; valid: {sorted(sizes)}")
        return sizes[self.token_per]

    @property
    def bin_range(self) -> tuple[float, float]:
        return (-self.max_action if self.low is None else self.low, self.max_action if self.high is None else self.high)

    def setup(self):
        super().setup()
        total = self.action_horizon * self.action_dim * self.num_bins
        self.vocab_proj = nn.Dense(total // self.num_probes, dtype=self.dtype)

    def logits(self, groups, *, last_only: bool = False) -> jax.Array:
        """(B, W, H, A, bins) float32."""
        out = self.vocab_proj(self.embed(groups, last_only=last_only)).astype(jnp.float32)
        return out.reshape(*out.shape[:2], self.action_horizon, self.action_dim, self.num_bins)

    def to_bins(self, action) -> jax.Array:
        return bin_index(action, self.num_bins, self.bin_type, *self.bin_range, compat=self.compat)

    def from_bins(self, index) -> jax.Array:
        """Bin centres."""
        edges = jnp.asarray(bin_thresholds(self.num_bins, self.bin_type, *self.bin_range))
        return ((edges[1:] + edges[:-1]) / 2)[index]

    def loss_terms(self, groups, action, mask, keys_b=None) -> dict[str, jax.Array]:
        """Masked sums of the cross-entropy "loss", "accuracy" and "mse" (times A, as upstream)."""
        logits, target = self.logits(groups), self.to_bins(action)
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
        guess = jnp.argmax(logits, axis=-1)
        squared = (self.from_bins(guess) - action) ** 2 * self.action_dim
        return {
            "loss": jnp.sum(entropy * mask),
            "accuracy": jnp.sum((guess == target) * mask),
            "mse": jnp.sum(squared * mask),
        }

    def sample(self, groups, keys_b, *, sample_shape=(), valid=None, noise=None) -> jax.Array:
        """Samples classes at `temperature`; 0 takes the most likely one."""
        logits = self.logits(groups, last_only=True)[:, -1]
        if self.temperature == 0:
            action = self.from_bins(jnp.argmax(logits, axis=-1))
            return jnp.broadcast_to(action, (*sample_shape, *action.shape))
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (*sample_shape, *logits.shape[1:])))(keys_b)
        gumbel = jnp.moveaxis(gumbel, 0, len(sample_shape))
        return self.from_bins(jnp.argmax(logits / self.temperature + gumbel, axis=-1))
