"""Meta-World (Yu et al. 2020; package metaworld 3): a Sawyer arm that slides a gripper in x, y, z."""

import warnings
from typing import Any

import numpy as np

from octo_like.envs.sims.camera import View
from octo_like.envs.sims.simulation import Simulation
from octo_like.envs.sims.tasks import SimTask


class MetaWorld(Simulation):
    """See `Simulation`. 80 Hz of the environment by 5 make 16 actions a second, each up to 5 cm per axis.

    The environment would tell the goal in its state; the policy gets the hand's pose and the two pictures only. The
    environment's limit is 500 of its steps, here it is 200: its experts need at most 130.
    """

    ACTION = ("dx [cm a step of 1/80 s]", "dy [same]", "dz [same]", "gripper effort (1 close, -1 open)")
    METRES, OPEN = 0.05, -1.0
    PROPRIO = ("x [m]", "y [m]", "z [m]", "gripper opening (0..1)")
    SCENE = View(lookat=(0.0, 0.68, 0.10), distance=0.95, azimuth=135.0, elevation=-35.0)
    VIEWS = {
        "primary": View(lookat=(0.0, 0.09, -0.10), distance=0.75, azimuth=135.0, elevation=-40.0, travels=True),
        "secondary": View(lookat=(0.0, 0.09, -0.10), distance=0.75, azimuth=225.0, elevation=-40.0, travels=True),
    }
    IMAGE_SIZES = {"primary": 64, "secondary": 64}
    ACTION_REPEAT = 5
    MAX_STEPS = 40

    def _make(self, task: SimTask) -> Any:
        from metaworld import policies
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        env = ALL_V3_ENVIRONMENTS[task.env]()
        # What the package's own set_task does, but with the scene drawn from the environment's seeded generator: its
        # 50 pickled scenes a task would leave too few for demonstrations and evaluation.
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)
        env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
        env.max_path_length = 10**9  # it would refuse to go on after 500 steps: an episode's limit is ours to set
        env.expert = getattr(policies, task.expert)()
        return env

    def _start(self, env: Any, seed: int) -> None:
        env.seed(seed)
        self._state, _ = env.reset()

    def _advance(self, env: Any, action: np.ndarray) -> bool:
        self._state, _, _, _, info = env.step(action)
        return bool(info["success"])

    def _proprio(self, env: Any) -> np.ndarray:
        return self._state[:4]

    def expert_action(self) -> np.ndarray:
        with warnings.catch_warnings():  # that the environment will clip, which is done here
            warnings.simplefilter("ignore")
            return np.clip(self._env.expert.get_action(self._state), -1.0, 1.0).astype(np.float32)
