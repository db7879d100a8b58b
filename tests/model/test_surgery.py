"""Surgery: which parts a model gets, how weights reach them, what stays frozen."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import flatten, synthetic_batch, unflatten
from octo_like.model.octo import build_model
from octo_like.policy import surgery
from octo_like.policy.describe import abstract_params
from octo_like.policy.pretrained import PretrainedError, merge_params
from tests.model import light, tiny

BASE = tiny.config()


def shapes_of(config, spec=tiny.SPEC):
    return abstract_params(build_model(config), spec)


def merged(old_config, new_config, changes, *, old_spec=tiny.SPEC, new_spec=tiny.SPEC, **kwargs):
    """(old params, initial new params, merged params, report), all flat."""
    old = tiny.random_values(shapes_of(old_config, old_spec), seed=1)
    new = tiny.random_values(shapes_of(new_config, new_spec), seed=2)
    rules = surgery.carry(old_config, new_config, changes)
    tree, report = merge_params(new, old, copies=rules.copies, resize=rules.resize, anew=rules.anew, **kwargs)
    return dict(flatten(old)), dict(flatten(new)), dict(flatten(tree)), report


# ---------------------------------------------------------------------------------------------------------------- parts


def test_fields_of_a_part_are_changed_without_repeating_the_others():
    new = surgery.operate(BASE, {"heads": {"action": {"action_dim": 14}}})
    assert new["heads"]["action"] == BASE["heads"]["action"] | {"action_dim": 14, "resized_from": [[3, 4]]}
    assert BASE["heads"]["action"]["action_dim"] == 4, "the pretrained config is left alone"
    assert surgery.operate(BASE, {"max_window": None})["max_window"] == 4
    assert surgery.operate(BASE, {"max_window": 9})["max_window"] == 9
    assert surgery.operate(BASE, {"readouts": {"extra": 2}})["readouts"] == {"action": 1, "extra": 2}


def test_a_replacement_says_what_it_drops():
    """`operate` takes a part with a kind as it is: fields of the present part that it does not repeat are gone."""
    head = {"kind": "diffusion", "readout": "readout_action", "action_horizon": 3, "action_dim": 8}
    changes = {"heads": {"action": head}}
    assert "hidden_dim" not in surgery.operate(BASE, changes)["heads"]["action"]
    (said,) = surgery.replaced(BASE, changes)
    assert said.startswith("surgery.heads.action replaces the present 'diffusion', and with it ")
    dropped = BASE["heads"]["action"].keys() - head.keys()
    assert dropped and all(f"{field}=" in said for field in dropped)
    assert "action_dim=" not in said and "--config.surgery.heads.action.FIELD=VALUE" in said
    # What changes fields, repeats them all, adds or removes loses nothing.
    whole = BASE["heads"]["action"] | {"action_dim": 8}
    for entry in ({"action_dim": 8}, whole, {"copy_of": "action", "action_dim": 8}, None):
        assert not surgery.replaced(BASE, {"heads": {"action": entry}, "max_window": 5})
    assert not surgery.replaced(BASE, {"heads": {"mine": head}, "readouts": {"action": 2}})
    # A stem is a dict in a field: it, too, is replaced whole.
    (said,) = surgery.replaced(BASE, {"observation_tokenizers": {"primary": {"stem": {"kind": "small"}}}})
    assert said.startswith("surgery.observation_tokenizers.primary.stem replaces ") and "'kind'" in said


def test_the_report_counts_what_is_lost():
    """A replaced head's parameters that fit nowhere and those of a removed camera, and what is new in their place."""
    changes = {"heads": {"action": BASE["heads"]["action"] | {"hidden_dim": 24}},
               "observation_tokenizers": {"wrist": None}}  # fmt: skip
    new = surgery.operate(BASE, changes)
    spec = dataclasses.replace(tiny.SPEC, image_sizes={"primary": (32, 32)})
    old, _, tree, report = merged(BASE, new, changes, new_spec=spec)
    kept = {path for path in tree if report.status[path] != "new"}
    assert report.lost == {path: leaf.size for path, leaf in old.items() if path not in kept}
    of_head = sum(size for path, size in report.lost.items() if path.startswith("heads_action/"))
    made = sum(leaf.size for path, leaf in tree.items() if path not in kept)
    assert of_head and any("wrist" in path for path in report.lost)
    lost = next(line for line in str(report).splitlines() if line.startswith("lost of the checkpoint: "))
    assert f"{sum(report.lost.values()):,} parameters" in lost and f"heads_action {of_head:,}" in lost
    assert f"new here: {made:,} parameters (heads_action " in str(report)
    assert report.to_dict()["lost"] == report.lost
    widened, spec = {"heads": {"action": {"action_dim": 9}}}, dataclasses.replace(tiny.SPEC, action_dim=9)
    report = merged(BASE, surgery.operate(BASE, widened), widened, new_spec=spec)[3]
    assert "lost of the checkpoint: nothing" in str(report) and "new here: nothing" in str(report)


