"""The simulators themselves: determinism, judgement, experts, and an expert replayed through a policy's action path.

They run in processes of their own, as in use. `make test-sim` installs what they need and runs these.
"""

import functools
import importlib.util
import subprocess
import sys

import gymnasium
import numpy as np
import pytest

import octo_like.envs  # noqa: F401  (registers the environments)
from octo_like.common.normalization import normalize
from octo_like.common.normalization import unnormalize as to_physical
from octo_like.common.schema import BatchSpec
from octo_like.envs import EVALUATION_SEEDS
from octo_like.envs.sims import ENVIRONMENTS, GROUPS
from octo_like.envs.sims.remote import EXTRA, RemoteEnv, SimulatorPool
from octo_like.robot.rollout import evaluate

missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(
        bool(missing), reason=f"needs the extra sim ({', '.join(missing)} missing): pip install -e '.[sim]'"
    ),
]


@pytest.fixture(scope="module")
def pool():
    with SimulatorPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def demonstrations(pool):
    """Two noiseless episodes of every task: group -> list."""

    def make(group):
        process = pool.processes[0]
        return [process.call("demonstrate", group, t, seed, 0.0) for seed in (3, 4) for t in GROUPS[group][1]]

    return functools.cache(make)


@pytest.mark.parametrize("group", GROUPS)
def test_environments_speak_the_convention(group, pool):
    env = gymnasium.make(ENVIRONMENTS[group], pool=pool, render_mode="rgb_array")
    observation, info = env.reset(seed=7)
    assert env.observation_space.contains(observation) and env.action_space.shape == (4,)
    assert observation["image_primary"].shape == (64, 64, 3) and observation["image_primary"].std() > 20
    assert len(env.unwrapped.proprio_names) == len(observation["proprio"])
    assert info["task"] in GROUPS[group][1] and info["instruction"] in GROUPS[group][1][info["task"]].instructions
    assert env.render().shape == (256, 256, 3)
    _, reward, terminated, truncated, info = env.step(np.zeros(4))
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
    tasks = {env.reset(seed=seed)[1]["task"] for seed in range(40)}
    assert len(tasks) > min(2, len(GROUPS[group][1]) - 1), "the seed draws the task"
    env.close()


def test_bad_requests_are_refused(pool):
    env = RemoteEnv("fetch", pool=pool)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(4))
    with pytest.raises(ValueError, match="unknown task 'fly'; valid: reach, push, pick-and-place"):
        env.reset(seed=1, options={"task": "fly"})
    with pytest.raises(ValueError, match=r"unknown reset options \['speed'\]; valid: task, start"):
        env.reset(seed=1, options={"speed": 2})
    for start in ((0.1, 0.1), (0.1, 0.1, np.nan)):
        with pytest.raises(ValueError, match=r"'start' is \(dx, dy, dz\) in metres"):
            env.reset(seed=1, options={"start": start})
    env.reset(seed=1, options={"task": "reach"})
    for action in (np.zeros(3), np.full(4, np.nan)):
        with pytest.raises(ValueError, match="4 finite numbers"):
            env.step(action)
    env.close()
    with pytest.raises(ValueError, match="unknown group of tasks 'kitchen'; valid: metaworld_pretrain"):
        RemoteEnv("kitchen", pool=pool)
    with pytest.raises(ValueError, match="no camera 'rear'; valid: primary, secondary"):
        RemoteEnv("fetch", image_sizes={"rear": 8}, pool=pool)


def test_other_image_sizes(pool):
    env = RemoteEnv("fetch", image_sizes={"secondary": 32}, pool=pool)
    observation, _ = env.reset(seed=1)
    assert observation["image_primary"].shape == (64, 64, 3) and observation["image_secondary"].shape == (32, 32, 3)
    env.close()


