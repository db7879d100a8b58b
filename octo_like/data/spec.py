"""What a run must know about one dataset, as plain data."""

import dataclasses
import logging
import numbers
from collections.abc import Collection, Mapping
from typing import Any

from octo_like.common import dimensions
from octo_like.common.dimensions import DimensionError, Dimensions
from octo_like.common.normalization import KINDS
from octo_like.common.robot import Description, RobotError
from octo_like.common.schema import RESERVED, TEXT_KINDS
from octo_like.common.words import suggest
from octo_like.data.errors import DataError

IDLE_OF = ("action", "change")
# What decides which episodes are held out, and which of the others are used.
HELD_OUT = ("name", "split", "val_split", "val_fraction", "num_demos", "num_demos_of")
NUM_DEMOS_OF = ("all", "training")  # earlier versions had the second only
COMPAT = (None, "octo", "openvla")


def _registry_entry(standardize: str | None) -> Any:
    if standardize is None:
        return None
    from octo_like.data.oxe import registry  # imports TensorFlow, which a plain spec does not need

    return registry.find(standardize)


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """One dataset of a mixture. Built from a config's dict by `from_dict`.

    Attributes:
      name: TFDS name; the folder below `data_dir`.
      version: TFDS version, or None for the newest.
      weight: share of the samples, relative to the other datasets.
      split: training split; "a+b" joins several.
      val_split: validation split, or None: then a keyed `val_fraction` of the episodes of `split` is held out.
      val_fraction: share of the episodes held out (at least one); 0 for no validation.
      standardize: None, a name of the OXE registry, or "python.module:name" of a function (dict of tensors -> dict of
        tensors, on a whole trajectory) or of an entry like the registry's (`octo_like.data.oxe.entry.Entry`).
      image_keys: camera slot of the schema -> key below `observation`, or None where the dataset has no such camera.
      proprio_keys: keys below `observation`, concatenated.
      depth_keys: camera slot -> key below `observation` of its depth map, or None.
      depth_scale: metres per unit of the stored depth; None: as its number type says (see docs/data.md).
      text_keys: kind of a text that is learned ("answer", "subtask") -> key of a string per step: what the model shall
        say there; nothing where it is empty. One kind at most.
      point_keys: name of a thing -> key below `observation` of its place in the primary image, (2,) column and row as
        fractions of the image or (4,) of a box (left, top, right, bottom), NaN where it is not known; or None. Used by
        `model.auxiliaries`.
      extra_keys: name of another sensor in the run's `extra_observations` -> key below `observation` of its values,
        (T, ...) numbers, or None where the dataset has no such sensor. They are normalised entry by entry.
      bgr_slots: cameras whose stored frames have their channels in the order blue, green, red; they are swapped.
      action_key: key of the actions (T, A); None: there are none, as in pictures with words, whose `text_keys` are
        learned.
      language_key: key of the instruction (top level, or "observation/..."), or None.
      normalization: "normal" or "bounds".
      action_normalization_mask: False for action dimensions that are left in physical units.
      head: action head that learns from this dataset.
      num_demos: use only this many episodes (keyed; 10 are among the 50). Those of `val_fraction` are held out from
        among them; a named `val_split` comes on top.
      num_demos_of: what is counted: "all", or "training": episodes of `val_fraction` come on top.
      filter: None, or "python.module:function": trajectory as on disk (dict of tensors) -> bool for the episode, or
        (T,) bools for its standardised steps. What it refuses is in no batch; an episode refused whole is as if it
        were not there (no statistics, no validation).
      skip_unlabeled: leave out episodes without an instruction.
      max_action, max_proprio: leave out episodes with a normalised value of larger magnitude anywhere.
      idle_threshold: leave out steps at which nothing is commanded: `idle_of` of every normalised action dimension is
        at most this in physical units, and the others (a gripper) are what they were a step before. None: keep.
      idle_of: "action" for velocities and differences, "change" (from the step before) for absolute positions.
      frame_slice: (start, stop, step) as in Python: the steps of an episode that may be the present step of a sample.
      subsample_length: steps of an episode that one pass shows; the next pass goes on with others. None: all.
      relative_to: for each action dimension the proprioception dimension it is made relative to, or None: the chunk of
        step t becomes action[t + h] - proprio[t]. Needs `chunk_length`.
      chunk_length: actions in each of these chunks, at least the run's action horizon.
      env: gymnasium id for rollouts, or None.
      source: "python.module:function" that returns a tf.data.Dataset of trajectories, to be read instead of files; see
        `octo_like.data.tf_source`.
      compat: reading of a registry dataset: None (with our corrections), "octo" or "openvla" (theirs, see docs/oxe.md).
      blank_text: whether a registry dataset's instructions are dropped; None: as the registry says.
      robot: what the numbers mean, control rate and names, as `octo_like.common.robot.Description.to_json` writes it,
        or None. Nothing that is learned depends on it; checks, reports and the policy's card use it.
      action_names, proprio_names: of their dimensions, as plots, tags of metrics, reports and servers show them. None:
        the robot's or the registry entry's, where there is one, else a0, a1, ... and p0, p1, ...
      action_units, proprio_units: of these dimensions, see `octo_like.common.dimensions.UNITS`; "" where not known.
      action_kinds: what each action dimension commands, see `octo_like.common.dimensions.KINDS`; "" where not known.
        None: as the robot's description or the registry entry says. A robot that may have to hold needs them.
    """

    name: str
    version: str | None = None
    weight: float = 1.0
    split: str = "train"
    val_split: str | None = None
    val_fraction: float = 0.05
    standardize: str | None = None
    image_keys: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    proprio_keys: tuple[str, ...] = ()
    depth_keys: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    depth_scale: float | None = None
    point_keys: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    extra_keys: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    text_keys: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    bgr_slots: tuple[str, ...] = ()
    action_key: str | None = "action"
    language_key: str | None = "language_instruction"
    normalization: str = "normal"
    action_normalization_mask: tuple[bool, ...] | None = None
    head: str = "action"
    num_demos: int | None = None
    num_demos_of: str = "all"
    filter: str | None = None
    skip_unlabeled: bool = False
    max_action: float | None = None
    max_proprio: float | None = None
    idle_threshold: float | None = None
    idle_of: str = "action"
    frame_slice: tuple[int | None, int | None, int | None] | None = None
    subsample_length: int | None = None
    relative_to: tuple[int | None, ...] | None = None
    chunk_length: int | None = None
    env: str | None = None
    source: str | None = None
    compat: str | None = None
    blank_text: bool | None = None
    robot: Mapping[str, Any] | None = None
    action_names: tuple[str, ...] | None = None
    action_units: tuple[str, ...] | None = None
    proprio_names: tuple[str, ...] | None = None
    proprio_units: tuple[str, ...] | None = None
    action_kinds: tuple[str, ...] | None = None

    def __post_init__(self):
        self._check_numbers()
        for part in dimensions.PARTS:
            self._given_dimensions(part)
        self._check_kinds()
        if self.normalization not in KINDS:
            raise DataError(f"{self.name}: normalization {self.normalization!r}; {suggest(self.normalization, KINDS)}")
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"{self.name}: val_fraction must be in [0, 1), got {self.val_fraction}")
        if self.num_demos is not None and self.num_demos < 1:
            raise DataError(f"{self.name}: num_demos must be at least 1 or None, got {self.num_demos}")
        if self.num_demos_of not in NUM_DEMOS_OF:
            raise DataError(
                f"{self.name}: num_demos_of {self.num_demos_of!r}; {suggest(self.num_demos_of, NUM_DEMOS_OF)}"
            )
        if self.compat not in COMPAT:
            raise DataError(f"{self.name}: compat {self.compat!r}; valid: None, 'octo', 'openvla'")
        for field in ("compat", "blank_text"):
            if getattr(self, field) is not None and not self.from_registry:
                raise DataError(
                    f"{self.name}: {field}={getattr(self, field)!r} chooses how the registry reads a dataset, but "
                    f"standardize={self.standardize!r} is none of its entries"
                )
        if self.depth_scale is not None and not self.depth_scale > 0:
            raise DataError(f"{self.name}: depth_scale must be positive (metres per unit), got {self.depth_scale}")
        for name in self.extra_keys:
            if not name.isidentifier() or name in RESERVED:
                raise DataError(
                    f"{self.name}: extra_keys: {name!r} cannot be the name of a sensor; valid: letters, digits and _, "
                    f"but not {', '.join(RESERVED)}"
                )
        for kind in self.text_keys:
            if kind not in TEXT_KINDS:
                raise DataError(f"{self.name}: text_keys: {suggest(kind, TEXT_KINDS)}, not {kind!r}")
        if len(kinds := [kind for kind, key in self.text_keys.items() if key is not None]) > 1:
            raise DataError(f"{self.name}: text_keys: a step has one text to learn, not {' and '.join(kinds)}")
        if self.action_key is None:
            self._check_without_actions()
        unknown = sorted(set(self.bgr_slots) - {slot for slot, key in self.image_keys.items() if key is not None})
        if unknown:
            raise DataError(f"{self.name}: bgr_slots: no camera {unknown[0]!r}; {suggest(unknown[0], self.image_keys)}")
        if not 0 <= self.weight < float("inf"):
            raise DataError(f"{self.name}: weight must be a finite number, not negative, got {self.weight}")
        self._check_filters()
        if self.source is not None:
            self._check_source(self.source)
        if (self.relative_to is None) != (self.chunk_length is None):
            raise DataError(f"{self.name}: relative_to and chunk_length go together, give both or none")
        if self.relative_to is not None and not self.proprio_keys:
            raise DataError(f"{self.name}: relative_to needs proprio_keys, whose dimensions it names")
        if self.chunk_length is not None and self.chunk_length < 1:
            raise DataError(f"{self.name}: chunk_length must be at least 1, got {self.chunk_length}")

    def _given_dimensions(self, part: str) -> Dimensions | None:
        """The names and units that the spec's own fields give. Raises DataError for some that cannot be."""
        names, units = getattr(self, f"{part}_names"), getattr(self, f"{part}_units")
        if names is None and units is None:
            return None
        if names is None:
            raise DataError(f"{self.name}: {part}_units without {part}_names: give both, or names only")
        if self.robot is not None:
            raise DataError(
                f"{self.name}: {part}_names beside a robot's description, which names the dimensions itself"
            )
        try:
            return Dimensions(tuple(names), tuple(units or ()))
        except DimensionError as error:
            raise DataError(f"{self.name}: {part}_names, {part}_units: {error}") from None

    def _check_kinds(self) -> None:
        """Raises DataError for kinds of actions that cannot be."""
        kinds = self.action_kinds
        if kinds is None:
            return
        if self.robot is not None:
            raise DataError(f"{self.name}: action_kinds beside a robot's description, which has the kinds itself")
        try:
            Dimensions.unnamed(len(kinds)).of_kinds(kinds)
        except DimensionError as error:
            raise DataError(f"{self.name}: action_kinds: {error}") from None
        for d, (kind, origin) in enumerate(zip(kinds, self.relative_to or (), strict=False)):
            if origin is not None and kind in ("delta", "velocity"):
                raise DataError(
                    f"{self.name}: action_kinds calls action {d} a {kind}, and relative_to makes it relative to "
                    f"proprioception {origin}, which only absolute targets can be"
                )

    def dimensions(self, part: str, width: int) -> Dimensions:
        """Names and units of a part ("action" or "proprio") of the data, which has `width` dimensions.

        Raises:
          DataError: the spec's own names or kinds, or the robot's, are of another number.
        """
        named, kinds = self._named(part, width), self.action_kinds
        if part != "action" or kinds is None:
            return named
        if len(kinds) != width:
            raise DataError(f"{self.name}: action_kinds gives {len(kinds)} action dimensions, the data has {width}")
        return named.of_kinds(kinds)

    def _named(self, part: str, width: int) -> Dimensions:
        given, whose = self._given_dimensions(part), f"{part}_names gives"
        if given is None and self.robot is not None:
            given, whose = dimensions.of_robot(self.robot, part), "the robot's description has"
        if given is not None:
            if len(given) != width:
                raise DataError(
                    f"{self.name}: {whose} {len(given)} {part} dimensions ({', '.join(given.names)}), the data has "
                    f"{width}"
                )
            return given
        entry = _registry_entry(self.standardize)
        if entry is not None and (part == "action" or self.proprio_keys == ("proprio",)):
            known = entry.read_as(self.compat).columns()[part]
            if known is not None and len(known) == width:
                return known
        return Dimensions.unnamed(width, part)

    def _check_numbers(self) -> None:
        whole, required = ("num_demos", "subsample_length", "chunk_length"), ("weight", "val_fraction")
        for field in (*required, *whole, "depth_scale", "max_action", "max_proprio", "idle_threshold"):
            value, kind = getattr(self, field), numbers.Integral if field in whole else numbers.Real
            if value is None and field not in required:
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                what = "an integer" if field in whole else "a number"
                raise DataError(
                    f"{self.name}: {field} must be {what}{'' if field in required else ' or None'}, got {value!r}"
                )

    def _check_without_actions(self) -> None:
        of_actions = (
            "action_normalization_mask",
            "max_action",
            "idle_threshold",
            "relative_to",
            "action_names",
            "action_kinds",
            "env",
        )
        given = [field for field in of_actions if getattr(self, field) is not None]
        if given:
            raise DataError(f"{self.name}: {given[0]} is about actions, and action_key=None says that there are none")
        if not any(key is not None for key in self.text_keys.values()):
            raise DataError(
                f"{self.name}: action_key=None: without actions there is nothing to learn; give text_keys, e.g. "
                "text_keys=dict(answer='answer')"
            )

    def _check_source(self, source: str) -> None:
        if ":" not in source:
            raise DataError(f"{self.name}: source must be 'module:function', got {source!r}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        of_files = ("version", "val_split", "num_demos", "filter", "subsample_length", *self.filter_fields())
        changed = [field for field in dict.fromkeys(of_files) if getattr(self, field) != defaults[field]]
        if changed:
            raise DataError(
                f"{self.name}: {changed[0]} cannot be given for a source, which is a tf.data.Dataset; do it there"
            )

    def _check_filters(self) -> None:
        for field in ("max_action", "max_proprio", "idle_threshold"):
            value = getattr(self, field)
            if value is not None and not value >= 0:
                raise DataError(f"{self.name}: {field} must not be negative, got {value}")
        if self.idle_of not in IDLE_OF:
            raise DataError(f"{self.name}: idle_of {self.idle_of!r}; {suggest(self.idle_of, IDLE_OF)}")
        if self.subsample_length is not None and self.subsample_length < 1:
            raise DataError(f"{self.name}: subsample_length must be at least 1 or None, got {self.subsample_length}")
        if self.max_proprio is not None and not self.proprio_keys:
            raise DataError(f"{self.name}: max_proprio needs proprio_keys")
        if self.skip_unlabeled and self.language_key is None:
            raise DataError(f"{self.name}: skip_unlabeled with language_key=None would leave nothing")
        if self.frame_slice is not None:
            parts = self.frame_slice
            ok = len(parts) == 3 and all(p is None or isinstance(p, int) for p in parts)
            if not ok or (parts[2] is not None and parts[2] < 1):
                raise DataError(
                    f"{self.name}: frame_slice must be (start, stop, step), integers or None, step at least 1; "
                    f"got {parts}"
                )

    @property
    def from_registry(self) -> bool:
        """Whether `standardize` is a registry entry (or a user's own entry) rather than a function."""
        return _registry_entry(self.standardize) is not None

    @classmethod
    def from_dict(cls, data: "Mapping[str, Any] | DatasetSpec", name: str | None = None) -> "DatasetSpec":
        """Spec of a plain dict; a spec stays as it is.

        Fields not given come from the registry entry that `standardize` names, if any.

        Raises:
          DataError: an unknown field or a missing name.
        """
        if isinstance(data, DatasetSpec):
            return data
        fields = {field.name for field in dataclasses.fields(cls)}
        data = dict(data)
        for key in data:
            if key not in fields:
                raise DataError(f"dataset {data.get('name') or name!r}: unknown field {key!r}; {suggest(key, fields)}")
        if _registry_entry(data.get("standardize")) is not None:
            from octo_like.data.oxe import registry

            names = (data["standardize"], data.get("compat"))
            if "image_keys" in data and "bgr_slots" not in data:
                swapped, cameras = registry.bgr_keys(*names), (data["image_keys"] or {}).items()
                data["bgr_slots"] = [
                    slot for slot, key in cameras if key and key.removeprefix("observation/") in swapped
                ]
            data = {**registry.spec_fields(*names), **data}
        if not data.get("name"):
            if not name:
                raise DataError("a dataset needs a name")
            data["name"] = name
        for field in ("image_keys", "depth_keys", "point_keys", "extra_keys", "text_keys"):
            data[field] = dict(data.get(field) or {})
        for field in ("proprio_keys", "bgr_slots"):
            if isinstance(data.get(field), str):
                raise DataError(f"{data['name']}: {field} is a list, got {data[field]!r}; write ({data[field]!r},)")
            data[field] = tuple(data.get(field) or ())
        mask = data.get("action_normalization_mask")
        data["action_normalization_mask"] = None if mask is None else tuple(bool(m) for m in mask)
        if data.get("robot") is not None:
            try:
                data["robot"] = Description.from_json(data["robot"]).to_json()
            except RobotError as error:
                raise DataError(f"{data['name']}: {error}") from error
        for field in ("action_names", "action_units", "action_kinds", "proprio_names", "proprio_units"):
            if isinstance(data.get(field), str):
                raise DataError(f"{data['name']}: {field} is a list, got {data[field]!r}; one entry per dimension")
            data[field] = None if data.get(field) is None else tuple(data[field])
        data["action_kinds"] = data["action_kinds"] or None
        for field in ("frame_slice", "relative_to"):
            data[field] = None if data.get(field) is None else tuple(data[field])
        return cls(**data)

    def held_out(self) -> dict[str, Any]:
        """The fields `HELD_OUT`. They travel with a policy's statistics: it is tried on what it has not seen."""
        return {field: getattr(self, field) for field in HELD_OUT}

    def held_out_as(self, trained: Mapping[str, Any], given: Collection[str] = ()) -> tuple["DatasetSpec", str | None]:
        """(spec that holds out what a policy's training did, what differs and was given), see `held_out`.

        Args:
          trained: the policy's `held_out`; {} where its statistics do not say, and of another dataset: left alone.
          given: fields that the user has set, which stay.
        """
        if trained.get("name") != self.name:
            return self, None
        fields = {field: value for field, value in trained.items() if field in HELD_OUT and field != "name"}
        fields.setdefault("num_demos_of", "training")
        other = [f"{field}={getattr(self, field)!r}, trained with {value!r}"
                 for field, value in fields.items() if field in given and value != getattr(self, field)]  # fmt: skip
        kept = {field: value for field, value in fields.items() if field not in given}
        return dataclasses.replace(self, **kept), "; ".join(other) or None

    @property
    def text_target(self) -> tuple[str, str] | None:
        """(kind, key) of the text that is learned, if any is."""
        return next(((kind, key) for kind, key in self.text_keys.items() if key is not None), None)

    def transform_fields(self) -> dict[str, Any]:
        """The fields that determine the content of an episode (not its weight, split or normalisation)."""
        return self.index_fields() | self.view_fields()

    def index_fields(self) -> dict[str, Any]:
        """Those of them that determine what an index holds: numbers, steps and the user's filter."""
        # `compat` and `blank_text` act through the standardize function, whose definition is hashed beside these.
        fields = {
            "standardize": self.standardize,
            "proprio_keys": list(self.proprio_keys),
            "action_key": self.action_key,
            "filter": self.filter,
            "relative_to": None if self.relative_to is None else list(self.relative_to),
            "chunk_length": self.chunk_length,
        }
        return fields | ({"extra_keys": dict(sorted(self.extra_keys.items()))} if self.extra_keys else {})

    def view_fields(self) -> dict[str, Any]:
        """Those that choose and interpret what is looked at when an episode is read: pictures, texts, points."""
        fields = {"image_keys": dict(sorted(self.image_keys.items())), "language_key": self.language_key}
        # Fields that most datasets leave empty appear only when they are not: a run stays valid when one is added.
        seldom = {
            "depth_keys": dict(sorted(self.depth_keys.items())),
            "depth_scale": self.depth_scale,
            "point_keys": dict(sorted(self.point_keys.items())),
            "text_keys": dict(sorted(self.text_keys.items())),
            "bgr_slots": sorted(self.bgr_slots),
        }
        return fields | {key: value for key, value in seldom.items() if value}

    def filter_fields(self) -> dict[str, Any]:
        """The fields that choose among the steps of the episodes, by their standardised values."""
        return {
            "skip_unlabeled": self.skip_unlabeled,
            "max_action": self.max_action,
            "max_proprio": self.max_proprio,
            "idle_threshold": self.idle_threshold,
            "idle_of": self.idle_of,
            "frame_slice": None if self.frame_slice is None else list(self.frame_slice),
        }


def specs_from_config(
    datasets: Mapping[str, Any], num_demos: int | None = None, num_demos_of: str = "all"
) -> dict[str, DatasetSpec]:
    """{key: DatasetSpec} of a config's `datasets`; the key is the name unless the dict has another.

    Args:
      num_demos, num_demos_of: of the datasets that do not say themselves; the config's `data.num_demos`, ...
    """
    if not datasets:
        raise DataError("the mixture is empty: `datasets` needs at least one entry, or name a `mix`")
    of = {"num_demos_of": num_demos_of}
    entries = {key: value if isinstance(value, DatasetSpec) else {**of, **value} for key, value in datasets.items()}
    specs = {str(key): DatasetSpec.from_dict(value, str(key)) for key, value in entries.items()}
    if num_demos is not None:
        own = {key: spec.num_demos or num_demos for key, spec in specs.items()}
        specs = {key: dataclasses.replace(spec, num_demos=own[key]) for key, spec in specs.items()}
    _warn_of_twins(specs)
    return specs


def _warn_of_twins(specs: Mapping[str, DatasetSpec]) -> None:
    """Logs which datasets of a mixture read the same episodes for the same head."""
    seen: dict[tuple, str] = {}
    for key, spec in specs.items():
        # Another filter may well be another part of the files.
        what = (spec.name, spec.version, spec.split) if spec.source is None else (spec.source,)
        other = seen.setdefault((*what, spec.filter, spec.head), key)
        if other != key:
            read = f"split {spec.split!r} of {spec.name!r}" if spec.source is None else f"source {spec.source!r}"
            logging.warning(
                "%s and %s are both %s for head %r: the same episodes count twice in the mixture, with weights %g and "
                "%g",
                *(other, key, read, spec.head, specs[other].weight, spec.weight),
            )
