"""Gymnasium-Robotics' Fetch (Plappert et al. 2018): another robot, other cameras, and experts of our own."""

from typing import Any

import numpy as np

from octo_like.envs.sims.camera import View
from octo_like.envs.sims.simulation import Simulation
from octo_like.envs.sims.tasks import SimTask

HOLD = 4  # steps of the environment for which it must find the goal reached: passing by is not enough
METRES = 0.05  # of one unit of action


class Fetch(Simulation):
    """See `Simulation`. 25 Hz of the environment by 2: an action is up to 10 cm per axis.

    Success is the environment's own `is_success` (within 5 cm of the goal) for HOLD of its steps running. Its limit of
    50 steps holds here, too.
    """

    ACTION = ("dx [5 cm a step of 1/25 s]", "dy [same]", "dz [same]", "gripper (1 open, -1 close)")
    METRES, OPEN = 0.1, 1.0
    PROPRIO = ("x [m]", "y [m]", "z [m]", "right finger [m]", "left finger [m]")
    SCENE = View(lookat=(1.33, 0.75, 0.52), distance=0.95, azimuth=145.0, elevation=-35.0)
    VIEWS = {
        "primary": View(lookat=(0.0, 0.0, 0.04), distance=0.8, azimuth=145.0, elevation=-30.0, travels=True),
        "secondary": View(lookat=(0.0, 0.0, 0.04), distance=0.8, azimuth=225.0, elevation=-30.0, travels=True),
    }
    IMAGE_SIZES = {"primary": 64, "secondary": 64}
    ACTION_REPEAT = 2
    MAX_STEPS = 25

    def _make(self, task: SimTask) -> Any:
        from gymnasium_robotics.envs.fetch.pick_and_place import MujocoFetchPickAndPlaceEnv
        from gymnasium_robotics.envs.fetch.push import MujocoFetchPushEnv
        from gymnasium_robotics.envs.fetch.reach import MujocoFetchReachEnv

        classes = {
            "FetchReach": MujocoFetchReachEnv,
            "FetchPush": MujocoFetchPushEnv,
            "FetchPickAndPlace": MujocoFetchPickAndPlaceEnv,
        }
        return classes[task.env](reward_type="sparse")

    def _start(self, env: Any, seed: int) -> None:
        self._state, _ = env.reset(seed=seed)
        self._held = 0
        self._expert = Expert(self.task.env)
        self._mark_goal(env)

    def _advance(self, env: Any, action: np.ndarray) -> bool:
        self._state, _, _, _, info = env.step(action)
        self._held = self._held + 1 if info["is_success"] else 0
        self._mark_goal(env)
        return self._held >= HOLD

    @staticmethod
    def _mark_goal(env: Any) -> None:
        """Puts the red ball where the goal is (the simulation itself does not know it)."""
        env.data.site("target0").xpos = env.goal

    def _proprio(self, env: Any) -> np.ndarray:
        state = self._state["observation"]
        fingers = state[9:11] if env.has_object else state[3:5]
        return np.concatenate([state[:3], fingers])

    def expert_action(self) -> np.ndarray:
        return self._expert.act(self._state)


class Expert:
    """Proportional control towards way points that the true state chooses; one per episode."""

    GAIN = 0.6  # share of the way that one held action covers
    ABOVE = 0.06  # metres over the block before going down to it
    BEHIND = 0.09  # metres behind the block from which it is pushed

    def __init__(self, env: str):
        self._policy = {"FetchReach": self._reach, "FetchPush": self._push, "FetchPickAndPlace": self._pick}[env]

    def act(self, state: Any) -> np.ndarray:
        """(4,) in units of the action space.

        Args:
          state: the environment's full observation.
        """
        hand = state["observation"][:3]
        target, gripper = self._policy(hand, state)
        move = np.clip(self.GAIN * (target - hand) / (METRES * Fetch.ACTION_REPEAT), -1.0, 1.0)
        return np.append(move, gripper).astype(np.float32)

    @staticmethod
    def _reach(hand, state):
        return state["desired_goal"], -1.0

    def _push(self, hand, state):
        block, goal = state["achieved_goal"], state["desired_goal"]
        way = goal[:2] - block[:2]
        distance = float(np.linalg.norm(way))
        if distance < 0.02:
            return hand, -1.0
        way = way / distance
        offset = hand[:2] - block[:2]
        along, aside = float(offset @ way), float(abs(offset @ np.array([-way[1], way[0]])))
        low = block[2]
        if -self.BEHIND - 0.05 < along < -0.03 and aside < 0.02 and hand[2] < low + 0.03:
            # Behind it and low: push, aiming a little behind the goal for the length of the hand and half the block.
            return np.append(goal[:2] - 0.045 * way, low), -1.0
        behind = block[:2] - self.BEHIND * way
        if np.linalg.norm(hand[:2] - behind) < 0.02:
            return np.append(behind, low), -1.0
        near = np.linalg.norm(offset) < self.BEHIND + 0.03
        if near and hand[2] < low + self.ABOVE:
            return np.append(hand[:2], low + 0.12), -1.0
        return np.append(behind, low + 0.12), -1.0

    def _pick(self, hand, state):
        block, goal = state["achieved_goal"], state["desired_goal"]
        offset = block - hand
        aside = float(np.linalg.norm(offset[:2]))
        width = float(state["observation"][9:11].sum())
        if 0.03 < width < 0.056 and aside < 0.03 and abs(offset[2]) < 0.03:
            return goal, -1.0  # the fingers hold its 5 cm
        if aside < 0.015 and abs(offset[2]) < 0.015:
            return hand, -1.0
        if aside < 0.02:
            return block, 1.0
        return np.append(block[:2], max(hand[2], block[2] + self.ABOVE)), 1.0
