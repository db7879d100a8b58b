"""The loop of the docs against a server that is killed, started again, slow, unwilling and wrong, at every request.

The server is a real one of websockets' whose answers follow a script; what it says of its policy is a `PolicyServer`'s.
Another test kills a real process.
"""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from octo_like.robot import client as robot_client
from octo_like.robot import loop as robot_loop
from octo_like.robot.chunking import Plan
from octo_like.robot.client import PolicyClient, PolicyServerError
from octo_like.robot.executor import AsyncExecutor
from octo_like.robot.local import LocalPolicy
from octo_like.robot.loop import drive
from octo_like.robot.messages import pack, unpack
from octo_like.robot.safety import UnknownKind
from octo_like.robot.server import PolicyServer
from tests.robot.toy import SIZE, LinePolicy

pytest.importorskip("websockets")

H, EXECUTED = 10, 4
# What the server does instead of answering; each is a failed request.
FAULTS = {
    "killed": None,
    "slow": None,
    "refused": lambda reply: {"type": "error", "error": "ValueError", "message": "no"},
    "garbage": lambda reply: b"\xc1 no message",
    "text": lambda reply: "no message",
    "a list": lambda reply: [reply],
    "another type": lambda reply: {**reply, "type": "song"},
    "no actions": lambda reply: {key: value for key, value in reply.items() if key != "actions"},
    "words": lambda reply: {**reply, "actions": "left"},
    "short": lambda reply: {**reply, "actions": reply["actions"][:-1]},
    "long": lambda reply: {**reply, "actions": np.repeat(reply["actions"], 2, axis=0)},
    "wide": lambda reply: {**reply, "actions": np.repeat(reply["actions"], 2, axis=1)},
    "flat": lambda reply: {**reply, "actions": reply["actions"].ravel()},
    "nan": lambda reply: {**reply, "actions": reply["actions"] * np.nan},
    "one inf": lambda reply: {**reply, "actions": np.r_[reply["actions"][:-1], [[np.inf]]]},
    "subtask": lambda reply: {**reply, "subtask": 3},
}


def metadata(kind: str = "absolute", horizon: int = H) -> dict:
    policy = LinePolicy(horizon=horizon)
    policy.statistics["line"]["dimensions"]["action"]["kinds"] = [kind]
    return unpack(pack(PolicyServer(policy, unnormalize="line", port=0).metadata))


class Scripted:
    """Answers request number i as `script.get(i)` says, else with a chunk of where the robot is, + 0, + .01, ..."""

    def __init__(self, kind: str = "absolute"):
        self.told, self.script, self.windows, self.requests = metadata(kind), {}, [], []
        self.chunk = lambda seen, number: seen + np.arange(H)[:, None] / 100
        self.port, self._open = 0, None

    def start(self) -> None:
        from websockets.sync.server import serve

        self._server = serve(self._converse, "127.0.0.1", self.port, compression=None)
        self.port = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """As a process that is killed: nobody says goodbye, and the port refuses."""
        for connection in list(self._server.connections):
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        self._thread.join(30)

    def _converse(self, connection) -> None:
        connection.send(pack(self.told))
        for data in connection:
            request = unpack(data)
            number = len(self.windows)
            self.windows.append(request["observation"])
            self.requests.append(request)
            fault = self.script.get(number)
            if fault == "slow":
                continue
            if fault == "killed":
                connection.socket.shutdown(socket.SHUT_RDWR)
                return
            chunk = self.chunk(request["observation"]["proprio"][-1], number).astype(np.float32)
            reply = {"type": "actions", "id": request["id"], "actions": chunk, "warnings": []}
            answer = reply if fault is None else FAULTS[fault](reply)
            answer = {**answer, "id": request["id"]} if isinstance(answer, dict) else answer
            connection.send(answer if isinstance(answer, (bytes, str)) else pack(answer))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()


class Arm:
    """A robot of one joint, at x = 0, 1, 2, ... in its control steps; it has the client's patience for this request."""

    def __init__(self, server: Scripted, policy: PolicyClient):
        self.server, self.policy = server, policy
        self.x, self.executed = -1, []

    def observe(self) -> dict:
        self.x += 1
        slow = self.server.script.get(len(self.server.windows)) == "slow"
        self.policy.timeout = 0.05 if slow else 30.0
        return {"image_primary": np.zeros((SIZE, SIZE, 3), np.uint8), "proprio": np.array([self.x], np.float32)}

    def execute(self, action: np.ndarray) -> None:
        self.executed.append((self.x, float(np.asarray(action)[0])))


