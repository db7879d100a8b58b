"""What reads for a stream or for validation: episodes, texts, assembler, threads, and the count of what was damaged."""

import concurrent.futures
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from octo_like.common.schema import BatchSpec
from octo_like.common.text import TextTokenizer
from octo_like.data.batches import memory
from octo_like.data.batches.assemble import Assembler, TaskOptions, check_spec
from octo_like.data.batches.buffers import Buffers
from octo_like.data.batches.damage import DamageLog
from octo_like.data.batches.episodes import EpisodeStore
from octo_like.data.batches.frames import MODES
from octo_like.data.batches.texts import Paraphrases, Texts
from octo_like.data.rlds.bad_records import MAX_BAD_FRACTION
from octo_like.data.rlds.prepare import PreparedDataset, prepare_datasets
from octo_like.data.spec import DataError, specs_from_config, suggest

REMOTE_READERS = 16  # threads that read from a bucket: they wait for the network most of the time

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """Knobs of this machine. None of them changes a batch by itself; see `memory.plan_mixed` for memory_gb.

    Attributes:
      threads: threads that decode frames (and as many that read episodes; 16 of them from a bucket).
      prefetch: batches made ahead of the consumer.
      memory_gb: what encoded episodes and batches may take. Episodes that do not fit are read again when needed.
      max_bad_fraction: share of a dataset's records that may be damaged.
    """

    threads: int = 2
    prefetch: int = 2
    memory_gb: float = 4.0
    max_bad_fraction: float = MAX_BAD_FRACTION

    def __post_init__(self):
        if self.threads < 1 or self.prefetch < 1 or self.memory_gb <= 0:
            raise DataError(f"threads and prefetch must be at least 1, memory_gb positive; got {self}")


def prepare_mixture(
    specs: Mapping[str, Any], data_dir: str | None, cache_dir: str | None, progress: bool, **options: Any
) -> dict[str, PreparedDataset]:
    if specs and all(isinstance(value, PreparedDataset) for value in specs.values()):
        return dict(specs)
    specs = specs_from_config(specs)
    if data_dir is None and any(spec.source is None for spec in specs.values()):
        raise DataError("data_dir is needed to read datasets")
    return prepare_datasets(specs, data_dir or "", cache_dir, progress, **options)


class Reader:
    """What training and validation share: store, table of texts, assembler, threads."""

    def __init__(
        self,
        sources: list[tuple[PreparedDataset, Any]],
        spec: BatchSpec,
        tokenizer: TextTokenizer | None,
        task: TaskOptions,
        decode: str,
        host: HostOptions,
        paraphrases: Paraphrases | None,
        batch_bytes: float = 0,
    ):
        if decode not in MODES:
            raise DataError(f"decode mode {decode!r}; {suggest(decode, MODES)}")
        if spec.language_length is not None:
            if tokenizer is None:
                raise DataError("batches have language, but no text tokenizer was given")
            if tokenizer.max_length != spec.language_length:
                raise DataError(
                    f"the tokenizer makes {tokenizer.max_length} ids, but batches hold language_length="
                    f"{spec.language_length}"
                )
        check_spec([prepared for prepared, _ in sources], spec)
        texts = Texts(tokenizer, paraphrases, task.paraphrase_prob)
        self.texts = texts
        texts.check(text for prepared, _ in sources for text in prepared.instructions)
        self.damage = DamageLog(sources, host.max_bad_fraction)
        # Two pools: reading ahead must not queue in front of the frames of the present batch.
        remote = any("://" in path for _, index in sources for path in index.files[:1])
        readers = max(host.threads, REMOTE_READERS) if remote else host.threads
        self._readers = concurrent.futures.ThreadPoolExecutor(readers, "octo_like-read")
        self._decoders = concurrent.futures.ThreadPoolExecutor(host.threads, "octo_like-decode")
        limit = max(0, int(host.memory_gb * memory.STORED * 2**30 - batch_bytes))
        self.store = EpisodeStore(sources, spec.image_sizes, texts, self._readers, limit, spec.depth_sizes)
        self.assemble = Assembler(
            sources,
            spec,
            self.store,
            texts,
            self.damage,
            self._decoders,
            task=task,
            decode=decode,
            threads=host.threads,
            buffers=Buffers(host.prefetch + 2),  # made ahead, being made, and in use
        )

    def close(self) -> None:
        if (summary := self.damage.summary()) is not None:
            log.warning(summary)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)
