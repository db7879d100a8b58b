"""Runs notebooks and keeps small outputs in them, as a reader of the repository sees them.

    python scripts/keep_notebooks.py                          # all, with what `make demo` has left in runs/demo
    OCTO_CHECKPOINT=EXPORT python scripts/keep_notebooks.py load_checkpoint probe_representations
    python scripts/keep_notebooks.py --check                  # only looks at what is kept

The notebooks' own environment variables say what they look at (the first cells name them). Pictures are kept with a
palette, without times and versions of the machine. A notebook whose outputs would not be fit to be kept (an error, a
warning, a folder of this machine, too large) stays as it was, and the reason is said. Needs the extra `notebook`, and
`data` for explore_data.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import base64
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
MOST_BYTES = 400_000  # of a notebook
# Folders where machines keep what is theirs; the rest of a path may be a name of the project.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:tmp|home|root|Users|work|mnt|content|opt|var|data)/[\w.-]+|[A-Z]:\\\\?Users")

# What TensorFlow's library says whenever it starts, in lines that begin with a letter and the date.
STARTING = re.compile(r"^(WARNING: All log messages before absl::|[IW]\d{4} \d\d:\d\d:\d+\.).*\n?", re.MULTILINE)


def problems(notebook: dict[str, Any], size: int) -> list[str]:
    """Why a notebook should not be kept as it is.

    Args:
      notebook: the parsed file. size: of the file, bytes.
    """
    found = []
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [(i, output) for i, cell in enumerate(cells) for output in cell["outputs"]]
    if not any("image/png" in output.get("data", {}) for _, output in outputs):
        found.append("no cell shows a picture: it was not run")
    for i, output in outputs:
        text = _text(output)
        if output["output_type"] == "error":
            found.append(f"code cell {i}: an error: {output['ename']}: {output['evalue']}")
        elif output.get("name") == "stderr":
            found.append(f"code cell {i}: printed on stderr: {text[:300]}")
        if machine := MACHINE_PATH.search(text):
            found.append(f"code cell {i}: names a folder of the machine it was made on: {machine[0]}")
    if size > MOST_BYTES:
        found.append(f"it has {size} bytes; at most {MOST_BYTES} are kept")
    return found


def _text(output: dict[str, Any]) -> str:
    """All that can be read of an output."""
    parts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if not k.startswith("image/"))]
    return "".join("".join(part) if isinstance(part, list) else str(part) for part in parts)


def with_palette(png: str) -> str:
    """A picture in base64, with at most 256 colours where that makes it smaller."""
    from PIL import Image

    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return min(png, base64.b64encode(small.getvalue()).decode(), key=len)


def tidy(outputs: list[Any]) -> list[Any]:
    """Outputs of a cell as they are kept: what was printed in a row is one, pictures have a palette."""
    kept: list[Any] = []
    for output in outputs:
        if output.get("name") == "stderr":
            output["text"] = STARTING.sub("", output["text"])
            if not output["text"].strip():
                continue
        if "image/png" in output.get("data", {}):
            output["data"]["image/png"] = with_palette(output["data"]["image/png"])
            output["data"].pop("image/jpeg", None)  # Pillow's pictures offer both
        if kept and output["output_type"] == "stream" and kept[-1].get("name") == output["name"]:
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def execute(path: Path, timeout: int) -> str:
    """Runs a notebook in its folder; its text with the new outputs, ready to be kept.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    options = {"record_timing": False, "resources": {"metadata": {"path": str(path.parent)}}}
    nbclient.NotebookClient(notebook, timeout=timeout, **options).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main() -> int:
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--check", action="store_true", help="runs nothing")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for a cell (default: %(default)s)")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(names)):
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(names)}")
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TQDM_DISABLE": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    status = 0
    for name in args.names or names:
        path = FOLDER / f"{name}.ipynb"
        text = path.read_text(encoding="utf-8") if args.check else execute(path, args.timeout)
        size = len(text.encode())
        if found := problems(json.loads(text), size):
            status = 1
            print(f"{name}: {'' if args.check else 'not kept: '}" + "\n  ".join(found), file=sys.stderr)
            continue
        if not args.check:
            path.write_text(text, encoding="utf-8")
        print(f"{name}: {size} bytes")
    return status


if __name__ == "__main__":
    sys.exit(main())
