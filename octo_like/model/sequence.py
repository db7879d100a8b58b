"""Heads that say an action chunk as a sequence of tokens, each given those before it.

Where the data choose between two chunks, the first tokens choose, and the others follow: what the heads of
`discrete.py`, whose entries are independent, cannot do.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octo_like.model.decoder import Places, Rule, TokenDecoder
from octo_like.model.discrete import ActionBins, Range
from octo_like.model.heads import ActionHead
from octo_like.model.tokens import TokenGroup


class SequenceHead(ActionHead):
    """What these heads share: a decoder that reads the tokens of a timestep.

    Attributes:
      reads: "readout" (the head's readout, best of 4 to 8 tokens) or "all" (the task's and the timestep's observation
        tokens as well).
      width, num_layers, num_heads, mlp_dim: of the decoder, see `TokenDecoder`.
      temperature: of sampling; 0 says the likeliest token at every step.
      top_k: sample among the k likeliest tokens; 0: among all.
    """

    reads: str = "readout"
    width: int = 256
    num_layers: int = 2
    num_heads: int = 4
    mlp_dim: int = 0
    temperature: float = 1.0
    top_k: int = 0

    def setup(self) -> None:
        super().setup()
        if self.reads not in ("readout", "all"):
            raise ValueError(f"unknown reads {self.reads!r}; valid: 'readout', 'all'")
        if self.use_map:
            raise ValueError("use_map pools what a head reads; this one reads token by token, leave it out")
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(f"temperature and top_k must not be negative, got {self.temperature}, {self.top_k}")

    @property
    def needed_group(self) -> str | None:
        return self.readout if self.reads == "readout" else None

    def _decoder(self, vocab_size: int, max_length: int) -> TokenDecoder:
        return TokenDecoder(
            vocab_size, max_length, self.width, self.num_layers, self.num_heads, self.mlp_dim, self.dtype
        )

    def read(self, groups: Mapping[str, TokenGroup], *, last_only: bool = False) -> TokenGroup:
        """Tokens (B * W, M, D) that the decoder reads for each timestep."""
        if self.readout not in groups:
            raise ValueError(f"head reads group {self.readout!r}, but the transformer has {sorted(groups)}")
        return reading(groups, self.readout, self.reads, last_only=last_only)

    def _say(self, groups, keys_b, sample_shape, rule: Rule) -> jax.Array:
        """(B, S, L) ids for the last timestep, S the number of samples (1 where nothing is drawn).

        `rule`: of one row, of B * S neighbouring ones, or of none.
        """
        read = self.read(groups, last_only=True)
        rows, samples = read.tokens.shape[0], 1 if self.temperature == 0 else int(np.prod(sample_shape))
        keys = None
        if self.temperature > 0:
            keys = jax.vmap(lambda key: jax.random.split(key, samples))(keys_b).reshape(rows * samples)
        ids = self.decoder.generate(read, rule, keys, temperature=self.temperature, top_k=self.top_k)
        return ids.reshape(rows, samples, -1)

    def _samples(self, chunks: jax.Array, sample_shape: tuple[int, ...]) -> jax.Array:
        """(B, S, H, A) to (*sample_shape, B, H, A)."""
        chunks = jnp.moveaxis(chunks, 0, 1)
        shape = (int(np.prod(sample_shape)), *chunks.shape[1:])
        return jnp.broadcast_to(chunks, shape).reshape(*sample_shape, *shape[1:])


def reading(
    groups: Mapping[str, TokenGroup], readout: str, reads: str = "readout", *, last_only: bool = False
) -> TokenGroup:
    """Tokens (B * W, M, D) of every timestep: the readout's, or with reads="all" the task's and observations' too."""
    read = groups[readout]
    if reads == "all":
        b, w = read.tokens.shape[:2]
        parts = [read, *(groups[name] for name in ("obs", "task") if name in groups)]
        parts = [
            TokenGroup(
                jnp.broadcast_to(part.tokens[:, None], (b, w, *part.tokens.shape[1:])),
                jnp.broadcast_to(part.mask[:, None], (b, w, *part.mask.shape[1:])),
            )
            if part.tokens.ndim == 3
            else part
            for part in parts
        ]
        read = TokenGroup.concatenate(parts)
    tokens, mask = (x[:, -1:] if last_only else x for x in (read.tokens, read.mask))
    return TokenGroup(tokens.reshape(-1, *tokens.shape[2:]), mask.reshape(-1, mask.shape[2]))


class BinsHead(SequenceHead):
    """One token per step and dimension, a class each, decoded one after the other (RT-2, Brohan et al. 2023; OpenVLA,
    Kim et al. 2024): all dimensions of the first step, then of the second ...

    OpenVLA's bins are 256 between the 1st and the 99th percentile: `normalization="bounds"` of the dataset, and low=-1,
    high=1 here. Padded dimensions have a token of their own, which nothing is learned from.

    Attributes:
      num_bins, bin_type, low, high: see `octo_like.model.discrete.DiscreteHead`.
    """

    num_bins: int = 256
    bin_type: str = "uniform"
    low: Range = None
    high: Range = None

    def setup(self) -> None:
        super().setup()
        self.bins = ActionBins.make(
            self.num_bins, self.bin_type, self.low, self.high, self.max_action, self.action_dim, compat=False
        )
        self.decoder = self._decoder(self.num_bins + 1, self.action_horizon * self.action_dim)

    def logits(self, groups: Mapping[str, TokenGroup], action: jax.Array, mask: jax.Array) -> jax.Array:
        """(B, W, H, A, bins) float32 of every entry of (B, W, H, A) actions, given those before it."""
        ids = jnp.where(mask > 0, self.bins.index(action), self.num_bins)
        logits = self.decoder(ids.reshape(-1, self.action_horizon * self.action_dim), self.read(groups))
        return logits[..., : self.num_bins].reshape(*action.shape, self.num_bins)

    def loss_terms(
        self, groups: Mapping[str, TokenGroup], action: jax.Array, mask: jax.Array, keys_b: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Masked sums of the cross-entropy "loss" (nats), and of the likeliest bin given the right ones before it:
        "accuracy" and "mse" (times A as the other heads')."""
        logits, target = self.logits(groups, action, mask), self.bins.index(action)
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
        guess = jnp.argmax(logits, axis=-1)
        squared = (self.bins.centre(guess) - action) ** 2 * self.action_dim
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
        """(*sample_shape, B, H, A): centres of the bins that were said; zero in padded dimensions.

        Args:
          valid: (A,) or (B, A) bool, False for padded action dimensions.
        """
        b, shape = keys_b.shape[0], (self.action_horizon, self.action_dim)
        valid = jnp.ones((1, 1, *shape), bool) if valid is None else jnp.asarray(valid, bool)
        if valid.ndim < 4:
            samples = 1 if self.temperature == 0 else int(np.prod(sample_shape))
            valid = jnp.broadcast_to(valid[..., None, :], (b, *shape))[:, None]
            valid = jnp.broadcast_to(valid, (b, samples, *shape))
        is_pad = np.arange(self.num_bins + 1) == self.num_bins
        rule = Places(valid.reshape(-1, shape[0] * shape[1], 1) != is_pad)
        ids = self._say(groups, keys_b, sample_shape, rule)
        ids = ids.reshape(*ids.shape[:2], *shape)
        action = jnp.where(ids < self.num_bins, self.bins.centre(jnp.minimum(ids, self.num_bins - 1)), 0.0)
        return self._samples(action, sample_shape)