def test_a_copied_camera_starts_from_the_weights_of_the_other():
    changes = {"observation_tokenizers": {"secondary": {"copy_of": "primary"}}}
    new = surgery.operate(BASE, changes)
    assert new["observation_tokenizers"]["secondary"]["obs_keys"] == ("image_secondary",)
    assert new["observation_tokenizers"]["secondary"]["goal_keys"] == ("image_secondary",)
    sizes = {**tiny.SPEC.image_sizes, "secondary": (32, 32)}
    spec = dataclasses.replace(tiny.SPEC, image_sizes=sizes)
    old, _, tree, report = merged(BASE, new, changes, new_spec=spec)
    pairs = {path: path.replace("secondary", "primary") for path in tree if "secondary" in path}
    assert len(pairs) == len([path for path in tree if "primary" in path]) > 5
    positions = "octo_transformer/obs_secondary_pos_embedding"
    for path, origin in pairs.items():
        assert origin in report.notes[path]
        if path != positions:
            np.testing.assert_array_equal(tree[path], old[origin])
            assert report.status[path] == "loaded"
    assert not report.unused
    # All tokens are moved by one vector as large as the embeddings are: places keep their distances, cameras differ.
    was = old[pairs[positions]]
    moved = tree[positions] - was
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1, :1], moved.shape), atol=1e-6)
    np.testing.assert_allclose(np.square(moved).mean(), np.square(was).mean(), rtol=1e-4)
    assert report.status[positions] == "resized" and "moved by a vector of its own" in report.notes[positions]


def test_a_copied_camera_with_a_longer_window_keeps_its_rows():
    changes = {"observation_tokenizers": {"secondary": {"copy_of": "primary"}}, "max_window": 6}
    sizes = {**tiny.SPEC.image_sizes, "secondary": (32, 32)}
    spec = dataclasses.replace(tiny.SPEC, image_sizes=sizes)
    old, new, tree, _ = merged(BASE, surgery.operate(BASE, changes), changes, new_spec=spec)
    path = "octo_transformer/obs_secondary_pos_embedding"
    was = old[path.replace("secondary", "primary")]
    moved = tree[path][:, : was.shape[1]] - was
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1, :1], moved.shape), atol=1e-6)
    np.testing.assert_array_equal(tree[path][:, was.shape[1] :], new[path][:, was.shape[1] :])


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"tokenizers": {}}, ["tokenizers", "observation_tokenizers"]),
        ({"heads": {"arm": None}}, ["removes heads.arm", "action"]),
        ({"heads": {"arm": {"action_dim": 3}}}, ["heads.arm", "kind", "action"]),
        ({"observation_tokenizers": {"top": {"copy_of": "front"}}}, ["front", "primary", "wrist"]),
    ],
)
def test_surgery_on_what_is_not_there(changes, words):
    with pytest.raises(PretrainedError) as error:
        surgery.operate(BASE, changes)
    for word in words:
        assert word in str(error.value)


# ------------------------------------------------------------------------------------------------------------ resizing

HEADS = {
    "diffusion": tiny.diffusion(),
    "flow": light.FLOW,
    "regression": dict(kind="regression", readout="readout_action", action_horizon=3, action_dim=4),
    "map": dict(kind="regression", readout="obs", use_map=True, action_horizon=3, action_dim=4),
    "chunk": dict(kind="discrete", readout="readout_action", token_per="", action_horizon=3, action_dim=4, num_bins=5),
    "step": dict(kind="discrete", readout="obs", use_map=True, token_per="action_horizon", action_horizon=3,
                 action_dim=4, num_bins=5),
    "entry": dict(kind="discrete", readout="obs", use_map=True, action_horizon=3, action_dim=4, num_bins=5),
}  # fmt: skip