@pytest.mark.parametrize("group,task", [("metaworld_pretrain", "push"), ("fetch", "reach")])
def test_the_hand_starts_where_it_is_asked_to(group, task, pool):
    """The robot moves there by its own controller, which lags: within 4 cm. Nothing else of the scene changes."""
    env = RemoteEnv(group, pool=pool)
    home = env.reset(seed=5, options={"task": task})[0]["proprio"]
    np.testing.assert_array_equal(env.reset(seed=5, options={"task": task, "start": (0, 0, 0)})[0]["proprio"], home)
    for way in ((0.08, -0.06, 0.05), (-0.08, 0.06, 0.0)):
        observation, info = env.reset(seed=5, options={"task": task, "start": way})
        np.testing.assert_allclose(observation["proprio"][:3] - home[:3], way, atol=0.04)
        assert info["task"] == task and not info["success"]
    env.close()


def test_demonstrations_start_at_different_places(pool):
    make = functools.partial(pool.processes[0].call, "demonstrate", "metaworld_pretrain", "push")
    starts = np.stack([make(seed, 0.0, 0.15)["observations"][0]["proprio"][:3] for seed in range(6)])
    assert (starts.std(0) > 0.02).all() and (np.abs(starts - [0.0, 0.6, 0.2]) < [0.2, 0.2, 0.2]).all()
    again = make(2, 0.0, 0.15)["observations"][0]["proprio"][:3]
    np.testing.assert_array_equal(again, starts[2])


@pytest.mark.parametrize("group", ["metaworld_heldout", "fetch"])
def test_an_episode_follows_from_its_seed_alone(group, demonstrations, pool):
    """Bitwise, in another process and after other episodes in the same environment: what paired seeds rest on."""
    reference = demonstrations(group)
    for process in pool.processes:
        for one in reference[: len(GROUPS[group][1])]:
            process.call("demonstrate", group, one["task"], 99, 0.1)
            again = process.call("demonstrate", group, one["task"], one["seed"], 0.0)
            np.testing.assert_array_equal(one["actions"], again["actions"])
            for a, b in zip(one["observations"], again["observations"], strict=True):
                for key in a:
                    np.testing.assert_array_equal(a[key], b[key], err_msg=f"{one['task']} {key}")
    first, second = reference[0], reference[len(GROUPS[group][1])]
    assert not np.array_equal(first["observations"][0]["image_primary"], second["observations"][0]["image_primary"])


@pytest.mark.parametrize("group", GROUPS)
def test_experts_solve_every_task(group, demonstrations):
    """Meta-World's own experts of push-back, soccer and sweep-into, whose actions are held here, fail now and then."""
    failed = [(one["task"], one["seed"]) for one in demonstrations(group) if not one["success"]]
    assert {task for task, _ in failed} <= {"push-back", "soccer", "sweep-into"}
    assert {one["task"] for one in demonstrations(group) if one["success"]} == set(GROUPS[group][1])
    for one in demonstrations(group):
        assert np.abs(one["actions"]).max() <= 1 and len(one["actions"]) == len(one["observations"])


@pytest.mark.parametrize("group", ["metaworld_pretrain", "fetch"])
def test_doing_nothing_solves_nothing(group, pool):
    env = RemoteEnv(group, pool=pool)
    for task in GROUPS[group][1]:
        _, info = env.reset(seed=5, options={"task": task})
        ended, steps = False, 0
        while not ended:
            _, _, terminated, truncated, info = env.step(np.zeros(4))
            ended, steps = terminated or truncated, steps + 1
        assert not info["success"] and steps == env.max_steps, task
    env.close()


def test_an_episode_may_have_a_limit_of_its_own(pool):
    env = RemoteEnv("metaworld_pretrain", pool=pool)
    # Also beyond the environment's own limit of 500 steps, 5 to an action; the next episode has the usual one again.
    for limit in (3, 110, env.max_steps):
        env.reset(seed=5, options={"task": "door-open"} | ({} if limit == env.max_steps else {"max_steps": limit}))
        truncated = [env.step(np.zeros(4))[3] for _ in range(limit)]
        assert truncated == [False] * (limit - 1) + [True]
    with pytest.raises(ValueError, match="'max_steps' must be at least 1, got 0"):
        env.reset(seed=5, options={"max_steps": 0})
    env.close()


