"""How sure a success rate is, from a few hundred episodes."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def success_rate(successes: Sequence[bool]) -> float:
    """The share of successes. Raises ValueError when there are none to count."""
    if len(successes) == 0:
        raise ValueError("no episodes: a success rate needs at least one")
    return float(np.mean(np.asarray(successes, bool)))


def success_interval(successes: Sequence[bool], level: float = 0.9) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson 1927): sensible at 0% and 100% and for few episodes.

    Args:
      successes: one bool per episode.
      level: two-sided coverage, in (0, 1).

    Returns:
      (low, high), within [0, 1].
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    rate, n = success_rate(successes), len(successes)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))


def difference_interval(
    first: Sequence[bool], second: Sequence[bool], level: float = 0.9, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of rate(first) - rate(second) over episodes that are paired (same seeds, same order).

    Raises:
      ValueError: unequal numbers of episodes, or none.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired episodes are needed, got {a.shape} and {b.shape}")
    difference = a.astype(np.float64) - b
    drawn = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    low, high = np.quantile(difference[drawn].mean(axis=1), [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)
