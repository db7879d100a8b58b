"""What people install: wheel and source distribution of octo_like and octo_like-client, in environments of their own.

Run with `make test-package`. Nothing here is imported from this checkout but the policy that is exported.
"""

import glob
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from octo_like.commands import COMMANDS
from octo_like.robot.rollout import sampling_keys
from tests.robot.tiny import tiny_policy

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

ACT = """
import json, sys
import numpy as np
from octo_like_client import PolicyClient
for name in ("jax", "octo_like", "tensorflow"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is here: this environment is not bare")
port, image = int(sys.argv[1]), np.load(sys.argv[2])
with PolicyClient(port=port, timeout=60, limits=False) as client:
    client.reset(seed=3)
    actions = client.act({"image_primary": image}, "push the block")
print(json.dumps({"python": sys.version.split()[0], "actions": actions.tolist()}))
"""

LOAD = """
import json, sys
import jax, numpy as np
import octo_like
from octo_like.common.config import load_config
for name in ("tensorflow", "tests"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is here: this environment is not bare")
policy = octo_like.Policy.load_pretrained(sys.argv[1])
observation = {"image_primary": np.load(sys.argv[2])[None, None], "timestep_pad_mask": np.ones((1, 1), bool)}
task = policy.create_tasks(texts=["push the block"])
actions = policy.sample_actions(observation, task, rng=jax.random.key(0), unnormalize="line")
configs = [load_config(name).model.token_dim for name in ("octo_small", "configs/octo_base.py")]
configs.append(load_config("configs/finetune.py:lora,language,tabletop").batch_size)
print(json.dumps({"file": octo_like.__file__, "configs": configs, "actions": np.asarray(actions)[0].tolist()}))
"""