class Replay:
    """Answers with recorded actions, normalised, cut into chunks and turned back as a policy's are."""

    def __init__(self, demonstration, statistics, sizes, horizon=4):
        self.actions = normalize(demonstration["actions"], statistics, "normal")
        self.statistics, self.horizon = statistics, horizon
        proprio = len(demonstration["observations"][0]["proprio"])
        self.batch_spec = BatchSpec(
            window_size=2,
            action_horizon=horizon,
            action_dim=4,
            image_sizes={slot: (size, size) for slot, size in sizes.items()},
            proprio_dim=proprio,
            language_length=4,
        )

    def create_tasks(self, texts):
        return {"texts": list(texts)}

    def sample_actions(self, observations, tasks, *, rng, unnormalize: str | None):
        now = int(observations["timestep"][0, -1])
        rows = np.minimum(np.arange(now, now + self.horizon), len(self.actions) - 1)
        return to_physical(self.actions[rows], self.statistics, "normal")[None]


@pytest.mark.parametrize("group", ["metaworld_heldout", "fetch"])
@pytest.mark.parametrize("exec_horizon", [1, 2])
def test_the_expert_replayed_through_the_action_path_succeeds_as_often(group, exec_horizon, demonstrations, pool):
    """Normalise, chunk, execute part of the chunk, unnormalise: before anything is learned, nothing is lost."""
    actions = np.concatenate([one["actions"] for one in demonstrations(group)])
    statistics = {"mean": actions.mean(0), "std": actions.std(0)}
    sizes = {"primary": 64, "secondary": 64}
    for one in demonstrations(group):
        (episode,) = evaluate(
            Replay(one, statistics, sizes),
            functools.partial(RemoteEnv, group, pool=pool),
            [one["seed"]],
            options={"task": one["task"]},
            exec_horizon=exec_horizon,
            batch_size=1,
            threads=1,
        )
        assert (episode.success, episode.steps) == (one["success"], len(one["actions"]) - 1), one["task"]
        np.testing.assert_allclose(episode.actions, one["actions"][:-1], atol=1e-5)


