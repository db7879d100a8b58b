"""Sensors that the schema has no names for, from records to batches, statistics and masks."""

import dataclasses

import numpy as np
import pytest

from octo_like.common import normalization
from octo_like.common.schema import BatchSpec, check_batch, synthetic_batch
from octo_like.common.synthetic import SyntheticStream
from octo_like.data.check.report import range_table
from octo_like.data.dlimp import functions
from octo_like.data.in_memory import prepare_in_memory
from octo_like.data.prepare import prepare_dataset, prepare_datasets
from octo_like.data.spec import DataError, DatasetSpec, specs_from_config
from tests.data import sensors
from tests.data.streams import make_train_stream

SPEC = BatchSpec(
    2, 2, 3, {"primary": (32, 32)}, extra_observations={"force": (6,), "touch": (1,), "skin": (2, 3), "sonar": (4,)}
)
KEYS = {"force": "force_torque", "touch": "contact", "skin": "observation/taxels", "sonar": None}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    episodes = sensors.make_episodes(12)
    return sensors.build(tmp_path_factory.mktemp("sensors"), "push", episodes), episodes


def fields(**changes):
    return {
        "name": "push",
        "image_keys": {"primary": "image"},
        "extra_keys": KEYS,
        "language_key": None,
        "normalization": "normal",
        "action_normalization_mask": (False, False, False),
        "val_fraction": 0.2,
    } | changes


def stream_of(data_dir, datasets, spec=SPEC, **options):
    return make_train_stream(datasets, spec, None, data_dir=data_dir, seed=0, batch_size=16, **options)


def test_batches_hold_what_is_stored_normalised_and_statistics_are_of_training_episodes(dataset):
    data_dir, episodes = dataset
    with stream_of(data_dir, {"push": fields()}) as stream:
        batches, statistics = [next(stream) for _ in range(3)], stream.statistics["push"]
        trained = {int(n) for n in range(12)} - {int(row[0]) for row in _validation_numbers(stream.datasets["push"])}
    stored = {
        "force": [step["observation"]["force_torque"] for n in trained for step in episodes[n]],
        "touch": [[step["observation"]["contact"]] for n in trained for step in episodes[n]],
        "skin": [step["observation"]["taxels"].reshape(-1) for n in trained for step in episodes[n]],
    }
    assert set(statistics["extra"]) == set(stored)
    for name, rows in stored.items():
        want = normalization.compute_statistics(np.array(rows, np.float32))
        for field, values in want.items():
            np.testing.assert_allclose(statistics["extra"][name][field], values, rtol=1e-5, atol=1e-6)
    for batch in batches:
        check_batch(batch, SPEC)
        masks = batch["observation"]["pad_mask_dict"]
        for name, shape in SPEC.extra_observations.items():
            got = batch["observation"][name]
            if name == "sonar":
                assert not got.any() and not masks[name].any()
                continue
            raw = sensors.of(episodes, batch, KEYS[name].removeprefix("observation/")).reshape(16, 2, *shape)
            stats = statistics["extra"][name]
            mean, std = (np.asarray(stats[field]).reshape(shape) for field in ("mean", "std"))
            np.testing.assert_allclose(got, (raw - mean) / std, rtol=1e-4, atol=1e-5)
            assert masks[name].all()


def _validation_numbers(prepared):
    for episode in range(len(prepared.val)):
        raw = prepared.function.read(prepared.val.files[0], int(prepared.val.offset[episode]), ())
        yield raw.action[0]


def test_sensors_change_no_other_part_of_a_batch_and_no_order(dataset):
    """The same samples with and without them; a stream goes on as it would have; old indices stay valid."""
    data_dir, _ = dataset
    plain = dataclasses.replace(SPEC, extra_observations={})
    with stream_of(data_dir, {"push": fields()}) as stream:
        first, second = next(stream), next(stream)
        order = stream.order_spec["order"]["datasets"][0]
        stream.seek(16)
        again = next(stream)
    for name in SPEC.extra_observations:
        np.testing.assert_array_equal(second["observation"][name], again["observation"][name])
    with stream_of(data_dir, {"push": fields(extra_keys={})}, plain) as stream:
        without = next(stream)
        assert stream.order_spec["order"]["datasets"][0].keys() == order.keys()
    np.testing.assert_array_equal(first["action"], without["action"])
    np.testing.assert_array_equal(first["observation"]["image_primary"], without["observation"]["image_primary"])
    np.testing.assert_array_equal(first["sample_id"], without["sample_id"])
    assert "extra_keys" not in DatasetSpec.from_dict(fields(extra_keys={})).transform_fields()


def test_a_dataset_without_the_sensor_is_masked(dataset):
    data_dir, _ = dataset
    with stream_of(data_dir, {"push": fields(), "bare": fields(extra_keys={})}) as stream:
        batch = next(stream)
    bare = batch["dataset_id"] == 1
    assert bare.any() and not bare.all()
    for name in ("force", "touch", "skin"):
        mask = batch["observation"]["pad_mask_dict"][name]
        np.testing.assert_array_equal(mask, np.broadcast_to(~bare[:, None], mask.shape))
        assert not batch["observation"][name][bare].any() and batch["observation"][name][~bare].any()


