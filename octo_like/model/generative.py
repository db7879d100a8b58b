"""Heads that turn noise into actions: diffusion and flow matching, with one network and one way of drawing."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from octo_like.common.chunks import METHODS
from octo_like.model import flow
from octo_like.model.diffusion import (
    ScoreNetwork,
    add_noise,
    cosine_schedule,
    ddim_sample,
    ddpm_sample,
    noise_from_action,
    noise_from_velocity,
    velocity,
)
from octo_like.model.guidance import Guidance, Pull, flat_pull
from octo_like.model.heads import ActionHead
from octo_like.model.tokens import TokenGroup
from octo_like.model.transformer import fold_in_all


class GenerativeHead(ActionHead):
    """What diffusion and flow matching share.

    Attributes:
      num_samples: noise draws per example; one transformer pass serves all of them.
      time_dim, num_blocks, hidden_dim, use_layer_norm, dropout_rate: of the network, see `ScoreNetwork`.
      loss: "mse" or "l1" on what is predicted.
      max_delay: 0, or the network also learns to continue a chunk: in training a sample's first 0 to `max_delay`
        actions (uniformly drawn) stand clean in its input, marked by a mask, and the loss is of the others
        (training-time real-time chunking, arXiv 2512.05964; there each action has its own time, which a network that
        reads the whole chunk at once has not). Guidance may then be "trained".
    """

    num_samples: int = 1
    time_dim: int = 32
    num_blocks: int = 3
    hidden_dim: int = 256
    use_layer_norm: bool = True
    dropout_rate: float = 0.0
    loss: str = "mse"
    max_delay: int = 0

    def setup(self) -> None:
        super().setup()
        if self.loss not in ("mse", "l1"):
            raise ValueError(f"unknown loss {self.loss!r}; valid: 'mse', 'l1'")
        if not 0 <= self.max_delay < self.action_horizon:
            raise ValueError(
                f"max_delay must be at least 0 and less than action_horizon={self.action_horizon}, got {self.max_delay}"
            )

    def _network(self) -> ScoreNetwork:
        return ScoreNetwork(
            self.action_horizon * self.action_dim,
            self.time_dim,
            self.num_blocks,
            self.hidden_dim,
            self.use_layer_norm,
            self.dropout_rate,
            self.max_delay > 0,
            self.sizes,
            self.dtype,
        )

    def check_guidance(self, guidance: Guidance) -> None:
        """Raises ValueError for an unknown method, or "trained" where the network has not learned it."""
        if guidance.method not in METHODS:
            raise ValueError(f"unknown guidance {guidance.method!r}; valid: {', '.join(METHODS)}")
        if guidance.method == "trained" and not self.max_delay:
            raise ValueError(
                "guidance 'trained' needs a head that was trained with max_delay > 0; valid: jacobian_free, vjp"
            )

    @property
    def draws_mask(self) -> bool:
        return self.max_delay > 0

    def learned_mask(self, mask: jax.Array, keys_b: jax.Array | None) -> jax.Array:
        """`mask` (B, W, H, A) without the actions that are given, see `max_delay`."""
        given = self._given(keys_b, mask.shape[1])
        return mask if given is None else mask * ~given[..., None]

    def _given(self, keys_b: jax.Array | None, window: int) -> jax.Array | None:
        """(B, W, H) bool: actions that stand clean in the network's input in training; None: none ever do."""
        if not self.max_delay:
            return None
        if keys_b is None:
            raise ValueError("with max_delay, which entries are learned from is drawn: keys_b are needed")
        draw = jax.vmap(lambda key: jax.random.randint(key, (window,), 0, self.max_delay + 1))
        return jnp.arange(self.action_horizon) < draw(fold_in_all(keys_b, 3))[..., None]

    def _with_given(self, noisy: jax.Array, clean: jax.Array, given: jax.Array | None):
        """(network's input (..., H*A), its mask (..., H) or None) from noisy and clean chunks laid flat."""
        if given is None:
            return noisy, None
        return jnp.where(jnp.repeat(given, self.action_dim, axis=-1), clean, noisy), given

    def _continue(self, guidance: Guidance | None, valid: jax.Array | None):
        """(pull of the sampler or None, what is given to the network or None), of which at most one is there."""
        if guidance is None:
            return None, None
        self.check_guidance(guidance)
        pull = flat_pull(guidance, self.max_action, valid)
        if guidance.method != "trained":
            return pull, None
        return None, (pull, guidance.is_fixed)

    def _ended(self, flat: jax.Array, guidance: Guidance | None, given, valid: jax.Array | None) -> jax.Array:
        """(..., B, H, A) actions of what a sampler ended on, (..., B, H*A)."""
        chunk = self._chunk(_put_in(flat, given)[0])
        return chunk if guidance is None else guidance.fix(chunk, valid)

    def _clipped(self, action) -> jax.Array:
        """(B, W, H, A) to (B, W, H*A) within the bounds."""
        return jnp.clip(action, -self.max_action, self.max_action).reshape(*action.shape[:2], -1)

    def _draw(self, keys_b, draw_time, shape) -> tuple[jax.Array, jax.Array]:
        """(time (n, B, W, 1), standard normal (n, B, W, H*A)) of a loss; a sample's depend on its own key only."""
        _, w, flat = shape
        n = self.num_samples
        time = jax.vmap(lambda key: draw_time(key, (n, w, 1)))(fold_in_all(keys_b, 0))
        noise = jax.vmap(lambda key: jax.random.normal(key, (n, w, flat)))(fold_in_all(keys_b, 1))
        return jnp.moveaxis(time, 1, 0), jnp.moveaxis(noise, 1, 0)

    def _terms(self, pred, target, mask) -> dict[str, jax.Array]:
        """Masked sums over (n, B, W, H*A), averaged over n, times A as upstream."""
        squared = (pred - target) ** 2
        loss = jnp.abs(pred - target) if self.loss == "l1" else squared
        weight = mask.reshape(*mask.shape[:2], -1) * self.action_dim / pred.shape[0]
        self.report_by_sample(loss * weight, mask, batch_axis=1)
        return {"loss": jnp.sum(loss * weight), "mse": jnp.sum(squared * weight)}

    def _start(self, groups, keys_b, sample_shape, valid, num_draws):
        """(embedding (B, D), valid (B, H*A) or None, noise (num_draws, *sample_shape, B, H*A) or None)."""
        embedding = self.embed(groups, last_only=True)[:, -1]
        b, flat = embedding.shape[0], self.action_horizon * self.action_dim
        drawn = None
        if num_draws:
            drawn = jnp.moveaxis(self.draw(jax.random.normal, keys_b, (num_draws, *sample_shape)), 0, -2)
        if valid is not None:
            valid = jnp.broadcast_to(jnp.asarray(valid, bool)[..., None, :], (b, self.action_horizon, self.action_dim))
            valid = valid.reshape(b, flat)
        return embedding, valid, drawn


