"""Words out: answers to questions, and what the robot is doing just now, said by a decoder.

It stands among a model's auxiliaries: rows that have a text to learn train it and nothing else needs it; a policy
without it acts as before.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octo_like.common.schema import TEXT_KINDS, TEXT_LENGTH
from octo_like.common.vocabularies import size_of
from octo_like.model.decoder import TokenDecoder, UntilEnd
from octo_like.model.sequence import reading
from octo_like.model.tokens import TokenGroup

PAD, END, UNKNOWN = 0, 1, 2


class TextHead(nn.Module):
    """A text for the last timestep of the window, said one id after the other.

    Attributes:
      readout: token group that is read, best one of its own with 4 to 8 tokens ("readout_text").
      vocabulary: of the words, see `octo_like.common.vocabularies`.
      max_length: M, ids of a text with its end.
      learns: kinds of texts that it learns, of `octo_like.common.schema.TEXT_KINDS`.
      reads: "readout", or "all": the task's and the observations' tokens as well.
      width, num_layers, num_heads, mlp_dim: of the decoder, see `TokenDecoder`.
      remembers: it has learned what to do next given what was done before (`data.last_subtask_prob`), so who asks it
        hands back what was said last, as the task's sub-task. Nothing is computed otherwise.
    """

    readout: str
    vocabulary: Mapping[str, Any]
    max_length: int = TEXT_LENGTH
    learns: tuple[str, ...] = TEXT_KINDS
    reads: str = "readout"
    width: int = 256
    num_layers: int = 2
    num_heads: int = 4
    mlp_dim: int = 0
    remembers: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        if self.reads not in ("readout", "all"):
            raise ValueError(f"unknown reads {self.reads!r}; valid: 'readout', 'all'")
        if not self.learns or set(self.learns) - set(TEXT_KINDS):
            raise ValueError(f"learns {self.learns!r}: kinds of texts are {', '.join(TEXT_KINDS)}")
        self.decoder = TokenDecoder(
            size_of(self.vocabulary),
            self.max_length,
            self.width,
            self.num_layers,
            self.num_heads,
            self.mlp_dim,
            self.dtype,
        )

    @property
    def needed_group(self) -> str | None:
        """The one group that is read, at the last timestep; None: all are."""
        return self.readout if self.reads == "readout" else None

    def mask(self, batch: Mapping) -> jax.Array:
        """(B, M) bool: ids that are learned. None are, in a batch without texts."""
        if "text_target" not in batch:
            return jnp.zeros((batch["action"].shape[0], self.max_length), bool)
        kinds = np.array([1 + TEXT_KINDS.index(kind) for kind in self.learns], np.int32)
        learned = (jnp.asarray(batch["text_target_kind"])[:, None] == kinds).any(-1)
        return learned[:, None] & (jnp.asarray(batch["text_target"]["attention_mask"]) > 0)

    def loss_terms(self, groups: Mapping[str, TokenGroup], batch: Mapping) -> dict[str, jax.Array]:
        """Masked sums of the cross-entropy "loss" (nats) and of "accuracy", the share of ids that are the likeliest
        given the right ones before them; "count" is the number of ids."""
        mask = self.mask(batch)
        ids = jnp.where(mask, jnp.asarray(batch["text_target"]["input_ids"]) if "text_target" in batch else PAD, PAD)
        logits = self.decoder(ids, self._read(groups))
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0]
        return {
            "loss": jnp.sum(jnp.where(mask, entropy, 0.0)),
            "accuracy": jnp.sum((jnp.argmax(logits, axis=-1) == ids) & mask, dtype=jnp.float32),
            "count": jnp.sum(mask, dtype=jnp.float32),
        }

    def generate(
        self,
        groups: Mapping[str, TokenGroup],
        keys_b: jax.Array | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        allowed_v: jax.Array | None = None,
    ) -> jax.Array:
        """(B, M) ids, see `OctoModel.predict_text`. Never padding or <unk> before the end."""
        words = ~np.isin(np.arange(self.decoder.vocab_size), (PAD, END, UNKNOWN))
        rule = UntilEnd(words if allowed_v is None else words & allowed_v, self.max_length, END, PAD)
        return self.decoder.generate(self._read(groups), rule, keys_b, temperature=temperature, top_k=top_k)

    def log_probs(self, groups: Mapping[str, TokenGroup], ids: jax.Array) -> jax.Array:
        """(B,) logarithms of the probability of texts (B, M), each up to its end."""
        ended = jnp.cumsum(ids == END, axis=-1) - (ids == END) > 0
        ids = jnp.where(ended, PAD, ids)
        return jnp.sum(jnp.where(ended, 0.0, self.decoder.log_probs(ids, self._read(groups))), axis=-1)

    def _read(self, groups: Mapping[str, TokenGroup]) -> TokenGroup:
        if self.readout not in groups:
            raise ValueError(f"text is read from group {self.readout!r}, but the transformer has {sorted(groups)}")
        return reading(groups, self.readout, self.reads, last_only=True)