def quiet(*command, cwd=None) -> str:
    """What a command prints; it sees nothing of this checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS", "PYTHONHOME")}
    environment |= {"JAX_PLATFORMS": "cpu", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(folder: pathlib.Path, *requirements, python=sys.executable) -> pathlib.Path:
    """The `bin` of a new environment with these packages."""
    quiet(python, "-m", "venv", folder)
    quiet(folder / "bin" / "pip", "install", "--quiet", *requirements, cwd=folder)
    return folder / "bin"


def old_python() -> str:
    """Python 3.9 where there is one, else this one."""
    pyenv = glob.glob(os.path.expanduser("~/.pyenv/versions/3.9.*/bin/python"))
    for found in (os.environ.get("OCTO_PYTHON39"), shutil.which("python3.9"), *pyenv):
        if found and subprocess.run([found, "-c", "import ssl, venv"], capture_output=True).returncode == 0:
            return found
    return sys.executable


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> pathlib.Path:
    """Both distributions, as source archives and as the wheels that are built from these."""
    folder = tmp_path_factory.mktemp("dist")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name)
    tools = environment(folder / "tools", "build", "setuptools", "wheel")
    for source in (folder / "tree", folder / "tree" / "client"):
        quiet(tools / "python", "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="session")
def bare(dist, tmp_path_factory) -> pathlib.Path:
    (wheel,) = dist.glob("octo_like-0*.whl")
    lock = ROOT / "requirements" / "cpu.lock"
    return environment(tmp_path_factory.mktemp("bare") / "env", f"{wheel}[serve]", "--constraint", lock)


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """(folder, image file, the actions (H, A) that the policy gives)."""
    folder = tmp_path_factory.mktemp("export")
    policy = tiny_policy("line", 3, None)
    policy.save_pretrained(folder / "policy")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.save(folder / "image.npy", image)
    observation = {"image_primary": image[None, None], "timestep_pad_mask": np.ones((1, 1), bool)}
    task = policy.create_tasks(texts=["push the block"])
    actions = policy.sample_actions(observation, task, rng=sampling_keys(0, [3], [0]), unnormalize="line")
    return folder / "policy", folder / "image.npy", np.asarray(actions)[0]


def test_contents(dist):
    (wheel,), (archive,) = dist.glob("octo_like-0*.whl"), dist.glob("octo_like-0*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"octo_like/bundled/{file}" for file in COMMANDS.values()} <= set(names)
    packaged = {name for name in names if not name.startswith("octo_like/bundled/") and ".dist-info/" not in name}
    package = [path for path in (ROOT / "octo_like").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert packaged == {path.relative_to(ROOT).as_posix() for path in package}
    assert {"octo_like/py.typed", "octo_like/bundled/configs/octo_small.py"} <= set(names)
    assert any(name.endswith("/configs/finetune.py") for name in tarfile.open(archive).getnames())
    (client,) = dist.glob("octo_like_client-0*.whl")
    theirs = zipfile.ZipFile(client).namelist()
    assert {"octo_like_client/client.py", "octo_like_client/py.typed"} <= set(theirs)
    assert not set(theirs) & set(names)


def test_the_wheel_alone_loads_and_acts(bare, export, tmp_path):
    folder, image, actions = export
    found = json.loads(quiet(bare / "python", "-c", LOAD, folder, image, cwd=tmp_path).splitlines()[-1])
    assert pathlib.Path(found["file"]).is_relative_to(bare.parent)
    assert found["configs"][:2] == [384, 768]
    np.testing.assert_allclose(found["actions"], actions, atol=1e-5)


def test_commands(bare, tmp_path):
    assert quiet(bare / "octo_like", "--version", cwd=tmp_path).startswith("octo_like 0.")
    overview = quiet(bare / "octo_like", cwd=tmp_path)
    assert all(re.search(rf"^  {name} +\w", overview, re.MULTILINE) for name in COMMANDS)
    for command in (["octo-train"], ["octo-finetune"], ["octo-serve"], ["octo_like", "doctor"]):
        text = quiet(bare / command[0], *command[1:], "--help", cwd=tmp_path)
        assert text.startswith(f"usage: {' '.join(command)} [-h]")
    wrong = [str(bare / "octo-train"), "--workdir", "run", "--config", "octo_smal"]
    done = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'configs/octo_small.py'?" in done.stderr
    report = json.loads(quiet(bare / "octo_like", "doctor", "--quick", "--json", cwd=tmp_path).splitlines()[-1])
    assert report["ready"], report


@pytest.fixture
def served(bare, export, tmp_path):
    """The port of `octo-serve` of the bare environment."""
    command = [bare / "octo-serve", "--checkpoint", export[0], "--unnormalize", "line", "--port", "0"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    server = subprocess.Popen(
        [*map(str, command), "--max_batch", "1"],
        cwd=tmp_path,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = server.stdout.readline()
        yield int(re.search(r"ws://127\.0\.0\.1:(\d+)", line)[1])
    finally:
        server.terminate()
        server.wait(60)
        server.stdout.close()


def test_the_client_alone_drives_a_server_of_the_wheel(dist, served, export, tmp_path):
    (client,) = dist.glob("octo_like_client-0*.whl")
    _, image, actions = export
    robot = environment(tmp_path / "robot", client, python=old_python())
    found = json.loads(quiet(robot / "python", "-c", ACT, served, image, cwd=tmp_path).splitlines()[-1])
    print(f"client on Python {found['python']}")
    np.testing.assert_allclose(found["actions"], actions, atol=1e-5)


def test_both_are_installed_together(dist, bare, tmp_path):
    (client,) = dist.glob("octo_like_client-0*.whl")
    quiet(bare / "pip", "install", "--quiet", "--no-deps", client)
    both = "import octo_like.robot.client as a, octo_like_client.client as b; assert a.__file__ != b.__file__"
    quiet(bare / "python", "-c", both, cwd=tmp_path)
    quiet(bare / "pip", "uninstall", "--yes", "octo_like-client")
    quiet(bare / "python", "-c", "from octo_like.robot.client import PolicyClient", cwd=tmp_path)
