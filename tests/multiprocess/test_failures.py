"""One process of a run fails: all of them end soon, with its status and its message. And who else trains there."""

import json
import os
import signal
import sys

import pytest

from octo_like.training import exits
from tests.multiprocess.launch import Launch, batches, diary

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]
# JAX's own timeouts are long: what ends the processes within `SOON` is not them.
PATIENT = ("--shutdown_timeout=600", "--init_timeout=600")
SOON = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def two(workdir, *flags, cache, **options):
    return Launch(workdir, "--config.num_steps=8", *PATIENT, *flags, cache=cache, processes=2, heartbeat=30, **options)


def end_together(run):
    """Waits for the first process that ends, and for the others no longer than SOON."""
    run.until(lambda: False)
    for child in run.children:
        child.wait(SOON)


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
    "fault,message,status",
    [
        ("mistake:0", "a mistake at step 0", exits.USAGE),  # in the data: nothing has been trained
        ("lost:4", "a shard is gone at step 4", exits.ERROR),  # in mid-run
    ],
)
def test_the_failing_process_has_the_last_word(cache, tmp_path, process, fault, message, status):
    run = two(tmp_path / "run", "--config.checkpoint.every=2", cache=cache, fault=f"{fault}@{process}")
    end_together(run)
    run.wait(status)
    other = run.log(1 - process)
    assert f"because of process {process} on host {os.uname().nodename}" in other and message in other
    assert f"ends with status {status}" in other
    assert message in run.log(process) and ("Traceback" in run.log(process)) == (status == exits.ERROR)
    if fault == "lost:4" and process == 1:
        again = two(tmp_path / "run", "--config.checkpoint.every=2", cache=cache).wait(0)
        assert again.resumed_from() == 2 and sorted(batches(tmp_path / "run")) == list(range(1, 9))


def test_a_mistake_on_one_host_is_not_tried_again(cache, tmp_path):
    """Both supervisors give up at once with 2, as the process that failed did."""
    attempts = tmp_path / "attempts.jsonl"
    wrapper = (sys.executable, "scripts/supervise.py", "--backoff=1", f"--log={attempts}", "--")
    run = two(tmp_path / "run", cache=cache, fault="mistake:0@1", wrapper=wrapper)
    run.wait(exits.USAGE, timeout=300)
    assert [json.loads(line)["status"] for line in attempts.read_text().splitlines()] == [exits.USAGE] * 2


def test_a_stall_on_one_host_ends_all_as_stalled(cache, tmp_path):
    limits = ("--config.watchdog.data_minutes=0.3", "--config.watchdog.minutes=0")
    run = two(tmp_path / "run", *limits, cache=cache, fault="hang:0@1")
    run.wait(exits.STALLED, timeout=300)
    assert any("data was not done within" in run.log(i) for i in range(2))
    assert any(
        "hang" in path.read_text() or "happen" in path.read_text() for path in (tmp_path / "run/stacks").iterdir()
    )


def test_a_killed_process_ends_the_others_within_the_heartbeat(cache, tmp_path):
    run = two(tmp_path / "run", cache=cache, fault="kill:4@1")
    end_together(run)
    assert run.children[1].returncode == -signal.SIGKILL
    # Killed by JAX, or ended by the collective that broke: a crash for the supervisor either way.
    assert run.children[0].returncode in (exits.ERROR, -signal.SIGABRT)


def test_separate_workdirs_are_said_at_once(cache, tmp_path):
    run = two(tmp_path / "run", cache=cache, workdirs=(tmp_path / "mine", tmp_path / "yours"))
    run.wait(exits.USAGE, timeout=300)
    for process in range(2):
        assert "is not the same folder for all processes: [1] do not see" in run.log(process), run.log(process)
        assert "use a bucket (gs://...) or a file system that all hosts share" in run.log(process)
    assert not (tmp_path / "mine").exists() and not (tmp_path / "yours").exists()


def test_two_trainings_in_one_workdir(cache, tmp_path):
    """The second is refused and leaves the first alone, which ends as if it had been on its own."""
    workdir, flags = tmp_path / "run", ("--config.num_steps=60", "--config.checkpoint.every=2")
    first = Launch(workdir, *flags, cache=cache, fault="hang:9")
    assert first.until(lambda: len(diary(workdir)) >= 8)
    second = Launch(workdir.with_name("other"), *flags, cache=cache, workdirs=(workdir,))
    second.wait(exits.ERROR)
    pid = first.children[0].pid
    assert f"{workdir} is in use: process {pid} on host {os.uname().nodename}" in second.log()
    assert "Traceback" not in second.log() and not diary(second.workdir)
    first.signal(signal.SIGKILL)
    first.wait(-signal.SIGKILL)
    # A SIGKILL gives nothing back, and still the next one need not wait.
    third = Launch(workdir, "--config.num_steps=12", "--config.checkpoint.every=2", cache=cache).wait(0)
    assert third.resumed_from() in (6, 8) and "took over from process" in third.log()
    assert sorted(batches(workdir)) == list(range(1, 13))
