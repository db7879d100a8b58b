"""What was found out by compiling a program for a topology, with what is calculated from it, and as a text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from octo_like.aot.chips import Chip, parse_topology
from octo_like.aot.hlo import BETWEEN_SLICES

GIB = 2**30
MFUS = (0.3, 0.4, 0.5)
WANTED_HEADROOM = 0.15


@dataclasses.dataclass(frozen=True)
class Report:
    """What a program needs on a topology. Bytes and FLOPs are per chip unless they say otherwise.

    Attributes:
      program: "train" or "sample".
      config: name of the config.
      topology, slices: "v5e:8x8", 1.
      accelerator: "v5e-64".
      chips, hosts: of the topology.
      mesh: devices by axis.
      batch_size: global.
      accumulate, remat, attention: of the config.
      arguments, outputs, temporaries, code: bytes; outputs are those that do not reuse the memory of arguments.
      total, capacity: bytes needed and bytes there are.
      model_flops: matrix products of a step of the whole batch, without what rematerialisation computes again.
      loops: how often the body of each loop of the compiled program runs; None: not known, counted once.
      compiled_flops, memory_traffic: FLOPs, and bytes read and written, of one run of the compiled program: the
        compiler's, with the loops as often as they run.
      collectives: by kind, {"count", "bytes", "wire_bytes"}; "between-slices" goes over the data-centre network.
      activation_gathers: "all-gather bf16(2048, 16, 768) of SOURCE" of each that is none of a parameter.
      compile_seconds: wall time of the compiler, on the machine that ran it.
      fingerprint: of the traced program (SHA-256, 12 digits): equal programs have equal ones.
      versions: of jax and libtpu.
      parameters, trained_parameters: counts.
      error: what the compiler said when it gave up for lack of memory, else None.
    """

    program: str
    config: str
    topology: str
    slices: int
    accelerator: str
    chips: int
    hosts: int
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    remat: str
    attention: str
    arguments: int
    outputs: int
    temporaries: int
    code: int
    total: int
    capacity: int
    model_flops: int
    loops: list[int | None]
    compiled_flops: float
    memory_traffic: float
    collectives: dict[str, dict[str, float]]
    activation_gathers: list[str]
    compile_seconds: float
    fingerprint: str
    versions: dict[str, str]
    parameters: int
    trained_parameters: int
    error: str | None = None

    @property
    def headroom(self) -> float:
        """Share of the memory that is left; negative when it does not fit."""
        return 1 - self.total / self.capacity

    @property
    def fits(self) -> bool:
        return self.error is None and self.total <= self.capacity

    def chip(self) -> Chip:
        """Data of the chip."""
        return parse_topology(self.topology).chip

    def compute_seconds(self, mfu: float) -> float:
        """Time of a step at a given utilisation of the matrix units: model FLOPs / (chips x peak x MFU)."""
        return self.model_flops / (self.chips * self.chip().peak_flops * mfu)

    def memory_seconds(self) -> float:
        """Memory traffic over bandwidth; the compiler counts operands of fused operations in full: rather too much."""
        return self.memory_traffic / self.chip().hbm_bandwidth

    def interconnect_seconds(self) -> float:
        """Bytes on the wire over the bandwidth of a chip's links, none of it hidden behind computation."""
        sent = sum(part["wire_bytes"] for kind, part in self.collectives.items() if kind != BETWEEN_SLICES)
        return sent / self.chip().ici_bandwidth

    def network_seconds(self) -> float:
        """Bytes that go to other slices over a chip's share of its host's network, none of it hidden."""
        return self.collectives.get(BETWEEN_SLICES, {"wire_bytes": 0})["wire_bytes"] / self.chip().dcn_bandwidth

    def seconds(self, mfu: float) -> dict[str, float]:
        """What might bind a step, in seconds; the step takes at least the longest."""
        parts = {"compute": self.compute_seconds(mfu)}
        if self.error is None:
            parts |= {"memory": self.memory_seconds(), "interconnect": self.interconnect_seconds()}
        if self.slices > 1:
            parts["network"] = self.network_seconds()
        return parts

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with what is calculated."""
        return {
            **dataclasses.asdict(self),
            "fits": self.fits,
            "headroom": round(self.headroom, 4),
            "step_seconds": {f"{mfu:.0%}": round(self.compute_seconds(mfu), 5) for mfu in MFUS},
            "memory_seconds": round(self.memory_seconds(), 5),
            "interconnect_seconds": round(self.interconnect_seconds(), 6),
            "network_seconds": round(self.network_seconds(), 6),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Report":
        """Inverse of `to_dict`."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})

    def __str__(self) -> str:
        return table(self)


