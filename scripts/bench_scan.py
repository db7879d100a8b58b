"""How much quicker the first reading of a dataset is when several processes share it: P processes on P cores, in turns.

    python scripts/bench_scan.py --data_dir DIR my_robot --set action_key=action --processes 1 2 4

One process on one core is the floor: a scan reads with a thread of its own and one of TensorFlow, so that one process
left alone would use almost two. What is timed is the scan, from the first claim to the last part; workers are started
within it, this process's own imports are not. The parts must have the same bytes every time.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from octo_like.data.arguments import add_dataset_arguments, specs_from_arguments


def scan(args: argparse.Namespace) -> dict:
    """Seconds, bytes, episodes and a hash of the parts of one pass, with no index there before."""
    from octo_like.data import prepare
    from octo_like.data.rlds import shared_pass

    with tempfile.TemporaryDirectory() as cache:
        jobs = prepare.unindexed(specs_from_arguments(args), args.data_dir, cache)
        start = time.perf_counter()
        shared_pass.take_part(jobs, threads=1, processes=args.once, progress=False)
        seconds = time.perf_counter() - start
        digest = hashlib.sha256()
        for job in jobs:
            for path in sorted(pathlib.Path(job.parts).glob("*.npz")):
                digest.update(path.read_bytes())
        return {
            "seconds": seconds,
            "bytes": sum(sum(job.split.file_bytes) for job in jobs),
            "episodes": sum(sum(job.split.shard_lengths) for job in jobs),
            "parts": digest.hexdigest(),
        }


def on_cores(count: int) -> dict:
    """`scan` by `count` processes that have `count` cores, in a process of its own: threads inherit them."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    command = [sys.executable, *sys.argv, "--once", str(count)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_dataset_arguments(parser)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="counts to compare with the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.once:
        with contextlib.redirect_stdout(sys.stderr):
            result = scan(args)
        print(json.dumps(result))
        return
    cores = len(os.sched_getaffinity(0))
    if max(args.processes) > cores:
        parser.error(f"--processes {max(args.processes)}: this machine has {cores} cores")
    rounds = [{count: on_cores(count) for count in args.processes} for _ in range(args.rounds)]
    first = rounds[0][args.processes[0]]
    if any(result["parts"] != first["parts"] for taken in rounds for result in taken.values()):
        sys.exit("error: the passes wrote different parts")
    print(f"{first['bytes'] / 1e9:.2f} GB, {first['episodes']:,} episodes; the same parts every time")
    for count in args.processes:
        seconds = [taken[count]["seconds"] for taken in rounds]
        ratios = [taken[args.processes[0]]["seconds"] / taken[count]["seconds"] for taken in rounds]
        rate = first["bytes"] / 1e6 / statistics.median(seconds)
        print(
            f"{count} processes on {count} cores: {statistics.median(seconds):.1f} s ({rate:.0f} MB/s), "
            f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
