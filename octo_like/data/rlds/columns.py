"""What an index keeps of every step, side by side in one row of float32: action, proprioception, other sensors by name.

`function` has `action_dim`, `action_chunk`, `proprio_dim` and `extra_shapes`, as `rlds.EpisodeFunction` has.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def _shapes(function: Any) -> dict[str, tuple[int, ...]]:
    """{column group: shape of one step's values}, in the order of the columns."""
    action = (function.action_dim,) if function.action_chunk is None else (function.action_chunk, function.action_dim)
    extras = dict(sorted(function.extra_shapes.items()))
    return {"action": action, "proprio": (function.proprio_dim or 0,), **extras}


def width(function: Any) -> int:
    """Numbers in a row."""
    return sum(math.prod(shape) for shape in _shapes(function).values())


def to_rows(item: Mapping[str, Any], function: Any) -> np.ndarray:
    """(T, width) of an episode {"action", "proprio" (may be absent), "extras": {name: values}}."""
    steps = len(item["action"])
    values = {"proprio": np.zeros((steps, 0), np.float32), **item, **item["extras"]}
    parts = [np.reshape(values[key], (steps, math.prod(shape))) for key, shape in _shapes(function).items()]
    return np.concatenate(parts, axis=1)


def from_rows(rows: np.ndarray, function: Any) -> dict[str, np.ndarray]:
    """{"action": (n, A) or (n, N, A), "proprio": (n, P), name: (n, ...)} of rows (n, width); P may be 0."""
    shapes = _shapes(function)
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(rows, ends[:-1], axis=1)
    return {key: part.reshape(len(rows), *shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}