def test_memory_and_tf_data_give_the_same_values(dataset, tmp_path, monkeypatch):
    data_dir, episodes = dataset
    columns = [
        {
            "action": np.stack([step["action"] for step in episode]),
            "observation": {
                key: np.stack([step["observation"][key] for step in episode]) for key in episode[0]["observation"]
            },
        }
        for episode in episodes
    ]
    spec = DatasetSpec.from_dict(fields(val_fraction=0.0))
    files = prepare_dataset("push", spec, data_dir, progress=False)
    memory = prepare_in_memory("push", spec, {"train": columns})
    (tmp_path / "sensor_source.py").write_text(
        "import tensorflow as tf\n"
        "EPISODES = []\n"
        "def trajectories():\n"
        "    parts = [tf.data.Dataset.from_tensors(one) for one in EPISODES]\n"
        "    step_first = lambda x: tf.TensorSpec([None, *x.shape[1:]], x.dtype)\n"
        "    step_first = lambda x: tf.TensorSpec([None, *x.shape[1:]], x.dtype)\n"
        "    shapes = tf.nest.map_structure(step_first, parts[0].element_spec)\n"
        "    return tf.data.Dataset.from_generator(lambda: iter(EPISODES), output_signature=shapes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import sensor_source

    sensor_source.EPISODES = columns
    live = prepare_dataset(
        "push",
        DatasetSpec.from_dict(fields(source="sensor_source:trajectories", val_fraction=0.05)),
        "",
        progress=False,
    )
    assert files.function.extra_shapes == memory.function.extra_shapes == live.function.extra_shapes
    for prepared in (memory, live):
        for name, stats in files.statistics["extra"].items():
            for field, values in stats.items():
                np.testing.assert_allclose(prepared.statistics["extra"][name][field], values, rtol=1e-5, atol=1e-6)
    with stream_of(None, {"push": live}) as stream:
        batch = next(stream)
    raw = sensors.of(episodes, batch, "force_torque")
    stats = live.statistics["extra"]["force"]
    np.testing.assert_allclose(
        batch["observation"]["force"], (raw - stats["mean"]) / stats["std"], rtol=1e-4, atol=1e-4
    )
    with stream_of(None, {"push": memory}) as stream:
        batch = next(stream)
    raw = sensors.of(episodes, batch, "contact")[..., None]
    stats = memory.statistics["extra"]["touch"]
    np.testing.assert_allclose(
        batch["observation"]["touch"], (raw - stats["mean"]) / stats["std"], rtol=1e-4, atol=1e-4
    )


def test_trajectory_functions_pass_sensors_on(dataset):
    """The pipeline for users of `TrajectoryDataset` gives what the stream gives."""
    data_dir, _ = dataset
    spec = DatasetSpec.from_dict(fields())
    prepared = prepare_dataset("push", spec, data_dir, progress=False)
    from octo_like.data.rlds import records

    split = records.open_split("push", data_dir)
    record = records.read_record(split.files[0], np.int64(0))
    trajectory = functions.restructure(records.parse_episode(record, split.features), spec)
    normal = functions.normalize(trajectory, prepared.statistics)
    for name in ("force", "touch", "skin"):
        stats = prepared.statistics["extra"][name]
        want = normalization.normalize_sensor(trajectory["observation"][name].numpy(), stats)
        np.testing.assert_allclose(normal["observation"][name].numpy(), want, rtol=1e-5, atol=1e-6)


def test_mistakes_are_named(dataset, tmp_path):
    data_dir, _ = dataset

    def first(spec=SPEC, **changes):
        with stream_of(data_dir, {"push": fields(**changes)}, spec) as stream:
            return next(stream)

    with pytest.raises(DataError, match=r"push: no sensor 'force' .*'force_torqe'; did you mean 'force_torque'"):
        first(extra_keys={"force": "force_torqe"})
    with pytest.raises(DataError, match=r"'image' cannot be the sensor 'force'"):
        first(extra_keys={"force": "image"})
    with pytest.raises(DataError, match=r"sensor 'force' .* has the shape \(6,\).*they hold \(3,\).*force=6"):
        first(dataclasses.replace(SPEC, extra_observations={**SPEC.extra_observations, "force": (3,)}))
    with pytest.raises(DataError, match=r"sensor 'wind'.*valid: force, skin, sonar, touch"):
        first(extra_keys={"wind": "force_torque"})
    with pytest.raises(DataError, match="extra_keys: 'proprio' cannot be the name of a sensor"):
        DatasetSpec.from_dict(fields(extra_keys={"proprio": "force_torque"}))
    for name in ("proprio", "timestep", "image_left", "depth_x", "force_pad_mask", "action"):
        with pytest.raises(ValueError, match=f"extra_observations: '{name}' cannot be the name of a sensor"):
            dataclasses.replace(SPEC, extra_observations={name: (1,)})
    for shape in ((), (0,), (2.5,)):
        with pytest.raises(ValueError, match="extra_observations.force is .*expected the shape"):
            dataclasses.replace(SPEC, extra_observations={"force": shape})
    broken = sensors.make_episodes(3)
    broken[1][2]["observation"]["force_torque"][4] = np.nan
    folder = sensors.build(tmp_path, "push", broken)
    with pytest.raises(DataError, match=r"episode \d: force \('force_torque'\) is nan at step 2, dimension 4"):
        prepare_datasets(specs_from_config({"push": fields()}), folder, progress=False)


def test_synthetic_streams_saved_specs_statistics_and_reports_know_sensors(dataset):
    data_dir, _ = dataset
    check_batch(synthetic_batch(SPEC, 3), SPEC)
    assert BatchSpec.from_json(SPEC.to_json()) == SPEC
    assert SyntheticStream(SPEC, 2, 0, 10).statistics["synthetic"]["extra"]["skin"]["mean"].shape == (6,)
    prepared = prepare_dataset("push", DatasetSpec.from_dict(fields()), data_dir, progress=False)
    back = normalization.from_json(normalization.to_json({"push": prepared.statistics}))
    np.testing.assert_array_equal(back["push"]["extra"]["skin"]["p99"], prepared.statistics["extra"]["skin"]["p99"])
    assert "force[5]" in range_table(prepared)
