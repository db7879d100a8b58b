"""The order against slow, obviously right twins. No TensorFlow."""

import collections
import json
import subprocess
import sys

import numpy as np
import pytest

from octo_like.data import order as order_lib
from octo_like.data.order import WINDOW, DatasetFrames, Mixture, Order


def make_order(num_lanes=1, batch_size=16, seed=3, block=5, scale=1):
    rng = np.random.default_rng(0)
    return Order(
        [
            DatasetFrames("a", 3.0, rng.integers(1, 30, 40 * scale), "hash-a", block),
            DatasetFrames("b", 1.5, np.array([4, 0, 7]), "hash-b", block),
            DatasetFrames("c", 0.01, rng.integers(0, 9, 25 * scale), "hash-c", block),
        ],
        seed=seed,
        batch_size=batch_size,
        num_lanes=num_lanes,
    )


def sequential(order, stop):
    """Brute-force twin: walks every lane step by step and deals its samples into the rows of global batches."""
    S, B = order.num_lanes, order.batch_size
    rows = B // S

    def lane_samples(lane):
        positions = collections.Counter()
        k = 0
        while True:
            # The quota of a window is a difference of counts.
            v, slots = k * S + lane, WINDOW // S
            quota = order.mixture.counts((v + 1) * slots) - order.mixture.counts(v * slots)
            multiset = [d for d, count in enumerate(quota) for _ in range(count)]
            for i in order_lib.permutation(slots, order.seed, "mixture", lane, k):
                d = multiset[i]
                yield (d, *frame_at(d, lane, positions[d]))
                positions[d] += 1
            k += 1

    tables = {}

    def frame_at(d, lane, position):
        data = order.datasets[d]
        key = (order.seed, "walk", data.name, lane)
        share = order.lane_share(d, lane)
        per_pass = int(np.sum(np.asarray(data.frames)[share]))
        number = position // per_pass
        if (d, lane, number) not in tables:
            hashes = [int(order_lib.hash_key(*key, "pass", number, int(e))) for e in share]
            episodes = [int(e) for _, e in sorted(zip(hashes, share, strict=True))]
            blocks = -(-len(episodes) // data.episodes_per_block)
            walked = []
            for block in range(blocks):
                inside = episodes[block * len(episodes) // blocks : (block + 1) * len(episodes) // blocks]
                frames = [(e, f) for e in inside for f in range(data.frames[e])]
                shuffle = order_lib.permutation(len(frames), *key, "frames", number, block)
                walked += [(number, block, *frames[i]) for i in shuffle]
            tables[d, lane, number] = walked
        return tables[d, lane, number][position % per_pass]

    lanes = [lane_samples(lane) for lane in range(S)]
    result = []
    while len(result) < stop:
        for lane in range(S):
            for _ in range(rows):
                result.append((lane, *next(lanes[lane])))
    return result[:stop]


@pytest.mark.parametrize("num_lanes", [1, 4])
def test_matches_a_sequential_walk(num_lanes):
    order, stop = make_order(num_lanes), 2 * WINDOW + 100
    want = sequential(order, stop)
    got = order.samples(np.arange(stop))
    assert got.pass_number.max() > 3  # several passes were crossed
    for i, (lane, dataset, number, block, episode, frame) in enumerate(want):
        row = (got.lane[i], got.dataset[i], got.pass_number[i], got.block[i], got.episode[i], got.frame[i])
        assert row == (lane, dataset, number, block, episode, frame), i


@pytest.mark.parametrize("num_lanes", [1, 4])
def test_seek_equals_sequential(num_lanes):
    whole = make_order(num_lanes).samples(np.arange(3 * WINDOW))
    rng = np.random.default_rng(1)
    order = make_order(num_lanes)
    for n in rng.integers(0, 3 * WINDOW, 50):
        one = order.samples([n])
        for name, value in whole._asdict().items():
            assert value[n] == getattr(one, name)[0], (n, name)


def test_far_seek_is_a_function_of_n_alone():
    n = 600_000_000
    fresh = make_order(4).samples([n, 5, n + 1])
    order = make_order(4)
    order.samples(np.arange(1000))
    order.samples([7_000_000])
    again = order.samples([n, 5, n + 1])
    for a, b in zip(fresh, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_lanes", [1, 2, 4, 8])
def test_each_pass_covers_every_frame_once(num_lanes):
    order = make_order(num_lanes)
    samples = order.samples(np.arange(6 * WINDOW))
    for d, data in enumerate(order.datasets[:2]):
        whole_walks = np.count_nonzero(data.frames) < 4 * num_lanes
        seen = collections.Counter()
        for lane in range(num_lanes):
            rows = (samples.dataset == d) & (samples.lane == lane) & (samples.pass_number == 1)
            assert rows.sum() == order.frames_per_pass(d, lane)  # the pass is complete in this prefix
            here = list(zip(samples.episode[rows].tolist(), samples.frame[rows].tolist(), strict=True))
            assert len(set(here)) == len(here)
            seen.update(here)
        want = {(e, f) for e, count in enumerate(data.frames) for f in range(count)}
        assert set(seen) == want
        assert set(seen.values()) == {num_lanes if whole_walks else 1}


def test_lanes_are_disjoint_and_balanced():
    order = make_order(8, scale=10)
    shares = [set(order.lane_share(0, lane).tolist()) for lane in range(8)]
    assert set.union(*shares) == set(range(400)) and sum(map(len, shares)) == 400
    frames = [order.frames_per_pass(0, lane) for lane in range(8)]
    assert max(frames) - min(frames) <= 2 * 30


def test_giant_episodes_leave_no_lane_empty():
    frames = np.array([1] * 30 + [100_000, 100_000])
    order = Order([DatasetFrames("x", 1.0, frames)], seed=0, batch_size=8, num_lanes=8)
    assert all(len(order.lane_share(0, lane)) for lane in range(8))
    assert sorted(np.concatenate([order.lane_share(0, lane) for lane in range(8)])) == list(range(32))


def test_passes_and_seeds_differ():
    order = make_order()
    first, second = order.block_episodes(0, 0, 0, 0), order.block_episodes(0, 0, 1, 0)
    assert not np.array_equal(first, second)
    a, b = make_order(seed=3).samples(np.arange(500)), make_order(seed=4).samples(np.arange(500))
    assert (a.episode != b.episode).mean() > 0.5
    assert not np.array_equal(a.dataset, b.dataset)


def test_other_datasets_do_not_change_a_walk():
    frames = np.arange(1, 20)
    one = Order([DatasetFrames("x", 1.0, frames)], seed=0, batch_size=4)
    two = Order([DatasetFrames("y", 1.0, frames), DatasetFrames("x", 1.0, frames)], seed=0, batch_size=4)
    n = np.arange(WINDOW)
    a, b = one.samples(n), two.samples(n)
    rows = b.dataset == 1
    np.testing.assert_array_equal(a.episode[: rows.sum()], b.episode[rows])
    np.testing.assert_array_equal(a.frame[: rows.sum()], b.frame[rows])


@pytest.mark.parametrize("batch_size,num_lanes", [(16, 1), (16, 4), (48, 1), (24, 8)])
def test_processes_share_one_global_sequence(batch_size, num_lanes):
    order = make_order(num_lanes, batch_size)
    for processes in (1, 2, 4, 8):
        if num_lanes % processes:
            with pytest.raises(ValueError, match="lanes"):
                order.batch_rows(0, 0, processes)
            continue
        rows = [order.batch_rows(5, p, processes) for p in range(processes)]
        np.testing.assert_array_equal(np.concatenate(rows), np.arange(5 * batch_size, 6 * batch_size))
        lanes = [set(order.samples(r).lane.tolist()) for r in rows]
        assert sum(map(len, lanes)) == num_lanes  # no lane is opened twice


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1, 1], [0.9, 0.1], [5, 0, 3], [1e-5, 1.0, 1e-4], [0.5**i for i in range(12)], list(range(1, 28))],
)
def test_quotas(weights):
    mixture = Mixture(weights)
    m = np.concatenate([np.arange(20000), np.arange(1, 300) * WINDOW, 10**9 + np.arange(5000)])
    m.sort()
    counts = mixture.counts(m)
    np.testing.assert_array_equal(counts.sum(1), m)
    assert (np.diff(counts, axis=0) >= 0).all()
    assert np.abs(counts - m[:, None] * mixture.weights).max() <= 2 + 1e-2
    assert (counts[:, np.asarray(weights) == 0] == 0).all()


