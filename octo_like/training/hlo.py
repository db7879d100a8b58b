"""What a compiled program sends between chips, read off its text (HLO)."""

import dataclasses
import math
import re
from collections.abc import Iterable

# Operations over the interconnect. A TPU does a reduce-scatter as an all-reduce that keeps a part of the result, in a
# computation of that name.
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
REDUCE_SCATTER = "all-reduce-scatter"

_TILE = (8, 128)  # of float32 in a TPU's memory

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_LOOP = re.compile(r" while\(.*?body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between chips.

    Attributes:
      kind: one of KINDS.
      shapes: of the arrays it gives on one chip, (dtype, dimensions); for a reduce-scatter before it is cut.
      group: number of chips that exchange with each other; 0: all.
      times: how often a step runs it (it may stand in a loop).
      source: where in the program it comes from, as far as the compiler says.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group: int
    times: int
    source: str

    @property
    def bytes(self) -> int:
        """Of the arrays, once."""
        return round(sum(_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.shapes))

    def wire_bytes(self, chips: int) -> float:
        """Bytes that one chip has to send at least, all times together: the bound that ring algorithms reach."""
        n = self.group or chips
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.times * self.bytes * share


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program's text, each once."""
    found: dict[tuple, tuple[str, Collective]] = {}
    callers: dict[str, list[tuple[str, int]]] = {}
    computation = ""
    for number, line in enumerate(text.splitlines()):
        if line[:1] not in (" ", "}", "") and (head := _COMPUTATION.match(line)):
            computation = head[1]
            continue
        loop = _LOOP.search(line) if " while(" in line else None
        if "=" in line and ("calls=" in line or "to_apply=" in line or "body=" in line or "branch_comp" in line):
            trips = _TRIPS.search(line)
            for match in _CALLED.finditer(line):
                for name in re.findall(r"[\w.\-]+", match[1] or match[2]):
                    times = int(trips[1]) if loop and trips and name == loop[1] else 1
                    callers.setdefault(name, []).append((computation, times))
        match = _COLLECTIVE.match(line)
        if match is None:
            continue
        result, kind, start = match.groups()
        arrays = tuple(
            (dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in _ARRAY.findall(_no_layouts(result))
        )
        if start and kind in ("all-gather", "collective-permute") and len(arrays) > 1:
            # (what goes in, what comes out, bookkeeping)
            arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]
        if kind == "all-reduce" and computation.startswith(REDUCE_SCATTER):
            kind = "reduce-scatter"
        channel = re.search(r"channel_id=(\d+)", line)
        source = re.search(r'op_name="([^"]*)"', line)
        # The steps of an asynchronous collective repeat it, with the same channel.
        key = (kind, channel[1], arrays) if channel else (kind, number)
        found.setdefault(
            key, (computation, Collective(kind, arrays, _group_size(line), 1, source[1] if source else ""))
        )
    return [dataclasses.replace(one, times=_times(where, callers)) for where, one in found.values()]


def _no_layouts(shape: str) -> str:
    return re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", shape)


def _times(computation: str, callers, depth: int = 0) -> int:
    """How often the entry runs a computation: the trip counts of the loops it stands in, multiplied."""
    entry = callers.get(computation)
    if not entry or depth > 50:
        return 1
    return max(times * _times(name, callers, depth + 1) for name, times in entry)


def _group_size(line: str) -> int:
    """Chips in one replica group, from any of the notations of the compiler; 0 when all belong together."""
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return explicit[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(iota[2])
    if named := re.search(r"replica_groups=@?\w*\[?([^\]]*)\]? \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        total = 1
        for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]):
            total *= int(part) if part else sizes.get(name, 1)
        return total
    return 0


def activation_gathers(
    found: Iterable[Collective], parameters: Iterable[tuple[int, ...]], batch_size: int
) -> list[Collective]:
    """All-gathers and all-to-alls of something that is not a parameter.

    With the batch split over all chips and parameters gathered where they are used there is no reason for one. Between
    slices the compiler sums gradients in parts: reduce-scatter in a slice, transfer between hosts, all-gather.
    Small gradients go together, as one array of whole tiles (n, 8, 128); that no line of the program is named as its
    source tells such a gather from one of an activation.

    Args:
      parameters: shapes. A result counts as a parameter's when it has as many entries as one (compilers transpose and
        reshape), or is a slice of one along one dimension (position embeddings, of which a window is used).
      batch_size: global; what is as long as a batch is no slice.
    """
    squeezed = {tuple(d for d in shape if d != 1) for shape in parameters}
    sizes = {math.prod(shape) for shape in squeezed}

    def of_gradients(one: Collective) -> bool:
        packed = all(dtype == "f32" and len(shape) == 3 and shape[1:] == _TILE for dtype, shape in one.shapes)
        return one.kind == "all-gather" and not one.source and packed

    def of_parameter(shape: tuple[int, ...]) -> bool:
        shape = tuple(d for d in shape if d != 1)
        return math.prod(shape) in sizes or any(
            len(shape) == len(whole)
            and sum(part != all_ for part, all_ in zip(shape, whole, strict=True)) == 1
            and all(
                part == all_ or (part < all_ and part % batch_size) for part, all_ in zip(shape, whole, strict=True)
            )
            for whole in squeezed
        )

    return [
        one
        for one in found
        if one.kind in ("all-gather", "all-to-all")
        and not of_gradients(one)
        and not all(of_parameter(shape) for _, shape in one.shapes)
    ]
