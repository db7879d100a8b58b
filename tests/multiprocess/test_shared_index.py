"""Hosts that start together read the files of datasets that have no index, each file once. Real processes and kills."""

import collections
import json
import signal
import subprocess
import sys

import pytest

from octo_like.data.prepare import prepare_datasets
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import specs_from_config
from tests.data.conftest import build, make_episodes
from tests.data.test_shared_pass import files_below

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]

HOST = """
import json, os, signal, sys, time
from octo_like.common.lanes import Processes
from octo_like.data.rlds import lock, scan, shared_pass
from octo_like.data.prepare import prepare_datasets
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import specs_from_config

fields, data_dir, cache, go, log, index, count, dies = json.loads(sys.argv[1])
shared_pass.PIECE_FILES, shared_pass.POLL_SECONDS, lock.PULSE_SECONDS = 1, 0.05, 0.2
scan_file = scan.scan_file

def noted(split, number, *rest):
    with open(log, "a") as file:
        file.write(f"{index} {split.name} {number}\\n")
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)  # so that the others have their turn, too
    return scan_file(split, number, *rest)

scan.scan_file = noted
print("ready", flush=True)
while not os.path.exists(go):
    time.sleep(0.01)
prepared = prepare_datasets(
    specs_from_config(fields), data_dir, cache, False, IndexOptions(workers=1, processes=1), Processes(index, count)
)
print(json.dumps({key: [one.train.hash, one.statistics["action"]["mean"].tolist()] for key, one in prepared.items()}))
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two datasets of six and two files, one with a validation split of two."""
    folder = tmp_path_factory.mktemp("pair")
    build(folder, "many", {"train": make_episodes(18, seed=5)}, num_shards=6)
    build(folder, "few", {"train": make_episodes(4, seed=6), "spare": make_episodes(2, seed=7)}, num_shards=2)
    fields = dict(proprio_keys=["joints"], action_key="control", language_key="task_text", val_fraction=0.2)
    return {"many": fields, "few": fields | {"val_split": "spare"}}, str(folder)


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """The caches as one process makes them, with one thread."""
    cache, (fields, data_dir) = tmp_path_factory.mktemp("alone"), pair
    prepare_datasets(specs_from_config(fields), data_dir, str(cache), False, IndexOptions(workers=1, processes=1))
    return files_below(cache)


@pytest.mark.parametrize("dies", [False, True], ids=["all live", "one is killed"])
def test_hosts_share_the_files(pair, alone, tmp_path, repository, dies):
    go, scans = tmp_path / "go", tmp_path / "scans"
    common = [*pair, str(tmp_path / "cache"), str(go), str(scans)]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, json.dumps([*common, i, 3, dies and i == 1])],
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    for host in hosts:
        assert host.stdout.readline() == "ready\n"
    go.touch()
    outputs = [host.communicate(timeout=240) for host in hosts]
    assert [host.returncode for host in hosts] == [0, -signal.SIGKILL if dies else 0, 0], outputs
    said = {out for i, (out, _) in enumerate(outputs) if not (dies and i == 1)}
    assert len(said) == 1 and len(json.loads(said.pop())) == 2
    read = [line.split() for line in scans.read_text().splitlines()]
    by_file = collections.Counter((name, number) for _, name, number in read)
    # Of each split: six files, two, and those of the validation split, which has two as well.
    assert len(by_file) == 8 and sum(by_file.values()) == 6 + 2 + 2 + dies
    assert len({host for host, _, _ in read}) == 3
    assert files_below(tmp_path / "cache") == alone
