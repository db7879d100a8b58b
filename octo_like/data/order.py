"""The order of the data is a function: sample number n -> (dataset, pass, episode, frame, key). Pure NumPy.

Nothing here reads a file or keeps a position. Everything follows from the *order spec*: the seed, the datasets with
their weights and usable frames per episode, the batch size, the number of lanes S and the episodes per block.

Lanes      The stream is S lanes. Lane s owns rows [s B/S, (s+1) B/S) of every global batch; a process opens the lanes
           of the rows it holds, so more or fewer processes continue the same global sequence.
Mixture    Lane s fills its k-th window of WINDOW/S slots with the quotas of "virtual window" v = k S + s. The quotas
           are the increments of integer counts c_d(m) that sum to m, never decrease, and stay within 2 of m w_d (a
           Huffman tree of exact two-way splits). A window's slots are in keyed order. Per-dataset counts at any n are
           arithmetic.
Episodes   A dataset is dealt to the lanes once, by a keyed permutation cut at equal frames; one with fewer than 4 S
           episodes is walked whole by every lane with its own key. A lane walks its share in a new keyed permutation
           per pass, frames shuffled within blocks of consecutive episodes. Finding sample n takes a divmod and two
           searches in cumulative sums.
Randomness All keys are 64-bit hashes of (seed, what, which); nothing depends on what was asked for before.
"""

import collections
import dataclasses
import functools
import hashlib
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

WINDOW = 4096
VERSION = 1
NEAR = 8  # substitutes that are drawn from a sample's own block
_SPLIT_BITS = 40
_MAX_SAMPLES = 1 << 44


# ---------------------------------------------------------------- keyed hashing


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words that mixes all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*parts: int | str | np.ndarray) -> np.ndarray:
    """64-bit hash of a tuple of strings, integers and integer arrays (broadcast together). Returns uint64."""
    key = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            if isinstance(part, str):
                part = int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
            if isinstance(part, int):
                part = np.uint64(part & 0xFFFFFFFFFFFFFFFF)
            part = np.asarray(part).astype(np.uint64)
            key = _mix(key * np.uint64(0x9E3779B97F4A7C15) + _mix(part + np.uint64(0x9E3779B97F4A7C15)))
    return key


