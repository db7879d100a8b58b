"""Runs a notebook from top to bottom in a kernel of its own, as the tests of this folder do."""

import os
from pathlib import Path

import pytest

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


def run(
    name: str, tmp_path: Path, monkeypatch, *, tensorflow: bool = False, more: str = "", **settings
) -> tuple[str, list[str]]:
    """Runs notebooks/NAME.ipynb; its own outputs, which are kept with it, are not looked at.

    Args:
      tensorflow: whether the kernel can import it.
      more: a cell that is run at the end.
      settings: environment variables of the kernel.

    Returns:
      All text that was printed, and the kinds of everything that was shown ("image/png", ...).
    """
    places = [str(NOTEBOOKS.parent)]
    if not tensorflow:
        site = tmp_path / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(NO_TENSORFLOW)
        places.insert(0, str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for key, value in settings.items():
        monkeypatch.setenv(key, str(value))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    if more:
        notebook.cells.append(nbformat.v4.new_code_cell(more))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    return text, [kind for output in outputs for kind in output.get("data", {})]
