"""Chunks that continue the previous one: corrections against closed forms, and a toy whose denoiser is exact.

The toy is a chunk of 16 correlated normal numbers; what it is, given its first steps, is known in closed form.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.chunks import SCHEDULES, Continuation
from octo_like.model.diffusion import action_from_noise, cosine_schedule, ddim_sample, ddpm_sample
from octo_like.model.flow import euler_sample
from octo_like.model.guidance import Guidance, Pull, flat_pull
from octo_like.model.octo import OctoModel
from octo_like.policy.surgery import carry
from tests.model import light
from tests.model.light import HeadAlone

H, DELAY, EXECUTED, STD, LENGTH = 16, 4, 8, 0.5, 6.0
STEPS = np.arange(H)
COVARIANCE = STD**2 * (0.98 * np.exp(-0.5 * ((STEPS[:, None] - STEPS) / LENGTH) ** 2) + 0.02 * np.eye(H))
METHODS = ("jacobian_free", "vjp")
DIFFUSION = dict(kind="diffusion", readout="readout_action", action_horizon=6, action_dim=4, hidden_dim=16)
HEADS = {
    "ddpm, noise": DIFFUSION,
    "ddpm, velocity": DIFFUSION | dict(prediction="velocity", clip="x0"),
    "ddim, action": DIFFUSION | dict(prediction="action", sampler="ddim", sample_steps=5),
    "flow": light.FLOW | dict(action_horizon=6),
}


def exact_noise(schedule, mean=0.0, covariance=COVARIANCE):
    """E[noise | x_t] for chunks (N, H) from N(mean, covariance)."""

    def denoise(x, t):
        level = schedule.alpha_hats[t]
        gain = jnp.linalg.inv(level * covariance + (1 - level) * jnp.eye(len(covariance)))
        return jnp.sqrt(1 - level) * (x - jnp.sqrt(level) * mean) @ gain

    return denoise


def exact_velocity(x, tau):
    """E[action - noise | x_tau] for chunks (N, H) from N(0, COVARIANCE)."""
    gain = jnp.linalg.inv(tau**2 * COVARIANCE + (1 - tau) ** 2 * jnp.eye(H))
    return x @ gain @ (tau * COVARIANCE - (1 - tau) * jnp.eye(H))


def toy(method):
    """A previous chunk drawn from the toy's own distribution, (400, H), and the pull towards it."""
    root = np.linalg.cholesky(COVARIANCE)
    previous = (np.random.default_rng(0).normal(size=(400, H)) @ root.T).astype(np.float32)
    plan = Continuation(previous[..., None], EXECUTED, DELAY, schedule="exp")
    target = plan.shifted()[..., 0]
    return target, None if method is None else Pull(jnp.asarray(target), jnp.asarray(plan.weights()), method=method)


def drawn(sampler, pull):
    noise = np.random.default_rng(1).normal(size=(21, 400, H)).astype(np.float32)
    if sampler == "flow":
        return np.asarray(euler_sample(exact_velocity, noise[0], 20, pull=pull))
    schedule = cosine_schedule(20)
    arguments = dict(max_action=5.0, clip="x0", pull=pull)
    if sampler == "ddpm":
        return np.asarray(ddpm_sample(exact_noise(schedule), schedule, noise[0], noise[1:], **arguments))
    return np.asarray(ddim_sample(exact_noise(schedule), schedule, noise[0], num_steps=20, **arguments))


def measures(out, target):
    """(error of the frozen steps, jump from the last of them to the first free, natural jump)."""
    frozen = np.abs(out[:, :DELAY] - target[:, :DELAY]).mean()
    return frozen, np.abs(out[:, DELAY] - target[:, DELAY - 1]).mean(), np.abs(np.diff(target[:, :DELAY])).mean()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "flow"])
def test_on_the_toy_frozen_steps_are_kept_and_the_seam_is_natural(sampler):
    target, _ = toy(None)
    frozen, jump, natural = measures(drawn(sampler, None), target)
    assert frozen > 0.4 and jump > 3 * natural  # two independent chunks
    for method in METHODS:
        target, pull = toy(method)
        frozen, jump, natural = measures(drawn(sampler, pull), target)
        assert frozen < 1e-5 and jump < 1.5 * natural, (method, frozen, jump, natural)


