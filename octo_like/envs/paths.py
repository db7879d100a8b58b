"""Where the hand of a tabletop robot goes, as words; and where it would go if its expert took over: `info["path"]`."""

import copy
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from octo_like.common import hand_paths
from octo_like.envs.tabletop import TabletopEnv


def place(env: TabletopEnv) -> np.ndarray:
    """(2,) float32: column and row of the hand in the primary image, as fractions of it."""
    return np.array(env.project(*map(float, env.effector.tip)), np.float32) / env.image_size


def is_closing(action: np.ndarray) -> bool:
    """Whether an action of a robot with a hand wants it closed."""
    return bool(action[-1] < 0.5)


def paths_of(hands_t2: Sequence[np.ndarray], actions_t: Sequence[np.ndarray]) -> list[str]:
    """Of every step of an episode, the text of the way that the hand takes from there.

    Args:
      hands_t2: T times `place`.
      actions_t: what was done there.
    """
    return hand_paths.paths_ahead(np.stack(hands_t2)[:, ::-1], [is_closing(action) for action in actions_t])


class PathsAhead(gym.Wrapper):
    """Adds `info["path"]` to a tabletop environment: the text of the path that its expert would take from here.

    The expert acts in a copy of the world, and sees no picture. An `OraclePlanner("path")` tells it to a policy.

    Raises:
      ValueError: the robot has no hand.
    """

    env: TabletopEnv

    def __init__(self, env: TabletopEnv):
        super().__init__(env)
        if not env.embodiment.grasps:
            raise ValueError(f"embodiment {env.embodiment.name!r} has no hand whose path could be told")

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**arguments)
        return observation, {**info, "path": self._path(over=False)}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "path": self._path(terminated or truncated)}

    def _path(self, over: bool) -> str:
        ahead = copy.deepcopy(self.env)
        ahead.render_images = False
        expert = ahead.expert(np.random.default_rng([ahead.episode_seed, 0xE4]))
        hands: list[np.ndarray] = []
        actions: list[np.ndarray] = []
        while True:
            action = expert.act()
            hands.append(place(ahead))
            actions.append(action)
            if over:
                return hand_paths.path_ahead(np.stack(hands)[:, ::-1], [is_closing(action) for action in actions])
            *_, terminated, truncated, _ = ahead.step(action)
            over = terminated or truncated
