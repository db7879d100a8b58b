"""The state of training: everything a resumed run needs besides the position in the data."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from octo_like.training.optimizer import join_params, split_params


@flax.struct.dataclass
class TrainState:
    """
    Attributes:
      step: updates done (skipped ones included).
      trained: trained parameters, a flat dict by path.
      frozen: the other parameters; no gradient, no optimizer state.
      opt_state: of the trained parameters.
      ema: exponential moving average of the trained parameters.
      skipped: updates skipped because a gradient was not finite.
    """

    step: jax.Array
    trained: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    opt_state: optax.OptState
    ema: dict[str, jax.Array]
    skipped: jax.Array

    @property
    def params(self) -> dict[str, Any]:
        """The whole nested parameter tree."""
        return join_params(self.trained, self.frozen)

    @property
    def ema_params(self) -> dict[str, Any]:
        """The whole tree with averages in place of the trained parameters."""
        return join_params(self.ema, self.frozen)


def create_state(params: Mapping[str, Any], tx: optax.GradientTransformation, frozen: frozenset[str]) -> TrainState:
    """State at step 0."""
    trained, rest = split_params(params, frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        frozen=rest,
        opt_state=tx.init(trained),
        ema=jax.tree.map(jnp.copy, trained),
        skipped=jnp.zeros((), jnp.int32),
    )
