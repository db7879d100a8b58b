"""Properties of the whole network with every kind of head, on batches whose masks are drawn at random.

`test_masks.py` changes one input at a time and shows that unmasked it matters; here everything that is masked changes
at once, and all outputs are looked at: tokens, losses, samples.
"""

import dataclasses

import jax
import numpy as np
import pytest

from octo_like.common.schema import flatten, synthetic_batch, unflatten
from octo_like.model.octo import build_model, total_loss
from tests.model import light, tiny

ROWS, WINDOW = 4, 3
SIZES = dict(action_horizon=3, action_dim=4)
HEADS = dict(
    diffusion=tiny.diffusion(),
    flow=light.FLOW | dict(readout="readout_other", action_dim=2),
    regression=SIZES | dict(kind="regression", readout="obs", use_map=True),
    discrete=SIZES | dict(kind="discrete", readout="readout_other", token_per="", num_bins=8),
)
CHANGES = dict(heads=HEADS, readouts=dict(action=1, other=2))
KEYS = jax.random.split(jax.random.key(0), ROWS)


def spec_of(spec):
    return dataclasses.replace(spec, window_size=WINDOW, heads=tuple(HEADS))


@pytest.fixture(scope="module")
def network():
    """(params, outputs): a jitted (params, batch, keys) to (groups, loss terms, samples by head)."""
    model = build_model(tiny.config(**CHANGES))

    def run(module, batch, keys):
        groups = module.groups(batch["observation"], batch["task"])
        terms = module.loss_terms(batch, keys, False)
        return groups, terms, {name: head.sample(groups, keys) for name, head in module.heads.items()}

    outputs = jax.jit(lambda params, batch, keys: model.apply({"params": params}, batch, keys, method=run))
    return tiny.random_params(model, spec_of(tiny.SPEC)), outputs


def random_masks(spec, seed):
    """A batch with something missing everywhere; the present observation never is, as in data and at inference."""
    rng = np.random.default_rng([seed, 1])
    flat = dict(flatten(synthetic_batch(spec, ROWS, seed, language_vocab=tiny.VOCAB)))
    for path, leaf in flat.items():
        if leaf.dtype == bool and not path.endswith("timestep_pad_mask"):
            flat[path] = rng.random(leaf.shape) < 0.7
    begins = rng.integers(0, WINDOW, (ROWS, 1))
    flat["observation/timestep_pad_mask"] = np.arange(WINDOW) >= begins
    return unflatten(flat)


def scrambled(batch, seed):
    """The same batch with other values wherever a mask says that there is nothing."""
    rng = np.random.default_rng([seed, 2])
    flat = dict(flatten(batch))
    steps = flat["observation/timestep_pad_mask"]
    out = {}
    for path, leaf in flat.items():
        room, name = path.split("/")[0], path.rsplit("/", 1)[-1]
        valid = np.ones(leaf.shape, bool)
        spread = lambda mask, leaf=leaf: mask.reshape(*mask.shape, *[1] * (leaf.ndim - mask.ndim))  # noqa: E731
        if name in ("timestep", "dataset_id", "sample_id"):  # the network does not read them
            valid &= False
        if room == "observation" and name != "timestep_pad_mask":
            valid = valid & spread(steps)
        if path == "action" or path == "action_pad_mask":
            valid = valid & spread(steps)
        if path == "action":
            valid = valid & flat["action_pad_mask"]
        if path == "observation/proprio":
            valid = valid & flat["observation/proprio_pad_mask"]
        if "pad_mask" not in path and f"{room}/pad_mask_dict/{name}" in flat:
            valid = valid & spread(flat[f"{room}/pad_mask_dict/{name}"])
        if "language_instruction/" in path:
            valid = valid & spread(flat["task/pad_mask_dict/language_instruction"])
        if name == "input_ids":
            valid = valid & (flat["task/language_instruction/attention_mask"] > 0)
        if leaf.dtype == bool:
            other = rng.random(leaf.shape) < 0.5
        elif name == "attention_mask":
            other = rng.integers(0, 2, leaf.shape)
        elif leaf.dtype.kind in "iu":
            other = rng.integers(0, 255 if leaf.dtype == np.uint8 else tiny.VOCAB, leaf.shape)
        else:
            other = rng.normal(scale=1e3, size=leaf.shape)
        out[path] = np.where(valid, leaf, other.astype(leaf.dtype))
    return unflatten(out)


def assert_same(first, second):
    for (path, a), (_, b) in zip(flatten(first), flatten(second), strict=True):
        np.testing.assert_array_equal(a, b, path)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_masked_changes_no_bit_of_what_is_valid(network, seed):
    params, outputs = network
    batch = random_masks(spec_of(tiny.SPEC), seed)
    other = scrambled(batch, seed)
    changed = [path for (path, a), (_, b) in zip(flatten(batch), flatten(other), strict=True) if np.any(a != b)]
    assert {"action", "observation/image_primary", "observation/image_wrist", "observation/proprio"} <= set(changed)
    (groups, terms, samples), (groups2, terms2, samples2) = (outputs(params, b, KEYS) for b in (batch, other))
    for name, group in groups.items():
        np.testing.assert_array_equal(group.mask, groups2[name].mask, name)
        valid = np.asarray(group.mask)
        np.testing.assert_array_equal(np.asarray(group.tokens)[valid], np.asarray(groups2[name].tokens)[valid], name)
    assert_same(terms, terms2)
    assert_same(samples, samples2)
    for _, value in flatten(terms):
        assert np.isfinite(value)