@pytest.mark.parametrize("size", [(5, 6), (2, 3), (3, 14)])
@pytest.mark.parametrize("kind", HEADS)
def test_a_resized_head_predicts_what_it_did_for_what_it_knew(kind, size):
    """New dimensions and steps do not disturb the old ones: the outputs for those are equal."""
    before = light.HeadAlone(HEADS[kind], seed=1)
    entry = HEADS[kind] | dict(action_horizon=size[0], action_dim=size[1])
    after = light.HeadAlone(entry, seed=2)
    after.groups = before.groups
    rules = surgery.carry({"heads": {"action": HEADS[kind]}}, {"heads": {"action": entry}}, {})
    other = {"x": np.zeros(2, np.float32)}  # something has to be loaded whole
    tree, report = merge_params(
        {"heads_action": after.params, "other": other},
        {"heads_action": before.params, "other": other},
        resize=rules.resize,
    )
    params = tree["heads_action"]
    resized = [path for path, status in report.status.items() if status == "resized"]
    assert resized and "new" not in report.status.values()
    h, a = min(3, size[0]), min(4, size[1])

    def outputs(head, params, horizon, dim):
        if kind in ("diffusion", "flow"):
            noisy = np.zeros((2, horizon, dim), np.float32)
            noisy[:, :h, :a] = np.random.default_rng(0).normal(size=(2, 3, 4))[:, :h, :a]
            embedding = np.random.default_rng(1).normal(size=(2, 16)).astype(np.float32)
            network = "diffusion_model" if kind == "diffusion" else "flow_model"
            out = head.apply(
                method=lambda m: getattr(m, network)(embedding, noisy.reshape(2, -1), np.full((2, 1), 2)), params=params
            )
            return out.reshape(2, horizon, dim)
        if kind in ("regression", "map"):
            return head.apply(head.groups, method="predict", params=params)
        return head.apply(head.groups, method="logits", params=params)

    one = np.asarray(outputs(before, before.params, 3, 4))
    other = np.asarray(outputs(after, params, *size))
    index = (
        (slice(None),) * (one.ndim - 2) if kind in ("diffusion", "flow", "regression", "map") else (slice(None),) * 2
    )
    np.testing.assert_allclose(one[(*index, slice(h), slice(a))], other[(*index, slice(h), slice(a))], atol=1e-5)


RESIZED = {
    "ddpm": dict(kind="diffusion", hidden_dim=64),
    "ddim": dict(kind="diffusion", hidden_dim=48, prediction="action", sampler="ddim", sample_steps=4, max_delay=1),
    "flow": dict(kind="flow", hidden_dim=96, sample_steps=4),
    "mse": dict(kind="regression"),
    "l1": dict(kind="regression", loss="l1"),
    "discrete": dict(kind="discrete", num_bins=11, token_per=""),
}


def resized(entry, *sizes, rows=1, seed=1):
    """(head, its parameters) for the head of an entry and for every size that it is given, one after the other."""
    entry = dict(readout="readout_action", action_horizon=4, action_dim=7) | entry
    head = light.HeadAlone(entry, rows=rows, seed=seed)
    found = [(head, head.params)]
    for h, a in sizes:
        old, changes = {"heads": {"action": entry}}, {"heads": {"action": dict(action_horizon=h, action_dim=a)}}
        new = surgery.operate(old, changes)
        entry = new["heads"]["action"]
        other = {"x": np.zeros(2, np.float32)}  # something has to be loaded whole
        grown = light.HeadAlone(entry, rows=rows, seed=seed + len(found))
        source = {"heads_action": found[-1][1], "other": other}
        rules = surgery.carry(old, new, changes)
        tree, _ = merge_params({"heads_action": grown.params, "other": other}, source, resize=rules.resize)
        grown.groups = head.groups
        found.append((grown, tree["heads_action"]))
    return found


def drawn(head, params, **options):
    keys = jax.random.split(jax.random.key(5), head.groups["readout_action"].tokens.shape[0])
    sample = lambda params, keys: head.apply(head.groups, keys, method="sample", params=params, **options)  # noqa: E731
    return np.asarray(jax.jit(sample)(params, keys))


