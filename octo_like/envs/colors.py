"""Which colours things of a dataset have, and which of them its words name."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from octo_like.envs.language import BLOCK_COLORS, EXTRA_BLOCK_COLORS, HELD_OUT_PAIRS, PLATE_COLORS

ALL_BLOCK_COLORS = BLOCK_COLORS + EXTRA_BLOCK_COLORS
FEWEST = 4  # colours of a palette: three blocks, and one that a scene lacks


@dataclasses.dataclass(frozen=True)
class Colors:
    """Colours of a dataset. The default is that of the robots' datasets.

    Attributes:
      palette: colours of blocks; None: `BLOCK_COLORS`, as the scene of a seed has them.
      unnamed: colours of blocks that no words name, although such blocks stand there (unless the palette is without).
      unnamed_pairs: (block, plate) that no words put together.

    Raises:
      ValueError: unknown colours, or too few.
    """

    palette: tuple[str, ...] | None = None
    unnamed: frozenset[str] = frozenset()
    unnamed_pairs: frozenset[tuple[str, str]] = HELD_OUT_PAIRS

    def __post_init__(self):
        if self.palette is not None:
            check_palette(self.palette)
        _check_blocks(self.unnamed)
        for pair in self.unnamed_pairs:
            if len(pair) != 2 or pair[0] not in ALL_BLOCK_COLORS or pair[1] not in PLATE_COLORS:
                raise ValueError(
                    f"no pair {pair!r} of a block and a plate; blocks: {', '.join(ALL_BLOCK_COLORS)}; "
                    f"plates: {', '.join(PLATE_COLORS)}"
                )
        if set(self.palette or BLOCK_COLORS) <= self.unnamed:
            raise ValueError("no colour is left that words may name")

    def may_name(self, target: str, plate: str | None = None) -> bool:
        """Whether words may name a block of this colour, together with a plate of that one."""
        return target not in self.unnamed and (target, plate) not in self.unnamed_pairs

    def record(self) -> dict[str, Any]:
        """For a dataset's metadata: what differs from the default, as lists."""
        fields = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        return {name: _listed(value, name) for name, value, default in fields if value != default}


def _listed(value: Iterable[Any] | None, name: str) -> list[Any] | None:
    if value is None or name == "palette":
        return None if value is None else list(value)
    return sorted(list(item) if isinstance(item, tuple) else item for item in value)


def check_palette(palette: Sequence[str]) -> None:
    """Raises ValueError when these colours cannot be those of a scene's blocks."""
    _check_blocks(palette)
    if len(set(palette)) != len(palette) or len(palette) < FEWEST:
        raise ValueError(f"a palette has at least {FEWEST} colours, each once; got {', '.join(palette)}")


def _check_blocks(colors: Iterable[str]) -> None:
    for color in colors:
        if color not in ALL_BLOCK_COLORS:
            raise ValueError(f"no block is {color!r}; valid: {', '.join(ALL_BLOCK_COLORS)}")


def parse_pair(text: str) -> tuple[str, str]:
    """ "green:white" as ("green", "white"), for command lines."""
    block, colon, plate = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r}: expected BLOCK:PLATE, e.g. green:white")
    return block, plate
