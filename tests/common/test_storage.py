"""What an error of a storage means, and looks at files in which an error is no absence."""

import errno
import json
import os
import types
import zipfile

import jax
import pytest

from octo_like.common import storage
from octo_like.common.config import ConfigError
from octo_like.common.storage import Files, Found, Kind, StorageError, kind_of, persistently


class UnavailableError(Exception):
    """As TensorFlow's."""


class NotFoundError(Exception):
    """As TensorFlow's."""


class FailedPreconditionError(Exception):
    """As TensorFlow's."""


class UnknownError(Exception):
    """As TensorFlow's."""


class ResourceExhaustedError(Exception):
    """As TensorFlow's."""


class RpcError(Exception):
    """As grpc's."""

    __module__ = "grpc._channel"

    def code(self):
        return types.SimpleNamespace(name="UNAVAILABLE")


class HttpError(OSError):
    """As gcsfs's."""

    def __init__(self, code):
        super().__init__(f"status {code}")
        self.code = code


def caused(error, cause):
    try:
        try:
            raise cause
        except Exception as inner:
            raise error from inner
    except Exception as outer:
        return outer


def in_passing(error, cause):
    try:
        try:
            raise cause
        except Exception:
            raise error  # noqa: B904 - as libraries do that hide what happened
    except Exception as outer:
        return outer


@pytest.mark.parametrize(
    "error,kind",
    [
        (OSError(errno.EIO, "I/O error"), Kind.PASSING),
        (OSError(errno.ESTALE, "stale"), Kind.PASSING),
        (OSError(errno.ETIMEDOUT, "timed out"), Kind.PASSING),
        (OSError(errno.ENOTCONN, "transport endpoint"), Kind.PASSING),
        (OSError("of a file system that has no numbers"), Kind.PASSING),
        (TimeoutError(), Kind.PASSING),
        (ConnectionResetError(), Kind.PASSING),
        (MemoryError(), Kind.MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Kind.MEMORY),
        (ResourceExhaustedError("OOM when allocating tensor with shape[9]"), Kind.MEMORY),
        (ResourceExhaustedError("429: rate limit"), Kind.PASSING),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), Kind.MEMORY),
        (ValueError("RESOURCE_EXHAUSTED: Error reading gs://x: 429"), Kind.PASSING),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: x"), Kind.PASSING),
        (RpcError("x"), Kind.PASSING),
        (StorageError("after all looks"), Kind.PASSING),
        (FileNotFoundError(errno.ENOENT, "no"), Kind.GONE),
        (FileNotFoundError("no"), Kind.GONE),
        (NotADirectoryError(errno.ENOTDIR, "no"), Kind.GONE),
        (PermissionError(errno.EACCES, "no"), Kind.DENIED),
        (OSError(errno.EROFS, "read-only"), Kind.DENIED),
        (OSError(errno.ENOSPC, "full"), Kind.OTHER),
        (UnavailableError("503"), Kind.PASSING),
        (UnknownError("I/O error"), Kind.PASSING),
        (UnknownError("KeyError: 'x'\nTraceback (most recent call last):\n ..."), Kind.OTHER),
        (NotFoundError("gs://x"), Kind.GONE),
        (FailedPreconditionError("x; Is a directory"), Kind.GONE),
        (FailedPreconditionError("Transport endpoint is not connected"), Kind.PASSING),
        *((HttpError(code), Kind.PASSING) for code in (408, 429, 500, 503)),
        *((HttpError(code), Kind.DENIED) for code in (401, 403)),
        (HttpError(404), Kind.GONE),
        (HttpError(400), Kind.OTHER),
        (ValueError("UNAVAILABLE: Error reading gs://x"), Kind.PASSING),
        (ValueError("PERMISSION_DENIED: x"), Kind.DENIED),
        (ValueError("NOT_FOUND: x"), Kind.GONE),
        (ValueError("DATA_LOSS: x"), Kind.DATA),
        # A word of a status is none: another library's, in the middle of a text, or of a key.
        (RuntimeError("INTERNAL: src/sentencepiece_processor.cc(1102)"), Kind.OTHER),
        (ValueError("the mode INTERNAL is unknown; valid: ABORTED, UNKNOWN"), Kind.OTHER),
        (ValueError("UNKNOWN"), Kind.OTHER),
        (KeyError("UNKNOWN: x"), Kind.OTHER),
        (ConfigError("INTERNAL: x"), Kind.OTHER),
        (json.JSONDecodeError("x", "{", 0), Kind.DATA),
        (zipfile.BadZipFile("x"), Kind.DATA),
        (ValueError("a shape is wrong"), Kind.OTHER),
        # What a library concluded does not count where the read itself failed.
        (caused(ValueError("cannot restore params/x"), OSError(errno.EIO, "I/O error")), Kind.PASSING),
        (caused(ValueError("x"), caused(RuntimeError("y"), ValueError("UNAVAILABLE: z"))), Kind.PASSING),
        (in_passing(FileNotFoundError("features.json"), OSError(errno.EIO, "I/O error")), Kind.PASSING),
        (caused(ValueError("x"), ValueError("DATA_LOSS: y")), Kind.DATA),
        (caused(OSError(errno.EIO, "I/O error"), MemoryError()), Kind.MEMORY),
        (ExceptionGroup("several", [ValueError("x"), OSError(errno.EIO, "I/O error")]), Kind.PASSING),
    ],
    ids=lambda x: x.name if isinstance(x, Kind) else f"{type(x).__name__} {str(x)[:24]}",
)
def test_kinds_of_errors(error, kind):
    assert kind_of(error) is kind


