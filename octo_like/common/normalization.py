"""Statistics of a dataset, and normalisation by them.

Statistics of one dataset are a plain dict:

    {"action": {"mean", "std", "min", "max", "p01", "p99", "mask"}, "proprio": {...} or absent,
     "extra": {sensor: {...}} or absent, "num_transitions": int, "num_trajectories": int}

The arrays are float32 of shape (D,) in physical units; `mask` is bool, False for dimensions that are passed through
unchanged (a gripper that is already 0 or 1). Those of another sensor are of one step's values laid flat. `normalize`
and `unnormalize` use operators only, so they take NumPy arrays, JAX arrays and JAX tracers alike, and return what they
were given.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common.words import suggest

Statistics = dict[str, Any]

KINDS = ("normal", "bounds")
FIELDS = ("mean", "std", "min", "max", "p01", "p99")

# A dimension that varies less than this is constant: it normalises to 0 and un-normalises to its mean.
CONSTANT = 1e-8


def compute_statistics(values: np.ndarray, mask: Sequence[bool] | None = None) -> dict[str, np.ndarray]:
    """Statistics over the first axis of `values` (N, D), accumulated in float64, returned as float32.

    `std` is the population deviation (exactly 0 for constant dimensions); percentiles interpolate linearly.
    """
    values = np.asarray(values)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"statistics need values of shape (N, D) with N > 0, got {values.shape}")
    wide = values.astype(np.float64)
    low, high = wide.min(0), wide.max(0)
    p01, p99 = np.quantile(wide, [0.01, 0.99], axis=0)
    constant = low == high
    stats = {
        "mean": np.where(constant, low, wide.mean(0)),
        "std": np.where(constant, 0.0, wide.std(0)),
        "min": low,
        "max": high,
        "p01": p01,
        "p99": p99,
    }
    result: dict[str, np.ndarray] = {key: value.astype(np.float32) for key, value in stats.items()}
    result["mask"] = np.ones(values.shape[1], bool) if mask is None else np.asarray(mask, bool)
    if result["mask"].shape != values.shape[1:]:
        raise ValueError(f"mask has {result['mask'].size} entries, but the values have {values.shape[1]} dimensions")
    return result


def choose_units(statistics: Mapping[str, Any], unnormalize: str | None, normalized: bool = False) -> str | None:
    """The dataset in whose units actions go to a robot; None: as the policy gives them, without units.

    Args:
      statistics: of the policy, by dataset.
      unnormalize: the dataset that was named.
      normalized: whether normalised numbers are wanted: a robot that executes them moves by other amounts.

    Raises:
      ValueError: no such dataset, none named although the policy has statistics, or one named beside `normalized`.
    """
    if normalized and unnormalize is not None:
        raise ValueError(
            f"normalized numbers have no units: leave out either normalized or unnormalize={unnormalize!r}"
        )
    if unnormalize is not None and unnormalize not in statistics:
        raise ValueError(f"unknown statistics {unnormalize!r}; {suggest(unnormalize, statistics)}")
    if normalized or unnormalize is not None:
        return unnormalize
    if statistics:
        raise ValueError(
            "unnormalize (--unnormalize) has to name the dataset in whose units the actions are; valid: "
            f"{', '.join(sorted(statistics))}. Numbers without units have to be requested by normalized (--normalized)"
        )
    return None


def _mask(stats: Mapping[str, Any]) -> np.ndarray:
    size = len(np.asarray(stats["mean"]))
    return np.ones(size, bool) if stats.get("mask") is None else np.asarray(stats["mask"], bool)


def _affine(stats: Mapping[str, Any], kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(centre, spread, constant, mask) so that normalised = (x - centre) / spread. All (D,)."""
    if kind == "normal":
        centre, spread = np.asarray(stats["mean"], np.float64), np.asarray(stats["std"], np.float64)
    elif kind == "bounds":
        low, high = np.asarray(stats["p01"], np.float64), np.asarray(stats["p99"], np.float64)
        centre, spread = (low + high) / 2, (high - low) / 2
    else:
        raise ValueError(f"unknown normalisation {kind!r}; valid: {', '.join(KINDS)}")
    return centre, spread, spread <= CONSTANT, _mask(stats)


def _check_width(x: Any, stats: Mapping[str, Any]) -> None:
    width = len(np.asarray(stats["mean"]))
    if x.shape[-1] != width:
        raise ValueError(f"values have {x.shape[-1]} dimensions on the last axis, the statistics have {width}")


