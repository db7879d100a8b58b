"""Small print of heads and of what stands before them: losses, bounds, padding, one entry. Against NumPy by hand."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from octo_like.common.schema import flatten
from octo_like.model.attention import BlockMask, GroupLayout, StaticRule, attend, block_mask
from octo_like.model.decoder import TokenDecoder
from octo_like.model.diffusion import ScoreNetwork
from octo_like.model.discrete import ActionBins
from octo_like.model.heads import head_batch
from octo_like.model.octo import build_model
from octo_like.model.stems import convolve
from octo_like.model.tokenizers import LanguageTokenizer, LowdimTokenizer
from octo_like.model.tokens import TokenGroup, masked_mean
from octo_like.model.transformer import MapPooling, Transformer
from tests.model import light, tiny
from tests.model.light import FLOW, HeadAlone

RNG = np.random.default_rng(0)
REGRESSION = dict(kind="regression", readout="readout_action", action_horizon=3, action_dim=4)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_the_mean_of_a_tasks_tokens():
    tokens, mask = normal(2, 3, 5), np.array([[1, 1, 0], [0, 0, 1]], bool)
    want = np.stack([tokens[0, :2].mean(0), tokens[1, 2]])
    np.testing.assert_allclose(masked_mean(TokenGroup(jnp.asarray(tokens), jnp.asarray(mask))), want, rtol=1e-6)


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_a_generative_loss_is_the_mean_error_of_its_draws(loss):
    head = HeadAlone(FLOW | dict(loss=loss, num_samples=2))
    action, mask = 0.3 * normal(4, 2, 3, 4), RNG.random((4, 2, 3, 4)) < 0.7
    tau, noise = RNG.random((2, 4, 2, 1)).astype(np.float32), normal(2, 4, 2, 12)
    keys = jax.random.split(jax.random.key(0), 4)
    terms = head.apply(head.groups, action, mask.astype(np.float32), keys, draws=(tau, noise), method="loss_terms")
    flat = action.reshape(4, 2, 12)
    error = np.zeros((2, 4, 2, 12))
    for i in range(2):
        x = tau[i] * flat + (1 - tau[i]) * noise[i]
        embedding = head.groups["readout_action"].tokens[:, :, 0]
        error[i] = head.apply(embedding, x, tau[i], method="predict_velocity") - (flat - noise[i])
    counted = mask.reshape(4, 2, 12)
    by_name = {"l1": np.abs(error), "mse": error**2}
    np.testing.assert_allclose(terms["loss"], (by_name[loss] * counted).sum() / 2 * 4, rtol=1e-4)
    np.testing.assert_allclose(terms["mse"], (by_name["mse"] * counted).sum() / 2 * 4, rtol=1e-4)


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_a_regression_is_bounded_smoothly_and_its_loss_is_the_error(loss):
    head = HeadAlone(REGRESSION | dict(loss=loss, max_action=2.0))
    scaled = jax.tree.map(lambda leaf: 6 * leaf, head.params)
    raw = head.groups["readout_action"].tokens[:, :, 0] @ scaled["mean_proj"]["kernel"] + scaled["mean_proj"]["bias"]
    want = 2 * np.tanh(np.asarray(raw) / 2).reshape(4, 2, 3, 4)
    assert np.abs(want).max() > 1.99, "the bound must show"
    np.testing.assert_allclose(head.apply(head.groups, method="predict", params=scaled), want, rtol=1e-4, atol=1e-4)
    action, mask = normal(4, 2, 3, 4), (RNG.random((4, 2, 3, 4)) < 0.7).astype(np.float32)
    terms = head.apply(head.groups, action, mask, method="loss_terms", params=scaled)
    error = np.abs(want - action)
    np.testing.assert_allclose(terms["loss"], 4 * ((error if loss == "l1" else error**2) * mask).sum(), rtol=1e-4)
    np.testing.assert_allclose(terms["mse"], 4 * (error**2 * mask).sum(), rtol=1e-4)


def test_a_flow_leaves_padded_entries_on_the_straight_path_from_noise_to_zero():
    head, noise = HeadAlone(FLOW), normal(4, 12)
    valid = np.array([True, False, True, False])
    flat = np.tile(valid, 3)
    keys = jax.random.split(jax.random.key(0), 4)
    got = head.apply(head.groups, keys, valid=valid, noise=noise, method="sample")
    embedding, x = head.groups["readout_action"].tokens[:, -1, 0], noise
    for i in range(4):
        tau = np.full((4, 1), i / 4, np.float32)
        x = x + np.asarray(head.apply(embedding, x, tau, method="predict_velocity")) / 4
        x = np.where(flat, x, (1 - (i + 1) / 4) * noise)
    np.testing.assert_allclose(got.reshape(4, 12), np.clip(x, -5, 5), rtol=1e-4, atol=1e-4)
    assert np.all(got[..., ~valid] == 0)
    free = head.apply(head.groups, keys, noise=noise, method="sample")
    assert np.abs(free - got)[..., valid].max() > 1e-3, "what the network reads in padded entries must show"


def test_what_is_masked_is_zero_in_a_heads_actions():
    entry = REGRESSION
    batch = light.batch(entry)
    batch["action_pad_mask"][1, :, 1:] = False
    batch["observation"]["timestep_pad_mask"][2, 0] = False
    action, mask = head_batch(batch, "action", HeadAlone(entry).module)
    assert np.all(np.asarray(action)[~np.asarray(mask)] == 0) and np.sum(~np.asarray(mask)) == 2 * 2 * 4 + 3 * 4
    np.testing.assert_array_equal(np.asarray(action)[np.asarray(mask)], batch["action"][np.asarray(mask)])


def test_a_score_network_takes_given_actions_only_when_told():
    embedding, x, time = normal(2, 8), normal(2, 6), np.zeros((2, 1), np.float32)
    for given, entries in ((False, 0), (True, 1)):
        network = ScoreNetwork(6, hidden_dim=4, **(dict(with_given=True) if given else {}))
        shapes = jax.eval_shape(
            lambda network=network: network.init(jax.random.key(0), embedding, x, time, None, np.ones((2, 3)))
        )
        assert sum("given" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shapes)) == entries


def test_patches_that_do_not_cover_the_picture_are_those_of_a_convolution():
    """A width of one pixel more than whole patches: the last column is dropped, as a convolution drops it."""
    x, kernel = normal(2, 8, 9, 3), normal(4, 4, 3, 5)
    want = np.stack(
        [
            [np.einsum("nhwc,hwcf->nf", x[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4], kernel) for j in range(2)]
            for i in range(2)
        ]
    ).transpose(2, 0, 1, 3)
    for picture, turned in ((x, False), (x.transpose(0, 2, 1, 3), True)):
        weights = kernel.transpose(1, 0, 2, 3) if turned else kernel
        out = np.asarray(convolve(jnp.asarray(picture), jnp.asarray(weights), 4, 0))
        np.testing.assert_allclose(out.transpose(0, 2, 1, 3) if turned else out, want, rtol=1e-4, atol=1e-4)


def test_the_fused_kernel_is_given_heads_of_128_and_its_empty_rows_are_zero():
    """JAX's own attention in the kernel's place: as plain attention, also where nothing may be attended."""
    q, k, v = (jnp.asarray(normal(1, 4, 2, 128), jnp.bfloat16) for _ in "qkv")
    mask = jnp.tril(jnp.ones((1, 4, 4), bool), -1)  # the first query sees nothing
    own = jax.nn.dot_product_attention

    def kernel(q, k, v, *, mask, implementation):
        assert implementation == "cudnn"
        return own(q, k, v, mask=mask)

    with mock.patch.object(jax.nn, "dot_product_attention", kernel):
        out = np.asarray(attend(q, k, v, mask, implementation="cudnn"), np.float32)
    np.testing.assert_allclose(out, np.asarray(attend(q, k, v, mask), np.float32), atol=0.03)
    assert not out[:, 0].any() and out[:, 1:].any((0, 2, 3)).all()


def test_only_some_rows_of_the_last_block():
    """The same as all rows, of which these are taken: the blocks before need every token."""
    net = Transformer(num_layers=2, num_heads=2, mlp_dim=8)
    layouts = (GroupLayout("obs", "obs", 3, 0), GroupLayout("readout_a", "readout", 2, 0))
    mask = BlockMask(StaticRule(block_mask(layouts)), jnp.ones((2, 5), bool))
    x = jnp.asarray(normal(2, 5, 8))
    params = tiny.random_values(jax.eval_shape(lambda: net.init(jax.random.key(0), x, mask))["params"])
    whole = net.apply({"params": params}, x, mask)
    some = net.apply({"params": params}, x, mask, rows=(3, 2))
    np.testing.assert_allclose(some, whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_a_discrete_loss_s_error_is_that_of_the_likeliest_bins():
    head = HeadAlone(dict(kind="discrete", readout="readout_action", action_horizon=2, action_dim=3, num_bins=5,
                          token_per="", low=-1.0, high=1.0))  # fmt: skip
    action = np.clip(0.5 * normal(4, 2, 2, 3), -0.99, 0.99)
    mask = (RNG.random((4, 2, 2, 3)) < 0.7).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    terms = head.apply(head.groups, action, mask, keys, method="loss_terms")
    guess = np.asarray(head.apply(head.groups, method="logits"), np.float64).argmax(-1).reshape(4, 2, 2, 3)
    centre = -1 + 0.4 * (guess + 0.5)
    np.testing.assert_allclose(terms["mse"], 3 * ((centre - action) ** 2 * mask).sum(), rtol=1e-4)


def test_a_loss_of_bins_by_hand():
    head = HeadAlone(dict(kind="bins", readout="readout_action", action_horizon=2, action_dim=3, num_bins=5, low=-1.0,
                          high=1.0, width=8, num_heads=2, num_layers=1))  # fmt: skip
    action = np.clip(0.5 * normal(4, 2, 2, 3), -0.99, 0.99)
    mask = (RNG.random((4, 2, 2, 3)) < 0.7).astype(np.float32)
    terms = head.apply(head.groups, action, mask, method="loss_terms")
    logits = np.asarray(head.apply(head.groups, action, mask, method="logits"), np.float64)
    target = np.floor((action + 1) / 0.4).astype(int)
    guess = logits.argmax(-1)
    log_sum = np.log(np.exp(logits).sum(-1))
    entropy = log_sum - np.take_along_axis(logits, target[..., None], -1)[..., 0]
    np.testing.assert_allclose(terms["loss"], (entropy * mask).sum(), rtol=1e-4)
    assert terms["accuracy"] == ((guess == target) * mask).sum()
    centre = -1 + 0.4 * (guess + 0.5)
    np.testing.assert_allclose(terms["mse"], 3 * ((centre - action) ** 2 * mask).sum(), rtol=1e-4)


def test_pooling_computes_in_the_type_it_is_told():
    pool, tokens = MapPooling(dtype=jnp.bfloat16), normal(2, 3, 16)
    params = pool.init(jax.random.key(0), tokens)
    assert jax.eval_shape(pool.apply, params, tokens).dtype == jnp.bfloat16


def test_the_layer_of_neighbours_is_twice_as_wide_as_a_word():
    text = LanguageTokenizer(
        encoder="small", vocab_size=9, dim=4, num_layers=0, num_heads=1, max_length=5, pool="ngrams"
    )
    task = {"language_instruction": {"input_ids": np.ones((1, 5), int), "attention_mask": np.ones((1, 5), int)}}
    shapes = jax.eval_shape(lambda: text.init(jax.random.key(0), {}, task)["params"])
    assert shapes["ngrams"]["kernel"].shape == (12, 8) and shapes["ngrams_out"]["kernel"].shape == (8, 4)


def test_chosen_entries_are_counted_from_zero():
    observation = {"proprio": normal(2, 1, 5)}
    task = {}
    first = LowdimTokenizer(obs_keys=("proprio",), entries=(0, 4)).apply({}, observation, task)
    np.testing.assert_array_equal(first.tokens[..., 0, :2], observation["proprio"][..., [0, 4]])
    for entries in ((0, 5), (-1, 2)):
        with pytest.raises(ValueError, match="there are 5, counted from 0"):
            LowdimTokenizer(obs_keys=("proprio",), entries=entries).apply({}, observation, task)


def test_a_model_is_the_same_from_a_dict_a_config_and_json():
    config = light.config(heads=dict(action=tiny.diffusion()))
    assert build_model(config) == build_model(ConfigDict(config)) == build_model(json.loads(json.dumps(config)))


def test_bins_of_the_releases_by_hand():
    """Uniform: the last bin also holds what is above the range; normal: what is above the last edge is in bin 0."""
    bins = ActionBins.make(4, "uniform", -1.0, 1.0, 5.0, 2, compat=True)
    x = np.array([[-3.0, -0.9], [-0.1, 0.1], [0.49, 0.51], [0.99, 7.0]], np.float32)
    np.testing.assert_array_equal(bins.index(x), [[0, 0], [1, 2], [2, 3], [3, 3]])
    normal = ActionBins.make(4, "normal", None, None, 5.0, 2, compat=True)
    quartile = 0.6744898
    x = np.array([[-9.0, -quartile - 0.01], [-0.1, quartile - 0.01], [quartile + 0.01, 2.0], [3.0, 9.0]], np.float32)
    np.testing.assert_array_equal(normal.index(x), [[0, 0], [1, 2], [3, 3], [3, 0]])


def test_a_decoder_s_layers_are_four_times_as_wide_inside():
    decoder, group = TokenDecoder(5, 3, width=8, num_heads=2), TokenGroup(normal(1, 2, 8), np.ones((1, 2), bool))
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), np.zeros((1, 3), int), group)["params"])
    widths = {leaf.shape[-1] for path, leaf in flatten(shapes) if "mlp" in path and path.endswith("kernel")}
    assert widths == {32, 8}
