"""Normalisation: values, masks, constant dimensions, JAX and NumPy alike, JSON and combination."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common import normalization as n

EXCERPT = pathlib.Path(__file__).resolve().parent.parent / "golden" / "pipeline_excerpt.npz"


@pytest.fixture
def values():
    x = np.random.default_rng(0).normal(3.0, [1.0, 0.01, 100.0, 1.0], (500, 4)).astype(np.float32)
    x[:, 1] = 0.1  # constant
    x[:, 3] = x[:, 3] > 3  # a gripper
    return x


@pytest.fixture
def stats(values):
    return n.compute_statistics(values, [True, True, True, False])


def test_statistics_equal_a_float64_brute_force(values, stats):
    wide = values.astype(np.float64)
    np.testing.assert_allclose(stats["mean"], wide.mean(0), rtol=1e-7)
    np.testing.assert_allclose(stats["std"][[0, 2, 3]], wide.std(0)[[0, 2, 3]], rtol=1e-7)
    np.testing.assert_allclose(stats["p01"], np.quantile(wide, 0.01, axis=0), rtol=1e-7)
    assert stats["std"][1] == 0 and stats["mean"][1] == np.float32(0.1)
    assert stats["mask"].tolist() == [True, True, True, False]
    assert all(stats[key].dtype == np.float32 for key in n.FIELDS)


def test_statistics_of_large_offsets_are_not_lost():
    x = (1e4 + np.random.default_rng(0).normal(size=(100_000, 1))).astype(np.float32)
    assert abs(n.compute_statistics(x)["std"][0] - x.astype(np.float64).std()) < 1e-6


@pytest.mark.parametrize("kind", n.KINDS)
def test_values(values, stats, kind):
    y = n.normalize(values, stats, kind)
    assert y.dtype == np.float32
    if kind == "normal":
        np.testing.assert_allclose(y[:, [0, 2]].mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(y[:, [0, 2]].std(0), 1, atol=1e-4)
    else:
        assert y[:, [0, 2]].min() == -1 and y[:, [0, 2]].max() == 1
        np.testing.assert_allclose((y[:, 0] == 1).mean(), 0.01, atol=0.003)
    np.testing.assert_array_equal(y[:, 1], 0)  # constant
    np.testing.assert_array_equal(y[:, 3], values[:, 3])  # passed through, never clipped


@pytest.mark.parametrize("kind", n.KINDS)
def test_round_trip(values, stats, kind):
    inside = (values >= stats["p01"]) & (values <= stats["p99"])
    back = n.unnormalize(n.normalize(values, stats, kind), stats, kind)
    check = np.ones_like(inside) if kind == "normal" else inside | ~stats["mask"]
    np.testing.assert_allclose(back[check], values[check], rtol=1e-5, atol=1e-5)
    # Whatever a model says about a constant dimension, the robot gets its mean.
    assert n.unnormalize(np.full((1, 4), 7.0, np.float32), stats, kind)[0, 1] == stats["mean"][1]


@pytest.mark.parametrize("kind", n.KINDS)
def test_jax_arrays_and_tracers(values, stats, kind):
    for function in (n.normalize, n.unnormalize):
        want = function(values, stats, kind)
        eager = function(jnp.asarray(values), stats, kind)
        traced = jax.jit(lambda x, f=function: f(x, stats, kind))(values)
        assert isinstance(eager, jax.Array) and eager.dtype == jnp.float32
        np.testing.assert_allclose(eager, want, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(traced, want, rtol=1e-5, atol=1e-5)
        chunk = function(jnp.asarray(values).reshape(5, 25, 4, 4), stats, kind)
        np.testing.assert_allclose(np.reshape(chunk, (500, 4)), want, rtol=1e-6, atol=1e-6)


def test_reference_values():
    golden = np.load(EXCERPT)
    for kind in n.KINDS:
        for masked in (True, False):
            stats = {key: golden[f"normalize/in/stats/action/{key}"] for key in ("mean", "std", "p01", "p99")}
            if masked:
                stats["mask"] = golden["normalize/in/mask"]
            got = n.normalize(golden["normalize/in/action"], stats, kind)
            want = golden[f"normalize/{kind}_{'masked' if masked else 'unmasked'}/upstream/action"]
            # Column 0 has no spread: 0 here, while upstream's bounds give -1.
            np.testing.assert_allclose(got[:, 1:], want[:, 1:], rtol=1e-5, atol=1e-5)


def test_json_round_trip(stats):
    whole = {"a": {"action": stats, "num_transitions": 500, "num_trajectories": 3}}
    back = n.from_json(json.dumps(n.to_json(whole)))
    assert back["a"]["num_transitions"] == 500
    for key, value in stats.items():
        np.testing.assert_array_equal(back["a"]["action"][key], value)
        assert back["a"]["action"][key].dtype == value.dtype
    without = n.to_json(whole["a"])
    del without["action"]["mask"]
    assert n.from_json(without)["action"]["mask"].tolist() == [True] * 4
    del without["action"]["p01"]
    with pytest.raises(ValueError, match="action lack p01"):
        n.from_json(without)
    with pytest.raises(ValueError, match="must be a mapping"):
        n.from_json("[1, 2]")


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda s: n.normalize(np.zeros((2, 3)), s), "3 dimensions on the last axis, the statistics have 4"),
        (lambda s: n.unnormalize(np.zeros((2, 5)), s), "5 dimensions"),
        (lambda s: n.normalize(np.zeros((2, 4)), s, "gauss"), "'gauss'; valid: normal, bounds"),
        (lambda s: n.compute_statistics(np.zeros((0, 4))), "N > 0"),
        (lambda s: n.compute_statistics(np.zeros((3, 4)), [True]), "1 entries, but the values have 4"),
    ],
)
def test_bad_input(stats, call, message):
    with pytest.raises(ValueError, match=message):
        call(stats)
