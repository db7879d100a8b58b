"""Image encoders, token learner and low-dimensional tokens against NumPy written from their papers, loop by loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import flatten, unflatten
from octo_like.model.stems import ConvStem, KeypointStem, PatchStem, ResNetStem, SmallStem, normalize_depth
from octo_like.model.tokenizers import ImageTokenizer, LowdimTokenizer, TokenLearner, bin_index
from tests.model import tiny
from tests.model.by_hand import (
    convolution,
    film,
    group_norm,
    layer_norm,
    map_pooling,
    max_pool_3_2,
    relu,
    same,
    standardized,
)

RNG = np.random.default_rng(0)


def resnet(x, p, layers, c=None):
    def conv_norm(h, unit, i, size, stride):
        kernel = standardized(unit[f"conv{i}"]["kernel"])
        return group_norm(convolution(h, kernel, stride, *same(h, size, stride)), unit[f"gn{i}"])

    h = convolution(x, standardized(p["conv_root"]["kernel"]), 2, *same(x, 7, 2))
    h = max_pool_3_2(relu(group_norm(h, p["gn_root"])))
    films = 0
    for i, units in enumerate(layers):
        for j in range(units):
            unit, stride = p[f"block{i + 1}"][f"unit{j + 1}"], 2 if i > 0 and j == 0 else 1
            shortcut = conv_norm(h, unit, "_proj", 1, stride) if "conv_proj" in unit else h
            g = relu(conv_norm(h, unit, "1", 1, 1))
            g = relu(conv_norm(g, unit, "2", 3, stride))
            h = relu(shortcut + conv_norm(g, unit, "3", 1, 1))
        if c is not None and i > 0:
            h = film(h, p[f"FilmConditioning_{films}"], c)
            films += 1
    return h


def run(module, *args, scale=1.0):
    """(output, float64 parameters) of a module with random parameters."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args)["params"])
    params = tiny.random_values(shapes)
    out = jax.jit(lambda p: module.apply({"params": p}, *args))(params)
    return np.asarray(out), unflatten({path: np.asarray(leaf, np.float64) for path, leaf in flatten(params)})


@pytest.mark.parametrize("size", [(32, 32), (35, 29)])
@pytest.mark.parametrize("use_film", [False, True])
def test_resnet(size, use_film):
    """Two units in a block, so that one has an identity for a shortcut; odd sizes, where "same" is one-sided."""
    x, c = RNG.normal(size=(2, *size, 3)), RNG.normal(size=(2, 5))
    module = ResNetStem(num_layers=(1, 2), width=0.5, use_film=use_film)
    out, params = run(module, jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32))
    want = resnet(x, params, (1, 2), c if use_film else None)
    assert out.shape == (2, -(-size[0] // 8), -(-size[1] // 8), 256)
    np.testing.assert_allclose(out, want, rtol=2e-4, atol=2e-4)


def test_resnet_26_has_26_layers():
    shapes = jax.eval_shape(lambda: ResNetStem().init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), None)["params"])
    kernels = {path: leaf.shape for path, leaf in flatten(shapes) if path.endswith("kernel")}
    on_the_way = [path for path in kernels if "conv_proj" not in path]
    assert len(on_the_way) == 25 and len(kernels) == 29  # and the projection to tokens is the 26th
    # Closed form: each unit f -> 4f has c*f + 9*f*f + 4*f*f weights, the first of a block also c*4f.
    total, channels = 49 * 3 * 64, 64
    for i in range(4):
        f = 64 * 2**i
        for unit in range(2):
            total += channels * f + 13 * f * f + (channels * 4 * f if unit == 0 else 0)
            channels = 4 * f
    assert sum(int(np.prod(shape)) for shape in kernels.values()) == total


