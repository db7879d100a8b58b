"""The command `octo_like`, what its --help imports, and the sources of octo_like-client."""

import ast
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

import octo_like
from octo_like import commands
from octo_like.common.files import beside_package, find_file

ROOT = pathlib.Path(__file__).resolve().parent.parent

# One process asks every command for its --help, and says after which of them a heavy module was there.
HELP = """
import contextlib, io, sys
from octo_like import commands
PROOF = ("show_model", "aot_compile", "scaling")  # say what models cost: a second of CPU time
for name in sorted(commands.COMMANDS, key=PROOF.__contains__):
    text, code = io.StringIO(), None
    with contextlib.redirect_stdout(text):
        try:
            commands.main([name, "--help"])
        except SystemExit as error:
            code = error.code
    assert code == 0 and text.getvalue().startswith(f"usage: octo_like {name} "), (name, code, text.getvalue())
    heavy = {"tensorflow", "tensorflow_datasets", "torch"} | set(() if name in PROOF else ("jax", "flax", "orbax"))
    assert not heavy & sys.modules.keys(), (name, heavy & sys.modules.keys())
"""


def test_every_command_is_a_file_that_asks_for_help_without_jax_or_tensorflow():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_commands(capsys, tmp_path, monkeypatch):
    assert commands.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(commands.COMMANDS)
    assert all(len(line) <= 120 for line in lines)
    assert commands.main(["tarin"]) == 2
    assert "no command 'tarin'; did you mean 'train'?" in capsys.readouterr().err
    program = tmp_path / "program.py"
    program.write_text("import sys, beside\nif __name__ == '__main__':\n    sys.exit(beside.STATUS + len(sys.argv))\n")
    (tmp_path / "beside.py").write_text("STATUS = 40\n")
    code = "import pathlib, sys\nfrom octo_like import commands\n"
    code += "commands.path = lambda name: pathlib.Path(sys.argv[1])\ncommands.run('train', 'octo-train', ['a', 'b'])"
    assert subprocess.run([sys.executable, "-c", code, str(program)], cwd=ROOT).returncode == 43


def test_files_of_the_project_are_found_from_anywhere(tmp_path, monkeypatch):
    assert beside_package() == ROOT
    monkeypatch.chdir(tmp_path)
    for name in ("octo_small", "configs/octo_small.py"):
        assert find_file(name) == ROOT / "configs" / "octo_small.py"
    assert find_file("configs/robots/my_robot.py") == ROOT / "configs" / "robots" / "my_robot.py"
    assert find_file("octo_smal") is None and find_file("") is None and find_file("scripts/octo_small.py") is None
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "octo_small.py").write_text("")
    for name in ("octo_small", "configs/octo_small.py"):  # one's own come first
        assert find_file(name) == pathlib.Path("configs/octo_small.py")


# ---------------------------------------------------------------------------------------------------- octo_like-client

THIRD_PARTY = {"numpy", "PIL", "websockets", "msgpack"}


def client_modules() -> dict[str, str]:
    """MODULES of client/setup.py."""
    for node in ast.parse((ROOT / "client" / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULES":
            return ast.literal_eval(node.value)
    raise AssertionError("client/setup.py names no MODULES")


@pytest.mark.parametrize("source", client_modules().values())
def test_the_clients_sources_are_python_3_9(source):
    """What Python 3.9 cannot read is found by its grammar and by ruff (pyproject.toml: per-file-target-version)."""
    text = (ROOT / "octo_like" / source).read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 9))
    assert "from __future__ import annotations" in text
    allowed = {"octo_like." + name.removesuffix(".py").replace("/", ".") for name in client_modules().values()}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            first = name.partition(".")[0]
            assert name in allowed or first in THIRD_PARTY or first in sys.stdlib_module_names, name
        if isinstance(node, ast.Call):  # at run time, `isinstance(x, A | B)` and these came with 3.10
            unions = [arg for arg in node.args if isinstance(arg, ast.BinOp) and isinstance(arg.op, ast.BitOr)]
            assert not (getattr(node.func, "id", "") in ("isinstance", "issubclass") and unions), node.lineno
            new = {"strict", "slots", "kw_only", "match_args"} & {keyword.arg for keyword in node.keywords}
            assert not new, (node.lineno, new)


def test_the_clients_modules_get_names_of_their_own(client_package):
    """Nothing in them speaks of octo_like, so both distributions can be installed together."""
    assert (client_package / "version.py").read_text() == f'__version__ = "{octo_like.__version__}"\n'
    for name in client_modules():
        text = (client_package / f"{name}.py").read_text()
        assert not re.search(r"^\s*(?:from|import) octo_like\b", text, re.MULTILINE), name
    namespace = runpy.run_path(str(client_package / "words.py"))
    assert namespace["suggest"]("a", ["b"]) == "valid: b"
