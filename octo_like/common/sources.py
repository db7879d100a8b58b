"""What a user's function is made of: the source of its module and of every module of the user's that this one imports.

A changed helper changes what a function returns as much as a changed function does. Modules of the standard library, of
installed packages (site-packages) and of octo_like are not followed: changes of octo_like that matter to data have
another FORMAT of the index or another data version. What a module imports by other means than an import statement is
not seen; `octo_like/data/rlds/spot_check.py` finds what that changes in the values of a few records.
"""

import ast
import hashlib
import importlib.util
import inspect
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
    found: dict[str, bytes] = {}
    package = getattr(module, "__package__", None) or ""
    _follow(source, package, found, {module.__name__})
    for name in sorted(found):
        digest.update(b"\0" + name.encode() + b"\0" + found[name])
    return digest.hexdigest()[:16]


def _follow(source: str | bytes, package: str, found: dict[str, bytes], seen: set[str]) -> None:
    """Adds the files of what `source`, in a package, imports to `found`."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for name in _imported(tree, package):
        if name in seen:
            continue
        seen.add(name)
        spec = _users(name)
        if spec is None or spec.origin is None:
            continue
        found[name] = pathlib.Path(spec.origin).read_bytes()
        if spec.origin.endswith(".py"):
            inside = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
            _follow(found[name], inside, found, seen)


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Names that may be modules: of each import statement the module, its packages, and what is taken from it."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                if not package or node.level > len(parents):
                    continue
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


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
