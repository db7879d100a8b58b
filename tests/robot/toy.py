"""A world small enough to reason about: a dot on a line of pixels, told in words which end to go to."""

import gymnasium as gym
import jax
import numpy as np

from octo_like.common.schema import BatchSpec

SIZE = 16


class LineEnv(gym.Env):
    """The dot (white column) starts near the middle; 'left'/'right' must be reached; 12 steps at most.

    options: {"task": "left" | "right"}. Reaching either end ends the episode: success iff it is the named one.
    """

    def __init__(self, time_limit: int | None = 12):
        self.time_limit = time_limit
        self.action_space = gym.spaces.Box(-4, 4, (1,), np.float32)
        self.observation_space = gym.spaces.Dict(
            {
                "image_primary": gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
                "proprio": gym.spaces.Box(-np.inf, np.inf, (1,), np.float32),
            }
        )
        self.closed = False

    def _observe(self):
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        image[:, int(np.clip(round(self.x), 0, SIZE - 1))] = 255
        return {"image_primary": image, "proprio": np.array([self.x], np.float32)}

    def _info(self):
        reached = "left" if self.x <= 0 else "right" if self.x >= SIZE - 1 else None
        return {
            "instruction": f"go {self.task}",
            "task": self.task,
            "success": reached == self.task,
            "reached_left": reached == "left",
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, 7.0 + self.np_random.uniform(-2, 2)
        drawn = str(self.np_random.choice(["left", "right"]))
        self.task = (options or {}).get("task", drawn)
        return self._observe(), self._info()

    def step(self, action):
        self.t += 1
        self.x += float(action[0])
        info = self._info()
        ended = self.x <= 0 or self.x >= SIZE - 1
        return self._observe(), -1.0, ended, self.time_limit is not None and self.t >= self.time_limit, info

    def close(self):
        self.closed = True


class LinePolicy:
    """Obeys the words, steered by what it sees (it stands still when it sees nothing), with keyed noise per row."""

    def __init__(self, horizon: int = 3, window: int = 2, image_size: int = SIZE, noise: float = 0.3):
        self.batch_spec = BatchSpec(
            window_size=window,
            action_horizon=horizon,
            action_dim=1,
            image_sizes={"primary": (image_size, image_size)},
            proprio_dim=1,
            language_length=4,
        )
        numbers = {"mean": np.zeros(1), "std": np.ones(1)}
        kinds = {"action": {"names": ["a0"], "kinds": ["delta"]}}
        self.statistics = {"line": {"action": dict(numbers), "proprio": dict(numbers), "dimensions": kinds}}
        self.noise = noise
        self.calls: list[dict] = []

    def create_tasks(self, texts):
        return {"direction": np.array([-1.0 if "left" in t else 1.0 if "right" in t else 0.0 for t in texts])}

    def get_pretty_spec(self):
        return "reads a line, goes to its end"

    def sample_actions(self, observations, tasks, *, rng, unnormalize):
        if unnormalize not in (None, "line"):
            raise ValueError(f"unknown statistics {unnormalize!r}; valid: line")
        images = observations["image_primary"]
        batch, window, height = images.shape[:3]
        self.calls.append({"batch": batch, "unnormalize": unnormalize, "observations": observations})
        assert (window, height) == (self.batch_spec.window_size, self.batch_spec.image_sizes["primary"][0])
        seen = images[:, -1].max(axis=(1, 2, 3)) > 40
        horizon = self.batch_spec.action_horizon
        noise = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (horizon, 1)))(rng))
        return (2.0 * tasks["direction"] * seen)[:, None, None] + self.noise * noise
