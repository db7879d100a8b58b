"""The notebook runs from top to bottom on a tiny checkpoint, in a kernel that cannot import TensorFlow."""

import pytest

from octo_like.envs import EMBODIMENTS
from tests.notebooks.kernels import run
from tests.robot.tiny import tiny_policy

LOOK = """
import importlib, sys
print('tensorflow loaded:', 'tensorflow' in sys.modules)
try:
    importlib.import_module('tensorflow')
except ImportError as error:
    print('refused:', error)
"""


@pytest.mark.parametrize("dataset", ["tabletop_gripper", "my_robot"])
def test_the_notebook_runs_without_tensorflow(tmp_path, monkeypatch, dataset):
    robot = EMBODIMENTS["gripper"]
    policy = tiny_policy(dataset, robot.action_dim, robot.proprio_dim)
    policy.save_pretrained(tmp_path / "export")
    text, kinds = run("load_checkpoint", tmp_path, monkeypatch, more=LOOK, OCTO_CHECKPOINT=tmp_path / "export")
    assert "tensorflow loaded: False" in text and "refused: tensorflow" in text
    assert "image_primary" in text and dataset in text, "the spec is printed"
    assert "samples, horizon, dimensions: (16, 4, 7)" in text
    in_the_world = dataset.startswith("tabletop_")
    drawn = "the observation, the actions, the attention and, in the world, chunks along a trajectory"
    assert kinds.count("image/png") == (4 if in_the_world else 3), drawn
    assert "takes words alone" in text
    assert kinds.count("image/gif") == (1 if in_the_world else 0)
    assert text.count(" steps  ") == (4 if in_the_world else 0)
