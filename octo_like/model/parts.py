"""What the parts of a model have to be like: checked when a config names a class of the user's own, and while a model
is traced, where shapes and dtypes cost nothing to look at. docs/extending.md says it in words, with an example.

    tokenizer   nn.Module   __call__(observation, task, summaries=None) -> TokenGroup or None
    stem        nn.Module   __call__(x, condition=None): (N, h, w, C) float32 -> (N, h', w', F)
    head        ActionHead  loss_terms(groups, action, mask, keys_b) -> {"loss": sum, ...}, and `report_by_sample`
                            sample(groups, keys_b, *, sample_shape=(), valid=None) -> (*sample_shape, B, H, A)
    auxiliary   nn.Module   mask(batch) -> (B, ...) bool; loss_terms(groups, batch) -> {"loss", "count": sums, ...}

Fields of the class are options in the config. Those called `dtype`, `compat` and `vocab_size` are filled in.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octo_like.common.parts import Modules, PartError, accepts, find_class, hashes_of, is_own, modules_in, name_of
from octo_like.model.heads import ActionHead
from octo_like.model.tokens import TokenGroup

GROUPS = ("task_tokenizers", "observation_tokenizers", "heads", "auxiliaries")

# Role -> (base class, methods with an example of their arguments, what an entry of the config has to say itself, so
# that config and data can be checked against each other without importing anything).
_A = object()
PROTOCOLS: dict[str, tuple[type[nn.Module], dict[str, tuple[tuple, dict]], tuple[str, ...]]] = {
    "task tokenizer": (nn.Module, {"__call__": ((_A, _A), {})}, ()),
    "observation tokenizer": (nn.Module, {"__call__": ((_A, _A, _A), {})}, ("obs_keys",)),
    "stem": (nn.Module, {"__call__": ((_A, _A), {})}, ()),
    "head": (
        ActionHead,
        {"loss_terms": ((_A, _A, _A, _A), {}), "sample": ((_A, _A), dict(sample_shape=(), valid=None))},
        ("readout", "action_horizon", "action_dim"),
    ),
    "auxiliary": (nn.Module, {"mask": ((_A,), {}), "loss_terms": ((_A, _A), {})}, ()),
}
# Keys of an entry that are not the class's.
_TAKEN = {"head": ("kind", "weight"), "auxiliary": ("kind", "weight"), "stem": ("kind", "module_name")}


# ------------------------------------------------------------------------------------------------------- from a config


def check_class(cls: type, role: str, where: str, entry: Mapping[str, Any]) -> None:
    """Checks that a class of the user's own can be a part, and that its entry in the config says what others must know.

    Args:
      role: a key of `PROTOCOLS`.
      entry: of the config, without "kind".

    Raises:
      PartError: naming the class and what it lacks.
    """
    base, methods, required = PROTOCOLS[role]
    what = f"{where}: {name_of(cls)}"
    if not issubclass(cls, base):
        expected = "flax.linen.Module" if base is nn.Module else f"{base.__module__}.{base.__name__}"
        raise PartError(f"{what} cannot be a {role}: it is no subclass of {expected}")
    for method, (args, kwargs) in methods.items():
        found = getattr(cls, method, None)
        # Flax gives every module a __call__ of its own, which only says that there is none.
        if found is None or (method == "__call__" and found is nn.Module.__call__):
            raise PartError(f"{what} cannot be a {role}: it has no method {method}")
        if not accepts(found, *args, **kwargs):
            wanted = ", ".join([f"{len(args)} argument(s)", *(f"{key}=" for key in kwargs)])
            raise PartError(f"{what}: {method} does not take {wanted}, as a {role}'s has to; see docs/extending.md")
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in _TAKEN.get(role, ("kind",)):
        if key in fields:
            raise PartError(f"{what} has a field {key!r}, which in a config means something else; rename it")
    for key in required:
        if key not in entry:
            raise PartError(f"{where}: say {key!r} in the config; what reads configs does not look into {name_of(cls)}")
        if key not in fields:
            raise PartError(f"{what} has no field {key!r}, and a {role} needs it")


def check_frozen(tokenizer: nn.Module, where: str) -> None:
    """Raises PartError for a tokenizer that says `is_frozen` and cannot encode by itself, once per task."""
    if getattr(tokenizer, "is_frozen", False) and not accepts(type(tokenizer).__call__, _A, _A, encode_only=True):
        raise PartError(f"{where}: {name_of(tokenizer)} is_frozen, but its __call__ does not take encode_only=True")


def own_kinds(model: Mapping[str, Any]) -> dict[str, str]:
    """{place in the config: "module:Class"} of the parts of a model that are not ours."""
    found: dict[str, str] = {}
    for group in GROUPS:
        for name, entry in (model.get(group) or {}).items():
            places = {f"model.{group}.{name}": entry, f"model.{group}.{name}.stem": _mapping(entry.get("stem"))}
            found |= {where: one["kind"] for where, one in places.items() if is_own(one.get("kind"))}
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if hasattr(value, "items") else {}


def own_modules(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules of the parts of a model that are not ours, sorted."""
    return modules_in({where: {"kind": kind} for where, kind in own_kinds(model).items()})


