"""Functions on nested dicts of frames, with the names that dlimp gives them in `dlimp.transforms`.

They serve pipelines of your own on `octo_like.data.trajectory`, where they are `dl.transforms`. The training stream
decodes and resizes in `octo_like.data.frames`, and augments on the device.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octo_like.data.spec import DataError, suggest
from octo_like.data.tf import tf

Match = str | Sequence[str] | Callable[[str, Any], bool]


def selective_tree_map(x: Mapping[str, Any], match: Match, map_fn: Callable[[Any], Any]) -> dict[str, Any]:
    """`map_fn` of the leaves of a nested dict that match; the others as they are.

    Args:
      match: part of the leaf's path ("observation/image"), or a pattern of it when it has one of `*?[`; several: any of
        them. Or a function of path and leaf.
    """
    if not callable(match):
        return selective_tree_map(x, _matcher(match), map_fn)

    def walk(tree: Mapping[str, Any], above: str) -> dict[str, Any]:
        result = {}
        for key, value in tree.items():
            if isinstance(value, Mapping):
                result[key] = walk(value, f"{above}{key}/")
            else:
                result[key] = map_fn(value) if match(f"{above}{key}", value) else value
        return result

    return walk(x, "")


def _matcher(match: str | Sequence[str], dtype: tf.DType | None = None) -> Callable[[str, Any], bool]:
    words = [match] if isinstance(match, str) else list(match)

    def matches(path: str, value: Any) -> bool:
        if dtype is not None and getattr(value, "dtype", None) != dtype:
            return False
        return any(fnmatch.fnmatchcase(path, w) if set(w) & set("*?[") else w in path for w in words)

    return matches


def flatten_dict(d: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """{"a": {"b": x}} to {"a/b": x}."""
    flat = {}
    for key, value in d.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{sep}{below}": leaf for below, leaf in flatten_dict(value, sep).items()}
        else:
            flat[key] = value
    return flat


def unflatten_dict(d: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """{"a/b": x} to {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in d.items():
        *above, last = path.split(sep)
        folder = tree
        for key in above:
            folder = folder.setdefault(key, {})
        folder[last] = leaf
    return tree


def add_next_obs(traj: Mapping[str, Any]) -> dict[str, Any]:
    """A trajectory without its last step, with `next_obs`: `obs` of the step after."""
    return tf.nest.map_structure(lambda x: x[:-1], dict(traj)) | {
        "next_obs": tf.nest.map_structure(lambda x: x[1:], traj["obs"])
    }


# ---------------------------------------------------------------- images of one frame


def decode_images(x: Mapping[str, Any], match: str | Sequence[str] = "image") -> dict[str, Any]:
    """Decodes the strings among the leaves whose path matches, each an encoded image, to (h, w, channels) uint8."""
    return selective_tree_map(
        x, _matcher(match, tf.string), lambda image: tf.io.decode_image(image, expand_animations=False)
    )


def resize_image(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """(..., h, w, channels) uint8 to (..., *size, channels) uint8: Lanczos3 with antialiasing, rounded.

    Raises:
      DataError: not uint8.
    """
    image = _with_dtype(image, tf.uint8, "resize_image")
    return _to_uint8(tf.image.resize(image, size, method="lanczos3", antialias=True))


def resize_images(
    x: Mapping[str, Any], match: str | Sequence[str] = "image", size: tuple[int, int] = (128, 128)
) -> dict[str, Any]:
    """`resize_image` of the uint8 leaves whose path matches."""
    return selective_tree_map(x, _matcher(match, tf.uint8), lambda image: resize_image(image, size))


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
    x: Mapping[str, Any], match: str | Sequence[str] = "depth", size: tuple[int, int] = (128, 128)
) -> dict[str, Any]:
    """`resize_depth_image` of the float32 leaves whose path matches."""
    return selective_tree_map(x, _matcher(match, tf.float32), lambda depth: resize_depth_image(depth, size))


# ---------------------------------------------------------------- augmentation


def random_resized_crop(image: tf.Tensor, scale: Sequence[float], ratio: Sequence[float], seed: tf.Tensor) -> tf.Tensor:
    """A crop of an image (h, w, channels) in [0, 1], scaled back to (h, w).

    Args:
      scale: least and greatest share of the area. ratio: of width by height, drawn evenly in its logarithm.
      seed: (2,) integers.
    """
    draws = tf.random.stateless_uniform([4], seed)
    area = scale[0] + draws[0] * (scale[1] - scale[0])
    low, high = tf.math.log(tf.cast(ratio[0], tf.float32)), tf.math.log(tf.cast(ratio[1], tf.float32))
    aspect = tf.exp(low + draws[1] * (high - low))
    height, width = tf.minimum(tf.sqrt(area / aspect), 1.0), tf.minimum(tf.sqrt(area * aspect), 1.0)
    top, left = draws[2] * (1 - height), draws[3] * (1 - width)
    box = tf.stack([top, left, top + height, left + width])[None]
    return tf.image.crop_and_resize(image[None], box, [0], tf.shape(image)[:2])[0]


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


def augment_image(
    image: tf.Tensor, seed: Any = None, *, augment_order: Sequence[str] = (), **augment_kwargs: Any
) -> tf.Tensor:
    """A uint8 image (h, w, channels) after the operations of `augment_order`, each with its own part of the seed.

    The names and arguments are dlimp's, the random numbers are not.

    Args:
      seed: (2,) integers; None: another one each time.
      augment_order: names of `AUGMENT_OPS`.
      **augment_kwargs: arguments of each: a dict, or a list of positional ones.

    Raises:
      DataError: no such operation, arguments of one that `augment_order` does not name, not uint8.
    """
    for name in augment_order:
        if name not in AUGMENT_OPS:
            raise DataError(f"augment_order: no operation {name!r}; {suggest(name, AUGMENT_OPS)}")
    unused = sorted(set(augment_kwargs) - set(augment_order))
    if unused:
        raise DataError(f"augment_image: {unused[0]!r} is not in augment_order; {suggest(unused[0], augment_order)}")
    image = tf.cast(_with_dtype(image, tf.uint8, "augment_image"), tf.float32) / 255.0
    seed = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32) if seed is None else tf.convert_to_tensor(seed)
    for number, name in enumerate(augment_order):
        own, given = tf.random.experimental.stateless_fold_in(seed, number), augment_kwargs.get(name, {})
        # A config's dict need not be a dict.
        positional, named = ((), dict(given)) if hasattr(given, "items") else (given, {})
        image = tf.clip_by_value(AUGMENT_OPS[name](image, *positional, **named, seed=own), 0.0, 1.0)
    return _to_uint8(image * 255.0)


def augment(
    x: Mapping[str, Any],
    match: Match = "image",
    traj_identical: bool = True,
    keys_identical: bool = True,
    augment_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`augment_image` of the leaves of a frame that match.

    Args:
      traj_identical: the same for all frames of a trajectory (the frame needs `_traj_index`).
      keys_identical: the same for all leaves.
    """
    if traj_identical:
        index = tf.cast(x["_traj_index"], tf.int32)
        base = tf.stack([index, index])
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
