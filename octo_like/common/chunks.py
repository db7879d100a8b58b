"""What a new chunk of actions has to continue, and chunks at another control rate. NumPy only.

Time is counted in actions. A chunk of H actions is asked for with an observation; action i is for i steps later. When
the new one is asked for, `executed` actions of the previous chunk are done, and `delay` more will be before the new one
is there:

    previous   0 ... executed-1 | executed ... executed+delay-1 | ... H-1 |
    new                         | 0 .................... delay-1 | delay .. | H-executed ... H-1
                                | given: they will be executed   | soft     | free
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from octo_like.common.dimensions import KINDS
from octo_like.common.words import suggest

METHODS = ("jacobian_free", "vjp", "trained")
SCHEDULES = ("exp", "linear", "ones", "zeros")


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A previous chunk that the next continues.

    Attributes:
      previous: (B, H, A) actions in the robot's own units: what will be executed of them, within limits.
      executed: number of its actions, or (B,) numbers, that were executed before the present observation; H: there is
        nothing to continue.
      delay: number of further actions, or (B,) numbers, that will be executed before the new chunk is there.
      method: how, see `octo_like.model.guidance`.
      schedule: of the weights behind `delay`, see `weights`.
      max_weight, prior_std: of "vjp", see `octo_like.model.guidance`.
    """

    previous: Any
    executed: Any
    delay: Any = 0
    method: str = "jacobian_free"
    schedule: str = "exp"
    max_weight: float = 5.0
    prior_std: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r} of continuing a chunk; valid: {', '.join(METHODS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r} of weights; valid: {', '.join(SCHEDULES)}")
        if not (self.max_weight > 0 and self.prior_std > 0):
            raise ValueError(f"max_weight and prior_std must be positive, got {self.max_weight}, {self.prior_std}")
        shape = np.shape(self.previous)
        if len(shape) != 3:
            raise ValueError(f"the previous chunk must be (B, H, A), got {shape}")
        if not np.isfinite(np.asarray(self.previous)).all():
            raise ValueError("the previous chunk holds values that are not finite")
        executed, delay = self.counts()
        if (executed < 0).any() or (delay < 0).any() or (executed > shape[1]).any():
            raise ValueError(
                f"executed must be in 0..{shape[1]} and delay at least 0, got {self.executed}, {self.delay}"
            )
        short = (executed < shape[1]) & (executed + delay > shape[1])
        if short.any():
            row = int(np.argmax(short))
            raise ValueError(
                f"after {executed[row]} executed actions {shape[1] - executed[row]} of {shape[1]} are left, and "
                f"delay={delay[row]} are to be executed meanwhile: ask earlier, or say what can be executed"
            )

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(executed, delay), (B,) int64 each. Raises ValueError for what are no counts."""
        rows, found = np.shape(self.previous)[0], []
        for name in ("executed", "delay"):
            value = np.asarray(getattr(self, name))
            if value.dtype.kind not in "iu" or value.shape not in ((), (rows,)):
                raise ValueError(f"{name} must be a whole number, or one for each of {rows} rows, got {value!r}")
            found.append(np.broadcast_to(value, (rows,)).astype(np.int64))
        return found[0], found[1]

    def weights(self) -> np.ndarray:
        """(B, H) float32 in [0, 1]: how much step i of the new chunk is bound to the previous one.

        1 for i < delay; 0 from the end of the previous chunk on, i >= e = H - executed; between, with
        c = (e - i) / (e - delay + 1): "exp" c (exp(c) - 1) / (exp(1) - 1) (Black et al. 2025, equation 5), "linear" c,
        "ones" 1, "zeros" 0. "trained" has no soft part.
        """
        executed, delay = (x[:, None] for x in self.counts())
        horizon = np.shape(self.previous)[1]
        i, end = np.arange(horizon), horizon - executed
        c = np.clip((end - i) / (end - np.minimum(delay, end) + 1), 0, 1)
        soft = {"exp": c * np.expm1(c) / (math.e - 1), "linear": c, "ones": np.ones_like(c), "zeros": np.zeros_like(c)}
        schedule = "zeros" if self.method == "trained" else self.schedule
        return np.where(i < end, np.where(i < delay, 1.0, soft[schedule]), 0.0).astype(np.float32)

    def shifted(self) -> np.ndarray:
        """(B, H, A) float32: what the previous chunk says for the steps of the new one; its last action goes on."""
        previous = np.asarray(self.previous, np.float32)
        executed, _ = self.counts()
        steps = np.minimum(executed[:, None] + np.arange(previous.shape[1]), previous.shape[1] - 1)
        return np.take_along_axis(previous, steps[..., None], axis=1)


def check_known(kinds: Sequence[str]) -> None:
    """Raises ValueError for what is no sequence of kinds of action dimensions: a misspelt one would be held."""
    if isinstance(kinds, str):
        raise ValueError(f"kinds is one for each action dimension; for one dimension: kinds=({kinds!r},)")
    for d, kind in enumerate(kinds):
        if kind not in tuple(KINDS):
            raise ValueError(f"kinds[{d}]: unknown kind {kind!r}; {suggest(kind, KINDS)}")


def resample(chunk: np.ndarray, factor: int, kinds: Sequence[str]) -> np.ndarray:
    """A chunk (H, A) for a robot that is commanded `factor` times as often, (H * factor, A) float32.

    Args:
      factor: commands for each action, at least 1.
      kinds: of the dimensions, see `octo_like.common.dimensions.KINDS`: "absolute" targets are interpolated linearly,
        from each action to the next (the last stays); a "delta" is divided into equal parts, so that the movement is
        the same; a "velocity", a "gripper" and what is "other" is held.

    Raises:
      ValueError: an unknown kind, or another number of them than dimensions; a factor below 1.
    """
    chunk = np.asarray(chunk, np.float32)
    check_known(kinds)
    if chunk.ndim != 2 or len(kinds) != chunk.shape[1]:
        raise ValueError(f"expected a chunk (H, {len(kinds)}), got shape {chunk.shape}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    if factor == 1:
        return chunk
    held = np.repeat(chunk, factor, axis=0)
    at = np.arange(len(chunk) * factor) / factor
    is_absolute = np.array([kind == "absolute" for kind in kinds])
    is_delta = np.array([kind == "delta" for kind in kinds])
    linear = np.stack([np.interp(at, np.arange(len(chunk)), column) for column in chunk.T], axis=1)
    return np.where(is_absolute, linear, np.where(is_delta, held / factor, held)).astype(np.float32)
