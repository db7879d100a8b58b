"""What is asked about a picture of the table, and the answers: short, in lower case, without a full stop.

Places are location tokens (`octo_like.common.location_tokens`). Directions are those of the picture: forward is away
from the camera. Each question is asked only where its answer is clear: things are well visible, and a thing is left of
another by a margin.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from octo_like.common import location_tokens
from octo_like.envs.colors import ALL_BLOCK_COLORS, Colors
from octo_like.envs.language import BLOCK_COLORS, EXTRA_PLATE_COLORS, PLATE_COLORS
from octo_like.envs.picture import Picture, Thing

MARGIN = 3 / 64  # of the image: two places that differ by less are neither left nor right of one another
NEARER_BY = 0.03  # metres, between the two blocks nearest to the hand
THERE = 0.04  # metres: nearer than this the hand is at the block
NUMBERS = ("none", "one", "two", "three", "four")
YES_NO = ("no", "yes")

# kind -> question -> ways to ask it.
PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "caption": {
        "all": ("describe the picture", "what do you see?", "what is on the table?", "caption", "say what is there"),
    },
    "colour": {
        "left": ("what colour is the leftmost block?", "which colour has the block on the left?"),
        "right": ("what colour is the rightmost block?", "which colour has the block on the right?"),
        "hand": ("which block is nearest to the hand?", "what colour is the block closest to the hand?"),
        "plate": ("what colour is the block on the {plate} plate?", "which block is on the {plate} plate?"),
    },
    "count": {
        "blocks": ("how many blocks are there?", "count the blocks", "number of blocks?"),
        "plates": ("how many plates are there?", "count the plates", "number of plates?"),
        "on": ("how many blocks are on the {plate} plate?", "count the blocks on the {plate} plate"),
    },
    "presence": {
        "block": ("is there a {block} block?", "do you see a {block} block?", "is a {block} cube on the table?"),
        "plate": ("is there a {plate} plate?", "do you see a {plate} plate?", "is a {plate} dish on the table?"),
    },
    "relation": {
        "left": (
            "is the {block} block to the left of the {other} block?",
            "is the {block} cube left of the {other} one?",
        ),
        "right": (
            "is the {block} block to the right of the {other} block?",
            "is the {block} cube right of the {other} one?",
        ),
        "nearer": (
            "is the {block} block nearer than the {other} block?",
            "is the {block} cube in front of the {other} one?",
        ),
        "farther": (
            "is the {block} block farther than the {other} block?",
            "is the {block} cube behind the {other} one?",
        ),
        "side": (
            "is the {block} block left or right of the {plate} plate?",
            "on which side of the {plate} plate is the {block} block?",
        ),
    },
    "where": {
        "on": ("is the {block} block on the {plate} plate?", "is the {block} cube on the {plate} dish?"),
        "what": ("where is the {block} block?", "what is the {block} block on?", "where is the {block} cube?"),
    },
    "hand": {
        "holds": ("what does the hand hold?", "what is in the hand?", "which block is the robot holding?"),
        "empty": ("is the hand empty?", "is there nothing in the hand?"),
    },
    "point": {
        "block": ("point to the {block} block", "point at the {block} cube", "show me the {block} block"),
        "plate": ("point to the {plate} plate", "point at the {plate} dish", "show me the {plate} plate"),
    },
    "box": {
        "block": (
            "box of the {block} block",
            "draw a box around the {block} cube",
            "bounding box of the {block} block",
        ),
        "plate": (
            "box of the {plate} plate",
            "draw a box around the {plate} dish",
            "bounding box of the {plate} plate",
        ),
    },
    "identify": {
        "place": ("what is at {place}?", "what do you see at {place}?", "name the thing at {place}"),
    },
    "direction": {
        "block": (
            "which way must the hand move to reach the {block} block?",
            "where does the hand go to reach the {block} cube?",
            "direction from the hand to the {block} block?",
        ),
    },
    "done": {
        "task": ("{instruction}. is it done?", "is it done? {instruction}", "{instruction}. finished?"),
    },
}
KINDS = tuple(PROMPTS)


@dataclasses.dataclass(frozen=True)
class Row:
    """A question about a picture: its kind, which of the kind's questions it is, prompt and answer.

    `block`, `plate`: (row, column), as fractions of the image, of the first block and plate that the prompt names, None
    where it names none that is there.
    """

    kind: str
    question: str
    prompt: str
    answer: str
    block: tuple[float, float] | None = None
    plate: tuple[float, float] | None = None


def ask(picture: Picture, kind: str, rng: np.random.Generator, colors: Colors) -> Row | None:
    """A question of a kind about a picture; None where this picture gives none that `colors` allows.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in PROMPTS:
        raise ValueError(f"unknown kind {kind!r}; valid: {', '.join(KINDS)}")
    for question in rng.permutation(list(PROMPTS[kind])):
        asked = _QUESTIONS[kind](picture, str(question), rng, colors)
        if asked is None:
            continue
        names, answer, named = asked
        if not _allowed(named, colors) or (kind == "done" and not _may_say(picture.instruction, colors)):
            continue
        phrasings = PROMPTS[kind][str(question)]
        prompt = _articles(phrasings[rng.integers(len(phrasings))].format(**names))
        block, plate = _point_of(picture.blocks, names.get("block")), _point_of(picture.plates, names.get("plate"))
        return Row(kind, str(question), prompt, answer, block, plate)
    return None


