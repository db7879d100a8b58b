"""The smallest things the order accepts, what it leaves out, and the order itself: a change of it is a new version."""

import hashlib

import numpy as np
import pytest

from octo_like.common.lanes import MAX_LANES
from octo_like.data.order.mixture import _apportioned
from octo_like.data.order.order import VERSION, WINDOW, DatasetFrames, Mixture, Order
from tests.data.test_order import live_episodes, make_order


def test_the_smallest_mixture_is_accepted():
    """One frame in one episode, one of everything."""
    order = Order([DatasetFrames("a", 1.0, np.array([1]), "h", 1, 1, 1)], seed=0, batch_size=1, num_lanes=1)
    sample = order.samples([0, 1, 2])
    assert sample.frame.tolist() == sample.episode.tolist() == [0, 0, 0] and sample.pass_number.tolist() == [0, 1, 2]
    assert order.spec()["datasets"][0]["subsample"] == 1 and order.spec()["window"] == WINDOW == 4096
    most = MAX_LANES
    widest = Order([DatasetFrames("a", 1.0, np.full(4 * most, 1), "h", 1)], seed=0, batch_size=most, num_lanes=most)
    assert widest.samples([0, most - 1]).lane.tolist() == [0, most - 1]


def test_a_dataset_of_weight_zero_may_be_empty_and_gives_nothing():
    data = [DatasetFrames("a", 1.0, np.full(9, 4), "h", 2), DatasetFrames("b", 0.0, np.zeros(3, np.int64), "h", 2)]
    order = Order(data, seed=0, batch_size=4, num_lanes=2)
    assert not order.samples(np.arange(200)).dataset.any() and order.counts(200).tolist() == [200, 0]
    assert {d for d, _ in order.live(3)} == {0}


def test_sample_numbers_end_where_the_arithmetic_does():
    mixture = Mixture([1.0, 2.0])
    assert mixture.counts((1 << 44) - 1).sum() == (1 << 44) - 1
    for number in (-1, 1 << 44):
        with pytest.raises(ValueError, match="2\\^44"):
            mixture.counts(number)


def test_the_order_is_that_of_its_version():
    """A run that is continued repeats these numbers. If they are to change, raise VERSION and renew the digest."""
    rng = np.random.default_rng(5)
    data = [
        DatasetFrames("a", 3.0, rng.integers(0, 30, 60), "hash-a", 5, None, 2),
        DatasetFrames("b", 1.0, np.array([4, 0, 7]), "hash-b", 5),
        DatasetFrames("c", 0.5, rng.integers(1, 50, 40), "hash-c", 4, 20),
    ]
    order = Order(data, seed=9, batch_size=16, num_lanes=4)
    samples = order.samples(np.concatenate([np.arange(3000), 10**7 + np.arange(1000)]))
    numbers = np.stack([samples.dataset, samples.lane, samples.position, samples.episode, samples.frame])
    substitutes = np.array([order.substitute(n, attempt) for n in range(40) for attempt in (0, 7, 8)])
    digest = hashlib.sha256()
    for part in (numbers.astype(np.int64), samples.key, substitutes.astype(np.int64)):
        digest.update(np.ascontiguousarray(part).tobytes())
    assert (VERSION, digest.hexdigest()[:16]) == (3, "68d269fbbd7a4f37")


def test_what_is_live_is_each_walk_s_at_its_next_sample():
    order = make_order(4, batch_size=4, scale=10, mixed=40)
    for batch in (30, 31, 77):
        following = {}
        for later in range(batch, batch + 200):
            shown = order.samples(order.batch_rows(later, 0, 1))
            for d, walk, position in zip(shown.dataset, shown.walk, shown.position, strict=True):
                following.setdefault((int(d), int(walk)), int(position))
        wanted = {(d, e) for (d, w), at in following.items() for e in live_episodes(order, d, w, at).tolist()}
        often = {pair for pair in order.live(batch) if pair[0] in (0, 1)}  # the third is too rare to be seen again
        assert often == {pair for pair in wanted if pair[0] in (0, 1)} and {d for d, _ in often} == {0, 1}


def test_what_is_left_over_goes_to_the_first_of_equals():
    """Also among more than numpy sorts in their order by chance."""
    units = _apportioned(np.full(24, 1 / 24), 1000)
    assert units.tolist() == [42] * 16 + [41] * 8