def recommend(reports: Sequence[Report]) -> Report | None:
    """The report to follow, or None: of those that fit with the wanted headroom the largest batch, and for it the least
    recomputation, the largest micro-batch, the least communication."""
    good = [one for one in reports if one.fits and one.headroom >= WANTED_HEADROOM]
    order = ["none", "dots", "full"]
    key = lambda r: (-r.batch_size, order.index(r.remat), r.accumulate, r.interconnect_seconds())  # noqa: E731
    return min(good, key=key, default=None)


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def table(report: Report) -> str:
    """A report for people."""
    r = report
    if not r.fits:
        verdict = "DOES NOT FIT"
    else:
        verdict = (
            "fits" if r.headroom >= WANTED_HEADROOM else f"fits, but with less than {WANTED_HEADROOM:.0%} to spare"
        )
    mesh = " x ".join(f"{axis} {size}" for axis, size in r.mesh.items()) or "one chip"
    rows = [
        ("program", f"{r.program} step of {r.config}" if r.program == "train" else f"sample_actions of {r.config}"),
        ("topology", f"{r.topology}{f' x {r.slices} slices' if r.slices > 1 else ''} ({r.accelerator})"),
        ("chips, hosts", f"{r.chips}, {r.hosts}"),
        ("mesh", mesh),
        ("batch", f"{r.batch_size} ({r.batch_size / r.chips / r.accumulate:g} per chip{_micro(r)})"),
        ("remat, attention", f"{r.remat}, {r.attention}"),
        ("parameters", f"{r.parameters:,} ({r.trained_parameters:,} trained)" if r.mesh else f"{r.parameters:,}"),
        ("HBM per chip", verdict),
        ("  arguments", gib(r.arguments)),
        ("  temporaries", gib(r.temporaries)),
        ("  outputs, not aliased", gib(r.outputs)),
        ("  program", gib(r.code)),
        ("  total", f"{gib(r.total)} of {gib(r.capacity)}"),
        ("  headroom", f"{r.headroom:.1%}"),
        ("model FLOPs per step", f"{r.model_flops:.4g}"),
    ]
    if r.error is None:
        if r.loops:
            rows.append(
                ("trips of loops", ", ".join("unknown, counted once" if n is None else f"{n}" for n in r.loops))
            )
        rows.append(("compiled FLOPs per chip", f"{r.compiled_flops:.4g}"))
        for kind, part in sorted(r.collectives.items()):
            rows.append((f"{kind}", f"{part['count']} of {part['bytes'] / 2**20:.1f} MiB together"))
        if r.mesh:
            count = len(r.activation_gathers)
            rows.append(("gathers of activations", f"{count}" if count else "none"))
            rows += [("", text) for text in r.activation_gathers[:5]]
        rows += [
            (
                "memory traffic",
                f"{1e3 * r.memory_seconds():.1f} ms at full bandwidth ({r.memory_traffic / GIB:.1f} GiB)",
            ),
            ("interconnect", f"{1e3 * r.interconnect_seconds():.2f} ms at full bandwidth, not overlapped"),
        ]
        if r.slices > 1:
            rows.append(("network of slices", f"{1e3 * r.network_seconds():.2f} ms at full bandwidth, not overlapped"))
    else:
        rows.append(("compiler", r.error))
    times = ", ".join(f"{1e3 * r.compute_seconds(mfu):.1f} ms at {mfu:.0%}" for mfu in MFUS)
    rows += [("step at an MFU of", times), ("compile time", f"{r.compile_seconds:.0f} s")]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _micro(report: Report) -> str:
    return f" in each of {report.accumulate} micro-batches" if report.accumulate > 1 else ""
