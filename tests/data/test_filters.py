"""Filters against the episodes that were written; the stream shows what they leave, and nothing else."""

import sys

import numpy as np
import pytest

from octo_like.common import normalization
from octo_like.common.schema import BatchSpec
from octo_like.data.prepare import prepare_dataset
from octo_like.data.rlds import filters
from octo_like.data.spec import DataError, DatasetSpec
from tests.data.streams import make_train_stream, make_val_iterators

SPEC = BatchSpec(2, 3, 4, {"primary": (40, 52)}, proprio_dim=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def prepare(toy, cache):
    def make(**changes):
        spec = DatasetSpec.from_dict(toy.fields(**({"val_fraction": 0} | changes)))
        return prepare_dataset("toy", spec, toy.data_dir, cache, progress=False)

    return make


def actions(toy):
    return [np.stack([step["control"] for step in episode]) for episode in toy.episodes]


def proprios(toy):
    keys = ("joints", "aperture")
    return [
        np.stack([np.concatenate([np.atleast_1d(step["observation"][k]) for k in keys]) for step in episode])
        for episode in toy.episodes
    ]


def left(prepared):
    """{(episode, step)} that may be samples, of a dataset without hold-out."""
    index = prepared.train
    return {(e, int(step)) for e in range(len(index)) for step in index.usable(e)}


def brute(toy, keep):
    return {(e, t) for e, episode in enumerate(toy.episodes) for t in range(len(episode)) if keep(e, t)}


def test_without_filters_all_steps_are_usable(toy, prepare):
    prepared = prepare()
    assert prepared.train.bits is None
    assert left(prepared) == brute(toy, lambda e, t: True)
    np.testing.assert_array_equal(prepared.train.frames, prepared.train.steps)


def test_skip_unlabeled(toy, prepare):
    prepared = prepare(skip_unlabeled=True)
    assert left(prepared) == brute(toy, lambda e, t: bool(toy.episodes[e][0]["task_text"]))
    assert set(prepared.train.frames[~prepared.train.has_language]) == {0}


@pytest.mark.parametrize("kind", ["normal", "bounds"])
@pytest.mark.parametrize("mask", [None, (True, True, True, False)])
def test_max_action_and_proprio(toy, prepare, kind, mask):
    options = dict(normalization=kind, action_normalization_mask=mask)
    statistics = prepare(**options).statistics
    for key, values in (("action", actions(toy)), ("proprio", proprios(toy))):
        largest = [np.abs(normalization.normalize(v, statistics[key], kind)).max() for v in values]
        limit = float(np.median(largest))
        prepared = prepare(**options, **{f"max_{key}": limit})
        # Bounds clip at 1, which every longer episode reaches: then nothing is larger.
        assert limit == 1 if kind == "bounds" and key == "action" else 0 < (prepared.train.frames > 0).sum() <= 23
        assert left(prepared) == brute(toy, lambda e, t, n=largest, m=limit: n[e] <= m)
        # As in Octo, statistics come before these filters.
        np.testing.assert_array_equal(prepared.statistics["action"]["mean"], statistics["action"]["mean"])


@pytest.mark.parametrize("of", ["action", "change"])
def test_idle_steps(toy, prepare, of):
    mask, threshold = (True, True, True, False), 0.8
    all_actions = actions(toy)

    def idle(e, t):
        now, before = all_actions[e][t], all_actions[e][max(t - 1, 0)]
        size = now if of == "action" else now - before
        return (np.abs(size[:3]) <= np.float32(threshold)).all() and now[3] == before[3]

    prepared = prepare(idle_threshold=threshold, idle_of=of, action_normalization_mask=mask)
    want = brute(toy, lambda e, t: not idle(e, t))
    assert left(prepared) == want and len(want) < sum(map(len, toy.episodes))


def test_idle_steps_by_hand():
    moves = np.array([True, True, False])
    action = np.float32([[0, 0, 1], [0, 0, 1], [0.2, 0, 1], [0, 0, 0], [0, 0, 0]])
    assert filters.idle_steps(action, 0.1, "action", moves).tolist() == [True, True, False, False, True]
    assert filters.idle_steps(action, 0.1, "change", moves).tolist() == [True, True, False, False, True]
    absolute = np.float32([[5, 1, 0], [5, 1, 0], [5.5, 1, 0], [5.5, 1, 0]])
    assert filters.idle_steps(absolute, 0.1, "change", moves).tolist() == [True, True, False, True]
    chunks = np.stack([action, action + 9], axis=1)  # of chunks, the first action counts
    assert filters.idle_steps(chunks, 0.1, "action", moves).tolist() == [True, True, False, False, True]
    assert filters.idle_steps(action[:0], 0.1, "action", moves).tolist() == []


@pytest.mark.parametrize("part", [(0, None, 2), (2, -1, None), (-3, None, 1), (50, None, None)])
def test_frame_slice(toy, prepare, part):
    if part[0] == 50:
        with pytest.raises(DataError, match=r"filters leave none of the \d+ steps of 23 training.*frame_slice="):
            prepare(frame_slice=part)
        return
    assert left(prepare(frame_slice=part)) == brute(toy, lambda e, t: t in range(len(toy.episodes[e]))[slice(*part)])


def no_button(trajectory):
    """A user's filter of whole episodes; sees the episode's own features too."""
    import tensorflow as tf

    assert trajectory["traj_metadata"]["episode_metadata"]["number"].dtype == tf.int32
    return tf.reduce_all(trajectory["task_text"] != "press the red button")


def gripper_open(trajectory):
    return trajectory["control"][:, 3] > 0.5


def too_much(trajectory):
    return trajectory["control"]


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setitem(sys.modules, "user_filters", sys.modules[__name__])
    return "user_filters"


def test_user_filters(toy, prepare, here):
    whole = prepare(filter=f"{here}:no_button", val_fraction=0.2)
    texts = [episode[0]["task_text"] for episode in toy.episodes]
    kept = {e for e, text in enumerate(texts) if text != "press the red button"}
    # Refused episodes are not there: not in statistics, not in validation.
    assert len(whole.train) + len(whole.val) == len(kept)
    assert whole.statistics["num_trajectories"] == len(whole.train)
    assert whole.statistics["num_transitions"] == whole.train.steps.sum()
    steps = prepare(filter=f"{here}:gripper_open")
    assert left(steps) == brute(toy, lambda e, t: toy.episodes[e][t]["control"][3] > 0.5)
    both = prepare(filter=f"{here}:gripper_open", frame_slice=(0, None, 3))
    assert left(both) == left(steps) & left(prepare(frame_slice=(0, None, 3)))
    with pytest.raises(DataError, match=r"user_filters:too_much' returned float32.*valid: a bool"):
        prepare(filter=f"{here}:too_much")


def test_the_hash_knows_the_filters(prepare):
    options = [
        {},
        dict(skip_unlabeled=True),
        dict(max_action=2.3),
        dict(max_action=2.5),
        dict(idle_threshold=0.5),
        dict(idle_threshold=0.5, idle_of="change"),
        dict(frame_slice=(0, None, 2)),
        dict(frame_slice=(1, None, 2)),
    ]
    hashes = [prepare(**changes).train.hash for changes in options]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [prepare(**changes).train.hash for changes in options]  # the second time from the cache


def test_a_subset_keeps_its_steps(prepare):
    whole = prepare(idle_threshold=0.8)
    part = whole.train.take(np.array([5, 2, 11]))
    for i, e in enumerate((5, 2, 11)):
        np.testing.assert_array_equal(part.usable(i), whole.train.usable(e))
    episode = np.repeat(np.arange(3), part.frames)
    frame = np.concatenate([np.arange(n) for n in part.frames])
    np.testing.assert_array_equal(part.step_of(episode, frame), np.concatenate([part.usable(i) for i in range(3)]))


def test_the_stream_shows_usable_steps_only_and_all_of_them(toy, prepare):
    prepared = prepare(frame_slice=(1, None, 2), skip_unlabeled=True)
    frames = 2 * int(prepared.train.frames.sum())  # the first pass ends when the second has begun
    options = dict(seed=0, batch_size=8, episodes_mixed=4, host_threads=1)
    with make_train_stream({"toy": prepared}, SPEC, None, **options) as stream:
        samples = stream.order.samples(np.arange(frames))
        rows = [next(stream) for _ in range(-(-frames // 8))]
    steps = np.concatenate([batch["observation"]["timestep"][:, -1] for batch in rows])[:frames]
    assert set(zip(samples.episode.tolist(), steps.tolist(), strict=True)) == left(prepared)
    # Windows and chunks still use the steps that are no samples themselves.
    stats = prepared.statistics["action"]
    for i in range(8):
        control = actions(toy)[samples.episode[i]]
        want = normalization.normalize(control[min(steps[i] + 1, len(control) - 1)], stats)
        np.testing.assert_allclose(rows[0]["action"][i, -1, 1], want, rtol=1e-6)


def test_validation_is_filtered_too(prepare):
    prepared = prepare(val_fraction=0.3, frame_slice=(0, None, 2))
    (iterator,) = make_val_iterators({"toy": prepared}, SPEC, None, batch_size=4, host_threads=1).values()
    steps = np.concatenate([batch["observation"]["timestep"][:, -1] for batch in iterator])
    assert iterator.num_frames == prepared.val.frames.sum() and (steps % 2 == 0).all()


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(max_action=-1.0), "max_action must not be negative"),
        (dict(max_action=1e-3), "filters leave none.*max_action=0.001"),
        (dict(idle_threshold=1.0, idle_of="speed"), "idle_of 'speed'.*valid: action, change"),
        (dict(frame_slice=(0, 1)), r"frame_slice must be \(start, stop, step\)"),
        (dict(frame_slice=(0, None, -1)), "step at least 1"),
        (dict(subsample_length=0), "subsample_length must be at least 1"),
        (dict(max_proprio=1.0, proprio_keys=()), "max_proprio needs proprio_keys"),
        (dict(skip_unlabeled=True, language_key=None), "would leave nothing"),
        (dict(filter="no_such_module:f"), "cannot import 'no_such_module'"),
        (dict(relative_to=(0, None, None, None)), "relative_to and chunk_length go together"),
        (dict(relative_to=(0,), chunk_length=4), "relative_to has 1 entries, but the action has 4"),
        (dict(relative_to=(9, None, None, None), chunk_length=4), "names proprio dimension 9; valid: 0 to 3"),
        (dict(weight=float("nan")), "weight must be a finite number"),
    ],
)
def test_bad_filters(prepare, change, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        prepare(**change)
