"""Nothing dangerous reaches the policy or the motors: replies, observations, histories, actions."""

import threading

import numpy as np
import pytest

from octo_like.robot.client import PolicyClient, PolicyServerError
from octo_like.robot.history import History
from octo_like.robot.messages import pack, unpack
from octo_like.robot.safety import (
    MARGIN,
    ActionFilter,
    UnsafeAction,
    action_limits,
    check_observation,
    expected_keys,
)
from octo_like.robot.server import PolicyServer
from octo_like.robot.wrappers import (
    ActionChunkWrapper,
    ActionFilterWrapper,
    HistoryWrapper,
    ResizeImages,
    TemporalEnsembleWrapper,
)
from tests.robot.toy import SIZE, LineEnv, LinePolicy

pytest.importorskip("websockets")


def frame(x: float = 5.0) -> dict:
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[:, int(x)] = 255
    return {"image_primary": image, "proprio": np.array([x], np.float32)}


class SlowPolicy(LinePolicy):
    """Answers when it is let: its actions say which position it saw."""

    def __init__(self):
        super().__init__()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def sample_actions(self, observations, tasks, *, rng, unnormalize):
        self.may_answer.wait(30)
        seen = np.asarray(observations["proprio"])[:, -1, 0]
        return np.repeat(seen[:, None, None], 3, axis=1).astype(np.float32)


@pytest.fixture
def slow():
    policy = SlowPolicy()
    with PolicyServer(policy, unnormalize="line", port=0).running() as server:
        yield policy, server


def test_a_late_reply_is_nobodys_action(slow):
    """Before requests had ids, every call after a timeout returned the actions of the observation before."""
    policy, server = slow
    with PolicyClient(port=server.port) as client:
        assert client.act(frame(1), "go left")[0, 0] == 1
        policy.may_answer.clear()
        client.timeout = 0.2
        with pytest.raises(TimeoutError):
            client.act(frame(2), "go left")
        policy.may_answer.set()
        client.timeout = 30
        for x in (3, 4):
            assert client.act(frame(x), "go left")[0, 0] == x
        assert client.late_replies == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_on_both_sides(slow, bad):
    _, server = slow
    with PolicyClient(port=server.port) as client:
        with pytest.raises(ValueError, match=r"observation/proprio: .* at \[0\] \(1 of 1 values are not finite\)"):
            client.act(frame() | {"proprio": np.array([bad], np.float32)}, "go left")
        assert client.act(frame(2), "go left")[0, 0] == 2
    window = {"proprio": np.array([[1], [bad]], np.float32), "image_primary": np.zeros((2, SIZE, SIZE, 3), np.uint8)}
    window["timestep_pad_mask"] = np.array([True, True])
    reply = raw_request(server, {"type": "act", "id": 7, "observation": window, "instruction": "go left"})
    assert reply["type"] == "error" and reply["id"] == 7 and "not finite" in reply["message"]


def raw_request(server, message) -> dict:
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{server.port}", proxy=None, compression=None) as connection:
        connection.recv(10)
        connection.send(pack(message))
        return unpack(connection.recv(10))


def test_actions_that_are_no_numbers_are_not_sent():
    policy = LinePolicy()
    policy.sample_actions = lambda *_, **__: np.full((1, 3, 1), np.nan, np.float32)
    with PolicyServer(policy, unnormalize="line", port=0).running() as server, PolicyClient(port=server.port) as client:
        with pytest.raises(PolicyServerError, match="actions are not finite; they were not sent"):
            client.act(frame(), "go left")


def test_a_misspelled_or_missing_sensor_is_an_error_and_not_a_blind_robot(slow):
    _, server = slow
    with PolicyClient(port=server.port) as client:
        with pytest.raises(ValueError, match="reads no 'image_primry'; did you mean 'image_primary'\\?"):
            client.act({"image_primry": frame()["image_primary"], "proprio": np.ones(1)}, "go left")
        with pytest.raises(ValueError, match=r"lacks proprio, .* allow_missing=\('proprio',\)"):
            client.act({"image_primary": frame()["image_primary"]}, "go left")
        assert client.act(frame(3), "go left")[0, 0] == 3  # nothing of these was kept
    with pytest.raises(ValueError, match="allow_missing: the policy reads no 'wrist'"):
        PolicyClient(port=server.port, allow_missing=("wrist",))
    image = {"image_primary": np.zeros((2, SIZE, SIZE, 3), np.uint8), "timestep_pad_mask": np.array([True, True])}
    reply = raw_request(server, {"type": "act", "id": 1, "observation": image, "instruction": "go left"})
    assert reply["type"] == "error" and "lacks proprio" in reply["message"]  # also a client that does not look
    reply = raw_request(server, {"type": "act", "id": 2, "observation": image, "instruction": b"go left"})
    assert reply["type"] == "error" and "'instruction' must be a text" in reply["message"]


