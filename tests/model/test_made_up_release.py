"""A release nobody wrote, evaluated twice: loaded by the package, and by NumPy from the specification of the format.

Other tokenizers, token names, widths, heads and windows than the reference checkpoints have.
"""

import copy
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from octo_like.common.schema import flatten, unflatten
from octo_like.model.octo import build_model
from octo_like.policy.octo_release import release_spec, translate_config
from octo_like.policy.policy import Policy
from octo_like.policy.pretrained import PretrainedError
from tests.model import tiny
from tests.model.by_hand import dense, layer_norm, map_pooling, score, small_stem, transformer
from tests.model.golden_io import TOLERANCE
from tests.model.test_loading import component, image, pack

B, W = 2, 2
MODEL = {
    "token_embedding_size": 48,
    "max_horizon": 5,
    "repeat_task_tokens": True,
    "use_correct_attention": True,
    "transformer_kwargs": {"num_layers": 2, "mlp_dim": 40, "num_attention_heads": 3, "add_position_embedding": False},
    "task_tokenizers": {"sentence": component("LanguageTokenizer", encoder=None)},
    "observation_tokenizers": {
        "joints": component("LowdimObsTokenizer", obs_keys=["torque", "proprio"], low=-1.0, high=1.0, n_bins=8,
                            discretize=True),
        "both": image("image_(wrist|primary)", component("SmallStem16", features=[32, 32, 64, 32], num_features=40),
                      use_token_learner=True, num_tokens=3),
        "hand": image("image_wrist", component("PatchEncoder", patch_size=16, num_features=24), goal=["image_.*"]),
        "touch": component("LowdimObsTokenizer", obs_keys=["touch"]),
    },
    "readouts": {"two_arms": 2, "gripper": 1},
    "heads": {
        "pooled": component("L1ActionHead", readout_key="obs", action_dim=7, action_horizon=2),
        "mean": component("MSEActionHead", readout_key="readout_gripper", action_dim=3, use_map=False, max_action=2.0),
        "bimanual": component("DiffusionActionHead", readout_key="readout_two_arms", action_dim=14, action_horizon=8,
                              hidden_dim=32, diffusion_steps=4, num_blocks=2, time_dim=16),
    },
}  # fmt: skip


def example_batch(rows=1, seed=0):
    rng = np.random.default_rng(seed)
    pixels = lambda *lead: rng.integers(0, 256, (*lead, 32, 32, 3), np.uint8)  # noqa: E731
    observation = {
        "image_primary": pixels(rows, W),
        "image_wrist": pixels(rows, W),
        "proprio": rng.normal(size=(rows, W, 2)).astype(np.float32),
        "torque": rng.normal(size=(rows, W, 1)).astype(np.float32),
        "touch": rng.normal(size=(rows, W, 3)).astype(np.float32),
        "timestep_pad_mask": np.ones((rows, W), bool),
        "timestep": np.zeros((rows, W), np.int32),
    }
    sensors = [key for key in observation if not key.startswith("timestep")]
    observation["pad_mask_dict"] = {key: np.ones((rows, W), bool) for key in sensors}
    task = {
        "language_instruction": rng.normal(size=(rows, 3, 20)).astype(np.float32),
        "image_wrist": pixels(rows),
        "pad_mask_dict": {key: np.ones(rows, bool) for key in ("language_instruction", "image_wrist")},
    }
    return {"observation": observation, "task": task}


def write(path, model, params, example=None):
    (path / "300" / "default").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model": model, "window_size": W, "text_processor": None}))
    (path / "example_batch.msgpack").write_bytes(pack(example or example_batch()))
    (path / "300" / "default" / "checkpoint").write_bytes(pack(params))
    return path


@pytest.fixture(scope="module")
def params():
    config, example = translate_config(MODEL), example_batch()
    return tiny.random_params(build_model(config), release_spec(config, example, config["heads"]), seed=5)


# -- the specification, one sample at a time, float64 ------------------------------------------------------------------


