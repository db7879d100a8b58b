"""Commands, config keys and Python in README.md, CONTRIBUTING.md and docs/: held against parsers, configs and modules.

tests/launch/test_docs.py runs the shell blocks of two pages as they stand; here are all pages, also what is indented or
stands within a sentence: an option, a key, a script, a make target or a name that is gone is found and named with its
page.
"""

import argparse
import ast
import fnmatch
import functools
import importlib
import pathlib
import re
import runpy
import shlex
import sys

import pytest

from octo_like.common.config import OPEN_GROUPS, ConfigError, load_config
from octo_like.common.defaults import adaptation_config, default_config
from octo_like.common.schema import flatten
from octo_like.data.spec import DatasetSpec

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")) + [
    "CONTRIBUTING.md",
    "README.md",
]
# Configs that show every group of a config and every kind of model.
KNOWN = ("octo_small", "tabletop", "metaworld", "bridge_debug")
PLACEHOLDER = re.compile(r"^(\.\.\.|\[.*\]?|[A-Z][A-Z_/:.]*|\$.*|<.*>)$")


def text_of(page: str) -> str:
    """The text of a page; of docs/octo.md without the first columns, which name what is Octo's."""
    text = (ROOT / page).read_text("utf-8")
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE) if page == "docs/octo.md" else text


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of a page: fences, and what is indented by four (language "")."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return fenced + [
        ("", re.sub(r"^ {4}", "", b, flags=re.MULTILINE)) for b in re.findall(r"(?:^ {4}.*\n)+", prose, re.MULTILINE)
    ]


def inline(text: str) -> list[str]:
    """Code within sentences and tables."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def command_lines(text: str) -> list[list[str]]:
    """Every command of a page, as words; what a shell would do with `\\`, quotes, `#` and `&&` is done."""
    lines = [
        line
        for kind, code in blocks(text)
        if kind in ("", "sh", "bash")
        for line in code.replace("\\\n", " ").split("\n")
    ]
    found = []
    for line in lines + inline(text):
        if not re.search(r"\b(python|make|train\.py|finetune\.py)\b|--config\.|^\s*[A-Z_]+=\S+ \w|scripts/|^--", line):
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an apostrophe of a sentence
            continue
        for end in ("|", "&&", ";", "||"):
            words = words[: words.index(end)] if end in words else words
        found.append(words)
    return [words for words in found if words]


class Parsed(Exception):
    """Carries the parser of a script out of it."""


@functools.cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The real parser of a script: the one that it parses its arguments with."""

    def stop(parser, *_):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", [script])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{script} parses no arguments")


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser and those of its subcommands."""
    below = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(each for values in below for each in values)]


def check_script(script: str, words: list[str]) -> str | None:
    """What is wrong with the arguments of a script, or None."""
    if "--" in words:
        words = words[: words.index("--")]
    known = {
        name: action for each in parsers(parser_of(script)) for name, action in each._option_string_actions.items()
    }
    for i, word in enumerate(words):
        if not word.startswith("-") or " " in word or re.fullmatch(r"-[\d.]+", word):
            continue  # also arguments in quotes, which are another program's
        name, equals, value = word.strip("[],").partition("=")
        if name.startswith("--config."):
            continue  # a key, see wrong_key
        if name not in known:
            return f"{script} has no option {name}"
        value = value if equals else words[i + 1] if i + 1 < len(words) else ""
        choices = known[name].choices
        if (
            choices
            and value
            and not value.startswith("-")
            and not PLACEHOLDER.match(value)
            and value not in map(str, choices)
        ):
            return f"{script} {name} is one of {', '.join(map(str, choices))}, not {value!r}"
    return None


@functools.cache
def known_configs() -> list:
    return [load_config(str(ROOT / "configs" / f"{name}.py")) for name in KNOWN] + [adaptation_config()]


def wrong_key(key: str) -> str | None:
    """What is wrong with a dotted key of a config, or None. Below a group whose keys the user chooses everything is
    right, but for the fields of a dataset."""
    parts = key.split(".")
    if parts[:2] == ["data", "datasets"]:
        wrong = len(parts) > 3 and parts[3] not in DatasetSpec.__dataclass_fields__
        return f"DatasetSpec has no field {parts[3]!r}" if wrong else None
    for config in known_configs():
        node = config
        for depth, part in enumerate(parts):
            above = ".".join(parts[:depth])
            if any(fnmatch.fnmatchcase(above, group) for group in OPEN_GROUPS):
                return None
            if not hasattr(node, "keys") or part not in node:
                break
            node = node[part]
        else:
            return None
    return f"no config has the key {key}"


def wrong_command(words: list[str]) -> str | None:
    """What is wrong with one command of a page, or None."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for i, word in enumerate(words):
        if word.startswith("--config."):
            key = word.removeprefix("--config.").partition("=")[0]
            if "." not in key and key.isupper() or not re.fullmatch(r"[\w.]+\w", key):
                continue  # a placeholder: --config.A.B
            if wrong := wrong_key(key):
                return wrong
        elif word == "--config" and i + 1 < len(words) and words[i + 1].startswith("configs/"):
            try:
                load_config(str(ROOT / words[i + 1].rstrip(",.")))
            except ConfigError as error:
                if "my_robot.py" not in words[i + 1]:  # a file that the reader is to write
                    return str(error)
        elif re.fullmatch(r"(scripts|data)/[\w/]+\.(py|sh)|train\.py|finetune\.py", word):
            if not (ROOT / word).is_file():
                return f"{word} does not exist"
            if word.endswith(".py") and not word.startswith("data/") and i and words[i - 1].startswith("python"):
                if wrong := check_script(word, words[i + 1 :]):
                    return wrong
    if words and words[0] == "make":
        text = (ROOT / "Makefile").read_text("utf-8")
        for target in words[1:]:
            if "=" in target or not re.fullmatch(r"[a-z-]+", target):
                break
            if not re.search(rf"^{target}:", text, re.MULTILINE):
                return f"the Makefile has no target {target}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_keys_of_the_page_exist(page):
    text = text_of(page)
    wrong = [f"{shlex.join(words)}: {problem}" for words in command_lines(text) if (problem := wrong_command(words))]
    # Keys that stand alone in a sentence, `checkpoint.keep_best`: a group of every config, a dot, a field.
    groups = "|".join(key for key in known_configs()[0] if hasattr(known_configs()[0][key], "keys"))
    for code in inline(text):
        found = re.fullmatch(rf"(?:config\.)?((?:{groups})(?:\.\w+)+)(?:=.*)?|config\.(\w+)", code)
        key = found and (found[1] or found[2])
        if key and key.rpartition(".")[2] not in ("py", "json", "md") and (problem := wrong_key(key)):
            wrong.append(f"`{code}`: {problem}")
    assert not wrong, f"{page}:\n" + "\n".join(wrong)


