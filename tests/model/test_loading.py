"""Octo's checkpoint format beyond the golden files, and policies that live in buckets and on the Hub.

The remote parts run in a process of their own: tensorstore and huggingface_hub read their endpoints once.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest

from octo_like.common.schema import flatten, synthetic_batch
from octo_like.model.octo import build_model
from octo_like.policy.describe import abstract_params, parameter_counts
from octo_like.policy.octo_arrays import read_msgpack, read_params
from octo_like.policy.octo_release import load_release, release_files, release_spec, translate_config
from octo_like.policy.policy import Policy
from octo_like.policy.pretrained import PretrainedError
from scripts import import_octo
from tests.model import remote, tiny

ROOT = Path(__file__).resolve().parents[2]


def pack(tree) -> bytes:
    """A Flax msgpack file, written by the rules in the golden README."""

    def default(x):
        if isinstance(x, np.ndarray):
            return msgpack.ExtType(1, msgpack.packb((x.shape, x.dtype.name, x.tobytes())))
        raise TypeError(type(x))

    return msgpack.packb(tree, default=default)


def component(name, **kwargs):
    return {"module": "somewhere", "name": name, "args": [], "kwargs": kwargs}


def image(key, encoder, *, goal=(), **kwargs):
    return component("ImageTokenizer", encoder=encoder, obs_stack_keys=[key], task_stack_keys=list(goal), **kwargs)


OTHER = {
    "token_embedding_size": 48,
    "max_horizon": 5,
    "transformer_kwargs": {"num_layers": 1, "mlp_dim": 40, "num_attention_heads": 3},
    "task_tokenizers": {"language": component("LanguageTokenizer", encoder=None)},
    "observation_tokenizers": {
        "front": image("image_primary", component("ResNet26FILM", width=0.5), task_film_keys=["language_instruction"]),
        "stack": image(
            "image_(primary|wrist)",
            component("SmallStem", features=[32, 64, 32], kernel_sizes=[3, 3, 3], strides=[2, 2, 2], padding=[1, 1, 1],
                      patch_size=16, num_features=40),
            use_token_learner=True,
            num_tokens=3,
        ),
        "patch": image("image_wrist", component("PatchEncoder", patch_size=8, num_features=24), goal=["image_wrist"]),
        "state": component("LowdimObsTokenizer", obs_keys=["proprio"], discretize=True, n_bins=16, bin_type="normal"),
    },
    "readouts": {"arm": 2, "hand": 1},
    "heads": {
        "l1": component("L1ActionHead", readout_key="obs", action_dim=7, action_horizon=2),
        "mse": component("MSEActionHead", readout_key="readout_hand", action_dim=3, pred_horizon=1),
        "both": component("DiffusionActionHead", readout_key="readout_arm", action_dim=14, action_horizon=8,
                          hidden_dim=32, diffusion_steps=4),
    },
}  # fmt: skip


def example_batch():
    pixels = lambda size: np.zeros((1, 2, size, size, 3), np.uint8)  # noqa: E731
    observation = {"image_primary": pixels(32), "image_wrist": pixels(32), "proprio": np.zeros((1, 2, 6), np.float32)}
    observation |= {"timestep_pad_mask": np.ones((1, 2), bool), "timestep": np.zeros((1, 2), np.int32)}
    observation["pad_mask_dict"] = {key: np.ones((1, 2), bool) for key in ("image_primary", "image_wrist", "proprio")}
    task = {"language_instruction": np.zeros((1, 20), np.float32), "image_wrist": np.zeros((1, 32, 32, 3), np.uint8)}
    task["pad_mask_dict"] = {key: np.ones(1, bool) for key in task}
    return {"observation": observation, "task": task, "action": np.zeros((1, 2, 8, 14), np.float32)}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A release with other tokenizers, heads and widths than the golden ones; its parameters' names come from us."""
    path = tmp_path_factory.mktemp("other")
    (path / "config.json").write_text(json.dumps({"model": OTHER, "window_size": 2}))
    (path / "example_batch.msgpack").write_bytes(pack(example_batch()))
    entry = {name: [0.5] * 14 for name in ("mean", "std", "min", "max", "p01", "p99")}
    (path / "dataset_statistics.json").write_text(json.dumps({"action": entry, "num_transitions": 9}))
    config = translate_config(OTHER)
    params = tiny.random_params(build_model(config), release_spec(config, example_batch(), config["heads"]))
    for step in (10, 200):
        (path / str(step) / "default").mkdir(parents=True)
        scaled = jax.tree.map(lambda x, s=step: x * np.float32(1 if s == 200 else 0.5), params)
        (path / str(step) / "default" / "checkpoint").write_bytes(pack(scaled))
    return path, params


