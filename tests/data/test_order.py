"""The order against slow, obviously right twins. No TensorFlow."""

import collections
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from octo_like.data import order as order_lib
from octo_like.data.keys import shuffled
from octo_like.data.order import WINDOW, DatasetFrames, Mixture, Order


def make_order(num_lanes=1, batch_size=16, seed=3, mixed=5, scale=1, visits=1):
    rng = np.random.default_rng(0)
    return Order(
        [
            DatasetFrames("a", 3.0, rng.integers(1, 30, 40 * scale), "hash-a", mixed, None, visits),
            DatasetFrames("b", 1.5, np.array([4, 0, 7]), "hash-b", mixed, None, visits),
            DatasetFrames("c", 0.01, rng.integers(0, 9, 25 * scale), "hash-c", mixed, None, visits),
        ],
        seed=seed,
        batch_size=batch_size,
        num_lanes=num_lanes,
    )


def walked(order, d, lane):
    """(pass, episode, frame) of a lane's walk through a dataset: what `walk.py` says, with lists, one by one."""
    data, share = order.datasets[d], order.lane_share(d, lane)
    key = order_lib.hash_key(order.seed, "walk", data.name, lane)
    V, K = data.visits, min(data.episodes_mixed, len(share))
    frames = {int(e): int(data.frames[e]) for e in share}

    def line():
        for number in itertools.count():
            for part in range(V):
                ranks = {e: int(order_lib.hash_key(key, "pass", number * V + part, e)) for e in frames}
                for e in sorted(frames, key=ranks.get):
                    turn = int(order_lib.hash_key(key, "parts", e)) % V
                    first, stop = ((p * frames[e] + turn) // V for p in (part, part + 1))
                    shuffle = shuffled(
                        np.arange(frames[e]), frames[e], order_lib.hash_key(key, "frames", number + 1, e)
                    )
                    yield from ((number, e, int(f)) for f in shuffle[first:stop])

    rest = line()
    unit = max(1, round(sum(frames.values()) / (len(frames) * V)))
    whole = K == len(share)

    def cut(k, length):
        frames_of_unit = list(itertools.islice(rest, length))
        return frames_of_unit[::-1] if k % 2 and not whole else frames_of_unit

    units = [[cut(k, unit + (0 if whole else k * unit // K))] for k in range(K)]
    for round_number in itertools.count():
        if not all(map(any, units)):  # the units of a generation are cut in the order of the tracks
            for k in range(K):
                units[k].append(cut(k, unit))
        for turn in range(K):
            waiting = units[int(shuffled([turn], K, order_lib.hash_key(key, "round", round_number))[0])]
            if not waiting[0]:
                waiting.pop(0)
            yield waiting[0].pop(0)


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

    walks = {}

    def frame_at(d, lane, position):
        if (d, lane) not in walks:
            walks[d, lane] = ([], walked(order, d, lane))
        done, rest = walks[d, lane]
        done += itertools.islice(rest, position + 1 - len(done))
        return done[position]

    lanes = [lane_samples(lane) for lane in range(S)]
    result = []
    while len(result) < stop:
        for lane in range(S):
            for _ in range(rows):
                result.append((lane, *next(lanes[lane])))
    return result[:stop]


@pytest.mark.parametrize("num_lanes,mixed,visits", [(1, 5, 1), (4, 5, 1), (1, 4, 3), (1, 1, 1), (2, 40, 1)])
def test_matches_a_sequential_walk(num_lanes, mixed, visits):
    order, stop = make_order(num_lanes, mixed=mixed, visits=visits), 2 * WINDOW + 100
    want = sequential(order, stop)
    got = order.samples(np.arange(stop))
    assert got.pass_number.max() > 3  # several passes were crossed
    for i, (lane, dataset, number, episode, frame) in enumerate(want):
        row = (got.lane[i], got.dataset[i], got.pass_number[i], got.episode[i], got.frame[i])
        assert row == (lane, dataset, number, episode, frame), i


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


@pytest.mark.parametrize("num_lanes,visits", [(1, 1), (2, 1), (4, 1), (8, 1), (1, 7)])
def test_each_pass_covers_every_frame_once(num_lanes, visits):
    order = make_order(num_lanes, visits=visits)
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
    samples = make_order().samples(np.arange(2 * WINDOW))
    rows = [np.flatnonzero((samples.dataset == 0) & (samples.pass_number == number)) for number in (0, 1)]
    first, second = (list(zip(samples.episode[r].tolist(), samples.frame[r].tolist(), strict=True)) for r in rows)
    assert first != second and sorted(first) == sorted(second)
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


def long_walk(mixed, visits, episodes=2000, seed=0):
    frames = np.random.default_rng(seed).integers(25, 76, episodes)
    return Order([DatasetFrames("x", 1.0, frames, "", mixed, None, visits)], seed=0, batch_size=4)


def test_a_round_shows_each_track_once():
    order = long_walk(50, 1)
    for start in (0, 50 * 70, 50 * 1000):
        episodes = set(order.samples(start + np.arange(50)).episode.tolist())
        assert episodes == set(order.live_episodes(0, 0, start).tolist())
        assert 25 <= len(episodes) <= 50
    rounds = order.samples(np.arange(50 * 400)).episode.reshape(400, 50)
    assert (np.diff(rounds.reshape(-1)) == 0).mean() < 0.04  # about 1/50: tracks are in random order
    assert np.mean(rounds[1:, 0] == rounds[:-1, 0]) < 0.1


@pytest.mark.parametrize("mixed,visits", [(50, 1), (50, 8), (7, 3)])
def test_what_is_held_is_what_is_mixed(mixed, visits):
    """Episodes come and go one at a time, each is read once per visit, and about 3/4 K are live: no second block."""
    order = long_walk(mixed, visits, episodes=300)
    per_pass = order.frames_per_pass(0, 0)
    live = [set(order.live_episodes(0, 0, p).tolist()) for p in range(0, 4 * per_pass, mixed)]
    shown = order.samples(np.arange(4 * per_pass)).episode
    for number, episodes in enumerate(live[:-1]):
        assert set(shown[number * mixed : (number + 1) * mixed].tolist()) == episodes
    begun = [len(after - before) for before, after in itertools.pairwise(live)]
    unit = per_pass / (300 * visits)
    assert max(begun) <= 5 + 3 * mixed / unit  # of the K tracks, K / c begin another unit in each round
    assert sum(begun) / 4 / 300 == pytest.approx(visits, rel=0.08 + 1 / mixed)
    assert max(map(len, live)) <= mixed and np.mean([len(e) for e in live]) == pytest.approx(0.75 * mixed, rel=0.08)


def test_everything_is_mixed_when_everything_is_held():
    order = long_walk(100, 1, episodes=100)
    assert order.live_episodes(0, 0, 12345).tolist() == list(range(100))
    episodes = order.samples(np.arange(200 * 50)).episode.reshape(50, 200)
    distinct = np.mean([len(set(row.tolist())) for row in episodes])
    assert distinct > 0.97 * 100 * (1 - (1 - 1 / 100) ** 200)  # of as many uniform draws


def test_live_episodes_of_processes():
    order = make_order(4, batch_size=4, scale=10)  # one row per lane
    parts = [order.live(30, p, 2) for p in (0, 1)]
    assert sorted(set(parts[0]) | set(parts[1])) == order.live(30)
    shown = order.samples(order.batch_rows(30, 1, 2))
    assert set(zip(shown.dataset.tolist(), shown.episode.tolist(), strict=True)) <= set(parts[1])


def test_shuffled_is_a_permutation_and_uniform():
    for size in (1, 2, 3, 7, 100, 4097):
        assert sorted(shuffled(np.arange(size), size, np.uint64(5)).tolist()) == list(range(size))
    # All 24 permutations of four, equally often: chi-squared with 23 degrees of freedom is below 49.7 with p = 0.999.
    keys = order_lib.hash_key("test", np.arange(24_000))
    drawn = np.stack([shuffled(np.full(24_000, i), 4, keys) for i in range(4)])
    counts = np.unique(drawn.T @ 4 ** np.arange(4), return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 1000.0) ** 2 / 1000).sum() < 49.7
    # Sizes may differ between entries.
    sizes = np.array([5, 9, 1000])
    each = [int(shuffled([2], int(size), np.uint64(3))[0]) for size in sizes]
    assert shuffled([2, 2, 2], sizes, np.uint64(3)).tolist() == each


def test_substitutes_are_keyed_and_from_live_episodes():
    order = make_order()
    for n in (0, 77, WINDOW + 5):
        sample = order.samples([n])
        d, lane, position = int(sample.dataset[0]), int(sample.lane[0]), int(sample.position[0])
        live = set(order.live_episodes(d, lane, position).tolist())
        drawn = [order.substitute(n, attempt) for attempt in range(40)]
        assert drawn == [make_order().substitute(n, attempt) for attempt in range(40)]
        near, far = ({episode for episode, _ in part} for part in (drawn[: order_lib.NEAR], drawn[order_lib.NEAR :]))
        assert near <= live and len(near) > 1
        assert far - live or len(live) == len(order.lane_share(d, lane))  # live ones may be bad as a whole
        assert all(0 <= frame < order.datasets[d].frames[episode] for episode, frame in drawn)


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
        (dict(datasets=[DatasetFrames("x", 1.0, np.ones(3, int), episodes_mixed=0)]), "episodes_mixed"),
        (dict(datasets=[DatasetFrames("x", 1.0, np.ones(3, int), visits=0)]), "visits must be at least 1"),
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
    samples = order.samples(np.arange(11 * per_pass))  # passes overlap a little
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
    again = subsampled(10)[0].samples(np.arange(11 * per_pass)[::-1])
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
