"""How much does pretraining help a robot that it has never seen? The adaptation benchmark, end to end.

    python scripts/benchmark_adaptation.py                      # everything, below runs/adaptation
    python scripts/benchmark_adaptation.py --demos 50 --groups fetch --modes full lora
    python scripts/benchmark_adaptation.py --demos 10 50 --modes full --seeds 3    # every test with three trainings
    python scripts/benchmark_adaptation.py --report             # table and figure of what is there
    python scripts/benchmark_adaptation.py --report --page docs/adaptation.md      # and into the documentation
    python scripts/benchmark_adaptation.py --quick              # minutes: shows that everything works, learns nothing

One policy is pretrained on fourteen Meta-World tasks. It adapts with n demonstrations of every task to (a) Meta-World
tasks that were held out and (b) the Fetch robot; each mode of configs/finetune.py is one cell. The same network is
trained from scratch on the same demonstrations with every learning rate and number of steps of a grid; the best of the
grid, chosen on seeds of its own, is what adaptation is compared with. All policies are tested on the same seeds. With
--seeds K every tested policy is trained K times, and the report says how much that changes.

A cell is data, training and closed-loop evaluation. Its result is a JSON file in the workdir, keyed by everything that
was asked for; a finished cell is not run again, an interrupted one continues from its checkpoint. Two runs may share a
workdir when they do other `--groups`: what both need is made once. (The key does not cover the code: after changing
that, use a new --workdir.) Needs the extras `data` and `sim`.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for _path in (ROOT, ROOT / "scripts"):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))
import octo_like.common.interrupts  # noqa: E402, F401  isort: skip

from adaptation_cells import (  # noqa: E402
    LONG,
    PRETRAINING,
    QUICK,
    TARGETS,
    Cell,
    Settings,
    adapted_cell,
    base_cells,
    best_of,
    plan,
    repeated,
    scratch_grid,
    seeds_of,
    success,
)
from benchmarking import CommandFailed, digest, execute, write_json  # noqa: E402

from octo_like.common.locks import exclusive  # noqa: E402
from octo_like.envs.sims import GROUPS  # noqa: E402
from octo_like.policy.surgery import MODES  # noqa: E402

BATCH_SIZE = 30  # environments in lock-step


class Benchmark:
    """Runs cells below a workdir; what is finished is read from there.

    Args:
      workdir: of the benchmark.
      settings: sizes.
      processes: that simulate.
    """

    def __init__(self, workdir: Path, settings: Settings, processes: int = 1):
        self.workdir, self.settings, self.processes = workdir, settings, processes
        self._pool = None
        self.pretrain_key = digest(
            ["pretrain", settings.pretrain_episodes, settings.pretrain_steps, list(settings.overrides)]
        )

    # What a cell depends on, and where it is kept

    def key(self, cell: Cell, *, training_only: bool = False) -> str:
        """Hash of all that decides a cell's result, or its training."""
        request = cell.request()
        if training_only:
            for field in ("purpose", "episodes"):
                del request[field]
        pretrained = None if cell.mode == "scratch" else self.pretrain_key
        return digest([request, pretrained, list(self.settings.overrides)])

    def result_path(self, cell: Cell) -> Path:
        seed = f"-seed{cell.seed}" if cell.seed else ""
        name = f"{cell.group}-n{cell.demos}-{cell.mode}-{cell.purpose}{seed}-{self.key(cell)}.json"
        return self.workdir / "results" / name

    def training_path(self, cell: Cell) -> Path:
        return (
            self.workdir / "training" / f"{cell.group}-n{cell.demos}-{cell.mode}-{self.key(cell, training_only=True)}"
        )

    @property
    def pretrained(self) -> Path:
        """The exported base policy."""
        return self.workdir / f"pretrain-{self.pretrain_key}" / "export"

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell's result, or None."""
        path = self.result_path(cell)
        return json.loads(path.read_text()) if path.exists() else None

    # Doing

    def run(self, cell: Cell) -> dict[str, Any]:
        """The cell's result, from its file or by making it."""
        if (known := self.result(cell)) is not None:
            return known
        if cell.mode != "scratch":
            self.pretrain()
        begun = time.monotonic()
        export = self.pretrained if cell.mode == "pretrained" else self.train(cell)
        trained = time.monotonic()
        episodes = self.evaluate(export, cell)
        seconds = {"train": round(trained - begun, 1), "evaluate": round(time.monotonic() - trained, 1)}
        result = {"cell": cell.request(), "seconds": seconds, "episodes": episodes}
        write_json(self.result_path(cell), result)
        return result

    def pretrain(self) -> None:
        """Demonstrations of the pretraining tasks and the base policy, unless they are there."""
        with exclusive(self.workdir / "pretrain.lock"):
            self._pretrain()

    def _pretrain(self) -> None:
        """`pretrain`, for whoever holds its lock."""
        if (self.pretrained / "config.json").exists():
            return
        settings, data = self.settings, self.workdir / "data" / f"pretrain{self.settings.pretrain_episodes}"
        self.data(data, f"{PRETRAINING}={settings.pretrain_episodes}+2")
        execute(
            [
                *("train.py", "--config", "configs/metaworld.py", "--workdir", str(self.pretrained.parent)),
                f"--config.data.data_dir={data}",
                f"--config.num_steps={settings.pretrain_steps}",
                *settings.overrides,
            ],
            self.workdir / "logs" / "pretrain.log",
        )

    def data(self, folder: Path, *requests: str) -> None:
        command = ["data/sims/build.py", "--data_dir", str(folder), "--workers", str(self.processes)]
        execute([*command, "--episodes", *requests], self.workdir / "logs" / f"data-{folder.name}.log")

    def train(self, cell: Cell) -> Path:
        """Trains a cell's policy; returns its export."""
        folder, data = self.training_path(cell), self.workdir / "data" / f"n{cell.demos}"
        if (folder / "export" / "config.json").exists():
            return folder / "export"
        if not (data / cell.group).exists():
            self.data(data, f"{cell.group}={cell.demos}+2")
        mode = "full" if cell.mode == "scratch" else cell.mode
        execute(
            [
                *("finetune.py", "--config", f"configs/adapt_sim.py:{cell.group},{mode}", "--workdir", str(folder)),
                f"--config.data.data_dir={data}",
                f"--config.num_steps={cell.steps}",
                *((f"--config.seed={cell.seed}",) if cell.seed else ()),
                *(() if cell.rate is None else (f"--config.optimizer.peak={cell.rate}",)),
                *(() if cell.mode == "scratch" else (f"--config.pretrained={self.pretrained}",)),
                *self.settings.overrides,
            ],
            self.workdir / "logs" / f"{folder.name}.log",
        )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the export is what is evaluated
        return folder / "export"

    def evaluate(self, export: Path, cell: Cell) -> list[dict[str, Any]]:
        """Episodes of a cell as dicts: seed, task, success, steps. Records an animation of one seed of tests."""
        import functools

        from octo_like import Policy
        from octo_like.envs.sims.remote import RemoteEnv, SimulatorPool
        from octo_like.robot import rollout
        from octo_like.robot.record import write_gif

        if self._pool is None:
            self._pool = SimulatorPool(self.processes)
        policy = Policy.load_pretrained(export)
        seeds = seeds_of(cell)
        episodes = rollout.evaluate(
            policy,
            functools.partial(RemoteEnv, cell.group, pool=self._pool),
            [seed for seed, _ in seeds],
            options=[{"task": task} for _, task in seeds],
            unnormalize=PRETRAINING if cell.mode == "pretrained" else cell.group,
            exec_horizon=2,
            batch_size=BATCH_SIZE,
            threads=self.processes,
            record=len(GROUPS[cell.group][1]) if cell.purpose == "test" else 0,
        )
        for episode in episodes:
            if episode.frames is not None:
                folder = self.workdir / "gifs" / self.result_path(cell).stem
                write_gif(folder / f"{episode.task}.gif", episode.frames, episode.instruction, episode.success, scale=2)
        fields = ("seed", "task", "success", "steps")
        return [{field: episode.summary()[field] for field in fields} for episode in episodes]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def run_all(benchmark: Benchmark, groups: Sequence[str]) -> None:
    """Runs every cell of the plan that is not finished, with a bar over all, and renews the report after each."""
    from tqdm import tqdm

    units = plan(benchmark.settings, groups)
    is_open = lambda cell: benchmark.result(cell) is None  # noqa: E731
    total = 0.0
    for unit in units:
        waiting = [cell for cell in unit if is_open(cell)]
        total += sum(cell.cost for cell in waiting)
        if len(unit) > 1 and waiting:  # and then the test of the grid's best, which costs no training
            total += dataclasses.replace(unit[0], steps=0, episodes=benchmark.settings.tests).cost
    again = repeated(benchmark.settings, groups)
    total += sum(
        cell.cost for place in again for cell in _trained_again(benchmark, *place, guess=True) if is_open(cell)
    )
    with tqdm(total=round(total), bar_format="{percentage:3.0f}%|{bar:30}| {elapsed}<{remaining} {desc}") as bar:

        def run(cell: Cell) -> dict[str, Any]:
            if not is_open(cell):
                return benchmark.run(cell)
            bar.set_description_str(cell.name)
            result = benchmark.run(cell)
            bar.write(f"{cell.name}: {success(result):.0%}  {result['seconds']}")
            bar.update(min(round(cell.cost), bar.total - bar.n))  # beyond its total a bar shows 0%
            write_report(benchmark, groups)
            return result

        for unit in units:
            results = {cell: run(cell) for cell in unit}
            if len(unit) > 1:
                run(best_of(unit, results, benchmark.settings))
        for place in again:
            for cell in _trained_again(benchmark, *place):
                run(cell)
        bar.update(bar.total - bar.n)
    write_report(benchmark, groups)


