"""Separable antialiased resizing as a few small matrix products. Pure NumPy.

An output row is a weighted sum of the input rows below its kernel, so an axis is a banded matrix. Its rows are taken
in blocks, each a dense little matrix. Where blocks of a moderate size begin equally many whole input rows apart (480 to
256, 640 to 224: nearly all sizes in use), the axis is one batched product, else one product per block. This costs a
fifth of `tf.image.resize` with `antialias=True`, whose weights it reproduces: results differ by float32 rounding only.

Weights: tap j of output i is k((j + 1/2 - c) / s) with centre c = (i + 1/2) n/m and s = max(n/m, 1); taps outside the
image are dropped and the rest divided by their sum.
"""

import dataclasses
import functools
import math
import threading

import numpy as np

# Smaller products are not worth a thread to OpenBLAS: the caller's threads are the only ones.
_PRODUCT = 1 << 18
# Rows of a block: longer ones waste arithmetic on zeros, shorter ones are poor matrix products.
_BLOCK, _LONGEST = 4, 32


def lanczos3(x: np.ndarray) -> np.ndarray:
    """sinc(x) sinc(x/3) for |x| < 3, else 0."""
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def triangle(x: np.ndarray) -> np.ndarray:
    """1 - |x| for |x| < 1, else 0."""
    return np.maximum(0.0, 1.0 - np.abs(x))


KERNELS = {"lanczos3": (lanczos3, 3.0), "triangle": (triangle, 1.0)}


