"""Writes the tabletop datasets, simulating in several processes:

    python data/tabletop/build.py --data_dir data_dir --episodes tabletop_pusher=700 tabletop_arm3=200+20 --workers 2

`name=TRAIN` or `name=TRAIN+VAL`: numbers of episodes; VAL is a twentieth of TRAIN unless given. Running it again with
the same arguments does nothing; a dataset that is there with other numbers is an error unless --overwrite is given.
Datasets appear whole or not at all.
"""

import argparse
import importlib
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
from octo_like.envs import EMBODIMENTS, demonstrations  # noqa: E402
from octo_like.envs.colors import Colors  # noqa: E402

DATASETS = {f"tabletop_{name}": name for name in EMBODIMENTS}


def parse_request(text: str) -> tuple[str, int, int]:
    """ "name=TRAIN" or "name=TRAIN+VAL" as (name, TRAIN, VAL)."""
    return tabletop_building.parse_request(text, DATASETS, demonstrations.SEEDS_PER_DATASET // 2)


def builder_class(name: str):
    """The TFDS builder class of one dataset. Imports TensorFlow."""
    module = importlib.import_module(f"{name}.{name}_dataset_builder")
    return next(v for v in vars(module).values() if isinstance(v, type) and getattr(v, "EMBODIMENT", None))


def build(
    data_dir: str,
    requests: list[tuple[str, int, int]],
    *,
    workers: int = 2,
    overwrite: bool = False,
    seed: int = 0,
    colors: Colors = Colors(),  # noqa: B008  (frozen)
) -> None:
    """Writes the requested datasets below `data_dir`.

    Raises:
      ValueError: one exists with other numbers of episodes, of another seed or other colours, and `overwrite` is False.
    """
    simulator = demonstrations.Simulator(workers, seed, colors=colors)
    made_with = {"seed": seed, **colors.record()}
    written = tabletop_building.build(data_dir, requests, simulator, made_with, overwrite=overwrite, find=builder_class)
    for name, train, val in written:
        failed = sum(count for (who, _), count in simulator.failed.items() if who == DATASETS[name])
        where = pathlib.Path(data_dir).expanduser().resolve() / name
        print(f"{name}: wrote {train} + {val} episodes, left out {failed} that the expert failed ({where})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="where the datasets go: DATA_DIR/tabletop_pusher/1.2.0 ...")
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