class DiffusionHead(GenerativeHead):
    """Denoising diffusion over whole chunks (Ho et al. 2020; Chi et al. 2023).

    Attributes:
      num_steps: T of the cosine schedule.
      prediction: "noise" (as the Octo releases) or "velocity", sqrt(alpha_hat) noise - sqrt(1 - alpha_hat) action
        (Salimans & Ho 2022), or "action", the clean chunk itself ("x-prediction" there). Where there is almost only
        noise, predicting it asks nothing of the observation, and the sampler magnifies its errors; there the velocity
        is the action itself. Where there is little noise, the velocity is mostly noise that nothing explains, and its
        gradient drowns the rest; the action asks for what the observation tells at every level, and learns fastest.
      sampler: "ddpm" (all T steps, fresh noise at each) or "ddim" (`sample_steps` of them).
      sample_steps: of "ddim"; None: all T.
      eta: noise of "ddim"; 0 is deterministic given the initial noise.
      clip: "sample" (x after every step, as the Octo releases) or "x0" (the estimate of the action); see `ddpm_sample`.
      min_signal: of "ddim": where the share of the action in what the network sees, sqrt(alpha_hat), is smaller than
        this, it is asked as if it were this; see `ddim_sample`. 0 is the textbook's sampler, which is not calibrated in
        few steps, and with `prediction="noise"` in no number of steps.
    """

    num_steps: int = 20
    prediction: str = "noise"
    sampler: str = "ddpm"
    sample_steps: int | None = None
    eta: float = 0.0
    clip: str = "sample"
    min_signal: float = 0.15

    def setup(self) -> None:
        super().setup()
        if self.prediction not in ("noise", "velocity", "action"):
            raise ValueError(f"unknown prediction {self.prediction!r}; valid: 'noise', 'velocity', 'action'")
        if self.sampler not in ("ddpm", "ddim"):
            raise ValueError(f"unknown sampler {self.sampler!r}; valid: 'ddpm', 'ddim'")
        if self.sampler == "ddpm" and (self.sample_steps not in (None, self.num_steps) or self.eta):
            raise ValueError("sample_steps and eta belong to sampler='ddim'; 'ddpm' takes every step of the schedule")
        if self.clip not in ("sample", "x0"):
            raise ValueError(f"unknown clip {self.clip!r}; valid: 'sample', 'x0'")
        if self.sample_steps is not None and not 1 <= self.sample_steps <= self.num_steps:
            raise ValueError(f"sample_steps must be in 1..num_steps={self.num_steps}, got {self.sample_steps}")
        if not 0 <= self.min_signal < 1:
            raise ValueError(f"min_signal is a square root of alpha_hat, at least 0 and below 1, got {self.min_signal}")
        self.diffusion_model = self._network()
        self.schedule = cosine_schedule(self.num_steps)

    def predict_noise(
        self, embedding: jax.Array, x: jax.Array, time: jax.Array, given: jax.Array | None = None
    ) -> jax.Array:
        """The noise in x (..., H*A) at integer times (..., 1), given the embedding (..., D); see `ScoreNetwork`."""
        out = self.diffusion_model(embedding, x, time, None, given)
        if self.prediction == "velocity":
            return noise_from_velocity(self.schedule, x, out, time)
        return out if self.prediction == "noise" else noise_from_action(self.schedule, x, out, time)

    def loss_terms(
        self,
        groups: Mapping[str, TokenGroup],
        action: jax.Array,
        mask: jax.Array,
        keys_b: jax.Array,
        *,
        draws: tuple[jax.Array, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """Masked sums of "loss" and "mse" over what is predicted, averaged over draws, times A as upstream.

        Args:
          action, mask: (B, W, H, A).
          keys_b: (B,) keys; time and noise of a sample depend on its key only.
          draws: (time (n, B, W, 1) int, noise (n, B, W, H*A)) instead of random ones.
        """
        x0 = self._clipped(action)
        if draws is None:
            draws = self._draw(keys_b, lambda key, shape: jax.random.randint(key, shape, 0, self.num_steps), x0.shape)
        time, noise = draws
        noisy = add_noise(self.schedule, x0[None], noise, time)
        noisy, given = self._with_given(noisy, x0[None], self._given(keys_b, mask.shape[1]))
        pred = self.diffusion_model(self.embed(groups)[None], noisy, time, fold_in_all(keys_b, 2), given)
        target = {"noise": lambda *_: noise, "velocity": velocity, "action": lambda *_: x0[None]}[self.prediction](
            self.schedule, x0[None], noise, time
        )
        return self._terms(pred, target, self.learned_mask(mask, keys_b))

    def sample(
        self,
        groups: Mapping[str, TokenGroup],
        keys_b: jax.Array,
        *,
        sample_shape: tuple[int, ...] = (),
        valid: jax.Array | None = None,
        noise: tuple[jax.Array, Any] | None = None,
        guidance: Guidance | None = None,
    ) -> jax.Array:
        """(*sample_shape, B, H, A) actions within the bounds, but for those that `guidance` fixes.

        Args:
          keys_b: (B,) keys; a row's actions depend on its own key only.
          valid: (A,) or (B, A) bool, False for padded action dimensions.
          noise: (initial (*sample_shape, B, H*A), steps (number of steps, *sample_shape, B, H*A)) instead of random
            ones; steps may be None where the sampler draws none.
          guidance: a previous chunk that the drawn ones continue.
        """
        steps = self.sample_steps or self.num_steps
        draws = steps if self.sampler == "ddpm" or self.eta else 0
        embedding, valid, drawn = self._start(
            groups, keys_b, sample_shape, valid, 0 if noise is not None else draws + 1
        )
        initial, per_step = (drawn[0], drawn[1:]) if noise is None else noise
        pull, given = self._continue(guidance, valid)

        def denoise(x, t):
            x, marks = _put_in(x, given)
            return self.predict_noise(embedding, x, jnp.broadcast_to(t, (1,) * x.ndim), marks)

        bounds: dict[str, Any] = dict(max_action=self.max_action, clip=self.clip, valid=valid, pull=pull)
        if self.sampler == "ddpm":
            out = ddpm_sample(denoise, self.schedule, initial, per_step, **bounds)
        else:
            bounds |= dict(num_steps=steps, eta=self.eta, min_signal=self.min_signal)
            out = ddim_sample(denoise, self.schedule, initial, per_step if self.eta else None, **bounds)
        return self._ended(out, guidance, given, valid)


class FlowHead(GenerativeHead):
    """Flow matching over whole chunks (Lipman et al. 2023; times as in pi0, Black et al. 2024).

    Attributes:
      sample_steps: Euler steps of sampling.
      time_alpha: how much training prefers noisy times, see `flow.time_from_uniform`; 1 is uniform.
    """

    sample_steps: int = 10
    time_alpha: float = 1.5

    # The network's time features are made for diffusion's steps 0 ... 20.
    time_scale = 20.0

    def setup(self) -> None:
        super().setup()
        if self.sample_steps < 1 or self.time_alpha <= 0:
            raise ValueError(
                f"sample_steps must be at least 1 and time_alpha positive, got {self.sample_steps}, {self.time_alpha}"
            )
        self.flow_model = self._network()

    def predict_velocity(
        self,
        embedding: jax.Array,
        x: jax.Array,
        tau: jax.Array,
        dropout_keys: jax.Array | None = None,
        given: jax.Array | None = None,
    ) -> jax.Array:
        """d x / d tau at x (..., H*A), times tau (..., 1) in [0, 1] and embedding (..., D); see `ScoreNetwork`."""
        return self.flow_model(embedding, x, tau * self.time_scale, dropout_keys, given)

    def loss_terms(
        self,
        groups: Mapping[str, TokenGroup],
        action: jax.Array,
        mask: jax.Array,
        keys_b: jax.Array,
        *,
        draws: tuple[jax.Array, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """Masked sums of "loss" and "mse" of the velocity action - noise, averaged over draws, times A as diffusion's.

        Args:
          action, mask: (B, W, H, A).
          keys_b: (B,) keys; time and noise of a sample depend on its key only.
          draws: (tau (n, B, W, 1), noise (n, B, W, H*A)) instead of random ones.
        """
        x1 = self._clipped(action)
        if draws is None:
            draw_time = lambda key, shape: flow.time_from_uniform(jax.random.uniform(key, shape), self.time_alpha)  # noqa: E731
            draws = self._draw(keys_b, draw_time, x1.shape)
        tau, noise = draws
        x = flow.interpolate(x1[None], noise, tau)
        x, given = self._with_given(x, x1[None], self._given(keys_b, mask.shape[1]))
        pred = self.predict_velocity(self.embed(groups)[None], x, tau, fold_in_all(keys_b, 2), given)
        return self._terms(pred, x1[None] - noise, self.learned_mask(mask, keys_b))

    def sample(
        self,
        groups: Mapping[str, TokenGroup],
        keys_b: jax.Array,
        *,
        sample_shape: tuple[int, ...] = (),
        valid: jax.Array | None = None,
        noise: jax.Array | None = None,
        guidance: Guidance | None = None,
    ) -> jax.Array:
        """As `DiffusionHead.sample`; `noise` is the initial noise (*sample_shape, B, H*A) alone."""
        embedding, valid, drawn = self._start(groups, keys_b, sample_shape, valid, 0 if noise is not None else 1)

        pull, given = self._continue(guidance, valid)

        def speed(x, tau):
            x, marks = _put_in(x, given)
            return self.predict_velocity(embedding, x, jnp.broadcast_to(tau, (1,) * x.ndim), None, marks)

        initial = drawn[0] if noise is None else noise
        out = flow.euler_sample(speed, initial, self.sample_steps, valid=valid, pull=pull)
        return self._ended(jnp.clip(out, -self.max_action, self.max_action), guidance, given, valid)


def _put_in(x: jax.Array, given: tuple[Pull, jax.Array] | None) -> tuple[jax.Array, jax.Array | None]:
    """(x (..., B, H*A) with the actions that are given in their place, their mask (B, H) or None)."""
    if given is None:
        return x, None
    pull, marks = given
    return pull.fix(x), marks
