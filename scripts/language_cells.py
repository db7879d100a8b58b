"""The cells of scripts/benchmark_language.py: what is trained, and by which episodes every policy is judged.

Nothing is run here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarking import digest

from octo_like.envs.language import BLOCK_COLORS
from octo_like.envs.long_language import LONG_TASKS

TAUGHT = "purple"  # blocks of it stand in the robots' demonstrations, but only pictures name it
NEW = "pink"  # nothing in the robots' demonstrations has it
NAMED = tuple(color for color in BLOCK_COLORS if color != TAUGHT)
ROBOTS = {"word": ("gripper", "arm"), "subtasks": ("gripper", "arm"), "heads": ("pusher", "gripper", "arm")}
HEADS = ("diffusion", "flow", "l1", "discrete", "bins", "fast")
GRASPING = tuple(task for task in LONG_TASKS if task != "touch_in_order")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark.

    Attributes:
      demos: demonstrations of each robot's short tasks; long: of its long ones.
      rows: pictures with words.
      steps: of training, by study.
      seeds: trainings of every variant.
      episodes: of each test.
      overrides: of all training configs.
    """

    demos: int = 3000
    long: int = 2000
    rows: int = 12000
    steps: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"word": 3200, "subtasks": 4000, "heads": 1600}
    )
    seeds: int = 3
    episodes: int = 120
    overrides: tuple[str, ...] = ()


QUICK = Settings(
    demos=4,
    long=4,
    rows=24,
    steps={"word": 3, "subtasks": 3, "heads": 3},
    seeds=1,
    episodes=4,
    overrides=("--config.batch_size=10", "--config.optimizer.warmup_steps=1", "--config.log_every=1"),
)


@dataclasses.dataclass(frozen=True)
class Training:
    """One policy: a variant of a study, with a seed of initialisation, order and noise."""

    study: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.study}-{self.variant}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Test:
    """What a policy is judged by.

    Attributes:
      name: of the test.
      kind: "short" or "long" (episodes), "corrected" (episodes of long tasks in which a person contradicts), "answers"
        (questions about pictures) or "speed" (how long one robot waits for a chunk).
      options: reset options of the episodes.
      tasks: of the episodes, each as often; none: all that the robot has.
      targets: colours of the block that is asked for, in turn; none: as the scenes have it.
      planner: "predicted", "oracle", "random", "corrected" or None: who says what to do next.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    planner: str | None = None


NEW_PALETTE = (NEW, *NAMED)
WORD = (
    Test("named", "short", targets=NAMED),
    Test("taught", "short", targets=(TAUGHT,)),
    Test("new", "short", options={"palette": NEW_PALETTE}, targets=(NEW,)),
    Test("seen_pairs", "short", options={"pair": "seen", "palette": NAMED}, tasks=("pick_and_place",)),
    Test("new_pairs", "short", options={"pair": "held_out", "palette": NAMED}, tasks=("pick_and_place",)),
)
ANSWERS = Test("answers", "answers")
FLAT = Test("no plan", "long", tasks=LONG_TASKS)
PLANNED = (
    *(Test(planner, "long", tasks=LONG_TASKS, planner=planner) for planner in ("predicted", "oracle", "random")),
    Test("corrected", "corrected", tasks=GRASPING, planner="corrected"),
    Test("not corrected", "corrected", tasks=GRASPING, planner="predicted"),
)
DEMO = (
    Test("natural", "short"),
    Test("wrong_nearest", "short", options={"wrong_nearest": True}),
    Test("speed", "speed"),
)

# Study -> variant -> (config, tests).
STUDIES: dict[str, dict[str, tuple[str, tuple[Test, ...]]]] = {
    "word": {
        "pictures": ("configs/tabletop_words.py:no_long", (*WORD, ANSWERS)),
        "pictures_unnamed": ("configs/tabletop_words.py:no_long", (*WORD, ANSWERS)),
        "pictures_words": ("configs/tabletop_words.py:no_long,no_points", (*WORD, ANSWERS)),
        "robots": ("configs/tabletop_words.py:no_long,no_pictures", WORD),
    },
    "subtasks": {
        "subtasks": ("configs/tabletop_words.py:no_pictures", (FLAT, *PLANNED)),
        "memory": ("configs/tabletop_words.py:no_pictures,memory", (FLAT, *PLANNED)),
        "flat": ("configs/tabletop_words.py:no_pictures,no_subtasks", (FLAT,)),
    },
    "heads": {kind: (f"configs/tabletop_heads.py:{kind}", DEMO) for kind in HEADS},
}


def trainings(settings: Settings, studies: tuple[str, ...], variants: tuple[str, ...] = ()) -> list[Training]:
    """In the order of running: all variants of all studies with the first seed, then with the next.

    Args:
      variants: only these, of whatever study; none: all.
    """
    return [
        Training(study, variant, seed)
        for seed in range(settings.seeds)
        for study in studies
        for variant in STUDIES[study]
        if not variants or variant in variants
    ]


def tests_of(training: Training) -> tuple[Test, ...]:
    return STUDIES[training.study][training.variant][1]


def training_request(training: Training, settings: Settings) -> dict[str, Any]:
    """All that decides what a training gives, the code aside."""
    config = STUDIES[training.study][training.variant][0]
    sizes = {"demos": settings.demos, "steps": settings.steps[training.study]}
    sizes |= {"rows": settings.rows} if training.study == "word" else {}
    sizes |= {"long": settings.long} if training.study == "subtasks" else {}
    return {**dataclasses.asdict(training), "config": config, **sizes, "overrides": list(settings.overrides)}


def key(training: Training, settings: Settings, test: Test | None = None) -> str:
    """Short hash of what a training, or a test of it, depends on."""
    asked = None if test is None else [dataclasses.asdict(test), settings.episodes]
    return digest([training_request(training, settings), asked])
