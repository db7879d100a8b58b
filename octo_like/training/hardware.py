"""What the devices of a run can do, and how much of it is used."""

import os
import pathlib
from collections.abc import Sequence

import jax

# Dense bfloat16 FLOP/s of one device, by a part of its `device_kind`; from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of a device, or None when it is not in the table (a CPU, a new chip)."""
    # "TPU v5 lite" before "TPU v5": the longest name that fits is the right one.
    for part in sorted(PEAK_FLOPS, key=len, reverse=True):
        if part in device.device_kind:
            return PEAK_FLOPS[part]
    return None


def mfu(flops_per_step: float, seconds_per_step: float, devices: Sequence[jax.Device] | None = None) -> float | None:
    """Model FLOPs utilisation: useful FLOPs of a step / (seconds x peak FLOP/s of all devices); None without a peak.

    Args:
      flops_per_step: forward and backward FLOPs of the whole global batch, recomputation not counted.
      seconds_per_step: wall time.
      devices: default: all devices of the run.
    """
    peaks = [peak_flops(device) for device in (jax.devices() if devices is None else devices)]
    known = [peak for peak in peaks if peak is not None]
    if len(known) < len(peaks) or seconds_per_step <= 0:
        return None
    return flops_per_step / (seconds_per_step * sum(known))


def memory_stats() -> dict[str, float]:
    """Memory in GiB: of the fullest local device (where the backend tells), and of this process on the host."""
    values = {}
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s]
    for name, key in (("in_use", "bytes_in_use"), ("peak", "peak_bytes_in_use"), ("limit", "bytes_limit")):
        if found := [s[key] for s in stats if key in s]:
            values[f"memory/device_{name}_gib"] = max(found) / 2**30
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return values  # not Linux
    return values | {"memory/host_gib": pages * os.sysconf("SC_PAGE_SIZE") / 2**30}
