"""Heads: losses count what they should, closed forms, sampling keyed per row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import flatten, unflatten
from octo_like.model.diffusion import (
    add_noise,
    cosine_schedule,
    ddpm_sample,
    noise_from_action,
    noise_from_velocity,
    velocity,
)
from octo_like.model.octo import build_model
from octo_like.model.tokenizers import bin_index, bin_thresholds
from octo_like.model.tokens import TokenGroup
from tests.model import light, tiny
from tests.model.light import FLOW, HeadAlone

REGRESSION = dict(kind="regression", readout="readout_action", action_horizon=3, action_dim=4)

DISCRETE = dict(kind="discrete", readout="obs", use_map=True, action_horizon=3, action_dim=4, num_bins=16)
HEADS = {
    "diffusion": tiny.diffusion(),
    "diffusion_velocity": tiny.diffusion(prediction="velocity", clip="x0"),
    "diffusion_action": tiny.diffusion(prediction="action", sampler="ddim", sample_steps=3, clip="x0"),
    "diffusion_map": tiny.diffusion(use_map=True, num_samples=3, sampler="ddim", eta=1.0),
    "flow": FLOW,
    "flow_map": FLOW | dict(use_map=True, num_samples=3, loss="l1", time_alpha=1.0),
    "mse": REGRESSION,
    "l1": REGRESSION | dict(loss="l1", readout="obs", use_map=True),
    "discrete": DISCRETE,
    "discrete_ranges": DISCRETE | dict(low=(-1.0, -2.0, -3.0, -4.0), high=4.0),
    "discrete_tokens": DISCRETE | dict(use_map=False, readout="readout_action"),
    "discrete_step": DISCRETE | dict(token_per="action_horizon"),
    "discrete_chunk": DISCRETE | dict(use_map=False, readout="readout_action", token_per="", bin_type="normal"),
}


@pytest.fixture(scope="module", params=HEADS)
def alone(request):
    """(entry, head alone, its jitted loss terms)."""
    head = HeadAlone(HEADS[request.param])
    return HEADS[request.param], head, jax.jit(head.terms)


def test_masked_actions_do_not_matter_and_sums_add_up(alone):
    entry, head, terms = alone
    batch = light.batch(entry)
    batch["action_pad_mask"][0, :, 2] = False
    batch["action_pad_mask"][1, :, :, 3] = False
    batch["observation"]["timestep_pad_mask"][2, 0] = False
    keys = jax.random.split(jax.random.key(1), 4)
    whole = terms(batch, keys, head.groups)
    assert whole["count"] == 4 * 24 - 8 - 6 - 12
    parts = []
    for i in range(4):  # a row alone, by masking the others
        row = {"action_head_mask": {"action": np.arange(4) == i}} | batch
        parts.append(terms(row, keys, head.groups))
    for key in whole:
        np.testing.assert_allclose(whole[key], sum(part[key] for part in parts), rtol=2e-5, err_msg=key)
    batch["action"][0, :, 2] += 100.0
    batch["action"][1, :, :, 3] = np.nan
    batch["action"][2, 0] = np.inf
    for key, value in terms(batch, keys, head.groups).items():
        np.testing.assert_array_equal(value, whole[key], key)


def test_sampling_is_keyed_by_row(alone):
    _, head, _ = alone
    keys = jax.random.split(jax.random.key(5), 4)
    sample = jax.jit(functools.partial(head.apply, method="sample"), static_argnames="sample_shape")
    actions = sample(head.groups, keys)
    assert actions.shape == (4, 3, 4) and np.all(np.isfinite(actions)) and np.all(np.abs(actions) <= 5.0)
    rows = np.array([2, 0, 3, 1])
    permuted = jax.tree.map(lambda x: x[rows], head.groups)
    np.testing.assert_allclose(sample(permuted, keys[rows]), actions[rows], rtol=1e-4, atol=1e-4)
    # A row's sample knows nothing of the other rows' keys and tokens.
    mine = np.arange(4)[:, None, None, None] == 1
    changed = {
        name: TokenGroup(np.where(mine, group.tokens, group.tokens + 1), group.mask)
        for name, group in head.groups.items()
    }
    new_keys = jax.random.split(jax.random.key(6), 4).at[1].set(keys[1])
    np.testing.assert_allclose(sample(changed, new_keys)[1], actions[1], rtol=1e-5, atol=1e-5)


def test_several_samples_have_leading_dimensions(alone):
    _, head, _ = alone
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(5), 4))
    out = jax.eval_shape(functools.partial(head.apply, method="sample", sample_shape=(5, 2)), head.groups, keys)
    assert out.shape == (5, 2, 4, 3, 4) and out.dtype == np.float32


def test_sampling_a_gaussian_whose_score_is_known():
    """With the exact noise prediction of N(m, s^2), ancestral sampling gives N(m, s^2)."""
    schedule, mean, std = cosine_schedule(100), 0.7, 0.4

    def denoise(x, t):
        level = schedule.alpha_hats[t]
        variance = level * std**2 + 1 - level
        return jnp.sqrt(1 - level) * (x - jnp.sqrt(level) * mean) / variance

    n = 20_000
    noise = jax.random.normal(jax.random.key(0), (101, n))
    x = ddpm_sample(denoise, schedule, noise[0], noise[1:], max_action=5.0)
    assert abs(float(x.mean()) - mean) < 0.02 and abs(float(x.std()) - std) < 0.02


def test_add_noise_has_the_stated_moments():
    schedule = cosine_schedule(20)
    assert np.all(np.diff(schedule.alpha_hats) < 0) and schedule.alpha_hats[-1] < 1e-3
    noise = jax.random.normal(jax.random.key(0), (50_000,))
    for t in (0, 7, 19):
        x = add_noise(schedule, jnp.full(50_000, 2.0), noise, jnp.asarray(t))
        level = float(schedule.alpha_hats[t])
        assert abs(float(x.mean()) - 2 * level**0.5) < 0.02 and abs(float(x.var()) - (1 - level)) < 0.02


def test_velocity_action_and_noise_are_the_same_knowledge():
    schedule = cosine_schedule(20)
    x, noise = jax.random.normal(jax.random.key(0), (2, 20, 6))
    time = jnp.arange(20)[:, None]
    x_t = add_noise(schedule, x, noise, time)
    np.testing.assert_allclose(
        noise_from_velocity(schedule, x_t, velocity(schedule, x, noise, time), time), noise, atol=1e-5
    )
    np.testing.assert_allclose(noise_from_action(schedule, x_t, x, time), noise, atol=1e-4)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "action"])
def test_a_network_that_always_says_the_same_is_sampled_and_scored_as_the_closed_form_says(prediction):
    """The last layer's kernel is zero, so that its bias b is all the network ever says."""
    head = HeadAlone(tiny.diffusion(prediction=prediction), rows=2)
    b = np.linspace(-0.9, 0.9, 12, dtype=np.float32)
    flat = dict(flatten(head.params))
    last = "diffusion_model/reverse_network/Dense_1"
    flat[f"{last}/kernel"], flat[f"{last}/bias"] = jnp.zeros_like(flat[f"{last}/kernel"]), jnp.asarray(b)
    head.params = unflatten(flat)
    keys = jax.random.split(jax.random.key(0), 2)
    if prediction == "action":  # whatever the noise, the chain ends at b
        out = jax.jit(functools.partial(head.apply, method="sample"))(head.groups, keys)
        np.testing.assert_allclose(out.reshape(2, -1), np.stack([b, b]), atol=1e-5)

    schedule = cosine_schedule(5)
    action = light.batch(tiny.diffusion(), rows=2)["action"]
    shape = (1, *action.shape[:2])
    time = jnp.full((*shape, 1), 3)
    noise = jax.random.normal(jax.random.key(3), (*shape, 12))
    terms = head.apply(head.groups, action, jnp.ones_like(action), keys, draws=(time, noise), method="loss_terms")
    x = np.clip(action.reshape(*shape[1:], 12), -5, 5)[None]
    a = np.asarray(schedule.alpha_hats)[3]
    target = {"noise": noise, "velocity": a**0.5 * noise - (1 - a) ** 0.5 * x, "action": x}[prediction]
    assert np.isclose(terms["loss"], np.sum((b - target) ** 2) * action.shape[-1], rtol=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_bins_against_brute_force(kind):
    edges = bin_thresholds(16, kind, -2.0, 2.0)
    x = np.concatenate([np.linspace(-6, 6, 101), edges[1:-1]]).astype(np.float32)
    want = []
    for value in x:
        if kind == "uniform":
            value = np.clip(value, np.float32(-2 + 1e-6), np.float32(2 - 1e-6))
        inside = [i for i in range(16) if edges[i] <= value < edges[i + 1]]
        want.append(inside[0] if inside else (0 if value < edges[0] else 15))
    np.testing.assert_array_equal(bin_index(jnp.asarray(x), 16, kind, -2.0, 2.0, compat=False), want)


def test_bins_with_a_range_per_dimension():
    """Brute force: the bin is the one whose edges hold the value, the decoded value is the middle of it."""
    low, high = (-1.0, 0.0, -3.0, 2.0), (1.0, 0.5, -2.0, 8.0)
    entry = dict(kind="discrete", readout="obs", use_map=True, action_horizon=3, action_dim=4, num_bins=8)
    head = HeadAlone(entry | dict(low=low, high=high))
    x = np.random.default_rng(0).uniform(-4, 9, (50, 4)).astype(np.float32)
    index = np.asarray(head.apply(x, method="to_bins"))
    decoded = np.asarray(head.apply(index, method="from_bins"))
    for row, bins, middles in zip(x, index, decoded, strict=True):
        for d, value in enumerate(row):
            width = (high[d] - low[d]) / 8
            want = sum(value >= low[d] + k * width for k in range(1, 8))
            assert bins[d] == want
            assert np.isclose(middles[d], low[d] + (want + 0.5) * width)
    inside = np.clip(x, low, high)
    assert np.all(
        np.abs(head.apply(head.apply(inside, method="to_bins"), method="from_bins") - inside) <= 6 / 16 + 1e-6
    )


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_tokens_are_drawn_at_the_temperature(temperature):
    entry = dict(
        kind="discrete",
        readout="readout_action",
        token_per="",
        action_horizon=1,
        action_dim=2,
        num_bins=5,
        low=0.0,
        high=5.0,
    )
    head = HeadAlone(entry | dict(temperature=temperature), rows=1)
    keys = jax.random.split(jax.random.key(0), 1)
    drawn = head.apply(head.groups, keys, sample_shape=(20_000,), method="sample")[:, 0, 0]
    logits = np.asarray(head.apply(head.groups, method="logits"), np.float64)[0, -1, 0]
    for d in range(2):
        share = np.bincount(np.asarray(drawn[:, d]).astype(int), minlength=5) / 20_000
        if temperature == 0:
            want = np.eye(5)[logits[d].argmax()]
        else:
            want = np.exp(logits[d] / temperature) / np.exp(logits[d] / temperature).sum()
        np.testing.assert_allclose(share, want, atol=0.015)  # four standard deviations of a share


@pytest.mark.parametrize(
    "entry,message",
    [
        (tiny.diffusion(sampler="dpm"), "'ddim'"),
        (tiny.diffusion(sampler="ddim", sample_steps=6), "sample_steps must be in 1..num_steps=5, got 6"),
        (tiny.diffusion(eta=0.5), "belong to sampler='ddim'"),
        (tiny.diffusion(clip="hard"), "'x0'"),
        (tiny.diffusion(loss="l2"), "'l1'"),
        (FLOW | dict(sample_steps=0), "sample_steps"),
        (DISCRETE | dict(low=(0.0, 0.0)), "low needs one number or 4"),
        (DISCRETE | dict(low=(0.0, 0.0, 9.0, 0.0)), "dimension 2"),
        (DISCRETE | dict(bin_type="normal", low=0.0), "normal bins have none"),
        (DISCRETE | dict(bin_type="gauss"), "'normal'"),
        (DISCRETE | dict(temperature=-1.0), "temperature"),
        (DISCRETE | dict(token_per="action_dim"), "action_dim_and_action_horizon"),
        (REGRESSION | dict(loss="huber"), "'mse'"),
    ],
)
def test_bad_options_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        head = HeadAlone(entry)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(5), 4))
        jax.eval_shape(functools.partial(head.apply, method="sample"), head.groups, keys)


def test_a_batch_smaller_than_the_head_is_named():
    head = HeadAlone(REGRESSION | dict(action_horizon=100))
    with pytest.raises(ValueError, match="'action' predicts 100 steps of 4 dimensions.* have 3 steps of 4"):
        head.terms(light.batch(REGRESSION), None)


def test_unknown_options_are_named():
    for change, word in (
        (dict(kind="difusion"), "diffusion"),
        (tiny.diffusion(hiden_dim=3), "hidden_dim"),
    ):
        with pytest.raises(ValueError, match=word):
            build_model(light.config(heads=dict(action=change)))
    with pytest.raises(ValueError, match="readout_action"):
        HeadAlone(tiny.diffusion() | dict(readout="readout_value"))