def test_a_camera_may_reuse_its_buffer():
    history, buffer = History(3), np.zeros((2, 2, 3), np.uint8)
    for value in (1, 2, 3):
        buffer[:] = value
        window = history.append({"image_primary": buffer, "proprio": np.array([value])})
    assert window["image_primary"][:, 0, 0, 0].tolist() == [1, 2, 3]
    buffer[:] = 9
    assert window["image_primary"].max() == 3


def test_an_instruction_that_is_cut_is_reported(caplog):
    class Tokenizer:
        max_length = 4

        def num_tokens(self, text):
            return len(text.split()) + 1

    policy = LinePolicy()
    policy.text_tokenizer = Tokenizer()
    with PolicyServer(policy, unnormalize="line", port=0).running() as server, PolicyClient(port=server.port) as client:
        client.act(frame(), "go left")
        assert not caplog.records
        for _ in range(2):
            client.act(frame(), "go to the left end")
    reports = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
    assert reports == ["policy server: the policy reads 4 tokens, the instruction has 6: its end is cut off"]


# ---------------------------------------------------------------- what is expected


def test_expected_keys_are_those_the_policy_reads():
    spec = dict(image_sizes={"primary": [8, 8], "wrist": [8, 8]}, proprio_dim=3, depth_sizes={"primary": [8, 8]})
    spec["extra_observations"] = {"force": [6]}
    cameras = ["image_primary", "image_wrist", "depth_primary"]
    assert expected_keys(spec) == [*cameras, "proprio", "force"]
    assert expected_keys(spec, {"action": {}, "extra": {}}) == cameras
    assert expected_keys(spec, {"action": {}, "proprio": {}, "extra": {"force": {}}}) == [*cameras, "proprio", "force"]
    check_observation({"image_primary": np.zeros(1)}, cameras, ("image_wrist", "depth_primary"))
    with pytest.raises(ValueError, match="expected numbers, got an array of object"):
        check_observation({"image_primary": np.array([None])}, ["image_primary"])


# ---------------------------------------------------------------- the filter


def test_limits_are_declared_or_demonstrated():
    entry = {"action": {"mean": np.zeros(4), "min": [-1, -1, 0, -0.5], "max": [1, 1, 1, 0.5]}}
    entry["proprio"] = {"mean": np.zeros(2), "min": [2.0, 0.0], "max": [4.0, 1.0]}
    entry["relative_to"] = [None, None, None, 0]
    entry["robot"] = {
        "action_limits": [None, [-0.25, 0.25], None, None],
        "action_kind": ["delta", "delta", "gripper", "absolute"],
        "action_name": ["x", "y", "gripper", "z"],
        "action_unit": ["m", "m", "1", "m"],
    }
    limits = action_limits(entry)
    assert limits["declared"] == [False, True, False, False]
    np.testing.assert_allclose(limits["low"], [-1 - 2 * MARGIN, -0.25, -MARGIN, 1.5 - 3 * MARGIN])
    np.testing.assert_allclose(limits["high"], [1 + 2 * MARGIN, 0.25, 1 + MARGIN, 4.5 + 3 * MARGIN])
    assert action_limits({"action": {"mean": [0.0]}})["low"] == [None]  # a release that never said


def by_hand(actions, low, high, change, still):
    """The filter's rule, number by number: (what is executed, counts of clipped, slowed, held)."""
    last, done, counts = None, [], [0, 0, 0]
    for action in actions:
        row, flags = [], [False, False, False]
        for d, value in enumerate(action):
            if not np.isfinite(value):
                value, flags[2] = 0.0 if still[d] else last[d], True
            clipped = min(max(value, low[d]), high[d])
            flags[0] |= clipped != value
            slowed = clipped
            if last is not None:
                slowed = min(max(clipped, last[d] - change[d]), last[d] + change[d])
            flags[1] |= slowed != clipped
            row.append(slowed)
        counts = [n + flag for n, flag in zip(counts, flags, strict=True)]
        done.append(row)
        last = row
    return np.array(done), counts


@pytest.mark.parametrize("seed", range(5))
def test_the_filter_against_its_rule(seed):
    rng = np.random.default_rng(seed)
    actions = rng.normal(0, 2, (50, 3))
    actions[rng.random((50, 3)) < 0.1] = np.nan
    actions[0] = 0.5
    low, high, change = [-1.0, -2.0, -np.inf], [1.0, 0.5, np.inf], [0.5, np.inf, 1.0]
    safe = ActionFilter(low, [1.0, 0.5, None], max_change=[0.5, None, 1.0], kinds=["delta", "absolute", "gripper"])
    got = np.stack([safe(action) for action in actions])
    want, counts = by_hand(actions, low, high, change, [True, False, False])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert [safe.counts[key] for key in ("clipped", "slowed", "held")] == counts
    assert safe.counts["actions"] == 50 and "50 actions" in str(safe)
    assert np.isfinite(got).all() and (got[:, 0] <= 1).all() and (np.abs(np.diff(got[:, 2])) <= 1 + 1e-6).all()


