"""The pass over records that are not indexed yet as an Apache Beam pipeline: on this machine, Dataflow, Spark or Flink.

An extra, `pip install 'octo_like[beam]'`. The pipeline writes the parts of `shared_pass.py` into the folders of the
indices, which all its workers have to see (a bucket, unless they are processes of this machine); they are joined where
the pipeline was started. The index is the same, byte by byte, whatever runs the pipeline.
"""

import contextlib
import logging
import pickle
import threading
import time
from collections.abc import Iterator, Sequence

from octo_like.common.storage import StorageError
from octo_like.data.rlds import shared_pass
from octo_like.data.rlds.cache_files import make_folder
from octo_like.data.rlds.scan import traced_summary
from octo_like.data.spec import DataError

SILENT_SECONDS = 600.0  # without a new part the log says so; again after twice the time, and so on

log = logging.getLogger(__name__)


@contextlib.contextmanager
def _complains(jobs: Sequence[shared_pass.Job]) -> Iterator[None]:
    """Names in the log, from a thread, what to do when no file is finished: Beam waits for a killed worker for ever."""
    over = threading.Event()

    def watch() -> None:
        parts, since, patience = -1, time.monotonic(), SILENT_SECONDS
        while not over.wait(min(30.0, SILENT_SECONDS / 4)):
            try:
                now = sum(len(job.finished()) for job in jobs)
            except StorageError as error:
                log.warning("the parts of the index cannot be counted: %s", error)
                continue
            if now != parts:
                parts, since, patience = now, time.monotonic(), SILENT_SECONDS
            elif (silent := time.monotonic() - since) > patience:
                patience *= 2
                log.warning(
                    "no file was finished for %.0f s. When a worker was killed, Beam waits for it for ever: stop this "
                    "command and run it again, it goes on with the files that are missing",
                    silent,
                )

    threading.Thread(target=watch, name="octo_like-beam", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def run(jobs: Sequence[shared_pass.Job], options: Sequence[str]) -> None:
    """Scans all files that have no part yet.

    Args:
      options: command-line options of the pipeline: `--runner=...` and those of the runner.

    Raises:
      DataError: Apache Beam is not installed, or workers of a cluster would write to a disk of this machine.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError as error:
        raise DataError(
            f"Apache Beam cannot be imported ({error}): pip install 'octo_like[beam]', or leave out --beam and let "
            "--processes read"
        ) from error
    parsed = PipelineOptions(list(options))
    runner = parsed.get_all_options().get("runner") or "DirectRunner"
    elsewhere = [job.folder for job in jobs if "://" not in job.folder]
    if "Dataflow" in runner and elsewhere:
        raise DataError(f"--beam: workers of {runner} cannot write to {elsewhere[0]}; give a bucket as --cache_dir")
    numbers = {id(job): number for number, job in enumerate(jobs)}
    pieces = [(numbers[id(job)], (piece.start, piece.stop)) for job, piece in shared_pass.unfinished(jobs)]
    if not pieces:
        return
    for job in jobs:
        make_folder(job.parts)

    class Scan(apache_beam.DoFn):
        """Scans pieces; the functions are made once for each worker."""

        def __init__(self, content: bytes):
            self._content = content

        def setup(self):
            self._jobs = pickle.loads(self._content)

        def process(self, piece):
            number, (start, stop) = piece
            job = self._jobs[number]
            traced_summary(job.function)
            shared_pass.scan_piece(job, range(start, stop))

    content = pickle.dumps([job.plain() for job in jobs])
    with _complains(jobs), apache_beam.Pipeline(options=parsed) as pipeline:
        _ = (
            pipeline
            | "pieces" >> apache_beam.Create(pieces)
            | "spread" >> apache_beam.Reshuffle()
            | "scan" >> apache_beam.ParDo(Scan(content))
        )
