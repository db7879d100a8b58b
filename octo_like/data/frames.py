"""Encoded frames to uint8 images of the wanted size, many per call.

Two named modes:

    parity  decode as `tf.io.decode_image`, then Lanczos3 with antialiasing, rounded half to even: what Octo trains on.
    fast    JPEG decoded at 1/2, 1/4 or 1/8 where that is still large enough, then bilinear. Other formats are decoded
            fully. Several times cheaper for large frames; differs by about one grey level on average.

A frame that already has the wanted size is never resampled.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from octo_like.data.spec import DataError, suggest
from octo_like.data.tf import tf

MODES = ("parity", "fast")


class FrameError(DataError):
    """A frame that cannot be decoded. `position` is its place in the list that was given."""

    def __init__(self, position: int, message: str):
        super().__init__(message)
        self.position = position


def resize(image: tf.Tensor, size: tuple[int, int], mode: str = "parity") -> tf.Tensor:
    """(h, w, 3) uint8 tensor to (*size, 3) uint8."""
    if mode == "parity":
        scaled = tf.image.resize(image, size, method="lanczos3", antialias=True)
    else:
        scaled = tf.image.resize(image, size, method="bilinear")
    return tf.cast(tf.clip_by_value(tf.round(scaled), 0, 255), tf.uint8)


# Markers of a JPEG file that begin with the frame's size; C4, C8 and CC are tables.
_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def encoded_size(contents: bytes) -> tuple[int, int] | None:
    """(height, width) from the header of a JPEG or PNG file; None for anything else."""
    if contents[:4] == b"\x89PNG":
        return int.from_bytes(contents[20:24], "big"), int.from_bytes(contents[16:20], "big")
    position = 2 if contents[:2] == b"\xff\xd8" else len(contents)
    while position + 9 < len(contents) and contents[position] == 0xFF:
        marker = contents[position + 1]
        if marker in _SIZE_MARKERS:
            height, width = contents[position + 5 : position + 7], contents[position + 7 : position + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big")
        position += 2 + int.from_bytes(contents[position + 2 : position + 4], "big")
    return None


def _plan(contents: bytes, size: tuple[int, int], mode: str) -> tuple[int, bool]:
    """(ratio of a reduced JPEG decode, whether a resize is needed after it)."""
    raw, ratio = encoded_size(contents), 1
    if raw is None:
        return 1, True
    if mode == "fast" and contents[:2] == b"\xff\xd8":
        ratio = next(r for r in (8, 4, 2, 1) if r == 1 or (raw[0] >= r * size[0] and raw[1] >= r * size[1]))
    return ratio, (-(-raw[0] // ratio), -(-raw[1] // ratio)) != size


@functools.cache
def _decoder(size: tuple[int, int], mode: str, ratio: int, resized: bool):
    """A function (N,) strings -> (N, *size, 3) uint8 for frames of one plan: no branch is left for each frame."""

    def one(contents: tf.Tensor) -> tf.Tensor:
        if ratio == 1:
            image = tf.raw_ops.DecodeImage(contents=contents, channels=3, dtype=tf.uint8, expand_animations=False)
        else:
            image = tf.io.decode_jpeg(contents, channels=3, ratio=ratio)
        image = tf.ensure_shape(image, [None, None, 3])
        return tf.ensure_shape(resize(image, size, mode) if resized else image, [*size, 3])

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def decode(contents):
        return tf.map_fn(one, contents, fn_output_signature=tf.uint8, parallel_iterations=1)

    return decode


@functools.cache
def _resize_many(size: tuple[int, int], mode: str):
    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8)], autograph=False)
    def scale(images):
        return resize(images, size, mode)

    return scale


def decode_frames(contents: Sequence[bytes], size: tuple[int, int], mode: str = "parity") -> np.ndarray:
    """Decodes JPEG, PNG, BMP or GIF frames of any size to (N, *size, 3) uint8.

    Raises:
      FrameError: the first frame that is not an image, by position.
    """
    if mode not in MODES:
        raise DataError(f"decode mode {mode!r}; {suggest(mode, MODES)}")
    size = tuple(size)
    plans: dict[tuple[int, bool], list[int]] = {}
    for position, frame in enumerate(contents):
        plans.setdefault(_plan(frame, size, mode), []).append(position)
    if len(plans) == 1:
        return _decode_group(contents, range(len(contents)), _decoder(size, mode, *next(iter(plans))))
    result = np.empty((len(contents), *size, 3), np.uint8)
    for plan, positions in plans.items():
        result[positions] = _decode_group(contents, positions, _decoder(size, mode, *plan))
    return result


def _decode_group(contents: Sequence[bytes], positions: Sequence[int], decode: Callable) -> np.ndarray:
    array = np.array([contents[position] for position in positions], object)
    try:
        return decode(array).numpy()
    except tf.errors.InvalidArgumentError as error:
        for i, position in enumerate(positions):
            try:
                decode(array[i : i + 1])
            except tf.errors.InvalidArgumentError as single:
                reason = str(single.message).strip().splitlines()[0]
                message = f"not a decodable image (starts with {bytes(array[i][:8])!r}): {reason}"
                raise FrameError(position, message) from error
        raise


def resize_frames(images: np.ndarray, size: tuple[int, int], mode: str = "parity") -> np.ndarray:
    """Raw (N, h, w, 3) uint8 frames to (N, *size, 3) uint8."""
    if images.shape[1:3] == tuple(size):
        return images
    return _resize_many(tuple(size), mode)(images).numpy()
