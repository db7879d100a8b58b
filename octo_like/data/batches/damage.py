"""Records that turn out to be damaged while training: counted, named once, and fatal when there are too many.

What is damaged is a property of the files, so the samples that are substituted, and by what, are the same in every
run over the same files. Only the counts start anew with each process.
"""

import logging
import threading
from collections.abc import Sequence

from octo_like.data.rlds.bad_records import MAX_BAD_FRACTION, check
from octo_like.data.rlds.index import Index
from octo_like.data.rlds.prepare import PreparedDataset
from octo_like.data.spec import DataError

log = logging.getLogger(__name__)


class DamageLog:
    """Counts distinct damaged records per dataset. Safe to call from several threads.

    Args:
      sources: the datasets of a reader and the episodes that it reads of each.
      max_fraction: share of a dataset's episodes that may be damaged.
    """

    def __init__(self, sources: Sequence[tuple[PreparedDataset, Index]], max_fraction: float = MAX_BAD_FRACTION):
        if not 0 <= max_fraction <= 1:
            raise DataError(f"max_bad_fraction must be in [0, 1], got {max_fraction}")
        self._sources, self._max_fraction = sources, max_fraction
        self._seen: list[set[int]] = [set() for _ in sources]
        self._gone: set[str] = set()  # files
        self._lock = threading.Lock()

    def report(self, dataset: int, episode: int, reason: str, *, file_gone: bool = False) -> None:
        """Notes a damaged record (once), with a message that names file and episode.

        Args:
          file_gone: it was not found; the log names the file once, and not again for each of its episodes.

        Raises:
          DataError: it is one too many.
        """
        with self._lock:
            if episode in self._seen[dataset]:
                return
            self._seen[dataset].add(episode)
            count = len(self._seen[dataset])
            prepared, index = self._sources[dataset]
            file, is_news = index.files[index.file[episode]], True
            if file_gone:
                is_news = file not in self._gone
                self._gone.add(file)
                lost = int((index.file == index.file[episode]).sum())
                reason = f"{file} is gone, and with it {lost} of {len(index)} episodes"
        check(prepared.key, count, len(index), self._max_fraction, reason)
        if is_news:
            log.warning(
                "%s: damaged record %d (of %d allowed), others take its place: %s",
                prepared.key,
                count,
                int(self._max_fraction * len(index)),
                reason,
            )

    @property
    def counts(self) -> dict[str, int]:
        """{dataset: distinct damaged records met}."""
        return {prepared.key: len(seen) for (prepared, _), seen in zip(self._sources, self._seen, strict=True)}

    def summary(self) -> str | None:
        """One line for the end of a run; None when nothing was damaged."""
        parts = [
            f"{prepared.key} {len(seen)} of {len(index)}"
            for (prepared, index), seen in zip(self._sources, self._seen, strict=True)
            if seen
        ]
        return f"damaged records met: {', '.join(parts)}" if parts else None