@pytest.mark.parametrize("kind,rows,size", [(kind, 1, (9, 14)) for kind in RESIZED] + [("flow", 3, (4, 14))])
def test_a_larger_head_acts_bitwise_as_before_in_what_it_had(kind, rows, size):
    """Products and draws of other shapes are rounded and drawn otherwise: the old entries keep theirs."""
    (old, old_params), (new, params) = resized(RESIZED[kind], size, rows=rows)
    before, after = (drawn(*one, sample_shape=(2,)) for one in ((old, old_params), (new, params)))
    np.testing.assert_array_equal(after[..., :4, :7], before)
    assert np.std(after[..., 7:]) > 0.1, "new entries move"
    if kind in ("mse", "discrete"):
        return
    # Whatever the new rows of what the network gives are.
    wild = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.at[..., -1].set(1e3) if "Dense_1" in str(path[-2]) and leaf.shape[-1] == 56 else leaf,
        jax.tree.map(jnp.asarray, params),
    )
    np.testing.assert_array_equal(drawn(new, wild, sample_shape=(2,))[..., :4, :7], before)


@pytest.mark.parametrize("kind", ["flow", "l1"])
def test_a_head_is_resized_again_and_again(kind):
    steps = resized(RESIZED[kind], (4, 9), (6, 14), (6, 16))
    assert [list(map(list, head.module.resized_from)) for head, _ in steps] == [
        [],
        [[4, 7]],
        [[4, 7], [4, 9]],
        [[4, 7], [4, 9], [6, 14]],
    ]
    chunks = [drawn(*one) for one in steps]
    for before, after in itertools.pairwise(chunks):
        np.testing.assert_array_equal(after[..., : before.shape[-2], : before.shape[-1]], before)


def test_a_smaller_head_acts_as_before_where_what_is_gone_is_zero():
    """A regression is not concerned; a network that reads the chunk reads zero in the place of what it has no more."""
    (old, old_params), (new, params) = resized(RESIZED["mse"], (2, 5))
    np.testing.assert_array_equal(drawn(new, params), drawn(old, old_params)[..., :2, :5])
    (old, old_params), (new, params) = resized(RESIZED["flow"], (2, 5))
    x, embedding = np.zeros((1, 4, 7), np.float32), np.ones((1, 16), np.float32)
    x[:, :2, :5] = np.random.default_rng(0).normal(size=(2, 5))

    def velocity(head, params, x):
        return head.apply(method=lambda m: m.predict_velocity(embedding, x, np.full((1, 1), 0.5)), params=params)

    before, after = velocity(old, old_params, x.reshape(1, -1)), velocity(new, params, x[:, :2, :5].reshape(1, -1))
    np.testing.assert_array_equal(after.reshape(1, 2, 5), before.reshape(1, 4, 7)[:, :2, :5])


def test_a_resized_head_learns_its_new_entries():
    """Rows that are zero at first have a gradient, and what it gives for them is of the loss."""
    _, (head, params) = resized(RESIZED["ddim"], (5, 9), rows=3)
    batch, keys = light.batch(dict(action_horizon=5, action_dim=9), rows=3), jax.random.split(jax.random.key(0), 3)
    loss = lambda params: head.apply(  # noqa: E731
        head.groups, batch["action"], np.ones((3, 2, 5, 9), np.float32), keys, method="loss_terms", params=params
    )["loss"]
    network = jax.jit(jax.grad(loss))(params)["diffusion_model"]["reverse_network"]
    kernel = params["diffusion_model"]["reverse_network"]["Dense_0"]["kernel"][-45:].reshape(5, 9, -1)
    assert not np.asarray(kernel[4:]).any() and not np.asarray(kernel[:, 7:]).any()
    gradient = np.asarray(network["Dense_0"]["kernel"][-45:])
    assert np.abs(gradient).max(-1).min() > 0 and np.abs(network["Dense_1"]["bias"]).min() > 0


