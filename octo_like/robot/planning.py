"""Who says what to do next while a policy acts: the policy itself, the environment, a person, or chance.

A policy with a language group for sub-tasks acts on an instruction, on a sub-task, or on both. `evaluate(...,
planner=PredictedPlanner())` asks it for the sub-task first, every few chunks, and hands the answer back to it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from octo_like.common.schema import TEXT_KINDS


class Plan(NamedTuple):
    """What was said at a step of an episode.

    Attributes:
      step: actions that had been executed.
      text: what to do next.
      wanted: what the environment would have said (`info["subtask"]`), None where it says nothing, and where the text
        is a path of the hand.
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
        last: Sequence[str],
    ) -> list[str]:
        """B texts; "" says nothing.

        Args:
          observations: (B, W, ...), as `Policy.sample_actions` takes them.
          instructions: of the rows. infos: of their environments.
          rng: B keys, one per row.
          last: what was said last in the episodes of the rows, by whomever; "" at their beginning.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PredictedPlanner:
    """The policy says itself what it is going to do, given the instruction, and what was said last if it remembers.

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
        last: Sequence[str],
    ) -> list[str]:
        reminded = {"subtasks": list(last)} if able_to(policy)["remembers"] else {}
        tasks = policy.create_tasks(texts=list(instructions), **reminded)
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
        last: Sequence[str],
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
        last: Sequence[str],
    ) -> list[str]:
        if not self.texts:
            raise ValueError("a random planner needs texts to draw from")
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(self.texts)))(rng)
        return [self.texts[int(i)] for i in np.asarray(drawn)]


def able_to(policy: Any) -> dict[str, bool]:
    """Whether a policy "reads" sub-tasks, "says" what to do next itself, and "remembers" for that what it said last."""
    parts = getattr(policy, "config", {}).get("model", {}).get("auxiliaries") or {}
    text = parts.get("text", {})
    says = text.get("kind") == "text" and "subtask" in text.get("learns", TEXT_KINDS)
    reads = bool(policy.batch_spec.subtask)
    return {"reads": reads, "says": says, "remembers": reads and says and bool(text.get("remembers"))}


def check_words(subtask: Any, plan: Any, able: Mapping[str, bool]) -> None:
    """Checks what a robot is told to do next: a `subtask`, or to `plan` itself, of a policy that is `able_to`.

    Raises:
      ValueError: the policy cannot, or the two contradict one another.
    """
    if not isinstance(subtask, str | None) or not isinstance(plan, bool):
        raise ValueError("'subtask' must be a text or nothing, and 'plan' true or false")
    if subtask is not None and plan:
        raise ValueError("give 'subtask', or let the policy say it ('plan'), not both")
    if (subtask is not None or plan) and not able["reads"]:
        raise ValueError("this policy takes no sub-tasks: no task tokenizer of its model has key='subtask'")
    if plan and not able["says"]:
        raise ValueError("this policy does not say what to do next: its model.auxiliaries have no 'text'; give one")


def accuracy(plans: Sequence[Plan]) -> float:
    """Share of the plans that are what the environment would have said; NaN where it says nothing."""
    judged = [plan.text == plan.wanted for plan in plans if plan.wanted is not None]
    return float(np.mean(judged)) if judged else float("nan")