def _point_of(things: Sequence[Thing], color: str | None) -> tuple[float, float] | None:
    return next((thing.point for thing in things if thing.color == color), None)


def _allowed(named: Iterable[Thing], colors: Colors) -> bool:
    """Whether words may name these things in one row."""
    named = list(named)
    plates = [None, *(thing.color for thing in named if thing.what == "plate")]
    return all(colors.may_name(thing.color, plate) for thing in named if thing.what == "block" for plate in plates)


def _may_say(instruction: str, colors: Colors) -> bool:
    """Whether an instruction names no block and no pair that `colors` excludes."""
    words = [*instruction.replace(",", " ").split(), ""]
    plates = {color for color, what in zip(words, words[1:], strict=False) if what in ("plate", "dish")}
    blocks = {w for w, what in zip(words, words[1:], strict=False) if what not in ("plate", "dish")} & set(
        ALL_BLOCK_COLORS
    )
    return all(colors.may_name(block, plate) for block in blocks for plate in (None, *plates))


_Asked = tuple[dict[str, str], str, Sequence[Thing]]  # what the prompt names, the answer, what either names


def _a(name: str) -> str:
    return _articles(f"a {name}")


def _articles(text: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _some(things: Sequence[Thing], unusual: Sequence[Thing], rng: np.random.Generator) -> Thing | None:
    """One of the things; as often one of the unusual ones, where there are any, as one of all."""
    return _one(unusual if unusual and rng.random() < 0.5 else things, rng)


def _one(things: Sequence[Thing], rng: np.random.Generator) -> Thing | None:
    return things[int(rng.integers(len(things)))] if things else None


def _caption(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked:
    del question, rng, colors
    parts, carrying = [], {block.plate for block in picture.blocks}
    for block in sorted(picture.blocks, key=lambda block: block.point[1]):
        where = " in the hand" if block.held else f" on the {block.plate} plate" if block.plate else ""
        parts.append(f"{_a(block.name)}{where}")
    rest = sorted((plate for plate in picture.plates if plate.color not in carrying), key=lambda plate: plate.point[1])
    return {}, ", ".join([*parts, *(_a(plate.name) for plate in rest)]), (*picture.blocks, *picture.plates)


def _colour(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    del colors
    names, named = {}, []
    if question == "plate":
        loaded = [p for p in picture.plates if sum(block.plate == p.color for block in picture.blocks) == 1]
        plate = _one(loaded, rng)
        if plate is None:
            return None
        names, named = {"plate": plate.color}, [plate]
        block = next(block for block in picture.blocks if block.plate == plate.color)
    else:
        if question == "hand" and picture.held:
            return None
        signs = {"left": 1, "right": -1}
        order = sorted(
            ((signs[question] * b.point[1] if question in signs else math.dist(b.xy, picture.tip)), i)
            for i, b in enumerate(picture.blocks)
        )
        if order[1][0] - order[0][0] < (MARGIN if question in signs else NEARER_BY):
            return None
        block = picture.blocks[order[0][1]]
    return names, block.color, [block, *named]


def _count(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    del colors
    if question != "on":
        return {}, NUMBERS[len(picture.blocks if question == "blocks" else picture.plates)], ()
    plate = _some(picture.plates, [p for p in picture.plates if any(b.plate == p.color for b in picture.blocks)], rng)
    if plate is None:
        return None
    number = sum(block.plate == plate.color for block in picture.blocks)
    return {"plate": plate.color}, NUMBERS[number], (plate,)


def _presence(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    valid = (colors.palette or BLOCK_COLORS) if question == "block" else PLATE_COLORS + EXTRA_PLATE_COLORS
    there = [thing.color for thing in (picture.blocks if question == "block" else picture.plates)]
    present = bool(rng.random() < 0.5)
    fitting = [color for color in valid if (color in there) == present]
    if question == "block":
        fitting = [color for color in fitting if color not in colors.unnamed]
    if not fitting:
        return None
    return {question: fitting[rng.integers(len(fitting))]}, YES_NO[present], ()


def _relation(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    del colors
    if question == "side":
        block, plate = _one(picture.blocks, rng), _one(picture.plates, rng)
        if block is None or plate is None or abs(block.point[1] - plate.point[1]) < MARGIN:
            return None
        answer = "left" if block.point[1] < plate.point[1] else "right"
        return {"block": block.color, "plate": plate.color}, answer, (block, plate)
    first, second = (picture.blocks[i] for i in rng.permutation(len(picture.blocks))[:2])
    if question in ("nearer", "farther") and (first.held or second.held):
        return None  # how high something is held changes where it is in the picture
    axis = 1 if question in ("left", "right") else 0
    difference = first.point[axis] - second.point[axis]
    if abs(difference) < MARGIN:
        return None
    answer = (difference < 0) == (question in ("left", "farther"))
    return {"block": first.color, "other": second.color}, YES_NO[answer], (first, second)


def _where(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    del colors
    block = _some(picture.blocks, [block for block in picture.blocks if block.held or block.plate], rng)
    assert block is not None, "there are blocks in every scene"
    if question == "what":
        place = "in the hand" if block.held else f"on the {block.plate} plate" if block.plate else "on the table"
        under = [plate for plate in picture.plates if plate.color == block.plate]
        return {"block": block.color}, place, (block, *under)
    pairs = [(b, p) for b in picture.blocks for p in picture.plates]
    wanted = bool(rng.random() < 0.5)
    pairs = [(b, p) for b, p in pairs if (b.plate == p.color) == wanted and not b.held]
    if not pairs:
        return None
    block, plate = pairs[rng.integers(len(pairs))]
    return {"block": block.color, "plate": plate.color}, YES_NO[wanted], (block, plate)


def _hand(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    del colors
    held = picture.held
    if not picture.grasps or (held is None and rng.random() < 0.6):
        return None  # in most pictures the hand is empty, in most rows about it it should not be
    if question == "empty":
        return {}, YES_NO[held is None], ()
    return {}, held.name if held else "nothing", (held,) if held else ()


def _place(picture: Picture, question: str, rng: np.random.Generator, points: bool) -> _Asked | None:
    thing = _one(picture.blocks if question == "block" else picture.plates, rng)
    if thing is None:
        return None
    answer = location_tokens.encode_point(*thing.point) if points else location_tokens.encode_box(*thing.box)
    return {question: thing.color}, answer, (thing,)


def _point(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    del colors
    return _place(picture, question, rng, True)


def _box(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    del colors
    return _place(picture, question, rng, False)


def _identify(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    del question, colors
    thing = _one((*picture.blocks, *picture.plates), rng)
    assert thing is not None, "there are blocks in every scene"
    seen = np.argwhere(_inner(thing.pixels))
    if not len(seen):
        return None
    row, column = (seen[rng.integers(len(seen))] + 0.5) / thing.pixels.shape
    return {"place": location_tokens.encode_point(float(row), float(column))}, thing.name, (thing,)


def _inner(pixels: np.ndarray) -> np.ndarray:
    """Pixels all of whose four neighbours belong to the same thing."""
    inner = pixels.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(pixels, step, axis)
    return inner


def _direction(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    del question, colors
    free = [block for block in picture.blocks if not block.held]
    block = _some(free, [block for block in free if math.dist(block.xy, picture.tip) >= THERE], rng)
    if block is None:
        return None
    return {"block": block.color}, direction(picture.tip, block.xy), (block,)


def direction(start: tuple[float, float], end: tuple[float, float]) -> str:
    """The way from one place on the table to another: one word where one axis has twice the other's share."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    if math.hypot(dx, dy) < THERE:
        return "it is there"
    sideways = ["left" if dx < 0 else "right"] if abs(dy) < 2 * abs(dx) else []
    lengthways = ["back" if dy < 0 else "forward"] if abs(dx) < 2 * abs(dy) else []
    return " and ".join(sideways + lengthways)


def _done(picture: Picture, question: str, rng: np.random.Generator, colors: Colors) -> _Asked | None:
    del question, rng, colors
    if picture.done is None:
        return None
    return {"instruction": picture.instruction}, YES_NO[picture.done], ()


_QUESTIONS: dict[str, Callable[[Picture, str, np.random.Generator, Colors], _Asked | None]] = {
    "caption": _caption,
    "colour": _colour,
    "count": _count,
    "presence": _presence,
    "relation": _relation,
    "where": _where,
    "hand": _hand,
    "point": _point,
    "box": _box,
    "identify": _identify,
    "direction": _direction,
    "done": _done,
}


def all_texts() -> list[str]:
    """Prompts and answers, to train a text vocabulary on: every prompt and part of an answer, places left out."""
    texts = ["it is there", "nothing", "in the hand", "on the table", *NUMBERS, *YES_NO, "left", "right"]
    texts += [f"{side} and {way}" for side in ("left", "right") for way in ("forward", "back")]
    plates = PLATE_COLORS + EXTRA_PLATE_COLORS
    for block in ALL_BLOCK_COLORS:
        texts += [f"{_a(block)} block, {_a(other)} block" for other in ALL_BLOCK_COLORS if other != block]
        texts += [f"{_a(block)} block on the {plate} plate" for plate in plates]
        texts += [block, f"{_a(block)} block in the hand", f"{block} block"]
    texts += [f"{_a(plate)} plate, {_a(other)} plate" for plate in plates for other in plates if other != plate]
    texts += [f"on the {plate} plate" for plate in plates]
    for questions in PROMPTS.values():
        for phrasing in (phrasing for phrasings in questions.values() for phrasing in phrasings):
            for block, other in zip(ALL_BLOCK_COLORS, ALL_BLOCK_COLORS[1:] + ALL_BLOCK_COLORS[:1], strict=True):
                for plate in plates:
                    said = phrasing.format(block=block, other=other, plate=plate, place="", instruction="")
                    texts.append(_articles(said))
    return list(dict.fromkeys(texts))
