"""What `doctor.py` checks of a host: software, memory and disks, the place of checkpoints, the data."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import resource
import shutil
import sys
import tempfile
import time
import uuid

from doctor_report import CLOCK_SECONDS, Report

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
    from octo_like.common.storage import StorageError
    from octo_like.data.rlds.cache_files import FILES
    from octo_like.data.tf import tf

    def versions() -> list[str]:
        below = [os.path.join(data_dir, name) for name in FILES.folders(data_dir)]
        found = [os.path.join(folder, version) for folder in below for version in FILES.folders(folder)]
        return [folder for folder in found if FILES.is_file(os.path.join(folder, "dataset_info.json"))]

    try:
        found = versions()
        files = [name for name in (FILES.names(found[0]) if found else None) or [] if ".tfrecord" in name]
    except StorageError as error:  # no absence
        report.fail("data", str(error), "try again; check the rights to read --data_dir and the network")
        return
    if not found:
        finding = f"{data_dir} holds no dataset (name/version/dataset_info.json)"
        report.fail("data", finding, "check --data_dir and the rights to read it; `gcloud storage ls` shows a bucket")
        return
    names = sorted({folder.split("/")[-2] for folder in found})
    if not files:
        report.fail("data", f"{found[0]} has no tfrecord files", "copy the dataset again")
        return
    begin = time.perf_counter()
    with tf.io.gfile.GFile(os.path.join(found[0], files[0]), "rb") as file:
        size = len(file.read(64 << 20))
    rate = size / 1e6 / (time.perf_counter() - begin)
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    report.ok("data", f"{len(names)} datasets: {listed}; {size / 1e6:.1f} MB read at {rate:.0f} MB/s")
