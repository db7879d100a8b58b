"""The supervisor with real processes and real signals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from octo_like.training import exits

# A command that lives by a script: "status[:saved step]" per attempt, the last one for ever after.
COMMAND = """
import json, os, pathlib, signal, sys, time
folder, *plan = sys.argv[1:]
count = pathlib.Path(folder, "count")
attempt = int(count.read_text()) if count.exists() else 0
count.write_text(str(attempt + 1))
what, _, saved = plan[min(attempt, len(plan) - 1)].partition(":")
if saved:
    pathlib.Path(os.environ["OCTO_LIKE_PROGRESS"]).write_text(json.dumps({"start": 0, "saved": int(saved)}))
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    pathlib.Path(folder, "ready").touch()
    time.sleep(60)
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path(folder, "ready").touch()
    time.sleep(60)
sys.exit(int(what))
"""


def supervise(tmp_path, *plan, wait=True, **options):
    flags = [f"--{name}={value}" for name, value in {"backoff": 0.01, "delay": 0.01, **options}.items()]
    child = [sys.executable, "-c", COMMAND, str(tmp_path), *plan]
    command = [sys.executable, "scripts/supervise.py", *flags, f"--log={tmp_path / 'log.jsonl'}", "--", *child]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
    if not wait:
        return process
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors, attempts(tmp_path)


def attempts(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "plan,status,statuses",
    [
        (["0"], 0, [0]),
        (["75", "75", "0"], 0, [75, 75, 0]),
        (["1", "kill", "77", "0"], 0, [1, -9, 77, 0]),
        (["2"], 2, [2]),
        (["1", "76"], 76, [1, 76]),
    ],
)
def test_what_is_started_again(tmp_path, plan, status, statuses):
    code, errors, log = supervise(tmp_path, *plan)
    assert code == status, errors
    assert [entry["status"] for entry in log] == statuses
    assert log[-1]["next_in"] is None and all(entry["meaning"] for entry in log)


def test_a_crash_loop_is_given_up_with_growing_pauses(tmp_path):
    code, errors, log = supervise(tmp_path, "1", max_crashes=4, max_backoff=0.03)
    assert code == 1 and "giving up" in errors
    assert [entry["next_in"] for entry in log] == [0.01, 0.02, 0.03, None]


def test_progress_forgives_earlier_crashes(tmp_path):
    """Five crashes, but never three in a row without a new checkpoint."""
    code, _, log = supervise(tmp_path, "1", "kill", "1:10", "1:10", "1:20", "0", max_crashes=3)
    assert code == 0
    assert [entry["crashes_without_progress"] for entry in log] == [1, 2, 1, 2, 1, 2]
    assert [entry["saved_step"] for entry in log] == [None, None, 10, 10, 20, 20]


def test_a_note_or_a_log_that_is_broken_is_no_reason_to_give_up(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    flags = ["--backoff=0.01", f"--log={tmp_path / 'log.jsonl'}"]
    broken = "import os, pathlib, sys; pathlib.Path(os.environ['OCTO_LIKE_PROGRESS']).write_bytes(b'\\xff{'); " + (
        "path = pathlib.Path(sys.argv[1]); begun = path.exists(); path.touch(); sys.exit(0 if begun else 1)"
    )
    command = [
        sys.executable,
        "scripts/supervise.py",
        *flags,
        "--",
        sys.executable,
        "-c",
        broken,
        str(tmp_path / "begun"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}, timeout=60)
    assert done.returncode == 0 and "cannot be read" in done.stderr and "cannot write" in done.stderr


def until(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_and_ends_the_supervisor(tmp_path, number):
    """Ctrl-C reaches the command as SIGTERM, at which it saves."""
    process = supervise(tmp_path, "wait", wait=False)
    until(tmp_path / "ready")
    process.send_signal(number)
    process.communicate(timeout=60)
    log = attempts(tmp_path)
    assert [entry["status"] for entry in log] == [exits.PREEMPTED]
    assert process.returncode == (exits.INTERRUPTED if number == signal.SIGINT else exits.PREEMPTED)


@pytest.mark.parametrize("how", ["grace", "second signal"])
def test_a_command_that_does_not_listen_is_killed(tmp_path, how):
    process = supervise(tmp_path, "deaf", wait=False, grace=0.2 if how == "grace" else 600)
    until(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    if how == "second signal":
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert attempts(tmp_path)[0]["meaning"] == "killed by SIGKILL"


def test_command_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, "scripts/supervise.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})

    assert run().returncode == 2 and "no command" in run().stderr
    missing = run("--", "no_such_program")
    assert missing.returncode == 2 and "cannot start no_such_program" in missing.stderr


def test_statuses_in_words():
    assert exits.describe(exits.STALLED) == "stalled" and exits.describe(-15) == "killed by SIGTERM"
    assert exits.describe(3) == "failed with status 3" and exits.describe(-200) == "killed by signal 200"
