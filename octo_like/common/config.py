"""Experiment files and the command line.

A config is a Python file with a function `get_config()` or `get_config(arg)` that returns an ml_collections ConfigDict:

    python train.py --config configs/octo_small.py --config.seed=3 --config.optimizer.peak_lr 1e-3
    python finetune.py --config configs/finetune.py:lora --config.data.datasets.target.action_key=cmd

What stands after the colon is passed to `get_config` as one string. Overrides keep the type of the value they replace:

    int, float        3   1e-3   300_000   (an int accepts 3e5 because nothing is lost, a float accepts 3)
    bool              true   false   1   0   (a bare `--config.flag` means true)
    str               any text, as it is
    tuple             (64,64)   64,64   primary,wrist   ()
    None              a field that is None takes any literal: 3, 0.5, (1,2), true; anything else is text
    anything          None clears any field that is not a group

Groups are closed: a key the file does not have is an error with a suggestion. A few groups are open (`OPEN_GROUPS`),
because their keys are names that the user chooses, such as datasets. In an open group a new key may be written
(`--config.data.datasets.mine.weight=2`), and the whole group may be replaced by a dict literal
(`--config.data.datasets="{'mine': {'action_key': 'cmd'}}"`); what the keys mean is checked by the code that reads them.

After parsing, a config is frozen: reading is `config.a.b` or `config.get('x', default)`, assigning raises. Lists become
tuples, so that a config is equal to itself after a round trip through JSON.
"""

import argparse
import ast
import dataclasses
import fnmatch
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from octo_like.common import vocabularies
from octo_like.common.errors import ConfigError
from octo_like.common.files import python_file, write_whole
from octo_like.common.storage import StorageError
from octo_like.common.words import nearest

# Groups whose keys the user chooses (datasets, cameras, parts of a model); everything below them is free as well.
OPEN_GROUPS = (
    "data.datasets",
    "image_sizes",
    "depth_sizes",
    "extra_observations",
    "augmentation",
    "optimizer.arguments",
    "surgery.*",
)

# What a resumed run may change. Anything else decides which samples are seen or what is done with them.
RESUME_ALLOWED = (
    "num_steps",
    "eval.*",
    "checkpoint.*",
    "early_stopping.*",
    # Later than the first runs, and without effect where nothing says sub-tasks; where something does, they are in the
    # order spec, which must be the same.
    "data.drop_subtask_prob",
    "data.subtask_alone_prob",
    "data.last_subtask_prob",
    "data.last_subtask_steps",
    "log_*",
    "max_bad_steps",
    "modules",
    "watchdog.*",
    "profile_steps",
    "wandb.*",
    "mesh.*",
    "data.data_dir",
    "data.cache_dir",
    "data.host_*",
    "data.index_*",
    "data.max_bad_fraction",
    "data.prefetch",
    # What dimensions are called decides nothing.
    "data.datasets.*action_kinds",
    "data.datasets.*action_names",
    "data.datasets.*action_units",
    "data.datasets.*proprio_names",
    "data.datasets.*proprio_units",
)


# Keys that came later, and what runs from before did.
BEFORE = {"resize": "stretch"}


class ConfigMismatch(ConfigError):
    """A resumed run's config differs from the saved one where it must not. `changes` holds the refused differences."""

    def __init__(self, message: str, changes: Sequence["Change"]):
        super().__init__(message)
        self.changes = tuple(changes)


# -------------------------------------------------------------------------------------------------------------- loading


def load_config(
    spec: str,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    open_groups: Sequence[str] = OPEN_GROUPS,
    read_vocabularies: bool = True,
) -> FrozenConfigDict:
    """Loads "path/to/file.py" or "path/to/file.py:arg", applies overrides and freezes the result.

    Args:
      spec: the file, and after a colon the string handed to its `get_config`.
      overrides: (dotted key, text) pairs in the order of the command line; the last one wins.
      open_groups: patterns (fnmatch) of groups in which new keys may be written.
      read_vocabularies: put what a named vocabulary holds in the place of its name (`octo_like.common.vocabularies`).

    Raises:
      ConfigError: no such file, no `get_config`, an argument it does not take, an unknown key, a value of another type.
    """
    config = _run_config_file(spec)
    for key, text in overrides:
        override(config, key, text, open_groups=open_groups)
    for group in ("model", "surgery") if read_vocabularies else ():
        try:
            vocabularies.resolve(config.get(group), group)
        except vocabularies.VocabularyError as error:
            raise ConfigError(str(error)) from error
    return freeze(config)