def axis_weights(n: int, m: int, kernel: str) -> np.ndarray:
    """The whole matrix (m, n) float64 of an axis from n to m samples; rows sum to 1."""
    function, _ = KERNELS[kernel]
    centre, scale = (np.arange(m) + 0.5) * n / m, max(n / m, 1.0)
    weights = function((np.arange(n)[None] + 0.5 - centre[:, None]) / scale)
    return weights / weights.sum(1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class _Bands:
    """Block b gives outputs [b p, (b+1) p) from padded inputs [starts[b], starts[b] + K)."""

    weights: np.ndarray  # (blocks, p, K)
    starts: tuple[int, ...]
    pad: int  # zero samples before the axis
    step: int | None  # starts are this far apart; None: unequally, and the last block may be partly unused

    @property
    def reach(self) -> int:
        """Samples of the padded axis that the blocks read."""
        return self.starts[-1] + self.weights.shape[2]


@functools.cache
def _bands(n: int, m: int, kernel: str) -> _Bands:
    ratio = math.gcd(n, m)
    # Outputs per block: a multiple of m/ratio that divides m, so that its inputs are a whole number too.
    p = next(m // ratio * k for k in range(1, ratio + 1) if ratio % k == 0 and (m // ratio * k >= _BLOCK or k == ratio))
    step: int | None = p * n // m
    if p > _LONGEST and m > _LONGEST:
        p, step = _BLOCK, None
    full = axis_weights(n, m, kernel)
    blocks = -(-m // p)
    parts = [full[b * p : (b + 1) * p] for b in range(blocks)]
    first = np.array([np.flatnonzero(part.any(0))[0] for part in parts])
    last = np.array([np.flatnonzero(part.any(0))[-1] for part in parts])
    if step is not None:
        first = np.arange(blocks) * step + (first - np.arange(blocks) * step).min()
    pad, taps = max(0, -int(first[0])), int((last - first).max()) + 1
    weights = np.zeros((blocks, p, taps), np.float32)
    for b, part in enumerate(parts):
        low, high = max(int(first[b]), 0), min(int(first[b]) + taps, n)
        weights[b, : len(part), low - first[b] : high - first[b]] = part[:, low:high]
    return _Bands(weights, tuple((first + pad).tolist()), pad, step)


@functools.cache
def _interleaved(n: int, m: int, kernel: str, channels: int) -> np.ndarray:
    """Weights for an axis whose samples are pixels of several channels: (blocks, K c, p c)."""
    weights = _bands(n, m, kernel).weights
    blocks, p, taps = weights.shape
    wide = np.zeros((blocks, taps, channels, p, channels), np.float32)
    for c in range(channels):
        wide[:, :, c, :, c] = weights.transpose(0, 2, 1)
    return wide.reshape(blocks, taps * channels, p * channels)


def _parts(length: int, cost: int) -> int:
    """The fewest equal parts of `length` whose products stay below the threading threshold; 1 when there are none."""
    return next((c for c in range(1, 129) if length % c == 0 and length // c * cost <= _PRODUCT), 1)


_view = np.lib.stride_tricks.as_strided
_Product = tuple[np.ndarray, np.ndarray, np.ndarray]  # (left, right, out) of np.matmul


class _Plan:
    """Buffers and the matrix products of one resampling. Views are made once: making them costs as much as a product.

    Padding is read with weight 0, so what an earlier image left there does no harm as long as it is finite.

    Attributes:
      source: (h, w, c) float32, where the image goes. result: (H, W, c) float32, what the products leave.
      products: (left, right, out) of `np.matmul`, in order.
    """

    def __init__(self, h: int, w: int, c: int, H: int, W: int, kernel: str):
        self.products: list[_Product] = []
        across = _bands(w, W, kernel) if W != w else None
        # Between the passes: rows of the final height, columns with the padding that the second pass reads.
        columns, pad = (w, 0) if across is None else (max(across.reach, across.pad + w), across.pad)
        middle = np.zeros((H, columns, c), np.float32)
        if H == h:
            self.source = middle[:, pad : pad + w]
        else:
            down = _bands(h, H, kernel)
            rows = np.zeros((max(down.reach, down.pad + h), w * c), np.float32)
            self.source = rows[down.pad : down.pad + h].reshape(h, w, c)
            self.products += _down(down, rows, middle, pad * c)
        self.result = middle
        if across is not None:
            self.result = np.zeros((H, W, c), np.float32)
            self.products += _across(across, _interleaved(w, W, kernel, c), middle, self.result)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        self.source[...] = image
        for left, right, out in self.products:
            np.matmul(left, right, out=out)
        return self.result


class _Plans(threading.local):
    """A thread's own plans: fresh large arrays cost more in page faults than the arithmetic done on them."""

    def __init__(self):
        self._plans: dict[tuple, _Plan] = {}

    def get(self, *key) -> _Plan:
        if key not in self._plans:
            if len(self._plans) >= 32:
                self._plans.clear()
            self._plans[key] = _Plan(*key)
        return self._plans[key]


_plans = _Plans()


def resample(image: np.ndarray, size: tuple[int, int], kernel: str) -> np.ndarray:
    """(h, w, c) finite numbers to (*size, c) float32, antialiased.

    The result is a buffer of this thread: it holds until the next call, so copy what must last.

    Args:
      kernel: "lanczos3" or "triangle".
    """
    return _plans.get(*image.shape, *size, kernel)(image)


def _down(bands: _Bands, rows: np.ndarray, middle: np.ndarray, first: int) -> list[_Product]:
    """Vertical pass: (padded rows, w c) to numbers [first, first + w c) of each row of `middle` (H, columns, c)."""
    length, height = rows.shape[1], middle.shape[0]
    target = middle.reshape(height, -1)
    blocks, p, taps = bands.weights.shape
    parts = _parts(length, p * taps)
    part, item = length // parts, rows.itemsize
    row, out = length * item, target.shape[1] * item
    if bands.step is not None:
        source = _view(rows[bands.starts[0] :], (blocks, parts, taps, part), (bands.step * row, part * item, row, item))
        into = _view(target[:, first:], (blocks, parts, p, part), (p * out, part * item, out, item))
        return [(bands.weights[:, None], source, into)]
    products = []
    for b, start in enumerate(bands.starts):
        count = min(p, height - b * p)
        source = _view(rows[start:], (parts, taps, part), (part * item, row, item))
        into = _view(target[b * p :, first:], (parts, count, part), (part * item, out, item))
        products.append((bands.weights[b, :count], source, into))
    return products


def _across(bands: _Bands, weights: np.ndarray, middle: np.ndarray, result: np.ndarray) -> list[_Product]:
    """Horizontal pass: (H, padded columns, c) to (H, W, c)."""
    (H, columns, c), W = middle.shape, result.shape[1]
    blocks, taps, p = weights.shape
    parts = _parts(H, taps * p)
    part, item = H // parts, middle.itemsize
    row, out = columns * c * item, W * c * item
    if bands.step is not None:
        source = _view(
            middle[:, bands.starts[0] :], (blocks, parts, part, taps), (bands.step * c * item, part * row, row, item)
        )
        into = _view(result, (blocks, parts, part, p), (p * item, part * out, out, item))
        return [(source, weights[:, None], into)]
    flat, target = middle.reshape(H, -1), result.reshape(H, -1)
    products = []
    for b, start in enumerate(bands.starts):
        count = min(p, W * c - b * p)
        source = _view(flat[:, start * c :], (parts, part, taps), (part * row, row, item))
        into = _view(target[:, b * p :], (parts, part, count), (part * out, out, item))
        products.append((source, weights[b, :, :count], into))
    return products


def resample_uint8(image: np.ndarray, size: tuple[int, int], kernel: str, out: np.ndarray) -> None:
    """`resample`, rounded half to even and clipped, into `out` (*size, c) uint8."""
    values = resample(image, size, kernel)
    np.clip(values, 0, 255, out=values)  # half the time of np.maximum and np.minimum with a number
    np.rint(values, out=values)
    out[...] = values
