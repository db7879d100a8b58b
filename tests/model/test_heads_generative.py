"""Noise to actions, against closed forms: schedules, DDIM and flow integrals on Gaussians whose score is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.model.diffusion import (
    add_noise,
    cosine_schedule,
    ddim_sample,
    ddim_times,
    ddpm_sample,
    ddpm_step,
)
from octo_like.model.flow import euler_sample, interpolate, time_from_uniform
from tests.model import light, tiny
from tests.model.light import HeadAlone

MEAN, STD = 0.7, 0.4


def gaussian_noise(schedule, mean, std):
    """The exact noise prediction E[noise | x_t] for actions from N(mean, std^2)."""

    def denoise(x, t):
        level = schedule.alpha_hats[t]
        return jnp.sqrt(1 - level) * (x - jnp.sqrt(level) * mean) / (level * std**2 + 1 - level)

    return denoise


def gaussian_velocity(x, tau):
    """The exact velocity E[action - noise | x_tau] for actions from N(MEAN, STD^2)."""
    variance = tau**2 * STD**2 + (1 - tau) ** 2
    return MEAN + (tau * STD**2 - (1 - tau)) / variance * (x - tau * MEAN)


@pytest.mark.parametrize("steps", [5, 20, 100])
def test_the_cosine_schedule_is_its_formula(steps):
    """alpha_hat_t = f(t + 1) / f(0) with f(t) = cos^2((t / T + s) / (1 + s) pi / 2), up to the clipped end."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    schedule = cosine_schedule(steps)
    np.testing.assert_allclose(schedule.alpha_hats[:-1], (f[1:] / f[0])[:-1], rtol=2e-4)
    assert np.isclose(schedule.betas[-1], 0.999) and np.all(schedule.betas > 0)
    np.testing.assert_allclose(schedule.alpha_hats, np.cumprod(1 - np.asarray(schedule.betas, np.float64)), rtol=1e-5)


@pytest.mark.parametrize("num_steps", range(1, 21))
def test_ddim_times_descend_from_the_last_to_clean(num_steps):
    times = ddim_times(20, num_steps)
    assert times[0] == 19 and times[-1] == -1 and len(times) == num_steps + 1 and np.all(np.diff(times) < 0)
    assert np.ptp(np.diff(times)) <= 1


@pytest.mark.parametrize("num_steps", [1, 3, 20])
def test_ddim_on_a_standard_normal_is_a_product_of_cosines(num_steps):
    """With sqrt(alpha_hat) = cos a the exact prediction of N(0, 1) is sin(a) x: a step multiplies by cos(a_t - a_s)"""
    schedule = cosine_schedule(20)
    noise = jax.random.normal(jax.random.key(0), (50,))
    out = ddim_sample(
        gaussian_noise(schedule, 0.0, 1.0), schedule, noise, num_steps=num_steps, max_action=50.0, clip="x0"
    )
    angle = np.append(np.arccos(np.sqrt(np.asarray(schedule.alpha_hats, np.float64))), 0.0)
    factor = np.prod(np.cos(np.diff(angle[ddim_times(20, num_steps)])))
    np.testing.assert_allclose(out, factor * noise, rtol=2e-3, atol=2e-4)  # float32 at an alpha_hat of 6e-6


@pytest.mark.parametrize("num_steps", [1, 4, 20])
def test_ddim_finds_the_only_action_in_any_number_of_steps(num_steps):
    schedule = cosine_schedule(20)
    noise = jax.random.normal(jax.random.key(0), (50,))
    for eta in (0.0, 1.0):
        z = jax.random.normal(jax.random.key(1), (num_steps, 50))
        out = ddim_sample(
            gaussian_noise(schedule, MEAN, 0.0), schedule, noise, z, num_steps=num_steps, eta=eta, max_action=5.0
        )
        np.testing.assert_allclose(out, MEAN, atol=1e-3)


def test_ddim_converges_to_the_probability_flow():
    """The flow takes x_T to MEAN + STD z, z being x_T standardised by its distribution; the error is O(1 / steps)."""
    schedule = cosine_schedule(400)
    noise = jnp.linspace(-2, 2, 41)
    level = float(schedule.alpha_hats[-1])
    exact = MEAN + STD * (noise - level**0.5 * MEAN) / (level * STD**2 + 1 - level) ** 0.5
    errors = []
    for steps in (10, 20, 40):
        out = ddim_sample(gaussian_noise(schedule, MEAN, STD), schedule, noise, num_steps=steps, max_action=5.0)
        errors.append(float(jnp.abs(out - exact).max()))
    assert errors[0] < 0.2 and all(1.6 < a / b < 2.5 for a, b in zip(errors[:-1], errors[1:], strict=True)), errors