def tokens_of(p, obs, task, b):
    """{group: (tokens (n, F), mask (n,))} for the task and [the same for each timestep]."""
    scaled = lambda image: image.astype(np.float64) / 127.5 - 1  # noqa: E731
    words = task["language_instruction"][b].astype(np.float64)
    valid = task["pad_mask_dict"]["language_instruction"][b]
    steps = []
    for t in range(W):
        there = {key: mask[b, t] for key, mask in obs["pad_mask_dict"].items()}
        step = {}
        x = np.concatenate([obs["torque"][b, t], obs["proprio"][b, t]])
        edges = np.linspace(-1, 1, 9)
        step["joints"] = np.stack([np.eye(8)[np.clip((v >= edges).sum() - 1, 0, 7)] for v in x]), True
        cameras = np.concatenate([scaled(obs["image_primary"][b, t]), scaled(obs["image_wrist"][b, t])], -1)
        q = p["observation_tokenizers_both"]
        features = small_stem(cameras[None], q["SmallStem16_0"], 4, 1).reshape(-1, 40)
        learner = q["TokenLearner_0"]
        features = layer_norm(features + learner["pos_embed"], learner["LayerNorm_0"])
        pooled = map_pooling(features, np.ones(len(features), bool), learner["MAPHead_0"])
        step["both"] = pooled, there["image_primary"] or there["image_wrist"]
        # Goals of every observed camera that matches; one that the task lacks is black.
        goals = [np.zeros((32, 32, 3)), task["image_wrist"][b]]
        stacked = np.concatenate([scaled(x) for x in (obs["image_wrist"][b, t], *goals)], -1)
        kernel = p["observation_tokenizers_hand"]["PatchEncoder_0"]["embedding"]
        patches = stacked.reshape(2, 16, 2, 16, 9).transpose(0, 2, 1, 3, 4).reshape(4, -1)
        step["hand"] = patches @ kernel["kernel"].reshape(-1, 24) + kernel["bias"], there["image_wrist"]
        step["touch"] = obs["touch"][b, t].astype(np.float64)[:, None], True
        steps.append({name: (x, np.full(len(x), mask)) for name, (x, mask) in step.items()})
    return {"sentence": (words, np.full(len(words), valid))}, steps


def sequence(p, obs, task, b):
    """[(group, timestep, token, key mask)] in order."""
    prefix, steps = tokens_of(p, obs, task, b)
    out = []
    words = dense(prefix["sentence"][0], p["task_sentence_projection"]) + p["task_sentence_pos_embedding"][0]
    out += [("task_sentence", -1, x, m) for x, m in zip(words, prefix["sentence"][1], strict=True)]
    for t, step in enumerate(steps):
        for name, (x, mask) in step.items():
            x = dense(x, p[f"obs_{name}_projection"]) + p[f"obs_{name}_pos_embedding"][0, t]
            out += [
                (f"obs_{name}", t, token, m and obs["timestep_pad_mask"][b, t])
                for token, m in zip(x, mask, strict=True)
            ]
        out += [("obs_task_sentence", t, x, m) for x, m in zip(words, prefix["sentence"][1], strict=True)]
        for name in MODEL["readouts"]:
            out += [(f"readout_{name}", t, x, True) for x in p[f"readout_{name}_pos_embedding"][0, t]]
    return out


def may(query, key):
    role = lambda name: name.split("_")[0]  # noqa: E731
    allowed = {"task": ("task",), "obs": ("task", "obs"), "readout": ("task", "obs")}[role(query[0])]
    return key[1] <= query[1] and (role(key[0]) in allowed or query[0] == key[0])


def by_hand(params, batch):
    """(readouts and pooled embeddings by head (B, W, D), whole output {group: (B, W, n, D)})."""
    p, obs, task = params["octo_transformer"], batch["observation"], batch["task"]
    embeddings, groups = {name: [] for name in MODEL["heads"]}, {}
    for b in range(B):
        entries = sequence(p, obs, task, b)
        mask = np.array([[may(q, k) and k[3] for k in entries] for q in entries])
        x = np.stack([token for _, _, token, _ in entries])
        x = transformer(x, mask, p["BlockTransformer_0"]["Transformer_0"], 2)
        pick = lambda keep, entries=entries: np.array([i for i, e in enumerate(entries) if keep(*e[:2])])  # noqa: E731
        rows = {name: [] for name in MODEL["heads"]}
        for t in range(W):
            seen = pick(lambda name, when, t=t: name.startswith("obs_") and when == t)
            valid = np.array([entries[i][3] for i in seen])
            rows["pooled"].append(map_pooling(x[seen], valid, params["heads_pooled"]["map_head"])[0])
            for head, group in (("mean", "readout_gripper"), ("bimanual", "readout_two_arms")):
                mine = pick(lambda name, when, t=t, group=group: name == group and when == t)
                rows[head].append(x[mine].mean(0))
        for head, values in rows.items():
            embeddings[head].append(values)
        groups.setdefault("task_sentence", []).append(x[pick(lambda name, when: name == "task_sentence")])
    return {head: np.array(x) for head, x in embeddings.items()}, {k: np.array(v) for k, v in groups.items()}