def times(count: int):
    left = iter(range(count))
    return lambda: next(left, None) is not None


def check(server: Scripted, robot: Arm, failed: set[int], kind: str, last: int) -> None:
    """Every command is the next of a chunk that was given, or holds."""
    held = 0.0 if kind == "delta" else None
    executed, position, chunk, request = robot.executed, 0, None, 0
    begun = min((x for x, _ in executed), default=0)  # before that the robot stood where it was found: one moment
    for number, window in enumerate(server.windows):
        seen = window["proprio"].ravel().tolist()
        if seen[-1] > begun:
            assert seen == [seen[-1] - 1, seen[-1]], "frames of a window follow each other, and none is there twice"
            assert window["timestep"].tolist() == [seen[-1] - 1 - begun, seen[-1] - begun] and number <= last
        else:
            assert seen == [seen[-1]] * 2 and window["timestep_pad_mask"].tolist() == [False, True]
    x = 0
    for number in range(len(server.windows)):
        if number not in failed:
            chunk, position = server.chunk(np.array([x], float), number)[:, 0], 0
        else:
            chunk = None
        for _ in range(EXECUTED if chunk is not None else 1):
            if chunk is None and held is None and request == 0:
                x += 1  # nothing was executed yet: nothing is commanded
                break
            wanted = chunk[position] if chunk is not None else (0.0 if kind == "delta" else executed[request - 1][1])
            assert executed[request] == (x, pytest.approx(wanted, abs=1e-5)), (number, request)
            position, request, x = position + 1, request + 1, x + 1
    ended = executed[request:]
    assert len(ended) == (0 if not request else 1), "the loop ends in a hold"
    if ended:
        assert ended[0][1] == (0.0 if kind == "delta" else executed[request - 1][1])


@pytest.fixture(params=["here", "client package"])
def modules(request, client_package):
    """The loop and the client, as they are here and in the package for robots."""
    if request.param == "here":
        return robot_client, robot_loop
    name = client_package.name
    return importlib.import_module(f"{name}.client"), importlib.import_module(f"{name}.loop")


@pytest.mark.parametrize("kind", ["absolute", "delta"])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_every_fault_at_every_request_ends_in_what_was_executed(kind, first, modules):
    """Requests `first` and the next fail, the others are answered."""
    client, loop = modules
    for fault in FAULTS:
        with Scripted(kind) as server:
            server.script = {first: fault, first + 1: fault}
            with client.PolicyClient(port=server.port) as policy:
                robot = Arm(server, policy)
                loop.drive(policy, robot, "go", times(5), execute=EXECUTED)
                assert len(server.windows) == 5, fault
                check(server, robot, {first, first + 1}, kind, 4)
                assert policy.late_replies == 0


def test_holding_again_and_again_commands_nothing_new():
    """The server fails from the second request on: horizon 10, 4 executed, and then the fourth for ever."""
    with Scripted() as server, PolicyClient(port=server.port) as policy:
        server.script = dict.fromkeys(range(1, 100), "refused")
        robot = Arm(server, policy)
        drive(policy, robot, "go", times(8), execute=4)
        assert [x for _, x in robot.executed] == pytest.approx([0, 0.01, 0.02, 0.03] + [0.03] * 8)


@pytest.mark.parametrize("when", range(6))
def test_a_server_that_is_killed_and_started_again_is_found(when):
    """Killed before control step number `when` of the first two chunks, and back some requests later."""
    with Scripted() as server, PolicyClient(port=server.port) as policy:

        class Watched(Arm):
            def observe(self):
                if self.x + 1 == when:
                    server.stop()
                if self.x + 1 == when + 6:
                    server.start()
                return super().observe()

        robot = Watched(server, policy)
        drive(policy, robot, "go", times(12), execute=4)
        gone = [x for at, x in robot.executed if when <= at < when + 6]
        before = [x for at, x in robot.executed if at < when]
        assert len(set(gone[-3:])) <= 1  # it holds
        assert policy.connections == 2 and robot.executed[-2][0] > when + 6
        assert len(server.windows) >= 2 and (before or when == 0)
        assert robot.executed[-1][1] == robot.executed[-2][1]
        chunks = {round(float(window["proprio"][-1, 0]) + k / 100, 4) for window in server.windows for k in range(4)}
        assert {round(x, 4) for _, x in robot.executed} <= chunks, "an action that was never given"


