"""Index, statistics and splits on real TFRecord files, and everything that can be wrong with them."""

import json
import os
import shutil
import stat

import numpy as np
import pytest

from octo_like.common import normalization, storage
from octo_like.common.errors import ConfigError
from octo_like.common.storage import StorageError
from octo_like.data.inputs import Inputs
from octo_like.data.prepare import prepare_dataset
from octo_like.data.rlds import cache, cache_files, records
from octo_like.data.spec import DataError, DatasetSpec, specs_from_config


def spec_of(toy, **changes):
    return DatasetSpec.from_dict(toy.fields(**changes))


def prepare(toy, cache_dir=None, **changes):
    return prepare_dataset("toy", spec_of(toy, **changes), toy.data_dir, cache_dir, progress=False)


def stacked(episodes, *keys):
    def leaf(step):
        for key in keys:
            step = step[key]
        return np.atleast_1d(step)

    return [np.stack([leaf(step) for step in episode]) for episode in episodes]


def test_index_matches_what_was_written(toy):
    whole = prepare(toy, val_fraction=0)
    assert len(whole.train) == 23 and len(whole.val) == 0
    assert len(whole.train.files) == 3
    np.testing.assert_array_equal(whole.train.frames, [len(e) for e in toy.episodes])
    np.testing.assert_array_equal(whole.train.has_language, [bool(e[0]["task_text"]) for e in toy.episodes])
    for number, episode in enumerate(toy.episodes):
        path = whole.train.files[whole.train.file[number]]
        read = whole.function.from_file(path, int(whole.train.offset[number]))
        np.testing.assert_array_equal(read["action"], np.stack([step["control"] for step in episode]))
        joints = np.stack([[*step["observation"]["joints"], step["observation"]["aperture"]] for step in episode])
        np.testing.assert_array_equal(read["proprio"], joints.astype(np.float32))
        assert [text.decode() for text in read["language"].numpy()] == [step["task_text"] for step in episode]
        assert set(read["images"]) == {"primary", "wrist"}
        # Frames come encoded: a PNG and a JPEG.
        assert read["images"]["primary"].numpy()[0][:4] == b"\x89PNG"
        assert read["images"]["wrist"].numpy()[0][:2] == b"\xff\xd8"


def test_statistics_are_those_of_the_training_episodes(toy):
    prepared = prepare(toy, action_normalization_mask=(True, True, True, False))
    held = set(range(23)) - {toy_number(toy, prepared.train, i) for i in range(len(prepared.train))}
    assert len(held) == len(prepared.val) == 5  # 0.2 of 23
    actions = np.concatenate([a for i, a in enumerate(stacked(toy.episodes, "control")) if i not in held])
    wide = actions.astype(np.float64)
    stats = prepared.statistics["action"]
    for key, want in {
        "mean": wide.mean(0),
        "std": wide.std(0),
        "min": wide.min(0),
        "max": wide.max(0),
        "p01": np.quantile(wide, 0.01, 0),
        "p99": np.quantile(wide, 0.99, 0),
    }.items():
        np.testing.assert_allclose(stats[key], want, rtol=1e-6, atol=1e-7)
    assert stats["mask"].tolist() == [True, True, True, False]
    assert prepared.statistics["proprio"]["mean"].shape == (4,)
    assert prepared.statistics["num_transitions"] == len(actions)
    assert prepared.statistics["num_trajectories"] == 18


def toy_number(toy, table, episode):
    """Position in `toy.episodes` of an episode of an index."""
    lengths = json.loads((toy.path / "dataset_info.json").read_text())["splits"][0]["shardLengths"]
    return sum(map(int, lengths[: table.file[episode]])) + int(table.record[episode])


def test_validation_is_keyed_and_disjoint(toy):
    a, b = prepare(toy), prepare(toy, weight=3.0, normalization="bounds")
    np.testing.assert_array_equal(a.val.record_hash, b.val.record_hash)
    assert not set(a.val.record_hash) & set(a.train.record_hash)
    assert len(set(a.val.record_hash) | set(a.train.record_hash)) == 23
    small = prepare(toy, val_fraction=1e-6)
    assert len(small.val) == 1  # at least one
    assert set(small.val.record_hash) <= set(a.val.record_hash)