def _trained_again(benchmark: Benchmark, group: str, demos: int, seed: int, guess: bool = False) -> list[Cell]:
    """The tests of all modes and of the best from scratch with another training seed.

    Args:
      guess: the grid need not be finished: its first candidate stands for the best.
    """
    settings, candidates = benchmark.settings, scratch_grid(benchmark.settings, group, demos)
    results = {cell: benchmark.result(cell) for cell in candidates}
    cells = [adapted_cell(settings, group, demos, mode) for mode in settings.modes]
    if all(result is not None for result in results.values()):
        cells.append(best_of(candidates, results, settings))
    elif guess:
        cells.append(dataclasses.replace(candidates[0], purpose="test", episodes=settings.tests))
    return [dataclasses.replace(cell, seed=seed) for cell in cells]


def write_report(benchmark: Benchmark, groups: Sequence[str]) -> None:
    """results.json, table.md and curve.png below the workdir, of the cells that are finished."""
    import adaptation_report

    collected = collect(benchmark, groups)
    write_json(benchmark.workdir / "results.json", collected)
    (benchmark.workdir / "table.md").write_text(adaptation_report.table(collected))
    adaptation_report.draw_curve(collected, benchmark.workdir / "curve.png")


def write_page(benchmark: Benchmark, groups: Sequence[str], page: Path) -> None:
    """Puts the results into a page of the documentation; figure, animations and numbers into the folder of its name.

    Raises:
      ValueError: the page has no lines that mark where the results go.
    """
    import adaptation_report

    write_report(benchmark, groups)
    collected = json.loads((benchmark.workdir / "results.json").read_text())
    parts = [adaptation_report.table(collected).strip()]
    folder, shown = page.with_suffix(""), []
    if any(result for numbers in collected["groups"].values() for row in numbers.values() for result in row.values()):
        folder.mkdir(exist_ok=True)
        shutil.copy(benchmark.workdir / "curve.png", folder / "curve.png")
        (folder / "results.json").write_text(json.dumps(collected) + "\n")
        parts.append(f"![Success over the number of demonstrations]({folder.name}/curve.png)")
    for group in groups:
        tested = [
            adapted_cell(benchmark.settings, group, number, benchmark.settings.modes[0])
            for number in sorted(benchmark.settings.demos, reverse=True)
        ]
        best_known = next((cell for cell in tested if benchmark.result(cell) is not None), None)
        if best_known is None:
            continue
        for animation in sorted((benchmark.workdir / "gifs" / benchmark.result_path(best_known).stem).glob("*.gif")):
            target = folder / f"{group}_{animation.stem}.gif"
            shutil.copy(animation, target)
            shown.append(f"![{group}: {animation.stem}]({folder.name}/{target.name})")
    if shown:
        parts += ["Adapted policies in scenes of the test (green frame: success), one of each task:", " ".join(shown)]
    page.write_text(adaptation_report.between_marks(page.read_text(), "\n\n".join(parts)))


