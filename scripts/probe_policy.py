"""What a policy knows and what it does not.

    python scripts/probe_policy.py runs/tabletop/export --out runs/probe
    python scripts/probe_policy.py EXPORT --robots gripper --groups readout_action obs_primary:input
    python scripts/probe_policy.py EXPORT --frames my_frames.npz --out runs/probe

Prints, by robot and task: how well the positions of the named block, the named plate and the effector can be read off
the tokens by a linear map (R^2 on held-out episodes); where sampled actions differ from the expert's, by dimension and
phase; what the readout attends to; and how much the loss still pulls at each part of the model. With --out it writes
probe.json, probe.txt and PNGs. Frames are those of the tabletop's experts, made on the fly, or of a file. The format of
the file, and how to read the tables: docs/probing.md.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import sys
from pathlib import Path


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="an exported policy (RUN/export), or a location that load_pretrained takes")
    parser.add_argument("--text-model", help="sentencepiece model, for a released checkpoint")
    parser.add_argument("--modules", nargs="+", default=(), help="of the policy's own parts: they may be imported")
    parser.add_argument("--frames", type=Path, help="FILE.npz with labelled frames, in place of the tabletop's")
    parser.add_argument("--robots", nargs="+", help="of the tabletop (default: those in the policy's statistics)")
    parser.add_argument("--episodes", type=int, default=200, help="of each robot (default: %(default)s)")
    parser.add_argument(
        "--groups",
        nargs="+",
        help="of tokens: NAME, NAME:mean (over its tokens), NAME:input (as it enters the transformer), NAME:input:mean "
        "(default: all readouts and the mean of every observation group)",
    )
    parser.add_argument(
        "--task", help="text, goal, both or embedding: how tasks are given (default: as the policy can)"
    )
    parser.add_argument("--folds", type=int, default=5, help="of the episodes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of folds, sampled actions and loss (default: %(default)s)")
    parser.add_argument("--maps", type=int, default=4, help="frames with attention maps (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of probe.json, probe.txt and the pictures")
    flags = parser.parse_args(argv)
    if flags.frames and flags.robots:
        parser.error("give --frames or --robots, not both")

    from octo_like import Policy
    from octo_like.envs import EMBODIMENTS
    from octo_like.envs.labels import labelled_frames
    from octo_like.training.probe import Limits, probe_policy
    from octo_like.training.probe_frames import frames_from_arrays, read_frames
    from octo_like.training.probe_report import summary, write

    policy = Policy.load_pretrained(flags.policy, text_model=flags.text_model, modules=flags.modules)
    if flags.frames:
        frames = read_frames(flags.frames, policy)
    else:
        known = [name for name in EMBODIMENTS if f"tabletop_{name}" in policy.statistics]
        if not (flags.robots or known):
            raise ValueError(
                f"the policy has no statistics of a tabletop robot, but of {sorted(policy.statistics)}: give --frames"
            )
        spec = policy.batch_spec
        arrays = labelled_frames(
            flags.robots or known,
            flags.episodes,
            image_sizes=spec.image_sizes,
            horizon=spec.action_horizon,
            goals=spec.goal_images,
        )
        arrays = {key: array for key, array in arrays.items() if key != "proprio" or spec.proprio_dim is not None}
        names = {
            f"tabletop_{name}": tuple(zip(robot.action_names, robot.action_units, strict=True))
            for name, robot in EMBODIMENTS.items()
        }
        frames = frames_from_arrays(arrays, policy, "tabletop", action_names=names)
    limits = Limits(maps=flags.maps)
    probed = probe_policy(
        policy, frames, groups=flags.groups, task=flags.task, folds=flags.folds, seed=flags.seed, limits=limits
    )
    print(summary(probed))
    if flags.out:
        print("\n" + "\n".join(f"written: {path}" for path in write(probed, flags.out)))
    return 0


if __name__ == "__main__":
    from octo_like.policy.locations import LocationError
    from octo_like.policy.pretrained import PretrainedError

    try:
        sys.exit(main())
    except (PretrainedError, LocationError, FileNotFoundError, ValueError) as error:
        sys.exit(f"probe_policy.py: error: {error}")
