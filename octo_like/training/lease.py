"""One training per workdir: a lease that a run holds for as long as it may write there.

    WORKDIR/lease/<id>.json     a file per claimant: host, process, since when, how many signs of life it has given

Two trainings in one workdir would remove each other's unfinished checkpoints. All that a storage has to be able to do
is to write a whole file, to remove one, and to list a folder with every file whose writing has returned: local disks,
network file systems, GCS and S3 do that. A claimant writes its file first and lists the others afterwards, so of two
that come together at least one sees the other. Of those that are still choosing, the one with the smaller id goes
first.

A holder rewrites its file every `pulse` seconds. A lease is stale when its process was one of this machine and is no
more, or when its file has not changed for `stale` seconds as measured here: clocks of different hosts are not compared.
Whoever takes over removes the stale lease and names it; so a holder that was only asleep finds out before it writes
again.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from octo_like.common.errors import ConfigError
from octo_like.common.files import write_whole
from octo_like.common.storage import Kind, StorageError, first_line, kind_of, persistently
from octo_like.training.storage import FILES, absolute, list_now, make_folder

FOLDER = "lease"
STALE_SECONDS = 90.0
PULSE_SECONDS = 15.0

log = logging.getLogger(__name__)


class WorkdirInUse(RuntimeError):
    """Another training holds the workdir; the message names its host and process."""


@dataclasses.dataclass(frozen=True)
class _Record:
    """Another claimant's file as it was last read, and since when it has looked like this."""

    text: str
    since: float

    @property
    def fields(self) -> Mapping[str, Any]:
        try:
            found = json.loads(self.text)
        except ValueError:
            return {}  # cut short by a crash: nobody's, until it is stale
        return found if isinstance(found, dict) else {}


