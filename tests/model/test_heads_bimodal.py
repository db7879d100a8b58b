"""Two ways to do it, equally good: diffusion, flow matching and tokens said one after the other take either, regression
neither or only one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octo_like.model.tokens import TokenGroup
from tests.model.light import HeadAlone

SCALES = np.array([0.6, 1.0], np.float32)  # what the two contexts say: how far to go, left or right
SIZES = dict(readout="readout_action", action_horizon=2, action_dim=1)
NETWORK = dict(num_blocks=1, hidden_dim=32, num_samples=4)
HEADS = {
    "ddpm": SIZES | NETWORK | dict(kind="diffusion"),
    "ddim": SIZES | NETWORK | dict(kind="diffusion", prediction="action", sampler="ddim", sample_steps=8, clip="x0"),
    "flow": SIZES | NETWORK | dict(kind="flow"),
    "discrete": SIZES | dict(kind="discrete", token_per="", num_bins=17, low=-1.7, high=1.7),
    "bins": SIZES | dict(kind="bins", num_bins=17, low=-1.7, high=1.7, width=32, num_layers=1, num_heads=2),
    "mse": SIZES | dict(kind="regression"),
    "l1": SIZES | dict(kind="regression", loss="l1"),
}
ROWS, STEPS, SAMPLES = 128, 600, 500


def embeddings(contexts):
    """{"readout_action": ...} that say which context it is."""
    tokens = jax.nn.one_hot(contexts, 16)[:, None, None] * 4.0
    return {"readout_action": TokenGroup(tokens, jnp.ones(tokens.shape[:-1], bool))}


def two_ways(key, contexts):
    """(ROWS, 1, 2, 1) chunks (s, s) with s = +-SCALES[context]."""
    side = jnp.where(jax.random.bernoulli(key, shape=(ROWS,)), 1.0, -1.0)
    return jnp.broadcast_to((side * jnp.asarray(SCALES)[contexts])[:, None, None, None], (ROWS, 1, 2, 1))


def even_corners(key, contexts):
    """(ROWS, 1, 1, 3) corners of a cube of which an even number of entries is negative: any two are independent."""
    signs = jnp.where(jax.random.bernoulli(key, shape=(ROWS, 2)), 1.0, -1.0)
    corner = jnp.concatenate([signs, signs.prod(-1, keepdims=True)], axis=-1)
    return (corner * jnp.asarray(SCALES)[contexts][:, None])[:, None, None]


def learned_samples(entry, draw=two_ways):
    """(SAMPLES, contexts, H, A) actions after training on the chunks that `draw` makes of a key and contexts."""
    head = HeadAlone(entry, rows=2, window=1)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))

    def step(carry, key):
        params, state = carry
        contexts = jnp.arange(ROWS) % 2
        action = draw(jax.random.fold_in(key, 0), contexts)
        keys = jax.random.split(jax.random.fold_in(key, 1), ROWS)

        def loss(params):
            terms = head.apply(
                embeddings(contexts), action, jnp.ones_like(action), keys, params=params, method="loss_terms"
            )
            return terms["loss"] / action.size

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        keys = jax.random.split(jax.random.key(0), STEPS)
        params = jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]
        keys = jax.random.split(jax.random.key(1), 2)
        groups = embeddings(jnp.arange(2))
        return head.apply(groups, keys, sample_shape=(SAMPLES,), params=params, method="sample")

    return np.asarray(run(jax.tree.map(jnp.asarray, head.params)))


@pytest.mark.parametrize("name", HEADS)
def test_modes(name):
    samples = learned_samples(HEADS[name])[..., 0]
    near = {side: np.abs(samples - side * SCALES[:, None]) < 0.15 for side in (1, -1)}
    for context in range(2):
        right, left = (near[side][:, context].all(-1).mean() for side in (1, -1))
        entries = sum(near[side][:, context].mean() for side in (1, -1))
        report = f"{name} context {context}: right {right:.2f}, left {left:.2f}, entries at a mode {entries:.2f}"
        print(report)
        if name in ("ddpm", "ddim", "flow", "bins"):
            assert min(right, left) > 0.35 and right + left > 0.85, report
        elif name == "discrete":  # each entry is right, and half of the chunks go right and left at once
            assert entries > 0.95 and 0.15 < min(right, left) and right + left < 0.65, report
        else:
            assert min(right, left) == 0.0, report
            assert np.ptp(samples[:, context], axis=0).max() == 0.0
            assert name != "mse" or np.abs(samples[:, context]).max() < 0.2, report


@pytest.mark.parametrize("name", ["ddpm", "discrete", "bins"])
def test_three_entries_that_only_together_depend_on_each_other(name):
    samples = learned_samples(HEADS[name] | dict(action_horizon=1, action_dim=3), even_corners)[:, :, 0]
    for context in range(2):
        at_corner = np.abs(np.abs(samples[:, context]) - SCALES[context]) < 0.15
        corners = np.sign(samples[:, context])
        right = at_corner.all(-1) & (corners.prod(-1) > 0)
        share = [np.mean(right & (corners[:, :2] == pair).all(-1)) for pair in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
        report = f"{name} context {context}: at a corner {at_corner.mean():.2f}, right {right.mean():.2f}, {share}"
        print(report)
        if name == "discrete":
            assert at_corner.mean() > 0.95 and right.mean() < 0.65, report
        else:
            assert right.mean() > 0.85 and min(share) > 0.15, report
