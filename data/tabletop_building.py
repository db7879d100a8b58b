"""What the commands that write the tabletop's datasets share: requests, colours, and TFDS builders run one by one."""

import argparse
import contextlib
import importlib
import io
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from typing import Any

from octo_like.envs.colors import Colors, parse_pair

Request = tuple[str, int, int]  # dataset, episodes of "train", of "val"


def parse_request(text: str, valid: Collection[str], most: int) -> Request:
    """ "name=TRAIN" or "name=TRAIN+VAL" as (name, TRAIN, VAL)."""
    name, _, numbers = text.partition("=")
    train, plus, val = numbers.partition("+")
    if name not in valid:
        raise argparse.ArgumentTypeError(f"unknown dataset {name!r}; valid: {', '.join(valid)}")
    if not train.isdecimal() or (plus and not val.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {name}=TRAIN or {name}=TRAIN+VAL, e.g. {name}=200+20")
    train_episodes = int(train)
    val_episodes = int(val) if plus else max(1, train_episodes // 20)
    if not 1 <= train_episodes <= most or val_episodes < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: each split needs at least one episode")
    return name, train_episodes, val_episodes


def add_colors(parser: argparse.ArgumentParser) -> None:
    """Options that `colors` reads."""
    parser.add_argument("--palette", nargs="+", metavar="COLOR", help="colours of blocks (default: see the README)")
    parser.add_argument(
        "--unnamed", nargs="+", metavar="COLOR", help="blocks of these colours stand there, but no words name them"
    )
    parser.add_argument(
        "--unnamed_pairs", nargs="*", metavar="BLOCK:PLATE", help="pairs that no words put together; none: no pairs"
    )


def colors(args: argparse.Namespace, default: Colors) -> Colors:
    """What the options of `add_colors` say. Raises ValueError: unknown colours."""
    given = {name: getattr(args, name) for name in ("palette", "unnamed", "unnamed_pairs")}
    pairs = default.unnamed_pairs if given["unnamed_pairs"] is None else frozenset(map(parse_pair, args.unnamed_pairs))
    return Colors(
        default.palette if given["palette"] is None else tuple(args.palette),
        default.unnamed if given["unnamed"] is None else frozenset(args.unnamed),
        pairs,
    )


def builder_class(name: str) -> type:
    """The TFDS builder class in NAME/NAME_dataset_builder.py, or beside it. Imports TensorFlow."""
    module = importlib.import_module(f"{name}.{name}_dataset_builder")
    camel = "".join(part.capitalize() for part in name.split("_"))
    return getattr(module, camel)


def build(
    data_dir: str | pathlib.Path,
    requests: list[Request],
    simulator: Any,
    made_with: Mapping[str, Any],
    *,
    overwrite: bool = False,
    find: Callable[[str], Any] = builder_class,
    unit: str = "episode",
) -> list[Request]:
    """Writes the requested datasets below `data_dir`, those that are not there yet; returns these.

    Args:
      simulator: context manager that the builders are given.
      made_with: what of a dataset's metadata decides about its contents.
      find: name of a dataset to its builder's class.
      unit: what an example is called.

    Raises:
      ValueError: one exists with other numbers of episodes or made in another way, and `overwrite` is False.
    """
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    tfds.disable_progress_bar()  # one bar for everything is below
    root = pathlib.Path(data_dir).expanduser().resolve()
    missing = []
    for name, train, val in requests:
        builder = find(name)(data_dir=root)
        if not builder.is_prepared():
            missing.append((name, train, val))
            continue
        have = {split: info.num_examples for split, info in builder.info.splits.items()}
        known = {"failed_episodes", "passed_over"}
        made = {"seed": 0} | {k: v for k, v in (builder.info.metadata or {}).items() if k not in known}
        if have == {"train": train, "val": val} and made == made_with and not overwrite:
            print(f"{name}: {train} + {val} {unit}s are there already, nothing to do ({builder.data_path})")
        elif overwrite:
            shutil.rmtree(builder.data_path)
            missing.append((name, train, val))
        else:
            raise ValueError(
                f"{builder.data_path} holds {have.get('train')} + {have.get('val')} {unit}s of "
                f"{_told(made, made_with)}, but {train} + {val} of {_told(made_with, made)} were asked for: give "
                "--overwrite, another --data_dir, or these numbers"
            )
    total = sum(train + val for _, train, val in missing)
    if not total:
        return []
    with simulator, tqdm(total=total, unit=unit, smoothing=0.1) as bar:
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
            builder = find(name)(
                data_dir=root, train_episodes=train, val_episodes=val, simulator=simulator, on_episode=on_episode
            )
            # TFDS builds in a temporary folder and renames it. Its download cache, empty here, stays out of data_dir.
            with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_dir=downloads)
    return missing


def _told(made_with: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The seed, and what is not so in `other`."""
    words = [f"seed {made_with['seed']}"]
    for name in sorted((made_with.keys() | other.keys()) - {"seed"}):
        if made_with.get(name) != other.get(name):
            words.append(f"{name} {made_with.get(name, 'as usual')}")
    return ", ".join(words)
