"""What training and validation share: episodes, texts, assembler, threads, and the count of what was damaged."""

import concurrent.futures
import logging
from collections.abc import Mapping

from octo_like.common.lanes import Processes
from octo_like.common.schema import BatchSpec
from octo_like.data.batches import memory
from octo_like.data.batches.assemble import Assembler, check_spec
from octo_like.data.batches.damage import DamageLog
from octo_like.data.batches.episodes import EpisodeSet, EpisodeStore
from octo_like.data.batches.gather import FrameGatherer
from octo_like.data.batches.pooled import PooledEpisodes
from octo_like.data.batches.texts import Texts
from octo_like.data.prepared import PreparedDataset
from octo_like.data.settings import Settings

REMOTE_READERS = 16  # threads that read from a bucket: they wait for the network most of the time

log = logging.getLogger(__name__)


class Reader:
    """Makes batches of the episodes of some datasets.

    Args:
      part: "train" or "val", the episodes of each dataset.
      batch_bytes: of host_memory_gb, what the caller keeps for batches.

    Attributes:
      sets: the episodes of each dataset.
      store, texts, damage: the episodes in memory, the table of instructions, the damaged records that were met.
      assemble: makes a batch of a request.
    """

    def __init__(
        self,
        datasets: Mapping[str, PreparedDataset],
        part: str,
        spec: BatchSpec,
        texts: Texts,
        settings: Settings,
        processes: Processes,
        batch_bytes: float = 0,
    ):
        check_spec(list(datasets.values()), spec)
        texts.check(spec, (text for one in datasets.values() for text in one.instructions))
        for prepared in datasets.values():
            texts.check_targets(prepared.key, prepared.targets)
            if prepared.spec.text_keys.get("subtask") is not None:
                texts.check_subtasks(prepared.key, prepared.targets)
        cameras, host = (spec.image_sizes, spec.depth_sizes), settings.host
        self.texts = texts
        self.sets = [
            EpisodeSet(prepared, getattr(prepared, part), texts, *cameras)
            if prepared.seekable
            else PooledEpisodes(prepared, getattr(prepared, part), texts, *cameras, processes)
            for prepared in datasets.values()
        ]
        self.damage = DamageLog(self.sets, host.max_bad_fraction)
        # Two pools: reading ahead must not queue in front of the frames of the present batch.
        remote = any("://" in path for of in self.sets for path in of.index.files[:1])
        readers = max(host.host_threads, REMOTE_READERS) if remote else host.host_threads
        self._readers = concurrent.futures.ThreadPoolExecutor(readers, "octo_like-read")
        self._decoders = concurrent.futures.ThreadPoolExecutor(host.host_threads, "octo_like-decode")
        limit = max(0, int(host.host_memory_gb * memory.STORED * 2**30 - batch_bytes))
        self.store = EpisodeStore(self.sets, self._readers, limit)
        frames = FrameGatherer(self.sets, spec, settings, self._decoders)
        self.assemble = Assembler(self.sets, spec, settings.task, self.store, texts, self.damage, frames)

    def close(self) -> None:
        if (summary := self.damage.summary()) is not None:
            log.warning(summary)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)
