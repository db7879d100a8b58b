"""Errors of a storage, and what they say about a checkpoint: nothing, unless they say it twice.

A read may fail and work a second later: a bucket answers 503, a network disk ESTALE, a cache has not caught up with
what was written. Such an error says nothing about what was saved. `settled` looks again, with growing pauses, and makes
three cases of it: what was read, a mismatch that two looks in a row have found, and a storage that does not answer.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

PAUSES = (0.5, 2.0, 8.0, 16.0)  # seconds before the second, third, ... look

# Of a file that is not what was saved; any other error of a read may pass.
_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# TensorStore, XLA and TensorFlow name the kind of an error in its text; EIO is UNKNOWN and ESTALE is ABORTED there.
_PASSING = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|RESOURCE_EXHAUSTED|UNKNOWN|INTERNAL|PERMISSION_DENIED|"
    r"UNAUTHENTICATED)\b"
)

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved or restored; the message says which, why and what would be valid."""


class CheckpointDamaged(CheckpointError):
    """What is on disk is not what was saved."""


class CheckpointUnreadable(CheckpointError):
    """The storage does not answer, or not twice the same: nothing is known about what was saved."""


def absolute(path: str | os.PathLike) -> epath.Path:
    """A location on any file system; one on this machine does not depend on the working directory."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def is_gone(error: Exception) -> bool:
    """Whether an error says that there is no such file; on any file system."""
    return isinstance(error, _GONE) or type(error).__name__ == "NotFoundError"


def may_pass(error: Exception) -> bool:
    """Whether an error of a reader (Orbax, TensorStore, XLA) may be the storage's or the machine's, not the data's."""
    if isinstance(error, OSError):
        return not is_gone(error)
    return isinstance(error, MemoryError) or bool(_PASSING.search(str(error)))


def first_line(error: Exception) -> str:
    """'Kind: the first line of its text', for messages."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def agree(problem: CheckpointError | None) -> CheckpointError | None:
    """A problem of any process is a problem of all, so that all take the same branch; damage is the worst."""
    if jax.process_count() == 1:
        return problem
    kind = 0 if problem is None else 2 if isinstance(problem, CheckpointDamaged) else 1
    kinds = multihost_utils.process_allgather(np.array(kind))
    if kind == kinds.max():
        return problem
    where = int(np.flatnonzero(kinds == kinds.max())[0])
    if kinds.max() == 2:
        return CheckpointDamaged(f"process {where} found it damaged (see its log)")
    return CheckpointUnreadable(f"process {where} cannot read it (see its log)")


def alone(problem: CheckpointError | None) -> CheckpointError | None:
    """In place of `agree` where this process reads by itself."""
    return problem


def settled(
    look: Callable[[], Any],
    what: Any,
    agree: Callable[[CheckpointError | None], CheckpointError | None] = alone,
) -> Any:
    """The result of `look`, which is called again after an error, with growing pauses.

    Args:
      look: raises CheckpointDamaged when it finds something else than was saved, anything else when it cannot read.
      what: for messages.
      agree: `agree` where all processes look together: then all of them look again.

    Raises:
      CheckpointDamaged: two looks in a row have found that.
      CheckpointUnreadable: there is neither a result nor two such looks.
    """
    damaged_before = False
    for pause in (*PAUSES, None):
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
        if pause is None:
            raise CheckpointUnreadable(f"{what} does not read the same twice: {problem}") if damaged else problem
        log.warning("%s; looking again in %g s", problem, pause)
        damaged_before = damaged
        time.sleep(pause)