def uniform(key: np.ndarray, purpose: str) -> np.ndarray:
    """Uniform draws in [0, 1), float64, one per 64-bit key, independent between purposes."""
    return (hash_key(purpose, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(size: int, *key: int | str | np.ndarray) -> np.ndarray:
    """A keyed permutation of range(size), int64."""
    return np.argsort(hash_key(*key, np.arange(size)), kind="stable")


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


# ---------------------------------------------------------------- one lane's walk through one dataset


@dataclasses.dataclass(frozen=True)
class DatasetFrames:
    """What the order must know of a dataset.

    Attributes:
      name: key of its random choices; other datasets in the mixture do not influence its walk.
      weight: share of the samples, relative to the others.
      frames: usable frames of each episode, (N,) integers; episodes with 0 are skipped.
      index_hash: identifies the data, recorded in the order spec.
      episodes_per_block: frames are shuffled within this many consecutive episodes of a pass.
      subsample: frames of an episode that one pass shows, None for all. An episode's frames are in a keyed order, of
        which each pass takes the next ones, round and round: ceil(frames / subsample) passes show all.
    """

    name: str
    weight: float
    frames: np.ndarray
    index_hash: str = ""
    episodes_per_block: int = 256
    subsample: int | None = None

    @property
    def shown(self) -> np.ndarray:
        """Frames of each episode that one pass shows, (N,) int64."""
        frames = np.asarray(self.frames, np.int64)
        return frames if self.subsample is None else np.minimum(frames, self.subsample)


class Samples(NamedTuple):
    """Struct of equally long arrays, one entry per sample."""

    n: np.ndarray  # int64 global sample number
    dataset: np.ndarray  # int32
    lane: np.ndarray  # int32
    pass_number: np.ndarray  # int64
    block: np.ndarray  # int64, number of the block within the pass
    offset: np.ndarray  # int64, samples already taken from the block
    episode: np.ndarray  # int64, index into DatasetFrames.frames
    frame: np.ndarray  # int64, number of the usable frame within the episode
    key: np.ndarray  # uint64, keys everything random about this sample


class _Cache(collections.OrderedDict):
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


class _Pass(NamedTuple):
    episodes: np.ndarray  # the share in this pass's order
    ends: np.ndarray  # cumulative frames after each of them
    block_episode: np.ndarray  # (blocks + 1,) first episode position of each block
    block_start: np.ndarray  # (blocks + 1,) first frame position of each block


class _Walk:
    """One lane's endless walk through its share of one dataset: position i -> (pass, block, episode, frame)."""

    def __init__(self, data: DatasetFrames, share: np.ndarray, key: tuple):
        self._frames = data.shown
        self._all_frames = np.asarray(data.frames, np.int64)
        self._share = share
        self._key = key
        self.frames_per_pass = int(self._frames[share].sum())
        self.num_blocks = max(1, -(-len(share) // data.episodes_per_block))
        self._passes = _Cache(2)
        self._orders = _Cache(4)
        self._subsets = _Cache(256)

    def pass_table(self, number: int) -> _Pass:
        return self._passes.fetch(number, lambda: self._make_pass(number))

    def _make_pass(self, number: int) -> _Pass:
        # Keyed by the episodes' own numbers, not their place in the share.
        order = np.argsort(hash_key(*self._key, "pass", number, self._share), kind="stable")
        episodes = self._share[order]
        ends = np.cumsum(self._frames[episodes])
        # Blocks of equal size, so that the last one of a pass is not a poorly mixed rest.
        block_episode = np.arange(self.num_blocks + 1) * len(episodes) // self.num_blocks
        starts = np.concatenate([[0], ends])
        return _Pass(episodes, ends, block_episode, starts[block_episode])

    def block_episodes(self, number: int, block: int) -> np.ndarray:
        table = self.pass_table(number)
        return table.episodes[table.block_episode[block] : table.block_episode[block + 1]]

    def _block_order(self, number: int, block: int) -> np.ndarray:
        table = self.pass_table(number)
        size = int(table.block_start[block + 1] - table.block_start[block])
        return self._orders.fetch((number, block), lambda: permutation(size, *self._key, "frames", number, block))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """(pass, block, offset, episode, frame) of walk positions (N,)."""
        passes, rest = np.divmod(positions, self.frames_per_pass)
        blocks, offsets, episodes, frames = (np.empty_like(rest) for _ in range(4))
        for number in np.unique(passes):
            table = self.pass_table(int(number))
            rows = np.flatnonzero(passes == number)
            blocks[rows] = np.searchsorted(table.block_start, rest[rows], side="right") - 1
            for block in np.unique(blocks[rows]):
                inside = rows[blocks[rows] == block]
                start = table.block_start[block]
                offsets[inside] = rest[inside] - start
                shuffled = start + self._block_order(int(number), int(block))[offsets[inside]]
                episodes[inside], frames[inside] = self._episode_frame(int(number), table, shuffled)
        return passes, blocks, offsets, episodes, frames

    def _episode_frame(self, number: int, table: _Pass, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        which = np.searchsorted(table.ends, position, side="right")
        episode = table.episodes[which]
        frame = position - (table.ends[which] - self._frames[episode])
        for e in np.unique(episode[self._all_frames[episode] > self._frames[episode]]).tolist():
            rows, total = np.flatnonzero(episode == e), int(self._all_frames[e])
            shuffled = self._subsets.fetch(e, functools.partial(permutation, total, *self._key, "subsample", e))
            frame[rows] = shuffled[(frame[rows] + number * int(self._frames[e])) % total]
        return episode, frame

    def draw(self, number: int, block: int | None, key: np.ndarray) -> tuple[int, int]:
        """(episode, frame) of a keyed draw from all frames of a block, or of the pass."""
        table = self.pass_table(number)
        start, stop = (0, self.frames_per_pass) if block is None else map(int, table.block_start[block : block + 2])
        position = np.array([start + int(key % np.uint64(stop - start))])
        episode, frame = self._episode_frame(number, table, position)
        return int(episode[0]), int(frame[0])


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
            if data.episodes_per_block < 1:
                raise ValueError(f"{data.name}: episodes_per_block must be at least 1, got {data.episodes_per_block}")
            if data.subsample is not None and data.subsample < 1:
                raise ValueError(f"{data.name}: subsample must be at least 1 or None, got {data.subsample}")
            if data.weight > 0 and np.sum(data.frames) < 1:
                raise ValueError(f"{data.name}: no usable frames, but weight {data.weight}")
        self.datasets = tuple(datasets)
        self.seed, self.batch_size, self.num_lanes = int(seed), int(batch_size), int(num_lanes)
        self.mixture = Mixture([data.weight for data in datasets])
        self._rows = batch_size // num_lanes  # rows per lane in a batch
        self._slots = WINDOW // num_lanes  # lane samples per window
        self._bases: dict[int, tuple[int, np.ndarray]] = {}
        self._windows = _Cache(4 * num_lanes)
        self._shares: dict[int, list[np.ndarray]] = {}
        self._walks: dict[tuple[int, int], _Walk] = {}

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

    def _walk(self, dataset: int, lane: int) -> _Walk:
        if (dataset, lane) not in self._walks:
            key = (self.seed, "walk", self.datasets[dataset].name, lane)
            self._walks[dataset, lane] = _Walk(self.datasets[dataset], self.lane_share(dataset, lane), key)
        return self._walks[dataset, lane]

    def num_blocks(self, dataset: int, lane: int) -> int:
        """Blocks in a lane's pass through a dataset."""
        return self._walk(dataset, lane).num_blocks

    def block_episodes(self, dataset: int, lane: int, pass_number: int, block: int) -> np.ndarray:
        """Episodes of one block, in the order of the pass."""
        return self._walk(dataset, lane).block_episodes(pass_number, block)

    def block_frames(self, dataset: int, lane: int, pass_number: int, block: int) -> int:
        """Frames of one block."""
        start = self._walk(dataset, lane).pass_table(pass_number).block_start
        return int(start[block + 1] - start[block])

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
        start, base = self._bases.get(lane, (0, np.zeros(len(self.datasets), np.int64)))
        if start > window:
            start, base = 0, np.zeros(len(self.datasets), np.int64)
        while start < window:
            stop = min(window, start + 65536)
            base = base + self._quota(lane, np.arange(start, stop)).sum(0)
            start = stop
        self._bases[lane] = (window, base)
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
        passes, block, offset, episode, frame = (np.empty_like(n) for _ in range(5))
        for d, lane_id in sorted(set(zip(dataset.tolist(), lane.tolist(), strict=True))):
            rows = np.flatnonzero((dataset == d) & (lane == lane_id))
            located = self._walk(d, lane_id).locate(position[rows])
            passes[rows], block[rows], offset[rows], episode[rows], frame[rows] = located
        key = hash_key(self.seed, "sample", n)
        return Samples(n, dataset.astype(np.int32), lane.astype(np.int32), passes, block, offset, episode, frame, key)

    def batch_rows(self, batch: int, process_index: int = 0, process_count: int = 1) -> np.ndarray:
        """Sample numbers of a process's rows of a global batch, int64."""
        if self.num_lanes % process_count:
            raise ValueError(
                f"{process_count} processes do not divide {self.num_lanes} lanes; set num_lanes to a multiple of "
                f"{process_count} at the first start"
            )
        local = self.batch_size // process_count
        return batch * self.batch_size + process_index * local + np.arange(local, dtype=np.int64)

    def substitute(self, n: int, attempt: int) -> tuple[int, int]:
        """(episode, frame) of the keyed `attempt`-th substitute for a damaged sample n.

        The first NEAR attempts draw from the same block, whose episodes are in memory; later ones from the lane's whole
        pass, because a block may have nothing else that is good.
        """
        sample = self.samples([n])
        walk = self._walk(int(sample.dataset[0]), int(sample.lane[0]))
        key = hash_key(self.seed, "substitute", n, attempt)
        return walk.draw(int(sample.pass_number[0]), int(sample.block[0]) if attempt < NEAR else None, key)

    def counts(self, n: int) -> np.ndarray:
        """Samples of each dataset among the first n of the run, (D,) int64."""
        full, rest = divmod(int(n), self.batch_size)
        total = np.zeros(len(self.datasets), np.int64)
        for lane in range(self.num_lanes):
            done = full * self._rows + min(max(rest - lane * self._rows, 0), self._rows)
            window, slot = divmod(done, self._slots)
            total += self._base(lane, window)
            if slot:
                total += np.bincount(self._window(lane, window)[0][:slot], minlength=len(total))
        return total

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
                    "episodes_per_block": int(data.episodes_per_block),
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
