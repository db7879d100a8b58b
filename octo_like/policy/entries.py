"""Reading configs that others wrote: values by key, with errors that name file, key and what is expected."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from octo_like.policy.pretrained import PretrainedError


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value of a config is to be, and whether one is."""

    name: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int)


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
NUMBER, INTEGER = Kind("a number", _is_number), Kind("an integer", _is_integer)
SIZE = Kind("a positive integer", lambda value: _is_integer(value) and value > 0)
BOOL = Kind("true or false", lambda value: isinstance(value, bool))
WORD = Kind("a string", lambda value: isinstance(value, str))
WORDS = Kind("a list of strings", _is_list_of(lambda value: isinstance(value, str)))
SIZES = Kind("a list of integers", _is_list_of(_is_integer))

_REQUIRED = object()


class Entry:
    """An object of a release's config. Every error names the file, the path of the key, and what is expected there."""

    def __init__(self, value: Mapping[str, Any], file: str | os.PathLike, path: str = ""):
        self.value, self.file, self.path = value, file, path

    def error(self, key: str, problem: str) -> PretrainedError:
        return PretrainedError(f"{self.file}: {self.path}{key} {problem}")

    def get(self, key: str, kind: Kind, default: Any = _REQUIRED) -> Any:
        """A value of a kind. One that is missing or null is the default.

        Raises:
          PretrainedError: it is of another kind, or missing and there is no default.
        """
        value = self.value.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.error(key, f"is missing; expected {kind.name} (there is {sorted(self.value) or 'nothing'})")
            return default
        if not kind.fits(value):
            raise self.error(key, f"is {value!r:.80}; expected {kind.name}")
        return tuple(value) if isinstance(value, list) else value

    def given(self) -> list[str]:
        """Keys whose value is not null."""
        return [key for key, value in self.value.items() if value is not None]

    def entry(self, key: str, default: Any = _REQUIRED) -> "Entry":
        """An object inside this one."""
        return Entry(self.get(key, OBJECT, default), self.file, f"{self.path}{key}.")

    def entries(self, key: str) -> dict[str, "Entry"]:
        """{name: object} of an object whose values are objects."""
        inside = self.entry(key)
        return {name: inside.entry(name) for name in inside.value}

    def component(self) -> tuple[str, "Entry"]:
        """The class's name and its keyword arguments; positional ones would be lost silently."""
        name = self.get("name", WORD)
        if self.value.get("args"):
            raise self.error("args", f"is {self.value['args']}: {name} has positional arguments; expected none")
        return name, self.entry("kwargs", {})

    def check_options(self, known: Iterable[str], whose: str) -> None:
        for option in self.value:
            if option not in known:
                raise self.error(option, f"is an unknown option of {whose}; known: {sorted(known)}")
