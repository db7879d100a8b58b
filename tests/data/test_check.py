"""Every warning of check_demos is given on data made wrong on purpose, and none on data that is right."""

import dataclasses
import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from octo_like.common.robot import Camera, Description, Robot, absolute, delta, gripper, velocity
from octo_like.data.check.dataset import check_dataset, summary, write_page
from octo_like.data.check.numbers import LAGS, Numbers, check, relation
from octo_like.data.convert.npz import Npz
from octo_like.data.convert.write import Options, write_rlds
from octo_like.data.prepare import prepare_dataset
from octo_like.data.spec import DataError, DatasetSpec

HZ = 10
NAMES = ("x", "y", "gripper")


def simulate(kind, episodes=24, seed=0, lag=0):
    """(actions (T, 3), proprios (T, 3)) of a servo-driven x, y and a gripper: moves to random goals, grasps on the way.

    `kind`: what actions say of x and y. `lag`: further steps until the motion follows.
    """
    rng = np.random.default_rng(seed)
    actions, proprios = [], []
    for _ in range(episodes):
        goal, place = rng.uniform(-0.4, -0.1, 2), rng.uniform(0.1, 0.4, 2)
        p, aperture = rng.uniform(-0.4, 0.4, 2), 1.0
        grasped, a_rows, p_rows, pending = False, [], [], []
        for _ in range(60):
            towards = place if grasped else goal
            step = 0.04 * np.tanh(8 * (towards - p))
            grasped = grasped or np.linalg.norm(goal - p) < 0.01
            closed = grasped and np.linalg.norm(place - p) > 0.015
            if grasped and np.linalg.norm(place - p) < 0.005:
                break
            command = {"delta": step, "absolute": p + step, "velocity": step * HZ}[kind]
            a_rows.append([*command, 0.0 if closed else 1.0])
            p_rows.append([*p, aperture])
            pending.append(step)
            moved = pending[-1 - lag] if len(pending) > lag else np.zeros(2)
            p = p + moved + rng.normal(0, 4e-4, 2)
            aperture += 0.6 * (a_rows[-1][2] - aperture)
        actions.append(np.array(a_rows, np.float32))
        proprios.append(np.array(p_rows, np.float32))
    return actions, proprios


def describe(kind, unit="m", **more):
    make = {"delta": delta, "absolute": absolute, "velocity": velocity}[kind]
    rate = {"velocity": f"{unit}/s"}.get(kind, unit)
    actions = (make("x", rate, proprio=0, **more), make("y", rate, proprio=1, **more), gripper(proprio=2))
    return Description(HZ, actions, NAMES)


def numbers(kind="delta", declared=None, data=None, **more):
    actions, proprios = data or simulate(kind)
    return Numbers(actions, proprios, np.array([True, True, False]), describe(declared or kind, **more), HZ, 8)


def warnings_of(n):
    return {finding.code for finding in check(n)[0] if finding.warning}


@pytest.mark.parametrize("kind", ["delta", "absolute", "velocity"])
@pytest.mark.parametrize("described", [True, False])
def test_silent_on_correct_numbers(kind, described):
    n = numbers(kind)
    found, relations = check(n if described else dataclasses.replace(n, description=None))
    assert not [finding for finding in found if finding.warning], "\n".join(map(str, found))
    looks = "absolute" if kind == "absolute" else "delta"
    assert [r.looks for r in relations[:2]] == [looks, looks]


def test_relation_is_correlation():
    """Against NumPy, pair by pair, on one long episode."""
    rng = np.random.default_rng(0)
    p = np.cumsum(rng.normal(size=200))
    a = np.roll(np.diff(p, append=p[-1]), -2) + rng.normal(0, 0.01, 200)  # the motion comes two steps later
    found = relation([a[:, None]], [p[:, None]], 0, 0)
    assert LAGS[found.curve.argmax()] == 2 and found.looks == "delta"
    t = np.arange(1, 197)
    assert found.change == pytest.approx(np.corrcoef(a[t], p[t + 3] - p[t + 2])[0, 1])
    assert found.level == pytest.approx(np.corrcoef(a[:-1], p[1:])[0, 1])
    assert found.gain == pytest.approx(1, abs=0.05)


