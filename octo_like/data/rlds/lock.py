"""One process builds what several need: a lock file with a pulse, and patience for the others.

The lock saves work; nothing depends on it for correctness. Everything it guards is written atomically and is the same
whoever writes it, so two builders that miss each other only do the work twice.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from octo_like.common.storage import StorageError, persistently
from octo_like.data.rlds.cache_files import FILES, make_folder, remove
from octo_like.data.tf import tf

log = logging.getLogger(__name__)

PULSE_SECONDS = 5.0  # a builder shows this often that it lives
STALE_SECONDS = 60.0  # without a pulse for this long it is taken for dead
REPORT_SECONDS = 30.0
SETTLE_SECONDS = 0.5  # a bucket has no exclusive create: of several that write at once, the last has the lock


@contextlib.contextmanager
def claim(path: str) -> Iterator[bool]:
    """Whether this process has the lock `path`; if so, until the end of the block. Its folder must exist."""
    name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
    if not _create(path, name):
        yield False
        return
    done = threading.Event()

    def pulse() -> None:
        for beat in itertools.count(1):
            if done.wait(PULSE_SECONDS):
                return
            try:
                _write(path, f"{name} {beat}")
            except (tf.errors.OpError, OSError) as error:  # the others take over at worst
                log.warning("%s: cannot show that this process builds: %s", path, error)

    thread = threading.Thread(target=pulse, name="octo_like-lock", daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        try:
            remove(path)  # its folder may have been removed: what was to be built is there
        except StorageError as error:  # it goes stale
            log.warning("%s: stays behind: %s", path, error)


def _create(path: str, content: str) -> bool:
    """Whether this call made the file; not where its folder has just been removed."""
    if "://" in path:
        if FILES.is_file(path):
            return False
        persistently(lambda: _write(path, content), path)
        time.sleep(SETTLE_SECONDS)
        return _look(path) == content
    try:
        handle = persistently(lambda: os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), path)
    except (FileExistsError, FileNotFoundError):
        return False
    with os.fdopen(handle, "w") as file:
        file.write(content)
    return True


def _write(path: str, content: str) -> None:
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(content)


def _look(path: str) -> str | None:
    content = FILES.read(path)
    return None if content is None else content.decode(errors="replace")


def _break(lock: str, seen: str) -> None:
    """Removes a lock whose content is `seen`. Of several processes that do so one is first, and may have it by now."""
    aside = f"{lock}.{uuid.uuid4().hex[:8]}"
    try:
        persistently(lambda: tf.io.gfile.rename(lock, aside), lock)
    except tf.errors.NotFoundError:
        return
    if _look(aside) == seen:
        remove(aside)
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


class Watched:
    """A lock of another process, looked at now and then.

    Attributes:
      holder: the process that had it when it was last looked at.
    """

    def __init__(self, path: str):
        self.holder = "another process"
        self._path, self._seen, self._changed = path, _look(path), time.monotonic()

    def gone(self) -> bool:
        """Whether there is no such lock. A dead one counts; it is removed."""
        now, content = time.monotonic(), _look(self._path)
        if content is None:
            return True
        if content != self._seen:
            self._seen, self._changed = content, now
        self.holder = content.split(" ")[0]
        if now - self._changed <= STALE_SECONDS and not _is_dead(self.holder):
            return False
        log.warning("%s: %s is dead or has been silent for %.0f s", self._path, self.holder, now - self._changed)
        _break(self._path, content)
        return True


def build_once(target: str, build: Callable[[], None], *, what: str) -> None:
    """Returns when the file `target` exists: made by `build()` here, or by another process that sees its folder.

    Whoever comes first builds; the others wait for as long as it shows that it lives, then one of them builds.

    Args:
      target: what `build` writes, last and atomically.
      what: a few words for the log, which says now and then who is waited for.
    """
    make_folder(os.path.dirname(target))
    path = f"{target}.lock"
    other = Watched(path)
    start = reported = time.monotonic()
    while not FILES.is_file(target):
        with claim(path) as ours:
            if ours:
                # Another process may have finished between the look and the lock.
                if not FILES.is_file(target):
                    build()
                return
        if other.gone():
            continue
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            log.info("%s: waiting for %s to build it (%.0f s so far)", what, other.holder, reported - start)
        time.sleep(min(1.0, PULSE_SECONDS / 5))