def test_another_release_loads_with_the_names_that_upstream_gives(other):
    path, params = other
    policy = Policy.load_pretrained(path)
    names = dict(flatten(policy.params))
    front = "octo_transformer/observation_tokenizers_front/ResNet26FILM_0"
    shapes = {
        f"{front}/conv_root/kernel": (7, 7, 3, 32),
        f"{front}/block1/unit1/conv_proj/kernel": (1, 1, 32, 128),
        f"{front}/block4/unit2/conv2/kernel": (3, 3, 256, 256),
        f"{front}/block4/unit2/gn3/scale": (1024,),
        f"{front}/FilmConditioning_2/Dense_0/kernel": (20, 1024),
        "octo_transformer/observation_tokenizers_stack/SmallStem_0/embedding/kernel": (1, 1, 32, 40),
        "octo_transformer/observation_tokenizers_stack/TokenLearner_0/MAPHead_0/probe": (1, 3, 40),
        "octo_transformer/task_language_pos_embedding": (1, 1, 48),
        "octo_transformer/obs_state_pos_embedding": (1, 5, 6, 48),
        "heads_both/diffusion_model/reverse_network/Dense_1/kernel": (32, 8 * 14),
        "heads_mse/map_head/probe": (1, 1, 48),
    }
    assert {name: names[name].shape for name in shapes} == shapes
    assert not any(name.startswith(f"{front}/conv_root/bias") or "FilmConditioning_3" in name for name in names)
    np.testing.assert_array_equal(names["heads_l1/mean_proj/kernel"], params["heads_l1"]["mean_proj"]["kernel"])

    observation = synthetic_batch(policy.batch_spec, 2)["observation"]
    tasks = policy.create_tasks(embeddings=np.ones((2, 20), np.float32))
    out = policy.sample_actions(observation, tasks, rng=jax.random.key(0), head="both")
    assert out.shape == (2, 8, 14) and np.all(np.isfinite(out))
    keys = jax.random.split(jax.random.key(0), 2)

    def sample(head):
        apply = policy.model.apply
        return apply({"params": policy.params}, observation, tasks, keys, head=head, method="sample")

    assert jax.eval_shape(lambda: sample("l1")).shape == (2, 2, 7)
    assert jax.eval_shape(lambda: sample("mse")).shape == (2, 1, 3)
    with pytest.raises(ValueError, match="embeddings"):
        policy.create_tasks(texts=["a", "b"])


def test_steps(other):
    path, params = other
    half = load_release(path, step=10)[1]["heads_l1"]["mean_proj"]["kernel"]
    np.testing.assert_array_equal(half, params["heads_l1"]["mean_proj"]["kernel"] * np.float32(0.5))
    with pytest.raises(PretrainedError, match=r"no step 11; valid: \[10, 200\]"):
        load_release(path, step=11)
    names = ["config.json", "10/default/checkpoint", "200/default/checkpoint"]
    assert release_files(names) == ["config.json", "200/default/checkpoint"]
    assert release_files(names, 10) == names[:2]
    assert release_files(["config.json", "text/x"]) == ["config.json", "text/x"]


@pytest.mark.parametrize("ocdbt,zarr3", [(True, False), (True, True), (False, False), (False, True)])
def test_arrays_as_orbax_writes_them(tmp_path, ocdbt, zarr3):
    tree = {
        "octo_transformer": {"a.b": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}},
        "heads_x": {"bias": np.arange(3, dtype=np.float32), "scalar": np.float32(2.5)},
    }
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "default", tree)
    got, want = dict(flatten(read_params(tmp_path / "default"))), dict(flatten(tree))
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_placeholders_and_damage(tmp_path):
    tree = {"x": {"kernel": np.ones((2, 2), np.float32)}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "step", tree)
    for file in tmp_path.glob("step/_*"):
        file.unlink()
    mixed = {"x": {"kernel": "PLACEHOLDER://x.kernel", "bias": np.zeros(2, np.float32)}}
    (tmp_path / "step" / "checkpoint").write_bytes(pack(mixed))
    got = read_params(tmp_path / "step")
    np.testing.assert_array_equal(got["x"]["kernel"], tree["x"]["kernel"])
    assert got["x"]["bias"].shape == (2,)
    shutil.rmtree(tmp_path / "step" / "x.kernel")
    with pytest.raises(PretrainedError, match="no parameters|x.kernel"):
        read_params(tmp_path / "step")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PretrainedError, match="manifest.ocdbt"):
        read_params(tmp_path / "empty")


