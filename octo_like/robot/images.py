"""Image resizing on the robot side, in NumPy: the same filter that training data are resized with.

Both steps are separable and linear, so each axis is one small matrix, built once per size and cached.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

LANCZOS_RADIUS = 3


@functools.lru_cache(maxsize=256)
def lanczos_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Weights (size_out, size_in) of a Lanczos resize along one axis.

    Half-pixel centres; when shrinking the kernel is widened by the factor in/out (antialiasing); taps outside the
    image are dropped and the weights of a row sum to one. So do PIL's LANCZOS and TensorFlow's antialiased lanczos3.
    """
    scale = size_in / size_out
    width = max(scale, 1.0)
    centres = (np.arange(size_out) + 0.5) * scale
    x = (np.arange(size_in)[None] + 0.5 - centres[:, None]) / width
    weights = np.where(np.abs(x) < LANCZOS_RADIUS, np.sinc(x) * np.sinc(x / LANCZOS_RADIUS), 0.0)
    matrix = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


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


def resize_image(image: np.ndarray, size: tuple[int, int], crop_area: float | None = None) -> np.ndarray:
    """Resizes images (..., h, w, 3) uint8 to `size` = (height, width), rounding half to even.

    Args:
      image: uint8, any number of leading dimensions.
      size: target (height, width).
      crop_area: when given, the central part with this share of the area is then cut and stretched to `size`. A policy
        trained with random resized crops of area a..1 sees its average view with the mean of a and 1.

    Raises:
      ValueError: the array is not uint8 or has fewer than three dimensions, or crop_area is outside (0, 1].
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim < 3:
        raise ValueError(f"an image must be uint8 (..., height, width, channels), got {image.dtype} {image.shape}")
    if crop_area is not None and not 0 < crop_area <= 1:
        raise ValueError(f"crop_area must be in (0, 1], got {crop_area}")
    if image.shape[-3:-1] == tuple(size) and crop_area is None:
        return image
    rows, columns = (lanczos_matrix(have, want) for have, want in zip(image.shape[-3:-1], size, strict=True))
    if crop_area is not None:
        side = math.sqrt(crop_area)
        rows, columns = centre_crop_matrix(size[0], side) @ rows, centre_crop_matrix(size[1], side) @ columns
    resized = np.einsum("yh,...hwc,xw->...yxc", rows, image.astype(np.float32), columns, optimize=True)
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


def resize_images(
    observation: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]], crop_areas: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """A copy of `observation` in which the keys named in `sizes` (that are present) are resized; see `resize_image`."""
    crop_areas = crop_areas or {}
    return {
        key: resize_image(value, sizes[key], crop_areas.get(key)) if key in sizes else value
        for key, value in observation.items()
    }
