"""What an error of a storage means, and looks at files in which an error is an error: no absence, and no damage.

A read may fail and work a second later: a bucket answers 503, a network disk ESTALE, credentials are renewed. Such an
error says nothing about what is stored. `kind_of` is the one place that classifies errors, of this machine's files, of
TensorFlow, Orbax, TensorStore and HTTP; `persistently` is the one place that repeats a read; `Files` looks at files,
lists folders and reads through both.
"""

import dataclasses
import enum
import errno
import json
import logging
import os
import re
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

# Seconds before the second, third, ... look at a storage that does not answer: five minutes in all.
PAUSES: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, *(30.0,) * 9)
# Looks after a refusal: credentials may be renewed at this moment, but a wrong path is not worth minutes.
DENIED_LOOKS = 3

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Kind(enum.Enum):
    """What an error says about a file: the storage does not answer now, refuses, has no such file, or what was
    read is wrong. MEMORY: there is too little memory to read it. OTHER: nothing of these."""

    PASSING = "the storage does not answer"
    DENIED = "the storage refuses"
    GONE = "there is no such file"
    DATA = "what was read is wrong"
    MEMORY = "there is too little memory"
    OTHER = "another error"


class StorageError(RuntimeError):
    """A storage does not answer, or refuses: nothing is known about what is stored there. Another attempt may work."""


_ERRNOS = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR), Kind.GONE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), Kind.DENIED),
    # A full disk does not pass by itself, nor a name that no file can have.
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EEXIST, errno.ENOTEMPTY), Kind.OTHER),
    **dict.fromkeys((errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOEXEC), Kind.OTHER),
}
# TensorFlow's errors, by name: the core does not import it. EIO is UNKNOWN and ESTALE is ABORTED there.
_NAMES = {
    "NotFoundError": Kind.GONE,
    **dict.fromkeys(("PermissionDeniedError", "UnauthenticatedError"), Kind.DENIED),
    **dict.fromkeys(("DataLossError", "InvalidArgumentError", "OutOfRangeError", "SafetensorError"), Kind.DATA),
    **dict.fromkeys(
        (
            "UnavailableError",
            "DeadlineExceededError",
            "AbortedError",
            "CancelledError",
            "ResourceExhaustedError",
            "UnknownError",
            "InternalError",
        ),
        Kind.PASSING,
    ),
}
# XLA and TensorStore begin their text with the status. TensorStore's errors are plain ValueErrors.
_STATUS_FIRST = re.compile(r"([A-Z_]+): ")
_STATUS_MODULES = ("grpc.", "jax.", "jaxlib.", "orbax.", "tensorstore.")
_STATUS = {
    **dict.fromkeys(("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"), Kind.PASSING),
    **dict.fromkeys(("RESOURCE_EXHAUSTED", "UNKNOWN", "INTERNAL"), Kind.PASSING),
    **dict.fromkeys(("PERMISSION_DENIED", "UNAUTHENTICATED"), Kind.DENIED),
    **dict.fromkeys(("DATA_LOSS", "OUT_OF_RANGE", "INVALID_ARGUMENT", "FAILED_PRECONDITION"), Kind.DATA),
    "NOT_FOUND": Kind.GONE,
}
# RESOURCE_EXHAUSTED is a storage's quota, or the memory of this machine and its devices.
_MEMORY = re.compile(r"\bOOM\b|\bmemory\b|\ballocat", re.IGNORECASE)
# Libraries whose errors without a status are those of a connection. Not all of `google`: its JSON reader is no client.
_CLIENTS = (
    "aiohttp.",
    "botocore.",
    "gcsfs.",
    "google.api_core.",
    "google.auth.",
    "httpcore.",
    "httpx.",
    "requests.",
    "urllib3.",
)
_DAMAGE = (json.JSONDecodeError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, EOFError)


def kind_of(error: BaseException) -> Kind:
    """What an error says, by all that caused it: a library may hide the status of a read in `__cause__`.

    Where one of the causes is memory or may pass, nothing else counts: what was concluded from it is not known.
    """
    found = {_kind(one) for one in _chain(error)}
    ranked = (Kind.MEMORY, Kind.PASSING, Kind.DENIED, Kind.DATA, Kind.GONE)
    return next((kind for kind in ranked if kind in found), Kind.OTHER)


def may_pass(error: BaseException) -> bool:
    """Whether an error says nothing about what is stored: the storage does not answer or refuses, or memory ran out."""
    return kind_of(error) in (Kind.PASSING, Kind.DENIED, Kind.MEMORY)


def is_gone(error: BaseException) -> bool:
    """Whether an error says that there is no such file; on any file system."""
    return kind_of(error) is Kind.GONE


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        left.append(one.__cause__ if one.__cause__ is not None or one.__suppress_context__ else one.__context__)
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions


def _kind(error: BaseException) -> Kind:
    """What one error says by itself."""
    if isinstance(error, StorageError):
        return Kind.PASSING
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return Kind.MEMORY
    if isinstance(error, _DAMAGE):
        return Kind.DATA
    if (status := _http_status(error)) is not None:
        return {404: Kind.GONE, 410: Kind.GONE, 401: Kind.DENIED, 403: Kind.DENIED}.get(
            status, Kind.PASSING if status >= 500 or status in (408, 425, 429) else Kind.OTHER
        )
    if isinstance(error, OSError) and error.errno is not None:
        return _ERRNOS.get(error.errno, Kind.PASSING)
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return Kind.GONE
    if isinstance(error, PermissionError):
        return Kind.DENIED
    name, text = type(error).__name__, str(error)
    if name in _NAMES:
        if name == "ResourceExhaustedError" and _MEMORY.search(text):
            return Kind.MEMORY
        # An error of a user's function within a graph is UNKNOWN as well.
        return Kind.OTHER if "Traceback (most recent call last)" in text else _NAMES[name]
    if name == "FailedPreconditionError":
        return Kind.GONE if "directory" in text.lower() else Kind.PASSING
    module = type(error).__module__ + "."
    if (word := _status(error, module, text)) is not None:
        memory = word == "RESOURCE_EXHAUSTED" and (module.startswith("jax") or _MEMORY.search(text))
        return Kind.MEMORY if memory else _STATUS[word]
    return Kind.PASSING if isinstance(error, OSError) or module.startswith(_CLIENTS) else Kind.OTHER


