"""Hours, cost and bottleneck of pretraining runs on paper; see docs/scaling.md for the formulas.

python scripts/scaling.py
python scripts/scaling.py --configs configs/octo_base.py:1b --topologies v5p-128,v6e-256 --batch_size 4096 --mfu 0.3
python scripts/scaling.py --loader_rate 320 --price v5e=0.9 --price v6e=1.8
python scripts/scaling.py --write                # into docs/scaling.md
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import dataclasses
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from octo_like.aot import scaling  # noqa: E402
from octo_like.aot.chips import parse_topology  # noqa: E402
from octo_like.aot.report import Report  # noqa: E402
from octo_like.aot.table import read, replace_between  # noqa: E402
from octo_like.common.config import load_config  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = "configs/octo_small.py,configs/octo_base.py,configs/octo_base.py:300m,configs/octo_base.py:1b"
TOPOLOGIES = "v4-128,v5e-64,v5e-256,v5p-64,v6e-64"
PAGE, DATA = ROOT / "docs" / "scaling.md", ROOT / "docs" / "aot.json"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--topologies", default=TOPOLOGIES)
    parser.add_argument("--num_slices", type=int, default=1)
    parser.add_argument("--batch_size", type=int, help="global; default: the config's")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    defaults = scaling.Assumptions()
    for name in (field.name for field in dataclasses.fields(defaults) if field.name != "prices"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--price", action="append", default=[], metavar="CHIP=USD", help="of a chip-hour")
    flags = parser.parse_args(argv)
    prices = {chip: float(usd) for chip, _, usd in (text.partition("=") for text in flags.price)}
    given = {field.name: getattr(flags, field.name) for field in dataclasses.fields(defaults) if field.name != "prices"}
    assumptions = scaling.Assumptions(**given, prices=scaling.PRICES | prices)
    kept, rows = read(DATA), []
    for name in flags.configs.split(","):
        config = load_config(name)
        batch_size = flags.batch_size or config.batch_size
        facts = scaling.facts_of(config, jax.devices()[:1])
        for text in flags.topologies.split(","):
            topology = parse_topology(text, flags.num_slices)
            entry = kept.get(f"{name} {topology.accelerator_of_slice} {flags.num_slices}")
            report = Report.from_dict(entry["report"]) if entry else None
            if report is not None and (report.batch_size != batch_size or not report.fits):
                report = None
            one = scaling.estimate(facts, topology, batch_size, assumptions, report)
            rows.append((pathlib.Path(name).name.replace(".py", ""), facts, one, report is not None))
    table = scaling.markdown(rows, assumptions)
    print(table)
    if flags.write:
        PAGE.write_text(replace_between(PAGE.read_text(), table, "scaling-table"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        print(f"scaling.py: error: {error}", file=sys.stderr)
        sys.exit(2)
