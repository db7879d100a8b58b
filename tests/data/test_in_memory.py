"""Episodes in memory: the same batches as from RLDS, without TensorFlow, and clear errors."""

import dataclasses
import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from octo_like.common.schema import BatchSpec, check_batch, flatten
from octo_like.common.text import TextTokenizer
from octo_like.data import in_memory
from octo_like.data.episode import as_points
from octo_like.data.spec import DataError, DatasetSpec
from tests.data.streams import make_train_stream, make_val_iterators

SPEC = BatchSpec(
    window_size=2,
    action_horizon=3,
    action_dim=7,
    image_sizes={"primary": (64, 64)},
    goal_images=("primary",),
    proprio_dim=7,
    language_length=14,
    points=("target", "plate"),
)
POINTS = {"target": "target_point", "plate": "plate_point"}
NAMES = ("tabletop_pusher", "tabletop_gripper")


def specs(**changes):
    def one(name):
        fields = dict(name=name, image_keys={"primary": "image"}, val_split="val", point_keys=POINTS) | changes
        return DatasetSpec.from_dict(fields | (dict(proprio_keys=("state",)) if name == NAMES[1] else {}))

    return {name: one(name) for name in NAMES}


@pytest.fixture(scope="module")
def rlds(tmp_path_factory, repository):
    """The built-in world's data as RLDS, and the same episodes, as TFDS decodes them, in memory."""
    import tensorflow_datasets as tfds

    spec = importlib.util.spec_from_file_location("tabletop_build_in_memory", repository / "data/tabletop/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    folder = tmp_path_factory.mktemp("tabletop")
    build.build(folder, [(name, 7, 2) for name in NAMES], workers=0)
    episodes = {}
    for name in NAMES:
        builder = tfds.builder_from_directory(str(next((folder / name).iterdir())))
        episodes[name] = {}
        for split in ("train", "val"):
            found = tfds.as_numpy(
                builder.as_dataset(split=split, read_config=tfds.ReadConfig(interleave_cycle_length=1))
            )
            episodes[name][split] = [in_memory._columns({"steps": list(e["steps"])}, f"{name} {split}") for e in found]
    return str(folder), episodes


def stream(datasets, **options):
    tokenizer = TextTokenizer.load("builtin", 14)
    return make_train_stream(datasets, SPEC, tokenizer, seed=3, batch_size=8, episodes_mixed=4, num_lanes=2, **options)


def test_training_batches_are_bitwise_those_of_rlds(rlds):
    folder, episodes = rlds
    held = {name: in_memory.prepare_in_memory(name, spec, episodes[name]) for name, spec in specs().items()}
    with stream(specs(), data_dir=folder, decode="fast") as files, stream(held, decode="fast") as memory:
        for name in NAMES:
            for part, fields in files.statistics[name].items():
                if isinstance(fields, dict):
                    for field in fields:
                        np.testing.assert_array_equal(fields[field], memory.statistics[name][part][field])
        with_points = 0
        for number in range(25):
            if number == 20:
                for one in (files, memory):
                    one.seek(8 * 400)  # another pass over the data
            want, got = next(files), next(memory)
            check_batch(got, SPEC)
            for (path, a), (other, b) in zip(flatten(want), flatten(got), strict=True):
                assert path == other
                np.testing.assert_array_equal(a, b, err_msg=path)
            with_points += int(got["points_pad_mask"].sum())
        assert with_points > 100
        different = {
            k for k in files.order_spec["order"] if files.order_spec["order"][k] != memory.order_spec["order"][k]
        }
        assert different <= {"datasets"} and {**files.order_spec, "order": 0} == {**memory.order_spec, "order": 0}


def test_points_are_told_with_the_instruction_only_and_hidden_where_unknown(rlds):
    _, episodes = rlds
    held = {name: in_memory.prepare_in_memory(name, spec, episodes[name]) for name, spec in specs().items()}
    with stream(held) as batches:
        for _ in range(10):
            batch = next(batches)
            told = batch["task"]["pad_mask_dict"]["language_instruction"]
            assert not batch["points_pad_mask"][~told].any()
            assert batch["points_pad_mask"][told][..., 0].all()  # the block is always on the table
            assert (batch["points"][~batch["points_pad_mask"]] == 0).all()
            assert ((batch["points"] >= 0) & (batch["points"] <= 1)).all()


def test_boxes_become_their_middles_and_what_is_outside_is_unknown():
    boxes = np.array([[0.1, 0.2, 0.3, 0.6], [np.nan] * 4, [-0.9, 0.0, 0.1, 0.2]], np.float64)
    np.testing.assert_array_equal(as_points(boxes), np.array([[0.2, 0.4], [np.nan] * 2, [np.nan] * 2], np.float32))


def test_a_folder_of_npz_files_and_validation(rlds, tmp_path):
    _, episodes = rlds
    for name in NAMES:
        for split, some in episodes[name].items():
            (tmp_path / name / split).mkdir(parents=True)
            for number, episode in enumerate(some):
                whole = {key: value for key, value in episode.items() if key != "where"}
                in_memory.save_episode(tmp_path / name / split / f"{number:04d}.npz", whole)
    read = in_memory.datasets_in_memory(specs(), str(tmp_path), "", "", seed=0, workers=0)
    direct = {name: in_memory.prepare_in_memory(name, spec, episodes[name]) for name, spec in specs().items()}
    with stream(read) as a, stream(direct) as b:
        assert a.order_spec == b.order_spec
        for (path, x), (_, y) in zip(flatten(next(a)), flatten(next(b)), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=path)
    validation = make_val_iterators(read, SPEC, TextTokenizer.load("builtin", 14), batch_size=4, max_batches=2)
    assert set(validation) == set(NAMES) and all(len(list(one)) == len(one) > 0 for one in validation.values())


def test_what_is_made_depends_on_the_seed_and_not_on_the_workers():
    make = in_memory.make_episodes
    generator = "octo_like.envs.demonstrations:generate"
    one = make(generator, "tabletop_pusher=3+1", seed=0, workers=0)
    two = make(generator, "tabletop_pusher=3+1", seed=0, workers=2)
    other = make(generator, "tabletop_pusher=3+1", seed=1, workers=0)
    assert [len(one[split]) for split in ("train", "val")] == [3, 1]
    for a, b in zip(one["train"], two["train"], strict=True):
        np.testing.assert_array_equal(a["observation"]["image"], b["observation"]["image"])
    assert not np.array_equal(one["train"][0]["action"][:3], other["train"][0]["action"][:3])


NO_TENSORFLOW = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets"):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Block())
from configs import tabletop
from octo_like.common.defaults import batch_spec
from octo_like.common.text import TextTokenizer
from octo_like.data.inputs import inputs_from_config
config = tabletop.get_config()
config.batch_size, config.data.kind, config.data.workers = 8, "memory", 0
config.data.episodes = "tabletop_pusher=3+1 tabletop_gripper=3+1,tabletop_arm=3+1"
tokenizer = TextTokenizer.load("builtin", config.text.max_length)
inputs = inputs_from_config(config, batch_spec(config), tokenizer)
batch = next(inputs.stream)
assert batch["points_pad_mask"].any() and sum(len(list(one)) for one in inputs.validation.values()) >= 3
inputs.stream.close()
assert "tensorflow" not in sys.modules
"""


def test_nothing_of_it_needs_tensorflow(repository):
    done = subprocess.run([sys.executable, "-c", NO_TENSORFLOW], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def broken(episode, key, value):
    flat = dict(flatten({k: v for k, v in episode.items() if k != "where"})) | {key: value}
    return {k: v for k, v in flat.items() if v is not None} | {"where": "demo 7"}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("action", None, "demo 7: no action 'action'"),
        ("observation/image", None, "demo 7: no image of camera 'primary' 'observation/image'; did you mean"),
        ("observation/image", np.zeros((3, 8, 8, 3), np.float32), "cannot be the image of camera 'primary'"),
        ("observation/image", np.zeros((1, 8, 8, 3), np.uint8), r"7: action has \d+ steps, but camera primary has 1"),
        ("language_instruction", np.zeros(3), "cannot be the instruction"),
    ],
)
def test_an_episode_with_something_wrong_is_named(rlds, key, value, message):
    from octo_like.common.schema import unflatten

    episode = unflatten(broken(rlds[1][NAMES[0]]["train"][0], key, value))
    with pytest.raises(DataError, match=message):
        in_memory.prepare_in_memory("x", specs()[NAMES[0]], {"train": [episode], "val": [episode]})


def test_episodes_without_steps_are_as_if_they_were_not_there(rlds):
    from octo_like.common.schema import unflatten

    episode = {k: v for k, v in rlds[1][NAMES[0]]["train"][0].items() if k != "where"}
    empty = unflatten({key: v if np.ndim(v) == 0 else v[:0] for key, v in flatten(episode)})
    prepared = in_memory.prepare_in_memory("x", specs()[NAMES[0]], {"train": [empty, episode], "val": [episode]})
    assert len(prepared.train) == 1 and prepared.statistics["num_trajectories"] == 1
    with pytest.raises(DataError, match="x: none of 2 episode"):
        in_memory.prepare_in_memory("x", specs()[NAMES[0]], {"train": [empty] * 2, "val": [episode]})


def test_numbers_that_are_not_finite_are_named(rlds):
    from octo_like.common.schema import unflatten

    action = rlds[1][NAMES[0]]["train"][0]["action"].copy()
    action[2, 1] = np.nan
    episode = unflatten(broken(rlds[1][NAMES[0]]["train"][0], "action", action))
    with pytest.raises(DataError, match="demo 7: action is nan at step 2, dimension 1"):
        in_memory.prepare_in_memory("x", specs()[NAMES[0]], {"train": [episode], "val": [episode]})


def test_mistakes_in_settings_say_what_is_valid(rlds, tmp_path):
    spec, episodes = specs()[NAMES[0]], rlds[1][NAMES[0]]
    with pytest.raises(DataError, match="standardize is computed by TensorFlow"):
        in_memory.prepare_in_memory("x", dataclasses.replace(spec, standardize="my:function"), episodes)
    with pytest.raises(DataError, match="no episodes of split 'test'; valid: train, val"):
        in_memory.prepare_in_memory("x", dataclasses.replace(spec, split="test"), episodes)
    with pytest.raises(DataError, match="num_demos=99, but only 7"):
        in_memory.prepare_in_memory("x", dataclasses.replace(spec, num_demos=99), episodes)

    def load(requests, data_dir=None, generator="octo_like.envs.demonstrations:generate"):
        return in_memory.datasets_in_memory(specs(), data_dir, requests, generator, seed=0, workers=0)

    with pytest.raises(DataError, match="'tabletop_pushr' is not in the mixture; did you mean"):
        load("tabletop_pushr=3")
    with pytest.raises(DataError, match="expected NAME=TRAIN or NAME=TRAIN\\+VAL"):
        load("tabletop_pusher=three tabletop_gripper=1")
    with pytest.raises(DataError, match="data.generator='no.such:thing' is not an importable"):
        load("tabletop_pusher=3", generator="no.such:thing")
    with pytest.raises(DataError, match="neither data.episodes nor data.data_dir"):
        load("tabletop_pusher=1+1")
    with pytest.raises(DataError, match="no .npz files; folders beside it: none"):
        load("", data_dir=str(tmp_path))
    (tmp_path / NAMES[0] / "train").mkdir(parents=True)
    (tmp_path / NAMES[0] / "train" / "a.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a.npz: not an episode in .npz form"):
        load("", data_dir=str(tmp_path))


def test_points_that_nobody_learns_or_tells_are_named(rlds, caplog):
    episodes = rlds[1]
    wrong = specs(point_keys={"targt": "target_point"})
    held = {name: in_memory.prepare_in_memory(name, spec, episodes[name]) for name, spec in wrong.items()}
    with pytest.raises(DataError, match="learn no point 'targt'; did you mean 'target'"):
        stream(held)
    silent = specs(point_keys={"target": "target_point"})
    held = {name: in_memory.prepare_in_memory(name, spec, episodes[name]) for name, spec in silent.items()}
    stream(held).close()
    assert "no dataset says where 'plate' is" in caplog.text
