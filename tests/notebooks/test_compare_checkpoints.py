"""The notebook that compares two policies runs from top to bottom on tiny ones, without TensorFlow."""

from octo_like.envs import EMBODIMENTS
from tests.notebooks.kernels import run
from tests.robot.tiny import tiny_policy_for


def test_the_notebook_compares_two_policies(tmp_path, monkeypatch):
    robot = EMBODIMENTS["gripper"]
    for name, seed in (("a", 0), ("b", 1)):
        dims = {"tabletop_gripper": (robot.action_dim, robot.proprio_dim)}
        tiny_policy_for(dims, seed).save_pretrained(tmp_path / name)
    settings = {"OCTO_CHECKPOINT": tmp_path / "a", "OCTO_CHECKPOINT_B": tmp_path / "b", "OCTO_EPISODES": 2}
    text, kinds = run("compare_checkpoints", tmp_path, monkeypatch, **settings)
    assert "robots that both know: gripper" in text and "B - A" in text
    assert "\ngripper  A " in text and all(f"gripper  {name:8s} A" in text for name in robot.action_names)
    assert kinds.count("image/png") == 2, "success, and the chunks of both"
