"""Exact statistics of more steps than fit in memory: two passes over float32 rows on disk, constant memory.

Mean and deviation are sums in float64 (the deviation about the exact mean, in the second pass). Percentiles are exact
order statistics, found by radix selection: the bits of a float32, reordered, sort like the number; the first pass
counts the upper 16 bits of every value, which tells in which of 65,536 bins a wanted rank lies, and the second counts
the lower 16 bits within those bins. So nothing is sampled, sketched or sorted, and no array grows with the rows.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from octo_like.common.storage import persistently
from octo_like.data.rlds.cache_files import DamagedCache
from octo_like.data.tf import tf

QUANTILES = (0.01, 0.99)
CHUNK_BYTES = 8 << 20
_HEADER_BYTES = 4096  # more than the header of a file of rows has
_BINS = 1 << 16
_SIGN = np.uint32(0x80000000)


# ---------------------------------------------------------------- rows on disk


class RowWriter:
    """Writes a float32 array (rows, width) to an .npy file piece by piece, on any of TensorFlow's file systems."""

    def __init__(self, path: str, rows: int, width: int):
        self._file = tf.io.gfile.GFile(path, "wb")
        self._digest = hashlib.sha256()
        header = io.BytesIO()
        description = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(header, description)
        self._write(header.getvalue())

    def write(self, rows: np.ndarray) -> None:
        self._write(np.ascontiguousarray(rows, "<f4").tobytes())

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)

    def close(self) -> str:
        """Ends the file. Returns the SHA-256 (hex) of what was written, for `read_rows`."""
        self._file.close()
        return self._digest.hexdigest()


def read_rows(path: str, digest: str | None = None, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows (n, width) float32) of an .npy file, a few megabytes at a time.

    Args:
      digest: the SHA-256 (hex) of the file. It is compared after the last rows: whoever reads them all and meets no
        error has read what was written. None: not known.

    Raises:
      DamagedCache: the file is missing, empty, shorter than its header says, or another one than `digest` says.
      StorageError: the storage does not answer.
    """
    found, place = hashlib.sha256(), 0
    content = _content(path, 0, _HEADER_BYTES)
    rows, width, dtype, place = _header(path, content)
    found.update(content[:place])
    count = max(1, chunk_bytes // max(1, width * dtype.itemsize))
    for first in range(0, rows, count):
        content = _content(path, place, min(count, rows - first) * width * dtype.itemsize)
        found.update(content)
        place += len(content)
        yield first, _rows(path, content, min(count, rows - first), width, dtype)
    if digest is not None and found.hexdigest() != digest:
        raise DamagedCache(f"{path} is damaged: its SHA-256 is not that of what was written")


def row_range(path: str, first: int, count: int) -> np.ndarray:
    """Rows `first` to `first + count` of such a file, (count, width).

    Raises:
      DamagedCache: the file is missing, empty, or shorter than that.
      StorageError: the storage does not answer.
    """
    _, width, dtype, start = _header(path, _content(path, 0, _HEADER_BYTES))
    content = _content(path, start + first * width * dtype.itemsize, count * width * dtype.itemsize)
    return _rows(path, content, count, width, dtype)


def sha256_of(path: str) -> str:
    """The SHA-256 (hex) of a file of rows as it is now. Raises as `read_rows`."""
    found, place = hashlib.sha256(), 0
    while content := _content(path, place, CHUNK_BYTES):
        found.update(content)
        place += len(content)
    return found.hexdigest()


def _content(path: str, place: int, size: int) -> bytes:
    """Up to `size` bytes of a file from a place on."""

    def read() -> bytes:
        with tf.io.gfile.GFile(path, "rb") as file:
            file.seek(place)
            return file.read(size)

    try:
        return persistently(read, path)
    except tf.errors.OutOfRangeError:  # it ends before this place
        return b""
    except tf.errors.NotFoundError as error:
        raise DamagedCache(f"{path} is missing") from error


def _header(path: str, content: bytes) -> tuple[int, int, np.dtype, int]:
    """(rows, width, dtype, bytes of the header) of the beginning of an .npy file."""
    stream = io.BytesIO(content)
    try:
        np.lib.format.read_magic(stream)
        (rows, width), _, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, TypeError) as error:
        raise DamagedCache(f"{path} is damaged, expected an .npy file of two axes: {error}") from error
    return rows, width, dtype, stream.tell()


def _rows(path: str, content: bytes, count: int, width: int, dtype: np.dtype) -> np.ndarray:
    if len(content) != count * width * dtype.itemsize:
        raise DamagedCache(f"{path} is damaged: shorter than its header says")
    return np.frombuffer(content, dtype).reshape(count, width)


# ---------------------------------------------------------------- statistics


def _sortable(values: np.ndarray) -> np.ndarray:
    """float32 -> uint32 that sort alike."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _value(key: int) -> float:
    """Inverse of `_sortable`, of one number."""
    bits = np.uint32(key)
    return float((bits ^ _SIGN if bits & _SIGN else ~bits).reshape(1).view(np.float32)[0])


