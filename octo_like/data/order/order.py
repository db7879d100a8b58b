"""The order of the data is a function: sample number n -> (dataset, pass, episode, frame, key). Pure NumPy.

Nothing here reads a file or keeps a position. Everything follows from the *order spec*: the seed, the datasets with
their weights and usable frames per episode, the batch size, the number of lanes S, and for each dataset the number of
episodes that are mixed and of visits.

Lanes      The stream is S lanes. Lane s owns rows [s B/S, (s+1) B/S) of every global batch; a process opens the lanes
           of the rows it holds, so more or fewer processes continue the same global sequence.
Mixture    Samples come in windows of about 4,096, of which a lane has w. Lane s fills its k-th part of w slots with
           the quotas of "virtual window" v = k S + s, which are the increments of integer counts c_d(m) that sum to m,
           never decrease, stay within 2 of m w_d and repeat after PERIOD windows (`mixture.py`). The slots of a lane's
           part are in keyed order. So the counts before any window are a multiple of those of a period, and a look into
           a table of one period.
Walks      A dataset has G walks, each with a share of its episodes (`walk.py`); S / G adjacent lanes take the samples
           of a walk in turn. G divides S, and leaves each walk at least SHARED of the episodes that are mixed: many
           lanes cost no memory. Which samples of a walk a process needs follows from the windows, which all know.
Randomness All keys are 64-bit hashes of (seed, what, which); nothing depends on what was asked for before.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from octo_like.common.lanes import check_lanes, divisors
from octo_like.data.order.keys import hash_key, permutation, shuffled, uniform
from octo_like.data.order.mixture import Mixture, balanced_weights
from octo_like.data.order.walk import Cache, DatasetFrames, Walks

__all__ = ["DatasetFrames", "Mixture", "Order", "Samples", "balanced_weights", "hash_key", "permutation", "uniform"]

WINDOW = 4096
PERIOD = 256  # windows after which the mixture's counts repeat
SHARED = 4  # episodes that a walk mixes at least, unless there is only one walk
VERSION = 3
NEAR = 8  # substitutes that are drawn from the episodes that are live with the sample's own


class Samples(NamedTuple):
    """Struct of equally long arrays, one entry per sample."""

    n: np.ndarray  # int64 global sample number
    dataset: np.ndarray  # int32
    lane: np.ndarray  # int32
    walk: np.ndarray  # int32, of the dataset's walks
    position: np.ndarray  # int64, samples that have been taken of the walk before
    pass_number: np.ndarray  # int64
    episode: np.ndarray  # int64, index into DatasetFrames.frames
    frame: np.ndarray  # int64, number of the usable frame within the episode
    key: np.ndarray  # uint64, keys everything random about this sample


class Order:
    """The order of a run. Immutable; caches only what is a function of its arguments.

    Args:
      datasets: the mixture; the position in this list is the `dataset` number of a sample.
      seed: any integer.
      batch_size: B, the global batch size.
      num_lanes: S, which divides B.

    Raises:
      ValueError: what is wrong with the mixture or the lanes, and what would be valid.
    """

    def __init__(self, datasets: Sequence[DatasetFrames], *, seed: int, batch_size: int, num_lanes: int = 1):
        names = [data.name for data in datasets]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ValueError(f"duplicate dataset names in the mixture: {', '.join(doubles)}")
        check_lanes(num_lanes, batch_size)
        for data in datasets:
            for field in ("episodes_mixed", "visits"):
                if getattr(data, field) < 1:
                    raise ValueError(f"{data.name}: {field} must be at least 1, got {getattr(data, field)}")
            if data.subsample is not None and data.subsample < 1:
                raise ValueError(f"{data.name}: subsample must be at least 1 or None, got {data.subsample}")
            if data.weight > 0 and np.sum(data.frames) < 1:
                raise ValueError(f"{data.name}: no usable frames, but weight {data.weight}")
        self.datasets = tuple(datasets)
        self.seed, self.batch_size, self.num_lanes = int(seed), int(batch_size), int(num_lanes)
        self._rows = batch_size // num_lanes  # rows per lane in a batch
        self._slots = max(1, WINDOW // num_lanes)  # slots of a lane in a window
        self.window = self._slots * num_lanes
        self.mixture = Mixture([data.weight for data in datasets], PERIOD * self.window)
        shared = [min(data.episodes_mixed, int(np.count_nonzero(data.frames))) // SHARED for data in datasets]
        self.num_walks = np.array([max(g for g in divisors(num_lanes) if g <= max(1, most)) for most in shared])
        self._first_walk = np.cumsum(self.num_walks) - self.num_walks  # walks of all datasets have numbers in a row
        self._table: tuple[np.ndarray, np.ndarray] | None = None
        self._windows = Cache(16)
        self._walks: dict[int, Walks] = {}

    # -- walks

    def walks(self, dataset: int) -> Walks:
        """The walks of a dataset."""
        if dataset not in self._walks:
            self._walks[dataset] = Walks(self.datasets[dataset], int(self.num_walks[dataset]), self.seed)
        return self._walks[dataset]

    def walk_of(self, dataset: np.ndarray | int, lane: np.ndarray) -> np.ndarray:
        """Which of the dataset's walks the lanes take samples of."""
        return lane * self.num_walks[dataset] // self.num_lanes

    def live(self, batch: int, process_index: int = 0, process_count: int = 1) -> list[tuple[int, int]]:
        """(dataset, episode) pairs that a process's lanes are in the midst of before a batch: what it has to hold."""
        pairs: list[tuple[int, int]] = []
        taken = self._taken(batch)
        here = self.num_lanes // process_count
        lanes = np.arange(process_index * here, (process_index + 1) * here)
        for d in np.flatnonzero(self.mixture.units).tolist():
            walk = np.unique(self.walk_of(d, lanes))
            pairs += [(d, e) for e in self.walks(d).live(walk, taken[self._first_walk[d] + walk]).tolist()]
        return pairs

    # -- windows

    def _before(self, window: int) -> np.ndarray:
        """Samples of each dataset that each lane has taken before a window, (S, D) int64."""
        if self._table is None:
            S, D = self.num_lanes, len(self.datasets)
            counts = self.mixture.counts(np.arange(PERIOD * S + 1) * self._slots).T.astype(np.int32)
            quotas = np.diff(counts).reshape(D, PERIOD, S)
            sums = np.cumsum(quotas, axis=1, dtype=np.int32)
            self._table = sums - quotas, sums[:, -1].astype(np.int64)
        before, period = self._table
        return (window // PERIOD * period + before[:, window % PERIOD]).T

    def _walks_before(self, window: int) -> np.ndarray:
        """Samples taken of each walk of all datasets before a window, (walks,)."""
        before = self._before(window)
        taken = np.empty(int(self.num_walks.sum()), np.int64)
        for number in np.unique(self.num_walks).tolist():
            of = np.flatnonzero(self.num_walks == number)
            sums = before[:, of].reshape(number, -1, len(of)).sum(1)  # of the lanes that share a walk
            taken[self._first_walk[of] + np.arange(number)[:, None]] = sums
        return taken

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, position in its walk) of every slot of a window, (S, slots) each: lane after lane."""
        return self._windows.fetch(window, lambda: self._make_window(window))

    def _make_window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        S, w, D = self.num_lanes, self._slots, len(self.datasets)
        quotas = np.diff(self.mixture.counts((window * S + np.arange(S + 1)) * w), axis=0)
        grouped = np.repeat(np.tile(np.arange(D), S), quotas.reshape(-1)).reshape(S, w)
        lanes = np.arange(S)[:, None]
        keys = hash_key(self.seed, "mixture", lanes, window, np.arange(w))
        dataset = np.take_along_axis(grouped, np.argsort(keys, axis=1, kind="stable"), axis=1)
        # Lanes take the samples of a walk in the order in which they are shown: slot after slot, lane after lane.
        walk = (self._first_walk[dataset] + self.walk_of(dataset, lanes)).T.reshape(-1)
        by_walk = np.argsort(walk, kind="stable")
        first = np.searchsorted(walk[by_walk], walk[by_walk], side="left")
        position = np.empty(S * w, np.int64)
        position[by_walk] = self._walks_before(window)[walk[by_walk]] + np.arange(S * w) - first
        return dataset, position.reshape(w, S).T

    def _taken(self, batch: int) -> np.ndarray:
        """Samples taken of each walk of all datasets before a batch, (walks,)."""
        window, slot = divmod(batch * self._rows, self._slots)
        taken = self._walks_before(window)
        if slot:
            dataset = self._window(window)[0][:, :slot]
            walk = self._first_walk[dataset] + self.walk_of(dataset, np.arange(self.num_lanes)[:, None])
            taken += np.bincount(walk.reshape(-1), minlength=len(taken))
        return taken

    # -- samples

    def samples(self, n: np.ndarray | Sequence[int]) -> Samples:
        """Where the samples numbered `n` (N,) come from. Any n, in any order, at the cost of a few table look-ups."""
        n = np.asarray(n, np.int64).reshape(-1)
        if (n < 0).any():
            raise ValueError(f"sample numbers start at 0, got {n.min()}")
        batch, row = np.divmod(n, self.batch_size)
        lane, lane_row = np.divmod(row, self._rows)
        window, slot = np.divmod(batch * self._rows + lane_row, self._slots)
        dataset, position = np.empty_like(n), np.empty_like(n)
        for rows, which in _groups(window):
            dataset[rows], position[rows] = (table[lane[rows], slot[rows]] for table in self._window(which))
        walk = self.walk_of(dataset, lane)
        groups = [(self.walks(d), rows) for rows, d in _groups(dataset)]
        # Per sample: the key of its walk and its tracks. The permutations are then looked up for all samples at once.
        walk_key, tracks = np.empty(len(n), np.uint64), np.empty_like(n)
        for walks, rows in groups:
            walk_key[rows], tracks[rows] = walks.key[walk[rows]], walks.tracks[walk[rows]]
        rounds, turn = np.divmod(position, tracks)
        track = shuffled(turn, tracks, hash_key(walk_key, "round", rounds))
        passes, episode, number, frames, cycle = (np.empty_like(n) for _ in range(5))
        for walks, rows in groups:
            found = walks.at(walk[rows], walks.line(walk[rows], rounds[rows], track[rows]))
            passes[rows], episode[rows], number[rows], frames[rows], cycle[rows] = found
        frame = shuffled(number, frames, hash_key(walk_key, "frames", cycle, episode))
        of, on, by = (x.astype(np.int32) for x in (dataset, lane, walk))
        return Samples(n, of, on, by, position, passes, episode, frame, hash_key(self.seed, "sample", n))

    def batch_rows(self, batch: int, process_index: int = 0, process_count: int = 1) -> np.ndarray:
        """Sample numbers of a process's rows of a global batch, int64."""
        check_lanes(self.num_lanes, self.batch_size, process_count)
        local = self.batch_size // process_count
        return batch * self.batch_size + process_index * local + np.arange(local, dtype=np.int64)

    def substitute(self, n: int, attempt: int) -> tuple[int, int]:
        """(episode, frame) of the keyed `attempt`-th substitute for a damaged sample n.

        The first NEAR attempts draw from the episodes that are live with the sample's own, which are in memory; later
        ones from the walk's whole pass, because these may have nothing else that is good.
        """
        sample = self.samples([n])
        key = hash_key(self.seed, "substitute", n, attempt)
        return self.walks(int(sample.dataset[0])).draw(
            int(sample.walk[0]), int(sample.position[0]), attempt < NEAR, key
        )

    def counts(self, n: int) -> np.ndarray:
        """Samples of each dataset among the first n of the run, (D,) int64."""
        full, rest = divmod(int(n), self.batch_size)
        done = full * self._rows + np.clip(rest - np.arange(self.num_lanes) * self._rows, 0, self._rows)  # of each lane
        first = full * self._rows // self._slots
        total = self.mixture.counts(first * self.window)
        for window in range(first, -(-int(done.max()) // self._slots)):
            shown = window * self._slots + np.arange(self._slots) < done[:, None]
            total += np.bincount(self._window(window)[0][shown], minlength=len(total))
        return total

    def spec(self) -> dict[str, Any]:
        """JSON-able description that determines the order entirely."""
        return {
            "version": VERSION,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "num_lanes": self.num_lanes,
            "window": self.window,
            "datasets": [
                {
                    "name": data.name,
                    "weight": float(weight),
                    "episodes": int(len(data.frames)),
                    "frames": int(np.sum(data.frames)),
                    "index_hash": data.index_hash,
                    "episodes_mixed": int(data.episodes_mixed),
                    "visits": int(data.visits),
                    "subsample": data.subsample,
                }
                for data, weight in zip(self.datasets, self.mixture.given, strict=True)
            ],
        }


def _groups(values: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """(rows, value) of each value that occurs, in rising order."""
    order = np.argsort(values, kind="stable")
    found, first = np.unique(values[order], return_index=True)
    yield from zip(np.split(order, first[1:]), found.tolist(), strict=True)


def spec_differences(saved: Any, current: Any, where: str = "") -> list[str]:
    """Readable differences between two order specs; empty when a run may be resumed."""
    if isinstance(saved, dict) and isinstance(current, dict):
        lines = []
        for key in sorted(set(saved) | set(current)):
            path = f"{where}.{key}" if where else key
            if key not in saved or key not in current:
                lines.append(f"{path}: {'added' if key in current else 'removed'}")
            else:
                lines += spec_differences(saved[key], current[key], path)
        return lines
    if isinstance(saved, list) and isinstance(current, list):
        if all(isinstance(item, dict) and "name" in item for item in [*saved, *current]):
            before, after = ({item["name"]: item for item in items} for items in (saved, current))
            lines = spec_differences(before, after, where)
            order = [[item["name"] for item in items] for items in (saved, current)]
            return lines if lines or order[0] == order[1] else [f"{where}: reordered, {order[0]} -> {order[1]}"]
    return [] if saved == current else [f"{where}: {saved!r} -> {current!r}"]
