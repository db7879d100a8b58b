"""Pictures with questions: every answer is judged by hand, from the state, and places by the pixels themselves."""

import collections
import math
import re

import numpy as np
import pytest

from octo_like.common import location_tokens
from octo_like.envs import LONG_EMBODIMENTS, picture_rows, picture_words, render
from octo_like.envs.colors import ALL_BLOCK_COLORS, Colors
from octo_like.envs.picture_words import KINDS, PROMPTS

ROWS = 700
VIVID = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan")


@pytest.fixture(scope="module")
def rows():
    """(picture, row) of the first seeds that have one, and those of a few seeds of each kind more."""
    seeds = range(picture_rows.first_seed("train"), picture_rows.first_seed("train") + ROWS)
    return [found for seed in seeds if (found := picture_rows.row(seed)) is not None]


def kind(rows, *names):
    return [(picture, row) for picture, row in rows if row.kind in names]


def read_prompt(row):
    """The names in a prompt, read back through the phrasings."""
    for phrasing in PROMPTS[row.kind][row.question]:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(phrasing))
        match = re.fullmatch(pattern, re.sub(r"\ban (?=[aeiou])", "a ", row.prompt))
        if match:
            return match.groupdict()
    raise AssertionError(f"{row.prompt!r} is no phrasing of {row.kind}, {row.question}")


def test_there_is_enough_of_everything(rows):
    counts = collections.Counter(row.kind for _, row in rows)
    assert len(rows) > 0.9 * ROWS and set(counts) == set(KINDS)
    assert min(counts.values()) > 0.5 * ROWS / len(KINDS) and max(counts.values()) < 2 * ROWS / len(KINDS)
    answers = {name: collections.Counter(row.answer for _, row in kind(rows, name)) for name in KINDS}
    for name in ("relation", "presence", "done"):
        assert 0.5 < answers[name]["yes"] / answers[name]["no"] < 2, name
    assert answers["hand"]["nothing"] + answers["hand"]["yes"] < 0.8 * counts["hand"]
    asked = {(row.kind, row.question) for _, row in rows}
    assert asked == {(name, question) for name, questions in PROMPTS.items() for question in questions}
    assert {b.color for picture, _ in rows for b in picture.blocks} == set(ALL_BLOCK_COLORS)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", row.prompt) for _, row in rows)
    assert all(row.prompt and row.answer and row.answer == row.answer.strip().lower() for _, row in rows)


def test_questions_of_colours_counts_and_presence(rows):
    for picture, row in kind(rows, "colour", "count", "presence"):
        names, blocks, plates = read_prompt(row), list(picture.blocks), list(picture.plates)
        if row.question == "left":
            want = min(blocks, key=lambda b: b.point[1]).color
        elif row.question == "right":
            want = max(blocks, key=lambda b: b.point[1]).color
        elif row.question == "hand":
            want = min(blocks, key=lambda b: math.dist(b.xy, picture.tip)).color
        elif row.kind == "colour":
            (want,) = [b.color for b in blocks if b.plate == names["plate"]]
        elif row.kind == "count":
            on = [b for b in blocks if b.plate == names.get("plate")]
            number = len({"blocks": blocks, "plates": plates, "on": on}[row.question])
            want = ["none", "one", "two", "three", "four"][number]
        else:
            there = [t.color for t in (blocks if row.question == "block" else plates)]
            want = "yes" if names[row.question] in there else "no"
        assert row.answer == want, row