def test_no_step_is_larger_than_max_change_whatever_fails():
    rng = np.random.default_rng(0)
    faults = [*FAULTS, *[None] * len(FAULTS)]
    for kind in ("absolute", "delta"):
        with Scripted(kind) as server, PolicyClient(port=server.port, max_change=0.3) as policy:
            jumps = rng.normal(0, 2, (200, H, 1))
            server.chunk = lambda seen, number: jumps[number]  # noqa: B023
            server.script = {number: faults[int(rng.integers(len(faults)))] for number in range(60)}
            robot = Arm(server, policy)
            drive(policy, robot, "go", times(60), execute=4)
            said = np.array([x for _, x in robot.executed])
            steps = np.abs(np.diff(said))
            if kind == "delta":  # to stop is always allowed
                steps = steps[said[1:] != 0]
            assert len(said) > 60 and steps.max() <= 0.3 + 1e-6


def test_a_speed_does_not_go_on_while_the_next_request_takes_its_time():
    with Scripted("velocity") as server, PolicyClient(port=server.port) as policy:
        server.chunk = lambda seen, number: np.full((H, 1), 0.5)
        server.script = {1: "slow", 2: "killed"}
        robot = Arm(server, policy)
        drive(policy, robot, "go", times(4), execute=2)
        assert [x for _, x in robot.executed] == [0.5, 0.5, 0, 0, 0, 0.5, 0.5, 0, 0]
        seen = [window["proprio"].ravel().tolist() for window in server.windows]
        assert seen == [[0, 0], [2, 3], [3, 4], [4, 5]]


def test_the_loop_holds_also_when_the_robot_fails():
    with Scripted() as server, PolicyClient(port=server.port) as policy:
        robot = Arm(server, policy)
        good = robot.observe

        def camera_is_gone():
            if robot.x == 5:
                raise OSError("no camera")
            return good()

        robot.observe = camera_is_gone
        with pytest.raises(OSError, match="no camera"):
            drive(policy, robot, "go", times(9), execute=4)
        assert robot.executed[-1] == robot.executed[-2]


@pytest.mark.parametrize("kind", ["absolute", "delta"])
@pytest.mark.parametrize("mode", ["wait", "naive", "ensemble"])
def test_an_executor_goes_on_through_every_fault_and_an_absence(mode, kind):
    """Every command is one that the newest chunks have for this moment, or the hold of what was executed last."""
    for first in (1, 2):
        with Scripted(kind) as server, PolicyClient(port=server.port) as policy:
            server.script = {first + 2 * n: fault for n, fault in enumerate(FAULTS)}
            plan = Plan(mode, exec_horizon=H, exp_weight=-50.0)  # of an ensemble, the newest alone
            with AsyncExecutor(policy, plan, max_errors=1000, delay=0) as executor:
                robot = Arm(server, policy)
                executor.start(robot.observe(), "go")
                said, absent = [], range(60, 90)
                for step in range(120):
                    if step in (absent.start, absent.stop):
                        (server.stop if step == absent.start else server.start)()
                    before = executor.filter.last
                    said.append(float(executor.step(robot.observe() if step else None)[0]))
                    chunks = executor.state.seams[-1] == step
                    held = 0.0 if kind == "delta" else None if before is None else float(before[0])
                    ahead = [window["proprio"][-1, 0] + k / 100 for window in server.windows for k in range(H)]
                    assert chunks or said[-1] == held or min(abs(said[-1] - x) for x in ahead) < 1e-4, (step, first)
                    if step in absent[H:]:
                        assert said[-1] == held
                assert policy.connections >= 2 and executor.state.seams[-1] >= absent.stop and executor.errors
                assert executor.hold()[0] == (0 if kind == "delta" else said[-1])


