"""Trajectory functions against reference values, and the stream's index arithmetic against both."""

import pathlib

import numpy as np
import pytest

from octo_like.common.schema import flatten, unflatten
from octo_like.data.dlimp import functions
from octo_like.data.order import windows
from octo_like.data.oxe import vocabulary
from octo_like.data.spec import DataError
from octo_like.data.tf import tf

EXCERPT = pathlib.Path(__file__).resolve().parent.parent / "golden" / "pipeline_excerpt.npz"


@pytest.fixture(scope="module", params=["excerpt", "all"])
def golden(request):
    """Reference arrays: the excerpt kept with the tests, then all of them where they are."""
    path = EXCERPT if request.param == "excerpt" else request.getfixturevalue("shared") / "golden" / "pipeline.npz"
    return dict(np.load(path))


def tree(golden, prefix):
    """The arrays below a prefix as tensors in a nested dict."""
    found = {
        key[len(prefix) + 1 :]: tf.constant(value) for key, value in golden.items() if key.startswith(prefix + "/")
    }
    assert found, prefix
    return unflatten(found)


def same(got, want, atol=1e-5):
    got = dict(flatten(got))
    for path, value in flatten(want):
        a, b = got[path].numpy(), value.numpy()
        assert a.shape == b.shape, path
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=path)
        else:
            np.testing.assert_array_equal(a, b, err_msg=path)


def chunk_cases(golden):
    cases = sorted({tuple(k.split("/")[1:3]) for k in golden if k.startswith("chunk/") and "/upstream/" in k})
    assert len(cases) >= 24
    return cases


def test_chunk(golden):
    for length, case in chunk_cases(golden):
        W, H = (int(part[1:]) for part in case.split("_")[:2])
        trajectory = tree(golden, f"chunk/{length}/in")
        goal = trajectory.pop("task_timestep")
        if case.endswith("_goal"):
            trajectory["task"] = {"timestep": goal}
        else:
            goal = tf.fill(goal.shape, goal.shape[0] - 1)
        same(functions.chunk(trajectory, W, H, octo_compat=True), tree(golden, f"chunk/{length}/{case}/upstream"))
        # By default: past the end iff the unclamped index is greater than the goal (or the last) step.
        got = functions.chunk(trajectory, W, H)
        index = golden[f"chunk/{length}/{case}/corrected/action_index_unclamped"]
        completed = index > goal.numpy()[:, None, None]
        np.testing.assert_array_equal(got["observation"]["task_completed"], completed)
        want = trajectory["action_pad_mask"].numpy()[:, None, None] & ~completed[..., None]
        np.testing.assert_array_equal(got["action_pad_mask"], want)
        # The two rules differ exactly where the action is at the goal.
        corrected = golden[f"chunk/{length}/{case}/corrected/observation/task_completed"]
        np.testing.assert_array_equal(corrected & ~completed, index == goal.numpy()[:, None, None])


def test_chunks_that_come_chunked(golden):
    given = tree(golden, "chunk_prechunked/in")
    same(functions.chunk(given, 2, 4, octo_compat=True), tree(golden, "chunk_prechunked/upstream"))
    given["action_pad_mask"] = tree(golden, "chunk_prechunked_cut/in")["action_pad_mask"]
    same(functions.chunk(given, 2, 3, octo_compat=True), tree(golden, "chunk_prechunked_cut/upstream"))
    with pytest.raises(DataError, match="chunks of 4, shorter than action_horizon=5"):
        functions.chunk(given, 2, 5)


def test_goal_relabelling(golden):
    cases = sorted({k.split("/")[1] for k in golden if k.startswith("goal_relabel/")})
    assert len(cases) >= 4
    for case in cases:
        trajectory = tree(golden, f"goal_relabel/{case}/in")
        draws = trajectory.pop("uniform_draws")
        limit = case.split("max")[1]
        limit = None if limit == "None" else int(limit)
        trajectory["action"] = tf.zeros([draws.shape[0], 1])
        got = functions.relabel_goals(trajectory, draws, limit)
        want = tree(golden, f"goal_relabel/{case}/upstream")
        goal = want.pop("goal_index").numpy()
        same({"task": got["task"]}, want)
        np.testing.assert_array_equal(got["task"]["timestep"], goal)
        T = len(goal)
        in_numpy = windows.goal_step(draws.numpy(), np.arange(T, dtype=np.int32), T, limit)
        np.testing.assert_array_equal(in_numpy, goal)


def test_add_pad_mask_dict(golden):
    trajectory = tree(golden, "add_pad_mask_dict/in") | {"action": tf.zeros([5, 1])}
    got = functions.add_pad_mask_dict(trajectory)
    masks = {key: got[key]["pad_mask_dict"] for key in ("observation", "task")}
    same(masks, tree(golden, "add_pad_mask_dict/upstream"))