def test_relations(rows):
    for picture, row in kind(rows, "relation"):
        names = read_prompt(row)
        things = {b.color: b for b in picture.blocks}
        block = things[names["block"]]
        if row.question == "side":
            plate = next(p for p in picture.plates if p.color == names["plate"])
            assert row.answer == ("left" if block.point[1] < plate.point[1] else "right")
            continue
        (row1, column1), (row2, column2) = block.point, things[names["other"]].point
        holds = {"left": column1 < column2, "right": column1 > column2, "nearer": row1 > row2, "farther": row1 < row2}
        assert row.answer == ("yes" if holds[row.question] else "no")
        apart = abs(column1 - column2) if row.question in ("left", "right") else abs(row1 - row2)
        assert apart >= 3 / 64
        if row.question in ("nearer", "farther") and abs(block.xy[1] - things[names["other"]].xy[1]) > 0.06:
            # Nearer in the picture is nearer on the table, the camera being straight enough.
            assert (block.xy[1] < things[names["other"]].xy[1]) == holds["nearer"]


def test_where_things_are_and_what_the_hand_holds(rows):
    held_seen = 0
    for picture, row in kind(rows, "where", "hand"):
        names = read_prompt(row)
        held = [b for b in picture.blocks if b.held]
        held_seen += bool(held)
        if row.kind == "hand":
            empty = {True: "yes", False: "no"} if row.question == "empty" else {True: "nothing"}
            assert row.answer == empty.get(not held, f"{held[0].color} block" if held else None)
            continue
        block = next(b for b in picture.blocks if b.color == names["block"])
        under = [p.color for p in picture.plates if math.dist(p.xy, block.xy) < 0.08 and block.plate == p.color]
        if row.question == "on":
            assert row.answer == ("yes" if names["plate"] in under else "no")
        else:
            assert row.answer == (
                "in the hand" if block in held else f"on the {under[0]} plate" if under else "on the table"
            )
    assert held_seen > 10


def test_captions_name_everything_once(rows):
    for picture, row in kind(rows, "caption"):
        assert collections.Counter(re.findall(r"an? (\w+) block", row.answer)) == {b.color: 1 for b in picture.blocks}
        assert {*re.findall(r"(\w+) plate", row.answer)} == {p.color for p in picture.plates}
        pairs = re.findall(r"(\w+) block on the (\w+) plate", row.answer)
        assert set(pairs) == {(b.color, b.plate) for b in picture.blocks if b.plate}
        assert re.findall(r"(\w+) block in the hand", row.answer) == [b.color for b in picture.blocks if b.held]
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", row.answer)


