"""Keeps a training command running: starts it again after preemptions and crashes, gives up when that gets nowhere.

    python scripts/supervise.py -- python train.py --config configs/octo_base.py --workdir gs://bucket/run ...
    python scripts/supervise.py --max_crashes 3 --log runs/base/attempts.jsonl -- python train.py ...

What happens after the command has ended with status:

    0                 done: the supervisor ends with 0
    2                 a mistake in command line, config or data, found before the first step: ends with 2, since it
                      would happen again
    75                preempted, state saved: started again after --delay seconds
    76                stopped by the NaN guard: ends with 76, a person has to look
    77, any other     crashed or stalled: started again after --backoff seconds, twice as long after every further crash
                      in which nothing new was saved; after --max_crashes of these in a row: ends with the last status

SIGTERM and SIGINT reach the command as SIGTERM, so that it saves and leaves; then the supervisor does not start it
again (the machine is going away, or somebody pressed Ctrl-C), and ends with its status, after Ctrl-C with 130. A second
one kills it. On several hosts every host runs its own supervisor: when one process fails, all of them end with its
status, so that all supervisors do the same; when one is killed, the others notice and end, and all of them start again.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from octo_like.training import exits


class Supervisor:
    """One command, as often as it takes.

    Args:
      command: the words of the command.
      max_crashes: crashes in a row without progress after which to give up.
      backoff, max_backoff: seconds before the next attempt after the first crash; at most.
      delay: seconds before the next attempt after a preemption.
      grace: seconds between handing on a signal and killing.
      log: JSON lines, one per attempt; None: none.
    """

    def __init__(self, command, *, max_crashes=5, backoff=10.0, max_backoff=600.0, delay=1.0, grace=600.0, log=None):
        self.command, self.max_crashes = list(command), max_crashes
        self.backoff, self.max_backoff, self.delay, self.grace, self.log = backoff, max_backoff, delay, grace, log
        self.child: subprocess.Popen | None = None
        self.signal: int | None = None
        self.deadline = float("inf")

    def run(self) -> int:
        """Returns the exit status to end with."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        with tempfile.TemporaryDirectory(prefix="octo_like-supervise-") as folder:
            progress = pathlib.Path(folder) / "progress.json"
            crashes, reached, attempt = 0, -1, 0
            while True:
                attempt += 1
                began = time.time()
                status = self._attempt(progress)
                saved = _saved(progress)
                moved, reached = saved > reached, max(saved, reached)
                final = self.signal is not None or status in exits.FINAL
                if status == exits.PREEMPTED:
                    crashes, wait = 0, self.delay
                else:
                    crashes = 1 if moved else crashes + 1
                    wait = min(self.backoff * 2 ** (crashes - 1), self.max_backoff)
                    final = final or crashes >= self.max_crashes
                self._note(
                    attempt=attempt,
                    began=datetime.datetime.fromtimestamp(began).isoformat(timespec="seconds"),
                    seconds=round(time.time() - began, 1),
                    status=status,
                    meaning=exits.describe(status),
                    saved_step=reached if reached >= 0 else None,
                    crashes_without_progress=crashes,
                    next_in=None if final else wait,
                )
                if self.signal == signal.SIGINT and status != 0:
                    print("supervise: interrupted", file=sys.stderr)
                    return exits.INTERRUPTED
                if final:
                    if crashes >= self.max_crashes and status not in exits.FINAL:
                        print(f"supervise: {crashes} crashes without a new checkpoint; giving up", file=sys.stderr)
                    return status if status >= 0 else 128 - status  # as shells report signals
                self._sleep(wait)
                if self.signal is not None:
                    return exits.PREEMPTED if status == exits.PREEMPTED else 128 + self.signal

    def _attempt(self, progress: pathlib.Path) -> int:
        environment = {**os.environ, exits.PROGRESS_VARIABLE: str(progress)}
        try:
            # A session of its own: Ctrl-C reaches it through the supervisor only, and its workers die with it.
            self.child = subprocess.Popen(self.command, env=environment, start_new_session=True)
        except OSError as error:
            print(f"supervise: cannot start {self.command[0]}: {error}", file=sys.stderr)
            return exits.USAGE
        if self.signal is not None:
            self._forward(signal.SIGTERM)  # it arrived while the command was being started
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self.child.wait(timeout=0.5)
                if time.monotonic() > self.deadline:
                    self._forward(signal.SIGKILL)
        finally:
            self._forward(signal.SIGKILL)  # what the command leaves behind would hold devices and ports

    def _on_signal(self, number, frame) -> None:
        again, self.signal = self.signal is not None, number
        self.deadline = min(self.deadline, time.monotonic() + self.grace)
        self._forward(signal.SIGKILL if again else signal.SIGTERM)

    def _forward(self, number: int) -> None:
        if self.child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.child.pid, number)  # the session's process group has the number of its leader
            elif self.child.poll() is None:
                self.child.send_signal(number)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.signal is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _note(self, **fields) -> None:
        line = json.dumps(fields)
        print(f"supervise: {line}", file=sys.stderr, flush=True)
        if self.log is not None:
            try:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with open(self.log, "a") as file:
                    file.write(line + "\n")
            except OSError as error:  # a full disk is no reason to leave the command alone
                print(f"supervise: cannot write {self.log}: {error}", file=sys.stderr, flush=True)


def _saved(progress: pathlib.Path) -> int:
    """The newest step that is known to be saved; -1: none, or the command's note cannot be read."""
    try:
        saved = json.loads(progress.read_bytes())["saved"]
        return -1 if saved is None else int(saved)
    except FileNotFoundError:
        return -1
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"supervise: the command's note in {progress} cannot be read: {error!r}", file=sys.stderr, flush=True)
        return -1


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_crashes", type=int, default=5, help="in a row without anything new saved (default 5)")
    parser.add_argument("--backoff", type=float, default=10.0, metavar="SECONDS", help="after the first crash")
    parser.add_argument("--max_backoff", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--delay", type=float, default=1.0, metavar="SECONDS", help="after a preemption")
    parser.add_argument("--grace", type=float, default=600.0, metavar="SECONDS", help="from SIGTERM to SIGKILL")
    parser.add_argument("--log", type=pathlib.Path, help="file of JSON lines, one per attempt")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    flags = parser.parse_args(argv)
    command = flags.command[1:] if flags.command[:1] == ["--"] else flags.command
    if not command:
        parser.error("no command; for example: supervise.py -- python train.py --config ... --workdir ...")
    if flags.max_crashes < 1:
        parser.error("--max_crashes must be at least 1")
    fields = ("max_crashes", "backoff", "max_backoff", "delay", "grace", "log")
    return Supervisor(command, **{name: getattr(flags, name) for name in fields}).run()


if __name__ == "__main__":
    sys.exit(main())
