"""A previous chunk of actions, from the robot's units into the numbers of the model that continues it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from octo_like.common import normalization
from octo_like.common.chunks import METHODS, Continuation
from octo_like.common.parts import name_of
from octo_like.model.guidance import Guidance
from octo_like.model.heads import ActionHead
from octo_like.policy.observations import array_module


def methods_of(head: ActionHead) -> dict[str, int]:
    """{method: largest delay} of the continuations that a head can draw; {} when it can draw none."""
    found = {}
    for method in METHODS:
        try:
            head.check_guidance(_example(method))
        except ValueError:
            continue
        found[method] = head.max_delay if method == "trained" else head.action_horizon
    return found


def guidance_of(
    continuing: Continuation,
    head: ActionHead,
    rows: int,
    statistics: Mapping[str, Any] | None,
    origin_bp: Any,
) -> Guidance:
    """What a head's sampler needs to continue a chunk.

    Args:
      rows: B of the observations.
      statistics: of the dataset in whose units the chunk is; None: it is normalised.
      origin_bp: (B, P) present proprioception in physical units, of actions that are relative to it: the chunk is
        absolute, and becomes relative to where the robot is now, whatever it was relative to when it was drawn.

    Raises:
      ValueError: another number of rows, steps or dimensions, or a delay or a method that the head has not learned.
    """
    head.check_guidance(_example(continuing.method))
    width = head.action_dim if statistics is None else len(statistics["action"]["mean"])
    shape, wanted = np.shape(continuing.previous), (rows, head.action_horizon, width)
    if shape != wanted:
        raise ValueError(f"the previous chunk has shape {shape}; expected {wanted}: rows, action_horizon, dimensions")
    executed, delay = continuing.counts()
    largest = methods_of(head)[continuing.method]
    late = (executed < wanted[1]) & (delay > largest)
    if late.any():
        raise ValueError(
            f"delay={delay[np.argmax(late)]}, but the {name_of(head)} has learned to continue after at most "
            f"max_delay={largest} given actions"
        )
    xp = array_module(origin_bp)
    previous: Any = continuing.shifted()
    if statistics is not None:
        if origin_bp is not None:
            previous = normalization.to_relative(previous, origin_bp[:, None], statistics["relative_to"])
        # Without the clipping of `normalize`: what was predicted beyond the bounds comes back as it was.
        kind = statistics.get("normalization", "normal")
        shift, scale, _ = normalization.coefficients(statistics["action"], kind)
        previous = (previous - shift) * scale
    previous = xp.pad(previous, ((0, 0), (0, 0), (0, head.action_dim - width)))
    weights: Any = continuing.weights()
    max_weight: Any = np.float32(continuing.max_weight)
    prior_std: Any = np.float32(continuing.prior_std)
    return Guidance(previous, weights, max_weight, prior_std, continuing.method)


def _example(method: str) -> Guidance:
    previous: Any = np.zeros((1, 1, 1), np.float32)
    return Guidance(previous, previous[0], method=method)
