"""The trajectory dataset: dlimp's vocabulary, on real records."""

import numpy as np
import pytest

from octo_like.data.dlimp import TrajectoryDataset, vmap
from octo_like.data.spec import DataError
from octo_like.data.tf import tf


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

def make(builder, weights, split="train", parallel=1, shuffle=False):
    def one(split):
        return (
            dl.DLataset.from_rlds(builder, split=split, shuffle=shuffle, num_parallel_reads=parallel)
            .traj_map(standardize, num_parallel_calls=parallel, deterministic=True)
            .filter(lambda traj: tf.math.reduce_max(traj["_len"]) > 3)
            .traj_map(add_goal, parallel)
            .traj_map(restructure)
            .frame_map(lambda frame: {**frame, "seen": True}, parallel, deterministic=True)
            .flatten(num_parallel_calls=parallel)
        )
    merged = dl.DLataset.sample_from_datasets([one(split).repeat(), one(split).repeat()], weights)
    merged = merged.shuffle(50).frame_map(decode, num_parallel_calls=parallel).batch(16, drop_remainder=True)
    merged = merged.enumerate().map(lambda number, batch: {**batch, "number": number}, num_parallel_calls=parallel)
    return merged.take(3).prefetch(1).with_ram_budget(1)
"""

READS = ["train", "all", "train[:95%]", "train[2:9]+train[-3:]"]


@pytest.mark.parametrize("parallel,split,shuffle", [(1, "train", False), (2, "all", True), (4, "train[:95%]", True)])
def test_a_dlimp_script_runs_with_only_its_import_changed(toy, parallel, split, shuffle):
    """Everything in the vocabulary at once; what comes out is compared with what was written, frame by frame."""
    import tensorflow_datasets as tfds

    changed = PIPELINE.replace("import dlimp as dl", "from octo_like.data import dlimp as dl")
    script = {}
    exec(compile(changed, "pipeline", "exec"), script)  # noqa: S102 - our own text, above
    builder = tfds.builder_from_directory(str(toy.path))
    batches = list(script["make"](builder, [0.7, 0.3], split, parallel, shuffle).iterator())
    assert [int(batch["number"]) for batch in batches] == [0, 1, 2]
    for batch in batches:
        assert batch["image"].shape == batch["goal"].shape == (16, 40, 52, 3) and batch["action"].shape == (16, 4)
        for row in range(16):
            # By its action: `_traj_index` counts in the order of reading.
            (episode,) = (
                e for e in toy.episodes if any((s["control"][:3] == batch["action"][row, :3]).all() for s in e)
            )
            step = episode[batch["step"][row]]
            assert shuffle or episode is toy.episodes[batch["traj"][row]]
            assert len(episode) > 3 and batch["text"][row].decode() == step["task_text"]
            np.testing.assert_array_equal(batch["image"][row], step["observation"]["front_rgb"])
            np.testing.assert_array_equal(batch["goal"][row], episode[-1]["observation"]["front_rgb"])
            np.testing.assert_array_equal(batch["action"][row], np.append(step["control"][:3], step["control"][-1:]))


def numbers(dataset):
    """Which episodes of the toy these are, in order."""
    return [int(item["traj_metadata"]["episode_metadata"]["number"][0]) for item in dataset.iterator()]


def test_splits_are_those_of_tfds(toy):
    """Names, slices, sums and TFDS's own split objects, of a builder or a path, give the episodes that TFDS gives."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(toy.path))
    half = tfds.core.ReadInstruction("train", from_=50, to=100, unit="%")
    first, second = tfds.even_splits("train", n=2)
    for split in (*READS, half, first, second):
        read = builder.as_dataset(split=split, read_config=tfds.ReadConfig(interleave_cycle_length=1))
        want = [int(item["episode_metadata"]["number"]) for item in read]
        for source in (builder, str(toy.path)):
            assert numbers(TrajectoryDataset.from_rlds(source, split, shuffle=False)) == want, split
    assert len(want) == 11
    for parallel in (None, 1, 2, 4):
        assert sorted(numbers(TrajectoryDataset.from_rlds(builder, second, True, parallel))) == sorted(want)
    with pytest.raises(DataError, match="no split 'tst'; .*valid: train"):
        TrajectoryDataset.from_rlds(builder, "train[:2]+tst[:5]")
    with pytest.raises(DataError, match="'train.:2' is not one that TFDS can read"):
        TrajectoryDataset.from_rlds(builder, "train[:2")
    with pytest.raises(DataError, match="split 'train.:0.' is empty"):
        TrajectoryDataset.from_rlds(builder, "train[:0]")


