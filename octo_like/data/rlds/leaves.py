"""The leaves of a standardised trajectory that a spec names: actions, proprioception, texts, pictures, points."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from octo_like.data.order import windows
from octo_like.data.oxe import vocabulary
from octo_like.data.spec import DataError, DatasetSpec, suggest
from octo_like.data.tf import tf

MAX_TEXT = 4096  # bytes; whatever string is longer is no instruction


def _require(
    tree: Mapping[str, Any], path: str, what: str, spec: DatasetSpec, fits: Callable[[tf.Tensor], bool]
) -> tf.Tensor:
    leaf = vocabulary.lookup(tree, path)
    if leaf is None or isinstance(leaf, Mapping):
        problem = f"no {what} {path!r}"
    elif not fits(leaf):
        problem = f"{path!r} cannot be the {what}: it is {leaf.dtype.name} {leaf.shape}"
    else:
        return leaf
    after = f" after {spec.standardize}" if spec.standardize else ""
    valid = [key for key, value in vocabulary.leaves_of(tree).items() if fits(value)]
    raise DataError(f"{spec.name}: {problem}{after}; {suggest(path, valid)}")


def _is_image(x: tf.Tensor) -> bool:
    return (x.dtype == tf.string and x.shape.rank == 1) or (x.dtype == tf.uint8 and x.shape.rank == 4)


def _is_depth(x: tf.Tensor) -> bool:
    if x.dtype == tf.string:
        return x.shape.rank == 1
    return (x.dtype.is_floating or x.dtype.is_integer) and (x.shape.rank == 3 or x.shape.rank == 4 and x.shape[-1] == 1)


def _is_point(x: tf.Tensor) -> bool:
    return x.dtype.is_floating and x.shape.rank == 2 and x.shape[-1] in (2, 4)


def _is_text(x: tf.Tensor) -> bool:
    return x.dtype == tf.string and x.shape.rank == 1


def _is_sensor(x: tf.Tensor) -> bool:
    return _is_numeric(x, *range(1, 6)) and x.shape[1:].is_fully_defined()


def _is_numeric(x: tf.Tensor, *ranks: int) -> bool:
    return (x.dtype.is_floating or x.dtype.is_integer or x.dtype.is_bool) and x.shape.rank in ranks


def select(trajectory: Mapping[str, Any], spec: DatasetSpec) -> dict[str, Any]:
    """The leaves of a standardised trajectory that a spec names.

    Returns:
      {"action": (T, A) float32, or (T, N, A) when actions come in chunks, (T, 0) without actions; "target" (T,) string,
      what is to be said (absent without text_keys); "proprio": (T, P) float32 (absent without
      proprio_keys); "language": (T,) string, empty where it is no text (absent without language_key); "images": {slot:
      (T,) encoded strings or (T, h, w, 3) uint8}; "depths": {slot: (T,) encoded strings or (T, h, w) or (T, h, w, 1)
      numbers}; "points": {name: (T, 2) points or (T, 4) boxes, float32}; "extras": {name: (T, ...) float32, (T, 1) of
      one number a step}}.

    Raises:
      DataError: a key that is not there, or of the wrong kind or shape, with the valid ones.
    """
    observation = trajectory.get("observation")
    if not isinstance(observation, Mapping):
        raise DataError(f"{spec.name}: a trajectory has no `observation`; its keys: {', '.join(map(str, trajectory))}")
    chosen: dict[str, Any] = {}
    if spec.text_target is not None:
        kind, key = spec.text_target
        what = f"text to learn of kind {kind!r} (a string per step)"
        chosen["target"] = _as_texts(_require(trajectory, key, what, spec, _is_text))
    if spec.action_key is None:
        chosen["action"] = tf.zeros([tf.shape(chosen["target"])[0], 0])
    else:
        action = _require(trajectory, spec.action_key, "action", spec, lambda x: _is_numeric(x, 2, 3))
        chosen["action"] = tf.cast(action, tf.float32)
    chosen |= {"images": {}, "depths": {}, "points": {}, "extras": {}}
    if spec.proprio_keys:
        parts = []
        for key in spec.proprio_keys:
            key = key.removeprefix("observation/")
            part = _require(observation, key, "proprio key", spec, lambda x: _is_numeric(x, 1, 2))
            parts.append(tf.cast(part[:, None] if part.shape.rank == 1 else part, tf.float32))
        chosen["proprio"] = tf.concat(parts, axis=-1)
    if spec.relative_to is not None:
        try:
            chosen["action"] = relative_chunks(
                chosen["action"], chosen["proprio"], spec.relative_to, spec.chunk_length or 1
            )
        except DataError as error:
            raise DataError(f"{spec.name}: {error}") from error
    if spec.language_key is not None:
        kind = "instruction (a string per step)"
        chosen["language"] = _as_texts(_require(trajectory, spec.language_key, kind, spec, _is_text))
    for group, keys, what, fits in (
        ("images", spec.image_keys, "image of camera {!r}", _is_image),
        ("depths", spec.depth_keys, "depth of camera {!r}", _is_depth),
        ("points", spec.point_keys, "point {!r} (2 numbers, or 4 of a box)", _is_point),
        ("extras", spec.extra_keys, "sensor {!r} (numbers, of a shape that is known before reading)", _is_sensor),
    ):
        for name, place in keys.items():
            if place is not None:
                values = _require(observation, place.removeprefix("observation/"), what.format(name), spec, fits)
                if group in ("points", "extras"):
                    values = tf.cast(values[:, None] if values.shape.rank == 1 else values, tf.float32)
                chosen[group][name] = values
    return chosen


class Selected(abc.ABC):
    """What is known of the results of `select` before a trajectory is read."""

    spec: DatasetSpec

    @property
    @abc.abstractmethod
    def output(self) -> Any:
        """The structure that `select` gives, with shapes and dtypes in place of tensors."""

    @property
    def action_dim(self) -> int:
        return self._width("action")

    @property
    def action_chunk(self) -> int | None:
        """N, when each step has a chunk of N actions; None when it has one action."""
        shape = self.output["action"].shape
        if shape.rank == 2:
            return None
        if shape[1] is None:
            raise DataError(
                f"{self.spec.name}: the number of actions in each chunk of {self.spec.action_key!r} is not known "
                "before reading; give it a static shape in the standardize function (tf.ensure_shape)"
            )
        return int(shape[1])

    @property
    def proprio_dim(self) -> int | None:
        return self._width("proprio") if "proprio" in self.output else None

    @property
    def extra_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one step's values of each other sensor."""
        return {name: tuple(spec.shape[1:]) for name, spec in self.output["extras"].items()}

    def _width(self, key: str) -> int:
        width = self.output[key].shape[-1]
        if width is None:
            raise DataError(
                f"{self.spec.name}: the width of {key!r} is not known before reading; give it a static shape "
                "in the standardize function (tf.ensure_shape)"
            )
        return int(width)


