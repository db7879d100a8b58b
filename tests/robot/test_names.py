"""What dimensions are called: in an export and its description, what a server tells, and a filter of actions says."""

import json
import urllib.request

import numpy as np
import pytest

from octo_like.common import dimensions
from octo_like.policy.describe import model_card
from octo_like.policy.policy import Policy
from octo_like.robot.client import PolicyClient
from octo_like.robot.safety import ActionFilter, UnsafeAction, action_limits
from octo_like.robot.server import PolicyServer
from tests.robot.tiny import tiny_policy

NAMED = {
    "action": {
        "names": ["x", "turn", "gripper"],
        "units": ["m", "rad/s", "open fraction"],
        "kinds": ["absolute", "velocity", "gripper"],
    },
    "proprio": {"names": ["place", "width"], "units": ["m", ""]},
}


def named_policy():
    policy = tiny_policy("mine", 3, 2)
    policy.statistics["mine"]["dimensions"] = NAMED
    return policy


def test_an_export_carries_them(tmp_path):
    named_policy().save_pretrained(tmp_path / "export")
    loaded = Policy.load_pretrained(tmp_path / "export")
    assert dimensions.of_statistics(loaded.statistics["mine"]).tags == (
        "x_m",
        "turn_rad_per_s",
        "gripper_open_fraction",
    )
    for text in (loaded.get_pretty_spec(), model_card(loaded)):
        assert "x [m], turn [rad/s], gripper [open fraction]" in text and "place [m], width" in text
    # An export of before has none.
    file = tmp_path / "export" / "dataset_statistics.json"
    statistics = json.loads(file.read_text())
    del statistics["mine"]["dimensions"]
    file.write_text(json.dumps(statistics))
    (tmp_path / "export" / "SHA256SUMS").unlink()
    old = Policy.load_pretrained(tmp_path / "export")
    assert "a0, a1, a2" in old.get_pretty_spec() and "p0, p1" in old.get_pretty_spec()


def test_a_server_tells_them():
    with PolicyServer(named_policy(), unnormalize="mine", port=0).running() as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metadata") as answer:
            told = json.load(answer)
        with PolicyClient(port=server.port) as client:
            assert client.metadata["dimensions"] == told["dimensions"]
    assert told["dimensions"] == {"mine": NAMED} and told["action_names"] == ["x", "turn", "gripper"]
    assert told["actions"]["mine"]["units"] == NAMED["action"]["units"]
    plain = PolicyServer(tiny_policy("mine", 3, 2), unnormalize="mine", port=0).metadata
    assert plain["action_names"] == ["a0", "a1", "a2"] and plain["dimensions"]["mine"]["proprio"]["names"] == [
        "p0",
        "p1",
    ]


def test_a_filter_speaks_of_them():
    filtered = ActionFilter.of(action_limits(named_policy().statistics["mine"]))
    with pytest.raises(UnsafeAction, match="x is nan"):
        filtered(np.array([np.nan, 0.0, 0.0]))
