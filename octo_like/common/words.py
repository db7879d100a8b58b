"""What an error says about a word that is not one of the valid ones."""

from __future__ import annotations

import difflib
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