def _status(error: BaseException, module: str, text: str) -> str | None:
    """The status that the libraries name which have one; in the text of others its name is a word like any other."""
    if type(error) is not ValueError and not module.startswith(_STATUS_MODULES):
        return None
    if module.startswith("grpc.") and callable(code := getattr(error, "code", None)):
        name = getattr(code(), "name", "")
    else:
        found = _STATUS_FIRST.match(text)
        name = found[1] if found else ""
    return name if name in _STATUS else None


def _http_status(error: BaseException) -> int | None:
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return None


def first_line(error: BaseException) -> str:
    """'Kind: the first line of its text', for messages."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def persistently(act: Callable[[], Result], what: Any) -> Result:
    """The result of `act`, which is called again, with growing pauses, while the storage does not answer.

    PAUSES are waited, each with a line in the log; a storage that refuses is asked DENIED_LOOKS times.

    Args:
      act: an operation that may be done twice.
      what: for messages.

    Raises:
      StorageError: the storage did not answer within the time, or refuses.
      Exception: whatever else `act` raises, at once.
    """
    began = time.monotonic()
    for number, pause in enumerate((*PAUSES, None), start=1):
        try:
            return act()
        except StorageError:
            raise  # of an `act` that was patient itself
        except Exception as error:  # every storage has kinds of its own
            kind = kind_of(error)
            if kind not in (Kind.PASSING, Kind.DENIED):
                raise
            if pause is None or (kind is Kind.DENIED and number >= DENIED_LOOKS):
                waited = f"tried {number} times in {time.monotonic() - began:.0f} s"
                raise StorageError(f"{what}: {kind.value}: {first_line(error)} ({waited})") from error
            log.warning(
                "%s: %s: %s; looking again in %g s (gives up after %.0f s)",
                what,
                kind.value,
                first_line(error),
                pause,
                sum(PAUSES if kind is Kind.PASSING else PAUSES[: DENIED_LOOKS - 1]),
            )
        time.sleep(pause)
    raise AssertionError("the last look returns or raises")


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is at a path.

    Attributes:
      size: in bytes.
      changed: when, in nanoseconds or whatever the storage counts.
    """

    is_directory: bool
    size: int
    changed: int


class FileSystem(Protocol):
    """How one library looks at files that are not on this machine; errors are its own."""

    def stat(self, path: str) -> Found: ...

    def list(self, path: str) -> list[str]: ...

    def read(self, path: str) -> bytes: ...


class Files:
    """Looks at files, patiently: None and False mean that the storage answered that there is no such file.

    All methods raise StorageError when it does not answer, or refuses.

    Args:
      remote: for paths with a scheme (gs://...), where there are any. Others are of this machine.
    """

    def __init__(self, remote: FileSystem | None = None):
        self._remote = remote

    def look(self, path: str | os.PathLike) -> Found | None:
        """What there is at `path`; None: nothing."""
        text = os.fspath(path)

        def act() -> Found:
            if self._remote is not None and "://" in text:
                return self._remote.stat(text)
            found = os.stat(text)
            return Found(stat.S_ISDIR(found.st_mode), found.st_size, found.st_mtime_ns)

        return self._unless_gone(act, text)

    def is_folder(self, path: str | os.PathLike) -> bool:
        """Whether there is a folder at `path`."""
        found = self.look(path)
        return found is not None and found.is_directory

    def is_file(self, path: str | os.PathLike) -> bool:
        """Whether there is a file at `path`."""
        found = self.look(path)
        return found is not None and not found.is_directory

    def names(self, folder: str | os.PathLike) -> list[str] | None:
        """The sorted names of what a folder holds, without slashes; None: there is no such folder."""
        text = os.fspath(folder)

        def act() -> list[str]:
            if self._remote is None or "://" not in text:
                return sorted(os.listdir(text))
            # Some listings hide an error of their own look behind "no such folder".
            if not self._remote.stat(text).is_directory:
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", text)
            try:
                return sorted(name.rstrip("/") for name in self._remote.list(text))
            except Exception as error:  # every storage has kinds of its own
                if is_gone(error):
                    raise OSError(errno.EIO, f"is there, but cannot be listed: {first_line(error)}", text) from error
                raise

        return self._unless_gone(act, text)

    def folders(self, folder: str | os.PathLike) -> list[str]:
        """The sorted names of the folders in a folder."""
        names = self.names(folder) or []
        return [name for name in names if self.is_folder(os.path.join(os.fspath(folder), name))]

    def read(self, path: str | os.PathLike) -> bytes | None:
        """What a file holds; None: there is no such file."""
        text = os.fspath(path)

        def act() -> bytes:
            if self._remote is not None and "://" in text:
                return self._remote.read(text)
            with open(text, "rb") as file:
                return file.read()

        return self._unless_gone(act, text)

    def _unless_gone(self, act: Callable[[], Result], path: str) -> Result | None:
        try:
            return persistently(act, path)
        except StorageError:
            raise
        except Exception as error:  # every storage has kinds of its own
            if is_gone(error) and not isinstance(error, IsADirectoryError):
                return None
            raise
