"""Acting while thinking: chunks are computed in a thread of its own while the robot executes the last one.

    executor = AsyncExecutor(PolicyClient("gpu-box"), Plan("guided", exec_horizon=8))
    executor.start(observe(), "put the cup on the plate")      # waits for the first chunk: it may compile
    while running:                                             # at the robot's control rate
        robot.execute(executor.step(observe()))
    robot.execute(executor.hold())                             # whatever ends it: `octo_like.robot.loop.drive_async`

What was executed is counted, not guessed from latencies (`octo_like.robot.chunking`): a command that `step` or `hold`
returns is one that the robot executes. Its states are a table in docs/act.md. NumPy only: the robot's own computer
needs no more. With `delay=k` chunks arrive exactly k steps after they were asked for, whatever the clock says.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from octo_like.common.words import whole_number
from octo_like.robot.chunking import Ask, Chunks, Plan
from octo_like.robot.safety import ActionFilter, check_chunk

log = logging.getLogger(__name__)
# Executors that are not closed, by the identity of their sources: a source is one robot's.
_DRIVING: weakref.WeakValueDictionary[int, AsyncExecutor] = weakref.WeakValueDictionary()


class ExecutorStopped(RuntimeError):
    """The policy failed too often in a row. The robot was told to hold meanwhile; `hold` goes on with that."""


class ChunkSource(Protocol):
    """What an executor needs of a policy: `PolicyClient`, or `octo_like.robot.local.LocalPolicy` in this process."""

    subtask: str | None

    @property
    def window(self) -> Mapping[str, Any]: ...

    def reset(self, seed: int = 0) -> None: ...

    def observe(self, observation: Mapping[str, Any], *, unnormalize: str | None = None) -> None:
        """Adds an observation to the window, which must be another object then. One that is refused changes nothing."""

    def executed(self, action: np.ndarray, *, unnormalize: str | None = None) -> None:
        """Records in `filter_of(unnormalize)` what the robot executes."""

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
        """Actions (H, A); runs in another thread than the rest. `self.subtask` then has what was to be done next."""

    def chunks(self, unnormalize: str | None = None) -> dict[str, Any]: ...

    def filter_of(self, unnormalize: str | None = None) -> ActionFilter:
        """Limits, what holds the robot, and what it executed last."""


class AsyncExecutor:
    """Executes the chunks of one policy on one robot. It begins by a `reset` of the source.

    Attributes:
      state: `Chunks`: its counts and measured delays.
      filter: of every command before it is executed, with its counts and what was executed `last`.
      errors: {message: count} of requests that failed.

    Args:
      source: see `ChunkSource`.
      plan: see `Plan`.
      unnormalize: dataset of the units; the source's default when None.
      max_errors: requests that may fail in a row. Until then the chunk that is there is executed, then the robot holds.
      delay: None: chunks are computed in a thread, and arrive when they are there; k: in `step` itself, and arrive k
        steps later.

    Raises:
      ValueError: the policy cannot do what the plan wants; the source has no limits, or drives another executor.
      UnknownKind: nobody has said what holds each dimension of the actions.
    """

    def __init__(
        self,
        source: ChunkSource,
        plan: Plan,
        *,
        unnormalize: str | None = None,
        max_errors: int = 5,
        delay: int | None = None,
    ):
        whole_number(max_errors, "max_errors")
        if delay is not None:
            whole_number(delay, "delay", 0)
        self.source, self.unnormalize = source, unnormalize
        self.max_errors, self.delay = max_errors, delay
        other = _DRIVING.get(id(source))
        if other is not None and other.source is source:
            raise ValueError(
                f"this {type(source).__name__} drives another executor, of mode {other.plan.mode!r}: its window and "
                "what was executed are one robot's. Close that executor, or make a source for each robot"
            )
        self.filter = source.filter_of(unnormalize)
        about = source.chunks(unnormalize)
        if plan.method is not None and plan.method not in about["continues"]:
            able = ", ".join(about["continues"]) or "none: wait, naive and ensemble need none"
            raise ValueError(
                f"mode {plan.mode!r}: the policy cannot continue chunks by {plan.method!r}; it can by {able}"
            )
        if plan.mode == "trained" and (plan.max_delay or 0) > about["continues"]["trained"]:
            raise ValueError(
                f"max_delay={plan.max_delay}, but the policy was trained for {about['continues']['trained']}"
            )
        kinds = tuple(self.filter.kinds)
        if plan.kinds is not None and tuple(plan.kinds) != kinds:
            raise ValueError(
                f"Plan(kinds={tuple(plan.kinds)}), but the source's actions are {kinds}: leave kinds out of the "
                f"plan, or make the {type(source).__name__} with the right ones"
            )
        self.plan: Plan = dataclasses.replace(plan, kinds=kinds)
        self.state = Chunks(self.plan, about["horizon"])
        self.errors: dict[str, int] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="chunks")
        self._running: tuple[Ask, concurrent.futures.Future] | None = None
        self._failed = 0
        self._said: str | None = None
        self._says_subtasks = False
        self._phase = "idle"  # "running", "stopped" or "closed"
        self._last_error = ""
        source.reset()  # what another loop executed says nothing of where the robot is now
        _DRIVING[id(source)] = self

    def start(
        self,
        observation: Mapping[str, Any],
        instruction: str | None = None,
        *,
        goal: Mapping[str, np.ndarray] | None = None,
        seed: int = 0,
        says_subtasks: bool = False,
    ) -> None:
        """Begins an episode, and waits for its first chunk, of `observation`; `step` then begins with that moment.

        What was executed before is forgotten, for the robot may have been moved. When there is no chunk, nothing has
        begun: call it again. A plan that continues chunks asks once more, so that nothing is compiled while the robot
        moves. With `says_subtasks` the policy says before every chunk what to do next, and acts on it; see `say`. One
        that remembers is asked with what the chunk before was told.

        Raises:
          What the source raises: there is nothing to execute yet.
          ValueError: what came is no chunk of this policy.
          RuntimeError: after `close`.
        """
        self._check_open()
        self._forget()
        self._phase = "idle"
        self.source.reset(seed)
        self.state.reset()
        self._failed, self._task, self._goal = 0, instruction, goal
        self._said, self._says_subtasks = None, says_subtasks
        self.source.observe(observation, unnormalize=self.unnormalize)
        self._first_observation = True
        self.state.tick()
        ask, window = self.state.ask(), self.source.window
        first = self._predict(window, ask)
        if self.plan.method is not None:
            executed, self._said = min(1, len(first) - 1), self.source.subtask  # nothing new is said
            self._predict(window, Ask(0, first, executed, 0, self.plan.method))
            self._said = None
        self.state.accept(first)
        self._phase = "running"

    def say(self, subtask: str | None) -> None:
        """What to do next, from the next chunk on, whatever the policy would say itself; None: that is over.

        A chunk that is being executed or computed is not recalled.
        """
        self._said = subtask

    @property
    def subtask(self) -> str | None:
        """What the newest chunk was told to do, or said itself; None: nothing."""
        return self.source.subtask

    @property
    def takes_observation(self) -> bool:
        """Whether the next `step` wants an observation: each, unless the plan's `factor` is larger than 1."""
        return (self.state.now + (0 if self._first_observation else 1)) % self.plan.factor == 0

    def step(self, observation: Mapping[str, Any] | None = None) -> np.ndarray:
        """The command (A,) of this control step, in the robot's units, within limits. The robot executes it: it is on
        record as what was executed last.

        Args:
          observation: of this moment; None where `takes_observation` is False. That of the first step was `start`'s.

        Raises:
          ExecutorStopped: `max_errors` requests failed in a row, now or before: `hold`, and `start` again.
          UnsafeAction: there is nothing to hold, see `ActionFilter.hold`.
          ValueError: an observation that the policy cannot read, or none where one is needed. The step did not happen:
            `hold`, or call it again.
          RuntimeError: before `start`, or after `close`.
        """
        self._check_open()
        if self._phase == "stopped":
            raise ExecutorStopped(self._last_error)
        if self._phase != "running":
            raise RuntimeError("no episode has begun: call start(), and again when it fails")
        if self._first_observation:
            self._first_observation = False
        else:
            if self.takes_observation:
                if observation is None:
                    raise ValueError("this step needs an observation: the policy's window has no gaps")
                self.source.observe(observation, unnormalize=self.unnormalize)
            self.state.tick()
        self._collect()
        if self.state.wants_chunk():
            ask, window = self.state.ask(), self.source.window
            self._running = ask, self._compute(window, self._as_executed(ask))
            if self.delay is not None:
                concurrent.futures.wait([self._running[1]])
            self._collect()
        command = self.state.action()
        if command is None:
            return self.hold()
        command = self.filter.safe(command)
        self.source.executed(command, unnormalize=self.unnormalize)
        return command

    def hold(self) -> np.ndarray:
        """The command (A,) that keeps the robot where it is, for when `step` or `start` fails. The robot executes it:
        it is on record.

        Raises:
          UnsafeAction: nothing was executed since `start`, and a dimension is neither a change nor a velocity: command
            nothing, the robot stands where it was found.
          RuntimeError: after `close`, when another executor drives the source.
        """
        if self._phase == "closed" and (other := _DRIVING.get(id(self.source))) is not None:
            raise RuntimeError(f"this executor was closed, and another drives its source: hold() of {other!r}")
        command = self.filter.hold()
        self.source.executed(command, unnormalize=self.unnormalize)
        return command

    def close(self) -> None:
        """Ends the thread, when it has finished what it does. `hold` still says what holds the robot, until another
        executor drives the source."""
        self._forget()
        self._pool.shutdown()
        self._phase = "closed"
        if _DRIVING.get(id(self.source)) is self:
            del _DRIVING[id(self.source)]

    def _check_open(self) -> None:
        if self._phase == "closed":
            raise RuntimeError("this executor was closed")

    def __enter__(self) -> AsyncExecutor:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _predict(self, window: Mapping[str, Any], ask: Ask) -> np.ndarray:
        continuing = None
        if ask.method is not None:
            counts = {"executed": ask.executed, "delay": ask.delay}
            continuing = {"previous": ask.previous, **counts, "method": ask.method}
        words: dict[str, Any] = {"plan": True} if self._says_subtasks else {}
        if (said := self._said) is not None:
            words = {"subtask": said}
        chunk = self.source.predict(
            window, self._task, goal=self._goal, unnormalize=self.unnormalize, continuing=continuing, **words
        )
        return check_chunk(chunk, self.state.horizon, len(self.filter.low))

    def _as_executed(self, ask: Ask) -> Ask:
        """The request with the rest of its chunk as limits and `max_change` let it be executed from here on. With a
        `factor`, of which they see each command alone, it stays as predicted."""
        if ask.previous is None or self.plan.factor > 1:
            return ask
        previous = ask.previous.copy()
        previous[ask.executed :] = self.filter.preview(previous[ask.executed :])
        return dataclasses.replace(ask, previous=previous)

    def _compute(self, window: Mapping[str, Any], ask: Ask) -> concurrent.futures.Future:
        try:
            future = self._pool.submit(self._predict, window, ask)
        except RuntimeError as error:  # no thread can be started: a request that failed, as any other
            future = concurrent.futures.Future()
            future.set_exception(error)
        return future

    def _collect(self) -> None:
        """Takes the chunk that was asked for, if it is there."""
        if self._running is None:
            self.state.give_up()  # of a request that was interrupted before it was made
            return
        ask, future = self._running
        if not future.done() if self.delay is None else self.state.now < ask.tick + self.delay:
            return
        try:
            actions = future.result()
        except Exception as error:  # whatever the policy does wrong, the robot must be told to hold
            self._running = None
            self.state.give_up()
            message = f"{type(error).__name__}: {error}"
            self.errors[message] = self.errors.get(message, 0) + 1
            self._failed += 1
            log.warning("no chunk (%d of %d failures in a row): %s", self._failed, self.max_errors, message)
            if self._failed >= self.max_errors:
                self._phase = "stopped"
                self._last_error = f"{self._failed} requests failed in a row; the last: {message}"
                raise ExecutorStopped(self._last_error) from error
            return
        except BaseException:  # no answer, but the end of the program; who goes on all the same gets another chunk
            if future.done():
                self._running = None
            raise
        self._running, self._failed = None, 0
        self.state.accept(actions)

    def _forget(self) -> None:
        """Waits for what is being computed, and drops it: it belongs to another episode."""
        if self._running is not None:
            concurrent.futures.wait([self._running[1]])
            self._running = None
