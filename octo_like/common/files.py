"""Files of a user: Python files named on a command line (configs, robots), and files written whole or not at all."""

import contextlib
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType

from octo_like.common.errors import ConfigError
from octo_like.common.words import suggest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def beside_package() -> pathlib.Path:
    """The folder with train.py, configs/, scripts/ and data/: that of the checkout, or the wheel's copy of it."""
    bundled = PACKAGE / "bundled"
    return bundled if bundled.is_dir() else PACKAGE.parent


def find_file(text: str) -> pathlib.Path | None:
    """A file that a user named: as it stands, or among those of the project, "configs/x.py" or "x" for short.

    What is in the working directory comes first.
    """
    path = pathlib.Path(text)
    if path.is_file():
        return path
    if path.is_absolute() or not text:
        return None
    short = [pathlib.Path("configs") / f"{text}.py"] if path.suffix != ".py" and len(path.parts) == 1 else []
    names = [*short, *(beside_package() / name for name in (path, *short))]
    return next((name for name in names if name.is_file()), None)


@contextlib.contextmanager
def python_file(spec: str, what: str, home: str = "configs") -> Iterator[tuple[ModuleType, str]]:
    """The module of "path/to/file.py:arg", which is run, and the text after the colon.

    Files build on each other (`from configs import octo_small`), whatever folder the program lies in that loads them:
    until the end of the block, what is in the folder above the file's, in the working directory and beside the package
    can be imported. The project's own configs are also found by their name alone (`find_file`).

    Args:
      what: the file is, for messages.
      home: folder of the project in which such files are.

    Raises:
      ConfigError: there is no such file, or it is no Python file; the message names the nearest.
    """
    text, _, argument = spec.partition(":")
    path = find_file(text)
    if path is None:
        raise ConfigError(f"{what} {text!r} does not exist; {suggest(text, _files_near(pathlib.Path(text), home))}")
    module_spec = importlib.util.spec_from_file_location(f"_file_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{what} {text!r} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    folders = (str(path.resolve().parent.parent), str(pathlib.Path.cwd()), str(beside_package()))
    added = [folder for folder in dict.fromkeys(folders) if folder not in sys.path]
    sys.path.extend(added)
    try:
        module_spec.loader.exec_module(module)
        yield module, argument
    finally:
        for entry in added:
            sys.path.remove(entry)


def _files_near(path: pathlib.Path, home: str) -> list[str]:
    """Files in the folder of one that does not exist; those of the project's folder `home` when that is not there."""
    folder = path.parent if path.parent.is_dir() and path.parent != pathlib.Path() else pathlib.Path(home)
    if not folder.is_dir():
        return [f"{home}/{file.name}" for file in (beside_package() / home).glob("*.py")]
    return [str(file) for file in folder.glob("*.py") if file.name != "__init__.py"]


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a file on this machine so that a reader sees all of it, or what was there before."""
    target = pathlib.Path(path)
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder to fill, which becomes `path`, where nothing is yet, when the block ends well; else it is removed."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