@pytest.mark.parametrize("method", METHODS)
def test_on_the_toy_free_steps_follow_from_the_frozen_ones(method):
    """The mean of the step behind the frozen ones, given them, by the formula of conditional normals."""
    target, pull = toy(method)
    given = COVARIANCE[DELAY, :DELAY] @ np.linalg.inv(COVARIANCE[:DELAY, :DELAY])
    expected = target[:, :DELAY] @ given
    without = np.abs(drawn("ddim", None)[:, DELAY] - expected).mean()
    assert np.abs(drawn("ddim", pull)[:, DELAY] - expected).mean() < 0.3 * without


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampler", ["ddim", "flow"])
def test_the_network_reads_fixed_steps_on_the_path_from_their_noise(sampler, method):
    """By hand: straight for flow; for DDIM without fresh noise, the signal's share of y and the rest of one noise."""
    y, weight = np.float32([[0.7, -0.4, 0.2]]), np.float32([[1.0, 1.0, 0.5]])
    noise, pull, seen = np.float32([[-1.1, 0.6, 0.3]]), Pull(y, weight, 5.0, 0.5, method), []

    def network(x, t):
        jax.debug.callback(lambda x, t: seen.append((float(t), np.array(x))), x, t, ordered=True)
        return jnp.sin(3 * x[:, ::-1]) - 0.2 * x

    if sampler == "flow":
        out = euler_sample(network, noise, 5, pull=pull)
        path = lambda t: t * y + (1 - t) * noise  # noqa: E731
    else:
        schedule = cosine_schedule(20)
        out = ddim_sample(network, schedule, noise, num_steps=5, max_action=5.0, clip="x0", pull=pull)
        levels = np.asarray(schedule.alpha_hats)
        eps = (noise - np.sqrt(levels[-1]) * y) / np.sqrt(1 - levels[-1])
        path = lambda t: np.sqrt(levels[int(t)]) * y + np.sqrt(1 - levels[int(t)]) * eps  # noqa: E731
    jax.effects_barrier()
    assert len(seen) == 5
    for t, x in seen:
        np.testing.assert_allclose(x[:, :2], path(t)[:, :2], atol=1e-5)
    np.testing.assert_allclose(out[:, :2], y[:, :2], atol=1e-5)
    assert abs(out[0, 2] - y[0, 2]) > 1e-3, "weight 0.5 pulls, and fixes nothing"


@pytest.mark.parametrize("std", [1e-10, 1e15])
def test_any_prior_std_gives_a_finite_chunk(std):
    _, pull = toy("vjp")
    for sampler in ("ddim", "flow"):
        assert np.isfinite(drawn(sampler, pull.replace(prior_std=std))).all()


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_for_independent_normal_actions_the_vjp_is_the_soft_replacement(std):
    """With prior_std = std, gamma J = 1: x0' = x0 + W (y - x0), whichever of the two."""
    schedule = cosine_schedule(20)
    rng = np.random.default_rng(0)
    x, y, weight = (rng.normal(size=(3, 5)).astype(np.float32) for _ in range(3))
    denoise = exact_noise(schedule, 0.2, std**2 * np.eye(5, dtype=np.float32))
    for t in (1, 8, 17):
        level = schedule.alpha_hats[t]
        estimate = lambda x: action_from_noise(schedule, x, denoise(x, t), t)  # noqa: B023, E731
        found = [
            Pull(y, np.abs(weight) % 1, 1e9, std, method).clean(estimate, x, jnp.sqrt(level), jnp.sqrt(1 - level))
            for method in METHODS
        ]
        np.testing.assert_allclose(found[0], found[1], atol=2e-4)


