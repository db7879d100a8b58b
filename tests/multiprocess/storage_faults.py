"""Faults below Python, TensorFlow and Orbax alike: a library between a process and libc, and what is done under it.

    python -m tests.multiprocess.storage_faults LIBRARY FOLDER SCENARIO STRIDE

does the work of a scenario once undisturbed, counting every stat, open, listing and read below its folder, then again
and again while one of them after the other fails: once, and for good. Prints a line of JSON for each that went wrong,
and one at the end with the counts.
"""

import ctypes
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* Of the operations that read below `root`, those numbered first to first + count - 1 fail with `code`. */
static char root[4096];
static int armed = 0, code = 0, met = 0, made = 0;
static long first = 0, count = 0;
static char below[65536]; /* file descriptors of files below the root */

void arm(const char *path, long from, long times, int error) {
  strncpy(root, path, sizeof root - 1);
  first = from, count = times, code = error, met = 0, made = 0;
  __sync_synchronize();
  armed = 1;
}
void disarm(int *counts) { armed = 0, counts[0] = met, counts[1] = made; }

static int fails(void) {
  long number = __sync_fetch_and_add(&met, 1);
  if (number < first || number - first >= count) return 0;
  __sync_fetch_and_add(&made, 1);
  errno = code;
  return 1;
}
static int inside(const char *path) { return armed && path && !strncmp(path, root, strlen(root)); }
static void note(int fd, const char *path) {
  if (fd >= 0 && fd < (int)sizeof below) below[fd] = inside(path);
}
static int known(int fd) { return armed && fd >= 0 && fd < (int)sizeof below && below[fd]; }

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define STAT(name, kind) \
  int name(const char *path, struct kind *out) { \
    if (inside(path) && fails()) return -1; \
    return REAL(int, name, const char *, struct kind *)(path, out); \
  }
STAT(stat, stat) STAT(stat64, stat64) STAT(lstat, stat) STAT(lstat64, stat64)
#define STATAT(name, kind) \
  int name(int at, const char *path, struct kind *out, int flags) { \
    if (inside(path) && fails()) return -1; \
    return REAL(int, name, int, const char *, struct kind *, int)(at, path, out, flags); \
  }
STATAT(fstatat, stat) STATAT(fstatat64, stat64)
int statx(int at, const char *path, int flags, unsigned mask, struct statx *out) {
  if (inside(path) && fails()) return -1;
  return REAL(int, statx, int, const char *, int, unsigned, struct statx *)(at, path, flags, mask, out);
}
int access(const char *path, int mode) {
  if (inside(path) && fails()) return -1;
  return REAL(int, access, const char *, int)(path, mode);
}
DIR *opendir(const char *path) {
  if (inside(path) && fails()) return NULL;
  return REAL(DIR *, opendir, const char *)(path);
}
#define READS(flags) (((flags) & O_ACCMODE) == O_RDONLY && !((flags) & (O_DIRECTORY | O_PATH)))
#define MODE va_list l; va_start(l, flags); int mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(l, int) : 0; va_end(l);
#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    MODE if (inside(path) && READS(flags) && fails()) return -1; \
    int fd = REAL(int, name, const char *, int, ...)(path, flags, mode); \
    note(fd, path); \
    return fd; \
  }
OPEN(open) OPEN(open64)
#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    MODE if (inside(path) && READS(flags) && fails()) return -1; \
    int fd = REAL(int, name, int, const char *, int, ...)(at, path, flags, mode); \
    note(fd, path); \
    return fd; \
  }
OPENAT(openat) OPENAT(openat64)
#define FOPEN(name) \
  FILE *name(const char *path, const char *mode) { \
    if (inside(path) && mode[0] == 'r' && fails()) return NULL; \
    return REAL(FILE *, name, const char *, const char *)(path, mode); \
  }
