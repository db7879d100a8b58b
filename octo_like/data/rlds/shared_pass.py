"""The pass over records that are not indexed yet, shared: by the hosts of a pod, by worker processes, or on Beam.

What is shared is a folder. A piece of work is a few consecutive files of a split; who takes it claims it with a lock
file that has a pulse (`lock.py`), and leaves one part per file in the index's folder `parts/` (`cache.py`). Parts
are written atomically and are the same whoever writes them, so that a claim only saves work. A piece whose holder died
is taken over. Processes that share no disk see no claims of each other and read everything.

The pieces of all datasets are one list, of which each process begins at another place. Joining the parts to an index is
left to `cache.load_index`, which finds all of them.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from octo_like.data.rlds import lock, records, scan
from octo_like.data.rlds.cache_files import FILES, make_folder, write_atomically
from octo_like.data.rlds.records import EpisodeFunction, RldsSplit
from octo_like.data.rlds.stall import StallWatch
from octo_like.data.spec import DatasetSpec

# A piece is at least one file and ends with either of these; what a killed process loses is one piece per thread.
PIECE_BYTES, PIECE_FILES = 256 << 20, 64
# One more process for so many bytes, where their number is not given: starting TensorFlow takes seconds.
BYTES_PER_PROCESS, MAX_PROCESSES = 4 << 30, 8
POLL_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Job:
    """A split that is not indexed yet.

    Attributes:
      spec: of the dataset.
      split: its files. `features` is None on the way to another process.
      folder: of the index.
    """

    spec: DatasetSpec
    split: RldsSplit
    folder: str

    @functools.cached_property
    def function(self) -> EpisodeFunction:
        return EpisodeFunction(self.spec, self.split.features or records.features_of(self.split.directory))

    @property
    def parts(self) -> str:
        return os.path.join(self.folder, scan.PARTS)

    def pieces(self) -> list[range]:
        """Numbers of the files of each piece; the same for whoever asks."""
        found, first, size = [], 0, 0
        for number, file_bytes in enumerate(self.split.file_bytes):
            if number > first and (size + file_bytes > PIECE_BYTES or number - first == PIECE_FILES):
                found.append(range(first, number))
                first, size = number, 0
            size += max(0, file_bytes)
        return [*found, range(first, len(self.split.file_bytes))]

    def finished(self) -> set[str]:
        """Names of the parts there are, one look for all of them."""
        return set(FILES.names(self.parts) or ())

    def indexed(self) -> bool:
        return FILES.is_file(os.path.join(self.folder, "index.npz"))

    def plain(self) -> Job:
        """For other processes; the function is made again there."""
        return Job(self.spec, dataclasses.replace(self.split, features=None), self.folder)


Piece = tuple[Job, range]


def unfinished(jobs: Sequence[Job]) -> list[Piece]:
    """The pieces of which a part is missing."""
    left = []
    for job in jobs:
        if not job.indexed():
            done = job.finished()
            left += [(job, piece) for piece in job.pieces() if not all(_part_of(n, done) for n in piece)]
    return left


def _part_of(number: int, done: set[str]) -> bool:
    return scan.part_name(number) in done or scan.bad_name(number) in done


def estimate(jobs: Sequence[Job]) -> str:
    """What a pass will read, for the log: bytes, files, episodes, of which dataset, and how long that takes."""
    sizes: collections.Counter[str] = collections.Counter()
    files = episodes = 0
    for job, piece in unfinished(jobs):
        sizes[job.spec.name] += sum(max(0, job.split.file_bytes[n]) for n in piece)
        files += len(piece)
        episodes += sum(job.split.shard_lengths[n] for n in piece)
    total = sum(sizes.values())
    largest = ", ".join(f"{name} {_size(size)}" for name, size in sizes.most_common(5))
    more = f" and {len(sizes) - 5} more" if len(sizes) > 5 else ""
    return (
        f"no index yet: {_size(total)} in {files:,} files with {episodes:,} episodes of {len(sizes)} datasets will be "
        f"read once ({largest}{more}); at 100 MB/s that takes {_duration(total / 100e6)}"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def default_processes(jobs: Sequence[Job]) -> int:
    """How many processes of this machine read what is left of some jobs, unless it is said: by bytes and cores."""
    total = sum(max(0, job.split.file_bytes[n]) for job, piece in unfinished(jobs) for n in piece)
    return max(1, min(MAX_PROCESSES, (os.cpu_count() or 1) // 2, total // BYTES_PER_PROCESS))


def scan_piece(job: Job, piece: range, advance: Callable[[int], Any] = lambda count: None) -> None:
    """Scans the files of a piece that have no part yet, in their order, and writes their parts."""
    for number in piece:
        if not _exists(job, number):
            summary = scan.scan_file(job.split, number, job.function, advance)
            name = scan.bad_name(number) if summary.damaged else scan.part_name(number)
            write_atomically(os.path.join(job.parts, name), summary.to_bytes())


def _exists(job: Job, number: int) -> bool:
    names = (scan.part_name(number), scan.bad_name(number))
    return any(FILES.is_file(os.path.join(job.parts, name)) for name in names)


# ---------------------------------------------------------------- one of several processes


class _Pass:
    """This process's share of a pass."""

    def __init__(self, pieces: Sequence[Piece], index: int, count: int, progress: bool):
        start = len(pieces) * index // max(1, count)
        self._queue = collections.deque([*pieces[start:], *pieces[:start]])
        self._elsewhere: list[Piece] = []  # other processes have taken them
        self._lock = threading.Lock()
        self._watch = StallWatch("index")
        episodes = sum(job.split.shard_lengths[n] for job, piece in pieces for n in piece)
        self._bar = tqdm(total=episodes, desc="index", unit="ep", disable=not progress, leave=False, mininterval=1.0)

    def run(self, threads: int) -> None:
        """Returns when every piece is done, here or elsewhere."""
        with self._bar, self._watch, concurrent.futures.ThreadPoolExecutor(threads, "octo_like-index") as pool:
            futures = [pool.submit(self._take_all) for _ in range(threads)]
            for future in futures:
                future.result()
        self._wait()

    def _take_all(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    return
                piece = self._queue.popleft()
            try:
                if not self._take(piece):
                    with self._lock:
                        self._elsewhere.append(piece)
            except BaseException:
                with self._lock:
                    self._queue.clear()  # the other threads finish what they have in hand
                raise

    def _take(self, piece: Piece) -> bool:
        """Whether a piece is done; does it unless another process has taken it, or has removed the folder of parts."""
        job, numbers = piece
        if self._done(piece):
            return True
        with lock.claim(self._claim(piece)) as ours:
            if ours:
                with self._watch.reading(job.split.files[numbers[0]]) as moved:

                    def advance(count: int) -> None:
                        moved()
                        self._advance(count)

                    scan_piece(job, numbers, advance)
            return ours

    def _advance(self, count: int) -> None:
        with self._lock:
            self._bar.update(count)

    @staticmethod
    def _claim(piece: Piece) -> str:
        job, numbers = piece
        return os.path.join(job.parts, f"{numbers[0]:05d}.lock")

    @staticmethod
    def _done(piece: Piece) -> bool:
        # Files of a piece are finished in their order. The index is written last, then the parts are removed.
        job, numbers = piece
        return _exists(job, numbers[-1]) or job.indexed()

    def _wait(self) -> None:
        """Until the pieces that others hold are done; those of a holder that died are done here."""
        watched = {id(piece): lock.Watched(self._claim(piece)) for piece in self._elsewhere}
        reported = time.monotonic()
        while self._elsewhere:
            for piece in list(self._elsewhere):
                claim = watched[id(piece)]
                if self._done(piece) or (claim.gone() and self._take(piece)):
                    self._elsewhere.remove(piece)
            if self._elsewhere and time.monotonic() - reported > lock.REPORT_SECONDS:
                reported = time.monotonic()
                log.info("index: waiting for other processes to finish %d pieces", len(self._elsewhere))
            if self._elsewhere:
                time.sleep(POLL_SECONDS)


def take_part(
    jobs: Sequence[Job],
    *,
    threads: int,
    processes: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = True,
) -> None:
    """Does this process's share of what is not indexed of some splits, and returns when all of it is scanned.

    Args:
      threads: files read at the same time by each process.
      processes: processes of this machine that read, this one included; the others are started, and end with it.
      process_index, process_count: of the hosts that do the same at the same time, if they share the indices' folders.

    Raises:
      DataError, StorageError: as `scan.scan_file`.
    """
    pieces = unfinished(jobs)
    if not pieces:
        return
    for job in jobs:
        make_folder(job.parts)
    count = process_count * processes
    own = [(process_index * processes + i, count) for i in range(processes)]
    workers = [_start_worker(jobs, threads, index, count) for index, count in own[1:]]
    try:
        _trace(jobs, pieces)
        _Pass(pieces, *own[0], progress).run(threads)
    finally:
        for worker in workers:
            assert worker.stdin is not None  # started with a pipe
            worker.stdin.close()
            status = worker.wait()
            if status:
                log.warning("a worker process of the index ended with status %s; its pieces were done here", status)


def _trace(jobs: Sequence[Job], pieces: Sequence[Piece]) -> None:
    """Traces the functions that will be needed, once, before the threads ask for them."""
    wanted = {id(job) for job, _ in pieces}
    for job in jobs:
        if id(job) in wanted:
            scan.traced_summary(job.function)


# ---------------------------------------------------------------- worker processes

_WORKER = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "  # Ctrl-C: its parent says so, and it ends quietly
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from octo_like.data.rlds import shared_pass; "
    "shared_pass.work()"
)


def _start_worker(jobs: Sequence[Job], threads: int, index: int, count: int) -> subprocess.Popen:
    # Not `multiprocessing`: it would import the program's main file again, and JAX with it.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    worker = subprocess.Popen([sys.executable, "-c", _WORKER], stdin=subprocess.PIPE, env=environment)
    assert worker.stdin is not None
    worker.stdin.write(pickle.dumps([path or os.getcwd() for path in sys.path]))
    worker.stdin.write(pickle.dumps(([job.plain() for job in jobs], threads, index, count)))
    worker.stdin.flush()
    return worker


def work() -> None:
    """The main function of a worker process: takes pieces until none is left, or until its parent is gone."""
    jobs, threads, index, count = pickle.load(sys.stdin.buffer)

    def end_with_parent() -> None:
        while os.read(0, 1024):  # not through sys.stdin, whose lock must be free when the interpreter ends
            pass
        os._exit(0)  # what it holds is taken over; parts are written atomically

    threading.Thread(target=end_with_parent, daemon=True).start()
    pieces = unfinished(jobs)
    _trace(jobs, pieces)
    _Pass(pieces, index, count, progress=False).run(threads)
