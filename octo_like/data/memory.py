"""How much memory a stream takes, and the block sizes that make it take what it may.

A lane holds the block of episodes that it is in and, towards its end, the next one: two blocks of every dataset. A
dataset whose share of the budget holds all of a lane's episodes is one block, held once. The budget is shared by
weight, so that a dataset that is sampled twice as often is also shuffled over twice as many episodes' bytes.
"""

import math
import os
from collections.abc import Mapping

import numpy as np

from octo_like.data.frames import EncodedFrame
from octo_like.data.index import PreparedDataset
from octo_like.data.spec import DataError

# Of `host_memory_gb`: what blocks are planned for, what the store keeps at most (blocks differ in size, and both the
# frames of a batch and validation need some), what validation keeps.
PLANNED, STORED, VALIDATION = 0.8, 0.9, 0.1


def episode_bytes(prepared: PreparedDataset, slots: int) -> float:
    """Mean bytes of a training episode in memory, from its record's length: encoded frames and numbers, plus what
    each frame's object takes. An upper bound when the run does not use all cameras of the record."""
    usable = prepared.train.frames > 0
    used = min(slots, sum(key is not None for key in prepared.spec.image_keys.values()))
    lengths, steps = prepared.train.length[usable], prepared.train.steps[usable]
    return float(np.mean(lengths + EncodedFrame.OVERHEAD * used * steps)) if usable.any() else 0.0


def _whole(prepared: PreparedDataset, size: float, num_lanes: int, lanes_here: int) -> float:
    """Bytes of all episodes of a dataset that this process's lanes walk."""
    episodes = int((prepared.train.frames > 0).sum())
    # Small datasets are not dealt out; all lanes share the same episodes (see order.py).
    return size * episodes * (1.0 if episodes < 4 * num_lanes else lanes_here / num_lanes)


def plan_blocks(
    datasets: Mapping[str, PreparedDataset],
    weights: Mapping[str, float],
    *,
    host_memory_gb: float,
    num_lanes: int,
    lanes_here: int,
    slots: int,
) -> dict[str, int]:
    """Episodes per block of each dataset, so that the stream stays within `host_memory_gb` of encoded episodes.

    Args:
      weights: share of the samples of each dataset; those with 0 take no memory.
      num_lanes: S of the order. lanes_here: lanes of each process (of the first start).
      slots: cameras that the run uses.

    Raises:
      DataError: the budget does not hold two episodes of every dataset for each lane; says what would.
    """
    budget = host_memory_gb * 2**30 * PLANNED
    sizes = {name: episode_bytes(d, slots) for name, d in datasets.items() if weights[name] > 0}
    whole = {name: _whole(datasets[name], size, num_lanes, lanes_here) for name, size in sizes.items()}
    least = {name: min(whole[name], 2 * size * lanes_here) for name, size in sizes.items()}
    need = sum(least.values())
    if need > budget:
        raise DataError(
            f"host_memory_gb={host_memory_gb:g} is too small: two episodes of each of {len(sizes)} datasets for "
            f"{lanes_here} lane(s) take {need / 2**30:.3g} GB; set host_memory_gb to at least "
            f"{math.ceil(need / PLANNED / 2**30 * 100) / 100:g}, or use more processes or fewer lanes"
        )

    def given(level: float) -> dict[str, float]:
        return {name: min(max(level * weights[name], least[name]), whole[name]) for name in sizes}

    # The water level at which the shares add up to the budget: their sum grows with it.
    low, high = 0.0, max(budget, sum(whole.values())) / min(weights[name] for name in sizes)
    if sum(given(high).values()) <= budget:
        low = high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(given(middle).values()) <= budget else (low, middle)
    shares, blocks = given(low), {}
    for name, prepared in datasets.items():
        if name not in sizes or shares[name] >= whole[name]:
            blocks[name] = max(1, len(prepared.train))
        else:
            blocks[name] = max(1, int(shares[name] / (2 * sizes[name] * lanes_here)))
    return blocks


def expected_bytes(
    datasets: Mapping[str, PreparedDataset],
    weights: Mapping[str, float],
    blocks: Mapping[str, int],
    *,
    num_lanes: int,
    lanes_here: int,
    slots: int,
) -> float:
    """Bytes of encoded episodes that a process holds with these blocks."""
    total = 0.0
    for name, prepared in datasets.items():
        if weights[name] > 0:
            size = episode_bytes(prepared, slots)
            whole = _whole(prepared, size, num_lanes, lanes_here)
            total += min(whole, 2 * blocks[name] * size * lanes_here)
    return total


def resident_bytes() -> int:
    """Memory of this process at the moment (RSS); 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def machine_bytes() -> int | None:
    """Memory that this machine, or the container it is in, has; None where it cannot be found out."""
    found = []
    try:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        pass
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                found.append(int(file.read()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(found) if found else None


def check_fits(stored: float, batches: float) -> str:
    """One line about the memory that this process is going to take.

    Args:
      stored: bytes of encoded episodes at most.
      batches: bytes of batches that are being made or wait.

    Raises:
      DataError: more than the machine has.
    """
    now, machine = resident_bytes(), machine_bytes()
    total = now + stored + batches
    gb = [f"{value / 2**30:.2f}" for value in (total, now, stored, batches)]
    line = f"expected memory {gb[0]} GB: {gb[1]} now, up to {gb[2]} of encoded episodes, {gb[3]} of batches"
    if machine is not None:
        line += f"; the machine has {machine / 2**30:.2f}"
        if total > machine:
            raise DataError(f"{line}. Lower host_memory_gb, prefetch or the batch size")
    return line
