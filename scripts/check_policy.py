"""Checks a policy on held-out demonstrations before it meets the robot.

    python scripts/check_policy.py runs/mine/export --data_dir DATA --robot my_robot.py
    python scripts/check_policy.py runs/tabletop/export --data_dir runs/data --config configs/tabletop.py tabletop_arm
    python scripts/check_policy.py EXPORT --data_dir DATA my_robot --set image_keys='{"primary": "front"}'

Replays the validation episodes, those that training held out (the policy's statistics say how they were chosen): error
per action dimension and step of the chunk in physical units, beside two answers that need no policy; plots of what it
would have done; commands outside the limits; how rough they are; latency of `sample_actions` on this machine against
the control rate. Writes OUTPUT/DATASET/index.html and PNGs. docs/demos.md says how to read it. Exit status: 1 when
something cannot be read; 2 with --strict when there are warnings.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import os
import sys


def main() -> int:
    from octo_like.data.arguments import add_dataset_arguments, specs_from_arguments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="an exported policy (RUN/export), or a location that load_pretrained takes")
    parser.add_argument("--modules", nargs="+", default=(), help="of the policy's own parts: they may be imported")
    add_dataset_arguments(parser)
    parser.add_argument("--output", default="runs/check_policy", help="folder of the pages (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=8, help="demonstrations replayed (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="training episodes in place of held-out ones")
    parser.add_argument("--unnormalize", help="dataset of the policy's statistics (default: the one of this name)")
    parser.add_argument("--exec_horizon", type=int, help="actions executed of each chunk (default: half of it)")
    parser.add_argument("--control_hz", type=float, help="control rate (default: the robot's)")
    parser.add_argument("--calls", type=int, default=100, help="timed calls (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="exit status 2 when there are warnings")
    args = parser.parse_intermixed_args()  # datasets may stand behind options

    from octo_like import Policy
    from octo_like.common.robot import Description
    from octo_like.data.check.replay import load_demos
    from octo_like.data.prepare import prepare_dataset
    from octo_like.data.spec import DataError, suggest
    from octo_like.policy.locations import LocationError
    from octo_like.policy.pretrained import PretrainedError
    from octo_like.robot.check import check_policy
    from octo_like.robot.check_report import summary, write_page

    warnings = 0
    try:
        specs = specs_from_arguments(args)
        policy = Policy.load_pretrained(args.policy, modules=args.modules)
        for name, spec in specs.items():
            statistics = args.unnormalize or (name if name in policy.statistics else None)
            if statistics is None and len(policy.statistics) == 1:
                statistics = next(iter(policy.statistics))
            if statistics not in policy.statistics:
                raise DataError(
                    f"the policy has no statistics of {statistics or name!r}; --unnormalize, "
                    f"{suggest(statistics or name, policy.statistics)}"
                )
            trained = policy.statistics[statistics].get("held_out") or {}
            spec, differs = spec.held_out_as(trained, [item.partition("=")[0] for item in args.set])
            if differs:
                print(f"{name}: {differs}: episodes that were trained on may be among the replayed ones")
            prepared = prepare_dataset(name, spec, args.data_dir, args.cache_dir)
            index = prepared.train if args.train else prepared.val
            if not len(index):
                raise DataError(f"{name}: no episodes are held out (val_fraction=0); --train replays training episodes")
            dims = len(policy.statistics[statistics]["action"]["mean"])
            if dims != prepared.function.action_dim:
                raise DataError(
                    f"{name} has {prepared.function.action_dim} action dimensions, the policy's statistics of "
                    f"{statistics!r} {dims}: it was trained on other actions"
                )
            robot = spec.robot or policy.statistics[statistics].get("robot")
            demos = list(
                load_demos(prepared, index, policy.batch_spec.image_sizes, args.episodes, policy.batch_spec.resize)
            )
            checked = check_policy(
                policy,
                demos,
                statistics,
                description=None if robot is None else Description.from_json(robot),
                hz=args.control_hz,
                exec_horizon=args.exec_horizon,
                calls=args.calls,
            )
            page = write_page(checked, os.path.join(args.output, name))
            print(f"\n{summary(checked)}\n\n{page}")
            warnings += sum(finding.warning for finding in checked.findings)
    except (ValueError, LocationError, PretrainedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 2 if args.strict and warnings else 0


if __name__ == "__main__":
    sys.exit(main())
