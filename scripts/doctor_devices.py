"""What `doctor.py` checks of devices: that they are there, what they compute, and a training step of a tiny model."""

import os
import pathlib
import shutil
import time
from collections.abc import Callable

from doctor_report import Report


def check_devices(report: Report, expected: int | None) -> bool:
    """Lists the devices. Returns whether there are any to compute on."""
    import jax

    holders = _chip_holders()
    try:
        devices = jax.devices()
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        remedy = "python -c 'import jax; jax.devices()' shows more"
        if holders:
            remedy = f"end the processes that hold the chips: {holders} (tpu_pod.sh stop does it on all hosts)"
        report.fail("devices", f"JAX finds none: {text}", remedy)
        return False
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    local, processes = jax.local_device_count(), jax.process_count()
    finding = f"{len(devices)} x {kinds} ({jax.default_backend()}), {local} here, {processes} process(es)"
    on_cpu, forced = jax.default_backend() == "cpu", os.environ.get("JAX_PLATFORMS", "").startswith("cpu")
    if on_cpu and not forced and shutil.which("nvidia-smi"):
        report.fail("devices", f"{finding}, although there is an NVIDIA GPU", "pip install -e '.[cuda]'")
    elif on_cpu and not forced and _chip_devices():
        remedy = f"end the processes that hold the chips: {holders}" if holders else "pip install -e '.[tpu]'"
        report.fail("devices", f"{finding}, although this is a TPU host", remedy)
    elif expected is not None and len(devices) != expected:
        remedy = "start it on all hosts at once (tpu_pod.sh exec), and check that no host is missing"
        report.fail("devices", f"{finding}; expected {expected}", remedy)
    else:
        report.ok("devices", finding)
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        used, limit = stats.get("bytes_in_use", 0) / 1e9, stats.get("bytes_limit", 0) / 1e9
        if limit and used > 0.1 * limit:
            report.warn("device memory", f"{device}: {used:.1f} of {limit:.1f} GB in use", "end the other process")
    return True


def _chip_devices() -> list[str]:
    return sorted(str(p) for pattern in ("accel[0-9]*", "vfio/[0-9]*") for p in pathlib.Path("/dev").glob(pattern))


def _chip_holders() -> list[int]:
    """Other processes of this user that have a TPU chip open."""
    chips, holders = set(_chip_devices()), set()
    for link in pathlib.Path("/proc").glob("[0-9]*/fd/*") if chips else ():
        try:
            if os.readlink(link) in chips and int(link.parts[2]) != os.getpid():
                holders.add(int(link.parts[2]))
        except OSError:
            continue  # the process ended, or is another user's
    return sorted(holders)


