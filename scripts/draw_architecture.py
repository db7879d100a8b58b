"""Draws docs/architecture.svg from the imports: the rooms of octo_like, and the parts of its largest one.

    python scripts/draw_architecture.py

Who imports stands above and to the right of what is imported. The same files give the same picture; files and lines
are counted when it is drawn.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import ast
import collections
import html
import pathlib
import re
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "octo_like"
PICTURE = ROOT / "docs" / "architecture.svg"
LARGEST = "data"

COLOURS = ("#1f6feb", "#bf3989", "#1a7f37", "#9a6700", "#8250df", "#cf222e", "#0a7ea4", "#57606a")
Arrows = dict[str, set[str]]


def imported_files(path: pathlib.Path) -> set[pathlib.Path]:
    """The files of the package that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    places = (ROOT.joinpath(*name.split(".")) for name in names if name.startswith(f"{PACKAGE.name}."))
    return {place.with_suffix(".py") for place in places if place.with_suffix(".py").is_file()}


def groups(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """{name: files} of the sub-packages of a folder and of the modules beside them, without empty ones."""
    found: dict[str, list[pathlib.Path]] = {}
    for path in sorted(folder.rglob("*.py")):
        if path.stat().st_size:
            found.setdefault(path.relative_to(folder).parts[0], []).append(path)
    found.pop("__init__.py", None)
    return found


def arrows_between(parts: dict[str, list[pathlib.Path]]) -> Arrows:
    """{part: the other parts that it imports}."""
    owner = {path: name for name, paths in parts.items() for path in paths}
    arrows: Arrows = {name: set() for name in parts}
    for path, name in owner.items():
        arrows[name] |= {owner[other] for other in imported_files(path) if other in owner} - {name}
    return arrows


def reached_from(arrows: Arrows) -> Arrows:
    """{part: all that it imports, also by way of others}; of a part in a circle also itself."""
    reached = {name: set(targets) for name, targets in arrows.items()}
    for between in arrows:  # Warshall's algorithm
        for name in arrows:
            if between in reached[name]:
                reached[name] |= reached[between]
    return reached


def in_order(arrows: Arrows) -> list[str]:
    """Names so that each comes after what it imports, as far as there are no circles; ties by name."""
    reached, order = reached_from(arrows), []
    remaining = set(arrows)
    while remaining:
        # What reaches least is free, or in a circle of which every part reaches the same.
        least = min(remaining, key=lambda name: (len(reached[name] & remaining), len(arrows[name] & remaining), name))
        order.append(least)
        remaining.remove(least)
    return order


def without_implied(arrows: Arrows) -> Arrows:
    """Leaves out an arrow where other arrows lead to the same place, but for those of a circle."""
    reached = reached_from(arrows)
    circles = {name: {one for one in reached[name] if name in reached[one]} for name in arrows}
    return {
        name: {
            one
            for one in targets
            if not any(one in reached[other] and not {one, name} & circles[other] for other in targets - {one})
        }
        for name, targets in arrows.items()
    }


def descriptions() -> dict[str, str]:
    """{room: what it is}, as the package's docstring says."""
    text = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))) or ""
    return {name: " ".join(words.split()) for name, words in re.findall(r"`(\w+)`\s\(([^)]+)\)", text)}


def counted(paths: list[pathlib.Path]) -> str:
    """Files and lines, to hundreds."""
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    files = f"{len(paths)} files, " if len(paths) > 1 else ""
    return f"{files}{max(100, round(lines, -2)):,} lines"


