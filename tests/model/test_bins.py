"""The binnings of other policies, by name: every class, every edge and its neighbours, and what lies outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.checks import BIN_TYPES, check_run
from octo_like.common.config import ConfigError, freeze
from octo_like.model.discrete import ActionBins
from octo_like.policy.surgery import carry
from tests.model.light import HeadAlone
from tests.training import tiny_config

SIZES = dict(readout="readout_action", action_horizon=3, action_dim=4)
RANGES = [(256, -1.0, 1.0), (65, -1.0, 1.0), (2, -2.0, -1.0), (256, -np.pi / 2, np.pi / 2), (100, 0.0, 0.7)]


def bins(num_bins, kind, low=None, high=None, *, dims=1, compat=False):
    return ActionBins.make(num_bins, kind, low, high, 5.0, dims, compat=compat)


def values_around(edges, low, high):
    """float32 around every edge, between them, on both sides of the range, and both zeros."""
    x = np.float32(edges)
    for _ in range(2):
        x = np.concatenate([x, np.nextafter(x, np.float32(-np.inf)), np.nextafter(x, np.float32(np.inf))])
    between = np.random.default_rng(0).uniform(low - 0.1, high + 0.1, 2000).astype(np.float32)
    outside = np.float32([-np.inf, -1e30, low - 5, high + 5, 1e30, np.inf])
    x = x[(x == 0) | (np.abs(x) >= np.finfo(np.float32).tiny)]  # XLA takes smaller numbers for zero
    return np.unique(np.concatenate([x, between, outside, np.float32([0.0])])), np.float32([-0.0, 0.0])


def openvla_class(x, num_bins, low, high):
    """float32 compared in double precision, as NumPy does with OpenVLA's edges; the first class is 0."""
    return np.digitize(np.clip(x.astype(np.float64), low, high), np.linspace(low, high, num_bins)) - 1


def rt1_class(x, num_bins, low, high):
    low, high = np.float32(low), np.float32(high)
    share = (np.clip(x, low, high) - low) / (high - low)
    return (share * np.float32(num_bins - 1)).astype(np.int32)


@pytest.mark.parametrize("num_bins,low,high", RANGES)
def test_openvla_s_classes(num_bins, low, high):
    edges = np.linspace(low, high, num_bins)
    made = bins(num_bins, "openvla", low, high, compat=num_bins == 65)  # what the Octo releases do is theirs alone
    for x in values_around(edges, low, high):
        np.testing.assert_array_equal(made.index(x[:, None])[:, 0], openvla_class(x, num_bins, low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    want = np.float32(centres[np.clip(np.arange(num_bins + 3), 0, num_bins - 2)])  # also of classes that are none
    np.testing.assert_array_equal(made.centre(jnp.arange(num_bins + 3)[:, None])[:, 0], want)


def test_openvla_s_tokens_of_its_own_reference():
    """Actions and ids that OpenVLA's own code gave with the vocabulary of 32,000 words."""
    actions = [
        [1.0, -1.0, 0.8741060962360503, -0.8117857523613445, 0.5704874642784135, 0.38350530825076756, -0.515660712312],
        [0.45031630272, -0.15845028404, -0.29786738829, 0.99955098079, 0.91019058347, -0.95710951777, 0.48746519586],
    ]
    ids = [[31744, 31999, 31761, 31976, 31799, 31823, 31938], [31815, 31892, 31910, 31745, 31756, 31994, 31810]]
    made = bins(256, "openvla", dims=7)
    np.testing.assert_array_equal(31999 - made.index(np.float32(actions)), ids)
    ends = made.centre(31999 - np.int32([[31744] * 7, [31745] * 7, [31999] * 7]))
    np.testing.assert_array_equal(ends[:, 0], np.float32([254 / 255, 254 / 255, -254 / 255]))


@pytest.mark.parametrize("num_bins,low,high", RANGES)
def test_rt_1_s_classes(num_bins, low, high):
    made = bins(num_bins, "rt1" if num_bins == 256 else "rt2", low, high)
    share = np.arange(num_bins, dtype=np.float32) / np.float32(num_bins - 1)
    want = share * (np.float32(high) - np.float32(low)) + np.float32(low)
    np.testing.assert_array_equal(made.centre(np.arange(num_bins)[:, None])[:, 0], want)
    for edges in (np.linspace(low, high, num_bins), want, made.edges[0]):
        for x in values_around(edges, low, high):
            np.testing.assert_array_equal(made.index(x[:, None])[:, 0], rt1_class(x, num_bins, low, high))
    assert made.index(np.float32([[high]])) == num_bins - 1 and made.index(np.float32([[low]])) == 0


def test_uniform_bins_are_the_default_and_stay_what_they_were():
    edges = np.linspace(-5, 5, 257, dtype=np.float32)
    for head in (HeadAlone(SIZES | dict(kind="discrete", token_per="")), HeadAlone(SIZES | dict(kind="bins", width=8))):
        assert head.module.bin_type == "uniform" and head.module.num_bins == 256
    made = bins(256, "uniform", dims=2)
    np.testing.assert_array_equal(made.edges, [edges, edges])
    np.testing.assert_array_equal(made.centre(np.arange(256)[:, None] * [1, 1])[:, 1], (edges[1:] + edges[:-1]) / 2)
    for x in values_around(edges, -5, 5):
        want = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, 255)
        np.testing.assert_array_equal(made.index(np.stack([x, x], -1))[:, 0], want)


@pytest.mark.parametrize(
    "head,kind", [("discrete", "openvla"), ("discrete", "rt1"), ("bins", "openvla"), ("bins", "rt2")]
)
def test_heads_learn_and_sample_the_classes_of_their_binning(head, kind):
    """With a range per dimension; what is sampled are values of classes, and a loss is that of the action's class."""
    low, high = (-1.0, 0.0, -3.0, 2.0), (1.0, 0.5, -2.0, 8.0)
    options = dict(token_per="") if head == "discrete" else dict(width=8, num_heads=2, num_layers=1)
    alone = HeadAlone(SIZES | options | dict(kind=head, bin_type=kind, num_bins=9, low=low, high=high))
    made = bins(9, kind, low, high, dims=4)
    action, mask = np.random.default_rng(0).uniform(-4, 9, (4, 2, 3, 4)).astype(np.float32), np.ones((4, 2, 3, 4))
    keys = jax.random.split(jax.random.key(0), 4)
    terms = alone.apply(alone.groups, action, mask, keys, method="loss_terms")
    logits = alone.apply(alone.groups, *(() if head == "discrete" else (action, mask)), method="logits")
    function = openvla_class if kind == "openvla" else rt1_class
    target = np.stack([function(action[..., d], 9, low[d], high[d]) for d in range(4)], -1)
    entropy = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), target[..., None], -1)
    np.testing.assert_allclose(terms["loss"], entropy.sum(), rtol=1e-5)
    drawn = np.asarray(alone.apply(alone.groups, keys, sample_shape=(50,), method="sample"))
    for d in range(4):
        assert set(drawn[..., d].flat) <= set(made.values[d]) and len(set(drawn[..., d].flat)) > 4


