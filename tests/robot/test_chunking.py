"""Chunks that arrive late, by counting: every mode on chunks whose actions say where they belong."""

import numpy as np
import pytest

from octo_like.common import normalization
from octo_like.common.chunks import Continuation, resample
from octo_like.robot.chunking import MODES, Chunks, Plan, ensemble_weights

H = 8


def run(plan, delay, steps=24):
    """[command or None] of an episode whose chunk asked for at tick t is t + 0, t + 1, ...: the right action for each
    tick, plus 1000 for each chunk; and the requests."""
    chunks, arriving, asks, commands = Chunks(plan, H), None, [], []
    for _ in range(steps):
        chunks.tick()
        for _ in range(2):
            if arriving is not None and arriving[0] <= chunks.now:
                chunks.accept(arriving[1])
                arriving = None
            if chunks.wants_chunk():
                first = chunks.is_empty
                ask = chunks.ask()
                asks.append(ask)
                chunk = np.arange(H, dtype=np.float32)[:, None] + ask.tick + 1000 * len(asks)
                arriving = (ask.tick + (0 if first else delay), chunk)
        command = chunks.action()
        commands.append(None if command is None else float(command[0]))
    return commands, asks, chunks


@pytest.mark.parametrize("mode", ["naive", "guided", "guided_vjp", "trained"])
@pytest.mark.parametrize("delay", [0, 1, 2, 3, 4])
def test_chunks_take_over_at_the_action_of_the_present(mode, delay):
    commands, asks, chunks = run(Plan(mode, 4, initial_delay=delay, max_delay=4), delay)
    assert [command % 1000 for command in commands] == list(range(24)) and chunks.counts["held"] == 0
    assert [ask.tick for ask in asks] == [0, 4, 8, 12, 16, 20]
    for number, ask in enumerate(asks[1:], 1):
        assert (ask.executed, ask.delay) == (4, delay)
        assert ask.method == MODES[mode][1] and (ask.previous is None) == (mode == "naive")
        if ask.previous is not None:
            assert ask.previous[0, 0] == 1000 * number + 4 * (number - 1)
    assert chunks.seams == [0, *(tick + delay for tick in (4, 8, 12, 16, 20) if tick + delay < 24)]
    assert set(chunks.delays) == {delay} and chunks.counts["late"] == 0


def test_waiting_holds_and_begins_anew():
    commands, asks, chunks = run(Plan("wait", 4, initial_delay=2), 2, steps=12)
    assert commands == [1000, 1001, 1002, 1003, None, None, 2004, 2005, 2006, 2007, None, None]
    assert chunks.counts["held"] == 4 and all(ask.method is None for ask in asks)


def test_a_slow_computation_is_asked_for_later_and_what_runs_out_is_held():
    """Delays of 6 of 8 actions: 2 are left when the new chunk is asked for, so 4 steps are held; and when it comes, it
    begins behind the 2 that were executed, not behind the 6 steps that passed."""
    commands, asks, chunks = run(Plan("guided", 2, initial_delay=6), 6, steps=16)
    assert [ask.tick for ask in asks[:2]] == [0, 6] and (asks[1].executed, asks[1].delay) == (6, 2)
    assert commands[6:14] == [1006, 1007, None, None, None, None, 2008, 2009]
    assert chunks.counts["held"] == 4 and chunks.counts["late"] == 0


def test_the_expected_delay_is_the_largest_of_the_last_measured_ones():
    """The first chunk, which compiles, is not measured; a slow one is forgotten after `delay_window` others."""
    chunks = Chunks(Plan("guided", 2, initial_delay=1, delay_window=2), H)

    def once(delay):
        while not chunks.wants_chunk():
            chunks.tick()
            if chunks.wants_chunk():
                break
            chunks.action()
        ask = chunks.ask()
        for _ in range(delay):
            chunks.action()
            chunks.tick()
        chunks.accept(np.zeros((H, 1)))
        chunks.action()
        return ask.delay

    chunks.tick()
    once(5)
    assert chunks.expected_delay == 1 and not chunks.delays
    assert once(3) == 1 and chunks.expected_delay == 3 and chunks.counts["late"] == 1
    assert once(1) == 3 and chunks.expected_delay == 3
    once(1)
    assert chunks.expected_delay == 1
    once(0)
    chunks.reset()
    assert chunks.expected_delay == 1 and chunks.is_empty  # measured delays outlive an episode


@pytest.mark.parametrize("delay", [0, 2])
def test_ensembles_average_what_the_last_chunks_say_of_the_present(delay):
    plan = Plan("ensemble", 1, initial_delay=delay, exp_weight=0.5, ensemble_size=3)
    commands, asks, _ = run(plan, delay, steps=20)
    assert [ask.tick for ask in asks] == [0, *range(1, 20, max(1, delay))]
    for tick in range(10, 16):
        there = [n for n, ask in enumerate(asks, 1) if ask.tick + (delay if n > 1 else 0) <= tick][-3:]
        there = [n for n in there if tick - asks[n - 1].tick < H]
        weights = np.exp(-0.5 * np.arange(len(there)))
        assert commands[tick] == pytest.approx(weights @ (1000 * np.array(there)) / weights.sum() + tick, abs=1e-3)


@pytest.mark.parametrize(("exp_weight", "weights"), [(1e6, [1, 0, 0]), (-1e6, [0, 0, 1]), (0.0, [1 / 3] * 3)])
def test_weights_of_an_ensemble_are_finite(exp_weight, weights):
    np.testing.assert_array_equal(ensemble_weights(exp_weight, 3), weights)


