"""What a policy is asked to do, as arrays: instructions, goal images, embeddings, sub-tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common.schema import check_tree
from octo_like.common.text import check_text
from octo_like.common.words import suggest
from octo_like.policy.observations import as_array, check_layout


def make_tasks(
    policy: Any,
    texts: Sequence[str] | None,
    goals: Mapping[str, np.ndarray] | None,
    embeddings: np.ndarray | None,
    subtasks: Sequence[str] | None,
) -> dict[str, Any]:
    """`Policy.create_tasks`."""
    spec = policy.batch_spec
    if goals is not None and not isinstance(goals, Mapping):
        raise ValueError(f'goals must be a dict, {{"image_...": (B, h, w, 3)}}, got {goals!r:.60}')
    if texts is None and not goals and embeddings is None and subtasks is None:
        raise ValueError("a task needs texts, goals or both")
    texts = None if texts is None else _texts(texts, "texts", "instructions")
    subtasks = None if subtasks is None else _texts(subtasks, "subtasks", "sub-tasks")
    if subtasks is not None and not spec.subtask:
        raise ValueError("this policy takes no subtasks: no task tokenizer of its model has key='subtask'")
    valid_goals = [f"image_{slot}" for slot in spec.goal_images]
    for key in goals or {}:
        if key not in valid_goals:
            raise ValueError(f"this policy takes no goal {key!r}; {suggest(key, valid_goals)}")
    goals = {key: _pictures(key, goal) for key, goal in (goals or {}).items()}
    if texts is not None and spec.language_embedding is not None:
        raise ValueError(f"this policy takes embeddings {spec.language_embedding} of instructions, not texts")
    if texts is not None and spec.language_length is None:
        raise ValueError(f"this policy takes no language; valid goals: {valid_goals}")
    if embeddings is not None and spec.language_embedding is None:
        raise ValueError("this policy takes no language embeddings")
    if (texts is not None or subtasks is not None) and policy.text_tokenizer is None:
        raise ValueError(
            "this policy has no text tokenizer; load it with text_model=, the sentencepiece model of its language "
            "encoder (T5's spiece.model)"
        )
    if embeddings is not None:
        embeddings = as_array(embeddings, "embeddings", numbers=True)
        if embeddings.ndim == 0 or embeddings.dtype.kind not in "fiu" or not np.isfinite(np.asarray(embeddings)).all():
            shape = ", ".join(map(str, ("B", *(spec.language_embedding or ()))))
            raise ValueError(
                f"embeddings: expected finite numbers ({shape}), got {embeddings.shape} {embeddings.dtype}"
            )
    given = [len(x) for x in (texts, embeddings, subtasks) if x is not None]
    sizes = {len(g) for g in goals.values()} | set(given)
    if len(sizes) != 1:
        raise ValueError(f"texts and goals must have the same batch size, got sizes {sorted(sizes)}")
    b = sizes.pop()
    if b == 0:
        raise ValueError("a task needs at least one row, got goals or embeddings of none")
    task: dict[str, Any] = {"pad_mask_dict": {}, "timestep": np.zeros(b, np.int32)}
    if spec.language_length is not None:
        texts = [""] * b if texts is None else texts
        task["language_instruction"] = token_ids(policy, texts)
        task["pad_mask_dict"]["language_instruction"] = np.array([bool(text.strip()) for text in texts])
        if spec.subtask:
            subtasks = [""] * b if subtasks is None else subtasks
            task["subtask"] = token_ids(policy, subtasks)
            task["pad_mask_dict"]["subtask"] = np.array([bool(text.strip()) for text in subtasks])
    if spec.language_embedding is not None:
        task["pad_mask_dict"]["language_instruction"] = np.full(b, embeddings is not None)
        if embeddings is None:
            embeddings = np.zeros((b, *spec.language_embedding), np.float32)
        task["language_instruction"] = np.asarray(embeddings, np.float32)
    for slot in spec.goal_images:
        key = f"image_{slot}"
        task["pad_mask_dict"][key] = np.full(b, key in goals)
        task[key] = goals.get(key, np.zeros((b, *spec.image_sizes[slot], 3), np.uint8))
    check_tree(task, spec.task(), where="task")
    encoded = policy.language_program(policy.params, task) if spec.language_length is not None else {}
    if encoded:
        task["language_instruction"]["encoded"] = encoded
    return task


def _texts(given: Any, what: str, kind: str) -> list[str]:
    """A list of the B texts in a list, a tuple or an array (B,). Raises ValueError for anything else."""
    if isinstance(given, str) or not hasattr(given, "__len__") or (hasattr(given, "shape") and not given.shape):
        raise ValueError(f"{what} must be a list of {kind}, one per row of the batch, not {given!r:.40}")
    if not (len(given) and all(isinstance(text, str) for text in given)):
        raise ValueError(f"{what} must be strings, at least one, got {list(given)!r}")
    for text in given:
        check_text(text)
    return [str(text) for text in given]


def _pictures(key: str, goal: Any) -> np.ndarray:
    """Goal images (B, h, w, 3) of (h, w, 3) or as they are. Raises ValueError for what is no picture."""
    if isinstance(goal, list | tuple) and all(hasattr(each, "dtype") for each in goal):  # B pictures
        try:
            goal = np.stack(goal) if goal else np.zeros(0)
        except ValueError as error:
            raise ValueError(f"goals/{key}: {error}") from None
    goal = np.asarray(as_array(goal, f"goals/{key}"))
    goal = goal[None] if goal.ndim == 3 else goal
    check_layout(goal, f"goals/{key}")
    if goal.ndim != 4:
        raise ValueError(f"goals/{key}: expected (B, h, w, 3) or (h, w, 3) uint8, got {goal.shape} {goal.dtype}")
    return goal


def token_ids(policy: Any, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """{"input_ids", "attention_mask"} (B, L) of B texts."""
    if policy.text_tokenizer is not None:
        return policy.text_tokenizer.encode(texts)
    # No instruction is </s> and padding, whatever the words are.
    assert policy.batch_spec.language_length is not None
    ids = np.zeros((len(texts), policy.batch_spec.language_length), np.int32)
    ids[:, 0] = 1
    return {"input_ids": ids, "attention_mask": ids.copy()}
