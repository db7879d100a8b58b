"""Encoded frames to uint8 images or depth maps of the wanted size.

Two named modes for images:

    parity  decode as `tf.io.decode_image`, then Lanczos3 with antialiasing, rounded half to even: what Octo trains on.
            Equal to `tf.image.resize` but for rounding: fewer than one value in 5,000 differs, by one grey level.
    fast    JPEG decoded at 1/2, 1/4 or 1/8 where that is still large enough, then antialiased bilinear (a triangle
            kernel). Other formats are decoded fully. Differs from parity by less than two grey levels on average, on
            pictures of soft shapes, edges and noise (tests/data/test_frames.py measures it).

Where a picture of another aspect ratio lies in the result, `octo_like.common.geometry` says. A frame that already has
the wanted size is never resampled. Depth takes the nearest pixel: a mean of the table and the wall behind it is a
surface that is not there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from octo_like.common.geometry import Placement, placement
from octo_like.data.batches.resample import resample_uint8
from octo_like.data.episode import EncodedFrame
from octo_like.data.settings import MODES
from octo_like.data.spec import DataError, suggest
from octo_like.data.tf import error_text, tf

# Mode -> the kernel that resizes in it.
KERNELS = {"parity": "lanczos3", "fast": "triangle"}


class FrameError(DataError):
    """A frame that cannot be decoded. `position` is its place in the list that was given."""

    def __init__(self, position: int, message: str):
        super().__init__(message)
        self.position = position


@functools.lru_cache(maxsize=1024)
def reduction(raw: tuple[int, int] | None, size: tuple[int, int]) -> int:
    """1, 2, 4 or 8: the largest reduction at which a JPEG of `raw` size is still decoded no smaller than `size`."""
    if raw is None:
        return 1
    return next((r for r in (8, 4, 2) if raw[0] >= r * size[0] and raw[1] >= r * size[1]), 1)


def decode_reduced(tensor: tf.Tensor, ratio: int) -> np.ndarray:
    """(h, w, 3) uint8 of an image, or of a JPEG at 1/2, 1/4 or 1/8. One operation of TensorFlow per frame: cheaper
    than a traced loop over many, and it lets other Python threads run while it works."""
    if ratio == 1:
        return np.asarray(tf.raw_ops.DecodeImage(contents=tensor, channels=3, dtype=tf.uint8, expand_animations=False))
    # The defaults, spelled out: with any of them left to TensorFlow the operation takes a slower path.
    return np.asarray(
        tf.raw_ops.DecodeJpeg(
            contents=tensor,
            channels=3,
            ratio=ratio,
            fancy_upscaling=True,
            try_recover_truncated=False,
            acceptable_fraction=1.0,
            dct_method="",
        )
    )


def decode_frame(
    contents: bytes | EncodedFrame, size: tuple[int, int], mode: str, out: np.ndarray, resize: str = "stretch"
) -> None:
    """Decodes a JPEG, PNG, BMP or GIF of any size into `out`, (*size, 3) uint8.

    Raises:
      FrameError: not an image; `position` is 0.
    """
    frame = contents if isinstance(contents, EncodedFrame) else EncodedFrame(contents)
    ratio, target = 1, None
    if mode == "fast" and frame.jpeg_size is not None:
        source, target = placement(resize, frame.jpeg_size, size)
        ratio = reduction((source.height, source.width), (target.height, target.width))
    try:
        image = decode_reduced(frame.tensor, ratio)
    except tf.errors.InvalidArgumentError as error:
        raise FrameError(0, _reason("image", bytes(frame), error)) from error
    spot = placement(resize, image.shape[:2], size)
    # Where it lies follows from the size that it was stored in, not from a reduced one, which is rounded.
    _place(image, spot if target is None else Placement(spot.source, target), mode, out)


def decode_frames(
    contents: Sequence[bytes | EncodedFrame], size: tuple[int, int], mode: str = "parity", resize: str = "stretch"
) -> np.ndarray:
    """Decodes JPEG, PNG, BMP or GIF frames of any size to (N, *size, 3) uint8.

    Raises:
      FrameError: the first frame that is not an image, by position.
      DataError: no such mode.
    """
    if mode not in MODES:
        raise DataError(f"decode mode {mode!r}; {suggest(mode, MODES)}")
    out = np.empty((len(contents), *size, 3), np.uint8)
    for position, (frame, target) in enumerate(zip(contents, out, strict=True)):
        try:
            decode_frame(frame, (size[0], size[1]), mode, target, resize)
        except FrameError as error:
            raise FrameError(position, str(error)) from error
    return out


def _reason(what: str, contents: bytes, error: tf.errors.OpError) -> str:
    return f"not a decodable {what} (starts with {bytes(contents[:8])!r}): {error_text(error)}"


def resize_frame(image: np.ndarray, size: tuple[int, int], mode: str, out: np.ndarray, resize: str = "stretch") -> None:
    """A raw (h, w, 3) uint8 image into `out`, (*size, 3) uint8."""
    _place(image, placement(resize, image.shape[:2], (size[0], size[1])), mode, out)


def _place(image: np.ndarray, spot: Placement, mode: str, out: np.ndarray) -> None:
    part, inner = image[spot.source.slices], out[spot.target.slices]
    if inner.shape != out.shape:
        out[...] = 0
    if part.shape[:2] == inner.shape[:2]:
        inner[...] = part
    else:
        resample_uint8(part, inner.shape[:2], KERNELS[mode], inner)


def resize_frames(
    images: np.ndarray, size: tuple[int, int], mode: str = "parity", resize: str = "stretch"
) -> np.ndarray:
    """Raw (N, h, w, 3) uint8 frames to (N, *size, 3) uint8."""
    out = np.empty((len(images), *size, images.shape[-1]), np.uint8)
    for image, target in zip(images, out, strict=True):
        resize_frame(image, size, mode, target, resize)
    return out


# ---------------------------------------------------------------- depth


def nearest(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the nearest pixels: pixel i of m lies at (i + 1/2) n/m of n, in pixel floor of that."""
    rows, columns = (((2 * np.arange(m) + 1) * n // (2 * m)) for n, m in zip(size, wanted, strict=True))
    return rows[:, None], columns[None]


MILLIMETRE = 0.001


def depth_to_metres(values: np.ndarray, scale: float | None) -> np.ndarray:
    """Stored depth to float32 metres. No reading (0, NaN, infinite) is 0.

    Args:
      scale: metres per unit; None: integers are millimetres, floats metres.
    """
    if scale is None:
        scale = MILLIMETRE if values.dtype.kind in "iu" else 1.0
    return (np.where(np.isfinite(values), values, 0) * np.float64(scale)).astype(np.float32)


def resize_depth(depth: np.ndarray, size: tuple[int, int], scale: float | None, resize: str = "stretch") -> np.ndarray:
    """A raw (h, w) or (h, w, 1) depth map to (*size, 1) float32 metres: the nearest pixel of each; where the picture is
    black there is no reading."""
    source, target = placement(resize, depth.shape[:2], (size[0], size[1]))
    part = depth.reshape(depth.shape[:2])[source.slices]
    metres = depth_to_metres(part[nearest(part.shape, (target.height, target.width))], scale)
    if metres.shape != tuple(size):
        inner, metres = metres, np.zeros(size, np.float32)
        metres[target.slices] = inner
    return metres[..., None]


def decode_depth(
    contents: bytes | EncodedFrame, size: tuple[int, int], scale: float | None, resize: str = "stretch"
) -> np.ndarray:
    """An encoded depth map to (*size, 1) float32 metres.

    Args:
      contents: a PNG of 8 or 16 bits with one channel (integers), a PNG of 8 bits with four channels (TFDS stores a
        float32 image so: the bytes of each number, little-endian; metres), or a JPEG (8 bits).
      scale: see `depth_to_metres`.

    Raises:
      FrameError: not such an image; `position` is 0.
    """
    contents = bytes(contents)
    try:
        depth = _decode_depth(contents)
    except tf.errors.InvalidArgumentError as error:
        raise FrameError(0, _reason("depth map", contents, error)) from error
    return resize_depth(depth, size, scale, resize)


def _decode_depth(contents: bytes) -> np.ndarray:
    """(h, w) of the stored kind."""
    if contents[:4] != b"\x89PNG":
        return np.asarray(tf.io.decode_image(contents, channels=1, expand_animations=False))[..., 0]
    if len(contents) < 26:  # signature, length and name of the first chunk, size, bits, colour type
        raise FrameError(0, f"not a depth map: a PNG cut off after {len(contents)} bytes")
    bits, colour = contents[24], contents[25]
    if (bits, colour) == (8, 6):
        values = np.asarray(tf.io.decode_png(contents, channels=4))
        return np.ascontiguousarray(values).view("<f4")[..., 0]
    if colour != 0 or bits not in (8, 16):
        raise FrameError(0, f"not a depth map: a PNG of {bits} bits, colour type {colour}; valid: grey, or float32")
    return np.asarray(tf.io.decode_png(contents, channels=1, dtype=tf.uint16 if bits == 16 else tf.uint8))[..., 0]