def hashes(model: Mapping[str, Any]) -> dict[str, str]:
    """{module: hash of its source} of the parts of a model that has been built here and that are not ours."""
    return hashes_of(own_modules(model))


def resolve(table: Mapping[str, type], entry: dict[str, Any], role: str, where: str, modules: Modules) -> type:
    """Takes "kind" out of an entry and finds its class: one of ours, or a checked one of the user's own.

    Raises:
      PartError: there is none, or it cannot be such a part.
    """
    kind = entry.pop("kind", None)
    if is_own(kind):
        cls = find_class(kind, where, modules)
        check_class(cls, role, where, entry)
        return cls
    if kind not in table:
        raise PartError(f"{where}: unknown kind {kind!r}; valid: {sorted(table)}, or 'module:Class' of your own")
    return table[kind]


# --------------------------------------------------------------------------------------------------------- when traced


def _found(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"({', '.join(map(str, value.shape))}) {value.dtype}"
    return f"a {type(value).__name__}"


def check_tokens(group: Any, part: nn.Module, where: str, lead: Sequence[int]) -> None:
    """Checks what a tokenizer returned.

    Args:
      lead: leading dimensions, (B,) of a task and (B, W) of an observation.

    Raises:
      PartError: it is no TokenGroup, or its tokens or mask are of another shape or type.
    """
    who, lead = f"{where} ({name_of(part)})", tuple(lead)
    if not isinstance(group, TokenGroup):
        raise PartError(f"{who} returned {_found(group)}; expected a TokenGroup, or None where its inputs are missing")
    tokens, mask = group.tokens, group.mask
    letters = ", ".join(("B", "W")[: len(lead)])
    if not hasattr(tokens, "shape") or len(tokens.shape) != len(lead) + 2 or tuple(tokens.shape[: len(lead)]) != lead:
        wanted = f"({letters}, n, F) with ({letters}) = {lead}"
        raise PartError(f"{who} returned tokens {_found(tokens)}; expected {wanted}")
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise PartError(f"{who} returned tokens {_found(tokens)}; expected floating numbers")
    if not hasattr(mask, "shape") or tuple(mask.shape) != tuple(tokens.shape[:-1]) or mask.dtype != bool:
        wanted = f"({', '.join(map(str, tokens.shape[:-1]))}) bool, one entry for each token"
        raise PartError(f"{who} returned the mask {_found(mask)}; expected {wanted}")


def check_features(x: Any, part: nn.Module, where: str, count: int) -> None:
    """Checks what a stem made of `count` images. Raises PartError."""
    if getattr(x, "ndim", None) != 4 or x.shape[0] != count or not jnp.issubdtype(x.dtype, jnp.floating):
        raise PartError(f"{where} ({name_of(part)}) returned {_found(x)}; expected ({count}, h, w, F) floating numbers")


def check_terms(terms: Any, part: nn.Module, where: str, *, counted: bool) -> None:
    """Checks what a head or an auxiliary said of a batch.

    Args:
      counted: whether it has to count the entries itself.

    Raises:
      PartError: no "loss", a term that is no sum over the batch, or a "count" where others count.
    """
    who = f"{where} ({name_of(part)})"
    if not isinstance(terms, Mapping) or "loss" not in terms:
        raise PartError(f"{who}: loss_terms returned {_keys(terms)}; expected a dict with 'loss', a sum over the batch")
    if ("count" in terms) != counted:
        what = "needs 'count', the number of entries" if counted else "has 'count', which the model counts by the mask"
        raise PartError(f"{who}: loss_terms {what}")
    for key, value in terms.items():
        if jnp.shape(value) != ():
            raise PartError(f"{who}: loss_terms[{key!r}] is {_found(value)}; expected a number, the sum over the batch")


def _keys(terms: Any) -> str:
    return f"the keys {sorted(terms)}" if isinstance(terms, Mapping) else _found(terms)


def check_actions(actions: Any, part: ActionHead, where: str, lead: Sequence[int]) -> None:
    """Checks sampled actions: (*lead, H, A) floating numbers. Raises PartError."""
    shape = (*lead, part.action_horizon, part.action_dim)
    if getattr(actions, "shape", None) != shape or not jnp.issubdtype(actions.dtype, jnp.floating):
        wanted = f"({', '.join(map(str, shape))}), (*sample_shape, B, action_horizon, action_dim)"
        raise PartError(f"{where} ({name_of(part)}): sample returned {_found(actions)}; expected {wanted}")


def reported_losses(sown: Mapping[str, Any], name: str, part: ActionHead, rows: int) -> tuple[jax.Array, jax.Array]:
    """(loss, count) (B,) that a head reported of each sample; see `ActionHead.report_by_sample`.

    Raises:
      PartError: it reported nothing, or not one number for each.
    """
    said = sown.get(f"heads_{name}", {})
    if "loss" not in said:
        raise PartError(
            f"head {name!r} ({name_of(part)}): loss_terms did not call self.report_by_sample(loss, mask), from which "
            "the loss of each dataset is logged"
        )
    loss, count = said["loss"][0], said["count"][0]
    if loss.shape != (rows,):
        raise PartError(
            f"head {name!r} ({name_of(part)}): report_by_sample was given {loss.shape[0]} samples, the batch has {rows}"
        )
    return loss, count
