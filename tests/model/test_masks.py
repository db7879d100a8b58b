"""Masks mean what they say: nothing padded, missing or from the future reaches a valid output."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import flatten, synthetic_batch, unflatten
from octo_like.model.attention import GroupLayout, attend, block_mask
from octo_like.model.octo import build_model
from octo_like.model.tokenizers import bin_index
from tests.model import light, tiny


@pytest.fixture(scope="module")
def model():
    model = build_model(tiny.config())
    return model, tiny.random_params(model)


COMPILED = {}


def outputs(model, params, batch):
    """All groups and the head's embedding."""

    def run(module, observation, task):
        groups = module.groups(observation, task)
        return groups, module.heads["action"].embed(groups)

    if id(model) not in COMPILED:
        # The model is kept beside its program, so that its id stays its own.
        COMPILED[id(model)] = model, jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=run))
    return COMPILED[id(model)][1](params, batch["observation"], batch["task"])


def changed(batch, path, value):
    flat = dict(flatten(batch))
    flat[path] = value
    return unflatten(flat)


def test_block_mask_is_the_token_by_token_rule():
    groups = [GroupLayout("task_language", "task", 3, -1)]
    for t in range(3):
        groups += [
            GroupLayout("obs_a", "obs", 2, t),
            GroupLayout("obs_b", "obs", 1, t),
            GroupLayout("readout_x", "readout", 2, t),
            GroupLayout("readout_y", "readout", 1, t),
        ]
    tokens = [group for group in groups for _ in range(group.size)]
    mask = block_mask(groups)
    for (i, q), (j, k) in itertools.product(enumerate(tokens), enumerate(tokens)):
        sees = {"task": ("task",), "obs": ("task", "obs"), "readout": ("task", "obs")}[q.role]
        want = k.timestep <= q.timestep and (k.role in sees or (k.role == q.role == "readout" and k.name == q.name))
        assert mask[i, j] == want, (q, k)


