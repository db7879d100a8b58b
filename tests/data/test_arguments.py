"""Datasets that a command line names, through the loader that training uses."""

import argparse
import importlib.util
import runpy
import sys

import pytest

from octo_like.common.config import ConfigError, load_config
from octo_like.data import arguments
from octo_like.data.oxe.mixes import datasets_from_config
from octo_like.data.spec import DataError, specs_from_config


def parsed(*words):
    parser = argparse.ArgumentParser()
    arguments.add_dataset_arguments(parser)
    return parser.parse_args(["--data_dir", "data", *map(str, words)])


@pytest.mark.parametrize("config", ["finetune.py:lora", "finetune.py:full,goal_image,tabletop", "adapt_sim.py"])
def test_a_config_with_an_argument_is_what_training_reads(config, repository, monkeypatch, tmp_path):
    """These files build on others; the folder of the program and the working directory do not matter."""
    monkeypatch.chdir(tmp_path)
    config = str(repository / "configs" / config)
    specs = arguments.specs_from_arguments(parsed("--config", config))
    assert specs == specs_from_config(datasets_from_config(load_config(config).data)) and specs
    changed = arguments.specs_from_arguments(parsed("--config", config, "--set", "val_fraction=0.25"))
    assert {spec.val_fraction for spec in changed.values()} == {0.25} and changed.keys() == specs.keys()


def test_values_are_json_python_or_words():
    words = ('proprio_keys=("state",)', 'image_keys={"primary": "image"}', "action_key=act", "num_demos=5")
    spec = arguments.specs_from_arguments(parsed("mine", "--set", *words))["mine"]
    assert tuple(spec.proprio_keys) == ("state",) and dict(spec.image_keys) == {"primary": "image"}
    assert spec.action_key == "act" and spec.num_demos == 5


def test_mistakes_in_files_are_named(repository, tmp_path):
    for words, message in (
        (
            ("--config", repository / "configs" / "finetun.py"),
            r"finetun.py' does not exist; did you mean '.*finetune.py'",
        ),
        (("--config", f"{repository / 'configs' / 'finetune.py'}:lorra"), "unknown word 'lorra'"),
        (("--robot", tmp_path / "arm.py"), "a robot's description '.*arm.py' does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            arguments.specs_from_arguments(parsed(*words))
    with pytest.raises(DataError, match="exactly one of them"):
        arguments.specs_from_arguments(parsed("--config", "x.py", "--robot", "y.py"))


def test_the_benchmark_of_the_input_takes_such_a_config(repository):
    spec = importlib.util.spec_from_file_location("bench_input", repository / "scripts" / "bench_input.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = f"{repository / 'configs' / 'octo_base.py'}:300m"
    args = argparse.Namespace(
        config=path, data_dir="data", cache_dir=None, batch_size=8, decode="fast", threads=3, memory_gb=1.5
    )
    config, batch = module.run_config(args, {}, {})
    assert (config.batch_size, config.data.data_dir, config.data.host_threads) == (8, "data", 3)
    assert batch.window_size == load_config(path).window_size


def test_names_choose_among_the_datasets_of_a_config(repository, tmp_path):
    config = str(repository / "configs" / "tabletop.py")
    every = arguments.specs_from_arguments(parsed("--config", config))
    some = arguments.specs_from_arguments(parsed("tabletop_arm", "--config", config))
    assert list(some) == ["tabletop_arm"] and some["tabletop_arm"] == every["tabletop_arm"] and len(every) == 3
    with pytest.raises(DataError, match="no dataset 'tabletop_arn' in .*tabletop.py; did you mean 'tabletop_arm'"):
        arguments.specs_from_arguments(parsed("tabletop_arn", "--config", config))
    with pytest.raises(DataError, match="named twice"):
        arguments.specs_from_arguments(parsed("tabletop_arm", "tabletop_arm", "--config", config))
    with pytest.raises(DataError, match="exactly one of them"):
        arguments.specs_from_arguments(parsed("tabletop_arm", "--robot", "y.py"))
    # Demonstrations that the run leaves out are left out here as well.
    (tmp_path / "few.py").write_text(
        "from configs import tabletop\n"
        "def get_config(words=''):\n"
        "    config = tabletop.get_config()\n"
        "    config.data.num_demos = 7\n"
        "    config.data.datasets.tabletop_arm.num_demos = 3\n"
        "    return config\n"
    )
    few = arguments.specs_from_arguments(parsed("--config", tmp_path / "few.py"))
    assert {name: spec.num_demos for name, spec in few.items()} == dict.fromkeys(few, 7) | {"tabletop_arm": 3}


@pytest.mark.parametrize("script", ["show_data", "check_demos", "check_policy"])
def test_every_script_reads_the_same_command(script, repository, monkeypatch, tmp_path, capsys):
    """A config, options, then a name: no script reads other data than the others, or refuses it."""
    from octo_like.data import prepare
    from octo_like.policy.policy import Policy

    asked = []

    def note(name, *args, **kwargs):
        asked.append(name)
        raise DataError("that is enough")

    monkeypatch.setattr(prepare, "prepare_dataset", note)
    statistics = {"tabletop_arm": {"action": {"mean": [0.0] * 3}}}
    policy = type("Policy", (), {"statistics": statistics})()
    monkeypatch.setattr(Policy, "load_pretrained", lambda *args, **kwargs: policy)
    config = str(repository / "configs" / "tabletop.py")
    words = ["--data_dir", str(tmp_path), "--config", config, "tabletop_arm"]
    words = [*(["export"] if script == "check_policy" else []), *words, "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [f"{script}.py", *words])
    spec = importlib.util.spec_from_file_location(script, repository / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() == 1
    assert asked == ["tabletop_arm"] and "that is enough" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--beam", "--runner=DirectRunner --x=1"], ["--beam=--runner=DirectRunner --x=1"]])
def test_options_of_a_pipeline_begin_with_dashes(repository, monkeypatch, given):
    script = runpy.run_path(str(repository / "scripts" / "prepare_data.py"))
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--data_dir", "d", *given, "toy"])
    flags = script["arguments"]()
    assert flags.beam == "--runner=DirectRunner --x=1" and flags.datasets == ["toy"]