def test_directions(rows):
    words = set()
    for picture, row in kind(rows, "direction"):
        block = next(b for b in picture.blocks if b.color == read_prompt(row)["block"])
        words.add(row.answer)
        angle = math.degrees(math.atan2(block.xy[1] - picture.tip[1], block.xy[0] - picture.tip[0])) % 360
        if math.dist(block.xy, picture.tip) < 0.04:
            assert row.answer == "it is there"
            continue
        near = math.degrees(math.atan(0.5))  # slope 1/2: within 26.6 degrees of an axis it is one word
        axis, along = ["right", "forward", "left", "back"], min(range(5), key=lambda i: abs(angle - 90 * i)) % 4
        off = min(abs(angle - 90 * i) for i in range(5))
        if off < near:
            assert row.answer == axis[along]
        else:
            quadrant = int(angle // 90)
            two = {axis[quadrant], axis[(quadrant + 1) % 4]}
            assert set(row.answer.split(" and ")) == two
    assert len(words) == 9
    assert picture_words.direction((0, 0), (0.1, 0.1)) == "right and forward"
    assert picture_words.direction((0, 0), (-0.1, -0.04)) == "left"


def blob(picture, color):
    """(rows, columns) of the pixels that look like this colour, found without asking the renderer."""
    image = picture.image.astype(float)
    chroma = image - image.mean(-1, keepdims=True)
    wanted = np.array((render.BLOCK_RGB | render.EXTRA_BLOCK_RGB)[color], float)
    wanted -= wanted.mean()
    size = np.linalg.norm(chroma, axis=-1)
    alike = (chroma @ wanted) / np.maximum(size * np.linalg.norm(wanted), 1e-9)
    return np.nonzero((alike > 0.97) & (size > 0.45 * np.linalg.norm(wanted)))  # tables are brown, not orange


ALIKE = {"red": {"orange", "pink"}, "orange": {"red", "yellow"}, "blue": {"purple", "cyan"}, "cyan": {"blue", "green"}}
ALIKE |= {"purple": {"pink", "blue"}, "pink": {"purple", "red"}, "yellow": {"orange"}, "green": {"cyan"}}


def test_places_are_where_the_pixels_of_that_colour_are(rows):
    """Of blocks in scenes in which nothing else looks alike."""
    checked = collections.Counter()
    for picture, _ in rows:
        for block in picture.blocks:
            others = {t.color for t in (*picture.blocks, *picture.plates) if t is not block}
            if block.color not in VIVID or others & (ALIKE[block.color] | {block.color}) or block.pixels.sum() < 34:
                continue
            ys, xs = blob(picture, block.color)
            if len(ys) < 25:
                continue
            token = location_tokens.encode_point(*block.point)
            center = np.array(location_tokens.decode_point(token)) * 64
            assert np.abs(center - (np.median(ys) + 0.5, np.median(xs) + 0.5)).max() <= 2.5, (block.color, token)
            top, left, bottom, right = np.array(location_tokens.decode_box(location_tokens.encode_box(*block.box))) * 64
            # Nearly all of the blob is in the box; the renderer's own pixels reach all of its edges unless hidden.
            inside = (
                (ys + 0.5 > top - 1.5) & (ys + 0.5 < bottom + 1.5) & (xs + 0.5 > left - 1.5) & (xs + 0.5 < right + 1.5)
            )
            assert inside.mean() > 0.95
            checked[block.color] += 1
    assert len(checked) == len(VIVID) and min(checked.values()) >= 3 and sum(checked.values()) > 100


def test_points_boxes_and_names_agree_with_the_picture(rows):
    for picture, row in kind(rows, "point", "box", "identify"):
        names = read_prompt(row)
        if row.kind == "identify":
            y, x = (int(fraction * 64) for fraction in location_tokens.decode_point(names["place"]))
            thing = next(t for t in (*picture.blocks, *picture.plates) if f"{t.color} {t.what}" == row.answer)
            assert thing.pixels[y, x]
            continue
        things = picture.blocks if row.question == "block" else picture.plates
        thing = next(t for t in things if t.color == names[row.question])
        ys, xs = np.nonzero(thing.pixels)
        if row.kind == "point":
            y, x = np.array(location_tokens.decode_point(row.answer)) * 64
            assert ys.min() - 2 <= y <= ys.max() + 3 and xs.min() - 2 <= x <= xs.max() + 3
        else:
            top, left, bottom, right = np.array(location_tokens.decode_box(row.answer)) * 64
            assert top <= ys.min() + 1.5 and left <= xs.min() + 1.5
            assert bottom >= ys.max() - 0.5 and right >= xs.max() - 0.5
            # No larger than the thing, as far as it is seen: at most what a hand in front of it hides.
            assert bottom - top < 20 * 1.5 and right - left < 20 * 1.5


def test_a_row_has_the_places_of_what_its_prompt_names(rows):
    """Where the prompt names a thing that is there, the place is within its pixels; else there is none."""
    told = collections.Counter()
    for picture, row in rows:
        names = {} if row.kind == "done" else read_prompt(row)
        for what, things, place in (("block", picture.blocks, row.block), ("plate", picture.plates, row.plate)):
            seen = [thing for thing in things if thing.color == names.get(what)]
            assert (place is not None) == bool(seen), (row, what)
            if place is not None:
                ys, xs = np.nonzero(seen[0].pixels)
                y, x = np.array(place) * 64
                assert ys.min() - 2 <= y <= ys.max() + 3 and xs.min() - 2 <= x <= xs.max() + 3
                told[row.kind, what] += 1
    assert {kind for kind, what in told if what == "block"} == {
        "presence", "relation", "where", "point", "box", "direction"
    }  # fmt: skip
    assert {kind for kind, what in told if what == "plate"} == {
        "colour", "count", "presence", "relation", "where", "point", "box"
    }  # fmt: skip


def test_whether_it_is_done(rows):
    checked = collections.Counter()
    for picture, row in kind(rows, "done"):
        instruction = picture.instruction
        assert instruction in row.prompt
        words = instruction.replace(",", "").split()
        plates = [a for a, b in zip(words, words[1:], strict=False) if b in ("plate", "dish")]
        blocks = [a for a, b in zip(words, words[1:], strict=False) if b in ("block", "cube")]
        if len(blocks) != 1 or len(plates) > 1 or "but" in words or "leave" in words or "except" in words:
            continue  # a long task: see tests/envs/test_long_tasks.py
        block = next(b for b in picture.blocks if b.color == blocks[0])
        if plates:
            done = block.plate == plates[0] and not block.held
        else:
            done = math.dist(block.xy, picture.tip) < 0.045
        assert row.answer == ("yes" if done else "no")
        checked[row.answer] += 1
    assert min(checked["yes"], checked["no"]) > 5


def test_words_and_pairs_that_are_not_to_be_said():
    colors = Colors(ALL_BLOCK_COLORS, frozenset({"purple", "red"}), frozenset({("green", "white"), ("blue", "orange")}))
    start, said, seen = picture_rows.first_seed("val"), [], 0
    for seed in range(start, start + 250):
        found = picture_rows.row(seed, colors=colors)
        if found is None:
            continue
        picture, row = found
        seen += any(block.color == "purple" for block in picture.blocks)
        said.append(f"{row.prompt} {row.answer}")
        things = re.findall(r"(\w+) (block|cube|plate|dish)", said[-1])
        blocks = {color for color, what in things if what in ("block", "cube")}
        plates = {color for color, what in things if what in ("plate", "dish")}
        if row.kind == "colour":
            blocks |= {row.answer}
        assert not blocks & {"purple", "red"}, said[-1]
        assert not {(b, p) for b in blocks for p in plates} & colors.unnamed_pairs, said[-1]
    assert len(said) > 100 and seen > 20


def test_rows_do_not_depend_on_who_makes_them():
    def make(workers):
        with picture_rows.PictureSimulator(workers, kinds=("point", "count"), robots=("arm3", "pusher")) as simulator:
            return list(simulator.rows("val", 12))

    alone = make(0)
    np.testing.assert_equal(make(2), alone)
    assert {row["episode_metadata"]["kind"] for row in alone} == {"point", "count"}
    first = picture_rows.first_seed("val")
    assert all(first <= row["episode_metadata"]["seed"] < first + 100 for row in alone)


def test_another_data_seed_gives_other_rows():
    assert picture_rows.first_seed("train", 3) == picture_rows.first_seed("train") + 3_000_000
    with pytest.raises(ValueError, match="data seed 100; valid: 0 to 99"):
        picture_rows.first_seed("train", 100)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"kinds": ("shape",)}, "unknown kind 'shape'; valid: caption, colour"),
        ({"robots": ("hand",)}, "unknown robot 'hand'; valid: pusher"),
        ({"kinds": ()}, "no kind; valid"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        picture_rows.PictureSimulator(**arguments)
    assert set(picture_rows.ROBOTS) <= set(LONG_EMBODIMENTS)


def test_every_text_is_in_the_table_that_the_vocabulary_is_made_from(rows):
    words = {word for text in picture_words.all_texts() for word in re.findall(r"[a-z]+", text)}
    for _, row in rows:
        if row.kind != "done":  # its words are those of instructions
            text = re.sub(r"<loc\d\d>", "", f"{row.prompt} {row.answer}")
            assert set(re.findall(r"[a-z]+", text)) <= words
