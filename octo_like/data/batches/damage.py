"""Records that turn out to be damaged while training: counted, named once, and fatal when there are too many.

What is damaged is a property of the files, so the samples that are substituted, and by what, are the same in every
run over the same files. Only the counts start anew with each process.
"""

import logging
import threading
from collections.abc import Sequence

from octo_like.data.batches.episodes import EpisodeSet
from octo_like.data.rlds.bad_records import check

log = logging.getLogger(__name__)


class DamageLog:
    """Counts distinct damaged records per dataset. Safe to call from several threads.

    Args:
      sets: the episodes that batches are made of, of each dataset.
      max_fraction: share of a dataset's episodes that may be damaged.
    """

    def __init__(self, sets: Sequence[EpisodeSet], max_fraction: float):
        self._sets, self._max_fraction = sets, max_fraction
        self._seen: list[set[int]] = [set() for _ in sets]
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
            key, index = self._sets[dataset].prepared.key, self._sets[dataset].index
            file, is_news = index.files[index.file[episode]], True
            if file_gone:
                is_news = file not in self._gone
                self._gone.add(file)
                lost = int((index.file == index.file[episode]).sum())
                reason = f"{file} is gone, and with it {lost} of {len(index)} episodes"
        check(key, count, len(index), self._max_fraction, reason)
        if is_news:
            log.warning(
                "%s: damaged record %d (of %d allowed), others take its place: %s",
                key,
                count,
                int(self._max_fraction * len(index)),
                reason,
            )

    @property
    def counts(self) -> dict[str, int]:
        """{dataset: distinct damaged records met}."""
        return {of.prepared.key: len(seen) for of, seen in zip(self._sets, self._seen, strict=True)}

    def summary(self) -> str | None:
        """One line for the end of a run; None when nothing was damaged."""
        parts = [
            f"{of.prepared.key} {len(seen)} of {len(of.index)}"
            for of, seen in zip(self._sets, self._seen, strict=True)
            if seen
        ]
        return f"damaged records met: {', '.join(parts)}" if parts else None
