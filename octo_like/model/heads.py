"""Action heads behind one interface: `loss_terms` (sums, so that any split of a batch adds up) and `sample`.

Shapes: embedding (B, W, D); actions (B, W, H, A); sampled actions (*sample_shape, B, H, A), of the last timestep only.
Here is what all heads share, and regression; `generative.py` has diffusion and flow matching, `discrete.py` tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octo_like.common.parts import PartError, name_of
from octo_like.model.resized import Size, entries
from octo_like.model.tokens import TokenGroup, masked_mean
from octo_like.model.transformer import MapPooling


def action_mask(batch: Mapping, head: str, horizon: int, dim: int) -> jax.Array:
    """Which entries of (B, W, H, A) head `head` learns from: valid timestep, dimension, step and sample."""
    mask = jnp.asarray(batch["action_pad_mask"], bool)[:, :, :horizon, :dim]
    mask &= jnp.asarray(batch["observation"]["timestep_pad_mask"], bool)[:, :, None, None]
    learns = batch.get("action_head_mask", {}).get(head)
    return mask if learns is None else mask & jnp.asarray(learns, bool)[:, None, None, None]


def head_batch(batch: Mapping, name: str, head: "ActionHead") -> tuple[jax.Array, jax.Array]:
    """(action, mask) (B, W, H, A) that a head learns from, cut from a batch that is padded to the largest head.

    Raises:
      ValueError: chunks of the batch are smaller than the head's.
    """
    want, got = (head.action_horizon, head.action_dim), batch["action"].shape[-2:]
    if got[0] < want[0] or got[1] < want[1]:
        raise ValueError(
            f"head {name!r} predicts {want[0]} steps of {want[1]} dimensions, but the batch's actions have {got[0]} "
            f"steps of {got[1]}; batches are padded to the largest head, see BatchSpec.action_horizon and action_dim"
        )
    mask = action_mask(batch, name, *want)
    action = batch["action"][:, :, : want[0], : want[1]]
    # Generative heads read (noisy) actions: what is masked must not stand in them. The releases were trained with it.
    kept = mask | jnp.isfinite(action) if head.compat else mask
    return jnp.where(kept, action, 0.0), mask


def check_datasets(heads: Mapping[str, "ActionHead"], statistics: Mapping[str, Mapping]) -> list[str]:
    """Checks that every dataset's actions fit the head that learns from them.

    Args:
      statistics: dataset to its statistics, with the name of its head in "head" (or not, as in synthetic data).

    Returns:
      Heads that no dataset trains; none where the statistics do not say.

    Raises:
      ValueError: a dataset names no head of the model, or has more action dimensions than its head.
    """
    named = {name: entry["head"] for name, entry in statistics.items() if "head" in entry}
    for dataset, name in named.items():
        if name not in heads:
            raise ValueError(f"{dataset}: no action head {name!r}; valid: {sorted(heads)}")
        width = len(statistics[dataset]["action"]["mean"])
        if width > heads[name].action_dim:
            raise ValueError(
                f"{dataset}: its actions have {width} dimensions, but its head {name!r} has {heads[name].action_dim}; "
                f"set the head's action_dim to at least {width}, or give the dataset a head of its own"
            )
    return sorted(set(heads) - set(named.values())) if named or not statistics else []


class ActionHead(nn.Module):
    """What the heads share. A head of your own is a subclass with `loss_terms` and `sample` (docs/extending.md).

    Attributes:
      readout: token group that is read ("readout_action", or "obs" with `use_map`).
      use_map: pool the group by attention; otherwise by its mean.
      action_horizon, action_dim: H and A.
      max_action: bound on the magnitude of normalised actions.
      resized_from: sizes (action_horizon, action_dim) that the head had before, the oldest first; surgery sets it. What
        the head does for entries that it has had before stays bitwise the same, see `octo_like.model.resized`.
    """

    readout: str
    use_map: bool = False
    action_horizon: int = 1
    action_dim: int = 7
    max_action: float = 5.0
    resized_from: tuple[Size, ...] = ()
    compat: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def num_probes(self) -> int:
        """How many tokens of a timestep are read, each for itself; a head may say another number."""
        return 1

    def setup(self) -> None:
        if self.use_map:
            self.map_head = MapPooling(self.num_probes, self.compat, self.dtype)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes (H, A) that the head has had, the last is the present one."""
        return (*((h, a) for h, a in self.resized_from), (self.action_horizon, self.action_dim))

    def draw(
        self, sampler: Callable, keys_b: jax.Array, lead: tuple[int, ...], last: tuple[int, ...] = ()
    ) -> jax.Array:
        """(B, *lead, H * A, *last) numbers of `sampler(key, shape)` to act with; a row's depend on its own key only."""
        if (groups := entries(self.sizes)) is not None:
            return groups.draw(sampler, keys_b, lead, last)
        # Taken as groups are: what computes with the numbers is compiled apart from them and leaves their bits alone.
        count = self.action_horizon * self.action_dim
        drawn = jax.vmap(lambda key: sampler(key, (*lead, count, *last)))(keys_b)
        return jnp.take(drawn, np.arange(count), axis=1 + len(lead))

    @property
    def needed_group(self) -> str | None:
        """The one group that `sample` reads, at the last timestep; None: it needs them all."""
        return self.readout

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
        return tokens.mean(axis=-2) if self.compat else masked_mean(TokenGroup(tokens, mask))

    @property
    def draws_mask(self) -> bool:
        """Whether `learned_mask` leaves something out."""
        return False

    def learned_mask(self, mask: jax.Array, keys_b: jax.Array | None) -> jax.Array:
        """Which entries of `mask` (B, W, H, A) the loss is of, when `keys_b` are those of `loss_terms`; here all."""
        del keys_b
        return mask

    def check_guidance(self, guidance: Any) -> None:
        """Raises ValueError when `sample` cannot continue a previous chunk as a `Guidance` wants it; here never can."""
        raise ValueError(
            f"a {name_of(self)} cannot continue a previous chunk: it does not draw its actions from noise step by "
            "step. Valid: diffusion and flow heads; executors of others wait, switch or average (docs/deployment.md)"
        )

    def report_by_sample(self, loss: jax.Array, mask: jax.Array, batch_axis: int = 0) -> None:
        """Offers every sample's own mean loss for metrics; no gradient flows through it. Every `loss_terms` calls it.

        Args:
          loss: of each entry, 0 where the mask is; B is its axis `batch_axis`.
          mask: (B, W, H, A), of the entries that are learned from.

        Raises:
          PartError: the two do not speak of the same samples.
        """
        if mask.ndim < 1 or loss.ndim <= batch_axis or loss.shape[batch_axis] != mask.shape[0]:
            raise PartError(
                f"{name_of(self)}: report_by_sample was given a loss of shape {loss.shape}, whose axis {batch_axis} "
                f"should have one entry per sample, and a mask of {mask.shape}"
            )
        axes = tuple(axis for axis in range(loss.ndim) if axis != batch_axis)
        count = jnp.sum(mask, axis=tuple(range(1, mask.ndim)))
        self.sow("by_sample", "loss", jax.lax.stop_gradient(jnp.sum(loss, axis=axes) / jnp.maximum(count, 1.0)))
        self.sow("by_sample", "count", count)

    def _chunk(self, flat: jax.Array) -> jax.Array:
        return flat.reshape(*flat.shape[:-1], self.action_horizon, self.action_dim)