@pytest.mark.parametrize("kind", ["absolute", "velocity"])
@pytest.mark.parametrize("end", ["running", "interrupt", "frame", "camera", "motor", "policy", "start"])
def test_the_loop_that_computes_meanwhile_holds_whatever_ends_it(end, kind, modules):
    client, loop = modules
    executor, plans = (
        importlib.import_module(loop.drive_async.__globals__[x].__module__) for x in ("AsyncExecutor", "Plan")
    )
    with Scripted(kind) as server, client.PolicyClient(port=server.port) as policy:
        robot, turns = Arm(server, policy), iter(range(8))
        server.chunk = lambda seen, number: np.full((H, 1), 0.5)
        observe, execute = robot.observe, robot.execute

        def running():
            turn = next(turns, None)
            if end == "interrupt" and turn == 4:
                raise KeyboardInterrupt
            return turn is not None or end == "policy"

        def seen():
            if end == "camera" and len(robot.executed) == 4:
                raise OSError("no camera")
            return {"proprio": np.zeros(2, np.float32)} if end == "frame" and len(robot.executed) == 4 else observe()

        def commanded(action):
            if end == "motor" and len(robot.executed) == 4:
                execute(np.array([9.0]))
                raise OSError("no motor")
            execute(action)

        robot.observe, robot.execute = seen, commanded
        if end in ("policy", "start"):
            server.script = dict.fromkeys(range(end == "policy", 99), "refused")
        error = {
            "interrupt": KeyboardInterrupt, "frame": ValueError, "camera": OSError, "motor": OSError,
            "policy": executor.ExecutorStopped, "start": client.PolicyServerError,
        }.get(end)  # fmt: skip
        plan = plans.Plan("naive", exec_horizon=4)
        with pytest.raises(error) if error else contextlib.nullcontext():
            loop.drive_async(policy, robot, "go", running, plan, max_errors=3)
        held = 0.0 if kind == "velocity" else 0.5
        said = [x for _, x in robot.executed]
        if end == "start":  # what was not moved needs no command
            assert said == [0.0] * (kind == "velocity")
        elif end == "policy":
            assert said[:4] == [0.5] * 4 and said[-1] == held
        else:
            moved = 8 if end == "running" else 4
            assert said == [0.5] * moved + [9.0] * (end == "motor") + [held]
        with pytest.raises(ValueError, match="unknown statistics 'others'"):
            loop.drive_async(policy, robot, "go", running, plan, unnormalize="others")


def test_a_robot_whose_hold_is_not_known_is_not_driven():
    with Scripted() as server, PolicyClient(port=server.port, limits=False) as policy:
        with pytest.raises(ValueError, match="limits=False: what holds this robot is not known"):
            drive(policy, Arm(server, policy), "go", times(3))
        assert not server.windows


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(seed=2.5), "seed must be a whole number, got 2.5"),
        (dict(seed=-1), "seed must be in 0..9223372036854775807, got -1"),
        (dict(seed=2**63), "seed must be in 0.."),
        (dict(seed="1"), "seed must be a whole number"),
        (dict(execute=0), "execute must be in 1..10, got 0"),
        (dict(execute=-1), "execute must be in 1..10, got -1"),
        (dict(execute=H + 1), "execute must be in 1..10, got 11"),
        (dict(execute=2.5), "execute must be a whole number, got 2.5"),
        (dict(instruction=b"go"), "instruction must be a text or None"),
    ],
)
def test_a_loop_of_wrong_arguments_does_not_begin(wrong, message):
    """A mistake is an error, not an outage that is held through."""
    with Scripted() as server, PolicyClient(port=server.port) as policy:
        robot = Arm(server, policy)
        with pytest.raises(ValueError, match=message):
            drive(**{"policy": policy, "robot": robot, "instruction": "go", "running": times(3), **wrong})
        assert robot.x == -1 and not robot.executed and not server.windows
        if "seed" in wrong:
            policy.observe(frame(1))
            with pytest.raises(ValueError, match=message):
                policy.reset(**wrong)
            assert seen(policy) == [1, 1]
        policy.reset(np.int64(3))
        policy.act(frame(0), "go")


def test_connections_are_closed_when_they_are_given_up():
    with Scripted() as server:
        with PolicyClient(port=server.port) as policy:
            for fault in ("garbage", "killed", "text"):
                server.script = {len(server.windows): fault}
                with pytest.raises((PolicyServerError, ConnectionError)):
                    policy.act(frame(0), "go")
                policy.act(frame(1), "go")
            assert policy.connections == 4 and len(server._server.connections) == 1
        assert not server._server.connections


