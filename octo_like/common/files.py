"""Files of a user: Python files named on a command line (configs, robots), and files written whole or not at all."""

import contextlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType

from octo_like.common.words import suggest


class ConfigError(ValueError):
    """A mistake in a config file or in an override. The message says what is wrong and what would be valid."""


@contextlib.contextmanager
def python_file(spec: str, what: str) -> Iterator[tuple[ModuleType, str]]:
    """The module of "path/to/file.py:arg", which is run, and the text after the colon.

    Files build on each other (`from configs import octo_small`), whatever folder the program lies in that loads them:
    until the end of the block, what is in the folder above the file's and in the working directory can be imported.

    Args:
      what: the file is, for messages.

    Raises:
      ConfigError: there is no such file, or it is no Python file; the message names the nearest.
    """
    text, _, argument = spec.partition(":")
    path = pathlib.Path(text)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else pathlib.Path("configs")
        files = [str(file) for file in folder.glob("*.py") if file.name != "__init__.py"]
        raise ConfigError(f"{what} {text!r} does not exist; {suggest(text, files)}")
    module_spec = importlib.util.spec_from_file_location(f"_file_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{what} {text!r} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    folders = (str(path.resolve().parent.parent), str(pathlib.Path.cwd()))
    added = [folder for folder in dict.fromkeys(folders) if folder not in sys.path]
    sys.path.extend(added)
    try:
        module_spec.loader.exec_module(module)
        yield module, argument
    finally:
        for entry in added:
            sys.path.remove(entry)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a file on this machine so that a reader sees all of it, or what was there before."""
    target = pathlib.Path(path)
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)
