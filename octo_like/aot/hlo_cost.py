"""How often the loops of a compiled program run, and which share of its work stands in them.

Compilers count the body of a loop once, however often it runs, and a step with micro-batches is one loop. Here the
trips are counted by running the loop's counter, and every computation is weighed by how often it runs.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping

from octo_like.aot.hlo import Instruction, Module, arrays, executions

# A counter that has not ended by then is taken for one that is not known.
MOST_TRIPS = 1_000_000

_KNOWN_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
}
_COMPARISONS = {"LT": "lt", "LE": "le", "GT": "gt", "GE": "ge", "EQ": "eq", "NE": "ne"}
_SAME_VALUE = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier")
# Neither read nor write: names of what is there, ends of what began elsewhere, and what the called computation does.
_NO_TRAFFIC = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id iota add-dependency "
    "opt-barrier send recv custom-call while call conditional".split()
)


class _Unknown(Exception):
    """A value that is only known when the program runs."""


Value = Callable[[], int]


# ---------------------------------------------------------------------------------------------------------------- trips


@dataclasses.dataclass(frozen=True)
class _Scope:
    """A computation whose integers are asked for: `parameters` gives those of its parameters, by number, and `carry`
    the entries of its tuple (in a loop)."""

    module: Module
    name: str
    parameters: Mapping[int, Value]
    carry: Callable[[int], int]

    def value(self, name: str) -> int:
        """The integer (or truth) that an instruction gives.

        Raises:
          _Unknown: it depends on more than constants and the loop's counter.
        """
        one = self.module.computations[self.name].get(name)
        if one is None:
            raise _Unknown
        if one.op == "constant":
            text = {"true": "1", "false": "0"}.get(one.inside, one.inside)
            if not re.fullmatch(r"-?\d+", text):
                raise _Unknown
            return int(text)
        if one.op in _SAME_VALUE:
            return self.value(one.operands[0])
        if one.op in _ARITHMETIC:
            return _ARITHMETIC[one.op](*(self.value(each) for each in one.operands))
        if one.op == "compare":
            direction = _match(r"direction=(\w+)", one)[1]
            return getattr(operator, _COMPARISONS[direction])(*(self.value(each) for each in one.operands))
        if one.op == "and":
            return all([self.value(each) for each in one.operands])
        if one.op == "parameter":
            if (number := int(one.inside)) not in self.parameters:
                raise _Unknown
            return self.parameters[number]()
        if one.op == "get-tuple-element":
            return self._entry(one)
        if one.op in ("fusion", "call"):
            (callee,) = one.called("calls", "to_apply")
            given = {n: functools.partial(self.value, each) for n, each in enumerate(one.operands)}
            return _root_value(_Scope(self.module, callee, given, _no_carry))
        raise _Unknown

    def _entry(self, one: Instruction) -> int:
        index = _index(one)
        source = self.module.computations[self.name].get(one.operands[0])
        if source is not None and source.op == "tuple":
            return self.value(source.operands[index])
        if source is not None and source.op == "parameter":
            return self.carry(index)
        raise _Unknown


def _no_carry(_: int) -> int:
    raise _Unknown


def _root_value(scope: _Scope) -> int:
    root = scope.module.root(scope.name)
    if root is None:
        raise _Unknown
    return scope.value(root.name)


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """How often the body of a loop runs; None when it cannot be told from the program.

    The compiler's word is taken where it gives one; otherwise the counter is run from its first value until the
    condition fails. What the carry of a surrounding loop hands through unchanged is known as well.

    Args:
      computation: that holds the loop.
      loop: the while instruction.
    """
    if known := _KNOWN_TRIPS.search(loop.attributes):
        return int(known[1])
    (body,), (condition,) = loop.called("body"), loop.called("condition")
    if body not in module.computations or condition not in module.computations:
        return None
    try:
        return _run(module, _start(module, computation, loop), body, condition)
    except _Unknown:
        return None


def _run(module: Module, first: Callable[[int], int], body: str, condition: str) -> int:
    root = module.root(body)
    if root is None or root.op != "tuple":
        raise _Unknown
    state: dict[int, int] = {}
    trips = 0

    def carried(index: int) -> int:
        if index not in state:
            if trips:
                raise _Unknown  # a counter that the first trips did not need
            state[index] = first(index)
        return state[index]

    while _root_value(_Scope(module, condition, {}, carried)):
        scope = _Scope(module, body, {}, carried)
        # What the condition reads may depend on further entries, which `carried` adds on the way.
        after: dict[int, int] = {}
        while missing := set(state) - set(after):
            after |= {index: scope.value(root.operands[index]) for index in missing}
        state = after
        trips += 1
        if trips > MOST_TRIPS:
            raise _Unknown
    return trips


def _start(module: Module, computation: str, loop: Instruction) -> Callable[[int], int]:
    """Entry of a loop's carry to its first value."""
    scope = _Scope(module, computation, {}, lambda index: _unchanged(module, computation, index))

    def first(index: int) -> int:
        given = module.computations[computation].get(loop.operands[0])
        if given is not None and given.op == "tuple":
            return scope.value(given.operands[index])
        if given is not None and given.op == "parameter":
            return scope.carry(index)
        raise _Unknown

    return first