def freeze(config: ConfigDict | Mapping[str, Any]) -> FrozenConfigDict:
    """A read-only copy, lists turned into tuples at every depth."""
    tree = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return FrozenConfigDict(_canonical(tree))


def _run_config_file(spec: str) -> ConfigDict:
    with python_file(spec, "config file") as (module, argument):
        file = module.__file__
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise ConfigError(f"{file} has no function get_config()")
        if argument and not inspect.signature(get_config).parameters:
            raise ConfigError(f"{file} takes no argument, but got :{argument}")
        try:
            config = get_config(argument) if argument else get_config()
        except ValueError as error:
            raise ConfigError(f"{spec}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config() of {file} returned {type(config).__name__}, expected an ml_collections.ConfigDict"
        )
    # A thawed copy without field references: an override changes the field it names and no other.
    return ConfigDict(_canonical(config.to_dict()))


def _canonical(value: Any) -> Any:
    if isinstance(value, (ConfigDict, Mapping)):
        items = value.items()
        bad = [key for key, _ in items if not isinstance(key, str)]
        if bad:
            raise ConfigError(f"config keys are strings, got {bad[0]!r}")
        return {key: _canonical(child) for key, child in items}
    if isinstance(value, (list, tuple)):
        return tuple(_canonical(child) for child in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"config values are numbers, strings, bools, None, tuples and groups; got {value!r} ({type(value).__name__})"
    )


# ------------------------------------------------------------------------------------------------------------- override


def override(config: ConfigDict, key: str, text: str, *, open_groups: Sequence[str] = OPEN_GROUPS) -> None:
    """Sets the dotted `key` of a thawed config from command line text, keeping the type of the present value.

    Raises:
      ConfigError: unknown key (with the closest valid ones), or text that is not of the field's type.
    """
    *parents, last = key.split(".")
    node = config
    seen: list[str] = []
    for part in parents:
        if part not in node:
            if not _is_open(".".join(seen), open_groups):
                raise _unknown_key(config, key, node, seen, part)
            node[part] = ConfigDict()
        if not isinstance(node[part], ConfigDict):
            dotted = ".".join([*seen, part])
            if node[part] is not None or not _is_open(dotted, open_groups):
                raise ConfigError(f"--config.{key}: {dotted} is a value ({node[part]!r}), not a group of fields")
            node[part] = ConfigDict()
        node = node[part]
        seen.append(part)

    is_open = _is_open(".".join(seen), open_groups) or _is_open(key, open_groups)
    if last not in node:
        if not is_open:
            raise _unknown_key(config, key, node, seen, last)
        value = _literal_or_text(text)
    elif isinstance(node[last], ConfigDict):
        value = _group(key, text, node[last], is_open)
    else:
        value = _typed(key, text, node[last])
    with node.ignore_type():
        if isinstance(value, dict):
            value = ConfigDict(_canonical(value))
        node[last] = value


def _is_open(dotted: str, open_groups: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(dotted, p) or fnmatch.fnmatchcase(dotted, f"{p}.*") for p in open_groups)


