"""Words of the long tasks: their instructions, and the closed table of sub-tasks."""

from collections.abc import Mapping, Sequence

from octo_like.envs.language import BLOCK_COLORS, EXTRA_PLATE_COLORS, PLATE_COLORS

LONG_TASKS = ("match", "touch_in_order", "place_in_order", "clear", "all_but_one")
LONG_PLATE_COLORS = tuple(dict.fromkeys(PLATE_COLORS + EXTRA_PLATE_COLORS))
MATCHING_COLORS = ("red", "green", "blue", "yellow")  # there are blocks and plates of each

# {blocks}: "the red block, then the blue block"; {colors}: "red, then blue".
LONG_PHRASINGS: dict[str, tuple[str, ...]] = {
    "match": (
        "put every block on the plate of its colour",
        "place each block on the plate of the same colour",
        "sort the blocks onto the plates by colour",
        "match every cube with the plate of its colour",
    ),
    "touch_in_order": (
        "touch {blocks}",
        "reach {blocks}",
        "go to {blocks}",
        "touch the blocks in this order: {colors}",
    ),
    "place_in_order": (
        "put {blocks} on the {plate} plate",
        "place {blocks} on the {plate} plate",
        "fill the {plate} plate in this order: {colors}",
        "take {blocks} to the {plate} dish",
    ),
    "clear": (
        "clear the {plate} plate",
        "empty the {plate} plate",
        "take everything off the {plate} plate",
        "put the blocks of the {plate} dish on the table",
    ),
    "all_but_one": (
        "put everything but the {spared} block on the {plate} plate",
        "put all blocks except the {spared} one on the {plate} plate",
        "place every block but the {spared} one on the {plate} dish",
        "leave the {spared} block and put the others on the {plate} plate",
    ),
}

# Sentences that no demonstration says, of words that occur above.
LONG_UNSEEN_PHRASINGS: dict[str, tuple[str, ...]] = {
    "match": ("sort every cube by colour onto the plates",),
    "touch_in_order": ("touch in this order: {colors}",),
    "place_in_order": ("on the {plate} plate, place {blocks}",),
    "clear": ("take the blocks off the {plate} dish",),
    "all_but_one": ("everything except the {spared} block, put it on the {plate} plate",),
}

PICK, PLACE = "pick up the {block} block", "place it on the {plate} plate"
PUT_DOWN, TOUCH, DONE = "put it on the table", "touch the {block} block", "it is done"


def long_instruction(
    task: str,
    phrasing: int,
    blocks: Sequence[str],
    *,
    plate: str | None,
    spared: str | None,
    phrasings: Mapping[str, Sequence[str]] = LONG_PHRASINGS,
) -> str:
    """The sentence of a long task. `blocks`: their colours in order, where the task has one."""
    listed = ", then ".join(f"the {color} block" for color in blocks)
    return phrasings[task][phrasing].format(blocks=listed, colors=", then ".join(blocks), plate=plate, spared=spared)


def all_subtasks() -> list[str]:
    """Every sub-task text there is, in a fixed order."""
    texts = [text.format(block=block) for text in (PICK, TOUCH) for block in BLOCK_COLORS]
    return [*texts, *(PLACE.format(plate=plate) for plate in LONG_PLATE_COLORS), PUT_DOWN, DONE]


def all_long_instructions() -> list[str]:
    """Sentences of the long tasks with every colour in every place (not every combination), in a fixed order."""
    sentences = []
    for table in (LONG_PHRASINGS, LONG_UNSEEN_PHRASINGS):
        for task in LONG_TASKS:
            for phrasing in range(len(table[task])):
                for i, first in enumerate(BLOCK_COLORS):
                    for second in BLOCK_COLORS[:i] + BLOCK_COLORS[i + 1 :]:
                        sentences += [
                            long_instruction(
                                task, phrasing, (first, second), plate=plate, spared=first, phrasings=table
                            )
                            for plate in LONG_PLATE_COLORS
                        ]
    return list(dict.fromkeys(sentences))
