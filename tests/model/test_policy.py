"""The public face: files, tasks, units, errors."""

import json

import jax
import numpy as np
import pytest

from octo_like.common.normalization import compute_statistics
from octo_like.common.schema import synthetic_batch
from octo_like.common.text import TextTokenizer
from octo_like.model.octo import build_model
from octo_like.policy.policy import Policy
from octo_like.policy.pretrained import PretrainedError, merge_params
from octo_like.policy.surgery import operate
from tests.model import tiny


@pytest.fixture(scope="module")
def policy():
    tokenizer = TextTokenizer.load("builtin", tiny.SPEC.language_length)
    config = tiny.config()
    config["task_tokenizers"]["language"]["vocab_size"] = 0
    model = build_model(config, vocab_size=tokenizer.vocab_size)
    params = tiny.random_params(model)
    rng = np.random.default_rng(0)
    statistics = {
        "arm": {
            "action": compute_statistics(rng.normal(3.0, 2.0, (100, 4)), [True, True, True, False]),
            "proprio": compute_statistics(rng.normal(1.0, 0.5, (100, 5))),
            "num_transitions": 100,
            "num_trajectories": 5,
            "normalization": "normal",
        },
        "small": {
            "action": compute_statistics(rng.normal(0.0, 1.0, (100, 2))),
            "num_transitions": 100,
            "num_trajectories": 5,
            "normalization": "bounds",
        },
    }
    return Policy({"model": config, "batch_spec": tiny.SPEC.to_json()}, params, statistics, tokenizer)


@pytest.fixture
def observation():
    return synthetic_batch(tiny.SPEC, 2, seed=4)["observation"]


def test_save_and_load_are_exact(policy, observation, tmp_path):
    policy.save_pretrained(tmp_path / "export")
    policy.save_pretrained(tmp_path / "export")  # replaces
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    loaded = Policy.load_pretrained(tmp_path / "export")
    tasks = policy.create_tasks(texts=["reach the red block", ""])
    for name in (None, "arm", "small"):
        given = {k: v for k, v in observation.items() if name != "small" or not k.startswith("proprio")}
        first, second = (
            p.sample_actions(given, tasks, rng=jax.random.key(1), unnormalize=name) for p in (policy, loaded)
        )
        np.testing.assert_array_equal(first, second)
        assert first.shape == (2, 3, 2 if name == "small" else 4)
    assert loaded.get_pretty_spec() == policy.get_pretty_spec()
    assert "image_primary" in loaded.get_pretty_spec() and "arm" in loaded.get_pretty_spec()


def test_units(policy, observation):
    tasks = policy.create_tasks(texts=["a", "b"])
    stats = policy.statistics["arm"]
    raw = dict(observation)
    raw["proprio"] = observation["proprio"] * stats["proprio"]["std"] + stats["proprio"]["mean"]
    normalised = policy.sample_actions(observation, tasks, rng=jax.random.key(1))
    physical = policy.sample_actions(raw, tasks, rng=jax.random.key(1), unnormalize="arm")
    want = np.where(stats["action"]["mask"], normalised * stats["action"]["std"] + stats["action"]["mean"], normalised)
    np.testing.assert_allclose(physical, want, rtol=1e-3, atol=1e-3)


def test_relative_actions_become_absolute(policy, observation, tmp_path):
    """Chunks learned relative to proprioception come out with that of the last timestep added, also after loading."""
    tasks = policy.create_tasks(texts=["a", "b"])
    statistics = {**policy.statistics, "relative": {**policy.statistics["arm"], "relative_to": [4, None, 0, None]}}
    relative = Policy(policy.config, policy.params, statistics, policy.text_tokenizer)
    relative.save_pretrained(tmp_path / "export")
    sample = dict(rng=jax.random.key(1), sample_shape=(3,))
    plain = policy.sample_actions(observation, tasks, unnormalize="arm", **sample)
    origin = np.asarray(observation["proprio"])[:, -1]
    moved = np.stack([origin[:, 4], np.zeros(2), origin[:, 0], np.zeros(2)], -1)[:, None]
    unmasked = {key: value for key, value in observation.items() if key != "pad_mask_dict"}
    for one, given in ((relative, observation), (Policy.load_pretrained(tmp_path / "export"), unmasked)):
        got = one.sample_actions(given, tasks, unnormalize="relative", **sample)
        np.testing.assert_allclose(got, plain + moved, rtol=1e-6, atol=1e-6)
    blind = {key: value for key, value in observation.items() if not key.startswith("proprio")}
    masked = dict(observation, pad_mask_dict={**observation["pad_mask_dict"], "proprio": np.zeros((2, 2), bool)})
    for without in (blind, masked):
        with pytest.raises(ValueError, match="proprio is missing, but the actions of 'relative' are relative"):
            relative.sample_actions(without, tasks, unnormalize="relative", **sample)