class RegressionHead(ActionHead):
    """Deterministic actions, squashed to [-max_action, max_action], with squared ("mse") or absolute ("l1") error."""

    loss: str = "mse"

    def setup(self) -> None:
        super().setup()
        if self.loss not in ("mse", "l1"):
            raise ValueError(f"unknown loss {self.loss!r}; valid: 'mse', 'l1'")
        groups = entries(self.sizes)
        dot = None if groups is None else groups.product_out
        self.mean_proj = nn.Dense(self.action_horizon * self.action_dim, dtype=self.dtype, dot_general=dot)

    def predict(self, groups: Mapping[str, TokenGroup], *, last_only: bool = False) -> jax.Array:
        """(B, W, H, A) float32."""
        raw = self._chunk(self.mean_proj(self.embed(groups, last_only=last_only))).astype(jnp.float32)
        return jnp.tanh(raw / self.max_action) * self.max_action

    def loss_terms(
        self, groups: Mapping[str, TokenGroup], action: jax.Array, mask: jax.Array, keys_b: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Masked sums of "loss" and "mse", times A as upstream; divide by the mask's count."""
        error = self.predict(groups) - action
        squared, weight = error**2, mask * self.action_dim
        loss = jnp.abs(error) if self.loss == "l1" else squared
        self.report_by_sample(loss * weight, mask)
        return {"loss": jnp.sum(loss * weight), "mse": jnp.sum(squared * weight)}

    def sample(
        self,
        groups: Mapping[str, TokenGroup],
        keys_b: jax.Array,
        *,
        sample_shape: tuple[int, ...] = (),
        valid: jax.Array | None = None,
        noise: Any = None,
    ) -> jax.Array:
        """(*sample_shape, B, H, A): the prediction, `sample_shape` times."""
        action = self.predict(groups, last_only=True)[:, -1]
        return jnp.broadcast_to(action, (*sample_shape, *action.shape))
