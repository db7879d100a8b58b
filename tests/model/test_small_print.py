"""What is easy to get wrong and changes little: epsilons, defaults, scales, masks of a part. Against NumPy by hand."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import flatten, unflatten
from octo_like.model import t5
from octo_like.model.diffusion import cosine_schedule, ddim_sample
from octo_like.model.stems import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Conv,
    Film,
    GroupNorm,
    PatchStem,
    normalize_images,
    with_coordinates,
)
from octo_like.model.tokenizers import ImageTokenizer, LanguageTokenizer, match_keys
from octo_like.model.tokens import TokenGroup, masked_mean, valid_mask
from octo_like.policy.octo_release import translate_config
from tests.model import light, tiny
from tests.model.light import FLOW, HeadAlone
from tests.model.test_made_up_release import MODEL

RNG = np.random.default_rng(0)


def test_the_mean_is_over_valid_tokens_only():
    tokens = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)
    mask = np.zeros((2, 3, 4), bool)
    mask[0, 0, :2] = mask[1, 2, 3] = True
    got = masked_mean(TokenGroup(jnp.asarray(tokens), jnp.asarray(mask)))
    np.testing.assert_allclose(got[0, 0], tokens[0, 0, :2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(got[1, 2], tokens[1, 2, 3], rtol=1e-6)
    assert not np.any(got[0, 1:]) and not np.any(got[1, :2])
    poisoned = jnp.where(jnp.asarray(mask)[..., None], tokens, jnp.nan)
    np.testing.assert_array_equal(masked_mean(TokenGroup(poisoned, jnp.asarray(mask))), got)


def test_groups_are_joined_along_their_tokens():
    parts = [TokenGroup(jnp.full((2, n, 3), float(n)), jnp.full((2, n), n == 1)) for n in (1, 2)]
    whole = TokenGroup.concatenate(parts)
    assert whole.tokens.shape == (2, 3, 3) and whole.tokens[0, :, 0].tolist() == [1, 2, 2]
    assert whole.mask[1].tolist() == [True, False, False]


def test_what_a_batch_does_not_say_is_valid():
    assert valid_mask({}, "x", (2, 3)).all() and valid_mask({"pad_mask_dict": {}}, "x", (2,)).shape == (2,)
    mask = valid_mask({"pad_mask_dict": {"x": np.array([1, 0])}}, "x", (2,))
    assert mask.dtype == bool and mask.tolist() == [True, False]


def t5_by_hand(p, config, ids, mask):
    """One row, position by position, in float64."""
    x = p["shared"]["embedding"][ids]
    table = p["encoder"]["block"]["0"]["layer"]["0"]["SelfAttention"]["relative_attention_bias"]["embedding"]
    norm = lambda x, w: w * x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon)  # noqa: E731
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    for i in range(config.num_layers):
        layers = p["encoder"]["block"][str(i)]["layer"]
        h, a = norm(x, layers["0"]["layer_norm"]["weight"]), layers["0"]["SelfAttention"]
        q, k, v = ((h @ a[n]["kernel"]).reshape(len(ids), config.num_heads, config.d_kv) for n in "qkv")
        out = np.zeros_like(q)
        for n in range(config.num_heads):
            for row in range(len(ids)):
                # Distances under a quarter of the buckets have one each; keys on the right have the upper half.
                logits = [
                    q[row, n] @ k[j, n] + table[abs(j - row) + (config.num_buckets // 2 if j > row else 0), n]
                    for j in range(len(ids))
                ]
                w = np.where(mask, np.exp(np.array(logits)), 0)
                out[row, n] = w @ v[:, n] / w.sum()
        x = x + out.reshape(len(ids), -1) @ a["o"]["kernel"]
        h, m = norm(x, layers["1"]["layer_norm"]["weight"]), layers["1"]["DenseReluDense"]
        if config.gated:
            hidden = gelu(h @ m["wi_0"]["kernel"]) * (h @ m["wi_1"]["kernel"])
        else:
            hidden = np.maximum(h @ m["wi"]["kernel"], 0)
        x = x + hidden @ m["wo"]["kernel"]
    return norm(x, p["encoder"]["final_layer_norm"]["weight"])


@pytest.mark.parametrize("gated", [True, False])
def test_t5_gated_and_not(gated):
    """The gate is GELU of wi_0, and wi_1 is linear (T5 1.1); a wide epsilon is seen."""
    config = t5.T5Config(20, 8, 3, 12, 2, 2, num_buckets=16, epsilon=0.1, gated=gated)
    shapes = jax.eval_shape(lambda: t5.init_params(config, jax.random.key(0)))
    p = tiny.random_values(shapes)
    ids, mask = np.array([[3, 7, 7, 1], [5, 2, 9, 0]]), np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    got = jax.jit(lambda p: t5.encode(p, config, ids, mask))(p)
    p64 = unflatten({path: np.asarray(leaf, np.float64) for path, leaf in flatten(p)})
    for row in range(2):
        np.testing.assert_allclose(got[row], t5_by_hand(p64, config, ids[row], mask[row] > 0), rtol=1e-4, atol=1e-4)


def test_t5_begins_with_its_scales_and_sizes():
    """Mesh TensorFlow: q by 1/sqrt(d d_kv), what reads the residual stream by 1/sqrt(d), what adds by its own width."""
    config = t5.T5Config(400, 64, 16, 128, 1, 8, gated=True)
    p = dict(flatten(t5.init_params(config, jax.random.key(0))))
    block = "encoder/block/0/layer"
    for name, shape, std in (
        ("shared/embedding", (400, 64), 1.0),
        (f"{block}/0/SelfAttention/q/kernel", (64, 128), (64 * 16) ** -0.5),
        (f"{block}/0/SelfAttention/k/kernel", (64, 128), 64**-0.5),
        (f"{block}/0/SelfAttention/v/kernel", (64, 128), 64**-0.5),
        (f"{block}/0/SelfAttention/o/kernel", (128, 64), 128**-0.5),
        (f"{block}/0/SelfAttention/relative_attention_bias/embedding", (32, 8), 64**-0.5),
        (f"{block}/1/DenseReluDense/wi_0/kernel", (64, 128), 64**-0.5),
        (f"{block}/1/DenseReluDense/wi_1/kernel", (64, 128), 64**-0.5),
        (f"{block}/1/DenseReluDense/wo/kernel", (128, 64), 128**-0.5),
    ):
        assert p[name].shape == shape, name
        np.testing.assert_allclose(np.std(p[name]), std, rtol=0.15, err_msg=name)
    assert np.all(p["encoder/final_layer_norm/weight"] == 1) and np.all(p[f"{block}/0/layer_norm/weight"] == 1)
    assert len({float(leaf.reshape(-1)[0]) for path, leaf in p.items() if "norm" not in path}) == 9, "keys are shared"
    sizes = {name: (c.d_model, c.d_kv, c.d_ff, c.num_layers, c.num_heads) for name, c in t5.T5_CONFIGS.items()}
    assert sizes == {
        "t5-small": (512, 64, 2048, 6, 8),
        "t5-base": (768, 64, 3072, 12, 12),
        "t5-large": (1024, 64, 4096, 24, 16),
    }
    base = t5.T5Config()
    assert (base.vocab_size, base.num_buckets, base.max_distance, base.epsilon, base.gated) == (
        32128,
        32,
        128,
        1e-6,
        False,
    )


def test_a_kernel_with_hardly_any_spread_shows_epsilon():
    """Standardised: (k - mean) / (std + 1e-5), here with a std of 1e-5; the bias is not."""
    kernel = (0.3 + 1e-5 * RNG.normal(size=(2, 2, 3, 4))).astype(np.float64)
    x, bias = RNG.normal(size=(1, 4, 4, 3)).astype(np.float32), RNG.normal(size=4).astype(np.float32)
    k32 = kernel.astype(np.float32).astype(np.float64)
    want = k32 - k32.mean((0, 1, 2))
    want = want / (want.std((0, 1, 2)) + 1e-5)
    patches = x.reshape(2, 2, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(2, 2, -1)
    out = Conv(4, 2, 2, standardize=True).apply({"params": {"kernel": kernel, "bias": bias}}, x)[0]
    np.testing.assert_allclose(out, patches @ want.reshape(-1, 4) + bias, rtol=0.02, atol=0.02)
    plain = Conv(4, 2, 2).apply({"params": {"kernel": kernel, "bias": bias}}, x)[0]
    np.testing.assert_allclose(plain, patches @ kernel.reshape(-1, 4) + bias, rtol=1e-4, atol=1e-5)


def test_group_norm_with_hardly_any_spread_shows_epsilon():
    x = (1e-3 * RNG.normal(size=(2, 3, 3, 8)) + 5).astype(np.float32)
    p = {"scale": RNG.normal(size=8).astype(np.float32), "bias": RNG.normal(size=8).astype(np.float32)}
    y = x.astype(np.float64).reshape(2, 9, 2, 4)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-6)
    want = y.reshape(x.shape) * p["scale"] + p["bias"]
    np.testing.assert_allclose(GroupNorm(2).apply({"params": p}, x), want, rtol=5e-3, atol=5e-3)
    for silent in (False, True):
        begin = GroupNorm(2, zero_scale=silent).init(jax.random.key(0), x)["params"]
        assert np.all(begin["scale"] == float(not silent)) and not np.any(begin["bias"])
    with pytest.raises(ValueError, match="8 channels are not divisible by 3 groups"):
        GroupNorm(3).init(jax.random.key(0), x)


def test_images_are_normalised_by_the_formulas():
    image = np.array([[[0, 127.5, 255, 255, 0, 51]]], np.float32)
    np.testing.assert_allclose(normalize_images(image), [[[-1, 0, 1, 1, -1, -0.6]]], atol=1e-6)
    want = (image.reshape(2, 3) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize_images(image, "imagenet").reshape(2, 3), want, rtol=1e-5)
    assert IMAGENET_MEAN.shape == IMAGENET_STD.shape == (3,)
    with pytest.raises(ValueError, match="'default', 'imagenet'"):
        normalize_images(image, "none")


def test_coordinates_are_row_and_column():
    out = with_coordinates(jnp.zeros((1, 3, 5, 2)))
    np.testing.assert_allclose(out[0, :, 2, 2], [-1, 0, 1])
    np.testing.assert_allclose(out[0, 1, :, 3], [-1, -0.5, 0, 0.5, 1])
    assert not np.any(out[..., :2])


def test_film_begins_as_the_identity():
    x, c = jnp.asarray(RNG.normal(size=(2, 3, 3, 4)), jnp.float32), jnp.ones((2, 5))
    params = Film().init(jax.random.key(0), x, c)["params"]
    np.testing.assert_array_equal(Film().apply({"params": params}, x, c), x)
    params = tiny.random_values(params)
    a, b = (c @ params[n]["kernel"] + params[n]["bias"] for n in ("Dense_0", "Dense_1"))
    want = x * (1 + a[:, None, None]) + b[:, None, None]
    np.testing.assert_allclose(Film().apply({"params": params}, x, c), want, rtol=1e-5, atol=1e-6)


def test_the_flow_network_is_told_twenty_times_tau():
    """Its time features were made for the steps 0 ... 20 of diffusion."""
    head = HeadAlone(FLOW)
    embedding, x = RNG.normal(size=(2, 16)).astype(np.float32), RNG.normal(size=(2, 12)).astype(np.float32)
    for tau in (0.0, 0.37, 0.95):
        at = jnp.full((2, 1), tau)
        want = head.module.apply({"params": head.params}, method=lambda m, at=at: m.flow_model(embedding, x, 20 * at))
        np.testing.assert_array_equal(head.apply(embedding, x, at, method="predict_velocity"), want)
    assert head.module.sample_steps == 4 and type(head.module)(readout="readout_action").sample_steps == 10


def test_ddim_clips_what_it_estimates_and_what_it_returns():
    """A network that says the action is 3 x where it is noisy and 0.4 x where it is not; bounds of 1 on the way ("x0"),
    or after every step ("sample")."""
    schedule = cosine_schedule(10)
    levels = np.append(np.asarray(schedule.alpha_hats, np.float64), 1.0)

    def denoise(x, t):
        level = schedule.alpha_hats[t]
        return (x - jnp.sqrt(level) * jnp.where(t > 3, 3.0, 0.4) * x) / jnp.sqrt(1 - level)

    start = jnp.array([-4.0, -0.2, 0.1, 2.5])
    for clip in ("x0", "sample"):
        x = np.asarray(start, np.float64)
        for t, s in ((9, 7), (7, 4), (4, 2), (2, -1)):
            x0 = (3 if t > 3 else 0.4) * x
            x0 = np.clip(x0, -1, 1) if clip == "x0" else x0
            eps = (x - np.sqrt(levels[t]) * x0) / np.sqrt(1 - levels[t])
            x = np.sqrt(levels[s]) * x0 + np.sqrt(1 - levels[s]) * eps
            if clip == "sample":
                x = np.clip(x, -1, 1)
        out = ddim_sample(denoise, schedule, start, num_steps=4, max_action=1.0, clip=clip)
        np.testing.assert_allclose(out, x, atol=2e-3)
        assert np.sum(np.abs(x) < 0.95) >= 3, "bounds at the end would hide those on the way"
    greedy = lambda x, t: (x - jnp.sqrt(schedule.alpha_hats[t]) * 9.0) / jnp.sqrt(1 - schedule.alpha_hats[t])  # noqa: E731
    for clip in ("x0", "sample"):
        assert np.all(ddim_sample(greedy, schedule, start, num_steps=4, max_action=1.0, clip=clip) == 1.0)
    with pytest.raises(ValueError, match="eta=0.5 draws noise"):
        ddim_sample(denoise, schedule, start, num_steps=4, max_action=1.0, eta=0.5)


class Flat(PatchStem):
    """A stem that tells what it was given."""

    def __call__(self, x, condition=None):
        return x


def seen_by(tokenizer, observation, task=None, summaries=None):
    """(tokens, mask) with the pixels themselves as features."""
    group = tokenizer.apply({}, observation, task or {}, summaries)
    return np.asarray(group.tokens), np.asarray(group.mask)


def test_stacked_cameras_of_which_the_mask_names_some():
    """A camera without an entry is there: the token is valid. With entries for all, it is if any of them is there."""
    frames = {f"image_{name}": RNG.integers(0, 256, (2, 1, 2, 2, 3), np.uint8) for name in ("a", "b")}
    stack = ImageTokenizer(stem=Flat, obs_keys=("image_.*",))
    absent, present = np.array([[False], [True]]), np.array([[True], [True]])
    for pads, want in (
        ({}, [True, True]),
        ({"image_a": absent}, [True, True]),
        ({"image_a": absent, "image_b": present}, [True, True]),
        ({"image_a": absent, "image_b": absent}, [False, True]),
    ):
        tokens, mask = seen_by(stack, frames | {"pad_mask_dict": pads})
        assert mask[:, 0].all(-1).tolist() == want and mask[:, 0].any(-1).tolist() == want, pads
        shown = tokens.reshape(2, 1, 2, 2, 6)
        for i, key in enumerate(("image_a", "image_b")):  # in the order of their names; what is missing is zero
            image = frames[key] / 127.5 - 1
            image = np.where(pads.get(key, present)[..., None, None, None], image, 0)
            np.testing.assert_allclose(shown[..., 3 * i : 3 * i + 3], image, atol=1e-6)
    off = ImageTokenizer(stem=Flat, obs_keys=("image_.*",), use_pad_mask=False)
    assert seen_by(off, frames | {"pad_mask_dict": {"image_a": absent, "image_b": absent}})[1].all()


def test_a_goal_is_stacked_onto_every_frame_and_conditions_are_repeated():
    frames = {"image_a": RNG.integers(0, 256, (2, 3, 2, 2, 3), np.uint8)}
    goal = RNG.integers(0, 256, (2, 2, 2, 3), np.uint8)
    stack = ImageTokenizer(stem=Flat, obs_keys=("image_a",), goal_keys=("image_a",))
    for task, want in (
        ({"image_a": goal}, goal / 127.5 - 1),
        ({"image_a": goal, "pad_mask_dict": {"image_a": np.array([True, False])}}, [goal[0] / 127.5 - 1, 0 * goal[1]]),
        ({}, 0 * goal),
    ):
        shown = seen_by(stack, frames, task)[0].reshape(2, 3, 2, 2, 6)
        np.testing.assert_allclose(shown[..., :3], frames["image_a"] / 127.5 - 1, atol=1e-6)
        for w in range(3):
            np.testing.assert_allclose(shown[:, w, ..., 3:], np.asarray(want), atol=1e-6)
    heard = []

    class Hears(Flat):
        def __call__(self, x, condition=None):
            heard.append(condition)
            return x

    film = ImageTokenizer(stem=Hears, obs_keys=("image_a",), film_keys=("task", "extra"))
    summary, extra = np.arange(2.0)[:, None], 10 + np.arange(4.0).reshape(2, 2)
    seen_by(film, frames, {"extra": extra}, {"task": summary})
    np.testing.assert_array_equal(heard[0], np.repeat(np.concatenate([summary, extra], -1), 3, axis=0))
    with pytest.raises(ValueError, match=r"no 'extra'; valid: \['task'\]"):
        seen_by(film, frames, {}, {"task": summary})


def test_keys_match_whole_names_or_beginnings():
    tree = {"image_a": 0, "image_ab": 0, "b": 0}
    assert match_keys(tree, ("image_a",), prefix=False) == ["image_a"]
    assert match_keys(tree, ("b", "image_a"), prefix=True) == ["b", "image_a", "image_ab"]


def test_ngrams_are_three_neighbours_and_their_strongest():
    """A convolution by hand over three words, GELU, the maximum over the words that are there, a layer, a norm."""
    text = LanguageTokenizer(
        encoder="small", vocab_size=9, dim=4, num_layers=0, num_heads=1, max_length=5, pool="ngrams"
    )
    ids, mask = np.array([[3, 8, 2, 5, 1], [4, 1, 0, 0, 0]]), np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    task = {"language_instruction": {"input_ids": ids, "attention_mask": mask}}
    shapes = jax.eval_shape(lambda: text.init(jax.random.key(0), {}, task)["params"])
    p = tiny.random_values(shapes)
    group = text.apply({"params": p}, {}, task)
    words = np.asarray(text.apply({"params": p}, {}, task, encode_only=True), np.float64)
    assert group.tokens.shape == (2, 1, 4) and group.mask.all()
    for row, length in enumerate((5, 2)):
        x = np.concatenate([words[row, :length], np.zeros((3, 4))])
        grams = np.stack([np.concatenate([x[i], x[i + 1], x[i + 2]]) for i in range(length)])
        h = grams @ p["ngrams"]["kernel"] + p["ngrams"]["bias"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        y = h.max(0) @ p["ngrams_out"]["kernel"] + p["ngrams_out"]["bias"]
        y = (y - y.mean()) / np.sqrt(y.var() + 1e-6) * p["pool_out_norm"]["scale"] + p["pool_out_norm"]["bias"]
        np.testing.assert_allclose(group.tokens[row, 0], y, rtol=1e-3, atol=1e-3)


def test_what_a_release_does_not_say():
    """Octo's own defaults: eight learned tokens, and the attention of the first releases."""
    model = copy.deepcopy(MODEL)
    assert translate_config(model)["legacy_attention"] is False
    assert translate_config(model)["observation_tokenizers"]["both"]["num_learned_tokens"] == 3
    del model["use_correct_attention"], model["observation_tokenizers"]["both"]["kwargs"]["num_tokens"]
    assert translate_config(model)["legacy_attention"] is True
    assert translate_config(model)["observation_tokenizers"]["both"]["num_learned_tokens"] == 8
    del model["observation_tokenizers"]["both"]["kwargs"]["use_token_learner"]
    assert translate_config(model)["observation_tokenizers"]["both"]["num_learned_tokens"] == 0


def test_losses_by_sample_are_means_over_what_the_sample_counts():
    entry = tiny.diffusion(num_samples=3)
    head, batch = HeadAlone(entry), light.batch(entry)
    mask = np.ones_like(batch["action"])
    mask[0, 0], mask[1] = 0, 0
    keys = jax.random.split(jax.random.key(0), 4)
    terms, sown = head.module.apply(
        {"params": head.params}, head.groups, batch["action"], mask, keys, method="loss_terms", mutable=["by_sample"]
    )
    (loss,), (count,) = sown["by_sample"]["loss"], sown["by_sample"]["count"]
    assert count.tolist() == [12, 0, 24, 24] and loss[1] == 0
    np.testing.assert_allclose(jnp.sum(loss * count), terms["loss"], rtol=1e-5)