def test_what_cannot_be_held_is_an_error():
    safe = ActionFilter([-1, -1], [1, 1], kinds=["delta", "absolute"], names=["x", "joint"])
    with pytest.raises(UnsafeAction, match="joint is nan, and nothing was executed before"):
        safe([np.nan, np.nan])
    with pytest.raises(UnsafeAction, match="joint cannot be held"):
        safe.hold()
    safe([0.25, 0.5])
    assert safe.hold().tolist() == [0.0, 0.5] and safe([np.nan, np.nan]).tolist() == [0.0, 0.5]
    safe.reset()
    with pytest.raises(UnsafeAction):
        safe.hold()
    with pytest.raises(ValueError, match="expected an action of 2 dimensions"):
        safe([1.0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(low=[1.0], high=[0.0]), "limits must be"),
        (dict(low=[0.0], high=[1.0, 2.0]), "one length"),
        (dict(low=[0.0], high=[1.0], max_change=0.0), "max_change positive"),
    ],
)
def test_limits_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ActionFilter(**arguments)


def test_the_client_keeps_to_the_limits_and_knows_what_was_executed():
    policy = SlowPolicy()
    policy.statistics["line"]["dimensions"] = {"action": {"names": ["x"], "kinds": ["absolute"]}}
    policy.statistics["line"]["action"] |= {"min": np.array([0.0]), "max": np.array([10.0])}
    with PolicyServer(policy, unnormalize="line", port=0).running() as server:
        with PolicyClient(port=server.port, max_change=2.0) as client:
            assert client.hold() is None  # nothing was executed: there is nothing to command
            actions = client.act(frame(15), "go")
            assert actions[:, 0].tolist() == [11.0, 11.0, 11.0]  # 10 and a tenth of the range
            assert client.filter.counts["clipped"] == 3 and client.hold() is None  # a chunk is no execution
            client.executed(actions[0])
            client.observe(frame(14))
            actions = client.act(frame(3), "go")
            assert actions[:, 0].tolist() == [9.0, 7.0, 5.0]  # no faster than 2 a step
            client.executed(actions[0])
            client.observe(frame(2))
            assert client.hold().tolist() == [9.0]
            client.observe(frame(2))  # observing executes nothing
            assert client.hold().tolist() == [9.0]
            assert client.act(frame(1), "go")[:, 0].tolist() == [7.0, 5.0, 3.0]
        with PolicyClient(port=server.port, limits=False) as client:
            assert client.act(frame(15), "go")[:, 0].tolist() == [15.0] * 3 and client.filter is None
            with pytest.raises(RuntimeError, match="limits=False"):
                client.hold()


# ---------------------------------------------------------------- wrappers


def test_an_environment_gets_filtered_actions_whatever_wraps_it():
    env = LineEnv(time_limit=None)
    env = ActionChunkWrapper(
        HistoryWrapper(ActionFilterWrapper(env, ActionFilter([-1.0], [1.0], kinds=["absolute"])), 2), 3
    )
    env.reset(seed=0)
    start = env.unwrapped.x
    info = env.step(np.array([[5.0], [0.5], [np.nan]]))[-1]
    assert env.unwrapped.x == pytest.approx(start + 1.0 + 0.5 + 0.5)  # an absolute value is held
    assert info["action_filter"] == {"actions": 3, "clipped": 1, "slowed": 0, "held": 1}
    env.reset(seed=0)
    with pytest.raises(UnsafeAction):
        env.step(np.full((3, 1), np.nan))
    with pytest.raises(ValueError, match="limits 2 dimensions, the environment takes 1"):
        ActionFilterWrapper(LineEnv(), ActionFilter([-1.0, 0], [1.0, 1], kinds=["delta"] * 2))


@pytest.mark.parametrize("wrap", [lambda env: ActionChunkWrapper(env, 2), lambda env: TemporalEnsembleWrapper(env, 2)])
def test_chunks_that_are_no_numbers_are_refused_even_without_a_filter(wrap):
    env = wrap(LineEnv())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="chunk holds values that are not finite"):
        env.step(np.array([[0.0], [np.inf]]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda env: HistoryWrapper(ActionChunkWrapper(env, 2), 2), "HistoryWrapper must be inside ActionChunkWrapper"),
        (lambda env: HistoryWrapper(HistoryWrapper(env, 2), 2), "HistoryWrapper is there already"),
        (lambda env: ActionChunkWrapper(TemporalEnsembleWrapper(env, 2), 2), "one of them takes chunks"),
        (lambda env: ActionChunkWrapper(ActionChunkWrapper(env, 2), 2), "one of them takes chunks"),
        (
            lambda env: ActionFilterWrapper(ActionChunkWrapper(env, 2), ActionFilter([0], [1], kinds=["delta"])),
            "inside ActionCh",
        ),
        (
            lambda env: ResizeImages(HistoryWrapper(env, 2), {"image_primary": (8, 8)}),
            "ResizeImages must be inside HistoryWrapper",
        ),
    ],
)
def test_wrappers_in_an_order_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(LineEnv())
