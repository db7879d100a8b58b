"""The template for one's own robot: builds from recordings, reads from configuration alone; the scripts show it."""

import importlib.util
import sys

import numpy as np
import pytest

from octo_like.common.schema import BatchSpec, check_batch
from octo_like.common.text import TextTokenizer
from tests.data.streams import make_train_stream


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "data" / "template" / "my_robot"


def record(path, steps, seed, **changes):
    rng = np.random.default_rng(seed)
    arrays = dict(
        image=rng.integers(0, 256, (steps, 48, 64, 3), np.uint8),
        wrist_image=rng.integers(0, 256, (steps, 32, 32, 3), np.uint8),
        state=np.cumsum(rng.normal(size=(steps, 8)), 0).astype(np.float32),
        action=rng.normal(size=(steps, 8)).astype(np.float32),
        instruction="put the cup on the shelf",
    )
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return arrays


def run_main(monkeypatch, path, *arguments):
    """Runs a script's main() in this process. Returns its exit status."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    return module.main()


@pytest.fixture(scope="module")
def build(folder):
    """Function that runs the builder's command line: (folder of recordings, data_dir)."""
    with pytest.MonkeyPatch.context() as patch:
        yield lambda raw, data_dir: run_main(
            patch, folder / "my_robot_dataset_builder.py", "--raw", raw, "--data_dir", data_dir
        )


@pytest.fixture(scope="module")
def built(build, tmp_path_factory):
    raw, data_dir = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("data")
    episodes = [record(raw / f"episode_{i:02d}.npz", 4 + i, i) for i in range(6)]
    assert build(raw, data_dir) == 0
    return data_dir, episodes


def test_trains_from_configuration_alone(built, folder, tmp_path, monkeypatch):
    data_dir, episodes = built
    monkeypatch.syspath_prepend(str(folder))
    spec = BatchSpec(2, 4, 8, {"primary": (32, 32), "wrist": (16, 16)}, ("primary",), 8, 16)
    options = dict(data_dir=str(data_dir), cache_dir=str(tmp_path), seed=0, batch_size=8)
    fields = dict(
        image_keys=dict(primary="image", wrist="wrist_image"),
        proprio_keys=("state",),
        action_normalization_mask=(True,) * 7 + (False,),
        val_fraction=0.2,
    )
    with make_train_stream({"my_robot": fields}, spec, TextTokenizer.load(), **options) as stream:
        check_batch(next(stream), spec)
        assert stream.datasets["my_robot"].instructions == {"put the cup on the shelf": 6}
    relative = fields | dict(standardize="transform:standardize", val_fraction=0)
    with make_train_stream({"my_robot": relative}, spec, TextTokenizer.load(), **options) as stream:
        check_batch(next(stream), spec)
        statistics = stream.statistics["my_robot"]
    want = np.concatenate([np.diff(e["state"][:, :7], axis=0) for e in episodes])
    np.testing.assert_allclose(statistics["action"]["mean"][:7], want.mean(0), rtol=1e-4, atol=1e-5)
    assert statistics["num_transitions"] == sum(len(e["action"]) - 1 for e in episodes)


def test_a_description_means_what_the_function_does(built, folder, tmp_path, monkeypatch):
    """One entry in the user's own file gives every field: the same batches as function and fields."""
    data_dir, _ = built
    monkeypatch.syspath_prepend(str(folder))
    spec = BatchSpec(2, 4, 8, {"primary": (32, 32), "wrist": (16, 16)}, (), 8, 16)
    options = dict(data_dir=str(data_dir), cache_dir=str(tmp_path), seed=0, batch_size=8)
    by_function = dict(
        standardize="transform:standardize",
        image_keys=dict(primary="image", wrist="wrist_image"),
        proprio_keys=("state",),
        action_normalization_mask=(True,) * 7 + (False,),
    )
    seen = []
    for fields in (by_function, dict(standardize="description:MY_ROBOT")):
        with make_train_stream({"my_robot": fields}, spec, TextTokenizer.load(), **options) as stream:
            check_batch(next(stream), spec)
            seen.append((stream.statistics["my_robot"], stream.datasets["my_robot"].spec))
    (by_function, first), (described, second) = seen
    for key in ("action", "proprio"):
        for name, value in by_function[key].items():
            np.testing.assert_array_equal(described[key][name], value)
    assert first.image_keys == second.image_keys
    assert first.action_normalization_mask == second.action_normalization_mask


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(state=None), "no state; it holds: image, wrist_image, action, instruction"),
        (dict(state=np.zeros((3, 8))), "5 actions, but 3 of 'state'"),
        (dict(action=np.full((5, 8), np.nan)), "not finite"),
    ],
)
def test_broken_recordings_leave_nothing_behind(build, tmp_path, changes, message):
    (tmp_path / "raw").mkdir()
    record(tmp_path / "raw" / "good.npz", 5, 0)
    record(tmp_path / "raw" / "broken.npz", 5, 1, **changes)
    with pytest.raises(ValueError, match=f"broken.npz: .*{message}"):
        build(tmp_path / "raw", tmp_path / "data")
    assert not list(tmp_path.glob("data/my_robot/1.0.0/*"))


def test_no_recordings(build, tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*npz recordings"):
        build(tmp_path, tmp_path / "data")


def test_scripts(built, repository, tmp_path, monkeypatch, capsys):
    data_dir, _ = built
    prepare, show = repository / "scripts" / "prepare_data.py", repository / "scripts" / "show_data.py"
    common = ["--data_dir", data_dir, "--cache_dir", tmp_path / "cache", "my_robot", "--set"]
    keys = ['image_keys={"primary": "image", "wrist": "wrist_image"}', 'proprio_keys=["state"]']
    assert run_main(monkeypatch, prepare, *common, *keys, "--statistics", tmp_path / "s.json") == 0
    printed = capsys.readouterr().out
    assert "action[7]" in printed and "proprio[0]" in printed and "put the cup on the shelf" in printed
    assert (tmp_path / "s.json").exists()
    assert run_main(monkeypatch, show, *common, *keys, "--output", tmp_path / "look", "--episodes", 2) == 0
    assert (tmp_path / "look" / "my_robot.png").stat().st_size > 20_000
    # A config with an argument that builds on another; the number of steps is derived.
    config = ["--data_dir", data_dir, "--cache_dir", tmp_path / "cache", "--config"]
    config += [repository / "configs" / "finetune.py:lora", "--set", "name=my_robot", *keys]
    assert run_main(monkeypatch, prepare, *config) == 0 and "\ntarget: " in capsys.readouterr().out
    assert run_main(monkeypatch, show, *config, "--output", tmp_path / "look", "--episodes", 2) == 0
    assert (tmp_path / "look" / "target.png").exists() and "target" in capsys.readouterr().out
    for arguments, message in (
        (["my_robt"], "did you mean 'my_robot'"),
        ([], "exactly one of them"),
        (["my_robot", "--mix", "bridge"], "no dataset 'my_robot' in the mixture 'bridge'"),
        (["--mix", "bridg"], "did you mean 'bridge'"),
        (["my_robot", "--set", "x"], "'x' is not FIELD=VALUE"),
        (["my_robot", "--set", "action_kee=x"], "did you mean 'action_key'"),
        (["--config", tmp_path / "missing.py"], "missing.py' does not exist"),
    ):
        assert run_main(monkeypatch, prepare, "--data_dir", data_dir, *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
