"""Endless walks through the shares of one dataset: position i of walk w -> (pass, episode, frame). Pure NumPy.

What a walk has to do at the same time: show every usable frame once per pass, mix the frames of as many episodes as
memory holds, replace these episodes one after the other (no rush of reads, nothing held that is not in use), and tell
what is at any position without having been anywhere before.

Share    The episodes are dealt to the walks once, by a keyed permutation cut at equal frames.
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

All walks of a dataset are looked up together, with arrays of walks and positions: a batch of many lanes asks each for a
few samples only.
"""

import collections
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from octo_like.data.order.keys import extended_key, hash_key


@dataclasses.dataclass(frozen=True)
class DatasetFrames:
    """What the order must know of a dataset.

    Attributes:
      name: key of its random choices; other datasets in the mixture do not influence its walks.
      weight: share of the samples, relative to the others.
      frames: usable frames of each episode, (N,) integers; episodes with 0 are skipped.
      index_hash: identifies the data, recorded in the order spec.
      episodes_mixed: episodes that are shown, and are in memory, at the same time, of all walks together.
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


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, ..., start + length - 1 of each (start, length), after each other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _permuted(ranks: np.ndarray, group: np.ndarray | int, number: np.ndarray, bits: int) -> np.ndarray:
    """`number` (N,) of the members of groups, group after group, each in the order of the highest bits of `ranks`.

    Equal ranks are in the order of their numbers, so all values that are sorted differ and any algorithm sorts alike.

    Args:
      ranks: (N,) uint64. group: (N,) below 1024. number: (N,) below 2^bits.
    """
    packed = ranks >> np.uint64(10 + bits) << np.uint64(bits)
    packed |= np.asarray(number).astype(np.uint64)
    packed |= np.asarray(group).astype(np.uint64) << np.uint64(54)
    packed.sort()
    return (packed & np.uint64((1 << bits) - 1)).astype(np.int64)


def deal(data: DatasetFrames, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals episodes to `number` walks: a keyed permutation, cut at equal frames.

    Returns:
      (episodes with frames, walk after walk, rising in each; (number,) how many each walk has).
    """
    shown = data.shown
    usable = np.flatnonzero(shown > 0)
    if number == 1:
        return usable, np.array([len(usable)])
    ranks = hash_key(seed, "deal", data.name, usable)
    order = _permuted(ranks, 0, np.arange(len(usable)), len(usable).bit_length())
    ends = np.cumsum(shown[usable][order])
    cuts = np.searchsorted(ends, np.arange(1, number) * int(ends[-1]) / number, side="left") + 1
    # A few giant episodes must not leave a walk empty.
    for s in range(number - 1):
        cuts[s] = min(max(cuts[s], cuts[s - 1] + 1 if s else 1), len(order) - (number - 1 - s))
    sizes = np.diff(cuts, prepend=0, append=len(order))
    walk = np.empty(len(order), np.int16)
    walk[order] = np.repeat(np.arange(number, dtype=np.int16), sizes)
    return usable[np.argsort(walk, kind="stable")], sizes


