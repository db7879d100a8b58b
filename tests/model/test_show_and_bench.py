"""scripts/show_model.py and scripts/bench_model.py, called as commands are; the pictures show what they say."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from octo_like.common.schema import flatten, unflatten
from octo_like.common.text import TextTokenizer
from octo_like.envs import TabletopEnv
from octo_like.model.octo import build_model
from octo_like.policy.describe import encoding_flops, sample_flops
from octo_like.policy.octo_release import load_release, release_spec
from octo_like.policy.policy import Policy
from scripts import bench_model, show_model
from tests.model import light, tiny
from tests.robot.tiny import tiny_policy

GREEN, RED = "push the green block to the left", "push the red block to the left"


@pytest.fixture(scope="module")
def policy():
    """One camera of 2 x 2 patches, words, one block, one readout; random weights."""
    return tiny_policy("robot", 4, None)


def picture(path, size=32):
    env = TabletopEnv("gripper", image_size=64)
    image = env.reset(seed=3)[0]["image_primary"]
    Image.fromarray(image).resize((size, size)).save(path)


def with_values(policy, change):
    """The policy with other parameters: `change` gets (path, leaf)."""
    params = unflatten({path: change(path, np.asarray(leaf)) for path, leaf in flatten(policy.params)})
    return Policy(policy.config, params, policy.statistics, policy.text_tokenizer)


def maps_of(policy, text=GREEN):
    observation = {
        "image_primary": np.random.default_rng(0).integers(0, 256, (1, 1, 32, 32, 3), np.uint8),
        "timestep_pad_mask": np.ones((1, 1), bool),
    }
    return show_model.attention_over_image(policy, observation, text, "primary", "readout_action")


def test_a_query_that_asks_nothing_attends_to_all_it_may_alike(policy):
    """Without queries every logit is 0: the weights are one over the number of valid tokens of the rule."""
    silent = with_values(policy, lambda path, leaf: 0 * leaf if "/query/" in path else leaf)
    words = int((policy.create_tasks(texts=[GREEN])["language_instruction"]["attention_mask"] > 0).sum())
    maps = maps_of(silent)
    assert maps.shape == (1, 2, 2)
    np.testing.assert_allclose(maps, 1 / (words + 4 + 1), rtol=1e-5)  # words, patches, the readout itself
    np.testing.assert_array_equal(maps, maps_of(silent, RED))


def rebuilt(policy, **changes):
    """A policy with changes in its model's config and larger random weights."""
    config = policy.config | {"model": policy.config["model"] | changes}
    model = build_model(config["model"], vocab_size=policy.text_tokenizer.vocab_size)
    return Policy(config, tiny.random_params(model, policy.batch_spec), policy.statistics, policy.text_tokenizer)


def test_words_change_where_it_looks(policy):
    """A patch learns of the words in the first block: there they share the readout's weight with the patches, but only
    from the second on they change which patch gets most."""
    one = rebuilt(policy, transformer={"num_layers": 1, "num_heads": 1, "mlp_dim": 32})
    green, red = maps_of(one), maps_of(one, RED)
    assert 0 < green.sum() < 1 and np.abs(green - red).max() > 1e-5
    np.testing.assert_allclose(green / green.sum(), red / red.sum(), rtol=1e-4)
    two = rebuilt(policy, transformer={"num_layers": 2, "num_heads": 1, "mlp_dim": 32})
    green, red = maps_of(two), maps_of(two, RED)
    first, second = (np.abs(g / g.sum() - r / r.sum()).max() for g, r in zip(green, red, strict=True))
    assert first < 1e-5 < 1e-4 < second


def test_show_model_of_a_policy(policy, tmp_path, capsys):
    policy.save_pretrained(tmp_path / "policy")
    picture(tmp_path / "scene.png")
    out = tmp_path / "show"
    arguments = [str(tmp_path / "policy"), "--out", str(out), "--image", str(tmp_path / "scene.png")]
    assert show_model.main([*arguments, "--instruction", GREEN, "--instruction", RED]) == 0
    for name in ("rule.png", "attention.png"):
        image = np.asarray(Image.open(out / name).convert("RGB"))
        assert image.shape[0] > 300 and len(np.unique(image.reshape(-1, 3), axis=0)) > 20, name
    text = capsys.readouterr().out
    assert "obs_primary" in text and "sample_actions, action" in text
    for bad, words in (
        (["--camera", "left"], None),
        (["--readout", "readout_x"], "no token group 'readout_x'; valid: .*readout_action"),
    ):
        with pytest.raises(SystemExit if words is None else ValueError, match=words):
            show_model.main([*arguments, "--instruction", GREEN, *bad])