class Lease:
    """The right to write to a workdir.

        lease = Lease("gs://bucket/run", on_lost=...)
        lease.take()        # waits for a stale lease to prove stale
        ...
        lease.check()       # before something is written
        lease.release()

    Args:
      workdir: a folder or a bucket's location.
      on_lost: called, from a thread, with a message when another training has taken over.
      stale: seconds without a sign of life after which a lease of another machine counts for nothing.
      pulse: seconds between signs of life.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        on_lost: Callable[[str], None] = lambda message: None,
        stale: float = STALE_SECONDS,
        pulse: float = PULSE_SECONDS,
    ):
        self._remote = "://" in os.fspath(workdir)
        self.workdir = absolute(workdir)
        self.id = uuid.uuid4().hex
        self.path = lease_path(workdir, self.id)
        self._folder = self.path.parent
        self._on_lost, self._stale, self._pulse = on_lost, stale, pulse
        self._fields = {**_identity(), "held": False, "overtaken": [], "beats": 0}
        self._made = False
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Returns when the workdir is this process's.

        Raises:
          WorkdirInUse: another training is alive there.
          ConfigError: the workdir is a file, or on this machine and may not be written.
          StorageError: the storage does not answer.
          OSError: the workdir cannot be written for another reason, e.g. a full disk.
        """
        found = FILES.look(self.workdir)
        if found is not None and not found.is_directory:
            raise ConfigError(f"--workdir {self.workdir} is a file, expected a directory")
        self._made = not self._remote and found is None
        try:
            persistently(self._write, self._folder)
        except (StorageError, NotADirectoryError) as error:
            if not self._remote and kind_of(error.__cause__ or error) in (Kind.DENIED, Kind.GONE):
                reason = first_line(error.__cause__ or error)
                raise ConfigError(f"--workdir {self.workdir} cannot be written: {reason}; use another one") from None
            raise
        try:
            self._wait_for_others()
        except BaseException:
            self._remove(self.path)
            self._tidy()
            raise
        self._thread = threading.Thread(target=self._run, name="octo_like-lease", daemon=True)
        self._thread.start()

    def _wait_for_others(self) -> None:
        records: dict[str, _Record] = {}
        logged, claimed, last_pulse = False, True, time.monotonic()
        while True:
            alive = self._alive(records)
            if not alive and claimed:
                break
            if not alive:
                self._write()  # and look again: another one may have come in between
                claimed = True
                continue
            if not logged:
                logged = True
                names = ", ".join(_who(other.fields) for other in alive.values())
                log.warning("%s: waiting up to %.0f s for a sign of life of %s", self.workdir, self._stale, names)
            if claimed and any(name < self.id and not other.fields.get("held") for name, other in alive.items()):
                self._remove(self.path)  # both are choosing: the other one goes first
                claimed = False
            if claimed and time.monotonic() - last_pulse > self._pulse:
                last_pulse = time.monotonic()
                self._write()
            time.sleep(min(1.0, self._pulse / 4))
        self._fields["held"] = True
        self._write()

    def _alive(self, records: dict[str, _Record]) -> dict[str, _Record]:
        """Claims that are not known to be stale; removes those that are. `records`: of earlier calls, renewed here.

        Raises:
          WorkdirInUse: one is held by a process that is known to live.
        """
        alive, now = {}, time.monotonic()
        for name, text in persistently(self._others, self._folder).items():
            before, other = records.get(name), _Record(text, now)
            if before is not None and before.text == text:
                other = before
            elif before is not None and before.fields.get("held") and other.fields.get("held"):
                raise WorkdirInUse(self._describe(other.fields))  # it has just shown that it lives
            records[name] = other
            if _is_dead(other.fields) or now - other.since > self._stale:
                log.warning("%s: took over from %s, which is no more", self.workdir, _who(other.fields))
                self._fields["overtaken"].append(name)
                self._write()
                self._remove(self._folder / f"{name}.json")
                continue
            if other.fields.get("held") and _is_ours_to_know(other.fields):
                raise WorkdirInUse(self._describe(other.fields))  # a process of this machine, and it is there
            alive[name] = other
        return alive

    def check(self) -> None:
        """Call before writing what another training could not bear.

        Raises:
          WorkdirInUse: another training has taken over, because this process was silent for too long.
        """
        if (message := self._lost()) is not None:
            raise WorkdirInUse(message)

    def release(self) -> None:
        """Gives the workdir back; the next training need not wait."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=self._pulse)
        with self._lock:
            self._remove(self.path)
            self._tidy()

    # ---------------------------------------------------------------------------------------------------------- files

    def _run(self) -> None:
        while not self._over.wait(self._pulse):
            message = self._lost()
            if message is not None:
                log.error("%s", message)
                self._thread = None  # it may be long at it, and `release` does not wait for it
                self._on_lost(message)
                return
            with self._lock:
                if self._over.is_set():
                    return
                try:
                    self._write()
                except Exception as error:  # of whichever file system; it is tried again
                    log.warning("%s could not be renewed: %s", self.path, error)

    def _lost(self) -> str | None:
        try:
            others, mine = self._others(), self.path.name in self._listed()
        except Exception as error:  # storage that does not answer is no proof
            log.warning("%s cannot be read: %s", self._folder, error)
            return None
        for text in others.values():
            fields = _fields_of(text)
            if self.id in fields.get("overtaken", ()):
                return f"lost the workdir after a long silence. {self._describe(fields)}"
        return None if mine else f"lost the workdir: {self.path} was removed"

    def _others(self) -> dict[str, str]:
        """{id: content} of the files that are not this process's."""
        found = {}
        for name in self._listed() - {self.path.name}:
            try:
                found[name.removesuffix(".json")] = (self._folder / name).read_bytes().decode(errors="replace")
            except Exception:  # TensorFlow's file systems have errors of their own
                if name in self._listed():
                    raise
                # It was released in between.
        return found

    def _listed(self) -> set[str]:
        """Names of the files of all claimants, now."""
        return {name for name in list_now(self._folder) if name.endswith(".json")}

    def _write(self) -> None:
        self._fields["beats"] += 1
        text = json.dumps(self._fields)
        for attempt in range(5):
            try:
                make_folder(self._folder)
                if self._remote:
                    self.path.write_text(text)  # an object appears whole
                else:
                    write_whole(self.path, text)
                return
            except FileNotFoundError:  # somebody who released removed the empty folder
                if attempt == 4:
                    raise

    def _remove(self, path: epath.Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

    def _tidy(self) -> None:
        """Removes what is empty: a start that failed at once leaves no workdir behind."""
        if self._remote:
            return
        for folder in (self._folder, self.workdir) if self._made else (self._folder,):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def _describe(self, fields: Mapping[str, Any]) -> str:
        return (
            f"{self.workdir} is in use: {_who(fields)} trains there. Stop that one first, or use another --workdir. "
            f"(A lease in {self._folder} says so; it counts for nothing {self._stale:.0f} s after its holder has died.)"
        )


def lease_path(workdir: str | os.PathLike, identity: str) -> epath.Path:
    """The file of the claimant with this id."""
    return absolute(workdir) / FOLDER / f"{identity}.json"


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(sys.argv)[:500],
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _machine() -> str | None:
    """What tells processes apart that number alike: this boot of this kernel, and this container's process numbers."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None  # not Linux: leases go stale by silence only


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot: its number may have been given to another. None: it is no more."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]


def _is_ours_to_know(fields: Mapping[str, Any]) -> bool:
    return fields.get("machine") is not None and fields["machine"] == _machine() and fields.get("started") is not None


def _is_dead(fields: Mapping[str, Any]) -> bool:
    return _is_ours_to_know(fields) and _started(fields["pid"]) != fields["started"]


def _fields_of(text: str) -> Mapping[str, Any]:
    return _Record(text, 0.0).fields


def _who(fields: Mapping[str, Any]) -> str:
    if not fields:
        return "a process whose lease is not readable"
    since = f" since {fields['since']}" if "since" in fields else ""
    return f"process {fields.get('pid')} on host {fields.get('host')}{since}"
