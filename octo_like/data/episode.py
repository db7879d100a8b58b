"""One episode as it is read, wherever it comes from: numbers in physical units, pictures as they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.data.tf import tf

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


class EncodedFrame:
    """An encoded frame as it is kept in memory: a tensor, because handing bytes to an operation costs 0.1 ms each time,
    and what its header says.

    Attributes:
      tensor: scalar string. nbytes: its length; 0 is a missing frame.
      jpeg_size: (height, width) of a JPEG; None for other formats.
    """

    __slots__ = ("tensor", "nbytes", "jpeg_size")

    # Of a frame in memory beside its bytes (measured: the tensor, its handle and buffer).
    OVERHEAD = 900

    def __init__(self, contents: bytes, tensor: tf.Tensor | None = None):
        self.tensor = tf.constant(contents) if tensor is None else tensor
        self.nbytes = len(contents)
        self.jpeg_size = encoded_size(contents) if contents[:2] == b"\xff\xd8" else None

    def __len__(self) -> int:
        return self.nbytes

    def __bytes__(self) -> bytes:
        return self.tensor.numpy()


def encoded_frames(contents: tf.Tensor) -> list[EncodedFrame]:
    """(T,) strings as frames."""
    return [EncodedFrame(c, t) for c, t in zip(contents.numpy().tolist(), tf.unstack(contents), strict=True)]


def stored_frames(
    frames: Mapping[str, tf.Tensor | np.ndarray], slots: Collection[str]
) -> dict[str, Sequence[EncodedFrame] | np.ndarray]:
    """The frames of some cameras: (T,) strings as encoded frames, numbers as arrays."""
    chosen = {slot: tf.convert_to_tensor(values) for slot, values in frames.items() if slot in slots}
    return {slot: encoded_frames(x) if x.dtype == tf.string else x.numpy() for slot, x in chosen.items()}


def stored_bytes(*parts: Sequence[EncodedFrame] | np.ndarray) -> int:
    """Memory that arrays and encoded frames take."""
    return sum(
        part.nbytes if isinstance(part, np.ndarray) else sum(map(len, part)) + EncodedFrame.OVERHEAD * len(part)
        for part in parts
    )


@dataclasses.dataclass(frozen=True)
class RawEpisode:
    """One standardised episode of T steps in physical units, as it is read.

    Attributes:
      hash: of the record.
      action: (T, A) or, in chunks, (T, N, A) float32.
      proprio: (T, P) float32, or None.
      texts: T instructions, or None.
      images, depths: as in `batches.episodes.Episode`, of the cameras that were asked for.
      points: name -> (T, 2) float32, see `as_points`.
      extras: name -> (T, ...) float32, values of other sensors.
      target: T texts that are learned, "" where there is none; or None.
    """

    hash: int
    action: np.ndarray
    proprio: np.ndarray | None
    texts: list[str] | None
    images: Mapping[str, Sequence[EncodedFrame] | np.ndarray]
    depths: Mapping[str, Sequence[EncodedFrame] | np.ndarray]
    points: Mapping[str, np.ndarray]
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    target: list[str] | None = None


def as_points(values: np.ndarray) -> np.ndarray:
    """(T, 2) float32 columns and rows, as fractions of the image, of points (T, 2) or of the middles of boxes (T, 4),
    (left, top, right, bottom). What is not known, or lies outside the picture, is NaN."""
    points: np.ndarray = np.asarray(values, np.float32)
    if points.shape[-1] == 4:
        points = (points[:, :2] + points[:, 2:]) / 2
    seen = ((points >= 0) & (points <= 1)).all(-1, keepdims=True)  # NaN is neither
    return np.where(seen, points, np.float32(np.nan))


def raw_episode(
    chosen: Mapping[str, Any], number: int, slots: Collection[str], depth_slots: Collection[str] = ()
) -> RawEpisode:
    """An episode with the pictures of some cameras, of what `octo_like.data.rlds.leaves.select` chose, as values.

    Args:
      number: the record's hash.
    """

    def texts_at(key: str) -> list[str] | None:
        if key not in chosen:
            return None
        return [text.decode("utf-8", "replace").strip() for text in np.asarray(chosen[key]).tolist()]

    return RawEpisode(
        hash=number,
        action=np.asarray(chosen["action"]),
        proprio=np.asarray(chosen["proprio"]) if "proprio" in chosen else None,
        texts=texts_at("language"),
        target=texts_at("target"),
        images=stored_frames(chosen["images"], slots),
        depths=stored_frames(chosen["depths"], depth_slots),
        points={name: as_points(np.asarray(values)) for name, values in chosen["points"].items()},
        extras={name: np.asarray(values) for name, values in chosen["extras"].items()},
    )
