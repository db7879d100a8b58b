"""Draws the pictures of the docs: docs/figures/*.svg, and with a trained policy of the tabletop the GIF of the README.

    python scripts/draw_figures.py                                        # the figures of docs/concepts.md
    python scripts/draw_figures.py --gif runs/tabletop/export             # docs/figures/tabletop.gif

The block mask is computed by the rule that the model uses, lanes by the functions that the data uses. The GIF shows
the first episodes of the evaluation's seeds, tasks in turns, whether they succeed or not.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "docs" / "figures"
INK, GREY, LIGHT = "#1f2328", "#57606a", "#d0d7de"
COLOURS = {
    "task": "#8250df",
    "obs": "#1f6feb",
    "readout": "#1a7f37",
    "pad": "#d0d7de",
    "loss": "#cf222e",
    "now": "#bf8700",
}
GIF_ROBOTS = {"pusher": ("reach", "push"), "gripper": ("reach", "pick_and_place"), "arm": ("reach", "pick_and_place")}
HELD = 4  # frames for which the end of an episode is shown


class Drawing:
    """Rectangles, texts and arrows of one SVG, in pixels."""

    def __init__(self, width: int, height: int):
        self.width, self.height, self.parts = width, height, list[str]()

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, *, text: str = "", ink: str = "#fff", opacity=1.0
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="{fill}" fill-opacity="{opacity:g}"/>'
        )
        if text:
            self.text(x + w / 2, y + h / 2 + 4, text, ink=ink, anchor="middle")

    def text(
        self, x: float, y: float, text: str, *, ink: str = INK, size: float = 12, anchor: str = "start", bold=False
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{ink}" font-size="{size:g}" text-anchor="{anchor}"{weight}>{text}</text>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float, colour: str = GREY, *, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{colour}" stroke-width="1.5" fill="none"{dash} '
            'marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
                "<style>text{font-family:Helvetica,Arial,sans-serif}</style>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>',
                f'<rect width="{self.width}" height="{self.height}" fill="#fff"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def tokens() -> str:
    """The token sequence of a window of two and who attends to whom."""
    from octo_like.model.attention import GroupLayout, block_mask

    layouts = [GroupLayout("task_language", "task", 3, -1)]
    for step in (0, 1):
        layouts += [
            GroupLayout("obs_primary", "obs", 4, step),
            GroupLayout("obs_wrist", "obs", 2, step),
            GroupLayout("readout_action", "readout", 1, step),
        ]
    allowed = block_mask(layouts)
    cell, left, top = 17, 170, 108
    count = len(allowed)
    out = Drawing(left + count * cell + 20, top + count * cell + 60)
    out.text(12, 24, "One row for each token: what it attends to", size=15, bold=True)
    owner = [layout for layout in layouts for _ in range(layout.size)]
    for row in range(count):
        for column in range(count):
            fill = COLOURS[owner[column].role] if allowed[row, column] else "#f6f8fa"
            out.box(left + column * cell, top + row * cell, cell - 1.5, cell - 1.5, fill, opacity=0.85)
    start = 0
    for layout in layouts:
        place, size = start * cell, layout.size * cell
        colour = COLOURS[layout.role]
        out.box(left + place, top - 14, size - 2, 9, colour)
        out.box(left - 14, top + place, 9, size - 2, colour)
        out.text(left - 20, top + place + size / 2 + 4, layout.name, ink=colour, anchor="end")
        start += layout.size
    for title, first, last in (("task", 0, 3), ("timestep 0: the past", 3, 10), ("timestep 1: now", 10, 17)):
        middle = left + (first + last) / 2 * cell
        out.text(middle, top - 24, title, ink=GREY, anchor="middle")
    out.text(12, 48, "Task tokens see the task. Observations see the task and what was observed until then.", ink=GREY)
    out.text(12, 65, "The readout sees all of that, and nobody sees the readout: it reads without writing.", ink=GREY)
    out.text(12, out.height - 30, "Tokens that are padding or missing are masked as well, row by row.", ink=GREY)
    out.text(12, out.height - 13, "The action head reads the readout of the last timestep.", ink=GREY)
    return out.svg()


def windows() -> str:
    """One sample of an episode: window, chunk, goal, and what is masked at the edges."""
    out = Drawing(640, 330)
    out.text(12, 24, "A sample: a window of 2 observations, a chunk of 4 actions", size=15, bold=True)
    width, left, steps = 46, 60, 12

    def row(y: int, name: str, now: int, goal: int) -> None:
        out.text(12, y - 30, name, ink=GREY)
        for step in range(steps):
            x = left + step * width
            in_window, in_chunk = now - 1 <= step <= now, now <= step < now + 4
            out.box(
                x,
                y - 20,
                width - 4,
                26,
                COLOURS["obs"] if in_window else "#eaeef2",
                text=f"o{step}",
                ink="#fff" if in_window else GREY,
            )
            valid = step <= goal
            out.box(
                x,
                y + 12,
                width - 4,
                26,
                (COLOURS["readout"] if valid else COLOURS["pad"]) if in_chunk else "#eaeef2",
                text=f"a{step}",
                ink="#fff" if in_chunk and valid else GREY,
            )
        out.box(left + goal * width, y + 44, width - 4, 15, COLOURS["task"], text="goal", ink="#fff")

    row(92, "Step 4: the goal image is of a later step of the episode, here step 9", 4, 9)
    row(192, "Step 8 with the goal at step 9: actions past the goal are masked (grey)", 8, 9)
    y = 262
    out.text(12, y + 8, "Step 0: the window reaches before the episode, that place is masked", ink=GREY)
    for i, name in enumerate(("pad", "o0")):
        out.box(
            left + i * width,
            y + 18,
            width - 4,
            26,
            COLOURS["pad"] if i == 0 else COLOURS["obs"],
            text=name,
            ink=GREY if i == 0 else "#fff",
        )
    for i in range(4):
        out.box(left + (3 + i) * width, y + 18, width - 4, 26, COLOURS["readout"], text=f"a{i}")
    out.text(left + 7 * width + 8, y + 35, "timestep_pad_mask = (False, True)", ink=GREY)
    return out.svg()


def lanes() -> str:
    """Samples of a batch, dealt to lanes, opened by hosts; and the same by other hosts."""
    from octo_like.common.lanes import check_lanes

    batch, count = 16, check_lanes(8, 16)
    rows, width, left, colours = (
        batch // count,
        34,
        70,
        (COLOURS["obs"], COLOURS["now"], COLOURS["readout"], COLOURS["task"]),
    )
    out = Drawing(640, 318)
    out.text(
        12,
        24,
        f"{batch} samples of each batch, {count} lanes, and any number of hosts that divides them",
        size=15,
        bold=True,
    )

    def line(y: int, batch_number: int, hosts: int, note: str) -> None:
        out.text(12, y + 20, f"batch {batch_number}", ink=GREY)
        for row in range(batch):
            lane = row // rows
            host = lane * hosts // count
            out.box(left + row * width, y, width - 2, 30, colours[host % 4], text=str(batch_number * batch + row))
        for lane in range(count):
            out.text(left + (lane * rows + rows / 2) * width, y - 5, f"lane {lane}", ink=GREY, size=10, anchor="middle")
        out.text(left, y + 48, note, ink=GREY)

    line(66, 0, 4, "four hosts (colours): each opens the two lanes of its rows")
    line(144, 1, 4, "sample 21 is the same frame with the same random numbers, whoever makes it: its number says all")
    line(222, 2, 2, "preempted, continued by two hosts: the very next batch, from the same lanes")
    out.text(12, 302, "Each lane walks its own share of the episodes; a position in the data is one integer.", ink=GREY)
    return out.svg()


def checkpoints() -> str:
    """A run that is killed between two checkpoints, and what the next start does."""
    out = Drawing(640, 300)
    out.text(12, 24, "A checkpoint, and a run that was killed", size=15, bold=True)
    for i, (title, lines, colour) in enumerate(
        (
            ("state", ("parameters", "optimizer", "averages", "step"), COLOURS["obs"]),
            (
                "position",
                ("sample number n", "order of the data", "(mixture, indices,", "seed, lanes)"),
                COLOURS["task"],
            ),
            ("proof", ("two checksums of", "every array, hash", "of every file"), COLOURS["readout"]),
            ("story", ("config, clock,", "code and versions,", "where it began"), COLOURS["now"]),
        )
    ):
        x = 14 + i * 155
        out.box(x, 42, 145, 24, colour, text=title)
        for row, words in enumerate(lines):
            out.text(x + 8, 84 + 16 * row, words, ink=GREY)
    y, start, scale = 190, 40, 0.56
    for first, last, colour, note in ((0, 520, COLOURS["obs"], ""), (400, 1000, COLOURS["obs"], "")):
        level = y if first == 0 else y + 46
        out.box(start + first * scale, level, (last - first) * scale, 14, colour, opacity=0.85)
        out.text(start + (first + last) / 2 * scale, level - 6, note, anchor="middle")
    for step in (200, 400):
        out.box(start + step * scale - 2, y - 8, 4, 30, INK)
        out.text(start + step * scale, y - 13, f"{step}", ink=INK, anchor="middle", size=11)
    for step in (600, 800, 1000):
        out.box(start + step * scale - 2, y + 38, 4, 30, INK)
        out.text(start + step * scale, y + 33, f"{step}", ink=INK, anchor="middle", size=11)
    out.text(start + 528 * scale, y + 12, "killed at step 520", ink=COLOURS["loss"])
    out.arrow(start + 520 * scale, y + 18, start + 404 * scale, y + 42, COLOURS["loss"], dashed=True)
    out.text(start, y + 57, "steps 401 to 520 again, with", ink=GREY, size=11)
    out.text(start, y + 71, "the same samples: same bits", ink=GREY, size=11)
    out.text(12, 286, "A damaged newest step is set aside, loudly, and the one before it is used.", ink=GREY)
    return out.svg()


FIGURES: dict[str, Callable[[], str]] = {
    "tokens": tokens,
    "windows": windows,
    "lanes": lanes,
    "checkpoints": checkpoints,
}


def tabletop_gif(export: str, output: pathlib.Path, *, size: int, count: int) -> list[Any]:
    """A GIF of the robots side by side, `count` episodes of each one after the other, framed by their outcome.

    Returns:
      The episodes, robot by robot.
    """
    import gymnasium
    from PIL import Image

    from octo_like import Policy
    from octo_like.envs import EVALUATION_SEEDS, TabletopEnv
    from octo_like.robot import rollout

    class Filmed(gymnasium.ObservationWrapper):
        """Also shows the scene as people see it; the policy does not read that."""

        def __init__(self, env):
            super().__init__(env)
            film = gymnasium.spaces.Box(0, 255, (256, 256, 3), np.uint8)
            self.observation_space = gymnasium.spaces.Dict({**env.observation_space.spaces, "image_film": film})

        def observation(self, observation):
            return {**observation, "image_film": self.env.render()}

    policy = Policy.load_pretrained(export)
    films, episodes = [], []
    for robot, tasks in GIF_ROBOTS.items():
        of_robot = rollout.evaluate(
            policy,
            lambda robot=robot: Filmed(TabletopEnv(robot, render_mode="rgb_array")),
            [EVALUATION_SEEDS + len(films) * count + i for i in range(count)],
            options=[{"task": tasks[i % len(tasks)]} for i in range(count)],
            unnormalize=f"tabletop_{robot}",
            exec_horizon=2,
            batch_size=count,
            record=count,
        )
        films.append([tile for episode in of_robot for tile in _tiles(episode, size)])
        episodes += of_robot
    length = max(len(film) for film in films)
    films = [film + film[-1:] * (length - len(film)) for film in films]
    pictures = []
    for tiles in zip(*films, strict=True):
        whole = Image.new("RGB", (sum(tile.width + 4 for tile in tiles) - 4, tiles[0].height), "white")
        for i, tile in enumerate(tiles):
            whole.paste(tile, (i * (tile.width + 4), 0))
        pictures.append(whole)
    # One palette of all scenes: the colours of blocks are what the words are about.
    some = pictures[:: max(1, length // 24)]
    all_scenes = Image.new("RGB", (pictures[0].width, pictures[0].height * len(some)))
    for i, picture in enumerate(some):
        all_scenes.paste(picture, (0, i * picture.height))
    palette = all_scenes.quantize(200, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    duration = [170] * (length - 1) + [2000]
    small[0].save(output, "GIF", save_all=True, append_images=small[1:], duration=duration, loop=0, disposal=1)
    return episodes


def _tiles(episode: Any, size: int) -> list[Any]:
    """Pictures of an episode, below two lines of words; the border of the last ones says how it ended."""
    from PIL import Image

    from octo_like.robot.record import BORDER, FONT_SIZE, annotate

    top = 2 * (FONT_SIZE + 3) + 4
    pictures = []
    for frame in episode.frames:
        reduced = Image.fromarray(np.asarray(frame)[:, :256]).resize((size, size), Image.Resampling.LANCZOS)
        for outcome in (None, episode.success):
            tile = annotate(np.asarray(reduced), episode.instruction, outcome, 1)
            whole = Image.new("RGB", (tile.width, size + top + 2 * BORDER), tile.getpixel((0, 0)))
            whole.paste(tile, (0, whole.height - tile.height))
            whole.paste("white", (BORDER, BORDER, tile.width - BORDER, whole.height - tile.height + BORDER))
            pictures.append(whole)
    return pictures[::2] + pictures[-1:] * HELD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gif", metavar="EXPORT", help="an exported policy of the tabletop; draws the GIF alone")
    parser.add_argument("--count", type=int, default=6, help="episodes of each robot in it (default: 6)")
    parser.add_argument("--size", type=int, default=224, help="of the pictures in it, in pixels (default: 224)")
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER, help="the folder to write to")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.gif:
        output = arguments.output / "tabletop.gif"
        for e in tabletop_gif(arguments.gif, output, size=arguments.size, count=arguments.count):
            print(f"{'success' if e.success else 'failure'}  {e.steps:3d} steps  {e.instruction}")
        print(f"wrote {output} ({output.stat().st_size / 1e3:.0f} kB)")
        return
    for name, draw in FIGURES.items():
        (arguments.output / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(f"wrote {arguments.output / name}.svg")


if __name__ == "__main__":
    main()
