"""Releases and T5 folders with something wrong: every error is one of ours and names file, key and what is expected."""

import copy
import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from octo_like.common.schema import flatten, unflatten
from octo_like.model import t5
from octo_like.model.octo import build_model
from octo_like.policy.octo_release import release_spec, t5_sizes, translate_config
from octo_like.policy.policy import Policy
from octo_like.policy.pretrained import PretrainedError, load_t5
from scripts import import_octo
from tests.model import tiny
from tests.model.test_loading import pack
from tests.model.test_made_up_release import MODEL, example_batch, write

SMALL_T5 = t5.T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)


def changed(tree, path, value):
    """A copy of a nested dict with another value at a path; ... deletes it."""
    tree = copy.deepcopy(tree)
    *parents, last = path
    node = tree
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return tree


def paths(tree, above=()):
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


@pytest.fixture(scope="module")
def params():
    config, example = translate_config(MODEL), example_batch()
    return tiny.random_params(build_model(config), release_spec(config, example, config["heads"]), seed=5)


@pytest.mark.parametrize("value", [..., None, "text", -1, 0.5, True, [], [3], {}, {"a": 1}], ids=str)
def test_whatever_a_config_holds_it_is_understood_or_refused_by_name(value):
    refused = 0
    for path in paths(MODEL):
        model = changed(MODEL, path, value)
        try:
            build_model(translate_config(model, file="there/config.json"), vocab_size=10)
        except PretrainedError as error:
            assert str(error).startswith("there/config.json: model"), (path, error)
            assert re.search(r"expected|known|not supported", str(error)), (path, error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "path,value,message",
    [
        (("heads", "mean", "kwargs", "readout_key"), ..., r"heads.mean.kwargs.readout_key is missing; .*a string"),
        (("heads", "mean", "kwargs", "readout_key"), "readout_arm", r"is 'readout_arm'; .*readout_gripper"),
        (("observation_tokenizers", "hand", "kwargs", "encoder"), ..., r"tokenizers.hand.kwargs.encoder is missing"),
        (("observation_tokenizers", "hand", "kwargs", "encoder"), "SmallStem", r"encoder is 'SmallStem'; .* an object"),
        (("observation_tokenizers", "touch", "kwargs", "obs_keys"), ..., r"touch.kwargs.obs_keys is missing; .*list"),
        (("observation_tokenizers", "touch", "kwargs", "obs_keys"), "touch", r"is 'touch'; expected a list of strings"),
        (("task_tokenizers", "sentence", "kwargs", "encoder"), "t5-xl", r"sentence.kwargs.encoder is 't5-xl'.*t5-base"),
        (("observation_tokenizers", "hand", "kwargs", "encoder", "kwargs", "patch_size"), "16", "patch_size is '16'"),
        (("max_horizon",), "5", "model.max_horizon is '5'; expected a positive integer"),
        (("readouts", "gripper"), None, "model.readouts.gripper is missing; expected a positive integer"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_config_is_said(path, value, message):
    with pytest.raises(PretrainedError, match="^config.json: .*" + message):
        translate_config(changed(MODEL, path, value))


def test_the_first_releases_do_not_know_the_right_attention():
    """Without the option they were trained with the look-up that is off by one."""
    assert translate_config(MODEL)["legacy_attention"] is False
    for value in (..., False):
        assert translate_config(changed(MODEL, ("use_correct_attention",), value))["legacy_attention"] is True


def test_files_of_a_release(params, tmp_path, capsys):
    """Each is missing, empty, no JSON, a list or text in its turn; the script says so in one line."""
    folder = write(tmp_path / "release", MODEL, params)
    (folder / "dataset_statistics.json").write_text("{}")
    checkpoint = folder / "300" / "default" / "checkpoint"
    bad_batch = example_batch()
    del bad_batch["observation"]["timestep_pad_mask"]
    flat_image = example_batch()
    flat_image["observation"]["image_primary"] = np.zeros((1, 2, 32, 32), np.uint8)
    string_leaf = dict(flatten(params)) | {"heads_mean/mean_proj/kernel": "nobody"}
    cases = [
        (folder / "config.json", b"", "config.json is damaged, expected JSON: Expecting value"),
        (folder / "config.json", b'{"model": ', "config.json is damaged, expected JSON: .*line 1 column 11"),
        (folder / "config.json", b"\xff\xfe", "config.json is damaged, expected JSON: .*utf-8"),
        (folder / "config.json", b"[1]", r"config.json holds \[1\]; expected a JSON object"),
        (folder / "config.json", b'{"window_size": 2}', r"config.json: model is missing; .*there is \['window_size'\]"),
        (folder / "config.json", b'{"model": "octo"}', "config.json: model is 'octo'; expected an object"),
        (folder / "config.json", None, r"not a released Octo checkpoint: expected config.json"),
        (folder / "example_batch.msgpack", None, "example_batch.msgpack is missing; expected the example batch"),
        (folder / "example_batch.msgpack", b"\x93", "example_batch.msgpack is not a Flax msgpack file, or damaged"),
        (folder / "example_batch.msgpack", pack([1]), "example_batch.msgpack holds a list; expected a nested dict"),
        (folder / "example_batch.msgpack", pack({"task": {}}), r"example_batch.msgpack: observation is missing"),
        (folder / "example_batch.msgpack", pack(bad_batch), r"observation.pad_mask is missing; .*array \(B, W\)"),
        (folder / "example_batch.msgpack", pack(flat_image), r"image_primary has shape \(1, 2, 32, 32\); .*B, W, h"),
        (folder / "dataset_statistics.json", b"{", "dataset_statistics.json is damaged, expected JSON"),
        (folder / "dataset_statistics.json", b'{"robot": 3}', "statistics.json: robot is 3; expected an object"),
        (checkpoint, None, "holds no parameters: expected checkpoint or manifest.ocdbt"),
        (checkpoint, pack(params)[:-7], "checkpoint is not a Flax msgpack file, or damaged"),
        (checkpoint, pack([1]), "checkpoint holds a list; expected a nested dict of arrays"),
        (checkpoint, pack(unflatten(string_leaf)), "'heads_mean/mean_proj/kernel' is 'nobody'; expected"),
        (folder / "t5_config.json", b"{", None),  # no T5 here: not looked at
    ]  # fmt: skip
    for file, content, message in cases:
        original = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        if message is None:
            Policy.load_pretrained(folder)
        else:
            with pytest.raises(PretrainedError, match=message):
                Policy.load_pretrained(folder)
        if original is not None:
            file.write_bytes(original)
    Policy.load_pretrained(folder)
    (tmp_path / "t5.json").write_text("{")
    for options, message in ((["--t5-config", str(tmp_path / "t5.json")], "t5.json is damaged"), ([], None)):
        if message is None:
            assert import_octo.main([str(folder), str(tmp_path / "ours"), *options]) == 0
        else:
            with pytest.raises(PretrainedError, match=message):
                import_octo.main([str(folder), str(tmp_path / "ours"), *options])


def test_a_config_that_no_model_can_be_built_of_is_named(params, tmp_path):
    """Every value is of its kind, but together they make no sense."""
    for name, path, value, message in (
        ("bins", ("observation_tokenizers", "joints", "kwargs", "bin_type"), "round", "bin_type|round"),
        ("keys", ("observation_tokenizers", "touch", "kwargs", "obs_keys"), ["lidar"], "obs_touch_projection"),
        ("heads", ("transformer_kwargs", "num_attention_heads"), 5, "heads"),
        ("regex", ("observation_tokenizers", "touch", "kwargs", "obs_keys"), ["("], "unterminated"),
    ):
        folder = write(tmp_path / name, changed(MODEL, path, value), params)
        with pytest.raises(PretrainedError, match=rf"(?s){name}.*config.json.*{message}"):
            Policy.load_pretrained(folder)


def test_a_t5_without_one_of_its_tables():
    tree = {"octo_transformer": {"task_tokenizers_words": {"hf_model": t5.init_params(SMALL_T5, jax.random.key(0))}}}
    assert t5_sizes(tree)["num_layers"] == 2
    flat = dict(flatten(tree))
    block = "octo_transformer/task_tokenizers_words/hf_model/encoder/block/0/layer"
    for name in (
        "octo_transformer/task_tokenizers_words/hf_model/shared/embedding",
        f"{block}/0/SelfAttention/relative_attention_bias/embedding",
        f"{block}/0/SelfAttention/q/kernel",
        f"{block}/1/DenseReluDense/wi/kernel",
    ):
        without = unflatten({key: value for key, value in flat.items() if key != name})
        with pytest.raises(
            PretrainedError, match=f"there: {re.escape(name)} is missing; expected an array with two axes"
        ):
            t5_sizes(without, "there")
        with pytest.raises(PretrainedError, match=rf"{re.escape(name)} is \(3,\); expected"):
            t5_sizes(unflatten(flat | {name: np.zeros(3)}))


@pytest.mark.parametrize(
    "gated,proj,fits",
    [
        (False, None, True),
        (False, "relu", True),
        (False, "gelu", False),
        (False, "gated-gelu", False),
        (True, None, True),
        (True, "gated-gelu", True),
        (True, "gated-relu", False),
        (True, "gated-silu", False),
        (True, "relu", False),
    ],
)
def test_a_t5_with_another_activation_is_refused(tmp_path, gated, proj, fits):
    """Its weights have the same names and shapes; the encoder would compute other numbers."""
    mlp = ["wi_0", "wi_1"] if gated else ["wi"]
    names = [f"encoder.block.0.layer.1.DenseReluDense.{name}.weight" for name in mlp]
    arrays = {name: np.ones((3, 2), np.float32) for name in names} | {"shared.weight": np.ones((4, 2), np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    if proj is not None:
        (tmp_path / "config.json").write_text(json.dumps({"d_model": 2, "feed_forward_proj": proj}))
    if fits:
        assert "shared" in load_t5(tmp_path)
        return
    expected = "gated-gelu" if gated else "relu"
    with pytest.raises(PretrainedError, match=f"config.json: feed_forward_proj is '{proj}'; expected '{expected}'"):
        load_t5(tmp_path)


def test_what_is_told_of_a_releases_t5(shared, tmp_path):
    folder = shutil.copytree(shared / "golden" / "octo_tiny_diffusion", tmp_path / "release")
    told = json.loads((folder / "t5_config.json").read_text())
    (folder / "t5_config.json").write_text(json.dumps(told | {"feed_forward_proj": "gated-silu"}))
    with pytest.raises(PretrainedError, match=r"t5_config.json: feed_forward_proj is 'gated-silu'; expected 'relu'"):
        Policy.load_pretrained(folder)
    (folder / "t5_config.json").write_text(json.dumps(told | {"layer_norm_epsilon": "small"}))
    with pytest.raises(PretrainedError, match=r"t5_config.json: layer_norm_epsilon is 'small'; expected a number"):
        Policy.load_pretrained(folder)
    (folder / "t5_config.json").unlink()
    with pytest.raises(PretrainedError, match=r"maximum is an unknown option of T5Config; known: .*max_distance"):
        Policy.load_pretrained(folder, t5={"maximum": 1})
    with pytest.raises(PretrainedError, match=r"max_distance is 'far'; expected an integer"):
        Policy.load_pretrained(folder, t5={"max_distance": "far"})


def test_an_export_without_its_keys(shared, tmp_path):
    Policy.load_pretrained(shared / "golden" / "octo_tiny_diffusion").save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    config = json.loads(file.read_text())
    for key in ("model", "batch_spec", "params_sha256"):
        file.write_text(json.dumps({name: value for name, value in config.items() if name != key}))
        with pytest.raises(PretrainedError, match=rf"config.json lacks {key}; it has \["):
            Policy.load_pretrained(tmp_path / "ours")