def changed(kind, change):
    actions, proprios = simulate(kind)
    return [change(a.copy(), p) for a, p in zip(actions, proprios, strict=True)], proprios


def put(column, values):
    def change(a, p):
        a[:, column] = values(a, p)
        return a

    return change


def spike(a, p):
    a[7, 0] = 30.0 * np.sign(a[0, 0] or 1) if p[0, 0] == FIRST else a[7, 0]
    return a


FIRST = simulate("delta")[1][0][0, 0]


@pytest.mark.parametrize(
    "code,made",
    [
        ("not_delta", lambda: numbers("absolute", "delta")),
        ("not_delta", lambda: numbers("absolute", "velocity")),
        ("not_absolute", lambda: numbers("delta", "absolute")),
        ("scale", lambda: numbers("velocity", "delta")),
        ("scale", lambda: numbers(data=changed("delta", lambda a, p: a * [1000, 1000, 1]))),
        ("units", lambda: numbers(data=changed("delta", lambda a, p: a * [1000, 1000, 1]))),
        ("units", lambda: numbers("absolute", unit="rad", data=changed("absolute", lambda a, p: a * [180, 180, 1]))),
        ("limits", lambda: numbers(limits=(-0.02, 0.02))),
        ("lag", lambda: numbers(data=simulate("delta", lag=5))),
        ("lag", lambda: numbers("absolute", data=changed("absolute", lambda a, p: np.roll(a, -6, 0)))),
        ("lag", lambda: numbers(data=changed("delta", lambda a, p: np.roll(a, 1, 0)))),
        ("lag", lambda: numbers("absolute", data=changed("absolute", lambda a, p: np.c_[p[:, :2], a[:, 2]]))),
        ("gripper_sign", lambda: numbers(data=changed("delta", put(2, lambda a, p: 1 - a[:, 2])))),
        ("gripper_range", lambda: numbers(data=changed("delta", put(2, lambda a, p: 2 * a[:, 2] - 1)))),
        ("gripper_range", lambda: numbers(data=changed("delta", put(2, lambda a, p: 0.04 * a[:, 2])))),
        ("idle", lambda: numbers(data=changed("delta", lambda a, p: a * (np.arange(len(a)) < 15)[:, None]))),
        ("saturated", lambda: numbers(data=changed("delta", lambda a, p: a.clip([-0.01, -0.01, 0], [0.01, 0.01, 1])))),
        ("outlier", lambda: numbers(data=changed("delta", spike))),
        ("few_demos", lambda: numbers(data=simulate("delta", episodes=6))),
        ("short_demos", lambda: dataclasses.replace(numbers(), horizon=50)),
        ("unnormalised", lambda: dataclasses.replace(
            numbers(data=changed("delta", put(2, lambda a, p: 255 * a[:, 2]))), description=None)),
    ],
)  # fmt: skip
def test_each_warning_on_numbers(code, made):
    assert code in warnings_of(made())


def test_inverted_gripper_without_proprioception():
    """What is left are the commands: episodes that begin and end closed."""
    right = dataclasses.replace(numbers(), proprios=None, description=None)
    assert "gripper_sign" not in warnings_of(right)
    actions = changed("delta", put(2, lambda a, p: 1 - a[:, 2]))[0]
    assert "gripper_sign" in warnings_of(dataclasses.replace(right, actions=actions))


def test_constant_is_a_note():
    found, _ = check(numbers(data=changed("delta", put(1, lambda a, p: 0 * a[:, 1]))))
    assert [f.warning for f in found if f.code == "constant"] == [False]