def _unknown_key(config: ConfigDict, key: str, node: ConfigDict, seen: list[str], part: str) -> ConfigError:
    every = [path for path, _ in _flatten(config, groups=True)]
    siblings = sorted(node.keys())
    close = nearest(part, siblings)
    suggestion: str | None
    if close:
        rest = key.split(".")[len(seen) + 1 :]
        suggestion = ".".join([*seen, close[0], *rest])
        # The rest of the path may be wrong as well: then the group is the best that can be suggested.
        suggestion = suggestion if suggestion in every else ".".join([*seen, close[0]])
    else:
        same_name = [path for path in every if path.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        leaves = [path for path, _ in _flatten(config)]
        suggestion = next(iter(same_name or nearest(key, leaves, cutoff=0.7)), None)
    hint = f"Did you mean --config.{suggestion}? " if suggestion else ""
    where = f"config.{'.'.join(seen)}" if seen else "config"
    return ConfigError(f"unknown key --config.{key}. {hint}Keys of {where}: {', '.join(siblings) or 'none'}")


def _literal_or_text(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
        return _canonical(value)
    except (ValueError, SyntaxError):
        return text


def _group(key: str, text: str, present: ConfigDict, is_open: bool) -> Any:
    value = _literal_or_text(text)
    if value is None and is_open:
        return None
    if not isinstance(value, dict):
        example = next(iter(present.keys()), "name")
        literal = " or give a dict literal" if is_open else ""
        raise ConfigError(f"--config.{key} is a group: set its fields (--config.{key}.{example}=VALUE){literal}")
    if not is_open:
        fields = ", ".join(sorted(present.keys()))
        raise ConfigError(f"--config.{key} cannot be replaced as a whole; set its fields: {fields}")
    return value


def _typed(key: str, text: str, present: Any) -> Any:
    """Text as a value of the type of `present`."""
    if text in ("None", "none", "null"):
        return None
    if present is None:
        return _literal_or_text(text)
    if isinstance(present, str):
        value = _literal_or_text(text)
        # Quotes survive some shells and launchers; '3' in quotes is text, and so is a bare 3.
        return value if isinstance(value, str) else text
    value = _literal_or_text(text)
    kind = type(present)
    if kind is bool:
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        raise _wrong_type(key, text, present, "true, false, 1 or 0")
    if kind is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise _wrong_type(key, text, present, "a whole number")
    if kind is float:
        value = _float(text) if isinstance(value, str) else value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise _wrong_type(key, text, present, "a number")
    return _tuple(key, text, value, present)


def _float(text: str) -> float | None:
    try:
        return float(text)  # inf, nan: not Python literals
    except ValueError:
        return None


def _tuple(key: str, text: str, value: Any, present: tuple) -> tuple:
    if isinstance(value, str):
        # primary,wrist and (primary,wrist): text without quotes, as it is natural to type.
        inner = text.strip()
        if inner[:1] + inner[-1:] in ("()", "[]"):
            inner = inner[1:-1]
        value = tuple(_literal_or_text(item.strip()) for item in inner.split(",") if item.strip())
    elif not isinstance(value, tuple):
        value = (value,)
    kinds = {type(item) for item in present}
    if len(kinds) == 1 and (kind := kinds.pop()) in (bool, int, float, str):
        items = [float(v) if kind is float and type(v) is int else v for v in value]
        wrong = [v for v in items if type(v) is not kind]
        if wrong:
            raise _wrong_type(key, text, present, f"a tuple of {kind.__name__}; {wrong[0]!r} is not one")
        value = tuple(items)
    return value


def _wrong_type(key: str, text: str, present: Any, valid: str) -> ConfigError:
    return ConfigError(f"--config.{key}={text}: expected {type(present).__name__} (now {present!r}): {valid}")


# --------------------------------------------------------------------------------------------------------- command line


def parse_command_line(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    default: str | None = None,
    open_groups: Sequence[str] = OPEN_GROUPS,
    read_vocabularies: bool = True,
    check: Callable[[argparse.Namespace, FrozenConfigDict], None] = lambda flags, config: None,
) -> tuple[argparse.Namespace, FrozenConfigDict]:
    """Parses `--config FILE[:arg]`, `--config.a.b=value` and the flags of `parser`.

    Args:
      parser: holds the script's other flags (such as --workdir); `--config` is added for its help text.
      argv: arguments without the program's name; default: those of the process.
      default: config file used when --config is not given.
      open_groups, read_vocabularies: see `load_config`.
      check: called with both; raises ConfigError for what no run could use.

    Returns:
      The parsed flags and the frozen config. On any mistake: one line on stderr and exit status 2.
    """
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        default=default,
        help="experiment file; single fields are overridden with --config.path.to.field=value",
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    overrides, rest = _split_overrides(parser, argv)
    flags, unknown = parser.parse_known_args(rest)
    if flags.config is None:
        parser.error("no config: pass --config configs/NAME.py")
    try:
        options: dict[str, Any] = dict(open_groups=open_groups, read_vocabularies=read_vocabularies)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown, load_config(flags.config))}")
        config = load_config(flags.config, overrides, **options)
        check(flags, config)
        return flags, config
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except StorageError as error:  # no mistake: another attempt may work
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def _meant(arguments: Sequence[str], config: FrozenConfigDict) -> str:
    """The field of the config that somebody may have meant by arguments that no flag has."""
    keys = [path for path, _ in _flatten(config, groups=True)]
    for argument in arguments:
        if argument.startswith("-"):
            word, equals, value = argument.lstrip("-").partition("=")
            word = word.removeprefix("config_")
            same = [key for key in keys if key == word or key.rpartition(".")[2] == word]
            if found := same or nearest(word, keys):
                return f". Fields of the config begin with --config.: did you mean --config.{found[0]}{equals}{value}?"
    return ""


