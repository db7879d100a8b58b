"""One attempt at a run, from the parsed command line to the exit status: what train.py and finetune.py do around it.

    with Attempt(flags, config) as attempt:     # joins the other processes, agrees with them, takes the workdir
        with attempt.phase("data"):             # watched, with a limit of its own; ends on all processes together
            inputs = ...
        return run_loop(Run(..., attempt=attempt))

Whatever ends the attempt, ends it on all processes and with one status: see `exits` and `peers`.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from octo_like.common.config import ConfigError, to_dict
from octo_like.common.storage import StorageError, may_pass
from octo_like.policy.devices import find_devices
from octo_like.training import distributed, exits
from octo_like.training.checkpoint import CheckpointError, NonFiniteState, has_checkpoint
from octo_like.training.lease import Lease, WorkdirInUse, lease_path
from octo_like.training.peers import Failure, Peers
from octo_like.training.provenance import library_versions, source_digests
from octo_like.training.storage import FILES
from octo_like.training.watch import TooManyBadSteps, Watchdog

# What the command cannot get past by being run again, as long as no step was taken.
MISTAKES = (ValueError, FileNotFoundError)
# For how long a process looks for the file that process 0 has just written into the workdir.
_SAME_WORKDIR_SECONDS = 5.0
# The last acts of a process that has failed: copying its logs, giving the workdir back.
_LAST_ACTS_SECONDS = 30.0

log = logging.getLogger(__name__)


class TrainingFailed(RuntimeError):
    """Something failed after the first step; the cause says what. Config and data were good for a step: a crash."""


class Attempt:
    """What holds for one process of a run from its start to its end.

    Args:
      flags: of `arguments.add_arguments`, and `workdir`.
      config: the run's config.

    Attributes:
      watchdog: ends the process when nothing moves.
      lease: the right to write to the workdir, held by process 0.
      resumes: whether there was a checkpoint in the workdir; the same on all processes.
      begun: set by the loop when the first step was taken: from then on nothing is a mistake in config or data.
      finishing: set by the loop when the last step was taken: what is left is to evaluate, save and export.

    Entering raises:
      ValueError: wrong flags, or processes whose workdirs are different folders.
      RuntimeError: processes that were given different configs, or run different code or versions of libraries.
      WorkdirInUse: another training holds the workdir.
    """

    def __init__(self, flags: argparse.Namespace, config: Any):
        self._flags, self._config = flags, config
        self.begun, self.finishing, self.resumes = False, False, False
        self._last_acts: list[Callable[[], None]] = []
        self._leaving, self._phases = threading.Lock(), 0
        self.lease: Lease | None = None
        self.peers: Peers | None = None
        self._timer: threading.Timer | None = None
        self._interrupts = Interrupts(self._on_interrupt)
        options = config.watchdog
        self.watchdog = Watchdog(
            flags.workdir,
            60 * (options.minutes or 0),
            exit=options.exit,
            limits={
                "startup": 60 * (options.startup_minutes or 0),
                "data": 60 * (options.data_minutes or 0),
                "restore": 60 * (options.restore_minutes or 0),
                "agreement": 60 * (options.agreement_minutes or 0),
            },
            leave=self.leave,
        )

    def __enter__(self) -> "Attempt":
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
        for chatty in ("absl", "jax"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        try:
            self._interrupts.start()
            distributed.initialize_from_flags(self._flags)  # has a limit of its own, --init_timeout
            self.peers = Peers(self._on_failure)
            self.watchdog.__enter__()
            self._agree()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _agree(self) -> None:
        self.watchdog.enter("startup")  # the devices are found when they are needed first
        find_devices()
        distributed.setup_compilation_cache()
        self.watchdog.enter("agreement")
        distributed.fingerprint_across_hosts(to_dict(self._config))
        distributed.fingerprint_across_hosts(library_versions(), "the versions of the libraries")
        distributed.fingerprint_across_hosts(source_digests(), "the code of octo_like")
        workdir, identity = self._flags.workdir, None
        if distributed.is_main():
            lease = Lease(workdir, on_lost=lambda message: self.leave(exits.ERROR, message))
            lease.take()
            self.lease, identity = lease, lease.id
        check_same_workdir(workdir, distributed.from_main("octo_like/lease", identity))
        # Process 0 looks for all.
        found = json.dumps(has_checkpoint(workdir)) if distributed.is_main() else None
        self.resumes = json.loads(distributed.from_main("octo_like/resumes", found))
        self.watchdog.enter("startup")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside has the limit `config.watchdog.<name>_minutes`, and ends on all processes together."""
        self._phases += 1
        seconds = self.watchdog.enter(name)
        yield
        distributed.wait_for_all(f"octo_like/{name}/{self._phases}", 2 * seconds + 60)  # the watchdog comes first
        self.watchdog.enter("startup")

    def check_lease(self) -> None:
        """Call on all processes before a checkpoint is written.

        Raises:
          WorkdirInUse: (on process 0) another training has taken the workdir.
        """
        if self.lease is not None:
            self.lease.check()

    def before_leaving(self, act: Callable[[], None]) -> None:
        """`act` is called, for a limited time, when the process has to end in the middle of everything."""
        self._last_acts.append(act)

    @contextlib.contextmanager
    def ends_in_time(self) -> Iterator[None]:
        """An error inside ends the process within the heartbeat, although the others it would wait for are not there.

        On its way out a process finishes the save that is in progress, and in this all processes take part.
        """
        try:
            yield
        except BaseException as error:
            if distributed.process_count() > 1:
                text, status = _in_words(error), status_of(error, begun=self.begun)
                self._timer = threading.Timer(self._flags.heartbeat_timeout, self.leave, (status, text))
                self._timer.daemon = True
                self._timer.start()
            raise

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            if self._timer is not None:
                self._timer.cancel()  # the loop has made a status of it
            self._end_together()
            return
        status = status_of(error, begun=self.begun)
        if distributed.process_count() > 1:
            # Not the normal way: it would wait for processes that wait for this one.
            print_error(error, status)
            self.leave(status, _in_words(error))
        self._close()
        if self.begun and isinstance(error, MISTAKES):
            raise TrainingFailed(f"after the first step: {_in_words(error)}") from error

    def _end_together(self) -> None:
        """Waits for the others, which may still fail; their failure would then be this process's."""
        try:
            distributed.wait_for_all("octo_like/end", self._flags.shutdown_timeout)
        except jax.errors.JaxRuntimeError as error:
            self.leave(exits.ERROR, f"not all processes have come to the end: {error}")
        self._close()

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C has asked for the end."""
        return self._interrupts.count > 0

    def _on_interrupt(self) -> None:
        """In a thread: the main thread may be in the middle of a compilation, which no signal handler interrupts."""
        if self._interrupts.count > 1:
            self._end_interrupted("interrupted again; what was done since the newest checkpoint is not saved")
        elif not self.begun:
            self._end_interrupted("interrupted before the first step; the same command starts again")
        elif distributed.process_count() == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._end_interrupted("interrupted at the end; what the run leaves is saved")
        if self.finishing:
            print(
                "\ninterrupted after the last step: finishes the last evaluation and saves (Ctrl-C again: at once)",
                file=sys.stderr,
                flush=True,
            )
            return
        print("\ninterrupted: saves and stops (Ctrl-C again: at once)", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # from here on as when the machine is taken away, on all processes

    def _end_interrupted(self, said: str) -> NoReturn:
        print(f"\n{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr, flush=True)
        self.leave(exits.INTERRUPTED, said)

    def _close(self) -> None:
        self._interrupts.stop()
        if self._timer is not None:
            self._timer.cancel()
        self.watchdog.__exit__(None, None, None)
        if self.peers is not None:
            self.peers.close()
        if self.lease is not None:
            self.lease.release()

    def _on_failure(self, failure: Failure) -> None:
        self.leave(failure.status, failure.message)

    def leave(self, status: int, message: str) -> NoReturn:
        """Ends the process from any thread, whatever the others do, and with it the other processes of the run.

        The status and message are those of the process that failed first.
        """
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it, and will not be long
        end = [status]

        def report() -> None:
            if self.peers is not None:
                failure = self.peers.report(status, message)
                end[0] = failure.status
                if failure.process != distributed.process_id():
                    meaning = exits.describe(failure.status)
                    log.error("ends with status %d (%s), because of %s", failure.status, meaning, failure)

        def last_acts() -> None:
            for act in self._last_acts:
                act()
            if self.peers is not None:
                self.peers.leave(self._flags.heartbeat_timeout)
            if self.lease is not None:
                self.lease.release()

        _within(_LAST_ACTS_SECONDS, report)
        _within(_LAST_ACTS_SECONDS + self._flags.heartbeat_timeout, last_acts)
        for child in multiprocessing.active_children():
            child.terminate()
        for stream in (*(h for h in logging.getLogger().handlers), sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(end[0])


class Interrupts:
    """Calls a function for every SIGINT, from a thread, whatever the main thread does.

    Attributes:
      count: of those that came.
    """

    def __init__(self, act: Callable[[], None]):
        self._act, self.count = act, 0
        self._before: Any = None
        self._ends: tuple[socket.socket, socket.socket] | None = None

    def start(self) -> None:
        """Only a process's main thread may: elsewhere SIGINT keeps its meaning."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._ends = socket.socketpair()
        self._ends[1].setblocking(False)
        signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
        self._before = signal.signal(signal.SIGINT, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(self._ends[0],), name="octo_like-ctrl-c", daemon=True).start()

    def _listen(self, end: socket.socket) -> None:
        while numbers := end.recv(16):  # the numbers of all signals that have a handler in Python
            for _ in range(numbers.count(signal.SIGINT)):
                self.count += 1
                self._act()
        end.close()

    def stop(self) -> None:
        if self._ends is not None:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, self._before or signal.default_int_handler)
            self._ends[1].close()
            self._ends = None


