"""Trains one config with several seeds and on several kinds of processor, and lets every policy act: is it luck?

    python scripts/seed_table.py --config configs/tabletop.py --seeds 0 1 2 3 4 --isa native AVX2
    python scripts/seed_table.py --config configs/tabletop_octo.py --seeds 0 1 2 --isa native

A run has its own demonstrations, initialisation and order, all from its seed; what is judged is its final export. Runs
that are finished are not repeated, and one that was interrupted continues. OUT/table.jsonl has a line for each of them.
`--isa AVX2` lets XLA use no newer instructions than that, as if the processor had none. TensorFlow is not needed.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import concurrent.futures
import dataclasses
import json
import os
import platform
import queue
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EPISODES = "tabletop_pusher=3000 tabletop_gripper=3000 tabletop_arm=3000"
EVALUATIONS = ("natural", "wrong_nearest", "swapped")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: `isa` is "native", or what XLA may use at most ("AVX2", "SSE4_2")."""

    config: str
    seed: int
    isa: str

    @property
    def name(self) -> str:
        config = Path(self.config).name.replace(".py", "").replace(":", "_")
        return f"{config}-{self.isa}-{self.seed}"


def environment(run: Run) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    if run.isa != "native":
        flags = f"{flags} --xla_cpu_max_isa={run.isa}"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "XLA_FLAGS": flags.strip(), "PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def cores_here() -> list[int]:
    """Numbers of the cores that this process may use; none where the system does not let one choose (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def settings(args: argparse.Namespace) -> dict:
    """What a line of the table depends on besides its run."""
    data = {"data_dir": args.data_dir} if args.data_dir else {"episodes": args.episodes}
    return {**data, "per_task": args.per_task, "set": args.set}


def execute(run: Run, folder: Path, cores: set[int], args: argparse.Namespace) -> dict:
    """Trains and judges, in processes of their own on `cores`. Returns the line of the table.

    Raises:
      RuntimeError: a process failed, or the run is there with other settings.
    """
    workdir, result, begun_with = (folder / run.name / part for part in ("", "result.json", "settings.json"))
    if begun_with.exists() and (before := json.loads(begun_with.read_text())) != settings(args):
        raise RuntimeError(f"{run.name}: {workdir} was begun with {before}, not {settings(args)}; use another --out")
    if result.exists():
        return json.loads(result.read_text())
    workdir.mkdir(parents=True, exist_ok=True)
    begun_with.write_text(json.dumps(settings(args)))
    print(f"{run.name}: training; progress in {workdir / 'log.txt'}", flush=True)
    train = ["train.py", "--config", run.config, "--workdir", str(workdir), f"--config.seed={run.seed}"]
    if args.data_dir:
        train += [f"--config.data.data_dir={args.data_dir}"]
    else:
        workers = f"--config.data.workers={max(1, len(cores))}"
        train += ["--config.data.kind=memory", f"--config.data.episodes={args.episodes}", workers]
    train += [f"--config.{change}" for change in args.set]
    judge = [str(Path(__file__).resolve()), "--judge", str(workdir / "export"), "--per_task", str(args.per_task)]
    begun = time.monotonic()
    with open(workdir / "log.txt", "a") as log:
        for command in (train, [*judge, "--out", str(workdir / "judged.json")]):
            started = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment(run), stdout=log, stderr=subprocess.STDOUT
            )
            if cores:
                os.sched_setaffinity(started.pid, cores)
            if status := started.wait():
                raise RuntimeError(f"{run.name}: {command[0]} ended with status {status}; see {workdir / 'log.txt'}")
    logged = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    last = [entry for entry in logged if "train/action/loss" in entry][-1]
    line = {
        **dataclasses.asdict(run),
        **json.loads((workdir / "judged.json").read_text()),
        "steps": last["step"],
        "loss": round(last["train/action/loss"], 3),
        "seconds": round(time.monotonic() - begun),
        "processor": processor(),
        "cores": len(cores) or os.cpu_count(),
    }
    result.write_text(json.dumps(line))
    return line


def processor() -> str:
    """Model and newest vector instructions of this machine."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    return f"{model}, {'AVX-512' if ' avx512f' in text else 'AVX2' if ' avx2' in text else 'older'}"


