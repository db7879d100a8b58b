"""What the simulated robots share: episodes with words, in the project's observation convention.

Only in a simulator's own process: rendering through EGL crashes in one that has imported TensorFlow.
"""

import abc
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from octo_like.envs.sims.camera import Camera, View
from octo_like.envs.sims.tasks import SimTask, find_task

RESET_OPTIONS = ("task", "start", "max_steps")
CAMERAS_OPEN = 32  # each holds the model's meshes and textures: 80 MB; opening one takes as long as 50 pictures

_IDLE: dict[tuple[str, str], list[Any]] = defaultdict(list)  # (simulator, task) -> environments that no episode uses
_CAMERAS: dict[tuple[str, str, str, int], Camera] = {}  # (simulator, task, slot, size), in the order of use


class Simulation(gymnasium.Env, abc.ABC):
    """A robot in a third party's environment, told in words what to do.

    Observation: dict with `image_{slot}` (size, size, 3) uint8 for every camera and "proprio" (P,) float32 in the units
    of PROPRIO. Action: (4,) float32 in the environment's own units, ACTION; what is out of range is clipped. An action
    is held for ACTION_REPEAT of the environment's steps. `info` holds "instruction", "task" and "success", the
    environment's own judgement. Reward is 1 on success. The episode terminates on success and is cut off after
    MAX_STEPS actions.

    Args:
      tasks: what may be asked; the seed draws one unless `reset(options={"task": name})` names it.
      image_sizes: camera slot -> pixels, for other than the default sizes.

    Attributes:
      looks: while False, pictures are black and cost nothing: for the steps of a chunk that nobody looks at.

    A subclass implements the four methods at the end. Environments of a task are kept and used again by later episodes;
    cameras are shared by all environments of a task in this process, and the CAMERAS_OPEN used last are kept open.
    """

    ACTION: tuple[str, ...]
    METRES: float  # that an action of 1 moves the hand
    OPEN: float  # the gripper's action that opens it
    PROPRIO: tuple[str, ...]
    VIEWS: Mapping[str, View]
    SCENE: View  # for people
    IMAGE_SIZES: Mapping[str, int]
    ACTION_REPEAT: int
    MAX_STEPS: int

    def __init__(self, tasks: Mapping[str, SimTask], image_sizes: Mapping[str, int] | None = None):
        self.tasks = dict(tasks)
        self.image_sizes = {**self.IMAGE_SIZES, **(image_sizes or {})}
        if unknown := sorted(set(self.image_sizes) - set(self.VIEWS)):
            raise ValueError(f"no camera {unknown[0]!r}; valid: {', '.join(self.VIEWS)}")
        self.observation_space, self.action_space = self.spaces(self.image_sizes)
        self.looks = True
        self._env: Any = None
        self._done = True

    @classmethod
    def spaces(cls, image_sizes: Mapping[str, int]) -> tuple[gymnasium.spaces.Dict, gymnasium.spaces.Box]:
        """Observation and action space."""
        spaces: dict[str, gymnasium.Space] = {
            f"image_{slot}": gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
            for slot, size in image_sizes.items()
        }
        spaces["proprio"] = gymnasium.spaces.Box(-np.inf, np.inf, (len(cls.PROPRIO),), np.float32)
        return gymnasium.spaces.Dict(spaces), gymnasium.spaces.Box(-1.0, 1.0, (len(cls.ACTION),), np.float32)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode that `seed` and `options` determine.

        Args:
          options: "task": name of the task. "start": (dx, dy, dz) metres by which the hand is moved, open, before the
            episode begins (so far as the robot gets in the steps that this takes). "max_steps": actions after which
            the episode is cut off, in place of MAX_STEPS.

        Raises:
          ValueError: an option or a task that does not exist, a start that is not three finite numbers, or a limit of
            less than one action.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        if unknown := sorted(set(options) - set(RESET_OPTIONS)):
            raise ValueError(f"unknown reset options {unknown}; valid: {', '.join(RESET_OPTIONS)}")
        limit = int(options.get("max_steps", self.MAX_STEPS))
        if limit < 1:
            raise ValueError(f"reset option 'max_steps' must be at least 1, got {limit}")
        episode_seed = seed if seed is not None else int(self.np_random.integers(2**31))
        rng = np.random.default_rng([episode_seed, 0x51])
        drawn = list(self.tasks)[int(rng.integers(len(self.tasks)))]
        task = find_task(self.tasks, options.get("task") or drawn)
        self._release()
        self.task = task
        self.instruction = task.instructions[int(rng.integers(len(task.instructions)))]
        idle = _IDLE[type(self).__name__, task.name]
        self._env = idle.pop() if idle else self._make(task)
        self._start(self._env, episode_seed)
        self._move_hand(np.asarray(options.get("start", (0.0, 0.0, 0.0)), np.float64))
        self.success, self._steps, self._limit, self._done = False, 0, limit, False
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Holds one action for ACTION_REPEAT steps of the environment (fewer when the task is done before).

        Raises:
          ValueError: wrong shape or a non-finite entry.
          RuntimeError: before `reset` or after the episode's end.
        """
        if self._done:
            raise RuntimeError("no episode is under way: call reset() first")
        action = np.asarray(action, np.float32)
        if action.shape != (len(self.ACTION),) or not np.isfinite(action).all():
            raise ValueError(f"an action is {len(self.ACTION)} finite numbers {self.ACTION}, got {action}")
        action = np.clip(action, -1.0, 1.0)
        for _ in range(self.ACTION_REPEAT):
            self.success = self._advance(self._env, action)
            if self.success:
                break
        self._steps += 1
        truncated = not self.success and self._steps >= self._limit
        self._done = self.success or truncated
        return self._observation(), float(self.success), self.success, truncated, self._info()

    def close(self) -> None:
        self._release()

    def render_scene(self, size: int) -> np.ndarray:
        """A picture of the whole scene, for people."""
        return self._picture("scene", size)

    def _move_hand(self, way: np.ndarray) -> None:
        if way.shape != (3,) or not np.isfinite(way).all():
            raise ValueError(f"reset option 'start' is (dx, dy, dz) in metres, got {way}")
        held = int(np.ceil(np.abs(way).max() / self.METRES))
        for _ in range(held * self.ACTION_REPEAT):
            self._advance(self._env, np.append(way / (held * self.METRES), self.OPEN).astype(np.float32))

    def _release(self) -> None:
        if self._env is not None:
            _IDLE[type(self).__name__, self.task.name].append(self._env)
            self._env, self._done = None, True

    def _observation(self) -> dict[str, np.ndarray]:
        images = {
            f"image_{slot}": self._picture(slot, size) if self.looks else np.zeros((size, size, 3), np.uint8)
            for slot, size in self.image_sizes.items()
        }
        return {**images, "proprio": np.asarray(self._proprio(self._env), np.float32)}

    def _picture(self, slot: str, size: int) -> np.ndarray:
        key = (type(self).__name__, self.task.name, slot, size)
        camera = _CAMERAS.pop(key, None) or Camera(self._env.model, {**self.VIEWS, "scene": self.SCENE}[slot], size)
        _CAMERAS[key] = camera  # last in the order of use
        if len(_CAMERAS) > CAMERAS_OPEN:
            _CAMERAS.pop(next(iter(_CAMERAS))).close()
        return camera.render(self._env.data, np.asarray(self._proprio(self._env)[:3], np.float64))

    def _info(self) -> dict[str, Any]:
        return {"instruction": self.instruction, "task": self.task.name, "success": bool(self.success)}

    @abc.abstractmethod
    def _make(self, task: SimTask) -> Any:
        """A new environment (with `model` and `data`)."""

    @abc.abstractmethod
    def _start(self, env: Any, seed: int) -> None:
        """Begins an episode that the seed alone determines."""

    @abc.abstractmethod
    def _advance(self, env: Any, action: np.ndarray) -> bool:
        """One step of the environment; whether it now counts the task as done."""

    @abc.abstractmethod
    def _proprio(self, env: Any) -> np.ndarray:
        """(P,) what the robot feels; the hand's place x, y, z [m] comes first."""

    @abc.abstractmethod
    def expert_action(self) -> np.ndarray:
        """What a scripted expert, which sees the true state, would command now: (4,), clipped."""


