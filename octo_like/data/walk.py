"""One lane's endless walk through its share of one dataset: position i -> (pass, episode, frame). Pure NumPy.

What a walk has to do at the same time: show every usable frame once per pass, mix the frames of as many episodes as
memory holds, replace these episodes one after the other (no rush of reads, nothing held that is not in use), and tell
what is at any position without having been anywhere before.

Line     A pass is a permutation of the share; with V visits it is V permutations, each of which shows another V-th of
         every episode's frames. Passes laid end to end are the *line*: an endless row of frames, in which an episode's
         (or a part's) frames lie side by side.
Tracks   The line is cut into units of c frames, the mean length of a part. K tracks take the units in turn: track k
         shows unit k, then K + k, and so on, one frame in each *round*. A round shows the next frame of every track,
         tracks in keyed order: K consecutive samples come from K places of the line.
Stagger  Track k is k c / K rounds behind track 0 (its first unit is so much longer), so units end one at a time.
Mirror   Odd tracks show their units backwards: the two ends of a part that a cut has divided are shown at the same
         time, and the part is in memory once, for no longer than a unit lasts.

A walk that mixes all episodes of its share holds them all the time: it is neither staggered nor mirrored.
"""

import collections
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from octo_like.data.keys import hash_key


@dataclasses.dataclass(frozen=True)
class DatasetFrames:
    """What the order must know of a dataset.

    Attributes:
      name: key of its random choices; other datasets in the mixture do not influence its walk.
      weight: share of the samples, relative to the others.
      frames: usable frames of each episode, (N,) integers; episodes with 0 are skipped.
      index_hash: identifies the data, recorded in the order spec.
      episodes_mixed: K, the episodes (of a lane) that are shown, and are in memory, at the same time.
      subsample: frames of an episode that one pass shows, None for all. An episode's frames are in a keyed order, of
        which each pass takes the next ones, round and round: ceil(frames / subsample) passes show all.
      visits: V, parts into which a pass divides the frames of each episode. More parts mix more episodes into as many
        samples, in the same memory, and read each episode that often.
    """

    name: str
    weight: float
    frames: np.ndarray
    index_hash: str = ""
    episodes_mixed: int = 256
    subsample: int | None = None
    visits: int = 1

    @property
    def shown(self) -> np.ndarray:
        """Frames of each episode that one pass shows, (N,) int64."""
        frames = np.asarray(self.frames, np.int64)
        return frames if self.subsample is None else np.minimum(frames, self.subsample)


class Cache(collections.OrderedDict):
    """The few most recently used values of a pure function of the key."""

    def __init__(self, size: int):
        super().__init__()
        self._size = size

    def fetch(self, key: Any, make: Any) -> Any:
        if key in self:
            self.move_to_end(key)
        else:
            self[key] = make()
            if len(self) > self._size:
                self.popitem(last=False)
        return self[key]


class Found(NamedTuple):
    """Equally long arrays: what is at some places of the line."""

    pass_number: np.ndarray
    episode: np.ndarray
    number: np.ndarray  # of the frame in the keyed order of its episode
    frames: np.ndarray  # usable frames of the episode
    cycle: np.ndarray  # which keyed order: a new one in each pass, or 0, the same in all, when passes show subsets


class Walk:
    """See the module. `key` is a uint64 scalar; `share` are the sorted episodes that the walk shows."""

    def __init__(self, data: DatasetFrames, share: np.ndarray, key: np.ndarray):
        self.key, self._share = key, share
        self._frames, self._shown = np.asarray(data.frames, np.int64)[share], data.shown[share]
        self._visits = data.visits
        # Which parts are the larger ones, when the frames of an episode cannot be divided by V, is keyed.
        self._turn = (hash_key(key, "parts", share) % np.uint64(data.visits)).astype(np.int64)
        sizes = [int((self._cut(part + 1) - self._cut(part)).sum()) for part in range(data.visits)]
        self._part_start = np.concatenate([[0], np.cumsum(sizes)])
        self.frames_per_pass = int(self._part_start[-1])
        self.tracks = min(data.episodes_mixed, len(share))
        self._unit = max(1, round(self.frames_per_pass / (len(share) * data.visits)))
        self.whole = self.tracks == len(share)
        self._behind = np.arange(self.tracks) * (0 if self.whole else self._unit) // self.tracks
        lengths = self._unit + self._behind  # of the first units
        self._start = np.cumsum(lengths) - lengths
        self._rest = int(lengths.sum())  # where the second units begin
        self._tables = Cache(4)

    def _cut(self, part: int, members: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Number, in the keyed order of each episode, of the first frame of a part."""
        return (part * self._shown[members] + self._turn[members]) // self._visits

    def line(self, rounds: np.ndarray, tracks: np.ndarray) -> np.ndarray:
        """Places on the line (N,) that `tracks` (N,) show in `rounds` (N,)."""
        behind = self._behind[tracks]
        first = rounds < self._unit + behind
        generation, shown = np.divmod(rounds - behind, self._unit)
        length = np.where(first, self._unit + behind, self._unit)
        shown = np.where(first, rounds, shown)
        if not self.whole:
            shown = np.where(tracks % 2 == 1, length - 1 - shown, shown)
        later = self._rest + ((generation - 1) * self.tracks + tracks) * self._unit
        return np.where(first, self._start[tracks], later) + shown

    def at(self, places: np.ndarray) -> Found:
        """What is at places of the line (N,)."""
        passes, rest = np.divmod(places, self.frames_per_pass)
        parts = np.searchsorted(self._part_start, rest, side="right") - 1
        inside = rest - self._part_start[parts]
        member, number = np.empty_like(rest), np.empty_like(rest)
        turns = passes * self._visits + parts
        for turn in np.unique(turns).tolist():
            rows, part = np.flatnonzero(turns == turn), turn % self._visits
            order, ends = self._tables.fetch(turn, lambda turn=turn: self._table(turn))
            which = np.searchsorted(ends, inside[rows], side="right")
            member[rows] = members = order[which]
            number[rows] = self._cut(part + 1, members) - (ends[which] - inside[rows])
        frames, shown = self._frames[member], self._shown[member]
        subset = shown < frames
        number = np.where(subset, (number + passes * shown) % frames, number)
        return Found(passes, self._share[member], number, frames, np.where(subset, 0, passes + 1))

    def _table(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """(the share's members in the order of one permutation, cumulative frames of their parts)."""
        # Keyed by the episodes' own numbers, not their place in the share.
        order = np.argsort(hash_key(self.key, "pass", turn, self._share), kind="stable")
        part = turn % self._visits
        return order, np.cumsum(self._cut(part + 1, order) - self._cut(part, order))

    def live(self, position: int) -> np.ndarray:
        """Sorted episodes that the walk is in the midst of at a position; all, when it mixes all."""
        if self.whole:
            return self._share
        tracks = np.arange(self.tracks)
        return np.unique(self.at(self.line(np.full(self.tracks, position // self.tracks), tracks)).episode)

    def draw(self, position: int, near: bool, key: np.ndarray) -> tuple[int, int]:
        """(episode, frame) of a keyed draw, from an episode live at a position, or from anywhere in its pass."""
        rounds, track = position // self.tracks, int(key % np.uint64(self.tracks))
        place = self.line(np.array([rounds]), np.array([track]))
        if not near:
            first = place // self.frames_per_pass * self.frames_per_pass
            place = first + int(hash_key(key, "place") % np.uint64(self.frames_per_pass))
        found = self.at(place)
        return int(found.episode[0]), int(hash_key(key, "frame") % np.uint64(found.frames[0]))
