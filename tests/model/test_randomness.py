"""What is drawn, from which key: dropout, time and noise of losses, the noise of sampling. No two of them share one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import synthetic_batch
from octo_like.model import flow
from octo_like.model.octo import build_model
from octo_like.model.tokens import TokenGroup
from octo_like.model.transformer import Block, Mlp, MultiHeadAttention, Transformer, dropout, fold_in_all
from octo_like.policy.policy import Policy
from tests.model import light, tiny
from tests.model.light import FLOW, HeadAlone

KEYS = jax.random.split(jax.random.key(3), 4)


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = jnp.ones((4, 50, 80))
    out = np.asarray(dropout(x, 0.2, KEYS))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.8)}
    np.testing.assert_allclose((out == 0).mean((1, 2)), 0.2, atol=0.02)  # 4000 entries: 3 standard deviations
    for row, key in enumerate(KEYS):
        np.testing.assert_array_equal(out[row] != 0, jax.random.bernoulli(key, 0.8, (50, 80)))
    assert np.any(out[0] != out[1])
    for unchanged in (dropout(x, 0.0, KEYS), dropout(x, 0.2, None)):
        np.testing.assert_array_equal(unchanged, x)


def random(module, *args, **kwargs):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs)["params"])
    return tiny.random_values(shapes)


def run(module, params, *args, **kwargs):
    """Compiled as a whole: operation by operation, each would be compiled."""
    return jax.jit(lambda params, *args, **kwargs: module.apply({"params": params}, *args, **kwargs))(
        params, *args, **kwargs
    )


def test_a_blocks_dropouts_are_where_they_belong_and_apart():
    """Rebuilt from the parts: after attention, after GELU and after the MLP, each with its own key."""
    x, mask = jax.random.normal(jax.random.key(0), (4, 3, 8)), jnp.ones((4, 3, 3), bool)
    params = random(Block(2, 16), x, mask)
    out = run(Block(2, 16, 0.3, 0.2), params, x, mask, KEYS)

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    dense = lambda x, p: x @ p["kernel"] + p["bias"]  # noqa: E731
    attention = params["MultiHeadDotProductAttention_0"]
    h = run(
        MultiHeadAttention(2, 0.2), attention, norm(x, params["LayerNorm_0"]), mask, dropout_keys=fold_in_all(KEYS, 0)
    )
    y = x + dropout(h, 0.3, fold_in_all(KEYS, 1))
    keys, mlp = fold_in_all(KEYS, 2), params["MlpBlock_0"]
    h = dropout(jax.nn.gelu(dense(norm(y, params["LayerNorm_1"]), mlp["Dense_0"])), 0.3, fold_in_all(keys, 0))
    h = dropout(dense(h, mlp["Dense_1"]), 0.3, fold_in_all(keys, 1))
    np.testing.assert_allclose(out, y + h, rtol=1e-4, atol=1e-5)
    # The weights of attention are dropped, and by another key: with values of one the output counts what was kept.
    kept = {**attention, "value": {"kernel": 0 * attention["value"]["kernel"], "bias": jnp.ones((2, 4))}}
    plain, dropped = (run(MultiHeadAttention(2, rate), kept, x, mask, dropout_keys=KEYS) for rate in (0.0, 0.2))
    assert np.any(np.abs(plain - dropped) > 0.01)


def test_layers_drop_by_their_own_keys():
    """Two layers with the same parameters, one after the other, are two transformers of one layer with two keys."""
    x, mask = jax.random.normal(jax.random.key(0), (4, 3, 8)), jnp.ones((4, 3, 3), bool)
    params = random(Transformer(1, 2, 16), x, mask)
    block = jax.jit(lambda *args: Block(2, 16, 0.3).apply({"params": params["encoderblock_0"]}, *args))
    want = block(block(x, mask, fold_in_all(KEYS, 0)), mask, fold_in_all(KEYS, 1))
    norm = params["encoder_norm"]
    want = (want - want.mean(-1, keepdims=True)) / jnp.sqrt(want.var(-1, keepdims=True) + 1e-6)
    both = {**params, "encoderblock_1": params["encoderblock_0"]}
    got = run(Transformer(2, 2, 16, 0.3), both, x, mask, KEYS)
    np.testing.assert_allclose(got, want * norm["scale"] + norm["bias"], rtol=1e-4, atol=1e-5)


def test_an_mlp_is_its_formula():
    x = jax.random.normal(jax.random.key(0), (4, 3, 8))
    params = random(Mlp(16), x)
    want = jax.nn.gelu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], approximate=True)
    want = want @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(Mlp(16, 0.5).apply({"params": params}, x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry", [tiny.diffusion(num_samples=3, dropout_rate=0.4), FLOW | dict(num_samples=3)])
def test_time_noise_and_dropout_of_a_loss_have_keys_of_their_own(entry):
    """Which keys is part of what a resumed run repeats; the draws are made here again, and given instead."""
    head, batch = HeadAlone(entry), light.batch(entry)
    mask = np.ones_like(batch["action"])
    times, noise = [], []
    for key in KEYS:
        time_key, noise_key = (jax.random.fold_in(key, i) for i in (0, 1))
        if entry["kind"] == "flow":
            times.append(flow.time_from_uniform(jax.random.uniform(time_key, (3, 2, 1)), 1.5))
        else:
            times.append(jax.random.randint(time_key, (3, 2, 1), 0, 5))
        noise.append(jax.random.normal(noise_key, (3, 2, 12)))
    draws = jnp.stack(times, 1), jnp.stack(noise, 1)
    call = jax.jit(
        lambda keys, **options: head.apply(head.groups, batch["action"], mask, keys, method="loss_terms", **options)
    )
    np.testing.assert_allclose(call(KEYS)["loss"], call(KEYS, draws=draws)["loss"], rtol=1e-5)
    if "dropout_rate" in entry:  # the draws are the same, what is dropped is not
        others = jax.random.split(jax.random.key(9), 4)
        assert abs(call(others, draws=draws)["loss"] / call(KEYS, draws=draws)["loss"] - 1) > 1e-3


def test_dropout_of_the_score_network_is_one_mask_per_row_and_block():
    entry = tiny.diffusion(num_samples=1, dropout_rate=0.5)
    head = HeadAlone(entry)
    time, noise = jnp.full((1, 4, 2, 1), 2), jax.random.normal(jax.random.key(0), (1, 4, 2, 12))
    x = jnp.sqrt(0.5) * noise
    score = jax.jit(
        lambda keys: head.module.apply(
            {"params": head.params},
            method=lambda m: m.diffusion_model(m.embed(head.groups)[None], x, time, keys),
        )
    )
    plain, dropped, again = score(None), score(KEYS), score(KEYS[jnp.array([0, 1, 2, 0])])
    assert np.all(np.abs(plain - dropped).max((0, 2, 3)) > 1e-3)
    np.testing.assert_array_equal(dropped[:, :3], again[:, :3])
    assert np.any(dropped[:, 3] != again[:, 3])


def test_heads_draw_apart_from_each_other_and_dropout_is_for_training():
    """Two heads with the same parameters, on the same data: their losses differ by what they drew, each from the key of
    its place."""
    heads = {name: tiny.diffusion() for name in ("first", "second")}
    transformer = dict(num_layers=1, num_heads=2, mlp_dim=32, dropout_rate=0.5)
    model = build_model(light.config(heads=heads, transformer=transformer))
    params = tiny.random_params(model, light.SPEC)
    params["heads_second"] = params["heads_first"]
    batch = synthetic_batch(light.SPEC, 4, language_vocab=tiny.VOCAB)
    batch["action_head_mask"] = {name: np.ones(4, bool) for name in heads}

    def run(train):
        return jax.jit(lambda: model.apply({"params": params}, batch, KEYS, train, method="loss_terms"))()

    def alone(module, i):
        groups = module.groups(batch["observation"], batch["task"])
        head = module.heads["first"]
        return head.loss_terms(groups, batch["action"], jnp.ones_like(batch["action"]), fold_in_all(KEYS, i))

    terms = run(False)
    assert abs(terms["first"]["loss"] / terms["second"]["loss"] - 1) > 1e-3
    direct = jax.jit(lambda i: model.apply({"params": params}, i, method=alone))
    for i, name in enumerate(heads, 1):
        np.testing.assert_allclose(terms[name]["loss"], direct(i)["loss"], rtol=1e-5)
    assert abs(run(True)["first"]["loss"] / terms["first"]["loss"] - 1) > 1e-3


def test_one_key_gives_every_row_noise_of_its_own_and_padding_is_known():
    """Through the policy: equal rows get different actions, row i those of its key alone; what is valid arrives."""
    config = light.config()
    unit = lambda n: {"mean": [0.0] * n, "std": [1.0] * n, "mask": [True] * n}  # noqa: E731
    policy = Policy(
        {"model": config, "batch_spec": light.SPEC.to_json()},
        tiny.random_params(build_model(config), light.SPEC),
        {"small": {"action": unit(2), "proprio": unit(5)}},
    )
    batch = jax.tree.map(lambda x: np.repeat(x[:1], 3, 0), synthetic_batch(light.SPEC, 1, language_vocab=tiny.VOCAB))
    observation, task, key = batch["observation"], batch["task"], jax.random.key(0)
    actions = policy.sample_actions(observation, task, rng=key)
    assert np.abs(actions[0] - actions[1]).max() > 0.1 and np.abs(actions[1] - actions[2]).max() > 0.1
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(3))
    np.testing.assert_array_equal(policy.sample_actions(observation, task, rng=keys), actions)

    def drawn(valid):
        valid = np.array(valid)
        return policy.sample_program(policy.params, observation, task, keys, valid, head="action", sample_shape=())

    np.testing.assert_array_equal(drawn([True] * 4), actions)
    # A dimension that is padding ends as the noise of the cleanest level, and the others see that.
    some = drawn([True, True, False, False])
    assert np.all(np.abs(some - actions)[..., 2:].max((0, 1)) > 0.05) and np.any(some[..., :2] != actions[..., :2])
    small = policy.sample_actions(observation, task, rng=key, unnormalize="small")
    np.testing.assert_allclose(small, some[..., :2], rtol=1e-4, atol=1e-4)


def test_a_readout_of_several_tokens_is_their_mean_at_the_last_timestep():
    tokens = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    head = HeadAlone(dict(kind="regression", readout="readout_action", action_horizon=1, action_dim=2))
    groups = {"readout_action": TokenGroup(tokens, jnp.ones((2, 3, 4), bool))}
    np.testing.assert_allclose(head.apply(groups, method="embed"), tokens.mean(2), rtol=1e-5)
    np.testing.assert_allclose(head.apply(groups, last_only=True, method="embed"), tokens[:, -1:].mean(2), rtol=1e-5)
