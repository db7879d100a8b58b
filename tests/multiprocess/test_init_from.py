"""config.init_from is used when a run begins, and only then; in a bucket as well, whatever a killed start left."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from octo_like.common.schema import flatten
from octo_like.policy.policy import Policy
from octo_like.training import exits
from tests.multiprocess.launch import CONFIG, ROOT, state
from tests.training.test_checkpoint_storage import AS_IN_A_BUCKET

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]

TRAIN = (
    AS_IN_A_BUCKET
    + """
import os, signal, sys
from octo_like.training import attempt, checkpoint, resume
import train

kill, write, moment = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL), checkpoint.write_manifest, sys.argv.pop(1)
if moment == "before the manifest":
    checkpoint.write_manifest = kill
elif moment == "before the mark":
    checkpoint.write_manifest = lambda *a, **k: (write(*a, **k), kill())
elif moment == "gone in between":
    attempt.has_checkpoint = lambda workdir: True
elif moment == "unchecked":
    resume.check_resume = lambda old, new: []
attempt.command(train.main)
"""
)


def train(workdir, *flags, moment="never"):
    command = [
        sys.executable,
        "-c",
        TRAIN,
        moment,
        "--config",
        f"{CONFIG}:synthetic,smallest",
        "--workdir",
        str(workdir),
    ]
    # The learning rate of the only step is 0: what is exported is what the run began with.
    command += ["--config.num_steps=1", "--config.optimizer.warmup_steps=1", "--config.eval.every=None"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command += ["--config.checkpoint.export=raw", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run whose parameters another one begins with."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    done = train(workdir, "--config.seed=7")
    assert done.returncode == 0 and "starts at step 0; parameters: new ones (seed 7)" in done.stderr, done.stderr
    return workdir


def assert_begins_with(workdir, first):
    arrays = state(first)[0]
    for path, leaf in flatten(Policy.load_pretrained(workdir / "export").params):
        np.testing.assert_array_equal(leaf, arrays[f"ema/{path}"], path)


@pytest.mark.parametrize("moment", ["before the manifest", "before the mark"])
def test_a_start_that_was_killed_in_its_first_save(first, tmp_path, moment):
    begin, workdir = f"--config.init_from={first}", tmp_path / "run"
    killed = train(workdir, begin, moment=moment)
    assert killed.returncode == -signal.SIGKILL and (workdir / "checkpoints" / "1").is_dir(), killed.stderr
    again = train(workdir, begin)
    assert again.returncode == 0, again.stderr
    loaded = f"loaded from {first}"
    if moment == "before the manifest":
        assert f"starts at step 0; parameters: {loaded}" in again.stderr
    else:
        assert f"resumed from step 1; parameters at step 0: {loaded}" in again.stderr
    assert_begins_with(workdir, first)
    assert state(workdir)[1]["began"] == {"loaded_from": str(first), "init_from": str(first)}


def test_doubt_is_refused(first, tmp_path):
    begin, workdir = f"--config.init_from={first}", tmp_path / "run"
    gone = train(workdir, begin, moment="gone in between")
    assert gone.returncode == exits.ERROR and "in doubt" in gone.stderr and "was not loaded" in gone.stderr, gone.stderr
    assert "Traceback" not in gone.stderr and not (workdir / "export").exists()
    # A run that began with new parameters does not become one that began with others.
    assert train(workdir).returncode == 0
    other = train(workdir, begin, moment="unchecked")
    assert other.returncode == exits.ERROR and "began with new parameters" in other.stderr, other.stderr
