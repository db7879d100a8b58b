"""What do words do for a policy? Three studies in the built-in tabletop, end to end.

    python scripts/benchmark_language.py                       # everything, below runs/language
    python scripts/benchmark_language.py --studies word --seeds 1
    python scripts/benchmark_language.py --kept docs/language/results.json     # only what is not in that file yet
    python scripts/benchmark_language.py --kept docs/language/results.json --report --page docs/language.md
    python scripts/benchmark_language.py --quick               # minutes: shows that everything works, learns nothing

word      One block colour is never named in the robots' demonstrations, though such blocks stand there; pictures with
          questions and answers name it. Does the arm obey the word, with the pictures, with pictures that do not name
          it either, with words alone (which say, but do not show, where a thing is), and without any?
subtasks  Long tasks. A policy that reads sub-tasks is run without them, with its own, with the right ones and with
          random ones, and contradicted by a person; beside it one that is asked with what it said last, and one
          that knows no sub-tasks.
heads     The demo's policy with six kinds of action head, on the same demonstrations.

A cell is a training (configs/tabletop_words.py, configs/tabletop_heads.py) or a test of one. Its result is a JSON file
in the workdir, keyed by everything that was asked for; a finished cell is not run again, an interrupted training goes
on from its checkpoint. Tests of a study use the same scenes. (The key does not cover the code: after changing that, use
a new --workdir.) Needs the extra `data`.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import dataclasses
import json
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarking import ROOT, CommandFailed, execute, write_json
from language_cells import QUICK, STUDIES, TAUGHT, Settings, Test, Training, key, tests_of, trainings
from language_kept import Kept

from octo_like.common.locks import exclusive
from octo_like.training.metrics import read_metrics

SHORT, LONG = "data/tabletop/build.py", "data/tabletop_long/build.py"


class Benchmark:
    """Runs cells below a workdir; what is finished is read from there."""

    def __init__(self, workdir: Path, settings: Settings, processes: int = 1, kept: Kept | None = None):
        self.workdir, self.settings, self.processes, self.kept = workdir, settings, processes, kept

    def folder(self, training: Training) -> Path:
        return self.workdir / "training" / f"{training.name}-{key(training, self.settings)}"

    def result_path(self, training: Training, test: Test) -> Path:
        name = f"{training.name}-{test.name.replace(' ', '_')}-{key(training, self.settings, test)}"
        return self.workdir / "results" / f"{name}.json"

    def result(self, training: Training, test: Test) -> dict[str, Any] | None:
        """A finished test's result, or None."""
        path = self.result_path(training, test)
        if path.exists():
            return json.loads(path.read_text())
        return self.kept.result(path.stem) if self.kept is not None else None

    def run(self, training: Training, test: Test) -> dict[str, Any]:
        """A test's result, from its file or by making it, and before it whatever it needs."""
        if (known := self.result(training, test)) is not None:
            return known
        from language_episodes import run

        export = self.train(training)
        begun, path = time.monotonic(), self.result_path(training, test)
        result = run(export, training.study, test, self.settings.episodes, self.workdir / "gifs" / path.stem)
        write_json(path, {"seconds": round(time.monotonic() - begun, 1), **result})
        return result

    def train(self, training: Training) -> Path:
        """The exported policy of a training."""
        folder = self.folder(training)
        if (folder / "export" / "config.json").exists():
            return folder / "export"
        data = self.data(training.study, training.variant)
        command = [
            *("train.py", "--config", STUDIES[training.study][training.variant][0], "--workdir", str(folder)),
            f"--config.data.data_dir={data}",
            f"--config.num_steps={self.settings.steps[training.study]}",
            f"--config.seed={training.seed}",
            *self.settings.overrides,
        ]
        if training.variant == "fast":
            command.append(f"--config.model.heads.action.vocabulary={self.vocabulary(data)}")
        execute(command, self.workdir / "logs" / f"{folder.name}.log")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the export is what is judged
        return folder / "export"

    def curves(self, training: Training) -> dict[str, list[tuple[int, float]]]:
        """Validation losses of a training, means over its datasets: {"text" or "action": [(step, nats or MSE)]}."""
        folder = self.folder(training)
        if self.kept is not None and folder.name in self.kept.losses and not (folder / "metrics.jsonl").exists():
            return self.kept.losses[folder.name]
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in read_metrics(folder) if (folder / "metrics.jsonl").exists() else ():
            for what in ("text", "action"):
                values = [value for key, value in entry.items() if re.fullmatch(rf"val/\w+/{what}/loss", key)]
                if values:
                    found.setdefault(what, []).append((entry["step"], statistics.mean(values)))
        return found

    def data(self, study: str, variant: str) -> Path:
        """The datasets of a variant, made unless they are there."""
        settings = self.settings
        unnamed = ["--unnamed", TAUGHT] if variant == "pictures_unnamed" else []
        name = variant if unnamed else study
        folder = self.workdir / "data" / f"{name}-{settings.demos}-{settings.long}-{settings.rows}"
        share = ["--data_dir", str(folder), "--workers", str(self.processes)]
        robots = [f"tabletop_gripper={settings.demos}", f"tabletop_arm={settings.demos}"]
        long = [f"tabletop_long_gripper={settings.long}", f"tabletop_long_arm={settings.long}"]
        commands = {
            "word": [
                [SHORT, *share, "--episodes", *robots, "--unnamed", TAUGHT],
                ["data/tabletop_words/build.py", *share, "--rows", str(settings.rows), *unnamed],
            ],
            "subtasks": [[SHORT, *share, "--episodes", *robots], [LONG, *share, "--episodes", *long]],
            "heads": [[SHORT, *share, "--episodes", f"tabletop_pusher={settings.demos}", *robots]],
        }
        with exclusive(self.workdir / f"{folder.name}.lock"):
            for command in commands[study]:
                execute(command, self.workdir / "logs" / f"data-{folder.name}.log")
        return folder

    def vocabulary(self, data: Path) -> Path:
        """The action vocabulary of a study's demonstrations."""
        path = data / "actions.json"
        if not path.exists():
            chunks = max(200, min(20_000, 3 * self.settings.demos))
            options = [f"--config.data.data_dir={data}", f"--chunks={chunks}", f"--output={path}"]
            command = ["scripts/train_action_tokenizer.py", "--config", "configs/tabletop_heads.py:fast", *options]
            execute(command, self.workdir / "logs" / "vocabulary.log")
        return path


