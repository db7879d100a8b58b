"""A tf.data.Dataset of trajectories in a mixture: through the train stream, by a config, with its limits named."""

import dataclasses
import logging
import sys
import types

import numpy as np
import pytest

from octo_like.common.config import freeze
from octo_like.common.defaults import batch_spec, default_config
from octo_like.common.schema import check_batch, flatten
from octo_like.common.text import TextTokenizer
from octo_like.data.dlimp import TrajectoryDataset
from octo_like.data.inputs import inputs_from_config
from octo_like.data.spec import DataError
from tests.data.streams import make_train_stream


@pytest.fixture
def module(wide_toy, monkeypatch):
    """A user's module with sources made from `wide_toy`."""
    import tensorflow as tf

    made = types.ModuleType("my_sources")

    def trajectories():
        return TrajectoryDataset.from_rlds(str(wide_toy.path), shuffle=False)

    def with_boxes(trajectory):
        corner = 0.1 * tf.cast(trajectory["_frame_index"], tf.float32)[:, None] + 0.05
        boxes = tf.concat([corner, corner, corner + 0.2, corner + 0.1], axis=1)  # outside the picture from step 9 on
        return {**trajectory, "observation": {**trajectory["observation"], "button": boxes}}

    def plain():
        return trajectories().dataset.shuffle(9)

    made.trajectories, made.plain = trajectories, plain
    made.frames = lambda: trajectories().flatten()
    made.boxed = lambda: trajectories().traj_map(with_boxes)
    made.nothing = lambda: 3
    made.tuples = lambda: tf.data.Dataset.range(3)
    made.empty = lambda: trajectories().filter(lambda t: tf.constant(False))
    made.needs = lambda path: trajectories()
    made.broken = lambda: trajectories().traj_map(lambda t: {**t, "control": t["control"] / 0.0})
    monkeypatch.setitem(sys.modules, "my_sources", made)
    monkeypatch.setattr("inspect.getsource", lambda module: "sources")
    return made


def make_config(toy, wide_toy, source="my_sources:trajectories"):
    config = default_config()
    config.batch_size = 16
    config.image_sizes = dict(primary=(20, 26), wrist=(24, 24))
    config.goal_images = ("primary",)
    config.proprio_dim = 4
    config.model = dict(heads=dict(action=dict(action_horizon=2, action_dim=6)))
    config.data.data_dir = toy.data_dir
    fields = wide_toy.fields(source=source, weight=0.5)
    config.data.datasets = {"toy": toy.fields(), "live": {**fields, "val_fraction": 0.0}}
    config.data.host_threads = 1
    return config


def inputs(config):
    tokenizer = TextTokenizer.load(config.text.model, config.text.max_length)
    config = freeze(config)
    return inputs_from_config(config, batch_spec(config), tokenizer)


@pytest.mark.parametrize("source", ["trajectories", "plain"])
def test_it_works_through_the_stream_of_a_config(module, toy, wide_toy, caplog, source):
    config = make_config(toy, wide_toy, f"my_sources:{source}")
    with caplog.at_level(logging.WARNING):
        first = inputs(config)
    assert "live: source='my_sources:" in caplog.text and "resume is approximate" in caplog.text
    assert first.stream.order_spec["approximate"] == ["live"]
    assert first.statistics["live"]["num_trajectories"] == 9 and set(first.validation) == {"toy"}
    batches = [next(first.stream) for _ in range(8)]
    second = inputs(config)
    second.resume(first.stream.order_spec, 0)
    stats = first.statistics["live"]["action"]
    steps = {step["control"].tobytes(): step for episode in wide_toy.episodes for step in episode}
    seen = 0
    for batch in batches:
        check_batch(batch, first.stream.batch_spec)
        again = next(second.stream)
        exact = batch["dataset_id"] == first.stream.dataset_names.index("toy")
        np.testing.assert_array_equal(batch["dataset_id"], again["dataset_id"])
        for (path, a), (_, b) in zip(flatten(batch), flatten(again), strict=True):
            np.testing.assert_array_equal(a[exact], b[exact], err_msg=path)
        for row in np.flatnonzero(~exact):
            action = batch["action"][row, -1, 0] * stats["std"] + stats["mean"]
            near = min(steps.values(), key=lambda step: np.abs(step["control"] - action).max())
            np.testing.assert_allclose(near["control"], action, atol=1e-4)
            seen += 1
    assert seen > 20
    first.stream.close(), second.stream.close()


