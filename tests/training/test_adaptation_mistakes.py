"""Mistakes in what finetune.py is told: one clear error each, before data is read and anything is computed."""
# ruff: noqa: F811  fixtures of another file

import shutil

import pytest

import finetune
from octo_like.common.config import ConfigError
from octo_like.common.defaults import adaptation_config
from octo_like.common.schema import BatchSpec
from octo_like.training import adaptation
from tests.data.conftest import build, make_episodes
from tests.training.test_adaptation import SYNTHETIC, export, prepared  # noqa: F401  fixtures


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--config.window_size=9"], ["window_size=9", "at most 4", "surgery.max_window=9"]),
        (["--config.mode=lora", "--config.lora.targets=attn"], ["'attn'", "matches no parameter", "query"]),
        (["--config.mode=lora", "--config.lora.targets=pos_embed"], ["matches no kernel", "kernels are at"]),
        (["--config.mode=lora", "--config.lora.rank=64"], ["rank=64", "at most 32"]),
        (["--config.mode=lorra"], ["lorra", "did you mean 'lora'"]),
        (["--config.conditioning=text"], ["text", "goal_image"]),
        (["--config.optimizer.freeze=nonsense"], ["nonsense", "octo_transformer"]),
        (["--config.reinitialize=nonsense"], ["nonsense", "heads_action"]),
        (["--config.reinitialize=.*"], ["no parameter of the checkpoint fits"]),
        (["--config.surgery.heads.arm.action_dim=3"], ["heads.arm", "action"]),
        (["--config.image_sizes.side=(32, 40)"], ["image_side", "copy_of"]),
        (["--config.image_sizes.primary=(64, 64)"], ["(64, 64)", "(32, 40)", "leave"]),
        (["--config.image_sizes={}", "--config.data.kind=rlds", "--config.data.datasets.toy.image_keys.top=x"],
         ["image_sizes.top"]),
        (["--config.proprio_dim=None", "--config.data.kind=rlds"], ["proprio_keys", "proprio_dim"]),
        (["--config.num_steps=0"], ["num_steps", "at least 1"]),
        (["--config.text.t5_weights=nowhere"], ["nowhere"]),
        (["--config.mode=lora", "--config.lora.rank=0"], ["lora.rank", "at least 1"]),
        (["--config.mode=lora", "--config.lora.alpha=-1"], ["lora.alpha", "positive"]),
        (["--config.mode=lora", "--config.lora.targets=()"], ["lora.targets is empty"]),
        (["--config.mode=lora", "--config.lora.targets=(query"], ["lora.targets", "'(query'", "not a regular"]),
        (["--config.mode=lora", "--config.lora.targets=language.*/kernel", "--config.lora.rank=17"], ["at most 16"]),
        (["--config.optimizer.freeze=*heads"], ["optimizer.freeze", "'*heads'", "not a regular expression"]),
        (["--config.optimizer.freeze=.*"], ["leaves nothing to train"]),
        (["--config.optimizer.schedule=cosin"], ["cosin", "did you mean 'cosine'"]),
        (["--config.optimizer.weight_decay=-1"], ["optimizer.weight_decay", "at least 0", "-1"]),
        (["--config.optimizer.peak=0"], ["optimizer.peak", "positive"]),
        (["--config.ema_decay=1.5"], ["ema_decay", "less than 1", "1.5"]),
        (["--config.batch_size=6", "--config.accumulate=4"], ["batch_size 6", "4 micro-batches"]),
        (["--config.augmentation.primary.brightnes=0.2"], ["augmentation.primary", "did you mean 'brightness'"]),
        (["--config.augmentation.primary.crop_scale=(0.5, 2)"], ["augmentation.primary", "crop_scale"]),
        (["--config.augmentation.primary.crop_scale=0.5"], ["augmentation.primary"]),
        (["--config.augmentation.primry.shift=0.1"], ["augmentation.primry", "primary"]),
        (["--config.checkpoint.best_mode=mix"], ["mix", "did you mean 'min'"]),
        (["--config.surgery.heads.action.action_dims=8"], ["action_dims", "did you mean 'action_dim'"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(export, prepared, monkeypatch, arguments, words):
    """Before any data is read and before any parameter is made."""

    def too_late(*args, **kwargs):
        raise AssertionError("this comes after the mistakes")

    if "--config.data.kind=rlds" not in arguments:
        monkeypatch.setattr(finetune, "inputs_from_config", too_late)
        monkeypatch.setattr(adaptation, "init_params", too_late)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prepared(*SYNTHETIC, f"--config.pretrained={export}", *arguments)
    for word in words:
        assert word in str(error.value)


def test_without_demonstrations_the_number_of_steps_has_to_be_given(export, prepared):
    with pytest.raises(ConfigError, match="num_steps is None and there are no demonstrations"):
        prepared(*SYNTHETIC, f"--config.pretrained={export}", "--config.num_steps=None")


def test_a_bimanual_robot_needs_a_wider_head(export, prepared, monkeypatch, tmp_path):
    folder = tmp_path / "data"
    build(folder, "toy_bimanual", {"train": make_episodes(4, seed=5, action_dim=14)})
    common = (
        f"--config.pretrained={export}",
        f"--config.data.data_dir={folder}",
        "--config.data.datasets.toy.name=toy_bimanual",
        "--config.data.num_demos=2",
    )
    with pytest.raises(ValueError, match=r"14 dimensions.*hold 4.*surgery.heads.action.action_dim=14"):
        prepared(*common)
    given = prepared(*common, "--config.surgery.heads.action.action_dim=14")
    assert given.model.heads["action"].action_dim == 14 and given.config.num_steps == 8
    # A head of its own, and the one that nothing trains now is left alone.
    own = ("--config.surgery.heads.both.copy_of=action", "--config.surgery.heads.both.action_dim=14")
    given = prepared(*common, *own, "--config.data.datasets.toy.head=both")
    assert any(path.startswith("heads_action/") for path in given.frozen)
    assert not any(path.startswith("heads_both/") for path in given.frozen)


def test_wrong_paths(export, prepared, tmp_path):
    with pytest.raises(ValueError, match="not a directory"):
        prepared(*SYNTHETIC, f"--config.pretrained={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="did you mean"):
        prepared(*SYNTHETIC, f"--config.pretrained={export.parent}")
    with pytest.raises(ConfigError, match="mode 'lora'.*config.pretrained"):
        prepared(*SYNTHETIC, "--config.mode=lora", "--config.num_steps=2")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_an_adaptation_places_pictures_as_the_pretrained_policy_does(caplog):
    spec = BatchSpec(1, 4, 3, {"primary": (32, 40)}, resize="letterbox")
    model = {"observation_tokenizers": {"primary": {"kind": "image", "obs_keys": ["image_primary"]}}}
    config = adaptation_config()
    config.data.kind = "synthetic"
    assert adaptation.with_inputs(config, model, (), spec).resize == "letterbox" and not caplog.records
    config.image_sizes = {"primary": (32, 40)}
    assert adaptation.with_inputs(config, model, (), None).resize == "stretch"
    config.resize = "crop"
    assert adaptation.with_inputs(config, model, (), spec).resize == "crop"
    assert "the pretrained policy has seen pictures by 'letterbox'" in caplog.text


def test_from_scratch_nothing_is_frozen_at_random(export, prepared):
    with pytest.raises(ConfigError, match="optimizer.freeze.*observation_tokenizers_primary.*at random"):
        prepared("--config.pretrained=None", "--config.optimizer.freeze=observation_tokenizers_primary")


def test_t5_gets_its_own_vocabulary(export, prepared):
    t5 = "{'kind': 'language', 'encoder': 't5', 't5': 't5-base'}"
    with pytest.raises(ConfigError, match="text.model='words' is not its vocabulary"):
        prepared(f"--config.surgery.task_tokenizers.language={t5}", "--config.text.model=words")