@pytest.mark.parametrize("num_lanes", [1, 4, 16])
def test_counts_match_the_samples_and_the_weights(num_lanes):
    order = make_order(num_lanes, batch_size=16)
    stop = 3 * WINDOW
    dataset = order.samples(np.arange(stop)).dataset
    for n in [0, 1, 15, 16, 17, 1000, WINDOW, WINDOW + 9, 2 * WINDOW, stop]:
        np.testing.assert_array_equal(order.counts(n), np.bincount(dataset[:n], minlength=3))
        if n % WINDOW == 0:
            assert np.abs(order.counts(n) - n * order.mixture.weights).max() <= 2
    n = 10_000 * WINDOW
    assert np.abs(order.counts(n) - n * order.mixture.weights).max() <= 2


def test_random_mixtures_stay_within_two():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.random(rng.integers(1, 30)) ** rng.integers(1, 12)
        mixture = Mixture(weights)
        m = np.sort(rng.integers(0, 10**8, 200))
        counts = mixture.counts(m)
        assert np.abs(counts - m[:, None] * mixture.weights).max() <= 2 + 1e-3
        assert (np.diff(counts, axis=0) >= 0).all()


def test_frames_are_mixed_within_blocks():
    order = Order([DatasetFrames("x", 1.0, np.full(100, 20), episodes_per_block=50)], seed=0, batch_size=4)
    samples = order.samples(np.arange(1000))
    assert len(set(samples.episode.tolist())) == 50  # one block
    adjacent = (np.diff(samples.episode) == 0).mean()
    assert adjacent < 0.06  # 1/50 expected
    assert set(samples.block.tolist()) == {0}


