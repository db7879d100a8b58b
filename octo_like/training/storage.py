"""What errors of a storage say about a checkpoint: nothing, unless they say it twice.

`octo_like.common.storage` classifies errors and looks at files. `settled` makes three cases of reading a checkpoint:
what was read, a mismatch that two looks in a row have found, and a storage that does not answer.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from octo_like.common import storage
from octo_like.common.storage import Found, StorageError, first_line

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved or restored; the message says which, why and what would be valid."""


class CheckpointDamaged(CheckpointError):
    """What is on disk is not what was saved."""


class CheckpointUnreadable(CheckpointError, StorageError):
    """The storage does not answer, or not twice the same: nothing is known about what was saved."""


class _Buckets:
    """Files that etils.epath reads: gs:// with gcsfs or TensorFlow, s3:// with s3fs."""

    def stat(self, path: str) -> Found:
        found = epath.Path(path).stat()
        return Found(found.is_directory, found.length or 0, found.mtime)

    def list(self, path: str) -> list[str]:
        return list_now(epath.Path(path))

    def read(self, path: str) -> bytes:
        return epath.Path(path).read_bytes()


def list_now(folder: epath.Path) -> list[str]:
    """The names of what a folder holds at this moment. Errors are those of the file system."""
    file_system = getattr(getattr(folder, "_backend", None), "fs", None)
    if file_system is not None:
        file_system(folder).invalidate_cache()  # gcsfs and s3fs remember what they have listed
    return [entry.name for entry in folder.iterdir()]


FILES = storage.Files(_Buckets())


def absolute(path: str | os.PathLike) -> epath.Path:
    """A location on any file system; one on this machine does not depend on the working directory."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def agree(problem: CheckpointError | None) -> CheckpointError | None:
    """A problem of any process is a problem of all, so that all take the same branch; damage is the worst."""
    if jax.process_count() == 1:
        return problem
    kind = 0 if problem is None else 3 if isinstance(problem, CheckpointDamaged) else 2 if _is_brief(problem) else 1
    kinds = multihost_utils.process_allgather(np.array(kind))
    if kind == kinds.max():
        return problem
    where = int(np.flatnonzero(kinds == kinds.max())[0])
    if kinds.max() == 3:
        return CheckpointDamaged(f"process {where} found it damaged (see its log)")
    error = CheckpointUnreadable(f"process {where} cannot read it (see its log)")
    if kinds.max() == 2:  # all give up at the same look
        error.__cause__ = RuntimeError(f"of process {where}")
    return error


def _is_brief(problem: CheckpointError) -> bool:
    """Whether an error is none of a storage, or a refusal: not worth minutes."""
    return problem.__cause__ is not None and storage.kind_of(problem.__cause__) is not storage.Kind.PASSING


def make_folder(folder: epath.Path) -> None:
    """Makes a folder and those above it, where it is not there yet.

    Raises:
      StorageError: the storage does not answer, or refuses.
      FileExistsError: there is a file of this name.
    """
    if not FILES.is_folder(folder):
        try:
            storage.persistently(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
        except FileExistsError:  # it came in between, or the look of `mkdir` failed
            if not FILES.is_folder(folder):
                raise


def of_first(read: Callable[[], Any]) -> Any:
    """The JSON-able result of `read`, which process 0 alone calls, so that all processes go on from the same.

    Raises:
      CheckpointError: on all processes, where `read` raised it or StorageError on process 0.
      Exception: whatever else `read` raised, on process 0; a RuntimeError with its text on the others.
    """
    if jax.process_count() == 1:
        return read()
    text, other = "", None
    if jax.process_index() == 0:
        try:
            text = json.dumps({"value": read()})
        except (CheckpointError, StorageError) as error:
            text = json.dumps({"error": str(error), "damaged": isinstance(error, CheckpointDamaged)})
        except Exception as error:  # the others wait below, whatever it is
            text, other = json.dumps({"error": f"process 0: {first_line(error)}"}), error
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(content))))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, len(content))] = content[:size]
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())
    if other is not None:
        raise other
    if "error" in outcome and "damaged" not in outcome:
        raise RuntimeError(outcome["error"])
    if "error" in outcome:
        raise (CheckpointDamaged if outcome["damaged"] else CheckpointUnreadable)(outcome["error"])
    return outcome["value"]


def alone(problem: CheckpointError | None) -> CheckpointError | None:
    """In place of `agree` where this process reads by itself."""
    return problem


def settled(
    look: Callable[[], Any],
    what: Any,
    agree: Callable[[CheckpointError | None], CheckpointError | None] = alone,
) -> Any:
    """The result of `look`, which is called again after an error, with the pauses of `octo_like.common.storage`.

    Args:
      look: raises CheckpointDamaged when it finds something else than was saved, anything else when it cannot read.
      what: for messages.
      agree: `agree` where all processes look together: then all of them look again.

    Raises:
      CheckpointDamaged: two looks in a row have found that.
      CheckpointUnreadable: there is neither a result nor two such looks.
    """
    damaged_before = False
    for number, pause in enumerate((*storage.PAUSES, None), start=1):
        result, problem = None, None
        try:
            result = look()
        except CheckpointError as error:
            problem = error
        except Exception as error:  # every storage has kinds of its own
            problem = CheckpointUnreadable(f"{what} cannot be read: {first_line(error)}")
            problem.__cause__ = error
        problem = agree(problem)
        if problem is None:
            return result
        damaged = isinstance(problem, CheckpointDamaged)
        if damaged and damaged_before:
            raise problem
        if pause is None or (not damaged and _is_brief(problem) and number >= storage.DENIED_LOOKS):
            raise CheckpointUnreadable(f"{what} does not read the same twice: {problem}") if damaged else problem
        log.warning("%s; looking again in %g s (gives up after %.0f s)", problem, pause, sum(storage.PAUSES))
        damaged_before = damaged
        time.sleep(pause)