def test_masked_query_gives_zero_or_the_mean():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 4, 2, 8)) for i in range(3))
    mask = jnp.ones((1, 4, 4), bool).at[0, 1].set(False)
    out = attend(q, k, v, mask)
    assert not np.any(out[0, 1]) and np.all(np.any(out[0, 0] != 0, -1))
    np.testing.assert_allclose(
        attend(q, k, v, mask, uniform_when_masked=True)[0, 1], v[0].mean(0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "mask_path,index,hidden",
    [
        ("observation/pad_mask_dict/image_primary", (0, slice(None)), ["observation/image_primary"]),
        ("observation/pad_mask_dict/image_wrist", (0, 1), ["observation/image_wrist"]),
        ("observation/pad_mask_dict/proprio", (0, slice(None)), ["observation/proprio"]),
        ("observation/proprio_pad_mask", (0, slice(None), 3), ["observation/proprio"]),
        ("task/pad_mask_dict/image_primary", (0,), ["task/image_primary"]),
        ("task/pad_mask_dict/language_instruction", (0,), ["task/language_instruction/input_ids"]),
    ],
)
def test_missing_inputs_change_nothing(model, mask_path, index, hidden):
    """Bitwise: whatever stands in a masked place, the readouts are the same; unmasked, they differ."""
    model, params = model
    batch = synthetic_batch(tiny.SPEC, 2, language_vocab=tiny.VOCAB)
    flat = dict(flatten(batch))
    mask = flat[mask_path].copy()
    mask[index] = False
    for path in hidden:
        value = flat[path].copy()
        replaced = value[index]
        value[index] = (
            replaced ^ 0x55
            if value.dtype == np.uint8
            else ((replaced + 3) % tiny.VOCAB if value.dtype == np.int32 else replaced + 5)
        )
        masked, other = changed(batch, mask_path, mask), changed(changed(batch, mask_path, mask), path, value)
        want, got = (outputs(model, params, b)[1] for b in (masked, other))
        np.testing.assert_array_equal(want, got)
        visible = outputs(model, params, changed(batch, path, value))[1]
        assert np.any(visible[0] != outputs(model, params, batch)[1][0])


def test_padded_words_are_not_read(model):
    model, params = model
    batch = synthetic_batch(tiny.SPEC, 2, language_vocab=tiny.VOCAB)
    text = batch["task"]["language_instruction"]
    text["attention_mask"][:] = np.arange(6) < 4
    first = outputs(model, params, batch)[1]
    text["input_ids"][:, 4:] = 7
    np.testing.assert_array_equal(first, outputs(model, params, batch)[1])


def test_padded_timesteps_are_not_read(model):
    model, params = model
    batch = synthetic_batch(tiny.SPEC, 2, language_vocab=tiny.VOCAB)
    batch["observation"]["timestep_pad_mask"][0, 0] = False
    first = outputs(model, params, batch)[1]
    batch["observation"]["image_primary"][0, 0] = 3
    batch["observation"]["proprio"][0, 0] = 9.0
    second = outputs(model, params, batch)[1]
    np.testing.assert_array_equal(first[0, 1], second[0, 1])
    np.testing.assert_array_equal(first[1], second[1])


def test_the_future_is_not_read(model):
    model, params = model
    batch = synthetic_batch(tiny.SPEC, 2, language_vocab=tiny.VOCAB)
    first, embedding = outputs(model, params, batch)
    batch["observation"]["image_primary"][:, 1] = 200
    batch["observation"]["proprio"][:, 1] += 1.0
    second, other = outputs(model, params, batch)
    for name, group in first.items():
        if name.startswith("task"):
            np.testing.assert_array_equal(group.tokens, second[name].tokens, name)
        else:
            np.testing.assert_array_equal(group.tokens[:, 0], second[name].tokens[:, 0], name)
    assert np.any(embedding[:, 1] != other[:, 1])


def test_readouts_read_without_writing(model):
    model, params = model
    batch = synthetic_batch(tiny.SPEC, 2, language_vocab=tiny.VOCAB)
    first, _ = outputs(model, params, batch)
    moved = jax.tree.map(jnp.copy, params)
    moved["octo_transformer"]["readout_action_pos_embedding"] += 1.0
    second, _ = outputs(model, moved, batch)
    for name, group in first.items():
        if not name.startswith("readout"):
            np.testing.assert_array_equal(group.tokens, second[name].tokens, name)
    assert np.any(first["readout_action"].tokens != second["readout_action"].tokens)


def test_rows_are_independent(model):
    model, params = model
    batch = synthetic_batch(tiny.SPEC, 4, language_vocab=tiny.VOCAB)
    order = np.array([2, 0, 3, 1])
    permuted = unflatten({path: leaf[order] for path, leaf in flatten(batch)})
    first, second = (outputs(model, params, b)[1] for b in (batch, permuted))
    np.testing.assert_allclose(first[order], second, rtol=1e-5, atol=1e-6)


# -- what differs between the releases' behaviour (octo_compat) and the correct one ---------------------------------


@pytest.fixture(scope="module")
def both():
    """compat -> (model, params): the same parameters. One tokenizer reads two cameras."""
    observing = tiny.config()["observation_tokenizers"]
    stacked = observing["primary"] | dict(obs_keys=("image_primary", "image_side"), goal_keys=("image_primary",))
    changes = dict(observation_tokenizers=observing | dict(primary=stacked), readouts=dict(action=1, other=2))
    models = {compat: build_model(tiny.config(octo_compat=compat, **changes)) for compat in (False, True)}
    params = tiny.random_params(models[False], TWO_CAMERAS)
    return {compat: (model, params) for compat, model in models.items()}


TWO_CAMERAS = dataclasses.replace(
    tiny.SPEC, image_sizes={"primary": (32, 32), "side": (32, 32), "wrist": (16, 16)}, goal_images=("primary",)
)


def other_values(value):
    return (
        value ^ 0x55 if value.dtype == np.uint8 else (value + 3) % tiny.VOCAB if value.dtype.kind == "i" else value + 5
    )


@pytest.mark.parametrize(
    "mask_path,index,hidden",
    [
        ("task/language_instruction/attention_mask", (slice(None), slice(3, 6)), "task/language_instruction/input_ids"),
        ("observation/pad_mask_dict/proprio", slice(None), "observation/proprio"),
        ("observation/proprio_pad_mask", (slice(None), slice(None), 2), "observation/proprio"),
        ("task/pad_mask_dict/image_primary", slice(None), "task/image_primary"),
        ("observation/pad_mask_dict/image_side", slice(None), "observation/image_side"),
    ],
    ids=["padded words", "missing proprio", "padded dimension of proprio", "missing goal", "one missing camera of two"],
)
def test_what_is_missing_is_read_under_compat_only(both, mask_path, index, hidden):
    flat = dict(flatten(synthetic_batch(TWO_CAMERAS, 2, language_vocab=tiny.VOCAB)))
    flat["task/language_instruction/attention_mask"][:] = 1
    mask, value = flat[mask_path].copy(), flat[hidden].copy()
    mask[index] = 0
    where = index if mask.shape == value.shape else slice(None)
    value[where] = other_values(value[where])
    for compat, (model, params) in both.items():
        first, second = (
            outputs(model, params, unflatten(flat | {mask_path: mask, hidden: pixels}))[1]
            for pixels in (flat[hidden], value)
        )
        assert np.any(first != second) == compat


def test_a_missing_goal_is_black_under_compat_and_grey_otherwise(both):
    """Compat: as if a black image had been given. Correct: as if there were nothing; black is something else."""
    batch = synthetic_batch(TWO_CAMERAS, 2, language_vocab=tiny.VOCAB)
    black = changed(batch, "task/image_primary", np.zeros_like(batch["task"]["image_primary"]))
    absent = {k: v for k, v in batch["task"].items() if k != "image_primary"}
    absent["pad_mask_dict"] = {k: v for k, v in batch["task"]["pad_mask_dict"].items() if k != "image_primary"}
    for compat, (model, params) in both.items():
        first, second = (outputs(model, params, b)[1] for b in (black, batch | {"task": absent}))
        assert np.allclose(first, second, rtol=1e-5, atol=1e-6) == compat


def test_groups_of_padded_timesteps_are_masked_except_under_compat(both):
    batch = synthetic_batch(TWO_CAMERAS, 2, language_vocab=tiny.VOCAB)
    batch["observation"]["timestep_pad_mask"][0, 0] = False
    for compat, (model, params) in both.items():
        groups = outputs(model, params, batch)[0]
        for name in ("obs_task_language", "readout_action", "readout_other"):
            assert np.any(groups[name].mask[0, 0]) == compat, name
        for name in ("obs_primary", "obs_wrist", "obs_proprio"):
            assert not np.any(groups[name].mask[0, 0]), name
        # What stands in a padded readout reaches the readout of the next step under compat.
        moved = unflatten(dict(flatten(params)))
        moved["octo_transformer"]["readout_other_pos_embedding"] = params["octo_transformer"][
            "readout_other_pos_embedding"
        ].copy()
        moved["octo_transformer"]["readout_other_pos_embedding"][:, 0] *= -1
        other = outputs(model, moved, batch)[0]["readout_other"].tokens
        assert np.any(groups["readout_other"].tokens[0, 1] != other[0, 1]) == compat
        assert np.any(groups["readout_other"].tokens[1, 1] != other[1, 1]), "a valid one reaches it always"


def test_a_token_without_keys_averages_all_under_compat(both):
    """Words of a task without an instruction: what is observed later reaches them under compat, which nobody reads."""
    flat = dict(flatten(synthetic_batch(TWO_CAMERAS, 2, language_vocab=tiny.VOCAB)))
    flat["task/pad_mask_dict/language_instruction"] = np.array([False, True])
    moved = flat | {"observation/proprio": flat["observation/proprio"] + 1}
    for compat, (model, params) in both.items():
        first, second = (outputs(model, params, unflatten(f))[0]["task_language"].tokens for f in (flat, moved))
        assert np.any(first[0] != second[0]) == compat
        np.testing.assert_array_equal(first[1], second[1])


def test_masked_actions_reach_a_generative_head_under_compat_only():
    """The releases put a masked entry, noised, into the network that predicts the others."""
    for compat in (False, True):
        head = light.HeadAlone(tiny.diffusion() | dict(compat=compat))
        batch = light.batch(tiny.diffusion())
        batch["action_pad_mask"][..., 2] = False
        keys = jax.random.split(jax.random.key(0), 4)
        first = head.terms(batch, keys)["loss"]
        batch["action"] = batch["action"].copy()
        batch["action"][..., 2] += 1.0
        assert (head.terms(batch, keys)["loss"] != first) == compat


def test_values_above_normal_bins_go_to_bin_0_under_compat():
    x = jnp.array([-9.0, 0.01, 9.0])
    for compat, want in ((False, [0, 8, 15]), (True, [0, 8, 0])):
        np.testing.assert_array_equal(bin_index(x, 16, "normal", 0.0, 0.0, compat=compat), want)