@pytest.mark.parametrize("robot", ["pusher", "gripper", "arm"])
def test_keypoints_are_shown_where_they_are(robot, tmp_path, monkeypatch):
    """The default policy of the tabletop world has one token per camera and no patches: its key points are drawn."""
    from configs.tabletop import get_config
    from octo_like.common.defaults import batch_spec

    config = get_config()
    spec, tokenizer = batch_spec(config), TextTokenizer.load("builtin", 14)
    model = build_model(config.model.to_dict(), vocab_size=tokenizer.vocab_size)
    policy = Policy(
        {"model": config.model.to_dict(), "batch_spec": spec.to_json()},
        tiny.random_params(model, spec),
        {},
        tokenizer,
    )
    image = TabletopEnv(robot, image_size=64).reset(seed=1)[0]["image_primary"]
    observation = {"image_primary": image[None, None], "timestep_pad_mask": np.ones((1, 1), bool)}
    maps = {
        text: show_model.attention_over_image(policy, observation, text, "primary", "readout_action")
        for text in (GREEN, RED)
    }
    assert maps[GREEN].shape == (48, 8, 8) and np.abs(maps[GREEN] - maps[RED]).max() > 1e-5
    np.testing.assert_allclose(maps[GREEN].sum((1, 2)), 1, rtol=1e-5)
    show_model.draw_attention(image, maps, tmp_path / "attention.png")
    assert Image.open(tmp_path / "attention.png").size[0] > 500


def test_tokens_that_are_no_grid_are_said_to_be_none(policy):
    model = policy.config["model"]
    primary = model["observation_tokenizers"]["primary"] | {"num_learned_tokens": 3}
    learner = rebuilt(policy, observation_tokenizers={"primary": primary})
    with pytest.raises(ValueError, match="the 3 tokens of obs_primary are no grid over its image of 32 x 32"):
        maps_of(learner)


def test_show_model_of_a_config(tmp_path, repository, capsys):
    """As a command, on a config of full size: nothing is computed for it, so that it takes seconds."""
    command = [sys.executable, "scripts/show_model.py", "--config", "configs/octo_small.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "136,670,604" in done.stdout and (tmp_path / "rule.png").is_file()
    with pytest.raises(SystemExit) as stopped:
        show_model.main([*command[2:], "--instruction", GREEN])
    assert stopped.value.code == 2 and "needs a policy" in capsys.readouterr().err


def test_flops_of_acting_leave_out_what_is_encoded_once(shared):
    config, _, _, example = load_release(shared / "golden" / "octo_tiny_diffusion")
    spec, model = release_spec(config, example, config["heads"]), build_model(config)
    once, acting = encoding_flops(model, spec), sample_flops(model, spec)
    # Per T5 block of width 32 with 16 words: q, k, v, o, the two of the feed-forward, logits and values.
    t5 = config["task_tokenizers"]["language"]["t5"]
    inner = t5["num_heads"] * t5["d_kv"]
    by_hand = 2 * 16 * (4 * t5["d_model"] * inner + 2 * t5["d_model"] * t5["d_ff"] + 2 * 16 * inner)
    assert once == t5["num_layers"] * by_hand
    assert encoding_flops(build_model(light.config()), light.SPEC) == 0
    assert 0 < once and 0 < acting


def test_bench_model_on_a_small_config(capsys):
    flags = ["--batch-size", "2", "--rounds", "1", "--samples-per-round", "2"]
    assert bench_model.main(["--config", "tests/training/tiny_config.py:smallest", *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["batch_size"] == 2 and result["parameters"] > 1000 and result["dtype"] == "float32"
    for name in ("trace_s", "compile_s", "step_s", "sample_p50_s", "step_gflop", "sample_gflop", "ceiling_gflop_per_s"):
        assert result[name] > 0 or name.endswith("gflop"), name
    assert result["sample_p99_s"] >= result["sample_p50_s"]
    for name in ("step", "sample"):
        assert 0 < result[f"{name}_share_of_ceiling"] and 0 < result[f"{name}_share_by_cpu_time"]
