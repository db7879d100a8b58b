"""How long a run takes and what it costs, on paper: five times per step, of which the longest binds.

    compute       model FLOPs / (chips x peak FLOP/s x MFU)
    memory        bytes that the compiled program moves per chip / bandwidth of the chip's memory
    interconnect  bytes on the wire per chip / bandwidth of the chip's links
    network       of s slices: bytes per chip to the others / the chip's share of its host's network; without a
                  compilation 2 (s-1)/s x 4 bytes per trained parameter / (chips of a slice x that share)
    input         batch / (hosts x virtual CPUs x share for the loader x samples/s of one virtual CPU)

    hours         steps x max(...) / 3600 / goodput
    cost          hours x chips x price of a chip-hour

    reads         samples/s of a host x bytes of a stored step x visits per pass
    RAM           process + stream (`host_memory_gb`) + the state once, while it is saved

Memory traffic is the ahead-of-time proof's and exists only for what was compiled; the rest needs no compilation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from octo_like.aot.chips import CHIPS, Topology
from octo_like.aot.proof import training_program
from octo_like.aot.report import GIB, Report
from octo_like.policy.describe import matmul_flops

# Google Cloud's list prices of a chip-hour on demand, in USD, of 2025: to be checked before money is spent, and
# replaced by `--price v5e=1.10`. Committed use and spot are cheaper.
PRICES = {"v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70}
PRICES_OF = "2025"

# GB of a process that trains, beside the stream's memory and the state: Python, JAX, TensorFlow and the compiler.
PROCESS_GB = 4.0
# Batches that a process holds at a time: what data/batches/plan.py reckons with.
BATCHES = 4
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
      step_kb: bytes of one stored step of an episode, all its cameras, in thousands.
      episode_steps: steps of an episode.
      visits: how often a pass reads each episode (docs/data.md: with little memory up to `max_visits`).
      host_memory_gb: as `config.data.host_memory_gb`.
      prices: USD per chip-hour by kind of chip.
    """

    mfu: float = 0.4
    loader_rate: float = 345.0
    loader_share: float = 0.75
    goodput: float = 0.95
    steps: int = 300_000
    step_kb: float = 60.0
    episode_steps: float = 50.0
    visits: float = 1.0
    host_memory_gb: float = 32.0
    prices: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(PRICES))

    def __post_init__(self):
        for name in ("mfu", "loader_share", "goodput"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        for name in ("loader_rate", "steps", "step_kb", "episode_steps", "visits", "host_memory_gb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if unknown := set(self.prices) - set(CHIPS):
            raise ValueError(f"no chip {sorted(unknown)[0]!r} to have a price; valid: {', '.join(CHIPS)}")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the traced program says, without a compiler.

    Attributes:
      flops_per_sample: matrix products of a step, per sample.
      trained, frozen: parameters.
      frozen_bytes: of the frozen parameters.
      sample_bytes: of a sample of a batch on the host: decoded images, goals, numbers.
    """

    flops_per_sample: float
    trained: int
    frozen: int
    frozen_bytes: int
    sample_bytes: float = 0.0

    @property
    def state_bytes(self) -> int:
        """Of the whole training state: parameter, two moments and average in float32, and what is frozen."""
        return 16 * self.trained + self.frozen_bytes


def facts_of(config: Any, devices: Sequence[Any]) -> Facts:
    """Traces the training step of a config for one device."""
    _, program, batch = training_program(config, devices)
    trained = sum(leaf.size for leaf in program.state.trained.values())
    frozen = program.state.frozen.values()
    return Facts(
        matmul_flops(program.step, program.state, batch) / config.batch_size,
        trained,
        sum(leaf.size for leaf in frozen),
        sum(leaf.size * leaf.dtype.itemsize for leaf in frozen),
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch)) / config.batch_size,
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one config on one topology.

    Attributes:
      seconds: of a step, by what might bind.
      hours, cost: of the run, cost in USD.
      samples_per_second: of the whole run.
      loader_cpus: virtual CPUs per host that keep up with it.
      host_reads: bytes/s that each host reads from storage.
      host_episodes: episodes/s of these reads; each is a request.
      host_gb: memory of each host that the run takes, GB.
      batches_gb: of that, batches that are being made or wait.
      fsdp: smallest power of two over which the state takes no more than STATE_SHARE of the memory.
    """

    topology: Topology
    seconds: dict[str, float]
    hours: float
    cost: float
    samples_per_second: float
    loader_cpus: float
    host_reads: float
    host_episodes: float
    host_gb: float
    batches_gb: float
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
        one reduction of 16-bit gradients, the network between slices one of 32-bit gradients (as compiled programs
        do), and memory traffic is left out.
    """
    chip, chips = topology.chip, topology.chips
    seconds = {"compute": facts.flops_per_sample * batch_size / (chips * chip.peak_flops * assumptions.mfu)}
    gradient_bytes = 2 * facts.trained
    if report is not None:
        seconds["memory"] = report.memory_seconds()
        seconds["interconnect"] = report.interconnect_seconds()
    else:
        seconds["interconnect"] = 2 * (chips - 1) / chips * gradient_bytes / chip.ici_bandwidth
    if topology.slices > 1 and report is not None:
        seconds["network"] = report.network_seconds()
    elif topology.slices > 1:
        share = 2 * (topology.slices - 1) / topology.slices
        seconds["network"] = share * 4 * facts.trained / (topology.chips_per_slice * chip.dcn_bandwidth)
    per_host = topology.host_vcpus * assumptions.loader_share * assumptions.loader_rate
    seconds["input"] = batch_size / (topology.hosts * per_host)
    step = max(seconds.values())
    hours = assumptions.steps * step / 3600 / assumptions.goodput
    fsdp = 1
    while facts.state_bytes / fsdp > STATE_SHARE * chip.hbm_gib * GIB and fsdp < topology.chips_per_slice:
        fsdp *= 2
    host_rate = batch_size / step / topology.hosts
    batches_gb = BATCHES * batch_size / topology.hosts * facts.sample_bytes / 1e9
    return Estimate(
        topology,
        seconds,
        hours,
        hours * chips * assumptions.prices[chip.name],
        batch_size / step,
        host_rate / assumptions.loader_rate,
        host_rate * assumptions.step_kb * 1e3 * assumptions.visits,
        host_rate * assumptions.visits / assumptions.episode_steps,
        PROCESS_GB + max(assumptions.host_memory_gb, batches_gb) + facts.state_bytes / 1e9,
        batches_gb,
        fsdp,
    )


def markdown(rows: list[tuple[str, Facts, Estimate, bool]], assumptions: Assumptions) -> str:
    """The tables: (name of the config, its facts, estimate, whether it was compiled) per line."""
    a = assumptions
    lines = [
        f"MFU {a.mfu:.0%}, {a.loader_rate:g} samples/s per virtual CPU of which {a.loader_share:.0%} load, goodput "
        f"{a.goodput:.0%}, {a.steps:,} steps, prices of {PRICES_OF} per chip-hour: "
        + ", ".join(f"{k} ${v:.2f}" for k, v in a.prices.items())
        + ".",
        "",
        "| config | topology | step | binds | compute, memory, wire, network, input (ms) | hours | chip-hours | cost "
        "| fsdp |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, _, one, compiled in rows:
        parts = ", ".join(_part(one, part) for part in ("compute", "memory", "interconnect", "network", "input"))
        chip_hours = one.hours * one.topology.chips
        lines.append(
            f"| {name} | {one.topology.accelerator} | {1e3 * one.step_seconds:.0f} ms{'' if compiled else ' *'} "
            f"| {one.binds} | {parts} | {one.hours:.1f} | {chip_hours:,.0f} | ${one.cost:,.0f} | {one.fsdp} |"
        )
    lines += [
        "",
        "\\* not compiled for this topology yet: without memory traffic, a lower bound.",
        "",
        f"What each host has to give at that speed, with {a.step_kb:g} KB per stored step, {a.episode_steps:g} steps "
        f"per episode, {a.visits:g} visit(s) per pass and `host_memory_gb={a.host_memory_gb:g}`:",
        "",
        "| config | topology | hosts | CPUs for input | reads | episodes | reads of all hosts | RAM (of it batches) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, _, one, _ in rows:
        where, together = one.topology, one.topology.hosts * one.host_reads
        lines.append(
            f"| {name} | {where.accelerator} | {where.hosts} | {one.loader_cpus:.1f} of {where.host_vcpus} "
            f"| {one.host_reads / 1e6:.0f} MB/s | {one.host_episodes:.1f}/s | {together / 1e9:.2f} GB/s "
            f"| {one.host_gb:.0f} ({one.batches_gb:.2f}) of {where.host_memory_gb} GB |"
        )
    return "\n".join(lines)


def _part(one: Estimate, part: str) -> str:
    if part in one.seconds:
        return f"{1e3 * one.seconds[part]:.1f}"
    return "-" if part == "network" else "?"