def test_the_range_of_named_binnings_is_that_of_scaled_actions():
    for kind in ("openvla", "rt1", "rt2"):
        default, given = bins(256, kind), bins(256, kind, -1.0, 1.0)
        np.testing.assert_array_equal(default.edges, given.edges)
        np.testing.assert_array_equal(default.values, given.values)
    entry = SIZES | dict(kind="bins", bin_type="openvla")
    same, other = ({"heads": {"action": entry | change}} for change in (dict(max_action=2.0), dict(bin_type="rt2")))
    assert not carry({"heads": {"action": entry}}, same, {}).anew  # max_action means nothing to these bins
    assert carry({"heads": {"action": entry}}, other, {}).anew


def test_bins_that_are_none_are_refused_before_anything_is_read():
    for make in (lambda: bins(256, "openvl"), lambda: bins(256, "gauss")):
        with pytest.raises(ValueError, match="valid: " + ", ".join(map(repr, BIN_TYPES))):
            make()
    for kind, least in (("uniform", 1), ("openvla", 2), ("rt2", 2)):
        with pytest.raises(ValueError, match=f"num_bins={least - 1}: {kind} bins are at least {least}"):
            bins(least - 1, kind)
    for field, value, message in (
        ("bin_type", "openvl", "bin_type must be one of 'uniform', 'normal', 'openvla', 'rt1', 'rt2'; got 'openvl'"),
        ("num_bins", 1, "num_bins must be a whole number of at least 2 with bin_type='openvla'; got 1"),
        ("num_bins", 2.5, "num_bins must be a whole number"),
    ):
        for group in ("model", "surgery"):
            tree = tiny_config.get_config("synthetic").to_dict()
            head = SIZES | dict(kind="bins", bin_type="openvla") | {field: value}
            tree.setdefault(group, {}).setdefault("heads", {})["action"] = head
            with pytest.raises(ConfigError, match=f"{group}.heads.action.{message}"):
                check_run(freeze(tree))
    # A field of a user's own head may mean anything.
    tree = tiny_config.get_config("synthetic").to_dict()
    tree["model"]["heads"]["mine"] = dict(kind="my_heads:Head", bin_type="gauss", num_bins=0)
    check_run(freeze(tree))
