"""A small causal transformer that says a sequence of ids, one after the other, and reads tokens of the model.

One decoder serves action tokens, answers and sub-tasks. In training it sees the sequence that it should have said
("teacher forcing"); to act it says one id, reads it, and goes on, with the keys and values of what it has said kept in
a cache. Both give the same logits.

Letters: N sequences, L their length, V ids of the vocabulary, M tokens that are read, D width, h heads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octo_like.model.tokens import TokenGroup, present
from octo_like.model.transformer import LN_EPSILON, Mlp, fold_in_all

Cache = tuple[jax.Array, jax.Array]  # keys and values (N, L, h, D / h) of what has been said


class Rule(Protocol):
    """What may be said next. A state is any tree of arrays (N, ...); ids and allowed ids are of one position."""

    def start(self, rows: int) -> Any:
        """The state before anything is said. Raises ValueError for a rule that leaves nothing to say."""

    def allowed(self, state: Any, position: jax.Array) -> jax.Array:
        """(N, V) or (1, V) bool, at least one True in a row."""

    def advance(self, state: Any, said: jax.Array, position: jax.Array) -> Any:
        """The state after `said` (N,) int32."""


def _is_known(values: Any) -> bool:
    return not isinstance(values, jax.core.Tracer)  # of values that are traced nothing can be said


class Places(NamedTuple):
    """A table: which ids may stand where.

    Attributes:
      table: (N or 1, L, V) bool.
    """

    table: jax.Array | np.ndarray

    def start(self, rows: int) -> tuple[()]:
        if _is_known(self.table) and not np.asarray(self.table).any(-1).all():
            row, place = np.argwhere(~np.asarray(self.table).any(-1))[0]
            raise ValueError(f"the rule of sequence {row} leaves no id for position {place}")
        return ()

    def allowed(self, state: Any, position: jax.Array) -> jax.Array:
        return jnp.asarray(self.table)[:, position]

    def advance(self, state: Any, said: jax.Array, position: jax.Array) -> tuple[()]:
        return ()


class UntilEnd(NamedTuple):
    """Anything of `words`, then `end`, then `pad` for ever; the last position is for the end.

    Attributes:
      words: (V,) bool, what may be said besides the end.
      length: L.
    """

    words: np.ndarray | jax.Array
    length: int
    end: int = 1
    pad: int = 0

    def start(self, rows: int) -> jax.Array:
        if _is_known(self.words) and not np.asarray(self.words).any():
            raise ValueError("none of the ids that may be said is a word: the rule leaves nothing but the end")
        return jnp.zeros(rows, bool)

    def allowed(self, state: jax.Array, position: jax.Array) -> jax.Array:
        ids = np.arange(len(self.words))
        going = jnp.where(position < self.length - 1, jnp.asarray(self.words | (ids == self.end)), ids == self.end)
        return jnp.where(state[:, None], ids == self.pad, going)

    def advance(self, state: jax.Array, said: jax.Array, position: jax.Array) -> jax.Array:
        return state | (said == self.end)


class Filling(NamedTuple):
    """Pieces of several lengths that fill a space exactly, in `most` pieces or fewer; then padding (id 0) for ever.

    Attributes:
      lengths: (V,) int, how much of the space a piece takes; 0 for the padding.
      space: how much there is to fill; it can be.
      most: L.
    """

    lengths: np.ndarray
    space: int
    most: int

    def fillable(self) -> np.ndarray:
        """(most + 1, space + 1) bool: whether so many pieces, or fewer, can fill exactly so much."""
        table = np.zeros((self.most + 1, self.space + 1), bool)
        table[:, 0] = True
        for pieces in range(1, self.most + 1):
            for length in np.unique(self.lengths[(self.lengths > 0) & (self.lengths <= self.space)]):
                table[pieces, length:] |= table[pieces - 1, : self.space + 1 - length]
        return table

    def start(self, rows: int) -> jax.Array:
        if not self.fillable()[self.most, self.space]:
            raise ValueError(
                f"the rule leaves no id: up to {self.most} pieces of these lengths cannot fill {self.space}"
            )
        return jnp.full(rows, self.space, jnp.int32)

    def allowed(self, state: jax.Array, position: jax.Array) -> jax.Array:
        rest = state[:, None] - jnp.asarray(self.lengths)
        can_go_on = jnp.asarray(self.fillable())[self.most - 1 - position, jnp.maximum(rest, 0)]
        fits = (self.lengths > 0) & (rest >= 0) & can_go_on
        return jnp.where(state[:, None] > 0, fits, np.arange(len(self.lengths)) == 0)

    def advance(self, state: jax.Array, said: jax.Array, position: jax.Array) -> jax.Array:
        return state - jnp.asarray(self.lengths, jnp.int32)[said]


class Attention(nn.Module):
    """Multi-head attention whose keys and values are made apart from its queries, so that they can be kept."""

    width: int
    num_heads: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        dense = lambda: nn.Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())  # noqa: E731
        self.query, self.key, self.value, self.out = dense(), dense(), dense(), dense()

    def keys_values(self, x_nld: jax.Array) -> Cache:
        """Keys and values (N, L, h, D / h)."""
        return self._heads(self.key(x_nld)), self._heads(self.value(x_nld))

    def __call__(self, x_nld: jax.Array, keys_values: Cache, mask: jax.Array) -> jax.Array:
        """(N, L, D) of queries (N, L, D); `mask` (N or 1, L or 1, M) bool says what each may see."""
        # Keys and values have the sequences' rows, or one for a group of neighbouring rows (several samples).
        k, v = (jnp.repeat(t, x_nld.shape[0] // t.shape[0], axis=0) for t in keys_values)
        mask = jnp.repeat(mask, x_nld.shape[0] // mask.shape[0], axis=0) if mask.shape[0] != 1 else mask
        mask = jnp.broadcast_to(mask[:, None], (mask.shape[0], 1, x_nld.shape[1], k.shape[1]))
        out = jax.nn.dot_product_attention(self._heads(self.query(x_nld)), k, v, mask=mask)
        return self.out(out.reshape(x_nld.shape))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, self.width // self.num_heads)


class DecoderBlock(nn.Module):
    """What was said before, then the tokens that are read, then an MLP; layer norms before, residuals around each."""

    width: int
    num_heads: int
    mlp_dim: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        norm = lambda: nn.LayerNorm(epsilon=LN_EPSILON, dtype=self.dtype)  # noqa: E731
        self.norm_said, self.norm_reading, self.norm_mlp = norm(), norm(), norm()
        self.said = Attention(self.width, self.num_heads, self.dtype)
        self.reading = Attention(self.width, self.num_heads, self.dtype)
        self.mlp = Mlp(self.mlp_dim, dtype=self.dtype)

    def __call__(self, x_nld: jax.Array, read: Cache, read_mask: jax.Array) -> jax.Array:
        """All positions at once, each seeing itself and those before."""
        h = self.norm_said(x_nld)
        causal = jnp.tril(jnp.ones((1, x_nld.shape[1], x_nld.shape[1]), bool))
        return self._rest(x_nld + self.said(h, self.said.keys_values(h), causal), read, read_mask)

    def step(
        self, x_n1d: jax.Array, cache: Cache, position: jax.Array, read: Cache, read_mask: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """One position, whose keys and values enter the cache."""
        h = self.norm_said(x_n1d)
        new = self.said.keys_values(h)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, one, position, axis=1) for old, one in zip(cache, new, strict=True)
        )
        seen = (jnp.arange(keys.shape[1]) <= position)[None, None]
        return self._rest(x_n1d + self.said(h, (keys, values), seen), read, read_mask), (keys, values)

    def _rest(self, x, read, read_mask):
        x = x + self.reading(self.norm_reading(x), read, read_mask)
        return x + self.mlp(self.norm_mlp(x))


class TokenDecoder(nn.Module):
    """Ids one after the other, given tokens that are read by cross-attention (Vaswani et al. 2017, the decoder).

    Attributes:
      vocab_size: V.
      max_length: L.
      width, num_layers, num_heads, mlp_dim: of the blocks; mlp_dim 0 is four times the width.
    """

    vocab_size: int
    max_length: int
    width: int = 256
    num_layers: int = 2
    num_heads: int = 4
    mlp_dim: int = 0
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        for name in ("vocab_size", "max_length", "width", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"a decoder's {name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"a decoder's width {self.width} is not divisible by its {self.num_heads} heads")
        # One row more than ids: what is read before anything has been said.
        self.embedding = nn.Embed(self.vocab_size + 1, self.width, dtype=self.dtype)
        self.positions = self.param("positions", nn.initializers.normal(0.02), (self.max_length, self.width))
        mlp_dim = self.mlp_dim or 4 * self.width
        self.blocks = [DecoderBlock(self.width, self.num_heads, mlp_dim, self.dtype) for _ in range(self.num_layers)]
        self.norm = nn.LayerNorm(epsilon=LN_EPSILON, dtype=self.dtype)
        self.logits = nn.Dense(self.vocab_size, dtype=self.dtype)

    def __call__(self, ids_nl: jax.Array, read: TokenGroup) -> jax.Array:
        """Logits (N, L, V) float32 of every id, given those before it.

        Args:
          ids_nl: int32, of which the last is not read.
          read: tokens (N, M, .) with their mask.
        """
        self._check_length(ids_nl.shape[1])
        start = jnp.full_like(ids_nl[:, :1], self.vocab_size)
        x = self.embedding(jnp.concatenate([start, ids_nl[:, :-1]], axis=1))
        x = x + self.positions[: ids_nl.shape[1]].astype(self.dtype)
        for block, kept in zip(self.blocks, self._read(read), strict=True):
            x = block(x, kept, read.mask[:, None])
        return self.logits(self.norm(x)).astype(jnp.float32)

    def log_probs(self, ids_nl: jax.Array, read: TokenGroup) -> jax.Array:
        """(N, L) natural logarithms of the probability of every id, given those before it and what is read."""
        return jnp.take_along_axis(jax.nn.log_softmax(self(ids_nl, read)), ids_nl[..., None], axis=-1)[..., 0]

    def generate(
        self,
        read: TokenGroup,
        rule: Rule,
        keys: jax.Array | None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        length: int | None = None,
    ) -> jax.Array:
        """Says (N, L) int32 ids, in one `jax.lax.scan`.

        Args:
          read: tokens (N, M, .) with their mask, or of (N / n) rows, each of which n neighbouring sequences read.
          rule: what may be said where.
          keys: (N,) keys of the draws; a sequence depends on its own only. None at temperature 0.
          temperature: 0 says the likeliest id; else ids are drawn from softmax(logits / temperature).
          top_k: draw among the k likeliest that are allowed, of equally likely ones the lowest ids; 0: among all.
          length: of the sequences, at most (and by default) max_length.
        """
        length = self.max_length if length is None else length
        self._check_length(length)
        if temperature < 0 or top_k < 0:
            raise ValueError(f"temperature and top_k must not be negative, got {temperature}, {top_k}")
        if temperature > 0 and keys is None:
            raise ValueError(f"temperature {temperature} draws: keys are needed")
        rows = read.tokens.shape[0] if keys is None else keys.shape[0]
        positions = jnp.asarray(self.positions, self.dtype)
        kept, mask = self._read(read), read.mask[:, None]
        empty = jnp.zeros((rows, length, self.num_heads, self.width // self.num_heads), self.dtype)

        def step(carry, position):
            before, caches, state = carry
            x = self.embedding(before[:, None]) + positions[position]
            grown = []
            for block, cache, one in zip(self.blocks, caches, kept, strict=True):
                x, cache = block.step(x, cache, position, one, mask)
                grown.append(cache)
            logits = self.logits(self.norm(x)).astype(jnp.float32)[:, 0]
            logits = jnp.where(rule.allowed(state, position), logits, -jnp.inf)
            said = choose(logits, fold_in_all(keys, position), temperature, top_k)
            return (said, grown, rule.advance(state, said, position)), said

        start = jnp.full(rows, self.vocab_size, jnp.int32)
        carry = (start, [(empty, empty)] * self.num_layers, rule.start(rows))
        return jax.lax.scan(step, carry, jnp.arange(length))[1].T

    def _read(self, read: TokenGroup) -> Sequence[Cache]:
        """Keys and values of the tokens that are read, for every block: they do not change while ids are said."""
        tokens = present(read).tokens.astype(self.dtype)
        return [block.reading.keys_values(tokens) for block in self.blocks]

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(f"a sequence of {length} ids, but this decoder was made for at most {self.max_length}")


def choose(logits: jax.Array, keys: jax.Array | None, temperature: float, top_k: int) -> jax.Array:
    """(N,) int32 of logits (N, V), -inf for what may not be said: the likeliest, or drawn (the Gumbel trick)."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k:
        chosen = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[1]  # of equal ones those with the lowest ids
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = jnp.full_like(logits, -jnp.inf).at[rows, chosen].set(jnp.take_along_axis(logits, chosen, axis=-1))
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits / temperature + gumbel, axis=-1).astype(jnp.int32)
