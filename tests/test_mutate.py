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


class Toy:
    """A repository of one module and one test; `run` mutates it in a real process."""

    def __init__(self, folder, source, test, excuses=""):
        self.folder = folder
        files = {
            "octo_like/__init__.py": "",
            "octo_like/toy.py": source,
            "tests/conftest.py": "",
            "tests/test_toy.py": f"from octo_like.toy import up\n\n\ndef test_up():\n    assert {test}\n",
            "tests/equivalent_mutants.txt": excuses,
            "configs/none.py": "",
            "scripts/mutate.py": (ROOT / "scripts" / "mutate.py").read_text(),
            ".gitignore": "runs/\n",
        }
        for name, text in files.items():
            self.write(name, text)
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)

    def write(self, name, text):
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)

    def run(self, *flags):
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", RUN, "--per_file", "0", *flags]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=500)

    def results(self):
        """{what -> into what: "caught" or "survived"}"""
        known = json.loads((self.folder / "runs" / "mutation" / "results.json").read_text())
        return {key.split("::up: ")[1]: entry["verdict"] for key, entry in known.items()}


def test_a_run_counts_lists_and_remembers(tmp_path):
    excuse = "# of this test\nocto_like/toy.py::up: x < 8 -> (x <= 8)\n    8 is never asked for\n"
    source = "def up(x):\n    return (x + 2 if x < 8 else x), x * 1\n"
    toy = Toy(tmp_path, source, "up(7)[0] == 9", excuse)
    done = toy.run()
    survivors = [line.split("::up: ")[1] for line in done.stdout.splitlines() if line.startswith("octo_like/toy.py::")]
    assert done.returncode == 1 and sorted(survivors) == ["1 -> (2)", "8 -> (9)", "x * 1 -> (x / 1)"], done.stderr
    results = toy.results()
    assert {name for name, verdict in results.items() if verdict == "survived"} == set(survivors)
    assert {"x + 2 -> (x - 2)", "2 -> (3)", "x + 2 if x < 8 else x -> (x if x < 8 else x + 2)"} <= set(results)
    assert "x < 8 -> (x <= 8)" not in results and "| all " in done.stdout
    assert (tmp_path / "octo_like" / "toy.py").read_text() == source

    # When the tests change, the survivors are run again, and what was caught is not; later nothing is.
    stamp = (tmp_path / "runs" / "mutation" / "results.json").stat().st_mtime_ns
    toy.write("tests/test_toy.py", (tmp_path / "tests" / "test_toy.py").read_text() + "    assert up(8) == (8, 8)\n")
    done = toy.run("--at_least", "0")
    assert done.returncode == 0 and "3/6" in done.stderr, done.stderr
    assert {name for name, verdict in toy.results().items() if verdict == "survived"} == {"x * 1 -> (x / 1)"}
    assert (tmp_path / "runs" / "mutation" / "results.json").stat().st_mtime_ns > stamp
    toy.write("tests/equivalent_mutants.txt", "octo_like/toy.py::up: x < 8 -> (x <= 8)\n")
    assert "no reason is given" in toy.run().stderr


@pytest.mark.slow
def test_a_loop_without_end_and_tests_that_fail_anyway(tmp_path):
    toy = Toy(tmp_path, "def up(x):\n    while x < 8:\n        x += 2\n    return x\n", "up(7) == 9")
    assert toy.run("--at_least", "0").returncode == 0
    assert toy.results()["x += 2 -> pass"] == "caught"
    toy.write("tests/test_toy.py", "def test_nothing():\n    assert False\n")
    toy.write("octo_like/toy.py", "def up(x):\n    return x + 2\n")
    assert "its tests fail without any mutation" in toy.run().stderr
