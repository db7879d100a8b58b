"""The datasets of pictures and words, and of long tasks, through TFDS; and the robots' datasets in other colours."""

import importlib.util
import sys

import numpy as np
import pytest

from octo_like.envs import EVALUATION_SEEDS, LongTabletopEnv, demonstrations, long_demonstrations, picture_rows
from octo_like.envs.colors import Colors
from octo_like.envs.long_language import all_subtasks

pytest.importorskip("tensorflow_datasets", reason="needs the [data] extra")


@pytest.fixture(scope="module")
def builds(repository):
    """{folder: module data/FOLDER/build.py}."""
    modules, path = {}, list(sys.path)
    for folder in ("tabletop", "tabletop_words", "tabletop_long"):
        spec = importlib.util.spec_from_file_location(f"{folder}_build", repository / "data" / folder / "build.py")
        modules[folder] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[folder])
    yield modules
    sys.path[:] = path


def read(folder, split="train"):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    episodes = [(e["episode_metadata"], list(e["steps"])) for e in tfds.as_numpy(builder.as_dataset(split=split))]
    return builder.info, sorted(episodes, key=lambda item: item[0]["seed"])


def test_pictures_and_words(builds, tmp_path, capsys):
    build = builds["tabletop_words"]

    def make(rows="12+2", **arguments):
        build.build(tmp_path, build.parse_rows(rows), picture_rows.PictureSimulator(**arguments))

    make()
    info, rows = read(tmp_path / "tabletop_words" / "1.1.0")
    assert set(info.features["steps"].keys()) == {
        "observation", "language_instruction", "answer", "is_first", "is_last", "is_terminal", "reward", "discount"
    }  # fmt: skip
    assert len(rows) == 12 and len(read(tmp_path / "tabletop_words" / "1.1.0", "val")[1]) == 2
    for metadata, steps in rows:
        picture, row = picture_rows.row(int(metadata["seed"]))
        (step,) = steps
        assert (step["language_instruction"].decode(), step["answer"].decode()) == (row.prompt, row.answer)
        assert metadata["kind"].decode() == row.kind and row.prompt
        assert step["observation"]["image"].shape == (64, 64, 3)
        assert np.abs(step["observation"]["image"].astype(int) - picture.image).mean() < 4  # JPEG, quality 95
        assert step["is_first"] and step["is_last"] and step["is_terminal"]
        for name, place in (("target_point", row.block), ("plate_point", row.plate)):
            np.testing.assert_allclose(step["observation"][name], (place or (np.nan, np.nan))[::-1], rtol=1e-6)
    assert info.metadata["robots"] == ["gripper", "arm"] and "passed_over" in info.metadata
    assert [path.name for path in tmp_path.iterdir()] == ["tabletop_words"]
    make()
    assert "12 + 2 rows are there already, nothing to do" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"12 \+ 2 rows of seed 0, kinds .*, but 12 \+ 2 of seed 0, kinds \['point'\] were"
    ):
        make(kinds=("point",))
    with pytest.raises(ValueError, match=r"of seed 0, unnamed as usual, but .* of seed 0, unnamed \['red'\]"):
        make(colors=Colors(picture_rows.PICTURE_COLORS.palette, frozenset({"red"}), frozenset()))


def test_long_tasks(builds, tmp_path, capsys):
    build = builds["tabletop_long"]
    requests = [build.parse_request("tabletop_long_arm=3+1"), build.parse_request("tabletop_long_gripper=2+1")]
    build.build(tmp_path, requests, workers=0)
    assert "tabletop_long_arm: wrote 3 + 1 episodes, left out 0 that the expert failed" in capsys.readouterr().out
    for name, count in (("arm", 3), ("gripper", 2)):
        info, episodes = read(tmp_path / f"tabletop_long_{name}" / "1.1.0")
        assert len(episodes) == count
        env = LongTabletopEnv(name, mishaps=True)
        for metadata, steps in episodes:
            seed = int(metadata["seed"])
            observation, told = env.reset(seed=seed)
            expert = env.expert(np.random.default_rng([seed, 0xE4]))
            assert metadata["task"].decode() == told["task"] and metadata["success"]
            for step in steps:
                assert step["language_instruction"].decode() == told["instruction"]
                assert step["subtask"].decode() == told["subtask"] in all_subtasks()
                np.testing.assert_array_equal(step["observation"]["state"], observation["proprio"])
                action = expert.act()
                np.testing.assert_array_equal(step["action"], action)
                if not step["is_last"]:
                    observation, _, _, _, told = env.step(action)
            assert steps[-1]["subtask"] == b"it is done" and steps[-1]["reward"] == 1 and steps[-1]["is_terminal"]
            assert np.isnan(steps[-1]["observation"]["target_point"]).all()
            assert not np.isnan(steps[0]["observation"]["target_point"]).any()
    assert info.features["steps"]["action"].shape == (7,)
    build.build(tmp_path, requests, workers=0)
    assert capsys.readouterr().out.count("nothing to do") == 2


