"""The one table of instructions: every task, phrasing, colour and direction of the tabletop world."""

BLOCK_COLORS = ("red", "green", "blue", "yellow", "purple")
PLATE_COLORS = ("blue", "orange", "white")
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


def instruction(task: str, phrasing: int, target: str, *, plate: str | None, direction: str | None) -> str:
    """The sentence of one task. `phrasing` indexes `PHRASINGS[task]`."""
    return PHRASINGS[task][phrasing].format(target=target, plate=plate, direction=direction)


def all_instructions() -> list[str]:
    """Every sentence the world can say (each once, in a fixed order), e.g. to train a text tokenizer on."""
    sentences = []
    for task in TASKS:
        plates = PLATE_COLORS if task == "pick_and_place" else (None,)
        directions = DIRECTIONS if task == "push" else (None,)
        for phrasing in range(len(PHRASINGS[task])):
            for target in BLOCK_COLORS:
                for plate in plates:
                    for direction in directions:
                        sentences.append(instruction(task, phrasing, target, plate=plate, direction=direction))
    return sentences
