"""An index that is not what the files and functions are any more: by its name, and by a look at a few records."""

import hashlib
import inspect
import itertools
import sys
import types

import numpy as np
import pytest

from octo_like.common import sources
from octo_like.data.batches.episodes import load_episode
from octo_like.data.prepare import prepare_dataset
from octo_like.data.rlds import records, spot_check
from octo_like.data.rlds.cache import cache_folder, load_index
from octo_like.data.rlds.records import EpisodeFunction
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf


def opened(toy, **changes):
    spec = DatasetSpec.from_dict(toy.fields(**changes))
    split = records.open_split(spec.name, toy.data_dir, spec.version, spec.split)
    return split, EpisodeFunction(spec, split.features)


def test_the_folder_is_keyed_by_the_helpers_of_a_function(toy, tmp_path, monkeypatch):
    """What the user's module imports counts, at any depth and from packages; what is installed does not."""
    package = tmp_path / "helping"
    (package / "deep").mkdir(parents=True)
    function = "import numpy\nfrom helping.scale import scaled\n\ndef f(t):\n    return scaled(t)\n"
    scaled = "    from .deep import factor\n    return {**t, 'control': t['control'] * factor.F}\n"
    files = {
        tmp_path / "my_transform.py": function,
        package / "__init__.py": "",
        package / "scale.py": f"def scaled(t):\n{scaled}",
        package / "deep" / "__init__.py": "",
        package / "deep" / "factor.py": "F = 1.0\n",
        package / "unused.py": "",
    }
    for path, text in files.items():
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    folders = [cache_folder(*opened(toy, standardize="my_transform:f"), str(tmp_path))]
    for path in list(files)[1:]:
        path.write_text(path.read_text() + "# another\n")
        folders.append(cache_folder(*opened(toy, standardize="my_transform:f"), str(tmp_path)))
    assert len(set(folders)) == len(files) - 1 and folders[-1] == folders[-2]  # all but the one that is not imported
    alone = types.ModuleType("alone")
    monkeypatch.setattr("inspect.getsource", lambda module: "import numpy, json\nfrom octo_like.data import rlds\n")
    assert sources.source_hash(alone) == hashlib.sha256(inspect.getsource(alone).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- what the cache's name does not see


def actions_changed(path, change):
    """Writes a file anew, as large as before, with other actions."""
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            example = tf.train.Example.FromString(record)
            values = example.features.feature["steps/control"].float_list.value
            values[:] = [change(value) for value in values]
            writer.write(example.SerializeToString())


def test_data_built_again_in_the_same_size_is_indexed_again(copied, tmp_path, caplog):
    spec = DatasetSpec.from_dict(copied.fields(max_action=50.0))
    options = dict(cache_dir=str(tmp_path / "cache"), progress=False)
    before = prepare_dataset("toy", spec, copied.data_dir, **options)
    same = prepare_dataset("toy", spec, copied.data_dir, **options)
    assert same.train.hash == before.train.hash and "made anew" not in caplog.text
    for path in copied.path.glob("*tfrecord*"):
        size = path.stat().st_size
        actions_changed(path, lambda value: value + 1.0)
        assert path.stat().st_size == size
    after = prepare_dataset("toy", spec, copied.data_dir, **options)
    assert after.train.folder == before.train.folder  # the name does not see it
    assert "the record is another one than when it was indexed" in caplog.text and after.train.folder in caplog.text
    fresh = prepare_dataset("toy", spec, copied.data_dir, str(tmp_path / "fresh"), progress=False)
    assert after.train.hash == fresh.train.hash
    for key, value in fresh.statistics["action"].items():
        np.testing.assert_array_equal(after.statistics["action"][key], value)
    assert not np.array_equal(after.statistics["action"]["mean"], before.statistics["action"]["mean"])
    # In the middle of a run it is an error that says what to delete.
    with pytest.raises(DataError, match=f"not the one that was indexed: toy has been.*delete {before.train.folder}"):
        load_episode(before, before.train, 0, (), None)


def test_a_function_with_other_values_is_indexed_again(toy, tmp_path, monkeypatch, caplog):
    """What it reads besides its source has changed: no hash knows."""
    scale = {"by": 1.0}
    module = types.ModuleType("scaling")
    module.f = lambda t: {**t, "control": t["control"] * scale["by"]}
    monkeypatch.setitem(sys.modules, "scaling", module)
    monkeypatch.setattr("inspect.getsource", lambda module: "the same")
    spec = DatasetSpec.from_dict(toy.fields(standardize="scaling:f"))
    before = prepare_dataset("toy", spec, toy.data_dir, str(tmp_path), progress=False)
    scale["by"] = 2.0
    after = prepare_dataset("toy", spec, toy.data_dir, str(tmp_path), progress=False)
    assert "standardize='scaling:f' gives other values than when it was indexed" in caplog.text
    assert after.train.folder == before.train.folder
    mean = before.statistics["action"]["mean"]
    np.testing.assert_allclose(after.statistics["action"]["mean"], 2 * mean, rtol=1e-6)


def test_a_function_that_never_says_the_same_is_refused(toy, tmp_path, monkeypatch):
    count = itertools.count()
    module = types.ModuleType("counting")

    def f(t):
        number = tf.numpy_function(lambda control: np.float32(next(count)), [t["control"]], tf.float32, stateful=False)
        return {**t, "control": t["control"] + tf.ensure_shape(number, [])}

    module.f = f
    monkeypatch.setitem(sys.modules, "counting", module)
    monkeypatch.setattr("inspect.getsource", lambda module: "the same")
    spec = DatasetSpec.from_dict(toy.fields(standardize="counting:f"))
    with pytest.raises(
        DataError, match="(?s)standardize='counting:f' gives other values.*still so.*do not give the same values"
    ):
        prepare_dataset("toy", spec, toy.data_dir, str(tmp_path), progress=False)


def test_a_record_damaged_since_leaves_the_index_alone(copied, tmp_path, caplog):
    """It is replaced while training; an index without it would be another order. Without a good one it is no use."""
    spec = DatasetSpec.from_dict(copied.fields())
    options = dict(cache_dir=str(tmp_path / "cache"), progress=False, options=IndexOptions(max_bad_fraction=1.0))
    whole = load_index(*opened(copied), options["cache_dir"], progress=False).index
    before = prepare_dataset("toy", spec, copied.data_dir, **options)
    picked = spot_check._pick(whole)
    assert len(set(whole.file[picked])) == 3 and picked == spot_check._pick(whole)
    for number, episode in enumerate(picked):
        with open(whole.files[whole.file[episode]], "rb+") as file:
            file.seek(int(whole.offset[episode]))
            file.write(b"\xff" * 12)  # its length
        after = prepare_dataset("toy", spec, copied.data_dir, **options)
        assert (after.train.hash == before.train.hash) == (number < 2), caplog.text
    assert "none of 3 records can be read where they were indexed" in caplog.text