def test_another_policy_behind_the_same_address_is_never_executed():
    with Scripted() as server, PolicyClient(port=server.port) as policy:
        robot = Arm(server, policy)
        drive(policy, robot, "go", times(1), execute=4)
        server.stop()
        server.told = metadata(horizon=H + 1)
        server.start()
        for _ in range(2):
            with pytest.raises(PolicyServerError, match="came back with another policy .batch_spec, chunks differ"):
                policy.act(robot.observe(), "go")
        assert policy.hold() == pytest.approx(0.03)
        server.stop()
        server.told = metadata()
        server.start()
        assert policy.act(robot.observe(), "go").shape == (H, 1)


# ---------------------------------------------------------------- the states of a client


def frame(x: float) -> dict:
    return {"image_primary": np.zeros((SIZE, SIZE, 3), np.uint8), "proprio": np.array([x], np.float32)}


def seen(policy) -> list[float]:
    return policy.window["proprio"].ravel().tolist()


def test_the_states_of_a_moment():
    """Every line of the table in docs/act.md."""
    with Scripted() as server, PolicyClient(port=server.port) as policy:
        # New: nothing was seen.
        assert policy.window == {} and policy.hold() is None
        # Observed: another observation of the moment takes the place of the first.
        policy.observe(frame(1))
        policy.observe(frame(2))
        assert seen(policy) == [2, 2] and policy.window["timestep_pad_mask"].tolist() == [False, True]
        # A request that failed advances nothing: observed, as before.
        server.script = {0: "refused"}
        with pytest.raises(PolicyServerError):
            policy.act(frame(3), "go")
        assert seen(policy) == [3, 3] and policy.hold() is None
        # Given: a chunk is there.
        actions = policy.act(frame(4), "go")
        assert seen(policy) == [4, 4] and policy.hold() is None
        with pytest.raises(RuntimeError, match="nothing of it was reported as executed"):
            policy.observe(frame(5))
        assert seen(policy) == [4, 4]
        # Executed: the next moment.
        policy.executed(actions[0])
        assert policy.hold() == actions[0]
        policy.observe(frame(5))
        assert seen(policy) == [4, 5] and policy.hold() == actions[0]
        # A hold executes nothing by being asked for, and is on record as any other when it was.
        policy.executed(policy.hold())
        policy.executed(np.array([7.0]))  # the robot's own idea
        assert policy.hold() == 7 and policy.filter.last == 7
        for bad in (np.array([np.nan]), np.zeros(2), np.zeros((1, 1))):
            with pytest.raises(ValueError):
                policy.executed(bad)
            assert policy.hold() == 7
        # Another chunk although nothing of the last was executed: each answer is of a moment of its own.
        policy.act(frame(6), "go")
        policy.act(frame(8), "go")
        assert seen(policy) == [6, 8] and policy.hold() == 7
        policy.reset()
        assert policy.window == {} and policy.hold() is None
    with pytest.raises(RuntimeError, match="was closed"):
        policy.act(frame(9), "go")


def test_max_change_needs_to_be_told_what_was_executed(caplog):
    with Scripted() as server:
        with PolicyClient(port=server.port, max_change=1.0) as policy:
            policy.act(frame(0), "go")
            with pytest.raises(RuntimeError, match="max_change is measured from what was executed"):
                policy.act(frame(1), "go")
        with PolicyClient(port=server.port) as policy:
            for x in range(4):
                policy.act(frame(x), "go")
            assert caplog.text.count("nothing was reported as executed") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"proprio": np.zeros(2, np.float32)},
        {"proprio": np.zeros((1, 1), np.float32)},
        {"proprio": np.float32(3)},
        {"proprio": np.zeros(0, np.float32)},
        {"proprio": np.array([np.nan], np.float32)},
        {"image_primary": np.zeros((SIZE, SIZE), np.uint8)},
        {"image_primary": np.zeros((3, SIZE, SIZE), np.uint8)},
        {"image_primary": np.zeros((1, SIZE, SIZE, 3), np.uint8)},
        {"image_primary": np.zeros((SIZE, SIZE, 4), np.uint8)},
        {"image_primary": np.zeros((0, SIZE, 3), np.uint8)},
        {"image_primary": np.zeros((SIZE, SIZE, 3), np.float32)},
        {"proprioception": np.zeros(1, np.float32)},
    ],
)
@pytest.mark.parametrize("frames", [0, 1, 2])
def test_a_frame_that_is_none_enters_no_window(change, frames):
    with Scripted() as server, PolicyClient(port=server.port) as policy:
        for x in range(frames):
            policy.executed(policy.act(frame(x), "go")[0])
        before = dict(policy.window)
        for call in (policy.observe, lambda one: policy.act(one, "go")):
            with pytest.raises(ValueError, match="observation"):
                call({**frame(7), **change})
            assert policy.window.keys() == before.keys() and all(policy.window[k] is before[k] for k in before)
        policy.act(frame(frames), "go")
        assert seen(policy) == [max(frames - 1, 0), frames] and len(server.windows) == frames + 1


