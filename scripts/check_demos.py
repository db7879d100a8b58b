"""Looks at demonstrations before training: what will be learned from them, and what usually goes wrong.

    python scripts/check_demos.py --data_dir DATA --robot my_robot.py
    python scripts/check_demos.py --data_dir DATA --config configs/tabletop.py
    python scripts/check_demos.py --data_dir DATA my_robot --set image_keys='{"primary": "front"}'

Prints ranges, idle share, time between steps, language coverage, how actions go with proprioception, and warnings;
writes OUTPUT/NAME.html with the same and pictures. What each warning means and what to do: docs/demos.md. A robot's
description (configs/robots/my_robot.py) lets it check more: meanings, units, signs, limits, rate. Numbers are of all
training episodes, frames of some. Exit status: 1 when something cannot be read; 2 with --strict when there are
warnings.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import sys


def main() -> int:
    from octo_like.data.arguments import add_dataset_arguments, specs_from_arguments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_dataset_arguments(parser)
    parser.add_argument("--output", default="runs/check_demos", help="folder of the pages (default: %(default)s)")
    parser.add_argument(
        "--horizon", type=int, help="actions in a chunk (default: the robot's or config's, else unchecked)"
    )
    parser.add_argument("--episodes", type=int, default=64, help="whose frames are looked at (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="exit status 2 when there are warnings")
    args = parser.parse_intermixed_args()  # datasets may stand behind options

    from octo_like.common.config import ConfigError, load_config
    from octo_like.common.robot import load_robot
    from octo_like.common.storage import StorageError
    from octo_like.data.check.dataset import check_dataset, summary, write_page
    from octo_like.data.prepare import prepare_dataset
    from octo_like.data.spec import DataError

    warnings = 0
    try:
        horizon = args.horizon
        if horizon is None and args.robot:
            horizon = load_robot(args.robot).action_horizon
        if horizon is None and args.config:
            model = load_config(args.config).get("model")
            horizon = max(head["action_horizon"] for head in model["heads"].values()) if model else None
        for name, spec in specs_from_arguments(args).items():
            prepared = prepare_dataset(name, spec, args.data_dir, args.cache_dir)
            checked = check_dataset(prepared, args.data_dir, args.cache_dir, horizon=horizon, episodes=args.episodes)
            print(f"\n{summary(checked)}\n\n{write_page(checked, args.output)}")
            warnings += len(checked.warnings)
    except (ConfigError, DataError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 2 if args.strict and warnings else 0


if __name__ == "__main__":
    sys.exit(main())
