"""The notebook runs from top to bottom on a tiny checkpoint, in a kernel that cannot import TensorFlow."""

import os
from pathlib import Path

import pytest

from octo_like.envs import EMBODIMENTS
from tests.robot.tiny import tiny_policy

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"

# Read by Python itself at the start of the kernel's process.
NO_TENSORFLOW = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "keras"):
            raise ImportError(f"{name} is not available here")

sys.meta_path.insert(0, Refuse())
"""


def execute(tmp_path, monkeypatch, checkpoint: Path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_TENSORFLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(NOTEBOOKS.parent)]))
    monkeypatch.setenv("OCTO_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOKS / "load_checkpoint.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    notebook.cells.append(
        nbformat.v4.new_code_cell(
            "import importlib, sys\n"
            "print('tensorflow loaded:', 'tensorflow' in sys.modules)\n"
            "try:\n"
            "    importlib.import_module('tensorflow')\n"
            "except ImportError as error:\n"
            "    print('refused:', error)"
        )
    )
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert "tensorflow loaded: False" in text and "refused: tensorflow" in text
    return text, kinds


@pytest.mark.parametrize("dataset", ["tabletop_gripper", "my_robot"])
def test_the_notebook_runs_without_tensorflow(tmp_path, monkeypatch, dataset):
    robot = EMBODIMENTS["gripper"]
    policy = tiny_policy(dataset, robot.action_dim, robot.proprio_dim)
    policy.save_pretrained(tmp_path / "export")
    text, kinds = execute(tmp_path, monkeypatch, tmp_path / "export")
    assert "image_primary" in text and dataset in text, "the spec is printed"
    assert "samples, horizon, dimensions: (16, 4, 7)" in text
    in_the_world = dataset.startswith("tabletop_")
    assert kinds.count("image/png") == 2, "the observation and the actions are drawn"
    assert kinds.count("image/gif") == (1 if in_the_world else 0)
    assert text.count(" steps  ") == (4 if in_the_world else 0)
