"""Datasets of the Open X-Embodiment collection, as data: one readable entry each.

An entry says where the cameras are, and what the action and proprioception mean, in the vocabulary of
`octo_like.data.standardize`. Naming it in a config (`standardize="bridge_dataset"`) fills in every field of the
dataset's spec that the config does not give itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from octo_like.data import standardize as s
from octo_like.data.spec import DataError, suggest


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one dataset is read.

    Attributes:
      images: camera slot -> key below `observation`.
      standardize: trajectory function, or None when the dataset is already in the schema's terms.
      proprio: keys below `observation` after standardising.
      action_mask: False for action dimensions that are not normalised (grippers).
      language: key of the instruction, or None.
    """

    images: Mapping[str, str]
    standardize: s.Standardize | None = None
    proprio: tuple[str, ...] = ("proprio",)
    action_mask: tuple[bool, ...] | None = None
    language: str | None = "language_instruction"


ARM_WITH_GRIPPER = (True,) * 6 + (False,)

REGISTRY: dict[str, Entry] = {
    # WidowX in toy kitchens. Actions are the achieved pose change; the gripper is absolute, 1 open. The gripper is
    # binarised over the whole trajectory before its last step is dropped, so that step still decides an open question.
    "bridge_dataset": Entry(
        images={"primary": "image_0", "secondary": "image_1"},
        action_mask=ARM_WITH_GRIPPER,
        standardize=s.Standardize(
            outputs={
                "action": s.concat(
                    s.delta(s.field("observation/state")[0:6]),
                    s.drop_last_step(s.expand(s.binarize_gripper(s.field("action")[-1]))),
                ),
                "observation/proprio": s.drop_last_step(s.field("observation/state")),
                "language_instruction": s.drop_last_step(s.field("language_instruction")),
            },
            passthrough_steps=(("drop_last_steps", 1),),
        ),
    ),
}


def get(name: str) -> Entry:
    """Entry of a dataset. Raises DataError with the valid names."""
    if name not in REGISTRY:
        raise DataError(f"no registry entry {name!r}; {suggest(name, REGISTRY)}. Your own: 'python.module:function'")
    return REGISTRY[name]


def spec_fields(name: str) -> dict[str, Any]:
    """The fields of a `DatasetSpec` that an entry determines."""
    entry = get(name)
    return {
        "image_keys": dict(entry.images),
        "proprio_keys": entry.proprio,
        "language_key": entry.language,
        "action_normalization_mask": entry.action_mask,
    }
