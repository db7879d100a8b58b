"""The description of a robot: what it refuses, what it becomes in a config, that it survives JSON and exports."""

import dataclasses
import json

import jax
import pytest

from octo_like.common.config import ConfigError, load_config
from octo_like.common.robot import Action, Camera, Description, Robot, RobotError, absolute, delta, gripper, load_robot
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.model.octo import init_params
from octo_like.policy.describe import model_card
from tests.robot.tiny import tiny_policy

ACTIONS = (
    delta("dx", "m", proprio=0, limits=(-0.1, 0.1)),
    absolute("q", "rad", proprio=1),
    gripper(open=0.0, closed=1.0),
)


def robot(**changes):
    fields = dict(
        name="mine",
        cameras=dict(primary=Camera("front", (64, 80)), wrist=Camera("hand", (32, 32), bgr=True)),
        proprio=("state",),
        proprio_names=("x", "q"),
        actions=ACTIONS,
        control_hz=12.5,
        action_horizon=6,
        window_size=2,
        dataset=dict(num_demos=50, val_fraction=0.2),
    )
    return Robot(**(fields | changes))


def test_json_round_trip():
    description = robot().description()
    assert Description.from_json(json.loads(json.dumps(description.to_json()))) == description
    text = description.describe()
    assert "action[0] dx: delta [m], limits -0.1 to 0.1, moves proprio[0] x" in text
    assert "gripper, open 0, closed 1" in text and "12.5 Hz" in text


def test_dataset_fields_make_a_spec():
    spec = DatasetSpec.from_dict(robot().dataset_fields())
    assert spec.image_keys == {"primary": "front", "wrist": "hand"} and spec.bgr_slots == ("wrist",)
    assert spec.action_normalization_mask == (True, True, False)
    assert (spec.num_demos, spec.val_fraction, spec.proprio_keys) == (50, 0.2, ("state",))
    assert Description.from_json(spec.robot) == robot().description()
    # What the numbers are called changes nothing that is learned: the index stays valid.
    assert spec.transform_fields() == DatasetSpec.from_dict(robot(control_hz=5).dataset_fields()).transform_fields()


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Action("a", "relative"), "kind 'relative'; .*valid: absolute, delta"),
        (lambda: delta("a", "cm"), "unknown unit 'cm'; .*valid: 1, N, Nm, deg"),
        (lambda: delta("a", "m", limits=(1, 0)), r"limits must be \(lowest, highest\)"),
        (lambda: Action("a", "gripper"), "has both `open` and `closed`"),
        (lambda: gripper(open=1, closed=1), "open and closed are both 1"),
        (lambda: robot(actions=(ACTIONS[0], ACTIONS[0])), "mine: actions need different names"),
        (lambda: robot(actions=(delta("a", "m", proprio=2),)), "no proprioception 2; valid: 0 to 1"),
        (lambda: robot(control_hz=0), "control_hz must be positive"),
        (lambda: robot(action_horizon=0), "action_horizon must be at least 1"),
        (lambda: robot(proprio_names=()), "proprio and proprio_names go together"),
        (lambda: Description.from_json({"control_hz": 5, "action_names": ["a"]}), "did you mean 'action_name'"),
        (lambda: Description.from_json({"control_hz": 5, "action_name": ["a"], "action_kind": []}), "unequal length"),
        (lambda: Description.from_json({"action_name": ["a"]}), "control_hz and action_name are needed"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(RobotError, match=message):
        make()


def test_a_spec_refuses_a_wrong_description():
    with pytest.raises(DataError, match="mine: robot: unknown key 'hz'"):
        DatasetSpec.from_dict(dict(name="mine", robot={"hz": 5}))


def test_finetuning_config_of_a_robot(repository, tmp_path):
    """The example file configures data, sizes, window and head of configs/finetune.py, and nothing else."""
    file = repository / "configs" / "robots" / "my_robot.py"
    config = load_config(f"{repository / 'configs' / 'finetune.py'}:full,robot={file}")
    plain = load_config(str(repository / "configs" / "finetune.py"))
    assert config.image_sizes.to_dict() == {"primary": (256, 256), "wrist": (128, 128)}
    assert (config.proprio_dim, config.window_size) == (7, 1)
    assert list(config.data.datasets) == ["my_robot"]
    head = config.surgery.heads.action
    assert dict(head) == {"action_dim": 7, "action_horizon": 8}
    assert config.optimizer == plain.optimizer and config.eval == plain.eval
    spec = DatasetSpec.from_dict(config.data.datasets.my_robot.to_dict())
    assert spec.robot == load_robot(str(file)).description().to_json()
    for words, message in (
        (f"robot={tmp_path / 'no.py'}", "no.py' does not exist"),
        ("robto=x", "unknown word 'robto=x'; valid: .*robot=FILE"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(f"{repository / 'configs' / 'finetune.py'}:{words}")
    broken = tmp_path / "broken.py"
    broken.write_text("from octo_like.common.robot import delta\nROBOT = delta('a', 'furlong')\n")
    with pytest.raises(RobotError, match="broken.py: action 'a': unknown unit 'furlong'"):
        load_robot(str(broken))
    broken.write_text("from octo_like.common.robot import Robot\nROBOT = Robot(nam='x')\n")
    with pytest.raises(RobotError, match="broken.py: .*unexpected keyword argument 'nam'"):
        load_robot(str(broken))


def test_exports_carry_it(tmp_path):
    policy = tiny_policy("mine", 3, None)
    policy.statistics["mine"]["robot"] = robot().description().to_json()
    policy.save_pretrained(tmp_path / "export")
    loaded = type(policy).load_pretrained(tmp_path / "export")
    assert Description.from_json(loaded.statistics["mine"]["robot"]) == robot().description()
    assert "## Robot of mine" in model_card(loaded) and "action[1] q: absolute [rad]" in model_card(loaded)
    assert "## Robot" not in model_card(tiny_policy("mine", 3, None))


def test_a_window_that_the_model_does_not_have():
    """What finetune.py says when a robot asks for more history than the pretrained model was built for."""
    policy = tiny_policy("mine", 3, None)
    spec = dataclasses.replace(policy.batch_spec, window_size=2)
    with pytest.raises(ValueError, match="window of 2 observations, but this model was built for at most 1"):
        jax.eval_shape(lambda: init_params(policy.model, spec, jax.random.key(0)))
