"""Language motions against a loop in NumPy, and as sub-tasks of a real dataset."""

import numpy as np
import pytest

from octo_like.common.schema import BatchSpec
from octo_like.common.text import TextTokenizer
from octo_like.common.vocabularies import Targets
from octo_like.data.motions import STAY, Motion, language_motions
from octo_like.data.spec import DataError
from tests.data.conftest import build, make_episodes
from tests.data.streams import make_train_stream

MOTIONS = (
    Motion(0, 0.5, "move forward", "move back"),
    Motion(2, 0.25, "move up", "move down"),
    Motion(1, 1.0, "open", "close"),
)


def by_hand(places, motions, steps):
    texts = []
    for t in range(len(places)):
        change = places[min(t + steps, len(places) - 1)] - places[t]
        words = [m.more if change[m.entry] > 0 else m.less for m in motions if abs(change[m.entry]) >= m.threshold]
        texts.append(" and ".join(words) or STAY)
    return texts


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_texts_are_those_of_a_loop(steps):
    places = np.cumsum(np.random.default_rng(0).normal(scale=0.3, size=(25, 3)), 0).astype(np.float32)
    texts = [text.decode() for text in language_motions(places_of(places), MOTIONS, steps=steps).numpy()]
    assert texts == by_hand(places, MOTIONS, steps) and texts[-1] == STAY and len(set(texts)) > 2


def places_of(array):
    import tensorflow as tf

    return tf.constant(array)


def test_what_makes_no_sense_is_refused():
    places = places_of(np.zeros((4, 2), np.float32))
    for motions, words in (
        ((Motion(2, 0.1, "a", "b"),), "no entry 2 of a vector of 2"),
        ((Motion(0, 0.0, "a", "b"),), "a positive threshold and two texts"),
        ((Motion(0, 0.1, "a", ""),), "a positive threshold and two texts"),
        ((), "at least one motion"),
    ):
        with pytest.raises(DataError, match=words):
            language_motions(places, motions)
    with pytest.raises(DataError, match="steps of at least 1"):
        language_motions(places, MOTIONS[:1], steps=0)


ON = (Motion(0, 0.5, "go on", "go back"),)


def with_motions(trajectory):
    """A `standardize` function: motions of the first joint."""
    return {**trajectory, "motion": language_motions(trajectory["observation"]["joints"], ON, steps=3)}


def test_a_dataset_is_told_its_motions_and_learns_them(tmp_path):
    episodes = make_episodes(4, seed=3)
    build(tmp_path, "toy_motions", {"train": episodes})
    joints = [np.stack([step["observation"]["joints"] for step in episode]) for episode in episodes]
    wanted = {text for places in joints for text in by_hand(places, ON, 3)}
    spec = BatchSpec(1, 2, 4, {"primary": (16, 16)}, (), None, 8, text_target=10, subtask=True)
    fields = dict(
        standardize="tests.data.test_motions:with_motions",
        image_keys=dict(primary="front_rgb"),
        action_key="control",
        language_key="task_text",
        text_keys=dict(subtask="motion"),
        val_fraction=0.0,
    )
    tokenizer = TextTokenizer.load("builtin", 10)
    options = dict(data_dir=str(tmp_path), seed=0, batch_size=32, targets=Targets(tokenizer))
    with make_train_stream({"toy_motions": fields}, spec, TextTokenizer.load("builtin", 8), **options) as stream:
        said = set()
        for batch in (next(stream) for _ in range(8)):
            texts = np.array(tokenizer.decode(batch["text_target"]["input_ids"]))
            said |= set(texts[batch["text_target_kind"] > 0].tolist())
    assert said == wanted == {"go on", "go back", STAY}