# ---------------------------------------------------------------- a whole dataset

WOOD = np.array([170, 120, 70])
TEXTS = ("push the red block", "push the blue block")


def recordings(folder, count=12, **changes):
    """npz episodes of the simulated robot over a wooden table. `changes`: name -> function of (arrays, number)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    actions, proprios = simulate("delta", episodes=count)
    for number, (action, proprio) in enumerate(zip(actions, proprios, strict=True)):
        steps = len(action)
        frames = np.tile(WOOD, (steps, 32, 32, 1)) + rng.integers(-6, 7, (steps, 32, 32, 1))
        row, column = ((proprio[:, :2] + 0.6) * 24).astype(int).clip(1, 28).T
        for t in range(steps):
            frames[t, row[t] : row[t] + 4, column[t] : column[t] + 4] = (40, 40, 40)
        frames[:, 2:9, 20:27] = (220, 20, 20) if number % 2 == 0 else (20, 20, 220)
        arrays = dict(
            front=frames.clip(0, 255).astype(np.uint8),
            state=proprio,
            action=action,
            timestamp=np.arange(steps) / HZ,
            instruction=TEXTS[number % 2],
        )
        arrays |= {key: change(arrays, number) for key, change in changes.items()}
        np.savez(folder / f"episode_{number}.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder


ROBOT = Robot(
    name="toy",
    cameras=dict(primary=Camera("front", (32, 32))),
    proprio=("state",),
    proprio_names=NAMES,
    actions=describe("delta").actions,
    control_hz=HZ,
    action_horizon=8,
)


def check_toy(tmp_path, robot=ROBOT, **changes):
    source = Npz(str(recordings(tmp_path / "raw", **changes)))
    write_rlds(source, str(tmp_path), "toy", options=Options(missing_cameras="mask"))
    spec = DatasetSpec.from_dict(robot.dataset_fields(), "toy")
    prepared = prepare_dataset("toy", spec, str(tmp_path), progress=False)
    return check_dataset(prepared, str(tmp_path), horizon=8)


def test_silent_on_a_correct_dataset(tmp_path):
    checked = check_toy(tmp_path)
    assert not checked.warnings, checked.warnings
    text = summary(checked)
    for part in ("11 (1 held out)", "10 Hz", "action[0] x", "delta", "push the red block", "no warnings", "0.1000 s"):
        assert part in text, text
    page = pathlib.Path(write_page(checked, str(tmp_path / "out")))
    content = page.read_text()
    assert content.count("data:image/png;base64,") == 3 and "no warnings" in content
    assert (tmp_path / "out" / "toy.png").stat().st_size > 10_000


def _drop(arrays, number):
    times = arrays["timestamp"].copy()
    times[10:] += 0.3
    times[20:] += 0.3
    return times


@pytest.mark.parametrize(
    "code,changes",
    [
        ("bgr", dict(front=lambda a, n: a["front"][..., ::-1])),
        # Two episodes: one of the twelve is held out, and not looked at.
        ("camera_black", dict(front=lambda a, n: a["front"] * (n not in (3, 7)))),
        ("camera_missing", dict(wrist=lambda a, n: None if n in (5, 9) else a["front"])),
        ("repeated_frames", dict(front=lambda a, n: a["front"][np.arange(len(a["front"])) // 2 * 2])),
        ("dropped_frames", dict(timestamp=_drop)),
        ("control_rate", dict(timestamp=lambda a, n: a["timestamp"] / 3)),
        ("language_gaps", dict(instruction=lambda a, n: TEXTS[0] if n % 3 else "")),
        ("no_language", dict(instruction=lambda a, n: "")),
    ],
)
def test_each_warning_on_frames_times_and_words(tmp_path, code, changes):
    robot = ROBOT
    if "wrist" in changes:
        robot = dataclasses.replace(ROBOT, cameras={**ROBOT.cameras, "wrist": Camera("wrist", (32, 32))})
    checked = check_toy(tmp_path, robot, **changes)
    assert {finding.code for finding in checked.warnings} == {code}, checked.warnings


def test_turned_channels_are_right_again(tmp_path):
    """bgr_slots is what the warning advises: with it the same files are silent."""
    robot = dataclasses.replace(ROBOT, cameras=dict(primary=Camera("front", (32, 32), bgr=True)))
    assert not check_toy(tmp_path, robot, front=lambda a, n: a["front"][..., ::-1]).warnings


def test_silent_on_real_robots(shared):
    """The sample of BridgeData V2: changes of the pose it records, at no lag."""
    spec = DatasetSpec.from_dict(dict(name="bridge_dataset", standardize="bridge_dataset"))
    data_dir = str(shared / "bridge_debug")
    prepared = prepare_dataset("bridge", spec, data_dir, progress=False)
    checked = check_dataset(prepared, data_dir, horizon=4)
    assert not checked.warnings, checked.warnings
    assert [r.looks for r in checked.relations[:6]] == ["delta"] * 6


def test_command_line(tmp_path, repository, monkeypatch, capsys):
    script = repository / "scripts" / "check_demos.py"
    spec = importlib.util.spec_from_file_location("check_demos", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    write_rlds(Npz(str(recordings(tmp_path / "raw", count=11))), str(tmp_path), "toy")
    robot = tmp_path / "robot.py"
    robot.write_text(
        "from octo_like.common.robot import Camera, Robot, absolute, gripper\n"
        "ROBOT = Robot(name='toy', cameras=dict(primary=Camera('front', (32, 32))), proprio=('state',), "
        "proprio_names=('x', 'y', 'g'), actions=(absolute('x', 'm', proprio=0), absolute('y', 'm', proprio=1), "
        "gripper(proprio=2)), control_hz=10, action_horizon=8)\n"
    )

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_demos.py", "--data_dir", *map(str, arguments)])
        return module.main()

    out = ("--output", tmp_path / "out")
    assert main(tmp_path, "--robot", robot, *out) == 0
    printed = capsys.readouterr().out
    assert "WARNING not_absolute: action[0] x is declared absolute, but looks like a change" in printed
    assert main(tmp_path, "--robot", robot, *out, "--strict") == 2
    plain = ("toy", "--set", 'image_keys={"primary": "front"}', 'proprio_keys=["state"]',
             "action_normalization_mask=[true, true, false]")  # fmt: skip
    assert main(tmp_path, *out, *plain, "--horizon", 8) == 0
    capsys.readouterr()
    for arguments, message in (
        ((tmp_path, "--robot", tmp_path / "no.py"), "no.py' does not exist"),
        ((tmp_path, "--robot", f"{robot}:ARM"), "no Robot called ARM; valid: ROBOT"),
        ((tmp_path, "--robot", robot, "toy"), "exactly one of them"),
    ):
        assert main(*arguments, *out) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
    robot.write_text(robot.read_text().replace("gripper(proprio=2)", "absolute('z', 'm'), gripper(proprio=2)"))
    assert main(tmp_path, "--robot", robot, *out) == 1
    assert "4 action dimensions (x, y, z, gripper), the data has 3" in capsys.readouterr().err


def test_too_few_episodes(tmp_path):
    """One demonstration: an error that says what to do, not a run without validation."""
    write_rlds(Npz(str(recordings(tmp_path / "raw", count=1))), str(tmp_path), "toy")
    spec = DatasetSpec.from_dict(ROBOT.dataset_fields(), "toy")
    with pytest.raises(DataError, match=r"1 episode\(s\) with usable steps, none left to train on .*val_fraction=0"):
        prepare_dataset("toy", spec, str(tmp_path), progress=False)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no .*npz files"):
        write_rlds(Npz(str(tmp_path / "none")), str(tmp_path), "none")
