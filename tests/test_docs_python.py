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


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("README.md", "PolicyClient"),
        ("docs/deployment.md", "import PolicyClient, drive"),
        ("docs/deployment.md", "import Plan"),
    ],
)
def test_a_robot_as_the_docs_say(page, words, policy, monkeypatch, client_package):
    client = importlib.import_module(client_package.name)
    server = PolicyServer(policy, unnormalize="tabletop_gripper", port=0)
    executed, times = [], iter([True, True])
    picture, joints = np.zeros((48, 64, 3), np.uint8), np.zeros(ROBOT.proprio_dim, np.float32)
    seen = {"image_primary": picture, "proprio": joints}
    names = {
        "frame": picture,
        "joints": joints,
        "robot": types.SimpleNamespace(execute=executed.append, observe=lambda: seen),
        "running": lambda: next(times, False),
    }
    with server.running():

        class Here(client.PolicyClient):
            def __init__(self, *_, **__):
                super().__init__("127.0.0.1", server.port)

        monkeypatch.setattr(client, "PolicyClient", Here)
        plan = client.Plan("wait", 2)  # chunks of the tiny policy are short, and continue none
        monkeypatch.setattr(client, "Plan", lambda *_, **__: plan)
        exec(block(page, words), names)
    if page == "README.md":
        assert names["actions"].shape == (4, ROBOT.action_dim)
    else:
        steps = 2 if "Plan" in words else 2 * 4
        assert len(executed) == steps + 1 and not executed[-1].any()  # two chunks, and the hold at the end


def test_the_docs_show_the_loop_that_is_shipped():
    source = (ROOT / "octo_like" / "robot" / "loop.py").read_text("utf-8")
    for name in ("drive", "drive_async"):
        loop = re.search(rf"^def {name}\(.*?(?=^def |\Z)", source, re.MULTILINE | re.DOTALL).group().rstrip() + "\n"
        assert block("docs/deployment.md", f"def {name}(") == loop