def test_the_robots_datasets_in_other_colours(builds, tmp_path):
    build = builds["tabletop"]
    colors = Colors(("red", "green", "blue", "yellow"), frozenset({"red"}), frozenset())
    request = [build.parse_request("tabletop_pusher=6+1")]
    build.build(tmp_path, request, workers=0, colors=colors)
    info, episodes = read(tmp_path / "tabletop_pusher" / "1.2.0")
    said = {word for _, steps in episodes for word in steps[0]["language_instruction"].decode().split()}
    assert not said & {"red", "purple"} and said & {"green", "blue", "yellow"}
    build.build(tmp_path, request, workers=0, colors=colors)  # nothing to do
    with pytest.raises(
        ValueError, match=r"palette \['red', .*unnamed \['red'\].* but 6 \+ 1 of seed 0, palette as usual"
    ):
        build.build(tmp_path, request, workers=0)


def test_what_the_command_lines_say(builds, monkeypatch, tmp_path, capsys):
    for folder, arguments, message in (
        ("tabletop", ["--palette", "red", "green"], "a palette has at least 4 colours"),
        ("tabletop", ["--unnamed", "mauve"], "no block is 'mauve'; valid: red"),
        ("tabletop", ["--unnamed_pairs", "red-white"], "'red-white': expected BLOCK:PLATE"),
        ("tabletop_words", ["--rows", "many"], "expected tabletop_words=TRAIN"),
        ("tabletop_words", ["--kinds", "shape"], "invalid choice: 'shape'"),
        ("tabletop_words", ["--unnamed_pairs", "red:pink"], "plates: blue, orange, white"),
        ("tabletop_long", ["--episodes", "tabletop_long_pusher=3"], "valid: tabletop_long_gripper, tabletop_long_arm"),
        ("tabletop_long", ["--palette", "red", "green", "blue", "pink"], "scenes of long tasks have no other palette"),
    ):
        monkeypatch.setattr(sys, "argv", ["build.py", "--data_dir", str(tmp_path), *arguments])
        with pytest.raises(SystemExit):
            builds[folder].main()
        assert message in capsys.readouterr().err


def test_tfds_build(repository, tmp_path, monkeypatch):
    """The code of TFDS's own `tfds build` command finds and runs the builders in their folders."""
    from tensorflow_datasets.scripts.cli import build as command
    from tensorflow_datasets.scripts.cli import cli_utils

    for folder, name in (("tabletop_words", "tabletop_words"), ("tabletop_long", "tabletop_long_arm")):
        monkeypatch.chdir(repository / "data" / folder / name)
        parse = cli_utils.make_flags_parser(command.Args, description="")
        parse(["build", "--data_dir", str(tmp_path), "--max_examples_per_split", "2"]).execute()
        assert len(read(next((tmp_path / name).glob("?.?.?")))[1]) == 2


def test_no_two_datasets_share_a_seed():
    ranges = []
    for name in ("pusher", "gripper", "arm", "arm3"):
        for split in ("train", "val"):
            for first in (demonstrations.first_seed, long_demonstrations.first_long_seed):
                start = first(name, split)
                ranges.append((start, start + demonstrations.SEEDS_PER_DATASET))
    for split in ("train", "val"):
        start = picture_rows.first_seed(split)
        ranges.append((start, start + picture_rows.SEEDS_PER_RUN * picture_rows.RUNS))
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in zip(ranges[:-1], ranges[1:], strict=True))
    assert ranges[-1][1] <= EVALUATION_SEEDS
