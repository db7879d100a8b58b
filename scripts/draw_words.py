"""Draws pictures of docs/language.md: rows of pictures and words, long tasks with their sub-tasks, paths of the hand.

python scripts/draw_words.py      # docs/figures/words.png, long_tasks.png and hand_paths.png
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import pathlib
import textwrap

import numpy as np
from PIL import Image, ImageDraw

from octo_like.common import location_tokens
from octo_like.envs import LongTabletopEnv, picture_rows
from octo_like.envs.paths import PathsAhead
from octo_like.envs.picture_words import KINDS
from octo_like.robot.record import annotate

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "docs" / "figures"
SIZE, WIDTH, TEXT = 128, 196, 62  # of a picture, of its column, of the words below it, in pixels
LONG = (("gripper", "match", 3), ("arm", "place_in_order", 4), ("arm", "all_but_one", 6), ("gripper", "clear", 8))
COLUMNS = 6


def words() -> Image.Image:
    """A row of each kind, the first that the training seeds give."""
    found, seed = {}, picture_rows.first_seed("train")
    while len(found) < len(KINDS):
        row = picture_rows.row(seed)
        if row is not None:
            found.setdefault(row[1].kind, row)
        seed += 1
    sheet = Image.new("RGB", (COLUMNS * WIDTH, len(KINDS) // COLUMNS * (SIZE + TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, kind in enumerate(KINDS):
        picture, row = found[kind]
        x, y = number % COLUMNS * WIDTH, number // COLUMNS * (SIZE + TEXT)
        image = Image.fromarray(picture.image).resize((SIZE, SIZE), Image.Resampling.NEAREST)
        if kind in ("point", "box"):
            _mark(ImageDraw.Draw(image), [SIZE * number for number in location_tokens.decode(row.answer)])
        sheet.paste(image, (x, y))
        lines = textwrap.wrap(row.prompt, 32) + textwrap.wrap(f"-> {row.answer}", 32)
        draw.text((x, y + SIZE + 3), "\n".join(lines), fill="black")
    return sheet


def _mark(draw: ImageDraw.ImageDraw, places: list[float]) -> None:
    """A ring at a point (row, column), or a frame around a box (top, left, bottom, right)."""
    if len(places) == 2:
        row, column = places
        draw.ellipse((column - 5, row - 5, column + 5, row + 5), outline="magenta", width=2)
    else:
        top, left, bottom, right = places
        draw.rectangle((left, top, right, bottom), outline="magenta", width=2)


def long_tasks() -> Image.Image:
    """An expert's episode of each of some tasks: a frame of each sub-task."""
    strips = []
    for robot, task, seed in LONG:
        env = LongTabletopEnv(robot, image_size=SIZE)
        observation, info = env.reset(seed=seed, options={"task": task})
        expert, frames, done = env.expert(np.random.default_rng(0)), [], False
        while True:
            frames.append((observation["image_primary"], info["subtask"], info["progress"]))
            if done:
                break
            observation, _, terminated, truncated, info = env.step(expert.act())
            done = terminated or truncated
        middle = [
            (first + last) // 2
            for first, last in _runs([subtask for _, subtask, _ in frames])  # where the sub-task is well under way
        ]
        strip = Image.new("RGB", (7 * WIDTH, SIZE + TEXT), "white")
        draw = ImageDraw.Draw(strip)
        draw.text((0, 2), f'{robot}: "{info["instruction"]}"', fill="black")
        for column, index in enumerate(middle[:7]):
            image, subtask, progress = frames[index]
            draw.text((column * WIDTH, 18), f"{subtask}\nprogress {progress:.2f}", fill="#1f6feb")
            strip.paste(Image.fromarray(image), (column * WIDTH, 46))
        strips.append(np.asarray(strip))
    return Image.fromarray(np.concatenate(strips))


def hand_paths() -> Image.Image:
    """An expert's episode of a long task, every few steps, with the path that it takes from there."""
    env = PathsAhead(LongTabletopEnv("arm", image_size=SIZE))
    observation, info = env.reset(seed=3)
    expert, pictures, done = env.unwrapped.expert(np.random.default_rng(0)), [], False
    while not done:
        pictures.append(annotate(observation["image_primary"], info["instruction"], None, 2, info["path"]))
        observation, _, terminated, truncated, info = env.step(expert.act())
        done = terminated or truncated
    chosen = pictures[:: len(pictures) // 4][:4]
    sheet = Image.new("RGB", (len(chosen) * (chosen[0].width + 8) - 8, chosen[0].height), "white")
    for number, picture in enumerate(chosen):
        sheet.paste(picture, (number * (picture.width + 8), 0))
    return sheet


def _runs(texts: list[str]) -> list[tuple[int, int]]:
    """(first, last) index of each stretch of equal texts."""
    starts = [i for i, text in enumerate(texts) if i == 0 or text != texts[i - 1]]
    return list(zip(starts, [i - 1 for i in starts[1:]] + [len(texts) - 1], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER, help="the folder to write to")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in (("words", words), ("long_tasks", long_tasks), ("hand_paths", hand_paths)):
        draw().save(output / f"{name}.png", optimize=True)
        print(f"wrote {output / name}.png")


if __name__ == "__main__":
    main()