SIZES = {"small": (12, 384, 6, 1536, 27_000_000), "base": (12, 768, 12, 3072, 92_800_000)}


@pytest.mark.parametrize("size", SIZES)
def test_the_shapes_of_the_released_sizes(shared, size):
    """Octo-small-1.5 and octo-base-1.5: shapes only, nothing of that size is allocated."""
    layers, width, heads, mlp, total = SIZES[size]
    config = json.loads((shared / "golden" / "octo_tiny_diffusion" / "config.json").read_text())["model"]
    config["token_embedding_size"] = width
    config["transformer_kwargs"] |= {"num_layers": layers, "mlp_dim": mlp, "num_attention_heads": heads}
    config["heads"]["action"]["kwargs"]["hidden_dim"] = 256
    config["task_tokenizers"]["language"]["kwargs"]["encoder"] = "t5-base"
    for tokenizer in config["observation_tokenizers"].values():
        tokenizer["kwargs"]["encoder"]["kwargs"] = {}
    example = read_msgpack(shared / "golden" / "octo_tiny_diffusion" / "example_batch.msgpack")
    for key, pixels in (("image_primary", 256), ("image_wrist", 128)):
        example["observation"][key] = np.zeros((1, 2, pixels, pixels, 3), np.uint8)
        example["task"][key] = np.zeros((1, pixels, pixels, 3), np.uint8)
    model = translate_config(config)
    counts = parameter_counts(abstract_params(build_model(model), release_spec(model, example, model["heads"])))
    t5 = counts.pop("task_tokenizers_language/hf_model")
    assert t5 == 109_628_544
    assert abs(sum(counts.values()) - total) < 0.002 * total, counts


def test_import_script(shared, tmp_path, capsys):
    source = shared / "golden" / "octo_tiny_diffusion"
    assert import_octo.main([str(source), str(tmp_path / "ours")]) == 0
    assert "refuses texts" in capsys.readouterr().out
    ours, release = Policy.load_pretrained(tmp_path / "ours"), Policy.load_pretrained(source)
    got, want = dict(flatten(ours.params)), dict(flatten(release.params))
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], name)
    assert set(ours.statistics) == {"bridge_dataset", "fractal20220817_data"}
    assert ours.config["model"]["octo_compat"] and "octo_compat" in (tmp_path / "ours" / "README.md").read_text()
    with pytest.raises(ValueError, match="spiece.model"):
        ours.create_tasks(texts=["go"])


def test_language_is_encoded_once_per_task(shared):
    """The features in the task give what the token ids give; ids are not looked at again."""
    policy = Policy.load_pretrained(shared / "golden" / "octo_tiny_diffusion")
    goals = {key: np.zeros((2, *leaf.shape), np.uint8) for key, leaf in policy.batch_spec.task().items()
             if key.startswith("image_")}  # fmt: skip
    tasks = policy.create_tasks(goals=goals)
    text = tasks["language_instruction"]
    assert text["encoded"]["task_tokenizers_language"].shape == (2, 16, 32)
    observation = synthetic_batch(policy.batch_spec, 2)["observation"]
    bare = tasks | {"language_instruction": {k: text[k] for k in ("input_ids", "attention_mask")}}
    other = tasks | {"language_instruction": text | {"input_ids": text["input_ids"] + 3}}
    first, second, third = (policy.sample_actions(observation, t, rng=jax.random.key(0)) for t in (tasks, bare, other))
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(first, third)


def test_frozen_encoder_in_bfloat16_has_no_gradient(shared):
    release, *_ = load_release(shared / "golden" / "octo_tiny_diffusion")
    language = release["task_tokenizers"]["language"]
    config = release | {"task_tokenizers": {"language": language | {"encoder_dtype": "bfloat16"}}}
    spec = Policy.load_pretrained(shared / "golden" / "octo_tiny_diffusion").batch_spec
    model = build_model(config)
    params = tiny.random_params(model, spec)
    batch = synthetic_batch(spec, 1)
    kept = params["octo_transformer"]["task_tokenizers_language"]["hf_model"]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(kept)} == {"bfloat16"}

    def features(m, p):
        run = jax.jit(lambda p: m.apply({"params": p}, batch["task"], method="encode_language"))
        return run(p)["task_tokenizers_language"]

    wide = build_model(release)
    exact = features(wide, jax.tree.map(lambda x: np.asarray(x, np.float32), params))
    got = features(model, params)
    assert got.dtype == "bfloat16" and np.max(np.abs(np.asarray(got, np.float32) - exact)) < 0.05 * np.max(
        np.abs(exact)
    )
    grads = jax.jit(jax.grad(lambda p: features(model, p).astype("float32").sum()))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="frozen"):
        bad = language | {"encoder_dtype": "bfloat16", "finetune_encoder": True}
        abstract_params(build_model(release | {"task_tokenizers": {"language": bad}}), spec)


