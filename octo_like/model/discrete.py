"""Actions as tokens: bins, and the head that predicts them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octo_like.model.heads import ActionHead
from octo_like.model.tokenizers import bin_index, bin_thresholds
from octo_like.model.tokens import TokenGroup


class DiscreteHead(ActionHead):
    """Actions as classes, one per dimension and step (RT-1, Brohan et al. 2022; OpenVLA, Kim et al. 2024).

    Given the embedding, the entries of a chunk are independent: each has the right distribution, but where the data
    choose between two chunks, a sample may mix them. Diffusion and flow matching do not.

    Attributes:
      num_bins: classes per entry.
      bin_type: "uniform" on [low, high], or "normal": equally likely under a standard normal.
      low, high: range of uniform bins, one number or one per action dimension; None: -max_action, max_action. Values
        outside go to the nearest bin.
      token_per: what an embedding is read for: "" (the chunk), "action_horizon" (a step) or
        "action_dim_and_action_horizon" (an entry). The readout must have as many tokens, unless `use_map` makes them.
      temperature: of sampling; 0 takes the most likely class.
    """

    num_bins: int = 256
    bin_type: str = "uniform"
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    token_per: str = "action_dim_and_action_horizon"
    temperature: float = 1.0

    @property
    def num_probes(self) -> int:
        sizes = {
            "": 1,
            "action_horizon": self.action_horizon,
            "action_dim_and_action_horizon": self.action_horizon * self.action_dim,
        }
        if self.token_per not in sizes:
            raise ValueError(f"unknown token_per {self.token_per!r}; valid: {sorted(sizes)}")
        return sizes[self.token_per]

    def setup(self) -> None:
        super().setup()
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        self.edges = self._edges()
        total = self.action_horizon * self.action_dim * self.num_bins
        self.vocab_proj = nn.Dense(total // self.num_probes, dtype=self.dtype)

    def _edges(self) -> np.ndarray:
        """(A, bins + 1) edges of every dimension's bins."""
        if self.bin_type == "normal" and not (self.low is None and self.high is None):
            raise ValueError("low and high are the range of uniform bins; normal bins have none")
        ranges = []
        for name, value, default in (("low", self.low, -self.max_action), ("high", self.high, self.max_action)):
            values = np.asarray(default if value is None else value, np.float64)
            if values.ndim > 1 or values.size not in (1, self.action_dim):
                raise ValueError(f"{name} needs one number or {self.action_dim}, one per dimension, got {value}")
            ranges.append(np.broadcast_to(values, self.action_dim))
        for d, (low, high) in enumerate(zip(*ranges, strict=True)):
            if not low < high:
                raise ValueError(f"bins of action dimension {d} span [{low}, {high}]: low must be less than high")
        if self.bin_type == "normal":
            return np.tile(bin_thresholds(self.num_bins, "normal", 0.0, 0.0), (self.action_dim, 1))
        return np.stack([bin_thresholds(self.num_bins, self.bin_type, *pair) for pair in zip(*ranges, strict=True)])

    def logits(self, groups: Mapping[str, TokenGroup], *, last_only: bool = False) -> jax.Array:
        """(B, W, H, A, bins) float32."""
        out = self.vocab_proj(self.embed(groups, last_only=last_only)).astype(jnp.float32)
        return out.reshape(*out.shape[:2], self.action_horizon, self.action_dim, self.num_bins)

    def to_bins(self, action: jax.Array) -> jax.Array:
        """(..., A) actions to int32 bins."""
        if self.compat:
            low, high = (float(self.edges[0, i]) for i in (0, -1))
            return bin_index(action, self.num_bins, self.bin_type, low, high, compat=True)
        search = lambda edges, x: jnp.searchsorted(edges, x, side="right") - 1  # noqa: E731
        index = jax.vmap(search, in_axes=(0, -1), out_axes=-1)(jnp.asarray(self.edges), action)
        return jnp.clip(index, 0, self.num_bins - 1)

    def from_bins(self, index: jax.Array) -> jax.Array:
        """(..., A) bins to their centres."""
        centres = jnp.asarray((self.edges[:, 1:] + self.edges[:, :-1]) / 2)
        return centres[jnp.arange(self.action_dim), index]

    def loss_terms(
        self, groups: Mapping[str, TokenGroup], action: jax.Array, mask: jax.Array, keys_b: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Masked sums of the cross-entropy "loss", "accuracy" and "mse" (times A, as upstream)."""
        logits, target = self.logits(groups), self.to_bins(action)
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
        guess = jnp.argmax(logits, axis=-1)
        squared = (self.from_bins(guess) - action) ** 2 * self.action_dim
        self.report_by_sample(entropy * mask, mask)
        return {
            "loss": jnp.sum(entropy * mask),
            "accuracy": jnp.sum((guess == target) * mask),
            "mse": jnp.sum(squared * mask),
        }

    def sample(
        self,
        groups: Mapping[str, TokenGroup],
        keys_b: jax.Array,
        *,
        sample_shape: tuple[int, ...] = (),
        valid: jax.Array | None = None,
        noise: Any = None,
    ) -> jax.Array:
        """(*sample_shape, B, H, A): samples classes at `temperature`; 0 takes the most likely one."""
        logits = self.logits(groups, last_only=True)[:, -1]
        if self.temperature == 0:
            action = self.from_bins(jnp.argmax(logits, axis=-1))
            return jnp.broadcast_to(action, (*sample_shape, *action.shape))
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (*sample_shape, *logits.shape[1:])))(keys_b)
        gumbel = jnp.moveaxis(gumbel, 0, len(sample_shape))
        return self.from_bins(jnp.argmax(logits / self.temperature + gumbel, axis=-1))
