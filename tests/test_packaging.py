"""What may import what, what the package promises to installers, and what the files may not say."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "octo_like"
ROOMS = ("common", "model", "policy", "data", "training", "aot", "robot", "envs")

# Which rooms a room may import besides itself.
ARROWS = {
    "common": set(),
    "model": {"common"},
    "policy": {"model", "common"},
    "data": {"common"},
    "training": {"model", "policy", "common", "robot"},
    "aot": {"training", "model", "policy", "common"},
    "robot": {"policy", "common"},
    "envs": {"common"},
}
# `training -> robot` is for closed-loop evaluation during training, and for nothing else; `envs -> common` for places
# written as words.
ARROW_EXCEPTIONS = {
    ("training", "robot"): {"training/evaluation.py", "training/evaluator.py"},
    ("envs", "common"): {"envs/picture_words.py", "envs/paths.py"},
}

# Which parts of `data` a part may import besides itself. Its other files are above all of them.
DATA_ARROWS = {
    "errors": set(),
    "tf": set(),
    "order": set(),
    "oxe": {"errors", "tf"},
    "spec": {"errors", "oxe"},
    "episode": {"tf"},
    "motions": {"errors", "tf"},
    "rlds": {"errors", "tf", "order", "oxe", "spec", "episode"},
    "settings": {"errors", "spec", "rlds"},
    "prepared": {"errors", "spec", "episode", "rlds"},
    "tf_source": {"errors", "tf", "oxe", "spec", "episode", "rlds", "prepared"},
    "prepare": {"errors", "order", "oxe", "spec", "rlds", "prepared", "settings", "tf_source"},
    "batches": {"errors", "tf", "order", "oxe", "spec", "episode", "rlds", "prepared", "settings", "tf_source"},
    "check": {"errors", "tf", "order", "spec", "episode", "rlds", "batches", "prepare", "prepared", "settings"},
    "convert": {"errors", "tf", "spec", "motions"},
    "dlimp": {"errors", "tf", "order", "oxe", "spec", "rlds", "batches"},
}
TENSORFLOW = ("tensorflow", "tensorflow_datasets", "tensorflow_cpu", "tfds")

# A process in which TensorFlow is not installed, as far as Python can tell.
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

sys.meta_path.insert(0, Blocker())
import importlib
for module in sys.argv[1:]:
    importlib.import_module(module)
try:
    import tensorflow
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the blocker does not block")
print(sorted(m for m in sys.modules if m.split(".")[0] in ("tensorflow", "tensorflow_datasets", "torch")))
"""


