"""Encoded frames to uint8 images of the wanted size, many per call.

Two named modes:

    parity  decode as `tf.io.decode_image`, then Lanczos3 with antialiasing, rounded half to even: what Octo trains on.
    fast    JPEG decoded at 1/2, 1/4 or 1/8 where that is still large enough, then bilinear. Other formats are decoded
            fully. Several times cheaper for large frames; differs by about one grey level on average.

A frame that already has the wanted size is never resampled.
"""

import functools
from collections.abc import Sequence

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


def _decode(contents: tf.Tensor, size: tuple[int, int], mode: str) -> tf.Tensor:
    def plain():
        return tf.raw_ops.DecodeImage(contents=contents, channels=3, dtype=tf.uint8, expand_animations=False)

    def scaled():
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(contents))
        ratio = tf.minimum(height // size[0], width // size[1])
        # The ratio is an attribute of the kernel, so each choice is a branch of its own.
        decoders = [lambda r=r: tf.io.decode_jpeg(contents, channels=3, ratio=r) for r in (1, 2, 4, 8)]
        return tf.switch_case(tf.searchsorted([2, 4, 8], [ratio], side="right")[0], decoders)

    image = tf.cond(tf.io.is_jpeg(contents), scaled, plain) if mode == "fast" else plain()
    image = tf.ensure_shape(image, [None, None, 3])
    same = tf.reduce_all(tf.equal(tf.shape(image)[:2], size))
    return tf.ensure_shape(tf.cond(same, lambda: image, lambda: resize(image, size, mode)), [*size, 3])


@functools.cache
def _decode_many(size: tuple[int, int], mode: str):
    if mode not in MODES:
        raise DataError(f"decode mode {mode!r}; {suggest(mode, MODES)}")

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def decode(contents):
        return tf.map_fn(
            lambda c: _decode(c, size, mode), contents, fn_output_signature=tf.uint8, parallel_iterations=1
        )

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
    decode = _decode_many(tuple(size), mode)
    array = np.array(contents, object)
    try:
        return decode(array).numpy()
    except tf.errors.InvalidArgumentError as error:
        for position in range(len(array)):
            try:
                decode(array[position : position + 1])
            except tf.errors.InvalidArgumentError as single:
                head = bytes(array[position][:8])
                reason = str(single.message).strip().splitlines()[0]
                raise FrameError(position, f"not a decodable image (starts with {head!r}): {reason}") from error
        raise


def resize_frames(images: np.ndarray, size: tuple[int, int], mode: str = "parity") -> np.ndarray:
    """Raw (N, h, w, 3) uint8 frames to (N, *size, 3) uint8."""
    if images.shape[1:3] == tuple(size):
        return images
    return _resize_many(tuple(size), mode)(images).numpy()