@pytest.mark.parametrize("parallel", [1, 2, 4, 16])
def test_flatten_takes_as_many_trajectories_in_turns(parallel):
    steps = [[(n, k) for k in range(3)] for n in range(8)]
    dataset = TrajectoryDataset.from_tensor_slices(np.int64(steps))
    got = [tuple(row) for row in dataset.flatten(num_parallel_calls=parallel).iterator()]
    groups = [steps[first : first + parallel] for first in range(0, 8, parallel)]
    assert got == [row for group in groups for rows in zip(*group, strict=True) for row in rows]
    in_order = [tuple(row) for row in dataset.flatten().iterator()]
    assert in_order == [row for episode in steps for row in episode]


def test_it_is_a_dataset_of_tf_data(trajectories):
    """Every operation of tf.data gives a TrajectoryDataset again, with what it knows; class methods too."""
    frames = trajectories.flatten()
    for dataset, flat in ((trajectories, False), (frames, True)):
        for made in (
            dataset,
            dataset.take(2),
            dataset.cache(),
            dataset.enumerate(),
            dataset.apply(lambda d: d.skip(1)),
        ):
            assert isinstance(made, tf.data.Dataset) and isinstance(made, TrajectoryDataset)
            assert made.is_flattened == flat
    assert trajectories.take(2).cardinality().numpy() == tf.data.UNKNOWN_CARDINALITY
    assert TrajectoryDataset.range(5).cardinality().numpy() == 5 == len(TrajectoryDataset.range(5))
    slices = TrajectoryDataset.from_tensor_slices({"x": np.arange(6).reshape(3, 2)})
    assert [item["x"].tolist() for item in slices.flatten().batch(2).iterator()] == [[0, 1], [2, 3], [4, 5]]
    assert TrajectoryDataset.zip((frames, frames)).is_flattened
    assert sum(1 for _ in tf.data.Dataset.range(3).concatenate(TrajectoryDataset.range(2))) == 5
    chosen = TrajectoryDataset.choose_from_datasets([slices, slices], TrajectoryDataset.range(2))
    assert len(list(chosen)) == 2 and not chosen.is_flattened

    @tf.function
    def total(dataset):
        return dataset.reduce(tf.constant(0, tf.int64), lambda a, b: a + b)

    assert total(TrajectoryDataset.range(5)).numpy() == 10
    assert TrajectoryDataset.range(5).with_ram_budget(1).options().autotune.ram_budget == 2**30


@pytest.mark.parametrize("parallel", [None, 1, 2, 4])
def test_from_tfrecords(tmp_path, parallel):
    def feature(value):
        contents = value if isinstance(value, bytes) else tf.io.serialize_tensor(value).numpy()
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[contents]))

    for name, lengths in (("a", (4, 1)), ("b", (3,))):
        with tf.io.TFRecordWriter(str(tmp_path / f"{name}.tfrecord")) as writer:
            for length in lengths:
                features = {
                    "x": feature(np.arange(length * 2, dtype=np.float32).reshape(length, 2)),
                    "task": feature(np.int32(length)),
                    "one": feature(np.array([name])),
                    "text": feature(b"pick it up"),
                }
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())
    items = list(TrajectoryDataset.from_tfrecords(str(tmp_path), shuffle=False).iterator())
    assert [len(item["x"]) for item in items] == [4, 1, 3]
    for number, item in enumerate(items):
        T = len(item["x"])
        assert item["task"].tolist() == [T] * T and item["text"].tolist() == [b"pick it up"] * T
        assert item["one"].tolist() == [b"b" if number == 2 else b"a"] * T
        assert item["_len"].tolist() == [T] * T and item["_frame_index"].tolist() == list(range(T))
        assert item["_traj_index"].tolist() == [number] * T
    paths = [str(tmp_path / "b.tfrecord"), str(tmp_path / "a.tfrecord")]
    shuffled = TrajectoryDataset.from_tfrecords(paths, True, parallel).iterator()
    assert sorted(len(item["x"]) for item in shuffled) == [1, 3, 4]
    with pytest.raises(DataError, match="no TFRecord files"):
        TrajectoryDataset.from_tfrecords(str(tmp_path / "none"))


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
    assert trajectories.take(2).repeat().cardinality().numpy() < 0
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


def test_a_missing_file_is_named(copied):
    path = sorted(copied.path.glob("*tfrecord*"))[1]
    path.unlink()
    with pytest.raises(DataError, match=f"1 of 3 files of split 'train' are missing: .*{path.name}"):
        TrajectoryDataset.from_rlds(str(copied.path))


def test_errors_can_be_left_out(trajectories):
    def fail_on_short(trajectory):
        with tf.control_dependencies([tf.debugging.assert_greater(tf.shape(trajectory["control"])[0], 5)]):
            return {"x": tf.identity(trajectory["control"])}

    kept = list(trajectories.traj_map(fail_on_short).ignore_errors(log_warning=False).iterator())
    assert 0 < len(kept) < 23 and all(len(item["x"]) > 5 for item in kept)
