"""Names and units of dimensions in a dataset's spec, and where they come from when nobody says them."""

import dataclasses
import json

import numpy as np
import pytest

from octo_like.common import dimensions
from octo_like.common.robot import Description, absolute
from octo_like.data.check.report import range_table
from octo_like.data.in_memory import prepare_in_memory
from octo_like.data.oxe import columns, registry
from octo_like.data.prepare import prepare_dataset
from octo_like.data.spec import DataError, DatasetSpec
from tests.data import oxe_golden
from tests.data.conftest import build, make_episodes
from tests.data.test_oxe import traced

KEYS = dict(
    image_keys={"primary": "front_rgb"},
    proprio_keys=("joints", "aperture"),
    action_key="control",
    language_key="task_text",
    val_fraction=0.2,
)
NAMES = dict(action_names=["x", "y", "z", "hand"], action_units=["m", "m", "m", "open fraction"])


def spec(**changes):
    return DatasetSpec.from_dict({"name": "toy", **KEYS, **changes})


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(action_units=["m"]), "toy: action_units without action_names"),
        (dict(action_names="x"), "toy: action_names is a list, got 'x'"),
        (dict(action_names=["x", "x"]), "toy: action_names, action_units: the name 'x' is given to more than one"),
        (dict(proprio_names=["x"], proprio_units=["metre"]), "dimension 'x': unknown unit 'metre'"),
        (dict(proprio_names=["x"], proprio_units=["m", "m"]), "2 units for 1 dimensions"),
        (
            dict(action_names=["x"], robot=Description(5.0, (absolute("q", "rad"),)).to_json()),
            "action_names beside a robot's description",
        ),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(DataError, match=message):
        spec(**changes)


def test_names_decide_nothing(tmp_path, monkeypatch):
    """The same index, statistics and order; nothing is read or computed again for them."""
    build(tmp_path, "toy", {"train": make_episodes(8)})
    plain = prepare_dataset("toy", spec(), str(tmp_path), progress=False)
    files = sorted(str(path) for path in tmp_path.rglob("*"))
    named = prepare_dataset("toy", spec(**NAMES), str(tmp_path), progress=False)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == files
    assert named.function.definition == plain.function.definition and named.train.hash == plain.train.hash
    np.testing.assert_array_equal(named.statistics["action"]["mean"], plain.statistics["action"]["mean"])
    assert named.statistics["action"].keys() == plain.statistics["action"].keys()
    assert plain.dimensions["action"].names == ("a0", "a1", "a2", "a3")
    assert plain.dimensions["proprio"].names == ("p0", "p1", "p2", "p3")
    assert named.dimensions["action"].labels[-1] == "hand [open fraction]"
    assert "action[3] hand [open fraction]" in range_table(named) and "proprio[0] " in range_table(named)
    with pytest.raises(DataError, match=r"toy: action_names gives 2 action dimensions \(x, y\), the data has 4"):
        prepare_dataset("toy", spec(action_names=["x", "y"]), str(tmp_path), progress=False)


def test_a_wrong_number_of_names_in_memory():
    episode = dict(action=np.zeros((5, 2), np.float32), observation=dict(state=np.zeros((5, 3), np.float32)))
    one = DatasetSpec.from_dict(
        dict(name="m", proprio_keys=("state",), language_key=None, val_fraction=0, proprio_names=["a", "b"])
    )
    with pytest.raises(DataError, match=r"m: proprio_names gives 2 proprio dimensions \(a, b\), the data has 3"):
        prepare_in_memory("m", one, {"train": [episode]})


def test_a_robots_names_are_the_datasets():
    robot = Description(5.0, (absolute("q", "rad"),), ("place",), ("m",)).to_json()
    one = spec(robot=robot)
    assert (one.dimensions("action", 1).labels, one.dimensions("proprio", 1).labels) == (("q [rad]",), ("place [m]",))
    with pytest.raises(DataError, match=r"the robot's description has 1 action dimensions \(q\), the data has 2"):
        one.dimensions("action", 2)


def test_encodings_have_names():
    bridge = DatasetSpec.from_dict(dict(name="bridge_dataset", standardize="bridge_dataset"))
    assert bridge.dimensions("action", 7).tags == (
        *("x_m", "y_m", "z_m", "roll_rad", "pitch_rad", "yaw_rad", "gripper_open_fraction"),
    )
    assert bridge.dimensions("proprio", 7).names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    joints = DatasetSpec.from_dict(dict(name="roboset", standardize="roboset")).dimensions("action", 8)
    assert joints.names[:2] == ("joint_1", "joint_2") and joints.units == ("rad",) * 7 + ("open fraction",)
    own = dataclasses.replace(bridge, action_names=tuple("abcdefg"))
    assert own.dimensions("action", 7).names == tuple("abcdefg"), "what the config says wins"
    # Another choice of proprioception than the entry's, or other data than it describes: nothing is claimed.
    other = dataclasses.replace(bridge, proprio_keys=("state",))
    assert other.dimensions("proprio", 7).names[0] == "p0" and bridge.dimensions("action", 9).names[0] == "a0"
    assert columns.action_of((True,) * 5) is None and columns.action_of(None) is None


def test_columns_of_the_registry_have_the_widths_of_the_data(repository):
    """Every entry in our reading and in Octo's, traced on a reference trajectory."""
    files = oxe_golden.unpack(repository / "tests" / "golden" / "oxe" / "cases.xz")[1]
    for name in registry.REGISTRY:
        leaves = next(iter(files[name].values()))["in"]
        for compat in (None, "octo"):
            entry = registry.get(name, compat)
            found, shapes = entry.columns(), traced(name, compat, leaves).structured_outputs
            assert found["action"] is not None and len(found["action"]) == shapes["action"].shape[-1], (name, compat)
            if found["proprio"] is not None:
                width = shapes["observation"]["proprio"].shape[-1]
                assert len(found["proprio"]) == width, (name, compat, width)
            elif compat is None and entry.proprio is not None:
                assert name in ("berkeley_cable_routing", "mujoco_manip", "roboturk", "gnm_dataset"), name
    unit = registry.get("nyu_rot_dataset_converted_externally_to_rlds", "octo").columns()["action"].units[-1]
    assert unit == "", "Octo leaves 1 for closed, which is no open fraction"


def test_statistics_of_a_run_carry_them(tmp_path):
    """From the config to `Inputs.statistics`, as JSON."""
    from octo_like.common.defaults import batch_spec
    from octo_like.data.inputs import inputs_from_config
    from tests.training.tiny_config import get_config

    build(tmp_path, "toy_buttons", {"train": make_episodes(8)})
    config = get_config("smallest")
    config.data.data_dir = str(tmp_path)
    del config.data.datasets.toy["image_keys"]
    config.data.datasets.toy.update({key: tuple(value) for key, value in NAMES.items()})
    inputs = inputs_from_config(config, batch_spec(config), None)
    entry = json.loads(json.dumps(inputs.statistics["toy"]["dimensions"]))
    assert dimensions.of_statistics({**inputs.statistics["toy"], "dimensions": entry}).tags[0] == "x_m"
    assert entry["proprio"]["names"] == ["p0", "p1", "p2", "p3"]
    # One held-out episode in the order of time, the last batch filled up.
    steps = np.concatenate([batch["observation"]["timestep"][:, -1] for batch in inputs.episodes["toy"]()])
    last = int(steps.max())
    assert steps[: last + 1].tolist() == list(range(last + 1)) and (steps[last + 1 :] == last).all()
    inputs.stream.close()
