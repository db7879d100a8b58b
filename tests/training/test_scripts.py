"""train.py and finetune.py as commands, on a dataset nobody named: resume, adaptation, devices, bad input."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from octo_like.common.schema import flatten
from octo_like.policy.policy import Policy
from octo_like.training.checkpoint import Checkpointer
from octo_like.training.metrics import read_metrics
from tests.data.conftest import build, make_episodes

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "tests/training/tiny_config.py"


def run(script, *arguments, devices=1, check=True):
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done


def train(workdir, *arguments, words="", **kwargs):
    return run("train.py", "--config", f"{CONFIG}:{words}", "--workdir", workdir, *arguments, **kwargs)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    build(folder, "toy_buttons", {"train": make_episodes(20)}, num_shards=2)
    build(folder, "toy_wide", {"train": make_episodes(12, seed=5, action_dim=6)})
    return folder


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A whole run of 8 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(workdir, f"--config.data.data_dir={data_dir}")
    return workdir


def params_of(workdir):
    return dict(flatten(Policy.load_pretrained(workdir / "export").params))


def test_run_leaves_what_it_should(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "export", "media", "tensorboard"} <= names
    last = read_metrics(trained)[-1]
    assert last["step"] == 8 and np.isfinite(last["train/loss"]) and np.isfinite(last["val/toy/action/loss"])
    assert any(key.startswith("val/toy/mae/") for key in last)
    assert list((trained / "media" / "predictions" / "toy").glob("*.png"))
    policy = Policy.load_pretrained(trained / "export")
    assert set(policy.statistics) == {"toy"} and policy.statistics["toy"]["action"]["mean"].shape == (4,)


def test_resume_is_bitwise(trained, data_dir, tmp_path):
    """4 steps, a new process, 4 more: the same parameters as 8 steps at once."""
    train(tmp_path / "parts", f"--config.data.data_dir={data_dir}", "--config.num_steps=4")
    second = train(tmp_path / "parts", f"--config.data.data_dir={data_dir}")
    assert "resumed from step 4" in second.stderr and "num_steps" in second.stderr
    whole, parts = params_of(trained), params_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf, parts[path], path)


def test_resume_refuses_another_run(trained, data_dir, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained, workdir)
    refused = train(workdir, f"--config.data.data_dir={data_dir}", "--config.seed=1", check=False)
    assert refused.returncode != 0 and "seed" in refused.stderr and "Traceback" not in refused.stderr


def test_devices_do_not_change_the_losses(tmp_path):
    """1 device, and 8 with parameters and batch sharded: the same losses over 20 steps."""
    losses = {}
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4") if devices == 8 else ()
        train(workdir, "--config.num_steps=20", *mesh, words="synthetic", devices=devices)
        losses[devices] = np.array([row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row])
    assert len(losses[1]) == 20
    np.testing.assert_allclose(losses[1], losses[8], rtol=1e-5)


def test_best_policy_and_warm_start(tmp_path):
    """The best evaluation's policy is exported beside the last one; another run begins with its parameters."""
    small, first = "synthetic,smallest", tmp_path / "first"
    keep = ("--config.checkpoint.keep_best=1", "--config.checkpoint.every=2", "--config.checkpoint.keep_last=1")
    train(first, *keep, "--config.eval.every=2", words=small)
    reader = Checkpointer(first, read_only=True)
    scores = {
        row["step"]: row["val/synthetic/action/loss"]
        for row in read_metrics(first)
        if "val/synthetic/action/loss" in row
    }
    best = min(scores, key=scores.get)
    assert sorted(scores) == [2, 4, 6, 8] and reader.best_step() == best and set(reader.all_steps()) == {best, 8}
    averaged = reader.load_arrays(best, "ema/")
    for path, leaf in flatten(Policy.load_pretrained(first / "export_best").params):
        np.testing.assert_array_equal(leaf, averaged[path], path)

    second = tmp_path / "second"
    flags = ("--config.num_steps=1", "--config.optimizer.warmup_steps=1", "--config.eval.every=None")
    begin = f"--config.init_from={first / 'checkpoints' / str(best)}"
    train(second, *flags, begin, "--config.checkpoint.export=raw", words=small)
    report = json.loads((second / "weights.json").read_text())["summary"]
    assert report["loaded"]["arrays"] == len(averaged) and not report["new"]["arrays"]
    # The learning rate of the first step is 0: what is exported is what the run began with.
    for path, leaf in params_of(second).items():
        np.testing.assert_array_equal(leaf, averaged[path], path)
    nowhere = train(tmp_path / "x", *flags, "--config.init_from=/no/where", words=small, check=False)
    assert nowhere.returncode == 2 and "neither an exported policy nor a run with checkpoints" in nowhere.stderr


def test_adaptation_to_another_robot(trained, data_dir, tmp_path):
    """Another action space from configuration alone; the report says what became of every parameter."""
    common = (
        "--config",
        f"{CONFIG}:finetune",
        f"--config.data.data_dir={data_dir}",
        "--config.data.datasets.toy.name=toy_wide",
        "--config.surgery.heads.action={'kind': 'diffusion', 'readout': 'readout_action', 'action_horizon': 3, "
        "'action_dim': 6, 'num_steps': 5, 'hidden_dim': 32}",
        "--config.num_steps=4",
        "--config.optimizer.freeze=('BlockTransformer',)",
    )
    adapted = tmp_path / "adapted"
    done = run("finetune.py", *common, "--workdir", adapted, f"--config.pretrained={trained / 'export'}")
    report = (adapted / "weights.txt").read_text()
    assert re.search(r"resized +heads_action/diffusion_model/reverse_network/Dense_1/kernel: 32x12 to 32x18", report), (
        report
    )
    assert "loaded" in done.stderr and "frozen" in done.stderr
    before, after = params_of(trained), params_of(adapted)
    assert after["heads_action/diffusion_model/reverse_network/Dense_1/kernel"].shape == (32, 18)
    frozen = [path for path in after if "BlockTransformer" in path]
    assert frozen and all(np.array_equal(before[path], after[path]) for path in frozen)
    moved = "octo_transformer/obs_primary_projection/kernel"
    assert not np.array_equal(before[moved], after[moved])

    wrong = run("finetune.py", *common, "--workdir", tmp_path / "x", f"--config.pretrained={trained}", check=False)
    assert wrong.returncode != 0 and "did you mean" in wrong.stderr and "export" in wrong.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--config.data.datasets.toy.image_keys.primary=front"], ["front", "front_rgb"]),
        (["--config.data.datasets.toy.name=toy_button"], ["toy_button", "toy_buttons"]),
        (["--config.data.datasets.toy.version=3.0.0"], ["3.0.0", "1.0.0"]),
        (["--config.data.datasets.toy.name=toy_wide"], ["6", "4"]),
        (["--config.data.datasets.toy.split=test"], ["test", "train"]),
        (["--config.optimiser.peak=1"], ["optimizer"]),
        (["--config.batch_size=15", "--config.accumulate=2"], ["15", "multiple"]),
        (["--config.data.kind=rdls"], ["rdls", "synthetic"]),
    ],
)
def test_bad_input_is_one_clear_error(data_dir, tmp_path, arguments, words):
    done = train(tmp_path / "run", f"--config.data.data_dir={data_dir}", *arguments, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    for word in words:
        assert word in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())
