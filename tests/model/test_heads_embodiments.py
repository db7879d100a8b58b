"""Heads per embodiment in one batch (as in CrossFormer, Doshi et al. 2024): each sample trains its own and no other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import flatten, synthetic_batch, unflatten
from octo_like.model.heads import check_datasets
from octo_like.model.octo import build_model, total_loss
from octo_like.policy.policy import Policy
from tests.model import light, tiny

# Single arm, bimanual (50 Hz), navigation.
HEADS = dict(
    arm=dict(kind="diffusion", readout="readout_arm", action_horizon=4, action_dim=7, num_steps=3, hidden_dim=8),
    bimanual=dict(kind="regression", loss="l1", readout="readout_bimanual", action_horizon=100, action_dim=14),
    navigation=dict(
        kind="flow", readout="readout_nav", action_horizon=4, action_dim=2, hidden_dim=8, sample_steps=2, weight=0.25
    ),
    tokens=dict(
        kind="discrete", readout="readout_nav", token_per="", action_horizon=4, action_dim=2, num_bins=8, weight=3.0
    ),
)
READOUTS = dict(arm=1, bimanual=5, nav=1)
SPEC = dataclasses.replace(light.SPEC, action_horizon=100, action_dim=14, heads=tuple(HEADS))
CONFIG = light.config(heads=HEADS, readouts=READOUTS)
OWNER = ["arm", "bimanual", "arm", "navigation"]  # of every row


def padded_batch():
    """A batch of four samples of three embodiments, padded to 100 x 14."""
    batch = synthetic_batch(SPEC, 4, language_vocab=tiny.VOCAB)
    for row, owner in enumerate(OWNER):
        batch["action_pad_mask"][row, ..., HEADS[owner]["action_dim"] :] = False
    names = {"tokens": "navigation"}  # navigation trains two heads at once
    batch["action_head_mask"] = {head: np.array([owner == names.get(head, head) for owner in OWNER]) for head in HEADS}
    return batch


def rows_of(batch, rows):
    return unflatten({path: np.asarray(leaf)[rows] for path, leaf in flatten(batch)})


@pytest.fixture(scope="module")
def model():
    model = build_model(CONFIG)
    return model, tiny.random_params(model, SPEC)


@pytest.fixture(scope="module")
def gradient(model):
    """(params, batch, keys) to ((loss, terms), gradient)."""
    model, _ = model

    def loss(params, batch, keys):
        terms = model.apply({"params": params}, batch, keys, False, method="loss_terms")
        return total_loss(model, terms, model.counts(batch)), terms

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def of_head(grads, head):
    readout = f"octo_transformer/readout_{HEADS[head]['readout'].removeprefix('readout_')}_pos_embedding"
    return {path: leaf for path, leaf in flatten(grads) if path.startswith((f"heads_{head}/", readout))}


def test_counts_are_those_of_each_heads_own_entries(model, gradient):
    model, params = model
    batch, keys = padded_batch(), jax.random.split(jax.random.key(0), 4)
    (loss, terms), grads = gradient(params, batch, keys)
    want = {"arm": 2 * 2 * 28, "bimanual": 2 * 1400, "navigation": 2 * 8, "tokens": 2 * 8}
    assert {head: int(part["count"]) for head, part in terms.items()} == want
    by_hand = sum(
        float(HEADS[head].get("weight", 1.0)) * float(part["loss"]) / want[head] for head, part in terms.items()
    )
    assert np.isclose(loss, by_hand, rtol=1e-6)
    assert all(np.all(np.isfinite(leaf)) for _, leaf in flatten(grads))
    for head in HEADS:
        assert all(np.any(leaf) for path, leaf in of_head(grads, head).items() if path.endswith("kernel"))


def test_absent_heads_have_no_gradient_at_all(model, gradient):
    """Exactly zero, in their parameters and in their readout's, whatever stands in the actions they would have read."""
    _, params = model
    keys = jax.random.split(jax.random.key(0), 4)
    for present, absent in ((["arm"], ["bimanual", "navigation", "tokens"]), (["bimanual"], ["arm", "navigation"])):
        batch = padded_batch()
        for head in HEADS:
            batch["action_head_mask"][head] &= head in present
        batch["action"][np.array([owner in absent for owner in OWNER])] = 1e30
        grads = gradient(params, batch, keys)[1]
        for head in absent:
            leaves = of_head(grads, head)
            assert len(leaves) > 2 and all(not np.any(leaf) for leaf in leaves.values()), head
        assert any(np.any(leaf) for leaf in of_head(grads, present[0]).values())