def test_substitutes_are_keyed_and_from_the_block():
    order = make_order()
    for n in (0, 77, WINDOW + 5):
        sample = order.samples([n])
        where = (int(sample.dataset[0]), int(sample.lane[0]), int(sample.pass_number[0]), int(sample.block[0]))
        block = set(order.block_episodes(*where).tolist())
        drawn = [order.substitute(n, attempt) for attempt in range(40)]
        assert drawn == [make_order().substitute(n, attempt) for attempt in range(40)]
        near, far = ({episode for episode, _ in part} for part in (drawn[: order_lib.NEAR], drawn[order_lib.NEAR :]))
        assert near <= block and len(near) > 1
        assert far - block or len(block) == len(order.lane_share(where[0], where[1]))  # a block may be bad as a whole
        assert all(0 <= frame < order.datasets[where[0]].frames[episode] for episode, frame in drawn)


def test_uniform_draws_are_uniform_and_independent_between_purposes():
    keys = make_order().samples(np.arange(20000)).key
    u, v = order_lib.uniform(keys, "goal"), order_lib.uniform(keys, "drop")
    assert u.min() >= 0 and u.max() < 1
    np.testing.assert_allclose(np.histogram(u, 10, (0, 1))[0] / 2000, 1, atol=0.1)
    assert abs(np.corrcoef(u, v)[0, 1]) < 0.03


