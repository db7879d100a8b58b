"""Names in the log the files that a pass is waiting for."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

STALL_SECONDS = 30.0  # without a record from a file it is named; again after twice the time, and so on

log = logging.getLogger(__name__)


class StallWatch:
    """Watches reads in several threads; a thread of its own complains of those that do not move.

    with StallWatch("index of toy") as watch:
        with watch.reading(path) as progress:  # in any thread
            progress()  # something was read
    """

    def __init__(self, what: str):
        self._what = what
        self._lock, self._done = threading.Lock(), threading.Event()
        self._reads: dict[int, list] = {}  # [path, time of the last progress, seconds to wait before it is named]
        self._thread = threading.Thread(target=self._run, name="octo_like-stall", daemon=True)

    def __enter__(self) -> "StallWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[Callable[[], None]]:
        """Watches the read of a file; calls of what this yields are its progress."""
        read = [path, time.monotonic(), STALL_SECONDS]

        def progress() -> None:
            with self._lock:
                read[1:] = time.monotonic(), STALL_SECONDS

        with self._lock:
            self._reads[id(read)] = read
        try:
            yield progress
        finally:
            with self._lock:
                del self._reads[id(read)]

    def _run(self) -> None:
        while not self._done.wait(STALL_SECONDS / 10):
            now, late = time.monotonic(), []
            with self._lock:
                for read in self._reads.values():
                    path, last, patience = read
                    if now - last > patience:
                        late.append(f"{path} ({now - last:.0f} s)")
                        read[2] = 2 * patience
            if late:
                log.warning(
                    "%s: nothing is being read from %s; the storage does not answer", self._what, ", ".join(late)
                )