def test_mistakes_are_seen():
    for line, message in (
        ("python scripts/serve.py --checkpoints x", "has no option --checkpoints"),
        ("python scripts/convert_demos.py --from lerobott A --to B", "is one of"),
        ("python scripts/gone.py", "does not exist"),
        ("python train.py --config configs/tabletop.py --workdirs runs/x", "has no option --workdirs"),
        ("python train.py --config configs/tabletopp.py", "tabletopp"),
        ("python train.py --config.optimizer.peek=3", "optimizer.peek"),
        ("--config.data.datasets.mine.image_key.primary=a", "image_key"),
        ("make tests", "no target tests"),
    ):
        wrong = wrong_command(command_lines(f"```sh\n{line}\n```")[0])
        assert wrong and message in wrong, (line, wrong)
    assert (
        wrong_command(shlex.split("python train.py --config configs/octo_base.py --config.data.mix=rtx --workdir x"))
        is None
    )


def python_blocks(text: str) -> list[str]:
    marked = [code for kind, code in blocks(text) if kind == "python"]
    return marked + [code for kind, code in blocks(text) if not kind and re.match(r"(from|import) \w", code)]


def missing(name: str) -> str | None:
    """What is wrong with a dotted name of the package, or None: modules are imported, attributes looked up."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name and not name.startswith(error.name):
                raise
            continue
        found = module
        for part in parts[end:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part) and part not in fields:
                return f"{name}: {'.'.join(parts[:end])} has no {part}"
            found = getattr(found, part, None)
        return None
    return f"{name}: no such module"


@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_page_compiles_and_names_what_is_there(page, client_package):
    text = text_of(page)
    names = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    names |= {code.rstrip("().") for code in inline(text) if re.fullmatch(r"octo_like(\.\w+)+(\(\))?", code)}
    for code in python_blocks(text):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("octo_like"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names if alias.name.startswith("octo_like")}
    wrong = [problem for name in sorted(names) if (problem := missing(name))]
    assert not wrong, f"{page}:\n" + "\n".join(wrong)


def test_names_that_are_gone_are_seen():
    assert missing("octo_like.policy.policy.Policy.load_pretrained") is None
    assert missing("octo_like.robot.safety.ActionFilter") is None
    assert "has no Polizy" in missing("octo_like.policy.policy.Polizy")
    assert missing("octo_like.nowhere.Policy") is not None


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_the_page_names_exist(page):
    """docs/reliability.md: every promise has a test, which may not lose its name."""
    wrong = []
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / page).read_text("utf-8")):
        there = (ROOT / file).is_file() and (
            not name or re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.M)
        )
        wrong += [] if there else [f"{file}::{name}"]
    assert not wrong, f"{page}: {wrong}"


def test_the_site_has_every_page():
    """mkdocs.yml names every page, and every page of its navigation is there or made of a file of the root."""
    text = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    named = re.findall(r"([\w/]+\.md)$", text, re.MULTILINE)
    hooks = runpy.run_path(str(ROOT / "scripts" / "site_hooks.py"))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} | set(hooks["PAGES"])
    assert sorted(named) == sorted(pages), "a page in the navigation is missing, or twice, or not there"


def test_tables_of_the_site_are_made_from_the_code():
    hooks = runpy.run_path(str(ROOT / "scripts" / "site_hooks.py"))
    keys = {key: (default, comment) for key, default, comment in hooks["config_keys"]("default_config")}
    assert keys["data.keep_goal_prob"] == ("0.5", "") and keys["seed"] == ("0", "")
    assert keys["mesh.fsdp"] == ("1", "devices over which parameters and optimizer state are spread as well")
    real = {path for path, _ in flatten(default_config().to_dict(), sep=".")}
    assert real <= set(keys)
    assert "recipe.passes" in {key for key, *_ in hooks["config_keys"]("adaptation_config")}
    assert "| `--output` | `'runs/show_data'` |" in hooks["commands"]()
    linked = hooks["linked"](
        "See docs/data.md, `docs/tpu.md` and [x](data.md).\n```sh\ncat docs/data.md\n```\n", "api/a.md"
    )
    assert linked.startswith("See [docs/data.md](../data.md), [docs/tpu.md](../tpu.md) and [x](data.md).")
    assert "cat docs/data.md\n" in linked