def test_tasks(policy):
    goal = np.zeros((32, 32, 3), np.uint8)
    both = policy.create_tasks(texts=["go"], goals={"image_primary": goal})
    assert both["pad_mask_dict"]["image_primary"].all() and both["pad_mask_dict"]["language_instruction"].all()
    words = policy.create_tasks(texts=["go", ""])
    assert words["pad_mask_dict"]["language_instruction"].tolist() == [True, False]
    assert not words["pad_mask_dict"]["image_primary"].any()
    for arguments, match in (
        (dict(), "needs texts"),
        (dict(texts="one"), "list"),
        (dict(texts=["a"], goals={"image_wrist": goal}), "image_primary"),
        (dict(goals={"image_primary": goal[:8]}), r"expected \(B, 32, 32, 3\) uint8"),
        (dict(texts=["a", "b"], goals={"image_primary": goal}), "same batch size"),
    ):
        with pytest.raises(ValueError, match=match):
            policy.create_tasks(**arguments)


def test_input_errors_name_what_is_wrong(policy, observation):
    tasks = policy.create_tasks(texts=["a", "b"])
    sample = lambda obs, **kw: policy.sample_actions(obs, tasks, rng=jax.random.key(0), **kw)  # noqa: E731
    with pytest.raises(ValueError, match="did you mean 'arm'"):
        sample(observation, unnormalize="amr")
    with pytest.raises(ValueError, match=r"image_primary: expected .* uint8, got .* float32"):
        sample(observation | {"image_primary": observation["image_primary"].astype(np.float32)})
    with pytest.raises(ValueError, match="none of this policy's cameras"):
        sample({k: v for k, v in observation.items() if not k.startswith("image_")})
    with pytest.raises(ValueError, match="timestep_pad_mask"):
        sample({k: v for k, v in observation.items() if k != "timestep_pad_mask"})
    with pytest.raises(ValueError, match="without proprio"):
        sample(observation, unnormalize="small")
    for name, width, words in (
        ("arm", 3, r"\(B, W, 5\) .*as 'arm' was.*got \(2, 2, 3\)"),
        (None, 9, r"\(B, W, 5\).*\(2, 2, 9\)"),
    ):
        with pytest.raises(ValueError, match=f"observation/proprio: expected {words}"):
            sample(observation | {"proprio": np.zeros((2, 2, width), np.float32)}, unnormalize=name)
    with pytest.raises(ValueError, match=r"observation/proprio: expected \(B, W, 5\).*got \(5\)"):
        sample(observation | {"proprio": np.zeros(5, np.float32)})
    with pytest.raises(ValueError, match="one task per row"):
        policy.sample_actions(observation, policy.create_tasks(texts=["a"]), rng=jax.random.key(0))
    with pytest.raises(ValueError, match="unknown head 'x'"):
        sample(observation, head="x")


def test_values_that_are_no_numbers_are_refused_where_they_count(policy, observation):
    """A policy answers NaN with actions that look like any others."""
    observation = {key: value for key, value in observation.items() if key != "pad_mask_dict"}
    observation["timestep_pad_mask"] = np.ones_like(observation["timestep_pad_mask"])
    task, rng = policy.create_tasks(texts=["put it down"] * 2), jax.random.key(0)
    for bad in (np.nan, np.inf):
        proprio = np.array(observation["proprio"])
        proprio[0, -1, 0] = bad
        with pytest.raises(ValueError, match=r"observation/proprio: NaN or infinite values in row 0, timestep \d"):
            policy.sample_actions({**observation, "proprio": proprio}, task, rng=rng)
    masked = np.array(observation["timestep_pad_mask"])
    masked[0, 0] = False
    proprio = np.array(observation["proprio"])
    proprio[0, 0] = np.nan  # no timestep of the episode: anything may stand there
    got = policy.sample_actions({**observation, "proprio": proprio, "timestep_pad_mask": masked}, task, rng=rng)
    assert np.isfinite(got).all()


