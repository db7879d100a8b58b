"""When one process of a run fails, all of them leave with its status and its message.

JAX on its own does neither: the process that fails waits for the others in JAX's shutdown barrier while they wait for
it in a collective, and in the end all of them are aborted. Here the process that fails first writes down why in the
key-value store of JAX's coordination service; a thread on every process reads it there, whatever the main thread does.
Process 0, which keeps the store, leaves last. A process that is killed can write nothing: the others notice when its
heartbeats stay away, and are aborted by JAX.
"""

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable

import jax

from octo_like.training import distributed

_KEY = "octo_like/failure"
_SEEN = "octo_like/failure_seen/"
_INTERVAL = 0.5


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a run ends.

    Attributes:
      process: index of the process that failed first.
      host, pid: where it ran.
      status: its exit status; that of all others, too.
      message: in words.
    """

    process: int
    host: str
    pid: int
    status: int
    message: str

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host} (pid {self.pid}): {self.message}"


class Peers:
    """The failures of the other processes of this run. Does nothing where there are none.

    Args:
      on_failure: called once, from a thread, with the failure of another process.
    """

    def __init__(self, on_failure: Callable[[Failure], None]):
        self._client = distributed.coordination_client() if distributed.process_count() > 1 else None
        self._me, self._over = distributed.process_id(), threading.Event()
        self._on_failure = on_failure
        if self._client is not None:
            threading.Thread(target=self._listen, name="octo_like-peers", daemon=True).start()

    def close(self) -> None:
        """Listens no more."""
        self._over.set()

    def _listen(self) -> None:
        while not self._over.wait(_INTERVAL):
            failure = self.first()
            if failure is not None and failure.process != self._me:
                self._on_failure(failure)
                return

    def first(self) -> Failure | None:
        """The failure that was reported first, if any."""
        assert self._client is not None  # a lone process has nobody to ask, and does not
        try:
            return Failure(**json.loads(self._client.key_value_try_get(_KEY)))
        except jax.errors.JaxRuntimeError:
            return None  # nothing is there, or the service is not: then JAX ends this process

    def report(self, status: int, message: str) -> Failure:
        """Tells the others that this process fails, unless another one was first; returns the first failure."""
        mine = Failure(self._me, socket.gethostname(), os.getpid(), status, message[:4000])
        if self._client is None:
            return mine
        try:
            self._client.key_value_set(_KEY, json.dumps(dataclasses.asdict(mine)))  # refused if there is one
        except jax.errors.JaxRuntimeError:
            return self.first() or mine
        return mine

    def leave(self, seconds: float) -> None:
        """Call last. Process 0 waits so long for the others to have read the failure; they say that they have."""
        if self._client is None:
            return
        try:
            self._client.key_value_set(f"{_SEEN}{self._me}", "")
            end = time.monotonic() + seconds
            while self._me == 0 and time.monotonic() < end:
                if len(self._client.key_value_dir_get(_SEEN)) >= distributed.process_count():
                    return
                time.sleep(_INTERVAL / 5)
        except jax.errors.JaxRuntimeError:
            return  # without the service nobody waits
