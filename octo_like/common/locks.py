"""Work that two processes of a machine must not do at once, such as writing one dataset."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Waits until no other process is inside `exclusive` of this path; a process that dies leaves it.

    Args:
      path: of the lock, a file that is made where it does not exist and stays, empty. On a file system with `flock`
        (local ones; NFS from Linux 2.6.12).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s is held by another process: waiting for it", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
