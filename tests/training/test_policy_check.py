"""check_policy against a policy whose errors are known, and as a command with real parts."""

import dataclasses
import importlib.util
import sys

import numpy as np
import pytest

from octo_like.common.demo import Demo
from octo_like.common.robot import Description, absolute, gripper
from octo_like.common.schema import BatchSpec
from octo_like.data.check.replay import load_demos
from octo_like.data.prepare import prepare_dataset
from octo_like.data.spec import DatasetSpec
from octo_like.robot import check, check_report
from octo_like.robot.check import Latency, check_policy, findings_of, observations, replay
from octo_like.robot.check_report import summary, write_page
from tests.data.conftest import build, make_episodes
from tests.robot.tiny import tiny_policy

H, A = 4, 2
BIAS = np.array([0.1, 0.2, 0.3, 0.4])[:, None] * np.array([1.0, -2.0])


def make_demo(steps=37, seed=0):
    """A frame's first pixel is the number of its step."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((steps, 8, 8, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(steps)
    action = np.cumsum(rng.normal(size=(steps, A)), 0).astype(np.float32)
    proprio = rng.normal(size=(steps, 3)).astype(np.float32)
    return Demo("demo", {"primary": frames}, {"primary": np.ones(steps, bool)}, proprio, action, "do it")


class KnownPolicy:
    """Reads the step off the image, and answers with the true chunk plus BIAS."""

    text_tokenizer = object()
    batch_spec = BatchSpec(3, H, A, {"primary": (8, 8)}, proprio_dim=3, language_length=4)

    def __init__(self, demo):
        self.chunks = demo.chunks(H)[0]
        self.seen = []
        action = demo.action.astype(np.float64)
        self.statistics = {
            "d": {"action": dict(mean=action.mean(0), std=action.std(0), min=action.min(0), max=action.max(0))}
        }

    def create_tasks(self, texts):
        assert set(texts) == {"do it"}
        return {"n": np.zeros(len(texts))}

    def sample_actions(self, observations, tasks, *, rng, unnormalize):
        assert unnormalize == "d" and len(tasks["n"]) == len(observations["proprio"])
        self.seen.append(observations)
        return self.chunks[observations["image_primary"][:, -1, 0, 0, 0]] + BIAS


def test_windows_are_what_a_robot_has():
    demo = make_demo(5)
    rows = observations(demo, KnownPolicy(demo))
    assert [row["image_primary"][:, 0, 0, 0].tolist() for row in rows[:3]] == [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert [row["timestep_pad_mask"].tolist() for row in rows[:2]] == [[False, False, True], [False, True, True]]
    np.testing.assert_array_equal(rows[4]["proprio"], demo.proprio[2:5])
    absent = dataclasses.replace(demo, present={"primary": np.arange(5) != 3})
    mask = observations(absent, KnownPolicy(demo))[4]["pad_mask_dict"]["image_primary"]
    assert mask.tolist() == [True, False, True]


def test_errors_are_the_known_ones():
    demo = make_demo()
    one = replay(KnownPolicy(demo), demo, "d")
    np.testing.assert_allclose(one.predicted - one.true, np.broadcast_to(BIAS, one.true.shape), atol=1e-5)
    assert one.valid.sum(0).tolist() == [37, 36, 35, 34]
    checked = check_policy(KnownPolicy(demo), [demo, demo], "d", calls=3)
    np.testing.assert_allclose(checked.errors.policy, np.abs(BIAS), atol=1e-5)
    assert checked.errors.count.tolist() == [74, 72, 70, 68]
    a = demo.action.astype(np.float64)
    for h in range(H):
        pairs = range(37 - h)
        np.testing.assert_allclose(
            checked.errors.mean[h], np.abs([a[t + h] - a.mean(0) for t in pairs]).mean(0), rtol=1e-5
        )
        want = np.abs([a[t + h] - a[max(t - 1, 0)] for t in pairs]).mean(0)
        np.testing.assert_allclose(checked.errors.repeat[h], want, rtol=1e-5)


def test_what_is_executed_and_how_it_moves():
    demo = make_demo()
    checked = check_policy(KnownPolicy(demo), [demo], "d", exec_horizon=3, calls=3)
    one = checked.replays[0]
    want = np.array([one.predicted[t - t % 3, t % 3] for t in range(37)])
    np.testing.assert_array_equal(one.executed(3), want)
    rough = [
        np.mean([abs(x[t + 1] - 2 * x[t] + x[t - 1]) for t in range(1, 36)]) for x in (want[:, 0], demo.action[:, 0])
    ]
    assert checked.roughness[0] == pytest.approx(rough[0] / rough[1], rel=1e-5)
    # Chunks that are 3 steps apart share one step: its errors are BIAS[3] and BIAS[0].
    np.testing.assert_allclose(checked.disagreement, np.abs(BIAS[3] - BIAS[0]) / demo.action.std(0), rtol=1e-4)
    low, high = checked.limits
    outside = np.mean([(row < low) | (row > high) for row in want], axis=0)
    np.testing.assert_allclose(checked.outside, outside)
    whole = check_policy(KnownPolicy(demo), [demo], "d", exec_horizon=4, calls=3)
    assert np.isnan(whole.disagreement).all()


def test_findings():
    demo = make_demo()
    description = Description(10.0, (absolute("x", "m", limits=(-1.0, 1.0)), absolute("y", "rad")))
    good = check_policy(KnownPolicy(demo), [demo], "d", calls=3)
    assert not [f for f in good.findings if f.warning] and "unknown" in good.findings[-1].message

    def codes(check):
        return {f.code: f.message for f in findings_of(check) if f.warning}

    limited = check_policy(KnownPolicy(demo), [demo], "d", calls=3, description=description)
    assert "x (" in codes(limited)["limits"] and "y (" not in codes(limited)["limits"]
    errors = dataclasses.replace(good.errors, policy=good.errors.mean * [2, 0.5])
    assert codes(dataclasses.replace(good, errors=errors))["not_learned"].startswith("a0: ")
    assert "a1 (4.0 times)" in codes(dataclasses.replace(good, roughness=np.array([1.0, 4.0])))["rough"]
    # At 10 Hz a step is 100 ms; 2 of 4 actions are executed.
    for milliseconds, word, warning in (
        (80, "within one step", False),
        (150, "2 + 2 of its 4 actions are enough", False),
        (250, "the robot waits", True),
    ):
        slow = dataclasses.replace(good, hz=10.0, latency=Latency(9.0, np.full(20, float(milliseconds))))
        (found,) = [f for f in findings_of(slow) if f.code == "latency"]
        assert word in found.message and found.warning == warning
    tight = dataclasses.replace(good, hz=10.0, exec_horizon=3, latency=Latency(9.0, np.full(20, 150.0)))
    assert "would need 5 actions and have 4" in codes(tight)["latency"]


class Copycat(KnownPolicy):
    """Goes on as the proprioception says: right at every step but the first, where it says nothing."""

    def __init__(self, demos, looks):
        super().__init__(demos[0])
        self.chunks = [demo.chunks(H)[0] for demo in demos]
        self.looks = looks

    def sample_actions(self, observations, tasks, *, rng, unnormalize):
        which = observations["image_primary"][:, -1, 0, 1, 0]
        steps = observations["image_primary"][:, -1, 0, 0, 0]
        chunks = np.stack([self.chunks[i][t] for i, t in zip(which, steps, strict=True)])
        return np.where((steps == 0)[:, None, None] & (not self.looks), 0.0, chunks)


def test_a_policy_that_only_goes_on_is_told_by_its_first_action():
    demos = []
    for i in range(6):
        demo = make_demo(seed=i)
        demo.images["primary"][:, 0, 1, 0] = i
        demo.action[:] *= 0.2
        demo.action[0] = [(-1.0) ** i, 0.5]  # scenes differ in the first dimension, not in the second
        demos.append(demo)
    codes = {}
    for looks in (False, True):
        check = check_policy(Copycat(demos, looks), demos, "d", calls=1)
        codes[looks] = {f.code: f.message for f in check.findings if f.warning}
        # Half of the first actions are 1, half -1: their mean is off by 1.
        np.testing.assert_allclose(check.start, [[0.0 if looks else 1.0, 0.0 if looks else 0.5], [1.0, 0.0]], atol=1e-6)
    assert codes[False]["start"].startswith("a0: the first action") and "start" not in codes[True]
    assert "not_learned" not in codes[False], "over whole episodes it looks good"
    few = check_policy(Copycat(demos, False), demos[:2], "d", calls=1)
    assert np.isnan(few.start).all() and "start" not in {f.code for f in few.findings}


def test_bad_arguments():
    demo = make_demo()
    for demos, options, message in (
        ([], {}, "no demonstrations"),
        ([demo], dict(exec_horizon=5), r"exec_horizon must be in 1..4"),
        ([demo], dict(description=Description(5.0, (gripper(),))), "1 action dimensions, the policy's dataset 2"),
    ):
        with pytest.raises(ValueError, match=message):
            check_policy(KnownPolicy(demo), demos, "d", calls=1, **options)


def test_goal_policies_are_given_the_last_frame():
    demo, asked = make_demo(), []

    class GoalPolicy(KnownPolicy):
        batch_spec = dataclasses.replace(KnownPolicy.batch_spec, goal_images=("primary",), language_length=None)

        def create_tasks(self, goals):
            asked.append(goals["image_primary"])
            return {"n": np.zeros(len(goals["image_primary"]))}

    replay(GoalPolicy(demo), demo, "d")
    assert asked[0].shape == (check.BATCH, 8, 8, 3) and (asked[0][:, 0, 0, 0] == 36).all()


def test_report(tmp_path):
    demo = make_demo()
    checked = check_policy(KnownPolicy(demo), [demo], "d", hz=5.0, calls=5)
    text = summary(checked)
    assert (
        "1 held-out demonstrations, 37 steps, chunks of 4 actions, 2 executed" in text
        and "control period 200.0 ms" in text
    )
    page = tmp_path / "out" / "index.html"
    assert write_page(checked, str(tmp_path / "out")) == str(page)
    assert page.read_text().count("data:image/png;base64,") == 3
    for name in ("replay_0.png", "errors.png", "latency.png"):
        assert (tmp_path / "out" / name).stat().st_size > 3000


FIELDS = dict(
    image_keys={"primary": "front_rgb", "wrist": "hand_rgb"},
    proprio_keys=("joints", "aperture"),
    action_key="control",
    language_key="task_text",
    val_fraction=0.2,
)


def test_demos_are_the_recorded_ones(tmp_path):
    episodes = make_episodes(6)
    build(tmp_path, "toy", {"train": episodes})
    prepared = prepare_dataset(
        "toy", DatasetSpec.from_dict(FIELDS | dict(val_fraction=0), "toy"), str(tmp_path), progress=False
    )
    demos = list(load_demos(prepared, prepared.train, {"primary": (40, 52), "other": (8, 8)}, 100))
    assert len(demos) == 6 and list(demos[0].images) == ["primary"]
    by_action = {episode[0]["control"].tobytes(): episode for episode in episodes}
    for demo in demos:
        episode = by_action[demo.action[0].tobytes()]
        np.testing.assert_array_equal(demo.action, [step["control"] for step in episode])
        np.testing.assert_array_equal(demo.images["primary"], [step["observation"]["front_rgb"] for step in episode])
        np.testing.assert_allclose(demo.proprio[:, :3], [step["observation"]["joints"] for step in episode], rtol=1e-6)
        assert demo.instruction == episode[0]["task_text"]
    assert len(list(load_demos(prepared, prepared.train, {}, 2))) == 2


def test_what_is_replayed_is_what_training_held_out(tmp_path, repository, monkeypatch, capsys):
    """finetune.py holds out a tenth, a dataset named on the command line a twentieth: the policy says what it was."""
    build(tmp_path, "toy", {"train": make_episodes(20)})
    fields = dict(image_keys=dict(primary="front_rgb"), proprio_keys=("joints", "aperture"), action_key="control",
                  language_key="task_text")  # fmt: skip
    counted = {"num_demos": 9, "num_demos_of": "training"}
    trained = DatasetSpec.from_dict({"name": "toy", "val_fraction": 0.3, **counted, **fields}, "mine")
    policy = tiny_policy("mine", 4, 4)
    policy.statistics["mine"]["held_out"] = trained.held_out()
    del policy.statistics["mine"]["held_out"]["num_demos_of"]  # an export of before there was a choice
    policy.save_pretrained(tmp_path / "export")
    spec = importlib.util.spec_from_file_location("check_policy", repository / "scripts" / "check_policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    replayed = []
    monkeypatch.setattr(check, "check_policy", lambda policy, demos, *args, **kwargs: replayed.append(demos))
    monkeypatch.setattr(check_report, "write_page", lambda *args: "page")
    monkeypatch.setattr(check_report, "summary", lambda *args: (_ for _ in ()).throw(ValueError("enough")))
    keys = ['image_keys={"primary": "front_rgb"}', 'proprio_keys=["joints", "aperture"]', "action_key=control",
            "language_key=task_text"]  # fmt: skip

    def main(*more):
        command = [tmp_path / "export", "--data_dir", tmp_path, "--episodes", 99, "toy", *more]
        monkeypatch.setattr(sys, "argv", ["check_policy.py", *map(str, command)])
        module.main()
        return [demo.where for demo in replayed[-1]], capsys.readouterr().out

    held = prepare_dataset("mine", trained, str(tmp_path), progress=False)
    assert main("--set", *keys)[0] == [held.val.where(i) for i in range(len(held.val))] and len(held.val) == 6
    assert len(main("--train", "--set", *keys)[0]) == 9
    wheres, printed = main("--set", *keys, "val_fraction=0.1")
    assert len(wheres) == 2 and "val_fraction=0.1, trained with 0.3" in printed


def test_command(tmp_path, repository, monkeypatch, capsys):
    build(tmp_path, "toy", {"train": make_episodes(8)})
    tiny_policy("toy", 4, 4).save_pretrained(tmp_path / "export")
    script = repository / "scripts" / "check_policy.py"
    spec = importlib.util.spec_from_file_location("check_policy", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_policy.py", *map(str, arguments)])
        return module.main()

    common = (tmp_path / "export", "--data_dir", tmp_path, "--output", tmp_path / "out", "--calls", 3)
    keys = ('image_keys={"primary": "front_rgb"}', 'proprio_keys=["joints", "aperture"]', "action_key=control",
            "language_key=task_text", "val_fraction=0.2")  # fmt: skip
    assert main(*common, "toy", "--control_hz", 5, "--set", *keys) == 0
    printed = capsys.readouterr().out
    assert "2 held-out demonstrations" in printed and "note latency" in printed and "a3 " in printed
    assert (tmp_path / "out" / "toy" / "index.html").exists()
    for arguments, message in (
        (("toy", "--set", *keys[:-1], "val_fraction=0"), "no episodes are held out"),
        (("toy", "--unnormalize", "to", "--set", *keys), "did you mean 'toy'"),
        (("toy", "--exec_horizon", 9, "--set", *keys), "exec_horizon must be in 1..4"),
        (
            ("toy", "--set", *keys, "action_key=observation/joints"),
            "3 action dimensions, the policy's statistics of 'toy' 4",
        ),
        (("tyo",), "did you mean 'toy'"),
    ):
        assert main(*common, *arguments) == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error and "error: " in error and message in error, error
