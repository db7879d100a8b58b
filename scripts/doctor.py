"""Checks a machine, or all hosts of a pod together, before a run.

    python scripts/doctor.py                                              # this machine
    python scripts/doctor.py --workdir gs://bucket/runs/base --data_dir gs://bucket/oxe
    python scripts/doctor.py --config configs/octo_base.py --workdir gs://bucket/runs/base --config.data.data_dir=gs://...
    bash scripts/tpu_pod.sh exec -- python scripts/doctor.py --devices 64 --workdir gs://bucket/runs/base

It takes the arguments of train.py: with --config the run's own input stream is measured. Every line is OK, WARN or
FAIL, with what to do about it. On several hosts they are gathered, and process 0 prints them. Works without TensorFlow,
except for what reads data. Exit status: 0 when training can start, 1 when a check failed.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import resource
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable

from doctor_report import CLOCK_SECONDS, Report, gather, show

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections", "sentencepiece", "gymnasium")
# Extra: the modules it brings and what they are for.
EXTRAS = {
    "data": (("tensorflow", "tensorflow_datasets"), "reading RLDS datasets, needed for training"),
    "demos": (("av", "h5py", "pyarrow"), "converting recordings"),
    "serve": (("websockets",), "serving a policy to a robot"),
    "wandb": (("wandb",), "logging to Weights & Biases"),
    "notebook": (("ipykernel",), "notebooks"),
}
FREE_GB, OPEN_FILES, MEMORY_GB = 5, 4096, 4

# ---------------------------------------------------------------------------------------------------------- software


def check_versions(report: Report) -> None:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        report.ok("python", f"{version} on {platform.platform()}")
    else:
        report.fail("python", version, "octo_like supports 3.11 and 3.12: uv venv --python 3.11")
    found, missing = [], []
    for name in CORE:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        report.fail("packages", f"not installed: {', '.join(missing)}", "pip install -e .")
    else:
        report.ok("packages", ", ".join(found))
    for extra, (modules, purpose) in EXTRAS.items():
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        if not absent:
            report.ok(f"[{extra}]", purpose)
        elif extra == "data":
            finding = f"no {', '.join(absent)}: synthetic data works, datasets cannot be read"
            report.warn("[data]", finding, "pip install -e '.[data]'")
        else:
            report.ok(f"[{extra}]", f"not installed ({purpose}: pip install -e '.[{extra}]')")


# ----------------------------------------------------------------------------------------------------------- machine


def check_machine(report: Report, config) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        report.ok("open files", f"limit {soft}")
    else:
        finding = f"limit {soft} (hard limit {hard}): many shards, workers and checkpoint files are open at once"
        report.warn("open files", finding, f"ulimit -n {OPEN_FILES}, in the shell that starts the run")

    memory = _memory_gb()
    if memory is not None:
        total, available = memory
        needed = MEMORY_GB + (config.data.host_memory_gb if config is not None else 0)
        finding = f"{available:.0f} of {total:.0f} GB available, {os.cpu_count()} cores"
        if available >= needed:
            report.ok("memory", finding)
        else:
            report.warn("memory", f"{finding}; a run wants about {needed:.0f} GB", "lower config.data.host_memory_gb")

    cache = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or pathlib.Path.home() / ".cache")
    for what, folder in (("temporary files", pathlib.Path(tempfile.gettempdir())), ("compile cache", cache)):
        if "://" in str(folder) or str(folder).startswith("gs:/"):
            continue
        existing = _nearest(folder)
        free = shutil.disk_usage(existing).free / 1e9
        if not os.access(existing, os.W_OK):
            report.warn(what, f"{existing} is not writable", "set TMPDIR or JAX_COMPILATION_CACHE_DIR")
        elif free < FREE_GB:
            report.warn(what, f"only {free:.1f} GB free in {existing}", "make room there")
        else:
            report.ok(what, f"{free:.0f} GB free in {existing}")


def _memory_gb() -> tuple[float, float] | None:
    """(total, available) of this host, or None where /proc does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.split()[1:2]}
    return kilobytes["MemTotal"] / 1e6, kilobytes["MemAvailable"] / 1e6


