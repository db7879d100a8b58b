"""The whole path in one command: data, pretraining, adaptation to a new robot, closed-loop evaluation, report.

    make demo                                # or: python scripts/demo.py
    python scripts/demo.py --fresh           # forget what is there
    python scripts/demo.py --quick           # tiny: shows that everything works, learns nothing
    python scripts/demo.py --seed 3          # other demonstrations, weights and order; the same evaluation

Exit status: 0; 3 when everything ran and a bar was missed (see scripts/demo_bars.py); else that of the stage that
failed.

Stages are separate processes. A finished stage is skipped as long as its command and the code behind it are unchanged;
an interrupted one continues where it can (training resumes from its checkpoint). Everything is below --workdir.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from octo_like.common.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
STAMPS = "stages"
BAR_MISSED = 3
HELD_OUT = "tabletop_arm3"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the demo.

    Attributes:
      name: short, unique.
      title: what it does, for the banner.
      command: arguments after the Python interpreter.
      sources: glob patterns of the files whose contents decide whether a finished stage is still valid.
      owns: paths below the workdir that the stage makes; removed when it starts anew.
      proof: a file below the workdir that exists when it is finished.
      needs: stages whose output it reads.
    """

    name: str
    title: str
    command: tuple[str, ...]
    sources: tuple[str, ...]
    owns: tuple[str, ...]
    proof: str
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the demo.

    Attributes:
      episodes: of the datasets, as data/tabletop/build.py takes them.
      adapt_steps: of adaptation; training from scratch gets as many, and four times as many.
      demonstrations: of the held-out robot that adaptation sees.
      overrides, pretrain_overrides: changes to the configs of all training runs, and of pretraining.
      quick: one episode of each evaluation.
    """

    episodes: tuple[str, ...]
    adapt_steps: int
    demonstrations: int = 50
    overrides: tuple[str, ...] = ()
    pretrain_overrides: tuple[str, ...] = ()
    quick: bool = False


FULL = Settings(
    episodes=("tabletop_pusher=3000", "tabletop_gripper=3000", "tabletop_arm=3000", f"{HELD_OUT}=200+20"),
    adapt_steps=400,
)
QUICK = Settings(
    episodes=("tabletop_pusher=6+2", "tabletop_gripper=6+2", "tabletop_arm=6+2", f"{HELD_OUT}=6+2"),
    adapt_steps=2,
    demonstrations=4,
    overrides=("--config.batch_size=8", "--config.optimizer.warmup_steps=1", "--config.log_every=1"),
    pretrain_overrides=("--config.num_steps=4",),
    quick=True,
)

TRAINING_CODE = (
    "octo_like/common/**/*",
    "octo_like/model/*.py",
    "octo_like/policy/*.py",
    "octo_like/data/**/*.py",
    "octo_like/training/*.py",
)
WORLD_CODE = ("octo_like/envs/*.py",)


def make_stages(workdir: Path, settings: Settings, seed: int = 0) -> list[Stage]:
    """The demo as commands; paths are those of `workdir`. Evaluation is the same for every `seed`."""
    data = ("data/tabletop/**/*.py", "data/tabletop_building.py", *WORLD_CODE)
    common = (f"--config.data.data_dir={workdir / 'data'}", f"--config.seed={seed}", *settings.overrides)
    stages = [
        Stage(
            "data",
            "demonstrations of four robots, written as RLDS",
            ("data/tabletop/build.py", "--data_dir", str(workdir / "data"), "--seed", str(seed))
            + ("--episodes", *settings.episodes),
            data,
            owns=("data",),
            proof=f"data/{HELD_OUT}",
        ),
        Stage(
            "pretrain",
            "one policy for three robots",
            ("train.py", "--config", "configs/tabletop.py", "--workdir", str(workdir / "pretrain"), *common)
            + settings.pretrain_overrides,
            ("train.py", "configs/tabletop.py", *TRAINING_CODE),
            owns=("pretrain",),
            proof="pretrain/export/config.json",
            needs=("data",),
        ),
    ]

    def adapt(name: str, title: str, steps: int, pretrained: str | None = None) -> Stage:
        folder = f"adapt_{name}"
        return Stage(
            name,
            title,
            (
                "finetune.py",
                *("--config", "configs/finetune.py:tabletop"),
                *("--workdir", str(workdir / folder)),
                *common,
                *(() if pretrained is None else (f"--config.pretrained={pretrained}",)),
                f"--config.data.num_demos={settings.demonstrations}",
                f"--config.num_steps={steps}",
            ),
            ("finetune.py", "configs/finetune.py", "configs/tabletop.py", *TRAINING_CODE),
            owns=(folder,),
            proof=f"{folder}/export/config.json",
            needs=("data",) if pretrained is None else ("data", "pretrain"),
        )

    one, four = settings.adapt_steps, 4 * settings.adapt_steps
    pretrained = str(workdir / "pretrain" / "export")
    demos = f"{settings.demonstrations} demonstrations of a robot it has never seen"
    stages += [
        adapt("from_pretrained", f"the pretrained policy adapts to {demos}", one, pretrained),
        adapt("from_scratch_1x", "the same demonstrations, from scratch, as many steps", one),
        adapt("from_scratch_4x", "the same demonstrations, from scratch, four times the steps", four),
    ]
    exports = [f"{stage.name}={workdir / stage.owns[0] / 'export'}" for stage in stages[2:]]
    trained = tuple(stage.name for stage in stages[1:])
    stages += [
        Stage(
            "evaluate",
            "all of them act, in scenes nobody has seen",
            ("scripts/demo_evaluate.py", "--pretrain", pretrained, "--out", str(workdir / "evaluation"))
            + ("--adapted", *exports, *(("--quick",) if settings.quick else ())),
            ("scripts/demo_evaluate.py", "octo_like/robot/*.py", "octo_like/training/evaluation.py", *WORLD_CODE),
            owns=("evaluation",),
            proof="evaluation/episodes.json",
            needs=trained,
        ),
        Stage(
            "report",
            "numbers and pictures on one page",
            ("scripts/demo_report.py", "--workdir", str(workdir)),
            ("scripts/demo_report.py", "scripts/demo_bars.py", "octo_like/robot/intervals.py"),
            owns=("results.json", "report.html"),
            proof="report.html",
            needs=("evaluate", *trained),
        ),
    ]
    return stages


def stage_keys(stages: Sequence[Stage]) -> dict[str, str]:
    """Name to a digest of everything a stage's output depends on: its command, its code, the stages before it."""
    keys: dict[str, str] = {}
    for stage in stages:
        digest = hashlib.sha256(json.dumps([stage.command, [keys[name] for name in stage.needs]]).encode())
        for pattern in stage.sources:
            files = sorted(path for path in ROOT.glob(pattern) if path.is_file() and "__pycache__" not in path.parts)
            if not files:
                raise FileNotFoundError(f"stage {stage.name}: no file matches {pattern} below the repository")
            for path in files:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
        keys[stage.name] = digest.hexdigest()
    return keys