def test_a_cause_that_was_hidden_on_purpose_does_not_count():
    try:
        try:
            raise OSError(errno.EIO, "I/O error")
        except OSError:
            raise ValueError("x") from None
    except ValueError as error:
        assert kind_of(error) is Kind.OTHER


def failing(times, error):
    left = [times]

    def act():
        if left[0]:
            left[0] -= 1
            raise error
        return "read"

    return act, left


def test_pauses_grow_to_minutes_and_are_logged(monkeypatch, caplog):
    slept = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    assert persistently(failing(len(storage.PAUSES), OSError(errno.EIO, "I/O error"))[0], "the index") == "read"
    assert slept == list(storage.PAUSES) == sorted(slept) and 240 <= sum(slept) <= 600
    assert caplog.text.count("the index: the storage does not answer: OSError") == len(slept)
    with pytest.raises(StorageError, match="the index: the storage does not answer: OSError: .*I/O error.*16 times"):
        persistently(failing(99, OSError(errno.EIO, "I/O error"))[0], "the index")


def test_a_refusal_is_asked_a_few_times_and_other_errors_once(monkeypatch):
    slept = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    with pytest.raises(StorageError, match="the storage refuses: PermissionError"):
        persistently(failing(99, PermissionError(errno.EACCES, "no"))[0], "x")
    assert len(slept) == storage.DENIED_LOOKS - 1
    for error in (FileNotFoundError("no"), ValueError("wrong"), OSError(errno.ENOSPC, "full"), MemoryError()):
        act, left = failing(99, error)
        with pytest.raises(type(error)):
            persistently(act, "x")
        assert left == [98]


class Bucket:
    """One file and its folder, behind a connection that fails `left` times."""

    def __init__(self, left=0):
        self.left, self.files = left, {"b://run/a": b"content"}

    def _meet(self):
        if self.left:
            self.left -= 1
            raise UnavailableError("503")

    def stat(self, path):
        self._meet()
        if path == "b://run":
            return Found(True, 0, 1)
        if path not in self.files:
            raise NotFoundError(path)
        return Found(False, len(self.files[path]), 1)

    def list(self, path):
        if self.left:  # as tf.io.gfile.listdir: its own look failed
            self.left -= 1
            raise NotFoundError(f"Could not find directory {path}")
        return ["a"]

    def read(self, path):
        self.stat(path)
        return self.files[path]


@pytest.mark.parametrize("times", [0, 1, 2, 5])
def test_an_error_is_no_absence(monkeypatch, times):
    monkeypatch.setattr(storage, "PAUSES", (0.0,) * 6)
    for look, there, gone in (("look", Found(False, 7, 1), None), ("is_file", True, False), ("read", b"content", None)):
        assert getattr(Files(Bucket(times)), look)("b://run/a") == there
        assert getattr(Files(Bucket(times)), look)("b://run/b") == gone
        with pytest.raises(StorageError, match="b://run/b"):
            getattr(Files(Bucket(99)), look)("b://run/b")
    assert Files(Bucket(times)).names("b://run") == ["a"] and Files(Bucket(times)).folders("b://run") == []
    assert Files(Bucket(times)).names("b://none") is None and Files(Bucket(times)).names("b://run/a") is None
    with pytest.raises(StorageError):
        Files(Bucket(99)).names("b://run")
    bucket = Bucket()
    bucket.list = Bucket(99).list  # the look works, the listing never does
    with pytest.raises(StorageError, match="cannot be listed"):
        Files(bucket).names("b://run")


def test_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0,) * 3)
    files = Files(Bucket(99))  # is not asked
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    assert files.names(tmp_path) == ["file", "folder"] and files.folders(tmp_path) == ["folder"]
    assert files.read(tmp_path / "file") == b"x" and files.read(tmp_path / "none") is None
    assert files.is_folder(tmp_path) and not files.is_file(tmp_path) and files.look(tmp_path / "file" / "x") is None
    real, errors = os.stat, [OSError(errno.EIO, "I/O error")]

    def stat(path, *arguments, **named):
        if str(path) == str(tmp_path / "file") and errors:
            raise errors.pop()
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", stat)
    assert files.is_file(tmp_path / "file") and not errors
    errors += [OSError(errno.EIO, "I/O error")] * 4
    with pytest.raises(StorageError, match="file: the storage does not answer: OSError"):
        files.is_file(tmp_path / "file")
