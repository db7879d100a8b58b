"""Linear probes against closed forms, and against the same thing written without shortcuts."""

import numpy as np
import pytest

from octo_like.training.linear_probe import episode_folds, linear_probe, ridge_predictions

EPISODES = np.repeat(np.arange(30), 7)


def linear_data(noise=0.0, width=12, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(EPISODES), width)) * rng.uniform(0.1, 9, width) + rng.normal(size=width)
    targets = features @ rng.normal(size=(width, 2)) + (3.0, -1.0)
    return features, targets + noise * rng.normal(size=targets.shape) * targets.std(0)


def test_what_is_linear_is_read_off_entirely():
    probe = linear_probe(*linear_data(), EPISODES)
    assert probe.r2 == pytest.approx(1, abs=1e-9) and probe.error < 1e-5
    assert (probe.frames, probe.episodes) == (len(EPISODES), 30)
    np.testing.assert_allclose([probe.low, probe.high, *probe.r2_k], 1, atol=1e-9)


def test_noise_costs_its_share_and_the_interval_says_how_sure_that_is():
    probe = linear_probe(*linear_data(noise=0.5), EPISODES)
    assert 0.7 < probe.low < probe.r2 < probe.high < 0.9  # 1 / 1.25, and a little for the fit


def test_shuffled_targets_are_not_told():
    features, targets = linear_data()
    probe = linear_probe(features, np.random.default_rng(1).permutation(targets), EPISODES)
    assert -0.1 < probe.r2 < 0.02


def test_constant_features_say_as_much_as_the_mean():
    _, targets = linear_data()
    constant = np.full((len(EPISODES), 5), 1e4) * (1 + 1e-8 * np.random.default_rng(0).normal(size=(1, 5)))
    assert linear_probe(constant, targets, EPISODES).r2 == 0.0
    rounding = constant * (1 + 1e-8 * np.random.default_rng(0).normal(size=constant.shape))
    assert linear_probe(rounding, targets, EPISODES).r2 == 0.0, "rounding must not become features"


def test_an_episode_is_never_on_both_sides():
    fold = episode_folds(EPISODES, 5)
    assert set(fold) == set(range(5))
    for episode in np.unique(EPISODES):
        assert len(set(fold[EPISODES == episode])) == 1
    assert set(np.bincount(fold)) == {6 * 7}
    np.testing.assert_array_equal(fold, episode_folds(EPISODES, 5))
    assert (fold != episode_folds(EPISODES, 5, seed=1)).any()
    np.testing.assert_array_equal(np.sort(episode_folds(np.array([7, 7, 9]), 5)), [0, 0, 1])


def test_what_only_identifies_the_episode_does_not_help():
    """Split by frames, an episode's own mark would tell its target exactly."""
    rng = np.random.default_rng(0)
    mark, place = np.eye(30)[EPISODES], rng.normal(size=(30, 2))[EPISODES]
    assert linear_probe(mark, place, EPISODES).r2 < 0.02
    assert linear_probe(mark, place, np.arange(len(EPISODES))).r2 > 0.9


@pytest.mark.parametrize("width", [12, 400])
@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_ridge_against_least_squares_with_extra_rows(width, ridge):
    """The penalty is a row sqrt(n ridge) per weight whose target is 0 (Hastie et al. 2009, exercise 3.12)."""
    features, targets = linear_data(noise=0.1, width=width)
    test = linear_data(width=width, seed=1)[0]

    def brute(features, targets, test):
        mean, std = features.mean(0), features.std(0)
        x, n = (features - mean) / std, len(features)
        rows = np.concatenate([x, np.sqrt(n * ridge) * np.eye(width)])
        centred = np.concatenate([targets - targets.mean(0), np.zeros((width, 2))])
        return (test - mean) / std @ np.linalg.lstsq(rows, centred, rcond=None)[0] + targets.mean(0)

    got = ridge_predictions(features, targets, test, [9.0, ridge])
    np.testing.assert_allclose(got[1], brute(features, targets, test), atol=1e-5)
    fold = episode_folds(EPISODES, 3, 5)
    error, spread = np.zeros_like(targets), np.zeros_like(targets)
    for i in range(3):
        train, held_out = fold != i, fold == i
        error[held_out] = brute(features[train], targets[train], features[held_out]) - targets[held_out]
        spread[held_out] = targets[train].mean(0) - targets[held_out]
    probe = linear_probe(features, targets, EPISODES, folds=3, ridges=[ridge], seed=5)
    assert probe.r2 == pytest.approx(1 - (error**2).sum() / (spread**2).sum(), abs=1e-6)
    np.testing.assert_allclose(probe.r2_k, 1 - (error**2).sum(0) / (spread**2).sum(0), atol=1e-6)
    assert probe.error == pytest.approx(np.sqrt((error**2).sum(1).mean()), rel=1e-5)


def test_unknown_targets_are_left_out():
    features, targets = linear_data()
    targets[EPISODES < 10, 1] = np.nan
    probe = linear_probe(features, targets, EPISODES)
    assert (probe.frames, probe.episodes) == (140, 20) and probe.r2 > 0.999
    targets[EPISODES < 29] = np.nan
    nothing = linear_probe(features, targets, EPISODES)
    assert np.isnan([nothing.r2, nothing.low, nothing.error, *nothing.r2_k]).all() and nothing.episodes == 1
    assert np.isnan(linear_probe(features, np.ones_like(targets), EPISODES).r2), "there is nothing to tell"


def test_what_is_no_probe():
    features, targets = linear_data()
    with pytest.raises(ValueError, match=r"features \(N, F\).* got \(210, 12\), \(209, 2\), \(210,\)"):
        linear_probe(features, targets[1:], EPISODES)
    with pytest.raises(ValueError, match="two folds"):
        linear_probe(features, targets, EPISODES, folds=1)
    features[3, 2] = np.inf
    with pytest.raises(ValueError, match="1 of 210 features are not finite"):
        linear_probe(features, targets, EPISODES)