def test_units_do_not_change_within_an_episode():
    told = metadata()
    for key in ("expects", "actions", "chunks", "dimensions"):
        told[key]["other"] = told[key]["line"]
    with Scripted() as server:
        server.told = told
        with PolicyClient(port=server.port) as policy:
            policy.executed(policy.act(frame(0), "go")[0])
            for call in (policy.observe, policy.act):
                with pytest.raises(ValueError, match="units are those of 'line'; reset.. before those of 'other'"):
                    call(frame(1), unnormalize="other")
            policy.reset()
            policy.act(frame(1), "go", unnormalize="other")


def of_two_robots(default: str | None) -> dict:
    """What a server of two datasets says: of 'line' nobody knows what holds it; 'other' has two velocities."""
    told, policy = metadata("other"), LinePolicy(horizon=H)
    policy.statistics["line"]["dimensions"]["action"] = {"names": ["u", "v"], "kinds": ["velocity"] * 2}
    policy.statistics["line"]["action"] = {
        key: np.repeat(x, 2) for key, x in policy.statistics["line"]["action"].items()
    }
    other = unpack(pack(PolicyServer(policy, unnormalize="line", port=0).metadata))
    for key in ("expects", "actions", "chunks", "dimensions"):
        told[key]["other"] = other[key]["line"]
    return {**told, "statistics": ["line", "other"], "unnormalize": default}


@pytest.mark.parametrize("default", ["line", None])
def test_a_client_of_a_dataset_that_is_not_the_servers_default(default):
    with Scripted() as server:
        server.told, server.chunk = of_two_robots(default), lambda seen, number: np.full((H, 2), 0.5)
        with PolicyClient(port=server.port, unnormalize="other") as policy:
            actions = policy.act(frame(0), "go")
            policy.executed(actions[0])
            policy.observe(frame(1))
            assert policy.keeps_moving and policy.hold().tolist() == [0, 0] and policy.chunks()["horizon"] == H
            policy.executed(policy.hold())
            robot = Arm(server, policy)
            drive(policy, robot, "go", times(2), execute=2)
            assert [x for _, x in robot.executed] == [0.5, 0.5, 0] * 2 + [0]
        assert {request["unnormalize"] for request in server.requests} == {"other"}
        with PolicyClient(port=server.port, unnormalize="other", limits=False) as policy:
            assert policy.act(frame(0), "go").shape == (H, 2)
        for limits in (True, False):
            with pytest.raises(ValueError, match="unknown statistics 'others'; valid: line, other"):
                PolicyClient(port=server.port, unnormalize="others", limits=limits)
        if default is not None:
            with pytest.raises(UnknownKind, match="line: nobody has said"):
                PolicyClient(port=server.port)


@pytest.mark.parametrize("first", ["act", "observe", "reset", "drive"])
def test_units_that_were_named_once_are_the_episodes(first):
    """`executed`, `observe` and `act` without a name go on with them, whatever the server's default is."""
    with Scripted() as server:
        server.told, server.chunk = of_two_robots(None), lambda seen, number: np.full((H, 2), 0.5)
        with PolicyClient(port=server.port) as policy:
            if first == "drive":
                robot = Arm(server, policy)
                drive(policy, robot, "go", times(2), execute=2, unnormalize="other")
                assert [x for _, x in robot.executed] == [0.5, 0.5, 0] * 2 + [0]
            elif first == "act":
                policy.act(frame(0), "go", unnormalize="other")
            elif first == "observe":
                policy.observe(frame(0), unnormalize="other")
            else:
                policy.reset(unnormalize="other")
            policy.executed(np.array([1.0, 2.0]))
            policy.observe(frame(1))
            assert policy.act(frame(1), "go").shape == (H, 2) and policy.filter.last.tolist() == [1, 2]
            with pytest.raises(ValueError, match="units are those of 'other'"):
                policy.executed(np.zeros(1), unnormalize="line")
            with pytest.raises(ValueError, match="unknown statistics 'others'"):
                policy.reset(unnormalize="others")
            assert policy.filter.last.tolist() == [1, 2]


