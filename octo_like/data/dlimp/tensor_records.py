"""TFRecord files of trajectories whose every feature is one serialised tensor, as dlimp's converters write them."""

from collections.abc import Sequence
from typing import Any

from octo_like.data.rlds.cache_files import FILES
from octo_like.data.spec import DataError
from octo_like.data.tf import tf


def find_files(dir_or_paths: str | Sequence[str]) -> list[str]:
    """The *.tfrecord files of a folder, sorted, or the paths themselves.

    Raises:
      DataError: there is none.
    """
    if isinstance(dir_or_paths, str):
        names = FILES.names(dir_or_paths) or []
        paths = [tf.io.gfile.join(dir_or_paths, name) for name in names if name.endswith(".tfrecord")]
    else:
        paths = [str(path) for path in dir_or_paths]
    if not paths:
        raise DataError(f"no TFRecord files: {dir_or_paths!r}; valid: a folder with *.tfrecord files, or their paths")
    return paths


def specs_of(path: str) -> dict[str, tf.TensorSpec | None]:
    """{feature: type and shape of its tensor, of any length; None for plain bytes} of the first record of a file.

    Raises:
      DataError: no record, or a feature that is not one string of bytes.
    """
    first = next(tf.data.TFRecordDataset(path).take(1).as_numpy_iterator(), None)
    if first is None:
        raise DataError(f"{path}: no records")
    specs: dict[str, tf.TensorSpec | None] = {}
    for key, feature in tf.train.Example.FromString(first).features.feature.items():
        if len(feature.bytes_list.value) != 1:
            raise DataError(f"{path}: feature {key!r} is not one serialised tensor (tf.io.serialize_tensor)")
        contents = feature.bytes_list.value[0]
        # A serialised tensor begins with its number type, the field 1 of its message; no text begins with this byte.
        if contents[:1] != b"\x08":
            specs[key] = None
            continue
        tensor = tf.io.parse_tensor(contents, tf.as_dtype(contents[1]))
        specs[key] = tf.TensorSpec([None, *tensor.shape[1:]] if tensor.shape.rank else [], tensor.dtype)
    return specs


def parse_trajectory(record: tf.Tensor, specs: dict[str, tf.TensorSpec | None]) -> dict[str, Any]:
    """A record as a trajectory of T steps, T the greatest length; scalars and tensors of length 1 are repeated.

    Added: `_len` and `_frame_index` (int32).
    """
    features = tf.io.parse_single_example(record, {key: tf.io.FixedLenFeature([], tf.string) for key in specs})
    tensors = {}
    for key, spec in specs.items():
        tensor = features[key]
        if spec is not None:
            tensor = tf.ensure_shape(tf.io.parse_tensor(tensor, spec.dtype), spec.shape)
        tensors[key] = tensor[None] if tensor.shape.rank == 0 else tensor
    lengths = {key: tf.shape(tensor)[0] for key, tensor in tensors.items()}
    steps = tf.reduce_max(list(lengths.values()))
    trajectory = {}
    for key, tensor in tensors.items():
        fits = tf.debugging.assert_equal(
            (lengths[key] == steps) | (lengths[key] == 1), True, f"{key!r} is neither of length 1 nor as long as others"
        )
        with tf.control_dependencies([fits] if fits is not None else []):
            repeats = tf.where(lengths[key] == steps, 1, steps)
            trajectory[key] = tf.repeat(tensor, repeats, axis=0)
    trajectory["_len"] = tf.repeat(steps, steps)
    trajectory["_frame_index"] = tf.range(steps)
    return trajectory