@pytest.mark.parametrize("case,limits", [("a", (7, 8)), ("b", (7, None)), ("c", (None, 6)), ("prechunked", (6, 8))])
def test_padding(golden, case, limits):
    given = tree(golden, f"pad_actions_and_proprio/{case}/in")
    trajectory = {"action": given["action"], "observation": {"proprio": given["proprio"]}}
    got = functions.pad_actions_and_proprio(trajectory, *limits)
    got["proprio"] = got["observation"]["proprio"]
    same(got, tree(golden, f"pad_actions_and_proprio/{case}/upstream"))


def test_padding_refuses_what_is_wider():
    trajectory = {"action": tf.zeros([3, 5]), "observation": {}}
    with pytest.raises(DataError, match="action has 5 dimensions, more than max_action_dim=4"):
        functions.pad_actions_and_proprio(trajectory, 4)


@pytest.mark.parametrize("kind", ["normal", "bounds"])
@pytest.mark.parametrize("masked", [True, False])
def test_normalize(golden, kind, masked):
    given = tree(golden, "normalize/in")
    statistics = {k: {f: v.numpy() for f, v in fields.items()} for k, fields in given["stats"].items()}
    for fields in statistics.values():
        fields |= {"min": fields["p01"], "max": fields["p99"]}
    if masked:
        statistics["action"]["mask"] = given["mask"].numpy()
        statistics["proprio"]["mask"] = given["mask"].numpy()[:3]
    trajectory = {"action": given["action"], "observation": {"proprio": given["proprio"]}}
    got = functions.normalize(trajectory, statistics, kind)
    want = tree(golden, f"normalize/{kind}_{'masked' if masked else 'unmasked'}/upstream")
    for key, value in (("action", got["action"]), ("proprio", got["observation"]["proprio"])):
        spread = statistics[key]["std"] if kind == "normal" else statistics[key]["p99"] - statistics[key]["p01"]
        varies = spread > 0
        assert (~varies).sum() == (1 if key == "action" else (~varies).sum())
        np.testing.assert_allclose(value.numpy()[:, varies], want[key].numpy()[:, varies], rtol=1e-5, atol=1e-5)
        constant = ~varies & np.asarray(statistics[key].get("mask", np.ones(len(varies), bool)))
        # A dimension without spread: 0, where Octo's bounds give -1.
        np.testing.assert_array_equal(value.numpy()[:, constant], 0)


def test_dropping_a_task_condition(golden):
    given = tree(golden, "delete_task_conditioning/in")
    trajectory = {"task": given["task"], "action": tf.zeros([8, 1])}
    got = functions.drop_task_conditioning(trajectory, given["uniform_draws"], float(given["keep_image_prob"]))
    same({"task": got["task"]}, tree(golden, "delete_task_conditioning/upstream"))


def test_nothing_is_dropped_without_a_choice():
    trajectory = {"task": {"language_instruction": tf.constant(["go"])}, "action": tf.zeros([1, 1])}
    assert functions.drop_task_conditioning(trajectory, tf.zeros([1]), 0.5) is trajectory


def test_index_arithmetic_of_samples_equals_that_of_trajectories():
    T, W, H = 7, 3, 4
    t = np.arange(T, dtype=np.int32)
    goal = np.array([3, 1, 5, 6, 6, 5, 6], np.int32)
    trajectory = {
        "observation": {"x": t},
        "task": {"timestep": tf.constant(goal)},
        "action": tf.cast(t, tf.float32)[:, None],
    }
    for compat in (False, True):
        whole = functions.chunk(trajectory, W, H, octo_compat=compat)
        history = windows.window_steps(t, W)
        window = windows.within(history, T)
        np.testing.assert_array_equal(whole["observation"]["x"], window)
        chunk = windows.within(windows.chunk_steps(window, H), T)
        np.testing.assert_array_equal(whole["action"][..., 0], chunk)
        done = windows.task_completed(windows.chunk_steps(history, H), goal, octo_compat=compat)
        np.testing.assert_array_equal(whole["action_pad_mask"][..., 0], ~done)


def test_goals_are_never_behind_and_reach_the_end():
    u = np.random.default_rng(0).random(20000).astype(np.float32)
    t = np.tile(np.arange(10, dtype=np.int32), 2000)
    goal = windows.goal_step(u, t, 10)
    assert (goal >= t).all() and (goal <= 9).all()
    assert set(goal[t == 0]) == set(range(10)) and set(goal[t == 8]) == {8, 9}
    assert windows.goal_step(np.float32([0.99999994]), np.int32([0]), 10)[0] == 9


# ---------------------------------------------------------------- cameras, relative actions, subsets


