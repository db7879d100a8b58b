"""The notebook runs from top to bottom on a tiny checkpoint, in a kernel that cannot import TensorFlow."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from octo_like.common.normalization import compute_statistics
from octo_like.common.schema import BatchSpec
from octo_like.common.text import TextTokenizer
from octo_like.envs import EMBODIMENTS
from octo_like.model.octo import build_model, init_params
from octo_like.model.policy import Policy, spec_to_json

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


def tiny_policy(dataset: str, action_dim: int, proprio_dim: int | None) -> Policy:
    """Random weights, real shapes."""
    tokenizer = TextTokenizer.load("builtin")
    spec = BatchSpec(
        window_size=1,
        action_horizon=4,
        action_dim=action_dim,
        image_sizes={"primary": (32, 32)},
        proprio_dim=proprio_dim,
        language_length=tokenizer.max_length,
    )
    model = {
        "token_dim": 32,
        "max_window": 1,
        "transformer": {"num_layers": 1, "num_heads": 2, "mlp_dim": 32},
        "task_tokenizers": {"language": {"kind": "language", "encoder": "small", "dim": 16, "num_heads": 2}},
        "observation_tokenizers": {
            "primary": {
                "kind": "image",
                "obs_keys": ["image_primary"],
                "stem": {"kind": "patch", "patch_size": 16, "num_features": 16},
            },
        },
        "readouts": {"action": 1},
        "heads": {
            "action": {
                "kind": "regression",
                "readout": "readout_action",
                "action_horizon": 4,
                "action_dim": action_dim,
            }
        },
    }
    rng = np.random.default_rng(0)
    statistics = {"action": compute_statistics(rng.normal(size=(50, action_dim)).astype(np.float32) * 0.01)}
    if proprio_dim:
        statistics["proprio"] = compute_statistics(rng.normal(size=(50, proprio_dim)).astype(np.float32))
    params = init_params(build_model(model, vocab_size=tokenizer.vocab_size), spec, jax.random.key(0))
    return Policy({"model": model, "batch_spec": spec_to_json(spec)}, params, {dataset: statistics}, tokenizer)


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
