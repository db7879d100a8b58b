"""How many of the first m samples come from each dataset, as exact integers. Pure NumPy."""

import heapq
from collections.abc import Sequence

import numpy as np

_MAX_SAMPLES = 1 << 44


class Mixture:
    """Exact integer counts per dataset: `counts(m)[d]` of the first m samples, |count - m w_d| <= 2, sum exactly m.

    The counts repeat: the first `period` samples contain a whole number of each dataset, its `units`, and so do the
    next. What is true of one period is therefore known of all, which makes a position arithmetic.

    Attributes:
      given: the weights (D,) that were asked for, normalised.
      units: samples of each dataset in a period, (D,) int64; at least one where the weight is not zero.
      weights: units / period. They differ from those given by less than 1 / period, but for the largest, which pay for
        those that are raised to one unit.
    """

    def __init__(self, weights: Sequence[float], period: int = 1 << 20):
        given = np.asarray(weights, np.float64)
        if given.ndim != 1 or not len(given) or not np.isfinite(given).all() or (given < 0).any():
            raise ValueError(f"mixture weights must be non-negative finite numbers, got {given.tolist()}")
        if given.sum() <= 0:
            raise ValueError("all mixture weights are zero")
        self.given, self.period = given / given.sum(), period
        self.units = _apportioned(self.given, period)
        self.weights = self.units / period
        # Merging the two lightest nodes first keeps every inner share at most 2/3, which bounds the error by 2.
        heap: list[tuple[int, int]] = [(units, d) for d, units in enumerate(self.units.tolist()) if units]
        heapq.heapify(heap)
        self._splits: list[tuple[int, int, int, int, int]] = []  # (node, left, right, units of left, units of node)
        node = len(given)
        while len(heap) > 1:
            (ua, a), (ub, b) = heapq.heappop(heap), heapq.heappop(heap)
            self._splits.append((node, a, b, ua, ua + ub))
            heapq.heappush(heap, (ua + ub, node))
            node += 1
        self._root = heap[0][1]
        self._splits.reverse()

    def counts(self, m: np.ndarray | int) -> np.ndarray:
        """Counts (..., D) int64 among the first `m` (...,) samples."""
        m = np.asarray(m, np.int64)
        if (m < 0).any() or (m >= _MAX_SAMPLES).any():
            raise ValueError(f"sample numbers must be in [0, 2^44), got {m.min()}..{m.max()}")
        periods, rest = np.divmod(m, self.period)
        node: dict[int, np.ndarray] = {self._root: rest}
        for parent, left, right, part, whole in self._splits:
            total = node.pop(parent)
            node[left] = (2 * total * part + whole) // (2 * whole)  # total * part / whole, rounded
            node[right] = total - node[left]
        result = np.zeros((len(self.units), *m.shape), np.int64)
        for leaf, count in node.items():
            result[leaf] = periods * self.units[leaf] + count
        return np.moveaxis(result, 0, -1)


def _apportioned(weights: np.ndarray, period: int) -> np.ndarray:
    """Integers (D,) that sum to `period`, nearest to weights * period, and at least 1 where the weight is positive.

    What the largest remainders leave over or lack is settled with the largest entries.
    """
    positive = weights > 0
    if positive.sum() > period:
        raise ValueError(f"a mixture has at most {period} datasets, got {positive.sum()}")
    exact = weights * period
    units = np.where(positive, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    missing = period - int(units.sum())
    if missing > 0:
        units[np.argsort(np.where(positive, units - exact, np.inf), kind="stable")[:missing]] += 1
    while missing < 0:  # many tiny weights were raised to 1
        largest = int(np.argmax(units))
        taken = min(-missing, max(1, int(units[largest]) // 2))
        units[largest] -= taken
        missing += taken
    return units


def balanced_weights(weights: Sequence[float], sizes: Sequence[int]) -> np.ndarray:
    """Weights (D,) times sizes (D,), normalised, as in Octo: with equal weights every frame is equally likely."""
    product = np.asarray(weights, np.float64) * np.asarray(sizes, np.float64)
    if not product.sum() > 0:
        raise ValueError(f"weights times sizes are all zero: {list(weights)}, {list(sizes)}")
    return product / product.sum()
