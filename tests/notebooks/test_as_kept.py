"""Notebooks as they are kept: with small outputs that name no machine, and a first cell that installs where needed."""

import base64
import importlib.util
import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.notebooks.kernels import NOTEBOOKS, nbformat

NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture(scope="module")
def keep(repository):
    spec = importlib.util.spec_from_file_location("keep_notebooks", repository / "scripts" / "keep_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_test_of_each():
    assert NAMES and NAMES == sorted(
        path.stem.removeprefix("test_") for path in NOTEBOOKS.parent.glob("tests/notebooks/test_[!a]*.py")
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_as_it_is_kept(name, keep):
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert keep.problems(notebook, path.stat().st_size) == [], f"python scripts/keep_notebooks.py {name}"
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    first = next(cell for cell in cells if cell.cell_type == "code")
    assert 'find_spec("octo_like")' in first.source and "%pip install" in first.source
    # All cells were run, in this order, in one go.
    assert [cell.execution_count for cell in cells if cell.cell_type == "code"] == list(
        range(1, 1 + sum(cell.cell_type == "code" for cell in cells))
    )


def picture(colours: int) -> str:
    """A PNG of noise in base64."""
    drawn = np.random.default_rng(0).integers(0, 255, (colours, 3))[np.arange(64 * 64) * 7919 % colours]
    buffer = io.BytesIO()
    Image.fromarray(drawn.reshape(64, 64, 3).astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_what_should_not_be_kept_is_told_of(keep):
    shown = nbformat.v4.new_output("display_data", {"image/png": picture(4), "text/plain": "<Figure>"})
    good = nbformat.v4.new_output("stream", name="stdout", text="../runs/demo/export https://example.org/tmp/x 1/tmp\n")

    def found(*outputs, size=100):
        cells = [nbformat.v4.new_markdown_cell("# A"), nbformat.v4.new_code_cell("1", outputs=list(outputs))]
        return keep.problems(json.loads(nbformat.writes(nbformat.v4.new_notebook(cells=cells))), size)

    assert found(shown, good) == []
    assert found(good) == ["no cell shows a picture: it was not run"]
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    assert found(shown, error) == ["code cell 0: an error: ValueError: no"]
    warning = nbformat.v4.new_output("stream", name="stderr", text="deprecated\n")
    assert found(shown, warning) == ["code cell 0: printed on stderr: deprecated\n"]
    for text in ("saved to /tmp/tmpab/export", "'/opt/me/x'", "File C:\\Users\\me"):
        assert "names a folder of the machine" in found(shown, nbformat.v4.new_output("stream", text=text))[0]
        assert "names a folder" in found(shown, nbformat.v4.new_output("execute_result", {"text/html": text}))[0]
    assert found(shown, size=400_001) == ["it has 400001 bytes; at most 400000 are kept"]


def test_outputs_are_made_small_and_stay_in_order(keep):
    def stream(text, name="stdout"):
        return nbformat.v4.new_output("stream", name=name, text=text)

    large = picture(4000)
    figure = nbformat.v4.new_output("display_data", {"image/png": large, "image/jpeg": "eA==", "text/plain": "<x>"})
    starting = (
        "WARNING: All log messages before absl::InitializeLog() is called\nI0000 00:00:17.5 9 port.cc:1] oneDNN\n"
    )
    kept = keep.tidy([stream("a\n"), stream("b\n"), figure, stream(starting, "stderr"), stream("c\n")])
    assert [one.get("text", "figure") for one in kept] == ["a\nb\n", "figure", "c\n"]
    assert set(kept[1]["data"]) == {"image/png", "text/plain"} and len(kept[1]["data"]["image/png"]) < len(large)
    assert [one["text"] for one in keep.tidy([stream(starting + "careful\n", "stderr")])] == ["careful\n"]
    before, after = (Image.open(io.BytesIO(base64.b64decode(one))) for one in (large, kept[1]["data"]["image/png"]))
    assert before.size == after.size and after.mode == "P"
    few = picture(4)
    assert len(keep.with_palette(few)) <= len(few)
