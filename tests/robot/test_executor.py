"""Acting while the next chunk is computed: in this process and over the real server, with a policy that is held up."""

import concurrent.futures
import contextlib
import gc
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
from octo_like.robot.safety import UnsafeAction
from octo_like.robot.server import PolicyServer
from tests.robot.toy import SIZE, LinePolicy

pytest.importorskip("websockets")


@pytest.mark.parametrize("option", [dict(max_errors=2.5), dict(max_errors=0), dict(delay=2.5), dict(delay=-1)])
def test_counts_of_an_executor_are_whole_numbers(option):
    with pytest.raises(ValueError, match="(max_errors|delay) must be (a whole number|at least)"):
        AsyncExecutor(LocalPolicy(LinePolicy(), "line"), Plan("naive", 2), **option)


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
        PolicyServer(LinePolicy(), unnormalize="line", port=0, continue_by=("vjp",))


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


@pytest.mark.parametrize("limit", ["max_change", "range"])
def test_what_a_chunk_continues_is_what_is_executed(limit):
    """The frozen actions are those that limits and `max_change` let pass, and are counted when they are executed."""
    policy = HeldUpPolicy()
    if limit == "range":
        policy.statistics["line"]["action"] = {**policy.statistics["line"]["action"], "max": np.full(1, 2.0)}
        policy.statistics["line"]["action"]["min"] = np.full(1, -2.0)
    source = LocalPolicy(policy, "line", max_change=0.05 if limit == "max_change" else None)
    with AsyncExecutor(source, Plan("guided", 2, initial_delay=2), delay=2) as executor:
        executor.start(frame(0), "go right")
        said, asked = [], {}
        for step in range(30):
            before = len(policy.continued)
            said.append(float(executor.step(frame(0.2 * step))[0]))
            if len(policy.continued) > before:
                asked[step] = policy.continued[-1]
        assert len(asked) > 5 and executor.filter.counts["actions"] == 30
        assert executor.filter.counts["slowed" if limit == "max_change" else "clipped"] > 5
        for step, one in asked.items():
            executed, delay = int(np.ravel(one.executed)[0]), int(np.ravel(one.delay)[0])
            frozen = np.ravel(one.previous)[executed : executed + delay]
            assert delay == 2 and frozen == pytest.approx(
                said[step : step + delay] + [frozen[-1]] * (step + delay - 30)
            )


@pytest.mark.parametrize("kinds", [None, ("delta",)])
def test_a_faster_control_rate_moves_a_robot_no_further(kinds):
    """The kinds are the source's; a plan that contradicts them would move the robot `factor` times as far."""
    source = LocalPolicy(Faulty("delta"), "line")
    with AsyncExecutor(source, Plan("naive", H, factor=3, kinds=kinds), delay=0) as executor:
        executor.start(frame(1), "go right")
        moved = sum(float(executor.step(frame(1))[0]) for _ in range(3 * H))
    assert moved == pytest.approx(H + sum(range(H)) / 10, abs=1e-4)
    for wrong in (("absolute",), ("other",), ("delta",) * 2, ()):
        with pytest.raises(ValueError, match=r"but the source's actions are \('delta',\): leave kinds out"):
            AsyncExecutor(source, Plan("naive", factor=3, kinds=wrong))


def test_what_robots_will_ask_for_is_compiled_before():
    policy = HeldUpPolicy()
    server = PolicyServer(policy, unnormalize="line", port=0, max_batch=2, continue_by=("jacobian_free", "trained"))
    with server.running(warm=True):
        methods = [None if one is None else one.method for one in policy.continued]
        assert methods == [None] * 2 + ["jacobian_free"] * 2 + ["trained"] * 2  # batches of one and of two
        assert [len(np.ravel(one.executed)) for one in policy.continued if one is not None] == [1, 2, 1, 2]


def test_robots_without_jax_can_use_it():
    code = "import sys, octo_like.robot.executor, octo_like.robot.client; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ------------------------------------------------------------------------------------ the states, and failures in each


def wrong_chunks():
    """What is no chunk of this policy."""
    good = np.zeros((1, H, 1), np.float32)
    return {
        "raises": RuntimeError("out of memory"),
        "short": good[:, :-1],
        "long": np.repeat(good, 2, axis=1),
        "wide": np.repeat(good, 2, axis=2),
        "nan": good * np.nan,
        "inf": np.where(np.arange(H)[:, None] == 3, np.inf, good),
        "words": np.full((1, H, 1), "left"),
        "nothing": None,
    }


class Faulty(HeldUpPolicy):
    """Gives what `fault` says in place of a chunk; kinds of its actions."""

    def __init__(self, kind="absolute"):
        super().__init__()
        self.fault = None
        self.statistics["line"]["dimensions"]["action"]["kinds"] = [kind]

    def sample_actions(self, observations, tasks, **options):
        if self.fault is not None:
            if isinstance(wrong_chunks()[self.fault], Exception):
                raise wrong_chunks()[self.fault]
            return wrong_chunks()[self.fault]
        return super().sample_actions(observations, tasks, **options)


