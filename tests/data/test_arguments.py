"""Datasets that a command line names, through the loader that training uses."""

import argparse
import importlib.util

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
