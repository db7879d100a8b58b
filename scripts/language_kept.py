"""Results of scripts/benchmark_language.py in one small file, which can be kept where the workdir cannot.

{"cells": {name of a result: {"seconds", "episodes" or "answers": {column: [a value of each]}, ...}},
 "losses": {name of a training: curves}}
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octo_like.common.files import write_whole

# What tables and figure read of an episode and of an answer.
COLUMNS = {
    "episodes": ("robot", "seed", "task", "success", "steps", "progress", "plans", "agreed"),
    "answers": ("kind", "answer", "said", "taught"),
}


class Kept:
    """The file at a path; nothing is in one that is not there yet."""

    def __init__(self, path: Path):
        self.path = path
        content = json.loads(path.read_text()) if path.exists() else {}
        self.cells: dict[str, Any] = content.get("cells", {})
        self.losses: dict[str, Any] = content.get("losses", {})

    def result(self, name: str) -> dict[str, Any] | None:
        """A result as `benchmark_language.Benchmark.result` gives it, with the columns that are kept."""
        return unpack(self.cells[name]) if name in self.cells else None

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        self.cells[name] = pack(result)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f'"{part}": {{\n'
            + ",\n".join(f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in rows)
            + "\n}"
            for part, rows in (("cells", sorted(self.cells.items())), ("losses", sorted(self.losses.items())))
        ]
        write_whole(self.path, "{" + ",\n".join(lines) + "}\n")


def pack(result: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of a result as columns; columns that no row has are left out."""
    return {
        key: value
        if key not in COLUMNS
        else {name: [row[name] for row in value] for name in COLUMNS[key] if value and name in value[0]}
        for key, value in result.items()
    }


def unpack(packed: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of columns."""
    return {
        key: value
        if key not in COLUMNS
        else [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
        for key, value in packed.items()
    }
