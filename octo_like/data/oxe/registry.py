"""Datasets of the Open X-Embodiment collection and its neighbours, as data: one readable entry each.

An entry says where the cameras are, and what the action and proprioception mean, in the vocabulary of
`octo_like.data.oxe.vocabulary`. Naming it in a config (`standardize="bridge_dataset"`) fills in every field of the
dataset's spec that the config does not give itself. `compat` chooses the reading, see `octo_like.data.oxe.entry`.
docs/oxe.md lists what our reading corrects.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octo_like.common.sources import source_hash
from octo_like.common.words import suggest
from octo_like.data.errors import DataError
from octo_like.data.oxe import arms, franka, mobile, rtx
from octo_like.data.oxe import vocabulary as s
from octo_like.data.oxe.entry import Entry

REGISTRY: dict[str, Entry] = {**rtx.ENTRIES, **franka.ENTRIES, **arms.ENTRIES, **mobile.ENTRIES}


def is_entry_name(standardize: str | None) -> bool:
    """Whether a spec's `standardize` is meant as a name of the registry rather than of a function."""
    return standardize is not None and ":" not in standardize


def load(name: str) -> Any:
    """The function or registry entry "python.module:name".

    Raises:
      DataError: no such module, or nothing of that name in it.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise DataError(f"standardize={name!r}: cannot import {module_name!r}: {error}") from error
    found = getattr(module, attribute, None)
    if not callable(found) and not isinstance(found, Entry):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) or isinstance(value, Entry)]
        raise DataError(f"standardize={name!r}: no function {attribute!r}; {suggest(attribute, own)}")
    return found


def find(standardize: str | None) -> Entry | None:
    """The entry that a spec's `standardize` names: a name of the registry, or "python.module:NAME" of an `Entry`.

    None when it names a function or nothing. Raises DataError for a name that does not exist.
    """
    if standardize is None:
        return None
    if not is_entry_name(standardize):
        found = load(standardize)
        return found if isinstance(found, Entry) else None
    if standardize not in REGISTRY:
        raise DataError(
            f"no registry entry {standardize!r}; {suggest(standardize, REGISTRY)}. Your own: 'python.module:function'"
        )
    return REGISTRY[standardize]


def get(name: str, compat: str | None = None) -> Entry:
    """Entry of a dataset, in one reading. `name`: see `find`.

    Raises:
      DataError: no such entry, or none in this reading, with what is valid.
    """
    entry = find(name)
    if entry is None:
        raise DataError(f"standardize={name!r} is a function, not a registry entry")
    try:
        return entry.read_as(compat)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def spec_fields(name: str, compat: str | None = None) -> dict[str, Any]:
    """The fields of a `DatasetSpec` that an entry determines."""
    entry = get(name, compat)
    return {
        "image_keys": dict(entry.images),
        "depth_keys": dict(entry.depth),
        "depth_scale": entry.depth_scale,
        "bgr_slots": tuple(slot for slot, key in entry.images.items() if key in entry.bgr),
        "proprio_keys": () if entry.proprio is None else ("proprio",),
        "language_key": "language_instruction",
        "action_normalization_mask": entry.action_mask,
    }


def bgr_keys(name: str, compat: str | None = None) -> set[str]:
    """Keys below `observation` whose raw frames are BGR, whatever camera slot they are put into."""
    return set(get(name, compat).bgr)


def _bare(key: str | None) -> str | None:
    return None if key is None else key.removeprefix("observation/")


def standardizer(name: str, compat: str | None = None, blank_text: bool | None = None) -> s.Standardize:
    """The trajectory function of an entry. `blank_text`: whether instructions are dropped; None: as the entry says."""
    return get(name, compat).standardize(blank_text)


def resolve(
    name: str | None, *, compat: str | None = None, blank_text: bool | None = None
) -> tuple[Callable[[s.Trajectory], s.Trajectory] | None, str]:
    """(function, hash of its definition) of a spec's `standardize`.

    Args:
      name: None, a name of the registry, or "python.module:name" of a function or of an `Entry`.
      compat, blank_text: which reading of a registry entry; see `standardizer`.

    Raises:
      DataError: no such module, function or registry entry.
    """
    if name is None:
        return None, ""
    if find(name) is not None:
        function = standardizer(name, compat, blank_text)
        return function, hashlib.sha256(repr(function).encode()).hexdigest()[:16]
    # The whole module counts, and what it imports: helpers change the result as much as the function does.
    return load(name), source_hash(importlib.import_module(name.partition(":")[0]))


def cautions(
    name: str,
    compat: str | None,
    version: str,
    num_episodes: int,
    bgr_slots: Sequence[str],
    image_keys: Mapping[str, str | None] | None = None,
) -> list[str]:
    """What to tell the user of a dataset about the copy that was found, one sentence each.

    Args:
      version: TFDS version of the copy.
      num_episodes: episodes of its split.
      bgr_slots: cameras whose channels will be swapped.
      image_keys: camera slot -> key below `observation`; None: the entry's.
    """
    entry = get(name, compat)
    notes = [entry.caution] if entry.caution else []
    if entry.version is not None and version != entry.version:
        notes.append(f"the registry describes version {entry.version}, this is {version}: check keys and values")
    if entry.unfiltered is not None and num_episodes == entry.unfiltered:
        notes.append(f"this copy of {num_episodes:,} episodes still holds the failed ones; filter by their `success`")
    if bgr_slots:
        notes.append(
            f"channels of {', '.join(bgr_slots)} are swapped: the raw frames are BGR. If your copy was repaired when "
            "it was downloaded, set bgr_slots=()"
        )
    # Our reading swaps by itself: a camera of it that is not swapped was named by the user, who has read the above.
    if compat is not None:
        known = bgr_keys(name)
        cameras = (entry.images if image_keys is None else image_keys).items()
        stored = [slot for slot, key in cameras if _bare(key) in known and slot not in bgr_slots]
        if stored:
            notes.append(
                f"the raw frames of {', '.join(stored)} are BGR, and compat={compat!r} does not swap them, as "
                f"{'Octo' if compat == 'octo' else 'OpenVLA'} trains on a copy that was repaired when it was "
                f"downloaded. If yours was not, set bgr_slots={tuple(stored)!r}"
            )
    return notes
