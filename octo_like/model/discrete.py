"""Actions as tokens: bins, and the head that predicts them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octo_like.common.checks import BIN_TYPES, BOUNDED_BINS
from octo_like.model.heads import ActionHead
from octo_like.model.tokenizers import bin_index, bin_thresholds
from octo_like.model.tokens import TokenGroup

Range = float | tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class ActionBins:
    """Classes of action entries, another range per dimension.

    Attributes:
      edges: (A, n) float32, ascending: an action's class is the last one whose edge is not above it.
      values: (A, bins) float32, the action that each class stands for.
      kind: see `DiscreteHead`.
      compat: values outside of normal bins as upstream; see `bin_index`.
    """

    edges: np.ndarray
    values: np.ndarray
    kind: str
    compat: bool = False

    @classmethod
    def make(
        cls, num_bins: int, kind: str, low: Range, high: Range, max_action: float, action_dim: int, *, compat: bool
    ) -> "ActionBins":
        """Arguments as the attributes of `DiscreteHead`. Raises ValueError for a range or bins that are none."""
        if kind not in BIN_TYPES:
            raise ValueError(f"unknown bin_type {kind!r}; valid: {', '.join(map(repr, BIN_TYPES))}")
        if kind == "normal" and not (low is None and high is None):
            raise ValueError("low and high are the range of other bins; normal bins have none")
        least = 2 if kind in BOUNDED_BINS else 1
        if num_bins < least:
            raise ValueError(f"num_bins={num_bins}: {kind} bins are at least {least}")
        bound = 1.0 if kind in BOUNDED_BINS else max_action
        ranges = []
        for name, value, default in (("low", low, -bound), ("high", high, bound)):
            values = np.asarray(default if value is None else value, np.float64)
            if values.ndim > 1 or values.size not in (1, action_dim):
                raise ValueError(f"{name} needs one number or {action_dim}, one per dimension, got {value}")
            ranges.append(np.broadcast_to(values, action_dim))
        made = []
        for d, pair in enumerate(zip(*ranges, strict=True)):
            if not np.float32(pair[0]) < np.float32(pair[1]):
                raise ValueError(
                    f"bins of action dimension {d} span [{pair[0]}, {pair[1]}]: low must be less than high"
                )
            if kind == "openvla":
                made.append(_openvla(num_bins, *pair))
            elif kind in ("rt1", "rt2"):
                made.append(_rt1(num_bins, *pair))
            else:
                edges = bin_thresholds(num_bins, kind, *pair)
                made.append((edges, (edges[1:] + edges[:-1]) / 2))
        edges, values = (np.stack(part) for part in zip(*made, strict=True))
        return cls(edges, values, kind, compat)

    def index(self, action: jax.Array) -> jax.Array:
        """(..., A) actions to int32 bins; values outside of the range are in the nearest one."""
        num_bins = self.values.shape[1]
        if self.compat and self.kind not in BOUNDED_BINS:
            low, high = (float(self.edges[0, i]) for i in (0, -1))
            return bin_index(action, num_bins, self.kind, low, high, compat=True)
        search = lambda edges, x: jnp.searchsorted(edges, x, side="right") - 1  # noqa: E731
        index = jax.vmap(search, in_axes=(0, -1), out_axes=-1)(jnp.asarray(self.edges), action)
        return jnp.clip(index, 0, num_bins - 1)

    def centre(self, index: jax.Array) -> jax.Array:
        """(..., A) bins to the actions that they stand for."""
        return jnp.asarray(self.values)[jnp.arange(len(self.values)), index]


def _openvla(num_bins: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges and values of one dimension. OpenVLA compares with edges of double precision."""
    edges = np.linspace(low, high, num_bins)
    centres = (edges[:-1] + edges[1:]) / 2
    near = edges.astype(np.float32)
    # A float32 is not below an edge if and only if it is not below the next float32 from the edge on.
    up = np.where(near < edges, np.nextafter(near, np.float32(np.inf)), near)
    return up, np.append(centres, centres[-1]).astype(np.float32)


