"""The one geometry of pictures: which part of one a policy sees, and where in its input that part lies.

    stretch     the whole picture over the whole input; an object is as wide as the aspect ratio makes it
    letterbox   the whole picture at its own aspect ratio in the middle, black on two sides: what openpi's clients send
    crop        the middle of the picture that has the input's aspect ratio, over the whole input

A picture that has the input's size already is taken as it is. Training, clients and servers place pictures by this
rule; the filter between the pixels is theirs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from octo_like.common.words import suggest

RESIZES = ("stretch", "letterbox", "crop")


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Of its rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


class Placement(NamedTuple):
    """`source`, a part of the picture, becomes `target`, a part of the input, which is black elsewhere."""

    source: Box
    target: Box


@functools.lru_cache(maxsize=1024)
def placement(resize: str, raw: tuple[int, int], size: tuple[int, int]) -> Placement:
    """Where a picture goes.

    Args:
      resize: one of `RESIZES`.
      raw, size: (height, width) of the picture and of the input.

    Raises:
      ValueError: another name, a size without pixels.
    """
    check_resize(resize)
    if min(*raw, *size) < 1:
        raise ValueError(f"a picture of {raw[0]}x{raw[1]} cannot become one of {size[0]}x{size[1]}")
    (h, w), (height, width) = raw, size
    source, target = Box(0, 0, h, w), Box(0, 0, height, width)
    if resize == "letterbox":
        # openpi's rule to the bit: the quotient of floats, cut off, decides where rounding matters.
        ratio = max(w / width, h / height)
        inner_h, inner_w = max(int(h / ratio), 1), max(int(w / ratio), 1)
        target = Box((height - inner_h) // 2, (width - inner_w) // 2, inner_h, inner_w)
    elif resize == "crop":
        part_h = h if h * width <= w * height else max(round(w * height / width), 1)
        part_w = w if w * height <= h * width else max(round(h * width / height), 1)
        source = Box((h - part_h) // 2, (w - part_w) // 2, part_h, part_w)
    return Placement(source, target)


def check_resize(resize: str) -> None:
    """Raises ValueError for a name that is none of `RESIZES`."""
    if resize not in RESIZES:
        raise ValueError(f"resize {resize!r}; {suggest(resize, RESIZES)}")
