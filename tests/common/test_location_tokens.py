"""Places as words: what is written is read back, and nothing else is."""

import numpy as np
import pytest

from octo_like.common import location_tokens
from octo_like.common.location_tokens import BINS, TOKENS


def test_the_words():
    assert len(TOKENS) == BINS == 64 and TOKENS[0] == "<loc00>" and TOKENS[7] == "<loc07>" and TOKENS[-1] == "<loc63>"
    assert location_tokens.encode_point(21.5 / 64, 40.2 / 64) == "<loc21><loc40>"  # row, then column
    assert location_tokens.encode_box(0.0, 0.25, 0.5, 1.0) == "<loc00><loc16><loc32><loc63>"


def test_round_trip_to_half_a_bin():
    numbers = np.random.default_rng(0).uniform(0, 1, 200).tolist() + [0.0, 1.0, 1 / 64, 63 / 64]
    read = np.array(location_tokens.decode(location_tokens.encode(numbers)))
    assert np.abs(read - numbers).max() <= 0.5 / 64 + 1e-12
    for token in TOKENS:  # the centre of a bin is in the bin
        assert location_tokens.encode(location_tokens.decode(token)) == token
    assert location_tokens.decode_point("<loc21><loc40>") == (21.5 / 64, 40.5 / 64)
    assert location_tokens.decode_box(" <loc01> <loc02><loc03> <loc04>") == (1.5 / 64, 2.5 / 64, 3.5 / 64, 4.5 / 64)


@pytest.mark.parametrize("number", [-0.001, 1.001, float("nan"), float("inf")])
def test_places_outside_of_the_image(number):
    with pytest.raises(ValueError, match="outside of the image; valid: fractions from 0 to 1"):
        location_tokens.encode_point(0.5, number)


@pytest.mark.parametrize(
    "text,message",
    [
        ("<loc64><loc01>", "'<loc64>' is no location token; valid: <loc00> to <loc63>"),
        ("<loc7><loc01>", "'<loc7>' is no location token"),
        ("<loc007><loc01>", "'<loc007>' is no location token"),
        ("<LOC07><loc01>", "'<LOC07>' is no location token"),
        ("<loc-1><loc01>", "'<loc-1>' is no location token"),
        ("<loc07<loc01>", "'<loc07' is no location token"),
        ("<loc٠٧><loc01>", "is no location token"),
        ("red", "'red' has 'red' beside location tokens"),
        ("<loc01>", "has 1 location tokens; expected 2"),
        ("<loc01><loc02><loc03>", "has 3 location tokens; expected 2"),
        ("", "has 0 location tokens; expected 2"),
    ],
)
def test_what_is_no_point(text, message):
    with pytest.raises(ValueError) as error:
        location_tokens.decode_point(text)
    assert message in str(error.value)


def test_what_is_no_box():
    with pytest.raises(ValueError, match="is no box"):
        location_tokens.decode_box("<loc10><loc00><loc05><loc09>")
    with pytest.raises(ValueError, match="a box is top, left, bottom, right"):
        location_tokens.encode_box(0.5, 0.1, 0.2, 0.3)


def test_texts_with_places_in_them():
    location_tokens.check("what is at <loc01><loc02>? a <location>? 3 < local")
    with pytest.raises(ValueError, match="<loc99>"):
        location_tokens.check("what is at <loc01><loc99>?")
