"""Encoded frames to uint8 images or depth maps of the wanted size, many per call.

Two named modes for images:

    parity  decode as `tf.io.decode_image`, then Lanczos3 with antialiasing, rounded half to even: what Octo trains on.
            Equal to `tf.image.resize` but for rounding: about one value in 20,000 differs, by one grey level.
    fast    JPEG decoded at 1/2, 1/4 or 1/8 where that is still large enough, then antialiased bilinear (a triangle
            kernel). Other formats are decoded fully. Against parity on natural textures: about one grey level on
            average (tests/data/test_frames.py measures it).

A frame that already has the wanted size is never resampled. Depth takes the nearest pixel: a mean of the table and the
wall behind it is a surface that is not there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from octo_like.data.resample import resample_uint8
from octo_like.data.spec import DataError, suggest
from octo_like.data.tf import tf

# Mode -> the kernel that resizes in it.
KERNELS = {"parity": "lanczos3", "fast": "triangle"}
MODES = tuple(KERNELS)

# Frames decoded by one call of TensorFlow: enough to make the call cheap, few enough to stay near the processor.
_GROUP = 8


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


def _plan(contents: bytes, size: tuple[int, int], mode: str) -> tuple[tuple[int, int] | None, int]:
    """(size of the decoded frame, or None when the header does not tell; ratio of a reduced JPEG decode)."""
    raw, ratio = encoded_size(contents), 1
    if raw is None:
        return None, 1
    if mode == "fast" and contents[:2] == b"\xff\xd8":
        ratio = next(r for r in (8, 4, 2, 1) if r == 1 or (raw[0] >= r * size[0] and raw[1] >= r * size[1]))
    return (-(-raw[0] // ratio), -(-raw[1] // ratio)), ratio


@functools.cache
def _decoder(ratio: int) -> Callable[[np.ndarray], tf.Tensor]:
    """A function (N,) strings -> (N, h, w, 3) uint8 for frames of one size: no branch is left for each frame."""

    def one(contents: tf.Tensor) -> tf.Tensor:
        if ratio == 1:
            image = tf.raw_ops.DecodeImage(contents=contents, channels=3, dtype=tf.uint8, expand_animations=False)
        else:
            image = tf.io.decode_jpeg(contents, channels=3, ratio=ratio)
        return tf.ensure_shape(image, [None, None, 3])

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def decode(contents):
        return tf.map_fn(one, contents, fn_output_signature=tf.uint8, parallel_iterations=1)

    return decode


def decode_frames(
    contents: Sequence[bytes], size: tuple[int, int], mode: str = "parity", out: Sequence[np.ndarray] | None = None
) -> Any:
    """Decodes JPEG, PNG, BMP or GIF frames of any size to (N, *size, 3) uint8.

    Args:
      out: N arrays (*size, 3) uint8 to write into; None: a new array.

    Returns:
      `out`, or the new array.

    Raises:
      FrameError: a frame that is not an image, by position. What `out` then holds is undefined.
    """
    if mode not in MODES:
        raise DataError(f"decode mode {mode!r}; {suggest(mode, MODES)}")
    size = tuple(size)
    if out is None:
        out = np.empty((len(contents), *size, 3), np.uint8)
    plans: dict[tuple, list[int]] = {}
    for position, frame in enumerate(contents):
        plans.setdefault(_plan(frame, size, mode), []).append(position)
    for (decoded_size, ratio), positions in plans.items():
        # Frames whose size is not known beforehand may each have another one.
        group = 1 if decoded_size is None else _GROUP
        for first in range(0, len(positions), group):
            chosen = positions[first : first + group]
            for position, image in zip(chosen, _decode(contents, chosen, decoded_size, ratio), strict=True):
                if image.shape[:2] == size:
                    out[position][...] = image
                else:
                    resample_uint8(image, size, KERNELS[mode], out[position])
    return out


# Nothing larger than this is a camera's frame; a damaged header can claim any size.
_MAX_PIXELS = 1 << 27


def _decode(
    contents: Sequence[bytes], positions: Sequence[int], size: tuple[int, int] | None, ratio: int
) -> Sequence[np.ndarray]:
    """(h, w, 3) uint8 images of frames of one plan."""
    if size is not None and not 0 < size[0] * size[1] <= _MAX_PIXELS:
        raise FrameError(positions[0], f"not a decodable image: its header says {size[0]} x {size[1]} pixels")
    decode = _decoder(ratio)
    array = np.array([contents[position] for position in positions], object)
    try:
        return np.asarray(decode(array))
    except tf.errors.InvalidArgumentError:
        images = []
        for i, position in enumerate(positions):
            try:
                images.append(np.asarray(decode(array[i : i + 1]))[0])
            except tf.errors.InvalidArgumentError as single:
                reason = str(single.message).strip().splitlines()[0]
                message = f"not a decodable image (starts with {bytes(array[i][:8])!r}): {reason}"
                raise FrameError(position, message) from single
        return images  # each is an image, but a header was wrong about its size


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
        reason = str(error.message).strip().splitlines()[0]
        message = f"not a decodable depth map (starts with {bytes(contents[:8])!r}): {reason}"
        raise FrameError(0, message) from error
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