def squash(embedding, p, horizon, dim, limit):
    return limit * np.tanh(dense(embedding, p["mean_proj"]).reshape(*embedding.shape[:-1], horizon, dim) / limit)


def diffuse(embedding, p, initial, noise, steps=4, dims=14):
    """The reverse chain for one sample; dimensions from `dims` on are padding."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.clip(1 - f[1:] / f[:-1], 0, 0.999)
    alpha, level = 1 - beta, np.cumprod(1 - beta)
    x, pad = initial.astype(np.float64), np.tile(np.arange(14) >= dims, 8)
    for i, t in enumerate(range(steps - 1, -1, -1)):
        eps = score(embedding, x, t, p["diffusion_model"], 2)
        x = (x - beta[t] / np.sqrt(1 - level[t]) * eps) / np.sqrt(alpha[t]) + (t > 0) * np.sqrt(beta[t]) * noise[i]
        x = np.where(pad, np.sqrt(1 - level[t]) * noise[i], np.clip(x, -5, 5))
    return x.reshape(8, 14)


def batch_with_gaps():
    batch = example_batch(B, seed=3)
    obs, task = batch["observation"], batch["task"]
    obs["timestep_pad_mask"][0, 0] = False
    obs["pad_mask_dict"]["image_wrist"][1] = False
    task["pad_mask_dict"]["language_instruction"][1] = False
    task["pad_mask_dict"]["image_wrist"][0] = False
    return batch


def test_the_package_gives_what_the_specification_says(params, tmp_path):
    policy = Policy.load_pretrained(write(tmp_path / "release", MODEL, params))
    batch = batch_with_gaps()
    obs, task = batch["observation"], batch["task"]
    want, groups = by_hand(jax.tree.map(lambda x: np.asarray(x, np.float64), params), batch)
    rng = np.random.default_rng(1)
    initial, noise = rng.normal(size=(B, 112)).astype(np.float32), rng.normal(size=(4, B, 112)).astype(np.float32)
    valid = np.arange(14) < 9

    def run(module):
        out = module.groups(obs, task)
        embeddings = {name: head.embed(out) for name, head in module.heads.items()}
        predicted = {name: module.heads[name].predict(out) for name in ("pooled", "mean")}
        drawn = module.heads["bimanual"].sample(out, None, noise=(initial, noise), valid=valid)
        return out["task_sentence"].tokens, embeddings, predicted, drawn

    words, embeddings, predicted, drawn = jax.jit(lambda p: policy.model.apply({"params": p}, method=run))(
        policy.params
    )
    np.testing.assert_allclose(words, groups["task_sentence"], **TOLERANCE)
    for name, value in embeddings.items():
        np.testing.assert_allclose(value, want[name], err_msg=name, **TOLERANCE)
    for name, sizes in (("pooled", (2, 7, 5.0)), ("mean", (1, 3, 2.0))):
        np.testing.assert_allclose(predicted[name], squash(want[name], params[f"heads_{name}"], *sizes), **TOLERANCE)
    for b in range(B):
        expected = diffuse(want["bimanual"][b, -1], params["heads_bimanual"], initial[b], noise[:, b], dims=9)
        np.testing.assert_allclose(drawn[b], expected, rtol=1e-3, atol=1e-3)


def test_sensors_that_the_schema_does_not_name_are_part_of_the_policy(params, tmp_path):
    policy = Policy.load_pretrained(write(tmp_path / "release", MODEL, params))
    assert policy.batch_spec.extra_observations == {"torque": (1,), "touch": (3,)}
    policy.save_pretrained(tmp_path / "ours")
    again = Policy.load_pretrained(tmp_path / "ours")
    assert again.batch_spec == policy.batch_spec
    batch = example_batch(B)
    task = again.create_tasks(
        embeddings=batch["task"]["language_instruction"], goals={"image_wrist": batch["task"]["image_wrist"]}
    )
    first = again.sample_actions(batch["observation"], task, rng=jax.random.key(0), head="bimanual")
    batch["observation"]["touch"] = batch["observation"]["touch"] + 1
    second = policy.sample_actions(batch["observation"], task, rng=jax.random.key(0), head="bimanual")
    assert first.shape == (B, 8, 14) and np.all(np.isfinite(first)) and np.any(first != second)
    with pytest.raises(ValueError, match=r"touch: expected \(B, 2, 3\) float32, got \(2, 2, 4\)"):
        policy.sample_actions(
            batch["observation"] | {"touch": np.zeros((B, W, 4), np.float32)}, task, rng=jax.random.key(0), head="mean"
        )


def test_a_sensor_that_is_missing_leaves_the_sequence_as_in_octo(params, tmp_path, caplog):
    """Its tokens know no mask in a release: zeros in its place would be read as a measurement."""
    policy = Policy.load_pretrained(write(tmp_path / "release", MODEL, params))
    batch = example_batch(B)
    task = policy.create_tasks(
        embeddings=batch["task"]["language_instruction"], goals={"image_wrist": batch["task"]["image_wrist"]}
    )
    without = {key: value for key, value in batch["observation"].items() if key != "touch"}
    prepared = policy.prepare_observations(without)
    assert "touch" not in prepared and "touch" not in prepared["pad_mask_dict"]
    assert "observation/touch is missing: its tokens are left out" in caplog.text

    def run(module, observation, task):
        groups = module.groups(observation, task)
        return groups, module.heads["mean"].predict(groups)

    groups, direct = jax.jit(lambda p, *a: policy.model.apply({"params": p}, *a, method=run))(
        policy.params, prepared, task
    )
    assert "obs_touch" not in groups and "obs_joints" in groups
    zeros = without | {"touch": np.zeros_like(batch["observation"]["touch"])}
    key = jax.random.key(0)
    one, other = (policy.sample_actions(o, task, rng=key, head="mean") for o in (without, zeros))
    assert np.abs(one - other).max() > 1e-4
    np.testing.assert_allclose(one, direct[:, -1], **TOLERANCE)
    # The tokenizer that also reads the proprioception keeps its tokens when only the torque is missing.
    some = policy.prepare_observations({key: value for key, value in without.items() if key != "torque"})
    assert (some["torque"] == 0).all() and not some["pad_mask_dict"]["torque"].any()


def test_parameters_that_do_not_fit_are_listed(params, tmp_path):
    flat = dict(flatten(params))
    flat["heads_mean/mean_proj/kernel"] = np.zeros((5, 3), np.float32)
    del flat["octo_transformer/readout_gripper_pos_embedding"]
    flat["octo_transformer/stray/kernel"] = np.zeros(2, np.float32)
    with pytest.raises(PretrainedError, match="3 parameters do not fit") as error:
        Policy.load_pretrained(write(tmp_path / "release", MODEL, unflatten(flat)))
    for line in (
        "heads_mean/mean_proj/kernel: config.json says (48, 3), the file has (5, 3)",
        "octo_transformer/readout_gripper_pos_embedding (1, 5, 1, 48) is missing",
        "octo_transformer/stray/kernel (2,) is in no part of this model",
    ):
        assert line in str(error.value)


def test_parameters_in_half_precision_are_computed_in_float32(params, tmp_path):
    half = jax.tree.map(lambda x: np.asarray(x, ml_dtypes.bfloat16), params)
    policy = Policy.load_pretrained(write(tmp_path / "release", MODEL, half))
    for (path, got), (_, want) in zip(flatten(policy.params), flatten(half), strict=True):
        assert got.dtype == np.float32, path
        np.testing.assert_array_equal(got, np.asarray(want, np.float32), path)


@pytest.mark.parametrize(
    "where,value,message",
    [
        (("transformer_kwargs", "add_position_embedding"), True, "add_position_embedding is True, .* not supported"),
        (("transformer_kwargs", "gated"), 1, "transformer_kwargs.gated is 1, .* not supported"),
        (("max_horizon",), None, r"model.max_horizon is missing; .* \(there is \["),
        (("transformer_kwargs", "mlp_dim"), ..., "model.transformer_kwargs.mlp_dim is missing"),
        (
            ("observation_tokenizers", "hand", "kwargs", "obs_stack_key"),
            [],
            "obs_stack_key is an unknown opt.*known",
        ),
        (("observation_tokenizers", "hand", "kwargs", "encoder", "name"), "ViT", "unknown image encoder 'ViT'.*known"),
        (("observation_tokenizers", "touch", "name"), "Lidar", "unknown tokenizer 'Lidar'.*known"),
        (("observation_tokenizers", "touch", "args"), [3], r"args is \[3\]: LowdimObsTokenizer has positional arg"),
        (("heads", "mean", "name"), "UNetDDPMActionHead", "unknown action head 'UNet.*known"),
        (("heads", "mean", "kwargs", "layers"), 3, "layers is an unknown option of MSEActionHead"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(where, value, message):
    model = copy.deepcopy(MODEL)
    node = model
    for key in where[:-1]:
        node = node[key]
    if value is ...:
        del node[where[-1]]
    else:
        node[where[-1]] = value
    with pytest.raises(PretrainedError, match=message):
        translate_config(model)
