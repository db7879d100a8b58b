"""Functions of trajectories: a pipeline of one's own makes the samples that the training stream makes."""

import numpy as np
import pytest

from octo_like.common.schema import BatchSpec
from octo_like.common.text import TextTokenizer
from octo_like.data import dlimp as dl
from octo_like.data.batches.frames import decode_frames
from octo_like.data.dlimp import functions
from octo_like.data.order.keys import uniform
from octo_like.data.prepare import prepare_datasets
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf
from tests.data.streams import make_train_stream


@pytest.mark.parametrize("relative,compat,limit", [(False, False, None), (False, True, 4), (True, False, None)])
def test_samples_of_the_stream(toy, tmp_path, relative, compat, limit):
    chunks = dict(relative_to=(0, None, 2, None), chunk_length=4) if relative else {}
    spec = DatasetSpec.from_dict(toy.fields(val_fraction=0, **chunks))
    prepared = prepare_datasets({"toy": spec}, toy.data_dir, str(tmp_path), progress=False)["toy"]
    trajectories = list(dl.DLataset.from_rlds(str(toy.path), shuffle=False))
    batch_spec = BatchSpec(2, 3, 6, {"primary": (40, 52)}, ("primary",), 5, 14)
    tokenizer = TextTokenizer.load("builtin", 14)
    task = dict(keep_goal_prob=0.5, octo_compat=compat, max_goal_distance=limit)
    with make_train_stream({"toy": prepared}, batch_spec, tokenizer, seed=0, batch_size=24, **task) as stream:
        batch, samples = stream.batch(0), stream.order.samples(stream.order.batch_rows(0))
    goals = 0
    for row, (episode, t) in enumerate(
        zip(samples.episode, prepared.train.step_of(samples.episode, samples.frame), strict=True)
    ):
        x = functions.restructure(trajectories[episode], spec)
        T = int(x["action"].shape[0])
        draw = {
            purpose: tf.fill([T], np.float32(uniform(samples.key[row : row + 1], purpose)[0]))
            for purpose in ("goal", "task")
        }
        x = functions.normalize(x, prepared.statistics)
        x = functions.add_pad_mask_dict(x)
        x = functions.pad_actions_and_proprio(x, 6, 5)
        x = functions.relabel_goals(x, draw["goal"], limit)
        x = functions.drop_task_conditioning(x, draw["task"], 0.5)
        x = functions.chunk(x, 2, 3, octo_compat=compat)
        got = tf.nest.map_structure(lambda leaf, t=t: leaf[t].numpy(), x)
        want = tf.nest.map_structure(lambda leaf, row=row: leaf[row], batch)
        np.testing.assert_allclose(got["action"], want["action"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got["action_pad_mask"], want["action_pad_mask"])
        np.testing.assert_allclose(got["observation"]["proprio"], want["observation"]["proprio"], rtol=1e-5, atol=1e-6)
        for key in ("timestep", "timestep_pad_mask"):
            np.testing.assert_array_equal(got["observation"][key], want["observation"][key])
        assert got["task"]["timestep"] == want["task"]["timestep"]
        for key in ("language_instruction", "image_primary"):
            assert got["task"]["pad_mask_dict"][key] == want["task"]["pad_mask_dict"][key]
        if contents := got["task"]["image_primary"]:
            np.testing.assert_array_equal(decode_frames([contents], (40, 52))[0], want["task"]["image_primary"])
            goals += 1
    assert 3 < goals < 21


def test_mistakes_are_named():
    trajectory = {"action": tf.zeros([3, 5]), "observation": {}}
    with pytest.raises(DataError, match="action has 5 dimensions, more than max_action_dim=4"):
        functions.pad_actions_and_proprio(trajectory, 4)
    with pytest.raises(DataError, match="chunks of 4, shorter than action_horizon=5"):
        functions.chunk({"action": tf.zeros([3, 4, 2]), "observation": {}}, 2, 5)


def test_nothing_is_dropped_without_a_choice():
    trajectory = {"task": {"language_instruction": tf.constant(["go"])}, "action": tf.zeros([1, 1])}
    assert functions.drop_task_conditioning(trajectory, tf.zeros([1]), 0.5) is trajectory
