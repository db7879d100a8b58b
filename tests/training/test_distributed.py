"""Start-up, preemption and agreement with one process; with two, see tests/multiprocess."""

import argparse
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from octo_like.training import distributed
from octo_like.training.arguments import add_arguments
from octo_like.training.distributed import check_hosts


def test_flags_fit_initialize():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert distributed.initialize(**vars(parser.parse_args(["--distributed=off"]))) is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(coordinator_address="host:1"), "but not --num_processes, --process_id: pass all three or none"),
        (dict(process_id=0, num_processes=2), "--num_processes was given, but not --coordinator_address"),
        (dict(distributed="off", process_id=0), "--distributed=off contradicts --process_id"),
        (dict(heartbeat_timeout=0), "--heartbeat_timeout must be at least 1 second, got 0"),
        (dict(init_timeout=-1), "--init_timeout must be at least 1 second"),
    ],
)
def test_incomplete_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(**arguments)


def test_sigterm_stops_a_lone_process_between_steps():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.Preemption() as preemption:
        assert not preemption.should_stop(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.should_stop(1) and preemption.should_stop(2)
        # A second one does what it did before.
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_fingerprint():
    assert distributed.fingerprint({"a": 1, "b": [2, None]}) == distributed.fingerprint({"b": [2, None], "a": 1})
    assert distributed.fingerprint({"a": 1}) != distributed.fingerprint({"a": 2})
    assert distributed.fingerprint_across_hosts([1]) == distributed.fingerprint([1])


def test_hosts_compare_the_statistics_too(monkeypatch):
    """Every process has the same order, but a source without a seed gave process 1 other statistics."""
    statistics = {
        name: {"action": {"mean": np.zeros(2, np.float32), "mask": np.ones(2, bool)}, "num_transitions": 5}
        for name in ("bridge", "mine")
    }
    other = {**statistics, "mine": {**statistics["mine"], "action": {"mean": np.float32([0, 1e-7])}}}
    order_spec, words, calls = {"approximate": ["mine"]}, [], []

    def allgather(mine):
        words.append(mine)
        calls.append(None)
        return np.stack([mine, theirs[len(calls) - 1] if theirs else mine])

    theirs = []
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", allgather)
    check_hosts(order_spec, other)
    assert len(words) == 4  # the order, parts of one's own, and the statistics of both datasets
    theirs, calls = list(words), []
    check_hosts(order_spec, other)
    calls.clear()
    message = r"statistics of 'mine' \(a source must .* give what it shuffles a seed\) differs .*processes \[1\]"
    with pytest.raises(RuntimeError, match=message):
        check_hosts(order_spec, statistics)


COMPILE = """
import sys
import jax, jax.numpy as jnp
from octo_like.training import distributed
from octo_like.training.arguments import add_arguments

print(distributed.setup_compilation_cache(sys.argv[1], min_seconds=0))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
"""


def test_compilation_cache_is_filled(tmp_path, repository):
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(tmp_path), done.stderr
    assert any(tmp_path.iterdir())


def test_compilation_cache_can_be_turned_off(monkeypatch):
    before = jax.config.jax_enable_compilation_cache
    try:
        assert distributed.setup_compilation_cache("off") is None
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
