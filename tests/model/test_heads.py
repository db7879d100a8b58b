"""Heads: losses count what they should, closed forms, sampling keyed per row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import flatten, synthetic_batch, unflatten
from octo_like.model.diffusion import (
    add_noise,
    cosine_schedule,
    ddpm_sample,
    noise_from_action,
    noise_from_velocity,
    velocity,
)
from octo_like.model.octo import build_model, total_loss
from octo_like.model.tokenizers import bin_index, bin_thresholds
from tests.model import tiny

HEADS = {
    "diffusion": tiny.diffusion(),
    "diffusion_velocity": tiny.diffusion(prediction="velocity"),
    "diffusion_action": tiny.diffusion(prediction="action"),
    "diffusion_map": tiny.diffusion(use_map=True, num_samples=3),
    "mse": dict(kind="regression", readout="readout_action", action_horizon=3, action_dim=4),
    "l1": dict(kind="regression", loss="l1", readout="obs", use_map=True, action_horizon=3, action_dim=4),
    "discrete": dict(kind="discrete", readout="obs", use_map=True, action_horizon=3, action_dim=4, num_bins=16),
    "discrete_chunk": dict(
        kind="discrete", readout="readout_action", token_per="", action_horizon=3, action_dim=4, bin_type="normal"
    ),
}


def make(head):
    model = build_model(tiny.config(heads=dict(action=head)))
    return model, tiny.random_params(model)


@pytest.mark.parametrize("name", HEADS)
def test_masked_actions_do_not_matter_and_sums_add_up(name):
    model, params = make(HEADS[name])
    batch = synthetic_batch(tiny.SPEC, 4, language_vocab=tiny.VOCAB)
    batch["action_pad_mask"][0, :, 2] = False
    batch["action_pad_mask"][1, :, :, 3] = False
    batch["observation"]["timestep_pad_mask"][2, 0] = False
    keys = jax.random.split(jax.random.key(1), 4)
    terms = jax.jit(lambda b, k: model.apply({"params": params}, b, k, False, method="loss_terms")["action"])
    whole = terms(batch, keys)
    assert whole["count"] == 4 * 24 - 8 - 6 - 12
    parts = []
    for i in range(4):
        row = unflatten({path: leaf[i : i + 1] for path, leaf in flatten(batch)})
        parts.append(terms(row, keys[i : i + 1]))
    for key in whole:
        np.testing.assert_allclose(whole[key], sum(part[key] for part in parts), rtol=2e-5, err_msg=key)
    if "diffusion" not in name:
        batch["action"][0, :, 2] += 100.0
        batch["action"][1, :, :, 3] -= 100.0
        batch["action"][2, 0] = 50.0
        np.testing.assert_allclose(terms(batch, keys)["loss"], whole["loss"], rtol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_sampling_is_keyed_by_row(name):
    model, params = make(HEADS[name])
    batch = synthetic_batch(tiny.SPEC, 3, language_vocab=tiny.VOCAB)
    keys = jax.random.split(jax.random.key(5), 3)

    def sample(rows, **kwargs):
        part = unflatten({path: leaf[rows] for path, leaf in flatten(batch)})
        run = jax.jit(lambda *args: model.apply({"params": params}, *args, head="action", method="sample", **kwargs))
        return run(part["observation"], part["task"], keys[rows])

    actions = sample(np.array([0, 1, 2]))
    assert actions.shape == (3, 3, 4) and np.all(np.isfinite(actions)) and np.all(np.abs(actions) <= 5.0)
    np.testing.assert_allclose(sample(np.array([2, 0])), actions[np.array([2, 0])], rtol=1e-4, atol=1e-4)
    assert sample(np.array([0, 1]), sample_shape=(5,)).shape == (5, 2, 3, 4)


def test_several_heads_train_their_own_samples_only():
    heads = dict(arm=tiny.diffusion(), base=HEADS["mse"] | dict(action_horizon=2, action_dim=2, weight=0.5))
    model = build_model(tiny.config(heads=heads))
    params = tiny.random_params(model)
    batch = synthetic_batch(tiny.SPEC, 2, language_vocab=tiny.VOCAB)
    batch["action_head_mask"] = {"arm": np.array([True, True]), "base": np.array([False, False])}
    keys = jax.random.split(jax.random.key(1), 2)

    def loss(params):
        terms = model.apply({"params": params}, batch, keys, False, method="loss_terms")
        return total_loss(model, terms, model.counts(batch))

    grads = jax.jit(jax.grad(loss))(params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["heads_base"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads["heads_arm"]))


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
    model, params = make(tiny.diffusion(prediction=prediction))
    b = np.linspace(-0.9, 0.9, 12, dtype=np.float32)
    flat = dict(flatten(params))
    last = "heads_action/diffusion_model/reverse_network/Dense_1"
    flat[f"{last}/kernel"], flat[f"{last}/bias"] = jnp.zeros_like(flat[f"{last}/kernel"]), jnp.asarray(b)
    params = unflatten(flat)
    batch = synthetic_batch(tiny.SPEC, 2, language_vocab=tiny.VOCAB)
    keys = jax.random.split(jax.random.key(0), 2)
    if prediction == "action":  # whatever the noise, the chain ends at b
        out = model.apply({"params": params}, batch["observation"], batch["task"], keys, head="action", method="sample")
        np.testing.assert_allclose(out.reshape(2, -1), np.stack([b, b]), atol=1e-5)

    schedule = cosine_schedule(5)
    groups = model.apply({"params": params}, batch["observation"], batch["task"], method="groups")
    action, mask = batch["action"], jnp.ones_like(batch["action"])
    shape = (1, *action.shape[:2])
    time = jnp.full((*shape, 1), 3)
    noise = jax.random.normal(jax.random.key(3), (*shape, 12))
    terms = model.bind({"params": params}).heads["action"].loss_terms(groups, action, mask, keys, draws=(time, noise))
    x = np.clip(np.asarray(action).reshape(*shape[1:], 12), -5, 5)[None]
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


def test_unknown_options_are_named():
    for change, word in (
        (dict(kind="difusion"), "diffusion"),
        (tiny.diffusion(hiden_dim=3), "hidden_dim"),
    ):
        with pytest.raises(ValueError, match=word):
            build_model(tiny.config(heads=dict(action=change)))
    with pytest.raises(ValueError, match="readout_action"):
        make(tiny.diffusion() | dict(readout="readout_value"))
