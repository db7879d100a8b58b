"""Who says what to do next while a policy acts: the policy itself, the environment, a person, or chance.

A policy with a language group for sub-tasks acts on an instruction, on a sub-task, or on both. `evaluate(...,
planner=PredictedPlanner())` asks it for the sub-task first, every few chunks, and hands the answer back to it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np


class Plan(NamedTuple):
    """What was said at a step of an episode.

    Attributes:
      step: actions that had been executed.
      text: what to do next.
      wanted: what the environment would have said (`info["subtask"]`), None where it says nothing.
    """

    step: int
    text: str
    wanted: str | None


class Planner(Protocol):
    """Says what to do next, for every row of a batch."""

    def __call__(
        self,
        policy: Any,
        observations: Mapping[str, Any],
        instructions: Sequence[str],
        infos: Sequence[Mapping[str, Any]],
        *,
        rng: jax.Array,
        unnormalize: str | None,
    ) -> list[str]:
        """B texts; "" says nothing.

        Args:
          observations: (B, W, ...), as `Policy.sample_actions` takes them.
          instructions: of the rows. infos: of their environments.
          rng: B keys, one per row.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PredictedPlanner:
    """The policy says itself what it is going to do, given the instruction.

    Attributes:
      part: of `model.auxiliaries`. temperature: 0 says the likeliest.
    """

    part: str = "text"
    temperature: float = 0.0

    def __call__(
        self,
        policy: Any,
        observations: Mapping[str, Any],
        instructions: Sequence[str],
        infos: Sequence[Mapping[str, Any]],
        *,
        rng: jax.Array,
        unnormalize: str | None,
    ) -> list[str]:
        tasks = policy.create_tasks(texts=list(instructions))
        options: dict[str, Any] = dict(part=self.part, temperature=self.temperature)
        return policy.predict_text(observations, tasks, rng=rng, unnormalize=unnormalize, **options)


@dataclasses.dataclass(frozen=True)
class OraclePlanner:
    """The environment says it, in `info[key]`."""

    key: str = "subtask"

    def __call__(
        self,
        policy: Any,
        observations: Mapping[str, Any],
        instructions: Sequence[str],
        infos: Sequence[Mapping[str, Any]],
        *,
        rng: jax.Array,
        unnormalize: str | None,
    ) -> list[str]:
        if missing := [sorted(info) for info in infos if self.key not in info]:
            raise ValueError(f"the environment's info has no {self.key!r} to plan by; it has {missing[0]}")
        return [str(info[self.key]) for info in infos]


@dataclasses.dataclass(frozen=True)
class RandomPlanner:
    """One of some texts, drawn anew each time: what is a plan worth that means nothing?"""

    texts: tuple[str, ...]

    def __call__(
        self,
        policy: Any,
        observations: Mapping[str, Any],
        instructions: Sequence[str],
        infos: Sequence[Mapping[str, Any]],
        *,
        rng: jax.Array,
        unnormalize: str | None,
    ) -> list[str]:
        if not self.texts:
            raise ValueError("a random planner needs texts to draw from")
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(self.texts)))(rng)
        return [self.texts[int(i)] for i in np.asarray(drawn)]


def accuracy(plans: Sequence[Plan]) -> float:
    """Share of the plans that are what the environment would have said; NaN where it says nothing."""
    judged = [plan.text == plan.wanted for plan in plans if plan.wanted is not None]
    return float(np.mean(judged)) if judged else float("nan")
