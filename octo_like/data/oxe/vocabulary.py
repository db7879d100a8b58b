"""The closed vocabulary in which the registry says what a dataset's actions and proprioception mean.

An expression is built from `field("observation/state")[0:6]`, `concat(...)`, `delta(...)`, ... and evaluated on a
trajectory: a dict of tensors whose first axis is the step ("steps", T) and whose last is the feature axis. Expressions
are plain frozen data, so they can be printed, compared and hashed. A user's own function (dict of tensors -> dict of
tensors) may use the same operations through `evaluate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from octo_like.common.words import suggest
from octo_like.data.errors import DataError
from octo_like.data.tf import tf

Trajectory = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Expression:
    """One operation with its arguments (expressions) and settings."""

    op: str
    args: tuple[Expression, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, key: int | slice) -> Expression:
        """Feature `key` (that axis disappears) or a range of features."""
        if isinstance(key, slice):
            if key.step not in (None, 1):
                raise ValueError("feature ranges have no step")
            return Expression("slice", (self,), (("start", key.start), ("stop", key.stop)))
        return Expression("index", (self,), (("i", int(key)),))

    # Without this, Python would iterate an expression through __getitem__ for ever.
    __iter__ = None


def _build(op: str, *args: Expression, **settings: Any) -> Expression:
    return Expression(op, args, tuple(settings.items()))


def field(path: str, *, before_pre_steps: bool = False) -> Expression:
    """The leaf at `path`; `before_pre_steps`: as it was before the steps were cut."""
    return _build("field", path=path, before_pre_steps=before_pre_steps)


def concat(*args: Expression) -> Expression:
    """Joined along the feature axis."""
    return _build("concat", *args)


def expand(arg: Expression) -> Expression:
    """(T,) to (T, 1)."""
    return _build("expand", arg)


def cast(arg: Expression, dtype: str) -> Expression:
    return _build("cast", arg, dtype=dtype)


def clip(arg: Expression, lo: float, hi: float) -> Expression:
    return _build("clip", arg, lo=lo, hi=hi)


def divide(arg: Expression, by: Expression | float) -> Expression:
    """Element-wise quotient by an expression or a number."""
    return _build("divide", arg, _operand(by))


def multiply(arg: Expression, factor: Expression | float) -> Expression:
    """Element-wise product with an expression or a number."""
    return _build("multiply", arg, _operand(factor))


def _operand(value: Expression | float) -> Expression:
    return value if isinstance(value, Expression) else _build("number", value=float(value))


def invert_gripper(arg: Expression) -> Expression:
    """1 - x, unclipped."""
    return _build("invert_gripper", arg)


def zeros(width: int, dtype: str = "float32") -> Expression:
    return _build("zeros", width=width, dtype=dtype)


def ones(width: int, dtype: str = "float32") -> Expression:
    return _build("ones", width=width, dtype=dtype)


def delta(arg: Expression) -> Expression:
    """x[t+1] - x[t]: one step shorter; angles are not wrapped."""
    return _build("delta", arg)


def drop_last_step(arg: Expression) -> Expression:
    return _build("drop_last_step", arg)


def binarize_gripper(arg: Expression, open_above: float = 0.95, closed_below: float = 0.05) -> Expression:
    """Absolute gripper (T,) to open 1 / closed 0.

    Steps in between take the next decided state; a run of them at the end takes the raw last value.
    """
    return _build("binarize_gripper", arg, open_above=open_above, closed_below=closed_below)


def rel_to_abs_gripper(arg: Expression, threshold: float = 0.1) -> Expression:
    """Relative commands (T,), positive closes, to open 1 / closed 0. The first command is taken as a real change."""
    return _build("rel_to_abs_gripper", arg, threshold=threshold)


def euler_from_quat(arg: Expression, order: str = "xyzw") -> Expression:
    """Quaternions (T, 4) to fixed-axis x, y, z angles (T, 3)."""
    return _build("euler_from_quat", arg, order=order)


def rotate_by_heading(vec: Expression, yaw: Expression) -> Expression:
    """World vectors (T, 2) seen from a frame rotated by yaw (T, 1)."""
    return _build("rotate_by_heading", vec, yaw)


def first_step_norm_ratio(num: Expression, den: Expression, *, moving: bool = False) -> Expression:
    """Norm of the first row of `num` over that of `den`: a scalar. NaN or infinite when the latter is 0.

    `moving`: of the first row where neither is 0 instead; 1 when there is none.
    """
    # The setting appears only when it is set: a definition's hash does not depend on settings nobody uses.
    return _build("first_step_norm_ratio", num, den, **({"moving": True} if moving else {}))


# Operations that leave the width and the meaning of their first argument.
_SAME = ("drop_last_step", "cast", "clip", "multiply", "divide", "rotate_by_heading")


def changes(action: Expression, width: int) -> set[int]:
    """The columns of an action of `width` columns that are computed as changes from one step to the next, or are 0."""
    found, start = set[int](), 0
    for part in action.args if action.op == "concat" else (action,):
        while part.op in _SAME:
            part = part.args[0]
        columns = width if part is action or action.op != "concat" else _width(part)
        if columns is None:
            return found
        if part.op in ("delta", "zeros"):
            found |= set(range(start, start + columns))
        start += columns
    return found


def _width(part: Expression) -> int | None:
    """Columns of a part of an action; None: the expression does not say."""
    settings = dict(part.settings)
    if part.op in ("zeros", "ones"):
        return settings["width"]
    if part.op == "slice" and None not in settings.values() and min(settings.values()) >= 0:
        return settings["stop"] - settings["start"]
    return _width(part.args[0]) if part.op == "delta" else None


def zlib_floats(arg: Expression, width: int) -> Expression:
    """Each step inflated and read as little-endian float32: (T, width)."""
    return _build("zlib_floats", arg, width=width)


def blank_text() -> Expression:
    """No instruction: an empty string per step."""
    return _build("blank_text")


def codepoints_to_text(arg: Expression) -> Expression:
    """Rows of Unicode code points, cut at the first 0, to UTF-8 text."""
    return _build("codepoints_to_text", arg)


# ---------------------------------------------------------------- values


def _binarize_gripper(x: tf.Tensor, open_above: float, closed_below: float) -> tf.Tensor:
    is_open, is_closed = x > tf.constant(open_above, x.dtype), x < tf.constant(closed_below, x.dtype)
    decided = tf.where(is_open | is_closed)[:, 0]
    states = tf.concat([tf.gather(tf.cast(is_open, x.dtype), decided), x[-1:]], 0)
    following = tf.searchsorted(decided, tf.range(tf.size(x, tf.int64)), side="left")
    return tf.gather(states, following)


def _rel_to_abs_gripper(x: tf.Tensor, threshold: float) -> tf.Tensor:
    opens, closes = x < tf.constant(-threshold, x.dtype), x > tf.constant(threshold, x.dtype)
    events = tf.where(opens | closes)[:, 0]
    states = tf.gather(tf.cast(opens, tf.float32), events)
    before = tf.concat([1 - states[:1], tf.ones([tf.cast(tf.size(events) == 0, tf.int32)])], 0)
    past = tf.searchsorted(events, tf.range(tf.size(x, tf.int64)), side="right")
    return tf.gather(tf.concat([before, states], 0), past)


def _euler_from_quat(quat: tf.Tensor, order: str) -> tf.Tensor:
    parts = dict(zip(order, tf.unstack(quat, axis=-1), strict=True))
    x, y, z, w = (parts[name] for name in "xyzw")
    r00, r01, r02 = 1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)
    r10, r20 = 2 * (x * y + z * w), 2 * (x * z - y * w)
    r21, r22 = 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)
    sign = tf.where(r20 < 0, -tf.ones_like(r20), tf.ones_like(r20))
    locked = tf.abs(tf.abs(r20) - 1) < 1e-6  # pitch of +-90 degrees: roll and yaw are one angle, given to roll
    pitch = tf.where(locked, -sign * tf.constant(np.pi / 2, quat.dtype), -tf.asin(tf.clip_by_value(r20, -1, 1)))
    roll = tf.where(locked, tf.atan2(-sign * r01, -sign * r02), tf.atan2(r21, r22))
    yaw = tf.where(locked, tf.zeros_like(r20), tf.atan2(r10, r00))
    return tf.stack([roll, pitch, yaw], axis=-1)


def _rotate_by_heading(vec: tf.Tensor, yaw: tf.Tensor) -> tf.Tensor:
    cos, sin = tf.cos(yaw), tf.sin(yaw)
    return tf.concat([cos * vec[:, :1] + sin * vec[:, 1:], -sin * vec[:, :1] + cos * vec[:, 1:]], axis=-1)


def _first_step_norm_ratio(num: tf.Tensor, den: tf.Tensor, moving: bool = False) -> tf.Tensor:
    if not moving:
        return tf.norm(num[:1]) / tf.norm(den[:1])
    steps = tf.minimum(tf.shape(num)[0], tf.shape(den)[0])
    above, below = tf.norm(num[:steps], axis=-1), tf.norm(den[:steps], axis=-1)
    ratios = tf.boolean_mask(above, (above > 0) & (below > 0)) / tf.boolean_mask(below, (above > 0) & (below > 0))
    return tf.concat([ratios, tf.ones([1], num.dtype)], 0)[0]


def _zlib_floats(x: tf.Tensor, width: int) -> tf.Tensor:
    return tf.reshape(tf.io.decode_raw(tf.io.decode_compressed(x, "ZLIB"), tf.float32), [-1, width])


def _codepoints_to_text(rows: tf.Tensor) -> tf.Tensor:
    rows = tf.cast(rows, tf.int32)
    lengths = tf.reduce_sum(tf.math.cumprod(tf.cast(rows != 0, tf.int32), axis=-1), axis=-1)
    ragged = tf.RaggedTensor.from_tensor(rows, lengths=lengths)
    return tf.strings.unicode_encode(ragged, "UTF-8", errors="replace")


OPERATIONS: dict[str, Callable[..., tf.Tensor]] = {
    "concat": lambda *args: tf.concat(args, axis=-1),
    "slice": lambda x, start, stop: x[..., start:stop],
    "index": lambda x, i: x[..., i],
    "expand": lambda x: x[..., None],
    "cast": lambda x, dtype: tf.cast(x, dtype),
    "clip": lambda x, lo, hi: tf.clip_by_value(x, tf.constant(lo, x.dtype), tf.constant(hi, x.dtype)),
    "divide": lambda x, by: x / by,
    "multiply": lambda x, factor: x * factor,
    "invert_gripper": lambda x: 1 - x,
    "delta": lambda x: x[1:] - x[:-1],
    "drop_last_step": lambda x: x[:-1],
    "binarize_gripper": _binarize_gripper,
    "rel_to_abs_gripper": _rel_to_abs_gripper,
    "euler_from_quat": _euler_from_quat,
    "rotate_by_heading": _rotate_by_heading,
    "first_step_norm_ratio": _first_step_norm_ratio,
    "zlib_floats": _zlib_floats,
    "codepoints_to_text": _codepoints_to_text,
}


def lookup(trajectory: Mapping[str, Any], path: str) -> Any:
    """What is at "a/b/c", or None. A key may itself contain slashes."""
    if path in trajectory:
        return trajectory[path]
    for cut in (i for i, letter in enumerate(path) if letter == "/"):
        child = trajectory.get(path[:cut])
        found = lookup(child, path[cut + 1 :]) if isinstance(child, Mapping) else None
        if found is not None:
            return found
    return None


def leaves_of(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a/b": leaf} of a nested trajectory."""
    result = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        result.update(leaves_of(value, path + "/") if isinstance(value, Mapping) else {path: value})
    return result


