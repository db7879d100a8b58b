"""What the registry says about one dataset, and the three ways of reading it.

    None      our reading: what the leaves mean, with the corrections that docs/oxe.md lists (the default)
    "octo"    Octo's reading, mistakes included; of a dataset that only OpenVLA registers, OpenVLA's
    "openvla" OpenVLA's reading: its own state of (mostly) eight columns, instructions never blanked

An entry gives our reading; `upstream` and `openvla` hold what differs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from octo_like.common.dimensions import Dimensions
from octo_like.data.errors import DataError
from octo_like.data.oxe import columns
from octo_like.data.oxe import vocabulary as s

# Where most datasets keep these.
ACTION, STATE, TEXT = s.field("action"), s.field("observation/state"), s.field("language_instruction")

# Action dimensions that are normalised: grippers are not.
ARM = (True,) * 6 + (False,)
JOINTS = (True,) * 7 + (False,)
BIMANUAL = ARM + ARM
BIMANUAL_BASE = BIMANUAL + (True, True)
PLANAR = (True, True)


def from_closedness(x: s.Expression) -> s.Expression:
    """A gripper command where 1 and more closes, 0 and less opens, to 1 open / 0 closed."""
    return s.invert_gripper(s.clip(x, 0.0, 1.0))


def from_signed(x: s.Expression, *, opens: int) -> s.Expression:
    """A gripper command in [-1, 1] to [0, 1] with 1 open. `opens`: the sign (1 or -1) that opens."""
    closed = s.divide(s.invert_gripper(x), 2.0)  # (1 - x) / 2
    return s.clip(s.invert_gripper(closed) if opens > 0 else closed, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class OpenVLA:
    """How OpenVLA's reading differs from Octo's.

    Attributes:
      state: keys below `observation` that are joined to the proprioception; None is a column of zeros. Empty: it reads
        no proprioception.
      leaves: leaves below `observation` that it computes first; other keys of `state` are in the data.
      changes: fields of the entry that differ.
    """

    state: tuple[str | None, ...] = ()
    leaves: Mapping[str, s.Expression] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def proprio(self) -> s.Expression | None:
        """The joined state, (T, width) float32; None when it reads none."""
        parts = [
            s.zeros(1) if key is None else s.cast(self.leaves.get(key, s.field(f"observation/{key}")), "float32")
            for key in self.state
        ]
        return s.concat(*parts) if parts else None


NO_STATE = OpenVLA((None,) * 8)
# "eef_state, one column of zeros, gripper_state" of a state that is xyz, three angles, ..., gripper.
EEF_AND_GRIPPER = OpenVLA(("eef_state", None, "gripper_state"), {"eef_state": STATE[0:6], "gripper_state": STATE[-1:]})


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one dataset is read.

    Attributes:
      images: camera slot -> key below `observation`; cameras it does not have are left out.
      action: the action, (T, A); 1 is an open gripper and 0 a closed one unless the entry's comment says otherwise.
      proprio: the proprioception, (T, P), or None when the data has none.
      text: the instruction, a string per step.
      blank: the instructions are not used (Octo's choice for datasets with one or a few uninformative texts).
      action_mask: False for action dimensions that are not normalised.
      action_columns, proprio_columns: names and units of what `action` and `proprio` give. None: of the action's
        encoding, which `action_mask` tells (see `columns.action_of`); of proprioception none.
      extra: further leaves that are computed, by path; `removes`: leaves that go.
      before: step operations on everything, before anything is computed.
      shorter: the action has one step less than the rest, which loses its last.
      swap: (path, path, probability): see `standardize.Standardize`.
      depth: camera slot -> key below `observation` of its depth map.
      depth_scale: metres per unit of the stored depth; None: not documented.
      bgr: keys below `observation` whose raw frames are stored as BGR, in `images` or not.
      upstream: fields that differ in Octo's reading (in OpenVLA's too).
      openvla: OpenVLA's reading, or None when it has none; `only_openvla`: Octo has none.
      version: the TFDS version that this describes, or None where that is not known.
      folder: TFDS name where that is not the entry's.
      unfiltered: number of episodes of the copy that still holds failed ones.
      beware: another dataset that this one is mistaken for; part of the message when a leaf is not there.
      caution: what one must know before training on it; logged when it is prepared.
    """

    images: Mapping[str, str]
    action: s.Expression = ACTION
    proprio: s.Expression | None = STATE
    text: s.Expression = TEXT
    blank: bool = False
    action_mask: tuple[bool, ...] = ARM
    action_columns: Dimensions | None = None
    proprio_columns: Dimensions | None = None
    extra: Mapping[str, s.Expression] = dataclasses.field(default_factory=dict)
    removes: tuple[str, ...] = ()
    before: tuple[tuple[str, int], ...] = ()
    shorter: bool = False
    swap: tuple[str, str, float] | None = None
    depth: Mapping[str, str] = dataclasses.field(default_factory=dict)
    depth_scale: float | None = None
    bgr: tuple[str, ...] = ()
    upstream: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    openvla: OpenVLA | None = None
    only_openvla: bool = False
    version: str | None = None
    folder: str | None = None
    unfiltered: int | None = None
    beware: str = ""
    caution: str = ""

    def __post_init__(self):
        for key in self.bgr:
            if key in self.images and key not in self.images.values():
                raise DataError(
                    f"bgr names keys below `observation`, not camera slots: {self.images[key]!r} in place of {key!r}"
                )

    def read_as(self, compat: str | None) -> "Entry":
        """The entry with the fields of one reading.

        Raises:
          DataError: OpenVLA does not read this dataset.
        """
        if compat is None:
            return self
        # Neither project swaps channels when it loads: their copies were repaired before.
        unnamed = {"proprio_columns": None} if "proprio" in self.upstream else {}  # it joins other columns
        upstream = dataclasses.replace(self, bgr=(), **unnamed | dict(self.upstream))
        if compat == "octo" and not self.only_openvla:
            return upstream
        if self.openvla is None:
            raise DataError("OpenVLA does not register this dataset; valid compat: None, 'octo'")
        computed = {f"observation/{key}": value for key, value in self.openvla.leaves.items()}
        return dataclasses.replace(
            upstream,
            blank=False,
            proprio=self.openvla.proprio(),
            proprio_columns=None,
            extra={**upstream.extra, **computed},
            **self.openvla.changes,
        )

    def columns(self) -> dict[str, Dimensions | None]:
        """Names and units of {"action", "proprio"}, as far as they are known, and kinds of actions.

        Actions that the entry computes as differences of a state are changes. Of others the encoding does not say
        whether they are, so an entry whose documentation does has kinds in its `action_columns`.
        """
        action = self.action_columns or columns.action_of(self.action_mask)
        if action is not None and not any(action.kinds):
            changes = s.changes(self.action, len(action))
            action = action.of_kinds(["delta" if d in changes else "" for d in range(len(action))])
        return {"action": action, "proprio": self.proprio_columns}

    def standardize(self, blank: bool | None = None) -> s.Standardize:
        """The trajectory function of this reading. `blank`: overrides the entry's.

        It sets `action`, `language_instruction` and, if there is one, `observation/proprio`.
        """

        def cut(value: s.Expression) -> s.Expression:
            return s.drop_last_step(value) if self.shorter else value

        outputs = {"action": self.action}
        if self.proprio is not None:
            outputs["observation/proprio"] = cut(self.proprio)
        outputs["language_instruction"] = cut(s.blank_text() if (self.blank if blank is None else blank) else self.text)
        outputs |= {path: cut(value) for path, value in self.extra.items()}
        return s.Standardize(
            outputs=outputs,
            pre_steps=self.before,
            passthrough_steps=(("drop_last_steps", 1),) if self.shorter else (),
            removes=self.removes,
            swap=self.swap,
            hint=f"The registry describes version {self.version}{self.beware}" if self.version else "",
        )


def oxe(**fields: Any) -> Entry:
    """An entry of version 0.1.0, which most of Open X-Embodiment has, unless it says otherwise."""
    return Entry(**{"version": "0.1.0"} | fields)
