"""Linear probes: what can be read off features by one matrix (Alain & Bengio 2016). NumPy only.

Frames of one episode resemble each other, so episodes and not frames are held out.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

RIDGES = tuple(10.0**power for power in range(-8, 5))  # per frame, of features of deviation 1
RESAMPLES = 500


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """How well held-out targets were predicted; NaN with fewer than two episodes, or where the target is constant.

    Attributes:
      r2: 1 - squared error / squared error of the training episodes' mean, over all targets together. The latter
        (Campbell & Thompson 2008) makes features that say nothing 0 and not a little less.
      low, high: 95% interval of it over episodes drawn again (bootstrap).
      r2_k: (K,) by target.
      error: root of the mean squared distance of prediction and target, in the targets' unit.
      frames, episodes: with a known target.
    """

    r2: float
    low: float
    high: float
    r2_k: np.ndarray
    error: float
    frames: int
    episodes: int


def episode_folds(episode_n: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """(N,) int: the fold in which a row is tested. All rows of an episode are in one, and folds are as even as can be.

    With fewer episodes than folds every episode is a fold of its own.
    """
    names, index_n = np.unique(episode_n, return_inverse=True)
    order = np.random.default_rng([seed, 0xF01D]).permutation(len(names))
    return (order % min(folds, len(names)))[index_n]


def linear_probe(
    features_nf: np.ndarray,
    targets_nk: np.ndarray,
    episode_n: np.ndarray,
    *,
    folds: int = 5,
    ridges: Sequence[float] = RIDGES,
    seed: int = 0,
) -> LinearProbe:
    """Ridge regression from features to targets, every episode tested once by a probe that was fitted without it.

    Args:
      features_nf: (N, F). They are standardised by their training mean and deviation.
      targets_nk: (N, K); rows with a NaN are left out.
      episode_n: (N,) any labels.
      ridges: weights of the penalty |W|^2 beside the mean squared error. The best for a quarter of the training
        episodes is taken; with one, that one.

    Raises:
      ValueError: unequal lengths, no two folds, or features that are not finite.
    """
    features, targets = np.asarray(features_nf, np.float64), np.asarray(targets_nk, np.float64)
    if features.ndim != 2 or targets.ndim != 2 or not len(features) == len(targets) == len(episode_n):
        shapes = f"{features.shape}, {targets.shape}, {np.shape(episode_n)}"
        raise ValueError(f"a probe needs features (N, F), targets (N, K) and episodes (N,), got {shapes}")
    if folds < 2 or not len(ridges):
        raise ValueError(f"a probe needs two folds or more and a ridge, got {folds} and {tuple(ridges)}")
    if not np.isfinite(features).all():
        raise ValueError(f"{int((~np.isfinite(features)).any(1).sum())} of {len(features)} features are not finite")
    known = np.isfinite(targets).all(1)
    features, targets = features[known], targets[known]
    _, episode = np.unique(np.asarray(episode_n)[known], return_inverse=True)
    count, width = int(episode.max(initial=-1)) + 1, targets.shape[1]
    if count < 2:
        nan = float("nan")
        return LinearProbe(nan, nan, nan, np.full(width, nan), nan, len(targets), count)
    error, spread = np.zeros_like(targets), np.zeros_like(targets)
    fold = episode_folds(episode, folds, seed)
    for i in range(fold.max() + 1):
        test, train = fold == i, fold != i
        ridge = _best_ridge(features[train], targets[train], episode[train], ridges, seed)
        error[test] = ridge_predictions(features[train], targets[train], features[test], [ridge])[0] - targets[test]
        spread[test] = targets[train].mean(0) - targets[test]
    by_episode = [np.stack([np.bincount(episode, column**2) for column in x.T]) for x in (error, spread)]
    drawn = np.random.default_rng([seed, 0xB007]).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile(_r2(*(x.sum(0)[drawn].sum(1) for x in by_episode)), [0.025, 0.975])
    return LinearProbe(
        r2=float(_r2(*(x.sum() for x in by_episode))),
        low=float(low),
        high=float(high),
        r2_k=_r2(*(x.sum(1) for x in by_episode)),
        error=float(np.sqrt((error**2).sum(1).mean())),
        frames=len(targets),
        episodes=count,
    )


def _r2(error, spread):
    tiny = 1e-12  # of the squares of targets that vary by millionths
    return np.where(spread > tiny, 1 - error / np.where(spread > tiny, spread, 1.0), np.nan)


def _best_ridge(features, targets, episode, ridges, seed) -> float:
    fold = episode_folds(episode, 4, seed + 1)
    if len(ridges) == 1 or fold.max() == 0:
        return ridges[len(ridges) // 2]
    test, train = fold == 0, fold != 0
    predicted = ridge_predictions(features[train], targets[train], features[test], ridges)
    return ridges[int(np.argmin(((predicted - targets[test]) ** 2).sum((1, 2))))]


def ridge_predictions(
    features_nf: np.ndarray, targets_nk: np.ndarray, test_mf: np.ndarray, ridges: Sequence[float]
) -> np.ndarray:
    """(R, M, K): for every ridge r, of W and b with least mean squared error + r |W|^2 on standardised features.

    One eigendecomposition serves all ridges, of the smaller of the (F, F) and the (N, N) matrix of products.
    """
    mean, std = features_nf.mean(0), features_nf.std(0)
    varies = std > 1e-6 * np.abs(mean) + 1e-12  # what is constant up to rounding would become noise of size 1
    x = (features_nf[:, varies] - mean[varies]) / std[varies]
    z = (test_mf[:, varies] - mean[varies]) / std[varies]
    centre = targets_nk.mean(0)
    y, n = targets_nk - centre, len(targets_nk)
    if x.shape[1] <= n:  # W = (X'X/n + r)^-1 X'y/n
        values, vectors = np.linalg.eigh(x.T @ x / n)
        left, right = z @ vectors, vectors.T @ (x.T @ y) / n
    else:  # W = X' (XX'/n + r)^-1 y/n
        values, vectors = np.linalg.eigh(x @ x.T / n)
        left, right = (z @ x.T) @ vectors / n, vectors.T @ y
    values = np.maximum(values, 0.0)
    return np.stack([left @ (right / (values + ridge)[:, None]) + centre for ridge in ridges])