def test_plans_say_what_is_wrong():
    for message, arguments in {
        "unknown mode 'fast'; valid: wait, naive": dict(mode="fast"),
        "exec_horizon must be at least 1": dict(exec_horizon=0),
        "exec_horizon must be a whole number, got 2.5": dict(exec_horizon=2.5),
        "delay_window must be a whole number, got True": dict(delay_window=True),
        "initial_delay must be a whole number, got 1.5": dict(initial_delay=1.5),
        "initial_delay must be a whole number, got nan": dict(initial_delay=float("nan")),
        "initial_delay must be at least 0, got -1": dict(initial_delay=-1),
        "max_delay must be a whole number, got 2.5": dict(mode="trained", max_delay=2.5),
        "exp_weight must be a finite number, got nan": dict(mode="ensemble", exp_weight=float("nan")),
        "exp_weight must be a finite number, got None": dict(mode="ensemble", exp_weight=None),
        "'trained' needs max_delay": dict(mode="trained"),
        r"kinds\[1\]: unknown kind 'Delta'; did you mean 'delta'": dict(factor=2, kinds=("delta", "Delta")),
        "kinds is one for each action dimension": dict(kinds="delta"),
    }.items():
        with pytest.raises(ValueError, match=message):
            Plan(**arguments)
    with pytest.raises(ValueError, match=r"exec_horizon must be in 1..8"):
        Chunks(Plan(exec_horizon=9), H)
    with pytest.raises(ValueError, match="factor > 1 needs the kinds of the action dimensions"):
        Chunks(Plan(factor=2), H)


# ------------------------------------------------------------------------------------------------- resampling, weights


def test_resampling_interpolates_targets_divides_changes_and_holds_the_rest():
    chunk = np.array([[0, 3, 1, 0], [6, 6, 2, 1], [3, 0, 3, 1]], np.float32)
    found = resample(chunk, 3, ["absolute", "delta", "velocity", "gripper"])
    np.testing.assert_allclose(found[:, 0], [0, 2, 4, 6, 5, 4, 3, 3, 3], atol=1e-6)
    np.testing.assert_allclose(found[:, 1].reshape(3, 3).sum(1), chunk[:, 1], atol=1e-6)
    np.testing.assert_array_equal(found[:, 2:], np.repeat(chunk[:, 2:], 3, axis=0))
    assert resample(chunk, 1, ["other"] * 4) is not None and found.dtype == np.float32
    with pytest.raises(ValueError, match=r"expected a chunk \(H, 3\)"):
        resample(chunk, 2, ["delta"] * 3)
    with pytest.raises(ValueError, match="unknown kind 'detla'; did you mean 'delta'"):
        resample(chunk, 2, ["delta"] * 3 + ["detla"])


def test_a_faster_control_rate_goes_on_between_actions():
    """Three commands for each action: chunks are asked for on every third step only, and take over between actions."""
    plan = Plan("naive", 2, initial_delay=4, factor=3, kinds=["absolute"])
    commands, asks, _ = run(plan, 4, steps=40)
    assert all(ask.tick % 3 == 0 for ask in asks) and [ask.executed for ask in asks[1:]] == [2] * (len(asks) - 1)
    first = resample(np.arange(H, dtype=np.float32)[:, None] + 1000, 3, ["absolute"])[:10, 0]
    np.testing.assert_allclose(commands[:10], first, atol=1e-3)
    second = resample(np.arange(H, dtype=np.float32)[:, None] + 2006, 3, ["absolute"])[:, 0]
    np.testing.assert_allclose(commands[10:16], second[4:10], atol=1e-3)


def test_weights_are_the_papers():
    plan = Continuation(np.zeros((2, 16, 1)), [8, 16], 4)
    c = (8 - np.arange(4, 8)) / (8 - 4 + 1)
    expected = [1] * 4 + list(c * (np.exp(c) - 1) / (np.e - 1)) + [0] * 8
    np.testing.assert_allclose(plan.weights()[0], expected, rtol=1e-6)
    assert not plan.weights()[1].any()  # nothing is left of it
    linear = Continuation(np.zeros((1, 16, 1)), 8, 4, schedule="linear").weights()[0]
    np.testing.assert_allclose(linear[4:8], c, rtol=1e-6)
    hard = Continuation(np.zeros((1, 16, 1)), 8, 4, method="trained").weights()[0]
    np.testing.assert_array_equal(hard, np.arange(16) < 4)
    shifted = Continuation(np.arange(4.0).reshape(1, 4, 1), 1).shifted()
    np.testing.assert_array_equal(shifted[0, :, 0], [1, 2, 3, 3])


def test_what_cannot_be_continued_is_said():
    chunk = np.zeros((1, 8, 2))
    for message, arguments in {
        "unknown method 'hard'": dict(previous=chunk, executed=0, method="hard"),
        r"must be \(B, H, A\)": dict(previous=chunk[0], executed=0),
        "not finite": dict(previous=chunk * np.nan, executed=0),
        r"executed must be in 0..8": dict(previous=chunk, executed=9),
        "after 6 executed actions 2 of 8 are left, and delay=3": dict(previous=chunk, executed=6, delay=3),
        "delay must be a whole number": dict(previous=chunk, executed=6, delay=0.5),
    }.items():
        with pytest.raises(ValueError, match=message):
            Continuation(**arguments)


def test_relative_actions_become_relative_to_another_state():
    rng = np.random.default_rng(0)
    action, before, now = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 1, 5)), rng.normal(size=(2, 1, 5))
    which = (4, None, 0)
    absolute = normalization.to_absolute(action, before, which)
    again = normalization.to_relative(absolute, now, which)
    np.testing.assert_allclose(normalization.to_absolute(again, now, which), absolute)
    np.testing.assert_allclose(again[..., 0], action[..., 0] + (before - now)[..., 4])
    np.testing.assert_array_equal(again[..., 1], action[..., 1])