def test_permuted_rows_give_permuted_outputs(network):
    params, outputs = network
    batch, order = random_masks(spec_of(tiny.SPEC), 7), np.array([2, 0, 3, 1])
    permuted = unflatten({path: leaf[order] for path, leaf in flatten(batch)})
    groups, terms, samples = outputs(params, batch, KEYS)
    groups2, terms2, samples2 = outputs(params, permuted, KEYS[order])
    for name, group in groups.items():
        np.testing.assert_allclose(groups2[name].tokens, group.tokens[order], rtol=1e-4, atol=1e-5, err_msg=name)
    for name, sample in samples.items():
        np.testing.assert_allclose(samples2[name], sample[order], rtol=1e-3, atol=1e-4, err_msg=name)
    for (path, a), (_, b) in zip(flatten(terms), flatten(terms2), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("readout", ["action", "other"])
def test_readouts_change_no_other_token(network, readout):
    params, outputs = network
    batch = random_masks(spec_of(tiny.SPEC), 8)
    moved = unflatten(dict(flatten(params)))
    embedding = moved["octo_transformer"][f"readout_{readout}_pos_embedding"]
    # Another direction, not just a shift: layer norms would take that away.
    moved["octo_transformer"][f"readout_{readout}_pos_embedding"] = embedding[..., ::-1] + 1.0
    (groups, terms, _), (groups2, terms2, _) = (outputs(p, batch, KEYS) for p in (params, moved))
    for name, group in groups.items():
        same = np.array_equal(group.tokens, groups2[name].tokens)
        assert same == (name != f"readout_{readout}"), name
    for head, entry in HEADS.items():
        assert (terms[head]["loss"] == terms2[head]["loss"]) == (entry["readout"] != f"readout_{readout}"), head


@pytest.mark.parametrize("after", [0, 1])
def test_the_future_changes_nothing_before_it(network, after):
    """Observations and actions later than a timestep: tokens and losses up to it stay the same, bit by bit."""
    params, outputs = network
    flat = dict(flatten(random_masks(spec_of(tiny.SPEC), 9)))
    flat["observation/timestep_pad_mask"] = np.ones((ROWS, WINDOW), bool)
    flat["action_pad_mask"] = flat["action_pad_mask"] & (np.arange(WINDOW) <= after)[:, None, None]
    other = dict(flat)
    rng = np.random.default_rng(0)
    for path, leaf in flat.items():
        if path == "action" or (path.startswith("observation/") and leaf.dtype != bool):
            other[path] = leaf.copy()
            other[path][:, after + 1 :] = rng.integers(0, 100, leaf[:, after + 1 :].shape)
        elif path.startswith("observation/pad_mask_dict/"):
            other[path] = leaf.copy()
            other[path][:, after + 1 :] ^= True
    (groups, terms, samples), (groups2, terms2, samples2) = (outputs(params, unflatten(f), KEYS) for f in (flat, other))
    for name, group in groups.items():
        upto = slice(None) if name.startswith("task") else slice(0, after + 1)
        np.testing.assert_array_equal(group.tokens[:, upto], groups2[name].tokens[:, upto], name)
    assert_same(terms, terms2)
    assert all(np.any(samples[name] != samples2[name]) for name in HEADS)


def test_the_gradient_does_not_depend_on_the_split_of_a_batch():
    """Unequal masks, heads absent from a part, dropout and noise: two halves add up to the whole, either way."""
    transformer = dict(num_layers=1, num_heads=2, mlp_dim=32, dropout_rate=0.2, attention_dropout_rate=0.2)
    model = build_model(light.config(**CHANGES, transformer=transformer))
    spec = spec_of(light.SPEC)
    params = tiny.random_params(model, spec)
    batch = random_masks(spec, 10)
    batch["action_head_mask"]["flow"] = np.array([True, False, True, False])
    counts = model.counts(batch)

    @jax.jit
    def gradient(params, batch, keys):
        def loss(params):
            terms = model.apply({"params": params}, batch, keys, True, method="loss_terms")
            return total_loss(model, terms, counts), terms

        return jax.value_and_grad(loss, has_aux=True)(params)

    whole = gradient(params, batch, KEYS)
    for halves in (([0, 1], [2, 3]), ([0, 2], [1, 3])):
        parts = [
            gradient(params, unflatten({path: leaf[rows] for path, leaf in flatten(batch)}), KEYS[np.array(rows)])
            for rows in halves
        ]
        total = jax.tree.map(lambda a, b: a + b, *parts)
        assert np.isclose(total[0][0], whole[0][0], rtol=1e-5)
        for (path, want), (_, got) in zip(flatten(whole[1]), flatten(total[1]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=path)
        for (path, want), (_, got) in zip(flatten(whole[0][1]), flatten(total[0][1]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=path)