def _nearest(path: pathlib.Path) -> pathlib.Path:
    """The path itself or the closest of its parents that exists: a run creates the rest."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


# ------------------------------------------------------------------------------------------------------------ storage


def check_workdir(report: Report, workdir: str) -> None:
    """Writes, reads and deletes a file where checkpoints will go; compares its time with this host's clock."""
    remote = "://" in workdir
    if not remote:
        folder = _nearest(pathlib.Path(workdir))
        if not folder.is_dir():
            report.fail("workdir", f"{folder} is a file, expected a directory", "choose another --workdir")
            return
    try:
        from etils import epath
    except ImportError:
        report.fail("workdir", "etils is missing, checkpoints cannot be written", "pip install -e .")
        return
    folder = epath.Path(workdir) if remote else epath.Path(folder)
    probe = folder / f".doctor_{uuid.uuid4().hex}"
    content, begin = uuid.uuid4().hex, time.time()
    try:
        probe.write_text(content)
        back, modified = probe.read_text(), probe.stat().mtime
        probe.unlink()
        gone = not probe.exists()
    except Exception as error:  # noqa: BLE001  every file system has errors of its own
        text = " ".join(str(error).split())[:300]
        remedy = "gcloud auth application-default login; the service account needs Storage Object Admin on the bucket"
        report.fail("workdir", f"{folder}: {text}", remedy if remote else "choose a --workdir that is writable")
        return
    if back != content or not gone:
        report.fail("workdir", f"{folder} does not give back what was written, or does not delete it", "check the disk")
        return
    finding = f"{folder}: wrote, read and deleted a file in {time.time() - begin:.2f} s"
    if remote:
        report.ok("workdir", finding)
    else:
        free = shutil.disk_usage(os.fspath(folder)).free / 1e9
        if free < FREE_GB:
            report.fail("workdir", f"only {free:.1f} GB free in {folder}", "checkpoints need room: make some")
        else:
            report.ok("workdir", f"{finding}, {free:.0f} GB free")
    # A second of slack each way: some file systems round times.
    skew = max(begin - 1 - modified, modified - time.time() - 1, 0)
    if skew > CLOCK_SECONDS:
        finding = f"{skew:.0f} s apart from the clock of {folder}"
        report.fail("clock", finding, "sudo systemctl restart systemd-timesyncd, or set the clock")
    else:
        report.ok("clock", f"agrees with that of {folder}")


def check_data(report: Report, data_dir: str) -> None:
    """Lists the datasets of a folder and reads from the first file."""
    if importlib.util.find_spec("tensorflow") is None:
        report.fail("data", f"{data_dir} was not looked at: TensorFlow is missing", "pip install -e '.[data]'")
        return
    from octo_like.data.tf import tf

    infos = tf.io.gfile.glob(os.path.join(data_dir, "*", "*", "dataset_info.json"))
    if not infos:
        finding = f"{data_dir} holds no dataset (name/version/dataset_info.json)"
        report.fail("data", finding, "check --data_dir and the rights to read it; `gcloud storage ls` shows a bucket")
        return
    names = sorted({info.split("/")[-3] for info in infos})
    files = tf.io.gfile.glob(os.path.join(os.path.dirname(infos[0]), "*.tfrecord*"))
    if not files:
        report.fail("data", f"{os.path.dirname(infos[0])} has no tfrecord files", "copy the dataset again")
        return
    begin = time.perf_counter()
    with tf.io.gfile.GFile(files[0], "rb") as file:
        size = len(file.read(64 << 20))
    rate = size / 1e6 / (time.perf_counter() - begin)
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    report.ok("data", f"{len(names)} datasets: {listed}; {size / 1e6:.1f} MB read at {rate:.0f} MB/s")


# ------------------------------------------------------------------------------------------------------------ devices


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


# ------------------------------------------------------------------------------------------------------------ program


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


def check_parts(report: Report, config) -> None:
    """Whether parts of the user's own can be imported here, and are what they have to be."""
    from octo_like.training.program import own_parts

    report.ok(
        "own parts", ", ".join(f"{name} (source {digest})" for name, digest in own_parts(config).items()) or "none"
    )


