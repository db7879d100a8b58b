"""What mkdocs does with the pages of docs/ beside rendering them (mkdocs.yml). No step of its own: `make docs` runs it.

The pages are written to be read as files: they name each other as `docs/data.md`, and the README says what the start
page says. For the site such names become links, README.md, CONTRIBUTING.md and CHANGELOG.md become pages, and two
markers become tables that are made from the code: the keys of a config and the options of the scripts.
"""

import ast
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
DEFAULTS = ROOT / "octo_like" / "common" / "defaults.py"
# A page named in running text or inline code, but not as the text or the target of a link.
NAMED = re.compile(r"(?<![\w/\[.])(?<!\]\()`?(docs/([\w/]+)\.md|README\.md|CONTRIBUTING\.md|CHANGELOG\.md)`?(?![\w\]])")


def on_files(files, config):
    """Adds the pages that lie elsewhere in the repository."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=as_page(text)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between pages, and the tables that are made from the code."""
    markdown = markdown.replace("<!-- keys of a config -->", config_table())
    markdown = markdown.replace("<!-- options of the scripts -->", commands())
    return linked(markdown, page.file.src_uri)


def as_page(text: str) -> str:
    """A file of the root as a page of docs/: its links are those of a page; files that are no pages are only named."""
    text = re.sub(r"(\]\(|src=\")docs/", r"\1", text)
    text = re.sub(r"\]\((CONTRIBUTING|CHANGELOG)\.md\)", lambda m: f"]({m[1].lower()}.md)", text)
    return re.sub(r"\[([^\]]+)\]\((?:LICENSE|notebooks/[\w.]*|configs/[\w./]*)\)", r"`\1`", text)


def outside_code(text: str) -> Iterator[tuple[bool, str]]:
    """(is prose, piece) of a page; what stands in fences or is indented by four is code."""
    for piece in re.split(r"(^```.*?^```$|^(?: {4}.*\n)+)", text, flags=re.MULTILINE | re.DOTALL):
        yield not piece.startswith(("```", "    ")), piece


def linked(text: str, page: str) -> str:
    """The page with `docs/data.md` in running text as a link to that page."""
    up = "../" * page.count("/")
    targets = {source: name for name, source in PAGES.items()}

    def link(found: re.Match) -> str:
        target = targets.get(found[1], f"{found[2]}.md")
        exists = found[1] in targets or (ROOT / "docs" / target).is_file()
        return f"[{found[1]}]({up}{target})" if exists and target != page else found[0]

    return "".join(NAMED.sub(link, piece) if prose else piece for prose, piece in outside_code(text))


def config_keys(function: str) -> list[tuple[str, str, str]]:
    """(key, default, comment) of what a function of `octo_like/common/defaults.py` sets, in its order."""
    source = DEFAULTS.read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    own_line = {number for number in comments if source.splitlines()[number - 1].lstrip().startswith("#")}
    found: list[tuple[str, str, str]] = []

    def above(line: int) -> str:
        lines = []
        while line - 1 in own_line:
            line -= 1
            lines.insert(0, comments[line])
        return " ".join(lines)

    def add(key: str, value: ast.expr) -> None:
        is_group = isinstance(value, ast.Call) and getattr(value.func, "id", "") == "dict"
        comment = comments.get(value.end_lineno or 0, "") if not is_group or not value.keywords else ""
        if isinstance(value, ast.Call) and is_group and value.keywords:
            if said := above(value.lineno):
                found.append((key, "", said))
            for each in value.keywords:
                add(f"{key}.{each.arg}", each.value)
        else:
            found.append((key, ast.unparse(value), " ".join(filter(None, [above(value.lineno), comment]))))

    tree = ast.parse(source)
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function).body
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            add(ast.unparse(node.targets[0]).removeprefix("config."), node.value)
        elif isinstance(node, ast.Expr) and ast.unparse(node.value).startswith("config."):
            call = node.value
            assert isinstance(call, ast.Call)
            for each in call.keywords:  # config.optimizer.update(peak=...)
                add(f"{ast.unparse(call.func).removeprefix('config.').removesuffix('.update')}.{each.arg}", each.value)
    return found


def config_table() -> str:
    """The keys of a config as tables: of every run, and what adaptation adds or changes."""
    parts = []
    for title, function in (
        ("Every run", "default_config"),
        ("What `finetune.py` adds or changes", "adaptation_config"),
    ):
        rows = [
            f"| `{key}` | {f'`{value}`' if value else ''} | {comment} |".replace("**", "\\*\\*")
            for key, value, comment in config_keys(function)
        ]
        parts.append("\n".join([f"## {title}", "", "| key | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def options(path: pathlib.Path) -> list[tuple[str, str, str]]:
    """(option, default, help) of a script's parser, read off its source: nothing is imported."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            said = {each.arg: each.value for each in node.keywords}
            text = said.get("help")
            try:
                words = "" if text is None else str(ast.literal_eval(text)).replace("%%", "%")
            except ValueError:  # put together when it runs
                words = ""
            default = ast.unparse(said["default"]) if "default" in said else ""
            found.append((", ".join(map(str, names)), default, words.replace("%(default)s", default.strip("'\""))))
    return found


def commands() -> str:
    """Every script with what its docstring says first and its options."""
    parts = []
    for path in [ROOT / "train.py", ROOT / "finetune.py", *sorted((ROOT / "scripts").glob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        if "ArgumentParser(" not in text:
            continue
        said = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
        parts.append(f"## {path.relative_to(ROOT)}\n\n{said}\n")
        if rows := options(path):
            cells = [f"| `{name}` | {f'`{default}`' if default else ''} | {words} |" for name, default, words in rows]
            parts.append("\n".join(["| option | default | |", "|---|---|---|", *cells]) + "\n")
    return "\n".join(parts)
