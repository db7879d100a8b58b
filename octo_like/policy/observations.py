"""Looks at what a policy is given before it reads it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octo_like.common.schema import BatchSpec, Leaf, check_tree, flatten
from octo_like.common.words import check_words

# Keys that may stand beside those a policy reads, and are not read: what the data pipelines of Octo and this package
# leave among observations and tasks.
ACCEPTED = ("timestep", "task_completed")


def array_module(*likes: Any) -> Any:
    """NumPy, or while a program is traced jax.numpy: the batch size may then be a symbol, which NumPy cannot handle.

    What is done to concrete values outside the jitted programs is done in NumPy: operations of jax.numpy would be
    compiled one by one, for every shape, when a robot waits for its first actions.
    """
    return jnp if any(isinstance(like, jax.core.Tracer) for like in likes) else np


def check_sensor(key: str, observations: Mapping[str, Any]) -> None:
    """Raises ValueError for a sensor that says NaN or infinity where its masks say that it counts."""
    values, steps = observations[key], observations["timestep_pad_mask"]
    masks = [steps, observations.get("pad_mask_dict", {}).get(key), observations.get(f"{key}_pad_mask")]
    if any(isinstance(one, jax.core.Tracer) for one in (values, *masks)) or np.asarray(values).dtype.kind != "f":
        return
    finite = np.isfinite(np.asarray(values))
    counts = np.ones(finite.shape, bool)
    for mask in (np.asarray(mask) for mask in masks if mask is not None):
        if mask.ndim == finite.ndim > 2:
            mask = mask[..., : finite.shape[-1]]  # a robot with fewer dimensions than the policy
        if mask.shape != finite.shape[: mask.ndim]:
            return  # refused by its shape, with what would be valid
        counts = counts & mask.reshape(*mask.shape, *[1] * (finite.ndim - mask.ndim))
    bad = np.argwhere(~finite & counts)
    if len(bad):
        row, timestep = bad[0][:2].tolist()
        raise ValueError(f"observation/{key}: NaN or infinite values in row {row}, timestep {timestep} of the window")


def as_array(value: Any, where: str, *, numbers: bool = False) -> Any:
    """What is an array, as it is; nested lists of `numbers` as one of float32. Raises ValueError for anything else,
    with `numbers` also for arrays of texts, objects or complex numbers."""
    if numbers and isinstance(value, list | tuple | int | float):
        try:
            made = np.asarray(value)
        except (TypeError, ValueError):  # lists of different lengths
            made = np.asarray("ragged")
        if not _holds_numbers(made.dtype):
            raise ValueError(f"{where}: expected an array of numbers, got {value!r:.60}")
        return made.astype(np.float32)
    try:
        dtype, _ = np.dtype(value.dtype), tuple(value.shape)
    except (AttributeError, TypeError):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise ValueError(f"{where}: expected a NumPy or JAX array, got a {kind}; give np.asarray(...)") from None
    if numbers and not _holds_numbers(dtype):
        raise ValueError(f"{where}: expected an array of numbers, got one of {dtype}")
    return value


def _holds_numbers(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" or jnp.issubdtype(dtype, np.floating)  # the latter: bfloat16


def check_mask(mask: Any, where: str, shape: tuple[Any, ...], axes: str = "(B, W)") -> None:
    """Raises ValueError for what is no array of booleans of a shape."""
    as_array(mask, where)
    if mask.dtype != bool or tuple(mask.shape) != shape:
        expected = f"{axes} = ({', '.join(map(str, shape))}) bool"
        raise ValueError(f"{where}: expected {expected}, got ({', '.join(map(str, mask.shape))}) {mask.dtype}")


def check_layout(image: Any, where: str) -> None:
    """Raises ValueError for pictures whose channels stand before their rows, or that have no pixels."""
    shape = tuple(image.shape)
    if len(shape) >= 3 and shape[-3] in (1, 3) and shape[-1] not in (1, 3):
        raise ValueError(
            f"{where}: the channels come first in ({', '.join(map(str, shape))}); expected them last, (..., h, w, 3): "
            "np.moveaxis(image, -3, -1)"
        )
    if len(shape) >= 3 and 0 in shape[-3:]:
        raise ValueError(f"{where}: a picture without pixels, ({', '.join(map(str, shape))})")


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


def check_tasks(tasks: Any, spec: BatchSpec, b: int) -> None:
    """Checks tasks before they are read: what `create_tasks` gives, or the `task` of a batch.

    A part that the policy reads may be missing. Octo copies the whole goal observation into a task: its bookkeeping
    (`ACCEPTED`) and the sensors of the policy's own observations may stand there, and are not read.

    Raises:
      ValueError: what is no task; a key, shape or dtype that the policy does not read; another number of rows than the
        observations.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError(f"tasks must be what create_tasks gives, got {tasks!r:.60}")
    known = spec.task()
    sensors = [key for key in spec.observation()["pad_mask_dict"] if not key.startswith("image_")]
    unread = [key for key in (*ACCEPTED, *sensors, "pad_mask_dict") if key not in known]
    check_words(tasks, [key for key in known if key != "timestep"], "task", ("timestep", *unread))
    pads = tasks.get("pad_mask_dict", {})
    if not isinstance(pads, Mapping):
        raise ValueError(f"task/pad_mask_dict: expected a dict of (B,) bool, got {pads!r:.60}")
    check_words(pads, known["pad_mask_dict"], "task/pad_mask_dict", (*ACCEPTED, *unread))
    for key, mask in pads.items():
        check_mask(mask, f"task/pad_mask_dict/{key}", np.shape(mask)[:1] or (b,), "(B,)")
    want = dict(flatten(known))
    got = {path: value for path, value in flatten(tasks) if path.split("/")[0] not in (*unread, "pad_mask_dict")}
    for text in ("language_instruction", "subtask"):
        if isinstance(known.get(text), Mapping) and text in tasks:
            parts = tasks[text]
            if not isinstance(parts, Mapping) or not {"input_ids", "attention_mask"} <= set(parts):
                found = sorted(parts) if isinstance(parts, Mapping) else f"{parts!r:.60}"
                raise ValueError(f"task/{text}: expected a dict of input_ids and attention_mask, got {found}")
            check_words(parts, known[text], f"task/{text}", ("encoded",))
    for path, value in got.items():
        as_array(value, f"task/{path}")
        if path.startswith("image_"):
            check_layout(value, f"task/{path}")
    encoded = {path for path in got if "/encoded/" in path}
    loose = {path for path in got if path.endswith("attention_mask") and got[path].dtype == bool}
    checked = {path: value for path, value in got.items() if path not in encoded | loose}
    check_tree(checked, {path: leaf for path, leaf in want.items() if path in checked}, where="task")
    for path, value in [*got.items(), *(("pad_mask_dict/" + key, mask) for key, mask in pads.items())]:
        if not value.shape or value.shape[0] != b:
            rows = value.shape[0] if value.shape else "no"
            raise ValueError(f"{b} observations but {rows} tasks (task/{path}); create one task per row")


