"""The tabletop datasets: what is written is what the expert did, whoever writes it, and whole or not at all."""

import subprocess
import sys

import numpy as np
import pytest

from octo_like.envs import EMBODIMENTS, EVALUATION_SEEDS, TabletopEnv


@pytest.fixture(scope="module")
def build(repository):
    """The module data/tabletop/build.py."""
    pytest.importorskip("tensorflow_datasets", reason="needs the [data] extra")
    path = str(repository / "data" / "tabletop")
    sys.path.insert(0, path)
    import build

    yield build
    sys.path.remove(path)


@pytest.fixture(scope="module")
def data(build, tmp_path_factory):
    """A folder with small datasets of two embodiments."""
    root = tmp_path_factory.mktemp("data")
    build.build(root, [("tabletop_pusher", 3, 1), ("tabletop_arm3", 3, 2)], workers=0)
    return root


def read(root, name, split):
    import tensorflow_datasets as tfds

    dataset = tfds.builder_from_directory(root / name / "1.2.0").as_dataset(split=split)
    episodes = []
    for episode in tfds.as_numpy(dataset):
        episodes.append((episode["episode_metadata"], list(episode["steps"])))
    return sorted(episodes, key=lambda item: item[0]["seed"])


def replay(name, seed):
    """Observations, actions and places of the named things (each with the last), and the last info, of the
    demonstration with this seed."""
    env = TabletopEnv(name, bumps=True)
    observation, info = env.reset(seed=seed)
    expert = env.expert(np.random.default_rng([seed, 0xE4]))

    def places():
        world, goal = env.world, env.goal
        target = np.array(env.project(*world.block(goal.target).xy)) / 64
        plate = np.array(env.project(*world.plate(goal.plate).xy)) / 64 if goal.plate else np.full(2, np.nan)
        return {"target": target.astype(np.float32), "plate": plate.astype(np.float32)}

    observations, actions, points, done = [observation], [expert.act()], [places()], False
    while not done:
        observation, _, terminated, truncated, info = env.step(actions[-1])
        observations.append(observation)
        actions.append(expert.act())
        points.append(places())
        done = terminated or truncated
    return observations, actions, points, info


@pytest.mark.parametrize("name,split", [("pusher", "train"), ("arm3", "train"), ("arm3", "val")])
def test_round_trip(data, build, name, split):
    episodes = read(data, f"tabletop_{name}", split)
    assert len(episodes) == {"pusher": {"train": 3}, "arm3": {"train": 3, "val": 2}}[name][split]
    for metadata, steps in episodes:
        first = build.demonstrations.first_seed(name, split)
        assert first <= metadata["seed"] < first + 100 < EVALUATION_SEEDS
        observations, actions, points, info = replay(name, int(metadata["seed"]))
        assert metadata["success"] and metadata["task"].decode() == info["task"]
        np.testing.assert_array_equal([step["action"] for step in steps], actions)
        assert {step["language_instruction"].decode() for step in steps} == {info["instruction"]}
        last = len(steps) - 1
        for t, step in enumerate(steps):
            assert (step["is_first"], step["is_last"], step["is_terminal"]) == (t == 0, t == last, t == last)
            assert (step["reward"], step["discount"]) == ((1.0, 0.0) if t == last else (0.0, 1.0))
            seen = step["observation"]
            named = {"target_point", "plate_point"}
            assert set(seen) == ({"image", "wrist_image", "state"} if name == "arm3" else {"image"}) | named
            np.testing.assert_array_equal(seen["target_point"], points[t]["target"])
            np.testing.assert_array_equal(seen["plate_point"], points[t]["plate"])
            error = np.abs(seen["image"].astype(int) - observations[t]["image_primary"])
            assert error.mean() < 4 and np.percentile(error, 99) < 24  # JPEG, quality 95
            if name == "arm3":
                np.testing.assert_array_equal(seen["state"], observations[t]["proprio"])
                assert np.abs(seen["wrist_image"].astype(int) - observations[t]["image_wrist"]).mean() < 5


def test_training_evaluates_on_seeds_that_no_demonstration_uses():
    """The two rooms cannot import each other: each has the number."""
    from octo_like.training import evaluation

    assert evaluation.EVALUATION_SEEDS == EVALUATION_SEEDS


def test_nothing_but_datasets_is_left_in_the_folder(data):
    assert sorted(path.name for path in data.iterdir()) == ["tabletop_arm3", "tabletop_pusher"]
    assert [path.name for path in (data / "tabletop_arm3").iterdir()] == ["1.2.0"]


def test_the_same_command_again_does_nothing(data, build, capsys):
    files = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    build.build(data, [("tabletop_arm3", 3, 2)], workers=0)
    assert "nothing to do" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in data.rglob("*")}


def test_other_numbers_are_refused(data, build):
    with pytest.raises(ValueError, match=r"tabletop_arm3.*holds 3 \+ 2 episodes of seed 0, but 4 \+ 1 .*--overwrite"):
        build.build(data, [("tabletop_arm3", 4, 1)], workers=0)
    with pytest.raises(ValueError, match=r"of seed 0, but 3 \+ 2 of seed 5 were asked for"):
        build.build(data, [("tabletop_arm3", 3, 2)], workers=0, seed=5)
    assert len(read(data, "tabletop_arm3", "train")) == 3


