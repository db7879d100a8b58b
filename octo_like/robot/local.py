"""A policy in this process for `octo_like.robot.executor.AsyncExecutor`: what `PolicyClient` is for one on a server."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common.chunks import Continuation
from octo_like.robot.history import History, LastWords
from octo_like.robot.images import resize_images
from octo_like.robot.planning import able_to, check_words
from octo_like.robot.rollout import sampling_keys
from octo_like.robot.safety import ActionFilter, action_limits, check_observation, expected_keys

KEPT_TASKS = 64  # sub-tasks of an instruction


class LocalPolicy:
    """Keeps the window of observations of one robot, and asks a policy.

    Attributes:
      window: the last W observations.
      subtask: what the policy was told to do next in its last actions, or said itself; None: nothing.

    Args:
      policy: an `octo_like.policy.policy.Policy`, or what has its methods.
      unnormalize: dataset of the units.
      allow_missing: observation keys that the policy reads and this robot does not have.
      rng_seed: of the sampling noise.
      max_change: see `ActionFilter`.
    """

    def __init__(
        self,
        policy: Any,
        unnormalize: str,
        *,
        allow_missing: Sequence[str] = (),
        rng_seed: int = 0,
        max_change: Sequence[float | None] | float | None = None,
    ):
        if unnormalize not in policy.statistics:
            raise ValueError(f"unknown statistics {unnormalize!r}; valid: {', '.join(sorted(policy.statistics))}")
        self.policy, self.unnormalize, self.allow_missing = policy, unnormalize, tuple(allow_missing)
        self._rng_seed, self._max_change = rng_seed, max_change
        self._expected = expected_keys(policy.batch_spec.to_json(), policy.statistics[unnormalize])
        self._sizes = {f"image_{slot}": tuple(size) for slot, size in policy.batch_spec.image_sizes.items()}
        self._history = History(policy.batch_spec.window_size)
        self._filter: ActionFilter | None = None
        self._tasks: tuple[Any, dict[str | None, Any]] = (None, {})
        self._able, self._last = able_to(policy), LastWords()
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Starts an episode; see `PolicyClient.reset`."""
        self._history.reset()
        self._seed = seed
        self.window: dict[str, Any] = {}
        self.subtask: str | None = None
        self._last.reset()
        if self._filter is not None:
            self._filter.reset()

    def observe(self, observation: Mapping[str, Any], *, unnormalize: str | None = None) -> None:
        """See `PolicyClient.observe`."""
        self._check(unnormalize)
        check_observation(observation, self._expected, self.allow_missing)
        self.window = self._history.append(self._resized(observation))

    def predict(
        self,
        window: Mapping[str, Any],
        instruction: str | None = None,
        *,
        goal: Mapping[str, np.ndarray] | None = None,
        unnormalize: str | None = None,
        continuing: Mapping[str, Any] | None = None,
        subtask: str | None = None,
        plan: bool = False,
    ) -> np.ndarray:
        """See `PolicyClient.predict`. Raises FloatingPointError for actions that are not finite."""
        self._check(unnormalize)
        check_words(subtask, plan, self._able)
        options = {}
        if continuing is not None:
            previous = np.asarray(continuing["previous"], np.float32)[None]
            options["continuing"] = Continuation(previous, **{k: v for k, v in continuing.items() if k != "previous"})
        rng = sampling_keys(self._rng_seed, [self._seed], [int(window["timestep"][-1])])
        rows = {key: np.asarray(value)[None] for key, value in window.items()}
        if plan:
            last = self._last.of(instruction) if self._able["remembers"] else None
            asked = self._task(instruction, goal, last)
            (subtask,) = self.policy.predict_text(rows, asked, unnormalize=self.unnormalize)
        task = self._task(instruction, goal, subtask)
        actions = self.policy.sample_actions(rows, task, rng=rng, unnormalize=self.unnormalize, **options)
        actions = np.asarray(actions, np.float32)[0]
        if not np.isfinite(actions).all():
            raise FloatingPointError("the policy's actions are not finite")
        self.subtask = subtask
        self._last.keep(instruction, subtask)
        return actions

    def chunks(self, unnormalize: str | None = None) -> dict[str, Any]:
        """See `PolicyClient.chunks`."""
        self._check(unnormalize)
        able: dict[str, int] = getattr(self.policy, "continuation_methods", lambda _: {})(self.unnormalize)
        horizon = self.policy.batch_spec.action_horizon
        if hasattr(self.policy, "chunk_horizon"):
            horizon = self.policy.chunk_horizon(self.unnormalize)
        return {"horizon": horizon, "continues": able}

    def filter_of(self, unnormalize: str | None = None) -> ActionFilter:
        """See `PolicyClient.filter_of`."""
        self._check(unnormalize)
        if self._filter is None:
            limits = action_limits(self.policy.statistics[self.unnormalize])
            self._filter = ActionFilter.of(limits, max_change=self._max_change)
        return self._filter

    def _check(self, unnormalize: str | None) -> None:
        if unnormalize not in (None, self.unnormalize):
            raise ValueError(f"this LocalPolicy speaks the units of {self.unnormalize!r}, not {unnormalize!r}")

    def _resized(self, observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return resize_images({key: np.asarray(value) for key, value in observation.items()}, self._sizes)

    def _task(self, instruction: str | None, goal: Mapping[str, np.ndarray] | None, subtask: str | None = None) -> Any:
        key = (instruction, None if goal is None else id(goal))
        if self._tasks[0] != key or len(self._tasks[1]) > KEPT_TASKS:
            self._tasks = key, {}
        made = self._tasks[1]
        if subtask not in made:
            goals = None if goal is None else {k: v[None] for k, v in self._resized(goal).items()}
            options: dict[str, Any] = {} if goals is None else {"goals": goals}
            options |= {} if subtask is None else {"subtasks": [subtask]}
            texts = [instruction or ""] if goal is None or instruction is not None else None
            made[subtask] = self.policy.create_tasks(texts=texts, **options)
        return made[subtask]
