"""The trajectory dataset: dlimp's vocabulary, on real records."""

import numpy as np
import pytest

from octo_like.data import transforms
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf
from octo_like.data.trajectory import TrajectoryDataset, vmap


@pytest.fixture(scope="module")
def trajectories(toy):
    return TrajectoryDataset.from_rlds(str(toy.path), shuffle=False)


def test_from_rlds(toy, trajectories):
    items = list(trajectories.iterator())
    assert len(items) == len(toy.episodes)
    for number, (item, episode) in enumerate(zip(items, toy.episodes, strict=True)):
        T = len(episode)
        np.testing.assert_array_equal(item["control"], np.stack([step["control"] for step in episode]))
        assert item["observation"]["front_rgb"].shape == (T,) and item["observation"]["front_rgb"][0][:4] == b"\x89PNG"
        assert item["_len"].tolist() == [T] * T and item["_frame_index"].tolist() == list(range(T))
        assert item["_traj_index"].tolist() == [number] * T
        assert item["traj_metadata"]["episode_metadata"]["number"].shape == (T,)
        assert item["is_last"].tolist() == [False] * (T - 1) + [True]


def test_shuffled_files_hold_the_same_trajectories(toy, trajectories):
    import tensorflow_datasets as tfds

    shuffled = TrajectoryDataset.from_rlds(tfds.builder_from_directory(str(toy.path)), shuffle=True)
    a, b = ({item["control"].tobytes() for item in d.iterator()} for d in (trajectories, shuffled))
    assert a == b and len(a) == 23


def test_a_pipeline_in_dlimp_style(toy, trajectories):
    """from_rlds, traj_map, filter, flatten, frame_map, shuffle, batch: only the import says who we are."""

    def relabel(trajectory):
        # In place, as such functions often are.
        trajectory["action"] = trajectory.pop("control")[:, :3] * 2
        trajectory["observation"] = {"image": trajectory["observation"]["front_rgb"]}
        return {key: trajectory[key] for key in ("observation", "action", "task_text")}

    def decode(frame):
        frame["observation"]["image"] = tf.io.decode_image(frame["observation"]["image"], expand_animations=False)
        return frame

    dataset = (
        trajectories.traj_map(relabel)
        .filter(lambda trajectory: tf.shape(trajectory["action"])[0] >= 5)
        .traj_map(lambda t: t, num_parallel_calls=2)
        .flatten()
        .filter(lambda frame: frame["task_text"] != "")
        .frame_map(decode, num_parallel_calls=2)
        .shuffle(20, seed=1)
        .batch(8)
        .prefetch(1)
        .with_ram_budget(1)
    )
    assert dataset.is_flattened
    want = [step for e in toy.episodes if len(e) >= 5 for step in e if step["task_text"]]
    batches = list(dataset.iterator(prefetch=0))
    actions = np.concatenate([batch["action"] for batch in batches])
    images = np.concatenate([batch["observation"]["image"] for batch in batches])
    assert images.shape == (len(want), 40, 52, 3)
    expected = {(step["control"][:3] * 2).tobytes(): step["observation"]["front_rgb"] for step in want}
    for action, image in zip(actions, images, strict=True):
        np.testing.assert_array_equal(expected.pop(action.tobytes()), image)
    assert not expected
    first = next(iter(trajectories))
    assert "control" in first  # the functions changed their own copies only


PIPELINE = """
import dlimp as dl
import tensorflow as tf

def standardize(traj):
    traj["action"] = tf.concat([traj["control"][:, :3], tf.clip_by_value(traj["control"][:, -1:], 0, 1)], axis=-1)
    return traj

def add_goal(traj):
    traj["goal"] = tf.nest.map_structure(lambda x: tf.repeat(x[-1:], tf.shape(x)[0], 0), traj["observation"])
    return traj

def restructure(traj):
    return {"image": traj["observation"]["front_rgb"], "goal": traj["goal"]["front_rgb"], "action": traj["action"],
            "text": traj["task_text"], "step": traj["_frame_index"], "traj": traj["_traj_index"]}

def decode(frame):
    for key in ("image", "goal"):
        frame[key] = tf.io.decode_png(frame[key])
    return frame

def make(builder, weights):
    def one(split):
        return (
            dl.DLataset.from_rlds(builder, split=split, shuffle=False, num_parallel_reads=1)
            .traj_map(standardize, num_parallel_calls=1)
            .filter(lambda traj: tf.math.reduce_max(traj["_len"]) > 3)
            .traj_map(add_goal)
            .traj_map(restructure)
            .flatten(num_parallel_calls=1)
        )
    merged = dl.DLataset.sample_from_datasets([one("train").repeat(), one("train").repeat()], weights)
    merged = merged.shuffle(50).frame_map(decode, num_parallel_calls=1).batch(16, drop_remainder=True).enumerate()
    return merged.map(lambda number, batch: {**batch, "number": number}).take(3).prefetch(1).with_ram_budget(1)
"""


