"""Parts of a user's own, named in a config as "module:Class" or "module:function".

Who may import them, and what source they are made of.

A config that somebody writes names the modules it wants. A policy that somebody downloads does not: its kinds are text
until its user names the module, so that loading it runs no code but ours (`modules` below).
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

from octo_like.common.sources import source_hash
from octo_like.common.words import suggest

Modules = Collection[str | ModuleType] | str | None
_FOUND: dict[str, tuple[ModuleType, str]] = {}  # name of a module that parts are of -> the module, hash of its source


class PartError(ValueError):
    """A part of a user's own that cannot be used: where it stands in the config, what it is, and what is expected."""


def is_own(kind: Any) -> bool:
    """Whether a kind is "module:Class" rather than one of ours."""
    return isinstance(kind, str) and ":" in kind


def names(modules: Modules) -> tuple[str, ...]:
    """Names of modules that are given by name or as modules."""
    modules = (modules,) if isinstance(modules, str | ModuleType) else modules or ()
    return tuple(one if isinstance(one, str) else one.__name__ for one in modules)


def is_named(kind: str, modules: Modules) -> bool:
    """Whether the module of a kind, or a package that it is in, is among `modules`; None stands for all."""
    if modules is None:
        return True
    module = kind.partition(":")[0]
    return any(module == name or module.startswith(f"{name}.") for name in names(modules))


def modules_in(tree: Any) -> tuple[str, ...]:
    """Modules that a config names anywhere below it, sorted."""
    return tuple(sorted({kind.partition(":")[0] for kind in kinds_in(tree)}))


def kinds_in(tree: Any) -> Iterator[str]:
    """Every "module:Class" that a config names anywhere below it."""
    if not isinstance(tree, Mapping) and not hasattr(tree, "items"):
        return
    for key, value in tree.items():
        if key == "kind" and is_own(value):
            yield value
        else:
            yield from kinds_in(value)


def find_class(kind: str, where: str, modules: Modules = None) -> type:
    """The class "module:Class", its module imported.

    Args:
      where: place in the config, for messages.
      modules: those that may be imported; None: the config is the caller's own, and names what it wants.

    Raises:
      PartError: the module is not among them, cannot be imported or has no such class.
    """
    return _find(kind, f"{where}: kind {kind!r}", "class", inspect.isclass, modules)


def find_function(name: str, where: str) -> Callable[..., Any]:
    """The function "module:function" that a config of the caller's own names; as `find_class`."""
    return _find(name, f"{where}: {name!r}", "function", callable, None)


def _find(kind: str, what: str, sort: str, is_wanted: Callable[[Any], bool], modules: Modules) -> Any:
    module_name, _, name = kind.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")) or not name.isidentifier():
        example = "my_parts:ForceTokenizer" if sort == "class" else "my_parts:make"
        raise PartError(f"{what} is not 'module:{sort.replace('class', 'Class')}', e.g. {example!r}")
    if not is_named(kind, modules):
        raise PartError(f"{what}: {unnamed(module_name)}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises
        raise PartError(f"{what}: {_why_not(module_name, error)}") from error
    found = getattr(module, name, None)
    if not is_wanted(found):
        own = [key for key, value in vars(module).items() if is_wanted(value) and _home(value) == module_name]
        raise PartError(
            f"{what}: module {module_name!r} ({_file(module)}) has no {sort} {name!r}; it has {sorted(own)}"
        )
    if module is not _FOUND.get(module_name, (None,))[0]:  # read when it is first used: it may change later
        try:
            _FOUND[module_name] = (module, source_hash(module))
        except (OSError, TypeError) as error:
            raise PartError(
                f"{what}: module {module_name!r} has no source file, and an export could not say what its parts are "
                "made of; put them in a .py file"
            ) from error
    return found


def _home(value: Any) -> str | None:
    return getattr(value, "__module__", None)


def make(cls: type, entry: Mapping[str, Any], where: str, **shared: Any) -> Any:
    """An instance of a dataclass (a Flax module is one) with the fields of a config's entry.

    Args:
      entry: fields without "kind".
      shared: fields that are given to every class that has them, and that an entry cannot give.

    Raises:
      PartError: an unknown field, a missing one, or one that the class itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = {key: value for key, value in shared.items() if key in fields}
    check_options(entry, set(fields) - {"parent", "name"} - set(given), where)
    unset = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [
        key
        for key, field in fields.items()
        if (field.default, field.default_factory) == unset and field.init and key not in {**entry, **given}
    ]
    if missing:
        raise PartError(f"{where}: {name_of(cls)} needs the option {missing[0]!r}")
    try:
        return cls(**entry, **given)
    except (TypeError, ValueError) as error:
        raise PartError(f"{where}: {name_of(cls)}: {error}") from error


def check_options(entry: Collection[str], known: Collection[str], where: str) -> None:
    """Raises PartError for a key of a config's entry that means nothing."""
    for key in entry:
        if key not in known:
            raise PartError(f"{where}: unknown option {key!r}; {suggest(key, known)}")


def name_of(part: Any) -> str:
    """A class (or an instance's) by its name, and by its module when it is a user's own."""
    cls = part if inspect.isclass(part) else type(part)
    own = cls.__module__.partition(".")[0] != __name__.partition(".")[0]
    return f"{cls.__module__}:{cls.__qualname__}" if own else cls.__qualname__


def accepts(method: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a method could be called with these arguments, itself and its object left aside."""
    try:
        inspect.signature(method).bind(None, *args, **kwargs)
    except TypeError:
        return False
    return True


def unnamed(*modules: str) -> str:
    """What to do so that modules are imported."""
    listed = ", ".join(map(repr, modules))
    return (
        f"loading runs no code of a module that you have not named. If you trust {listed}, name "
        f"{'it' if len(modules) == 1 else 'them'}: Policy.load_pretrained(..., modules=[{listed}]), "
        f"--config.modules={','.join(modules)} of finetune.py, or --modules {' '.join(modules)} of a script"
    )


def _why_not(module: str, error: Exception) -> str:
    parents = [module.rsplit(".", n)[0] for n in range(module.count(".") + 1)]
    if isinstance(error, ModuleNotFoundError) and error.name in parents:
        return f"there is no module {error.name!r} here; put its file into a folder that PYTHONPATH names"
    return f"importing {module!r} failed: {type(error).__name__}: {error}"


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "no file"


def used() -> dict[str, str]:
    """{module: hash, see `hashes_of`} of all parts that this process has made so far."""
    return hashes_of(sorted(_FOUND))


def hashes_of(modules: Collection[str]) -> dict[str, str]:
    """{module: 16 hex digits of its source and of all of the user's that it imports}, as it was first used here."""
    return {name: _FOUND[name][1] for name in modules}
