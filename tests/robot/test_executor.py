"""Acting while the next chunk is computed: in this process and over the real server, with a policy that is held up."""

import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from octo_like.robot.chunking import Plan
from octo_like.robot.client import PolicyClient, PolicyServerError
from octo_like.robot.executor import AsyncExecutor, ExecutorStopped
from octo_like.robot.local import LocalPolicy
from octo_like.robot.server import PolicyServer
from tests.robot.toy import SIZE, LinePolicy

pytest.importorskip("websockets")
ROOT = pathlib.Path(__file__).resolve().parents[2]
H = 6


class HeldUpPolicy(LinePolicy):
    """Says where the robot is, + 0, + 0.1, ...; when it is told to, it answers only after `go` is set."""

    def __init__(self):
        super().__init__(horizon=H)
        numbers = {"mean": np.zeros(1), "std": np.ones(1), "min": np.full(1, -100.0), "max": np.full(1, 100.0)}
        kinds = {"action": {"names": ["x"], "kinds": ["absolute"]}}
        self.statistics = {"line": {"action": numbers, "proprio": numbers, "dimensions": kinds}}
        self.go, self.begun = threading.Event(), threading.Semaphore(0)
        self.go.set()
        self.fails = False
        self.continued = []

    def continuation_methods(self, unnormalize=None):
        return {"jacobian_free": H, "trained": 2}

    def sample_actions(self, observations, tasks, *, rng, unnormalize, continuing=None):
        self.begun.release()
        assert self.go.wait(60)
        if self.fails:
            raise RuntimeError("out of memory")
        self.calls.append(observations)
        self.continued.append(continuing)
        return np.asarray(observations["proprio"])[:, -1:, :] + np.linspace(0, (H - 1) / 10, H)[None, :, None]


def frame(x):
    return {"image_primary": np.zeros((SIZE, SIZE, 3), np.uint8), "proprio": np.array([x], np.float32)}


@pytest.fixture(params=["here", "server"])
def source(request):
    policy = HeldUpPolicy()
    if request.param == "here":
        yield LocalPolicy(policy, "line")
        return
    with PolicyServer(policy, unnormalize="line", port=0).running() as server:
        with PolicyClient(port=server.port) as client:
            client.policy = policy
            yield client


def wait_for_chunk(executor):
    """Until the computation is done, whatever the clock says; how it ended is the executor's business."""
    executor._running[1].exception(60)


def test_the_robot_moves_while_the_policy_thinks(source):
    """The chunk of x = 2, asked for after two actions, comes three steps later and goes on with its fourth action."""
    policy = source.policy
    with AsyncExecutor(source, Plan("guided", 2, initial_delay=2)) as executor:
        executor.start(frame(0), "go right", seed=5)
        policy.go.clear()
        said = [executor.step(frame(x))[0] for x in range(5)]
        np.testing.assert_allclose(said, [0, 0.1, 0.2, 0.3, 0.4], atol=1e-6)
        policy.go.set()
        wait_for_chunk(executor)
        policy.go.clear()
        said = [executor.step(frame(x))[0] for x in (5, 6)]
        np.testing.assert_allclose(said, [2.3, 2.4], atol=1e-6)
        assert list(executor.state.delays) == [3] and executor.state.counts["late"] == 1
        policy.go.set()
    # The first chunk, one more so that nothing compiles later, the one that came late, and the last.
    assert policy.continued[0] is None and len(policy.continued) == 4
    window = policy.calls[2]
    assert np.asarray(window["proprio"]).tolist() == [[[1.0], [2.0]]]  # frames that follow each other
    asked = policy.continued[2]
    assert (np.ravel(asked.executed)[0], np.ravel(asked.delay)[0], asked.method) == (2, 2, "jacobian_free")
    np.testing.assert_allclose(np.ravel(asked.previous), np.arange(H) / 10, atol=1e-6)
    # Three of its actions were done when the next was asked for, and three steps are expected from now on.
    asked = policy.continued[3]
    assert (np.ravel(asked.executed)[0], np.ravel(asked.delay)[0]) == (3, 3)


def test_failures_are_held_and_too_many_stop(source):
    with AsyncExecutor(source, Plan("naive", 4), max_errors=3) as executor:
        executor.start(frame(0), "go right")
        source.policy.fails = True
        said = []
        for x in range(6):
            said.append(executor.step(frame(x))[0])
            if executor._running is not None:
                wait_for_chunk(executor)
        np.testing.assert_allclose(said, np.arange(6) / 10, atol=1e-6)  # the chunk that is there
        assert sum(executor.errors.values()) == 1
        assert executor.step(frame(6))[0] == pytest.approx(0.5)  # what was executed last
        wait_for_chunk(executor)
        with pytest.raises(ExecutorStopped, match="3 requests failed in a row; the last: .*out of memory"):
            executor.step(frame(7))
        source.policy.fails = False
        executor.start(frame(0), "go left")
        assert executor.step(frame(0))[0] == 0


