"""scripts/mutate.py on a repository of a few lines: what it changes, what it keeps, what it says."""

import ast
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def mutate():
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "source,want",
    [
        ("a + b", {"(a - b)"}),
        ("a ** 2", {"(a * 2)", "(3)"}),
        ("a < b", {"(a <= b)"}),
        ("a and not b", {"(a or not b)", "(b)"}),
        ("-a", {"(a)"}),
        ("a if b else c", {"(c if b else a)"}),
        ("f(1.5, True)", {"(f(True, 1.5))", "(2.25)", "(False)"}),
        ("f(x, y, 1)", {"(f(y, x, 1))", "(2)"}),
        ("f(x, key=y, **z)", {"(f(x, **z))"}),
        ("maximum(x, y)", {"(x)"}),
        ("if a:\n    b()\n", {"(not a)", "pass"}),
        ("a += b", {"pass"}),
    ],
)
def test_what_is_changed(mutate, source, want):
    found = set()
    for node, _ in mutate.places(ast.parse(source)):
        for new in mutate.variants(node):
            found.add("pass" if isinstance(new, ast.Pass) else f"({ast.unparse(new)})")
    assert want <= found


def test_what_is_said_is_left_alone(mutate):
    source = 'def f(x: int = 1) -> 2:\n    """3"""\n    assert x > 4\n    raise ValueError(f"{x + 5}", 6)\n'
    changed = [new for node, _ in mutate.places(ast.parse(source)) for new in mutate.variants(node)]
    assert [ast.unparse(new) for new in changed] == ["2"]


def test_every_target_and_every_excuse_is_of_this_tree(mutate):
    for path, tests in mutate.TARGETS.items():
        assert all((ROOT / name).is_file() for name in (path, *tests)), path
    keys = {mutant.key for path in mutate.TARGETS for mutant in mutate.mutants(path)}
    gone = sorted(set(mutate.equivalents()) - keys)
    assert not gone, f"in {mutate.EQUIVALENT.name}, but no mutant is called so: {gone}"


def test_every_mutant_is_a_program_of_its_own(mutate):
    for path, number in (("octo_like/model/flow.py", 20), ("octo_like/training/step.py", 80)):
        found = mutate.mutants(path)
        programs = {ast.dump(ast.parse(mutate.mutated(mutant))) for mutant in found}
        assert len(found) > number and len({mutant.key for mutant in found}) == len(found)
        assert ast.dump(ast.parse((ROOT / path).read_bytes())) not in programs


RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("mutate", "scripts/mutate.py")
mutate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutate)
mutate.SPARE_SECONDS = 2
mutate.TARGETS = {"octo_like/toy.py": ("tests/test_toy.py",)}
mutate.main()
"""


def test_a_run_counts_lists_and_remembers(tmp_path):
    """Real processes in a real repository: one mutant is caught, one survives, one is excused, one never ends."""
    files = {
        "octo_like/__init__.py": "",
        "octo_like/toy.py": "def up(x):\n    while x < 8:\n        x += 2\n    return x, x * 1\n",
        "tests/conftest.py": "",
        "tests/test_toy.py": "from octo_like.toy import up\n\n\ndef test_up():\n    assert up(7)[0] == 9\n",
        "tests/equivalent_mutants.txt": (
            "# one\nocto_like/toy.py::up: x < 8 -> (x <= 8)\n    8 is never asked for in this test of tests\n"
        ),
        "configs/none.py": "",
        "scripts/mutate.py": (ROOT / "scripts" / "mutate.py").read_text(),
        ".gitignore": "runs/\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def run(*flags):
        command = [sys.executable, "-c", RUN, "--per_file", "0", *flags]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)

    done = run()
    lines = [line for line in done.stdout.splitlines() if line.startswith("octo_like/toy.py::")]
    assert done.returncode == 1, done.stderr
    assert "octo_like/toy.py::up: x * 1 -> (x / 1)" in lines and "octo_like/toy.py::up: 1 -> (2)" in lines
    assert not [line for line in lines if "x += 2" in line or "x < 8" in line]
    results = json.loads((tmp_path / "runs" / "mutation" / "results.json").read_text())
    verdicts = {key.split("::up: ")[1]: entry["verdict"] for key, entry in results.items()}
    assert verdicts["x += 2 -> pass"] == "caught" and verdicts["x * 1 -> (x / 1)"] == "survived"
    assert "x < 8 -> (x <= 8)" not in verdicts and "| all " in done.stdout
    assert (tmp_path / "octo_like" / "toy.py").read_text() == files["octo_like/toy.py"]

    # Nothing is run twice; when the tests change, the survivors are, and only they.
    before = (tmp_path / "runs" / "mutation" / "results.json").read_text()
    assert run("--at_least", "0").returncode == 0
    assert (tmp_path / "runs" / "mutation" / "results.json").read_text() == before
    (tmp_path / "tests" / "test_toy.py").write_text(files["tests/test_toy.py"] + "    assert up(7)[1] == 9\n")
    done = run("--at_least", "0")
    assert "(2)" not in done.stdout and done.returncode == 0, done.stdout

    (tmp_path / "tests" / "equivalent_mutants.txt").write_text("octo_like/toy.py::up: x < 8 -> (x <= 8)\n")
    assert "no reason is given" in run().stderr
    (tmp_path / "tests" / "equivalent_mutants.txt").write_text("")
    (tmp_path / "tests" / "test_toy.py").write_text("def test_nothing():\n    assert False\n")
    assert "its tests fail without any mutation" in run().stderr
