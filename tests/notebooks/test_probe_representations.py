"""The notebook about probes runs from top to bottom on a tiny policy, without TensorFlow."""

import pytest

from octo_like.envs import EMBODIMENTS
from tests.notebooks.kernels import run
from tests.robot.tiny import tiny_policy


@pytest.mark.slow  # gradients of every part are compiled
def test_the_notebook_probes_a_policy(tmp_path, monkeypatch):
    robot = EMBODIMENTS["gripper"]
    tiny_policy("tabletop_gripper", robot.action_dim, robot.proprio_dim).save_pretrained(tmp_path / "export")
    settings = {"OCTO_CHECKPOINT": tmp_path / "export", "OCTO_EPISODES": 3}
    text, kinds = run("probe_representations", tmp_path, monkeypatch, **settings)
    assert "target" in text and "readout_action" in text and "effector" in text
    assert kinds.count("image/png") == 4, "frames, what is read off the tokens, errors, attention"
