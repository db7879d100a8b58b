"""Functions on frames and trajectories, with the names that dlimp gives them in `transforms`, `utils`, `augmentations`.

They serve pipelines of your own, where they are `dl.transforms` (`from octo_like.data import dlimp as dl`). They do
what dlimp's do or raise an error; docs/data.md lists all names, and where they differ. They are TensorFlow's operations
on tensors of a graph; the training stream decodes and resizes in NumPy (`octo_like.data.batches.frames`, which the
tests hold to the same operations), and augments on the device.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from octo_like.common.schema import flatten, unflatten
from octo_like.data.spec import DataError, suggest
from octo_like.data.tf import tf

Match = str | Iterable[str] | Callable[[str, Any], bool]


def selective_tree_map(x: Mapping[str, Any], match: Match, map_fn: Callable[[Any], Any]) -> dict[str, Any]:
    """`map_fn` of the leaves of a nested dict that match; the others as they are.

    Args:
      match: a pattern of the leaf's whole path: `"image"` is the leaf of that name at the top, `"*image"` every path
        that ends so, `"*image*"` every path that has it anywhere. Several: any of them. Or a function of path and leaf.
    """
    matches: Callable[[str, Any], bool]
    if callable(match):
        matches = match
    else:
        patterns = _words(match, "selective_tree_map")
        matches = lambda path, value: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)  # noqa: E731

    def walk(tree: Mapping[str, Any], above: str) -> dict[str, Any]:
        result = {}
        for key, value in tree.items():
            if isinstance(value, Mapping):
                result[key] = walk(value, f"{above}{key}/")
            else:
                result[key] = map_fn(value) if matches(f"{above}{key}", value) else value
        return result

    return walk(x, "")


def _words(match: Any, where: str) -> list[str]:
    words = [match] if isinstance(match, str) else list(match) if isinstance(match, Iterable) else [match]
    if not all(isinstance(word, str) for word in words):
        raise DataError(f"{where}: match is {match!r}; valid: a string or several")
    return words


def _contains(match: str | Iterable[str], dtype: tf.DType, where: str) -> Callable[[str, Any], bool]:
    """Whether a leaf's path has one of the words anywhere, and its numbers are of a type."""
    words = _words(match, where)
    for word in words:
        if set(word) & set("*?"):
            raise DataError(
                f"{where}: match={word!r} is a pattern, which selective_tree_map and augment take; here it is a part "
                f"of the path, found anywhere in it, e.g. {word.strip('*?')!r}"
            )
    return lambda path, value: dtype == getattr(value, "dtype", None) and any(word in path for word in words)


def flatten_dict(d: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """{"a": {"b": x}} to {"a/b": x}."""
    return dict(flatten(d, sep=sep))


def unflatten_dict(d: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """{"a/b": x} to {"a": {"b": x}}, to any depth."""
    return unflatten(d, sep)


def add_next_obs(traj: Mapping[str, Any], pad: bool = True) -> dict[str, Any]:
    """A trajectory with `next_obs`: `obs` of the step after.

    Args:
      pad: the last step, which has none, gets its own `obs`. False: it is left out, everywhere.

    Raises:
      DataError: no `obs`.
    """
    if "obs" not in traj:
        raise DataError(f"add_next_obs: the trajectory has no 'obs'; {suggest('obs', traj)}")
    following = tf.nest.map_structure(lambda x: tf.concat([x[1:], x[-1:]], axis=0) if pad else x[1:], traj["obs"])
    steps = dict(traj) if pad else tf.nest.map_structure(lambda x: x[:-1], dict(traj))
    return {**steps, "next_obs": following}


def vmap(fn: Callable[[Any], Any], num_parallel_calls: int | None = None) -> Callable[[Any], Any]:
    """`fn` of one frame, applied to all frames of a trajectory (at least one)."""

    def mapped(trajectory: Any) -> Any:
        steps = tf.shape(tf.nest.flatten(trajectory)[0], tf.int64)[0]
        frames = tf.data.Dataset.from_tensor_slices(trajectory)
        frames = frames.map(fn, num_parallel_calls, deterministic=True if num_parallel_calls else None)
        return frames.batch(steps).get_single_element()

    return mapped


def parallel_vmap(fn: Callable[[Any], Any], num_parallel_calls: int | None = None) -> Callable[[Any], Any]:
    """`vmap` on several cores; None: on as many as tf.data likes."""
    return vmap(fn, tf.data.AUTOTUNE if num_parallel_calls is None else num_parallel_calls)


def tensor_feature(value: Any) -> Any:
    """A feature of a TFRecord: the serialised tensor, as `TrajectoryDataset.from_tfrecords` reads it."""
    content = tf.io.serialize_tensor(value).numpy()
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[content]))