class Runner:
    """Runs stages below a workdir and remembers what is finished and how long it took."""

    def __init__(self, workdir: Path, stages: Sequence[Stage]):
        self.workdir, self.stages, self.keys = workdir, stages, stage_keys(stages)
        (workdir / STAMPS).mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Runs what is not finished; returns the exit status of the first stage that fails, or 0."""
        for number, stage in enumerate(self.stages, 1):
            stamp = self.stamp(stage)
            head = f"[{number}/{len(self.stages)}] {stage.name}: {stage.title}"
            if stamp["finished"]:
                print(f"\n{head}\n      done before in {stamp['seconds']:.0f} s, nothing has changed since", flush=True)
                continue
            print(f"\n{'━' * min(len(head), 100)}\n{head}\n{'━' * min(len(head), 100)}", flush=True)
            if status := self.execute(stage, stamp):
                return status
        return 0

    def stamp(self, stage: Stage) -> dict:
        """What is known of a stage: {"key", "seconds", "finished"}; clears the output of one that is out of date."""
        path = self.workdir / STAMPS / f"{stage.name}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("key") != self.keys[stage.name]:
            for name in stage.owns:
                target = self.workdir / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
            known = {"key": self.keys[stage.name], "seconds": 0.0, "finished": False}
        known["finished"] &= (self.workdir / stage.proof).exists()
        return known

    def execute(self, stage: Stage, stamp: dict) -> int:
        self.write_seconds()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, *stage.command]
        begun, status, interrupted = time.monotonic(), 130, False
        self.write_stamp(stage, stamp)
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # Ctrl-C reached the stage, too: let it save what it can.
            interrupted = True
            status = process.wait() or 130
        finally:
            stamp["seconds"] += time.monotonic() - begun
            stamp["finished"] = status == 0 and (self.workdir / stage.proof).exists()
            self.write_stamp(stage, stamp)
        if interrupted:
            print(f"demo.py: interrupted in stage {stage.name}; the same command continues", file=sys.stderr)
            return 130
        if status == 0 and not stamp["finished"]:
            print(f"\nstage {stage.name} ended without making {self.workdir / stage.proof}", file=sys.stderr)
            return 1
        if status:
            shown = " ".join(["python", *stage.command])
            print(f"\nstage {stage.name} failed with status {status}:\n  {shown}", file=sys.stderr)
            print("Run the demo again to continue from here.", file=sys.stderr)
            return status if status > 0 else 1
        print(f"      {stage.name}: {stamp['seconds']:.0f} s", flush=True)
        return 0

    def write_stamp(self, stage: Stage, stamp: dict) -> None:
        write_whole(self.workdir / STAMPS / f"{stage.name}.json", json.dumps(stamp))

    def write_seconds(self) -> None:
        """seconds.json: of the stages finished so far, for the report."""
        seconds = {}
        for stage in self.stages:
            path = self.workdir / STAMPS / f"{stage.name}.json"
            if path.exists() and (stamp := json.loads(path.read_text()))["finished"] and stage.name != "report":
                seconds[stage.name] = round(stamp["seconds"], 1)
        (self.workdir / "seconds.json").write_text(json.dumps(seconds, indent=1))


def default_workdir(quick: bool, seed: int) -> Path:
    return ROOT / "runs" / ("demo" + ("_quick" if quick else "") + (f"_seed{seed}" if seed else ""))


def missed_bars(workdir: Path) -> list[str]:
    """What results.json says of each bar that was missed: what was measured, what was wanted, where to look."""
    bars = json.loads((workdir / "results.json").read_text())["bars"]
    return [f"{bar['sentence']}\n      {bar['look_at']}" for bar in bars.values() if not bar["met"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="default: runs/demo, _quick and _seedN added as they are given")
    parser.add_argument("--fresh", action="store_true", help="start from nothing")
    parser.add_argument("--quick", action="store_true", help="a few episodes and steps of everything; misses every bar")
    parser.add_argument("--seed", type=int, default=0, help="of demonstrations, weights, order and adaptation")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    workdir = (args.workdir or default_workdir(args.quick, args.seed)).resolve()
    if args.fresh:
        shutil.rmtree(workdir / STAMPS, ignore_errors=True)  # a stage without a stamp clears its output and starts anew
    stages = make_stages(workdir, QUICK if args.quick else FULL, args.seed)
    begun = time.monotonic()
    if status := Runner(workdir, stages).run():
        return status
    print(f"\n{time.monotonic() - begun:.0f} s.  results: {workdir / 'results.json'}")
    print(f"          report:  {workdir / 'report.html'}", flush=True)
    if args.quick or not (missed := missed_bars(workdir)):
        return 0
    print(f"\n{len(missed)} of the demo's bars missed:", file=sys.stderr)
    for text in missed:
        print(f"  ✗ {text}", file=sys.stderr)
    return BAR_MISSED


if __name__ == "__main__":
    sys.exit(main())
