"""Verifies checkpoints: hashes of the files, checksums of the arrays. Changes nothing.

    python scripts/verify_checkpoint.py runs/my_run            # the newest step
    python scripts/verify_checkpoint.py runs/my_run --all      # every step
    python scripts/verify_checkpoint.py runs/my_run --step 1000

Exit status: 0 when all of them are what was saved, 1 otherwise. A storage that does not answer is asked again for
five minutes; that it cannot be read says nothing about a step.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # verifying needs no accelerator, and one may be busy training


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a run's directory, its checkpoints directory, or one step's directory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="this step only")
    which.add_argument("--all", action="store_true", help="every step, not only the newest")
    flags = parser.parse_args()

    from octo_like.common.storage import StorageError
    from octo_like.training.checkpoint import Checkpointer, CheckpointError, CheckpointUnreadable

    try:
        checkpointer = Checkpointer(flags.path, read_only=True)
        steps = checkpointer.all_steps()
        if flags.step is not None and flags.step not in steps:
            raise CheckpointError(f"there is no step {flags.step} in {checkpointer.directory}; steps: {steps}")
    except (CheckpointError, StorageError) as error:
        print(f"verify_checkpoint: {error}", file=sys.stderr)
        return 1
    chosen = steps if flags.all else [flags.step if flags.step is not None else steps[-1]]
    bad = 0
    for step in chosen:
        try:
            problems = checkpointer.verify(step)
        except CheckpointUnreadable as error:
            print(f"step {step}: CANNOT BE READ, so nothing is known of it\n  {error}")
            bad += 1
            continue
        bad += bool(problems)
        if problems:
            print(f"step {step}: DAMAGED")
            print("\n".join(f"  {problem}" for problem in problems))
        else:
            manifest = checkpointer.read(step)
            files = "files not hashed" if manifest.files is None else f"{len(manifest.files)} files"
            metric = "" if manifest.metric is None else f", metric {manifest.metric:.6g}"
            print(f"step {step}: good ({len(manifest.leaves)} arrays, {files}{metric})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