def run_all(benchmark: Benchmark, studies: tuple[str, ...], variants: tuple[str, ...] = ()) -> None:
    """Runs every cell (of these variants) that is not finished, with a bar over all; renews the report after each."""
    from tqdm import tqdm

    settings = benchmark.settings
    waiting = [
        (training, test)
        for training in trainings(settings, studies, variants)
        for test in tests_of(training)
        if benchmark.result(training, test) is None
    ]
    with tqdm(
        waiting, bar_format="{percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} {elapsed}<{remaining} {desc}"
    ) as bar:
        for training, test in bar:
            bar.set_description_str(f"{training.name}: {test.name}")
            benchmark.run(training, test)
            write_report(benchmark, studies)


def collect(benchmark: Benchmark, studies: tuple[str, ...]) -> dict[str, Any]:
    """{"settings", "studies": {study: {variant: {test: [result of each seed, or None]}}}, "losses": {study: {variant:
    [`Benchmark.curves` of each seed that has begun]}}}."""
    settings = benchmark.settings
    found: dict[str, Any] = {}
    losses: dict[str, Any] = {}
    for training in trainings(settings, studies):
        of_variant = found.setdefault(training.study, {}).setdefault(training.variant, {})
        for test in tests_of(training):
            of_variant.setdefault(test.name, []).append(benchmark.result(training, test))
        if curves := benchmark.curves(training):
            losses.setdefault(training.study, {}).setdefault(training.variant, []).append(curves)
    return {"settings": dataclasses.asdict(settings), "studies": found, "losses": losses}


def keep(benchmark: Benchmark, studies: tuple[str, ...]) -> None:
    """Adds what is finished to the file of kept results."""
    kept = benchmark.kept
    assert kept is not None
    for training in trainings(benchmark.settings, studies):
        finished = [(test, result) for test in tests_of(training) if (result := benchmark.result(training, test))]
        for test, result in finished:
            kept.add(benchmark.result_path(training, test).stem, result)
        if finished and (curves := benchmark.curves(training)):
            kept.losses[benchmark.folder(training).name] = curves
    kept.save()


def write_report(benchmark: Benchmark, studies: tuple[str, ...], page: Path | None = None) -> str:
    """results.json, table.md and language.png below the workdir, and into a page of the documentation."""
    import language_report

    collected = collect(benchmark, studies)
    if benchmark.kept is not None:
        keep(benchmark, studies)
    text = language_report.tables(collected)
    write_json(benchmark.workdir / "results.json", collected)
    (benchmark.workdir / "table.md").write_text(text)
    language_report.draw(collected, benchmark.workdir / "language.png")
    if page is not None:
        language_report.into_page(page, text, benchmark.workdir / "language.png")
    return text


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="default: runs/language, or runs/language_quick with --quick")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    every = list(dict.fromkeys(variant for study in STUDIES.values() for variant in study))
    parser.add_argument("--variants", nargs="+", choices=every, default=[], help="run only these (default: all)")
    parser.add_argument("--seeds", type=int, help="trainings of every variant (default: 3)")
    parser.add_argument("--episodes", type=int, help="of each test (default: 120)")
    parser.add_argument("--processes", type=int, default=2, help="that simulate demonstrations")
    parser.add_argument("--report", action="store_true", help="only tables and figure of what is there")
    parser.add_argument("--page", type=Path, help="with --report: puts them into this page of the documentation")
    parser.add_argument("--kept", type=Path, help="a file of results: those in it count as finished, new ones go there")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in ("seeds", "episodes") if getattr(args, name) is not None}
    if any(value < 1 for value in given.values()):
        parser.error("--seeds and --episodes must be at least 1")
    workdir = args.workdir or ROOT / "runs" / ("language_quick" if args.quick else "language")
    settings = dataclasses.replace(QUICK if args.quick else Settings(), **given)
    benchmark = Benchmark(workdir.resolve(), settings, args.processes, Kept(args.kept) if args.kept else None)
    studies = tuple(args.studies)
    try:
        if not args.report:
            from octo_like.training.distributed import setup_compilation_cache

            setup_compilation_cache()
            run_all(benchmark, studies, tuple(args.variants))
        print(write_report(benchmark, studies, args.page))
    except CommandFailed as error:
        print(f"benchmark_language.py: error: {error}", file=sys.stderr)
        print("Run the same command again to continue from here.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
