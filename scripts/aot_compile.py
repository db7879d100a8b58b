"""Does a config compile for a TPU topology, does it fit, how long will a step take? Asked without a TPU.

    python scripts/aot_compile.py --config configs/octo_base.py --topology v4:4x4x4
    python scripts/aot_compile.py --config configs/octo_base.py --topology v5e-64 --batch_size 4096
    python scripts/aot_compile.py --config configs/octo_base.py --topology v5e:4x4 --num_slices 2
    python scripts/aot_compile.py --config configs/octo_base.py --topology v5e-64 --sweep --accumulates 1,2
    python scripts/aot_compile.py --config configs/octo_base.py --topology v5e-64 --inference

Compiles the very step that train.py runs with the compiler of a TPU host (`make aot` in a checkout, otherwise
`pip install 'octo_like[aot]'`), which takes a few minutes, and prints a table; the last line is the same as JSON. Exit
status 1: it does not fit.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import json
import os
import sys

# Before JAX is imported: the TPUs exist on paper only.
os.environ["JAX_PLATFORMS"] = "cpu"

from octo_like.aot import proof, report  # noqa: E402
from octo_like.aot.chips import parse_topology  # noqa: E402
from octo_like.common.config import ConfigDict, freeze, parse_command_line, to_dict  # noqa: E402


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True, help="v4:4x4x4, v5e:8x8, ..., or v4-128, v5e-64, ...")
    parser.add_argument("--num_slices", type=int, default=1, help="slices of that topology")
    parser.add_argument("--batch_size", type=int, help="global; default: the config's, for --inference 1")
    parser.add_argument(
        "--inference", action="store_true", help="sample_actions on one chip instead of a training step"
    )
    parser.add_argument("--min_headroom", type=float, default=0.0, help="share of the memory that has to stay free")
    group = parser.add_argument_group("trying several (each takes as long as one)")
    group.add_argument("--sweep", action="store_true", help="compile every combination and recommend one")
    group.add_argument("--batch_sizes", type=_numbers, default=(), metavar="N,N", help="default: the config's")
    group.add_argument("--accumulates", type=_numbers, default=(), metavar="N,N", help="default: the config's")
    group.add_argument(
        "--remats", type=_words, default=(), metavar="R,R", help="none, dots, full; default: the config's"
    )
    group.add_argument("--fsdps", type=_numbers, default=(), metavar="N,N", help="default: the config's")
    flags, config = parse_command_line(parser, argv)
    proof.find_compiler()
    topology = parse_topology(flags.topology, flags.num_slices)
    name = os.path.basename(flags.config)
    if flags.inference:
        if flags.sweep:
            parser.error("--sweep is for training steps; run --inference by itself")
        reports = [proof.prove_sampling(config, topology, name=name, batch_size=flags.batch_size or 1)]
    else:
        if flags.batch_size is not None:
            config = ConfigDict(to_dict(config))
            config.batch_size = flags.batch_size
            config = freeze(config)
        chosen = [config]
        if flags.sweep:
            chosen = proof.variants(
                config,
                batch_sizes=flags.batch_sizes,
                accumulates=flags.accumulates,
                remats=flags.remats,
                fsdps=flags.fsdps,
            )
        reports = []
        for number, one in enumerate(chosen, 1):
            if flags.sweep:
                print(f"[{number}/{len(chosen)}]", flush=True)
            reports.append(proof.prove_training(one, topology, name=name))
            print(f"{reports[-1]}\n", flush=True)

    if flags.sweep:
        best = report.recommend(reports)
        if best is None:
            print(
                f"recommended: none of these leaves {report.WANTED_HEADROOM:.0%}; try --accumulates, --remats, --fsdps"
            )
        else:
            print(
                f"recommended: --config.batch_size={best.batch_size} --config.accumulate={best.accumulate} "
                f"--config.model.transformer.remat={best.remat} --config.mesh.fsdp={best.mesh['fsdp']}"
            )
        print(json.dumps({"recommended": best and best.to_dict(), "tried": [one.to_dict() for one in reports]}))
        return 0 if best else 1
    (proven,) = reports
    if flags.inference:
        print(f"{proven}\n")
    print(json.dumps(proven.to_dict()))
    return 0 if proven.fits and proven.headroom >= flags.min_headroom else 1


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if unknown := set(words) - {"none", "dots", "full"}:
        raise argparse.ArgumentTypeError(f"unknown remat {sorted(unknown)[0]!r}; valid: none, dots, full")
    return words


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError, proof.NoCompiler) as error:
        print(f"aot_compile.py: error: {error}", file=sys.stderr)
        sys.exit(2)