@pytest.mark.parametrize("use_film", [False, True])
def test_small_stem(use_film):
    x, c = RNG.normal(size=(2, 24, 16, 6)), RNG.normal(size=(2, 4))
    module = SmallStem(
        patch_size=8, features=(32, 64), kernel_sizes=(3, 5), strides=(2, 2), padding=(1, 2), num_features=12,
        use_film=use_film,
    )  # fmt: skip
    out, p = run(module, jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32))
    h = x
    for i, pad in enumerate((1, 2)):
        conv = p[f"StdConv_{i}"]
        h = convolution(h, standardized(conv["kernel"]), 2, (pad, pad), (pad, pad), conv["bias"])
        h = relu(group_norm(h, p[f"GroupNorm_{i}"]))
    h = convolution(h, p["embedding"]["kernel"], 2, (0, 0), (0, 0), p["embedding"]["bias"])
    h = film(h, p["FilmConditioning_0"], c) if use_film else h
    assert out.shape == (2, 3, 2, 12)
    np.testing.assert_allclose(out, h, rtol=1e-4, atol=1e-4)


def test_patch_stem():
    x, c = RNG.normal(size=(2, 16, 8, 3)), RNG.normal(size=(2, 4))
    out, p = run(PatchStem(8, 10, use_film=True), jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32))
    h = convolution(x, p["embedding"]["kernel"], 8, (0, 0), (0, 0), p["embedding"]["bias"])
    np.testing.assert_allclose(out, film(h, p["FilmConditioning_0"], c), rtol=1e-4, atol=1e-4)


def conv_stem(x, p, layers, c, coordinates=False):
    for i, (kernel, stride, _) in enumerate(layers):
        if coordinates:
            rows, cols = np.meshgrid(*(np.linspace(-1, 1, n) for n in x.shape[1:3]), indexing="ij")
            where = np.broadcast_to(np.stack([rows, cols], -1), (*x.shape[:3], 2))
            x = np.concatenate([x, where], -1)
        pad = (0, 0) if kernel == stride else (kernel // 2,) * 2
        x = convolution(x, p[f"Conv_{i}"]["kernel"], stride, pad, pad, p[f"Conv_{i}"]["bias"])
        x = relu(film(group_norm(x, p[f"GroupNorm_{i}"], 8), p[f"Film_{i}"], c))
    return x


LAYERS = ((4, 4, 16), (3, 2, 24))


@pytest.mark.parametrize("coordinates", [False, True])
def test_conv_stem(coordinates):
    x, c = RNG.normal(size=(2, 16, 24, 3)), RNG.normal(size=(2, 4))
    module = ConvStem(LAYERS, use_film=True, coordinates=coordinates)
    out, p = run(module, jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32))
    np.testing.assert_allclose(out, conv_stem(x, p, LAYERS, c, coordinates), rtol=1e-4, atol=1e-4)


def test_keypoint_stem():
    x, c = RNG.normal(size=(2, 16, 24, 3)), RNG.normal(size=(2, 4))
    out, p = run(
        KeypointStem(LAYERS, num_keypoints=5, use_film=True), jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32)
    )
    h = conv_stem(x, p["ConvStem_0"], LAYERS, c)
    maps = h @ p["maps"]["kernel"][0, 0] + p["maps"]["bias"]
    want = np.zeros((2, 15))
    for n, k in np.ndindex(2, 5):
        weights = np.exp(maps[n, ..., k] - maps[n, ..., k].max())
        weights /= weights.sum()
        rows, cols = np.linspace(-1, 1, maps.shape[1]), np.linspace(-1, 1, maps.shape[2])
        want[n, 2 * k : 2 * k + 2] = (weights.sum(1) @ rows, weights.sum(0) @ cols)
        want[n, 10 + k] = np.tanh((weights * maps[n, ..., k]).sum() / 4)
    np.testing.assert_allclose(out[:, 0, 0], want, rtol=1e-4, atol=1e-4)


