"""Questions about demonstrations: what a robot does, whether it is done, what comes next.

Any robot's episodes know the answers: their instruction, their end, the sub-tasks that they are labelled with, and
which way the hand went. Asked about single pictures they are rows of pictures with words (RT-H and others ask such
questions in hindsight), a second source beside rendered scenes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from octo_like.data.motions import Motion, language_motions
from octo_like.data.tf import tf

# kind -> ways to ask it.
PROMPTS = {
    "task": ("what is the robot doing?", "what is being done?", "describe what the robot does"),
    "done": ("{task}. is it done?", "is it done? {task}", "{task}. finished?"),
    "next": ("what comes next to {task}?", "{task}. what now?"),
    "motion": ("how does the hand move now to {task}?", "{task}. which way?"),
}
KINDS = tuple(PROMPTS)
UNDONE = 0.5  # share of an episode in which it is surely not done yet
DOING = 0.25  # share after which it shows what is being done


class Question(NamedTuple):
    """About the picture of a step: its kind, what is asked and what is right."""

    step: int
    kind: str
    prompt: str
    answer: str


def questions(
    instructions: Sequence[str],
    rng: np.random.Generator,
    *,
    count: int,
    subtasks: Sequence[str] = (),
    places_td: np.ndarray | None = None,
    motions: Sequence[Motion] = (),
    steps_ahead: int = 8,
    finished: bool = True,
) -> list[Question]:
    """Questions about pictures of an episode of T steps, of all kinds that it can answer, each as often.

    Args:
      instructions: T texts; what is asked is about that of the step. Steps without one are not asked about.
      count: of questions, at most.
      subtasks: T texts, "" where there is none; or none at all.
      places_td: (T, D), what `motions` are about, see `language_motions`.
      finished: whether the last step shows it done; else nobody asks whether it is: the answer would always be no.
    """
    length = len(instructions)
    said = [text.strip().rstrip(".") for text in instructions]
    answers: dict[str, dict[int, str]] = {kind: {} for kind in KINDS}
    for step, text in enumerate(said):
        share = step / max(1, length - 1)
        if share >= DOING and step < length - 1:
            answers["task"][step] = text
        if finished and share <= UNDONE and step < length - 1:
            answers["done"][step] = "no"
        if step < len(subtasks) and subtasks[step]:
            answers["next"][step] = subtasks[step]
    if motions and places_td is not None:
        texts = language_motions(tf.constant(places_td, tf.float32), motions, steps=steps_ahead).numpy()
        answers["motion"] = {step: text.decode() for step, text in enumerate(texts[: max(1, length - 1)])}
    able = rng.permutation([kind for kind in KINDS if answers[kind]])
    asked: list[Question] = []
    used: set[tuple[str, int]] = set()
    for number in range(count if len(able) else 0):
        kind = str(able[number % len(able)])
        if kind == "done" and rng.random() < 0.5:
            step, answer = length - 1, "yes"
        else:
            choices = sorted(answers[kind])
            step = choices[int(rng.integers(len(choices)))]
            answer = answers[kind][step]
        if said[step] and (kind, step) not in used:
            used.add((kind, step))
            phrasings = PROMPTS[kind]
            prompt = phrasings[int(rng.integers(len(phrasings)))].format(task=said[step])
            asked.append(Question(step, kind, prompt, answer))
    return asked
