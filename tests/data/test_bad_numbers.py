"""Numbers that are not finite: as if not there where a filter refuses them, counted where not, all in one report."""

import logging

import numpy as np
import pytest

from octo_like.common.schema import BatchSpec, flatten
from octo_like.data.prepare import prepare_dataset, prepare_datasets
from octo_like.data.rlds import bad_records, cache
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import DataError, DatasetSpec
from tests.data.streams import make_train_stream

SPEC = BatchSpec(2, 3, 4, {"primary": (40, 52)}, proprio_dim=4)
FILTERS = """
import tensorflow as tf

def finite(trajectory):
    return tf.reduce_all(tf.math.is_finite(trajectory["control"]))

def finite_steps(trajectory):
    return tf.reduce_all(tf.math.is_finite(trajectory["control"]), axis=-1)

def cut_texts(trajectory):  # one leaf of some episodes is shorter than the others
    good = tf.reduce_all(tf.math.is_finite(trajectory["control"]))
    return {**trajectory, "task_text": trajectory["task_text"][: tf.where(good, trajectory["_len"][0], 1)]}
"""


@pytest.fixture
def make(make_toy, episodes_like, tmp_path, monkeypatch):
    """Function that writes a dataset whose episodes of the given numbers (as written) hold a NaN, and prepares it."""
    (tmp_path / "finite_filters.py").write_text(FILTERS)
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, bad, count=20, step=1):
        episodes = episodes_like(count, seed=3)
        for number in bad:
            values = episodes[number][step]["control"]
            episodes[number][step]["control"] = np.where(np.arange(len(values)) == 2, np.nan, values).astype(np.float32)
        return make_toy(tmp_path / "data", name, episodes, num_shards=2), episodes

    return make


def prepare(toy, cache, fraction=0.01, **changes):
    spec = DatasetSpec.from_dict(toy.fields(**({"val_fraction": 0.2} | changes)))
    return prepare_dataset(toy.name, spec, toy.data_dir, str(cache), False, IndexOptions(max_bad_fraction=fraction))


def clean(toy):
    return np.array([np.isfinite(np.stack([step["control"] for step in e])).all() for e in toy.episodes])


def test_what_a_filter_refuses_is_as_if_not_there(make, tmp_path):
    """Not one NaN reaches statistics, validation or batches, and max_bad_fraction=0 has nothing to count."""
    toy, _ = make("holes", [4, 11])
    prepared = prepare(toy, tmp_path / "cache", 0.0, filter="finite_filters:finite")
    assert not prepared.damaged and len(prepared.train) + len(prepared.val) == 18
    records = {
        (f, r) for index in (prepared.train, prepared.val) for f, r in zip(index.file, index.record, strict=True)
    }
    left = {(f, r) for (f, r), good in zip(place(toy), clean(toy), strict=True) if good}
    assert records == left and len(place(toy)) == 20
    values = np.concatenate(
        [
            np.stack([s["control"] for s in toy.episodes[i]])
            for i, where in enumerate(place(toy))
            if where in {(f, r) for f, r in zip(prepared.train.file, prepared.train.record, strict=True)}
        ]
    )
    np.testing.assert_allclose(prepared.statistics["action"]["mean"], values.mean(0), rtol=1e-5, atol=1e-6)
    # The index is taken from the cache the second time: what it does not hold is no reason to build it anew.
    stamp = [path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("index.npz")]
    again = prepare(toy, tmp_path / "cache", 0.0, filter="finite_filters:finite")
    assert again.train.hash == prepared.train.hash
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("index.npz")] == stamp
    with make_train_stream({"holes": prepared}, SPEC, None, seed=0, batch_size=16, host_threads=1) as stream:
        for _ in range(10):
            batch = dict(flatten(next(stream)))
            assert all(np.isfinite(value).all() for value in batch.values() if value.dtype.kind == "f")


def place(toy):
    """(file, record) of each episode in the order on disk."""
    from octo_like.data.tf import tf

    counts = [sum(1 for _ in tf.data.TFRecordDataset(str(path))) for path in sorted(toy.path.glob("*train*tfrecord*"))]
    return [(f, r) for f, count in enumerate(counts) for r in range(count)]