def test_every_step_is_used_once_before_a_trajectory_leaves(module, wide_toy, monkeypatch):
    from octo_like.data import tf_source

    monkeypatch.setattr(tf_source, "POOL", 3)
    from octo_like.common.schema import BatchSpec

    spec = BatchSpec(1, 1, 6, {"primary": (8, 8)})
    fields = wide_toy.fields(source="my_sources:trajectories", language_key=None, val_fraction=0.0)
    total = sum(map(len, wide_toy.episodes))
    with make_train_stream({"live": fields}, spec, None, seed=0, batch_size=1, host_threads=1, prefetch=1) as stream:
        drawn = [stream.batch(i)["action"][0, 0, 0].tobytes() for i in range(2 * total)]
    counts = {key: drawn.count(key) for key in set(drawn)}
    # Two passes but for what is left in the pool, and trajectories that entered a third time.
    assert len(counts) == total and max(counts.values()) <= 3 and sum(counts.values()) == 2 * total


def test_points_of_a_source_are_told(module, wide_toy):
    from octo_like.common.schema import BatchSpec

    spec = BatchSpec(1, 1, 6, {"primary": (8, 8)}, language_length=16, points=("button",))
    keys = dict(point_keys={"button": "button"}, source="my_sources:boxed", val_fraction=0.0)
    tokenizer = TextTokenizer.load("builtin", 16)
    seen = 0
    with make_train_stream({"live": wide_toy.fields(**keys)}, spec, tokenizer, seed=0, batch_size=16) as stream:
        for _ in range(4):
            batch = next(stream)
            step, told = batch["observation"]["timestep"][:, 0], batch["task"]["pad_mask_dict"]["language_instruction"]
            known = batch["points_pad_mask"][:, 0, 0]
            np.testing.assert_array_equal(known, told & (step < 9))
            middle = np.stack([0.1 * step + 0.15, 0.1 * step + 0.1], -1)
            np.testing.assert_allclose(batch["points"][:, 0, 0][known], middle[known], atol=1e-6)
            seen += known.sum()
    assert seen > 20


def test_places_of_things_need_the_stored_geometry(module, wide_toy):
    """A letterboxed picture has them elsewhere."""
    from octo_like.common.schema import BatchSpec
    from octo_like.data.batches.texts import Texts

    spec = BatchSpec(1, 1, 6, {"primary": (8, 8)}, language_length=16, points=("button",), resize="letterbox")
    keys = dict(point_keys={"button": "button"}, source="my_sources:boxed", val_fraction=0.0)
    tokenizer = TextTokenizer.load("builtin", 16)
    with pytest.raises(DataError, match="point_keys: places .* resize='letterbox' moves"):
        make_train_stream({"live": wide_toy.fields(**keys)}, spec, tokenizer, seed=0, batch_size=16)
    texts = Texts(tokenizer)
    texts.check(dataclasses.replace(spec, points=()), ())
    texts.rows(["pick it up"])
    with pytest.raises(DataError, match="'point to <loc21><loc40>' has places"):
        texts.rows(["point to <loc21><loc40>"])


@pytest.mark.parametrize(
    "source, message",
    [
        ("my_sources:missing", "no function 'missing'"),
        ("my_sources", "source must be 'module:function'"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("my_sources:nothing", "returned a int; it must return a tf.data.Dataset"),
        ("my_sources:tuples", "it must return a tf.data.Dataset whose elements are trajectories"),
        ("my_sources:frames", "is flattened"),
        ("my_sources:empty", "gives no trajectories"),
        ("my_sources:needs", "function without arguments"),
        ("my_sources:broken", "trajectory 0 of source='my_sources:broken': action is (nan|inf|-inf) at step 0"),
    ],
)
def test_mistakes_are_named(module, toy, wide_toy, source, message):
    with pytest.raises(DataError, match=message):
        inputs(make_config(toy, wide_toy, source))


def test_what_a_source_cannot_have(module, toy, wide_toy):
    config = make_config(toy, wide_toy)
    config.data.balance_weights = True
    with pytest.raises(DataError, match="live: a source's size is not known"):
        inputs(config)
    config = make_config(toy, wide_toy)
    config.data.datasets["live"]["max_action"] = 1.0
    with pytest.raises(DataError, match="max_action cannot be given for a source"):
        inputs(config)
