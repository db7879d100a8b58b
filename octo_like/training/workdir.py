"""A run's directory, local or in a bucket.

Checkpoints and the export are written straight to their place. Logs are not: files that grow, TensorBoard's, traces
and stacks need a file system, so a run whose workdir is gs://bucket/run keeps them in a local folder and copies what
changed every minute, at the end, and when it is preempted. A restart fetches the files it continues.
"""

import logging
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Sequence

import jax

from octo_like.training.storage import FILES, absolute

log = logging.getLogger(__name__)


class Workdir:
    """Where a run writes: `path` for checkpoints and export, `local` for everything that needs a file system.

        with Workdir("gs://bucket/run", continued=("metrics.jsonl",)) as workdir: ...

    Args:
      path: a folder, or a location that etils.epath knows (gs:// with gcsfs or TensorFlow, s3:// with s3fs).
      local: where logs are kept and copied from; default: `path` itself, or a temporary folder when it is not a folder
        of this machine.
      continued: files that a restart goes on writing; fetched when they are there and can be read.
      interval: seconds between copies.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        local: str | os.PathLike | None = None,
        continued: Sequence[str] = (),
        interval: float = 60.0,
    ):
        remote = "://" in os.fspath(path)
        self.path = absolute(path)
        if local is None:
            local = tempfile.mkdtemp(prefix="octo_like-") if remote else self.path
        self.local = pathlib.Path(local)
        self.is_copied = os.fspath(self.local) != os.fspath(self.path)
        self._interval = interval
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._renamed: dict[str, str] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        for name in continued if self.is_copied and jax.process_index() == 0 else ():
            try:
                if (content := FILES.read(self.path / name)) is not None:
                    (self.local / name).write_bytes(content)
                    self._copied[self.local / name] = _state(self.local / name)
            except Exception as error:  # of whichever file system: logs must not stop a resume
                stem, dot, suffix = name.rpartition(".")
                self._renamed[name] = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}{dot}{suffix}"
                words = "%s could not be fetched and stays as it is, %s begins anew: %s"
                log.warning(words, self.path / name, self._renamed[name], error)

    def sync(self) -> None:
        """Copies every local file that changed since the last time. What cannot be copied is said and tried again."""
        if not self.is_copied:
            return
        with self._lock:
            for file in sorted(p for p in self.local.rglob("*") if p.is_file() and not p.name.endswith(".tmp")):
                state = _state(file)
                if self._copied.get(file) == state:
                    continue
                name = file.relative_to(self.local).as_posix()
                target = self.path / self._renamed.get(name, name)
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
                except Exception as error:  # of whichever file system: logs must not end a run
                    log.warning("%s could not be copied to %s: %s", file, target, error)
                    continue
                self._copied[file] = state

    def __enter__(self) -> "Workdir":
        if self.is_copied:
            self._thread = threading.Thread(target=self._run, name="octo_like-workdir", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.sync()

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self.sync()


def _state(path: pathlib.Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
