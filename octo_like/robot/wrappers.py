"""Gymnasium wrappers between a robot that speaks single frames and single actions and a policy that does not.

A policy reads a window of W observations and answers with a chunk of H actions. The usual stack, innermost first:

    env = ActionFilterWrapper(env, ActionFilter.of(action_limits(policy.statistics["my_robot"])))
    env = ResizeImages(env, {"image_primary": (256, 256)}, resize=policy.batch_spec.resize)
    env = HistoryWrapper(env, window_size=policy.batch_spec.window_size)
    env = ActionChunkWrapper(env, exec_horizon=4)            # or TemporalEnsembleWrapper(env, length=4)

Observations are dicts of arrays with the schema's key names (`image_{slot}`, `proprio`). An order that cannot work is
refused.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np

from octo_like.common.geometry import check_resize
from octo_like.common.words import finite_number, whole_number
from octo_like.robot.chunking import ensemble_weights
from octo_like.robot.history import History
from octo_like.robot.images import resize_images
from octo_like.robot.safety import ActionFilter


class HistoryWrapper(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Stacks the last `window_size` observations and adds `timestep` and `timestep_pad_mask`; see `History`."""

    def __init__(self, env: gym.Env, window_size: int):
        _refuse(env, HistoryWrapper, "HistoryWrapper is there already")
        _refuse(env, ActionChunkWrapper, "HistoryWrapper must be inside ActionChunkWrapper: it would miss frames")
        window_size = whole_number(window_size, "window_size")
        gym.utils.RecordConstructorArgs.__init__(self, window_size=window_size)
        gym.Wrapper.__init__(self, env)
        self._history = History(window_size)
        space = _dict_space(env, "HistoryWrapper")
        stacked = {key: _stack_space(sub, window_size) for key, sub in space.items()}
        stacked["timestep"] = gym.spaces.Box(0, np.iinfo(np.int32).max, (window_size,), np.int32)
        stacked["timestep_pad_mask"] = gym.spaces.MultiBinary(window_size)
        self.observation_space = gym.spaces.Dict(stacked)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._history.reset()
        return self._history.append(observation), info

    def step(self, action: np.ndarray) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._history.append(observation), reward, terminated, truncated, info


