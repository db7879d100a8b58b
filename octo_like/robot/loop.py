"""The loops that drive a robot, as docs/deployment.md shows them: one chunk after the other, and a hold whenever there
is none (`drive`); and with chunks that are computed while the robot moves (`drive_async`). Import or copy them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from octo_like.common.words import whole_number
from octo_like.robot.chunking import Plan
from octo_like.robot.client import PolicyServerError
from octo_like.robot.executor import AsyncExecutor
from octo_like.robot.history import RobotState
from octo_like.robot.safety import UnsafeAction, check_request

log = logging.getLogger(__name__)


def drive(
    policy: RobotState,
    robot: Any,
    instruction: str,
    running: Callable[[], bool],
    *,
    execute: int = 4,
    seed: int = 0,
    unnormalize: str | None = None,
) -> None:
    """Drives a robot for one episode, and leaves it holding, whatever ends it.

    Args:
      policy: a `PolicyClient`, or a `LocalPolicy` of this process.
      robot: `observe()` waits for the next control step and gives its observation; `execute(action)` commands (A,).
      running: whether to go on.
      execute: actions of a chunk that are executed before the next is asked for, 1 to H.
      unnormalize: dataset of the units; None: the policy's default.

    Raises:
      ValueError: an argument that no request could be answered with; the robot was not asked for anything. Later:
        an observation that the policy cannot read.
      UnknownKind: nobody has said what holds each dimension of the actions.
    """

    def do(action):
        robot.execute(action)
        policy.executed(action)  # what hold() repeats, and what max_change is measured from

    check_request(instruction, None)
    whole_number(execute, "execute", 1, policy.chunks(unnormalize)["horizon"])
    policy.filter_of(unnormalize)  # who may have to hold knows how, or does not start
    policy.reset(seed, unnormalize=unnormalize)
    try:
        while running():
            observation = robot.observe()
            try:
                actions = list(policy.act(observation, instruction)[:execute])
            except (PolicyServerError, OSError) as error:  # refused, too late or away: the next request connects anew
                log.warning("the robot holds: %s", error)
                held = policy.hold()  # None: nothing was executed yet, and the robot stands where it was found
                actions = [] if held is None else [held]
            for i, action in enumerate(actions):
                if i > 0:
                    policy.observe(robot.observe())
                do(action)
            if policy.keeps_moving:  # a speed would go on for as long as the next request takes
                policy.observe(robot.observe())
                do(policy.hold())
    finally:
        if (held := policy.hold()) is not None:
            do(held)


def drive_async(
    policy: RobotState,
    robot: Any,
    instruction: str,
    running: Callable[[], bool],
    plan: Plan,
    *,
    seed: int = 0,
    unnormalize: str | None = None,
    max_errors: int = 5,
) -> None:
    """Drives a robot for one episode while the policy computes, and leaves it holding, whatever ends it.

    Args:
      policy, robot, running, unnormalize: as of `drive`.
      plan: which action is executed when.
      max_errors: requests that may fail in a row, before ExecutorStopped ends the episode.
    """
    with AsyncExecutor(policy, plan, unnormalize=unnormalize, max_errors=max_errors) as executor:
        try:
            observation = robot.observe()
            executor.start(observation, instruction, seed=seed)  # waits for the first chunk: it may compile
            while running():
                robot.execute(executor.step(observation))
                observation = robot.observe()  # waits for the next control step
        finally:
            with contextlib.suppress(UnsafeAction):  # nothing was executed: the robot stands where it was found
                robot.execute(executor.hold())
