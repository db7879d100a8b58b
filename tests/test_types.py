"""Public functions say what they take and give. Whether it is true is checked by mypy, in `make lint`."""

import ast
import pathlib
from collections.abc import Iterator

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "octo_like"


def public_functions(
    node: ast.AST, prefix: str = "", in_class: bool = False
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """(qualified name, definition, whether its first argument is the object) of what others may call."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            if not child.name.startswith("_"):
                yield from public_functions(child, f"{prefix}{child.name}.", True)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if not child.name.startswith("_") or child.name in ("__init__", "__call__"):
                static = any(isinstance(one, ast.Name) and one.id == "staticmethod" for one in child.decorator_list)
                yield f"{prefix}{child.name}", child, in_class and not static
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from public_functions(child, prefix, in_class)


def unannotated(source: str) -> set[str]:
    """Names of public functions of which a parameter or the result has no type."""
    found = set()
    for name, function, takes_self in public_functions(ast.parse(source)):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args][1 if takes_self else 0 :] + arguments.kwonlyargs
        named += [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
        untyped = any(one.annotation is None for one in named)
        if untyped or (function.returns is None and function.name != "__init__"):
            found.add(name)
    return found


def test_public_functions_are_annotated():
    missing = {p.relative_to(PACKAGE).as_posix(): unannotated(p.read_text("utf-8")) for p in PACKAGE.rglob("*.py")}
    found = {f"{path}:{name}" for path, names in missing.items() for name in names}
    assert not found, "annotate the parameters and the result of these"


def test_the_search_finds_what_has_no_type():
    source = """
def typed(a: int, *, b: str = "") -> None: ...
def no_result(a: int): ...
def no_parameter(a) -> None: ...
def _private(a): ...
class Part:
    def __init__(self, a: int): ...
    def method(self, a: int, *rest) -> None: ...
    @staticmethod
    def static(a) -> None: ...
    def __call__(self, x): ...
class _Private:
    def method(self, a): ...
"""
    found = {"no_result", "no_parameter", "Part.method", "Part.static", "Part.__call__"}
    assert unannotated(source) == found
