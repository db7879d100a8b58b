"""Which action is executed when: chunks that arrive late, by counting. No threads, no clock, NumPy only.

A control step is: `tick()`, then, if `wants_chunk()`, `ask()` for a chunk with the present observation, `accept()` what
has arrived, and execute `action()`. `AsyncExecutor` does this with a thread that computes, scripts/bench_delay.py for
many simulated robots at once with chunks that arrive after a given number of steps.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from octo_like.common.chunks import check_known, resample
from octo_like.common.words import finite_number, whole_number

# Mode: (what it does while a chunk is computed, method of `Continuation` or None).
MODES: dict[str, tuple[str, str | None]] = {
    "wait": ("the robot holds still: the old chunk ends where the new one is asked for", None),
    "naive": ("the old chunk goes on, and the new one takes over where it is by then", None),
    "ensemble": ("as naive, asking all the time; an action is the mean of what the last chunks say for its step", None),
    "guided": ("as naive, and the new chunk continues the old one (real-time chunking)", "jacobian_free"),
    "guided_vjp": ("as guided, with the Jacobian of the network", "vjp"),
    "trained": ("as naive, and the policy has learned to continue a chunk (`max_delay` of its head)", "trained"),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How chunks are executed.

    Attributes:
      mode: see `MODES`.
      exec_horizon: s: actions between two requests, if the computation is not slower ("ensemble" asks all the time).
      initial_delay: control steps that a computation is expected to take before any was measured.
      delay_window: the expectation is the largest of so many last measurements.
      max_delay: of a policy for "trained": it cannot be given more actions.
      exp_weight: of "ensemble": weights exp(-exp_weight * i), i = 0 for the oldest chunk (Zhao et al. 2023).
      ensemble_size: of "ensemble": chunks that are averaged at most.
      factor: commands for each action of the policy: see `octo_like.common.chunks.resample`.
      kinds: of the action dimensions, for `factor` > 1. None: `AsyncExecutor` takes those that its source knows; it
        refuses others than those.
    """

    mode: str = "guided"
    exec_horizon: int = 1
    initial_delay: int = 1
    delay_window: int = 10
    max_delay: int | None = None
    exp_weight: float = 0.0
    ensemble_size: int = 8
    factor: int = 1
    kinds: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; valid: {', '.join(MODES)}")
        for name in ("exec_horizon", "delay_window", "ensemble_size", "factor"):
            whole_number(getattr(self, name), name)
        whole_number(self.initial_delay, "initial_delay", 0)
        if self.max_delay is not None:
            whole_number(self.max_delay, "max_delay", 0)
        finite_number(self.exp_weight, "exp_weight")
        if self.mode == "trained" and not self.max_delay:
            raise ValueError("mode 'trained' needs max_delay, that of the policy's head")
        if self.kinds is not None:
            check_known(self.kinds)

    @property
    def method(self) -> str | None:
        return MODES[self.mode][1]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request for a chunk.

    Attributes:
      tick: control step of its observation.
      previous: (H, A) the chunk that it continues, as predicted, or None.
      executed, delay: see `octo_like.common.chunks.Continuation`.
      method: of the continuation, or None.
    """

    tick: int
    previous: np.ndarray | None
    executed: int
    delay: int
    method: str | None


@dataclasses.dataclass
class _Chunk:
    actions: np.ndarray  # (H, A) as predicted
    commands: np.ndarray  # (H * factor, A)
    position: int  # of the next command


class Chunks:
    """The chunk that is executed, and the one that is on its way.

    Attributes:
      counts: {"chunks": accepted, "held": control steps without an action, "late": chunks that came later than they had
        been asked for, "dropped": chunks that came when all of their actions were past}.
      delays: the last measured delays, control steps; the first chunk of an episode is not measured: it may compile.
      seams: steps since `reset` at which another chunk took over.

    Args:
      plan: see `Plan`.
      horizon: H of the policy's chunks.
    """

    def __init__(self, plan: Plan, horizon: int):
        if plan.exec_horizon > horizon:
            raise ValueError(f"exec_horizon must be in 1..{horizon} (the policy's chunk), got {plan.exec_horizon}")
        if plan.factor > 1 and plan.kinds is None:
            raise ValueError("factor > 1 needs the kinds of the action dimensions: not all may be interpolated")
        self.plan, self.horizon = plan, horizon
        self.delays: collections.deque[int] = collections.deque(maxlen=plan.delay_window)
        self.counts = dict.fromkeys(("chunks", "held", "late", "dropped"), 0)
        self.reset()

    def reset(self) -> None:
        """A new episode. What was measured is kept; what is under way is forgotten."""
        self._tick = -1
        self._asked: Ask | None = None
        self._asked_at = -1
        self._consumed = 0  # commands since the request that is under way
        self._current: _Chunk | None = None
        self._older: collections.deque[_Chunk] = collections.deque(maxlen=self.plan.ensemble_size)
        self.seams: list[int] = []

    @property
    def now(self) -> int:
        """Control steps before the present one."""
        return self._tick

    @property
    def is_empty(self) -> bool:
        """Whether no chunk was accepted yet."""
        return self._current is None

    @property
    def expected_delay(self) -> int:
        """Control steps that the next computation will take."""
        return max(self.delays) if self.delays else self.plan.initial_delay

    def tick(self) -> None:
        """A control step begins."""
        self._tick += 1

    @property
    def takes_observation(self) -> bool:
        """Whether the policy wants to see the present step: with `factor` > 1 every so-manyth."""
        return self._tick % self.plan.factor == 0

    def wants_chunk(self) -> bool:
        """Whether a chunk is to be asked for now."""
        if self._asked is not None or self._asked_at == self._tick or not self.takes_observation:
            return False
        if self._current is None or self.plan.mode == "ensemble":
            return True
        wanted = self.plan.exec_horizon
        if self.plan.mode != "wait":
            wanted = max(wanted, _up(self.expected_delay, self.plan.factor))
        return self._current.position >= min(wanted, self.horizon) * self.plan.factor

    def ask(self) -> Ask:
        """Says that a chunk is being computed from the present observation."""
        current, factor = self._current, self.plan.factor
        executed = self.horizon if current is None else min(_up(current.position, factor), self.horizon)
        left = self.horizon - executed
        delay = min(_up(self.expected_delay, factor), left)
        if self.plan.mode == "trained":
            delay = min(delay, self.plan.max_delay or 0)
        method = self.plan.method if current is not None and left else None
        previous = current.actions if current is not None and method else None
        self._asked, self._consumed = Ask(self._tick, previous, executed, delay, method), 0
        self._asked_at = self._tick
        return self._asked

    def accept(self, actions: np.ndarray) -> None:
        """The chunk (H, A) that was asked for is there. It goes on behind the actions that were executed meanwhile.

        Raises:
          ValueError: it has another shape. It was not accepted: `give_up`, or accept another.
        """
        if self._asked is None:
            raise RuntimeError("no chunk was asked for")
        chunk = np.array(actions, np.float32)
        if chunk.ndim != 2 or len(chunk) != self.horizon:
            raise ValueError(f"expected a chunk of {self.horizon} actions (H, A), got shape {chunk.shape}")
        kinds = ["other"] * chunk.shape[1] if self.plan.kinds is None else self.plan.kinds
        commands = resample(chunk, self.plan.factor, kinds)
        asked, self._asked = self._asked, None
        taken = self._tick - asked.tick
        if self._current is not None:
            self.delays.append(taken)
            self.counts["late"] += int(asked.method is not None and self._consumed > asked.delay * self.plan.factor)
        if self._consumed >= len(commands):
            self.counts["dropped"] += 1
            return
        self._current = _Chunk(chunk, commands, self._consumed)
        self._older.append(self._current)
        self.counts["chunks"] += 1
        self.seams.append(self._tick)

    def give_up(self) -> None:
        """The request failed: another may be made."""
        self._asked = None

    def action(self) -> np.ndarray | None:
        """The command (A,) of this control step; None: hold."""
        current = self._current
        stopped = self.plan.mode == "wait" and self._asked is not None
        if current is None or stopped or current.position >= len(current.commands):
            self.counts["held"] += 1
            return None
        if self.plan.mode != "ensemble":
            found = current.commands[current.position]
        else:
            said = [one.commands[one.position] for one in self._older if one.position < len(one.commands)]
            found = (ensemble_weights(self.plan.exp_weight, len(said)) @ np.stack(said)).astype(np.float32)
        for one in self._older if self.plan.mode == "ensemble" else (current,):
            one.position += 1
        self._consumed += 1
        return found

    def summary(self) -> dict[str, Any]:
        """Counts and measured delays, for logs."""
        return {**self.counts, "delays": list(self.delays)}


def ensemble_weights(exp_weight: float, count: int) -> np.ndarray:
    """(count,) that sum to 1: as exp(-exp_weight * i), i = 0 for the oldest chunk."""
    exponents = np.float64(-exp_weight) * np.arange(count)
    weights = np.exp(exponents - exponents.max())  # no overflow, however large exp_weight is
    return weights / weights.sum()


def _up(count: int, factor: int) -> int:
    return -(-count // factor)
