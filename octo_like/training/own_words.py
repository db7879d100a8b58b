"""Sub-tasks that a policy tells itself in training.

A policy that is only ever told the right sub-task does not know what to do after its own mistake (exposure bias). So
some of the samples are told what the policy itself would say just now, given the instruction, with the labels of their
actions unchanged. They are told the ids that it says; a policy at run time decodes its words and encodes them again,
which gives the same ids of all texts that it has learned to say.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from octo_like.common.text import EOS, PAD, TextTokenizer
from octo_like.common.vocabularies import tokenizer_of
from octo_like.model.octo import OctoModel
from octo_like.model.text_head import TextHead


@dataclasses.dataclass(frozen=True)
class OwnSubtasks:
    """Which samples are told the model's own words instead of the dataset's.

    Attributes:
      prob: share of the samples that are told both an instruction and what to do next.
      after: steps before that, in which the model learns to speak.
      part: of `model.auxiliaries`, which says them.
    """

    prob: float = 0.0
    after: int = 0
    part: str = "text"

    def __post_init__(self):
        if not 0.0 <= self.prob <= 1.0 or self.after < 0:
            raise ValueError(f"own_subtasks: prob in 0..1 and after of at least 0, got {self.prob} and {self.after}")


def check(own: OwnSubtasks, model: OctoModel, tokenizer: TextTokenizer | None) -> None:
    """Checks that what the model says is what it can be told.

    Raises:
      ValueError: no such part, one that learns no sub-tasks, no tokenizer of sub-tasks, or another vocabulary.
    """
    if not own.prob:
        return
    head = model.auxiliaries.get(own.part)
    if not isinstance(head, TextHead) or "subtask" not in head.learns:
        raise ValueError(f"own_subtasks: model.auxiliaries.{own.part} is no part of kind 'text' that learns sub-tasks")
    if not any(getattr(part, "key", "") == "subtask" for part in model.octo_transformer.task_tokenizers.values()):
        raise ValueError("own_subtasks: no task tokenizer of the model has key='subtask', to be told them")
    length = tokenizer.max_length if tokenizer is not None else 1
    if tokenizer is None or tokenizer_of(head.vocabulary, length).fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"own_subtasks: the vocabulary of model.auxiliaries.{own.part} is not that of config.text.model, so its "
            "ids would mean other words when they are told"
        )


def told(
    own: OwnSubtasks, model: OctoModel, params: Any, batch: Mapping[str, Any], keys_b: jax.Array, step: jax.Array
) -> Mapping[str, Any]:
    """The batch, in which some sub-tasks (`task/subtask`) are the model's own. No gradient flows through them.

    Args:
      params: of the model. keys_b: (B,) keys, which decide for each sample alone. step: of the training.
    """
    task = batch["task"]
    pads = task["pad_mask_dict"]
    drawn = jax.vmap(jax.random.uniform)(keys_b) < own.prob
    chosen = drawn & jnp.asarray(pads["subtask"], bool) & jnp.asarray(pads["language_instruction"], bool)
    if "text_target_kind" in batch:  # who is asked hears what was done before, which is not to be acted on
        chosen &= jnp.asarray(batch["text_target_kind"]) == 0
    given = jax.tree.map(jnp.asarray, task["subtask"])
    nothing = jnp.zeros_like(given["input_ids"]).at[:, 0].set(EOS)
    untold = {
        **task,
        "subtask": {"input_ids": nothing, "attention_mask": (nothing == EOS).astype(given["attention_mask"].dtype)},
        "pad_mask_dict": {**pads, "subtask": jnp.zeros_like(chosen)},
    }

    def say() -> jax.Array:
        ids: Any = model.apply({"params": params}, batch["observation"], untold, part=own.part, method="predict_text")
        return fitted(ids, given["input_ids"].shape[1]).astype(given["input_ids"].dtype)

    # Before `after`, and where nobody is told anything, the model is not asked at all.
    asked = (step >= own.after) & chosen.any()
    ids = jax.lax.cond(asked, say, lambda: given["input_ids"])
    chosen &= asked
    said = {"input_ids": ids, "attention_mask": (_ended_before(ids) == 0).astype(given["attention_mask"].dtype)}
    subtask = jax.tree.map(lambda own, other: jnp.where(chosen[:, None], own, other), said, given)
    silent = chosen & (subtask["input_ids"][:, 0] == EOS)
    pads = {**pads, "subtask": jnp.asarray(pads["subtask"], bool) & ~silent}
    return {**batch, "task": {**task, "subtask": subtask, "pad_mask_dict": pads}}


def fitted(ids: jax.Array, length: int) -> jax.Array:
    """Ids (B, M) of texts as a tokenizer of `length` gives them, (B, length): padded, or cut with the end kept."""
    ids = jnp.pad(ids, ((0, 0), (0, max(0, length - ids.shape[1]))), constant_values=PAD)[:, :length]
    ends = (ids == EOS).any(-1)
    return ids.at[:, -1].set(jnp.where(ends, ids[:, -1], EOS))


def _ended_before(ids: jax.Array) -> jax.Array:
    """(B, L) number of ends before each id."""
    ends = (ids == EOS).astype(jnp.int32)
    return jnp.cumsum(ends, axis=-1) - ends
