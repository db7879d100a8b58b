"""An auxiliary loss: where the things that the task names are in the image, told from a token group.

A policy that chooses among objects by their colour waits on a plateau until it happens to connect the word with the
thing; saying where the thing is connects them within a few hundred steps (docs/experiments.md). Nothing of it is
needed to act. Labels may be points or centres of boxes, from a simulator, a detector or people; what is not labelled is
masked.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octo_like.model.tokens import TokenGroup, masked_mean


class PointsHead(nn.Module):
    """A linear map from the mean of a group's tokens to the named points (an auxiliary regression).

    Attributes:
      readout: token group that is read, e.g. "readout_action", so that the action head finds the same there.
      names: of the points, in the order of the batch's.
    """

    readout: str
    names: tuple[str, ...]
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.project = nn.Dense(2 * len(self.names), dtype=self.dtype)

    def predict(self, groups: Mapping[str, TokenGroup]) -> jax.Array:
        """(B, W, K, 2) columns and rows as fractions of the image, float32."""
        if self.readout not in groups:
            raise ValueError(f"points are read from group {self.readout!r}, but the transformer has {sorted(groups)}")
        raw = self.project(masked_mean(groups[self.readout])).astype(jnp.float32)
        return 0.5 + 0.5 * raw.reshape(*raw.shape[:-1], len(self.names), 2)

    def mask(self, batch: Mapping) -> jax.Array:
        """(B, W, K) bool: labelled points of valid timesteps. None are, in a batch without labels."""
        valid = jnp.asarray(batch["observation"]["timestep_pad_mask"], bool)[..., None]
        return valid & jnp.asarray(batch.get("points_pad_mask", np.zeros(len(self.names), bool)), bool)

    def loss_terms(self, groups: Mapping[str, TokenGroup], batch: Mapping) -> dict[str, jax.Array]:
        """Masked sums of "loss" (squared error on the scale on which the image reaches from -1 to 1, per coordinate)
        and "error" (distance, as a fraction of the image's side); "count" is the number of points."""
        mask, predicted = self.mask(batch), self.predict(groups)
        target = jnp.where(mask[..., None], batch.get("points", 0.5), 0.5)
        squared = jnp.where(mask, jnp.sum((predicted - target) ** 2, axis=-1), 0.0)
        return {
            "loss": jnp.sum(2.0 * squared),  # 4 for the scale, 1/2 for the mean of two coordinates
            "error": jnp.sum(jnp.sqrt(jax.lax.stop_gradient(squared))),
            "count": jnp.sum(mask, dtype=jnp.float32),
        }
