"""The notebook about data runs from top to bottom on datasets that the test writes."""

import os
from pathlib import Path

import pytest

from octo_like.data import bench

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"

CONFIG = """
from octo_like.common.defaults import default_config

def get_config():
    config = default_config()
    config.num_steps, config.batch_size = 100, 8
    config.image_sizes = dict(primary=(32, 32), wrist=(16, 16))
    config.goal_images = ("primary",)
    config.proprio_dim = 8
    config.model = dict(heads=dict(action=dict(action_horizon=4, action_dim=7)))
    fields = dict(image_keys=dict(primary="image", wrist="wrist_image"), proprio_keys=("state",))
    config.data.datasets = {f"bench_32x32_{i}": dict(fields, weight=1.0 + i) for i in range(2)}
    return config
"""


def test_the_notebook_runs(tmp_path, monkeypatch):
    bench.make_datasets(str(tmp_path / "data"), 2, size=(32, 32), episodes=3, steps=6)
    (tmp_path / "look.py").write_text(CONFIG)
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    monkeypatch.setenv("OCTO_CONFIG", str(tmp_path / "look.py"))
    monkeypatch.setenv("OCTO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OCTO_OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOKS / "explore_data.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 5, "two sheets, two pairs of histograms, one batch"
    assert "bench_32x32_0" in text and "passes" in text and "put block 1" in text
    assert "observation/image_primary" in text and "(8, 2, 32, 32, 3)" in text and "action (8, 2, 4, 7)" in text
    assert sorted(os.listdir(tmp_path / "out")) == [
        f"bench_32x32_{i}{end}.png" for i in range(2) for end in ("", "_actions")
    ]