def source_of(policy, place, stack):
    if place == "here":
        return LocalPolicy(policy, "line")
    server = stack.enter_context(PolicyServer(policy, unnormalize="line", port=0).running())
    return stack.enter_context(PolicyClient(port=server.port))


@pytest.mark.parametrize("place", ["here", "server"])
@pytest.mark.parametrize("mode", ["wait", "naive", "ensemble", "guided"])
def test_a_start_that_fails_is_no_start_and_the_next_one_works(place, mode):
    policy = Faulty()
    with contextlib.ExitStack() as stack:
        source = source_of(policy, place, stack)
        executor = stack.enter_context(AsyncExecutor(source, Plan(mode, 2), delay=0))
        for fault in wrong_chunks():
            with pytest.raises(RuntimeError, match="no episode has begun"):
                executor.step(frame(0))
            with pytest.raises(UnsafeAction, match="nothing was executed yet"):
                executor.hold()
            policy.fault = fault
            with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
                executor.start(frame(0), "go")
            with pytest.raises(ValueError, match="observation/proprio"):
                executor.start({**frame(0), "proprio": np.zeros(3, np.float32)}, "go")
        policy.fault = None
        executor.start(frame(1), "go")
        assert executor.step(frame(1))[0] == 1 and executor.hold()[0] == 1
        assert np.ravel(source.window["proprio"]).tolist() == [1, 1]
        # A start that fails while the robot is under way ends that episode.
        policy.fault = "short"
        with pytest.raises((ValueError, PolicyServerError)):
            executor.start(frame(5), "go")
        with pytest.raises(RuntimeError, match="no episode has begun"):
            executor.step(frame(5))


@pytest.mark.parametrize("place", ["here", "server"])
@pytest.mark.parametrize("kind", ["absolute", "delta", "velocity"])
@pytest.mark.parametrize("fault", sorted(wrong_chunks()))
def test_what_is_no_chunk_is_held_and_forgiven(fault, kind, place):
    """The chunk that is there is executed to its end, then the robot holds; then the policy is well again."""
    policy = Faulty(kind)
    with contextlib.ExitStack() as stack:
        source = source_of(policy, place, stack)
        executor = stack.enter_context(AsyncExecutor(source, Plan("naive", 2), max_errors=100, delay=0))
        executor.start(frame(0), "go")
        said = [executor.step(frame(0))[0]]
        policy.fault = fault
        said += [executor.step(frame(x))[0] for x in range(1, H + 4)]
        held = 0.5 if kind == "absolute" else 0.0
        np.testing.assert_allclose(said, [0, 0.1, 0.2, 0.3, 0.4, 0.5, *[held] * 4], atol=1e-6)
        assert executor.filter.last == pytest.approx(held) and executor.errors
        assert executor.hold() == pytest.approx(held)
        policy.fault = None
        assert executor.step(frame(20))[0] == 20
        assert np.ravel(source.window["proprio"]).tolist() == [H + 3, 20]


@pytest.mark.parametrize("place", ["here", "server"])
def test_a_stopped_executor_holds_and_starts_again(place):
    policy = Faulty()
    with contextlib.ExitStack() as stack:
        source = source_of(policy, place, stack)
        executor = stack.enter_context(AsyncExecutor(source, Plan("naive", 2), max_errors=2, delay=0))
        executor.start(frame(0), "go")
        said = [executor.step(frame(x))[0] for x in range(2)]
        policy.fault = "wide"
        with pytest.raises(ExecutorStopped, match="2 requests failed in a row; the last: .*shape"):
            for x in range(2, 9):
                said.append(executor.step(frame(x))[0])
        for x in range(9, 12):
            with pytest.raises(ExecutorStopped, match="2 requests failed in a row"):
                executor.step(frame(x))
            assert executor.hold()[0] == said[-1]
        with pytest.raises((ValueError, PolicyServerError)):
            executor.start(frame(12), "go")
        policy.fault = None
        executor.start(frame(12), "go")
        assert executor.step(frame(12))[0] == 12


