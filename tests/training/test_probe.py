"""What a policy knows: labelled frames, measurements on tiny policies with random weights, and the script."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from PIL import Image

from octo_like.common.normalization import compute_statistics
from octo_like.common.schema import BatchSpec, flatten, unflatten
from octo_like.common.text import TextTokenizer
from octo_like.envs import EMBODIMENTS, TabletopEnv
from octo_like.envs.demonstrations import first_seed
from octo_like.envs.labels import labelled_frames
from octo_like.model.octo import build_model
from octo_like.policy.policy import Policy
from octo_like.robot.history import History
from octo_like.training import probe
from octo_like.training.probe_frames import FrameError, frames_from_arrays, read_frames
from octo_like.training.probe_report import findings, summary, to_json, write
from scripts import probe_policy as script
from tests.model import tiny
from tests.robot.tiny import tiny_policy_for

ROBOTS = ("pusher", "gripper")


@pytest.fixture(scope="module")
def policy():
    """2 x 2 patches, words, proprio in the spec, one block, one readout; random weights."""
    return tiny_policy_for(
        {f"tabletop_{name}": (EMBODIMENTS[name].action_dim, EMBODIMENTS[name].proprio_dim) for name in ROBOTS}
    )


@pytest.fixture(scope="module")
def arrays():
    return labelled_frames(ROBOTS, 4, image_sizes={"primary": (32, 32)}, horizon=4)


@pytest.fixture(scope="module")
def frames(policy, arrays):
    return frames_from_arrays(arrays, policy, "tabletop")


# -- frames ------------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_the_world(arrays):
    n = len(arrays["episode"])
    assert all(len(array) == n for array in arrays.values())
    assert len(np.unique(arrays["episode"])) == 8 and (np.diff(arrays["episode"]) >= 0).all()
    env = TabletopEnv("gripper", 32, bumps=True)
    observation, info = env.reset(seed=first_seed("gripper", "val"))
    row = int(np.argmax(arrays["dataset"] == "tabletop_gripper"))
    np.testing.assert_array_equal(arrays["image_primary"][row], observation["image_primary"])
    assert arrays["instruction"][row] == info["instruction"] and arrays["task"][row] == info["task"]
    np.testing.assert_allclose(
        arrays["point_effector"][row] * 32, env.project(*map(float, env.effector.tip)), rtol=1e-5
    )
    np.testing.assert_allclose(
        arrays["point_target"][row] * 32, env.project(*env.world.block(env.goal.target).xy), rtol=1e-5
    )
    np.testing.assert_array_equal(np.isfinite(arrays["point_plate"][:, 0]), arrays["task"] == "pick_and_place")
    pusher = arrays["dataset"] == "tabletop_pusher"
    assert np.isnan(arrays["proprio"][pusher]).all() and np.isfinite(arrays["proprio"][~pusher]).all()
    assert np.isnan(arrays["action"][pusher][..., 2:]).all()


def test_chunks_and_phases_tell_what_the_expert_does_next(arrays):
    same = arrays["episode"][1:] == arrays["episode"][:-1]
    np.testing.assert_array_equal(arrays["action"][1:, 0][same], arrays["action"][:-1, 1][same])
    assert np.isnan(arrays["action"][:-1, 1][~same]).all(), "nothing comes after the last frame"
    phases = {key: arrays[f"phase_{key}"] for key in ("reach", "push", "pick", "place", "switch")}
    assert (phases["reach"] <= (arrays["task"] == "reach")).all() and phases["push"].any()
    assert not (phases["pick"] & phases["place"]).any()
    assert phases["switch"].any() and (phases["switch"] <= phases["pick"] | phases["place"]).all()
    # In the frame after a switch the hand is the other way round; the last dimension of proprio is its opening.
    at = np.flatnonzero(phases["switch"])
    now, after, asked = arrays["proprio"][at, -1], arrays["proprio"][at + 1, -1], arrays["action"][at, 0, 6]
    np.testing.assert_array_equal(now >= 0.5, asked < 0.5)
    np.testing.assert_array_equal(after >= 0.5, asked >= 0.5)


def test_no_robot_is_made_up():
    for robots, episodes, size, words in (
        (["crane"], 1, (32, 32), "unknown robot 'crane'; valid: pusher"),
        ([], 1, (32, 32), "at least one robot"),
        (["pusher"], 1, (32, 48), "'primary' is 32 x 48"),
    ):
        with pytest.raises(ValueError, match=words):
            labelled_frames(robots, episodes, image_sizes={"primary": size}, horizon=4)


def test_windows_are_those_of_a_robot(frames):
    index, timestep, valid = frames.window(np.arange(len(frames)), 3)
    row = 0
    for episode in np.unique(frames.episode):
        history = History(3)
        for _ in range(int((frames.episode == episode).sum())):
            window = history.append({"row": row})
            np.testing.assert_array_equal(index[row], window["row"])
            np.testing.assert_array_equal(timestep[row], window["timestep"])
            np.testing.assert_array_equal(valid[row], window["timestep_pad_mask"])
            row += 1


def test_a_file_holds_what_the_world_gives(arrays, frames, policy, tmp_path):
    np.savez(tmp_path / "frames.npz", **arrays)
    got = read_frames(tmp_path / "frames.npz", policy)
    for field in dataclasses.fields(frames):
        if field.name not in ("where", "action_names"):
            want = getattr(frames, field.name)
            jax.tree.map(np.testing.assert_array_equal, getattr(got, field.name), want)
    assert got.where.endswith("frames.npz") and got.names(policy, "tabletop_pusher", 2)[1] == ("a1", "")


# name: (key, what becomes of it (None: it is left out), what is said)
BAD = {
    "no episodes": ("episode", None, r"episode: expected \(N,\) int with N > 0, got nothing"),
    "size": (
        "image_primary",
        lambda x: x[:, :16],
        r"image_primary: expected \(\d+, 32, 32, 3\) uint8, got \(\d+, 16, 32",
    ),
    "dtype": ("image_primary", lambda x: x / 255, r"image_primary: expected .* uint8, got .* float64"),
    "point": ("point_plate", lambda x: x[:, 0], r"point_plate: expected \(\d+, 2\) float, got \(\d+\)"),
    "phase": ("phase_pick", lambda x: x + 1, r"phase_pick: expected \(\d+\) bool, got \(\d+\) int64"),
    "chunks": ("action", lambda x: x[:, 0], r"action: expected \(\d+, H, A\) float, got \(\d+, 7\)"),
    "narrow": ("action", lambda x: x[..., :3], "action: 'tabletop_gripper' has 7 dimensions, got"),
    "unknown": ("instructions", lambda x: np.zeros(3), "instructions: not known; did you mean 'instruction'?"),
    "blind": ("image_primary", None, "no observation: expected one or more of image_primary"),
    "no task": ("instruction", None, "no task for the policy: expected one of instruction"),
    "dataset": ("dataset", lambda x: np.array("mine"), r"dataset: no 'mine' in the policy's statistics \['tabletop_g"),
    "datasets": ("dataset", None, "dataset: is needed, one of the policy's"),
    "order": ("episode", lambda x: np.roll(x, 3), "episode: the rows of episode 7 do not stand together"),
    "mixed": ("episode", lambda x: 0 * x, "dataset: changes within episode 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_file_is_said(case, arrays, policy, tmp_path):
    key, change, words = BAD[case]
    bad = {name: array for name, array in arrays.items() if case != "blind" or name != "proprio"}
    value = bad.pop(key, None)
    if change is not None:
        bad[key] = change(value)
    np.savez(tmp_path / "bad.npz", **bad)
    with pytest.raises(FrameError, match=words) as caught:
        read_frames(tmp_path / "bad.npz", policy)
    assert "bad.npz" in str(caught.value)


def test_files_that_are_no_archives(arrays, policy, tmp_path):
    (tmp_path / "no.npz").write_text("frames")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("no.npz", "one.npy"):
        with pytest.raises(FrameError, match=f"{name}: no .npz archive"):
            read_frames(tmp_path / name, policy)
    np.savez(tmp_path / "objects.npz", **arrays | {"task": arrays["task"].astype(object)})
    with pytest.raises(FrameError, match="objects.npz: task: .*dtype=str"):
        read_frames(tmp_path / "objects.npz", policy)
    with pytest.raises(FileNotFoundError):
        read_frames(tmp_path / "nowhere.npz", policy)


def test_proprio_that_a_dataset_has_must_be_known(arrays, policy):
    broken = arrays | {"proprio": np.full_like(arrays["proprio"], np.nan)}
    with pytest.raises(FrameError, match=r"proprio: row \d+ is not finite in the 7 of 'tabletop_gripper'"):
        probe.group_features(policy, frames_from_arrays(broken, policy, "x"), ["readout_action"], "text")


# -- measurements ------------------------------------------------------------------------------------------------------


def test_features_are_the_tokens_of_the_last_timestep(policy, frames, monkeypatch):
    monkeypatch.setattr(probe, "BATCH", 16)
    names = ["readout_action", "obs_primary", "obs_primary:mean", "task_language:mean", "obs:input", "obs:input:mean"]
    features = probe.group_features(policy, frames, names, "text")
    rows = np.flatnonzero(frames.dataset == "tabletop_gripper")[:3]
    observation, tasks = frames.inputs(policy, "tabletop_gripper", rows, "text")
    observation = policy.prepare_observations(observation, "tabletop_gripper")
    groups = policy.model.apply({"params": policy.params}, observation, tasks, method="groups")
    patches, words = np.asarray(groups["obs_primary"].tokens)[:, -1], groups["task_language"]
    want = {
        "readout_action": np.asarray(groups["readout_action"].tokens)[:, -1, 0],
        "obs_primary": patches.reshape(3, -1),
    }
    want["obs_primary:mean"] = patches.mean(1)
    want["task_language:mean"] = np.stack(
        [np.asarray(t)[np.asarray(m)].mean(0) for t, m in zip(words.tokens, words.mask, strict=True)]
    )
    # What enters: the stem's patches, projected, and their place.
    params = policy.params["octo_transformer"]
    model = build_model(policy.config["model"], vocab_size=policy.text_tokenizer.vocab_size)
    tokenizer = model.octo_transformer.observation_tokenizers["primary"]
    entering = tokenizer.apply({"params": params["observation_tokenizers_primary"]}, observation, tasks, None)
    projection = params["obs_primary_projection"]
    projected = entering.tokens[:, 0] @ projection["kernel"] + projection["bias"]
    want["obs:input"] = np.asarray(projected + params["obs_primary_pos_embedding"][0, 0]).reshape(3, -1)
    want["obs:input:mean"] = want["obs:input"].reshape(3, 4, -1).mean(1)
    for name in names:
        np.testing.assert_allclose(features[name][rows], want[name], rtol=1e-3, atol=1e-4)


def test_groups_are_chosen_by_name(policy):
    report = probe.token_report(policy.model, policy.batch_spec)
    assert probe.chosen_groups(report, None) == ["readout_action", "obs_primary:mean"]
    assert probe.chosen_groups(report, ["obs", "obs", "task:input:mean"]) == ["obs", "task:input:mean"]
    with pytest.raises(
        ValueError, match=r"no token group 'obs_wrist:mean'.*valid: .*obs_primary, readout_action, .*task_language"
    ):
        probe.chosen_groups(report, ["obs_wrist:mean"])
    with pytest.raises(ValueError, match="did you mean 'readout_action'"):
        probe.chosen_groups(report, ["readout_actions"])


def made_up(episodes=40, length=5):
    """Frames of one robot whose points are drawn at random, with all their parts."""
    n, rng = episodes * length, np.random.default_rng(0)
    fields = {field.name: {} for field in dataclasses.fields(probe.Frames)}
    target = np.repeat(rng.uniform(size=(episodes, 2)), length, axis=0)
    plate = np.repeat(rng.uniform(size=(episodes, 2)), length, axis=0)
    plate[: n // 2] = np.nan
    fields |= {"where": "here", "episode": np.repeat(np.arange(episodes), length), "dataset": np.full(n, "robot")}
    fields |= {
        "task": np.where(np.isfinite(plate[:, 0]), "place", "touch"),
        "points": {"target": target, "plate": plate},
    }
    return probe.Frames(**fields | {"phases": {"touch": np.isnan(plate[:, 0])}, "action": None, "embedding": None})


def test_scopes_with_the_same_frames_are_told_once_and_what_is_not_known_is_found():
    frames = made_up()
    knows_plate = np.nan_to_num(frames.points["plate"]) @ np.random.default_rng(1).normal(size=(2, 6))
    found = probe.probe_points(frames, {"readout_action": knows_plate})
    assert [(one.scope, one.point) for one in found] == [
        ("robot", "target"),
        ("robot touch", "target"),
        ("robot place", "target"),
        ("robot place", "plate"),
    ]
    r2 = {(one.scope, one.point): one.probe.r2 for one in found}
    assert r2["robot place", "plate"] > 0.99 > 0.1 > r2["robot place", "target"]
    told = findings(probe.Probed(frames, "text", found, [], {}, None, {}))
    assert [one.code for one in told] == ["unknown_point"]
    assert "robot place: readout_action does not tell where target is" in told[0].message


def test_errors_are_those_of_what_was_sampled(frames, policy, monkeypatch):
    """A policy that is wrong by 0.01 x (1 + dimension), against the statistics by hand."""
    monkeypatch.setattr(probe, "BATCH", 16)

    class Wrong:
        batch_spec, statistics, text_tokenizer = policy.batch_spec, policy.statistics, policy.text_tokenizer

        def create_tasks(self, texts):
            return texts

        def sample_actions(self, observation, tasks, *, rng, unnormalize):
            rows = np.flatnonzero(frames.dataset == unnormalize)
            width = EMBODIMENTS[unnormalize.removeprefix("tabletop_")].action_dim
            self.asked = getattr(self, "asked", 0) % len(rows)
            true = np.nan_to_num(frames.action[rows[self.asked : self.asked + 16]][..., :width])
            self.asked = self.asked + 16 if self.asked + 16 < len(rows) else 0
            assert len(tasks) == len(observation["timestep"]) == len(rng) == 16
            filled = np.concatenate([true, np.full((16 - len(true), *true.shape[1:]), 1e9)])
            return filled + 0.01 * (1 + np.arange(width))

    errors = probe.action_errors(Wrong(), frames, "text")
    by_name = {(one.dataset, one.phase): one for one in errors}
    assert ("tabletop_pusher", "pick") not in by_name and ("tabletop_gripper", "switch") in by_name
    for (dataset, phase), one in by_name.items():
        stats, width = policy.statistics[dataset]["action"], one.physical.shape[1]
        step = np.where(np.isfinite(one.physical), 0.01 * (1 + np.arange(width)), np.nan)
        np.testing.assert_allclose(one.physical, step, rtol=1e-4)
        np.testing.assert_allclose(one.normalised, step / stats["std"], rtol=1e-4)
        chosen = (frames.dataset == dataset) & (frames.phases[phase] if phase != "all" else True)
        true = frames.action[chosen][..., :width]
        np.testing.assert_allclose(
            one.mean_normalised, np.nanmean(np.abs(true - stats["mean"]), 0) / stats["std"], rtol=1e-4
        )
        assert one.frames == chosen.sum()


def test_a_readout_that_asks_nothing_attends_to_all_tokens_alike(policy, frames):
    params = {path: 0 * np.asarray(x) if "/query/" in path else np.asarray(x) for path, x in flatten(policy.params)}
    silent = Policy(policy.config, unflatten(params), policy.statistics, policy.text_tokenizer)
    report = probe.token_report(silent.model, silent.batch_spec)
    attention = probe.attention_shares(silent, frames, "text", report, limit=3, maps=3)
    assert attention.groups == ("task_language", "obs_primary", "readout_action")
    rows = probe._rows(frames, "tabletop_pusher", 3)
    ids = silent.create_tasks(texts=[str(frames.instruction[row]) for row in rows])["language_instruction"]
    words = (ids["attention_mask"] > 0).sum(1)[:, None]
    want = (np.concatenate([words, np.full_like(words, 4), np.ones_like(words)], 1) / (words + 5)).mean(0)
    np.testing.assert_allclose(attention.share["tabletop_pusher"], want[None], rtol=1e-4)
    assert attention.maps["primary"].shape == (3, 1, 2, 2) and list(attention.rows) == sorted(attention.rows)
    assert len(set(frames.dataset[attention.rows])) == 2


def test_gradients_do_not_depend_on_how_the_frames_are_batched(policy, frames, monkeypatch):
    results = []
    for size in (7, 16):
        monkeypatch.setattr(probe, "GRADIENT_BATCH", size)
        results.append(probe.gradient_norms(policy, frames, "text", limit=16))
    assert list(results[0]) == ["tabletop_pusher", "tabletop_gripper"]
    for dataset, norms in results[0].items():
        assert norms["loss"] > 0 and norms["heads_action"] > 0 and norms["transformer"] > 0
        assert norms == pytest.approx(results[1][dataset], rel=1e-3)
    rows = probe._rows(frames, "tabletop_gripper", 16)
    batch = probe.loss_batch(policy, frames, "tabletop_gripper", rows, 16, "text")
    stats = policy.statistics["tabletop_gripper"]["action"]
    known = np.isfinite(frames.action[rows])
    np.testing.assert_array_equal(batch["action_pad_mask"][:, 0], known)
    want = (frames.action[rows] - stats["mean"]) / stats["std"]
    np.testing.assert_allclose(batch["action"][:, 0][known], want[known], rtol=1e-3, atol=1e-4)


# -- all together ------------------------------------------------------------------------------------------------------


def test_the_script_on_an_exported_policy(policy, tmp_path, capsys):
    policy.save_pretrained(tmp_path / "policy")
    out = tmp_path / "probe"
    assert script.main([str(tmp_path / "policy"), "--episodes", "4", "--maps", "2", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for words in (
        "readout_action",
        "obs_primary:mean",
        "phase switch",
        "open fraction",
        "task_language",
        "heads_action",
    ):
        assert words in text, words
    report = json.loads((out / "probe.json").read_text())
    assert report["frames"]["episodes"] == 8 and set(report["gradients"]) == {"tabletop_pusher", "tabletop_gripper"}
    points = {(one["scope"], one["point"]) for one in report["probes"]}
    assert ("tabletop_pusher", "plate") not in points and ("all", "target") in points
    for name in ("r2", "errors", "attention", "attention_primary"):
        image = np.asarray(Image.open(out / f"{name}.png").convert("RGB"))
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20, name
    assert (out / "probe.txt").read_text().strip() in text
    with pytest.raises(ValueError, match="no token group 'obs_wrist'"):
        script.main([str(tmp_path / "policy"), "--robots", "pusher", "--episodes", "1", "--groups", "obs_wrist"])
    with pytest.raises(ValueError, match="tasks cannot be given by 'goal'; valid: text"):
        script.main([str(tmp_path / "policy"), "--robots", "pusher", "--episodes", "1", "--task", "goal"])
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "policy"), "--robots", "pusher", "--frames", "x.npz"])


def test_key_points_goals_and_history(tmp_path):
    """One token per camera, no words, goals, a window of two, a sensor of its own, another robot's file."""
    spec = BatchSpec(2, 3, 4, {"primary": (16, 16)}, goal_images=("primary",), extra_observations={"touch": (2,)})
    image = dict(
        kind="image",
        stem=dict(kind="keypoints", layers=((4, 4, 8),), num_keypoints=4),
        obs_keys=("image_primary",),
        goal_keys=("image_primary",),
    )
    config = tiny.config(
        repeat_task_tokens=False,
        task_tokenizers={},
        observation_tokenizers=dict(primary=image, touch=dict(kind="lowdim", obs_keys=("touch",))),
    )
    model = build_model(config)
    rng = np.random.default_rng(0)
    statistics = {"mine": {"action": compute_statistics(rng.normal(size=(20, 2)))}}
    policy = Policy({"model": config, "batch_spec": spec.to_json()}, tiny.random_params(model, spec), statistics)
    n = 24
    np.savez(
        tmp_path / "mine.npz",
        image_primary=rng.integers(0, 256, (n, 16, 16, 3), np.uint8),
        touch=rng.normal(size=(n, 2)).astype(np.float32),
        present_touch=np.arange(n) % 5 > 0,
        action=rng.normal(size=(n, 5, 2)).astype(np.float32),
        episode=np.repeat(np.arange(6), 4),
        point_cup=rng.uniform(size=(n, 2)),
        phase_lift=np.arange(n) % 4 > 1,
    )
    frames = read_frames(tmp_path / "mine.npz", policy)
    assert frames.ways(policy) == ["goal"]
    np.testing.assert_array_equal(frames.goals["image_primary"][5], frames.observation["image_primary"][7])
    observation, tasks = frames.inputs(policy, "mine", np.array([0, 5]), "goal")
    np.testing.assert_array_equal(observation["timestep_pad_mask"], [[False, True], [True, True]])
    np.testing.assert_array_equal(observation["pad_mask_dict"]["touch"], [[False, False], [True, False]])
    probed = probe.probe_policy(policy, frames, folds=3, limits=probe.Limits(gradients=16, attention=4))
    assert probed.attention.maps == {} and probed.attention.groups[0] == "obs_primary (earlier)"
    np.testing.assert_allclose(probed.attention.share["mine"].sum(1), 1, rtol=1e-5)
    assert {one.scope for one in probed.readable} == {"mine", "phase lift"}
    assert {one.phase for one in probed.errors} == {"all", "lift"} and probed.errors[0].physical.shape == (3, 2)
    assert probed.gradients["mine"]["observation_tokenizers_primary"] > 0
    assert "mine.npz: 24 frames of 6 episodes; tasks are given as goal" in summary(probed)
    json.dumps(to_json(probed), allow_nan=False)
    assert {path.name for path in write(probed, tmp_path / "out")} >= {"probe.json", "r2.png", "attention.png"}


