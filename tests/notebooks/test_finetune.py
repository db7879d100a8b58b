"""The notebook about adaptation runs from top to bottom on a tiny policy, without TensorFlow."""

from octo_like.envs import EMBODIMENTS
from tests.notebooks.kernels import run
from tests.robot.tiny import tiny_policy


def test_the_notebook_adapts_a_policy(tmp_path, monkeypatch):
    robot = EMBODIMENTS["gripper"]
    tiny_policy("tabletop_gripper", robot.action_dim, robot.proprio_dim).save_pretrained(tmp_path / "export")
    settings = {"OCTO_CHECKPOINT": tmp_path / "export", "OCTO_DEMOS": 3, "OCTO_STEPS": 60, "OCTO_EPISODES": 2}
    text, kinds = run("finetune", tmp_path, monkeypatch, **settings)
    assert "the policy knows tabletop_gripper" in text and "'tabletop_arm3': '3 episodes" in text
    trained, frozen = (next(line.split() for line in text.splitlines() if line.startswith(n)) for n in ("heads", "obs"))
    assert trained[-1] != "-" and frozen[-1] == "-" and frozen[-2] != "-"
    first, last = (float(x) for x in text.split("loss ")[1].split("\n")[0].split(" -> "))
    assert last < first
    assert "actions: 4 steps of {'names': ['q1', 'q2', 'q3', 'gripper']" in text
    assert text.count("before  ") == text.count("after   ") > 0
    assert kinds.count("image/png") == 2 and kinds.count("image/gif") == 2
