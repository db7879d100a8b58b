"""A compiled program's text (HLO) as data: its instructions, and what it sends between chips.

How often its computations run and what they cost is told by `hlo_cost.py`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

# Operations over the interconnect. A TPU does a reduce-scatter as an all-reduce that keeps a part of the result, in a
# computation of that name.
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
REDUCE_SCATTER = "all-reduce-scatter"
# What the hosts exchange between slices over the data-centre network, on behalf of their chips.
BETWEEN_SLICES = "between-slices"

_TILE = (8, 128)  # of float32 in a TPU's memory

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "token": 0}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?[^{}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, op: "add.3", "add".
      shape: of the result, as text with layouts.
      operands: names.
      inside: what stands between the parentheses: names, the value of a constant, the number of a parameter.
      attributes: what follows.
      root: whether the computation gives its result.
    """

    name: str
    op: str
    shape: str
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    def called(self, *roles: str) -> list[str]:
        """Names of the computations that it runs, in any role or in those that are named ("body", "calls", ...)."""
        return [
            name
            for role, several, one in _CALLED.findall(self.attributes)
            if not roles or role in roles
            for name in re.findall(r"[\w.\-]+", several or one)
        ]


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: "bf16", (4, 10), and its bytes with the padding to the tiles of its layout."""

    dtype: str
    dims: tuple[int, ...]
    padded_bytes: int

    @property
    def bytes(self) -> float:
        return _BYTES.get(self.dtype, 4) * math.prod(self.dims)


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape's text, tuples flattened."""
    found = []
    for dtype, dims, order, tile in _ARRAY.findall(shape):
        sizes = tuple(int(d) for d in dims.split(",") if d)
        padded = [sizes[int(axis)] for axis in reversed(order.split(","))] if order else list(sizes)
        if tile:
            tiles = [int(t) for t in tile.split(",")]
            padded = [1] * (len(tiles) - len(padded)) + padded
            for place in range(1, len(tiles) + 1):
                padded[-place] = -(-padded[-place] // tiles[-place]) * tiles[-place]
        found.append(Array(dtype, sizes, round(_BYTES.get(dtype, 4) * math.prod(padded))))
    return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, each {name: instruction} in order; `entry` is the one that is run."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def root(self, computation: str) -> Instruction | None:
        """What gives the result of a computation; None when it is not known."""
        return next((one for one in self.computations.get(computation, {}).values() if one.root), None)


def parse(text: str) -> Module:
    """The text of a compiled program.

    Raises:
      ValueError: there is no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, {}
    for line in text.splitlines():
        if line[:1] not in (" ", "}", ""):
            if head := _COMPUTATION.match(line):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            current[match[2]] = _instruction(match)
    if entry is None:
        raise ValueError("this is no compiled program: its text has no ENTRY computation")
    return Module(computations, entry)


def _instruction(match: re.Match) -> Instruction:
    rest = match[3]
    cut = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:cut], rest[cut:].lstrip()
    op, _, rest = rest.partition("(")
    cut = _closing("(" + rest) - 1
    inside = rest[:cut]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(match[2], op, shape, operands, inside, rest[cut + 1 :], bool(match[1]))


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def executions(module: Module, trips: Callable[[str, Instruction], int]) -> dict[str, int]:
    """How often one run of the program runs each computation; of a conditional every branch.

    Args:
      trips: (computation, while instruction in it) to how often its body runs.
    """
    calls: dict[str, list[tuple[str, int]]] = {}
    for name, body in module.computations.items():
        for one in body.values():
            # The later steps of something asynchronous name the computation that the start ran.
            if "=" in one.attributes and not one.op.endswith(("-done", "-update")):
                times = trips(name, one) if one.op == "while" else 1
                inner, tests = set(one.called("body")), set(one.called("condition"))
                for callee in one.called():
                    often = times if callee in inner else times + 1 if callee in tests and one.op == "while" else 1
                    calls.setdefault(callee, []).append((name, often))
    known: dict[str, int] = {module.entry: 1}

    def count(name: str) -> int:
        if name not in known:
            known[name] = sum(often * count(caller) for caller, often in calls.get(name, ()))
        return known[name]

    return {name: count(name) for name in module.computations}


# ---------------------------------------------------------------------------------------------------------- collectives


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between chips.

    Attributes:
      kind: one of KINDS, or BETWEEN_SLICES.
      shapes: of the arrays it gives on one chip, (dtype, dimensions); for a reduce-scatter before it is cut, between
        slices what the chip hands to its host.
      group: number of chips that exchange with each other, between slices of slices; 0: all.
      times: how often a step runs it (it may stand in a loop).
      source: where in the program it comes from, as far as the compiler says.
      reduces: whether what is exchanged is summed; otherwise each receives all of it.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group: int
    times: int
    source: str
    reduces: bool = False

    @property
    def bytes(self) -> int:
        """Of the arrays, once."""
        return round(sum(_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.shapes))

    def wire_bytes(self, chips: int) -> float:
        """Bytes that one chip has to send at least, all times together: the bound that ring algorithms reach."""
        n = self.group or chips
        if self.kind == BETWEEN_SLICES:
            share = 2 * (n - 1) / n if self.reduces else n - 1
        else:
            share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.times * self.bytes * share


def collectives(module: Module, times: Mapping[str, int], slices: int = 1) -> list[Collective]:
    """Every operation between chips of a program, each once.

    Args:
      times: how often each computation runs, of `executions`.
      slices: of the topology.
    """
    found: dict[tuple, Collective] = {}
    for name, body in module.computations.items():
        for one in body.values():
            made = _between_slices(one, slices) or _collective(name, body, one)
            if made is None:
                continue
            channel = re.search(r"channel_id=(\d+)", one.attributes)
            # The steps of an asynchronous collective repeat it, with the same channel.
            key = (made.kind, channel[1], made.shapes) if channel else (made.kind, name, one.name)
            found.setdefault(key, dataclasses.replace(made, times=times.get(name, 1)))
    return list(found.values())


def _collective(computation: str, body: Mapping[str, Instruction], one: Instruction) -> Collective | None:
    kind = one.op.removesuffix("-start")
    if kind not in KINDS:
        return None
    results = tuple((array.dtype, array.dims) for array in arrays(one.shape))
    if one.op != kind and kind in ("all-gather", "collective-permute") and len(results) > 1:
        # (what goes in, what comes out, bookkeeping)
        results = results[len(results) // 2 :] if kind == "all-gather" else results[1:2]
    if kind == "reduce-scatter":  # its result is the part that is kept
        given = [body[each].shape for each in one.operands if each in body]
        results = tuple((array.dtype, array.dims) for shape in given for array in arrays(shape)) or results
    if kind == "all-reduce" and computation.startswith(REDUCE_SCATTER):
        kind = "reduce-scatter"
    source = re.search(r'op_name="([^"]*)"', one.attributes)
    return Collective(kind, results, _group_size(one.attributes), 1, source[1] if source else "")


def _between_slices(one: Instruction, slices: int) -> Collective | None:
    """What a chip hands to its host for the other slices: the runtime of the hosts exchanges it, not the chips."""
    if one.op != "send" or "_xla_megascale_" not in one.attributes:
        return None
    sent = arrays(one.shape)[0]
    reduces = "_xla_megascale_reduce_operation=" in one.attributes
    return Collective(BETWEEN_SLICES, ((sent.dtype, sent.dims),), slices, 1, "", reduces)


def _group_size(attributes: str) -> int:
    """Chips in one replica group, from any of the notations of the compiler; 0 when all belong together."""
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return explicit[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if named := re.search(r"replica_groups=@?\w*\[?([^\]]*)\]? \{([^}]*)\}", attributes):
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
