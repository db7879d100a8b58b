"""What is wrong with a run's config is found before anything is read, whichever key it is in."""

import argparse
import subprocess
import sys

import pytest

from octo_like.common import checks
from octo_like.common.checks import check_run, check_workdir
from octo_like.common.config import ConfigError, _flatten, freeze, load_config, parse_command_line
from octo_like.common.defaults import adaptation_config, default_config
from tests.conftest import REPOSITORY
from tests.training import tiny_config

# Keys of which any value of their type will do, or whose meaning is checked by the code that reads them.
FREE = {
    *("data.datasets", "data.mix_only", "data.episodes", "data.generator", "data.paraphrases"),
    *("data.image_dropout_keep", "data.episodes_mixed", "own_subtasks.part", "augmentation", "optimizer.name"),
    *("optimizer.arguments", "optimizer.freeze", "mesh.overrides", "profile_steps", "image_sizes", "depth_sizes"),
    *("goal_images", "extra_observations", "model", "modules", "mode", "conditioning", "surgery", "reinitialize"),
    "lora",
}


def changed(config, key, value):
    tree = config.to_dict()
    *groups, last = key.split(".")
    node = tree
    for group in groups:
        node = node[group]
    node[last] = value
    return freeze(tree)


@pytest.mark.parametrize("adapts", [False, True])
def test_every_key_has_a_rule_that_its_default_follows(adapts):
    config = (adaptation_config if adapts else default_config)()
    check_run(freeze(config), adapts=adapts)
    rules = checks.RULES | (checks.ADAPTATION_RULES if adapts else {})
    keys = {path for path, _ in _flatten(config)}
    free = {key for key in keys for one in FREE if key == one or key.startswith(f"{one}.")}
    assert keys - free == rules.keys() & keys and not free & rules.keys()


@pytest.mark.parametrize("key", sorted(checks.RULES))
def test_nonsense_is_refused_by_its_key(key):
    config = tiny_config.get_config("synthetic")
    for value in (-7, float("nan"), ("a", 1)):
        if key == "seed" and value == -7:
            continue
        with pytest.raises(ConfigError, match=key):
            check_run(changed(config, key, value))


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("batch_size", 0, "batch_size must be a whole number of at least 1; got 0"),
        ("batch_size", None, "batch_size must be"),
        ("batch_size", 2.5, "batch_size must be"),
        ("batch_size", True, "batch_size must be"),
        ("accumulate", 3, "batch_size 16 does not split into 3 micro-batches"),
        ("num_steps", None, "num_steps must be"),
        ("model.dtype", "float8", "model.dtype must be one of 'float32', 'bfloat16'"),
        ("image_sizes.primary", (64,), "image_sizes.primary must be a height and a width.*=64,64"),
        ("image_sizes.primary", 64, "image_sizes.primary"),
        ("image_sizes.primary", (0, 64), "image_sizes.primary"),
        ("depth_sizes", {"primary": "64"}, "depth_sizes.primary"),
        ("goal_images", ("side",), "goal_images has 'side', but image_sizes only primary, wrist"),
        ("extra_observations", {"force": -1}, "extra_observations.force"),
        ("data.kind", "rld", "data.kind must be one of 'rlds'.*did you mean 'rlds'"),
        ("data.episodes_mixed", 0, "data.episodes_mixed"),
        ("optimizer.schedule", "cosin", "did you mean 'cosine'"),
        ("optimizer.decay_steps", 1, "optimizer.decay_steps=1, optimizer.warmup_steps=2"),
        ("optimizer.freeze", ("*a",), "optimizer.freeze: .* is not a regular expression"),
        ("optimizer.peak", float("inf"), "optimizer.peak must be a positive number"),
        ("eval.rollouts", 3, "random batches have no environment"),
        ("wandb.project", "x", "wandb"),
        ("model.token_dim", 0, "model.token_dim"),
        ("model.transformer.num_layers", -1, "model.transformer.num_layers"),
        ("text.max_length", 40, "text.max_length=40, but model.task_tokenizers.language has positions for 8 words"),
        ("mesh.overrides", 3, "mesh.overrides must hold pairs"),
        ("mesh.overrides", ("a", "b"), "mesh.overrides must hold pairs"),
        ("profile_steps", "abc", "profile_steps is 'abc'; expected"),
        ("profile_steps", "9:3", "holds no step"),
        ("profile_steps", "1000000:1000001", "begin after the run's last step"),
        ("mesh.overrides", (("(", (None,)),), "is not a regular expression"),
        (
            "mesh.overrides",
            (("a", (None, "fdsp")),),
            "expected the mesh axis of each dimension, 'data', 'fsdp' or None",
        ),
        ("mesh.overrides", (("a", "fsdp"),), "expected the mesh axis of each dimension"),
        ("seed", 2**64, "seed must be a whole number of 64 bits"),
        ("checkpoint.best_metric", "", "checkpoint.best_metric"),
        ("model.heads.action.hidden_dim", 0, "model.heads.action.hidden_dim must be a whole number of at least 1"),
        ("model.transformer.dropout_rate", 2, "model.transformer.dropout_rate must be at least 0 and less than 1"),
        ("model.readouts.action", 0, "model.readouts.action must be a whole number of tokens"),
        ("model.observation_tokenizers.wrist.obs_keys", ("image_wrst",), "no image_wrst; did you mean 'image_wrist'"),
        ("image_sizes", {"primary": (64, 64), "wrist": (32, 32), "side": (9, 9)}, "reads observation/image_side"),
        ("augmentation", {"side": {"shift": 1}}, "augmentation.side: the run has no such camera"),
        ("checkpoint.keep_best", 2, None),
    ],
)
def test_mistakes(monkeypatch, key, value, message):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    config = changed(tiny_config.get_config("synthetic"), key, value)
    if message is None:
        return check_run(config)
    with pytest.raises(ConfigError, match=message):
        check_run(config)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"checkpoint.keep_best": 1, "eval.every": 3}, "evaluation every 3 steps and checkpoints every 4 seldom meet"),
        ({"checkpoint.keep_best": 1, "eval.every": None}, "keep_best needs evaluations"),
        ({"early_stopping.patience": 2}, "early_stopping.patience"),
        ({"eval.rollouts": 2, "eval.every": None}, "nothing is evaluated"),
        ({"checkpoint.keep_best": 1, "checkpoint.best_metric": "rollout/*/success"}, "measured in rollouts"),
    ],
)
def test_contradictions(changes, message):
    config = tiny_config.get_config("synthetic")
    for key, value in changes.items():
        config = changed(config, key, value)
    with pytest.raises(ConfigError, match=message):
        check_run(config)