def get_leaf(trajectory: Mapping[str, Any], path: str) -> tf.Tensor:
    """The leaf at `path`. Raises DataError with the valid names."""
    leaf = lookup(trajectory, path)
    if leaf is None or isinstance(leaf, Mapping):
        raise DataError(f"no leaf {path!r} in the trajectory; {suggest(path, leaves_of(trajectory))}")
    return leaf


def steps_of(trajectory: Mapping[str, Any]) -> tf.Tensor:
    """T, the number of steps of a trajectory (scalar int32)."""
    return tf.shape(tf.nest.flatten(trajectory)[0])[0]


def evaluate(expression: Expression, trajectory: Trajectory, raw: Trajectory | None = None) -> tf.Tensor:
    """Value of an expression on a trajectory. `raw`: the trajectory before any step was cut."""
    settings = dict(expression.settings)
    if expression.op == "field":
        source = (raw or trajectory) if settings["before_pre_steps"] else trajectory
        return get_leaf(source, settings["path"])
    if expression.op in ("zeros", "ones"):
        shape = [steps_of(trajectory), settings["width"]]
        return tf.ensure_shape(getattr(tf, expression.op)(shape, settings["dtype"]), [None, settings["width"]])
    if expression.op == "blank_text":
        return tf.fill([steps_of(trajectory)], "")
    if expression.op not in OPERATIONS:
        raise DataError(f"unknown operation {expression.op!r}; {suggest(expression.op, OPERATIONS)}")
    # A number takes the type of the other operand, so it comes as a Python number.
    args = [
        dict(arg.settings)["value"] if arg.op == "number" else evaluate(arg, trajectory, raw) for arg in expression.args
    ]
    return OPERATIONS[expression.op](*args, **settings)


