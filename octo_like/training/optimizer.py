"""Learning-rate schedules, AdamW with a decay mask, and which parameters are trained."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

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
            span = decay_steps - warmup_steps
            after = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(s, span) / span))
        if warmup_steps == 0:
            return after
        return jnp.where(step < warmup_steps, init + (peak - init) * step / warmup_steps, after)

    return schedule


def decay_mask(params: Any) -> Any:
    """Weight decay for kernels only (any path with "kernel"), as in the Octo releases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


def make_optimizer(
    schedule: Schedule, *, weight_decay: float = 0.0, clip_norm: float | None = 1.0, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """Clipping by the global norm of the trained gradients, then AdamW (Loshchilov & Hutter 2019) in float32.

    For flat dicts of parameters by path. State and numbers are those of `optax.chain(clip_by_global_norm, adamw)`, but
    after the norm every parameter is updated by itself, in a function that parameters of equal shape share: a
    transformer has hundreds of parameters and a few dozen shapes, and tracing all of them took longer than the model.
    """

    def adamw(mask):
        return optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)

    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    whole = optax.chain(clip, adamw(decay_mask))

    def update_one(decays, gradient, norm, state, param):
        if clip_norm is not None:
            gradient = jnp.where(norm < clip_norm, gradient, gradient / norm.astype(gradient.dtype) * clip_norm)
        return adamw(lambda _: decays).update(gradient, state, param)

    shared = {decays: jax.jit(functools.partial(update_one, decays)) for decays in (False, True)}
    is_flat = lambda node: isinstance(node, Mapping)  # noqa: E731

    def update(gradients, state, params):
        norm, decays, (empty, state) = global_norm(gradients), decay_mask(params), state
        updates, states = {}, []
        for path, gradient in gradients.items():
            one = jax.tree.map(lambda node, path=path: node[path] if is_flat(node) else node, state, is_leaf=is_flat)
            updates[path], one = shared[decays[path]](gradient, norm, one, params[path])
            states.append(one)
        gather = lambda node, *ones: dict(zip(gradients, ones, strict=True)) if is_flat(node) else ones[0]  # noqa: E731
        return updates, (empty, jax.tree.map(gather, state, *states, is_leaf=is_flat))

    return optax.GradientTransformation(whole.init, update)


@jax.jit
def sum_of_squares(x: jax.Array) -> jax.Array:
    """Of all entries, float32; traced once per shape."""
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
    trained, rest = {}, {}
    for path, leaf in flatten(params):
        (rest if path in frozen else trained)[path] = leaf
    return trained, rest


def join_params(trained: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `split_params`."""
    return unflatten({**trained, **rest})
