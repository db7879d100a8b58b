"""Python of the docs that is cheap to run is run as it stands, with a tiny policy in place of the one it speaks of."""

import importlib
import re
import types
from pathlib import Path

import numpy as np
import pytest

from octo_like.envs import EMBODIMENTS
from octo_like.robot.server import PolicyServer
from tests.robot.tiny import tiny_policy

pytest.importorskip("websockets")

ROOT = Path(__file__).resolve().parent.parent
ROBOT = EMBODIMENTS["gripper"]


def block(page: str, containing: str) -> str:
    """The Python block of a page with these words in it."""
    found = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    chosen = [code for code in found if containing in code]
    assert len(chosen) == 1, f"{page}: {len(chosen)} blocks have {containing!r}"
    return chosen[0]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy("tabletop_gripper", ROBOT.action_dim, ROBOT.proprio_dim)


@pytest.fixture
def export(policy, tmp_path, monkeypatch):
    """A folder that has the demo's policy at its place."""
    policy.save_pretrained(tmp_path / "runs" / "demo" / "pretrain" / "export")
    monkeypatch.chdir(tmp_path)


def test_acting_as_the_docs_say(export, policy, capsys):
    names: dict = {}
    exec(block("docs/act.md", "load_pretrained"), names)
    assert names["actions"].shape == (1, 4, ROBOT.action_dim)
    assert "image_primary" in capsys.readouterr().out
    exec(block("README.md", "load_pretrained"), {"observation": names["observation"]})
    goals = types.SimpleNamespace(create_tasks=lambda goals: goals)
    exec(block("docs/act.md", "task_from_goal"), names)
    assert names["task_from_goal"](goals, np.zeros((8, 8, 3)))["image_primary"].shape == (1, 8, 8, 3)


class Times:
    """True so many times: the condition of a loop."""

    def __init__(self, count: int):
        self.count = count

    def __bool__(self) -> bool:
        self.count -= 1
        return self.count >= 0


@pytest.mark.parametrize(("page", "words"), [("README.md", "PolicyClient"), ("docs/deployment.md", "policy.hold()")])
def test_a_robot_as_the_docs_say(page, words, policy, monkeypatch, client_package):
    client = importlib.import_module(client_package.name)
    server = PolicyServer(policy, unnormalize="tabletop_gripper", port=0)
    executed = []
    picture, joints = np.zeros((48, 64, 3), np.uint8), np.zeros(ROBOT.proprio_dim, np.float32)
    names = {
        "frame": picture,
        "joints": joints,
        "camera": lambda: picture,
        "robot": types.SimpleNamespace(execute=executed.append, joints=lambda: joints),
        "running": Times(2),
    }
    with server.running():

        class Here(client.PolicyClient):
            def __init__(self, *_, **__):
                super().__init__("127.0.0.1", server.port)

        monkeypatch.setattr(client, "PolicyClient", Here)
        exec(block(page, words), names)
    assert names["actions"].shape == (4, ROBOT.action_dim)
    assert len(executed) == (8 if page != "README.md" else 0)