def collect(benchmark: Benchmark, groups: Sequence[str]) -> dict[str, Any]:
    """Everything a report needs: finished results, None for cells that were not run.

    {"settings", "base": {group: result}, "groups": {group: {demos: {mode: result}}}}; "scratch" is the best of its
    grid, with the grid's selection under "grid". Results of further training seeds, when there are any, stand under
    "repeats": {group: {demos: {mode: [result, ...]}}}.
    """
    settings = benchmark.settings
    collected: dict[str, Any] = {"settings": dataclasses.asdict(settings), "groups": {}}
    collected["base"] = {cell.group: benchmark.result(cell) for cell in base_cells(settings)}
    for group in groups:
        of_group = collected["groups"][group] = {}
        for number in sorted(settings.demos):
            row = {mode: benchmark.result(adapted_cell(settings, group, number, mode)) for mode in settings.modes}
            candidates = scratch_grid(settings, group, number)
            found = {cell: result for cell in candidates if (result := benchmark.result(cell)) is not None}
            row["scratch"] = None
            if len(found) == len(candidates):
                tested = benchmark.result(best_of(candidates, found, settings))
                if tested is not None:
                    grid = [{"rate": c.rate, "steps": c.steps, "success": success(r)} for c, r in found.items()]
                    row["scratch"] = {**tested, "grid": grid}
            of_group[str(number)] = row
    for group, number, seed in repeated(settings, groups):
        for cell, mode in zip(
            _trained_again(benchmark, group, number, seed), [*settings.modes, "scratch"], strict=False
        ):
            if (result := benchmark.result(cell)) is not None:
                of_group = collected.setdefault("repeats", {}).setdefault(group, {}).setdefault(str(number), {})
                of_group.setdefault(mode, []).append(result)
    return collected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="default: runs/adaptation, or runs/adaptation_quick with --quick")
    parser.add_argument("--groups", nargs="+", choices=TARGETS, default=TARGETS, help="what is adapted to")
    parser.add_argument("--demos", nargs="+", type=int, help="numbers of demonstrations, in the order of running")
    modes = [*MODES, *(mode + LONG for mode in MODES)]
    parser.add_argument("--modes", nargs="+", choices=modes, help="of adaptation; the first one is run first")
    parser.add_argument("--scratch_rates", nargs="+", type=float, help="peak learning rates of the grid from scratch")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of every tested policy (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="simulator processes")
    parser.add_argument("--report", action="store_true", help="only table and figure of what is there")
    parser.add_argument("--page", type=Path, help="with --report: puts the results into this page of the documentation")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    workdir = args.workdir or ROOT / "runs" / ("adaptation_quick" if args.quick else "adaptation")
    given = {key: tuple(value) for key in ("demos", "modes", "scratch_rates") if (value := getattr(args, key))}
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    settings = dataclasses.replace(QUICK if args.quick else Settings(), seeds=args.seeds, **given)
    benchmark = Benchmark(workdir.resolve(), settings, args.processes)
    try:
        if args.report and args.page is not None:
            write_page(benchmark, args.groups, args.page)
        elif args.report:
            write_report(benchmark, args.groups)
        else:
            from octo_like.training.distributed import setup_compilation_cache

            setup_compilation_cache()
            run_all(benchmark, args.groups)
    except CommandFailed as error:
        print(f"benchmark_adaptation.py: error: {error}", file=sys.stderr)
        print("Run the same command again to continue from here.", file=sys.stderr)
        return 1
    finally:
        benchmark.close()
    print((benchmark.workdir / "table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
