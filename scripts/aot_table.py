"""Compiles the Octo configs for the topologies of the table in docs/aot.md and docs/tpu.md, and writes it there.

    python scripts/aot_table.py                      # what has not been compiled with its present settings
    python scripts/aot_table.py --again              # everything
    python scripts/aot_table.py --only "octo_small.*v5e"
    python scripts/aot_table.py --render             # the table alone, from docs/aot.json

A row takes four to ten minutes of a core.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import os
import pathlib
import re
import sys

# Before JAX is imported: the TPUs exist on paper only.
os.environ["JAX_PLATFORMS"] = "cpu"

from octo_like.aot import proof  # noqa: E402
from octo_like.aot.report import WANTED_HEADROOM  # noqa: E402
from octo_like.aot.table import Row, markdown, prove, read, replace_between, report_of  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "aot.md", ROOT / "docs" / "tpu.md")
SMALL, BASE, LARGE, HUGE = (f"configs/octo_{name}" for name in ("small.py", "base.py", "base.py:300m", "base.py:1b"))


def _settings(**overrides) -> tuple[tuple[str, str], ...]:
    return tuple((key.replace("__", "."), str(value)) for key, value in overrides.items())


ROWS = (
    Row(SMALL, "v4-128"),
    Row(SMALL, "v5e-64"),
    Row(SMALL, "v5e-256"),
    Row(SMALL, "v5p-64"),
    Row(SMALL, "v6e-32"),
    Row(SMALL, "v6e-64"),
    Row(SMALL, "v5p-128"),
    Row(SMALL, "v5e-16", 2, _settings(accumulate=2)),
    Row(BASE, "v4-128"),
    Row(BASE, "v5e-64", 1, _settings(accumulate=2)),
    Row(BASE, "v5e-256"),
    Row(BASE, "v5p-64"),
    Row(BASE, "v6e-64"),
    Row(BASE, "v5p-128"),
    Row(BASE, "v5e-16", 2, _settings(accumulate=8)),
    Row(LARGE, "v5p-64", 1, _settings(accumulate=2)),
    Row(HUGE, "v5p-64", 1, _settings(accumulate=4)),
    Row(SMALL, "v5p-16", 1, _settings(accumulate=2)),
    # The text encoder is trained as well.
    Row(SMALL, "v5p-32", 1, _settings(optimizer__freeze="()", model__task_tokenizers__language__finetune_encoder=True)),
)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose 'config topology slices' matches")
    parser.add_argument("--again", action="store_true", help="also what is in docs/aot.json already")
    parser.add_argument("--render", action="store_true", help="compile nothing")
    parser.add_argument("--pages", nargs="+", type=pathlib.Path, default=PAGES)
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / "docs" / "aot.json")
    flags = parser.parse_args(argv)
    os.chdir(ROOT)
    if not flags.render:
        proof.find_compiler()
        for row in ROWS:
            if not re.search(flags.only, row.key) or (report_of(read(flags.data), row) and not flags.again):
                continue
            print(f"== {row.key} {row.arguments}", flush=True)
            (report,) = prove([row], flags.data)
            print(f"{report}\n", flush=True)
    kept = read(flags.data)
    for page in flags.pages:
        page.write_text(replace_between(page.read_text(), markdown(ROWS, kept)))
    reports = [report_of(kept, row) for row in ROWS]
    return 0 if all(one and one.fits and one.headroom >= WANTED_HEADROOM for one in reports) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError, proof.NoCompiler) as error:
        print(f"aot_table.py: error: {error}", file=sys.stderr)
        sys.exit(2)
