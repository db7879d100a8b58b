"""Paths of the hand as sub-tasks of a real dataset, whose standardize function computes them."""

import numpy as np
import pytest
import tensorflow as tf

from octo_like.common import hand_paths
from octo_like.common.schema import BatchSpec
from octo_like.common.text import TextTokenizer
from octo_like.common.vocabularies import Targets
from octo_like.data.errors import DataError
from octo_like.data.paths import paths_ahead
from tests.data.conftest import build, make_episodes
from tests.data.streams import make_train_stream


def with_paths(trajectory):
    """A `standardize` function: the first two joints are the place, the third closes."""
    joints = trajectory["observation"]["joints"]
    return {**trajectory, "path": paths_ahead(0.5 + joints[:, :2] / 8, joints[:, 2] > 0)}


def test_a_dataset_is_told_its_paths_and_learns_them(tmp_path):
    episodes = make_episodes(4, seed=3)
    build(tmp_path, "toy_paths", {"train": episodes})
    joints = [np.stack([step["observation"]["joints"] for step in episode]) for episode in episodes]
    wanted = {text for j in joints for text in hand_paths.paths_ahead(0.5 + j[:, :2] / 8, j[:, 2] > 0)}
    assert len(wanted) > 5
    tokenizer = TextTokenizer.load("words", 20)
    spec = BatchSpec(1, 2, 4, {"primary": (16, 16)}, (), None, 20, text_target=20, subtask=True)
    fields = dict(
        standardize="tests.data.test_paths:with_paths",
        image_keys=dict(primary="front_rgb"),
        action_key="control",
        language_key="task_text",
        text_keys=dict(subtask="path"),
        val_fraction=0.0,
    )
    options = dict(data_dir=str(tmp_path), seed=0, batch_size=32, targets=Targets(tokenizer))
    said, told = set(), set()
    with make_train_stream({"toy_paths": fields}, spec, tokenizer, **options) as stream:
        for batch in (next(stream) for _ in range(16)):
            texts = np.array(tokenizer.decode(batch["text_target"]["input_ids"]))
            said |= set(texts[batch["text_target_kind"] > 0].tolist())
            told |= set(tokenizer.decode(batch["task"]["subtask"]["input_ids"]))
    assert said <= wanted and told - {""} <= wanted  # drawn at random: not all of them
    assert len(said) > len(wanted) / 2 and len(told) > len(wanted) / 2


def test_what_makes_no_sense_is_refused():
    places, closed = tf.zeros((4, 2)), tf.zeros((4,), tf.bool)
    for arguments, options, words in (
        ((tf.zeros((4, 3)), closed), {}, r"expected places \(T, 2\)"),
        ((places, tf.zeros((4, 1), tf.bool)), {}, r"closed \(T,\)"),
        ((places, closed), {"points": 3}, "3 points for 2 events"),
    ):
        with pytest.raises(DataError, match=words):
            paths_ahead(*arguments, **options)
