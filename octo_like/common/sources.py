"""What a user's function is made of: the source of its module and of every module of the user's that this one imports.

A changed helper changes what a function returns as much as a changed function does. Modules of the standard library, of
installed packages (site-packages) and of octo_like are not followed: changes of octo_like that matter to data have
another FORMAT of the index or another data version. What a module imports by other means than an import statement is
not seen; `octo_like/data/rlds/spot_check.py` finds what that changes in the values of a few records.
"""

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import itertools
import pathlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_INSTALLED = {"site-packages", "dist-packages"}
_OWN = __name__.partition(".")[0]


def source_hash(module: ModuleType) -> str:
    """16 hex digits of the source of a module and of all modules of the user's that it imports, directly or not."""
    source = inspect.getsource(module)
    digest = hashlib.sha256(source.encode())
    files: dict[str, bytes] = {}
    _follow(source, getattr(module, "__package__", None) or "", files, {module.__name__})
    for name in sorted(files):
        digest.update(b"\0" + name.encode() + b"\0" + files[name])
    return digest.hexdigest()[:16]


def _follow(source: str | bytes, package: str, files: dict[str, bytes], seen: set[str]) -> None:
    """Adds {name: content} of what `source`, in a package, imports to `files`."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # not Python: an extension, for example
        return
    for name in _imported(tree, package):
        spec = None if name in seen else _users(name)
        seen.add(name)
        if spec is not None and spec.origin is not None:
            files[name] = pathlib.Path(spec.origin).read_bytes()
            inside = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
            _follow(files[name], inside, files, seen)


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Names that may be modules: of each import statement the module, its packages, and what is taken from it."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):  # more dots than there are packages
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            yield from itertools.accumulate(name.split("."), "{}.{}".format)


def _users(name: str) -> ModuleSpec | None:
    """Where a module is that is neither the standard library's nor installed nor of octo_like; None for all others."""
    top, _, rest = name.partition(".")
    if top in sys.stdlib_module_names or top == _OWN:
        return None
    try:
        if rest:
            # A name in a module that is no package, or in one of no interest, is no module. Nothing is imported.
            parent = _users(name.rpartition(".")[0])
            if parent is None or parent.submodule_search_locations is None:
                return None
            spec = PathFinder.find_spec(name, parent.submodule_search_locations)
        else:
            spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module made by hand has no specification
        return None
    if spec is None:
        return None
    if spec.origin is None or not spec.has_location:  # a namespace package has no file, what is in it may
        return spec if spec.submodule_search_locations is not None else None
    path = pathlib.Path(spec.origin)
    return None if _INSTALLED & set(path.parts) or not path.is_file() else spec