def text_keys(features: Any) -> set[str]:
    """Where texts may be: the string features of a step, and where standardising functions put the instruction."""
    found = vocabulary.leaves_of(features["steps"].get_tensor_info())
    texts = (key for key, one in found.items() if one.tf_dtype == tf.string and one.shape == ())
    return {"language_instruction", *texts}


def texts_of(trajectory: Mapping[str, Any], keys: Iterable[str]) -> dict[str, tf.Tensor]:
    """{key: (T,) texts} of those of `keys` that a trajectory has."""
    found = {}
    for key in sorted(keys):
        leaf = vocabulary.lookup(trajectory, key)
        if leaf is not None and not isinstance(leaf, Mapping) and leaf.dtype == tf.string and leaf.shape.rank == 1:
            found[key] = _as_texts(leaf)
    return found


def _as_texts(strings: tf.Tensor) -> tf.Tensor:
    """(T,) strings, empty where they are encoded pictures or other bytes: very long, or with a zero."""
    short = tf.where(tf.strings.length(strings) <= MAX_TEXT, strings, "")
    return tf.where(tf.strings.regex_full_match(short, r"(?s)\C*\x00\C*"), "", short)


def picture_bytes(trajectory: Mapping[str, Any], steps: tf.Tensor) -> dict[str, tf.Tensor]:
    """{key below `observation`: int32 bytes} of everything that can be a camera's pictures or depth.

    -1 where there is not one picture for each of the steps.
    """
    found = {}
    for key, leaf in sorted(vocabulary.leaves_of(trajectory["observation"]).items()):
        if _is_image(leaf) or _is_depth(leaf):
            text = leaf.dtype == tf.string
            size = tf.reduce_sum(tf.strings.length(leaf)) if text else tf.size(leaf) * leaf.dtype.size
            found[key] = tf.where(tf.shape(leaf)[0] == steps, size, -1)
    return found


def relative_chunks(action: tf.Tensor, proprio: tf.Tensor, relative_to: Sequence[int | None], length: int) -> tf.Tensor:
    """Chunks (T, length, A) of absolute actions, relative to the proprioception at the chunk's own first step.

    chunk[t, h, d] = action[min(t + h, T - 1), d] - proprio[t, relative_to[d]], without the second term where
    `relative_to[d]` is None. A robot adds its proprioception at the time of the prediction to all actions of a chunk.

    Args:
      action: (T, A) float32. proprio: (T, P) float32.
      relative_to: A entries.

    Raises:
      DataError: actions that come in chunks already, a wrong number of entries, no such proprioception dimension.
    """
    if action.shape.rank != 2:
        raise DataError(f"relative_to needs actions of shape (T, A), got {action.shape}")
    if len(relative_to) != action.shape[-1]:
        raise DataError(f"relative_to has {len(relative_to)} entries, but the action has {action.shape[-1]} dimensions")
    wrong = [p for p in relative_to if p is not None and not 0 <= p < proprio.shape[-1]]
    if wrong:
        raise DataError(f"relative_to names proprio dimension {wrong[0]}; valid: 0 to {proprio.shape[-1] - 1}")
    steps = tf.shape(action)[0]
    chunk = windows.within(windows.chunk_steps(tf.range(steps), length), steps, xp=tf)
    base = tf.gather(proprio, [p or 0 for p in relative_to], axis=1)
    moves = tf.constant([p is not None for p in relative_to])
    return tf.gather(action, chunk) - tf.where(moves, base, 0.0)[:, None]