def test_a_dlimp_script_runs_with_only_its_import_changed(toy):
    """Everything in the vocabulary at once; what comes out is compared with what was written, frame by frame."""
    import tensorflow_datasets as tfds

    changed = PIPELINE.replace("import dlimp as dl", "from octo_like.data import trajectory as dl")
    script = {}
    exec(compile(changed, "pipeline", "exec"), script)  # noqa: S102 - our own text, above
    batches = list(script["make"](tfds.builder_from_directory(str(toy.path)), [0.7, 0.3]).iterator())
    assert [int(batch["number"]) for batch in batches] == [0, 1, 2]
    for batch in batches:
        assert batch["image"].shape == batch["goal"].shape == (16, 40, 52, 3) and batch["action"].shape == (16, 4)
        for row in range(16):
            episode = toy.episodes[batch["traj"][row]]
            step = episode[batch["step"][row]]
            assert len(episode) > 3 and batch["text"][row].decode() == step["task_text"]
            np.testing.assert_array_equal(batch["image"][row], step["observation"]["front_rgb"])
            np.testing.assert_array_equal(batch["goal"][row], episode[-1]["observation"]["front_rgb"])
            np.testing.assert_array_equal(batch["action"][row], np.append(step["control"][:3], step["control"][-1:]))


def test_other_operations_of_tf_data(trajectories):
    window = trajectories.flatten().frame_map(lambda frame: {"x": frame["control"]}).padded_batch(4)
    assert window.is_flattened and next(window.iterator())["x"].shape == (4, 4)
    assert trajectories.enumerate().element_spec[0].shape == ()
    assert trajectories.take(3).reduce(0, lambda count, _: count + 1).numpy() == 3
    with pytest.raises(AttributeError, match="no attribute 'shufle'"):
        trajectories.shufle(3)


def test_frame_map_before_flatten_is_the_same(trajectories):
    def double(frame):
        return {"x": frame["control"] * 2, "text": tf.strings.upper(frame["task_text"])}

    before = trajectories.frame_map(double).flatten()
    after = trajectories.flatten().frame_map(double)
    for a, b in zip(before.iterator(), after.iterator(), strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])
        assert a["text"] == b["text"]


def test_vmap():
    got = vmap(lambda x: {"y": x["a"] + 1})({"a": tf.range(5)})
    assert got["y"].numpy().tolist() == [1, 2, 3, 4, 5]


def test_sizes(trajectories):
    assert len(list(trajectories.take(3).iterator())) == 3
    assert len(list(trajectories.skip(20).iterator())) == 3
    assert len(list(trajectories.take(2).repeat(3).cache().iterator())) == 6
    assert len(list(trajectories.take(2).concatenate(trajectories.take(1)).iterator())) == 3
    assert trajectories.apply(lambda d: d.enumerate()).map(lambda i, t: i).take(2).iterator().__next__() == 0
    assert trajectories.take(2).repeat().cardinality() < 0
    assert "observation" in trajectories.element_spec


def test_sample_from_datasets(trajectories):
    a, b = trajectories.take(1).repeat().traj_map(lambda t: {"d": t["_len"] * 0}), trajectories.take(1).repeat()
    mixed = TrajectoryDataset.sample_from_datasets([a, b.traj_map(lambda t: {"d": t["_len"] * 0 + 1})], [3, 1], seed=0)
    drawn = [int(item["d"][0]) for item in mixed.take(400).iterator()]
    assert 60 < sum(drawn) < 140
    with pytest.raises(DataError, match="all flattened or none"):
        TrajectoryDataset.sample_from_datasets([a, b.flatten()])
    with pytest.raises(DataError, match="all flattened or none"):
        TrajectoryDataset.sample_from_datasets([])


def test_misuse_is_named(toy, trajectories):
    flat = trajectories.flatten()
    with pytest.raises(DataError, match="use frame_map"):
        flat.traj_map(lambda t: t)
    with pytest.raises(DataError, match="flattened already"):
        flat.flatten()
    with pytest.raises(DataError, match="only one of the two"):
        flat.concatenate(trajectories)
    with pytest.raises(DataError, match="no split 'test'.*valid: train"):
        TrajectoryDataset.from_rlds(str(toy.path), "test")


def test_errors_can_be_left_out(trajectories):
    def fail_on_short(trajectory):
        with tf.control_dependencies([tf.debugging.assert_greater(tf.shape(trajectory["control"])[0], 5)]):
            return {"x": tf.identity(trajectory["control"])}

    kept = list(trajectories.traj_map(fail_on_short).ignore_errors(log_warning=False).iterator())
    assert 0 < len(kept) < 23 and all(len(item["x"]) > 5 for item in kept)


def test_transforms_compose_to_windows_and_goals(toy, trajectories):
    spec = DatasetSpec.from_dict(toy.fields())
    dataset = (
        trajectories.traj_map(lambda t: transforms.restructure(t, spec))
        .traj_map(transforms.add_pad_mask_dict)
        .traj_map(lambda t: transforms.pad_actions_and_proprio(t, 6, 5))
        .traj_map(lambda t: transforms.relabel_goals(t, tf.fill([tf.shape(t["action"])[0]], 0.999)))
        .traj_map(lambda t: transforms.drop_task_conditioning(t, tf.fill([tf.shape(t["action"])[0]], 0.9), 0.5))
        .traj_map(lambda t: transforms.chunk(t, 2, 3))
        .flatten()
    )
    frames = list(dataset.iterator())
    assert len(frames) == sum(map(len, toy.episodes))
    frame = frames[0]
    T = len(toy.episodes[0])
    assert frame["action"].shape == (2, 3, 6) and frame["observation"]["proprio"].shape == (2, 5)
    assert frame["observation"]["timestep_pad_mask"].tolist() == [False, True]
    assert frame["task"]["timestep"] == T - 1
    text = toy.episodes[0][0]["task_text"]
    assert frame["task"]["language_instruction"].decode() == text
    assert frame["task"]["pad_mask_dict"]["image_primary"] == (not text)
