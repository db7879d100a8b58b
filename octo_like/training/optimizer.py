"""Learning-rate schedules, the optimizer with clipping and a decay mask, and which parameters are trained."""

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from octo_like.common.parts import PartError, check_options, find_function, is_own
from octo_like.common.schema import flatten, unflatten

SCHEDULES = ("constant", "rsqrt", "cosine")
Schedule = Callable[[Any], jax.Array]


def make_schedule(
    name: str,
    *,
    peak: float,
    warmup_steps: int,
    init: float = 0.0,
    timescale: float = 10_000,
    decay_steps: int | None = None,
    end: float = 0.0,
) -> Schedule:
    """Linear warm-up from `init` to `peak`, then, with s the steps since:

    constant: peak; rsqrt: peak / sqrt((s + timescale) / timescale) (Zhai et al. 2022); cosine: to `end` at step
    `decay_steps` (Loshchilov & Hutter 2017).
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; valid: {', '.join(SCHEDULES)}")
    if name == "cosine" and (decay_steps is None or decay_steps <= warmup_steps):
        raise ValueError(f"a cosine schedule needs decay_steps > warmup_steps, got {decay_steps} and {warmup_steps}")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        s = jnp.maximum(step - warmup_steps, 0.0)
        if name == "constant":
            after = jnp.asarray(peak, jnp.float32)
        elif name == "rsqrt":
            after = peak / jnp.sqrt((s + timescale) / timescale)
        else:
            assert decay_steps is not None  # a cosine schedule without was refused above
            span = decay_steps - warmup_steps
            after = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(s, span) / span))
        if warmup_steps == 0:
            return after
        return jnp.where(step < warmup_steps, init + (peak - init) * step / warmup_steps, after)

    return schedule


def decay_mask(params: Any) -> Any:
    """Weight decay for kernels only (any path with "kernel"), as in the Octo releases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


OPTIMIZERS = {
    "adamw": optax.adamw,
    "lion": optax.lion,
    "muon": optax.contrib.muon,
    "adafactor": optax.adafactor,
    "sgd": optax.sgd,
}
# What is no option of theirs here: it has a key of its own in config.optimizer, or means the same for all of them.
_RESERVED = {
    "adamw": ("b2", "weight_decay", "mask"),
    "lion": ("weight_decay", "mask"),
    "muon": ("weight_decay", "weight_decay_mask", "adam_weight_decay", "muon_weight_dimension_numbers"),
    "adafactor": ("weight_decay_rate", "weight_decay_mask"),
    "sgd": (),
}


def find_optimizer(name: str, arguments: Mapping[str, Any]) -> Callable[..., optax.GradientTransformation]:
    """The function that is called as function(schedule, **arguments) to make an optimizer.

    Args:
      name: a key of OPTIMIZERS, or "module:function" of the user's own.

    Raises:
      ValueError: an unknown name or argument (with the valid ones), or a function that cannot be imported or called so.
    """
    if is_own(name):
        function = find_function(name, "optimizer.name")
        try:
            inspect.signature(function).bind(None, **arguments)
        except TypeError as error:
            raise PartError(
                f"optimizer.name: {name}{inspect.signature(function)} is called with the learning-rate schedule and "
                f"optimizer.arguments ({', '.join(arguments) or 'none'}): {error}"
            ) from error
        return function
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer.name {name!r}; valid: {', '.join(OPTIMIZERS)}, or 'module:function'")
    options = set(inspect.signature(OPTIMIZERS[name]).parameters) - {"learning_rate", *_RESERVED[name]}
    check_options(arguments, options, f"optimizer.arguments ({name})")
    for key, value in arguments.items():
        _check_argument(f"optimizer.arguments.{key}", value, inspect.signature(OPTIMIZERS[name]).parameters[key])
    return OPTIMIZERS[name]


# Of Optax's arguments: how much of an average is kept each time.
_DECAYS = ("b1", "b2", "beta", "momentum", "adam_b1", "adam_b2", "decay_rate")