def _unchanged(module: Module, body: str, index: int) -> int:
    """An entry of the carry that the loop with this body hands through as it came."""
    for name, instructions in module.computations.items():
        for one in instructions.values():
            if one.op == "while" and one.called("body") == [body]:
                root = module.root(body)
                kept = module.computations[body].get(root.operands[index]) if root and root.op == "tuple" else None
                if kept is None or kept.op != "get-tuple-element" or _index(kept) != index:
                    raise _Unknown
                return _start(module, name, one)(index)
    raise _Unknown


def _index(one: Instruction) -> int:
    return int(_match(r"index=(\d+)", one)[1])


def _match(pattern: str, one: Instruction) -> re.Match[str]:
    """What an instruction's attributes say, which have to say it."""
    found = re.search(pattern, one.attributes)
    if found is None:
        raise ValueError(f"{one.op}: no {pattern} among the attributes {one.attributes!r}")
    return found


# ----------------------------------------------------------------------------------------------------------------- work


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does in one run, counted with and without the trips of its loops.

    Attributes:
      times: by computation, how often it runs.
      trips: of every loop, in order; None: not known, counted once.
      flops, flops_once: of matrix products and convolutions.
      bytes, bytes_once: read and written.
    """

    times: Mapping[str, int]
    trips: tuple[int | None, ...]
    flops: int
    flops_once: int
    bytes: int
    bytes_once: int

    def weigh_flops(self, counted: float) -> float:
        """FLOPs that a compiler counted with every loop once, with the loops as often as they run."""
        return counted * self.flops / self.flops_once if self.flops_once else counted

    def weigh_bytes(self, counted: float) -> float:
        """The same for bytes."""
        return counted * self.bytes / self.bytes_once if self.bytes_once else counted


def work_of(module: Module) -> Work:
    """Counts a program."""
    found: dict[tuple[str, str], int | None] = {}

    def trips(computation: str, loop: Instruction) -> int:
        count = trip_count(module, computation, loop)
        found[computation, loop.name] = count
        return 1 if count is None else count

    times, once = executions(module, trips), executions(module, lambda *_: 1)
    fused = {
        callee
        for body in module.computations.values()
        for one in body.values()
        if one.op not in ("while", "call", "conditional", "async-start")
        for callee in one.called()
    }
    flops = {name: computation_flops(module, name) for name in module.computations}
    moved = {name: 0 if name in fused else computation_bytes(module, name) for name in module.computations}

    def total(of: Mapping[str, int], often: Mapping[str, int]) -> int:
        return sum(of[name] * often[name] for name in module.computations)

    return Work(
        times, tuple(found.values()), total(flops, times), total(flops, once), total(moved, times), total(moved, once)
    )


def computation_flops(module: Module, name: str) -> int:
    """FLOPs of the products that stand in a computation, 2 per multiply-add, without the computations that it calls."""
    body = module.computations[name]
    return sum(_product_flops(body, one) for one in body.values() if one.op in ("dot", "convolution"))


def _product_flops(body: Mapping[str, Instruction], one: Instruction) -> int:
    (left, right), (out,) = (arrays(body[each].shape)[0].dims for each in one.operands[:2]), arrays(one.shape)
    if one.op == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        contracted = (left[int(axis)] for axis in (axes[1] if axes else "").split(",") if axis)
        return 2 * math.prod(out.dims) * math.prod(contracted)
    labels = _match(r"dim_labels=(\w+)_(\w+)->(\w+)", one)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", one.attributes) or [""])[0]))
    count = 2 * out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")] * right[labels[2].index("i")]
    for axis, label in enumerate(sorted(set(labels[3]) - {"b", "f"})):
        pick = lambda key, default: (window[key].split("x")[axis]) if key in window else default  # noqa: B023, E731
        low = int(pick("pad", "0_0").split("_")[0])
        count *= _positions(
            left[labels[1].index(label)],
            right[labels[2].index(label)],
            out.dims[labels[3].index(label)],
            int(pick("stride", 1)),
            low,
            int(pick("lhs_dilate", 1)),
            int(pick("rhs_dilate", 1)),
        )
    return count


@functools.cache
def _positions(size: int, kernel: int, out: int, stride: int, low: int, spread: int, dilate: int) -> int:
    """Pairs of a result and a kernel position that meet an entry and not padding or the zeros of a spread image."""
    end = (size - 1) * spread
    return sum(
        0 <= (place := result * stride + tap * dilate - low) <= end and place % spread == 0
        for result in range(out)
        for tap in range(kernel)
    )


def computation_bytes(module: Module, name: str) -> int:
    """Bytes that the instructions of a computation read and write, padded to tiles, the way compilers count them:
    operands and results; of what is sliced only the slice. Called computations are not included, but fusions are."""
    body = module.computations[name]
    total = 0
    for one in body.values():
        if one.op in _NO_TRAFFIC or one.op.endswith(("-done", "-update")) or one.op == "async-start":
            continue
        if one.op == "fusion":
            total += _fusion_bytes(module, one)
        elif one.op in ("slice", "dynamic-slice"):
            total += 2 * _size(one.shape)
        elif one.op == "slice-start":  # ((what is cut), the slice, bookkeeping)
            total += 2 * arrays(one.shape)[1].padded_bytes
        elif one.op == "dynamic-update-slice":
            total += 2 * _size(body[one.operands[1]].shape) if one.operands[1] in body else 0
        elif one.op == "copy-start":  # begun and done: compilers count both
            total += 4 * arrays(one.shape)[0].padded_bytes
        else:
            total += _size(one.shape) + sum(_size(body[each].shape) for each in one.operands if each in body)
    return total


def _size(shape: str) -> int:
    return sum(array.padded_bytes for array in arrays(shape))


def _fusion_bytes(module: Module, one: Instruction) -> int:
    (callee,) = one.called("calls")
    inner = module.computations.get(callee, {})
    read = sum(_read(module, callee, each) for each in inner.values() if each.op == "parameter")
    root = module.root(callee)
    if root is not None and root.op == "dynamic-update-slice" and root.operands[1] in inner:
        return read + _size(inner[root.operands[1]].shape)  # in place
    return read + _size(one.shape)


def _read(module: Module, fused: str, parameter: Instruction) -> int:
    """What a fused computation reads of one of its parameters."""
    inner = module.computations[fused]
    whole, parts = False, 0
    for user in inner.values():
        for place, operand in enumerate(user.operands):
            if operand != parameter.name:
                continue
            if user.op == "slice" or (user.op == "dynamic-slice" and place == 0):
                parts += _size(user.shape)
            elif user.op == "dynamic-update-slice" and place == 0:
                continue  # only what is replaced is touched, and that is written
            elif user.op == "fusion":
                (callee,) = user.called("calls")
                given = [one for one in module.computations[callee].values() if one.op == "parameter"]
                parts += sum(_read(module, callee, one) for one in given if int(one.inside) == place)
            else:
                whole = True
    return parts + (_size(parameter.shape) if whole else 0)
