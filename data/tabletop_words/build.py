"""Writes the tabletop's pictures and words, drawing in several processes:

    python data/tabletop_words/build.py --data_dir data_dir --rows 20000 --workers 2
    python data/tabletop_words/build.py --data_dir data_dir --rows 4000+200 --kinds point box --robots arm

`TRAIN` or `TRAIN+VAL`: numbers of rows; VAL is a twentieth of TRAIN unless given. Running it again with the same
arguments does nothing. The dataset appears whole or not at all.
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
from octo_like.envs import EMBODIMENTS  # noqa: E402
from octo_like.envs.picture_rows import PICTURE_COLORS, ROBOTS, SEEDS_PER_RUN, PictureSimulator  # noqa: E402
from octo_like.envs.picture_words import KINDS  # noqa: E402

NAME = "tabletop_words"


def parse_rows(text: str) -> tabletop_building.Request:
    """ "TRAIN" or "TRAIN+VAL" as (name, TRAIN, VAL)."""
    return tabletop_building.parse_request(f"{NAME}={text}", (NAME,), SEEDS_PER_RUN // 4)


def build(
    data_dir: str | pathlib.Path, request: tabletop_building.Request, simulator: PictureSimulator, *, overwrite=False
) -> None:
    """Writes the dataset below `data_dir`.

    Raises:
      ValueError: it exists with other numbers of rows or made in another way, and `overwrite` is False.
    """
    made_with = simulator.record()
    for _, train, val in tabletop_building.build(
        data_dir, [request], simulator, made_with, overwrite=overwrite, unit="row"
    ):
        passed_over = sum(simulator.passed_over.values())
        print(f"{NAME}: wrote {train} + {val} rows, passed over {passed_over} pictures ({data_dir}/{NAME})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="where the dataset goes: DATA_DIR/tabletop_words/1.1.0")
    parser.add_argument("--rows", type=parse_rows, default="4000+200", metavar="TRAIN[+VAL]", help="default: 4000+200")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of questions (default: all)")
    parser.add_argument("--robots", nargs="+", choices=tuple(EMBODIMENTS), default=ROBOTS, help="in the pictures")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw; 0: this one")
    parser.add_argument("--seed", type=int, default=0, help="of the data: each gives other rows (default: 0)")
    tabletop_building.add_colors(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that exists")
    args = parser.parse_args()
    try:
        colors = tabletop_building.colors(args, PICTURE_COLORS)
        simulator = PictureSimulator(args.workers, args.seed, kinds=args.kinds, robots=args.robots, colors=colors)
        with exclusive(pathlib.Path(args.data_dir, ".lock")):  # another one would take this one's work for leftovers
            build(args.data_dir, args.rows, simulator, overwrite=args.overwrite)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