FOPEN(fopen) FOPEN(fopen64)
ssize_t read(int fd, void *out, size_t size) {
  if (known(fd) && fails()) return -1;
  return REAL(ssize_t, read, int, void *, size_t)(fd, out, size);
}
ssize_t pread(int fd, void *out, size_t size, off_t at) {
  if (known(fd) && fails()) return -1;
  return REAL(ssize_t, pread, int, void *, size_t, off_t)(fd, out, size, at);
}
ssize_t pread64(int fd, void *out, size_t size, off64_t at) {
  if (known(fd) && fails()) return -1;
  return REAL(ssize_t, pread64, int, void *, size_t, off64_t)(fd, out, size, at);
}
ssize_t readv(int fd, const struct iovec *out, int parts) {
  if (known(fd) && fails()) return -1;
  return REAL(ssize_t, readv, int, const struct iovec *, int)(fd, out, parts);
}
int close(int fd) {
  if (fd >= 0 && fd < (int)sizeof below) below[fd] = 0;
  return REAL(int, close, int)(fd);
}
"""


def build(folder: pathlib.Path) -> str:
    """The library, compiled; skips the test where that is not possible."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux to put faults below the file system's calls")
    (folder / "faults.c").write_text(SOURCE)
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / "faults.so"), str(folder / "faults.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return str(folder / "faults.so")


class Injector:
    """Makes operations below a folder fail, in this process, which was started with the library."""

    def __init__(self, library: str, folder: str):
        self._library, self._folder = ctypes.CDLL(library), folder.encode()

    def run(self, act: Callable[[], object], first: int, times: int, code: int = errno.EIO):
        """(result or error, operations met, faults made) of `act` while those from number `first` on fail."""
        counts = (ctypes.c_int * 2)()
        self._library.arm(self._folder, ctypes.c_long(first), ctypes.c_long(times), code)
        try:
            try:
                result = act()
            finally:
                self._library.disarm(counts)
        except Exception as error:
            result = error
        return result, counts[0], counts[1]


# ---------------------------------------------------------------- what is done


def start(folder: str) -> Callable[[], object]:
    """What a process looks at first: the lease, and whether there is something to resume."""
    from octo_like.training.checkpoint import has_checkpoint
    from octo_like.training.lease import Lease

    def act() -> object:
        lease = Lease(folder)
        lease.take()
        try:
            return has_checkpoint(folder)
        finally:
            lease.release()

    return act


def restore(folder: str) -> Callable[[], object]:
    """The newest step, as a run goes on from it."""
    from octo_like.training import checkpoint
    from tests.training.test_checkpoint import abstract, assert_same, make_state

    wanted = abstract(make_state(0))

    def act() -> object:
        with checkpoint.Checkpointer(folder) as saver:
            extra = saver.read().extra
            state, again = saver.restore(None, wanted)
            assert_same(state, make_state(again["position"] // 32))
            return saver.all_steps(), extra, again

    return act


def _datasets(folder: str, cache_dir: str | None):
    from octo_like.data.prepare import prepare_datasets
    from octo_like.data.spec import specs_from_config
    from tests.data.conftest import Toy

    fields = Toy("toy_buttons", folder, pathlib.Path(folder), []).fields()
    return prepare_datasets(specs_from_config({"toy": fields}), folder, cache_dir, progress=False)


def _facts(prepared) -> object:
    statistics = {name: [float(x) for x in prepared.statistics["action"][name]] for name in ("mean", "std", "p99")}
    return prepared.version, prepared.train.hash, statistics, prepared.damaged


def prepare(folder: str) -> Callable[[], object]:
    """A dataset of two versions whose index is there, as at a restart."""
    return lambda: _facts(_datasets(folder, None)["toy"])


def index(folder: str) -> Callable[[], object]:
    """The first scan of a dataset, and its statistics."""
    cache = os.path.join(folder, "index_cache")

    def act() -> object:
        shutil.rmtree(cache, ignore_errors=True)
        return _facts(_datasets(folder, cache)["toy"])

    return act


def stream(folder: str) -> Callable[[], object]:
    """A few batches of a prepared dataset."""
    from octo_like.common.schema import BatchSpec, flatten
    from tests.data.streams import make_train_stream

    datasets = _datasets(folder, None)
    spec = BatchSpec(2, 2, 4, {"primary": (40, 52)}, goal_images=("primary",), proprio_dim=4)

    def act() -> object:
        digest = hashlib.sha256()
        with make_train_stream(datasets, spec, None, seed=1, batch_size=8, host_threads=1) as batches:
            for _ in range(2):
                for name, array in flatten(next(batches)):
                    digest.update(f"{name}{array.shape}".encode() + array.tobytes())
            return digest.hexdigest(), batches.bad_counts

    return act


SCENARIOS = {act.__name__: act for act in (start, restore, prepare, index, stream)}


def problem_of(result: object, want: object, once: bool, made: int) -> str | None:
    """What is wrong with how something ended under a fault."""
    from octo_like.common.storage import StorageError
    from octo_like.training import exits
    from octo_like.training.attempt import status_of

    if not isinstance(result, Exception):
        return None if result == want else f"another result: {result} instead of {want}"
    trace = "".join(traceback.format_exception(result))
    if once or not made:
        return f"a single fault was not survived: {trace}"
    if not isinstance(result, StorageError):
        return f"not an error of the storage: {trace}"
    if status_of(result, begun=False) != exits.ERROR:
        return f"a status that a supervisor does not try again: {trace}"
    return None


def main(library: str, folder: str, name: str, stride: str) -> None:
    from octo_like.common import storage

    logging.disable(logging.CRITICAL)
    storage.PAUSES = (0.0,) * 4
    act, injector, problems, counts = SCENARIOS[name](folder), Injector(library, folder), 0, {}
    act()  # what is compiled, imported and remembered the first time
    want, met, _ = injector.run(act, 0, 0)
    assert not isinstance(want, Exception), want
    damaged = pathlib.Path(folder) / "checkpoints" / "damaged"
    for once in (True, False):
        faults = 0
        for number in range(0, met, int(stride)):
            result, _, made = injector.run(act, number, 1 if once else 1 << 40)
            faults += made > 0
            problem = problem_of(result, want, once, made)
            if problem is None and damaged.exists():
                problem = "a step was set aside"
            if problem is not None:
                problems += 1
                print(json.dumps({"once": once, "operation": number, "problem": problem}), flush=True)
        counts["once" if once else "for good"] = faults
    result, _, _ = injector.run(act, 0, 0)
    if result != want:
        print(json.dumps({"problem": f"in the end: {result} instead of {want}"}))
    print(json.dumps({"operations": met, "faults": counts, "problems": problems}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
