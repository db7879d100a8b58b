"""The built-in world: a table, blocks, plates and one of four robots, told in words what to do.

    env = TabletopEnv("gripper")
    observation, info = env.reset(seed=3)
    info["instruction"]                        # "put the green block on the blue plate"
    expert = env.expert(np.random.default_rng(0))
    observation, reward, terminated, truncated, info = env.step(expert.act())

Seeds of one billion and above are for evaluation; demonstrations are made from smaller ones (see data/tabletop).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from octo_like.envs import language, render, scene
from octo_like.envs.colors import ALL_BLOCK_COLORS, check_palette
from octo_like.envs.embodiments import EMBODIMENTS, Embodiment
from octo_like.envs.experts import make_expert

if TYPE_CHECKING:
    from octo_like.envs.experts import Acting

EVALUATION_SEEDS = 1_000_000_000  # the first seed that no demonstration uses

DWELL_SPEED = 0.025  # metres a step: faster than this passes over a block, slower dwells on it
LOW = 0.08  # metres: an effector that moves in z is at a block only below this height
PUSH_DISTANCE = 0.10
DISTURBED = 0.03  # metres: a block moved this far was moved
BUMP_PROBABILITY = 0.2

_CHOICES = {
    "phrasing": ("seen", "unseen"),
    "pair": ("seen", "held_out"),
    "instruction": ("shuffled", "empty", "absent"),
}
_RESET_OPTIONS = ("task", "wrong_nearest", "swap_instruction", "palette", "target", *_CHOICES)
# Independent random streams of an episode.
SCENE, LOOK, SWAP, NOISE, BUMP, PAIR, WORDS, PALETTE = range(8)


class TabletopEnv(gymnasium.Env):
    """One robot at the table.

    Observation: dict with "image_primary" (image_size, image_size, 3) uint8 and, for some embodiments, "image_wrist"
    (wrist_size, wrist_size, 3) uint8 and "proprio" (P,) float32 in physical units. The instruction is in `info`.

    Reward is 1 on success and 0 otherwise. An episode terminates when it is decided:
      reach: by the first block dwelt on, i.e. the effector is within `reach_radius` of it (and low) after two steps
        running, the second of them slower than DWELL_SPEED; so passing over a block is not reaching it;
      push: by success, or when something is moved out of place;
      pick_and_place: by success, or by releasing another block on a plate.
    `info["reached_target"]`: it was dwelt on (reach), moved by DISTURBED or more (push), grasped (pick_and_place);
    `info["reached_any"]`: any block was.

    Args:
      embodiment: a name of `EMBODIMENTS`.
      image_size, wrist_size: pixels.
      bumps: now and then displaces the effector, starts it at an awkward place or makes it lose its load, for
        demonstrations that show how to recover.
      render_images: False leaves images black, which makes an episode ten times faster.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    bump_probability = BUMP_PROBABILITY
    last_bump = 10  # bumps come at an earlier step

    def __init__(
        self,
        embodiment: str = "gripper",
        image_size: int = 64,
        wrist_size: int = 32,
        bumps: bool = False,
        render_images: bool = True,
        render_mode: str | None = None,
    ):
        if embodiment not in EMBODIMENTS:
            raise ValueError(f"unknown embodiment {embodiment!r}; valid: {', '.join(EMBODIMENTS)}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"unknown render_mode {render_mode!r}; valid: rgb_array")
        self.embodiment: Embodiment = EMBODIMENTS[embodiment]
        self.image_size, self.wrist_size = image_size, wrist_size
        self.bumps, self.render_images, self.render_mode = bumps, render_images, render_mode
        spaces: dict[str, gymnasium.Space] = {}
        for slot, size in self._camera_sizes().items():
            spaces[f"image_{slot}"] = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        if self.embodiment.proprio_dim:
            spaces["proprio"] = gymnasium.spaces.Box(-4.0, 4.0, (self.embodiment.proprio_dim,), np.float32)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = gymnasium.spaces.Box(
            np.array(self.embodiment.action_low, np.float32), np.array(self.embodiment.action_high, np.float32)
        )
        self._ready = False

    def _camera_sizes(self) -> dict[str, int]:
        sizes = {"primary": self.image_size, "wrist": self.wrist_size}
        return {slot: sizes[slot] for slot in self.embodiment.cameras}

    # Reset

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode that `seed` and `options` determine.

        Options:
          task: one of the embodiment's tasks (default: drawn from the seed).
          wrong_nearest: True or False: a block that is not the target is, or is not, nearest to the effector
            (default: it is in 2/3 of the scenes).
          swap_instruction: True: the scene of this seed, but the instruction names another block of it.
          phrasing: "unseen": a sentence of UNSEEN_PHRASINGS, which no demonstration says (default: "seen").
          pair: "held_out" or "seen": where a block goes to a plate, their colours are, or are not, in HELD_OUT_PAIRS.
            If they are not so in the scene of this seed, things change colours and nothing else; other tasks ignore it.
          palette: the blocks have colours drawn from these, at least four of `colors.ALL_BLOCK_COLORS`.
          target: the block asked for has this colour; if it has not, blocks change colours and nothing else.
          instruction: "shuffled": its words in another order; "empty": none; "absent": it names a block that is not
            there, so success cannot be.

        Raises:
          ValueError: unknown options or values, or some that contradict one another.
        """
        super().reset(seed=seed)
        options = self._checked_options(options or {})
        episode_seed = seed if seed is not None else int(self.np_random.integers(2**62))
        streams = [np.random.default_rng([episode_seed, i]) for i in range(8)]
        self._noise, self._bump_rng = streams[NOISE], streams[BUMP]
        self.episode_seed = episode_seed
        start = self._set_scene(streams, options)
        self.effector = self.embodiment.dynamics()
        self.effector.start(start, streams[SCENE])
        self._look = render.sample_look(streams[LOOK], self.embodiment.name, self.world)
        self._backgrounds: dict[int, Any] = {}
        self._bump_at = -1
        if self.bumps and self._bump_rng.random() < self.bump_probability:
            self._bump_at = int(self._bump_rng.integers(1, self.last_bump))
            self._awkward_start()
        tip = self.effector.tip[:2]
        nearest = min(self.world.blocks, key=lambda block: math.dist(block.xy, tip))
        self._nearest_is_wrong = nearest.color != self.goal.target
        self._steps = 0
        self._near: str | None = None  # colour of the block that the tip was at a step ago
        self._reached: set[str] = set()
        self.success = self._done = False
        self._ready = True
        return self._observation(), self._info()

    def _checked_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return _checked_options(options)

    def _set_scene(self, streams: list[np.random.Generator], options: Mapping[str, Any]) -> np.ndarray:
        """Draws world, goal and instruction. Returns where the effector starts, (x, y)."""
        tasks = self.embodiment.tasks
        task = options.get("task") or str(streams[SCENE].choice(tasks))
        if task not in tasks:
            raise ValueError(f"embodiment {self.embodiment.name!r} has no task {task!r}; valid: {', '.join(tasks)}")
        self.world, goal, start = scene.sample_scene(
            streams[SCENE],
            self.embodiment.layout,
            task,
            plates_allowed=self.embodiment.grasps,
            wrong_nearest=options.get("wrong_nearest"),
        )
        phrasing = int(streams[SCENE].integers(len(language.PHRASINGS[task])))
        palette = options.get("palette") or language.BLOCK_COLORS
        if options.get("palette"):
            painted = streams[PALETTE].permutation(palette)[: len(self.world.blocks)]
            goal = scene.repaint(self.world, goal, [str(color) for color in painted])
        if options.get("pair") and task == "pick_and_place":
            valid = [p for p in language.pairs(held_out=options["pair"] == "held_out") if p[0] in palette]
            if (goal.target, goal.plate) not in valid:
                goal = scene.recolor(self.world, goal, *valid[streams[PAIR].integers(len(valid))])
        elif options.get("target"):
            goal = scene.recolor(self.world, goal, options["target"], goal.plate)
        self.original_target = goal.target
        colors = [block.color for block in self.world.blocks]
        if options.get("swap_instruction"):
            others = [color for color in colors if color != goal.target]
            goal = dataclasses.replace(goal, target=str(streams[SWAP].choice(others)))
        elif options.get("instruction") == "absent":
            absent = [color for color in palette if color not in colors]
            goal = dataclasses.replace(goal, target=str(streams[WORDS].choice(absent)))
        self.goal = goal
        self.instruction = _say(goal, phrasing, options, streams[WORDS])
        return start

    def _awkward_start(self) -> None:
        """Half of the bumped episodes begin low over some block, the hand perhaps closed, and are not bumped later."""
        rng = self._bump_rng
        if not self.embodiment.grasps or rng.random() < 0.5:
            return
        self._bump_at = -1
        block = self.world.blocks[rng.integers(len(self.world.blocks))]
        self.effector.place(np.clip(block.xy + rng.uniform(-0.05, 0.05, 2), -0.2, 0.2), rng.uniform(0.03, 0.08))
        if rng.random() < 0.5:
            self.effector.opening = 0.0

    # Step

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes one action in physical units; what is out of range is clipped.

        Raises:
          ValueError: wrong shape or a non-finite entry.
          RuntimeError: before `reset` or after the episode's end.
        """
        if not self._ready:
            raise RuntimeError("call reset() first")
        if self._done:
            raise RuntimeError("the episode is over: call reset()")
        action = self._checked(action)
        before = self.effector.tip[:2].copy()
        self.world.released = None
        self.effector.apply(action, self.world, self._noise)
        self._steps += 1
        moved = math.dist(before, self.effector.tip[:2])
        terminated = self._judge(moved)
        if not terminated and self._steps == self._bump_at:
            self._bump()
        truncated = not terminated and self._steps >= self.max_steps
        self._done = terminated or truncated
        return self._observation(), float(self.success), terminated, truncated, self._info()

    @property
    def max_steps(self) -> int:
        """Steps after which the present episode is cut off."""
        return self.embodiment.max_steps[self.goal.task]

    def _checked(self, action) -> np.ndarray:
        action = np.asarray(action, np.float64)
        if action.shape != (self.embodiment.action_dim,):
            names = ", ".join(self.embodiment.action_names)
            expected = f"({self.embodiment.action_dim},) = ({names})"
            raise ValueError(f"an action of {self.embodiment.name!r} has shape {expected}, got {action.shape}")
        if not np.isfinite(action).all():
            raise ValueError(f"non-finite action {action.tolist()} for embodiment {self.embodiment.name!r}")
        return self.embodiment.clip(action)

    def _bump(self) -> None:
        if self.world.held is not None and self._bump_rng.random() < 0.5:
            block = self.world.blocks[self.world.held]
            if self.world.plate_under(block) is None:
                self.effector.slip(self.world)
                return
        self.effector.bump(self.world, self._bump_rng)

    # Judging: each returns whether the episode is decided.

    def _judge(self, moved: float) -> bool:
        return getattr(self, f"_judge_{self.goal.task}")(moved)

    def _dwelt_on(self, moved: float) -> str | None:
        """Colour of the block that the effector, which moved so far in this step, dwells on."""
        tip = self.effector.tip
        nearest = min(self.world.blocks, key=lambda block: math.dist(block.xy, tip[:2]))
        near = nearest.color if math.dist(nearest.xy, tip[:2]) < self.embodiment.reach_radius and tip[2] < LOW else None
        dwells = near is not None and near == self._near and moved <= DWELL_SPEED
        self._near = near
        return near if dwells else None

    def _judge_reach(self, moved: float) -> bool:
        block = self._dwelt_on(moved)
        if block is not None:
            self._reached.add(block)
            self.success = block == self.goal.target
        return block is not None

    def _judge_push(self, moved: float) -> bool:
        del moved
        sign = 1.0 if self.goal.direction == "right" else -1.0
        others_moved = off_table = False
        for block in self.world.blocks:
            if float(np.hypot(*block.displacement)) >= DISTURBED:
                self._reached.add(block.color)
                others_moved |= block.color != self.goal.target
            off_table |= bool(np.abs(block.xy).max() > scene.TABLE)
        if not any(block.color == self.goal.target for block in self.world.blocks):
            return others_moved or off_table  # an absent block cannot be pushed
        dx, dy = self.world.block(self.goal.target).displacement
        astray = -sign * dx >= PUSH_DISTANCE / 2 or abs(dy) >= PUSH_DISTANCE
        self.success = not others_moved and not astray and sign * dx >= PUSH_DISTANCE
        return self.success or others_moved or astray or off_table

    def _judge_pick_and_place(self, moved: float) -> bool:
        del moved
        self._reached |= self.world.grasped
        if self.world.released is None:
            return False
        block = self.world.block(self.world.released)
        plate = self.world.plate_under(block)
        if plate is None:
            return False
        self.success = block.color == self.goal.target and plate.color == self.goal.plate
        return self.success or block.color != self.goal.target

    # What is seen and said

    def _observation(self) -> dict[str, np.ndarray]:
        observation = {}
        for slot, size in self._camera_sizes().items():
            image = self._image(slot, size) if self.render_images else np.zeros((size, size, 3), np.uint8)
            observation[f"image_{slot}"] = image
        if self.embodiment.proprio_dim:
            observation["proprio"] = self.effector.proprio()
        return observation

    def _image(self, slot: str, size: int) -> np.ndarray:
        if slot == "wrist":
            return render.draw_wrist(self.world, self.effector, self._look, size)
        if size not in self._backgrounds:
            self._backgrounds[size] = render.background(self.world, self._look, size * render.SUPERSAMPLING)
        return render.draw_primary(self.world, self.effector, self._look, self._backgrounds[size])

    def _info(self) -> dict[str, Any]:
        return {
            "instruction": self.instruction,
            "task": self.goal.task,
            "success": bool(self.success),
            "reached_target": self.goal.target in self._reached,
            "reached_original": self.original_target in self._reached,
            "reached_any": bool(self._reached),
            "nearest_is_wrong": bool(self._nearest_is_wrong),
            "target": self.goal.target,
            "original_target": self.original_target,
        }

    def render(self) -> np.ndarray | None:
        """The primary camera at 256 x 256, for people."""
        return self._image("primary", 256) if self.render_mode == "rgb_array" else None

    def project(self, x: float, y: float, z: float = 0.0) -> tuple[float, float]:
        """Where a point of the table (metres) is in the primary image, as (column, row) in pixels."""
        u, v = self._look.camera.project(x, y, z)
        return u * self.image_size, v * self.image_size

    def visible(self) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """The primary image and the pixels of each block and plate, see `render.visible`."""
        return render.visible(self.world, self.effector, self._look, self.image_size)

    def outline(self, thing: scene.Block | scene.Plate) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of a block or plate in the primary image, as fractions of it."""
        return render.outline(self._look.camera, thing)

    def goal_image(self) -> dict[str, np.ndarray]:
        """The images of this scene as if the task had been done: {"image_primary": ...}; the same all episode long.

        Raises:
          ValueError: the block that the words name is not there.
        """
        world = scene.World(
            [scene.Block(b.color, b.size, b.yaw, b.start_xy.copy()) for b in self.world.blocks], self.world.plates
        )
        effector = self.embodiment.dynamics()
        effector.start(np.zeros(2), np.random.default_rng(0))
        target = world.block(self.goal.target)
        tip, z = target.xy, 0.05
        if self.goal.task == "pick_and_place":
            target.xy = tip = world.plate(self.goal.plate).xy.copy()
            target.z = scene.PLATE_HEIGHT
        elif self.goal.task == "push":
            sign = 1.0 if self.goal.direction == "right" else -1.0
            target.xy = target.xy + (sign * (PUSH_DISTANCE + 0.01), 0.0)
            tip = target.xy - (sign * (target.size / 2 + effector.radius), 0.0)
        elif not self.embodiment.grasps:
            tip = target.xy - (0.0, target.size / 2 + effector.radius)
        effector.place(tip, z)
        images = {}
        for slot, size in self._camera_sizes().items():
            if slot == "wrist":
                images["image_wrist"] = render.draw_wrist(world, effector, self._look, size)
            else:
                base = render.background(world, self._look, size * render.SUPERSAMPLING)
                images["image_primary"] = render.draw_primary(world, effector, self._look, base)
        return images

    def expert(self, rng: np.random.Generator, target: str | None = None) -> "Acting":
        """A scripted expert for this episode. `target`: colour of a block to serve instead of the one named."""
        return make_expert(self, rng, target)


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    unknown = set(options) - set(_RESET_OPTIONS)
    if unknown:
        raise ValueError(f"unknown reset options {sorted(unknown)}; valid: {', '.join(_RESET_OPTIONS)}")
    for name, valid in _CHOICES.items():
        value = options.get(name)
        if value is not None and value not in valid:
            raise ValueError(f"unknown value {value!r} of the reset option {name!r}; valid: {', '.join(valid)}")
    if options.get("palette"):
        check_palette(options["palette"])
    target, valid = options.get("target"), options.get("palette") or ALL_BLOCK_COLORS
    if target is not None and target not in valid:
        raise ValueError(f"no block is {target!r}; valid: {', '.join(valid)}")
    # Each of these decides which block is asked for.
    deciding = [name for name in ("swap_instruction", "pair", "target") if options.get(name)]
    deciding += ["instruction='absent'"] if options.get("instruction") == "absent" else []
    if len(deciding) > 1:
        raise ValueError(f"the reset options {' and '.join(deciding)} contradict one another; valid: one of them")
    return dict(options)


def _say(goal: scene.Goal, phrasing: int, options: Mapping[str, Any], rng: np.random.Generator) -> str:
    """The instruction; `phrasing` is the one of the scene's seed, `rng` makes the choices that the options ask for."""
    if options.get("instruction") == "empty":
        return ""
    phrasings = language.PHRASINGS
    if options.get("phrasing") == "unseen":
        phrasings = language.UNSEEN_PHRASINGS
        phrasing = int(rng.integers(len(phrasings[goal.task])))
    sentence = language.instruction(
        goal.task, phrasing, goal.target, plate=goal.plate, direction=goal.direction, phrasings=phrasings
    )
    if options.get("instruction") != "shuffled":
        return sentence
    while (shuffled := " ".join(rng.permutation(sentence.split()))) == sentence:
        pass
    return shuffled
