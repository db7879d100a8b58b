"""The notebook about adaptation runs from top to bottom on a tiny policy."""

import os
from pathlib import Path

import pytest

from octo_like.envs import EMBODIMENTS
from tests.robot.tiny import tiny_policy

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def test_the_notebook_adapts_a_policy(tmp_path, monkeypatch):
    robot = EMBODIMENTS["gripper"]
    tiny_policy("tabletop_gripper", robot.action_dim, robot.proprio_dim).save_pretrained(tmp_path / "export")
    monkeypatch.setenv("PYTHONPATH", os.fspath(NOTEBOOKS.parent))
    monkeypatch.setenv("OCTO_CHECKPOINT", os.fspath(tmp_path / "export"))
    monkeypatch.setenv("IPYTHONDIR", os.fspath(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOKS / "finetune.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert f"dimensions: {robot.action_dim}" in text or f"steps of {robot.action_dim} dimensions" in text
    assert "resized  heads_action" in text and "state on the devices" in text
    first, last = (float(x) for x in text.split("loss ")[1].split("\n")[0].split(" -> "))
    assert last < first
    assert f"actions: (8, 4, {robot.action_dim + 2})" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
