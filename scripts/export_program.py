"""Writes a policy as a program (StableHLO) that a machine with JAX and NumPy alone can run:

    python scripts/export_program.py --checkpoint runs/my_robot/export --unnormalize target \\
        --output runs/my_robot/program --instructions "put the cup on the plate" "open the drawer"

The folder holds the loader too: `from program import Program`. docs/deployment.md says how to use it, and what
instructions need that were not exported.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="exported policy, as load_pretrained takes it")
    parser.add_argument("--modules", nargs="+", default=(), help="of the policy's own parts: they may be imported")
    parser.add_argument("--output", required=True, type=Path, help="the folder that is written")
    parser.add_argument("--unnormalize", help="dataset whose units go in and come out")
    parser.add_argument("--normalized", action="store_true", help="normalised numbers go in and come out")
    parser.add_argument("--head", help="of a policy with several")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=(), help="that can be run; default: any")
    parser.add_argument("--platforms", nargs="+", default=("cpu", "cuda", "tpu"), help="cpu, cuda, tpu, rocm")
    parser.add_argument("--instructions", nargs="+", default=(), help="texts that can be given as texts")
    parser.add_argument("--missing", nargs="+", default=(), help="observations that the robot does not have")
    args = parser.parse_args()

    from octo_like import Policy
    from octo_like.common.normalization import choose_units
    from octo_like.policy.locations import LocationError
    from octo_like.policy.pretrained import PretrainedError, read_json
    from octo_like.policy.program_export import PROGRAM_FILE, export_program

    try:
        policy = Policy.load_pretrained(args.checkpoint, modules=args.modules)
        folder = export_program(
            policy,
            args.output,
            unnormalize=choose_units(policy.statistics, args.unnormalize, args.normalized),
            head=args.head,
            batch_sizes=args.batch_sizes,
            platforms=args.platforms,
            instructions=args.instructions,
            missing=args.missing,
        )
    except (PretrainedError, LocationError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    spec = read_json(folder / PROGRAM_FILE)
    rows = {**spec["inputs"], **spec["outputs"]}
    for name, entry in rows.items():
        shape = f"({', '.join(map(str, entry['shape']))}) {entry['dtype']}"
        print(f"{name:<52}{shape:<28}{', '.join(entry.get('names', ())) or entry['meaning']}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"\nwritten to {folder}: {size / 2**20:.1f} MB, for {', '.join(spec['platforms'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