def check_collectives(report: Report) -> None:
    """A sum over all devices and a gather, exact on every process; on accelerators also their speed."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from octo_like.training import sharding

    mesh, n = sharding.make_mesh(), jax.device_count()
    spread, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    rows = jax.make_array_from_callback((n,), spread, lambda index: np.arange(1, n + 1, dtype=np.int32)[index])
    total = int(jax.jit(jnp.sum, out_shardings=everywhere)(rows))
    gathered = np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(rows))
    if total != n * (n + 1) // 2 or not np.array_equal(gathered, np.arange(1, n + 1)):
        report.fail(
            "collectives", f"a sum over {n} devices gave {total}, a gather {gathered.tolist()}", "see docs/tpu.md"
        )
        return
    finding = f"sum and gather over {n} devices of {jax.process_count()} process(es) are right"
    if n > 1 and jax.default_backend() != "cpu":
        size = 16 << 20
        block = jax.make_array_from_callback(
            (n, size), spread, lambda index: np.ones((index[0].stop - index[0].start, size), np.float32)
        )
        reduce = jax.jit(lambda x: x.sum(0), out_shardings=everywhere)
        seconds = _seconds(lambda: reduce(block))
        finding += f"; 64 MiB summed over all in {1e3 * seconds:.1f} ms"
    report.ok("collectives", finding)


def _seconds(work: Callable, repeats: int = 10) -> float:
    """Mean time of `work`, which returns an array that is waited for; compiled beforehand."""
    work().block_until_ready()
    begin = time.perf_counter()
    for _ in range(repeats):
        last = work()
    last.block_until_ready()
    return (time.perf_counter() - begin) / repeats


def check_speed(report: Report) -> None:
    """A matrix product on the first local device against what its maker promises."""
    import jax
    import jax.numpy as jnp

    from octo_like.training.hardware import peak_flops

    on_cpu = jax.default_backend() == "cpu"
    n, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    device = jax.local_devices()[0]
    a = jax.device_put(jnp.ones((n, n), dtype) / n, device)
    multiply = jax.jit(lambda a: a @ a)
    value = float(multiply(a)[0, 0])
    if abs(value * n - 1) > 1e-2:
        report.fail("matrix product", f"gave {value}, expected {1 / n}", "this device computes wrongly: replace it")
        return
    rate = 2 * n**3 / _seconds(lambda: multiply(a)) / 1e12
    finding = f"{rate:.3g} TFLOP/s, {n} x {n} {jnp.dtype(dtype).name} on one device"
    peak = (peak_flops(device) or 0.0) / 1e12
    if not peak:
        report.ok("matrix product", finding)
    elif rate < 0.5 * peak:
        remedy = "is another process using the device, or is it throttled?"
        report.warn("matrix product", f"{finding}; {device.device_kind} can do {peak:.0f}", remedy)
    else:
        report.ok("matrix product", f"{finding} ({rate / peak:.0%} of the peak of {device.device_kind})")


def check_step(report: Report) -> None:
    """Compiles and runs one training step of a tiny model over all devices: the whole path of train.py, in small."""
    import jax
    import numpy as np
    import optax

    from octo_like.common.schema import BatchSpec
    from octo_like.common.synthetic import SyntheticStream
    from octo_like.model.octo import build_model, init_params
    from octo_like.training import sharding
    from octo_like.training.state import create_state
    from octo_like.training.step import StepConfig, make_train_step

    spec = BatchSpec(
        window_size=1, action_horizon=2, action_dim=3, image_sizes={"primary": (32, 32)}, heads=("action",)
    )
    model = build_model(
        dict(
            token_dim=32,
            max_window=1,
            transformer=dict(num_layers=1, num_heads=2, mlp_dim=32),
            task_tokenizers=dict(),
            observation_tokenizers=dict(
                primary=dict(
                    kind="image",
                    stem=dict(kind="conv", layers=((8, 8, 16),)),
                    obs_keys=("image_primary",),
                    goal_keys=(),
                )
            ),
            readouts=dict(action=1),
            heads=dict(action=dict(kind="regression", readout="readout_action", action_horizon=2, action_dim=3)),
        )
    )
    begin = time.perf_counter()
    mesh, tx = sharding.make_mesh(), optax.sgd(1e-3)
    stream = SyntheticStream(
        spec, jax.device_count(), 0, 1, process_index=jax.process_index(), process_count=jax.process_count()
    )
    create = jax.jit(
        lambda key: create_state(init_params(model, spec, key), tx, frozenset()),
        out_shardings=sharding.replicated(mesh),
    )
    step = jax.jit(make_train_step(model, tx, lambda count: 1e-3, StepConfig()), donate_argnums=0)
    state, metrics = step(create(jax.random.key(0)), sharding.put_batch(next(stream), mesh))
    loss = float(np.asarray(metrics["loss"]))
    finding = f"a tiny model compiled and made a step over {jax.device_count()} device(s) in "
    finding += f"{time.perf_counter() - begin:.1f} s, loss {loss:.3f}"
    if np.isfinite(loss):
        report.ok("training step", finding)
    else:
        report.fail("training step", finding, "the device or its driver computes wrongly")
