"""The notebook about adaptation runs from top to bottom on a tiny policy."""

from octo_like.envs import EMBODIMENTS
from tests.notebooks.kernels import run
from tests.robot.tiny import tiny_policy


def test_the_notebook_adapts_a_policy(tmp_path, monkeypatch):
    robot = EMBODIMENTS["gripper"]
    tiny_policy("tabletop_gripper", robot.action_dim, robot.proprio_dim).save_pretrained(tmp_path / "export")
    text, kinds = run("finetune", tmp_path, monkeypatch, OCTO_CHECKPOINT=tmp_path / "export")
    assert f"dimensions: {robot.action_dim}" in text or f"steps of {robot.action_dim} dimensions" in text
    assert "resized  heads_action" in text and "state on the devices" in text
    first, last = (float(x) for x in text.split("loss ")[1].split("\n")[0].split(" -> "))
    assert last < first
    assert f"actions: (8, 4, {robot.action_dim + 2})" in text
    assert "image/png" in kinds