def coefficients(stats: Mapping[str, Any], kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shift, scale, bound), (D,) float32 each: normalised = clip((x - shift) * scale, -bound, bound).

    The bound is infinite where nothing is clipped.
    """
    centre, spread, constant, mask = _affine(stats, kind)
    shift = np.where(mask, centre, 0.0)
    scale = np.where(mask, np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, spread)), 1.0)
    bound = np.where(mask & (kind == "bounds"), 1.0, np.inf)
    return shift.astype(np.float32), scale.astype(np.float32), bound.astype(np.float32)


def normalize(x: Any, stats: Mapping[str, Any], kind: str = "normal") -> Any:
    """Physical units to normalised values, over the last axis.

    Args:
      x: (..., D) floating array (NumPy or JAX).
      stats: statistics of this quantity, e.g. `statistics["action"]`.
      kind: "normal" ((x - mean) / std) or "bounds" (p01..p99 to [-1, 1], clipped).

    Dimensions whose mask is False are unchanged; constant dimensions become 0.
    """
    _check_width(x, stats)
    shift, scale, bound = coefficients(stats, kind)
    y = (x - shift) * scale
    return y.clip(-bound, bound) if kind == "bounds" else y


def normalize_sensor(x: Any, stats: Mapping[str, Any], kind: str = "normal") -> Any:
    """`normalize` of another sensor's values (..., *shape); its statistics are over `shape` laid flat."""
    width, axes = len(np.asarray(stats["mean"])), 1
    while axes < x.ndim and int(np.prod(x.shape[-axes:])) < width:
        axes += 1
    flat = x.reshape(*x.shape[: x.ndim - axes], -1)
    return normalize(flat, stats, kind).reshape(x.shape)


def normalize_extras(values: Mapping[str, Any], statistics: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """{sensor: values}, normalised by a dataset's statistics."""
    return {name: normalize_sensor(x, statistics["extra"][name], kind) for name, x in values.items()}


def unnormalize(x: Any, stats: Mapping[str, Any], kind: str = "normal") -> Any:
    """Inverse of `normalize` (up to clipping): back to physical units. Constant dimensions give their mean."""
    _check_width(x, stats)
    centre, spread, constant, mask = _affine(stats, kind)
    mean = np.asarray(stats["mean"], np.float64)
    scale = np.where(mask, np.where(constant, 0.0, spread), 1.0).astype(np.float32)
    shift = np.where(mask, np.where(constant, mean, centre), 0.0).astype(np.float32)
    return x * scale + shift


def to_absolute(action: Any, proprio: Any, relative_to: Sequence[int | None]) -> Any:
    """Actions relative to the proprioception of the time of their prediction, made absolute again.

    action[..., d] + proprio[..., relative_to[d]], without the second term where `relative_to[d]` is None: the inverse
    of what `DatasetSpec.relative_to` does to training's chunks.

    Args:
      action: (..., A) in physical units (NumPy or JAX).
      proprio: (..., P) in physical units, with leading dimensions that broadcast to those of `action`.
      relative_to: A entries.
    """
    moves = np.array([p is not None for p in relative_to])
    base = proprio[..., np.array([p or 0 for p in relative_to])]
    return action + base * moves


def to_relative(action: Any, proprio: Any, relative_to: Sequence[int | None]) -> Any:
    """Inverse of `to_absolute` for the same arguments."""
    return to_absolute(action, -proprio, relative_to)


def to_json(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics (of one dataset, or a dict of them by name) as JSON-able lists and numbers."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value

    return convert(statistics)


def from_json(data: Mapping[str, Any] | str) -> dict[str, Any]:
    """Inverse of `to_json`. Also reads a JSON string, and statistics without `mask` (all True then).

    Raises:
      ValueError: an entry lacks one of the fields, named.
    """
    data = json.loads(data) if isinstance(data, str) else data
    if not isinstance(data, Mapping):
        raise ValueError(f"statistics must be a mapping, got {type(data).__name__}")
    if "action" not in data:
        return {name: from_json(entry) for name, entry in data.items()}

    def arrays(key: str, value: Mapping[str, Any]) -> dict[str, np.ndarray]:
        missing = [field for field in FIELDS if field not in value]
        if missing:
            raise ValueError(f"statistics of {key} lack {', '.join(missing)}; they have {', '.join(value)}")
        return {**{field: np.asarray(value[field], np.float32) for field in FIELDS}, "mask": _mask(value)}

    result: dict[str, Any] = {}
    for key, value in data.items():
        result[key] = arrays(key, value) if key in ("action", "proprio") else value
        if key == "extra":
            result[key] = {name: arrays(name, of_sensor) for name, of_sensor in value.items()}
    return result
