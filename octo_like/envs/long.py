"""The tabletop with tasks of several parts, for the robots that have a hand.

env = LongTabletopEnv("gripper")
observation, info = env.reset(seed=3)
info["instruction"]     # "put every block on the plate of its colour"
info["subtask"]         # "pick up the red block": what an expert would do now, whoever has moved the hand
info["progress"]        # 0.5: half of the blocks are served
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from octo_like.envs import experts, long_language, scene
from octo_like.envs.embodiments import EMBODIMENTS, Embodiment
from octo_like.envs.language import BLOCK_COLORS
from octo_like.envs.long_tasks import LongGoal, Part, Progress, next_part, sample_long_scene
from octo_like.envs.tabletop import SCENE, WORDS, TabletopEnv

LONG_EMBODIMENTS = tuple(name for name, embodiment in EMBODIMENTS.items() if embodiment.grasps)
_CHOICES = {"task": long_language.LONG_TASKS, "phrasing": ("seen", "unseen"), "instruction": ("shuffled", "empty")}

MISHAP_PROBABILITY = 0.4  # of an episode
CLOSED_TOO_EARLY = 0.6  # of what befalls an empty hand
FIRST_MISHAP, BETWEEN_MISHAPS = 14, (8, 24)  # steps: the first before that one; from one to the next


class LongTabletopEnv(TabletopEnv):
    """`TabletopEnv` with the tasks of `long_language.LONG_TASKS`.

    Success is judged from the state after every step: each block where it should be, none where it should not, the hand
    empty. An episode terminates on success, and when an order is broken: a block is touched, or laid on the plate,
    before its turn. Other mistakes may be put right until time is up, which is in proportion to the number of parts.
    Reward is 1 on success and 0 otherwise.

    `info` has `progress`, the share of the blocks that are served (0 to 1), and `subtask`, what is to be done next.

    Args: as for `TabletopEnv`, and:
      mishaps: things go wrong in four of nine episodes of an expert, mostly more than once: bumps, a load that is
        lost, a hand that closes too early and holds nothing. For demonstrations of what is to be done then.
    """

    last_bump = 40

    goal: Any  # a LongGoal

    def __init__(self, embodiment: str = "gripper", *, mishaps: bool = False, **arguments: Any):
        if embodiment not in LONG_EMBODIMENTS:
            raise ValueError(f"embodiment {embodiment!r} has no long tasks; valid: {', '.join(LONG_EMBODIMENTS)}")
        super().__init__(embodiment, **(arguments | ({"bumps": True} if mishaps else {})))
        self.mishaps = mishaps
        if mishaps:
            self.bump_probability = MISHAP_PROBABILITY

    def _checked_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Reset options: task; phrasing and instruction as in `TabletopEnv.reset` (without "absent")."""
        unknown = set(options) - set(_CHOICES)
        if unknown:
            raise ValueError(f"unknown reset options {sorted(unknown)}; valid: {', '.join(_CHOICES)}")
        for name, valid in _CHOICES.items():
            if options.get(name) is not None and options[name] not in valid:
                raise ValueError(
                    f"unknown value {options[name]!r} of the reset option {name!r}; valid: {', '.join(valid)}"
                )
        return dict(options)

    def _set_scene(self, streams: list[np.random.Generator], options: Mapping[str, Any]) -> np.ndarray:
        rng = streams[SCENE]
        drawn = str(rng.choice(long_language.LONG_TASKS))
        self.world, self.goal, start = sample_long_scene(rng, self.embodiment.layout, options.get("task") or drawn)
        self.original_target = self.goal.target
        self._yaws = [block.yaw for block in self.world.blocks]
        self.progress, self._fraction = Progress(self.goal), 0.0
        self.instruction = _say(self.goal, options, rng, streams[WORDS])
        return start

    @property
    def max_steps(self) -> int:
        return self.goal.max_steps

    def part(self) -> Part:
        """What is to be done next, from the present state."""
        return next_part(self.world, self.progress, self.effector.tip)

    def _judge(self, moved: float) -> bool:
        touched = self._dwelt_on(moved)
        self._reached |= self.world.grasped | ({touched} if touched else set())
        self.progress.update(self.world, touched)
        # Before a bump, which may let a block fall where it should lie: that counts when the next step is judged.
        self.success, self._fraction = self.progress.complete(self.world), self.progress.fraction(self.world)
        return self.success or self.progress.wrong

    def _info(self) -> dict[str, Any]:
        return super()._info() | {"progress": self._fraction, "subtask": self.part().text}

    def _awkward_start(self) -> None:
        super()._awkward_start()
        if self.mishaps:
            self._bump_at = int(self._bump_rng.integers(1, FIRST_MISHAP))

    def _bump(self) -> None:
        if not self.mishaps:
            return super()._bump()
        if self.world.held is None and self._bump_rng.random() < CLOSED_TOO_EARLY:
            self.effector.opening = 0.0
        else:
            super()._bump()
        self._bump_at = self._steps + int(self._bump_rng.integers(*BETWEEN_MISHAPS))

    def goal_image(self) -> dict[str, np.ndarray]:
        """The images of this scene as if the task had been done: {"image_primary": ...}; the same all episode long."""
        before = self.world, self.effector, self.progress
        blocks = [
            scene.Block(b.color, b.size, yaw, b.start_xy.copy())
            for b, yaw in zip(self.world.blocks, self._yaws, strict=True)
        ]
        self.world = scene.World(blocks, self.world.plates)
        self.progress = Progress(self.goal)
        self.effector = self.embodiment.dynamics()
        self.effector.start(np.zeros(2), np.random.default_rng(0))
        try:
            for _ in range(4 * len(blocks)):
                part = self.part()
                if part.goal is None:
                    break
                self._do(part)
            return {f"image_{slot}": self._image(slot, size) for slot, size in self._camera_sizes().items()}
        finally:
            self.world, self.effector, self.progress = before

    def _do(self, part: Part) -> None:
        """Brings about what a part asks for, at once."""
        assert part.goal is not None
        block = self.world.block(part.block)
        if part.goal.task == "reach":
            self.effector.place(block.xy, 0.05)
            self.progress.update(self.world, part.block)
        elif self.world.held is None:
            self.world.held = self.world.blocks.index(block)
        else:
            spot = part.goal.spot if part.goal.spot is not None else self.world.plate(part.plate).xy
            block.xy = np.array(spot)
            self.world.release()
            self.effector.place(block.xy, 0.05)
            self.progress.update(self.world)

    def expert(self, rng: np.random.Generator, target: str | None = None) -> "LongExpert":
        """A scripted expert for this episode."""
        if target is not None:
            raise ValueError("a long task has no other target to serve")
        return LongExpert(self, rng)


