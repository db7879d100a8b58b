"""Writes the datasets of the tabletop's long tasks, simulating in several processes:

    python data/tabletop_long/build.py --data_dir data_dir --episodes tabletop_long_gripper=700 --workers 2

`name=TRAIN` or `name=TRAIN+VAL`: numbers of episodes; VAL is a twentieth of TRAIN unless given. Running it again with
the same arguments does nothing. Datasets appear whole or not at all.
"""

import argparse
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
for path in (str(HERE), str(HERE.parent), str(HERE.parent.parent)):  # works from a checkout that is not installed, too
    if path not in sys.path:
        sys.path.insert(0, path)
import octo_like.common.interrupts  # noqa: E402, F401  isort: skip

# No TensorFlow at the top level: worker processes import this file again.
import tabletop_building  # noqa: E402

from octo_like.common.locks import exclusive  # noqa: E402
from octo_like.envs.colors import Colors  # noqa: E402
from octo_like.envs.demonstrations import SEEDS_PER_RUN  # noqa: E402
from octo_like.envs.long_demonstrations import LongSimulator  # noqa: E402

DATASETS = ("tabletop_long_gripper", "tabletop_long_arm")


def parse_request(text: str) -> tabletop_building.Request:
    """ "name=TRAIN" or "name=TRAIN+VAL" as (name, TRAIN, VAL)."""
    return tabletop_building.parse_request(text, DATASETS, SEEDS_PER_RUN // 2)


def build(
    data_dir: str | pathlib.Path,
    requests: list[tabletop_building.Request],
    *,
    workers: int = 2,
    overwrite: bool = False,
    seed: int = 0,
    colors: Colors = Colors(),  # noqa: B008  (frozen)
) -> None:
    """Writes the requested datasets below `data_dir`.

    Raises:
      ValueError: one exists with other numbers of episodes or made in another way, and `overwrite` is False.
    """
    simulator = LongSimulator(workers, seed, colors=colors)
    made_with = {"seed": seed, **colors.record()}
    for name, train, val in tabletop_building.build(data_dir, requests, simulator, made_with, overwrite=overwrite):
        failed = sum(count for (who, _), count in simulator.failed.items() if name.endswith(f"_{who}"))
        print(f"{name}: wrote {train} + {val} episodes, left out {failed} that the expert failed ({data_dir}/{name})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="where the datasets go: DATA_DIR/tabletop_long_arm/1.0.0 ...")
    parser.add_argument(
        "--episodes", nargs="+", type=parse_request, metavar="NAME=TRAIN[+VAL]", help="default: 400+20 of each"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that simulate; 0: this one")
    parser.add_argument("--seed", type=int, default=0, help="of the data: each gives other episodes (default: 0)")
    tabletop_building.add_colors(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace datasets that exist")
    args = parser.parse_args()
    requests = args.episodes or [(name, 400, 20) for name in DATASETS]
    try:
        colors = tabletop_building.colors(args, Colors())
        with exclusive(pathlib.Path(args.data_dir, ".lock")):  # another one would take this one's work for leftovers
            build(
                args.data_dir,
                requests,
                workers=args.workers,
                overwrite=args.overwrite,
                seed=args.seed,
                colors=colors,
            )
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
