"""Every stat, open, listing and read of a start, a restore, a first scan, a restart and a stream fails in turn.

Once: nothing of it is seen but lines in the log. For good: an error of the storage, which a supervisor tries again.
Never another step, another version of a dataset, a step set aside, or "there is no such dataset".
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.data.conftest import build as build_dataset
from tests.data.conftest import make_episodes
from tests.multiprocess import storage_faults
from tests.training.test_checkpoint import save, without_hashes


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return storage_faults.build(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with two steps."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, 1, 2)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset with an older version beside the one that is meant."""
    folder = tmp_path_factory.mktemp("data")
    new = build_dataset(folder, "toy_buttons", {"train": make_episodes(12)}, num_shards=2)
    new.rename(new.parent / "2.0.0")
    for name in ("dataset_info.json",):
        path = new.parent / "2.0.0" / name
        path.write_text(path.read_text().replace("1.0.0", "2.0.0"))
    build_dataset(folder, "toy_buttons", {"train": make_episodes(7, seed=1)})
    return folder


def faults_in(repository, library, folder, scenario, stride=1):
    done = subprocess.run(
        [sys.executable, "-m", "tests.multiprocess.storage_faults", library, str(folder), scenario, str(stride)],
        cwd=repository,
        env=os.environ | {"LD_PRELOAD": library, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *problems, last = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    listed = "\n".join(f"operation {p.get('operation')}, once {p.get('once')}: {p['problem']}" for p in problems[:3])
    assert not problems, f"{len(problems)} problems of {last}:\n{listed}"
    assert last["faults"]["once"] and last["faults"]["for good"], last
    return last


def test_a_restart_under_some_faults(repository, library, run):
    faults_in(repository, library, run, "restore", stride=7)


def test_data_under_some_faults(repository, library, data):
    faults_in(repository, library, data, "prepare", stride=11)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("scenario", ["start", "restore"])
@pytest.mark.parametrize("hashed", [True, False], ids=["hashed", "as in a bucket"])
def test_a_run_under_every_fault(repository, library, run, tmp_path, scenario, hashed):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    if not hashed:
        without_hashes(folder / "checkpoints" / "2")
    faults_in(repository, library, folder, scenario)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("scenario", ["prepare", "index", "stream"])
def test_data_under_every_fault(repository, library, data, tmp_path, scenario):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    faults_in(repository, library, folder, scenario)
