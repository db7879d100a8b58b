"""The order of the data is a function: sample number n -> (dataset, pass, episode, frame, key). Pure NumPy.

Nothing here reads a file or keeps a position. Everything follows from the *order spec*: the seed, the datasets with
their weights and usable frames per episode, the batch size, the number of lanes S, and for each dataset the number of
episodes that are mixed and of visits.

Lanes      The stream is S lanes. Lane s owns rows [s B/S, (s+1) B/S) of every global batch; a process opens the lanes
           of the rows it holds, so more or fewer processes continue the same global sequence.
Mixture    Lane s fills its k-th window of WINDOW/S slots with the quotas of "virtual window" v = k S + s. The quotas
           are the increments of integer counts c_d(m) that sum to m, never decrease, and stay within 2 of m w_d (a
           Huffman tree of exact two-way splits). A window's slots are in keyed order. Per-dataset counts at any n are
           arithmetic.
Episodes   A dataset is dealt to the lanes once, by a keyed permutation cut at equal frames; one with fewer than 4 S
           episodes is walked whole by every lane with its own key. How a lane walks its share is in `walk.py`: in a
           new keyed permutation per pass, mixing the frames of a number of episodes that replace each other gradually.
           Finding sample n takes a divmod and two searches in cumulative sums.
Randomness All keys are 64-bit hashes of (seed, what, which); nothing depends on what was asked for before.
"""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from octo_like.data.keys import hash_key, permutation, shuffled, uniform
from octo_like.data.walk import Cache, DatasetFrames, Walk

__all__ = ["DatasetFrames", "Mixture", "Order", "Samples", "balanced_weights", "hash_key", "permutation", "uniform"]

WINDOW = 4096
VERSION = 2
NEAR = 8  # substitutes that are drawn from the episodes that are live with the sample's own
_SPLIT_BITS = 40
_MAX_SAMPLES = 1 << 44


# ---------------------------------------------------------------- mixture


class Mixture:
    """Exact integer counts per dataset: `counts(m)[d]` of the first m samples, |count - m w_d| <= 2, sum exactly m."""

    def __init__(self, weights: Sequence[float]):
        weights = np.asarray(weights, np.float64)
        if weights.ndim != 1 or not len(weights) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"mixture weights must be non-negative finite numbers, got {weights.tolist()}")
        if weights.sum() <= 0:
            raise ValueError("all mixture weights are zero")
        self.weights = weights / weights.sum()
        # Merging the two lightest nodes first keeps every inner share at most 2/3, which bounds the error by 2.
        heap: list[tuple[float, int]] = [(w, d) for d, w in enumerate(self.weights.tolist()) if w > 0]
        heapq.heapify(heap)
        self._splits: list[tuple[int, int, int, int]] = []  # (node, left, right, share of left in units of 2^-40)
        node = len(weights)
        while len(heap) > 1:
            (wa, a), (wb, b) = heapq.heappop(heap), heapq.heappop(heap)
            self._splits.append((node, a, b, round(wa / (wa + wb) * (1 << _SPLIT_BITS))))
            heapq.heappush(heap, (wa + wb, node))
            node += 1
        self._root, self._nodes = heap[0][1], node
        self._splits.reverse()

    def counts(self, m: np.ndarray | int) -> np.ndarray:
        """Counts (..., D) int64 among the first `m` (...,) samples."""
        m = np.asarray(m, np.int64)
        if (m < 0).any() or (m >= _MAX_SAMPLES).any():
            raise ValueError(f"sample numbers must be in [0, 2^44), got {m.min()}..{m.max()}")
        node: dict[int, np.ndarray] = {self._root: m.astype(np.uint64)}
        low, half = np.uint64((1 << 20) - 1), np.uint64(1 << (_SPLIT_BITS - 1))
        for parent, left, right, share in self._splits:
            total = node.pop(parent)
            # floor(total * share / 2^40 + 1/2) in 64 bits: `total` in two limbs of 24 and 20 bits.
            high = (total >> np.uint64(20)) * np.uint64(share)
            rest = ((high & low) << np.uint64(20)) + (total & low) * np.uint64(share) + half
            node[left] = (high >> np.uint64(20)) + (rest >> np.uint64(_SPLIT_BITS))
            node[right] = total - node[left]
        result = np.zeros((*m.shape, len(self.weights)), np.int64)
        for leaf, count in node.items():
            result[..., leaf] = count.astype(np.int64)
        return result


def balanced_weights(weights: Sequence[float], sizes: Sequence[int]) -> np.ndarray:
    """Weights (D,) times sizes (D,), normalised, as in Octo: with equal weights every frame is equally likely."""
    product = np.asarray(weights, np.float64) * np.asarray(sizes, np.float64)
    if not product.sum() > 0:
        raise ValueError(f"weights times sizes are all zero: {list(weights)}, {list(sizes)}")
    return product / product.sum()