def test_a_config_of_the_other_program():
    with pytest.raises(ConfigError, match="for finetune.py .*: run python finetune.py, not train.py"):
        check_run(freeze(adaptation_config()))
    with pytest.raises(ConfigError, match="for train.py .*: run python train.py, not finetune.py"):
        check_run(freeze(default_config()), adapts=True)


def test_data_without_tensorflow_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"data.kind='rlds' needs tensorflow.*pip install 'octo_like\[data\]'"):
        check_run(freeze(tiny_config.get_config()))
    check_run(freeze(tiny_config.get_config("synthetic")))


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="file is a file; give a folder"):
            check_workdir(str(workdir))
    for workdir in (str(tmp_path), str(tmp_path / "new" / "run"), "gs://bucket/run"):
        check_workdir(workdir)


def test_a_workdir_whose_disk_does_not_answer(tmp_path):
    """From the first look on: the fault is there before train.py is."""
    code = (
        "import os, sys, runpy; sys.argv = sys.argv[1:]\n"
        "from octo_like.common import storage; storage.PAUSES = (0.0,) * 3\n"
        "left, real, workdir = int(sys.argv.pop()), os.stat, sys.argv[-1]\n"
        "def stat(path, *arguments, **named):\n"
        "    global left\n"
        "    if path == workdir and left: left -= 1; raise OSError(5, 'Input/output error', path)\n"
        "    return real(path, *arguments, **named)\n"
        "os.stat = stat\n"
        "import octo_like.common.config as config; parse = config.parse_command_line\n"
        "config.parse_command_line = lambda *a, **k: (parse(*a, **k), os._exit(0))\n"  # ends after the first look
        "runpy.run_path('train.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "train.py", "--config", "configs/tabletop.py", "--workdir", str(tmp_path)]
    for times, status in (("1", 0), ("2", 0), ("9", 1)):
        done = subprocess.run([*command, times], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == status and "is a file" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: error: ") and "does not answer" in done.stderr


def test_a_workdir_that_no_folder_can_be(tmp_path):
    for workdir in (tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(ConfigError, match="cannot be a folder"):
            check_workdir(str(workdir))


def test_every_shipped_config_is_good():
    for file in sorted((REPOSITORY / "configs").glob("*.py")):
        if file.name not in ("__init__.py", "tabletop_delay.py"):
            config = load_config(str(file))
            check_run(config, adapts="pretrained" in config)


@pytest.mark.parametrize(
    "flag,meant",
    [
        ("--batch_size=3", "--config.batch_size=3"),
        ("--peak", "--config.optimizer.peak"),
        ("--num_step=5", "--config.num_steps=5"),
    ],
)
def test_a_field_without_its_prefix(capsys, flag, meant):
    with pytest.raises(SystemExit) as ended:
        parse_command_line(argparse.ArgumentParser(), ["--config", str(REPOSITORY / "configs" / "tabletop.py"), flag])
    assert ended.value.code == 2 and f"did you mean {meant}?" in capsys.readouterr().err


def test_a_command_says_it_in_one_line_and_imports_nothing_large(tmp_path):
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "finally: assert not {'jax', 'tensorflow'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, "train.py", "--config", "configs/tabletop.py", "--workdir", str(tmp_path)]
    done = subprocess.run([*command, "--config.batch_size=-1"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "batch_size must be a whole number of at least 1; got -1" in done.stderr


@pytest.mark.parametrize("workdir", ["gs:/bucket/x", "nope://bucket/x", "gs:///x", "C:/runs"])
def test_a_workdir_that_is_neither_a_folder_nor_a_bucket(workdir):
    with pytest.raises(ConfigError, match="gs://bucket/folder"):
        check_workdir(workdir)


def test_a_robot_s_description_that_is_not_there():
    with pytest.raises(ConfigError, match="nope.py.*configs/robots/my_robot.py"):
        load_config(f"{REPOSITORY / 'configs' / 'finetune.py'}:full,robot=nope.py")