class Staircase:
    """Boxes on a diagonal, so that every arrow is one line to the left and one down, and crosses no box.

    Args:
      step: (x, y) from one box to the next. size: (width, height) of a box, higher than none of the steps.
    """

    def __init__(self, arrows: Arrows, step: tuple[int, int], size: tuple[int, int]):
        self.arrows, self.order, self.step, self.size = arrows, in_order(arrows), step, size
        self.width = step[0] * (len(self.order) - 1) + size[0]
        self.height = step[1] * (len(self.order) - 1) + size[1]

    def corner(self, name: str) -> tuple[int, int]:
        """Upper left corner of a box."""
        place = self.order.index(name)
        return place * self.step[0], (len(self.order) - 1 - place) * self.step[1]

    def lines(self) -> list[str]:
        """The arrows, as SVG."""
        place = {name: number for number, name in enumerate(self.order)}
        entering = collections.defaultdict(list)
        for name, targets in self.arrows.items():
            for target in targets:
                entering[target].append(name)
        drawn = []
        for name in self.order:
            colour = COLOURS[place[name] % len(COLOURS)]
            # The farthest target leaves highest, and the highest source enters leftmost: so fewest lines cross.
            targets = sorted(self.arrows[name], key=place.__getitem__)
            for number, target in enumerate(targets, 1):
                sources = sorted(entering[target], key=place.__getitem__, reverse=True)
                x, y = self.corner(name)
                left, top = self.corner(target)
                down = place[target] < place[name]
                y += round(self.size[1] * number / (len(targets) + 1))
                left += round((self.step[0] - 8) * (sources.index(name) + 1) / (len(sources) + 1))
                path = f"M{x} {y}H{left}V{top}" if down else f"M{x} {y}H{x - 14}V{top - 8}H{left}V{top}"
                style = "" if down else ' stroke-dasharray="5 3"'
                drawn.append(
                    f'<path data-from="{name}" data-to="{target}" d="{path}" stroke="{colour}"{style} '
                    f'marker-end="url(#head)"/>'
                )
        return drawn

    def boxes(self, texts: dict[str, list[str]]) -> list[str]:
        """The boxes with their names and lines of text, as SVG."""
        drawn = []
        for number, name in enumerate(self.order):
            x, y = self.corner(name)
            colour = COLOURS[number % len(COLOURS)]
            drawn.append(
                f'<rect x="{x}" y="{y}" width="{self.size[0]}" height="{self.size[1]}" rx="6" fill="#fff" '
                f'stroke="{colour}" stroke-width="1.6"/>'
            )
            drawn.append(f'<text x="{x + 10}" y="{y + 19}" class="name" fill="{colour}">{name}</text>')
            for row, text in enumerate(texts[name]):
                drawn.append(f'<text x="{x + 10}" y="{y + 35 + 14 * row}" class="words">{html.escape(text)}</text>')
        return drawn


def panel(title: str, notes: str, stairs: Staircase, texts: dict[str, list[str]], y: int) -> list[str]:
    """One picture below its title; what it shows stands at the lower right, where the staircase leaves room."""
    left, lines = stairs.width - 400, textwrap.wrap(notes, 58)
    top = stairs.height - 17 * len(lines)
    words = [f'<text x="{left}" y="{top + 17 * row}" class="note">{line}</text>' for row, line in enumerate(lines, 1)]
    return [
        f'<text x="20" y="{y + 8}" class="title">{title}</text>',
        f'<g transform="translate(20 {y + 32})">',
        *stairs.lines(),
        *stairs.boxes(texts),
        *words,
        "</g>",
    ]


def draw() -> str:
    """The whole picture, as SVG."""
    rooms = {name: paths for name, paths in groups(PACKAGE).items() if not name.endswith(".py")}
    summaries = descriptions()
    upper = Staircase(arrows_between(rooms), step=(104, 84), size=(262, 70))
    room_texts = {name: [*textwrap.wrap(summaries[name], 44)[:2], counted(paths)] for name, paths in rooms.items()}
    parts = groups(PACKAGE / LARGEST)
    lower = Staircase(without_implied(arrows_between(parts)), step=(64, 54), size=(150, 44))
    part_texts = {name: [counted(paths)] for name, paths in parts.items()}
    split = 30 + 32 + upper.height + 50
    width, height = 40 + max(upper.width, lower.width), split + 32 + lower.height + 20
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
            "<style>text{font-family:Helvetica,Arial,sans-serif} .title{font-size:17px;font-weight:bold;fill:#1f2328}",
            ".name{font-size:15px;font-weight:bold} .words{font-size:11.5px;fill:#57606a}",
            ".note{font-size:13px;fill:#57606a} path{fill:none;stroke-width:1.5}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0L8 4L0 8z" style="fill:#57606a;stroke:none"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *panel(
                "The rooms of octo_like",
                "An arrow leads from a room to what it imports. train.py, finetune.py, configs/, scripts/ and "
                "notebooks/ use the rooms; nothing imports them.",
                *(upper, room_texts, 30),
            ),
            *panel(
                f"Inside {LARGEST}",
                "Folders and the modules beside them. Arrows that others imply are left out; a dashed one leads "
                "backwards, in a circle of imports.",
                *(lower, part_texts, split),
            ),
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=PICTURE, help="the file to write")
    arguments = parser.parse_args()
    arguments.output.write_text(draw(), encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