def test_a_replaced_head_of_the_same_kind_keeps_its_sizes_too():
    whole = BASE["heads"]["action"] | {"action_dim": 6}
    once = surgery.operate(BASE, {"heads": {"action": whole}})
    assert once["heads"]["action"]["resized_from"] == [[3, 4]]
    again = surgery.operate(once, {"heads": {"action": whole | {"action_horizon": 5}}})["heads"]["action"]
    assert again["resized_from"] == [[3, 4], [3, 6]]
    assert not surgery.replaced(once, {"heads": {"action": whole | {"action_horizon": 5}}})
    other = {"kind": "flow", "readout": "readout_action", "action_horizon": 3, "action_dim": 8}
    assert "resized_from" not in surgery.operate(once, {"heads": {"action": other}})["heads"]["action"]
    for wrong in ([[0, 4]], [[3, 4.0]]):
        with pytest.raises(ValueError, match="resized_from holds the pairs"):
            light.HeadAlone(HEADS["regression"] | {"resized_from": wrong})


def test_a_policy_with_a_resized_head_samples_bitwise_as_before():
    """Through the whole model, with factors of LoRA beside its kernels, and after an export."""
    from octo_like.policy import lora

    keys, batch = jax.random.split(jax.random.key(3), 2), synthetic_batch(light.SPEC, 2)
    config = light.config(heads={"action": light.FLOW})
    changes = {"heads": {"action": {"action_dim": 11, "action_horizon": 5}}}
    new = surgery.operate(config, changes)
    spec = dataclasses.replace(light.SPEC, action_dim=11, action_horizon=5)
    _, _, tree, _ = merged(config, new, changes, old_spec=light.SPEC, new_spec=spec)
    old = tiny.random_values(shapes_of(config, light.SPEC), seed=1)
    factors = lora.LoraSpec(2, targets=("BlockTransformer_0/.*/kernel",))
    params = unflatten(tree)
    adapted = lora.add_adapters(params, lora.find_targets(params, factors), factors, jax.random.key(0))

    def sample(model, params):
        call = lambda params: model.apply(  # noqa: E731
            {"params": params}, batch["observation"], batch["task"], keys, head="action", method="sample"
        )
        return np.asarray(jax.jit(call)(params))

    before = sample(build_model(config), old)
    grown = build_model(json.loads(json.dumps(new)))  # as an export's config comes back
    np.testing.assert_array_equal(sample(grown, params)[..., :3, :4], before)
    np.testing.assert_array_equal(sample(lora.AdaptedModel(grown, factors), adapted)[..., :3, :4], before)


def test_tokens_of_a_resized_chunk_keep_their_places():
    """What is said first, and what a step's first dimensions are told by their place, stays; the rest begins anew."""
    entry = dict(kind="bins", readout="readout_action", action_horizon=3, action_dim=4, num_bins=5, width=8)
    larger = entry | dict(action_horizon=4, action_dim=6)
    before, after = light.HeadAlone(entry, seed=1), light.HeadAlone(larger, seed=2)
    rules = surgery.carry({"heads": {"action": entry}}, {"heads": {"action": larger}}, {})
    tree, report = merge_params({"heads_action": after.params}, {"heads_action": before.params}, resize=rules.resize)
    assert [path for path, status in report.status.items() if status == "resized"] == ["heads_action/decoder/positions"]
    places = tree["heads_action"]["decoder"]["positions"].reshape(4, 6, 8)
    np.testing.assert_array_equal(places[:3, :4], before.params["decoder"]["positions"].reshape(3, 4, 8))
    np.testing.assert_array_equal(places[3, 5], after.params["decoder"]["positions"].reshape(4, 6, 8)[3, 5])
    actions = np.random.default_rng(0).normal(size=(4, 2, 4, 6)).astype(np.float32)
    old, new = (
        head.apply(before.groups, x, np.ones_like(x), params=params, method="logits")
        for head, x, params in (
            (before, actions[:, :, :3, :4], before.params),
            (after, actions, tree["heads_action"]),
        )
    )
    np.testing.assert_allclose(old[:, :, 0], new[:, :, 0, :4], atol=1e-5)


def test_heads_of_another_kind_or_with_other_bins_are_new():
    for changed in (HEADS["regression"], HEADS["chunk"] | {"num_bins": 6}):
        rules = surgery.carry({"heads": {"action": HEADS["chunk"]}}, {"heads": {"action": changed}}, {})
        assert rules.resize("heads_action/vocab_proj/kernel", np.ones((16, 60)), np.ones((16, 72))) is None