def test_one_success_forgives_failures(source):
    with AsyncExecutor(source, Plan("naive", 1), max_errors=2, delay=0) as executor:
        executor.start(frame(0), "go right")
        for x in range(1, 9):
            source.policy.fails = x % 2 == 0
            executor.step(frame(x))
        assert sum(executor.errors.values()) >= 3


@pytest.mark.parametrize("mode", ["wait", "naive", "ensemble", "guided", "trained"])
def test_injected_delays_are_the_same_here_and_over_the_server(mode):
    said = []
    for over_server in (False, True):
        policy = HeldUpPolicy()
        with PolicyServer(policy, unnormalize="line", port=0).running() as server:
            with PolicyClient(port=server.port) as client:
                source = client if over_server else LocalPolicy(policy, "line")
                plan = Plan(mode, 3, initial_delay=2, max_delay=2)
                with AsyncExecutor(source, plan, delay=2) as executor:
                    executor.start(frame(0), "go right", seed=3)
                    said.append([float(executor.step(frame(0.5 * x))[0]) for x in range(20)])
                    assert set(executor.state.delays) == {2}
    np.testing.assert_array_equal(*said)


def test_what_the_policy_cannot_do_is_said_before_the_robot_moves(source):
    with pytest.raises(ValueError, match="cannot continue chunks by 'vjp'; it can by jacobian_free, trained"):
        AsyncExecutor(source, Plan("guided_vjp", 2))
    with pytest.raises(ValueError, match="max_delay=4, but the policy was trained for 2"):
        AsyncExecutor(source, Plan("trained", 2, max_delay=4))
    source.observe(frame(0))
    previous = {"previous": np.zeros((H, 1), np.float32), "executed": 0, "method": "nonsense"}
    with pytest.raises(ValueError, match="'nonsense'.*valid: jacobian_free"):
        source.predict(source.window, "go", continuing=previous)


def test_a_policy_that_cannot_continue_chunks_is_served_as_before():
    with PolicyServer(LinePolicy(), unnormalize="line", port=0).running() as server:
        with PolicyClient(port=server.port) as client:
            assert client.chunks() == {"horizon": 3, "continues": {}}
            with pytest.raises(ValueError, match="none: wait, naive and ensemble need none"):
                AsyncExecutor(client, Plan("guided", 1))
            client.observe({"image_primary": frame(0)["image_primary"], "proprio": np.zeros(1, np.float32)})
            message = {"type": "act", "observation": client.window, "instruction": "go", "seed": 0, "step": 0}
            bad = {"previous": np.zeros((3, 1), np.float32), "executed": 1}
            with pytest.raises(PolicyServerError, match="cannot continue chunks by 'jacobian_free'; valid: none"):
                client._request({**message, "continuing": bad})
            with pytest.raises(PolicyServerError, match="'continuing' is a map with 'previous'"):
                client._request({**message, "continuing": {"previous": bad["previous"], "speed": 3}})
            # A server of before says nothing of chunks.
            del client.metadata["chunks"]
            assert client.chunks() == {"horizon": 3, "continues": {}}
    with pytest.raises(ValueError, match="cannot continue chunks by 'vjp'; valid: none"):
        PolicyServer(LinePolicy(), port=0, continue_by=("vjp",))


def test_several_commands_for_each_action(source):
    """A target is interpolated; observations are wanted at the policy's rate only."""
    plan = Plan("naive", 2, factor=2, kinds=["absolute"])
    with AsyncExecutor(source, plan, delay=0) as executor:
        executor.start(frame(0), "go right")
        wanted, said = [], []
        for _ in range(4):
            wanted.append(executor.takes_observation)
            said.append(executor.step(frame(0) if wanted[-1] else None)[0])
        assert wanted == [True, False, True, False]
        np.testing.assert_allclose(said, [0, 0.05, 0.1, 0.15], atol=1e-6)
        with pytest.raises(ValueError, match="needs an observation"):
            executor.step()


def test_what_robots_will_ask_for_is_compiled_before():
    policy = HeldUpPolicy()
    server = PolicyServer(policy, unnormalize="line", port=0, max_batch=2, continue_by=("jacobian_free", "trained"))
    with server.running(warm=True):
        methods = [None if one is None else one.method for one in policy.continued]
        assert methods == [None, "jacobian_free", "trained"] * 2  # batches of one and of two
        assert [len(np.ravel(one.executed)) for one in policy.continued if one is not None] == [1, 1, 2, 2]


def test_robots_without_jax_can_use_it():
    code = "import sys, octo_like.robot.executor, octo_like.robot.client; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
