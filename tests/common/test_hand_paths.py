"""Paths of the hand: their texts, and how they are chosen, against a twin that looks at every choice."""

import numpy as np
import pytest

from octo_like.common import hand_paths, location_tokens
from octo_like.common.hand_paths import HandPath, decode, encode, is_path, paths_ahead
from octo_like.common.text import TextTokenizer


def test_texts():
    path = HandPath(((0.33, 0.64), (0.5, 0.1), (0.99, 0.0)), ((1, "close"), (2, "open")))
    text = encode(path)
    assert text == "<loc21><loc40><loc32><loc06> close <loc63><loc00> open"
    back = decode(text)
    assert back.events == path.events and np.abs(np.array(back.points) - path.points).max() <= 0.5 / 64
    assert encode(back) == text
    assert decode("<loc01><loc02>") == HandPath(((1.5 / 64, 2.5 / 64),))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pick up the red block", "beside location tokens"),
        ("<loc01><loc02><loc03>", "half a point"),
        ("close <loc01><loc02>", "needs a point of its own"),
        ("<loc01><loc02> close open", "needs a point of its own"),
        ("<loc01><loc99>", "no location token"),
        ("", "no points"),
    ],
)
def test_what_is_no_path(text, words):
    with pytest.raises(ValueError, match=words):
        decode(text)
    assert not is_path(text) and is_path("<loc01><loc02> open")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (HandPath(()), "at least one point"),
        (HandPath(((0.1, 1.2),)), "outside of the image"),
        (HandPath(((0.1, 0.2),), ((1, "open"),)), "events at points"),
        (HandPath(((0.1, 0.2),), ((0, "open"), (0, "close"))), "events at points"),
        (HandPath(((0.1, 0.2),), ((0, "drop"),)), "unknown event 'drop'"),
    ],
)
def test_what_cannot_be_said(path, words):
    with pytest.raises(ValueError, match=words):
        encode(path)


def to_polyline(points, corners):
    """Greatest distance of points from a polyline, by looking at 2,000 places of it."""
    corners = np.asarray(corners)
    share = np.linspace(0, 1, 2000 // max(1, len(corners) - 1))[:, None]
    line = np.concatenate([a + share * (b - a) for a, b in zip(corners[:-1], corners[1:], strict=True)])
    return np.linalg.norm(points[:, None] - line, axis=-1).min(1).max()


def random_episode(seed, length=30):
    rng = np.random.default_rng(seed)
    places = np.clip(0.5 + np.cumsum(rng.normal(scale=0.04, size=(length, 2)), 0), 0.02, 0.98)
    closed = np.zeros(length, bool)
    closed[8:15] = closed[22:] = True
    return places, closed


@pytest.mark.parametrize("seed", range(4))
def test_a_path_keeps_near_the_way(seed):
    """With enough points nothing of the way is farther from the path than the tolerance, and what bins round off."""
    places, closed = random_episode(seed)
    rounding = np.sqrt(0.5) / location_tokens.BINS
    texts = paths_ahead(places, closed, points=40, events=2)
    ends = {0: 15, 8: 15, 9: 22, 15: 22, 16: 29, 23: 29}
    for start, end in ends.items():
        path = decode(texts[start])
        away = to_polyline(places[start : end + 1], path.points if len(path.points) > 1 else path.points * 2)
        assert away <= hand_paths.TOLERANCE + 2 * rounding
        np.testing.assert_allclose(path.points[0], places[start], atol=0.5 / 64 + 1e-9)
        np.testing.assert_allclose(path.points[-1], places[end], atol=0.5 / 64 + 1e-9)
    assert [what for _, what in decode(texts[0]).events] == ["close", "open"]
    assert [what for _, what in decode(texts[8]).events] == ["close", "open"]  # it closes at this very step
    assert [what for _, what in decode(texts[9]).events] == ["open", "close"]
    assert [what for _, what in decode(texts[16]).events] == ["close"]
    assert not decode(texts[23]).events


@pytest.mark.parametrize("seed", range(4))
def test_the_point_that_is_farthest_comes_first(seed):
    """One more point than those that must be there: the step which a brute-force search finds worst."""
    places, _ = random_episode(seed)
    places = np.round(places * 64 - 0.5) / 64 + 0.5 / 64  # centres of bins: nothing is rounded
    text = paths_ahead(places, np.zeros(30, bool), points=3, events=1)[0]
    line = places[0] + np.linspace(0, 1, 20001)[:, None] * (places[-1] - places[0])
    worst = np.argmax([np.linalg.norm(line - place, axis=1).min() for place in places])
    points = decode(text).points
    np.testing.assert_allclose(points, places[[0, worst, 29]], atol=1e-9)


def test_a_straight_way_has_two_points_and_a_rest_one():
    line = np.linspace((0.1, 0.2), (0.8, 0.6), 20)
    texts = paths_ahead(line, np.zeros(20, bool))
    assert len(decode(texts[0]).points) == 2 and len(decode(texts[-1]).points) == 1
    assert paths_ahead(np.full((5, 2), 0.5), np.zeros(5, bool)) == ["<loc32><loc32>"] * 5


def test_what_happens_where_the_hand_rests_is_told_at_points_of_its_own():
    closed = np.array([0, 0, 1, 1, 0, 0], bool)
    assert paths_ahead(np.full((6, 2), 0.5), closed)[0] == "<loc32><loc32> close <loc32><loc32> open"


def test_outside_of_the_image_is_its_edge():
    assert paths_ahead(np.array([[-0.5, 0.5], [2.0, 0.5]]), [False, False])[0] == "<loc00><loc32><loc63><loc32>"


@pytest.mark.parametrize(
    ("places", "closed", "options", "words"),
    [
        (np.zeros((3, 3)), np.zeros(3, bool), {}, r"expected places \(T, 2\)"),
        (np.zeros((3, 2)), np.zeros(2, bool), {}, r"closed \(T,\)"),
        (np.zeros((0, 2)), np.zeros(0, bool), {}, "expected places"),
        (np.array([[0.0, 0.0], [np.nan, 0.0]]), np.zeros(2, bool), {}, "step 1 is not finite"),
        (np.zeros((3, 2)), np.zeros(3, bool), {"points": 3}, "3 points for 2 events; valid: at least 4"),
        (np.zeros((3, 2)), np.zeros(3, bool), {"points": 3, "events": -1}, "valid: at least 2"),
    ],
)
def test_what_makes_no_path(places, closed, options, words):
    with pytest.raises(ValueError, match=words):
        paths_ahead(places, closed, **options)


def test_the_words_vocabulary_can_say_the_longest():
    text = encode(HandPath(tuple((0.1 * i, 0.15 * i) for i in range(5)), ((2, "close"), (4, "open"))))
    tokenizer = TextTokenizer.load("words", 19)
    assert tokenizer.decode(tokenizer.encode([text])["input_ids"]) == [text]