def test_a_goal_image_is_added_to_a_camera_and_taken_away():
    """The channels of the observed image keep their weights; those of the goal begin anew, or are cut off."""
    plain = surgery.operate(BASE, {"observation_tokenizers": {"primary": {"goal_keys": ()}}})
    path = "octo_transformer/observation_tokenizers_primary/SmallStem16_0/StdConv_0/kernel"
    no_goal = dataclasses.replace(tiny.SPEC, goal_images=())
    for before, after, specs in ((plain, BASE, (no_goal, tiny.SPEC)), (BASE, plain, (tiny.SPEC, no_goal))):
        old, new, tree, report = merged(before, after, {}, old_spec=specs[0], new_spec=specs[1])
        assert report.status[path] == "resized" and report.count("new") == (0, 0)
        np.testing.assert_array_equal(tree[path][:, :, :3], old[path][:, :, :3])
        np.testing.assert_array_equal(tree[path][:, :, 3:], new[path][:, :, 3:])


def test_a_longer_window_keeps_the_rows_it_had():
    new = surgery.operate(BASE, {"max_window": 7})
    old, initial, tree, report = merged(BASE, new, {})
    resized = report.paths("resized")
    assert sorted(path.split("/")[1] for path in resized) == sorted(
        f"{name}_pos_embedding" for name in ("obs_primary", "obs_wrist", "obs_proprio", "readout_action")
    )
    for path in resized:
        np.testing.assert_array_equal(tree[path][:, :4], old[path])
        np.testing.assert_array_equal(tree[path][:, 4:], initial[path][:, 4:])
    with pytest.raises(PretrainedError, match=r"window_size=7.*at most 4.*surgery.max_window=7"):
        surgery.check_inputs(BASE, dataclasses.replace(tiny.SPEC, window_size=7))
    surgery.check_inputs(new, dataclasses.replace(tiny.SPEC, window_size=7))


def test_a_readout_and_a_head_are_added():
    changes = {"readouts": {"other": 2}, "heads": {"other": tiny.diffusion() | dict(readout="readout_other")}}
    new = surgery.operate(BASE, changes)
    spec = dataclasses.replace(tiny.SPEC, heads=("action", "other"))
    old, _, tree, report = merged(BASE, new, changes, new_spec=spec)
    assert {path.split("/")[0] for path in report.paths("new")} == {"octo_transformer", "heads_other"}
    assert [path for path in report.paths("new") if path.startswith("octo")] == [
        "octo_transformer/readout_other_pos_embedding"
    ]
    assert all(np.array_equal(tree[path], leaf) for path, leaf in old.items())


def test_a_part_that_speaks_is_added_given_another_vocabulary_and_removed():
    from tests.model.test_text_head import SPEC, VOCABULARY, config

    quiet_spec = dataclasses.replace(SPEC, text_target=None)
    quiet = surgery.operate(config(), {"auxiliaries": {"text": None}, "readouts": {"text": None}})
    assert not quiet["auxiliaries"] and sorted(quiet["readouts"]) == ["action"]
    added = {"auxiliaries": {"text": config()["auxiliaries"]["text"]}, "readouts": {"text": 4}}
    old, _, tree, report = merged(quiet, surgery.operate(quiet, added), added, old_spec=quiet_spec, new_spec=SPEC)
    assert {path.split("/")[0] for path in report.paths("new")} == {"octo_transformer", "auxiliaries_text"}
    assert all(np.array_equal(tree[path], leaf) for path, leaf in old.items())
    removed = {"auxiliaries": {"text": None}, "readouts": {"text": None}}
    report = merged(config(), quiet, removed, old_spec=SPEC, new_spec=quiet_spec)[3]
    assert report.count("new") == (0, 0) and any("auxiliaries_text" in path for path in report.lost)

    # As many words, but others: nothing of a word's own is kept, and everything else is.
    others = {"auxiliaries": {"text": {"vocabulary": VOCABULARY | {"sentencepiece": "another"}}}}
    old, new, tree, report = merged(config(), surgery.operate(config(), others), others, old_spec=SPEC, new_spec=SPEC)
    anew = [f"auxiliaries_text/decoder/{part}" for part in ("embedding/embedding", "logits/bias", "logits/kernel")]
    assert sorted(report.paths("new")) == anew and "another vocabulary" in str(report)
    assert all(np.array_equal(tree[path], new[path] if path in anew else old[path]) for path in tree)
    bins = light.config(readouts=dict(action=2), heads=dict(action=HEADS["regression"] | dict(
        kind="bins", num_bins=8, low=-3.0, high=3.0, width=16, num_heads=2)))  # fmt: skip
    narrower = {"heads": {"action": {"low": -1.0}}}
    report = merged(bins, surgery.operate(bins, narrower), narrower, old_spec=light.SPEC, new_spec=light.SPEC)[3]
    parts = ("embedding/embedding", "logits/bias", "logits/kernel")
    assert sorted(report.paths("new")) == [f"heads_action/decoder/{part}" for part in parts]
    untaught = lambda *changes: surgery.untaught(*(surgery.operate(config(), change) for change in changes))  # noqa: E731
    for fields in (
        {"vocabulary": others["auxiliaries"]["text"]["vocabulary"]},
        {"remembers": True},
        {"learns": ("answer",)},
    ):
        assert untaught({}, {"auxiliaries": {"text": fields}}) == ("text",), fields
    assert untaught(removed, {}) == ("text",) and untaught({}, removed) == ()
    assert untaught({}, {"auxiliaries": {"text": {"weight": 0.5}}}) == ()
    assert untaught({"auxiliaries": {"text": {"remembers": True}}}, {}) == (), "asked with less than it has learned"
    same = {"auxiliaries": {"text": {"weight": 0.5}}}
    assert merged(config(), surgery.operate(config(), same), same, old_spec=SPEC, new_spec=SPEC)[3].count("new") == (
        0,
        0,
    )