def test_the_jacobian_is_that_of_the_estimate():
    """Against finite differences, for an estimate that is not linear; and the weight is bounded."""
    estimate = lambda x: jnp.tanh(x @ jnp.arange(9.0).reshape(3, 3) / 5)  # noqa: E731
    x, y = jnp.array([[0.1, -0.4, 0.3]]), jnp.array([[1.0, 0.0, -1.0]])
    pull = Pull(y, jnp.array([[1.0, 0.5, 0.0]]), 2.0, 1.0, "vjp")
    e = pull.weight * (y - estimate(x))
    h = 1e-3
    numeric = [float(jnp.sum((estimate(x + h * d) - estimate(x - h * d)) / (2 * h) * e)) for d in jnp.eye(3)]
    found = (pull.clean(estimate, x, 0.1, 0.99) - estimate(x)) / 2.0  # 1 / 0.1 is more than 2
    np.testing.assert_allclose(found[0], numeric, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_heads_keep_what_is_frozen_and_leave_the_rest_free(name):
    head = HeadAlone(HEADS[name] | dict(max_delay=3))
    keys = jax.random.split(jax.random.key(0), 4)
    y = np.random.default_rng(1).normal(size=(4, 6, 4)).astype(np.float32)
    weights = np.tile(np.float32([1, 1, 0, 0, 0, 0]), (4, 1))
    valid = np.array([True, True, True, False])

    @jax.jit
    def sample(guidance):
        return head.apply(head.groups, keys, valid=valid, guidance=guidance, method="sample")

    plain = head.apply(head.groups, keys, valid=valid, method="sample")
    y[0, 0, 0] = 7.5  # beyond the bounds: an action relative to a robot that has moved
    for method in ("jacobian_free", "trained", "vjp"):
        out = sample(Guidance(y, weights, method=method))
        np.testing.assert_array_equal(out[:, :2, :3], y[:, :2, :3])
        assert np.isfinite(out).all()
        assert np.abs(out - plain)[:, 2:, :3].max() > 1e-3
        # Nothing to continue: as without guidance.
        np.testing.assert_allclose(sample(Guidance(y, 0 * weights, method=method))[..., :3], plain[..., :3], atol=2e-3)
        sample(Guidance(-y, weights[:, ::-1], 3.0, 0.5, method))
    assert sample._cache_size() == 3  # one for each method, whatever the weights
    for schedule in SCHEDULES:
        for delay in range(4):
            plan = Continuation(y, 2, delay, "vjp", schedule, prior_std=0.1 + delay)
            given = plan.weights()
            out = sample(Guidance(plan.shifted(), given, plan.max_weight, plan.prior_std, "vjp"))
            fixed = given == 1
            assert fixed[:, :delay].all() and not fixed[:, 4:].any()
            np.testing.assert_array_equal(out[fixed][:, :3], plan.shifted()[fixed][:, :3])
    assert sample._cache_size() == 3
    # Several chunks of an observation, and no padding.
    both = dict(sample_shape=(3,), guidance=Guidance(y, weights, method="vjp"))
    several = head.apply(head.groups, keys, **both, method="sample")
    np.testing.assert_array_equal(several[..., :2, :], np.broadcast_to(y[:, :2], (3, 4, 2, 4)))


@pytest.mark.parametrize("method", ["jacobian_free", "trained"])
def test_nothing_pulls_on_padded_dimensions(method):
    """Without padding the pull is the chunk laid flat, within the bounds; padded dimensions are 0, and given as 0."""
    previous = np.array([[[0.5, -9.0, 2.0], [1.0, 0.25, -3.0]]], np.float32)
    guidance = Guidance(previous, np.array([[1.0, 0.5]], np.float32), method=method)
    pull = flat_pull(guidance, 5.0, None)
    np.testing.assert_array_equal(pull.target, [[0.5, -5.0, 2.0, 1.0, 0.25, -3.0]])
    np.testing.assert_array_equal(pull.weight, [[1.0, 1.0, 1.0, 0.5, 0.5, 0.5]])
    valid = np.array([[True, True, False, True, True, False]])
    padded = flat_pull(guidance, 5.0, valid)
    np.testing.assert_array_equal(padded.target, [[0.5, -5.0, 0.0, 1.0, 0.25, 0.0]])
    given = method == "trained"
    np.testing.assert_array_equal(padded.weight, pull.weight if given else np.where(valid, pull.weight, 0))
    assert padded.method == method


def test_other_heads_say_that_they_cannot():
    entry = dict(kind="regression", readout="readout_action", action_horizon=6, action_dim=4)
    guidance = Guidance(np.zeros((4, 6, 4)), np.zeros((4, 6)))
    with pytest.raises(ValueError, match="RegressionHead cannot continue .* Valid: diffusion and flow"):
        HeadAlone(entry).module.check_guidance(guidance)
    plain = HeadAlone(DIFFUSION).module
    plain.check_guidance(guidance)
    with pytest.raises(ValueError, match="trained with max_delay"):
        plain.check_guidance(guidance.replace(method="trained"))
    with pytest.raises(ValueError, match="unknown guidance 'hard'; valid: jacobian_free, vjp, trained"):
        flat_pull(guidance.replace(method="hard"), 5.0, None)


# ------------------------------------------------------------------------------------------------- learned in training


@pytest.mark.parametrize("name", ["ddpm, noise", "ddim, action", "flow"])
def test_with_max_delay_given_actions_are_clean_and_without_loss(name):
    """By hand: for each sample the drawn prefix stands clean in the input, and the loss is of the rest."""
    entry = HEADS[name] | dict(max_delay=4)
    head, batch = HeadAlone(entry, rows=5), light.batch(entry, rows=5)
    keys = jax.random.split(jax.random.key(3), 5)
    ones = np.ones((5, 2, 6, 4), np.float32)
    learned = np.asarray(head.module.learned_mask(jnp.asarray(ones), keys))
    lengths = (learned[..., 0] == 0).sum(-1)
    assert lengths.min() >= 0 and lengths.max() <= 4 and len(np.unique(lengths)) > 2
    assert (learned == (STEPS[:6, None] >= lengths[..., None, None])).all()
    terms = head.terms(batch, keys)
    # What is given does not enter the loss, except through the input: as a target it may be anything.
    alone = HeadAlone(entry | dict(max_delay=0), rows=5)
    assert not any("given" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(alone.params))
    assert np.isfinite(terms["loss"]) and terms["loss"] > 0
    moved = {**batch, "action": batch["action"] + 100.0 * (1 - learned)}
    clipped = head.terms(moved, keys)
    assert float(clipped["loss"]) < 100 * float(terms["loss"])  # targets of 100 would give ten thousand times as much


def test_counts_are_of_what_is_learned_from_and_add_up():
    model = light.config()
    from octo_like.model.octo import build_model

    model["heads"] = {"action": DIFFUSION | dict(action_horizon=3, max_delay=2, readout="readout_action")}
    built: OctoModel = build_model(model, vocab_size=20)
    batch = light.batch(model["heads"]["action"], rows=8)
    keys = jax.random.split(jax.random.key(0), 8)
    whole = built.counts(batch, keys)["action"]
    assert 0 < float(whole) < 8 * 2 * 3 * 4
    halves = [jax.tree.map(lambda x: x[rows], (batch, keys)) for rows in (slice(0, 4), slice(4, 8))]  # noqa: B023
    assert float(whole) == sum(float(built.counts(*half)["action"]) for half in halves)
    with pytest.raises(ValueError, match="keys_b are needed"):
        built.counts(batch)


def test_an_old_network_goes_on_unchanged_with_max_delay():
    """The new columns are zero and apart: at no delay the same actions, and weights carry over by name."""
    old, new = HeadAlone(DIFFUSION), HeadAlone(DIFFUSION | dict(max_delay=3))
    keys = jax.random.split(jax.random.key(0), 4)
    init = new.module.init(
        jax.random.key(0), new.groups, np.zeros((4, 2, 6, 4)), np.zeros((4, 2, 6, 4)), keys, method="loss_terms"
    )["params"]
    fresh = init["diffusion_model"]["reverse_network"]["given"]["kernel"]
    assert fresh.shape == (6, 16) and not np.asarray(fresh).any()
    network = old.params["diffusion_model"]
    merged = {
        "diffusion_model": {**network, "reverse_network": {**network["reverse_network"], "given": {"kernel": fresh}}}
    }
    np.testing.assert_array_equal(
        old.apply(old.groups, keys, method="sample"), new.apply(old.groups, keys, method="sample", params=merged)
    )


def test_surgery_keeps_the_steps_that_both_horizons_have():
    old, new = ({"heads": {"action": DIFFUSION | dict(max_delay=3, action_horizon=h)}} for h in (6, 8))
    path = "heads_action/diffusion_model/reverse_network/given/kernel"
    was, now = np.ones((6, 16)), np.zeros((8, 16))
    np.testing.assert_array_equal(carry(old, new, {}).resize(path, was, now), np.r_[was, np.zeros((2, 16))])


def test_max_delay_is_less_than_a_chunk():
    with pytest.raises(ValueError, match="max_delay must be at least 0 and less than action_horizon=6, got 6"):
        HeadAlone(DIFFUSION | dict(max_delay=6))