@pytest.mark.parametrize("limits", [True, False])
def test_nothing_that_may_hold_starts_without_knowing_what_holds(limits):
    with Scripted("other") as server:
        if not limits:
            with PolicyClient(port=server.port, limits=False) as policy:
                assert policy.act(frame(0), "go").shape == (H, 1)  # who never holds needs to know nothing
                with pytest.raises(RuntimeError, match="limits=False"):
                    policy.hold()
            return
        with pytest.raises(UnknownKind, match=r"line: nobody has said what keeps a0 .* action_kinds in the dataset"):
            PolicyClient(port=server.port)
        with pytest.raises(UnknownKind, match="line: 2 kinds for 1 action dimensions"):
            PolicyClient(port=server.port, kinds=("delta", "delta"))
        with pytest.raises(UnknownKind, match="unknown kind 'detla'; did you mean 'delta'"):
            PolicyClient(port=server.port, kinds=("detla",))
        with PolicyClient(port=server.port, kinds=("velocity",)) as policy:
            policy.executed(policy.act(frame(3), "go")[0])
            assert policy.hold() == 0


def test_a_policy_in_this_process_acts_as_one_on_a_server():
    """Also under `drive`: the same actions, limits and record."""
    policies = [LinePolicy(), LinePolicy()]
    for policy in policies:
        policy.statistics["line"]["action"] |= {"min": np.array([-1.0]), "max": np.array([1.0])}
    with PolicyServer(policies[0], unnormalize="line", port=0).running() as server:
        with PolicyClient(port=server.port) as remote:
            commanded = []
            for source in (remote, LocalPolicy(policies[1], "line")):
                x, executed = iter(range(99)), []
                robot = types.SimpleNamespace(
                    observe=lambda x=x: {**frame(next(x)), "image_primary": np.full((SIZE, SIZE, 3), 255, np.uint8)},
                    execute=lambda action, executed=executed: executed.append(float(action[0])),
                )
                drive(source, robot, "go right", times(3), execute=2, seed=3)
                commanded.append(executed)
                assert source.filter.counts["clipped"] > 0 and seen(source) == [4, 5]
            assert commanded[0] == commanded[1] and len(commanded[0]) == 7 and commanded[0][-1] == 0


def test_nothing_is_known_to_hold_where_no_dataset_is_named():
    with Scripted() as server:
        server.told["unnormalize"] = None
        for key in ("expects", "chunks"):
            server.told[key][""] = server.told[key]["line"]
        with PolicyClient(port=server.port) as policy:
            assert policy.filter is None and not policy.keeps_moving
            with pytest.raises(RuntimeError, match="no dataset was named"):
                policy.hold()
            for call in (policy.filter_of, lambda: policy.act(frame(0), "go")):
                with pytest.raises(ValueError, match="give unnormalize, one of line, or limits=False"):
                    call()
            policy.executed(policy.act(frame(0), "go", unnormalize="line")[0], unnormalize="line")
            assert policy.filter is policy.filter_of("line") and policy.hold() == 0


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_a_frame_of_a_wrong_width_enters_no_window_of_normalised_numbers(frames):
    with Scripted() as server:
        server.told["unnormalize"] = None
        server.told["batch_spec"]["proprio_dim"] = 2
        for key in ("expects", "chunks"):
            server.told[key][""] = server.told[key]["line"]
        with PolicyClient(port=server.port, limits=False) as policy:
            for x in range(frames):
                policy.executed(policy.act(frame(x), "go")[0])
            before = dict(policy.window)
            for width in (0, 3):
                with pytest.raises(
                    ValueError, match=r"observation/proprio: expected one moment of shape .1 to 2,., got"
                ):
                    policy.act({**frame(7), "proprio": np.zeros(width, np.float32)}, "go")
                assert policy.window.keys() == before.keys() and all(policy.window[k] is before[k] for k in before)
            if frames == 0:  # what was refused elsewhere is replaced by a frame of another width
                policy.observe({**frame(7), "proprio": np.zeros(2, np.float32)})
            assert policy.act(frame(frames), "go").shape == (H, 1)
            assert seen(policy) == [max(frames - 1, 0), frames]


