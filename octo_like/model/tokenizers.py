"""Tokenizers: parts of a batch to token groups (before projection to the transformer's width).

Every tokenizer returns a TokenGroup with tokens (B, [W,] n, F), or None when the batch holds none of its inputs. With
`compat=True` it reproduces the masks of the Octo releases; otherwise a token is valid iff its input is there.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octo_like.model.parts import check_features
from octo_like.model.stems import normalize_depth, normalize_images
from octo_like.model.t5 import T5Config, T5Encoder
from octo_like.model.tokens import TokenGroup, masked_mean, present, valid_mask
from octo_like.model.transformer import MapPooling, Mlp, Transformer

# Under this key an observation may hold {sensor: (B, W) bool, False: missing} for tokens of the releases, which are
# always valid there. They are masked where all sensors that make them are missing; the zeros of one among several stay.
DECLARED = "present_sensors"
NGRAM = 3  # neighbouring words that `pool="ngrams"` reads together


def match_keys(tree: Mapping[str, Any], patterns: tuple[str, ...], *, prefix: bool) -> list[str]:
    """Sorted keys of `tree` that match any regex; `prefix` anchors at the start only (as upstream)."""
    match = re.match if prefix else re.fullmatch
    return sorted(key for key in tree if any(match(pattern, key) for pattern in patterns))


class TokenLearner(nn.Module):
    """Pools tokens (..., n, D) to (..., `num_tokens`, D) by attention (Ryoo et al. 2021, MAP pooling as in Octo)."""

    num_tokens: int
    uniform_when_masked: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        pos = self.param("pos_embed", nn.initializers.normal(0.02), tokens.shape[-2:])
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="LayerNorm_0")(tokens + pos.astype(tokens.dtype))
        return MapPooling(self.num_tokens, self.uniform_when_masked, self.dtype, name="MAPHead_0")(h)


class ImageTokenizer(nn.Module):
    """Cameras (B, W, h, w, 3) to tokens (B, W, n, F); goal images (B, h, w, 3) are stacked on the channels ("early goal
    fusion").

    Attributes:
      stem: constructor of the encoder, with its options and name bound.
      obs_keys: regexes of observation keys, stacked along channels in alphabetical order.
      goal_keys: regexes of goal images. A goal that is missing is zero after normalisation (compat: a black image).
      film_keys: what conditions the stem, concatenated: "task" (the mean of all tokens of the task), "task_<tokenizer>"
        (the mean of one group's), or names of task arrays (B, d).
      num_learned_tokens: reduce to this many tokens by a TokenLearner; 0 keeps all.
      normalization: "default" or "imagenet".
    """

    stem: Callable[..., nn.Module]
    obs_keys: tuple[str, ...]
    goal_keys: tuple[str, ...] = ()
    film_keys: tuple[str, ...] = ()
    num_learned_tokens: int = 0
    normalization: Literal["default", "imagenet"] = "default"
    use_pad_mask: bool = True
    compat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], summaries: Mapping[str, jax.Array] | None = None
    ) -> TokenGroup | None:
        keys = match_keys(observation, self.obs_keys, prefix=self.compat)
        if not keys:
            return None
        b, w, *size = observation[keys[0]].shape
        images = [self._observed(observation, key) for key in keys]
        goal_keys = match_keys(observation, self.goal_keys, prefix=self.compat)
        extra = [k for k in match_keys(task, self.goal_keys, prefix=self.compat) if k not in goal_keys]
        for key in sorted(goal_keys + extra):
            reference = observation[key] if key in observation else observation[keys[0]]
            images.append(self._goal(task, key, reference))
        # One stem pass over all frames of the batch.
        x = jnp.concatenate(images, axis=-1).reshape(b * w, *size[:-1], -1)
        condition = self._condition(task, summaries, w)
        stem = self.stem(dtype=self.dtype)
        x = stem(x, condition)
        check_features(x, stem, f"the stem of tokenizer {self.name!r}", b * w)
        tokens = x.reshape(b, w, -1, x.shape[-1])
        mask = jnp.ones((b, w), bool)
        pads = observation.get("pad_mask_dict", {})
        if self.use_pad_mask and all(key in pads for key in keys):
            mask = jnp.stack([jnp.asarray(pads[key], bool) for key in keys]).any(0)
        if self.num_learned_tokens:
            there = mask & jnp.asarray(observation.get("timestep_pad_mask", True), bool)
            there = jnp.broadcast_to(there[..., None], tokens.shape[:-1])
            tokens = present(TokenGroup(tokens, there), compat=self.compat).tokens
            tokens = TokenLearner(self.num_learned_tokens, self.compat, self.dtype, name="TokenLearner_0")(tokens)
        return TokenGroup(tokens, jnp.broadcast_to(mask[..., None], tokens.shape[:-1]))

    def _observed(self, observation, key):
        if self.compat:
            return normalize_images(observation[key], self.normalization)
        image = observation[key]
        image = normalize_depth(image) if key.startswith("depth_") else normalize_images(image, self.normalization)
        valid = valid_mask(observation, key, image.shape[:2])
        return jnp.where(valid[..., None, None, None], image, 0.0)

    def _goal(self, task, key, observed):
        b, w = observed.shape[:2]
        if key in task:
            goal, valid = normalize_images(task[key], self.normalization), valid_mask(task, key, (b,))
        else:
            goal = normalize_images(jnp.zeros((b, *observed.shape[2:]), jnp.uint8), self.normalization)
            valid = jnp.zeros(b, bool)
        if not self.compat:
            goal = jnp.where(valid[:, None, None, None], goal, 0.0)
        return jnp.broadcast_to(goal[:, None], (b, w, *goal.shape[1:]))

    def _condition(self, task, summaries, window):
        if not self.film_keys:
            return None
        summaries, parts = summaries or {}, []
        for key in self.film_keys:
            if key not in summaries and key not in task:
                raise ValueError(
                    f"film_keys: this model's task has no {key!r}; valid: {sorted(summaries)}, or an array of the task"
                )
            parts.append(summaries[key] if key in summaries else task[key])
        condition = jnp.concatenate(parts, axis=-1)
        return jnp.repeat(condition, window, axis=0)


class LanguageTokenizer(nn.Module):
    """Instructions (B, L) to tokens (B, L, d), or (B, 1, d) when pooled.

    Attributes:
      key: the text of the task that is read: "language_instruction", or "subtask".
      encoder: "t5" (a T5 encoder), "small" (own embeddings and transformer, trained with the policy), or "embedding"
        (the batch holds precomputed (B, d) or (B, n, d) features).
      finetune_encoder: whether gradients reach a T5 encoder.
      encoder_dtype: dtype in which a frozen T5 encoder is kept and computed ("bfloat16" halves its memory and, on
        accelerators, its time); None: float32 parameters, computed in the model's dtype.
      vocab_size, dim, num_layers, num_heads: sizes of the "small" encoder.
      pool: one token instead of one per word. True or "mean": an MLP of the normalised mean over the words, a bag that
        cannot tell who is on whom; "ngrams": what neighbouring words say together, the strongest wherever it stands.
    """

    key: str = "language_instruction"
    encoder: str = "small"
    t5: T5Config | None = None
    finetune_encoder: bool = False
    encoder_dtype: str | None = None
    vocab_size: int = 0
    dim: int = 128
    num_layers: int = 1
    num_heads: int = 4
    max_length: int = 16
    pool: bool | str = False
    use_pad_mask: bool = True
    compat: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def is_frozen(self) -> bool:
        """Whether what the encoder says about a text never changes in training."""
        return self.encoder == "t5" and not self.finetune_encoder

    @nn.compact
    def __call__(
        self,
        observation: Mapping[str, Any] | None,
        task: Mapping[str, Any],
        summaries: Mapping[str, jax.Array] | None = None,
        *,
        encode_only: bool = False,
    ) -> TokenGroup | jax.Array | None:
        """`encode_only` returns the encoder's (B, L, d) features; in a task they stand under
        language_instruction/encoded/{name of this module} and are not computed again."""
        if self.key not in ("language_instruction", "subtask"):
            raise ValueError(f"unknown text {self.key!r} of a task; valid: 'language_instruction', 'subtask'")
        if self.key not in task:
            return None
        text = task[self.key]
        if self.encoder == "embedding":
            if isinstance(text, Mapping):
                raise ValueError(
                    "this model takes precomputed language embeddings (B, [n,] d), the task holds token ids"
                )
            tokens = text if text.ndim == 3 else text[:, None]
            word_mask = jnp.ones(tokens.shape[:2], bool)
        else:
            word_mask = text["attention_mask"] > 0
            tokens = text.get("encoded", {}).get(self.name)
            if tokens is None:
                tokens = self._encode(text["input_ids"], word_mask)
        if encode_only:
            return tokens
        tokens = tokens.astype(self.dtype)
        if self.pool:
            tokens, word_mask = self._pooled(tokens, word_mask), word_mask.any(-1, keepdims=True)
        mask = jnp.ones(tokens.shape[:1], bool)
        if self.use_pad_mask:
            mask = valid_mask(task, self.key, tokens.shape[:1])
        mask = jnp.broadcast_to(mask[:, None], tokens.shape[:2])
        return TokenGroup(tokens, mask if self.compat else mask & word_mask)

    def _pooled(self, tokens, word_mask):
        """(B, n, d) to (B, 1, d): the mean, normalised because the one word that matters is a tenth of it, and an MLP
        that may conclude from several words (deep averaging network, Iyyer et al. 2015)."""
        norm = lambda name: nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)  # noqa: E731
        if self.pool == "ngrams":
            return norm("pool_out_norm")(self._ngrams(tokens, word_mask))
        if self.pool not in (True, "mean"):
            raise ValueError(f"unknown pool {self.pool!r}; valid: False, 'mean' (or True), 'ngrams'")
        x = norm("pool_norm")(masked_mean(TokenGroup(tokens, word_mask))[:, None])
        return norm("pool_out_norm")(x + Mlp(4 * x.shape[-1], dtype=self.dtype, name="pool_mlp")(x))

    def _ngrams(self, tokens, word_mask):
        """(B, n, d) to (B, 1, d): a convolution over words, its largest value over all places, a layer (Kim 2014)."""
        x = jnp.where(word_mask[..., None], tokens, 0)
        padded = jnp.pad(x, ((0, 0), (0, NGRAM - 1), (0, 0)))
        neighbours = jnp.concatenate([padded[:, i : i + x.shape[1]] for i in range(NGRAM)], axis=-1)
        grams = jax.nn.gelu(nn.Dense(2 * x.shape[-1], dtype=self.dtype, name="ngrams")(neighbours))
        # GELU is above -1 everywhere: what is masked never wins, and no word at all is a constant.
        strongest = jnp.max(jnp.where(word_mask[..., None], grams, -1.0), axis=1, keepdims=True)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="ngrams_out")(strongest)

    def _encode(self, ids, word_mask):
        if self.encoder == "t5":
            if self.t5 is None:
                raise ValueError("a T5 encoder needs its sizes: t5=T5Config(...)")
            if self.encoder_dtype is not None and self.finetune_encoder:
                raise ValueError("encoder_dtype is for frozen encoders; one that is trained keeps float32 parameters")
            kept = jnp.dtype(self.encoder_dtype or "float32")
            computed = self.dtype if self.encoder_dtype is None else kept
            tokens = T5Encoder(self.t5, computed, kept, name="hf_model")(ids, word_mask)
            return tokens if self.finetune_encoder else jax.lax.stop_gradient(tokens)
        if self.encoder != "small":
            raise ValueError(f"unknown language encoder {self.encoder!r}; valid: 't5', 'small', 'embedding'")
        if not self.compat:
            # A padding id must not matter, whatever it is.
            ids = jnp.where(word_mask, ids, 0)
        x = nn.Embed(self.vocab_size, self.dim, embedding_init=nn.initializers.normal(1.0), name="embedding")(ids)
        pos = self.param("pos_embedding", nn.initializers.normal(0.1), (1, self.max_length, self.dim))
        x = (x + pos[:, : ids.shape[1]]).astype(self.dtype)
        length = ids.shape[1]
        mask = jnp.broadcast_to(word_mask[:, None], (ids.shape[0], length, length))
        return Transformer(self.num_layers, self.num_heads, 4 * self.dim, dtype=self.dtype, name="encoder")(x, mask)


def bin_thresholds(num_bins: int, kind: str, low: float, high: float) -> np.ndarray:
    """(num_bins + 1,) edges: evenly spaced on [low, high], or quantiles of the standard normal ("normal")."""
    if kind == "uniform":
        return np.linspace(low, high, num_bins + 1, dtype=np.float32)
    if kind == "normal":
        with jax.ensure_compile_time_eval():  # constants, also while tracing
            return np.asarray(jax.scipy.stats.norm.ppf(jnp.linspace(1e-6, 1 - 1e-6, num_bins + 1)))
    raise ValueError(f"unknown bin type {kind!r}; valid: 'uniform', 'normal'")


def bin_index(x: jax.Array, num_bins: int, kind: str, low: float, high: float, *, compat: bool) -> jax.Array:
    """Index of the bin that holds x, of the same shape; values outside the range go to the nearest bin.

    compat: with "normal" bins, values above the last threshold go to bin 0, as upstream.
    """
    edges = bin_thresholds(num_bins, kind, low, high)
    if kind == "uniform":
        x = jnp.clip(x, low + 1e-6, high - 1e-6)
    index = jnp.searchsorted(edges, x, side="right") - 1
    if compat:
        return jnp.where((index < 0) | (index >= num_bins), 0, index)
    return jnp.clip(index, 0, num_bins - 1)


class LowdimTokenizer(nn.Module):
    """Proprioception and other low-dimensional observations (B, W, d) to tokens (B, W, n, F).

    Attributes:
      obs_keys: regexes of (B, W, d) observations, concatenated.
      per: "scalar" gives one token per entry, "vector" one token for all (entries and their validity).
      discretize: one-hot bins instead of the value ("scalar" only).
      entries: which entries of the concatenated vector are read; None: all. In demonstrations the hand's own place
        tells where the expert is going; a policy that reads it learns to go on instead of to look. Leave it out.
    """

    obs_keys: tuple[str, ...]
    per: str = "vector"
    discretize: bool = False
    num_bins: int = 256
    bin_type: str = "uniform"
    low: float = 0.0
    high: float = 1.0
    compat: bool = False
    dtype: jnp.dtype = jnp.float32
    entries: tuple[int, ...] | None = None

    @nn.compact
    def __call__(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], summaries: Mapping[str, jax.Array] | None = None
    ) -> TokenGroup | None:
        keys: list[str] = []
        for pattern in self.obs_keys:
            found = match_keys(observation, (pattern,), prefix=self.compat)
            keys += [key for key in found if not key.endswith("pad_mask") and key not in keys]
        if not keys:
            return None
        values = [jnp.asarray(observation[key], jnp.float32) for key in keys]
        x = jnp.concatenate(values, axis=-1)
        if self.compat:
            # Tokens of the releases know no mask, but a policy's caller may say that a sensor is missing.
            there = observation.get(DECLARED)
            valid = jnp.ones(x.shape[:2], bool)
            if there is not None:
                valid = jnp.stack([jnp.asarray(there[key], bool) for key in keys]).any(0)
            valid = jnp.broadcast_to(valid[..., None], x.shape)
        else:
            valid = jnp.concatenate(
                [self._valid(observation, key, v.shape) for key, v in zip(keys, values, strict=True)], -1
            )
            x = jnp.where(valid, x, 0.0)
        if self.entries is not None:
            if not all(0 <= entry < x.shape[-1] for entry in self.entries):
                raise ValueError(
                    f"entries {self.entries} of {', '.join(keys)}: there are {x.shape[-1]}, counted from 0"
                )
            x, valid = x[..., self.entries], valid[..., self.entries]
        if self.per == "vector":
            tokens = jnp.concatenate([x, valid.astype(x.dtype)], axis=-1)[..., None, :]
            return TokenGroup(tokens, valid.any(-1, keepdims=True))
        if self.per != "scalar":
            raise ValueError(f"unknown low-dim token layout {self.per!r}; valid: 'vector', 'scalar'")
        if self.discretize:
            index = bin_index(x, self.num_bins, self.bin_type, self.low, self.high, compat=self.compat)
            return TokenGroup(jax.nn.one_hot(index, self.num_bins), valid)
        return TokenGroup(x[..., None], valid)

    def _valid(self, observation, key, shape):
        valid = jnp.broadcast_to(valid_mask(observation, key, shape[:2])[..., None], shape)
        dims = observation.get(f"{key}_pad_mask")
        return valid if dims is None else valid & jnp.asarray(dims, bool)
