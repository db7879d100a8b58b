"""What an error says about a word that is not one of the valid ones."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

LISTED = 40  # valid words that a message names


def nearest(word: Any, valid: Iterable[Any], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Up to `count` of the valid words that look like `word`, the most similar first; see `difflib` for `cutoff`."""
    return difflib.get_close_matches(str(word), list(map(str, valid)), count, cutoff)


def suggest(word: Any, valid: Iterable[Any]) -> str:
    """'valid: a, b, c', sorted, with "did you mean 'b'?" in front when one is similar."""
    words = sorted(map(str, valid))
    similar = nearest(word, words)
    listed = ", ".join(words[:LISTED]) + (f" and {len(words) - LISTED} more" if len(words) > LISTED else "")
    return (f"did you mean {similar[0]!r}? " if similar else "") + f"valid: {listed or '(none)'}"


def check_words(given: Iterable[Any], valid: Iterable[Any], where: str, also: Iterable[Any] = ()) -> None:
    """Raises ValueError, with the nearest valid one, for a key of `given` that is neither `valid` nor in `also`."""
    valid, also = list(valid), set(also)
    for key in given:
        if key not in valid and key not in also:
            raise ValueError(f"{where}: the policy reads no {key!r}; {suggest(key, valid)}")


def whole_number(value: Any, what: str, at_least: int = 1, at_most: int | None = None) -> int:
    """`value` as an int. Raises ValueError for what is no whole number, or is out of range."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{what} must be a whole number, got {value!r:.60}") from None
    if number < at_least or (at_most is not None and number > at_most):
        valid = f"at least {at_least}" if at_most is None else f"in {at_least}..{at_most}"
        raise ValueError(f"{what} must be {valid}, got {number}")
    return number


def finite_number(value: Any, what: str) -> float:
    """`value` as a float. Raises ValueError for what is no number, and for infinity and NaN."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r:.60}")
    return float(value)
