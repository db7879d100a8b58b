"""Writes the tabletop datasets, simulating in several processes:

    python data/tabletop/build.py --data_dir data_dir --episodes tabletop_pusher=700 tabletop_arm3=200+20 --workers 2

`name=TRAIN` or `name=TRAIN+VAL`: numbers of episodes; VAL is a twentieth of TRAIN unless given. Running it again with
the same arguments does nothing; a dataset that is there with other numbers is an error unless --overwrite is given.
Datasets appear whole or not at all.
"""

import argparse
import contextlib
import io
import pathlib
import shutil
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
for path in (str(HERE), str(HERE.parent.parent)):  # works from a checkout that is not installed, too
    if path not in sys.path:
        sys.path.insert(0, path)

# No TensorFlow at the top level: worker processes import this file again.
from octo_like.common.locks import exclusive  # noqa: E402
from octo_like.envs import EMBODIMENTS, demonstrations  # noqa: E402

DATASETS = {f"tabletop_{name}": name for name in EMBODIMENTS}


def parse_request(text: str) -> tuple[str, int, int]:
    """ "name=TRAIN" or "name=TRAIN+VAL" as (name, TRAIN, VAL)."""
    name, _, numbers = text.partition("=")
    train, plus, val = numbers.partition("+")
    if name not in DATASETS:
        raise argparse.ArgumentTypeError(f"unknown dataset {name!r}; valid: {', '.join(DATASETS)}")
    if not train.isdecimal() or (plus and not val.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {name}=TRAIN or {name}=TRAIN+VAL, e.g. {name}=200+20")
    train_episodes = int(train)
    val_episodes = int(val) if plus else max(1, train_episodes // 20)
    if not 1 <= train_episodes <= demonstrations.SEEDS_PER_DATASET // 2 or val_episodes < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: each split needs at least one episode")
    return name, train_episodes, val_episodes


def builder_class(name: str):
    """The TFDS builder class of one dataset. Imports TensorFlow."""
    import importlib

    module = importlib.import_module(f"{name}.{name}_dataset_builder")
    return next(v for v in vars(module).values() if isinstance(v, type) and getattr(v, "EMBODIMENT", None))


def build(
    data_dir: str, requests: list[tuple[str, int, int]], *, workers: int = 2, overwrite: bool = False, seed: int = 0
) -> None:
    """Writes the requested datasets below `data_dir`.

    Raises:
      ValueError: one exists with other numbers of episodes or of another seed, and `overwrite` is False.
    """
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    tfds.disable_progress_bar()  # one bar for everything is below
    root = pathlib.Path(data_dir).expanduser().resolve()
    missing = []
    for name, train, val in requests:
        builder = builder_class(name)(data_dir=root)
        if not builder.is_prepared():
            missing.append((name, train, val))
            continue
        have = {split: info.num_examples for split, info in builder.info.splits.items()}
        made_with = (builder.info.metadata or {}).get("seed", 0)
        if have == {"train": train, "val": val} and made_with == seed and not overwrite:
            print(f"{name}: {train} + {val} episodes are there already, nothing to do ({builder.data_path})")
        elif overwrite:
            shutil.rmtree(builder.data_path)
            missing.append((name, train, val))
        else:
            raise ValueError(
                f"{builder.data_path} holds {have.get('train')} + {have.get('val')} episodes of seed {made_with}, but "
                f"{train} + {val} of seed {seed} were asked for: give --overwrite, another --data_dir, or these numbers"
            )
    total = sum(train + val for _, train, val in missing)
    if not total:
        return
    with demonstrations.Simulator(workers, seed) as simulator, tqdm(total=total, unit="episode", smoothing=0.1) as bar:
        frames = 0

        def on_episode(steps: int) -> None:
            nonlocal frames
            frames += steps
            bar.set_postfix_str(f"{frames} frames", refresh=False)
            bar.update()

        for name, train, val in missing:
            bar.set_description(name)
            for leftover in (root / name).glob("incomplete.*"):  # of a build that was killed
                shutil.rmtree(leftover)
            builder = builder_class(name)(
                data_dir=root, train_episodes=train, val_episodes=val, simulator=simulator, on_episode=on_episode
            )
            # TFDS builds in a temporary folder and renames it. Its download cache, empty here, stays out of data_dir.
            with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_dir=downloads)
    for name, train, val in missing:
        failed = sum(count for (who, _), count in simulator.failed.items() if who == DATASETS[name])
        print(f"{name}: wrote {train} + {val} episodes, left out {failed} that the expert failed ({root / name})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="where the datasets go: DATA_DIR/tabletop_pusher/1.2.0 ...")
    parser.add_argument(
        "--episodes", nargs="+", type=parse_request, metavar="NAME=TRAIN[+VAL]", help="default: 400+20 of each"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that simulate; 0: this one")
    parser.add_argument("--seed", type=int, default=0, help="of the data: each gives other episodes (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace datasets that exist")
    args = parser.parse_args()
    requests = args.episodes or [(name, 400, 20) for name in DATASETS]
    try:
        with exclusive(pathlib.Path(args.data_dir, ".lock")):  # another one would take this one's work for leftovers
            build(args.data_dir, requests, workers=args.workers, overwrite=args.overwrite, seed=args.seed)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
