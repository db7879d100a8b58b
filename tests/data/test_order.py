"""The order against slow, obviously right twins. No TensorFlow."""

import collections
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from octo_like.data.order import order as order_lib
from octo_like.data.order.keys import shuffled
from octo_like.data.order.order import PERIOD, WINDOW, DatasetFrames, Mixture, Order


def live_episodes(order, dataset, walk, position):
    return order.walks(dataset).live(np.array([walk]), np.array([position]))


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


def walked(order, d, walk):
    """(pass, episode, frame) of a walk through a dataset: what `walk.py` says, with lists, one by one."""
    data, share = order.datasets[d], order.walks(d).share(walk)
    key = order_lib.hash_key(order.seed, "walk", data.name, walk)
    V, G = data.visits, int(order.num_walks[d])
    held = data.episodes_mixed >= np.count_nonzero(data.frames)
    K = len(share) if held else min(max(1, data.episodes_mixed // G), len(share))
    frames = {int(e): int(data.frames[e]) for e in share}

    def line():
        for number in itertools.count():
            for part in range(V):
                hashes = order_lib.hash_key(key, "pass", number * V + part, np.array(list(frames))).tolist()
                ranks = dict(zip(frames, hashes, strict=True))
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
        for track in shuffled(np.arange(K), K, order_lib.hash_key(key, "round", round_number)).tolist():
            waiting = units[track]
            if not waiting[0]:
                waiting.pop(0)
            yield waiting[0].pop(0)


def sequential(order, stop):
    """Brute-force twin: walks slot after slot, and deals what the lanes get into the rows of global batches."""
    S, B, slots = order.num_lanes, order.batch_size, max(1, WINDOW // order.num_lanes)
    walks, positions, shown = {}, collections.Counter(), [[] for _ in range(S)]

    def kinds(lane, k):
        # The quota of a window is a difference of counts.
        v = k * S + lane
        quota = order.mixture.counts((v + 1) * slots) - order.mixture.counts(v * slots)
        multiset = [d for d, count in enumerate(quota) for _ in range(count)]
        return [multiset[i] for i in order_lib.permutation(slots, order.seed, "mixture", lane, k)]

    for k in range(-(-stop // (S * slots))):
        of_lane = [kinds(lane, k) for lane in range(S)]
        for slot in range(slots):
            for lane in range(S):
                d = of_lane[lane][slot]
                walk = lane // (S // int(order.num_walks[d]))
                rest = walks.setdefault((d, walk), walked(order, d, walk))
                shown[lane].append((lane, d, walk, positions[d, walk], *next(rest)))
                positions[d, walk] += 1
    result, rest = [], [iter(samples) for samples in shown]
    try:
        while len(result) < stop:
            for lane in range(S):
                result += [next(rest[lane]) for _ in range(B // S)]
    except StopIteration:  # the last window is cut by a batch
        pass
    return result[:stop]


@pytest.mark.parametrize(
    "num_lanes,batch_size,mixed,visits",
    [
        (1, 16, 5, 1),
        (4, 16, 5, 1),
        (1, 16, 4, 3),
        (1, 16, 1, 1),
        (2, 16, 40, 1),
        (4, 16, 16, 1),
        (12, 24, 30, 3),
        (16, 16, 64, 2),
    ],
)
def test_matches_a_sequential_walk(num_lanes, batch_size, mixed, visits):
    order = make_order(num_lanes, batch_size, mixed=mixed, visits=visits)
    want = sequential(order, order.window + 100)
    assert len(want) > order.window
    got = order.samples(np.arange(len(want)))
    assert got.pass_number.max() > 2  # several passes were crossed
    for i, row in enumerate(want):
        names = ("lane", "dataset", "walk", "position", "pass_number", "episode", "frame")
        assert row == tuple(int(getattr(got, name)[i]) for name in names), i


@pytest.mark.parametrize("num_lanes", [1, 4, 12])
def test_seek_equals_sequential(num_lanes):
    size = 48 if num_lanes == 12 else 16
    whole = make_order(num_lanes, size, mixed=40).samples(np.arange(3 * WINDOW))
    rng = np.random.default_rng(1)
    order = make_order(num_lanes, size, mixed=40)
    for n in rng.integers(0, 3 * WINDOW, 50):
        one = order.samples([n])
        for name, value in whole._asdict().items():
            assert value[n] == getattr(one, name)[0], (n, name)


@pytest.mark.parametrize("num_lanes,batch_size", [(1, 16), (16, 48), (12, 12)])
def test_far_positions_are_sums_of_all_windows_before(num_lanes, batch_size):
    """Positions after more than a period of the mixture, against quotas that are summed up window by window."""
    order = make_order(num_lanes, batch_size, mixed=40)
    S, slots = num_lanes, order.window // num_lanes
    window = 2 * PERIOD + 77
    quota = np.diff(order.mixture.counts(np.arange(window * S + 1) * slots), axis=0).reshape(window, S, 3).sum(0)
    first = window * order.window  # its first sample of lane 0: windows are whole batches here
    first -= first % batch_size
    samples = order.samples(np.arange(first + batch_size, first + 4 * order.window))
    for d in range(3):
        lanes_of = S // int(order.num_walks[d])
        for walk in range(int(order.num_walks[d])):
            rows = (samples.dataset == d) & (samples.walk == walk)
            taken = int(quota[walk * lanes_of : (walk + 1) * lanes_of, d].sum())
            found = np.sort(samples.position[rows])
            assert len(set(found.tolist())) == len(found)
            assert abs(int(found[0]) - taken) <= 3 * order.window  # near, and in the middle without a gap:
            middle = found[(found > found[0] + batch_size) & (found < found[-1] - batch_size)]
            np.testing.assert_array_equal(middle, np.arange(len(middle)) + (middle[0] if len(middle) else 0))


def test_far_seek_is_a_function_of_n_alone():
    n = 600_000_000
    fresh = make_order(4).samples([n, 5, n + 1])
    order = make_order(4)
    order.samples(np.arange(1000))
    order.samples([7_000_000])
    again = order.samples([n, 5, n + 1])
    for a, b in zip(fresh, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "num_lanes,batch_size,mixed,visits",
    [(1, 16, 5, 1), (2, 16, 8, 1), (4, 16, 40, 1), (8, 16, 40, 1), (1, 16, 5, 7), (8, 8, 4, 1), (12, 24, 30, 3)],
)
def test_each_pass_covers_every_frame_once(num_lanes, batch_size, mixed, visits):
    """Over all walks: also where lanes share one, because there are fewer episodes, or fewer are mixed, than lanes."""
    order = make_order(num_lanes, batch_size, mixed=mixed, visits=visits)
    samples = order.samples(np.arange(6 * WINDOW))
    for d, data in enumerate(order.datasets[:2]):
        seen = collections.Counter()
        for walk in range(int(order.num_walks[d])):
            rows = (samples.dataset == d) & (samples.walk == walk) & (samples.pass_number == 1)
            assert rows.sum() == order.walks(d).frames_per_pass[walk]  # the pass is complete in this prefix
            seen.update(zip(samples.episode[rows].tolist(), samples.frame[rows].tolist(), strict=True))
        assert seen == dict.fromkeys(((e, f) for e, count in enumerate(data.frames) for f in range(count)), 1)


def test_walks_are_disjoint_and_balanced():
    order = make_order(8, scale=10, mixed=64)
    assert order.num_walks.tolist() == [8, 1, 8]
    shares = [set(order.walks(0).share(walk).tolist()) for walk in range(8)]
    assert set.union(*shares) == set(range(400)) and sum(map(len, shares)) == 400
    frames = [order.walks(0).frames_per_pass[walk] for walk in range(8)]
    assert max(frames) - min(frames) <= 2 * 30


def test_giant_episodes_leave_no_walk_empty():
    frames = np.array([1] * 30 + [100_000, 100_000])
    order = Order([DatasetFrames("x", 1.0, frames)], seed=0, batch_size=8, num_lanes=8)
    shares = [order.walks(0).share(walk) for walk in range(8)]
    assert order.num_walks[0] == 8 and all(map(len, shares))
    assert sorted(np.concatenate(shares)) == list(range(32))


@pytest.mark.parametrize(
    "num_lanes,mixed,episodes,walks",
    [(256, 4096, 5000, 256), (256, 100, 5000, 16), (256, 10**6, 100, 16), (256, 3, 5000, 1), (384, 200, 9999, 48)],
)
def test_lanes_share_walks_where_little_is_mixed(num_lanes, mixed, episodes, walks):
    data = DatasetFrames("x", 1.0, np.full(episodes, 7), "", mixed)
    order = Order([data], seed=0, batch_size=num_lanes, num_lanes=num_lanes)
    assert order.num_walks.tolist() == [walks]
    # What all lanes hold together is what is mixed, however many they are.
    assert order.walks(0).tracks.sum() <= max(mixed, 1)


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


@pytest.mark.parametrize("batch_size,num_lanes", [(16, 1), (16, 4), (48, 1), (24, 8), (96, 48), (48, 12)])
def test_processes_share_one_global_sequence(batch_size, num_lanes):
    order = make_order(num_lanes, batch_size)
    for processes in (1, 2, 3, 4, 8, 12, 48):
        if num_lanes % processes:
            with pytest.raises(ValueError, match=f"{processes} processes do not divide {num_lanes} lanes"):
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
    assert np.abs(counts - m[:, None] * mixture.weights).max() <= 2
    assert (counts[:, np.asarray(weights) == 0] == 0).all()
    # The weights are multiples of one in a period, and at least that.
    assert mixture.units.sum() == mixture.period and ((mixture.units > 0) == (mixture.given > 0)).all()
    assert np.abs(mixture.weights - mixture.given).max() <= len(weights) / mixture.period


def test_tiny_weights_are_raised_to_one_sample_in_a_period():
    mixture = Mixture([1.0, 0.5, *[1e-12] * 50])
    assert mixture.units[2:].tolist() == [1] * 50 and mixture.units.sum() == 1 << 20
    assert abs(mixture.weights[0] / mixture.weights[1] - 2) < 2e-4
    with pytest.raises(ValueError, match="at most 4 datasets"):
        Mixture([1.0] * 5, period=4)


@pytest.mark.parametrize("num_lanes,batch_size", [(1, 16), (4, 16), (16, 16), (2, 10_000), (48, 48 * 200)])
def test_counts_match_the_samples_and_the_weights(num_lanes, batch_size):
    order = make_order(num_lanes, batch_size)
    stop = 3 * WINDOW
    dataset = order.samples(np.arange(stop)).dataset
    for n in [0, 1, 15, 16, 17, 1000, WINDOW, WINDOW + 9, 2 * WINDOW, stop]:
        np.testing.assert_array_equal(order.counts(n), np.bincount(dataset[:n], minlength=3))
        if n % order.window == 0 and n % batch_size == 0:
            assert np.abs(order.counts(n) - n * order.mixture.weights).max() <= 2
    n = 10_000 * order.window * batch_size
    assert np.abs(order.counts(n) - n * order.mixture.weights).max() <= 2


def test_random_mixtures_stay_within_two():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.random(rng.integers(1, 30)) ** rng.integers(1, 12)
        mixture = Mixture(weights)
        m = np.sort(rng.integers(0, 10**8, 200))
        counts = mixture.counts(m)
        assert np.abs(counts - m[:, None] * mixture.weights).max() <= 2
        assert (np.diff(counts, axis=0) >= 0).all()


def long_walk(mixed, visits, episodes=2000, seed=0):
    frames = np.random.default_rng(seed).integers(25, 76, episodes)
    return Order([DatasetFrames("x", 1.0, frames, "", mixed, None, visits)], seed=0, batch_size=4)


def test_a_round_shows_each_track_once():
    order = long_walk(50, 1)
    for start in (0, 50 * 70, 50 * 1000):
        episodes = set(order.samples(start + np.arange(50)).episode.tolist())
        assert episodes == set(live_episodes(order, 0, 0, start).tolist())
        assert 25 <= len(episodes) <= 50
    rounds = order.samples(np.arange(50 * 400)).episode.reshape(400, 50)
    assert (np.diff(rounds.reshape(-1)) == 0).mean() < 0.04  # about 1/50: tracks are in random order
    assert np.mean(rounds[1:, 0] == rounds[:-1, 0]) < 0.1


@pytest.mark.parametrize("mixed,visits", [(50, 1), (50, 8), (7, 3)])
def test_what_is_held_is_what_is_mixed(mixed, visits):
    """Episodes come and go one at a time, each is read once per visit, and about 3/4 K are live: no second block."""
    order = long_walk(mixed, visits, episodes=300)
    per_pass = order.walks(0).frames_per_pass[0]
    live = [set(live_episodes(order, 0, 0, p).tolist()) for p in range(0, 4 * per_pass, mixed)]
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
    assert live_episodes(order, 0, 0, 12345).tolist() == list(range(100))
    episodes = order.samples(np.arange(200 * 50)).episode.reshape(50, 200)
    distinct = np.mean([len(set(row.tolist())) for row in episodes])
    assert distinct > 0.97 * 100 * (1 - (1 - 1 / 100) ** 200)  # of as many uniform draws


def test_live_episodes_of_processes():
    order = make_order(4, batch_size=4, scale=10, mixed=40)  # one row per lane
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
        d, walk, position = int(sample.dataset[0]), int(sample.walk[0]), int(sample.position[0])
        live = set(live_episodes(order, d, walk, position).tolist())
        drawn = [order.substitute(n, attempt) for attempt in range(40)]
        assert drawn == [make_order().substitute(n, attempt) for attempt in range(40)]
        near, far = ({episode for episode, _ in part} for part in (drawn[: order_lib.NEAR], drawn[order_lib.NEAR :]))
        assert near <= live and len(near) > 1
        assert far - live or len(live) == len(order.walks(d).share(walk))  # live ones may be bad as a whole
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
        (dict(num_lanes=3), "must divide the batch size.*allows 1, 2, 4, 8, 16"),
        (dict(num_lanes=32), "must divide the batch size"),
        (dict(num_lanes=2048, batch_size=2048), "at most 1024"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(datasets=[DatasetFrames("x", 1.0, np.ones(3, int))], seed=0, batch_size=16, num_lanes=1) | change
    with pytest.raises(ValueError, match=message):
        Order(arguments.pop("datasets"), **arguments)


def test_order_needs_no_tensorflow():
    code = "import sys, octo_like.data.order.order; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- subsampling, weights


def subsampled(subsample, num_lanes=1):
    frames = np.array([30, 4, 11, 1, 0, 25, 12, 9])
    data = DatasetFrames("a", 1.0, frames, "h", 3, subsample)
    return Order([data], seed=5, batch_size=4, num_lanes=num_lanes), frames


def test_a_pass_shows_a_subset_of_long_episodes():
    order, frames = subsampled(10)
    per_pass = int(np.minimum(frames, 10).sum())
    assert order.walks(0).frames_per_pass[0] == per_pass
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
    plain = Mixture(given["weights"]).given
    np.testing.assert_allclose(plain, golden[f"mixture_weights/{case}/upstream/unbalanced"], rtol=1e-6)
    with pytest.raises(ValueError, match="all zero"):
        order_lib.balanced_weights([0.0, 0.0], [3, 4])
