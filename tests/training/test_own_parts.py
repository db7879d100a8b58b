"""The example of docs/extending.md, as it stands there, in a folder outside the repository, by the commands.

It trains on a sensor from RLDS records, resumes, exports, loads from another folder, is adapted, and acts behind a
server.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import finetune
from octo_like.aot import proof
from octo_like.common.config import load_config
from octo_like.common.parts import PartError
from octo_like.common.schema import flatten
from octo_like.policy.describe import token_report
from octo_like.policy.lora import is_adapter
from octo_like.policy.policy import Policy
from octo_like.policy.pretrained import PretrainedError
from octo_like.robot.client import PolicyClient
from octo_like.robot.rollout import sampling_keys
from octo_like.robot.server import PolicyServer
from octo_like.training import adaptation, distributed
from octo_like.training.checkpoint import Checkpointer
from octo_like.training.program import own_parts
from octo_like.training.warm_start import load_params
from tests.data import sensors
from tests.model import tiny
from tests.training.test_scripts import ROOT

MODULE = "my_parts"


def blocks() -> dict[str, str]:
    """{file: contents} of the page's Python blocks that begin with a file's name."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return dict(found)


def run(folder, script, *arguments, check=True):
    environment = dict(os.environ, PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's folder: the example's two files."""
    found = tmp_path_factory.mktemp("mine")
    for name, contents in blocks().items():
        (found / name).write_text(contents)
    assert {path.name for path in found.iterdir()} == {"my_parts.py", "my_config.py"}
    return found


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return sensors.build(tmp_path_factory.mktemp("data"), "my_robot", sensors.make_episodes(10))


@pytest.fixture(scope="module")
def workdir(folder, data_dir, tmp_path_factory):
    """A whole run of 4 steps in a process of its own."""
    found = tmp_path_factory.mktemp("runs") / "whole"
    config = f"--config={folder / 'my_config.py'}"
    run(folder, "train.py", config, "--workdir", found, f"--config.data.data_dir={data_dir}")
    return found


@pytest.fixture
def importable(folder, monkeypatch):
    """The module can be imported, and was not."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield
    sys.modules.pop(MODULE, None)


def sums_of(workdir):
    manifest = Checkpointer(workdir, read_only=True).read()
    return manifest.step, {name: leaf["sums"] for name, leaf in manifest.leaves.items()}


def observation(rows=1, force=3.0):
    return {
        "image_primary": np.full((rows, 2, 32, 32, 3), 90, np.uint8),
        "force": np.full((rows, 2, 6), force),
        "timestep_pad_mask": np.ones((rows, 2), bool),
    }


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_the_whole_one_and_another_source_is_told(workdir, folder, data_dir, tmp_path):
    other, parts = tmp_path / "elsewhere", tmp_path / "parts"
    shutil.copytree(workdir, parts)
    shutil.rmtree(parts / "checkpoints" / "4")
    shutil.copytree(folder, other)
    (other / "my_parts.py").write_text((other / "my_parts.py").read_text() + "\n# a word\n")
    done = run(
        other,
        "train.py",
        f"--config={other / 'my_config.py'}",
        "--workdir",
        parts,
        f"--config.data.data_dir={data_dir}",
    )
    assert "resumed from step 2" in done.stderr
    assert "resumed by other code: my_parts: the source of its parts has the hash" in done.stderr
    assert sums_of(parts) == sums_of(workdir)


def test_the_export_loads_from_another_folder_when_its_module_is_named(workdir, importable, tmp_path):
    shutil.copytree(workdir / "export", tmp_path / "downloaded")
    config = json.loads((tmp_path / "downloaded" / "config.json").read_text())
    assert list(config["modules"]) == [MODULE] and len(config["modules"][MODULE]) == 16
    with pytest.raises(PretrainedError, match="model.heads.action is 'my_parts:GaussianHead'"):
        Policy.load_pretrained(tmp_path / "downloaded")
    assert MODULE not in sys.modules
    policy = Policy.load_pretrained(tmp_path / "downloaded", modules=[MODULE])
    assert policy.batch_spec.extra_observations == {"force": (6,)}
    assert policy.statistics["my_robot"]["extra"]["force"]["mean"].shape == (6,)
    task = policy.create_tasks(texts=["push"])

    def act(**changes):
        key = jax.random.key(0)
        return policy.sample_actions(observation(**changes), task, rng=key, unnormalize="my_robot", sample_shape=(3,))

    first = act()
    assert first.shape == (3, 1, 4, 3) and np.isfinite(first).all()
    np.testing.assert_array_equal(first, act())
    assert np.abs(first - act(force=9.0)).max() > 1e-4


def test_it_acts_behind_a_server_with_its_history(workdir, importable):
    policy = Policy.load_pretrained(workdir / "export", modules=[MODULE])
    with PolicyServer(policy, unnormalize="my_robot", port=0).running() as server:
        with PolicyClient(port=server.port, limits=False) as client:
            for force in (1.0, 5.0):
                frame = {"image_primary": np.full((32, 32, 3), 90, np.uint8), "force": np.full(6, force)}
                got = client.act(frame, "push")
            with pytest.raises(Exception, match=r"force: expected one moment of shape \(6,\)"):
                client.reset()
                client.act({**frame, "force": np.ones(5)}, "push")
    window = observation()
    window["force"] = np.array([[[1.0] * 6, [5.0] * 6]])
    window["timestep"] = np.array([[0, 1]], np.int32)
    task, rng = policy.create_tasks(texts=["push"]), sampling_keys(0, [0], [1])
    want = policy.sample_actions(window, task, rng=rng, unnormalize="my_robot")[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_parameters_alone_need_no_module(workdir):
    """`init_from` takes arrays out of an export, and makes nothing of its parts."""
    params, _ = load_params(workdir / "export")
    assert "heads_action/project/kernel" in dict(flatten(params)) and MODULE not in sys.modules


def test_the_ahead_of_time_proof_and_the_tools_for_models_know_own_parts(folder, importable):
    config = load_config(str(folder / "my_config.py"))
    assert list(own_parts(config)) == [MODULE]  # what scripts/doctor.py --config looks at
    network, program, batch = proof.training_program(config, jax.devices()[:1])
    assert batch["observation"]["force"].shape == (8, 2, 6)
    program.step.trace(program.state, batch)
    assert token_report(network.model, network.spec).sizes()["obs_force"] == 1


# ------------------------------------------------------------------------------------------------------------ adapting


@pytest.fixture
def adapted(monkeypatch, tmp_path, data_dir, workdir, importable):
    """Runs finetune.py up to the loop; returns what the loop was given."""
    found = {}
    # JAX has been started, and the logs and the compilation cache are those of the tests.
    for name in ("initialize_from_flags", "setup_compilation_cache"):
        monkeypatch.setattr(distributed, name, lambda *_: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(finetune, "run_loop", lambda given: found.update(run=given) or 0)
    monkeypatch.setattr(adaptation, "init_params", lambda model, spec, rng: tiny.random_params(model, spec, seed=9))

    def call(*arguments, words="full", keys="{'force': 'force_torque'}", named=True):
        given = [f"--config=configs/finetune.py:{words}", f"--workdir={tmp_path / 'run'}"]
        given += [f"--config.pretrained={workdir / 'export'}", f"--config.data.data_dir={data_dir}"]
        given += [f"--config.data.datasets.target.extra_keys={keys}", "--config.data.datasets.target.name=my_robot"]
        given += ["--config.window_size=2", "--config.data.episodes_mixed=2", "--config.image_sizes.primary=32,32"]
        given += [f"--config.modules={MODULE}"] if named else []
        assert finetune.main([*given, *arguments]) == 0
        return found["run"]

    return call


FORCE = "octo_transformer/observation_tokenizers_force/"


def test_adaptation_imports_only_what_is_named_and_takes_the_sensor_over(adapted):
    with pytest.raises(PretrainedError, match="--config.modules=my_parts"):
        adapted(named=False)
    assert MODULE not in sys.modules
    run = adapted()
    assert dict(run.config.extra_observations) == {"force": (6,)}
    batch = next(run.inputs.stream)
    assert batch["observation"]["force"].shape == (64, 2, 6) and batch["observation"]["pad_mask_dict"]["force"].all()
    assert run.frozen == frozenset()


def test_lora_freezing_copies_and_changed_fields_work_on_own_parts(adapted, workdir):
    before = dict(flatten(Policy.load_pretrained(workdir / "export", modules=[MODULE]).params))
    run = adapted(
        f"--config.lora.targets=('BlockTransformer_0/.*/query/kernel','{FORCE}hidden/kernel','heads_action/project')",
        "--config.lora.rank=2",
        "--config.surgery.heads.action.min_scale=0.2",
        "--config.surgery.observation_tokenizers.hand.copy_of=force",
        "--config.surgery.observation_tokenizers.hand.obs_keys=('force',)",
        "--config.optimizer.freeze=('_hand/',)",
        words="lora",
    )
    params = dict(flatten(run.init_from))
    adapters = {path for path in params if is_adapter(path)}
    for module in (f"{FORCE}hidden", "heads_action/project"):
        assert {f"{module}/lora_a", f"{module}/lora_b"} <= adapters and f"{module}/kernel" in run.frozen
    copied = FORCE.replace("_force/", "_hand/") + "hidden/kernel"
    np.testing.assert_array_equal(params[copied], before[f"{FORCE}hidden/kernel"])
    assert copied in run.frozen and f"{FORCE}hidden/lora_a" not in run.frozen
    assert run.model.heads["action"].min_scale == 0.2
    # What it begins with is what was pretrained, but for the field that was changed.
    policy = run.make_policy(run.init_from)
    np.testing.assert_array_equal(
        dict(flatten(policy.params))["heads_action/project/kernel"], before["heads_action/project/kernel"]
    )


def test_a_wider_own_head_begins_anew_and_the_report_says_so(adapted):
    run = adapted("--config.surgery.heads.action.action_dim=5", words="head_only")
    report = json.loads(run.documents["weights.json"])
    assert report["status"]["heads_action/project/kernel"] == "new"
    assert "shape 32x24 in the checkpoint, 32x40 here" in report["notes"]["heads_action/project/kernel"]
    assert all(path in run.frozen for path in report["status"] if path.startswith(FORCE))


def test_mistakes_in_adaptation(adapted):
    with pytest.raises(ValueError, match="extra_keys has 'wind', but extra_observations does not say its shape"):
        adapted(keys="{'wind': 'force_torque'}")
    with pytest.raises(ValueError, match=r"extra_observations.force is \(3,\), but the pretrained policy has \(6,\)"):
        adapted("--config.extra_observations.force=3")
    with pytest.raises(PretrainedError, match="no tokenizer of the model reads observation/skin"):
        adapted("--config.extra_observations.skin=(2,3)", keys="{'skin': 'taxels'}")
    with pytest.raises(PartError, match="surgery|model.heads.action: unknown option 'min_sclae'"):
        adapted("--config.surgery.heads.action.min_sclae=0.2")


@pytest.mark.slow
def test_adaptation_by_lora_as_a_command(workdir, folder, data_dir, tmp_path):
    """Trained in a process of its own, with a second own part; the export is an ordinary policy."""
    run(
        folder,
        "finetune.py",
        "--config=configs/finetune.py:lora",
        f"--workdir={tmp_path / 'lora'}",
        f"--config.pretrained={workdir / 'export'}",
        f"--config.modules={MODULE}",
        f"--config.data.data_dir={data_dir}",
        "--config.data.datasets.target.name=my_robot",
        "--config.data.datasets.target.extra_keys={'force': 'force_torque', 'touch': 'contact'}",
        "--config.extra_observations.touch=1",
        "--config.surgery.observation_tokenizers.touch={'kind': 'my_parts:ForceTokenizer', 'obs_keys': ('touch',)}",
        "--config.augmentation.primary={'kind': 'my_parts:Cutout'}",
        "--config.lora.rank=2",
        "--config.num_steps=2",
        "--config.batch_size=8",
        "--config.data.episodes_mixed=2",
        "--config.eval.every=2",
        "--config.checkpoint.every=2",
        "--config.optimizer.warmup_steps=1",
    )
    with pytest.raises(PretrainedError, match="touch is 'my_parts:ForceTokenizer'"):
        Policy.load_pretrained(tmp_path / "lora" / "export")
    shown = run(
        folder, "scripts/show_model.py", tmp_path / "lora" / "export", "--modules", MODULE, "--out", tmp_path / "shown"
    )
    assert "obs_touch" in shown.stdout and "GaussianHead" in shown.stdout
    names = dict(flatten(json.loads((tmp_path / "lora" / "weights.json").read_text())["status"]))
    assert not any(is_adapter(path) for path in names if "touch" in path), "new parts are trained themselves"
