"""How much memory a stream takes, and the numbers of episodes to mix that make it take what it may.

Memory holds the episodes that the walks are in the midst of (`walk.py`), the next ones, and the batches that are being
made. A dataset whose share of the budget holds all of its episodes mixes all of them and is read once. The budget is
shared by weight: a dataset that is sampled twice as often also mixes twice as many episodes' bytes.

What is mixed is planned for one process that makes all batches. It is part of the order, which must not depend on the
number of processes; each of several holds the walks of its own lanes, so none ever needs more.
"""

import math
import os
from collections.abc import Collection, Mapping

import numpy as np

from octo_like.data.episode import EncodedFrame
from octo_like.data.prepared import PreparedDataset
from octo_like.data.rlds.index import Index
from octo_like.data.spec import DataError

# Of `host_memory_gb`: what is planned for episodes that are mixed; what these, the episodes that are read ahead and
# batches take at most.
PLANNED, STORED = 0.6, 0.85
# How well samples are mixed: distinct episodes among so many samples, compared with a shuffle buffer.
MIXING_WINDOW, MIXING = 1000, 0.97
LIVE = 0.75  # live episodes per track, when they are equally long


def each_bytes(
    prepared: PreparedDataset, index: Index, slots: Collection[str], depth_slots: Collection[str] = ()
) -> np.ndarray:
    """Bytes (N,) of episodes in memory, from the index: the frames of the cameras and depth in use, what each frame's
    object takes, and the numbers. An index that does not know the bytes of its pictures counts whole records."""
    keys = [prepared.spec.image_keys.get(slot) for slot in slots]
    keys += [prepared.spec.depth_keys.get(slot) for slot in depth_slots]
    keys = [key.removeprefix("observation/") for key in keys if key is not None]
    overhead = EncodedFrame.OVERHEAD * len(keys) * index.steps.astype(np.int64)
    if index.picture_bytes is None:
        return index.length + overhead
    frames = index.picture_bytes[:, [index.pictures.index(key) for key in keys]].sum(1, dtype=np.int64)
    function = prepared.function
    numbers = function.action_dim * (function.action_chunk or 1) + (function.proprio_dim or 0) + 1  # and a text
    return frames + overhead + 4 * numbers * index.steps.astype(np.int64)


def _shown(prepared: PreparedDataset) -> np.ndarray:
    """Frames of each training episode that a pass shows, where it shows any, (N,) float64."""
    frames, most = prepared.train.frames, prepared.spec.subsample_length
    return np.minimum(frames[frames > 0], np.inf if most is None else most).astype(np.float64)


def _each_bytes(prepared: PreparedDataset, slots: Collection[str], depth_slots: Collection[str]) -> np.ndarray:
    """Bytes of each training episode with usable frames."""
    return each_bytes(prepared, prepared.train, slots, depth_slots)[prepared.train.frames > 0]


def episode_bytes(prepared: PreparedDataset, slots: Collection[str], depth_slots: Collection[str] = ()) -> float:
    """Mean bytes of a training episode in memory."""
    each = _each_bytes(prepared, slots, depth_slots)
    return float(np.mean(each)) if len(each) else 0.0


def track_bytes(prepared: PreparedDataset, slots: Collection[str], depth_slots: Collection[str] = ()) -> float:
    """Mean bytes that a walk holds per track: an episode with u times the mean number of frames is live for a share
    u - u^2/4 of the time that its track's unit lasts (for u = 1, from half of the unit to all of it; see `walk.py`),
    and one with more than twice the mean for all of it."""
    shown = _shown(prepared)
    if not len(shown):
        return 0.0
    u = np.minimum(shown / shown.mean(), 2.0)
    return float(np.mean((u - u**2 / 4) * _each_bytes(prepared, slots, depth_slots)))