# ---------------------------------------------------------------- images of one frame


def decode_images(x: Mapping[str, Any], match: str | Iterable[str] = "image") -> dict[str, Any]:
    """Decodes the strings among the leaves whose path contains `match`, encoded images, to (h, w, channels) uint8."""
    return selective_tree_map(
        x,
        _contains(match, tf.string, "decode_images"),
        lambda image: tf.io.decode_image(image, expand_animations=False),
    )


def resize_image(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """(..., h, w, channels) uint8 to (..., *size, channels) uint8: Lanczos3 with antialiasing, rounded.

    Raises:
      DataError: not uint8.
    """
    image = _with_dtype(image, tf.uint8, "resize_image")
    return _to_uint8(tf.image.resize(image, size, method="lanczos3", antialias=True))


def read_resize_encode_image(path: str, size: tuple[int, int]) -> tf.Tensor:
    """A JPEG file as a JPEG of another size, quality 95: what converters store."""
    return tf.io.encode_jpeg(resize_image(tf.image.decode_jpeg(tf.io.read_file(path)), size), quality=95)


def resize_images(
    x: Mapping[str, Any], match: str | Iterable[str] = "image", size: tuple[int, int] = (128, 128)
) -> dict[str, Any]:
    """`resize_image` of the uint8 leaves whose path contains `match`."""
    return selective_tree_map(x, _contains(match, tf.uint8, "resize_images"), lambda image: resize_image(image, size))


def resize_depth_image(depth_image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """(h, w) or (h, w, channels) float32 to the same of another size: bilinear with antialiasing.

    Raises:
      DataError: not float32.
    """
    depth = _with_dtype(depth_image, tf.float32, "resize_depth_image")
    flat = depth.shape.rank == 2
    resized = tf.image.resize(depth[..., None] if flat else depth, size, method="bilinear", antialias=True)
    return resized[..., 0] if flat else resized


def resize_depth_images(
    x: Mapping[str, Any], match: str | Iterable[str] = "depth", size: tuple[int, int] = (128, 128)
) -> dict[str, Any]:
    """`resize_depth_image` of the float32 leaves whose path contains `match`."""
    matches = _contains(match, tf.float32, "resize_depth_images")
    return selective_tree_map(x, matches, lambda depth: resize_depth_image(depth, size))


# ---------------------------------------------------------------- augmentation


def random_resized_crop(image: tf.Tensor, scale: Sequence[float], ratio: Sequence[float], seed: tf.Tensor) -> tf.Tensor:
    """A crop of an image (h, w, channels) in [0, 1], or of each of a batch, scaled back to (h, w).

    One number in [0, 1) decides area, aspect and place of an image's crop, as in dlimp: large crops are wide ones, and
    lie to the lower right.

    Args:
      scale: least and greatest share of the area. ratio: of width by height, drawn evenly in its logarithm.
      seed: (2,) integers.

    Raises:
      DataError: neither an image nor a batch of images.
    """
    if image.shape.rank not in (3, 4):
        raise DataError(f"random_resized_crop needs (h, w, channels) or a batch of such images, got {image.shape}")
    images = image[None] if image.shape.rank == 3 else image
    count = tf.shape(images)[0]
    draw = tf.random.stateless_uniform([count], seed)
    area = scale[0] + draw * (scale[1] - scale[0])
    low, high = tf.math.log(tf.cast(ratio[0], tf.float32)), tf.math.log(tf.cast(ratio[1], tf.float32))
    aspect = tf.exp(low + draw * (high - low))
    height, width = tf.minimum(tf.sqrt(area / aspect), 1.0), tf.minimum(tf.sqrt(area * aspect), 1.0)
    top, left = draw * (1 - height), draw * (1 - width)
    boxes = tf.stack([top, left, top + height, left + width], axis=1)
    crops = tf.image.crop_and_resize(images, boxes, tf.range(count), tf.shape(images)[1:3])
    return crops[0] if image.shape.rank == 3 else crops


def random_rot90(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Turned by a random multiple of 90 degrees."""
    return tf.image.rot90(image, tf.random.stateless_uniform([], seed, 0, 4, tf.int32))


AUGMENT_OPS = {
    "random_resized_crop": random_resized_crop,
    "random_brightness": tf.image.stateless_random_brightness,
    "random_contrast": tf.image.stateless_random_contrast,
    "random_saturation": tf.image.stateless_random_saturation,
    "random_hue": tf.image.stateless_random_hue,
    "random_flip_left_right": tf.image.stateless_random_flip_left_right,
    "random_flip_up_down": tf.image.stateless_random_flip_up_down,
    "random_rot90": random_rot90,
}


def augment_image(image: tf.Tensor, seed: Any = None, **augment_kwargs: Any) -> tf.Tensor:
    """An image (h, w, channels) after the operations of `augment_order`, each with a seed drawn from the one before.

    Args:
      image: uint8, or float in [0, 1]; the result is of the same type.
      seed: (2,) integers; None: another one each time.
      **augment_kwargs: `augment_order`, names of `AUGMENT_OPS`; and arguments of each: a dict, or a list of positional
        ones.

    Raises:
      DataError: no `augment_order`, no such operation, or arguments of one that `augment_order` does not name.
    """
    if "augment_order" not in augment_kwargs:
        raise DataError(f"augment_image needs augment_order, a list of operations; {suggest('', AUGMENT_OPS)}")
    order = list(augment_kwargs.pop("augment_order"))
    for name in order:
        if name not in AUGMENT_OPS:
            raise DataError(f"augment_order: no operation {name!r}; {suggest(name, AUGMENT_OPS)}")
    unused = sorted(set(augment_kwargs) - set(order))
    if unused:
        raise DataError(f"augment_image: {unused[0]!r} is not in augment_order; {suggest(unused[0], order)}")
    image = tf.convert_to_tensor(image)
    dtype, image = image.dtype, tf.image.convert_image_dtype(image, tf.float32)
    seed = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32) if seed is None else tf.convert_to_tensor(seed)
    for name in order:
        seed = tf.random.stateless_uniform([2], seed, maxval=tf.int32.max, dtype=tf.int32)
        arguments = augment_kwargs.get(name, {})
        # A config's dict need not be a dict.
        positional, named = ((), dict(arguments)) if hasattr(arguments, "items") else (arguments, {})
        image = tf.clip_by_value(AUGMENT_OPS[name](image, *positional, **named, seed=seed), 0.0, 1.0)
    return tf.image.convert_image_dtype(image, dtype, saturate=True)


def augment(
    x: Mapping[str, Any],
    match: Match = "*image",
    traj_identical: bool = True,
    keys_identical: bool = True,
    augment_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`augment_image` of the leaves of a frame that match.

    Args:
      match: see `selective_tree_map`.
      traj_identical: the same for all frames of a trajectory (the frame needs `_traj_index`).
      keys_identical: the same for all leaves.

    Raises:
      DataError: no `_traj_index`, or see `augment_image`.
    """
    if traj_identical and "_traj_index" not in x:
        raise DataError(
            "augment: the frame has no '_traj_index', which traj_identical=True needs; keep it, or give False"
        )
    if traj_identical:
        base = tf.stack([x["_traj_index"], x["_traj_index"]])
    else:
        base = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
    count = 0

    def augmented(image: tf.Tensor) -> tf.Tensor:
        nonlocal count
        seed = base if keys_identical else tf.random.experimental.stateless_fold_in(base, count)
        count += 1
        return augment_image(image, seed, **(augment_kwargs or {}))

    return selective_tree_map(x, match, augmented)


def _with_dtype(image: Any, dtype: tf.DType, where: str) -> tf.Tensor:
    image = tf.convert_to_tensor(image)
    if image.dtype != dtype:
        raise DataError(f"{where} needs {dtype.name}, got {image.dtype.name} {image.shape}")
    return image


def _to_uint8(image: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)
