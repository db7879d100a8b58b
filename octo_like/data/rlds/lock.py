"""One process builds what several need: a lock file with a pulse, and patience for the others.

The lock saves work; nothing depends on it for correctness. Everything it guards is written atomically and is the same
whoever writes it, so two builders that miss each other (a bucket has no exclusive create) only do the work twice.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable

from octo_like.data.spec import DataError
from octo_like.data.tf import tf

log = logging.getLogger(__name__)

PULSE_SECONDS = 5.0  # a builder shows this often that it lives
STALE_SECONDS = 60.0  # without a pulse for this long it is taken for dead
REPORT_SECONDS = 30.0
HOLDER_SECONDS = 20.0  # how long other processes let process 0 be the first to take the lock

# Caches below which this process has waited HOLDER_SECONDS and seen nothing of process 0: it waits there no more.
_without_process_0: set[str] = set()


def create(path: str, content: str) -> bool:
    """Whether this call made the file."""
    if "://" not in path:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(content)
        return True
    if tf.io.gfile.exists(path):
        return False
    _write(path, content)
    return True


def _write(path: str, content: str) -> None:
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(content)


def _look(path: str) -> str | None:
    try:
        with tf.io.gfile.GFile(path, "r") as file:
            return file.read()
    except (tf.errors.NotFoundError, tf.errors.FailedPreconditionError):
        return None


def _break(lock: str, seen: str) -> None:
    """Removes a lock whose content is `seen`. Of several processes that do so one is first, and may hold it by now."""
    aside = f"{lock}.{uuid.uuid4().hex[:8]}"
    try:
        tf.io.gfile.rename(lock, aside)
    except tf.errors.NotFoundError:
        return
    if _look(aside) == seen:
        tf.io.gfile.remove(aside)
    else:
        tf.io.gfile.rename(aside, lock, overwrite=True)


def _is_dead(holder: str) -> bool:
    """Whether the holder was a process of this machine that is no more: nobody has to wait for its pulse to fail."""
    host, pid, *_ = [*holder.split(":"), ""]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


class Pulse:
    """Rewrites the lock file every few seconds while the builder works."""

    def __init__(self, path: str, name: str):
        self._path, self._name, self._beats = path, name, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="octo_like-lock", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._done.wait(PULSE_SECONDS):
            self._beats += 1
            try:
                _write(self._path, f"{self._name} {self._beats}")
            except (tf.errors.OpError, OSError) as error:  # the others take over at worst
                log.warning("%s: cannot show that this process builds: %s", self._path, error)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        try:
            tf.io.gfile.remove(self._path)
        except tf.errors.NotFoundError:  # its folder was removed: what was to be built is there
            pass


def holder_name(process_index: int) -> str:
    """What this process writes into its lock files."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}:{process_index}"


class Watched:
    """A lock of another process, looked at now and then."""

    def __init__(self, path: str):
        self._path, self._seen, self._changed = path, _look(path), time.monotonic()

    def gone(self) -> bool:
        """Whether there is no such lock. A dead one counts; it is removed."""
        now, content = time.monotonic(), _look(self._path)
        if content is None:
            return True
        if content != self._seen:
            self._seen, self._changed = content, now
        holder = content.split(" ")[0]
        if now - self._changed <= STALE_SECONDS and not _is_dead(holder):
            return False
        log.warning("%s: %s is dead or has been silent for %.0f s", self._path, holder, now - self._changed)
        _break(self._path, content)
        return True


def build_once(
    target: str,
    build: Callable[[], None],
    *,
    what: str,
    process_index: int = 0,
    root: str | None = None,
    wait_seconds: float = 24 * 3600.0,
) -> None:
    """Returns when the file `target` exists: made by `build()` here, or by another process that shares the folder.

    Args:
      target: what `build` writes, last and atomically. Its folder must exist.
      what: a few words for messages.
      process_index: process 0 goes first. Others that see neither the file nor a builder for a while take it that they
        do not share a disk with process 0, and build for themselves.
      root: folder (or any name) of all that is shared or not shared together: below it that while is waited once.
        Forgotten when process 0 turns up there after all. None: that of the target.
      wait_seconds: how long to wait for another process.

    Raises:
      DataError: it is not there after `wait_seconds`; says who was building it.
    """
    lock = f"{target}.lock"
    name = holder_name(process_index)
    root = os.path.dirname(target) if root is None else root
    start = changed = reported = time.monotonic()
    seen: str | None = None
    may_build, met_process_0 = process_index == 0 or root in _without_process_0, False
    while not tf.io.gfile.exists(target):
        if not may_build and time.monotonic() - start > HOLDER_SECONDS:
            may_build = True
            if not met_process_0:
                _without_process_0.add(root)
        if may_build and create(lock, name):
            with Pulse(lock, name):
                # Another process may have finished between the look and the lock.
                if not tf.io.gfile.exists(target):
                    build()
            return
        now, content = time.monotonic(), _look(lock)
        if content != seen:
            seen, changed = content, now
        holder = (seen or "another process").split(" ")[0]
        if process_index and holder.count(":") == 3 and holder.endswith(":0"):
            met_process_0 = True
            _without_process_0.discard(root)
        if seen is not None and (now - changed > STALE_SECONDS or _is_dead(holder)):
            log.warning("%s: %s is dead or has been silent for %.0f s; building here", what, holder, now - changed)
            _break(lock, seen)
            may_build = True
            continue
        if now - start > wait_seconds:
            raise DataError(
                f"{what}: waited {now - start:.0f} s for {holder} to build it; see what that process does, or delete "
                f"{lock} and start again"
            )
        if now - reported > REPORT_SECONDS:
            reported = now
            log.info("%s: waiting for %s to build it (%.0f s so far)", what, holder, now - start)
        time.sleep(min(1.0, PULSE_SECONDS / 5))
