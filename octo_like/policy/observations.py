"""Looks at what a policy is given before it reads it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octo_like.common.schema import Leaf, flatten


def array_module(*likes: Any) -> Any:
    """NumPy, or while a program is traced jax.numpy: the batch size may then be a symbol, which NumPy cannot handle.

    What is done to concrete values outside the jitted programs is done in NumPy: operations of jax.numpy would be
    compiled one by one, for every shape, when a robot waits for its first actions.
    """
    return jnp if any(isinstance(like, jax.core.Tracer) for like in likes) else np


def check_finite(key: str, values: Any, timestep_pad_mask: Any, pad_mask: Any) -> None:
    """Raises ValueError for a sensor that says NaN or infinity at a timestep that counts."""
    if isinstance(values, jax.core.Tracer) or not np.issubdtype(np.asarray(values).dtype, np.floating):
        return
    counts = np.asarray(timestep_pad_mask) & (True if pad_mask is None else np.asarray(pad_mask))
    finite = np.isfinite(np.asarray(values))
    if finite.shape[:2] != counts.shape:
        return  # refused by its shape, with what would be valid
    bad = np.argwhere(~finite.reshape(*counts.shape, -1).all(-1) & counts)
    if len(bad):
        row, timestep = bad[0].tolist()
        raise ValueError(f"observation/{key}: NaN or infinite values in row {row}, timestep {timestep} of the window")


def with_window(leaf: Any, window: int) -> Any:
    """A spec's leaves for a window of another length."""
    if isinstance(leaf, Mapping):
        return {key: with_window(value, window) for key, value in leaf.items()}
    return Leaf((window, *leaf.shape[1:]), leaf.dtype)


def last_proprio(observations: Mapping[str, Any], dataset: str) -> Any:
    """(B, P) in physical units: what the actions of `dataset` are relative to."""
    present = np.asarray(observations.get("pad_mask_dict", {}).get("proprio", [True]))
    if "proprio" not in observations or not present[..., -1].all():
        raise ValueError(
            f"observation/proprio is missing, but the actions of {dataset!r} are relative to it: the policy cannot say "
            "where the robot should go without knowing where it is"
        )
    proprio = observations["proprio"]
    return array_module(proprio).asarray(proprio, np.float32)[:, -1]


def check_rows(tasks: Any, b: int) -> None:
    """Raises ValueError for what is no task, or has another number of rows than the observations."""
    leaves = list(flatten(tasks)) if isinstance(tasks, Mapping) else []
    if not leaves:
        raise ValueError(f"tasks must be what create_tasks gives, got {tasks!r:.60}")
    rows = leaves[0][1].shape[0]
    if rows != b:
        raise ValueError(f"{b} observations but {rows} tasks; create one task per row")


def row_keys(rng: Any, b: int) -> jax.Array:
    """Keys (B,): B of them as they are, one folded with the number of the row. Raises ValueError for what is none."""
    valid = "rng must be a key, jax.random.key(0), or one per row"
    if not isinstance(rng, jax.Array | np.ndarray):
        raise ValueError(f"{valid}; got {rng!r:.60}")
    rng = jnp.asarray(rng)
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if not (typed or rng.dtype == jnp.uint32):
        raise ValueError(f"{valid}; got an array of {rng.dtype}")
    if rng.ndim == (0 if typed else 1):
        return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(b))
    if rng.shape[0] != b:
        raise ValueError(f"{valid}; got {rng.shape[0]} keys for {b} observations")
    return rng