def test_an_interrupted_build_leaves_nothing(build, tmp_path, monkeypatch):
    attempts = []

    def simulate(embodiment, seed, encode, palette):
        attempts.append(seed)
        if len(attempts) == 3:
            raise KeyboardInterrupt
        return original(embodiment, seed, encode, palette)

    original = build.demonstrations.simulate
    monkeypatch.setattr(build.demonstrations, "simulate", simulate)
    with pytest.raises(KeyboardInterrupt):
        build.build(tmp_path, [("tabletop_pusher", 5, 1)], workers=0)
    assert len(attempts) == 3 and not [path for path in tmp_path.rglob("*") if path.is_file()]
    # What a killed build left behind is cleared away by the next one.
    (tmp_path / "tabletop_pusher" / "incomplete.KILLED_1.2.0").mkdir(parents=True)
    build.build(tmp_path, [("tabletop_pusher", 1, 1)], workers=0)
    assert [path.name for path in (tmp_path / "tabletop_pusher").iterdir()] == ["1.2.0"]


def test_failed_episodes_are_left_out_and_counted(build, monkeypatch):
    original = build.demonstrations.simulate
    fails = {0, 2}
    monkeypatch.setattr(build.demonstrations, "simulate", lambda *args: None if args[1] in fails else original(*args))
    simulator = build.demonstrations.Simulator()
    episodes = list(simulator.episodes("pusher", "train", 3))
    assert [episode["episode_metadata"]["seed"] for episode in episodes] == [1, 3, 4]
    assert simulator.failed == {("pusher", "train"): 2}


def test_an_expert_that_always_fails_is_an_error(build, monkeypatch):
    monkeypatch.setattr(build.demonstrations, "simulate", lambda *args: None)
    with pytest.raises(RuntimeError, match="pusher expert fails"):
        list(build.demonstrations.Simulator().episodes("pusher", "train", 3))


def test_the_number_of_workers_does_not_matter(build):
    def make(workers):
        with build.demonstrations.Simulator(workers) as simulator:
            return list(simulator.episodes("gripper", "train", 10))

    for one, two in zip(make(0), make(2), strict=True):
        assert one["episode_metadata"] == two["episode_metadata"]
        assert len(one["steps"]) == len(two["steps"])
        for a, b in zip(one["steps"], two["steps"], strict=True):
            np.testing.assert_array_equal(a["action"], b["action"])
            assert a["observation"]["image"] == b["observation"]["image"]


def test_pairs_that_are_held_out_are_in_no_demonstration(build):
    held_out = [seed for seed in range(200) if build.demonstrations.is_held_out("gripper", 10_000_000 + seed)]
    assert 10 < len(held_out) < 50  # a fifth of the half that is pick and place
    made = build.demonstrations._simulate_range("gripper", 10_000_000 + held_out[0], build.demonstrations.as_it_is)
    assert held_out[0] + 10_000_000 not in dict(made)


def test_another_data_seed_gives_other_episodes(build):
    first = build.demonstrations.first_seed
    assert first("arm", "train", 3) == first("arm", "train") + 3 * build.demonstrations.SEEDS_PER_RUN
    assert first("arm", "train", 99) < first("arm3", "train") and first("arm", "val", 3) < EVALUATION_SEEDS
    with pytest.raises(ValueError, match="data seed 100; valid: 0 to 99"):
        first("arm", "train", 100)


def test_seeds_of_splits_and_evaluation_are_disjoint(build):
    episodes = build.demonstrations
    firsts = [episodes.first_seed(name, split) for name in EMBODIMENTS for split in ("train", "val")]
    ranges = sorted((first, first + episodes.SEEDS_PER_DATASET) for first in firsts)
    assert all(end <= start for (_, end), (start, _) in zip(ranges[:-1], ranges[1:], strict=True))
    assert ranges[-1][1] <= EVALUATION_SEEDS


@pytest.mark.parametrize(
    "text,message",
    [
        ("tabletop_hand=3", "unknown dataset 'tabletop_hand'; valid: tabletop_pusher"),
        ("tabletop_arm", "expected tabletop_arm=TRAIN"),
        ("tabletop_arm=many", "expected tabletop_arm=TRAIN"),
        ("tabletop_arm=3+", "expected tabletop_arm=TRAIN"),
        ("tabletop_arm=0", "at least one episode"),
        ("tabletop_arm=3+0", "at least one episode"),
    ],
)
def test_bad_requests(build, text, message):
    with pytest.raises(build.argparse.ArgumentTypeError) as error:
        build.parse_request(text)
    assert message in str(error.value)
    assert build.parse_request("tabletop_arm=40") == ("tabletop_arm", 40, 2)
    assert build.parse_request("tabletop_arm=40+7") == ("tabletop_arm", 40, 7)


def test_tfds_build(build, repository, tmp_path, monkeypatch):
    """The code of TFDS's own `tfds build` command finds and runs the builders in their folders."""
    from tensorflow_datasets.scripts.cli import build as command
    from tensorflow_datasets.scripts.cli import cli_utils

    monkeypatch.chdir(repository / "data" / "tabletop" / "tabletop_gripper")
    parse = cli_utils.make_flags_parser(command.Args, description="")
    parse(["build", "--data_dir", str(tmp_path), "--max_examples_per_split", "2"]).execute()
    assert len(read(tmp_path, "tabletop_gripper", "train")) == len(read(tmp_path, "tabletop_gripper", "val")) == 2


def test_workers_need_no_tensorflow(repository):
    script = """
import sys
sys.modules.update({name: None for name in ("tensorflow", "tensorflow_datasets", "jax")})  # importing them fails
from octo_like.envs import demonstrations
print(len(demonstrations.simulate("arm3", 3)["steps"]))
"""
    path = {"PYTHONPATH": f"{repository}:{repository / 'data' / 'tabletop'}"}
    result = subprocess.run([sys.executable, "-c", script], env=path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 3