def test_format_version_1_still_loads(tmp_path):
    """What the first version wrote: no card, no language_embedding."""
    model = build_model(tiny.config())
    policy = Policy({"model": tiny.config(), "batch_spec": tiny.SPEC.to_json()}, tiny.random_params(model), {})
    policy.save_pretrained(tmp_path / "old")
    document = json.loads((tmp_path / "old" / "config.json").read_text())
    assert document["format_version"] == 2
    document["format_version"] = 1
    del document["batch_spec"]["language_embedding"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(document))
    for name in ("README.md", "SHA256SUMS"):
        (tmp_path / "old" / name).unlink()
    assert Policy.load_pretrained(tmp_path / "old").batch_spec == tiny.SPEC
    (tmp_path / "old" / "config.json").write_text(json.dumps(document | {"format_version": 0}))
    with pytest.raises(PretrainedError, match="reads 1 to 2"):
        Policy.load_pretrained(tmp_path / "old")


REMOTE = """
import sys, numpy as np
from octo_like.common.schema import flatten
from octo_like.policy.policy import Policy
from octo_like.policy.locations import LocationError
local, location = sys.argv[1:]
policy = Policy.load_pretrained(local)
policy.push(location)
for _ in range(2):
    back = Policy.load_pretrained(location)
    got, want = dict(flatten(back.params)), dict(flatten(policy.params))
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], name)
assert back.batch_spec == policy.batch_spec
try:
    Policy.load_pretrained(location + "/nothing")
except LocationError as error:
    assert "nothing" in str(error), error
else:
    raise AssertionError("an empty location loaded")
assert "tensorflow" not in sys.modules
"""


def run_remote(source, location, **environment):
    keep = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "PYTHONPATH", "TMPDIR")}
    path = os.pathsep.join([str(ROOT), *filter(None, [keep.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, str(source), location],
        env=keep | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_google_cloud_storage(shared, tmp_path):
    with remote.gcs() as (server, url):
        run_remote(
            shared / "golden" / "octo_tiny_film_map",
            "gs://bucket/policies/tiny",
            TENSORSTORE_GCS_HTTP_URL=url,
            GOOGLE_AUTH_TOKEN_FOR_TESTING="none",
            OCTO_LIKE_CACHE=str(tmp_path),
        )
        assert "policies/tiny/config.json" in server.objects and "policies/tiny/README.md" in server.objects
        uploads = [line for line in server.requests if line.startswith("POST")]
        assert "config.json" in uploads[-1]
        # The second load asked whether the parameters had changed, and got no data.
        asked = [line for line in server.requests if "params.safetensors?alt=media" in line]
        assert len(asked) == 2 and "ifGenerationNotMatch" in asked[1]


def test_hugging_face_hub(shared, tmp_path):
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed; run make test-hub")
    with remote.hub() as (server, url):
        hub = dict(HF_ENDPOINT=url, HF_HOME=str(tmp_path), HF_TOKEN="hf_none", HF_HUB_DISABLE_XET="1")
        run_remote(shared / "golden" / "octo_tiny_film_map", "hf://me/policy", **hub)
        assert "params.safetensors" in server.objects and server.objects["README.md"].startswith(b"---\nlibrary_name")
        assert [*server.large.values()] == [server.objects["params.safetensors"]]  # weights do not travel in a commit
        run_remote(shared / "golden" / "octo_tiny_film_map", "hf://me/policy@main/arms/left", **hub)
        assert "arms/left/config.json" in server.objects


def test_locations_that_are_none(tmp_path):
    from octo_like.policy.locations import LocationError, fetch, push

    assert fetch(f"file://{tmp_path}") == tmp_path and fetch(tmp_path) == tmp_path
    for bad in ("s4://bucket/x", "hf://only-one-part", "gs://bucket"):
        with pytest.raises(LocationError, match="valid|expected"):
            fetch(bad)
    with pytest.raises(LocationError, match="has no config.json"):
        push(tmp_path, "gs://bucket/x", last="config.json")
