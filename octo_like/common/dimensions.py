"""Names and units of what a vector holds, of a dataset's actions and of its proprioception, and kinds of actions.

Names and units are for people: plots, reports, tags of metrics, messages. Kinds (`KINDS`) say what an action commands,
and so which command keeps a robot where it is: robots that may have to hold need them (`octo_like.robot.safety`).
Nothing that is learned, indexed or ordered depends on any of them. A dataset's spec has them
(`DatasetSpec.action_names` and the four beside it, a robot's description, or its entry in the registry); from there
they travel in its statistics, and so in an exported policy, as

    {"dimensions": {"action": {"names": [...], "units": [...], "kinds": [...]}, "proprio": {"names": [...], ...}}}

Where nobody has said them, dimensions are called a0, a1, ... (actions) and p0, p1, ... (proprioception), and kinds are
not known.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from octo_like.common.errors import ConfigError
from octo_like.common.words import suggest

# Units, and the magnitude beyond which a number is more likely in another unit: (limit, what it may be).
UNITS: dict[str, tuple[float, str] | None] = {
    "m": (5.0, "millimetres"),
    "mm": (5000.0, "micrometres"),
    "rad": (13.0, "degrees"),  # two turns; wrists of some arms turn that far
    "deg": (720.0, "encoder ticks"),
    "m/s": (5.0, "millimetres per second"),
    "rad/s": (30.0, "degrees per second"),
    "N": None,
    "Nm": None,
    "open fraction": None,  # of a gripper: 1 open, 0 closed
    "1": None,  # without unit: normalised commands, fractions
    "ticks": None,
}
UNKNOWN = ""  # beside these
OPEN = "open fraction"
KINDS = {
    "absolute": "a target of the thing that `proprio` measures",
    "delta": "a change of it, from one step to the next",
    "velocity": "a change of it per second",
    "gripper": "an absolute command between `closed` and `open`",
    "other": "none of these: nothing is checked",
}
_KIND_OF_UNIT = {"m/s": "velocity", "rad/s": "velocity", OPEN: "gripper"}
PARTS = {"action": "a", "proprio": "p"}  # part of a batch -> letter of its dimensions that have no name


class DimensionError(ConfigError):
    """Names or units that cannot be. The message says what would be valid."""


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """Names and units of the dimensions of a vector.

    Attributes:
      names: all different.
      units: one for each, see `UNITS`; "" where it is not known. Empty: of none.
      kinds: of actions, one for each, see `KINDS`; "" where it is not known. Empty: of none.

    Raises:
      DimensionError: doubled or empty names, another number of units or kinds than of names, an unknown one.
    """

    names: tuple[str, ...]
    units: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def __post_init__(self):
        names, units = tuple(self.names), tuple(self.units or (UNKNOWN,) * len(self.names))
        kinds = tuple(self.kinds or (UNKNOWN,) * len(self.names))
        for name in names:
            if not isinstance(name, str) or not name.strip():
                raise DimensionError(f"{name!r} is no name of a dimension; the names are: {names}")
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise DimensionError(f"the name {twice[0]!r} is given to more than one dimension: {', '.join(names)}")
        for what, given, valid in (("unit", units, UNITS), ("kind", kinds, KINDS)):
            if len(given) != len(names):
                raise DimensionError(
                    f"{len(given)} {what}s for {len(names)} dimensions ({', '.join(names)}): give one for each, or none"
                )
            for name, one in _pairs(names, given):
                if one != UNKNOWN and one not in valid:
                    raise DimensionError(
                        f"dimension {name!r}: unknown {what} {one!r}; {suggest(str(one), valid)}, '' (not known)"
                    )
        object.__setattr__(self, "kinds", kinds)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "units", units)

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def unnamed(cls, width: int, part: str = "action") -> Dimensions:
        """a0, a1, ... or, of proprioception, p0, p1, ..."""
        return cls(tuple(f"{PARTS[part]}{d}" for d in range(width)))

    def of_kinds(self, kinds: Sequence[str]) -> Dimensions:
        """The same names and units with these kinds."""
        return Dimensions(self.names, self.units, tuple(kinds))

    @property
    def shown_units(self) -> tuple[str, ...]:
        """Units as they are shown: "" where there is none."""
        return tuple("" if unit == "1" else unit for unit in self.units)

    @property
    def labels(self) -> tuple[str, ...]:
        """("x [m]", "gripper [open fraction]", "a2", ...)."""
        return tuple(f"{name} [{unit}]" if unit else name for name, unit in _pairs(self.names, self.shown_units))

    def numbered(self, part: str) -> tuple[str, ...]:
        """("action[0] x [m]", ...); "action[0]" for a dimension without a name of its own."""
        own = (label != f"{PARTS[part]}{d}" for d, label in enumerate(self.labels))
        return tuple(f"{part}[{d}]" + (f" {self.labels[d]}" if named else "") for d, named in enumerate(own))

    @property
    def tags(self) -> tuple[str, ...]:
        """("x_m", "vx_m_per_s", ...): all different, of letters, digits, "_", "-" and "." as file systems and
        TensorBoard take them."""
        tags: list[str] = []
        for d, (name, unit) in enumerate(_pairs(self.names, self.shown_units)):
            words = f"{name} {unit}".strip().replace("/", " per ") if unit else name
            tag = re.sub(r"[^A-Za-z0-9.-]+", "_", words).strip("_.") or str(d)
            while tag in tags:
                tag = f"{tag}_{d}"
            tags.append(tag)
        return tuple(tags)

    def to_json(self) -> dict[str, list[str]]:
        """Kinds are in it where one is known."""
        kinds = {"kinds": list(self.kinds)} if any(self.kinds) else {}
        return {"names": list(self.names), "units": list(self.units), **kinds}

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[str]]) -> Dimensions:
        """Inverse of `to_json`. Raises DimensionError for what is none."""
        if not isinstance(data, Mapping) or "names" not in data:
            raise DimensionError(f"dimensions are {{'names': [...], 'units': [...]}}, got {data!r}")
        return cls(tuple(data["names"]), tuple(data.get("units") or ()), tuple(data.get("kinds") or ()))


def _pairs(names: Sequence[str], units: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, units[d]) for d, name in enumerate(names)]  # robots' clients run Pythons without zip(strict=True)


def of_robot(robot: Mapping[str, Any], part: str = "action") -> Dimensions | None:
    """What a robot's description (`octo_like.common.robot.Description.to_json`) calls them; None: it does not say.

    An absolute gripper command between 0 closed and 1 open is an open fraction.
    """
    names = tuple(robot.get(f"{part}_name" if part == "action" else f"{part}_names") or ())
    if not names:
        return None
    units = list(robot.get(f"{part}_unit" if part == "action" else f"{part}_units") or (UNKNOWN,) * len(names))
    if part == "action":
        for d, ends in _grippers_of(robot).items():
            if ends == (0, 1) and units[d] in ("1", UNKNOWN):
                units[d] = OPEN
    return Dimensions(names, tuple(units))


def of_statistics(statistics: Mapping[str, Any], part: str = "action", width: int | None = None) -> Dimensions:
    """Names and units in a dataset's statistics.

    Statistics of before there were any are read as well: they have the names of the robot's description, if they have
    one, or else none (a0, a1, ...).

    Args:
      statistics: of one dataset, as in `Policy.statistics`.
      part: "action" or "proprio".
      width: of the vector; None: as the statistics say.

    Raises:
      DimensionError: another number of names than of dimensions.
    """
    if width is None:
        width = len(statistics[part]["mean"]) if statistics.get(part) is not None else 0
    given = (statistics.get("dimensions") or {}).get(part)
    if given is not None:
        found: Dimensions | None = Dimensions.from_json(given)
    else:
        found = of_robot(statistics.get("robot") or {}, part)
    if found is None:
        return Dimensions.unnamed(width, part)
    check_width(found, width, part)
    return found


def action_kinds(statistics: Mapping[str, Any], width: int | None = None) -> tuple[str, ...]:
    """Kinds of a dataset's action dimensions, see `KINDS`; "" where neither the statistics nor what is in them say.

    In this order: the kinds of the dimensions, those of the robot's description, "absolute" for what was learned
    relative to the proprioception, and what a unit says: metres or radians per second are velocities, an open fraction
    is a gripper.

    Args:
      statistics: of one dataset, as in `Policy.statistics`.
      width: of the actions; None: as the statistics say.
    """
    named = of_statistics(statistics, "action", width)
    described = (statistics.get("robot") or {}).get("action_kind") or (UNKNOWN,) * len(named)
    relative = tuple(statistics.get("relative_to") or (None,) * len(named))
    found = []
    for d, unit in enumerate(named.units):
        given = [kind for kind in (named.kinds[d], described[d]) if kind not in (UNKNOWN, "other")]
        found.append(given[0] if given else "absolute" if relative[d] is not None else _KIND_OF_UNIT.get(unit, UNKNOWN))
    return tuple(found)


def unknown_kinds(statistics: Mapping[str, Mapping[str, Any]]) -> str:
    """What has to be given before a robot can hold, a line for each dataset whose action kinds are not all known.

    Args:
      statistics: by dataset, as `Policy.statistics`.

    Returns:
      The text of a warning; "" where all kinds are known.
    """
    lines = []
    for dataset, entry in statistics.items():
        kinds = action_kinds(entry)
        names = [name for name, kind in _pairs(of_statistics(entry).names, kinds) if kind == UNKNOWN]
        if names:
            lines.append(
                f"  {dataset}: kinds=({', '.join(repr(kind or '...') for kind in kinds)},) for {', '.join(names)}"
            )
    if not lines:
        return ""
    return (
        "the kinds of some action dimensions are not known, so no client starts that may have to hold the robot. In "
        "place of each '...' write absolute, delta, velocity or gripper; then give action_kinds in the dataset's "
        "config, --kinds DATASET=KIND,... of serve.py, or kinds= of the client:\n" + "\n".join(lines)
    )


def check_width(dimensions: Dimensions, width: int, part: str = "action") -> None:
    """Raises DimensionError when a vector of `width` has another number of dimensions than there are names."""
    if len(dimensions) != width:
        raise DimensionError(
            f"{len(dimensions)} names for {width} {part} dimensions: {', '.join(dimensions.names) or 'none'}"
        )


def grippers(statistics: Mapping[str, Any], width: int | None = None) -> dict[int, tuple[float, float]]:
    """{action dimension: (closed, open)} of the grippers that open and close, as far as the statistics tell."""
    found = {d: (0.0, 1.0) for d, unit in enumerate(of_statistics(statistics, width=width).units) if unit == OPEN}
    return found | _grippers_of(statistics.get("robot") or {})


def _grippers_of(robot: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    """{action dimension: (closed, open)} as a robot's description says."""
    kinds, closed, opened = (robot.get(f"action_{field}") or () for field in ("kind", "closed", "open"))
    return {
        d: (float(closed[d]), float(opened[d]))
        for d, kind in enumerate(kinds)
        if kind == "gripper" and d < len(closed) and d < len(opened)
    }
