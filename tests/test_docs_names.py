"""docs/architecture.md names functions and draws arrows: both have to be there."""

import ast
import importlib.util
import pathlib
import re
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PAGES = (PAGE, ROOT / "CONTRIBUTING.md")
PLACE = re.compile(r"`([\w/.]+\.py):([A-Za-z_][\w.]*)`")


def defined(path: pathlib.Path) -> set[str]:
    """Qualified names of the functions, classes and methods of a file."""
    found = set()

    def look(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    look(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.If | ast.Try | ast.With):
                look(child, prefix)

    look(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def elsewhere(name: str) -> str:
    """Where else in the package something of that name is defined, for the message."""
    files = [path for path in (ROOT / "octo_like").rglob("*.py") if name in defined(path)]
    return (
        f"it is in {', '.join(p.relative_to(ROOT).as_posix() for p in files)}" if files else "nothing has that name now"
    )


def test_every_function_that_the_page_names_exists():
    assert len(PLACE.findall(PAGE.read_text("utf-8"))) > 40, "the page names hardly any function, or in another way"
    wrong = []
    for page in PAGES:
        for file, name in dict.fromkeys(PLACE.findall(page.read_text("utf-8"))):
            if not (ROOT / file).is_file() or name not in defined(ROOT / file):
                wrong.append(f"{page.name}: {file}:{name} ({elsewhere(name)})")
    assert not wrong, "these are gone: name the function that now does what the page says there"


def test_every_file_that_the_page_names_exists():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = set(re.findall(r"`((?:octo_like|scripts|configs|tests|data|docs)/[\w/]*[\w.]+)", text))
        names |= set(re.findall(r"\]\(([\w/.]+)\)", text))
        assert names and not [name for name in names if not any((at / name).exists() for at in (ROOT, page.parent))]


def test_make_targets_that_contributors_are_told_of_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))) <= targets


def test_the_citation_has_the_version_of_the_package():
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "octo_like" / "__init__.py").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_methods_are_found_and_what_is_not_there_is_not(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("class A:\n    def f(self):\n        def inner(): ...\n\nif True:\n    def g(): ...\n")
    assert defined(file) == {"A", "A.f", "g"}
    assert elsewhere("Policy.sample_actions") == "it is in octo_like/policy/policy.py"


def script():
    found = importlib.util.spec_from_file_location("draw_architecture", ROOT / "scripts" / "draw_architecture.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def arrows(svg: str) -> set[tuple[str, str]]:
    paths = xml.etree.ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
    return {(path.get("data-from"), path.get("data-to")) for path in paths if path.get("data-from")}


def test_the_picture_has_the_arrows_of_the_imports():
    """Lines of code are counted when it is drawn, and may be older."""
    drawn = arrows((ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8"))
    assert ("model", "common") in drawn
    assert drawn == arrows(script().draw()), "draw it again: python scripts/draw_architecture.py"


def test_what_is_imported_stands_below():
    draw = script()
    imports = {"top": {"middle", "base"}, "middle": {"base"}, "base": set(), "alone": set()}
    order = draw.in_order(imports)
    assert all(order.index(target) < order.index(name) for name, targets in imports.items() for target in targets)
    assert draw.without_implied(imports) == imports | {"top": {"middle"}}
    circle = {"a": {"b", "c"}, "b": {"a", "c"}, "c": set()}
    assert draw.in_order(circle)[0] == "c" and draw.without_implied(circle) == circle
