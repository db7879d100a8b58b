"""TPU chips and topologies: what the ahead-of-time proof compiles for and the scaling estimates calculate with.

A topology is written as the compiler writes it, `v5e:8x8` (chips along each axis of the interconnect), or as Google
Cloud sells it, `v5e-64`. The number behind v4 and v5p counts cores, two to a chip: v4-128 has 64 chips.
"""

import dataclasses
import math
import re

from octo_like.training.hardware import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, from Google Cloud's data sheets.

    Attributes:
      name: "v5e", ...
      peak_flops: dense bfloat16 FLOP/s.
      hbm_gib: memory that the compiler gives to programs, in GiB (a little less than is soldered on).
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s of all links to neighbouring chips together.
      dcn_bandwidth: bytes/s to other slices and to storage, a chip's share of its host's network (for v4, of which the
        data sheet says nothing, as v5e).
      hosts: virtual CPUs and memory (GB) of a host, by its number of chips.
      cores_in_name: cores per chip in the number of the accelerator type.
      layouts: common topologies.
    """

    name: str
    peak_flops: float
    hbm_gib: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    hosts: dict[int, tuple[int, int]]
    cores_in_name: int
    layouts: tuple[str, ...]


_TORUS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_PLANE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_V5E_HOSTS = {1: (24, 48), 4: (112, 192), 8: (224, 384)}
_V6E_HOSTS = {1: (44, 176), 4: (180, 720), 8: (180, 1440)}

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", PEAK_FLOPS["TPU v4"], 30.75, 1228e9, 300e9, 3.125e9, {4: (240, 407)}, 2, _TORUS),
        Chip("v5e", PEAK_FLOPS["TPU v5e"], 15.75, 819e9, 200e9, 3.125e9, _V5E_HOSTS, 1, _PLANE),
        Chip("v5p", PEAK_FLOPS["TPU v5"], 95.73, 2765e9, 600e9, 6.25e9, {4: (208, 448)}, 2, _TORUS),
        Chip("v6e", PEAK_FLOPS["TPU v6"], 31.24, 1640e9, 448e9, 12.5e9, _V6E_HOSTS, 1, _PLANE),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices of chips.

    Attributes:
      chip: kind of chip.
      layout: chips along each axis of one slice, "4x4x4".
      slices: number of slices, joined by the data centre network.
    """

    chip: Chip
    layout: str
    slices: int = 1

    @property
    def chips_per_slice(self) -> int:
        return math.prod(int(side) for side in self.layout.split("x"))

    @property
    def chips(self) -> int:
        return self.slices * self.chips_per_slice

    @property
    def chips_per_host(self) -> int:
        """Four, but slices of one and, where there are hosts of eight, of eight chips have a single host."""
        return self.chips_per_slice if self.chips_per_slice in self.chip.hosts else 4

    @property
    def hosts(self) -> int:
        return self.slices * max(1, self.chips_per_slice // self.chips_per_host)

    @property
    def host_vcpus(self) -> int:
        """Virtual CPUs of each host."""
        return self.chip.hosts[self.chips_per_host][0]

    @property
    def host_memory_gb(self) -> int:
        """Memory of each host, in GB."""
        return self.chip.hosts[self.chips_per_host][1]

    @property
    def host_bounds(self) -> list[int] | None:
        """Chips of a host along each axis where it is not the compiler's 2x2x1, else None."""
        sides = [int(side) for side in self.layout.split("x")]
        return None if self.chips_per_host == 4 else [*sides, 1, 1][:3]

    @property
    def name(self) -> str:
        """As the compiler writes one slice."""
        return f"{self.chip.name}:{self.layout}"

    @property
    def accelerator(self) -> str:
        """As Google Cloud sells it: "v4-128", "2 x v5e-16"."""
        one = self.accelerator_of_slice
        return one if self.slices == 1 else f"{self.slices} x {one}"

    @property
    def accelerator_of_slice(self) -> str:
        """As Google Cloud sells one slice."""
        return f"{self.chip.name}-{self.chips_per_slice * self.chip.cores_in_name}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """ "v5e:8x8" or "v5e-64" to a topology.

    Raises:
      ValueError: naming the valid ones.
    """
    if slices < 1:
        raise ValueError(f"the number of slices must be at least 1, got {slices}")
    named = re.fullmatch(r"(\w+)-(\d+)", text)
    layout = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", text)
    found = named or layout
    kind = found[1] if found else text
    if kind not in CHIPS or found is None:
        examples = ", ".join(
            f"{c.name}:{c.layouts[4]} ({Topology(c, c.layouts[4]).accelerator})" for c in CHIPS.values()
        )
        raise ValueError(f"unknown topology {text!r}; chips are {', '.join(CHIPS)}, for example {examples}")
    chip = CHIPS[kind]
    known = {Topology(chip, one).accelerator: one for one in chip.layouts}
    if named:
        if text not in known:
            raise ValueError(f"unknown accelerator type {text!r}; valid: {', '.join(known)}")
        return Topology(chip, known[text], slices)
    if len(found[2].split("x")) != len(chip.layouts[0].split("x")):
        raise ValueError(
            f"{text!r}: {kind} has {len(chip.layouts[0].split('x'))} axes; valid: {', '.join(chip.layouts)}"
        )
    return Topology(chip, found[2], slices)
