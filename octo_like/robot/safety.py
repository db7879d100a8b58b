"""What may reach a policy and what may reach the motors. NumPy only: the robot's own computer needs no more.

An observation is complete, finite and spelled as the policy spells it, or it is an error (`check_observation`). An
action is finite and within limits, or it is replaced by one that is, and counted (`ActionFilter`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common.dimensions import Dimensions, action_kinds, of_statistics
from octo_like.common.words import suggest

# A policy may leave the demonstrated range by this share of its width before it is clipped: demonstrations end where
# the people who gave them stopped, not where the robot has to.
MARGIN = 0.1
Shape = tuple[Any, ...]  # sizes: int, None (any) or range (one of these)
STANDS_STILL = ("delta", "velocity")  # kinds of actions for which zero means "stay where you are"
HOLDS = ("absolute", "gripper", *STANDS_STILL)  # kinds of which it is known; the first two repeat their last command


class UnsafeAction(ValueError):
    """An action that cannot be executed and for which no safe one is known."""


class UnknownKind(ValueError):
    """Nobody has said what keeps a dimension of the actions where it is. The message says what to write."""


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
    if not isinstance(observation, Mapping):
        raise ValueError(f"{where}: expected a map from keys to arrays, got {observation!r:.60}")
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


def check_request(instruction: Any, goal: Any, subtask: Any = None, plan: Any = False) -> None:
    """Raises ValueError for what is no instruction, goal, sub-task or plan of `PolicyClient.act`."""
    for text, name in ((instruction, "instruction"), (subtask, "subtask")):
        if not isinstance(text, (str, type(None))):
            raise ValueError(f"{name} must be a text or None, got {text!r:.60}")
    if not isinstance(goal, (Mapping, type(None))):
        kind = type(goal).__name__
        raise ValueError(f"goal must be a map, {{'image_primary': (h, w, 3) uint8}}, or None, got one of type {kind}")
    if not isinstance(plan, bool):
        raise ValueError(f"plan must be True or False, got {plan!r:.60}")


def frame_shapes(batch_spec: Mapping[str, Any], proprio: int | None = None) -> dict[str, Shape]:
    """{key: shape} of one moment's observations; None: any size, a range: one of its sizes. A picture
    is resized, so its size is free.

    Args:
      batch_spec: as JSON (`BatchSpec.to_json`).
      proprio: dimensions of the dataset in whose units observations come; None: not known, so any that the policy
        has room for.
    """
    shapes: dict[str, Shape] = {f"image_{slot}": (None, None, 3) for slot in batch_spec["image_sizes"]}
    shapes |= {f"depth_{slot}": (*size, 1) for slot, size in (batch_spec.get("depth_sizes") or {}).items()}
    shapes |= {key: tuple(shape) for key, shape in (batch_spec.get("extra_observations") or {}).items()}
    most = batch_spec.get("proprio_dim")
    if proprio is not None:
        shapes["proprio"] = (proprio,)
    elif most is not None:
        shapes["proprio"] = (range(1, most + 1),)
    return shapes


def check_frame(observation: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Raises ValueError for a value of one moment that has another shape than `frame_shapes` says."""
    for key, value in observation.items():
        array, wanted = np.asarray(value), shapes.get(key)
        if wanted is None:
            continue
        same = array.ndim == len(wanted) and all(
            n is None or (size in n if isinstance(n, range) else size == n) for size, n in zip(array.shape, wanted)
        )
        is_image = key.startswith("image_")
        if not same or 0 in array.shape or (is_image and array.dtype != np.uint8):
            text = "(height, width, 3) uint8" if is_image else _shape_text(wanted)
            raise ValueError(f"observation/{key}: expected one moment of shape {text}, got {array.shape} {array.dtype}")


