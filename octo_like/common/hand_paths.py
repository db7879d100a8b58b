"""The way of a hand through the image, as words: an interface between who plans and who acts.

    "<loc21><loc40><loc33><loc41> close <loc12><loc20><loc30><loc10> open"

A few points (row, column), and after a point what the gripper does there. Li et al. 2025 (HAMSTER, arXiv 2502.05485)
draw such a path into the image of the policy that follows it; here it is a sub-task like any other: learned, said,
read, contradicted by a person, drawn into animations.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from octo_like.common import location_tokens

CLOSE, OPEN = "close", "open"
TOLERANCE = 1.0 / location_tokens.BINS  # a point nearer than this to the line through the others is not worth saying
_EVENT = re.compile(rf"\b({CLOSE}|{OPEN})\b")


class HandPath(NamedTuple):
    """Points of a path, and what happens at them.

    Attributes:
      points: (row, column) of each, as fractions of the image.
      events: (number of the point, "close" or "open"), in their order.
    """

    points: tuple[tuple[float, float], ...]
    events: tuple[tuple[int, str], ...] = ()


def encode(path: HandPath) -> str:
    """Its text.

    Raises:
      ValueError: no points, one outside of the image, an unknown event, or events that are not in order.
    """
    if not path.points:
        raise ValueError("a path needs at least one point")
    at = [number for number, _ in path.events]
    if at != sorted(set(at)) or not all(0 <= number < len(path.points) for number in at):
        raise ValueError(f"events at points {at} of {len(path.points)}: one at a point, in order")
    if unknown := [what for _, what in path.events if what not in (CLOSE, OPEN)]:
        raise ValueError(f"unknown event {unknown[0]!r}; valid: {CLOSE}, {OPEN}")
    events = dict(path.events)
    words = ""
    for number, point in enumerate(path.points):
        words += location_tokens.encode_point(*point)
        words += f" {events[number]} " if number in events else ""
    return words.strip()


def decode(text: str) -> HandPath:
    """The path of a text, its points at the centres of their bins.

    Raises:
      ValueError: it is none: other words, half a point, an event before the first point or two at one.
    """
    points: list[tuple[float, float]] = []
    events: list[tuple[int, str]] = []
    for part in filter(None, map(str.strip, _EVENT.split(text))):
        if part not in (CLOSE, OPEN):
            numbers = location_tokens.decode(part)
            if len(numbers) % 2:
                raise ValueError(f"{text!r} is no path: half a point in {part!r}")
            points += zip(numbers[::2], numbers[1::2], strict=True)
        elif not points or (events and events[-1][0] == len(points) - 1):
            raise ValueError(f"{text!r} is no path: {part!r} needs a point of its own before it")
        else:
            events.append((len(points) - 1, part))
    if not points:
        raise ValueError(f"{text!r} is no path: it has no points")
    return HandPath(tuple(points), tuple(events))


def is_path(text: str) -> bool:
    """Whether a text can be decoded."""
    try:
        decode(text)
    except ValueError:
        return False
    return True


def looks_like_path(text: str) -> bool:
    """Whether a text says nothing but places and events: a path, or what should have been one."""
    return location_tokens.has_any(text) and not location_tokens.without(_EVENT.sub("", text)).strip()


def paths_ahead(
    places_t2: np.ndarray, closed_t: Sequence[bool] | np.ndarray, *, points: int = 5, events: int = 2
) -> list[str]:
    """Of every step of an episode, the text of the way that the hand takes from there.

    A path ends where the gripper closes or opens for the last of `events` times, or with the episode. It has the point
    of the step, those of the events, the last one, and of the others always the one that is farthest from the line
    through the points before (Ramer 1972, Douglas and Peucker 1973), until there are enough or all are near it.

    Args:
      places_t2: (T, 2) (row, column) of the hand in the image, as fractions of it. Moved to the edge
        where it is outside.
      closed_t: (T,) whether the gripper is told to be closed at a step.
      points: the most that a path has, at least 2 + events.
      events: how often the gripper moves in a path, at most.

    Raises:
      ValueError: shapes, places that are not finite, too few points.
    """
    places, closed, moves = _checked(places_t2, closed_t, points, events)
    return [_path(places, closed, moves[moves >= start], start, points, events) for start in range(len(places))]


def path_ahead(
    places_t2: np.ndarray, closed_t: Sequence[bool] | np.ndarray, *, points: int = 5, events: int = 2
) -> str:
    """The one of the first step, see `paths_ahead`."""
    places, closed, moves = _checked(places_t2, closed_t, points, events)
    return _path(places, closed, moves, 0, points, events)


def _checked(
    places_t2: np.ndarray, closed_t: Sequence[bool] | np.ndarray, points: int, events: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places within the image, whether the gripper is closed, and the steps at which that changes."""
    places = np.asarray(places_t2, np.float64)
    closed = np.asarray(closed_t, bool)
    if places.ndim != 2 or places.shape[1] != 2 or closed.shape != places.shape[:1] or not len(places):
        raise ValueError(f"paths: expected places (T, 2) and closed (T,), got {places.shape} and {closed.shape}")
    if not np.isfinite(places).all():
        raise ValueError(f"paths: the place of step {int(np.argmin(np.isfinite(places).all(1)))} is not finite")
    if events < 0 or points < 2 + events:
        raise ValueError(f"paths: {points} points for {events} events; valid: at least {2 + max(events, 0)}")
    return np.clip(places, 0.0, 1.0), closed, np.flatnonzero(closed[1:] != closed[:-1]) + 1


def _path(places: np.ndarray, closed: np.ndarray, ahead: np.ndarray, start: int, points: int, events: int) -> str:
    """From `start` on; `ahead`: the steps at which the gripper moves from there on."""
    moves = [int(move) for move in ahead[:events]]
    end = moves[-1] if events and len(moves) == events else len(places) - 1
    kept = _simplified(places, sorted({start, *moves, end}), points)
    happens = tuple((kept.index(move), CLOSE if closed[move] else OPEN) for move in moves)
    return encode(_without_repeats(HandPath(tuple(map(tuple, places[kept])), happens)))


def _simplified(places: np.ndarray, kept: list[int], points: int) -> list[int]:
    """`kept`, and the steps between them that the line through them misses most."""
    while len(kept) < points:
        farthest, most = -1, TOLERANCE
        for first, last in zip(kept[:-1], kept[1:], strict=True):
            if last - first > 1:
                distances = _distances(places[first + 1 : last], places[first], places[last])
                worst = int(np.argmax(distances))
                if distances[worst] > most:
                    farthest, most = first + 1 + worst, distances[worst]
        if farthest < 0:
            break
        kept = sorted([*kept, farthest])
    return kept


def _distances(points_n2: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(N,) of points from the piece of a line between two others."""
    along = last - first
    length = float(along @ along)
    shares = np.zeros(len(points_n2)) if length == 0.0 else np.clip((points_n2 - first) @ along / length, 0.0, 1.0)
    return np.linalg.norm(points_n2 - first - shares[:, None] * along, axis=-1)


def _without_repeats(path: HandPath) -> HandPath:
    """The path without points whose tokens are those of the point before, unless something happens at both."""
    events = dict(path.events)
    points: list[tuple[float, float]] = []
    happens: list[tuple[int, str]] = []
    for number, point in enumerate(path.points):
        event = events.get(number)
        same = points and location_tokens.encode(points[-1]) == location_tokens.encode(point)
        busy = happens and happens[-1][0] == len(points) - 1
        if not same or (busy and event is not None):
            points.append(point)
        if event is not None:
            happens.append((len(points) - 1, event))
    return HandPath(tuple(points), tuple(happens))
