"""The cells of scripts/benchmark_adaptation.py: which policies there are, in which order, and what each is tested on.

Nothing is run here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from octo_like.envs import EVALUATION_SEEDS
from octo_like.envs.sims import GROUPS

TARGETS = ("metaworld_heldout", "fetch")
PRETRAINING = "metaworld_pretrain"
SELECTION_SEEDS = EVALUATION_SEEDS + 500_000  # what the best of a grid is chosen on; tests use EVALUATION_SEEDS + i
LONG = "_long"  # ends a mode that is given as many steps as the longest training from scratch


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark.

    Attributes:
      pretrain_episodes: demonstrations of every pretraining task.
      pretrain_steps: of pretraining, with the batch size of configs/metaworld.py.
      demos: demonstrations of every target task, in the order in which cells are run.
      modes: of adaptation; with `LONG` behind it, for as many steps as the longest training from scratch.
      steps: of adaptation.
      scratch_rates, scratch_factors: peak learning rates and multiples of `steps` of the grid from scratch.
      seeds: trainings of every tested cell. Those beyond the first are of the setting that the first one has; the grid
        from scratch is searched once.
      tests, selections: episodes of every task by which a policy is tested, and by which the best of a grid is chosen.
      overrides: of all training configs.
    """

    pretrain_episodes: int = 200
    pretrain_steps: int = 12000
    demos: tuple[int, ...] = (50, 10, 5, 25)
    modes: tuple[str, ...] = ("full", "full_long", "lora", "head_only")
    steps: int = 800
    scratch_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    scratch_factors: tuple[int, ...] = (1, 4)
    seeds: int = 1
    tests: int = 40
    selections: int = 10
    overrides: tuple[str, ...] = ()


QUICK = Settings(
    pretrain_episodes=2,
    pretrain_steps=4,
    demos=(2,),
    modes=("full",),
    steps=2,
    scratch_rates=(1e-3,),
    scratch_factors=(1, 2),
    tests=1,
    selections=1,
    overrides=("--config.batch_size=8", "--config.optimizer.warmup_steps=1", "--config.log_every=1"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One policy: how it is trained, and by how many episodes of every task it is judged.

    Attributes:
      group: of tasks.
      demos: demonstrations of every task.
      mode: of configs/finetune.py, "scratch" or "pretrained" (as it is, nothing is trained).
      rate: peak learning rate; None: that of the config.
      steps: of training; 0: none.
      purpose: "test" or "select".
      episodes: of every task.
      seed: of training: initial values of what is new, order of the data, noise.
    """

    group: str
    demos: int
    mode: str
    rate: float | None
    steps: int
    purpose: str
    episodes: int
    seed: int = 0

    @property
    def name(self) -> str:
        """For people: "fetch n50 scratch 0.001 x 400 test"."""
        rate = "" if self.rate is None else f" {self.rate:g}"
        steps = f" x {self.steps}" if self.steps else ""
        seed = f" seed {self.seed}" if self.seed else ""
        return f"{self.group} n{self.demos} {self.mode}{rate}{steps} {self.purpose}{seed}"

    def request(self) -> dict[str, Any]:
        """The fields that decide a result; the first seed is none of them: older results did not name it."""
        fields = dataclasses.asdict(self)
        return fields if self.seed else {key: value for key, value in fields.items() if key != "seed"}

    @property
    def cost(self) -> float:
        """What the progress bar counts: roughly seconds on one core."""
        return 30 + 0.12 * self.steps + 0.5 * self.episodes * len(GROUPS[self.group][1])


def base_cells(settings: Settings) -> list[Cell]:
    """The pretrained policy as it is: on the tasks it has learned, and on those held out."""
    return [
        Cell(PRETRAINING, 0, "pretrained", None, 0, "test", settings.selections),
        Cell(TARGETS[0], 0, "pretrained", None, 0, "test", settings.tests),
    ]


def adapted_cell(settings: Settings, group: str, demos: int, mode: str) -> Cell:
    """The test of an adaptation in one of `Settings.modes`."""
    factor = max(settings.scratch_factors) if mode.endswith(LONG) else 1
    return Cell(group, demos, mode.removesuffix(LONG), None, factor * settings.steps, "test", settings.tests)


def scratch_grid(settings: Settings, group: str, demos: int) -> list[Cell]:
    """The candidates from scratch, each judged on the selection seeds."""
    return [
        Cell(group, demos, "scratch", rate, factor * settings.steps, "select", settings.selections)
        for factor in settings.scratch_factors
        for rate in settings.scratch_rates
    ]


def best_of(candidates: Sequence[Cell], results: Mapping[Cell, Mapping], settings: Settings) -> Cell:
    """The test of the most successful candidate; among equals, of the one that took fewer steps, then of the first."""
    best = max(candidates, key=lambda cell: (success(results[cell]), -cell.steps))
    return dataclasses.replace(best, purpose="test", episodes=settings.tests)


def success(result: Mapping[str, Any]) -> float:
    """Share of successful episodes of a cell's result."""
    return sum(episode["success"] for episode in result["episodes"]) / len(result["episodes"])


def seeds_of(cell: Cell) -> list[tuple[int, str]]:
    """(seed, task) of a cell's episodes, all tasks of a seed together; equal for all cells of a group and purpose."""
    first = EVALUATION_SEEDS if cell.purpose == "test" else SELECTION_SEEDS
    return [(first + i, task) for i in range(cell.episodes) for task in GROUPS[cell.group][1]]


def plan(settings: Settings, groups: Sequence[str]) -> list[list[Cell]]:
    """Cells in units, in the order of importance; a unit of several cells is a grid, whose best is then tested."""
    learned, held_out = base_cells(settings)
    units: list[list[Cell]] = [[learned]]
    first, *others = settings.modes
    for number in settings.demos:
        units += [[adapted_cell(settings, group, number, first)] for group in groups]
        units += [scratch_grid(settings, group, number) for group in groups]
    units.append([held_out])
    for number in settings.demos:
        for group in groups:
            units += [[adapted_cell(settings, group, number, mode)] for mode in others]
    return units


def repeated(settings: Settings, groups: Sequence[str]) -> list[tuple[str, int, int]]:
    """(group, demonstrations, seed) of the further trainings: a whole round of all cells, then the next seed."""
    return [(group, number, seed) for seed in range(1, settings.seeds) for number in settings.demos for group in groups]
