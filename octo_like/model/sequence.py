"""Heads that say an action chunk as a sequence of tokens, each given those before it.

Where the data choose between two chunks, the first tokens choose, and the others follow: what the heads of
`discrete.py`, whose entries are independent, cannot do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octo_like.common.fast import dct_matrix
from octo_like.common.vocabularies import action_vocabulary
from octo_like.model.decoder import Filling, Places, Rule, TokenDecoder
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

    The classes are uniform bins unless `bin_type` says others: OpenVLA's are `bin_type="openvla"`, RT-2's
    `bin_type="rt2"`, of both num_bins=256 and `normalization="bounds"` of the dataset (1st to 99th percentile). Padded
    dimensions have a token of their own, which nothing is learned from.

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
        """(*sample_shape, B, H, A): what the bins that were said stand for; zero in padded dimensions.

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


class FastHead(SequenceHead):
    """A chunk as few tokens of its frequencies, decoded one after the other (FAST, Pertsch et al. 2025).

    What may be said is what fills the chunk exactly: every sequence that is sampled is a chunk. A chunk that is not
    whole, because the episode ends within it, is not learned from: its tokens stand for all of it.

    Attributes:
      vocabulary: of the tokens, for chunks of this head's size; see `octo_like.common.fast` and
        `octo_like.common.vocabularies`.
    """

    vocabulary: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def setup(self) -> None:
        super().setup()
        fast = action_vocabulary(self.vocabulary)
        if (fast.horizon, fast.dim) != (self.action_horizon, self.action_dim):
            raise ValueError(
                f"the vocabulary is of chunks of {fast.horizon} steps of {fast.dim} dimensions, the head's have "
                f"{self.action_horizon} steps of {self.action_dim}; train one with scripts/train_action_tokenizer.py"
            )
        self.fast = fast
        self.decoder = self._decoder(fast.vocab_size, fast.max_tokens)

    @property
    def draws_mask(self) -> bool:
        return True

    def learned_mask(self, mask: jax.Array, keys_b: jax.Array | None) -> jax.Array:
        """`mask` (B, W, H, A) of whole chunks."""
        del keys_b
        return mask & (mask == mask[:, :, :1]).all((2, 3), keepdims=True)

    def loss_terms(
        self,
        groups: Mapping[str, TokenGroup],
        action: jax.Array,
        mask: jax.Array,
        keys_b: jax.Array | None = None,
        *,
        tokens: jax.Array,
    ) -> dict[str, jax.Array]:
        """Masked sums of the cross-entropy "loss" (nats of a chunk's tokens; comparable between vocabularies of one
        scale only) and "accuracy", the share of the coefficients whose token is the likeliest given those before it.

        Args:
          tokens: (B, W, M) int32 ids of the chunks, 0 behind the last; all 0 of a chunk that is not whole.
        """
        del action
        weight = self.learned_mask(mask > 0, keys_b).sum((2, 3)).astype(jnp.float32)  # entries of each chunk
        ids = jnp.where(weight[..., None] > 0, tokens, 0).reshape(-1, tokens.shape[-1])
        logits = self.decoder(ids, self.read(groups))
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0]
        entropy = jnp.where(ids > 0, entropy, 0.0).reshape(tokens.shape)
        size = jnp.asarray(self.fast.piece_lengths)[ids] / (self.action_horizon * self.action_dim)
        right = ((jnp.argmax(logits, axis=-1) == ids) * size).sum(-1).reshape(weight.shape)
        self.report_by_sample(entropy, self.learned_mask(mask > 0, keys_b))
        return {"loss": jnp.sum(entropy), "accuracy": jnp.sum(right * weight)}

    def chunks(self, ids: jax.Array) -> jax.Array:
        """(..., H, A) float32 of ids (..., M) whose pieces fill a chunk."""
        tables = self.fast.piece_coefficients, self.fast.piece_lengths
        coefficients, lengths = (jnp.asarray(table) for table in tables)
        ends = jnp.cumsum(lengths[ids], axis=-1)
        place = jnp.arange(self.action_horizon * self.action_dim)
        # The piece that holds each coefficient: as many pieces end before it or on it.
        piece = jnp.sum(ends[..., None, :] <= place[:, None], axis=-1)
        piece = jnp.minimum(piece, ids.shape[-1] - 1)
        begin = jnp.take_along_axis(ends - lengths[ids], piece, axis=-1)
        found = coefficients[jnp.take_along_axis(ids, piece, axis=-1), place - begin]
        found = found.reshape(*ids.shape[:-1], self.action_horizon, self.action_dim) / self.fast.scale
        # In full precision also where matrix products are rounded: a coefficient of 10 is told from one of 10.05.
        inverse = jnp.asarray(dct_matrix(self.action_horizon).T, jnp.float32)
        return jnp.einsum("tk,...ka->...ta", inverse, found, precision=jax.lax.Precision.HIGHEST)

    def sample(
        self,
        groups: Mapping[str, TokenGroup],
        keys_b: jax.Array,
        *,
        sample_shape: tuple[int, ...] = (),
        valid: jax.Array | None = None,
        noise: Any = None,
    ) -> jax.Array:
        """(*sample_shape, B, H, A): the chunks that were said; zero in padded dimensions, `valid` (A,) or (B, A)."""
        rule = Filling(self.fast.piece_lengths, self.action_horizon * self.action_dim, self.fast.max_tokens)
        action = jnp.clip(self.chunks(self._say(groups, keys_b, sample_shape, rule)), -self.max_action, self.max_action)
        if valid is not None:
            valid = jnp.asarray(valid, bool)
            valid = jnp.broadcast_to(valid, (keys_b.shape[0], self.action_dim))[:, None, None]
            action = jnp.where(valid, action, 0.0)
        return self._samples(action, sample_shape)
