"""Writes the simulators' datasets, simulating in processes of their own:

    python data/sims/build.py --data_dir data_dir --episodes metaworld_pretrain=200+2 fetch=50+5 --workers 2

`name=TRAIN` or `name=TRAIN+VAL`: successful episodes of EVERY task; VAL is a tenth of TRAIN unless given. Running it
again with the same arguments does nothing; a dataset that is there with other numbers is an error unless --overwrite is
given. Datasets appear whole or not at all. Needs the extras `data` and `sim`.
"""

import argparse
import contextlib
import importlib
import io
import pathlib
import shutil
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
FOLDERS = {"metaworld_pretrain": "metaworld", "metaworld_heldout": "metaworld", "fetch": "fetch"}
# Works from a checkout that is not installed, too.
for path in (HERE, HERE.parent.parent, *(HERE.parent / folder for folder in set(FOLDERS.values()))):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
import octo_like.common.interrupts  # noqa: E402, F401  isort: skip

import sim_episodes  # noqa: E402

from octo_like.common.locks import exclusive  # noqa: E402
from octo_like.envs.sims import GROUPS  # noqa: E402
from octo_like.envs.sims.remote import SimulatorError  # noqa: E402


def parse_request(text: str) -> tuple[str, int, int]:
    """ "name=TRAIN" or "name=TRAIN+VAL" as (name, TRAIN, VAL), episodes per task."""
    name, _, numbers = text.partition("=")
    train, plus, val = numbers.partition("+")
    if name not in FOLDERS:
        raise argparse.ArgumentTypeError(f"unknown dataset {name!r}; valid: {', '.join(FOLDERS)}")
    if not train.isdecimal() or (plus and not val.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {name}=TRAIN or {name}=TRAIN+VAL, e.g. {name}=50+5")
    train_episodes = int(train)
    val_episodes = int(val) if plus else max(1, train_episodes // 10)
    if not 1 <= train_episodes <= sim_episodes.SEEDS_PER_TASK // 3 or val_episodes < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: each split needs at least one episode of every task")
    return name, train_episodes, val_episodes


def builder_class(name: str):
    """The TFDS builder class of one dataset. Imports TensorFlow."""
    module = importlib.import_module(f"{name}.{name}_dataset_builder")
    return next(v for v in vars(module).values() if isinstance(v, type) and getattr(v, "GROUP", None))


def build(data_dir: str, requests: list[tuple[str, int, int]], *, workers: int = 1, overwrite: bool = False) -> None:
    """Writes the requested datasets below `data_dir`.

    Raises:
      ValueError: one exists with other numbers of episodes, and `overwrite` is False.
    """
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    tfds.disable_progress_bar()  # one bar for everything is below
    root = pathlib.Path(data_dir).expanduser().resolve()
    missing = []
    for name, train, val in requests:
        tasks = len(GROUPS[name][1])
        builder = builder_class(name)(data_dir=root)
        if not builder.is_prepared():
            missing.append((name, train, val))
            continue
        have = {split: info.num_examples // tasks for split, info in builder.info.splits.items()}
        if have == {"train": train, "val": val} and not overwrite:
            print(f"{name}: {train} + {val} episodes a task are there already, nothing to do ({builder.data_path})")
        elif overwrite:
            shutil.rmtree(builder.data_path)
            missing.append((name, train, val))
        else:
            raise ValueError(
                f"{builder.data_path} holds {have.get('train')} + {have.get('val')} episodes a task, but {train} + "
                f"{val} were asked for: give --overwrite, another --data_dir, or these numbers"
            )
    total = sum((train + val) * len(GROUPS[name][1]) for name, train, val in missing)
    if not total:
        return
    with sim_episodes.Demonstrator(workers) as demonstrator, tqdm(total=total, unit="episode", smoothing=0.1) as bar:
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
                data_dir=root,
                train_episodes=train,
                val_episodes=val,
                demonstrator=demonstrator,
                on_episode=on_episode,
            )
            # TFDS builds in a temporary folder and renames it. Its download cache, empty here, stays out of data_dir.
            with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_dir=downloads)
    for name, train, val in missing:
        failed = {task: count for (group, task, _), count in demonstrator.failed.items() if group == name}
        left_out = ", ".join(f"{task} {count}" for task, count in failed.items()) or "none"
        tasks = len(GROUPS[name][1])
        print(
            f"{name}: wrote {tasks} x ({train} + {val}) episodes; left out because the expert failed: {left_out} "
            f"({root / name})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="where the datasets go: DATA_DIR/fetch/1.0.0 ...")
    parser.add_argument(
        "--episodes", nargs="+", type=parse_request, metavar="NAME=TRAIN[+VAL]", help="default: 50+5 of each"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that simulate")
    parser.add_argument("--overwrite", action="store_true", help="replace datasets that exist")
    args = parser.parse_args()
    requests = args.episodes or [(name, 50, 5) for name in FOLDERS]
    try:
        with exclusive(pathlib.Path(args.data_dir, ".lock")):  # another one would take this one's work for leftovers
            build(args.data_dir, requests, workers=args.workers, overwrite=args.overwrite)
    except (ValueError, SimulatorError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