def test_a_head_learns_what_it_would_learn_alone(model, gradient):
    """Its gradient in the mixed batch is that of a batch in which the other embodiments' rows hold something else."""
    _, params = model
    batch, keys = padded_batch(), jax.random.split(jax.random.key(0), 4)
    mixed = gradient(params, batch, keys)[1]
    other = synthetic_batch(SPEC, 4, seed=9, language_vocab=tiny.VOCAB)
    mine = np.array([owner == "arm" for owner in OWNER])
    flat, replaced = dict(flatten(batch)), dict(flatten(other))
    swapped = unflatten(
        {
            path: leaf if "mask" in path else np.where(mine.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, replaced[path])
            for path, leaf in flat.items()
        }
    )
    alone = gradient(params, swapped, keys)[1]
    for path, leaf in of_head(mixed, "arm").items():
        np.testing.assert_allclose(of_head(alone, "arm")[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    changed = of_head(alone, "bimanual")
    assert any(np.any(leaf != changed[path]) for path, leaf in of_head(mixed, "bimanual").items())


def lowered_sample(model, params, head):
    batch = synthetic_batch(SPEC, 2, language_vocab=tiny.VOCAB)
    keys = jax.random.split(jax.random.key(0), 2)

    def sample(params):
        return model.apply({"params": params}, batch["observation"], batch["task"], keys, head=head, method="sample")

    return jax.jit(sample).lower(params).cost_analysis()["flops"]


def test_absent_readouts_cost_nothing_at_inference(model):
    """By XLA's count: sampling one head of many takes the operations of a model that has no other, to the last one."""
    model, params = model
    for head in ("arm", "bimanual"):
        readout = HEADS[head]["readout"].removeprefix("readout_")
        single = build_model(light.config(heads={head: HEADS[head]}, readouts={readout: READOUTS[readout]}))
        own = {
            path: leaf
            for path, leaf in flatten(params)
            if not path.startswith(tuple(f"heads_{other}/" for other in HEADS if other != head))
            and ("/readout_" not in path or f"/readout_{readout}_" in path)
        }
        assert lowered_sample(model, params, head) == lowered_sample(single, unflatten(own), head)
    assert lowered_sample(model, params, "arm") < lowered_sample(model, params, "bimanual")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("only", ["readout_nav", "obs", "obs_proprio"])
def test_what_a_head_reads_is_the_same_when_nothing_else_is_computed(legacy, only):
    model = build_model(CONFIG | dict(legacy_attention=legacy, octo_compat=legacy))
    params = tiny.random_params(model, SPEC)
    batch = synthetic_batch(SPEC, 2, language_vocab=tiny.VOCAB)
    batch["observation"]["timestep_pad_mask"][0, 0] = False

    def run(module, only):
        return module.octo_transformer(batch["observation"], batch["task"], only_last=only)

    every, one = (
        jax.jit(lambda params, only=only: model.apply({"params": params}, only, method=run))(params)
        for only in (None, only)
    )
    assert only in one and {"task", "task_language", "readout_arm"} <= set(every)
    assert not {"task", "task_language", "readout_arm"} & set(one)
    for name, group in one.items():
        if only != "obs" and name == "obs":
            continue  # that is what is there of it
        np.testing.assert_allclose(group.tokens, every[name].tokens[:, -1:], rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(group.mask, every[name].mask[:, -1:], name)


def test_a_head_that_reads_no_group_of_the_sequence_is_told():
    model = build_model(CONFIG)
    batch = synthetic_batch(SPEC, 2, language_vocab=tiny.VOCAB)
    with pytest.raises(ValueError, match=r"no group 'readout_x'.*'obs', 'obs_proprio'"):
        jax.eval_shape(
            lambda p: model.apply(
                {"params": p},
                method=lambda m: m.octo_transformer(batch["observation"], batch["task"], only_last="readout_x"),
            ),
            tiny.random_params(model, SPEC),
        )


def test_datasets_must_fit_their_heads(model):
    heads = model[0].heads

    def entry(head, width):
        return {"head": head, "action": {"mean": np.zeros(width)}}

    assert check_datasets(heads, {"a": entry("arm", 7), "b": entry("navigation", 1)}) == ["bimanual", "tokens"]
    assert check_datasets(heads, {"synthetic": {"action": {"mean": np.zeros(14)}}}) == []
    with pytest.raises(ValueError, match="car: its actions have 3 dimensions, but its head 'navigation' has 2"):
        check_datasets(heads, {"car": entry("navigation", 3)})
    with pytest.raises(ValueError, match="car: no action head 'base'; valid: .*'arm'"):
        check_datasets(heads, {"car": entry("base", 3)})


def test_a_policy_takes_the_head_that_learned_from_the_dataset(model):
    _, params = model
    config = {"model": CONFIG, "batch_spec": dataclasses.replace(SPEC, language_length=None).to_json()}
    statistics = {
        name: {
            "action": {"mean": np.zeros(width), "std": np.ones(width), "mask": np.ones(width, bool)},
            "normalization": "normal",
            "head": head,
        }
        for name, head, width in (("car", "navigation", 2), ("aloha", "bimanual", 14))
    }
    policy = Policy(config, params, statistics)
    assert policy.chunk_horizon("car") == 4 and policy.chunk_horizon("aloha") == policy.chunk_horizon(head="bimanual")
    assert policy.chunk_horizon("aloha") == 100
    with pytest.raises(ValueError, match="'action'; valid"):
        policy.chunk_horizon()
    observation = {"timestep_pad_mask": np.ones((2, 2), bool)}
    tasks = {"timestep": np.zeros(2, np.int32), "pad_mask_dict": {}}
    for head in (None, "navigation", "tokens"):
        chunk = jax.eval_shape(
            lambda key, head=head: policy.sample_actions(
                observation, tasks, rng=key, unnormalize="car", head=head, check_finite=False
            ),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
        assert chunk.shape == (2, 4, 2)


def test_a_head_of_another_modality_reads_only_what_its_samples_have(model, gradient):
    """Tokenizers per embodiment: rows without proprio train it with nothing, whatever stands in its place."""
    _, params = model
    keys = jax.random.split(jax.random.key(0), 4)
    batch = padded_batch()
    batch["observation"]["pad_mask_dict"]["proprio"][1] = False  # the bimanual row has none
    batch["task"]["pad_mask_dict"]["language_instruction"][0] = False
    first = gradient(params, batch, keys)
    batch["observation"]["proprio"][1] = 1e6
    batch["task"]["language_instruction"]["input_ids"][0] = 3
    second = gradient(params, batch, keys)
    for (path, a), (_, b) in zip(flatten(first[1]), flatten(second[1]), strict=True):
        np.testing.assert_array_equal(a, b, path)
    for head in HEADS:  # only the bimanual row trains now: the tokenizer of proprio learns nothing
        batch["action_head_mask"][head] &= head == "bimanual"
    grads = gradient(params, batch, keys)[1]
    kernel = grads["octo_transformer"]["obs_proprio_projection"]["kernel"]
    assert not np.any(kernel) and np.any(jnp.asarray(grads["heads_bimanual"]["mean_proj"]["kernel"]))
