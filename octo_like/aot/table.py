"""The table of docs/aot.md: for which topologies the Octo configs were compiled, with which settings, and the result.

Every row is kept in docs/aot.json, from which the table and the scaling estimates (`scaling.py`) are made.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from octo_like.aot.chips import parse_topology
from octo_like.aot.proof import prove_training
from octo_like.aot.report import GIB, Report
from octo_like.common.config import load_config
from octo_like.common.files import write_whole


@dataclasses.dataclass(frozen=True)
class Row:
    """What is compiled for one line of the table.

    Attributes:
      config: as after --config.
      topology, slices: as after --topology and --num_slices.
      overrides: what differs from the config.
    """

    config: str
    topology: str
    slices: int = 1
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        return f"{self.config} {self.topology} {self.slices}"

    @property
    def arguments(self) -> str:
        """The overrides as on a command line."""
        return " ".join(f"--config.{key}={value}" for key, value in self.overrides)


def prove(rows: Sequence[Row], path: str | os.PathLike) -> list[Report]:
    """Compiles rows and writes each into the JSON file as soon as it is done."""
    reports = []
    for row in rows:
        config = load_config(row.config, list(row.overrides))
        report = prove_training(config, parse_topology(row.topology, row.slices), name=row.config)
        reports.append(report)
        kept = read(path)
        kept[row.key] = {"row": dataclasses.asdict(row), "report": report.to_dict()}
        write_whole(path, json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    return reports


def read(path: str | os.PathLike) -> dict[str, dict]:
    """The kept rows, {} when there is no file yet."""
    path = pathlib.Path(path)
    return json.loads(path.read_text()) if path.exists() else {}


def report_of(kept: Mapping[str, dict], row: Row) -> Report | None:
    """The report of a row, or None when it was not compiled with the row's settings."""
    entry = kept.get(row.key)
    if entry is None or entry["row"] != json.loads(json.dumps(dataclasses.asdict(row))):
        return None
    return Report.from_dict(entry["report"])


def markdown(rows: Sequence[Row], kept: Mapping[str, dict]) -> str:
    """The table; a row that has not been compiled says so."""
    lines = [
        "| config | topology | chips, hosts | per chip | HBM per chip (arguments + temporaries) | headroom "
        "| model PFLOP | longest | compute at 40% MFU, memory, wire, network (ms) | settings |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row.config.removeprefix("configs/").removesuffix(".py").replace(".py:", ":")
        topology = parse_topology(row.topology, row.slices)
        where = f"| {name} | {topology.accelerator} ({topology.layout}) | {topology.chips}, {topology.hosts} "
        settings = f"`{row.arguments}`" if row.overrides else "as in the config"
        r = report_of(kept, row)
        if r is None:
            lines.append(f"{where}| | not compiled yet | | | | | {settings} |")
            continue
        micro = f"{r.batch_size // r.accumulate // r.chips}" + (f" x {r.accumulate}" if r.accumulate > 1 else "")
        verdict = f"{r.headroom:.0%}" if r.fits else "**does not fit**"
        seconds = r.seconds(0.4)
        binds = max(seconds, key=lambda part: seconds[part])
        parts = ", ".join(
            f"{1e3 * seconds[part]:.{digits}f}" if part in seconds else "-"
            for part, digits in (("compute", 0), ("memory", 0), ("interconnect", 1), ("network", 1))
        )
        lines.append(
            f"{where}| {micro} | {r.total / GIB:.1f} of {r.capacity / GIB:.1f} GiB ({r.arguments / GIB:.1f} + "
            f"{r.temporaries / GIB:.1f}) | {verdict} | {r.model_flops / 1e15:.2f} "
            f"| {1e3 * seconds[binds]:.0f} ms: {binds} | {parts} | {settings} |"
        )
    return "\n".join(lines)


def replace_between(text: str, content: str, name: str = "aot-table") -> str:
    """The text with what stands between the markers `<!-- NAME begin -->` and `<!-- NAME end -->` replaced.

    Raises:
      ValueError: the markers are missing.
    """
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    if begin not in text or end not in text:
        raise ValueError(f"the page has no {begin} and {end}")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"