@pytest.mark.parametrize("case", range(4))
def test_image_dropout(shared, case):
    golden = dict(np.load(shared / "golden" / "pipeline.npz"))
    given = tree(golden, f"image_dropout/{case}/in")
    keys = ["image_a", "image_b", "image_c"]
    observation = {key: given[key][None] for key in keys}
    observation["pad_mask_dict"] = {key: given["pad_mask"][i][None] for i, key in enumerate(keys)}
    got = functions.drop_images(
        {"observation": observation},
        given["uniform_draws"][None],
        float(given["dropout_prob"]),
        given["keep_index"][None],
    )["observation"]
    want = tree(golden, f"image_dropout/{case}/upstream")
    np.testing.assert_array_equal([got["pad_mask_dict"][key][0].numpy() for key in keys], want["pad_mask"])
    for key in keys:
        np.testing.assert_array_equal(got[key][0], want[key])


def test_dropped_images_that_are_encoded_become_empty():
    observation = {"image_a": tf.constant(["x", "y"]), "pad_mask_dict": {"image_a": tf.constant([True, True])}}
    got = functions.drop_images({"observation": observation}, tf.constant([[0.1], [0.9]]), 0.5, tf.constant([-1, -1]))
    assert got["observation"]["image_a"].numpy().tolist() == [b"", b"y"]
    assert got["observation"]["pad_mask_dict"]["image_a"].numpy().tolist() == [False, True]


def test_kept_camera_is_one_that_is_there_and_any_of_them():
    flags = np.array([[True, False, True, True]] * 3000 + [[False, True, False, False]])
    u = np.append(np.random.default_rng(0).random(3000), 0.999)
    chosen = windows.nth_true(flags, u)
    assert flags[np.arange(3001), chosen].all() and chosen[-1] == 1
    share = np.bincount(chosen[:3000], minlength=4) / 3000
    np.testing.assert_allclose(share, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.03)


@pytest.mark.parametrize("H,N", [(3, 3), (2, 5)])
def test_relative_actions(H, N):
    rng = np.random.default_rng(0)
    T, W, relative_to = 6, 2, (2, None, 0)
    action, proprio = rng.normal(size=(T, 3)).astype(np.float32), rng.normal(size=(T, 4)).astype(np.float32)
    trajectory = {"action": tf.constant(action), "observation": {"proprio": tf.constant(proprio)}}
    got = functions.chunk(functions.relative_actions(trajectory, relative_to, N), W, H)
    for t in range(T):
        for w in range(W):
            u = max(t - W + 1 + w, 0)
            for h in range(H):
                want = action[min(u + h, T - 1)] - np.array([proprio[u, 2], 0, proprio[u, 0]], np.float32)
                np.testing.assert_array_equal(got["action"][t, w, h], want)
                assert got["action_pad_mask"][t, w, h].numpy().all() == (t - W + 1 + w + h <= T - 1)
    with pytest.raises(DataError, match="2 entries, but the action has 3"):
        functions.relative_actions(trajectory, (0, 1), 4)
    with pytest.raises(DataError, match=r"needs actions of shape \(T, A\)"):
        functions.relative_actions(functions.relative_actions(trajectory, relative_to, N), relative_to, N)


def test_subsample_keeps_whole_windows():
    trajectory = {"action": tf.range(10)[:, None], "observation": {"x": tf.range(10)}}
    draws = tf.constant([0.9, 0.1, 0.5, 0.2, 0.8, 0.3, 0.7, 0.05, 0.6, 0.4])
    got = functions.subsample(functions.chunk(trajectory, 2, 2), draws, 3)
    assert got["observation"]["x"].numpy().tolist() == [[0, 1], [2, 3], [6, 7]]
    assert functions.subsample(trajectory, draws, 30)["observation"]["x"].numpy().tolist() == list(range(10))


# ---------------------------------------------------------------- grippers, actions from states


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("name", ["binarize", "rel2abs"])
def test_grippers_match_the_reference(shared, name, case):
    golden = np.load(shared / "golden" / "pipeline.npz")
    build = {"binarize": vocabulary.binarize_gripper, "rel2abs": vocabulary.rel_to_abs_gripper}[name]
    given = {"g": tf.constant(golden[f"gripper/{name}/{case}/in"])}
    got = vocabulary.evaluate(build(vocabulary.field("g")), given)
    np.testing.assert_allclose(got, golden[f"gripper/{name}/{case}/upstream"], atol=1e-6)


def test_actions_from_states_match_the_reference(shared):
    golden = dict(np.load(shared / "golden" / "pipeline.npz"))
    s = vocabulary
    moved = s.delta(s.field("observation/state")[0:6])
    relabel = s.Standardize(
        outputs={"action": s.concat(moved, s.drop_last_step(s.field("action")[-1:]))},
        passthrough_steps=(("drop_last_steps", 1),),
    )
    got = relabel(tree(golden, "relabel_actions/in"))
    same(got, tree(golden, "relabel_actions/upstream"))
