"""What may reach a policy and what may reach the motors. NumPy only: the robot's own computer needs no more.

An observation is complete, finite and spelled as the policy spells it, or it is an error (`check_observation`). An
action is finite and within limits, or it is replaced by one that is, and counted (`ActionFilter`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common.dimensions import Dimensions, of_statistics
from octo_like.common.words import suggest

# A policy may leave the demonstrated range by this share of its width before it is clipped: demonstrations end where
# the people who gave them stopped, not where the robot has to.
MARGIN = 0.1
STANDS_STILL = ("delta", "velocity")  # kinds of actions for which zero means "stay where you are"


class UnsafeAction(ValueError):
    """An action that cannot be executed and for which no safe one is known."""


def expected_keys(batch_spec: Mapping[str, Any], statistics: Mapping[str, Any] | None = None) -> list[str]:
    """Keys of the observations that a policy reads: its cameras and sensors, those without pictures if the dataset has
    them.

    Args:
      batch_spec: as JSON (`BatchSpec.to_json`).
      statistics: of the dataset in whose units observations come; None: every sensor of the policy.
    """
    keys = [f"image_{slot}" for slot in batch_spec["image_sizes"]]
    keys += [f"depth_{slot}" for slot in batch_spec.get("depth_sizes") or {}]
    if batch_spec.get("proprio_dim") is not None and (statistics is None or "proprio" in statistics):
        keys.append("proprio")
    extras = batch_spec.get("extra_observations") or {}
    return keys + [key for key in extras if statistics is None or key in statistics.get("extra", extras)]


def check_observation(
    observation: Mapping[str, Any],
    expected: Collection[str],
    allow_missing: Collection[str] = (),
    where: str = "observation",
) -> None:
    """Raises ValueError for a key that is missing or unknown, and for values that are not finite.

    Args:
      expected: see `expected_keys`.
      allow_missing: those of them that the robot does not have; the policy masks them.
    """
    for key in observation:
        if key not in expected:
            raise ValueError(f"{where}: {_not_read(key, expected)}")
    missing = [key for key in expected if key not in observation and key not in allow_missing]
    if missing:
        there = ", ".join(sorted(observation)) or "none"
        raise ValueError(
            f"{where} lacks {', '.join(missing)}, which the policy reads; got {there}. Send it, or "
            f"say that this robot has none: allow_missing=({', '.join(map(repr, missing))},)"
        )
    for key, value in observation.items():
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{where}/{key}: expected numbers, got an array of {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{where}/{key}: {_describe_not_finite(array)}")


def check_allowed(allow_missing: Collection[str], keys: Collection[str]) -> None:
    """Raises ValueError for an `allow_missing` with a key that the policy never reads."""
    for key in allow_missing:
        if key not in keys:
            raise ValueError(f"allow_missing: {_not_read(key, keys)}")


def _not_read(key: str, expected: Collection[str]) -> str:
    return f"the policy reads no {key!r}; {suggest(key, expected)}"


def _describe_not_finite(array: np.ndarray) -> str:
    bad = np.argwhere(~np.isfinite(array))
    place = f" at {bad[0].tolist()}" if array.ndim else ""
    return f"{array[tuple(bad[0])]}{place} ({len(bad)} of {array.size} values are not finite)"


def action_limits(statistics: Mapping[str, Any]) -> dict[str, list]:
    """What is known of a dataset's actions, as JSON: "low", "high" (numbers, or None where nothing is known),
    "declared" (whether the robot's description says so), "kinds", "names", "units".

    Limits are those of the robot's description; where it has none, the demonstrated range and `MARGIN` of its width on
    both sides. An action that was learned relative to the proprioception is absolute when it is executed: its range is
    that of the proprioception plus that of the action.

    Args:
      statistics: of the dataset, as in an exported policy.
    """
    action, robot = statistics["action"], statistics.get("robot") or {}
    width = len(np.asarray(action["mean"]))
    named = of_statistics(statistics, "action", width)
    low, high = (_bounds(action, field, width) for field in ("min", "max"))
    for d, origin in enumerate(statistics.get("relative_to") or ()):
        if origin is not None:
            proprio = statistics["proprio"]
            low[d] += _bounds(proprio, "min", len(np.asarray(proprio["mean"])))[origin]
            high[d] += _bounds(proprio, "max", len(np.asarray(proprio["mean"])))[origin]
    margin = MARGIN * (high - low)
    low, high = low - margin, high + margin
    declared = [False] * width
    for d, pair in enumerate(robot.get("action_limits") or ()):
        if pair is not None:
            low[d], high[d] = pair
            declared[d] = True
    return {
        "low": [float(x) if np.isfinite(x) else None for x in low],
        "high": [float(x) if np.isfinite(x) else None for x in high],
        "declared": declared,
        "kinds": list(robot.get("action_kind") or ["other"] * width),
        "names": list(named.names),
        "units": list(named.units),
    }


def _bounds(statistics: Mapping[str, Any], field: str, width: int) -> np.ndarray:
    unknown = {"min": -np.inf, "max": np.inf}[field]
    return np.array(statistics.get(field, np.full(width, unknown)), np.float64)


class ActionFilter:
    """Replaces what must not be executed, and counts it: values that are not finite, outside limits, or too fast.

    A value that is not finite is held: zero for changes and velocities, otherwise the last value that was executed. A
    value outside the limits is clipped. A value that differs from the last one by more than `max_change` is brought
    nearer. What remains is what `__call__` returns and takes for executed.

    Attributes:
      counts: {"actions", "clipped", "slowed", "held"}: actions that passed, and those of them in which a dimension was
        changed for that reason, since the filter was made.

    Args:
      low: (A,) lower limits; None entries are unlimited.
      high: (A,) upper limits, likewise.
      max_change: (A,) or one number: largest change from one action to the next, None entries unlimited; of absolute
        actions and grippers, the largest step.
      kinds: of the dimensions, see `octo_like.common.robot.KINDS`; "other" holds its last value.
      names: of the dimensions, for messages.
    """

    def __init__(
        self,
        low: Sequence[float | None],
        high: Sequence[float | None],
        *,
        max_change: Sequence[float | None] | float | None = None,
        kinds: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ):
        self.low = np.array([-np.inf if x is None else x for x in low], np.float64)
        self.high = np.array([np.inf if x is None else x for x in high], np.float64)
        width = len(self.low)
        change = list(max_change) if isinstance(max_change, (Sequence, np.ndarray)) else [max_change] * width
        self.max_change = np.array([np.inf if x is None else x for x in change], np.float64)
        self.kinds = ["other"] * width if kinds is None else list(kinds)
        self.names = list(Dimensions.unnamed(width).names) if names is None else list(names)
        lengths = {len(self.high), len(self.max_change), len(self.kinds), len(self.names), width}
        if len(lengths) > 1:
            raise ValueError(f"low, high, max_change, kinds and names must have one length, got {sorted(lengths)}")
        wrong = ~(self.low <= self.high) | ~(self.max_change > 0)
        if wrong.any():
            d = int(np.argmax(wrong))
            raise ValueError(
                f"{self.names[d]}: limits must be (lowest, highest) and max_change positive, got "
                f"({self.low[d]:g}, {self.high[d]:g}), {self.max_change[d]:g}"
            )
        self._still = np.array([kind in STANDS_STILL for kind in self.kinds])
        self.counts = dict.fromkeys(("actions", "clipped", "slowed", "held"), 0)
        self._last: np.ndarray | None = None

    @classmethod
    def of(cls, limits: Mapping[str, Any], **options: Any) -> ActionFilter:
        """The filter of a dataset's `action_limits`; options as in the constructor."""
        return cls(limits["low"], limits["high"], **{"kinds": limits["kinds"], "names": limits["names"], **options})

    def reset(self) -> None:
        """A new episode: nothing has been executed yet. The counts go on."""
        self._last = None

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """The action (A,) to execute in place of one, float32.

        Raises:
          ValueError: another number of dimensions.
          UnsafeAction: a value is not finite, and none was executed before that could be held.
        """
        wanted = np.asarray(action, np.float64)
        if wanted.shape != self.low.shape:
            raise ValueError(f"expected an action of {len(self.low)} dimensions, got shape {wanted.shape}")
        finite = np.isfinite(wanted)
        held = np.where(self._still, 0.0, np.nan if self._last is None else self._last)
        given = np.where(finite, wanted, held)
        if not np.isfinite(given).all():
            d = int(np.argmin(np.isfinite(given)))
            raise UnsafeAction(f"{self.names[d]} is {wanted[d]}, and nothing was executed before that could be held")
        clipped = np.clip(given, self.low, self.high)
        safe = clipped
        if self._last is not None:
            safe = np.clip(clipped, self._last - self.max_change, self._last + self.max_change)
        self.counts["actions"] += 1
        self.counts["held"] += int(not finite.all())
        self.counts["clipped"] += int((clipped != given).any())
        self.counts["slowed"] += int((safe != clipped).any())
        self._last = safe
        return safe.astype(np.float32)

    def chunk(self, actions: np.ndarray) -> np.ndarray:
        """A chunk (H, A) in place of one, as if it were executed whole; tell `executed` where it really ended."""
        return np.stack([self(action) for action in np.asarray(actions)])

    def executed(self, action: np.ndarray) -> None:
        """Says which action was executed last."""
        self._last = np.asarray(action, np.float64)

    def hold(self) -> np.ndarray:
        """The action (A,) that keeps the robot where it is: zero for changes and velocities, else the last one.

        Raises:
          UnsafeAction: nothing was executed yet, and a dimension is neither a change nor a velocity.
        """
        if self._last is None and not self._still.all():
            raise UnsafeAction(f"nothing was executed yet, so {self.names[int(np.argmin(self._still))]} cannot be held")
        return np.where(self._still, 0.0, 0.0 if self._last is None else self._last).astype(np.float32)

    def __str__(self) -> str:
        changed = ", ".join(f"{self.counts[key]} {key}" for key in ("clipped", "slowed", "held"))
        return f"{self.counts['actions']} actions: {changed}"
