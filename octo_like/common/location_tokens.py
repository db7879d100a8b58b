"""Places in an image as words: an axis has 64 bins, `<loc00>` to `<loc63>`, written row first.

A point is two tokens (row, column), a box four (top, left, bottom, right), a path two for each of its points. Fractions
are of the image's height and width: 0 is the upper or left edge, 1 the lower or right one.
"""

import math
import re
from collections.abc import Sequence

BINS = 64
TOKENS = tuple(f"<loc{number:02}>" for number in range(BINS))

_TOKEN = re.compile(r"<loc([0-9][0-9])>")
_ANYTHING_LIKE_IT = re.compile(r"<\s*loc(?![a-z])[^<>\s]*>?", re.IGNORECASE)


def encode(fractions: Sequence[float]) -> str:
    """Tokens of numbers from 0 to 1.

    Raises:
      ValueError: a number outside of the image.
    """
    tokens = []
    for fraction in fractions:
        if not math.isfinite(fraction) or not 0 <= fraction <= 1:
            raise ValueError(f"{fraction} is outside of the image; valid: fractions from 0 to 1")
        tokens.append(TOKENS[min(int(fraction * BINS), BINS - 1)])
    return "".join(tokens)


def encode_point(row: float, column: float) -> str:
    """ "<loc21><loc40>". Raises ValueError: outside of the image."""
    return encode((row, column))


def encode_box(top: float, left: float, bottom: float, right: float) -> str:
    """ "<loc21><loc40><loc25><loc47>".

    Raises:
      ValueError: outside of the image, or the wrong way round.
    """
    if top > bottom or left > right:
        raise ValueError(f"a box is top, left, bottom, right; got {top}, {left}, {bottom}, {right}")
    return encode((top, left, bottom, right))


def decode(text: str, count: int | None = None) -> tuple[float, ...]:
    """The fractions at the centres of a text's bins; spaces between tokens do not matter.

    Args:
      count: of tokens that there must be: 2 for a point, 4 for a box.

    Raises:
      ValueError: something else than tokens, none, or another number of them.
    """
    check(text)
    rest = without(text).strip()
    if rest:
        raise ValueError(f"{text!r} has {rest!r} beside location tokens such as {TOKENS[7]}")
    numbers = _TOKEN.findall(text)
    if not numbers or count not in (None, len(numbers)):
        raise ValueError(f"{text!r} has {len(numbers)} location tokens; expected {count or 'some'}")
    return tuple((int(number) + 0.5) / BINS for number in numbers)


def decode_point(text: str) -> tuple[float, float]:
    """(row, column). Raises ValueError as `decode`."""
    row, column = decode(text, 2)
    return row, column


def decode_box(text: str) -> tuple[float, float, float, float]:
    """(top, left, bottom, right). Raises ValueError as `decode`, and when it is the wrong way round."""
    top, left, bottom, right = decode(text, 4)
    if top > bottom or left > right:
        raise ValueError(f"{text!r} is no box: top, left, bottom, right")
    return top, left, bottom, right


def has_any(text: str) -> bool:
    """Whether there is a location token in a text."""
    return _TOKEN.search(text) is not None


def without(text: str) -> str:
    """A text without its location tokens."""
    return _TOKEN.sub("", text)


def check(text: str) -> None:
    """Raises ValueError when something in a text looks like a location token and is none."""
    for found in _ANYTHING_LIKE_IT.findall(text):
        match = _TOKEN.fullmatch(found)
        if match is None or int(match[1]) >= BINS:
            raise ValueError(f"{found!r} is no location token; valid: {TOKENS[0]} to {TOKENS[-1]}, two digits each")