def test_ddim_with_all_noise_is_ancestral_sampling_with_the_posterior_variance():
    """eta = 1 on every step: DDPM's mean, and noise of variance (1 - alpha_hat_s) / (1 - alpha_hat_t) beta_t."""
    schedule = cosine_schedule(6)
    initial, z = jax.random.normal(jax.random.key(0), (30,)), jax.random.normal(jax.random.key(1), (6, 30))
    denoise = gaussian_noise(schedule, MEAN, STD)
    x, hats = initial, np.asarray(schedule.alpha_hats)
    for i, t in enumerate(range(5, -1, -1)):
        x = ddpm_step(schedule, x, denoise(x, t), 0.0, t)
        if t > 0:
            x = x + ((1 - hats[t - 1]) / (1 - hats[t]) * schedule.betas[t]) ** 0.5 * z[i]
    out = ddim_sample(denoise, schedule, initial, z, num_steps=6, eta=1.0, max_action=50.0)
    np.testing.assert_allclose(out, x, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_samples_have_the_gaussians_moments(eta):
    schedule = cosine_schedule(200)
    z = jax.random.normal(jax.random.key(0), (101, 5000))
    out = ddim_sample(
        gaussian_noise(schedule, MEAN, STD), schedule, z[0], z[1:], num_steps=100, eta=eta, max_action=5.0
    )
    assert abs(float(out.mean()) - MEAN) < 0.02 and abs(float(out.std()) - STD) < 0.02


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_clipping_the_estimate_keeps_the_noise(sampler):
    """A network that wants too much: its estimate is bounded, and x_t is not, as it would be by "sample"."""
    schedule, seen = cosine_schedule(4), []

    def denoise(x, t):
        jax.debug.callback(lambda x: seen.append(np.array(x)), x, ordered=True)
        level = schedule.alpha_hats[t]
        return (x - jnp.sqrt(level) * 9.0) / jnp.sqrt(1 - level)  # the action would be 9

    z = jnp.broadcast_to(jnp.array([3.0, 0.0]), (5, 2))
    for clip in ("x0", "sample"):
        seen.clear()
        options = dict(max_action=1.0, clip=clip)
        if sampler == "ddim":
            out = ddim_sample(denoise, schedule, z[0], z[1:], num_steps=4, eta=1.0, **options)
        else:
            out = ddpm_sample(denoise, schedule, z[0], z[1:], **options)
        jax.effects_barrier()
        np.testing.assert_allclose(out, 1.0, atol=1e-5)
        assert (max(np.abs(x).max() for x in seen[1:]) > 1.5) == (clip == "x0")


def test_flow_interpolates_between_noise_and_actions():
    a, noise = np.array([1.0, 2.0]), np.array([5.0, -1.0])
    np.testing.assert_allclose(interpolate(a, noise, np.array(0.0)), noise)
    np.testing.assert_allclose(interpolate(a, noise, np.array(1.0)), a)
    np.testing.assert_allclose(interpolate(a, noise, np.array(0.25)), [4.0, -0.25])


@pytest.mark.parametrize("alpha", [1.0, 1.5, 3.0])
def test_flow_times_have_the_beta_distribution(alpha):
    """Brute force: the empirical distribution against the integral of the density alpha y^(alpha - 1)."""
    tau = np.asarray(time_from_uniform(jax.random.uniform(jax.random.key(0), (50_000,)), alpha), np.float64)
    assert tau.min() >= 0 and tau.max() < 0.999
    y = np.linspace(0, 1, 4001)
    middle = (y[1:] + y[:-1]) / 2
    cumulative = np.append(0, np.cumsum(alpha * middle ** (alpha - 1)) / 4000)
    for at in (0.1, 0.3, 0.5, 0.7, 0.9):
        want = 1 - np.interp((0.999 - at) / 0.999, y, cumulative)
        assert abs((tau < at).mean() - want) < 0.01


def test_euler_converges_to_the_gaussians_flow():
    """The flow takes noise z to MEAN + STD z; the error is O(1 / steps)."""
    noise = jnp.linspace(-2, 2, 41)
    errors = []
    for steps in (10, 20, 40, 80):
        out = euler_sample(gaussian_velocity, noise, steps)
        errors.append(float(jnp.abs(out - (MEAN + STD * noise)).max()))
    assert errors[0] < 0.15 and all(1.6 < a / b < 2.5 for a, b in zip(errors[:-1], errors[1:], strict=True)), errors
    x = np.asarray(noise, np.float64)
    for i in range(10):
        x = x + gaussian_velocity(x, i / 10) / 10
    np.testing.assert_allclose(euler_sample(gaussian_velocity, noise, 10), x, atol=1e-5)


def test_euler_finds_the_only_action_in_one_step():
    """Straight paths: with a single action the velocity from noise z is MEAN - z everywhere on it."""
    noise = jax.random.normal(jax.random.key(0), (50,))
    np.testing.assert_allclose(euler_sample(lambda x, tau: (MEAN - x) / (1 - tau), noise, 1), MEAN, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "flow"])