def _shape_text(shape: Shape) -> str:
    sizes = [f"1 to {n[-1]}" if isinstance(n, range) else str(n) for n in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def check_chunk(actions: np.ndarray, horizon: int, width: int | None, whose: str = "the policy") -> np.ndarray:
    """A chunk as (H, A) float32. Raises ValueError for one that is none: nothing of it may be executed.

    Args:
      horizon: H. width: A; None: not known.
    """
    chunk = np.asarray(actions)
    if chunk.dtype.kind not in "iuf" or chunk.ndim != 2 or chunk.shape != (horizon, width or chunk.shape[1]):
        raise ValueError(
            f"{whose} gave a chunk of shape {chunk.shape} {chunk.dtype}; expected ({horizon}, {width or 'A'}) numbers"
        )
    if not np.isfinite(chunk).all():
        raise ValueError(f"{whose} gave a chunk that is not finite: {_describe_not_finite(chunk)}")
    return chunk.astype(np.float32)


def check_allowed(allow_missing: Collection[str], keys: Collection[str]) -> None:
    """Raises ValueError for an `allow_missing` with a key that the policy never reads."""
    if isinstance(allow_missing, str) or not isinstance(allow_missing, Collection):
        raise ValueError(f"allow_missing is a list of keys, got {allow_missing!r:.60}; for one key: ('image_wrist',)")
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
    "declared" (whether the robot's description says so), "kinds" ("other": not known), "names", "units".

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
        "kinds": [kind or "other" for kind in action_kinds(statistics, width)],
        "names": list(named.names),
        "units": list(named.units),
    }


def _bounds(statistics: Mapping[str, Any], field: str, width: int) -> np.ndarray:
    unknown = {"min": -np.inf, "max": np.inf}[field]
    return np.array(statistics.get(field, np.full(width, unknown)), np.float64)


def check_kinds(kinds: Sequence[str] | None, names: Sequence[str], whose: str = "") -> None:
    """Raises UnknownKind when there is a dimension of which nobody has said what keeps it where it is.

    Args:
      kinds: of the dimensions, see `octo_like.common.dimensions.KINDS`; "" and "other" say nothing.
      names: of the dimensions.
      whose: of what the kinds are, for the message.
    """
    kinds = ["other"] * len(names) if kinds is None else list(kinds)
    if len(kinds) != len(names):
        raise UnknownKind(f"{whose}{len(kinds)} kinds for {len(names)} action dimensions: {', '.join(names)}")
    for name, kind in _pairs(names, kinds):
        if kind not in (*HOLDS, "", "other"):
            raise UnknownKind(f"{whose}action {name!r}: unknown kind {kind!r}; {suggest(str(kind), HOLDS)}")
    unknown = [name for name, kind in _pairs(names, kinds) if kind not in HOLDS]
    if unknown:
        wanted = ", ".join(repr(kind) if kind in HOLDS else "..." for kind in kinds)
        raise UnknownKind(
            f"{whose}nobody has said what keeps {', '.join(unknown)} where they are, so nothing that may have to hold "
            f"the robot starts. Give the kind of each action dimension: kinds=({wanted},) here, or for good "
            "action_kinds in the dataset's config, or a robot's description. Valid: 'absolute' and 'gripper' (to hold "
            "is to repeat the command that was executed last), 'delta' and 'velocity' (to hold is to command 0)"
        )


def _pairs(names: Sequence[str], kinds: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, kinds[d]) for d, name in enumerate(names)]  # robots' clients run Pythons without zip(strict=True)


