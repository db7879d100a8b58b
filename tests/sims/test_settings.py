"""Environments, datasets and configs of the simulators describe the same robots. No simulator is needed."""

import importlib.util

import pytest

from configs import adapt_sim, metaworld
from octo_like.common.config import ConfigError, to_dict
from octo_like.common.defaults import batch_spec
from octo_like.envs import EVALUATION_SEEDS
from octo_like.envs.sims import ENVIRONMENTS, GROUPS
from octo_like.envs.sims.fetch import Fetch
from octo_like.envs.sims.metaworld import MetaWorld

ROBOTS = {"metaworld": MetaWorld, "fetch": Fetch}


@pytest.fixture(scope="module")
def build(repository):
    """The module data/sims/build.py."""
    pytest.importorskip("tensorflow_datasets", reason="needs the [data] extra")
    spec = importlib.util.spec_from_file_location("sims_build", repository / "data" / "sims" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("group", GROUPS)
def test_datasets_hold_what_the_environments_show(build, group):
    builder, robot = build.builder_class(group), ROBOTS[GROUPS[group][0]]
    assert builder.GROUP == group and dict(builder.CAMERAS) == dict(robot.IMAGE_SIZES)
    assert len(builder.ACTION) == len(robot.ACTION) and len(builder.PROPRIO) == len(robot.PROPRIO)


def test_seeds_of_tasks_splits_and_evaluation_are_disjoint(build):
    episodes = build.sim_episodes
    firsts = sorted(
        episodes.first_seed(group, task, split)
        for group, (_, tasks) in GROUPS.items()
        for task in tasks
        for split in ("train", "val")
    )
    assert all(b - a >= episodes.SEEDS_PER_TASK for a, b in zip(firsts[:-1], firsts[1:], strict=True))
    assert firsts[-1] + episodes.SEEDS_PER_TASK <= EVALUATION_SEEDS


@pytest.mark.parametrize("words,group", [("metaworld_heldout,head_only", "metaworld_heldout"), ("fetch", "fetch")])
def test_the_configs_read_what_the_environments_show(words, group):
    config, robot = adapt_sim.get_config(words), ROBOTS[GROUPS[group][0]]
    spec = batch_spec(config)
    assert {slot: size[0] for slot, size in spec.image_sizes.items()} == dict(robot.IMAGE_SIZES)
    assert (spec.proprio_dim, spec.action_dim) == (len(robot.PROPRIO), len(robot.ACTION))
    (dataset,) = to_dict(config)["data"]["datasets"].values()
    assert dataset["env"] == ENVIRONMENTS[group] and set(dataset["image_keys"]) == set(robot.IMAGE_SIZES)
    read = to_dict(config)["surgery"]["observation_tokenizers"] | config.model.observation_tokenizers.to_dict()
    assert {f"image_{slot}" for slot in robot.IMAGE_SIZES} | {"proprio"} == {
        key for tokenizer in read.values() for key in tokenizer["obs_keys"]
    }


def test_pretraining_and_adaptation_share_the_network():
    base = to_dict(metaworld.get_config())
    assert to_dict(adapt_sim.get_config("fetch"))["model"] == base["model"]
    language = base["model"]["task_tokenizers"]["language"]
    assert base["text"]["max_length"] == metaworld.TEXT_LENGTH == language["max_length"]


def test_unknown_words_are_refused_with_the_valid_ones():
    with pytest.raises(ConfigError, match="unknown dataset 'spot'; valid: metaworld_heldout, fetch"):
        adapt_sim.get_config("spot")
    with pytest.raises(ConfigError, match="unknown word 'half'; valid: .*full"):
        adapt_sim.get_config("fetch,half")