def _say(goal: LongGoal, options: Mapping[str, Any], scene_rng: np.random.Generator, rng: np.random.Generator) -> str:
    unseen = options.get("phrasing") == "unseen"
    phrasing = int(scene_rng.integers(len(long_language.LONG_PHRASINGS[goal.task])))
    table = long_language.LONG_UNSEEN_PHRASINGS if unseen else long_language.LONG_PHRASINGS
    if unseen:
        phrasing = int(rng.integers(len(table[goal.task])))
    if options.get("instruction") == "empty":
        return ""
    sentence = long_language.long_instruction(
        goal.task, phrasing, goal.blocks, plate=goal.plate, spared=goal.spared, phrasings=table
    )
    if options.get("instruction") != "shuffled":
        return sentence
    while (shuffled := " ".join(rng.permutation(sentence.split()))) == sentence:
        pass
    return shuffled


@dataclasses.dataclass
class _PartOfEpisode:
    """The present part of a long task, as an expert of short tasks sees an episode."""

    embodiment: Embodiment
    effector: Any
    world: scene.World
    goal: scene.Goal
    success: bool = False


class LongExpert:
    """Does one part after another with the skills of the short tasks' expert; its habits are those of one episode."""

    def __init__(self, env: LongTabletopEnv, rng: np.random.Generator):
        self._env = env
        start = scene.Goal("reach", env.goal.target)
        self._view = _PartOfEpisode(env.embodiment, env.effector, env.world, start)
        self._skill = experts.make_expert(self._view, rng)
        if isinstance(self._skill, experts.GripperExpert):
            self._skill.turns_back = True

    def act(self) -> np.ndarray:
        """An action in physical units, clipped to the embodiment's limits."""
        part = self._env.part()
        if part.goal is None:
            self._view.success = True
            self._view.goal = scene.Goal("pick_and_place", self._skill.color, spot=(0.0, 0.0))
            return self._skill.act()
        self._view.success = False
        self._view.goal, self._skill.color = part.goal, part.block
        return self._skill.act()


def thing_points(env: LongTabletopEnv) -> dict[str, np.ndarray]:
    """Where every thing is in the primary image, whatever is being done: {"red_block_point", ..., "white_plate_point"},
    (2,) float32, column and row as fractions of the image; NaN where there is no such thing."""
    nowhere = (math.nan, math.nan, math.nan)
    places = {f"{color}_block_point": nowhere for color in BLOCK_COLORS}
    places |= {f"{color}_plate_point": nowhere for color in long_language.LONG_PLATE_COLORS}
    places |= {
        f"{block.color}_block_point": (float(block.xy[0]), float(block.xy[1]), float(block.z))
        for block in env.world.blocks
    }
    places |= {
        f"{plate.color}_plate_point": (float(plate.xy[0]), float(plate.xy[1]), 0.0) for plate in env.world.plates
    }
    return {name: np.array(env.project(*xyz), np.float32) / env.image_size for name, xyz in places.items()}


def part_points(env: LongTabletopEnv) -> dict[str, np.ndarray]:
    """Where the things of the present part are in the primary image: {"target_point", "plate_point"}, (2,) float32,
    column and row as fractions of the image; NaN where the part names none."""
    part = env.part()
    places: dict[str, Any] = {
        "target_point": env.world.block(part.block).xy if part.block else (math.nan, math.nan),
        "plate_point": env.world.plate(part.plate).xy if part.plate else (math.nan, math.nan),
    }
    return {name: np.array(env.project(*xy), np.float32) / env.image_size for name, xy in places.items()}