def test_what_is_easily_got_wrong_is_said(policy, observation):
    task, rng = policy.create_tasks(texts=["put it down"] * 2), jax.random.key(0)
    single = jax.tree.map(lambda leaf: leaf[0], observation)
    with pytest.raises(ValueError, match=r"expected \(B, W\), got .* a single window needs a batch of one"):
        policy.sample_actions(single, task, rng=rng)
    three = jax.random.split(rng, 3)
    for wrong, got in ((0, "got 0"), (None, "got None"), ("a", "got 'a'"), (np.zeros(2), "float"), (three, "3 keys")):
        with pytest.raises(ValueError, match=rf"rng must be a key, jax.random.key\(0\).*{got}"):
            policy.sample_actions(observation, task, rng=wrong)
    for wrong in ({}, "put it down", None):
        with pytest.raises(ValueError, match="tasks must be what create_tasks gives"):
            policy.sample_actions(observation, wrong, rng=rng)
    with pytest.raises(ValueError, match="texts must be a list of instructions"):
        policy.create_tasks(texts=5)
    with pytest.raises(ValueError, match="a task needs texts, goals or both"):
        policy.create_tasks(goals={})
    for texts in ([], [None], [5]):
        with pytest.raises(ValueError, match="texts must be strings, at least one"):
            policy.create_tasks(texts=texts)


def test_the_files_of_an_export_can_be_read_by_whom_the_umask_says(policy, tmp_path):
    policy.save_pretrained(tmp_path / "export")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "export").iterdir() if path.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_missing_camera_is_masked_not_guessed(policy, observation):
    tasks = policy.create_tasks(texts=["a", "b"])
    absent = {k: v for k, v in observation.items() if k != "image_wrist"}
    garbage = observation | {"pad_mask_dict": {"image_wrist": np.zeros((2, 2), bool)}}
    first, second = (policy.sample_actions(o, tasks, rng=jax.random.key(1)) for o in (absent, garbage))
    np.testing.assert_array_equal(first, second)


def test_directories_that_are_not_policies(policy, tmp_path):
    with pytest.raises(PretrainedError, match="not a directory"):
        Policy.load_pretrained(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(PretrainedError, match="notes.txt"):
        Policy.load_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match="not overwritten"):
        policy.save_pretrained(tmp_path)
    policy.save_pretrained(tmp_path / "run" / "export")
    with pytest.raises(PretrainedError, match="did you mean .*export"):
        Policy.load_pretrained(tmp_path / "run")
    file = tmp_path / "run" / "export" / "params.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(PretrainedError, match="damaged"):
        Policy.load_pretrained(tmp_path / "run" / "export")
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    (tmp_path / "run" / "export" / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(PretrainedError, match="99"):
        Policy.load_pretrained(tmp_path / "run" / "export")


@pytest.mark.parametrize("name", ["config.json", "dataset_statistics.json", "SHA256SUMS", "text/tokenizer.json"])
def test_a_flipped_bit_of_an_export_is_found(tmp_path, policy, name):
    """Digits are what hurts: a file that still is JSON, with other numbers."""
    policy.save_pretrained(tmp_path / "export")
    file = tmp_path / "export" / name
    if not file.exists():
        pytest.skip("this policy takes no language")
    content = file.read_bytes()
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    for place in digits[:: max(1, len(digits) // 8)]:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(PretrainedError, match="damaged|format version|missing"):
            Policy.load_pretrained(tmp_path / "export")
    file.write_bytes(content)
    Policy.load_pretrained(tmp_path / "export")
    if name != "SHA256SUMS":
        (tmp_path / "export" / "SHA256SUMS").unlink()  # as exports were written before
        Policy.load_pretrained(tmp_path / "export")


def test_merge_reports_every_parameter(policy):
    config = operate(
        policy.config["model"],
        {"heads": {"action": tiny.diffusion() | dict(action_dim=2)}, "observation_tokenizers": {"wrist": None}},
    )
    config["max_window"] = 6
    model = build_model(config, vocab_size=policy.text_tokenizer.vocab_size)
    target = tiny.random_params(model, seed=3)
    merged, report = merge_params(target, jax.device_get(policy.params))
    assert report.status["octo_transformer/obs_primary_projection/kernel"] == "loaded"
    assert report.status["octo_transformer/obs_primary_pos_embedding"] == "resized"
    assert report.status["heads_action/diffusion_model/reverse_network/Dense_1/kernel"] == "new"
    assert any("wrist" in path for path in report.unused)
    old = np.asarray(policy.params["octo_transformer"]["obs_primary_pos_embedding"])
    np.testing.assert_array_equal(merged["octo_transformer"]["obs_primary_pos_embedding"][:, :4], old)
    assert sum(report.count(s)[0] for s in ("loaded", "resized", "new")) == len(jax.tree.leaves(target))
    assert "resized" in str(report)
    with pytest.raises(PretrainedError, match="matches no parameter"):
        merge_params(target, policy.params, reinitialize=("nonsense",))
    with pytest.raises(PretrainedError, match="no parameter of the checkpoint fits"):
        merge_params(target, {"other": {"x": np.zeros(3)}})
    with pytest.raises(PretrainedError, match="removes"):
        operate(config, {"heads": {"nothing": None}})