def _split_overrides(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    overrides, rest = [], []
    i = 0
    while i < len(argv):
        token = argv[i]
        i += 1
        if not token.startswith("--config."):
            rest.append(token)
            continue
        key, equals, text = token.removeprefix("--config.").partition("=")
        if not all(key.split(".")):
            parser.exit(2, f"{parser.prog}: error: {token}: empty key\n")
        if not equals:
            follows = i < len(argv) and not argv[i].startswith("--")
            text = argv[i] if follows else "true"
            i += follows
        overrides.append((key, text))
    return overrides, rest


# ---------------------------------------------------------------------------------------------------- JSON, differences


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Nested plain dict with tuples for sequences."""
    return _canonical(config.to_dict())


def to_json(config: ConfigDict, *, indent: int | None = 2) -> str:
    """JSON text; tuples are written as arrays, keys are sorted."""
    return json.dumps(to_dict(config), indent=indent)


def from_json(text: str | bytes) -> FrozenConfigDict:
    """Inverse of `to_json`."""
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ConfigError(f"a saved config is a JSON object, got {type(tree).__name__}")
    return freeze(tree)


class _Missing:
    def __repr__(self) -> str:
        return "(absent)"


MISSING = _Missing()


@dataclasses.dataclass(frozen=True)
class Change:
    """One differing key; `MISSING` stands for a key that one side does not have."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}"


def _short(value: Any, most: int = 500) -> str:
    """A value as it is written; of a very long one, its beginning and a digest that tells it from others."""
    text = repr(value)
    if len(text) <= most:
        return text
    return f"{text[:60]}... ({len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def diff(old: ConfigDict | Mapping[str, Any], new: ConfigDict | Mapping[str, Any]) -> list[Change]:
    """Keys whose values differ, in sorted order. Values compare as JSON does: 1 equals 1.0 but not True."""
    before, after = dict(_flatten(freeze(old))), dict(_flatten(freeze(new)))
    changes = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, MISSING), after.get(key, MISSING)
        if was is MISSING or now is MISSING or was != now or isinstance(was, bool) != isinstance(now, bool):
            changes.append(Change(key, was, now))
    return changes


def check_resume(
    old: ConfigDict | Mapping[str, Any],
    new: ConfigDict | Mapping[str, Any],
    allow: Sequence[str] = RESUME_ALLOWED,
) -> list[Change]:
    """Compares the config of a checkpoint with the present one.

    Args:
      allow: patterns (fnmatch on dotted keys) of what may differ.

    Returns:
      The accepted changes, to be printed.

    Raises:
      ConfigMismatch: something else differs; the message is the diff.
    """
    # A group that was not there before, and is empty, says nothing.
    changes = [c for c in diff(old, new) if not ((c.old is MISSING or c.new is MISSING) and {} in (c.old, c.new))]
    changes = [c for c in changes if not (c.old is MISSING and c.key in BEFORE and c.new == BEFORE[c.key])]
    refused = [c for c in changes if not any(fnmatch.fnmatchcase(c.key, pattern) for pattern in allow)]
    if refused:
        lines = "\n".join(f"  {change}" for change in refused)
        raise ConfigMismatch(
            f"this run was started with another config:\n{lines}\n"
            f"Use the old values, or another --workdir to start anew. A resumed run may change: {', '.join(allow)}",
            refused,
        )
    return changes


def _flatten(node: ConfigDict, prefix: str = "", *, groups: bool = False):
    """Yields (dotted key, value); an empty group is a value of its own, so that it is not lost in a diff."""
    for key in node.keys():
        value, path = node[key], f"{prefix}.{key}" if prefix else key
        if isinstance(value, ConfigDict):
            if groups:
                yield path, value
            if len(value):
                yield from _flatten(value, path, groups=groups)
            elif not groups:
                yield path, {}
        else:
            yield path, value


def save(config: ConfigDict, path: str | os.PathLike) -> None:
    """Writes JSON so that a reader never sees half a file."""
    write_whole(path, to_json(config) + "\n")