class ActionChunkWrapper(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Receding-horizon control: a step takes a chunk (H, A) and executes its first `exec_horizon` actions.

    Execution stops early when the episode ends. The step returns the last observation, the summed reward, and the last
    info plus `rewards`, `observations` and `infos`, one entry per executed action.
    """

    def __init__(self, env: gym.Env, exec_horizon: int):
        if isinstance(exec_horizon, bool) or not isinstance(exec_horizon, int | np.integer) or exec_horizon < 1:
            raise ValueError(f"exec_horizon must be at least 1, a whole number, got {exec_horizon!r}")
        _refuse(env, (ActionChunkWrapper, TemporalEnsembleWrapper), "one of them takes chunks already")
        gym.utils.RecordConstructorArgs.__init__(self, exec_horizon=exec_horizon)
        gym.Wrapper.__init__(self, env)
        self.exec_horizon = exec_horizon
        self.action_space = _chunk_space(env.action_space, exec_horizon)

    def step(self, action: np.ndarray) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        chunk = _check_chunk(self.env, action, self.exec_horizon, "exec_horizon")
        rewards, observations, infos = [], [], []
        for one in chunk[: self.exec_horizon]:
            observation, reward, terminated, truncated, info = self.env.step(one)
            rewards.append(reward)
            observations.append(observation)
            infos.append(info)
            if terminated or truncated:
                break
        summary = {**infos[-1], "rewards": rewards, "observations": observations, "infos": infos}
        return observations[-1], float(sum(map(float, rewards))), terminated, truncated, summary


class TemporalEnsembleWrapper(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Executes one action per step: the weighted average of what the last `length` chunks predicted for this moment.

    Weights are exp(-exp_weight * i), i = 0 for the OLDEST chunk (Zhao et al. 2023): 0 averages evenly, a positive
    value trusts older predictions more (smoother, slower to react), a negative one trusts newer ones more.
    """

    def __init__(self, env: gym.Env, length: int, exp_weight: float = 0.0):
        length = whole_number(length, "length")
        _refuse(env, (ActionChunkWrapper, TemporalEnsembleWrapper), "one of them takes chunks already")
        gym.utils.RecordConstructorArgs.__init__(self, length=length, exp_weight=exp_weight)
        gym.Wrapper.__init__(self, env)
        self.length = length
        self.exp_weight = finite_number(exp_weight, "exp_weight")
        self.action_space = _chunk_space(env.action_space, length)
        self._chunks: deque[np.ndarray] = deque(maxlen=length)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._chunks.clear()
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        self._chunks.append(_check_chunk(self.env, action, self.length, "length"))
        n = len(self._chunks)
        now = np.stack([chunk[n - 1 - i] for i, chunk in enumerate(self._chunks)])
        return self.env.step(ensemble_weights(self.exp_weight, n) @ now)


class ActionFilterWrapper(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Executes what an `ActionFilter` makes of each action; info gets its counts as "action_filter".

    An action is on record when the environment has executed it: one at which it fails is not.
    """

    def __init__(self, env: gym.Env, action_filter: ActionFilter):
        _refuse(env, (ActionChunkWrapper, TemporalEnsembleWrapper), "ActionFilterWrapper must be inside {}")
        width = math.prod(env.action_space.shape or ())
        if len(action_filter.low) != width:
            raise ValueError(f"the filter limits {len(action_filter.low)} dimensions, the environment takes {width}")
        gym.utils.RecordConstructorArgs.__init__(self, action_filter=action_filter)
        gym.Wrapper.__init__(self, env)
        self.action_filter = action_filter

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.action_filter.reset()
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        safe = self.action_filter.safe(action)
        observation, reward, terminated, truncated, info = self.env.step(safe)
        self.action_filter.executed(safe)
        return observation, reward, terminated, truncated, {**info, "action_filter": dict(self.action_filter.counts)}


class ResizeImages(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Resizes the images named in `sizes` = {key: (height, width)} with an antialiased Lanczos filter.

    `crop_areas` = {key: share of the area} also cuts the centre, for policies trained with random crops. `resize` says
    where a picture of another aspect ratio goes, as the policy was trained: `policy.batch_spec.resize`.
    """

    def __init__(
        self,
        env: gym.Env,
        sizes: Mapping[str, tuple[int, int]],
        crop_areas: Mapping[str, float] | None = None,
        *,
        resize: str = "stretch",
    ):
        check_resize(resize)
        _refuse(env, HistoryWrapper, "ResizeImages must be inside HistoryWrapper: it resizes single frames")
        gym.utils.RecordConstructorArgs.__init__(self, sizes=sizes, crop_areas=crop_areas, resize=resize)
        gym.ObservationWrapper.__init__(self, env)
        self.sizes = {key: (height, width) for key, (height, width) in sizes.items()}
        self.crop_areas, self.resize = dict(crop_areas or {}), resize
        space = _dict_space(env, "ResizeImages")
        for key in [*self.sizes, *self.crop_areas]:
            if key not in space.spaces or key not in self.sizes:
                raise ValueError(f"no image {key!r} to resize; the environment's observation keys: {sorted(space)}")
        resized: dict[str, gym.Space] = dict(space.items())
        for key, size in self.sizes.items():
            shape = space[key].shape
            assert shape is not None, "an image is an array"
            resized[key] = gym.spaces.Box(0, 255, (*size, shape[-1]), np.uint8)
        self.observation_space = gym.spaces.Dict(resized)

    def observation(self, observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return resize_images(observation, self.sizes, self.crop_areas, resize=self.resize)


def _chain(env: gym.Env) -> Iterator[gym.Env]:
    """An environment's wrappers, outermost first."""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env


def _refuse(env: gym.Env, inner: type | tuple[type, ...], message: str) -> None:
    """Raises ValueError when one of some wrappers is among those of an environment."""
    for one in _chain(env):
        if isinstance(one, inner):
            raise ValueError(message.format(type(one).__name__))


def _dict_space(env: gym.Env, wrapper: str) -> gym.spaces.Dict:
    if not isinstance(env.observation_space, gym.spaces.Dict):
        raise ValueError(f"{wrapper} needs an environment with Dict observations, got {env.observation_space}")
    return env.observation_space


def _stack_space(space: gym.Space, window_size: int) -> gym.Space:
    if not isinstance(space, gym.spaces.Box):
        raise ValueError(f"observations must be arrays (Box spaces) to be stacked over time, got {space}")
    return gym.spaces.Box(
        np.repeat(space.low[None], window_size, 0), np.repeat(space.high[None], window_size, 0), dtype=space.dtype
    )


def _chunk_space(space: gym.Space, length: int) -> gym.spaces.Box:
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"actions must be vectors (a Box of shape (A,)), got {space}")
    return gym.spaces.Box(
        np.repeat(space.low[None], length, 0), np.repeat(space.high[None], length, 0), dtype=space.dtype
    )


def _check_chunk(env: gym.Env, action: np.ndarray, at_least: int, argument: str) -> np.ndarray:
    """The chunk as an array. Values that are not finite pass only where an ActionFilterWrapper will hold them."""
    chunk = np.asarray(action)
    if chunk.ndim != 2 or len(chunk) < at_least:
        raise ValueError(
            f"expected a chunk of actions (H, A) with H >= {argument} = {at_least}, got shape {chunk.shape}"
        )
    if not np.isfinite(chunk).all() and not any(isinstance(one, ActionFilterWrapper) for one in _chain(env)):
        raise ValueError("the chunk holds values that are not finite; an ActionFilterWrapper would hold the last ones")
    return chunk