def test_demos_are_so_many_in_all(toy):
    """What is held out is among them."""
    before = set()
    for number in (3, 10, 20, 23):
        chosen = prepare(toy, num_demos=number)
        train, val = set(chosen.train.record_hash), set(chosen.val.record_hash)
        assert len(train) + len(val) == number and not train & val and len(val) == max(1, round(0.2 * number))
        assert before < train | val
        assert chosen.statistics["num_trajectories"] == len(train)
        before = train | val
    assert len(prepare(toy, num_demos=23, val_fraction=0).train) == 23
    with pytest.raises(DataError, match="num_demos=24, but only 23 episodes exist"):
        prepare(toy, num_demos=24)
    with pytest.raises(DataError, match=r"1 episode.* none left to train on .*\(num_demos=1\); set val_fraction=0"):
        prepare(toy, num_demos=1)


def test_demos_are_keyed_and_nested(toy):
    """As earlier versions counted."""
    of = dict(num_demos_of="training")
    subsets = [set(prepare(toy, num_demos=n, **of).train.record_hash) for n in (3, 10, 18)]
    assert [len(s) for s in subsets] == [3, 10, 18]
    assert subsets[0] < subsets[1] < subsets[2]
    val = set(prepare(toy).val.record_hash)
    assert not subsets[2] & val
    assert set(prepare(toy, num_demos=3, **of).val.record_hash) == val  # the same validation for any number
    one = prepare(toy, num_demos=3, **of)
    assert one.statistics["num_trajectories"] == 3


def test_named_validation_split_and_joined_splits(make_toy, episodes_like, tmp_path):
    toy = make_toy(tmp_path, "toy_two", {"train": episodes_like(6), "val": episodes_like(4, seed=9)})
    prepared = prepare(toy, val_split="val")
    assert (len(prepared.train), len(prepared.val)) == (6, 4)
    joined = prepare(toy, split="train+val", val_fraction=0)
    assert len(joined.train) == 10
    assert set(prepared.instructions) == {"press the red button", "open the drawer", ""}


def test_newest_version_is_the_default(copied):
    newer = copied.path.parent / "1.10.0"
    shutil.copytree(copied.path, newer)
    info = json.loads((newer / "dataset_info.json").read_text())
    (newer / "dataset_info.json").write_text(json.dumps(info | {"version": "1.10.0"}))
    shutil.copytree(newer, copied.path.parent / "1.9.0")
    assert records.find_dataset("toy_buttons", copied.data_dir).endswith("1.10.0")
    assert records.find_dataset("toy_buttons", copied.data_dir, "1.0.0").endswith("1.0.0")


# ---------------------------------------------------------------- the cache


def test_cache_is_used_and_never_stale(copied, monkeypatch):
    first = prepare(copied)
    (cached,) = (copied.path / ".octo_like").iterdir()
    assert {path.name.split("-")[0] for path in cached.iterdir()} == {"index.npz", "rows.npy", "statistics"}
    monkeypatch.setattr(cache, "_build", lambda *a: pytest.fail("the index was built again"))
    again = prepare(copied, val_fraction=0.5)  # another subset needs no second pass
    assert again.train.hash != first.train.hash
    monkeypatch.undo()
    without = prepare(copied, proprio_keys=("joints",))
    assert without.function.proprio_dim == 3 and without.statistics["proprio"]["mean"].shape == (3,)
    assert len(list((copied.path / ".octo_like").iterdir())) == 2