def test_padding_looks_in_sampling_as_it_did_in_training(kind):
    """What the network sees in padded entries is noise of the level, as `add_noise` and `interpolate` make it of 0."""
    schedule, seen = cosine_schedule(4), []
    valid = jnp.array([True, False])
    noise = jnp.array([0.5, 2.0])
    z = jnp.broadcast_to(noise, (4, 2))

    def network(x, time):
        jax.debug.callback(lambda x, t: seen.append((float(t), np.array(x))), x, time, ordered=True)
        return x * 0

    if kind == "ddpm":
        ddpm_sample(network, schedule, noise, z, max_action=5.0, valid=valid)
    elif kind == "ddim":
        ddim_sample(network, schedule, noise, num_steps=4, max_action=5.0, valid=valid)
    else:
        euler_sample(network, noise, 4, valid=valid)
    jax.effects_barrier()
    assert len(seen) == 4
    for time, x in seen[1:]:
        if kind == "flow":
            want = interpolate(0.0, 2.0, time)
        else:
            # The new level is what the step at t + 1 ended on; DDPM's releases mark it with the level of t + 1 itself.
            t = int(time) + (kind == "ddpm")
            want = add_noise(schedule, jnp.array(0.0), jnp.array(2.0), jnp.array(t))
        np.testing.assert_allclose(x[1], want, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.95])
def test_a_flow_network_that_always_says_the_same(tau):
    """Its last layer says b whatever it reads: the loss compares b with action - noise, a sample is noise + b."""
    entry = dict(kind="flow", readout="readout_action", action_horizon=3, action_dim=4, hidden_dim=16, max_action=50.0)
    head = HeadAlone(entry, rows=2)
    b = np.linspace(-0.9, 0.9, 12, dtype=np.float32)
    last = head.params["flow_model"]["reverse_network"]["Dense_1"]
    last["kernel"], last["bias"] = jnp.zeros_like(last["kernel"]), jnp.asarray(b)
    action = light.batch(entry, rows=2)["action"]
    noise = jax.random.normal(jax.random.key(0), (1, 2, 2, 12))
    mask = np.ones_like(action)
    mask[0, 0, 0, 0] = 0
    draws = jnp.full((1, 2, 2, 1), tau), noise
    terms = head.apply(head.groups, action, mask, None, draws=draws, method="loss_terms")
    target = action.reshape(1, 2, 2, 12) - noise
    assert np.isclose(terms["loss"], np.sum((b - target) ** 2 * mask.reshape(1, 2, 2, 12)) * 4, rtol=1e-5)
    out = head.apply(head.groups, None, noise=noise[0, 0], method="sample")
    np.testing.assert_allclose(out.reshape(2, 12), noise[0, 0] + b, atol=1e-5)


@pytest.mark.parametrize("entry", [tiny.diffusion(num_samples=400), light.FLOW | dict(num_samples=400)])
def test_many_draws_average_one_loss(entry):
    """400 draws in one call are the mean of 400 losses of one draw, and `loss_terms` draws each row's from its key."""
    head = HeadAlone(entry, rows=3)
    batch, keys = light.batch(entry, rows=3), jax.random.split(jax.random.key(2), 3)
    terms = jax.jit(head.terms)
    first, again = terms(batch, keys), terms(batch, jax.random.split(jax.random.key(3), 3))
    assert first["loss"] != again["loss"]
    np.testing.assert_allclose(first["loss"], again["loss"], rtol=0.1)