def test_spec_is_json_and_differences_are_named():
    saved = json.loads(json.dumps(make_order().spec()))
    assert order_lib.spec_differences(saved, make_order().spec()) == []
    changed = make_order(seed=9).spec()
    changed["datasets"][1]["index_hash"] = "other"
    changed["datasets"].pop(0)
    lines = order_lib.spec_differences(saved, changed)
    assert "seed: 3 -> 9" in lines
    assert "datasets.a: removed" in lines
    assert "datasets.b.index_hash: 'hash-b' -> 'other'" in lines
    reordered = make_order().spec()
    reordered["datasets"].reverse()
    assert "reordered" in order_lib.spec_differences(saved, reordered)[0]


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(datasets=[DatasetFrames("x", -1.0, np.ones(3, int))]), "non-negative"),
        (dict(datasets=[DatasetFrames("x", 0.0, np.ones(3, int))]), "zero"),
        (dict(datasets=[DatasetFrames("x", float("nan"), np.ones(3, int))]), "finite"),
        (dict(datasets=[DatasetFrames("x", 1.0, np.ones(3, int))] * 2), "duplicate dataset names.*x"),
        (dict(datasets=[DatasetFrames("x", 1.0, np.zeros(3, int))]), "x: no usable frames"),
        (dict(datasets=[DatasetFrames("x", 1.0, np.ones(3, int), episodes_per_block=0)]), "episodes_per_block"),
        (dict(num_lanes=3), "power of two"),
        (dict(num_lanes=32), "divides the batch size"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(datasets=[DatasetFrames("x", 1.0, np.ones(3, int))], seed=0, batch_size=16, num_lanes=1) | change
    with pytest.raises(ValueError, match=message):
        Order(arguments.pop("datasets"), **arguments)


def test_order_needs_no_tensorflow():
    code = "import sys, octo_like.data.order; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- subsampling, weights


def subsampled(subsample, num_lanes=1):
    frames = np.array([30, 4, 11, 1, 0, 25, 12, 9])
    data = DatasetFrames("a", 1.0, frames, "h", 3, subsample)
    return Order([data], seed=5, batch_size=4, num_lanes=num_lanes), frames


def test_a_pass_shows_a_subset_of_long_episodes():
    order, frames = subsampled(10)
    per_pass = int(np.minimum(frames, 10).sum())
    assert order.frames_per_pass(0, 0) == per_pass
    samples = order.samples(np.arange(9 * per_pass))
    shown = {}
    for number in range(9):
        rows = samples.pass_number == number
        pairs = list(zip(samples.episode[rows].tolist(), samples.frame[rows].tolist(), strict=True))
        assert len(set(pairs)) == len(pairs) == per_pass  # no frame twice in a pass
        for e, f in pairs:
            assert 0 <= f < frames[e]
            shown.setdefault(e, {}).setdefault(number, set()).add(f)
    for e, count in enumerate(frames):
        if not count:
            continue
        assert all(len(shown[e][number]) == min(count, 10) for number in range(9))
        # Any ceil(frames / 10) passes after each other show all of them.
        needed = -(-int(count) // 10)
        for first in range(9 - needed + 1):
            assert set.union(*(shown[e][first + i] for i in range(needed))) == set(range(count))
    assert shown[0][0] != set(range(10))  # not simply the first ten
    again = subsampled(10)[0].samples(np.arange(9 * per_pass)[::-1])
    np.testing.assert_array_equal(again.frame[::-1], samples.frame)


def test_subsampling_is_part_of_the_spec_and_nothing_else():
    (plain, _), (wide, _), (narrow, _) = subsampled(None), subsampled(30), subsampled(10)
    a, b = plain.samples(np.arange(400)), wide.samples(np.arange(400))
    for x, y in zip(a, b, strict=True):  # as long as the longest episode: no change
        np.testing.assert_array_equal(x, y)
    assert order_lib.spec_differences(plain.spec(), narrow.spec()) == ["datasets.a.subsample: None -> 10"]
    with pytest.raises(ValueError, match="subsample must be at least 1"):
        subsampled(0)
    n = 17
    episode, frame = narrow.substitute(n, 0)
    assert 0 <= frame < narrow.datasets[0].frames[episode]


@pytest.mark.parametrize("case", range(3))
def test_balanced_weights_match_the_reference(shared, case):
    golden = np.load(shared / "golden" / "pipeline.npz")
    given = {key: golden[f"mixture_weights/{case}/in/{key}"] for key in ("weights", "num_transitions")}
    got = order_lib.balanced_weights(given["weights"], given["num_transitions"])
    np.testing.assert_allclose(got, golden[f"mixture_weights/{case}/upstream/balanced"], rtol=1e-6)
    plain = Mixture(given["weights"]).weights
    np.testing.assert_allclose(plain, golden[f"mixture_weights/{case}/upstream/unbalanced"], rtol=1e-6)
    with pytest.raises(ValueError, match="all zero"):
        order_lib.balanced_weights([0.0, 0.0], [3, 4])