def _rt1(num_bins: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges and values of one dimension. RT-1 computes in float32, so an edge is the least float32 of its class, which
    bisection finds; a compiler that multiplies by a reciprocal would round otherwise."""
    first, last, steps = np.float32(low), np.float32(high), np.float32(num_bins - 1)
    classes = np.arange(num_bins, dtype=np.int32)

    def order(x: np.float32) -> int:  # of all float32, from the least to the greatest, 0 for zero
        bits = int(np.abs(x).view(np.int32))
        return -bits if x < 0 else bits

    below, found = (np.full(num_bins, order(x), np.int64) for x in (first, last))
    while (below < found).any():
        middle = (below + found) // 2
        x = np.where(middle < 0, np.float32(-1), np.float32(1)) * np.abs(middle).astype(np.int32).view(np.float32)
        reached = ((x - first) / (last - first) * steps).astype(np.int32) >= classes
        below, found = np.where(reached, below, middle + 1), np.where(reached, middle, found)
    edges = np.where(found < 0, np.float32(-1), np.float32(1)) * np.abs(found).astype(np.int32).view(np.float32)
    return edges, classes.astype(np.float32) / steps * (last - first) + first


class DiscreteHead(ActionHead):
    """Actions as classes, one per dimension and step (RT-1, Brohan et al. 2022; OpenVLA, Kim et al. 2024).

    Given the embedding, the entries of a chunk are independent: each has the right distribution, but where the data
    choose between two chunks, a sample may mix them. Diffusion and flow matching do not.

    Attributes:
      num_bins: classes per entry.
      bin_type: what the classes are. Actions outside of the range have the class of its nearest end.
        "uniform" (the default): num_bins of equal width fill [low, high]; a class stands for its centre.
        "normal": equally likely under a standard normal; a class stands for its centre.
        "openvla": OpenVLA's. num_bins edges, num_bins - 1 bins between them: class i begins at edge i, the last one is
          `high` and above alone, and stands as the one before it for the centre of the last bin. Its token of a
          vocabulary of V words is V - 1 - i.
        "rt1", "rt2": RT-1's, which RT-2 uses as well: class floor((a - low) / (high - low) (num_bins - 1)), in float32,
          stands for low + i / (num_bins - 1) (high - low), the lower end of its bin; the last one is `high` and above.
      low, high: range of the bins, one number or one per action dimension; None: -max_action, max_action, and -1, 1 of
        the named binnings of other policies, whose actions are scaled to their bounds. Normal bins have none.
      token_per: what an embedding is read for: "" (the chunk), "action_horizon" (a step) or
        "action_dim_and_action_horizon" (an entry). The readout must have as many tokens, unless `use_map` makes them.
      temperature: of sampling; 0 takes the most likely class.
    """

    num_bins: int = 256
    bin_type: str = "uniform"
    low: Range = None
    high: Range = None
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
        self.bins = ActionBins.make(
            self.num_bins, self.bin_type, self.low, self.high, self.max_action, self.action_dim, compat=self.compat
        )
        total = self.action_horizon * self.action_dim * self.num_bins
        self.vocab_proj = nn.Dense(total // self.num_probes, dtype=self.dtype)

    def logits(self, groups: Mapping[str, TokenGroup], *, last_only: bool = False) -> jax.Array:
        """(B, W, H, A, bins) float32."""
        out = self.vocab_proj(self.embed(groups, last_only=last_only)).astype(jnp.float32)
        return out.reshape(*out.shape[:2], self.action_horizon, self.action_dim, self.num_bins)

    def to_bins(self, action: jax.Array) -> jax.Array:
        """(..., A) actions to int32 bins."""
        return self.bins.index(action)

    def from_bins(self, index: jax.Array) -> jax.Array:
        """(..., A) bins to the actions that they stand for."""
        return self.bins.centre(index)

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
        numbers = jnp.isfinite(logits).all(-1)  # argmax finds a bin in NaN too
        if self.temperature == 0:
            action = jnp.where(numbers, self.from_bins(jnp.argmax(logits, axis=-1)), jnp.nan)
            return jnp.broadcast_to(action, (*sample_shape, *action.shape))
        gumbel = jnp.moveaxis(
            self.draw(jax.random.gumbel, keys_b, sample_shape, (self.num_bins,)), 0, len(sample_shape)
        )
        gumbel = gumbel.reshape(*sample_shape, *logits.shape)
        return jnp.where(numbers, self.from_bins(jnp.argmax(logits / self.temperature + gumbel, axis=-1)), jnp.nan)
