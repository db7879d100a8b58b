"""Ctrl-C: one line and status 130; from the first step on with the state saved, at once the second time."""

import ast
import os
import re
import signal
import subprocess
import sys

import pytest

from octo_like.commands import COMMANDS
from octo_like.training import exits
from octo_like.training.checkpoint import has_checkpoint
from tests.conftest import REPOSITORY

RUN = ("train.py", "--config", "tests/training/tiny_config.py:synthetic,smallest", "--config.checkpoint.every=100000")


def start(*command):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )


def read_until(process, words):
    said = b""
    while not re.search(words, said):
        assert (more := os.read(process.stderr.fileno(), 4096)), said.decode()
        said += more
    return said.decode()


def ended(process):
    rest = process.stderr.read().decode()
    process.stderr.close()
    return process.wait(60), rest


def test_a_run_is_saved_and_goes_on(tmp_path):
    process = start(*RUN, "--workdir", str(tmp_path / "run"), "--config.num_steps=100000")
    read_until(process, rb"step \d+/100000")
    process.send_signal(signal.SIGINT)
    status, said = ended(process)
    assert status == exits.INTERRUPTED == 130 and "Traceback" not in said
    assert "interrupted: saves and stops (Ctrl-C again: at once)" in said
    (step,) = re.findall(r"stopped at step (\d+) as asked; run the same command to continue", said)
    assert (tmp_path / "run" / "checkpoints" / step / "manifest.json").exists()
    process = start(*RUN, "--workdir", str(tmp_path / "run"), "--config.num_steps=100000")
    assert f"resumed from step {step}" in read_until(process, rb"resumed from step \d+;")
    process.kill()
    ended(process)


def test_the_second_ends_at_once(tmp_path):
    hangs = (
        "import train, octo_like.training.saver as s, threading; s.Saver.save = lambda *a: threading.Event().wait(); "
    )
    process = start("-c", f"{hangs}train.command(train.main)", *RUN[1:], "--workdir", str(tmp_path / "run"),
                    "--config.num_steps=100000")  # fmt: skip
    read_until(process, rb"step \d+/100000")
    process.send_signal(signal.SIGINT)
    read_until(process, rb"interrupted: saves and stops")
    process.send_signal(signal.SIGINT)
    status, said = ended(process)
    assert status == 130 and "Traceback" not in said and "interrupted again" in said
    assert not has_checkpoint(tmp_path / "run") and not (tmp_path / "run" / "lease").exists()


def test_after_the_last_step_the_run_is_finished(tmp_path):
    waits = (
        "import sys, time, train, octo_like.training.evaluator as e\n"
        "def evaluate(self, step, state):\n"
        "    print('evaluates', file=sys.stderr)\n"
        "    while not self.run.attempt.interrupted: time.sleep(0.01)\n"
        "    return {}\n"
        "e.Evaluator.__call__ = evaluate\n"
        "train.command(train.main)"
    )
    process = start("-c", waits, *RUN[1:], "--workdir", str(tmp_path / "run"), "--config.num_steps=1")
    read_until(process, rb"evaluates")
    process.send_signal(signal.SIGINT)
    status, said = ended(process)
    assert status == 0 and (tmp_path / "run" / "export").exists(), said
    assert "interrupted after the last step: finishes the last evaluation" in said and "saves and stops" not in said


def test_while_the_first_step_is_compiled(tmp_path):
    """The main thread looks at no signal then."""
    process = start(*RUN, "--workdir", str(tmp_path / "run"))
    read_until(process, rb"compiling")
    process.send_signal(signal.SIGINT)
    status, said = ended(process)
    assert status == 130 and said.count("interrupted") == 1 and "Traceback" not in said
    assert not (tmp_path / "run" / "lease").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("train.py", *RUN[1:], "--workdir", "runs/never"),
        ("finetune.py", "--config.pretrained=/nowhere", "--workdir", "runs/never"),
        ("scripts/check_policy.py", "--help"),
        ("-m", "octo_like", "probe_policy", "--help"),
    ],
)
def test_during_the_imports(command):
    process = start("-X", "importtime", *command)
    read_until(process, rb"octo_like\.common\.interrupts")
    process.send_signal(signal.SIGINT)
    status, said = ended(process)
    lines = [line for line in said.splitlines() if line and not line.startswith("import time:")]
    assert status == 130 and len(lines) == 1 and lines[0].endswith(": interrupted"), lines


def test_every_command_begins_with_it():
    """Before anything is imported that takes time."""
    files = {REPOSITORY / file for file in COMMANDS.values()}
    for folder, pattern in (("scripts", "*.py"), ("data", "*/build.py")):
        files |= {file for file in (REPOSITORY / folder).glob(pattern) if '__name__ == "__main__"' in file.read_text()}
    for file in files | {REPOSITORY / "octo_like" / "commands.py"}:
        imports = [
            node.names[0].name if isinstance(node, ast.Import) else node.module
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        before = imports[: imports.index("octo_like.common.interrupts")]
        assert {name.partition(".")[0] for name in before} <= set(sys.stdlib_module_names), (file, before)


def test_ctrl_c_that_a_finaliser_cannot_raise_comes_again():
    """Python ignores what finalisers and callbacks raise, as libraries have them while they are imported."""
    code = (
        "import octo_like.common.interrupts, os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "class Last:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        for _ in range(1000): pass\n"
        "Last()\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
