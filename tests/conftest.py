"""Set before anything imports JAX or TensorFlow: tests run on the CPU, quietly, with few threads per process."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

# JAX_PLATFORMS=cuda make test runs the suite on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Several test processes share the cores: more threads in each would only make them wait for each other.
# Most of a test's time is compilation, and nothing here runs long enough to be worth optimising.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
    # The gradient of a small model compiles in 1.4 s of a core's time; what these emitters write for its loops, in 4 s.
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", f"--xla_cpu_multi_thread_eigen=false {QUICK_COMPILE}")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Reference arrays and the BridgeData V2 sample, which live beside the repository and not in it."""
    path = pathlib.Path(os.environ.get("OCTO_SHARED", REPOSITORY.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no reference data: {path.name}/ beside the repository is missing (or set OCTO_SHARED)")
    return path


@pytest.fixture(scope="session")
def client_package(tmp_path_factory):
    """The folder of `octo_like_client`, written as its packaging does and importable in this process."""
    folder = tmp_path_factory.mktemp("client_package")
    shutil.copytree(REPOSITORY / "client", folder / "client", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for name in ("octo_like", "LICENSE"):
        (folder / name).symlink_to(REPOSITORY / name)
    arguments = [sys.executable, "setup.py", "--quiet", "--version"]
    done = subprocess.run(arguments, cwd=folder / "client", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sys.path.append(str(folder / "client"))
    yield folder / "client" / "octo_like_client"
    sys.path.remove(str(folder / "client"))


# Files that take minutes come first, so that no worker is alone with one of them in the end (a file is one worker's).
LONGEST = (
    "training/test_adaptation.py",
    "training/test_scripts.py",
    "training/test_step.py",
    "training/test_from_recordings.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files; the tests of a file stay as they are."""
    rank = {REPOSITORY / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