def test_a_frame_that_is_refused_is_no_step(source):
    """Neither the window nor the place in the chunk moves; the next frame is the next step."""
    with AsyncExecutor(source, Plan("naive", 6), delay=0) as executor:
        executor.start(frame(0), "go")
        said = [executor.step(frame(x))[0] for x in range(2)]
        before = executor.state.now, dict(executor.source.window)
        for bad in (
            {**frame(2), "proprio": np.zeros(2, np.float32)},
            {**frame(2), "proprio": np.array([np.nan], np.float32)},
            {**frame(2), "image_primary": np.zeros((SIZE, SIZE, 4), np.uint8)},
            {"proprio": np.zeros(1, np.float32)},
            None,
        ):
            with pytest.raises(ValueError):
                executor.step(bad)
            assert executor.state.now == before[0] and executor.source.window["proprio"] is before[1]["proprio"]
        said += [executor.step(frame(x))[0] for x in range(2, 6)]
        np.testing.assert_allclose(said, np.arange(6) / 10, atol=1e-6)
        assert np.ravel(executor.source.window["proprio"]).tolist() == [4, 5]


def test_a_closed_executor_says_so_and_gives_its_source_back(source):
    executor = AsyncExecutor(source, Plan("naive", 2), delay=0)
    with pytest.raises(RuntimeError, match="no episode has begun: call start"):
        executor.step(frame(0))
    with pytest.raises(ValueError, match=f"this {type(source).__name__} drives another executor, of mode 'naive'"):
        AsyncExecutor(source, Plan("wait"))
    executor.start(frame(0), "go")
    executor.step(frame(0))
    executor.close()
    executor.close()
    with pytest.raises(RuntimeError, match="was closed"):
        executor.step(frame(1))
    with pytest.raises(RuntimeError, match="was closed"):
        executor.start(frame(1), "go")
    assert executor.hold()[0] == 0
    with AsyncExecutor(source, Plan("wait"), delay=0) as another:
        another.start(frame(3), "go")
        assert another.step(frame(3))[0] == 3
    forgotten = AsyncExecutor(source, Plan("wait"))
    del forgotten  # nor does one keep its source of which nobody knows
    gc.collect()
    AsyncExecutor(source, Plan("wait")).close()


def test_an_executor_is_as_fast_as_max_change_from_what_was_executed():
    policy = Faulty()
    source = LocalPolicy(policy, "line", max_change=0.25)
    rng = np.random.default_rng(0)
    for mode in ("wait", "naive", "ensemble", "guided"):
        with AsyncExecutor(source, Plan(mode, 2, initial_delay=1), max_errors=100, delay=1) as executor:
            policy.fault, said = None, []
            executor.start(frame(0), "go")
            for _ in range(60):
                policy.fault = "nan" if rng.random() < 0.4 else None
                said.append(executor.step(frame(float(rng.normal(0, 3))))[0])
                assert executor.filter.last == said[-1]
            assert np.abs(np.diff(said)).max() <= 0.25 + 1e-6 and executor.filter.counts["slowed"]


@pytest.mark.parametrize("delay", [None, 0, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_goes_on_after_an_interrupt_gets_another_chunk(error, delay, monkeypatch):
    """Raised by the policy, or in the wait for it: it is not an outage, and nothing stays asked for."""
    for where in ("policy", "wait"):
        if where == "wait" and delay is None:
            continue  # there is none
        policy = HeldUpPolicy()
        with AsyncExecutor(LocalPolicy(policy, "line"), Plan("naive", 2), delay=delay) as executor:
            executor.start(frame(0), "go")
            answer, wait = policy.sample_actions, concurrent.futures.wait

            def interrupted(*_, **__):
                raise error

            if where == "policy":
                policy.sample_actions = interrupted
            else:
                monkeypatch.setattr(concurrent.futures, "wait", interrupted)
            interrupts = 0
            for x in range(30):
                try:
                    command = executor.step(frame(x))
                except error:
                    interrupts += 1
                    policy.sample_actions = answer
                    monkeypatch.setattr(concurrent.futures, "wait", wait)
                if executor._running is not None:
                    wait_for_chunk(executor)
            assert interrupts == 1 and not executor.errors
            assert command[0] > 20 and executor.state.counts["chunks"] > 5, where


def test_a_new_executor_knows_nothing_of_the_episode_before():
    source = LocalPolicy(HeldUpPolicy(), "line")
    first = AsyncExecutor(source, Plan("naive", 2), delay=0)
    first.start(frame(3), "go")
    first.step(frame(3))
    first.close()
    assert first.hold()[0] == 3
    with AsyncExecutor(source, Plan("naive", 2), delay=0) as second:
        with pytest.raises(UnsafeAction, match="nothing was executed yet"):
            second.hold()
        second.start(frame(5), "go")
        second.step(frame(5))
        with pytest.raises(RuntimeError, match="was closed, and another drives its source"):
            first.hold()
        assert second.hold()[0] == 5


def test_a_source_without_limits_drives_no_executor():
    with PolicyServer(HeldUpPolicy(), unnormalize="line", port=0).running() as server:
        with PolicyClient(port=server.port, limits=False) as client:
            with pytest.raises(ValueError, match="limits=False: what holds this robot is not known"):
                AsyncExecutor(client, Plan("wait"))