def judge(export: str, per_task: int) -> dict:
    """Closed-loop rates of a policy, by the scenes of `make demo`."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import demo_evaluate
    import jax

    from octo_like import Policy

    policy = Policy.load_pretrained(export)
    records = {}
    for evaluation in demo_evaluate.plan([]):
        name = evaluation.name.removeprefix("pretrain/")
        if name in EVALUATIONS:
            evaluation = dataclasses.replace(evaluation, per_task=per_task, record=0)
            records[name] = demo_evaluate.run(evaluation, policy, demo_evaluate.BATCH_SIZE)

    def rate(name, value=lambda record: record["success"], task=None):
        chosen = [value(record) for record in records[name] if task in (None, record["task"])]
        return round(sum(map(float, chosen)) / len(chosen), 3)

    return {
        "wrong_nearest": rate("wrong_nearest"),
        "pick_and_place": rate("natural", task="pick_and_place"),
        "reach": rate("natural", task="reach"),
        "push": rate("natural", task="push"),
        "swapped_target": rate("swapped", lambda record: record["flags"]["reached_target"]),
        "swapped_original": rate("swapped", lambda record: record["flags"]["reached_original"]),
        "episodes": len(records["wrong_nearest"]),
        "device": jax.devices()[0].device_kind,
    }


def print_table(lines: list[dict]) -> None:
    rates = ("wrong_nearest", "pick_and_place", "reach", "push", "swapped_target", "swapped_original")
    print(
        "\n| config | instructions | seed | loss | " + " | ".join(r.replace("_", " ") for r in rates) + " | seconds |"
    )
    print("|---" * (len(rates) + 5) + "|")
    for line in sorted(lines, key=lambda line: (line["config"], line["isa"], line["seed"])):
        shown = [Path(line["config"]).stem, line["isa"], str(line["seed"]), f"{line['loss']:.2f}"]
        shown += [f"{line[rate]:.0%}" for rate in rates] + [str(line["seconds"])]
        print("| " + " | ".join(shown) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tabletop.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--isa", nargs="+", default=["native"], help="native, AVX2, SSE4_2 ...")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "seed_table")
    parser.add_argument("--data_dir", help="RLDS datasets, the same for all seeds; default: made in memory, by seed")
    parser.add_argument("--episodes", default=EPISODES, help="what is made in memory, as config.data.episodes")
    parser.add_argument("--per_task", type=int, default=50, help="episodes of each task of each robot")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; each gets its share of the cores")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="changes to all configs"
    )
    parser.add_argument("--judge", metavar="EXPORT", help="only let this policy act; writes the file --out")
    args = parser.parse_args()
    if args.judge:
        if args.out.is_dir() or not args.out.parent.is_dir():
            parser.error(f"--judge writes a file: --out {args.out} is none")
        args.out.write_text(json.dumps(judge(args.judge, args.per_task)))
        return 0
    runs = [Run(args.config, seed, isa) for isa in args.isa for seed in args.seeds]
    mine = cores_here()
    share = max(1, len(mine) // args.parallel)
    free: queue.SimpleQueue = queue.SimpleQueue()
    for i in range(args.parallel):
        free.put(set(mine[i * share : (i + 1) * share]) or set(mine))
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0

    def work(run: Run) -> dict:
        cores = free.get()
        try:
            return execute(run, args.out, cores, args)
        finally:
            free.put(cores)

    with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
        futures = {pool.submit(work, run): run for run in runs}
        for future in concurrent.futures.as_completed(futures):
            try:
                print(json.dumps(future.result()), flush=True)
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failed += 1
    # All that were ever finished here, also with other seeds, configs and instructions.
    lines = [json.loads(path.read_text()) for path in sorted(args.out.glob("*/result.json"))]
    (args.out / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print_table(lines)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
