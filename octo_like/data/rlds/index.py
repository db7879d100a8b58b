"""The index of a split as it is used: where its episodes are, how long they are, which of their steps may be samples.

Memory holds a few numbers per episode, whatever the size of the dataset. `cache.py` makes and keeps indices.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Index:
    """Index of one split, or of some of its episodes. Arrays have one entry per episode, except `bits`.

    Attributes:
      files: of the split; `file` is the number of each episode's.
      record: number of the record in its file.
      offset, length: bytes of the record.
      record_hash: of the record's bytes.
      raw_steps, steps: before and after standardisation.
      frames: steps that may be samples.
      first: number of the episode's first step among all steps of the split.
      bits: packed bits of all steps of the split, 1 for those that may be samples; None: all may.
      definition_hash: of everything that defines the episodes and the choice of their steps.
      folder: of the cache, for messages.
      pictures: keys below `observation` of what can be a camera's pictures or depth.
      picture_bytes: (N, pictures) of each; -1 where there is not one for each step. None: not known.
    """

    files: tuple[str, ...]
    file: np.ndarray  # int32
    record: np.ndarray  # int32
    offset: np.ndarray  # int64
    length: np.ndarray  # int64
    record_hash: np.ndarray  # int64
    raw_steps: np.ndarray  # int32
    steps: np.ndarray  # int32
    frames: np.ndarray  # int32
    has_language: np.ndarray  # bool
    first: np.ndarray  # int64
    bits: np.ndarray | None
    definition_hash: str
    folder: str = ""
    pictures: tuple[str, ...] = ()
    picture_bytes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.frames)

    def take(self, episodes: np.ndarray) -> Index:
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "bits"}
        return dataclasses.replace(self, **{k: v[episodes] for k, v in arrays.items() if isinstance(v, np.ndarray)})

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the episodes' content and their order, and their usable steps, wherever the files lie."""
        digest = hashlib.sha256(self.definition_hash.encode())
        for values in (self.record_hash, self.frames, *((self.first,) if self.bits is not None else ())):
            digest.update(values.astype("<i8").tobytes())
        if self.bits is not None:
            digest.update(self.bits.tobytes())
        return digest.hexdigest()[:16]

    def usable(self, episode: int) -> np.ndarray:
        """(frames,) sorted numbers of the episode's usable steps."""
        if self.bits is None:
            return np.arange(self.steps[episode])
        start, stop = int(self.first[episode]), int(self.first[episode]) + int(self.steps[episode])
        packed = self.bits[start // 8 : -(-stop // 8)]
        return np.flatnonzero(np.unpackbits(packed)[start % 8 :][: stop - start])

    def step_of(self, episode: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Step numbers (N,) of the `frame`-th (N,) usable steps of `episode` (N,)."""
        if self.bits is None:
            return np.asarray(frame)
        return np.array([self.usable(e)[f] for e, f in zip(episode, frame, strict=True)], np.int64)

    def where(self, episode: int) -> str:
        """'file: episode number', for messages."""
        return f"{self.files[self.file[episode]]}: episode {self.record[episode]}"


@dataclasses.dataclass(frozen=True)
class SplitIndex:
    """The index of a whole split and what is kept beside it.

    Attributes:
      index: its episodes; usable are those steps that the user's filter left.
      folder: of the cache.
      instructions: every instruction and the number of episodes that have it.
      damaged: one message per record that cannot be read or used; these are not in `index`.
      targets: every text that is to be learned, where it is a feature of the files.
      made: when its file was written, see `octo_like.common.storage.Found`.
      rows_digest: the SHA-256 (hex) of the file of rows; None: not known.
    """

    index: Index
    folder: str
    instructions: dict[str, int]
    damaged: tuple[str, ...]
    targets: tuple[str, ...] = ()
    made: int = 0
    rows_digest: str | None = None

    @property
    def rows_path(self) -> str:
        return os.path.join(self.folder, "rows.npy")


def digest_of(*parts: Any) -> str:
    """20 hex digits of arrays and plain data."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:20]


def with_usable(index: Index, usable: np.ndarray, definition: dict[str, Any]) -> Index:
    """The index of a whole split with a choice of its steps, (all steps,) bool."""
    sums = np.concatenate([[0], np.cumsum(usable, dtype=np.int64)])
    frames = (sums[index.first + index.steps] - sums[index.first]).astype(np.int32)
    digest = digest_of(index.definition_hash, definition)
    return dataclasses.replace(index, frames=frames, bits=np.packbits(usable), definition_hash=digest)
