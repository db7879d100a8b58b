"""How long a run takes and what it costs, on paper: four times per step, of which the longest binds.

    compute       model FLOPs / (chips x peak FLOP/s x MFU)
    memory        bytes that the compiled program moves per chip / bandwidth of the chip's memory
    interconnect  bytes on the wire per chip / bandwidth of the chip's links, and for several slices
                  2 (s-1)/s x gradient bytes / (hosts of a slice x bandwidth of a host's network)
    input         batch / (hosts x virtual CPUs x share for the loader x samples/s of one virtual CPU)

    hours         steps x max(...) / 3600 / goodput
    cost          hours x chips x price of a chip-hour

Memory traffic is the ahead-of-time proof's and exists only for what was compiled; the rest needs no compilation.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from octo_like.model.describe import matmul_flops
from octo_like.training.aot import training_program
from octo_like.training.aot_report import GIB, Report
from octo_like.training.chips import CHIPS, Topology

# Google Cloud's list prices of a chip-hour on demand, in USD, of 2025: to be checked before money is spent, and
# replaced by `--price v5e=1.10`. Committed use and spot are cheaper.
PRICES = {"v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70}
PRICES_OF = "2025"

# Bytes/s of a host's network to other slices: 100 Gbit/s.
HOST_NETWORK = 12.5e9
# A chip of memory holds the state in at most this share; the rest is for activations.
STATE_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What cannot be known on paper.

    Attributes:
      mfu: share of peak FLOP/s that the model's products reach.
      loader_rate: samples/s that one virtual CPU reads, decodes and batches (docs/performance.md).
      loader_share: share of a host's virtual CPUs that the loader gets.
      goodput: share of the wall time that is training.
      steps: of the run.
      prices: USD per chip-hour by kind of chip.
    """

    mfu: float = 0.4
    loader_rate: float = 345.0
    loader_share: float = 0.75
    goodput: float = 0.95
    steps: int = 300_000
    prices: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(PRICES))

    def __post_init__(self):
        for name in ("mfu", "loader_share", "goodput"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.loader_rate <= 0 or self.steps < 1:
            raise ValueError(f"loader_rate and steps must be positive, got {self.loader_rate} and {self.steps}")
        if unknown := set(self.prices) - set(CHIPS):
            raise ValueError(f"no chip {sorted(unknown)[0]!r} to have a price; valid: {', '.join(CHIPS)}")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the traced program says, without a compiler.

    Attributes:
      flops_per_sample: matrix products of a step, per sample.
      trained, frozen: parameters.
      frozen_bytes: of the frozen parameters.
    """

    flops_per_sample: float
    trained: int
    frozen: int
    frozen_bytes: int

    @property
    def state_bytes(self) -> int:
        """Of the whole training state: parameter, two moments and average in float32, and what is frozen."""
        return 16 * self.trained + self.frozen_bytes


def facts_of(config: Any, devices) -> Facts:
    """Traces the training step of a config for one device."""
    _, program, batch = training_program(config, devices)
    trained = sum(leaf.size for leaf in program.state.trained.values())
    frozen = program.state.frozen.values()
    return Facts(
        matmul_flops(program.step, program.state, batch) / config.batch_size,
        trained,
        sum(leaf.size for leaf in frozen),
        sum(leaf.size * leaf.dtype.itemsize for leaf in frozen),
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one config on one topology.

    Attributes:
      seconds: of a step, by what might bind.
      hours, cost: of the run, cost in USD.
      samples_per_second: of the whole run.
      loader_cpus: virtual CPUs per host that keep up with it.
      fsdp: smallest power of two over which the state takes no more than STATE_SHARE of the memory.
    """

    topology: Topology
    seconds: dict[str, float]
    hours: float
    cost: float
    samples_per_second: float
    loader_cpus: float
    fsdp: int

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values())

    @property
    def binds(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


def estimate(
    facts: Facts, topology: Topology, batch_size: int, assumptions: Assumptions, report: Report | None = None
) -> Estimate:
    """One line of docs/scaling.md.

    Args:
      report: of the ahead-of-time proof for the same config, topology and batch; without it the interconnect carries
        one reduction of 16-bit gradients, and memory traffic is left out.
    """
    chip, chips = topology.chip, topology.chips
    seconds = {"compute": facts.flops_per_sample * batch_size / (chips * chip.peak_flops * assumptions.mfu)}
    gradient_bytes = 2 * facts.trained
    if report is not None:
        seconds["memory"] = report.memory_seconds()
        seconds["interconnect"] = report.interconnect_seconds()
    else:
        seconds["interconnect"] = 2 * (chips - 1) / chips * gradient_bytes / chip.ici_bandwidth
    if topology.slices > 1:
        share = 2 * (topology.slices - 1) / topology.slices
        hosts = topology.hosts // topology.slices
        seconds["interconnect"] += share * gradient_bytes / (hosts * HOST_NETWORK)
    per_host = chip.host_vcpus * assumptions.loader_share * assumptions.loader_rate
    seconds["input"] = batch_size / (topology.hosts * per_host)
    step = max(seconds.values())
    hours = assumptions.steps * step / 3600 / assumptions.goodput
    fsdp = 1
    while facts.state_bytes / fsdp > STATE_SHARE * chip.hbm_gib * GIB and fsdp < topology.chips_per_slice:
        fsdp *= 2
    return Estimate(
        topology,
        seconds,
        hours,
        hours * chips * assumptions.prices[chip.name],
        batch_size / step,
        batch_size / step / topology.hosts / assumptions.loader_rate,
        fsdp,
    )


def markdown(rows: list[tuple[str, Facts, Estimate, bool]], assumptions: Assumptions) -> str:
    """The table: (name of the config, its facts, estimate, whether it was compiled) per line."""
    lines = [
        f"MFU {assumptions.mfu:.0%}, {assumptions.loader_rate:g} samples/s per virtual CPU of which "
        f"{assumptions.loader_share:.0%} load, goodput {assumptions.goodput:.0%}, {assumptions.steps:,} steps, "
        f"prices of {PRICES_OF} per chip-hour: "
        + ", ".join(f"{k} ${v:.2f}" for k, v in assumptions.prices.items())
        + ".",
        "",
        "| config | topology | step | binds | compute, memory, wire, input (ms) | hours | chip-hours | cost "
        "| CPUs per host for input | fsdp |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, _, one, compiled in rows:
        parts = ", ".join(
            f"{1e3 * one.seconds[part]:.1f}" if part in one.seconds else "?"
            for part in ("compute", "memory", "interconnect", "input")
        )
        chip_hours = one.hours * one.topology.chips
        lines.append(
            f"| {name} | {one.topology.accelerator} | {1e3 * one.step_seconds:.0f} ms{'' if compiled else ' *'} "
            f"| {one.binds} | {parts} | {one.hours:.1f} | {chip_hours:,.0f} | ${one.cost:,.0f} "
            f"| {one.loader_cpus:.0f} of {one.topology.chip.host_vcpus} | {one.fsdp} |"
        )
    return "\n".join([*lines, "", "\\* not compiled for this topology yet: without memory traffic, a lower bound."])
