"""Encoded frames to uint8 images or depth maps of the wanted size.

Two named modes for images:

    parity  decode as `tf.io.decode_image`, then Lanczos3 with antialiasing, rounded half to even: what Octo trains on.
            Equal to `tf.image.resize` but for rounding: about one value in 20,000 differs, by one grey level.
    fast    JPEG decoded at 1/2, 1/4 or 1/8 where that is still large enough, then antialiased bilinear (a triangle
            kernel). Other formats are decoded fully. Against parity on natural textures: about one grey level on
            average (tests/data/test_frames.py measures it).

A frame that already has the wanted size is never resampled. Depth takes the nearest pixel: a mean of the table and the
wall behind it is a surface that is not there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from octo_like.data.resample import resample_uint8
from octo_like.data.spec import DataError, suggest
from octo_like.data.tf import tf

# Mode -> the kernel that resizes in it.
KERNELS = {"parity": "lanczos3", "fast": "triangle"}
MODES = tuple(KERNELS)


class FrameError(DataError):
    """A frame that cannot be decoded. `position` is its place in the list that was given."""

    def __init__(self, position: int, message: str):
        super().__init__(message)
        self.position = position


# Markers of a JPEG file that begin with the frame's size; C4, C8 and CC are tables.
_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def encoded_size(contents: bytes) -> tuple[int, int] | None:
    """(height, width) from the header of a JPEG or PNG file; None for anything else."""
    if contents[:4] == b"\x89PNG":
        return int.from_bytes(contents[20:24], "big"), int.from_bytes(contents[16:20], "big")
    position = 2 if contents[:2] == b"\xff\xd8" else len(contents)
    while position + 9 < len(contents) and contents[position] == 0xFF:
        marker = contents[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in _SIZE_MARKERS:
            height, width = contents[position + 5 : position + 7], contents[position + 7 : position + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big")
        position += 2 + int.from_bytes(contents[position + 2 : position + 4], "big")
    return None


def reduction(contents: bytes, size: tuple[int, int]) -> int:
    """1, 2, 4 or 8: the largest reduction at which a JPEG is still decoded no smaller than `size`; 1 for others."""
    raw = encoded_size(contents) if contents[:2] == b"\xff\xd8" else None
    if raw is None:
        return 1
    return next((r for r in (8, 4, 2) if raw[0] >= r * size[0] and raw[1] >= r * size[1]), 1)


def _decode(contents: bytes, ratio: int) -> np.ndarray:
    """(h, w, 3) uint8. One operation of TensorFlow per frame: cheaper than a traced loop over many, and it lets other
    Python threads run while it works."""
    # As a tensor: an operation that is handed bytes takes a slow path of 0.1 ms.
    tensor = tf.constant(contents)
    if ratio > 1:
        return np.asarray(tf.raw_ops.DecodeJpeg(contents=tensor, channels=3, ratio=ratio))
    return np.asarray(tf.raw_ops.DecodeImage(contents=tensor, channels=3, dtype=tf.uint8, expand_animations=False))


def decode_frames(
    contents: Sequence[bytes], size: tuple[int, int], mode: str = "parity", out: Sequence[np.ndarray] | None = None
) -> Any:
    """Decodes JPEG, PNG, BMP or GIF frames of any size to (N, *size, 3) uint8.

    Args:
      out: N arrays (*size, 3) uint8 to write into; None: a new array.

    Returns:
      `out`, or the new array.

    Raises:
      FrameError: the first frame that is not an image, by position. Frames before it are written.
    """
    if mode not in MODES:
        raise DataError(f"decode mode {mode!r}; {suggest(mode, MODES)}")
    size = tuple(size)
    if out is None:
        out = np.empty((len(contents), *size, 3), np.uint8)
    for position, (frame, target) in enumerate(zip(contents, out, strict=True)):
        ratio = reduction(frame, size) if mode == "fast" else 1
        try:
            image = _decode(frame, ratio)
        except tf.errors.InvalidArgumentError as error:
            raise FrameError(position, _reason("image", frame, error)) from error
        if image.shape[:2] == size:
            target[...] = image
        else:
            resample_uint8(image, size, KERNELS[mode], target)
    return out


def _reason(what: str, contents: bytes, error: tf.errors.OpError) -> str:
    lines = str(error.message).strip().splitlines()
    return f"not a decodable {what} (starts with {bytes(contents[:8])!r}): {lines[0] if lines else error}"


def resize_frames(images: np.ndarray, size: tuple[int, int], mode: str = "parity") -> np.ndarray:
    """Raw (N, h, w, 3) uint8 frames to (N, *size, 3) uint8."""
    size = tuple(size)
    if images.shape[1:3] == size:
        return images
    out = np.empty((len(images), *size, images.shape[-1]), np.uint8)
    for image, target in zip(images, out, strict=True):
        resample_uint8(image, size, KERNELS[mode], target)
    return out


# ---------------------------------------------------------------- depth


def nearest(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the nearest pixels: pixel i of m lies at (i + 1/2) n/m of n, in pixel floor of that."""
    rows, columns = (((2 * np.arange(m) + 1) * n // (2 * m)) for n, m in zip(size, wanted, strict=True))
    return rows[:, None], columns[None]


def depth_to_metres(values: np.ndarray, unit: float) -> np.ndarray:
    """Stored depth to float32 metres: integers count `unit` metres, floats are metres. No reading (NaN, inf) is 0."""
    if values.dtype.kind in "iu":
        return (values * np.float64(unit)).astype(np.float32)
    return np.where(np.isfinite(values), values, 0).astype(np.float32)


def resize_depth(depth: np.ndarray, size: tuple[int, int], unit: float) -> np.ndarray:
    """A raw (h, w) or (h, w, 1) depth map to (*size, 1) float32 metres: the nearest pixel of each."""
    depth = depth.reshape(depth.shape[:2])
    return depth_to_metres(depth[nearest(depth.shape, size)], unit)[..., None]


def decode_depth(contents: bytes, size: tuple[int, int], unit: float) -> np.ndarray:
    """An encoded depth map to (*size, 1) float32 metres.

    Args:
      contents: a PNG of 8 or 16 bits with one channel (integers), a PNG of 8 bits with four channels (TFDS stores a
        float32 image so: the bytes of each number, little-endian; metres), or a JPEG (8 bits).
      unit: metres per integer step.

    Raises:
      FrameError: not such an image; `position` is 0.
    """
    try:
        depth = _decode_depth(contents)
    except tf.errors.InvalidArgumentError as error:
        raise FrameError(0, _reason("depth map", contents, error)) from error
    return resize_depth(depth, size, unit)


def _decode_depth(contents: bytes) -> np.ndarray:
    """(h, w) of the stored kind."""
    if contents[:4] != b"\x89PNG":
        return np.asarray(tf.io.decode_image(contents, channels=1, expand_animations=False))[..., 0]
    bits, colour = contents[24], contents[25]
    if (bits, colour) == (8, 6):
        values = np.asarray(tf.io.decode_png(contents, channels=4))
        return np.ascontiguousarray(values).view("<f4")[..., 0]
    if colour != 0 or bits not in (8, 16):
        raise FrameError(0, f"not a depth map: a PNG of {bits} bits, colour type {colour}; valid: grey, or float32")
    return np.asarray(tf.io.decode_png(contents, channels=1, dtype=tf.uint16 if bits == 16 else tf.uint8))[..., 0]
