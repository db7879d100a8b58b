"""A policy in this process for `octo_like.robot.loop.drive` and `octo_like.robot.executor.AsyncExecutor`: what
`PolicyClient` is for one on a server."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common.chunks import Continuation
from octo_like.common.words import whole_number
from octo_like.robot.history import RobotState
from octo_like.robot.planning import able_to, check_words
from octo_like.robot.rollout import sampling_keys
from octo_like.robot.safety import (
    ActionFilter,
    Shape,
    action_limits,
    check_allowed,
    check_chunk,
    check_request,
    expected_keys,
    frame_shapes,
)

KEPT_TASKS = 64  # sub-tasks of an instruction


class LocalPolicy(RobotState):
    """Keeps the window of observations of one robot and what it executed, and asks a policy.

    Attributes:
      window: the last W observations.
      subtask: what the policy was told to do next in its last actions, or said itself; None: nothing.

    Args:
      policy: an `octo_like.policy.policy.Policy`, or what has its methods.
      unnormalize: dataset of the units.
      allow_missing: observation keys that the policy reads and this robot does not have.
      rng_seed: of the sampling noise.
      max_change: see `ActionFilter`.
      kinds: of the action dimensions, see `octo_like.robot.safety.check_kinds`; None: as the statistics say.

    Raises:
      ValueError: no such statistics, or `allow_missing` has a key that the policy does not read.
      UnknownKind: neither the statistics nor `kinds` say what holds each dimension of the actions.
    """

    def __init__(
        self,
        policy: Any,
        unnormalize: str,
        *,
        allow_missing: Sequence[str] = (),
        rng_seed: int = 0,
        max_change: Sequence[float | None] | float | None = None,
        kinds: Sequence[str] | None = None,
    ):
        if not isinstance(unnormalize, str) or unnormalize not in policy.statistics:
            raise ValueError(f"unknown statistics {unnormalize!r}; valid: {', '.join(sorted(policy.statistics))}")
        entry, spec = policy.statistics[unnormalize], policy.batch_spec.to_json()
        check_allowed(allow_missing, expected_keys(spec))
        self.policy, self.unnormalize, self.allow_missing = policy, unnormalize, tuple(allow_missing)
        self._rng_seed = whole_number(rng_seed, "rng_seed", 0, 2**63 - 1)
        proprio = None if entry.get("proprio") is None else len(entry["proprio"]["mean"])
        self._reads = expected_keys(spec, entry), frame_shapes(spec, proprio)
        self._tasks: tuple[Any, dict[str | None, Any]] = (None, {})
        self._able = able_to(policy)
        super().__init__(policy.batch_spec.window_size, policy.batch_spec.image_sizes, policy.batch_spec.resize)
        how: dict[str, Any] = dict(max_change=max_change, kinds=kinds, whose=f"{unnormalize}: ")
        self._filters[unnormalize] = ActionFilter.of(action_limits(entry), **how)

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
        """See `PolicyClient.predict`. Raises ValueError for what is no chunk of finite actions."""
        self._name(unnormalize)
        check_request(instruction, goal, subtask, plan)
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
        width = len(self.policy.statistics[self.unnormalize]["action"]["mean"])
        actions = check_chunk(np.asarray(actions)[0], self.chunks()["horizon"], width)
        self.subtask = subtask
        self._last.keep(instruction, subtask)
        return actions

    def chunks(self, unnormalize: str | None = None) -> dict[str, Any]:
        """See `PolicyClient.chunks`."""
        self._name(unnormalize)
        able: dict[str, int] = getattr(self.policy, "continuation_methods", lambda _: {})(self.unnormalize)
        horizon = self.policy.batch_spec.action_horizon
        if hasattr(self.policy, "chunk_horizon"):
            horizon = self.policy.chunk_horizon(self.unnormalize)
        return {"horizon": horizon, "continues": able}

    def _filter_of(self, unnormalize: str | None) -> ActionFilter | None:
        return self._filters.get(self._name(unnormalize))

    def _name(self, unnormalize: str | None) -> str:
        if unnormalize not in (None, self.unnormalize):
            raise ValueError(f"this LocalPolicy speaks the units of {self.unnormalize!r}, not {unnormalize!r}")
        return self.unnormalize

    def _expected(self, unnormalize: str | None) -> tuple[Sequence[str], Mapping[str, Shape]]:
        self._name(unnormalize)
        return self._reads

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