def _within(seconds: float, act: Callable[[], None]) -> None:
    """Calls `act`, and goes on without it after so many seconds or when it fails."""

    def guarded() -> None:
        try:
            act()
        except Exception:  # nothing may keep a process that is ending
            log.exception("while leaving")

    thread = threading.Thread(target=guarded, name="octo_like-leaving", daemon=True)
    thread.start()
    thread.join(seconds)


def check_same_workdir(workdir: str | os.PathLike, identity: str, *, seconds: float = _SAME_WORKDIR_SECONDS) -> None:
    """Makes sure that what process 0 has written into the workdir is there for all.

    Args:
      identity: of the lease that process 0 has taken.
      seconds: for how long to look.

    Raises:
      ConfigError: it is not; names the processes whose workdir is another folder.
      StorageError: the storage does not answer.
    """
    if jax.process_count() == 1:
        return
    path, end = lease_path(workdir, identity), time.monotonic() + seconds
    while not (visible := FILES.is_file(path)) and time.monotonic() < end:
        time.sleep(0.2)
    everyone = np.asarray(multihost_utils.process_allgather(np.array(visible))).reshape(-1)
    if not everyone.all():
        raise ConfigError(
            f"--workdir {workdir} is not the same folder for all processes: {np.flatnonzero(~everyone).tolist()} do "
            f"not see what process 0 has written there (this is process {jax.process_index()}). Checkpoints are "
            "written by all processes into one folder: use a bucket (gs://...) or a file system that all hosts share."
        )


def status_of(error: BaseException, *, begun: bool) -> int:
    """The exit status for what ended an attempt."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else exits.DONE if error.code is None else exits.ERROR
    if isinstance(error, KeyboardInterrupt):
        return exits.INTERRUPTED
    if isinstance(error, (TooManyBadSteps, NonFiniteState)):
        return exits.NOT_FINITE
    # A storage that did not answer is no mistake, whatever was concluded from it.
    return exits.USAGE if isinstance(error, MISTAKES) and not begun and not may_pass(error) else exits.ERROR


def print_error(error: BaseException, status: int) -> None:
    """One line for what says by itself what is wrong; a traceback would hide it. For all else the traceback."""
    if status == exits.USAGE or isinstance(error, (CheckpointError, StorageError, WorkdirInUse)):
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def command(main: Callable[[], int]) -> NoReturn:
    """`main` as a command: ends the process with its status, or with that of what it raises."""
    try:
        status = main()
    except (*MISTAKES, CheckpointError, StorageError, WorkdirInUse) as error:
        status = status_of(error, begun=False)
        print_error(error, status)
    sys.exit(status)
