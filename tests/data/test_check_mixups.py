"""check_demos on what was exchanged, inverted or recorded twice, and its silence where nothing was."""

import dataclasses
import itertools

import numpy as np
import pytest

from octo_like.common.robot import Camera
from octo_like.data.check import mixups
from octo_like.data.check.dataset import check_dataset
from octo_like.data.check.mixups import check_pairing, exchanged_episodes, find_copies, weights
from octo_like.data.check.numbers import Numbers
from octo_like.data.convert.npz import Npz
from octo_like.data.convert.write import write_rlds
from octo_like.data.prepare import prepare_dataset, values_of, whole_split
from octo_like.data.spec import DatasetSpec
from tests.data.test_check import HZ, ROBOT, check_toy, describe, recordings, simulate


def arm(kind, joints=4, episodes=12, lag=0, together=0.5, seed=0):
    """(actions, proprios) of a servo arm that passes through four points; `together`: share of a common motion."""
    rng = np.random.default_rng(seed)
    actions, proprios = [], []
    for _ in range(episodes):
        q, points = rng.uniform(-1, 1, joints), rng.uniform(-1.5, 1.5, (4, joints))
        points = (1 - together) * points + together * rng.uniform(-1, 1, (4, 1)) * np.linspace(0.5, 1.5, joints)
        rows, pending = [], []
        for t in range(60):
            step = 0.08 * np.tanh(3 * (points[t // 15] - q))
            command = {"delta": step, "absolute": q + 2 * step, "velocity": step * HZ}[kind]
            rows.append((command + rng.normal(0, 0.01, joints), q + rng.normal(0, 0.005, joints)))
            pending.append(step)
            q = q + (pending[-1 - lag] if len(pending) > lag else 0)
        actions.append(np.array([a for a, _ in rows], np.float32))
        proprios.append(np.array([p for _, p in rows], np.float32))
    return actions, proprios


def codes(actions, proprios, description=None):
    n = Numbers(actions, proprios, np.ones(actions[0].shape[1], bool), description, HZ, 8)
    return {finding.code for finding in check_pairing(n) if finding.warning}


def flipped(arrays, d):
    return [a * np.where(np.arange(a.shape[1]) == d, -1, 1) for a in arrays]


def exchanged(arrays, d, e):
    order = np.arange(arrays[0].shape[1])
    order[[d, e]] = e, d
    return [a[:, order] for a in arrays]


@pytest.mark.parametrize("together", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["delta", "absolute", "velocity"])
def test_every_joint_and_every_pair(kind, together):
    """Also of an arm whose joints move together, where every joint correlates with every other."""
    actions, proprios = arm(kind, together=together, lag=2)
    assert not codes(actions, proprios)
    for d in range(4):
        assert codes(flipped(actions, d), proprios) == {"sign"} == codes(actions, flipped(proprios, d))
    for d, e in itertools.combinations(range(4), 2):
        assert codes(exchanged(actions, d, e), proprios) == {"swapped"} == codes(actions, exchanged(proprios, d, e))
    cycle = [a[:, [1, 2, 0, 3]] for a in actions]
    (found,) = check_pairing(Numbers(cycle, proprios, np.ones(4, bool)))
    assert "action[0] moves proprio[1], action[1] moves proprio[2], action[2] moves proprio[0]" in found.message


def test_a_described_robot_s_own_pairs():
    """Which belongs to which is declared; an order of its own is no swap, another than the declared one is."""
    actions, proprios = simulate("delta")
    assert not codes(actions, proprios, describe("delta"))
    assert codes(flipped(actions, 0), proprios, describe("delta")) == {"sign"}
    assert codes(exchanged(actions, 0, 1), proprios, describe("delta")) == {"swapped"}
    turned = describe("delta")
    x, y, g = turned.actions
    crossed = dataclasses.replace(
        turned, actions=(dataclasses.replace(x, proprio=1), dataclasses.replace(y, proprio=0), g)
    )
    assert not codes(actions, exchanged(proprios, 0, 1), crossed)


@pytest.mark.parametrize("lag", [0, 1, 3, 5])
@pytest.mark.parametrize("kind", ["delta", "absolute", "velocity"])
def test_silent_on_correct_pairs(kind, lag):
    for seed, description in itertools.product(range(2), (describe(kind), None)):
        actions, proprios = simulate(kind, seed=seed, lag=lag)
        assert not codes(actions, proprios, description)


def test_silent_when_numbers_are_of_other_things():
    """Motions of a hand beside angles of joints, and numbers that have nothing to do with each other."""
    for seed in range(10):
        actions, proprios = arm("delta", joints=6, seed=seed)
        mixed = np.random.default_rng(seed).normal(size=(6, 6))
        assert not codes([a @ mixed for a in actions], proprios)
        assert not codes(arm("delta", joints=6, seed=seed + 100)[0], proprios)
    assert weights(Numbers(actions, None, np.ones(6, bool))) is None
    assert not codes([a[:3] for a in actions[:2]], [p[:3] for p in proprios[:2]]), "too few steps to tell"


def test_weights_are_least_squares():
    """Against NumPy's own solver, on standardised numbers of one long episode; the lag is found."""
    rng = np.random.default_rng(0)
    p = np.cumsum(rng.normal(size=(400, 2)) @ [[1, 0.5], [0.5, 1]], 0)
    change = np.diff(p, axis=0, append=p[-1:])
    a = np.roll(change, -2, 0) + rng.normal(0, 0.1, (400, 2))  # the motion comes two steps later
    found = weights(Numbers([a], [p], np.ones(2, bool)))
    steps = np.arange(0, 397)
    x, y = p[steps + 3] - p[steps + 2], a[steps, 0]
    z, target = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    expected, residual, *_ = np.linalg.lstsq(z, target, rcond=None)
    np.testing.assert_allclose(found.weight[0], expected, atol=5e-3)  # the ridge
    assert found.explained[0] == pytest.approx(1 - residual[0] / len(y), abs=1e-4)
    assert found.pairs == [(0, 0), (1, 1)] and found.carried.tolist() == np.eye(2, dtype=bool).tolist()


# ---------------------------------------------------------------- cameras


def pictures(episodes, seed=0, apart=1.0, varied=0.5):
    """Small pictures of two cameras: what each always shows, what differs between scenes and is seen by both, noise."""
    rng = np.random.default_rng(seed)
    places = apart * rng.normal(size=(2, 192)) * 40
    scene, own = rng.normal(size=(episodes, 192)) * 40, rng.normal(size=(2, episodes, 192)) * 40 * varied
    return (128 + places[k] + scene + own[k] for k in range(2))


@pytest.mark.parametrize("share", [1, 6, 12])
def test_cameras_that_change_places(share):
    for seed in range(10):
        one, other = pictures(24, seed)
        assert not exchanged_episodes(one, other).any()
        turned = np.zeros(24, bool)
        turned[np.random.default_rng(seed).permutation(24)[:share]] = True
        a, b = np.where(turned[:, None], other, one), np.where(turned[:, None], one, other)
        found = exchanged_episodes(a, b)
        assert np.array_equal(found, turned) or (share == 12 and np.array_equal(found, ~turned))
        a[5] = np.nan  # an episode without that camera says nothing
        assert not exchanged_episodes(a, b)[5] and exchanged_episodes(a, b).sum() >= share - 1


def test_cameras_that_nothing_tells_apart():
    """The labels that fit best are found in any pictures; here they mean nothing. Less than one in a hundred alarms."""
    alarms = 0
    for seed in range(200):
        one, other = pictures((8, 12, 24, 48)[seed % 4], seed, apart=0.0, varied=1.0)
        light = np.random.default_rng(seed).normal(size=(2, len(one), 1)) * 100  # one direction in which all differ
        bright = np.linspace(-1, 1, 192)
        alarms += exchanged_episodes(one + light[0] * bright, other + light[1] * bright).any()
    assert alarms <= 2
    assert not exchanged_episodes(*(x[:7] for x in pictures(24))).any(), "too few episodes"


# ---------------------------------------------------------------- copies and whole datasets


def test_copies_by_numbers_and_pictures():
    seen = []

    def same(first, second):
        seen.append((first, second))
        return (first, second) != (0, 3)

    # 3 has the numbers of 0 in front of something else, 5 is a copy of it; pictures are only read where numbers agree.
    assert find_copies(["a", "b", "a", "a", "c", "a"], same) == [(0, 2), (0, 5)]
    assert seen == [(0, 2), (0, 3), (0, 5)]
    action, proprio = np.ones((3, 2), np.float32), np.zeros((3, 1), np.float32)
    key = mixups.digest(action, proprio)
    assert key == mixups.digest(action.copy(), proprio.astype(np.float64))
    assert key not in (mixups.digest(action, proprio[:, :0]), mixups.digest(action + 1e-6, proprio))


TWO = dataclasses.replace(ROBOT, cameras={**ROBOT.cameras, "wrist": Camera("wrist", (32, 32))})


def _wrist(arrays, number):
    """Another view: a dark hand over the middle of the table."""
    frames = arrays["front"][:, ::-1] // 2 + 20
    frames[:, 10:22, 10:22] = 15
    return frames


def test_cameras_swapped_in_half_of_the_episodes(tmp_path):
    assert not check_toy(tmp_path / "right", TWO, wrist=_wrist).warnings
    checked = check_toy(
        tmp_path / "wrong",
        TWO,
        wrist=lambda a, n: a["front"] if n % 2 else _wrist(a, n),
        front=lambda a, n: _wrist(a, n) if n % 2 else a["front"],
    )
    (found,) = checked.warnings
    assert found.code == "cameras_swapped" and "'primary' and 'wrist' change places in 5 of 11" in found.message


@pytest.mark.parametrize("again", [False, True])
def test_a_recording_that_is_there_twice(tmp_path, again):
    """Under another name, and so with another hash of its record; the same numbers in front of other things are not."""
    folder = recordings(tmp_path / "raw")
    arrays = dict(np.load(folder / "episode_4.npz"))
    if not again:
        arrays["front"] = arrays["front"][:, ::-1]
    np.savez(folder / "taken_again.npz", **arrays)
    write_rlds(Npz(str(folder)), str(tmp_path), "toy")
    prepared = prepare_dataset(
        "toy", DatasetSpec.from_dict(ROBOT.dataset_fields(), "toy"), str(tmp_path), progress=False
    )
    hashes = np.concatenate([prepared.train.record_hash, prepared.val.record_hash])
    assert len(np.unique(hashes)) == len(hashes) == 13
    warned = check_dataset(prepared, str(tmp_path)).warnings
    assert [finding.code for finding in warned] == ["duplicates"] * again
    assert not again or "1 of 13 episodes are copies" in warned[0].message


def test_one_step_episodes(tmp_path):
    folder = recordings(tmp_path / "raw")
    for number in (12, 13):
        arrays = dict(np.load(folder / f"episode_{number - 12}.npz"))
        np.savez(folder / f"episode_{number}.npz", **{k: v if v.ndim == 0 else v[:1] for k, v in arrays.items()})
    write_rlds(Npz(str(folder)), str(tmp_path), "toy")
    spec = DatasetSpec.from_dict(ROBOT.dataset_fields(), "toy")
    checked = check_dataset(prepare_dataset("toy", spec, str(tmp_path), progress=False), str(tmp_path))
    (found,) = checked.warnings
    assert found.code == "one_step" and found.message.startswith("2 of 14 episodes have a single step")


def test_real_robot(shared):
    """BridgeData V2's own actions (not the differences of its poses): silent, and every mistake is found."""
    fields = dict(name="bridge_dataset", proprio_keys=("state",), image_keys=dict(primary="image_0", other="image_1"),
                  action_normalization_mask=(True,) * 6 + (False,))  # fmt: skip
    data_dir = str(shared / "bridge_debug")
    prepared = prepare_dataset("bridge", DatasetSpec.from_dict(fields), data_dir, progress=False)
    checked = check_dataset(prepared, data_dir, horizon=4)
    assert not checked.warnings, checked.warnings
    whole = whole_split(prepared, "train", data_dir)
    actions, proprios = zip(*((a, p) for _, a, p in values_of(prepared, prepared.train, whole)), strict=True)

    def found(values):
        n = Numbers(values, proprios, checked.numbers.normalised)
        return {finding.code for finding in check_pairing(n)}

    assert all(found(flipped(actions, d)) == {"sign"} for d in range(6))
    assert all(found(exchanged(actions, d, e)) == {"swapped"} for d, e in itertools.combinations(range(6), 2))