def test_report_counts_equal_the_tree():
    changes = {"heads": {"action": {"action_dim": 9}}, "observation_tokenizers": {"wrist": None}}
    new = surgery.operate(BASE, changes)
    spec = dataclasses.replace(tiny.SPEC, action_dim=9, image_sizes={"primary": (32, 32)})
    _, _, tree, report = merged(BASE, new, changes, new_spec=spec, reinitialize=(".*obs_proprio_projection",))
    loaded = {path: status == "loaded" for path, status in report.status.items()}
    frozen = surgery.frozen_by_mode("head_only", (), loaded)
    report = dataclasses.replace(report, frozen=frozen)
    document = report.to_dict()["summary"]
    for columns in (("loaded", "resized", "new"), ("frozen", "trained")):
        assert sum(document[c]["arrays"] for c in columns) == len(tree)
        assert sum(document[c]["parameters"] for c in columns) == sum(leaf.size for leaf in tree.values())
        assert sum(document[c]["bytes"] for c in columns) == sum(leaf.nbytes for leaf in tree.values())
    assert document["frozen"]["parameters"] == sum(tree[path].size for path in frozen)
    assert "octo_transformer/obs_proprio_projection/bias" not in frozen, "new arrays are trained in every mode"
    assert report.unused and all("wrist" in path for path in report.unused)
    assert "wrist" in str(report) and "not in the checkpoint" not in str(report)


# -------------------------------------------------------------------------------------------------------- conditioning


def test_conditioning():
    assert surgery.condition(BASE, "language") == (BASE, ())
    model, goals = surgery.condition(BASE, "both")
    assert goals == ("primary",) and model["task_tokenizers"] == BASE["task_tokenizers"]
    wrist = {"observation_tokenizers": {"wrist": {"film_keys": (), "stem": dict(kind="conv", layers=((4, 4, 8),))}}}
    model, goals = surgery.condition(surgery.operate(BASE, wrist), "goal_image", ("primary", "wrist"))
    assert goals == ("primary", "wrist") and not model["task_tokenizers"]
    assert model["observation_tokenizers"]["wrist"]["goal_keys"] == ("image_wrist",)
    assert "goal_keys" not in BASE["observation_tokenizers"]["wrist"]
    shapes_of(model, dataclasses.replace(tiny.SPEC, goal_images=goals, language_length=None))


@pytest.mark.parametrize(
    "changes,conditioning,goals,words",
    [
        ({}, "goals", (), ["goals", "both, goal_image, language"]),
        ({}, "langage", (), ["did you mean 'language'"]),
        ({}, "language", ("primary",), ["goal_images", "both"]),
        ({}, "both", ("front",), ["image_front"]),
        ({}, "goal_image", (), ["wrist", "film_keys", "both"]),
        ({"task_tokenizers": {"language": None}}, "both", (), ["language tokenizer", "goal_image"]),
        ({"observation_tokenizers": {"primary": {"goal_keys": ()}}}, "both", (), ["no goal inputs", "goal_images"]),
        (
            {"observation_tokenizers": {"wrist": {"film_keys": ("language_instruction",)}}},
            "language",
            (),
            ["embeddings"],
        ),
    ],
)
def test_conditioning_that_the_model_cannot_have(changes, conditioning, goals, words):
    with pytest.raises(PretrainedError) as error:
        surgery.condition(surgery.operate(BASE, changes), conditioning, goals)
    for word in words:
        assert word in str(error.value)


