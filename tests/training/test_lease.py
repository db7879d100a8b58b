"""The lease on a workdir: real files, real processes that are killed and stopped, and claimants on other machines."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils.epath import gpath
from fsspec.implementations import memory

from octo_like.common import storage
from octo_like.common.errors import ConfigError
from octo_like.common.storage import StorageError
from octo_like.training import exits, lease
from octo_like.training import lease as lease_module
from octo_like.training.attempt import status_of
from octo_like.training.lease import Lease, WorkdirInUse

QUICK = dict(stale=1.0, pulse=0.1)

HOLDER = """
import sys, time
from octo_like.training.lease import Lease
told = lambda message: print("lost:", message, flush=True)
Lease(sys.argv[1], stale=float(sys.argv[2]), pulse=0.1, on_lost=told).take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(repository, tmp_path):
    """Starts a process that holds the lease of a workdir."""
    children = []

    def start(workdir, stale=1.0):
        command = [sys.executable, "-c", HOLDER, str(workdir), str(stale)]
        child = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()


@pytest.fixture
def elsewhere(monkeypatch):
    """Lets this process look as if it were on another machine than the holders: it cannot see their processes."""
    monkeypatch.setattr(lease, "_machine", lambda: "another boot pid:[1]")


def files(workdir):
    return sorted(path.name for path in (workdir / "lease").iterdir())


def test_a_second_training_is_refused_by_name(tmp_path, holder):
    child = holder(tmp_path)
    with pytest.raises(WorkdirInUse) as refused:
        Lease(tmp_path, **QUICK).take()
    assert f"process {child.pid} on host {os.uname().nodename}" in str(refused.value)
    assert str(tmp_path) in str(refused.value) and "another --workdir" in str(refused.value)
    assert len(files(tmp_path)) == 1  # the holder's


def test_one_on_another_machine_is_refused_at_its_next_sign_of_life(tmp_path, holder, elsewhere):
    child = holder(tmp_path)
    with pytest.raises(WorkdirInUse, match=f"process {child.pid} on host"):
        Lease(tmp_path, stale=600, pulse=0.1).take()


def test_a_killed_holder_of_this_machine_is_followed_at_once(tmp_path, holder):
    child = holder(tmp_path)
    child.kill()
    child.wait()
    mine = Lease(tmp_path, stale=600, pulse=0.1)  # it does not wait for silence
    mine.take()
    assert files(tmp_path) == [f"{mine.id}.json"]
    mine.release()
    assert not (tmp_path / "lease").exists() and tmp_path.exists()


def test_a_killed_holder_of_another_machine_is_followed_when_it_is_stale(tmp_path, holder, elsewhere):
    child = holder(tmp_path)
    child.kill()
    child.wait()
    begin, mine = time.monotonic(), Lease(tmp_path, **QUICK)
    mine.take()
    assert time.monotonic() - begin >= QUICK["stale"]
    assert files(tmp_path) == [f"{mine.id}.json"]
    mine.release()


def test_a_holder_that_slept_too_long_finds_out(tmp_path, holder, elsewhere):
    """SIGSTOP: alive, and silent. After it was overtaken it must not write again."""
    child = holder(tmp_path)
    child.send_signal(signal.SIGSTOP)
    mine = Lease(tmp_path, **QUICK)
    mine.take()
    child.send_signal(signal.SIGCONT)
    assert "lost: " in child.stdout.readline()
    mine.check()
    mine.release()


def test_what_is_lost_is_known_before_a_write(tmp_path):
    first, second = Lease(tmp_path, stale=600, pulse=600), Lease(tmp_path, stale=600, pulse=600)
    first.take()
    first.check()
    second._fields.update(held=True, overtaken=[first.id])
    second._write()
    with pytest.raises(WorkdirInUse, match=r"lost the workdir after a long silence.* process \d+ on host"):
        first.check()
    second._remove(second.path)
    first.path.unlink()
    with pytest.raises(WorkdirInUse, match="was removed"):
        first.check()
    first.release()


