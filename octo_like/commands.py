"""The commands of an installation: `octo_like COMMAND ...` runs what `python FILE ...` runs in a checkout.

    octo_like train --config octo_small --workdir runs/smoke --config.data.kind=synthetic
    octo-serve --checkpoint runs/smoke/export

`octo_like COMMAND --help` says what a command takes. Nothing is imported but the command's own file.
"""

from __future__ import annotations

import octo_like.common.interrupts  # noqa: F401  isort: skip
import ast
import importlib.metadata
import pathlib
import re
import sys
import types
from collections.abc import Sequence

from octo_like.common.files import beside_package
from octo_like.common.words import suggest

# Name: file, relative to where train.py is. What only the project's own developers run is not among them.
COMMANDS = {
    "train": "train.py",
    "finetune": "finetune.py",
    "serve": "scripts/serve.py",
    "doctor": "scripts/doctor.py",
    "supervise": "scripts/supervise.py",
    "prepare_data": "scripts/prepare_data.py",
    "show_data": "scripts/show_data.py",
    "bench_input": "scripts/bench_input.py",
    "build_tabletop": "data/tabletop/build.py",
    "build_tabletop_words": "data/tabletop_words/build.py",
    "build_tabletop_long": "data/tabletop_long/build.py",
    "convert_demos": "scripts/convert_demos.py",
    "ask_demos": "scripts/ask_demos.py",
    "check_demos": "scripts/check_demos.py",
    "check_policy": "scripts/check_policy.py",
    "probe_policy": "scripts/probe_policy.py",
    "show_model": "scripts/show_model.py",
    "export_program": "scripts/export_program.py",
    "import_octo": "scripts/import_octo.py",
    "verify_checkpoint": "scripts/verify_checkpoint.py",
    "train_tokenizer": "scripts/train_tokenizer.py",
    "train_action_tokenizer": "scripts/train_action_tokenizer.py",
    "aot_compile": "scripts/aot_compile.py",
    "scaling": "scripts/scaling.py",
}

_CALLERS: list[types.ModuleType] = []  # modules that were `__main__`; what they hold has to stay


def main(argv: Sequence[str] | None = None) -> int:
    """`octo_like COMMAND ARGUMENTS`. Returns the exit status; a command that ends the process does so itself."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"octo_like {importlib.metadata.version('octo_like')}")
        return 0
    if words[0] not in COMMANDS:
        print(f"octo_like: error: no command {words[0]!r}; {suggest(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    return run(words[0], f"octo_like {words[0]}", words[1:])


def train() -> int:
    return run("train", "octo-train", sys.argv[1:])


def finetune() -> int:
    return run("finetune", "octo-finetune", sys.argv[1:])


def serve() -> int:
    return run("serve", "octo-serve", sys.argv[1:])


def run(name: str, program: str, arguments: Sequence[str]) -> int:
    """Runs a command's file as a program called `program`, with these arguments."""
    file = path(name)
    sys.argv = [program, *arguments]
    sys.path.insert(0, str(file.parent))  # as for `python FILE`: scripts import those beside them
    # Not runpy, which would put the file's name into messages; processes that are spawned run `__main__.__file__`.
    module = types.ModuleType("__main__")
    module.__file__ = str(file)
    _CALLERS.append(sys.modules["__main__"])
    sys.modules["__main__"] = module
    exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    return 0  # a file that has not ended the process itself


def path(name: str) -> pathlib.Path:
    """The file of a command."""
    return beside_package() / COMMANDS[name]


def overview() -> str:
    """All commands, each with the first words of its file."""
    lines = ["usage: octo_like COMMAND ARGUMENTS...     (octo_like COMMAND --help, octo_like --version)", ""]
    for name in COMMANDS:
        docstring = ast.get_docstring(ast.parse(path(name).read_text(encoding="utf-8"))) or ""
        first = re.split(r"[.:;?](?:\s|$)", docstring.replace("\n", " "), maxsplit=1)[0]
        lines.append(f"  {name:21} {first}")
    return "\n".join(lines)