class Walks:
    """The walks of a dataset. See the module. Immutable; keeps tables that are functions of its arguments.

    Attributes:
      number: G, of walks.
      key: (G,) uint64.
      tracks: (G,) K of each.
      frames_per_pass: (G,).
      whole: (G,) bool, whether a walk mixes all episodes of its share.
    """

    def __init__(self, data: DatasetFrames, number: int, seed: int):
        episodes, self._size = deal(data, number, seed)
        self.number, self._visits = number, data.visits
        self.key = hash_key(seed, "walk", data.name, np.arange(number))
        # Members: the episodes of all shares, one share after the other.
        self._first = np.cumsum(self._size) - self._size
        self._episode = episodes.astype(np.int32)
        self._bits = int(self._size.max()).bit_length()
        self._frames = np.asarray(data.frames)[self._episode].astype(np.int32)
        self._subsample = data.subsample
        # Which parts are the larger ones, when the frames of an episode cannot be divided by V, is keyed.
        turn = hash_key(np.repeat(self.key, self._size), "parts", self._episode) if data.visits > 1 else self._episode
        self._turn = (turn % data.visits).astype(np.int32)
        sizes = [np.add.reduceat(self._part_frames(part, slice(None)), self._first) for part in range(data.visits)]
        self._part_start = np.concatenate([np.zeros((number, 1), np.int64), np.cumsum(sizes, axis=0).T], axis=1)
        self.frames_per_pass = self._part_start[:, -1]
        mixed = max(1, data.episodes_mixed // number)
        self.tracks = self._size if data.episodes_mixed >= len(self._episode) else np.minimum(mixed, self._size)
        self._unit = np.maximum(1, np.rint(self.frames_per_pass / (self._size * data.visits))).astype(np.int64)
        self.whole = self.tracks == self._size
        # Tracks of all walks, one walk after the other.
        self._first_track = np.cumsum(self.tracks) - self.tracks
        walk = np.repeat(np.arange(number), self.tracks)
        track = np.arange(len(walk)) - self._first_track[walk]
        self._behind = np.where(self.whole[walk], 0, track * self._unit[walk] // self.tracks[walk])
        lengths = self._unit[walk] + self._behind  # of the first units
        before = np.cumsum(lengths) - lengths
        self._start = before - before[self._first_track][walk]
        self._rest = np.add.reduceat(lengths, self._first_track)  # where the second units begin
        # Two permutations of each share, of even and odd turns, with the cumulative frames of their parts. Those of
        # walk w are in [w stride, (w + 1) stride), so that one search serves all.
        self._stride = int(self.frames_per_pass.max()) + 1
        self._turn_of = np.full((2, number), -1)
        self._order = np.zeros(2 * len(self._episode), np.int32)
        self._ends = np.tile(np.repeat(np.arange(number) * self._stride, self._size), 2)

    def share(self, walk: int) -> np.ndarray:
        """Sorted episodes of a walk."""
        return self._episode[self._first[walk] : self._first[walk] + self._size[walk]].astype(np.int64)

    def _shown(self, members: np.ndarray | slice) -> np.ndarray:
        frames = self._frames[members].astype(np.int64)
        return frames if self._subsample is None else np.minimum(frames, self._subsample)

    def _cut(self, part: np.ndarray | int, members: np.ndarray | slice) -> np.ndarray:
        """Number, in the keyed order of each episode, of the first frame of a part."""
        return (part * self._shown(members) + self._turn[members]) // self._visits

    def _part_frames(self, part: np.ndarray | int, members: np.ndarray | slice) -> np.ndarray:
        return self._cut(part + 1, members) - self._cut(part, members)

    def line(self, walk: np.ndarray, rounds: np.ndarray, track: np.ndarray) -> np.ndarray:
        """Places on the lines of walks (N,) that `track` (N,) shows in `rounds` (N,)."""
        entry, unit = self._first_track[walk] + track, self._unit[walk]
        behind = self._behind[entry]
        first = rounds < unit + behind
        generation, shown = np.divmod(rounds - behind, unit)
        length = np.where(first, unit + behind, unit)
        shown = np.where(first, rounds, shown)
        shown = np.where((track % 2 == 1) & ~self.whole[walk], length - 1 - shown, shown)
        later = self._rest[walk] + ((generation - 1) * self.tracks[walk] + track) * unit
        return np.where(first, self._start[entry], later) + shown

    def at(self, walk: np.ndarray, places: np.ndarray) -> Found:
        """What is at places (N,) of the lines of walks (N,)."""
        passes, rest = np.divmod(places, self.frames_per_pass[walk])
        parts = (rest[:, None] >= self._part_start[walk, 1:]).sum(1)
        inside = rest - self._part_start[walk, parts]
        member, left = self._look_up(walk, passes * self._visits + parts, inside)
        number = self._cut(parts + 1, member) - left
        frames, shown = self._frames[member].astype(np.int64), self._shown(member)
        subset = shown < frames
        number = np.where(subset, (number + passes * shown) % frames, number)
        return Found(passes, self._episode[member].astype(np.int64), number, frames, np.where(subset, 0, passes + 1))

    def _look_up(self, walk: np.ndarray, turns: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(member, frames of its part that are left) at frames `inside` (N,) of the permutations `turns` (N,)."""
        member, left, even = np.empty_like(inside), np.empty_like(inside), turns % 2
        total = len(self._episode)
        waiting = np.arange(len(walk))
        while len(waiting):  # once, unless a walk is asked for several permutations of the same parity
            cell = even[waiting] * self.number + walk[waiting]
            cells, example = np.unique(cell, return_index=True)
            wanted = turns[waiting[example]]
            stale = self._turn_of.reshape(-1)[cells] != wanted
            if stale.any():
                self._fill(cells[stale] % self.number, wanted[stale])
            ready = self._turn_of.reshape(-1)[cell] == turns[waiting]
            for parity in (0, 1):
                rows = waiting[ready & (even[waiting] == parity)]
                if len(rows):
                    value = walk[rows] * self._stride + inside[rows]
                    ends = self._ends[parity * total : (parity + 1) * total]
                    which = np.searchsorted(ends, value, side="right")
                    member[rows], left[rows] = self._order[parity * total + which], ends[which] - value
            waiting = waiting[~ready]
        return member, left

    def _fill(self, walk: np.ndarray, turns: np.ndarray) -> None:
        """Makes the tables of permutations `turns` (n,) of different walks (n,)."""
        sizes = self._size[walk]
        rows = _ranges(self._first[walk], sizes)
        which = np.repeat(np.arange(len(walk)), sizes)
        # Keyed by the episodes' own numbers, not their place in the share.
        ranks = extended_key(hash_key(self.key[walk], "pass", turns)[which], self._episode[rows])
        first = self._first[walk][which]
        members = first + _permuted(ranks, which, rows - first, self._bits)
        ends = np.cumsum(self._part_frames((turns % self._visits)[which], members))
        before = np.concatenate([[0], ends])[np.cumsum(sizes) - sizes]
        places = rows + (turns % 2 * len(self._episode))[which]
        self._order[places] = members
        self._ends[places] = ends + (walk * self._stride - before)[which]
        self._turn_of[turns % 2, walk] = turns

    def live(self, walk: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Sorted episodes that walks (n,) are in the midst of at positions (n,); all of those that mix all."""
        whole = walk[self.whole[walk]]
        always = self._episode[_ranges(self._first[whole], self._size[whole])]
        rest = ~self.whole[walk]
        walk, rounds = walk[rest], position[rest] // self.tracks[walk[rest]]
        tracks = self.tracks[walk]
        each = np.repeat(walk, tracks)
        places = self.line(each, np.repeat(rounds, tracks), _ranges(np.zeros_like(tracks), tracks))
        return np.unique(np.concatenate([always, self.at(each, places).episode]))

    def draw(self, walk: int, position: int, near: bool, key: np.ndarray) -> tuple[int, int]:
        """(episode, frame) of a keyed draw, from an episode live at a position, or from anywhere in its pass."""
        tracks, per_pass, walks = int(self.tracks[walk]), int(self.frames_per_pass[walk]), np.array([walk])
        place = self.line(walks, np.array([position // tracks]), np.array([int(key % np.uint64(tracks))]))
        if not near:
            place = place // per_pass * per_pass + int(hash_key(key, "place") % np.uint64(per_pass))
        found = self.at(walks, place)
        return int(found.episode[0]), int(hash_key(key, "frame") % np.uint64(found.frames[0]))