def test_read_only_data_is_left_alone(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    os.chmod(copied.path, stat.S_IRUSR | stat.S_IXUSR)
    try:
        prepare(copied)
    finally:
        os.chmod(copied.path, stat.S_IRWXU)
    assert not (copied.path / ".octo_like").exists()
    assert list((tmp_path / "home").rglob("*.npz"))
    prepare(copied, cache_dir=str(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere").rglob("train-*/index.npz"))
    assert not (copied.path / ".octo_like").exists()


@pytest.mark.parametrize("name", ["index.npz", "rows.npy", "statistics-*.npz"])
@pytest.mark.parametrize("how", ["empty", "cut", "flipped", "not that format", "missing"])
def test_a_damaged_cache_is_made_anew(copied, name, how, caplog):
    """Whatever becomes of its files: the log names the file, and the numbers are those of the first time."""
    want = prepare(copied)
    (cached,) = (copied.path / ".octo_like").iterdir()
    for file in cached.glob("statistics-*.npz") if name == "rows.npy" else ():
        file.unlink()  # rows are read when statistics are made
    (file,) = cached.glob(name)
    content = file.read_bytes()
    half = len(content) // 2
    damaged = {
        "empty": b"",
        "cut": content[:half],
        "flipped": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        "not that format": b"something else",
    }
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(damaged[how])
    with caplog.at_level("INFO"):
        again = prepare(copied)
    harmless = how == "flipped" and "anew" not in caplog.text  # e.g. the date of an entry of a zip file
    assert harmless or how == "missing" or str(file) in caplog.text
    assert again.train.hash == want.train.hash
    for part in ("action", "proprio"):
        for field, values in want.statistics[part].items():
            np.testing.assert_array_equal(again.statistics[part][field], values)
    assert harmless or file.read_bytes() == content


@pytest.mark.parametrize("bit", range(0, 12))
def test_a_flipped_bit_of_the_rows_changes_no_statistics(copied, bit):
    want = prepare(copied)
    (cached,) = (copied.path / ".octo_like").iterdir()
    for file in cached.glob("statistics-*.npz"):
        file.unlink()
    rows = cached / "rows.npy"
    content = bytearray(rows.read_bytes())
    content[128 + (bit * 97) % (len(content) - 128)] ^= 1 << bit % 8
    rows.write_bytes(content)
    again = prepare(copied)
    for field, values in want.statistics["action"].items():
        np.testing.assert_array_equal(again.statistics["action"][field], values)


def test_a_cache_without_a_checksum_of_its_rows_gets_one(copied, caplog):
    """As it was written before there were checksums: it is used, and from then on verified."""
    want = prepare(copied)
    (cached,) = (copied.path / ".octo_like").iterdir()
    arrays = cache_files.load_arrays(str(cached / "index.npz"))
    text = json.loads(str(arrays["text"]))
    del text["rows_sha256"]
    cache_files.save_arrays(str(cached / "index.npz"), arrays | {"text": np.array(json.dumps(text))})
    with caplog.at_level("INFO"):
        assert prepare(copied).train.hash == want.train.hash
    assert "was written without a checksum" in caplog.text and (cached / "rows.sha256").is_file()
    caplog.clear()
    rows = bytearray((cached / "rows.npy").read_bytes())
    rows[-1] ^= 1
    (cached / "rows.npy").write_bytes(rows)
    next(cached.glob("statistics-*.npz")).unlink()
    with caplog.at_level("INFO"):
        again = prepare(copied)
    assert "made anew" in caplog.text and not (cached / "rows.sha256").exists()
    np.testing.assert_array_equal(again.statistics["action"]["mean"], want.statistics["action"]["mean"])


def test_nothing_half_written_is_left(copied):
    path = sorted(copied.path.glob("*tfrecord*"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError):
        prepare(copied)
    left = {path.name for path in copied.path.rglob("*.*") if ".octo_like" in str(path) and path.is_file()}
    assert left <= {"00000.npz", "00002.npz"}  # parts of the good files, for the next attempt


# ---------------------------------------------------------------- user functions


@pytest.mark.parametrize("name", ["2.0.0", "2.0.0/dataset_info.json", "", "data"])
@pytest.mark.parametrize("times", [1, 1000], ids=["once", "for good"])
def test_a_failing_look_does_not_choose_another_version(copied, monkeypatch, caplog, name, times):
    """Nor does it say that there is no such dataset, or no such data_dir."""
    root = copied.path.parent
    shutil.copytree(copied.path, root / "2.0.0")
    failing = str(root / name).rstrip("/") if name != "data" else copied.data_dir
    real, left = os.stat, [times]

    def stat(path, *arguments, **named):
        if str(path) == failing and left[0]:
            left[0] -= 1
            raise OSError(5, "I/O error")
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(storage, "PAUSES", (0.0,) * 3)
    if times == 1:
        with caplog.at_level("INFO"):
            assert records.find_dataset(copied.name, copied.data_dir) == str(root / "2.0.0")
        assert not left[0] and "version 2.0.0, the newest one (older: 1.0.0)" in caplog.text
    else:
        with pytest.raises(StorageError, match="the storage does not answer"):
            records.find_dataset(copied.name, copied.data_dir)


def test_a_resume_names_another_version():
    class Stream:
        order_spec = {"order": {"index_hash": "a"}}
        position = None

        def adopt(self, saved):
            pass

        def seek(self, position):
            self.position = position

    inputs = Inputs(Stream(), {}, {}, {}, versions={"toy": "2.0.0"})
    with pytest.raises(ConfigError, match=r"(?s)index_hash: 'b' -> 'a'.*toy: version 1.0.0 before, 2.0.0 now"):
        inputs.resume({"order": {"index_hash": "b"}}, 4, {"toy": "1.0.0"})
    inputs.resume({"order": {"index_hash": "a"}}, 4, {"toy": "1.0.0"})  # the same episodes
    assert inputs.stream.position == 4


def cut_gripper(trajectory):
    """Used by name below: drops the last action dimension and the first step."""
    import tensorflow as tf

    trajectory = tf.nest.map_structure(lambda x: x[1:], trajectory)
    trajectory["command"] = trajectory["control"][:, :3]
    return trajectory


def unequal(trajectory):
    trajectory["control"] = trajectory["control"][1:]
    return trajectory


def stateful(trajectory):
    import tensorflow as tf

    trajectory["control"] = trajectory["control"] + tf.random.normal([4])
    return trajectory


def broken(trajectory):
    return {"observation": trajectory["observation"]["no_such_key"]}


@pytest.fixture
def here(monkeypatch):
    """Makes this file importable by the name that a config would give."""
    import sys

    monkeypatch.setitem(sys.modules, "user_functions", sys.modules[__name__])
    return "user_functions"


def test_user_function(toy, here, tmp_path):
    prepared = prepare(toy, str(tmp_path), standardize=f"{here}:cut_gripper", action_key="command", val_fraction=0)
    np.testing.assert_array_equal(prepared.train.frames, [len(e) - 1 for e in toy.episodes])
    np.testing.assert_array_equal(prepared.train.raw_steps, [len(e) for e in toy.episodes])
    assert prepared.function.action_dim == 3
    want = np.concatenate([a[1:, :3] for a in stacked(toy.episodes, "control")])
    np.testing.assert_allclose(prepared.statistics["action"]["mean"], want.astype(np.float64).mean(0), rtol=1e-6)


def test_stateful_randomness_is_detected(toy, here, tmp_path):
    split = records.open_split(toy.name, toy.data_dir)
    assert records.EpisodeFunction(spec_of(toy, standardize=f"{here}:stateful"), split.features).random_ops
    assert not records.EpisodeFunction(spec_of(toy), split.features).random_ops


# ---------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(name="toy_buttonz"), "toy_buttonz.*did you mean 'toy_buttons'"),
        (dict(version="3.0.0"), "no version '3.0.0'.*valid: 1.0.0"),
        (dict(split="trian"), "no split 'trian'.*did you mean 'train'"),
        (dict(split="train[:10%]"), "no split.*val_fraction and num_demos"),
        (dict(val_split="test"), "no split 'test'.*valid: train"),
        (
            dict(image_keys={"primary": "front"}),
            "no image of camera 'primary' 'front'.*did you mean 'front_rgb'.*hand_rgb",
        ),
        (dict(image_keys={"primary": "joints"}), "'joints' cannot be the image of camera 'primary': it is float32"),
        (dict(proprio_keys=("joint",)), "no proprio key 'joint'.*did you mean 'joints'"),
        (dict(proprio_keys=("front_rgb",)), "'front_rgb' cannot be the proprio key: it is string.*aperture, joints"),
        (dict(action_key="is_first"), "'is_first' cannot be the action: it is bool.*control"),
        (dict(action_key="action"), "no action 'action'.*control"),
        (
            dict(language_key="language_instruction"),
            "no instruction .a string per step. 'language_instruction'.*task_text",
        ),
        (dict(language_key="control"), "'control' cannot be the instruction"),
        (dict(action_normalization_mask=(True,) * 7), "has 7 entries, but 'control' has 4"),
        (dict(num_demos=100), "num_demos=100, but only 23 episodes"),
        (dict(num_demos=100, num_demos_of="training"), "num_demos=100, but only 18 training"),
        (dict(num_demos_of="al"), "num_demos_of 'al'; did you mean 'all'"),
        (dict(standardize="no_such_dataset"), "no registry entry 'no_such_dataset'"),
        (dict(standardize="no_such_module:f"), "cannot import 'no_such_module'"),
        (dict(standardize="user_functions:cut_griper"), "did you mean 'cut_gripper'"),
        (dict(standardize="user_functions:unequal"), "action has . steps, but camera primary has"),
        (dict(standardize="user_functions:broken"), "user_functions:broken.*no_such_key"),
        (dict(normalization="gauss"), "'gauss'.*bounds, normal"),
        (dict(num_demos=0), "num_demos"),
        (dict(val_fraction=1.0), "val_fraction"),
        (dict(weight=-1.0), "weight"),
        (dict(weigth=1.0), "unknown field 'weigth'.*did you mean 'weight'"),
    ],
)
def test_bad_specs(toy, here, tmp_path, changes, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        prepare(toy, str(tmp_path), **changes)


def test_missing_folder(toy, tmp_path):
    with pytest.raises(DataError, match="data_dir .*nowhere.* does not exist"):
        prepare_dataset("toy", spec_of(toy), str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="data_dir .*file' is a file, expected the folder"):
        prepare_dataset("toy", spec_of(toy), str(tmp_path / "file"))
    with pytest.raises(DataError, match="not in"):
        prepare_dataset("toy", spec_of(toy), str(tmp_path))
    (tmp_path / toy.name / "1.0.0.incompleteABC").mkdir(parents=True)
    with pytest.raises(DataError, match="unfinished or interrupted"):
        prepare_dataset("toy", spec_of(toy), str(tmp_path))


def test_only_datasets_are_offered(copied):
    """TFDS keeps what it downloads beside the datasets."""
    data_dir = copied.path.parent.parent
    (data_dir / "downloads" / "extracted").mkdir(parents=True, exist_ok=True)
    (data_dir / "toy_unfinished" / "1.0.0.incompleteABC").mkdir(parents=True)
    with pytest.raises(DataError, match=r"'toy_butons' is not in .*; did you mean 'toy_buttons'\? valid: toy_buttons$"):
        prepare_dataset("toy", spec_of(copied, name="toy_butons"), str(data_dir))
    with pytest.raises(DataError, match=r"'download' is not in .*; valid: toy_buttons$"):
        prepare_dataset("toy", spec_of(copied, name="download"), str(data_dir))


def test_empty_mixture():
    with pytest.raises(DataError, match="empty"):
        specs_from_config({})


@pytest.mark.parametrize(
    "field,value,valid",
    [
        ("weight", "1", "a number, got '1'"),
        ("weight", None, "a number, got None"),
        ("weight", True, "a number, got True"),
        ("val_fraction", "0.1", "a number"),
        ("num_demos", 2.5, "an integer or None"),
        ("chunk_length", "4", "an integer or None"),
        ("max_action", "3", "a number or None"),
        ("depth_scale", "mm", "a number or None"),
    ],
)
def test_a_value_of_the_wrong_kind_names_its_dataset(field, value, valid):
    with pytest.raises(DataError, match=f"mine: {field} must be {valid}"):
        DatasetSpec.from_dict({field: value}, "mine")


def test_numbers_of_numpy_are_numbers():
    spec = DatasetSpec.from_dict(dict(weight=np.float32(0.5), num_demos=np.int64(3)), "mine")
    assert spec.weight == 0.5 and spec.num_demos == 3


def test_episodes_that_count_twice_are_noticed(caplog):
    """Two keys with the same files and head; not with another split, version, filter or head."""
    one = dict(name="bridge", weight=2.0)
    specs_from_config({"a": one, "b": dict(name="bridge", image_keys={"primary": "image"})})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "a and b are both split 'train' of 'bridge' for head 'action'" in record.getMessage()
    assert "count twice in the mixture, with weights 2 and 1" in record.getMessage()
    caplog.clear()
    changes = (dict(split="more"), dict(version="2.0.0"), dict(filter="my:good"), dict(head="other"))
    specs_from_config({"a": one} | {f"b{n}": one | change for n, change in enumerate(changes)})
    specs_from_config({"s": dict(source="my:live"), "t": dict(source="my:other"), "a": one})
    assert not caplog.records
    specs_from_config({"s": dict(source="my:live"), "t": dict(source="my:live")})
    assert "s and t are both source 'my:live'" in caplog.text


def test_truncated_file_names_file_episode_and_byte(copied):
    path = sorted(copied.path.glob("*tfrecord*"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=rf"{path.name}: episode \d+ \(byte \d+\) is damaged or truncated"):
        prepare(copied)


def test_file_cut_between_records(copied):
    whole = prepare(copied, val_fraction=0)
    last = np.flatnonzero(whole.train.file == 0)[-1]
    path = whole.train.files[0]
    with open(path, "rb+") as file:
        file.truncate(int(whole.train.offset[last]))
    shutil.rmtree(copied.path / ".octo_like")
    with pytest.raises(DataError, match=rf"{os.path.basename(path)}: \d+ episodes, but dataset_info.json says \d+"):
        prepare(copied)


def test_flipped_byte(copied):
    path = sorted(copied.path.glob("*tfrecord*"))[0]
    content = bytearray(path.read_bytes())
    content[500] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=rf"{path.name}: episode 0 \(byte 0\) is damaged"):
        prepare(copied)


def test_missing_file(copied):
    sorted(copied.path.glob("*tfrecord*"))[1].unlink()
    with pytest.raises(DataError, match="1 of 3 files.*are missing.*00001-of-00003"):
        prepare(copied)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("key", ["control", "joints"])
def test_non_finite_values_name_episode_step_and_dimension(make_toy, episodes_like, tmp_path, value, key):
    episodes = episodes_like(4)
    where = episodes[2][1] if key == "control" else episodes[2][1]["observation"]
    where[key] = where[key].copy()
    where[key][2] = value
    toy = make_toy(tmp_path, "toy_nan", episodes)
    number = next(i for i, e in enumerate(toy.episodes) if e is episodes[2])
    with pytest.raises(DataError, match=rf"episode {number}: .*{key}.* is {value} at step 1, dimension 2"):
        prepare(toy)


def test_empty_split(make_toy, episodes_like, tmp_path):
    toy = make_toy(tmp_path, "toy_few", {"train": episodes_like(3), "spare": episodes_like(1)})
    info_path = toy.path / "dataset_info.json"
    info = json.loads(info_path.read_text())
    for split in info["splits"]:
        if split["name"] == "spare":
            split["shardLengths"] = ["0"]
    info_path.write_text(json.dumps(info))
    with pytest.raises(DataError, match="split 'spare' is empty"):
        prepare(toy, split="spare")


def test_no_usable_steps(make_toy, episodes_like, tmp_path, here):
    toy = make_toy(tmp_path, "toy_short", episodes_like(3, min_steps=1, max_steps=1))
    with pytest.raises(DataError, match="no usable steps"):
        prepare(toy, standardize=f"{here}:cut_gripper", action_key="command")


def test_single_episode_cannot_be_held_out(make_toy, episodes_like, tmp_path):
    toy = make_toy(tmp_path, "toy_one", episodes_like(1))
    with pytest.raises(DataError, match="none left to train on.*val_fraction=0"):
        prepare(toy)
    assert len(prepare(toy, val_fraction=0).train) == 1


def test_not_rlds(make_toy, episodes_like, tmp_path):
    toy = make_toy(tmp_path, "toy_moves", episodes_like(2), rlds=False)
    with pytest.raises(DataError, match="not an RLDS dataset.*moves"):
        prepare(toy)


def test_unreadable_info(copied):
    (copied.path / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="cannot read dataset_info.json"):
        prepare(copied)


# ---------------------------------------------------------------- the real Bridge sample


def test_bridge_statistics_match_the_reference(shared, tmp_path):
    golden = np.load(shared / "golden" / "pipeline.npz")

    def check(prefix, statistics, tolerance):
        for key in ("action", "proprio"):
            for field in normalization.FIELDS:
                np.testing.assert_allclose(
                    statistics[key][field], golden[f"{prefix}/{key}/{field}"], rtol=tolerance, atol=tolerance
                )
        assert statistics["num_transitions"] == golden[f"{prefix}/num_transitions"]
        assert statistics["num_trajectories"] == golden[f"{prefix}/num_trajectories"]

    data_dir = str(shared / "bridge_debug")
    fields = dict(standardize="bridge_dataset", val_fraction=0)
    for prefix, split in (
        ("bridge/statistics_all/upstream", "train+val"),
        ("bridge/statistics_train_only/computed", "train"),
    ):
        spec = DatasetSpec.from_dict(fields | {"split": split}, "bridge_dataset")
        # Upstream accumulates in float32, hence not 1e-7.
        check(prefix, prepare_dataset("bridge", spec, data_dir, str(tmp_path), progress=False).statistics, 2e-6)
    raw = DatasetSpec.from_dict(dict(split="train+val", val_fraction=0, proprio_keys=("state",)), "bridge_dataset")
    prepared = prepare_dataset("bridge", raw, data_dir, str(tmp_path), progress=False)
    check("bridge/statistics_raw_all/upstream", prepared.statistics, 2e-6)
    assert set(prepared.instructions) and "" not in prepared.instructions


@pytest.mark.parametrize("field", ["proprio_keys", "bgr_slots"])
def test_a_list_that_is_given_as_one_word_is_not_taken_for_its_letters(field):
    with pytest.raises(DataError, match=rf"arm: {field} is a list, got 'state'; write \('state',\)"):
        DatasetSpec.from_dict({"name": "arm", field: "state"})


def test_bridge_trajectories_match_the_reference(shared, tmp_path):
    golden = np.load(shared / "golden" / "pipeline.npz")
    spec = DatasetSpec.from_dict(dict(standardize="bridge_dataset", val_fraction=0), "bridge_dataset")
    prepared = prepare_dataset("bridge", spec, str(shared / "bridge_debug"), str(tmp_path), progress=False)
    records = sorted({key.split("/")[2] for key in golden.files if key.startswith("bridge/train/record")})
    assert len(records) >= 3
    statistics = {
        key: {field: golden[f"bridge/statistics_all/upstream/{key}/{field}"] for field in normalization.FIELDS}
        for key in ("action", "proprio")
    }
    for record in records:
        number = int(record.removeprefix("record"))
        table = prepared.train
        read = prepared.function.from_file(table.files[0], int(table.offset[number]))
        assert read["language"].numpy()[0] == golden[f"bridge/train/{record}/language"]
        for key in ("action", "proprio"):
            value = read[key].numpy()
            np.testing.assert_allclose(value, golden[f"bridge/train/{record}/standardized/upstream/{key}"], atol=1e-6)
            normal = normalization.normalize(value, statistics[key])
            want = golden[f"bridge/train/{record}/normalized/upstream/{key}"]
            np.testing.assert_allclose(normal, want, rtol=1e-5, atol=1e-5)