# ---------------------------------------------------------------- steps


def _subsample(tree: Trajectory, factor: int) -> Trajectory:
    return tf.nest.map_structure(lambda x: x[::factor], tree)


def _empty_if_fewer_than(tree: Trajectory, n: int) -> Trajectory:
    steps = steps_of(tree)
    keep = tf.where(steps < n, 0, steps)
    return tf.nest.map_structure(lambda x: x[:keep], tree)


STEP_OPERATIONS: dict[str, Callable[..., Trajectory]] = {
    "drop_first_steps": lambda tree, n: tf.nest.map_structure(lambda x: x[n:], tree),
    "drop_last_steps": lambda tree, n: tf.nest.map_structure(lambda x: x[:-n], tree),
    "subsample": _subsample,
    "empty_if_fewer_than": _empty_if_fewer_than,
}


def _apply_steps(tree: Trajectory, operations: tuple[tuple[str, int], ...]) -> Trajectory:
    for name, argument in operations:
        if name not in STEP_OPERATIONS:
            raise DataError(f"unknown step operation {name!r}; {suggest(name, STEP_OPERATIONS)}")
        tree = STEP_OPERATIONS[name](tree, argument)
    return tree


def _swap(trajectory: Trajectory, paths: tuple[str, str], probability: float) -> Trajectory:
    """Exchanges two leaves for a keyed share of the episodes: the coin is a hash of the first leaf's content."""
    a, b = (get_leaf(trajectory, path) for path in paths)
    first = a[0] if a.dtype == tf.string else tf.strings.as_string(tf.reduce_sum(tf.cast(a, tf.float64)))
    heads = tf.strings.to_hash_bucket_strong(first, 1 << 30, key=[0x0C70, 0x51DE]) < int(probability * (1 << 30))
    trajectory = _set_leaf(trajectory, paths[0], tf.where(heads, b, a))
    return _set_leaf(trajectory, paths[1], tf.where(heads, a, b))


