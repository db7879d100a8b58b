"""The one table of instructions: every task, phrasing, colour and direction of the tabletop world."""

import itertools
from collections.abc import Mapping, Sequence

BLOCK_COLORS = ("red", "green", "blue", "yellow", "purple")
PLATE_COLORS = ("blue", "orange", "white")
# Colours of things that only palettes, pictures and long tasks have: the scenes of a seed are drawn from those above.
EXTRA_BLOCK_COLORS = ("orange", "white", "pink", "cyan")
EXTRA_PLATE_COLORS = ("red", "green", "yellow")
DIRECTIONS = ("left", "right")
TASKS = ("reach", "push", "pick_and_place")

PHRASINGS: dict[str, tuple[str, ...]] = {
    "reach": (
        "reach the {target} block",
        "move to the {target} block",
        "go to the {target} cube",
        "touch the {target} block",
        "approach the {target} cube",
        "reach for the {target} cube",
        "go over to the {target} block",
        "find the {target} block",
    ),
    "push": (
        "push the {target} block to the {direction}",
        "push the {target} cube {direction}",
        "slide the {target} block to the {direction}",
        "shove the {target} cube to the {direction}",
        "move the {target} block to the {direction} by pushing it",
        "nudge the {target} block towards the {direction}",
        "make the {target} cube slide {direction}",
        "push {direction} on the {target} block",
    ),
    "pick_and_place": (
        "put the {target} block on the {plate} plate",
        "place the {target} cube on the {plate} plate",
        "pick up the {target} block and put it on the {plate} plate",
        "set the {target} block down on the {plate} dish",
        "move the {target} cube onto the {plate} plate",
        "lay the {target} block on the {plate} dish",
        "grab the {target} cube and place it on the {plate} plate",
        "take the {target} block to the {plate} plate",
    ),
}

# Sentences that no demonstration says, to ask whether a policy understood more than the sentences it heard. Their words
# occur above (the comma does not): who learned from these demonstrations alone cannot know what another word means.
UNSEEN_PHRASINGS: dict[str, tuple[str, ...]] = {
    "reach": (
        "find and touch the {target} cube",
        "the {target} block, go to it",
        "go up to the {target} cube",
        "over to the {target} block, touch it",
    ),
    "push": (
        "to the {direction}, push the {target} block",
        "the {target} cube, slide it {direction}",
        "take the {target} block {direction} by pushing it",
        "go and shove the {target} block {direction}",
    ),
    "pick_and_place": (
        "on the {plate} plate, put the {target} block",
        "the {target} cube, put it on the {plate} dish",
        "pick the {target} block up and set it on the {plate} dish",
        "grab and place the {target} cube on the {plate} plate",
    ),
}

# (block, plate) that no demonstration asks for, although each of these blocks and plates occurs with others.
HELD_OUT_PAIRS = frozenset({("green", "white"), ("blue", "orange"), ("purple", "blue")})


def instruction(
    task: str,
    phrasing: int,
    target: str,
    *,
    plate: str | None,
    direction: str | None,
    phrasings: Mapping[str, Sequence[str]] = PHRASINGS,
) -> str:
    """The sentence of one task. `phrasing` indexes `phrasings[task]`."""
    return phrasings[task][phrasing].format(target=target, plate=plate, direction=direction)


def pairs(*, held_out: bool) -> list[tuple[str, str]]:
    """The pairs of a block's and a plate's colour that are, or are not, in `HELD_OUT_PAIRS`, in a fixed order."""
    every = [(block, plate) for block in BLOCK_COLORS for plate in PLATE_COLORS]
    return [pair for pair in every if (pair in HELD_OUT_PAIRS) == held_out]


def all_instructions(*, every: bool = False) -> list[str]:
    """Every sentence of `PHRASINGS` (each once, in a fixed order), e.g. to train a text tokenizer on.

    Args:
      every: with the colours that only palettes and pictures have, and the sentences of `UNSEEN_PHRASINGS`.
    """
    colors = BLOCK_COLORS + (EXTRA_BLOCK_COLORS if every else ())
    sentences = []
    for phrasings in (PHRASINGS, UNSEEN_PHRASINGS) if every else (PHRASINGS,):
        for task in TASKS:
            plates = PLATE_COLORS if task == "pick_and_place" else (None,)
            directions = DIRECTIONS if task == "push" else (None,)
            names = itertools.product(range(len(phrasings[task])), colors, plates, directions)
            for phrasing, target, plate, direction in names:
                sentences.append(
                    instruction(task, phrasing, target, plate=plate, direction=direction, phrasings=phrasings)
                )
    return sentences