def _check_argument(where: str, value: Any, parameter: inspect.Parameter) -> None:
    """Raises ValueError for a value that is not of the kind of the default; Optax itself takes what it is given."""
    default, optional = parameter.default, "None" in str(parameter.annotation)
    if value is None and (default is None or optional):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(default, bool):
        valid, good = "True or False", isinstance(value, bool)
    elif parameter.name in _DECAYS:
        valid, good = "at least 0 and less than 1", number and 0 <= value < 1
    elif isinstance(default, int):
        valid, good = "a whole number of at least 0", number and isinstance(value, int) and value >= 0
    elif isinstance(default, float):
        valid, good = "a number of at least 0", number and value >= 0
    elif "dtype" in parameter.name:
        valid, good = "the name of a type of numbers, e.g. 'bfloat16'", _is_float_dtype(value)
    else:
        return
    if not good:
        raise ValueError(f"{where} must be {valid}{', or None' if optional else ''}; got {value!r}")


def _is_float_dtype(value: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        return False


def make_optimizer(
    schedule: Schedule,
    *,
    name: str = "adamw",
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    b2: float = 0.999,
    arguments: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
    """Clipping by the global norm of the trained gradients, then an optimizer of Optax or of the user's own.

    For flat dicts of parameters by path. Weight decay is decoupled (Loshchilov & Hutter 2019) for all of them: besides
    the optimizer's update, learning rate times `weight_decay` of every kernel is taken away (`decay_mask`).

    Args:
      name: see `find_optimizer`.
      b2: of AdamW's second moment; the others take all of theirs from `arguments`.
      arguments: what else the optimizer's function takes.

    Raises:
      ValueError: see `find_optimizer`; also a function of the user's that returns something else.
    """
    arguments = dict(arguments or {})
    make = find_optimizer(name, arguments)
    if name == "adamw":
        tx = make(schedule, b2=b2, weight_decay=weight_decay, mask=decay_mask, **arguments)
    else:
        if name == "lion":
            arguments["weight_decay"] = 0.0  # its default is another
        if name == "muon":
            arguments["muon_weight_dimension_numbers"] = _matrices
        tx = make(schedule, **arguments)
        if not isinstance(tx, optax.GradientTransformation):
            raise PartError(f"optimizer.name: {name} returned {tx!r}, expected an optax.GradientTransformation")
        if weight_decay:
            tx = optax.chain(tx, optax.add_decayed_weights(lambda step: -weight_decay * schedule(step), decay_mask))
    return optax.chain(optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm), tx)


def _matrices(params: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The kernels that Muon orthogonalises, as matrices from inputs to outputs; everything else is for its AdamW."""

    def matrix(path: str, leaf: Any) -> Any:
        *_, layer, last = ("", *path.split("/"))
        if last != "kernel" or isinstance(leaf, optax.MaskedNode) or leaf.ndim < 2:
            return None
        inputs = 1 if layer in ("query", "key", "value") else leaf.ndim - 1  # these have heads x features as outputs
        axes = range(leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(axes[:inputs]), tuple(axes[inputs:]))

    return {path: matrix(path, leaf) for path, leaf in params.items()}


def sum_of_squares(x: jax.Array) -> jax.Array:
    """Of all entries, float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def global_norm(flat: Mapping[str, jax.Array]) -> jax.Array:
    """L2 norm of all arrays together."""
    return jnp.sqrt(functools.reduce(jax.lax.add, map(sum_of_squares, flat.values())))


def frozen_paths(params: Mapping[str, Any], patterns: Sequence[str]) -> frozenset[str]:
    """Paths that match any regex (searched anywhere in the path).

    Raises:
      ValueError: a pattern matches nothing, or everything is frozen.
    """
    paths = [path for path, _ in flatten(params)]
    frozen = set()
    for pattern in patterns:
        hits = {path for path in paths if re.search(pattern, path)}
        if not hits:
            tops = sorted({"/".join(path.split("/")[:2]) for path in paths})
            raise ValueError(f"freeze pattern {pattern!r} matches no parameter; paths begin with {tops}")
        frozen |= hits
    if len(frozen) == len(paths):
        raise ValueError(f"the freeze patterns {list(patterns)} leave nothing to train")
    return frozenset(frozen)


def split_params(params: Mapping[str, Any], frozen: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen) as flat dicts by path: gradients, optimizer state and averages exist for the first only."""
    trained: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for path, leaf in flatten(params):
        (rest if path in frozen else trained)[path] = leaf
    return trained, rest


def join_params(trained: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `split_params`."""
    return unflatten({**trained, **rest})
