"""What policy server and client say to each other: msgpack maps with NumPy arrays in them.

An array is one extension value: its dtype, shape and raw bytes, C order. Only plain numbers and booleans travel:
nothing that is received is ever executed.

    server, on connecting   {"type": "metadata", "protocol": 2, "batch_spec": ..., "statistics": [...],
                             "expects": {...}, "actions": {...}, ...}
    client                  {"type": "act", "id": int, "observation": {...: (W, ...)}, "allow_missing": [...],
                             "instruction": str | None, "goal": {...} | None, "unnormalize": str | None, "seed": int,
                             "step": int, "resize": str, "subtask": str | None,
                             "plan": bool, "last_subtask": str | None,
                             "continuing": {"previous": (H, A), "executed": int, "delay": int, "method": str}}
    server                  {"type": "actions", "id": int, "actions": (H, A) float32, "seconds": float,
                             "warnings": [...], "subtask": str}
                            {"type": "error", "id": int | None, "error": "ValueError", "message": "..."}

"resize" is how the client has brought pictures to their sizes, by default "stretch" (`octo_like.common.geometry`); it
has to be that of the metadata's batch_spec, where "stretch" is not named.

"continuing" (or nothing) is the chunk that the new one goes on from, see `octo_like.common.chunks.Continuation`; a
server that can do it says so in its metadata, "chunks": {dataset: {"horizon": H, "continues": {method: max delay}}};
those that never could do not have it. Without it, old and new ones understand each other.

"subtask" is what to do next, in words; with "plan" the policy says it itself, and the reply has what was said. A server
whose policy can has "subtasks": {"reads": bool, "says": bool, "remembers": bool} in its metadata; one that remembers
is told with "plan" what the robot was told before, "last_subtask": the server keeps nothing of a robot.

A reply has the id of its request: an answer that comes after its client has given up is recognised and dropped.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

PROTOCOL = 2
MAX_MESSAGE_BYTES = 64 * 2**20
_ARRAY = 0x4E
_KINDS = "biuf"


def pack(message: Any) -> bytes:
    """Encodes maps, lists, strings, numbers and arrays (whatever has `__array__`).

    Raises:
      TypeError: something else. ValueError: a text that is no Unicode (half a surrogate pair), a number beyond 64 bits.
    """
    try:
        return msgpack.packb(message, default=_encode)
    except UnicodeEncodeError as error:
        raise ValueError(f"cannot send the text {error.object!r:.60}: {error.reason} at {error.start}") from error


def unpack(data: bytes | str) -> Any:
    """Decodes what `pack` made. Raises ValueError when it is something else."""
    if isinstance(data, str):
        raise ValueError("expected a binary msgpack message, got text")
    try:
        return msgpack.unpackb(data, ext_hook=_decode)
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"not a valid message: {error or type(error).__name__}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, int):
        raise ValueError(f"cannot send the whole number {value}: it is beyond 64 bits")
    if not hasattr(value, "__array__"):
        raise TypeError(f"cannot send a {type(value).__name__}; valid: maps, lists, strings, numbers, booleans, arrays")
    array = np.asarray(value)
    if array.dtype.kind not in _KINDS:
        raise TypeError(f"cannot send an array of {array.dtype}; valid: booleans, integers, floats")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return msgpack.ExtType(_ARRAY, msgpack.packb([little.dtype.str, list(array.shape), little.tobytes()]))


def _decode(code: int, payload: bytes) -> np.ndarray:
    if code != _ARRAY:
        raise ValueError(f"unknown msgpack extension {code}")
    dtype_name, shape, raw = msgpack.unpackb(payload)
    if not (isinstance(dtype_name, str) and isinstance(shape, list) and isinstance(raw, bytes)):
        raise ValueError("an array is its dtype, its shape and its bytes")
    dtype = np.dtype(dtype_name)
    if dtype.kind not in _KINDS:
        raise ValueError(f"arrays of {dtype} are not accepted")
    if any(not isinstance(n, int) or n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} and type {dtype} does not have {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape)