def test_of_many_that_come_together_one_gets_it(tmp_path, elsewhere):
    """Claimants in threads, each as if on a machine of its own; whoever is refused is refused by name."""
    for _ in range(5):
        leases, outcome = [Lease(tmp_path / "run", stale=30, pulse=0.05) for _ in range(6)], {}
        gate = threading.Barrier(len(leases))
        for number, one in enumerate(leases):
            one._fields["machine"] = f"machine {number}"

        def claim(one, gate=gate, outcome=outcome):
            gate.wait()
            try:
                one.take()
                outcome[one.id] = True
            except WorkdirInUse:
                outcome[one.id] = False

        threads = [threading.Thread(target=claim, args=(one,)) for one in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sum(outcome.values()) == 1 and len(outcome) == len(leases)
        for one in leases:
            if outcome[one.id]:
                assert files(tmp_path / "run") == [f"{one.id}.json"]
                one.release()


def test_a_file_cut_short_is_nobodys_once_it_is_stale(tmp_path):
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "0123.json").write_bytes(b'{"held": tr\xff')
    begin, mine = time.monotonic(), Lease(tmp_path, **QUICK)
    mine.take()
    assert time.monotonic() - begin >= QUICK["stale"] and files(tmp_path) == [f"{mine.id}.json"]
    mine.release()


def test_numbers_of_processes_are_used_again(tmp_path):
    """A process with the holder's number that began at another time is not the holder."""
    old = Lease(tmp_path)
    old._fields.update(held=True, started="1")
    old._write()
    mine = Lease(tmp_path, stale=600, pulse=0.1)
    mine.take()
    fields = json.loads(mine.path.read_text())
    assert fields["overtaken"] == [old.id] and fields["pid"] == os.getpid() and fields["held"] is True
    mine.release()


class Bucket(memory.MemoryFileSystem):
    """Objects without folders, under gs://, whose listings are remembered as gcsfs remembers them."""

    protocol, store, pseudo_dirs, listings = ("gs", "gcs"), {}, [""], {}

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + os.fspath(path).removeprefix("gs://").strip("/")

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        if path not in self.listings:
            self.listings[path] = super().ls(path, detail=True)
        return self.listings[path] if detail else [entry["name"] for entry in self.listings[path]]

    def invalidate_cache(self, path=None):
        self.listings.clear()


def test_in_a_bucket(monkeypatch, elsewhere):
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(gpath.backend_lib.fsspec_backend, "fs", lambda path: bucket)
    bucket = Bucket(skip_instance_cache=True)
    first = Lease("gs://bucket/run", **QUICK)
    first._fields["machine"] = "of its own"
    first.take()
    assert first.path.exists() and len(first._listed()) == 1
    with pytest.raises(WorkdirInUse, match="gs://bucket/run is in use: process"):
        Lease("gs://bucket/run", stale=600, pulse=0.1).take()
    first.check()
    first._over.set()  # as if killed: no more signs of life
    first._thread.join()
    second = Lease("gs://bucket/run", **QUICK)
    second.take()
    with pytest.raises(WorkdirInUse, match="lost the workdir"):
        first.check()
    second.check()
    second.release()
    assert not bucket.find("/bucket")


def test_storage_that_does_not_answer_is_no_loss(tmp_path, monkeypatch, caplog):
    mine = Lease(tmp_path, stale=600, pulse=600)
    mine.take()

    def unavailable():
        raise OSError(503, "Service Unavailable")

    monkeypatch.setattr(mine, "_others", unavailable)
    mine.check()
    assert "Service Unavailable" in caplog.text
    monkeypatch.undo()
    mine.release()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_workdir_that_may_not_be_written_is_a_mistake_in_one_line(tmp_path, monkeypatch, code):
    def refuse(path, text):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(lease_module, "write_whole", refuse)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be written: .*{os.strerror(code)}") as found:
        Lease(tmp_path).take()
    assert "\n" not in str(found.value) and status_of(found.value, begun=False) == exits.USAGE


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="run is a file, expected a directory"):
        Lease(tmp_path / "run").take()


def test_a_workdir_whose_storage_does_not_answer_is_no_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0,) * 3)
    real, left = os.stat, [2]

    def stat(path, *arguments, **named):
        if str(path) == str(tmp_path) and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "I/O error")
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", stat)
    mine = Lease(tmp_path)
    mine.take()
    mine.release()
    left[0] = 99
    with pytest.raises(StorageError, match="the storage does not answer") as found:
        Lease(tmp_path).take()
    assert status_of(found.value, begun=False) == exits.ERROR
    left[0] = 0
