"""Datasets named on a command line: by a config file, a mixture, a registry entry, or key by key."""

import argparse
import ast
import collections
import contextlib
import json
from typing import Any

from octo_like.common.config import load_config
from octo_like.common.robot import load_robot
from octo_like.common.words import suggest
from octo_like.data.errors import DataError
from octo_like.data.oxe import mixes, registry
from octo_like.data.spec import DatasetSpec, specs_from_config


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `specs_from_arguments` reads."""
    parser.add_argument("--data_dir", required=True, help="folder of the TFDS datasets (DATA_DIR/name/version)")
    parser.add_argument("--cache_dir", help="where indices are kept (default: beside the data)")
    parser.add_argument(
        "datasets", nargs="*", metavar="DATASET", help="names below DATA_DIR; known ones use the registry"
    )
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", help="use the datasets of this config file, or the DATASETs of it"
    )
    parser.add_argument("--robot", metavar="FILE[:NAME]", help="use the dataset of a robot's description instead")
    parser.add_argument(
        "--mix", help=f"use a named mixture, or the DATASETs of it that are named: {', '.join(mixes.MIXES)}"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",  # given twice, both count
        default=[],
        metavar="FIELD=VALUE",
        help='fields of their spec, in JSON, Python or plain: image_keys=\'{"primary": "image"}\' action_key=action',
    )


def specs_from_arguments(args: argparse.Namespace) -> dict[str, DatasetSpec]:
    """{name: DatasetSpec} of parsed arguments.

    Raises:
      ConfigError: a config or a robot's description that cannot be loaded.
      DataError: another argument that is wrong, by name.
    """
    if bool(args.mix or (args.datasets and not args.config)) + bool(args.config) + bool(args.robot) != 1:
        raise DataError("name datasets or a --mix, or give --config or --robot: exactly one of them")
    twice = [name for name, count in collections.Counter(args.datasets).items() if count > 1]
    if twice:
        raise DataError(f"dataset {twice[0]!r} is named twice; name it once, and give weights in a config")
    num_demos, num_demos_of = None, "all"
    if args.robot:
        robot = load_robot(args.robot)
        datasets: dict[str, Any] = {robot.name: robot.dataset_fields()}
    elif args.config:
        data = load_config(args.config).data
        num_demos, num_demos_of = data.num_demos, data.get("num_demos_of", "all")
        datasets = mixes.datasets_from_config(data)
        for name in args.datasets:
            if name not in datasets:
                raise DataError(f"no dataset {name!r} in {args.config}; {suggest(name, datasets)}")
        datasets = {name: fields for name, fields in datasets.items() if name in (args.datasets or datasets)}
    elif args.mix:
        datasets = mixes.mix(args.mix, args.datasets)
    else:
        datasets = {name: {"standardize": name} if name in registry.REGISTRY else {} for name in args.datasets}
    changes = dict(_field(item) for item in args.set)
    # As training does it (octo_like.data.inputs): what a script shows of a config is what a run of it reads.
    return specs_from_config(
        {name: {**fields, **changes} for name, fields in datasets.items()}, num_demos, num_demos_of
    )


def _field(item: str) -> tuple[str, Any]:
    name, equals, value = item.partition("=")
    if not equals:
        raise DataError(f"--set: {item!r} is not FIELD=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        with contextlib.suppress(SyntaxError, ValueError):
            return name, ast.literal_eval(value)  # ("state",), as one writes it in a config
        return name, value  # a plain word