class Samples(NamedTuple):
    """Struct of equally long arrays, one entry per sample."""

    n: np.ndarray  # int64 global sample number
    dataset: np.ndarray  # int32
    lane: np.ndarray  # int32
    position: np.ndarray  # int64, samples that the lane has taken of the dataset before
    pass_number: np.ndarray  # int64
    episode: np.ndarray  # int64, index into DatasetFrames.frames
    frame: np.ndarray  # int64, number of the usable frame within the episode
    key: np.ndarray  # uint64, keys everything random about this sample


# ---------------------------------------------------------------- the whole order


class Order:
    """The order of a run. Immutable; caches only what is a function of its arguments.

    Args:
      datasets: the mixture; the position in this list is the `dataset` number of a sample.
      seed: any integer.
      batch_size: B, the global batch size.
      num_lanes: S, a power of two that divides B and WINDOW.

    Raises:
      ValueError: what is wrong with the mixture or the lanes, and what would be valid.
    """

    def __init__(self, datasets: Sequence[DatasetFrames], *, seed: int, batch_size: int, num_lanes: int = 1):
        names = [data.name for data in datasets]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ValueError(f"duplicate dataset names in the mixture: {', '.join(doubles)}")
        if batch_size < 1 or num_lanes < 1 or batch_size % num_lanes or WINDOW % num_lanes:
            raise ValueError(
                f"the number of lanes must be a power of two (at most {WINDOW}) that divides the batch size; "
                f"got {num_lanes} lanes and batch size {batch_size}"
            )
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
        self.mixture = Mixture([data.weight for data in datasets])
        self._rows = batch_size // num_lanes  # rows per lane in a batch
        self._slots = WINDOW // num_lanes  # lane samples per window
        self._bases = Cache(8 * num_lanes)
        self._windows = Cache(4 * num_lanes)
        self._shares: dict[int, list[np.ndarray]] = {}
        self._walks: dict[tuple[int, int], Walk] = {}

    # -- lanes

    def lane_share(self, dataset: int, lane: int) -> np.ndarray:
        """Sorted episodes of a dataset that a lane walks."""
        if dataset not in self._shares:
            self._shares[dataset] = self._deal(self.datasets[dataset])
        shares = self._shares[dataset]
        return shares[lane if len(shares) > 1 else 0]

    def _deal(self, data: DatasetFrames) -> list[np.ndarray]:
        frames, S = data.shown, self.num_lanes
        usable = np.flatnonzero(frames > 0)
        if S == 1 or len(usable) < 4 * S:
            return [usable]
        order = usable[np.argsort(hash_key(self.seed, "deal", data.name, usable), kind="stable")]
        ends = np.cumsum(frames[order])
        cuts = np.searchsorted(ends, np.arange(1, S) * int(ends[-1]) / S, side="left") + 1
        # A few giant episodes must not leave a lane empty.
        for s in range(S - 1):
            cuts[s] = min(max(cuts[s], cuts[s - 1] + 1 if s else 1), len(order) - (S - 1 - s))
        return [np.sort(part) for part in np.split(order, cuts)]

    def _walk(self, dataset: int, lane: int) -> Walk:
        if (dataset, lane) not in self._walks:
            key = hash_key(self.seed, "walk", self.datasets[dataset].name, lane)
            self._walks[dataset, lane] = Walk(self.datasets[dataset], self.lane_share(dataset, lane), key)
        return self._walks[dataset, lane]

    def live_episodes(self, dataset: int, lane: int, position: int) -> np.ndarray:
        """Sorted episodes that a lane is in the midst of, when it has taken `position` samples of a dataset."""
        return self._walk(dataset, lane).live(position)

    def live(self, batch: int, process_index: int = 0, process_count: int = 1) -> list[tuple[int, int]]:
        """(dataset, episode) pairs that a process's lanes are in the midst of before a batch: what it has to hold."""
        pairs: set[tuple[int, int]] = set()
        here = self.num_lanes // process_count
        for lane in range(process_index * here, (process_index + 1) * here):
            for d, position in enumerate(self._taken(lane, batch * self._rows).tolist()):
                if self.datasets[d].weight > 0:
                    pairs |= {(d, e) for e in self._walk(d, lane).live(position).tolist()}
        return sorted(pairs)

    def frames_per_pass(self, dataset: int, lane: int) -> int:
        """Frames of a lane's pass through a dataset."""
        return self._walk(dataset, lane).frames_per_pass

    # -- windows

    def _quota(self, lane: int, windows: np.ndarray) -> np.ndarray:
        """Samples of each dataset in a lane's windows: (K,) -> (K, D)."""
        virtual = windows * self.num_lanes + lane
        return self.mixture.counts((virtual + 1) * self._slots) - self.mixture.counts(virtual * self._slots)

    def _base(self, lane: int, window: int) -> np.ndarray:
        """Samples of each dataset before a lane's window, (D,)."""
        return self._bases.fetch((lane, window), lambda: self._make_base(lane, window))

    def _make_base(self, lane: int, window: int) -> np.ndarray:
        # From the nearest window before it that is known: reading on costs one step.
        start = max((known for other, known in self._bases if other == lane and known < window), default=0)
        base = self._bases[lane, start] if start else np.zeros(len(self.datasets), np.int64)
        while start < window:
            stop = min(window, start + 65536)
            base = base + self._quota(lane, np.arange(start, stop)).sum(0)
            start = stop
        return base

    def _window(self, lane: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, position in the lane's walk of it) of every slot of a lane's window."""
        return self._windows.fetch((lane, window), lambda: self._make_window(lane, window))

    def _make_window(self, lane: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        quota = self._quota(lane, np.array([window]))[0]
        sorted_slots = np.repeat(np.arange(len(quota)), quota)
        slots = sorted_slots[permutation(self._slots, self.seed, "mixture", lane, window)]
        # Rank of a slot among those of its dataset, then the count before the window.
        by_dataset = np.argsort(slots, kind="stable")
        position = np.empty(self._slots, np.int64)
        position[by_dataset] = np.arange(self._slots) - np.repeat(np.cumsum(quota) - quota, quota)
        return slots, position + self._base(lane, window)[slots]

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
        for lane_id, window_id in sorted(set(zip(lane.tolist(), window.tolist(), strict=True))):
            rows = (lane == lane_id) & (window == window_id)
            table_dataset, table_position = self._window(lane_id, window_id)
            dataset[rows], position[rows] = table_dataset[slot[rows]], table_position[slot[rows]]
        groups = [
            (self._walk(d, lane_id), np.flatnonzero((dataset == d) & (lane == lane_id)))
            for d, lane_id in sorted(set(zip(dataset.tolist(), lane.tolist(), strict=True)))
        ]
        # Per sample: the key of its walk and its tracks. The permutations are then looked up for all samples at once.
        walk_key, tracks = np.empty(len(n), np.uint64), np.empty_like(n)
        for walk, rows in groups:
            walk_key[rows], tracks[rows] = walk.key, walk.tracks
        rounds, turn = np.divmod(position, tracks)
        track = shuffled(turn, tracks, hash_key(walk_key, "round", rounds))
        passes, episode, number, frames, cycle = (np.empty_like(n) for _ in range(5))
        for walk, rows in groups:
            found = walk.at(walk.line(rounds[rows], track[rows]))
            passes[rows], episode[rows], number[rows], frames[rows], cycle[rows] = found
        frame = shuffled(number, frames, hash_key(walk_key, "frames", cycle, episode))
        key = hash_key(self.seed, "sample", n)
        return Samples(n, dataset.astype(np.int32), lane.astype(np.int32), position, passes, episode, frame, key)

    def batch_rows(self, batch: int, process_index: int = 0, process_count: int = 1) -> np.ndarray:
        """Sample numbers of a process's rows of a global batch, int64."""
        if self.num_lanes % process_count:
            possible = ", ".join(str(1 << i) for i in range(self.num_lanes.bit_length()))
            raise ValueError(
                f"{process_count} processes do not divide {self.num_lanes} lanes; possible numbers of processes: "
                f"{possible}. More lanes allow more (num_lanes at the first start: a power of two that divides the "
                f"batch size {self.batch_size}), but always powers of two"
            )
        local = self.batch_size // process_count
        return batch * self.batch_size + process_index * local + np.arange(local, dtype=np.int64)

    def substitute(self, n: int, attempt: int) -> tuple[int, int]:
        """(episode, frame) of the keyed `attempt`-th substitute for a damaged sample n.

        The first NEAR attempts draw from the episodes that are live with the sample's own, which are in memory; later
        ones from the lane's whole pass, because these may have nothing else that is good.
        """
        sample = self.samples([n])
        walk = self._walk(int(sample.dataset[0]), int(sample.lane[0]))
        key = hash_key(self.seed, "substitute", n, attempt)
        return walk.draw(int(sample.position[0]), attempt < NEAR, key)

    def counts(self, n: int) -> np.ndarray:
        """Samples of each dataset among the first n of the run, (D,) int64."""
        full, rest = divmod(int(n), self.batch_size)
        total = np.zeros(len(self.datasets), np.int64)
        for lane in range(self.num_lanes):
            total += self._taken(lane, full * self._rows + min(max(rest - lane * self._rows, 0), self._rows))
        return total

    def _taken(self, lane: int, done: int) -> np.ndarray:
        """Samples of each dataset among the first `done` of a lane, (D,)."""
        window, slot = divmod(done, self._slots)
        base = self._base(lane, window)
        if slot:
            base = base + np.bincount(self._window(lane, window)[0][:slot], minlength=len(base))
        return base

    def spec(self) -> dict[str, Any]:
        """JSON-able description that determines the order entirely."""
        return {
            "version": VERSION,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "num_lanes": self.num_lanes,
            "window": WINDOW,
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
                for data, weight in zip(self.datasets, self.mixture.weights, strict=True)
            ],
        }


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
            by_name = [{item["name"]: item for item in items} for items in (saved, current)]
            lines = spec_differences(*by_name, where)
            order = [[item["name"] for item in items] for items in (saved, current)]
            return lines if lines or order[0] == order[1] else [f"{where}: reordered, {order[0]} -> {order[1]}"]
    return [] if saved == current else [f"{where}: {saved!r} -> {current!r}"]
