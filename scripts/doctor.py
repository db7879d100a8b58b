"""Checks this machine before a run: devices, versions, extras, the work directory, collectives, matmul rate.

    python scripts/doctor.py
    python scripts/doctor.py --workdir runs/my_run

Exit status: 0 when training can start here, 1 when something is wrong (each problem is listed at the end).
"""

import argparse
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections", "sentencepiece", "gymnasium")
# Extra: the modules it brings and what they are for.
EXTRAS = {
    "data": (("tensorflow", "tensorflow_datasets"), "reading RLDS datasets, needed for training"),
    "demos": (("av", "h5py", "pyarrow"), "converting recordings"),
    "serve": (("websockets",), "serving a policy to a robot"),
    "wandb": (("wandb",), "logging to Weights & Biases"),
    "notebook": (("ipykernel",), "notebooks"),
}
MIN_FREE_GB = 5


def check_versions(problems: list[str]) -> None:
    version = platform.python_version()
    print(f"Python {version} on {platform.platform()}")
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        problems.append(f"Python {version}: octo_like supports 3.11 and 3.12")
    found = []
    for name in CORE:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install -e .")
    print("  " + ", ".join(found))


def check_extras(problems: list[str]) -> None:
    print("Extras")
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        state = "missing: " + ", ".join(missing) + f" (pip install -e '.[{extra}]')" if missing else "present"
        print(f"  [{extra}] {purpose}: {state}")
        if missing and extra == "data":
            problems.append("the extra [data] is missing: synthetic data works, datasets cannot be read")


def check_workdir(workdir: pathlib.Path, problems: list[str]) -> None:
    print(f"Work directory {workdir}")
    # The run will create it: what counts is the nearest directory that is there.
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not existing.is_dir():
        problems.append(f"{existing} is a file, expected a directory")
        return
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        problems.append(f"{existing} is not writable: {error}")
        return
    free = shutil.disk_usage(existing).free / 1e9
    print(f"  writable, {free:.0f} GB free")
    if free < MIN_FREE_GB:
        problems.append(f"only {free:.1f} GB free in {existing}: checkpoints need room")


def check_devices(problems: list[str]) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    try:
        devices = jax.devices()
    except RuntimeError as error:
        problems.append(f"JAX finds no device: {error}")
        return
    kinds = sorted({device.device_kind for device in devices})
    print(f"Devices: {len(devices)} x {', '.join(kinds)} ({jax.default_backend()}), {jax.process_count()} process(es)")
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi") and os.environ.get("JAX_PLATFORMS") != "cpu":
        problems.append("there is an NVIDIA GPU, but JAX uses the CPU: pip install -e '.[cuda]'")
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            print(f"  {device}: {stats.get('bytes_in_use', 0) / 1e9:.1f} of {stats['bytes_limit'] / 1e9:.1f} GB in use")

    total = jax.pmap(lambda x: jax.lax.psum(x, "all"), axis_name="all")(jnp.arange(1.0, jax.local_device_count() + 1))
    count = jax.device_count()
    right = jax.process_count() > 1 or bool(np.all(np.asarray(total) == count * (count + 1) / 2))
    print(f"  sum over all devices: {'right' if right else 'WRONG'}")
    if not right:
        problems.append(f"a sum over {count} devices gave {np.asarray(total).tolist()}")

    on_cpu = jax.default_backend() == "cpu"
    n, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    multiply = jax.jit(lambda a: a @ a)
    a = jnp.ones((n, n), dtype) / n
    value = float(multiply(a)[0, 0])
    if abs(value * n - 1) > 1e-2:
        problems.append(f"a matrix product gave {value}, expected {1 / n}")
    repeats, begin = 10, time.perf_counter()
    for _ in range(repeats):
        a = multiply(a)
    a.block_until_ready()
    rate = 2 * n**3 * repeats / (time.perf_counter() - begin)
    print(f"  matrix product of {n} x {n} {jnp.dtype(dtype).name} on one device: {rate / 1e12:.3g} TFLOP/s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs"), help="where runs will be written")
    flags = parser.parse_args()
    problems: list[str] = []
    check_versions(problems)
    check_extras(problems)
    check_workdir(flags.workdir, problems)
    if importlib.util.find_spec("jax") is not None:
        check_devices(problems)
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("This machine can train." if not problems else f"{len(problems)} problem(s).")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