def test_refused_episodes_may_have_leaves_of_any_length(make, tmp_path):
    toy, _ = make("cut", [4, 11])
    changes = dict(standardize="finite_filters:cut_texts")
    with pytest.raises(
        DataError, match=r"(?s)action has \d+ steps, but language has 1.*2 of 20 records are damaged or inv"
    ):
        prepare(toy, tmp_path / "a", **changes)
    prepared = prepare(toy, tmp_path / "b", 0.0, filter="finite_filters:finite", **changes)
    assert len(prepared.train) + len(prepared.val) == 18
    assert (
        prepare(toy, tmp_path / "b", 0.0, filter="finite_filters:finite", **changes).train.hash == prepared.train.hash
    )


def test_a_filter_of_steps_does_not_hide_a_number_from_the_windows_of_others(make, tmp_path):
    toy, _ = make("steps", [4])
    with pytest.raises(DataError, match=r"is nan at step 1, dimension 2"):
        prepare(toy, tmp_path, filter="finite_filters:finite_steps")


def test_invalid_numbers_count_as_damage_up_to_the_limit(make, tmp_path, caplog):
    toy, _ = make("some", [4, 11])
    with caplog.at_level(logging.WARNING):
        prepared = prepare(toy, tmp_path, 0.1)
    assert len(prepared.damaged) == 2 and all("is nan at step 1, dimension 2" in line for line in prepared.damaged)
    assert len(prepared.train) + len(prepared.val) == 18 and "2 of 20 records were damaged or invalid" in caplog.text
    assert all(np.isfinite(prepared.statistics["action"][key]).all() for key in ("mean", "std", "min", "max"))
    left = {(f, r) for i in (prepared.train, prepared.val) for f, r in zip(i.file, i.record, strict=True)}
    assert left == {where for where, good in zip(place(toy), clean(toy), strict=True) if good}


def test_all_offenders_are_in_one_report(make, tmp_path, monkeypatch):
    """Of both files and of both datasets; the first start names them all."""
    one, _ = make("one", [0, 3, 7, 12, 19])
    two, _ = make("two", [2, 5])
    good, _ = make("good", [])
    specs = {toy.name: DatasetSpec.from_dict(toy.fields()) for toy in (one, good, two)}
    with pytest.raises(DataError) as caught:
        prepare_datasets(specs, one.data_dir, str(tmp_path / "cache"), progress=False)
    said = str(caught.value)
    want = []
    for toy in (one, two):
        paths = sorted(toy.path.glob("*train*tfrecord*"))
        want += [
            f"{paths[f]}: episode {r}: action" for (f, r), ok in zip(place(toy), clean(toy), strict=True) if not ok
        ]
    assert [line.split(" (")[0] for line in said.splitlines() if "is nan" in line] == want
    assert "one train: 5 of 20 records" in said and "two train: 2 of 20 records" in said and "good" not in said
    # Many are listed in a file.
    monkeypatch.setattr(bad_records, "LISTED", 2)
    with pytest.raises(DataError, match="and 3 more, listed in (.*)") as caught:
        prepare(one, tmp_path / "cache")
    path = next(line for line in str(caught.value).splitlines() if "listed in" in line).split("listed in ")[1]
    assert [line.split(" (")[0] for line in open(path, encoding="utf-8")] == want[:5]


def test_a_pass_over_nothing_but_bad_records_ends_early(make, tmp_path, monkeypatch):
    toy, _ = make("all", range(20))
    monkeypatch.setattr(bad_records, "STOP_AFTER", 5)
    scanned, scan = [], cache.scan_file
    monkeypatch.setattr(cache, "scan_file", lambda *args: scanned.append(args[1]) or scan(*args))
    spec = DatasetSpec.from_dict(toy.fields())
    with pytest.raises(DataError, match="of 20 records are damaged or invalid"):
        prepare_dataset("all", spec, toy.data_dir, str(tmp_path), False, IndexOptions(workers=1))
    assert len(scanned) <= 2