def test_token_learner():
    x = RNG.normal(size=(2, 3, 7, 16))
    out, p = run(TokenLearner(num_tokens=4), jnp.asarray(x, jnp.float32))
    tokens = layer_norm(x + p["pos_embed"], p["LayerNorm_0"])
    for b, t in np.ndindex(2, 3):
        want = map_pooling(tokens[b, t], np.ones(7, bool), p["MAPHead_0"])
        np.testing.assert_allclose(out[b, t], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_binned_scalars(kind):
    """One token per entry, one-hot of the bin found by comparing with every threshold."""
    x = np.array([[[-5.0, -0.31, 0.0], [0.499, 0.5, 7.0]]], np.float32)
    tokenizer = LowdimTokenizer(("proprio",), "scalar", True, 8, kind, -1.0, 1.0)
    group = tokenizer.apply({}, {"proprio": jnp.asarray(x)}, {})
    from scipy.stats import norm

    edges = np.linspace(-1, 1, 9) if kind == "uniform" else norm.ppf(np.linspace(1e-6, 1 - 1e-6, 9))
    for w, d in np.ndindex(2, 3):
        found = sum(x[0, w, d] >= edge for edge in edges[1:-1])
        np.testing.assert_array_equal(group.tokens[0, w, d], np.eye(8)[found])
    assert group.tokens.shape == (1, 2, 3, 8) and group.mask.all()


def test_order_of_low_dimensional_keys():
    """Patterns in the order of the config, keys of a pattern by name; nothing twice."""
    obs = {name: jnp.full((1, 1, 1), value) for name, value in (("force_b", 2.0), ("force_a", 1.0), ("state", 3.0))}
    tokenizer = LowdimTokenizer(("state", "force_.*", ".*"), "scalar")
    np.testing.assert_array_equal(tokenizer.apply({}, obs, {}).tokens[0, 0, :, 0], [3, 1, 2])


@pytest.mark.parametrize("per", ["vector", "scalar"])
def test_entries_that_are_not_named_are_not_read(per):
    """The tokens are those of the vector that holds the named entries alone, with its validity."""
    x, valid = RNG.normal(size=(2, 3, 5)).astype(np.float32), RNG.random((2, 3, 5)) < 0.7
    whole = {"proprio": jnp.asarray(x), "proprio_pad_mask": jnp.asarray(valid)}
    part = {"proprio": jnp.asarray(x[..., [4, 1]]), "proprio_pad_mask": jnp.asarray(valid[..., [4, 1]])}
    found = LowdimTokenizer(("proprio",), per, entries=(4, 1)).apply({}, whole, {})
    want = LowdimTokenizer(("proprio",), per).apply({}, part, {})
    np.testing.assert_array_equal(found.tokens, want.tokens)
    np.testing.assert_array_equal(found.mask, want.mask)
    with pytest.raises(ValueError, match=r"entries \(5,\) of proprio: there are 5, counted from 0"):
        LowdimTokenizer(("proprio",), per, entries=(5,)).apply({}, whole, {})


def test_channels_of_cameras_and_goals():
    """Cameras by name, then goals by name; normalised; depth between -1 and 1, a metre being 0."""
    seen = []

    class Watch:
        def __init__(self, dtype):
            pass

        def __call__(self, x, condition):
            seen.append(x)
            return x

    rng = np.random.default_rng(1)
    pixels = lambda *lead: rng.integers(0, 256, (*lead, 4, 4, 3), np.uint8)  # noqa: E731
    observation = {
        "image_b": pixels(1, 2),
        "image_a": pixels(1, 2),
        "depth_a": np.full((1, 2, 4, 4, 1), 3.0, np.float32),
    }
    task = {"image_b": pixels(1)}
    ImageTokenizer(Watch, ("image_.*", "depth_.*"), ("image_b",)).apply({}, observation, task)
    scaled = lambda x: np.asarray(x, np.float64) / 127.5 - 1  # noqa: E731
    goal = np.broadcast_to(scaled(task["image_b"])[:, None], (1, 2, 4, 4, 3))
    parts = [np.full((1, 2, 4, 4, 1), 0.5), scaled(observation["image_a"]), scaled(observation["image_b"]), goal]
    np.testing.assert_allclose(seen[0], np.concatenate(parts, -1).reshape(2, 4, 4, 10), atol=1e-6)
    np.testing.assert_allclose(normalize_depth(jnp.array([0.0, 1.0, 3.0, jnp.inf])), [-1, 0, 0.5, 1], atol=3e-3)
    assert bin_index(jnp.array([0.5]), 2, "uniform", 0.0, 1.0, compat=False) == 1