def check_loader(report: Report, config, seconds: float) -> None:
    """Samples per second of this host: of made-up datasets, and of the run's own data."""
    if importlib.util.find_spec("tensorflow") is None:
        report.warn("loader", "not measured: TensorFlow is missing", "pip install -e '.[data]'")
        return
    import bench_input

    from octo_like.common.defaults import batch_spec
    from octo_like.common.text import TextTokenizer
    from octo_like.data import bench
    from octo_like.data.inputs import inputs_from_config
    from octo_like.data.prepare import prepare_datasets
    from octo_like.data.spec import specs_from_config

    def rate(config, spec, **processes) -> tuple[float, float]:
        tokenizer = TextTokenizer.load(config.text.model, config.text.max_length) if config.text.model else None
        begin = time.perf_counter()
        stream = inputs_from_config(config, spec, tokenizer, **processes).stream
        next(stream)
        first = time.perf_counter() - begin
        samples, taken = bench.timed(lambda: len(next(stream)["sample_id"]), seconds)
        stream.close()
        return samples / taken, first

    with tempfile.TemporaryDirectory() as folder:
        names = bench.make_datasets(folder, 1, size=(256, 256), episodes=8, steps=20)
        specs = specs_from_config({name: bench.bench_fields(name) for name in names})
        arguments = argparse.Namespace(
            config=None, data_dir=folder, cache_dir=None, window=2, sizes=["primary=256x256"], batch_size=32,
            decode="fast", threads=os.cpu_count() or 2, memory_gb=0.5,
        )  # fmt: skip
        made_up, spec = bench_input.run_config(arguments, specs, prepare_datasets(specs, folder, None))
        samples, _ = rate(made_up, spec)
    report.ok(
        "loader, made-up", f"{samples:.0f} samples/s (one camera of 256x256, fast decoding, {os.cpu_count()} cores)"
    )
    if config is None:
        return
    import jax

    samples, first = rate(
        config, batch_spec(config), process_index=jax.process_index(), process_count=jax.process_count()
    )
    together = samples * jax.process_count()
    report.ok(
        "loader, your data",
        f"{samples:.0f} samples/s here, first batch after {first:.1f} s; {jax.process_count()} process(es) feed "
        f"{together / config.batch_size:.2g} steps of {config.batch_size} per second",
    )


def check_hosts(report: Report, config, processes: int) -> None:
    """Whether this number of processes can begin or continue the run that a config describes."""
    from octo_like.common.lanes import check_lanes

    lanes = check_lanes(config.data.num_lanes, config.batch_size, processes)
    report.ok("lanes", f"{lanes}; each of {processes} process(es) makes the rows of {lanes // processes}")


# ---------------------------------------------------------------------------------------------------------------- main


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, object]:
    """Flags, and the config when one is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs", help="where runs will be written; gs://... too")
    parser.add_argument("--data_dir", help="folder of the TFDS datasets; default: that of the config")
    parser.add_argument("--devices", type=int, help="how many there have to be, all hosts together")
    parser.add_argument("--quick", action="store_true", help="leave out the training step and the loader")
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement of the loader")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    try:
        from octo_like.common.config import parse_command_line
        from octo_like.training import distributed
    except ImportError:  # reported by check_versions
        return parser.parse_known_args(argv)[0], None
    distributed.add_arguments(parser)
    if any(word.split("=")[0].split(".")[0] == "--config" for word in argv):
        return parse_command_line(parser, argv)
    parser.add_argument("--config", help="experiment file and overrides, as for train.py: measures its input stream")
    return parser.parse_args(argv), None


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    flags, config = parse_arguments(sys.argv[1:] if argv is None else argv)
    report = Report()
    report.attempt("packages", check_versions)
    importable = all(importlib.util.find_spec(name) for name in ("jax", "flax", "optax", "octo_like"))
    rows = report.rows
    if importable:
        from octo_like.training import distributed

        # Before anything touches a device, as train.py does.
        report.attempt("processes", lambda _: distributed.initialize_from_flags(flags) and None)
    report.attempt("machine", check_machine, config)
    report.attempt("workdir", check_workdir, flags.workdir)
    if importable and config is not None:
        report.attempt("own parts", check_parts, config)
    data_dir = flags.data_dir or (config.data.data_dir if config is not None and config.data.kind == "rlds" else None)
    if data_dir:
        report.attempt("data", check_data, data_dir)
    if importable and check_devices(report, flags.devices):
        import jax

        if config is not None:
            report.attempt("lanes", check_hosts, config, jax.process_count())
        report.attempt("collectives", check_collectives)
        report.attempt("matrix product", check_speed)
        if not flags.quick:
            report.attempt("training step", check_step)
            report.attempt("loader", check_loader, config, flags.seconds)
        rows = gather(report.rows)
        if jax.process_index() != 0:
            return int(any(row.status == "FAIL" for row in rows))
    if flags.json:
        failed = any(row.status == "FAIL" for row in rows)
        print(json.dumps({"ready": not failed, "rows": [dataclasses.asdict(row) for row in rows]}))
    else:
        show(rows)
    return int(any(row.status == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