class ActionFilter:
    """Replaces what must not be executed, and counts it: values that are not finite, outside limits, or too fast. Keeps
    the record of what was executed last.

    A value that is not finite is held: zero for changes and velocities, otherwise the last value that was executed. A
    value outside the limits is clipped. A value that differs from the last one by more than `max_change` is brought
    nearer. The record is written by `executed` alone (and by calling the filter, for whoever executes what comes back).

    Attributes:
      counts: {"actions", "clipped", "slowed", "held"}: actions that passed, and those of them in which a dimension was
        changed for that reason, since the filter was made.
      last: (A,) float32 what was executed last; None: nothing since the episode began.

    Args:
      low: (A,) lower limits; None entries are unlimited.
      high: (A,) upper limits, likewise.
      kinds: of the dimensions, see `octo_like.common.dimensions.KINDS`: what keeps each where it is.
      max_change: (A,) or one number: largest change from one action to the next, None entries unlimited; of absolute
        actions and grippers, the largest step.
      names: of the dimensions, for messages.
      whose: of what the actions are, for messages.

    Raises:
      UnknownKind: see `check_kinds`.
      ValueError: lists of other lengths, limits that cannot be.
    """

    def __init__(
        self,
        low: Sequence[float | None],
        high: Sequence[float | None],
        *,
        kinds: Sequence[str] | None = None,
        max_change: Sequence[float | None] | float | None = None,
        names: Sequence[str] | None = None,
        whose: str = "",
    ):
        self.low = np.array([-np.inf if x is None else x for x in low], np.float64)
        self.high = np.array([np.inf if x is None else x for x in high], np.float64)
        width = len(self.low)
        change = list(max_change) if isinstance(max_change, (Sequence, np.ndarray)) else [max_change] * width
        self.max_change = np.array([np.inf if x is None else x for x in change], np.float64)
        self.names = list(Dimensions.unnamed(width).names) if names is None else list(names)
        lengths = {len(self.high), len(self.max_change), len(self.names), width}
        if len(lengths) > 1:
            raise ValueError(f"low, high, max_change and names must have one length, got {sorted(lengths)}")
        wrong = ~(self.low <= self.high) | ~(self.max_change > 0)
        if wrong.any():
            d = int(np.argmax(wrong))
            raise ValueError(
                f"{self.names[d]}: limits must be (lowest, highest) and max_change positive, got "
                f"({self.low[d]:g}, {self.high[d]:g}), {self.max_change[d]:g}"
            )
        check_kinds(kinds, self.names, whose)
        self.kinds = list(kinds or ())
        self._still = np.array([kind in STANDS_STILL for kind in self.kinds])
        self.counts = dict.fromkeys(("actions", "clipped", "slowed", "held"), 0)
        self._last: np.ndarray | None = None

    @classmethod
    def of(cls, limits: Mapping[str, Any], *, kinds: Sequence[str] | None = None, **options: Any) -> ActionFilter:
        """The filter of a dataset's `action_limits`; options as in the constructor, `kinds` in place of its own."""
        names = {"names": limits["names"], "kinds": limits["kinds"] if kinds is None else kinds}
        return cls(limits["low"], limits["high"], **{**names, **options})

    @property
    def last(self) -> np.ndarray | None:
        return None if self._last is None else self._last.astype(np.float32)

    def reset(self) -> None:
        """A new episode: nothing has been executed yet. The counts go on."""
        self._last = None

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """`safe`, and what comes back is executed: for whoever hands it to the motors in any case."""
        safe = self.safe(action)
        self.executed(safe)
        return safe

    def safe(self, action: np.ndarray) -> np.ndarray:
        """The action (A,) to execute next in place of one, float32.

        Raises:
          ValueError: another number of dimensions.
          UnsafeAction: a value is not finite, and none was executed before that could be held.
        """
        return self._safe(action, self._last).astype(np.float32)

    def chunk(self, actions: np.ndarray) -> np.ndarray:
        """A chunk (H, A) in place of one, each action as if those before it had been executed. Raises as `safe`."""
        done, last = [], self._last
        for action in np.asarray(actions):
            last = self._safe(action, last)
            done.append(last)
        return np.array(done, np.float32)

    def preview(self, actions: np.ndarray) -> np.ndarray:
        """`chunk`, uncounted: what will be executed of it when nothing comes between."""
        counts = dict(self.counts)
        try:
            return self.chunk(actions)
        finally:
            self.counts.update(counts)

    def _safe(self, action: np.ndarray, last: np.ndarray | None) -> np.ndarray:
        wanted = np.asarray(action, np.float64)
        self._check_width(wanted)
        finite = np.isfinite(wanted)
        given = np.where(finite, wanted, np.where(self._still, 0.0, np.nan if last is None else last))
        if not np.isfinite(given).all():
            d = int(np.argmin(np.isfinite(given)))
            raise UnsafeAction(f"{self.names[d]} is {wanted[d]}, and nothing was executed before that could be held")
        clipped = np.clip(given, self.low, self.high)
        safe = clipped if last is None else np.clip(clipped, last - self.max_change, last + self.max_change)
        self.counts["actions"] += 1
        self.counts["held"] += int(not finite.all())
        self.counts["clipped"] += int((clipped != given).any())
        self.counts["slowed"] += int((safe != clipped).any())
        return safe

    def executed(self, action: np.ndarray) -> None:
        """Records what was executed: an action of a chunk, a hold, or one that came from elsewhere.

        Raises:
          ValueError: another number of dimensions, or a value that is not finite: the record stays as it is.
        """
        done = np.array(action, np.float64)
        self._check_width(done)
        if not np.isfinite(done).all():
            raise ValueError(f"what was executed has a value that is not finite: {done.tolist()}")
        self._last = done

    def hold(self) -> np.ndarray:
        """The action (A,) that keeps the robot where it is: zero for changes and velocities, else the last one.

        It is on record when it was executed, as any other.

        Raises:
          UnsafeAction: nothing was executed yet, and a dimension is neither a change nor a velocity.
        """
        if self._last is None and not self._still.all():
            raise UnsafeAction(f"nothing was executed yet, so {self.names[int(np.argmin(self._still))]} cannot be held")
        return np.where(self._still, 0.0, 0.0 if self._last is None else self._last).astype(np.float32)

    def _check_width(self, action: np.ndarray) -> None:
        if action.shape != self.low.shape:
            raise ValueError(f"expected an action of {len(self.low)} dimensions, got shape {action.shape}")

    def __str__(self) -> str:
        changed = ", ".join(f"{self.counts[key]} {key}" for key in ("clipped", "slowed", "held"))
        return f"{self.counts['actions']} actions: {changed}"
