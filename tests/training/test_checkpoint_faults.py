"""A storage that fails for a moment, or for long: nothing is set aside for it. Real errors of real system calls.

The faults are made below Python and Orbax alike, by a library between the process and libc. It is compiled here;
without a C compiler those tests are skipped, and what remains are faults of Python's own reads.
"""

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from octo_like.common import storage
from octo_like.common.storage import StorageError
from octo_like.training import checkpoint, integrity
from octo_like.training import storage as training_storage
from octo_like.training.storage import settled
from tests.training.test_checkpoint import abstract, assert_same, data_files, flip, make_state, save, without_hashes

FAULTS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Opening a file for reading whose path contains $FAULT_PATH fails with $FAULT_ERRNO, so often as $FAULT_COUNT says. */
static int failed = 0;
static int faulty(const char *path, int flags) {
  const char *part = getenv("FAULT_PATH"), *count = getenv("FAULT_COUNT"), *code = getenv("FAULT_ERRNO");
  if (!part || !count || !code || !path || (flags & O_ACCMODE) != O_RDONLY || (flags & O_DIRECTORY)) return 0;
  if (!strstr(path, part) || __sync_fetch_and_add(&failed, 1) >= atoi(count)) return 0;
  errno = atoi(code);
  return 1;
}
#define MODE va_list l; va_start(l, flags); int mode = (flags & O_CREAT) ? va_arg(l, int) : 0; va_end(l);
int open(const char *path, int flags, ...) {
  MODE if (faulty(path, flags)) return -1;
  return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open"))(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE if (faulty(path, flags)) return -1;
  return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64"))(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
  MODE if (faulty(path, flags)) return -1;
  return ((int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat"))(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
  MODE if (faulty(path, flags)) return -1;
  return ((int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64"))(at, path, flags, mode);
}
int faults_so_far(void) { return failed; }
"""

RESTORE = """
import ctypes, json, logging, os, sys
from octo_like.common import storage
from octo_like.training import checkpoint
from tests.training.test_checkpoint import abstract, assert_same, make_state

workdir, library, fault, hashed = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
logging.basicConfig(level=logging.WARNING)
storage.PAUSES = (0.0,) * len(storage.PAUSES)
with checkpoint.Checkpointer(workdir) as saver:
    wanted = abstract(make_state(0))
    os.environ.update(fault)
    try:
        restored, extra = saver.restore(None, wanted)
    except checkpoint.CheckpointError as error:
        print(type(error).__name__, error)
    else:
        assert_same(restored, make_state(extra["position"] // 32))
        print("restored", extra["position"] // 32)
    for name in fault:
        del os.environ[name]
    print("steps", saver.all_steps(), "faults", ctypes.CDLL(library).faults_so_far())
"""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0,) * len(storage.PAUSES))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux to put faults below the file system's calls")
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.c").write_text(FAULTS)
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / "faults.so"), str(folder / "faults.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return str(folder / "faults.so")


def restore_with(repository, library, workdir, part, count, code, hashed):
    fault = {"FAULT_PATH": part, "FAULT_COUNT": str(count), "FAULT_ERRNO": str(code)}
    environment = os.environ | {"LD_PRELOAD": library, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", RESTORE, str(workdir), library, json.dumps(fault), json.dumps(hashed)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said, facts = done.stdout.splitlines()
    return said, facts, done.stderr


@pytest.mark.parametrize(
    "code,hashed", [(errno.EIO, True), (errno.ESTALE, False)], ids=["EIO-hashed", "ESTALE-checksums only"]
)
@pytest.mark.parametrize("count", [1, 1000], ids=["once", "for good"])
def test_an_error_of_the_storage_sets_no_step_aside(tmp_path, repository, library, code, count, hashed):
    """Below Orbax: the data files of the newest step fail to open, once or for as long as anybody tries."""
    save(tmp_path, 1, 2)
    if not hashed:
        without_hashes(tmp_path / "checkpoints" / "2")
    # Without hashes the first to read it is TensorStore.
    part = "/checkpoints/2/state/"
    said, facts, log = restore_with(repository, library, tmp_path, part, count, code, hashed)
    assert facts.startswith("steps [1, 2] faults ") and int(facts.split()[-1]) >= 1, facts
    assert not (tmp_path / "checkpoints" / "damaged").exists()
    if count == 1:
        assert said == "restored 2" and "looking again in" in log
    else:
        assert said.startswith("CheckpointUnreadable") and "/checkpoints/2" in said
    # Nothing was wrong with it.
    with checkpoint.Checkpointer(tmp_path) as saver:
        assert_same(saver.restore(None, abstract(make_state(0)))[0], make_state(2))


class Storage:
    """Faults of Python's own reads: the manifest and the hashing of files."""

    def __init__(self, monkeypatch, part, error, times):
        self.part, self.error, self.left, self.met = part, error, times, 0
        self._hash, self._read = integrity._hash_file, integrity._read_manifest
        monkeypatch.setattr(integrity, "_hash_file", self.hash_file)
        monkeypatch.setattr(integrity, "_read_manifest", self.read_manifest)

    def meet(self, path):
        if self.part in str(path) and self.left:
            self.left, self.met = self.left - 1, self.met + 1
            raise self.error

    def hash_file(self, path):
        self.meet(path)
        return self._hash(path)

    def read_manifest(self, folder):
        self.meet(folder / "manifest.json")
        return self._read(folder)


class UnavailableError(Exception):
    """As TensorFlow's, of a bucket."""


ERRORS = [OSError(errno.EIO, "EIO"), OSError(errno.ESTALE, "ESTALE"), TimeoutError(), PermissionError(13, "EACCES")]


@pytest.mark.parametrize("error", [*ERRORS, UnavailableError("503")], ids=lambda e: type(e).__name__ + str(e.args[:1]))
@pytest.mark.parametrize("part", ["2/manifest.json", "2/state/manifest.ocdbt"])
def test_reads_are_tried_again_and_then_it_is_an_error(tmp_path, monkeypatch, error, part):
    if isinstance(error, UnavailableError) and "state" in part:
        pytest.skip("files in buckets are not hashed")
    save(tmp_path, 1, 2)
    looks = storage.DENIED_LOOKS - 1 if isinstance(error, PermissionError) else len(storage.PAUSES)
    faults = Storage(monkeypatch, part, error, looks)
    with checkpoint.Checkpointer(tmp_path) as saver:
        assert_same(saver.restore(None, abstract(make_state(0)))[0], make_state(2))
        assert faults.met == looks
        faults.left = 100
        with pytest.raises(checkpoint.CheckpointUnreadable, match="checkpoints/2"):
            saver.restore(None, abstract(make_state(0)))
        with pytest.raises(checkpoint.CheckpointUnreadable, match="checkpoints/2"):
            saver.verify(2)
        assert saver.all_steps() == [1, 2] and not (tmp_path / "checkpoints" / "damaged").exists()
        faults.left = 0
        assert saver.verify(2) == []


def test_the_pauses_grow(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(storage, "PAUSES", (0.5, 2.0, 8.0))

    def look():
        raise OSError(errno.EIO, "EIO")

    with pytest.raises(checkpoint.CheckpointUnreadable, match="there cannot be read: OSError"):
        settled(look, "there")
    assert slept == [0.5, 2.0, 8.0]


def test_a_mismatch_that_is_seen_once_proves_nothing(tmp_path, monkeypatch):
    """A cache that is behind: the first look at a file finds it short."""
    save(tmp_path, 1, 2)
    hashes, seen = integrity._hash_file, []

    def short_once(path):
        found = hashes(path)
        if path.name == "manifest.ocdbt" and not seen:
            seen.append(path)
            return {**found, "bytes": 0}
        return found

    monkeypatch.setattr(integrity, "_hash_file", short_once)
    with checkpoint.Checkpointer(tmp_path) as saver:
        assert_same(saver.restore(None, abstract(make_state(0)))[0], make_state(2))
        assert seen and saver.all_steps() == [1, 2]


@pytest.mark.parametrize("what", ["manifest.json", "state/manifest.ocdbt"])
def test_a_directory_in_place_of_a_file_is_damage(tmp_path, what, caplog):
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "2" / what
    path.unlink()
    path.mkdir()
    with checkpoint.Checkpointer(tmp_path) as saver:
        (problem,) = saver.verify(2)
        assert what in problem and "is a directory" in problem
        assert_same(saver.restore(None, abstract(make_state(0)))[0], make_state(1))
        assert saver.all_steps() == [1]
    assert (tmp_path / "checkpoints" / "damaged" / "2").is_dir()


def test_a_folder_with_the_name_of_another_step_is_damage(tmp_path):
    """Step 1 copied to 7: sound in itself, but not what was saved at step 7."""
    save(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "7")
    with checkpoint.Checkpointer(tmp_path) as saver:
        (problem,) = saver.verify(7)
        assert "is that of step 1" in problem
        restored, extra = saver.restore(None, abstract(make_state(0)))
        assert extra == {"position": 64} and saver.all_steps() == [1, 2]
        assert_same(restored, make_state(2))


def test_the_best_step_outlives_a_storage_that_does_not_answer(tmp_path, monkeypatch, caplog):
    """Retention reads the metrics of old steps: those that it cannot read are kept."""
    with checkpoint.Checkpointer(tmp_path, keep_last=1, keep_best=1) as saver:
        for step, metric in ((1, 0.1), (2, 0.5), (3, 0.4)):
            saver.save(step, make_state(step), metric=metric)
        saver.wait()
        assert saver.all_steps() == [1, 3]
    faults = Storage(monkeypatch, "1/manifest.json", OSError(errno.EIO, "EIO"), 100)
    with checkpoint.Checkpointer(tmp_path, keep_last=1, keep_best=1) as saver:
        saver.save(4, make_state(4), metric=0.3)
        saver.wait()
        assert faults.met and saver.all_steps() == [1, 3, 4] and "no old checkpoint is deleted" in caplog.text
        faults.left = 0
        saver.save(5, make_state(5), metric=0.2)
        saver.wait()
        assert saver.all_steps() == [1, 5]


def test_verify_says_that_it_could_not_read(tmp_path, repository, monkeypatch, capsys):
    save(tmp_path, 1, 2)
    Storage(monkeypatch, "2/state/", OSError(errno.EIO, "EIO"), 1000)
    monkeypatch.setattr(sys, "argv", ["verify_checkpoint.py", str(tmp_path), "--all"])
    status = runpy.run_path(str(repository / "scripts" / "verify_checkpoint.py"))["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert status == 1 and lines[0].startswith("step 1: good") and "step 2: CANNOT BE READ" in lines[1]
    assert "DAMAGED" not in "".join(lines)


def test_what_is_wrong_stays_wrong(tmp_path):
    """The other direction: real damage is found at once and named, with no wait for a storage."""
    save(tmp_path, 1, 2)
    flip(data_files(tmp_path / "checkpoints" / "2" / "state")[0], 20)
    with checkpoint.Checkpointer(tmp_path) as saver:
        assert_same(saver.restore(None, abstract(make_state(0)))[0], make_state(1))
        assert saver.all_steps() == [1]


@pytest.mark.parametrize("times", [1, 2, 3, 1000])
def test_a_failing_look_at_the_newest_step_does_not_hide_it(tmp_path, monkeypatch, times):
    save(tmp_path, 1, 2)
    real, left = os.stat, [times]

    def stat(path, *arguments, **named):
        if os.fspath(path).endswith("/checkpoints/2") and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "I/O error")
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", stat)
    if times < 1000:
        assert checkpoint.has_checkpoint(tmp_path)
        left[0] = times
        with checkpoint.Checkpointer(tmp_path) as saver:
            assert not left[0]
            assert_same(saver.restore(None, abstract(make_state(0)))[0], make_state(2))
    else:
        with pytest.raises(storage.StorageError, match="checkpoints/2"):
            checkpoint.has_checkpoint(tmp_path)
        with pytest.raises(storage.StorageError, match="checkpoints/2"):
            checkpoint.Checkpointer(tmp_path)


@pytest.mark.parametrize("after", [False, True])
def test_a_step_is_set_aside_although_a_rename_fails(tmp_path, monkeypatch, after):
    monkeypatch.setattr(checkpoint.storage.storage, "PAUSES", (0.0,) * 3)
    save(tmp_path, 1, 2)
    flip(tmp_path / "checkpoints" / "2" / "state" / "manifest.ocdbt", 40)
    kind = type(checkpoint.storage.absolute(tmp_path))
    real, errors = kind.rename, [OSError(errno.EIO, "I/O error")]

    def rename(self, target):
        if errors and after:
            real(self, target)
        if errors:
            raise errors.pop()
        return real(self, target)

    monkeypatch.setattr(kind, "rename", rename)
    with checkpoint.Checkpointer(tmp_path) as saver:
        assert_same(saver.restore(None, abstract(make_state(0)))[0], make_state(1))
        assert saver.all_steps() == [1] and not errors
    assert (tmp_path / "checkpoints" / "damaged" / "2").is_dir()


@pytest.mark.parametrize(
    "error,others",
    [
        (KeyError("body"), RuntimeError),
        (OSError(errno.ENOSPC, "full"), RuntimeError),
        (StorageError("x"), checkpoint.CheckpointUnreadable),
        (checkpoint.CheckpointDamaged("x"), checkpoint.CheckpointDamaged),
    ],
)
def test_an_error_of_the_first_process_is_one_of_all(monkeypatch, error, others):
    """The values that process 0 sends are what process 1 receives."""
    sent = []

    def read():
        raise error

    monkeypatch.setattr(training_storage.jax, "process_count", lambda: 2)
    for process, kind in ((0, type(error) if others is RuntimeError else others), (1, others)):
        monkeypatch.setattr(training_storage.jax, "process_index", lambda process=process: process)
        send = (lambda x: sent.append(x) or x) if process == 0 else (lambda x: sent.pop(0))
        monkeypatch.setattr(training_storage.multihost_utils, "broadcast_one_to_all", send)
        with pytest.raises(kind):
            training_storage.of_first(read)
    assert not sent


def test_all_processes_give_up_at_the_same_look(monkeypatch):
    monkeypatch.setattr(training_storage.jax, "process_count", lambda: 2)
    problem = checkpoint.CheckpointUnreadable("x")
    problem.__cause__ = KeyError("y")
    kinds = []
    monkeypatch.setattr(
        training_storage.multihost_utils, "process_allgather", lambda x: kinds.append(x) or np.array(kinds)
    )
    assert training_storage.agree(problem) is problem
    monkeypatch.setattr(training_storage.storage, "PAUSES", (0.0,) * 9)
    looks = []
    with pytest.raises(checkpoint.CheckpointUnreadable, match="process 0 cannot read it"):
        training_storage.settled(lambda: looks.append(1), "x", training_storage.agree)
    assert len(looks) == training_storage.storage.DENIED_LOOKS


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    without_hashes(tmp_path / "checkpoints" / "2")

    def restore(self, *arguments, **named):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", restore)
    with checkpoint.Checkpointer(tmp_path) as saver, pytest.raises(checkpoint.CheckpointUnreadable, match="memory"):
        saver.restore(None, abstract(make_state(0)))
    assert not (tmp_path / "checkpoints" / "damaged").exists()


def test_a_status_that_is_hidden_in_a_cause_is_no_damage(tmp_path, monkeypatch):
    """Files in buckets are not hashed: what Orbax raises is all there is to go by."""
    save(tmp_path, 1, 2)
    without_hashes(tmp_path / "checkpoints" / "2")
    real, left = checkpoint.ocp.PyTreeCheckpointHandler.restore, [3]

    def restore(self, *arguments, **named):
        if left[0]:
            left[0] -= 1
            try:
                raise ValueError("UNAVAILABLE: Error reading gs://bucket/run: 503")
            except ValueError as error:
                raise ValueError("cannot restore params/head") from error
        return real(self, *arguments, **named)

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", restore)
    with checkpoint.Checkpointer(tmp_path) as saver:
        assert_same(saver.restore(None, abstract(make_state(0)))[0], make_state(2))
        assert not left[0] and saver.all_steps() == [1, 2]
        left[0] = 1000
        with pytest.raises(checkpoint.CheckpointUnreadable, match="checkpoints/2"):
            saver.restore(None, abstract(make_state(0)))
    assert not (tmp_path / "checkpoints" / "damaged").exists()