def _interpolate(low: float, high: float, t: float) -> float:
    """Linear interpolation, from the nearer end."""
    return high - (high - low) * (1 - t) if t >= 0.5 else low + (high - low) * t


def streamed_statistics(
    rows: Callable[[], Iterable[np.ndarray]], mask: Sequence[bool] | None = None
) -> dict[str, np.ndarray]:
    """What `octo_like.common.normalization.compute_statistics` gives, of rows that are streamed twice.

    Args:
      rows: starts a pass; yields (n, D) float32 arrays, the same each time. Finite.
      mask: (D,) bool, kept in the result.

    Returns:
      {"mean", "std", "min", "max", "p01", "p99"} float32 (D,), "mask" bool (D,).

    Raises:
      ValueError: no rows, or a mask of another length.
    """
    count, total, low, high, upper = 0, 0.0, np.inf, -np.inf, None
    for part in rows():
        if not len(part):
            continue
        count += len(part)
        total = total + part.sum(0, dtype=np.float64)
        low, high = np.minimum(low, part.min(0)), np.maximum(high, part.max(0))
        if upper is None:
            upper = np.zeros((part.shape[1], _BINS), np.int64)
        for d in range(part.shape[1]):
            upper[d] += np.bincount(_sortable(part[:, d]) >> np.uint32(16), minlength=_BINS)
    if upper is None:
        raise ValueError("statistics need at least one row")
    width = len(upper)
    mean = total / count

    # Linear interpolation between the two order statistics around (count - 1) q, as numpy.quantile.
    places = [q * (count - 1) for q in QUANTILES]
    ranks = sorted({min(int(place) + i, count - 1) for place in places for i in (0, 1)})
    ends = upper.cumsum(1)
    found = [np.searchsorted(ends[d], ranks, side="right") for d in range(width)]
    bins = np.array(found, np.int64).reshape(width, len(ranks))  # also of no dimension at all
    lower = {(d, int(b)): np.zeros(_BINS, np.int64) for d in range(width) for b in bins[d]}
    squares = np.zeros(width)
    for part in rows():
        if not len(part):
            continue
        squares += ((part - mean) ** 2).sum(0)
        for d in range(width):
            keys = _sortable(part[:, d])
            top = keys >> np.uint32(16)
            for b in np.unique(bins[d]):
                inside = keys[top == b] & np.uint32(0xFFFF)
                lower[d, int(b)] += np.bincount(inside, minlength=_BINS)
    order = np.empty((width, len(ranks)))
    for d in range(width):
        for i, rank in enumerate(ranks):
            b = int(bins[d, i])
            before = int(ends[d, b] - upper[d, b])
            rest = int(np.searchsorted(lower[d, b].cumsum(), rank - before, side="right"))
            order[d, i] = _value(b << 16 | rest)
    position = {rank: i for i, rank in enumerate(ranks)}
    percentiles = [
        [
            _interpolate(
                order[d, position[int(place)]], order[d, position[min(int(place) + 1, count - 1)]], place - int(place)
            )
            for d in range(width)
        ]
        for place in places
    ]
    constant = low == high
    computed: dict[str, Any] = {
        "mean": np.where(constant, low, mean),
        "std": np.where(constant, 0.0, np.sqrt(squares / count)),
        "min": low,
        "max": high,
        "p01": np.array(percentiles[0]),
        "p99": np.array(percentiles[1]),
    }
    result = {key: np.asarray(value, np.float32) for key, value in computed.items()}
    result["mask"] = np.ones(width, bool) if mask is None else np.asarray(mask, bool)
    if result["mask"].shape != (width,):
        raise ValueError(f"mask has {result['mask'].size} entries, but the values have {width} dimensions")
    return result