def plan_mixed(
    datasets: Mapping[str, PreparedDataset],
    weights: Mapping[str, float],
    *,
    host_memory_gb: float,
    slots: Collection[str],
    depth_slots: Collection[str] = (),
) -> dict[str, int]:
    """Episodes to mix of each dataset, so that the stream stays within `host_memory_gb`.

    Args:
      weights: share of the samples of each dataset; those with 0 take no memory.
      slots, depth_slots: cameras that the run uses, and those of which it uses the depth.

    Raises:
      DataError: the budget does not hold two episodes of every dataset; says what would.
    """
    budget = host_memory_gb * 2**30 * PLANNED
    sizes = {name: episode_bytes(d, slots, depth_slots) for name, d in datasets.items() if weights[name] > 0}
    tracks = {name: track_bytes(datasets[name], slots, depth_slots) for name in sizes}
    whole = {name: size * int((datasets[name].train.frames > 0).sum()) for name, size in sizes.items()}
    least = {name: min(whole[name], 2 * size) for name, size in sizes.items()}
    need = sum(least.values())
    if need > budget:
        enough = math.ceil(need / PLANNED / 2**30 * 100) / 100
        raise DataError(
            f"host_memory_gb={host_memory_gb:g} is too small: two episodes of each of {len(sizes)} datasets take "
            f"{need / 2**30:.3g} GB, and {PLANNED:.0%} of it is for episodes; set host_memory_gb to at least {enough:g}"
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
    shares, mixed = given(low), {}
    for name, prepared in datasets.items():
        if name not in sizes or shares[name] >= whole[name]:
            mixed[name] = max(1, len(prepared.train))
        else:
            mixed[name] = max(1, int(shares[name] / tracks[name]))
    return mixed


def plan_visits(
    datasets: Mapping[str, PreparedDataset],
    weights: Mapping[str, float],
    mixed: Mapping[str, int],
    *,
    max_visits: int,
) -> dict[str, int]:
    """Visits per pass of each dataset: so many that the samples come from as many episodes as a shuffle buffer's would.

    A shuffle buffer of N frames holds parts of far more episodes than N frames make whole, and so mixes better than
    whole episodes in the same memory. Frames leave it at random, so their ages are exponential: of n samples, if the
    buffer's frames would make E whole episodes, E Ein(n / E) are distinct, where Ein(a) is the integral of
    (1 - exp(-t)) / t from 0 to a. Here K tracks have E = 3/4 K live episodes; n samples are a = n / K rounds, in each
    of which K / c parts are replaced when visits last c rounds: E + K (a - 1) / c distinct ones. MIXING of the former
    is aimed at, which gives c. It takes visits only while K is below n or so: with little memory.
    """
    visits = {}
    for name, prepared in datasets.items():
        shown = _shown(prepared)
        visits[name] = 1
        if weights[name] <= 0 or not len(shown) or mixed[name] >= len(shown):
            continue
        share = weights[name] / sum(weights.values())
        rounds = MIXING_WINDOW * share / mixed[name]
        t = (np.arange(4096) + 0.5) / 4096 * rounds / LIVE
        missing = LIVE * (MIXING * float(np.mean((1 - np.exp(-t)) / t)) * rounds / LIVE - 1)
        if missing > 0 and rounds > 1:
            frames = max(1.0, (rounds - 1) / missing)
            visits[name] = int(min(max_visits, max(1, math.ceil(shown.mean() / frames))))
    return visits


def expected_bytes(
    datasets: Mapping[str, PreparedDataset],
    weights: Mapping[str, float],
    mixed: Mapping[str, int],
    here: Mapping[str, float] | None = None,
    *,
    slots: Collection[str],
    depth_slots: Collection[str] = (),
) -> float:
    """Bytes of encoded episodes that a process mixes with these numbers.

    Args:
      here: share of each dataset's walks that it takes part in; None: all.
    """
    total = 0.0
    for name, prepared in datasets.items():
        if weights[name] > 0:
            whole = episode_bytes(prepared, slots, depth_slots) * int((prepared.train.frames > 0).sum())
            bytes_mixed = min(whole, mixed[name] * track_bytes(prepared, slots, depth_slots))
            total += bytes_mixed * (1.0 if here is None else here[name])
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