def demonstrate(
    simulation: Simulation, task: str, seed: int, noise: float = 0.0, spread: float = 0.0
) -> dict[str, Any]:
    """One episode of the scripted expert.

    Args:
      noise: standard deviation of what is added to the executed (not to the recorded) actions' first three
        dimensions, so that the demonstrations also show how to come back.
      spread: metres; the hand first moves to a random place as far as this to all sides, and up (half of it down).
        From one starting place, where the hand is tells where the expert goes, and nothing is learned of the scene.

    Returns:
      {"observations": [dict], "actions": (T + 1, A) float32, "instruction", "task", "seed", "success"}: T actions led
      to the last observation, and the last row is the one with which the expert would go on.
    """
    rng = np.random.default_rng([seed, 0xE4])
    start = spread * rng.uniform((-1, -1, -0.5), 1.0)
    observation, info = simulation.reset(seed=seed, options={"task": task, "start": start})
    observations, actions, done = [observation], [simulation.expert_action()], False
    while not done:
        executed = actions[-1].copy()
        executed[:3] += noise * rng.standard_normal(3)
        observation, _, terminated, truncated, info = simulation.step(executed)
        observations.append(observation)
        actions.append(simulation.expert_action())
        done = terminated or truncated
    return {
        "observations": observations,
        "actions": np.asarray(actions, np.float32),
        "instruction": info["instruction"],
        "task": task,
        "seed": seed,
        "success": info["success"],
    }
