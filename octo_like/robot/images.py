"""Image resizing on the robot side, by Pillow: the filter of the training data, in a few milliseconds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from octo_like.common.geometry import placement


@functools.lru_cache(maxsize=64)
def centre_crop_matrix(size: int, side: float) -> np.ndarray:
    """Weights (size, size) that cut the central `side` (0..1] of an axis and stretch it bilinearly to the full size."""
    start = (1.0 - side) / 2
    positions = start * (size - 1) + np.arange(size) * side * (size - 1) / max(size - 1, 1)
    low = np.clip(np.floor(positions).astype(int), 0, size - 1)
    high = np.minimum(low + 1, size - 1)
    fraction = positions - low
    matrix = np.zeros((size, size), np.float32)
    matrix[np.arange(size), low] += 1 - fraction
    matrix[np.arange(size), high] += fraction
    matrix.setflags(write=False)
    return matrix


def resize_image(
    image: np.ndarray, size: tuple[int, int], crop_area: float | None = None, *, resize: str = "stretch"
) -> np.ndarray:
    """Resizes images (..., h, w, channels) uint8 to `size` = (height, width) with an antialiased Lanczos filter.

    Training resizes with the same filter (half-pixel centres, radius 3, widened by the factor when shrinking) and
    rounds once; Pillow also rounds to whole levels between the two axes, and cuts off what is below 0 and above 255.
    The pictures differ by a fifth of a level on average, by several levels at corners of saturated objects;
    tests/robot/test_images.py holds how much.

    Args:
      image: uint8, any number of leading dimensions.
      size: target (height, width).
      crop_area: when given, the central part with this share of the area is then cut and stretched to `size`. A policy
        trained with random resized crops of area a..1 sees its average view with the mean of a and 1.
      resize: where a picture of another aspect ratio goes, as the policy was trained: `BatchSpec.resize`.

    Raises:
      ValueError: the array is not uint8, has fewer than three dimensions or no pixels, crop_area is outside (0, 1], or
        an unknown `resize`.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim < 3:
        raise ValueError(f"an image must be uint8 (..., height, width, channels), got {image.dtype} {image.shape}")
    if image.shape[-1] > 4 or 0 in image.shape:
        what = "has no pixels" if 0 in image.shape else f"has {image.shape[-1]} channels"
        hint = "; the channels come last: np.moveaxis(image, -3, -1)" if image.shape[-3] in (1, 3, 4) else ""
        raise ValueError(f"an image must be (..., height, width, 1 to 4 channels), {image.shape} {what}{hint}")
    if crop_area is not None and not 0 < crop_area <= 1:
        raise ValueError(f"crop_area must be in (0, 1], got {crop_area}")
    height, width = size
    if image.shape[-3:-1] != (height, width):
        source, target = placement(resize, image.shape[-3:-1], (height, width))
        resized = np.zeros((*image.shape[:-3], height, width, image.shape[-1]), np.uint8)
        for index in np.ndindex(image.shape[:-3]):
            part = image[index][source.slices]
            resized[index][target.slices] = _lanczos(part, (target.height, target.width))
        image = resized
    if crop_area is None:
        return image
    side = math.sqrt(crop_area)
    rows, columns = centre_crop_matrix(height, side), centre_crop_matrix(width, side)
    cropped = np.einsum("rh,...hwc->...rwc", rows, image.astype(np.float32), optimize=True)
    cropped = np.einsum("kw,...rwc->...rkc", columns, cropped, optimize=True)
    return np.clip(np.rint(cropped), 0, 255).astype(np.uint8)


def _lanczos(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One image (h, w, channels) in the size (height, width)."""
    if image.shape[:2] == size:
        return image
    if image.shape[-1] == 3:
        return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))
    # Channel by channel: what Pillow takes for transparency would be mixed into the others.
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[-1])]
    return np.stack([np.asarray(one.resize(size[::-1], Image.Resampling.LANCZOS)) for one in channels], -1)


def resize_images(
    observation: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
    crop_areas: Mapping[str, float] | None = None,
    *,
    resize: str = "stretch",
) -> dict[str, Any]:
    """A copy of `observation` in which the keys named in `sizes` (that are present) are resized; see `resize_image`."""
    crop_areas = crop_areas or {}
    return {
        key: resize_image(value, sizes[key], crop_areas.get(key), resize=resize) if key in sizes else value
        for key, value in observation.items()
    }