def row_keys(rng: Any, b: int) -> jax.Array:
    """Keys (B,): B of them as they are, one folded with the number of the row. Raises ValueError for what is none."""
    valid = "rng must be a key, jax.random.key(0), or one per row"
    if not isinstance(rng, jax.Array | np.ndarray):
        raise ValueError(f"{valid}; got {rng!r:.60}")
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if not (typed or rng.dtype == jnp.uint32):
        raise ValueError(f"{valid}; got an array of {rng.dtype}")
    rng = jnp.asarray(rng)
    lead = rng.shape if typed else rng.shape[:-1]
    width = None if typed else rng.shape[-1:]
    data = (2 if jax.config.jax_default_prng_impl == "threefry2x32" else 4,)  # type: ignore[attr-defined]
    if len(lead) > 1 or (width is not None and width != data):
        raise ValueError(f"{valid}; got {rng.dtype}{list(rng.shape)}, a key's data are uint32{list(data)}")
    if not lead:
        return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(b))
    if lead[0] != b:
        raise ValueError(f"{valid}; got {lead[0]} keys for {b} observations")
    return rng


def check_actions(actions: jax.Array) -> None:
    """Raises FloatingPointError for actions (..., B, H, A) that are not finite, ValueError while they are traced."""
    if isinstance(actions, jax.core.Tracer):
        raise ValueError(
            "sample_actions looks at the numbers that it returns, which a function that is traced or differentiated "
            "cannot do: call it with check_finite=False there, and look whether what comes out is finite"
        )
    finite = np.isfinite(jax.device_get(actions)).all((-2, -1))
    if not finite.all():
        row = int(np.argwhere(~finite)[0][-1])
        raise FloatingPointError(
            f"the policy's actions for row {row} are not finite: its parameters, statistics or task hold NaN or "
            "infinite values, or the network overflows"
        )