def test_simulating_works_beside_tensorflow(repository):
    """Rendering in a process that has imported TensorFlow is a segmentation fault; here the parent has."""
    pytest.importorskip("tensorflow", reason="needs the [data] extra")
    script = """
import tensorflow
import octo_like.envs, gymnasium
env = gymnasium.make("octo_like/Fetch-v0")
observation, info = env.reset(seed=1)
print(observation["image_primary"].shape, info["task"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=repository)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(64, 64, 3)" in done.stdout


# Datasets


@pytest.fixture(scope="module")
def build(repository):
    """The module data/sims/build.py."""
    pytest.importorskip("tensorflow_datasets", reason="needs the [data] extra")
    spec = importlib.util.spec_from_file_location("sims_build", repository / "data" / "sims" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(build, tmp_path_factory):
    """A folder with small datasets of two groups."""
    root = tmp_path_factory.mktemp("data")
    build.build(root, [("fetch", 2, 1), ("metaworld_heldout", 1, 1)])
    return root


def read(root, name, split):
    import tensorflow_datasets as tfds

    dataset = tfds.builder_from_directory(root / name / "1.0.0").as_dataset(split=split)
    episodes = [(episode["episode_metadata"], list(episode["steps"])) for episode in tfds.as_numpy(dataset)]
    return sorted(episodes, key=lambda item: item[0]["seed"])


@pytest.mark.parametrize("group,split", [("fetch", "train"), ("metaworld_heldout", "val")])
def test_datasets_hold_what_the_expert_did(data, build, pool, group, split):
    episodes = read(data, group, split)
    tasks = list(GROUPS[group][1])
    assert len(episodes) == {"fetch": 2, "metaworld_heldout": 1}[group] * len(tasks)
    how = (build.sim_episodes.NOISE[GROUPS[group][0]], build.sim_episodes.SPREAD[GROUPS[group][0]])
    for metadata, steps in episodes:
        seed, task = int(metadata["seed"]), metadata["task"].decode()
        assert 0 <= seed - build.sim_episodes.first_seed(group, task, split) < 100 and seed < EVALUATION_SEEDS
        one = pool.processes[0].call("demonstrate", group, task, seed, *how)
        np.testing.assert_array_equal([step["action"] for step in steps], one["actions"])
        assert {step["language_instruction"].decode() for step in steps} == {one["instruction"]}
        last = len(steps) - 1
        for t, (step, seen) in enumerate(zip(steps, one["observations"], strict=True)):
            assert (step["is_first"], step["is_last"], step["is_terminal"]) == (t == 0, t == last, t == last)
            assert (step["reward"], step["discount"]) == ((1.0, 0.0) if t == last else (0.0, 1.0))
            np.testing.assert_array_equal(step["observation"]["state"], seen["proprio"])
            for slot in (key for key in seen if key.startswith("image_")):
                stored = step["observation"][build.sim_episodes.image_key(slot.removeprefix("image_"))]
                error = np.abs(stored.astype(int) - seen[slot])
                assert error.mean() < 4 and np.percentile(error, 99) < 30  # JPEG, quality 95


def test_fewer_demonstrations_are_among_more(build):
    with build.sim_episodes.Demonstrator(2) as demonstrator:
        one, two = (list(demonstrator.episodes("metaworld_heldout", "train", count)) for count in (1, 2))
    seeds = [{episode["episode_metadata"]["seed"] for episode in episodes} for episodes in (one, two)]
    assert seeds[0] < seeds[1] and len(seeds[1]) == 2 * len(seeds[0])


def test_failed_episodes_are_left_out_and_counted(build, monkeypatch):
    from octo_like.envs.sims.remote import SimulatorProcess

    original, first = SimulatorProcess.call, build.sim_episodes.first_seed("fetch", "reach", "train")

    def call(self, method, group, task, seed, *how):
        episode = original(self, method, group, task, seed, *how)
        return {**episode, "success": episode["success"] and seed not in (first, first + 2)}

    monkeypatch.setattr(SimulatorProcess, "call", call)
    with build.sim_episodes.Demonstrator(2) as demonstrator:
        episodes = list(demonstrator._of_task("fetch", "reach", "train", 3))
    assert [episode["episode_metadata"]["seed"] - first for episode in episodes] == [1, 3, 4]
    assert demonstrator.failed == {("fetch", "reach", "train"): 2}


def test_the_same_command_again_does_nothing_and_other_numbers_are_refused(data, build, capsys):
    files = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    build.build(data, [("fetch", 2, 1)])
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"fetch.*holds 2 \+ 1 episodes a task, but 3 \+ 1 .*--overwrite"):
        build.build(data, [("fetch", 3, 1)])
    assert files == {path: path.stat().st_mtime_ns for path in data.rglob("*")}


def test_bad_dataset_requests(build):
    for text, message in [
        ("hand=3", "unknown dataset 'hand'; valid: metaworld_pretrain"),
        ("fetch", "expected fetch=TRAIN"),
        ("fetch=2+0", "at least one episode of every task"),
    ]:
        with pytest.raises(build.argparse.ArgumentTypeError) as error:
            build.parse_request(text)
        assert message in str(error.value)
    assert build.parse_request("fetch=50") == ("fetch", 50, 5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_benchmark_in_small(repository, tmp_path):
    """Several minutes: data, pretraining, adaptation, scratch, evaluation, report; and again, doing nothing."""
    command = [sys.executable, "scripts/benchmark_adaptation.py", "--quick", "--workdir", str(tmp_path)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=repository)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = (tmp_path / "table.md").read_text()
    assert "not run" not in table and "of 3" in table and (tmp_path / "curve.png").exists()
