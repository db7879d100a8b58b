"""Which steps of an episode may be the present step of a sample.

All filters look at standardised values, which the index keeps on disk; no record is read again when one changes.

    skip_unlabeled            whole episodes: no step has an instruction
    max_action, max_proprio   whole episodes: |normalised value| > max at any step, in any dimension
    idle_threshold            single steps: nothing is commanded
    frame_slice               single steps: by their number

The first two are Octo's (its limits, too, apply after normalisation and to whole trajectories). A step that is left out
is never a sample of its own; windows, action chunks and goals of other samples still contain it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from octo_like.common import normalization
from octo_like.data.spec import DatasetSpec


def has_filters(spec: DatasetSpec) -> bool:
    """Whether any filter of the spec is set (the user's function is not counted: the index has its result)."""
    fields = spec.filter_fields()
    return any(value not in (None, False) for key, value in fields.items() if key != "idle_of")


def needs_values(spec: DatasetSpec) -> bool:
    """Whether the filters look at actions or proprioception."""
    return any(value is not None for value in (spec.max_action, spec.max_proprio, spec.idle_threshold))


def idle_steps(action: np.ndarray, threshold: float, of: str, moves: np.ndarray) -> np.ndarray:
    """(T,) bool: steps at which nothing is commanded.

    Args:
      action: (T, A) in physical units, or (T, N, A), of which the first of each chunk counts.
      threshold: largest magnitude, in physical units.
      of: "action": of the command itself; "change": of its difference from the step before.
      moves: (A,) bool, the dimensions that are measured. The others have to equal those of the step before.

    At the first step nothing has changed: it is idle by "change", and by "action" when its command is.
    """
    action = action[:, 0] if action.ndim == 3 else action
    if not len(action):
        return np.zeros(0, bool)
    change = np.diff(action, axis=0, prepend=action[:1])
    size = np.abs(action if of == "action" else change)
    still = (size[:, moves] <= threshold).all(1)
    return still & (change[:, ~moves] == 0).all(1)


def usable_steps(
    spec: DatasetSpec, statistics: Mapping[str, Any], action: np.ndarray, proprio: np.ndarray, labeled: bool
) -> np.ndarray:
    """(T,) bool of one episode.

    Args:
      statistics: of the training episodes.
      action: (T, A) or (T, N, A) in physical units. proprio: (T, P), not read without max_proprio.
      labeled: whether any step has an instruction.
    """
    usable = np.zeros(len(action), bool)
    if spec.skip_unlabeled and not labeled:
        return usable
    for limit, values, key in ((spec.max_action, action, "action"), (spec.max_proprio, proprio, "proprio")):
        if limit is not None and len(values):
            normal = normalization.normalize(values, statistics[key], spec.normalization)
            if np.abs(normal).max() > limit:
                return usable
    usable[slice(*(spec.frame_slice or (None,)))] = True
    if spec.idle_threshold is not None:
        usable &= ~idle_steps(action, spec.idle_threshold, spec.idle_of, np.asarray(statistics["action"]["mask"], bool))
    return usable