def modules(room: str) -> list[str]:
    paths = sorted((PACKAGE / room).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


def sources() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    """Full names of everything a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                module = ".".join([*base, *([node.module] if node.module else [])])
            else:
                module = node.module
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """{module: modules of the package that its file imports, at any depth}. A package is its `__init__.py`."""
    files = {module_name(path): path for path in sources()}
    graph = {}
    for module, path in files.items():
        found = imports(path) & files.keys()
        # `from package import module` needs the module; the package itself only where another name is taken from it.
        taken = {name for name in imports(path) if name.rpartition(".")[0] in files and name not in files}
        packages = {name for name in found if files[name].name == "__init__.py"}
        unused = {name for name in packages if not any(other.rpartition(".")[0] == name for other in taken)}
        graph[module] = found - unused - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one node (Tarjan 1972)."""
    number, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == number[node]:
            component = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(component)

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def tracked_files() -> list[pathlib.Path]:
    """Files of the project: those git knows or would add; in an unpacked archive, all."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        paths = [ROOT / name for name in done.stdout.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not {".venv", "runs", "__pycache__"} & set(p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


def test_rooms_exist():
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} == set(ROOMS)
    for room in ROOMS:
        assert len(modules(room)) > 1, f"{room} is empty"


def test_core_imports_without_tensorflow_or_torch():
    """A notebook, a robot or a bare GPU box has no TensorFlow. One process imports every module outside of data."""
    names = ["octo_like", *(name for room in ROOMS if room != "data" for name in modules(room))]
    assert {"octo_like.policy.policy", "octo_like.training.step", "octo_like.common.schema"} <= set(names)
    command = [sys.executable, "-c", BLOCKED, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_order_of_the_data_is_plain_numpy():
    names = set().union(*(imports(path) for path in (PACKAGE / "data" / "order").glob("*.py")))
    assert "numpy" in names
    assert not {name for name in names if name.split(".")[0] in (*TENSORFLOW, "jax")}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_between_rooms_go_one_way(room):
    wrong = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        relative = path.relative_to(PACKAGE).as_posix()
        for name in imports(path):
            parts = name.split(".")
            if parts[0] in ("train", "finetune", "scripts", "configs"):
                wrong.append(f"{relative} imports {name}")
            if parts[0] != "octo_like" or len(parts) < 2 or parts[1] not in ROOMS or parts[1] == room:
                continue
            allowed = parts[1] in ARROWS[room]
            only = ARROW_EXCEPTIONS.get((room, parts[1]))
            if not allowed or (only is not None and relative not in only):
                wrong.append(f"{relative} imports {name}")
    assert not wrong


def test_arrows_between_parts_of_data_go_one_way():
    wrong, data = [], PACKAGE / "data"
    assert {path.parent.name for path in data.glob("*/__init__.py")} <= DATA_ARROWS.keys()
    for path in sorted(data.rglob("*.py")):
        relative = path.relative_to(data)
        part = relative.with_suffix("").parts[0]
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] != ["octo_like", "data"] or len(parts) < 3 or parts[2] == part or part not in DATA_ARROWS:
                continue
            if parts[2] not in DATA_ARROWS[part]:
                wrong.append(f"data/{relative.as_posix()} imports {name}")
    assert not sorted(wrong)


def test_nothing_imports_in_a_circle():
    """Also through imports inside functions and of types only: a reader cannot tell them from the others."""
    graph = import_graph()
    assert "octo_like.common.words" in graph["octo_like.common.robot"]
    assert "octo_like.data.oxe.registry" in graph["octo_like.data.spec"]  # an import inside a function
    assert not [sorted(circle) for circle in circles(graph)]


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}, "g": set()}
    assert sorted(map(sorted, circles(graph))) == [["a", "b", "c"], ["d", "e"]]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def files_importing(*packages: str) -> set[str]:
    def matches(name: str) -> bool:
        return any(name == package or name.startswith(f"{package}.") for package in packages)

    return {p.relative_to(PACKAGE).as_posix() for p in sources() if any(matches(n) for n in imports(p))}


def test_apis_that_churn_live_in_one_place():
    assert files_importing("orbax") == {"training/checkpoint.py"}
    assert files_importing("jax.sharding.PartitionSpec") <= {"training/sharding.py"}
    naming = {p.relative_to(PACKAGE).as_posix() for p in sources() if "PartitionSpec" in p.read_text(encoding="utf-8")}
    assert naming == {"training/sharding.py"}
    outside = {name for name in files_importing(*TENSORFLOW) if not name.startswith("data/")}
    assert not outside
    assert files_importing(*TENSORFLOW), "the scan finds no import of TensorFlow at all: it is broken"
    assert not files_importing("torch")
    assert files_importing("difflib") == {"common/words.py"}
    running = {p.relative_to(PACKAGE).as_posix() for p in sources() if "exec_module" in p.read_text(encoding="utf-8")}
    assert running == {"common/files.py"}
    assert not [p.name for p in (ROOT / "scripts").glob("*.py") if "exec_module" in p.read_text(encoding="utf-8")]


def test_model_knows_no_mesh():
    meshes = ("jax.sharding", "jax.experimental.mesh_utils", "jax.experimental.multihost_utils", "jax.distributed")
    assert not {name for name in files_importing(*meshes) if name.startswith("model/")}


def test_no_file_speaks_of_one_machine():
    """Paths of a developer's machine have no place in the project."""
    # Written in pieces, because this file is searched as well.
    home = re.compile(r"(?<![\w.~:])/(?:" + "|".join(["ho" + "me/", "ro" + "ot/", "wo" + "rk/", "Us" + "ers/"]) + r")")
    found = []
    for path in tracked_files():
        if path.suffix in (".png", ".gif", ".npz", ".model", ".tfrecord"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(text.splitlines(), 1) if home.search(line)]
    assert not found
    assert home.search("see /" + "work/x") and not home.search("pages/work/x")


def test_large_files_are_made_and_not_kept():
    assert not [f"{p} {p.stat().st_size}" for p in tracked_files() if p.stat().st_size > 1_000_000]


def requirements(text: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    matches = [re.fullmatch(r"([\w.-]+)==([\w.+!-]+)(?: ; .+)?", line) for line in lines if line]
    assert all(matches), [line for line, match in zip(filter(None, lines), matches, strict=True) if not match]
    return {match[1].lower().replace("_", "-"): match[2] for match in matches}


def test_lock_pins_exact_versions_from_nowhere_in_particular():
    text = (ROOT / "requirements" / "cpu.lock").read_text()
    pinned = requirements(text)
    assert not re.search(r"https?:|file:|index-url|find-links|--", text)
    assert "torch" not in pinned
    assert {"jax", "flax", "orbax-checkpoint", "tensorflow-cpu", "websockets", "pytest", "nbclient"} <= set(pinned)


def setup_lists() -> tuple[list[str], dict[str, list[str]]]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("CORE", "EXTRAS")
    }
    return values["CORE"], values["EXTRAS"]


def test_core_needs_no_tensorflow_and_every_extra_exists():
    core, extras = setup_lists()
    names = {re.match(r"[\w-]+", line)[0].lower() for line in core}
    assert not names & {"tensorflow", "tensorflow-cpu", "tensorflow-datasets", "torch", "wandb", "websockets"}
    hardware = {"cuda", "tpu", "aot"}
    assert (
        set(extras) == {"data", "beam", "demos", "sim", "serve", "hub", "wandb", "notebook", "docs", "dev"} | hardware
    )
    pinned = requirements((ROOT / "requirements" / "cpu.lock").read_text())
    locked = [line for extra in ("data", "demos", "serve", "notebook", "dev") for line in extras[extra]]
    needed = {re.match(r"[\w-]+", line)[0].lower() for line in [*core, *locked]}
    assert needed <= set(pinned)


def test_everything_the_core_imports_is_a_dependency():
    """A third-party import at the top of a module of the core has to be installed by `pip install octo_like`."""
    core, _ = setup_lists()
    distributions = {
        "absl-py": "absl",
        "ml-collections": "ml_collections",
        "orbax-checkpoint": "orbax",
        "pillow": "PIL",
    }
    installed = {distributions.get(name, name) for name in (re.match(r"[\w-]+", line)[0] for line in core)}
    # Dependencies of the dependencies that cannot go away: etils comes with orbax-checkpoint.
    installed |= {"octo_like", "etils"} | set(sys.stdlib_module_names)
    missing = set()
    for path in sources():
        if path.relative_to(PACKAGE).parts[0] == "data":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            missing |= {f"{path.name}: {n}" for n in names if n.split(".")[0] not in installed}
    assert not missing


def test_assets_are_packaged():
    """What the package reads at run time is found beside its modules and named in setup.py."""
    assets = [p for p in (PACKAGE / "common" / "assets").iterdir() if p.is_file()]
    assert assets
    data_files = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert {p.parent for p in data_files if p != PACKAGE / "py.typed"} == {PACKAGE / "common" / "assets"}
    text = (ROOT / "setup.py").read_text()
    assert '"octo_like": ["py.typed"], "octo_like.common": ["assets/*"]' in text


def test_readme_names_only_what_exists():
    """Every file and folder of the project that the README speaks of is there, and so is every make target."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = set(
        re.findall(r"(?<![\w/.])((?:octo_like|configs|scripts|notebooks|data|docs|tests|requirements)/[\w./-]*)", text)
    )
    names |= set(re.findall(r"python (\w+\.py)", text)) | set(re.findall(r"\]\(([\w./-]+)\)", text))
    names = {name.rstrip(".") for name in names}
    assert {"train.py", "finetune.py", "configs/tabletop.py", "scripts/serve.py"} <= names
    assert not sorted(name for name in names if not (ROOT / name).exists())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", text)) <= targets


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_import_what_an_installation_has(script):
    """Beside the script itself only the package is importable: configs are files, which `load_config` reads."""
    assert not {name for name in imports(script) if name.split(".")[0] in ("configs", "data", "tests")}