def _set_leaf(tree: Mapping[str, Any], path: str, value: Any) -> Trajectory:
    head, _, rest = path.partition("/")
    if not rest:
        return {**tree, head: value}
    child = tree.get(head)
    return {**tree, head: _set_leaf(child if isinstance(child, Mapping) else {}, rest, value)}


def _remove_leaf(tree: Trajectory, path: str) -> Trajectory:
    head, _, rest = path.partition("/")
    if rest and isinstance(tree.get(head), Mapping):
        return {**tree, head: _remove_leaf(tree[head], rest)}
    return {key: value for key, value in tree.items() if key != path}


@dataclasses.dataclass(frozen=True)
class Standardize:
    """A declarative trajectory function: what is cut, computed, kept and removed, in this order.

    Attributes:
      outputs: path -> expression, all on the trajectory after `pre_steps`.
      pre_steps: step operations on every leaf, e.g. (("drop_first_steps", 1),).
      passthrough_steps: step operations on the leaves that are not outputs (outputs are already final).
      removes: leaves deleted at the end.
      swap: (path, path, probability): two leaves exchanged for a share of the episodes.
      hint: what to tell the user when a leaf is not there. It changes nothing, so it is no part of the definition.
    """

    outputs: Mapping[str, Expression] = dataclasses.field(default_factory=dict)
    pre_steps: tuple[tuple[str, int], ...] = ()
    passthrough_steps: tuple[tuple[str, int], ...] = ()
    removes: tuple[str, ...] = ()
    swap: tuple[str, str, float] | None = None
    hint: str = dataclasses.field(default="", repr=False, compare=False)

    def __call__(self, raw: Trajectory) -> Trajectory:
        try:
            return self._apply(raw)
        except DataError as error:
            raise DataError(f"{error}. {self.hint}" if self.hint else str(error)) from error

    def _apply(self, raw: Trajectory) -> Trajectory:
        trajectory = _apply_steps(raw, self.pre_steps)
        values = {path: evaluate(expression, trajectory, raw) for path, expression in self.outputs.items()}
        result = _apply_steps(trajectory, self.passthrough_steps)
        for path, value in values.items():
            result = _set_leaf(result, path, value)
        if self.swap is not None:
            result = _swap(result, self.swap[:2], self.swap[2])
        for path in self.removes:
            result = _remove_leaf(result, path)
        return result
