"""LoRA on the robots that pretraining never saw: killed, continued, and the same to the last bit; the export acts."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from octo_like.common.config import load_config, to_dict
from octo_like.common.schema import flatten, synthetic_batch
from octo_like.policy.policy import Policy
from octo_like.training.program import network_from_config
from tests.model import tiny
from tests.training.test_adaptation import final_sums
from tests.training.test_scripts import ROOT, run

pytestmark = pytest.mark.slow  # two or three minutes each

SIMULATORS = all(importlib.util.find_spec(name) for name in ("metaworld", "gymnasium_robotics", "mujoco"))

# Config of adaptation, config of pretraining, builder and what it writes.
ROBOTS = {
    "tabletop_arm3": (
        "configs/finetune.py:lora,language,tabletop",
        "configs/tabletop.py",
        ("data/tabletop/build.py", "tabletop_arm3=4+1"),
    ),
    "fetch": ("configs/adapt_sim.py:fetch,lora", "configs/metaworld.py", ("data/sims/build.py", "fetch=2+1")),
}


def base_policy(config_file, path):
    """A policy of a pretraining config, with random weights everywhere."""
    config = load_config(f"{ROOT}/{config_file}")
    network = network_from_config(config)
    params = tiny.random_params(network.model, network.spec)
    description = {"model": to_dict(config)["model"], "batch_spec": network.spec.to_json()}
    Policy(description, params, {}, network.tokenizer).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "robot",
    [
        "tabletop_arm3",
        pytest.param(
            "fetch", marks=[pytest.mark.sim, pytest.mark.skipif(not SIMULATORS, reason="needs the extra [sim]")]
        ),
    ],
)
def test_killed_and_continued(robot, tmp_path):
    adaptation, pretraining, (builder, episodes) = ROBOTS[robot]
    run(builder, "--data_dir", tmp_path / "data", "--workers", "1", "--episodes", episodes)
    arguments = [
        f"--config.pretrained={base_policy(pretraining, tmp_path / 'base')}",
        f"--config.data.data_dir={tmp_path / 'data'}",
        *("--config.num_steps=60", "--config.batch_size=8", "--config.optimizer.warmup_steps=4"),
        *("--config.checkpoint.every=8", "--config.eval.every=None", "--config.checkpoint.keep_best=0"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("finetune.py", "--config", adaptation, "--workdir", whole, *arguments)

    command = [sys.executable, "finetune.py", "--config", adaptation, "--workdir", str(killed), *arguments]
    with (tmp_path / "log").open("w") as log:
        environment = dict(os.environ, PYTHONPATH=str(ROOT))
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log)
    deadline = time.monotonic() + 600
    while not (killed / "checkpoints" / "16").exists():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "export").exists()
    done = run("finetune.py", "--config", adaptation, "--workdir", killed, *arguments)
    assert "resumed from step" in done.stderr and "resumed from step 0" not in done.stderr
    assert final_sums(killed) == final_sums(whole)

    actions = []
    for workdir in (whole, killed):
        policy = Policy.load_pretrained(workdir / "export")
        batch = synthetic_batch(policy.batch_spec, 2)
        tasks = policy.create_tasks(texts=["slide the block to the red ball", ""])
        sampled = policy.sample_actions(batch["observation"], tasks, rng=jax.random.key(0), unnormalize=robot)
        assert sampled.shape[0] == 2 and np.all(np.isfinite(sampled))
        actions.append(np.asarray(sampled))
    np.testing.assert_array_equal(*actions)
    base = dict(flatten(Policy.load_pretrained(tmp_path / "base").params))
    after = dict(flatten(policy.params))
    encoder = [path for path in base if "observation_tokenizers_primary" in path]
    assert encoder and all(np.array_equal(base[path], after[path]) for path in encoder), "frozen parameters moved"