def test_inputs_that_nothing_reads():
    more = {**tiny.SPEC.image_sizes, "secondary": (32, 32)}
    with pytest.raises(PretrainedError, match=r"image_secondary.*surgery.observation_tokenizers.secondary.copy_of"):
        surgery.check_inputs(BASE, dataclasses.replace(tiny.SPEC, image_sizes=more))
    blind = surgery.operate(BASE, {"observation_tokenizers": {"proprio": None}})
    with pytest.raises(PretrainedError, match=r"observation/proprio.*lowdim"):
        surgery.check_inputs(blind, tiny.SPEC)
    surgery.check_inputs(BASE, tiny.SPEC)


# --------------------------------------------------------------------------------------------------------------- frozen

MAP = tiny.config(heads=dict(action=tiny.diffusion(use_map=True)))


@pytest.mark.parametrize("mode", surgery.MODES)
def test_what_every_mode_trains(mode):
    paths = [path for path, _ in flatten(shapes_of(MAP))]
    new = "octo_transformer/obs_wrist_projection/kernel"
    loaded = {path: path != new for path in paths}
    frozen = surgery.frozen_by_mode(mode, (), loaded)

    def expected(path):
        attention = "map_head/probe" in path or "map_head/MultiHeadDotProductAttention_0" in path
        if path.startswith("octo_transformer/obs_wrist_projection/"):
            return False  # its kernel is new
        return {
            "full": False,
            "frozen_transformer": "/BlockTransformer_0/" in path,
            "head_only": path.startswith("octo_transformer/"),
            "head_mlp_only": path.startswith("octo_transformer/") or attention,
            "lora": path.startswith("octo_transformer/"),
        }[mode]

    assert frozen == {path for path in paths if expected(path)}
    assert any("map_head/MlpBlock" in path for path in paths), "what head_mlp_only leaves to train"


def test_freezing_further_parts_and_nothing_left():
    loaded = {path: True for path, _ in flatten(shapes_of(BASE))}
    both = surgery.frozen_by_mode("frozen_transformer", ("obs_wrist", "^heads_action/.*Dense_1"), loaded)
    assert any("reverse_network/Dense_1" in path for path in both) and any("BlockTransformer" in path for path in both)
    untrained = surgery.frozen_by_mode("full", (), loaded, ["heads_action"])
    assert untrained == {path for path in loaded if path.startswith("heads_action/")}
    with pytest.raises(PretrainedError, match="matches no parameter.*octo_transformer"):
        surgery.frozen_by_mode("full", ("nonsense",), loaded)
    with pytest.raises(PretrainedError, match="nothing to train"):
        surgery.frozen_by_mode("head_only", ("^heads",), loaded)
    with pytest.raises(PretrainedError, match="did you mean 'head_only'"):
        surgery.frozen_by_mode("heads_only", (), loaded)


def test_an_encoder_that_no_gradient_reaches_is_never_trained():
    t5 = dict(
        kind="language", encoder="t5", t5=dict(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    for finetune in (False, True):
        config = tiny.config(task_tokenizers=dict(language=t5 | dict(finetune_encoder=finetune)))
        paths = [path for path, _ in flatten(shapes_of(config))]
        kept = surgery.never_trained(config, paths)
        assert kept == {path for path in paths if "/hf_model/" in path and not finetune}
    assert surgery.never_trained(BASE, ["octo_transformer/task_tokenizers_language/embedding/embedding"]) == frozenset()


def test_a_vocabulary_that_the_encoder_does_not_have():
    params = tiny.random_values(shapes_of(BASE))
    surgery.check_vocabulary(params, tiny.VOCAB)
    with pytest.raises(PretrainedError, match=rf"{tiny.VOCAB + 1} pieces.*{tiny.VOCAB} rows"):
        surgery.check_vocabulary(params, tiny.VOCAB + 1)
