"""Runs of train.py as real processes: start, wait for a moment, signal, compare what they leave."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np

from octo_like.training.checkpoint import Checkpointer
from octo_like.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "tests/training/tiny_config.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Launch:
    """train.py in `processes` processes of `devices` CPU devices each.

    Args:
      workdir: of the run; diaries and logs lie beside it.
      cache: folder of the compilation cache, shared by all launches of a test.
      wrapper: words before the command of every process, e.g. a supervisor's.
      workdirs: the workdir of every process, when they are not the same.
    """

    def __init__(
        self,
        workdir,
        *flags,
        cache,
        processes=1,
        devices=1,
        words="synthetic,smallest",
        fault="",
        heartbeat=10,
        wrapper=(),
        workdirs=(),
    ):
        self.workdir, self.processes = pathlib.Path(workdir), processes
        self.diary = self.workdir.with_name(f"{self.workdir.name}.diary")
        self.diary.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            **({"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"} if processes > 1 else {}),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "DIARY": str(self.diary),
            "FAULT": fault,
        }
        command = [sys.executable, "tests/multiprocess/diary_train.py", "--config", f"{CONFIG}:{words}"]
        command += ["--config.eval.every=None", "--config.log_every=1"]
        command += [f"--heartbeat_timeout={heartbeat}", *map(str, flags)]
        port = free_port()
        # Shared among launches: a run's logs follow each other.
        self.logs = [self.diary / f"{i}.log" for i in range(processes)]
        self.begun = [log.stat().st_size if log.exists() else 0 for log in self.logs]
        self.children = []
        for i, log in enumerate(self.logs):
            several = [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}", f"--process_id={i}"]
            place = ["--workdir", str(workdirs[i] if workdirs else self.workdir)]
            words = [*wrapper, *command, *place, *(several if processes > 1 else ())]
            with open(log, "a") as file:
                self.children.append(
                    subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )

    def log(self, process=0) -> str:
        """What this launch's process has said."""
        with open(self.logs[process]) as file:
            file.seek(self.begun[process])
            return file.read()

    def wait(self, *expected: int, timeout=900) -> "Launch":
        """Waits for all processes; their exit statuses must be `expected` (one: that of all)."""
        try:
            found = [child.wait(timeout) for child in self.children]
        finally:
            self.kill()
        wanted = list(expected) * (self.processes if len(expected) == 1 else 1)
        logs = "\n".join(f"--- process {i}\n{self.log(i)[-3000:]}" for i in range(self.processes))
        assert not expected or found == wanted, f"exit statuses {found}, expected {wanted}\n{logs}"
        return self

    def until(self, condition, timeout=900) -> bool:
        """Waits for a moment; False when the processes ended before it came."""
        deadline = time.monotonic() + timeout
        while not condition():
            if any(child.poll() is not None for child in self.children):
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"it did not come within {timeout} s\n{self.log()[-3000:]}")
            time.sleep(0.002)
        return True

    def signal(self, number, process=0) -> None:
        self.children[process].send_signal(number)

    def kill_child(self, process=0) -> None:
        """SIGKILL to what runs under a wrapper."""
        parent = self.children[process].pid
        (child,) = pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)

    def kill(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
                child.wait()

    def stopped_at(self) -> list[int]:
        """The step each process says it was stopped at."""
        return [int(re.findall(r"stopped at step (\d+)", self.log(i))[-1]) for i in range(self.processes)]

    def resumed_from(self) -> int | None:
        found = re.findall(r"resumed from step (\d+)", self.log())
        return int(found[-1]) if found else None


def diary(workdir, process=0) -> list[dict]:
    path = pathlib.Path(workdir).with_name(f"{pathlib.Path(workdir).name}.diary") / f"{process}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def batches(workdir, process=0, batch_size=16) -> dict[int, dict]:
    """{step: the last entry of it}: what a resumed run did again counts."""
    return {entry["ids"][0] // batch_size + 1: entry for entry in diary(workdir, process)}


def losses(workdir) -> np.ndarray:
    return np.array([row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row])


def state(workdir, step=None) -> tuple[dict[str, np.ndarray], dict]:
    """(all arrays of a checkpoint, what else is in it)."""
    reader = Checkpointer(workdir, read_only=True)
    step = reader.latest_step() if step is None else step
    return reader.load_arrays(step, ""), reader.read(step).extra


def assert_same_state(left, right) -> None:
    """Parameters, optimizer, averages, counters and data position, bit by bit."""
    (a, extra_a), (b, extra_b) = state(left), state(right)
    assert a.keys() == b.keys() and any(name.startswith("opt_state") for name in a)
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
    assert extra_a["position"] == extra_b["position"] and extra_a["order_spec"] == extra_b["order_spec"]
