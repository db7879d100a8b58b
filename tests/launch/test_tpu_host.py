"""tpu_host.sh on this machine: set-up, a run in a real tmux, logs, status, signals, and processes on the chips."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.clouds import ROOT, option

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux: runs on a host cannot be tried here")

POD = ["--name", "octo", "--project", "lab", "--zone", "us-central2-b"]

# A training run: says that it started, saves on SIGTERM as train.py does, and leaves with its status.
TRAIN = """
import os, signal, sys, time

def save(number, frame):
    print("saved", flush=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
print("started with", os.environ.get("WORD"), sys.argv[1:], "in", os.path.basename(os.getcwd()), flush=True)
if "--fail" in sys.argv:
    sys.exit(3)
while "--work" in sys.argv:
    time.sleep(0.05)
"""

STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('started', flush=True)\ntime.sleep(600)"
)


class Host:
    """A home folder that the fake gcloud's ssh lands in."""

    def __init__(self, clouds):
        self.clouds, self.home = clouds, clouds.folder / "host"
        self.home.mkdir()
        self.code = clouds.folder / "code"
        (self.code / "scripts").mkdir(parents=True)
        for name in ("shell.sh", "tpu_host.sh", "tpu_pod.sh"):
            shutil.copy(ROOT / "scripts" / name, self.code / "scripts" / name)
        (self.code / "requirements").mkdir()
        (self.code / "requirements" / "cpu.lock").write_text("")
        (self.code / "train_toy.py").write_text(TRAIN)
        (self.code / "stubborn.py").write_text(STUBBORN)
        # What supervise.py does to a command, for these tests: it runs it and passes SIGTERM on.
        (self.code / "scripts" / "supervise.py").write_text(
            "import signal, subprocess, sys\n"
            "child = subprocess.Popen(sys.argv[2:])\n"
            "signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))\n"
            "print('supervised', sys.argv[1], flush=True)\n"
            "sys.exit(child.wait())\n"
        )
        tmux = clouds.folder / "tmux"
        tmux.mkdir()
        self.settings = {
            "HOST_HOME": str(self.home),
            "TPU_ARCHIVE": str(clouds.folder / "tree.tgz"),
            "TMUX_TMPDIR": str(tmux),
            "OCTO_CHIP_DEVICES": str(clouds.folder / "chip"),
            "OCTO_LOCKFILE": str(clouds.folder / "lockfile"),
            "OCTO_STOP_SECONDS": "300",
        }

    def pod(self, what, *arguments, **settings):
        return subprocess.run(
            ["bash", str(self.code / "scripts" / "tpu_pod.sh"), what, *POD, *arguments],
            env=self.clouds.environment | self.settings | settings,
            capture_output=True,
            text=True,
            timeout=400,
        )

    def good(self, what, *arguments, **settings):
        done = self.pod(what, *arguments, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def log(self):
        return (self.home / "octo_logs" / "run.log").read_text()

    def state(self):
        done = self.good("exec", "--", "bash", "scripts/tpu_host.sh", "status", "--brief")
        return done.strip().removeprefix("octo_state=")

    def wait(self, condition, what):
        deadline = time.monotonic() + 400
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen; log:\n{self.log()}"
            time.sleep(0.05)

    def close(self):
        environment = self.clouds.environment | self.settings
        subprocess.run(["tmux", "kill-server"], env=environment, capture_output=True)


@pytest.fixture
def host(clouds):
    host = Host(clouds)
    yield host
    host.close()


@pytest.fixture
def ready(host):
    host.good("setup")
    return host


def test_setup_installs_with_the_lock_and_keeps_runs(host):
    (host.home / "octo_like" / "runs").mkdir(parents=True)
    (host.home / "octo_like" / "runs" / "kept").write_text("")
    (host.home / "octo_like" / "forgotten.py").write_text("")
    said = host.good("setup", "--setup_command", "echo in $PWD > runs/made")
    assert (host.home / "octo_like" / "runs" / "made").read_text() == f"in {host.home / 'octo_like'}\n"
    assert "ready: Python 3." in said and " JAX " in said
    code = host.home / "octo_like"
    assert (code / "runs" / "kept").exists() and not (code / "forgotten.py").exists()
    assert (code / "train_toy.py").read_text() == TRAIN
    create, install = host.clouds.calls("uv")
    venv = str(host.home / "octo_venv")
    assert create == ["uv", "venv", "--quiet", "--allow-existing", "--python", "3.11", venv]
    words = dict(zip(install[5::2], install[6::2], strict=False))
    assert install[:3] == ["uv", "pip", "install"]
    assert words["--python"] == f"{venv}/bin/python"
    assert words["--constraint"] == "requirements/cpu.lock" and words["--editable"] == ".[data,tpu]"


def test_run_logs_status_and_the_end_of_a_run(ready):
    assert ready.state() == "none"
    command = ["--env", "WORD=two words", "--", "python", "train_toy.py", "a b", "--workdir", "runs/toy"]
    said = ready.good("run", *command)
    assert "started in tmux session octo" in said
    ready.wait(lambda: ready.state() == "finished", "the end")
    assert "supervised --" in ready.log()
    assert "started with two words ['a b', '--workdir', 'runs/toy'] in octo_like" in ready.log()
    assert ready.good("logs", "--lines", "1").splitlines() == ready.log().splitlines()[-1:]
    for step in ("900", "1000"):
        (ready.home / "octo_like" / "runs" / "toy" / "checkpoints" / step).mkdir(parents=True)
        (ready.home / "octo_like" / "runs" / "toy" / "checkpoints" / step / "manifest.json").write_text("{}")
    (ready.home / "octo_like" / "runs" / "toy" / "checkpoints" / "1100").mkdir()  # was being written
    status = ready.good("status")
    assert "finished" in status and "newest checkpoint in runs/toy: 1000" in status

    ready.good("run", "--no_restart", "--", "python", "train_toy.py", "--fail")
    ready.wait(lambda: ready.state().startswith("failed"), "the failure")
    assert ready.state() == "failed:3"
    assert ready.log().count("===") == 2 and ready.log().count("supervised") == 1


def test_stop_lets_the_run_save(ready):
    ready.good("run", "--", "python", "train_toy.py", "--work")
    ready.wait(lambda: "started with" in ready.log(), "the start")
    assert ready.state() == "running" and "running" in ready.good("status")
    ready.good("stop")
    # A person has ended it, which is not to be undone; maintenance, which sends the same signal, is.
    assert "saved" in ready.log() and ready.state() == "ended" and "stopped" in ready.good("status")
    sessions = subprocess.run(["tmux", "ls"], env=ready.clouds.environment | ready.settings, capture_output=True)
    assert b"octo" not in sessions.stdout
    ready.good("run", "--", "python", "train_toy.py", "--work")
    ready.wait(lambda: ready.log().count("started with") == 2, "the second start")
    os.kill(int((ready.home / "octo_logs" / "pid").read_text()), signal.SIGTERM)
    ready.wait(lambda: ready.state() != "running", "the end")
    assert ready.state() == "stopped"


def test_a_second_run_replaces_the_first(ready):
    ready.good("run", "--", "python", "train_toy.py", "--work", "first")
    ready.wait(lambda: "started with" in ready.log(), "the start")
    first = int((ready.home / "octo_logs" / "pid").read_text())
    ready.good("run", "--", "python", "train_toy.py", "--work", "second")
    ready.wait(lambda: "'second'" in ready.log(), "the second start")
    assert ready.log().index("saved") < ready.log().index("'second'")
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    ready.good("stop", "--now")


@pytest.mark.parametrize("how", ["--now", "deadline"])
def test_what_does_not_stop_is_killed_with_its_children(ready, how):
    ready.good("run", "--", "python", "stubborn.py")
    ready.wait(lambda: "started" in ready.log().split("\n", 1)[1], "the start")
    parent = int((ready.home / "octo_logs" / "pid").read_text())
    children = pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    assert children
    if how == "--now":
        ready.good("stop", "--now")
    else:
        ready.good("stop", OCTO_STOP_SECONDS="1")
    ready.wait(lambda: not any(_alive(int(child)) for child in children), "the end of the child")
    assert ready.state() == "failed:137"


def _alive(pid):
    try:
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(shutil.which("lsof") is None, reason="no lsof: who holds a device cannot be found out here")
def test_whoever_holds_the_chips_is_killed_before_a_run(ready):
    """A file stands for the device, and a process that has it open for one that was forgotten."""
    chip, lock = ready.clouds.folder / "chip", ready.clouds.folder / "lockfile"
    chip.write_text("")
    lock.write_text("")
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import time; f = open({str(chip)!r}); print('open', flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"open\n"
        said = ready.good("run", "--", "python", "train_toy.py")
        assert f"killing process {holder.pid}" in said
        assert holder.wait(timeout=300) == -signal.SIGKILL and not lock.exists()
    finally:
        holder.kill()
        holder.stdout.close()


def test_a_vanished_session_is_noticed(ready):
    ready.good("run", "--", "python", "train_toy.py", "--work")
    ready.wait(lambda: "started with" in ready.log(), "the start")
    pid = int((ready.home / "octo_logs" / "pid").read_text())
    launcher = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(launcher, signal.SIGKILL)  # as a reboot would: nobody is left to write down how it ended
    os.killpg(pid, signal.SIGKILL)
    ready.close()
    assert ready.state() == "vanished"


def test_exec_runs_in_the_environment(ready):
    said = ready.good(
        "exec", "--env", "A=x y", "--", "python", "-c", "import os, sys; print(os.getcwd(), os.environ['A'])"
    )
    assert said.strip() == f"{ready.home / 'octo_like'} x y"
    assert ready.pod("exec", "--", "python", "-c", "raise SystemExit(4)").returncode == 4


def test_mistakes_on_the_host(host, ready):
    assert "nothing was started" in ready.pod("logs").stderr
    call = ready.clouds.calls("gcloud")[-1]
    assert option(call, "command") == "bash octo_like/scripts/tpu_host.sh logs --lines 50"
    shutil.rmtree(ready.home / "octo_venv")
    assert "run setup first" in ready.pod("run", "--", "python", "x.py").stderr
    for arguments, words in [
        (["fly"], ["fly", "setup"]),
        (["run", "python"], ["python", "after --"]),
        (["run", "--env", "A", "--", "ls"], ["NAME=VALUE"]),
        (["logs", "--lines", "x"], ["--lines x"]),
    ]:
        done = ready.clouds.run("tpu_host.sh", *arguments)
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