CALLS = {
    "observation: expected a map from keys to arrays, got None": dict(observation=None),
    "observation: expected a map from keys to arrays, got 5": dict(observation=5),
    "instruction must be a text or None, got b'go'": dict(instruction=b"go"),
    "instruction must be a text or None, got 3": dict(instruction=3),
    "goal must be a map, .*, got one of type ndarray": dict(goal=np.zeros((SIZE, SIZE, 3), np.uint8)),
    "subtask must be a text or None": dict(subtask=["left"]),
    "plan must be True or False": dict(plan="yes"),
    r"\['line'\]": dict(unnormalize=["line"]),
    r"\{'mean': 0\}": dict(unnormalize={"mean": 0}),
}


@pytest.mark.parametrize("place", ["server", "process"])
def test_a_wrong_call_is_refused_where_it_is_made(place):
    """Nothing is sent, and window and record stay as they are."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Scripted("delta"))
        remote = place == "server"
        policy = stack.enter_context(PolicyClient(port=server.port)) if remote else LocalPolicy(LinePolicy(), "line")
        for message, wrong in CALLS.items():
            given = {"observation": frame(0), "instruction": "go", **wrong}
            with pytest.raises(ValueError, match=message):
                policy.act(**given)
            if "observation" in wrong:
                with pytest.raises(ValueError, match=message):
                    policy.observe(wrong["observation"])
            assert policy.window == {} and not server.windows


@pytest.mark.parametrize(
    ("allow_missing", "message"),
    [
        ("proprio", "allow_missing is a list of keys, got 'proprio'"),
        (5, "allow_missing is a list of keys, got 5"),
        (["image_primry"], "allow_missing: the policy reads no 'image_primry'; did you mean 'image_primary'"),
    ],
)
def test_keys_that_may_be_missing_are_keys_of_the_policy(allow_missing, message):
    with pytest.raises(ValueError, match=message):
        LocalPolicy(LinePolicy(), "line", allow_missing=allow_missing)
    with Scripted() as server, pytest.raises(ValueError, match=message):
        PolicyClient(port=server.port, allow_missing=allow_missing)


@pytest.mark.parametrize("wrong", [["line"], {"line": 1}, None, "lines"])
def test_a_local_policy_takes_the_name_of_a_dataset(wrong):
    with pytest.raises(ValueError, match="unknown statistics .*; valid: line"):
        LocalPolicy(LinePolicy(), wrong)


# ---------------------------------------------------------------- a process

SERVE = """
import sys
from octo_like.robot.server import PolicyServer
from tests.robot.toy import LinePolicy
policy = LinePolicy(noise=0.0)
policy.statistics["line"]["dimensions"]["action"]["kinds"] = ["absolute"]
with PolicyServer(policy, unnormalize="line", port=int(sys.argv[1])).running() as server:
    print(server.port, flush=True)
    server.wait()
"""


@pytest.mark.multiprocess
def test_a_process_that_is_killed_and_started_again(repository):
    def start(port: int) -> tuple[subprocess.Popen, int]:
        command = [sys.executable, "-c", SERVE, str(port)]
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        return process, int(process.stdout.readline())

    process, port = start(0)
    try:
        with PolicyClient(port=port) as policy:
            executed, x = [], iter(range(1000))
            robot = types.SimpleNamespace(observe=lambda: frame(next(x) % 15), execute=lambda a: executed.append(a[0]))
            robot.observe = lambda: {**frame(1), "image_primary": np.full((SIZE, SIZE, 3), 255, np.uint8)}
            drive(policy, robot, "go right", times(2), execute=2)
            assert [float(a) for a in executed] == [2.0] * 5
            stopped = False

            turns = iter(range(6))

            def running():
                nonlocal process, stopped
                turn = next(turns, None)
                if turn == 1:
                    process.send_signal(signal.SIGSTOP)  # it hangs: nothing is refused, nothing is answered
                    policy.timeout, stopped = 0.3, True
                if turn == 2:
                    process.send_signal(signal.SIGCONT)
                    process.kill()
                    process.wait(60)
                if turn == 4:
                    process, again = start(port)
                    policy.timeout = 30.0
                    assert again == port
                return turn is not None

            executed.clear()
            drive(policy, robot, "go right", running, execute=2)
            assert stopped and [float(a) for a in executed] == [2.0] * (2 + 3 + 4 + 1)
            assert policy.connections == 2
    finally:
        process.kill()
        process.wait(60)
