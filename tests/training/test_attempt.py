"""Exit statuses, the phases of a start and their limits, with one process; with two, see tests/multiprocess."""

import argparse
import errno
import os
import signal
import subprocess
import sys

import pytest

from octo_like.common.config import ConfigError
from octo_like.common.storage import StorageError
from octo_like.training import attempt as module
from octo_like.training import exits
from octo_like.training.arguments import add_arguments
from octo_like.training.attempt import Attempt, TrainingFailed, status_of
from octo_like.training.checkpoint import CheckpointError, NonFiniteState
from octo_like.training.lease import Lease, WorkdirInUse
from octo_like.training.watch import TooManyBadSteps
from tests.training import tiny_config


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.fixture
def attempt(tmp_path):
    """Makes an attempt with a config whose `watchdog` is changed."""

    def make(**watchdog):
        parser = argparse.ArgumentParser()
        parser.add_argument("--workdir")
        add_arguments(parser)
        config = tiny_config.get_config("synthetic")
        config.watchdog.update(watchdog)
        return Attempt(parser.parse_args([f"--workdir={tmp_path / 'run'}", "--distributed=off"]), config)

    return make


@pytest.mark.parametrize(
    "error,before,after",
    [
        (ConfigError("x"), exits.USAGE, exits.ERROR),
        (FileNotFoundError("x"), exits.USAGE, exits.ERROR),
        (RuntimeError("x"), exits.ERROR, exits.ERROR),
        (CheckpointError("x"), exits.ERROR, exits.ERROR),
        # An outage is no mistake, whatever was concluded from it.
        (StorageError("x"), exits.ERROR, exits.ERROR),
        (caused(ConfigError("no dataset"), OSError(errno.EIO, "I/O error")), exits.ERROR, exits.ERROR),
        (caused(FileNotFoundError("features.json"), TimeoutError()), exits.ERROR, exits.ERROR),
        (caused(ConfigError("x"), ValueError("UNAVAILABLE: y")), exits.ERROR, exits.ERROR),
        (caused(ConfigError("x"), FileNotFoundError("y")), exits.USAGE, exits.ERROR),
        (WorkdirInUse("x"), exits.ERROR, exits.ERROR),
        (TooManyBadSteps("x"), exits.NOT_FINITE, exits.NOT_FINITE),
        (NonFiniteState("x"), exits.NOT_FINITE, exits.NOT_FINITE),
        (SystemExit(76), 76, 76),
        (SystemExit(None), 0, 0),
        (SystemExit("words"), exits.ERROR, exits.ERROR),
    ],
)
def test_a_mistake_is_one_before_the_first_step_only(error, before, after):
    assert status_of(error, begun=False) == before and status_of(error, begun=True) == after


def test_the_same_error_before_and_after_the_first_step(attempt, tmp_path):
    with pytest.raises(ConfigError, match="no such key"):
        with attempt() as one:
            raise ConfigError("no such key")
    assert not (tmp_path / "run").exists()  # the lease left nothing
    with pytest.raises(TrainingFailed, match="after the first step: FileNotFoundError: .*shard") as failed:
        with attempt() as one:
            one.begun = True
            raise FileNotFoundError("shard 7 is gone")
    assert isinstance(failed.value.__cause__, FileNotFoundError)


def test_the_workdir_is_held_from_the_beginning_to_the_end(attempt, tmp_path):
    with attempt() as one:
        assert not one.resumes
        with pytest.raises(WorkdirInUse, match=f"process {os.getpid()} on host"):
            Lease(tmp_path / "run").take()
        with pytest.raises(WorkdirInUse):
            attempt().__enter__()
    with attempt():
        pass


def test_every_phase_has_its_limit(attempt):
    with attempt(startup_minutes=1.0, data_minutes=2.0, restore_minutes=3.0, agreement_minutes=4.0, minutes=5.0) as one:
        dog = one.watchdog
        assert (dog._phase, dog._limit) == ("startup", 60)
        for name, seconds in (("data", 120), ("restore", 180), ("agreement", 240)):
            with one.phase(name):
                assert (dog._phase, dog._limit) == (name, seconds)
            assert dog._phase == "startup"
        dog.enter("steps")
        assert dog._limit == 1200
    with attempt(minutes=0, data_minutes=0) as one:
        assert one.watchdog.enter("data") == 86400 and one.watchdog._limit == 0


HANGS = """
import sys, threading, types
from octo_like.training import attempt, loop
import train

def it_hangs_here(*args, **kwargs):
    threading.Event().wait()

what = sys.argv.pop(1)  # the first thing that is done in this phase
if what == "data":
    train.inputs_from_config = it_hangs_here
elif what == "restore":
    loop.build_program = lambda *args, **kwargs: types.SimpleNamespace(place=it_hangs_here)
elif what == "agreement":
    attempt.distributed.fingerprint_across_hosts = it_hangs_here
attempt.command(train.main)
"""


@pytest.mark.parametrize("phase", ["data", "restore", "agreement"])
def test_what_hangs_before_the_first_step_is_ended(tmp_path, repository, phase):
    limits = [f"--config.watchdog.{name}_minutes=20" for name in ("data", "restore", "agreement") if name != phase]
    command = [sys.executable, "-c", HANGS, phase, "--config", "tests/training/tiny_config.py:synthetic,smallest"]
    command += ["--workdir", str(tmp_path / "run"), f"--config.watchdog.{phase}_minutes=0.02", *limits]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == exits.STALLED, done.stderr[-3000:]
    assert f"{phase} was not done within" in done.stderr and f"watchdog.{phase}_minutes" in done.stderr
    (stacks,) = (tmp_path / "run" / "stacks").iterdir()
    assert "it_hangs_here" in stacks.read_text()
    assert not (tmp_path / "run" / "lease").exists()


LEAVES = """
import sys, types
from octo_like.training import attempt
from octo_like.training.arguments import add_arguments
from octo_like.training.attempt import Attempt

one = Attempt.__new__(Attempt)
one._leaving, one._last_acts = attempt.threading.Lock(), []
one.peers = one.lease = None
one._flags = types.SimpleNamespace(heartbeat_timeout=1)
attempt._LAST_ACTS_SECONDS = 0.1
one.before_leaving(lambda: attempt.threading.Event().wait())  # a bucket that does not answer
print("leaving")
attempt.threading.Thread(target=one.leave, args=(77, "x")).start()
attempt.threading.Event().wait()
"""


def test_leaving_takes_a_limited_time_and_gets_through_to_a_thread_that_hangs(repository):
    done = subprocess.run([sys.executable, "-c", LEAVES], cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 77 and done.stdout == "leaving\n", done.stderr


def test_one_process_needs_no_agreement_on_the_workdir(tmp_path):
    module.check_same_workdir(tmp_path, "absent", seconds=0)


def test_a_process_that_is_killed_leaves_the_workdir_to_the_next(tmp_path, repository):
    source = (
        "import os, signal, sys\nfrom octo_like.training.lease import Lease\nLease(sys.argv[1]).take()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", source, str(tmp_path)], cwd=repository, timeout=60)
    assert done.returncode == -signal.SIGKILL and list((tmp_path / "lease").iterdir())
    mine = Lease(tmp_path)
    mine.take()
    mine.release()