def test_frames_without_actions_or_statistics(policy, arrays):
    """Points alone are enough to probe; a policy without statistics takes proprio as it is."""
    bare = Policy(policy.config, policy.params, {}, TextTokenizer.load("builtin"))
    only = {key: arrays[key] for key in ("image_primary", "instruction", "episode", "point_target")}
    frames = frames_from_arrays(only, bare, "here")
    probed = probe.probe_policy(bare, frames, limits=probe.Limits(attention=2, maps=0))
    assert probed.errors == [] and probed.gradients == {} and frames.datasets == ["frames"]
    assert [one.scope for one in probed.readable] == ["frames", "frames"]
    assert "attends to" in summary(probed)


def test_points_of_an_auxiliary_loss_are_passed_on(frames):
    """As in training: what words name is learned from, by its known points."""
    spec = types.SimpleNamespace(points=("plate", "target", "moon"))
    index = np.array([[0, 0], [0, 1], [len(frames) - 2, len(frames) - 1]])
    batch = probe._batch_points(frames, spec, index, 2, "text")
    known = np.isfinite(frames.points["plate"][index[:2, 1], 0])
    np.testing.assert_array_equal(batch["points_pad_mask"][:2, 1, 0], known)
    assert batch["points_pad_mask"][:2, :, 1].all() and not batch["points_pad_mask"][..., 2].any()
    assert not batch["points_pad_mask"][2].any(), "a row that fills up the batch"
    np.testing.assert_array_equal(batch["points"][1, :, 1], frames.points["target"][:2])
    assert not probe._batch_points(frames, spec, index, 2, "goal")["points_pad_mask"].any()
    assert probe._batch_points(frames, types.SimpleNamespace(points=()), index, 2, "text") == {}
