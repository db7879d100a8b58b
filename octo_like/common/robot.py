"""One description of a robot: cameras, proprioception, what its actions mean, control rate, horizon.

A lab writes it once, in a file of its own (configs/robots/my_robot.py is an example):

    from octo_like.common.robot import Camera, Robot, absolute, gripper

    ROBOT = Robot(
        name="my_robot",
        cameras=dict(primary=Camera("front", size=(256, 256))),
        proprio=("state",),
        actions=(absolute("joint1", "rad", proprio=0), gripper("gripper", open=1.0, closed=0.0, proprio=1)),
        control_hz=10,
        action_horizon=8,
    )

and finetune.py (`--config configs/finetune.py:full,robot=FILE`), check_demos.py (`--robot FILE`), the exported policy's
statistics and its model card all read it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from octo_like.common.dimensions import KINDS, UNITS, DimensionError, Dimensions
from octo_like.common.errors import ConfigError
from octo_like.common.files import python_file
from octo_like.common.words import suggest


class RobotError(ConfigError):
    """A mistake in the description of a robot. The message says what would be valid."""


@dataclasses.dataclass(frozen=True)
class Action:
    """One dimension of the action.

    Attributes:
      name: as in plots and reports.
      kind: see `KINDS`.
      unit: see `octo_like.common.dimensions.UNITS`.
      limits: (lowest, highest) that the robot accepts, or None.
      proprio: dimension of the proprioception that it moves, or None.
      open, closed: of a gripper: the commands.
    """

    name: str
    kind: str = "other"
    unit: str = "1"
    limits: tuple[float, float] | None = None
    proprio: int | None = None
    open: float | None = None
    closed: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise RobotError(f"action {self.name!r}: kind {self.kind!r}; {suggest(self.kind, KINDS)}")
        if self.unit not in UNITS:
            raise RobotError(f"action {self.name!r}: unknown unit {self.unit!r}; {suggest(self.unit, UNITS)}")
        if self.limits is not None and not (len(self.limits) == 2 and self.limits[0] < self.limits[1]):
            raise RobotError(f"action {self.name!r}: limits must be (lowest, highest), got {self.limits}")
        if (self.kind == "gripper") != (self.open is not None and self.closed is not None):
            raise RobotError(f"action {self.name!r}: a gripper, and nothing else, has both `open` and `closed`")
        if self.kind == "gripper" and self.open == self.closed:
            raise RobotError(f"action {self.name!r}: open and closed are both {self.open}")


def absolute(name: str, unit: str, *, proprio: int | None = None, limits: tuple[float, float] | None = None) -> Action:
    """A target position or angle."""
    return Action(name, "absolute", unit, limits, proprio)


def delta(name: str, unit: str, *, proprio: int | None = None, limits: tuple[float, float] | None = None) -> Action:
    """A change of a position or angle within one step."""
    return Action(name, "delta", unit, limits, proprio)


def velocity(name: str, unit: str, *, proprio: int | None = None, limits: tuple[float, float] | None = None) -> Action:
    """A speed."""
    return Action(name, "velocity", unit, limits, proprio)


def gripper(name: str = "gripper", *, open: float = 1.0, closed: float = 0.0, proprio: int | None = None) -> Action:
    """An absolute gripper command; it is not normalised."""
    return Action(name, "gripper", "1", None, proprio, open, closed)


@dataclasses.dataclass(frozen=True)
class Camera:
    """Where a camera's frames are, and how large the model sees them.

    Attributes:
      key: below `observation`.
      size: (height, width).
      bgr: the stored frames have blue first.
    """

    key: str
    size: tuple[int, int]
    bgr: bool = False


@dataclasses.dataclass(frozen=True)
class OpenpiKeys:
    """Which keys of its openpi client are what to a policy, for robots that are driven by one.

    Attributes:
      images: key to camera slot. state: keys whose values, one after the other, are the proprioception.
      prompt: key of the instruction.
    """

    images: Mapping[str, str]
    state: Sequence[str] = ()
    prompt: str = "prompt"

    def to_json(self) -> dict[str, Any]:
        """Lists, because keys may have characters that configs do not take in names."""
        images = {"image_keys": list(self.images), "image_slots": list(self.images.values())}
        return {**images, "state": list(self.state), "prompt": self.prompt}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "OpenpiKeys":
        """Inverse of `to_json`. Raises RobotError for anything else."""
        try:
            images = dict(zip(data["image_keys"], data["image_slots"], strict=True))
            return cls(images, tuple(data["state"]), str(data["prompt"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RobotError(f"robot: openpi needs image_keys, image_slots, state and prompt: {error!r}") from error


@dataclasses.dataclass(frozen=True)
class Description:
    """What numbers of a robot mean: the part of `Robot` that travels with statistics and exported policies.

    Attributes:
      control_hz: steps per second.
      actions: one entry per dimension.
      proprio_names: one name per dimension of the proprioception; may be empty.
      proprio_units: one unit for each of them ("" where it is not known), or none at all.
      openpi: keys of its openpi client, or None.
    """

    control_hz: float
    actions: tuple[Action, ...]
    proprio_names: tuple[str, ...] = ()
    proprio_units: tuple[str, ...] = ()
    openpi: OpenpiKeys | None = None

    def __post_init__(self):
        if not self.control_hz > 0:
            raise RobotError(f"control_hz must be positive, got {self.control_hz}")
        names = [action.name for action in self.actions]
        if not names or len(set(names)) < len(names):
            raise RobotError(f"actions need different names, at least one: {', '.join(names) or 'none given'}")
        for action in self.actions:
            width = len(self.proprio_names)
            if width and action.proprio is not None and not 0 <= action.proprio < width:
                raise RobotError(f"action {action.name!r}: no proprioception {action.proprio}; valid: 0 to {width - 1}")
        try:
            Dimensions(self.proprio_names, self.proprio_units)
        except DimensionError as error:
            raise RobotError(f"proprioception: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, names and lists, one list per property: fits JSON and configs."""
        columns = {
            f"action_{field.name}": [getattr(action, field.name) for action in self.actions]
            for field in dataclasses.fields(Action)
        }
        columns["action_limits"] = [None if pair is None else list(pair) for pair in columns["action_limits"]]
        units = {"proprio_units": list(self.proprio_units)} if self.proprio_units else {}
        openpi = {} if self.openpi is None else {"openpi": self.openpi.to_json()}
        names = {"proprio_names": list(self.proprio_names)}
        return {"control_hz": self.control_hz, **names, **units, **columns, **openpi}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Description":
        """Inverse of `to_json`. Raises RobotError for unknown keys and lists of unequal length."""
        fields = [field.name for field in dataclasses.fields(Action)]
        known = {"control_hz", "proprio_names", "proprio_units", "openpi", *(f"action_{field}" for field in fields)}
        for key in data:
            if key not in known:
                raise RobotError(f"robot: unknown key {key!r}; {suggest(key, known)}")
        if "control_hz" not in data or "action_name" not in data:
            raise RobotError("robot: control_hz and action_name are needed")
        columns = {field: data[f"action_{field}"] for field in fields if data.get(f"action_{field}") is not None}
        lengths = {field: len(column) for field, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise RobotError(f"robot: lists of unequal length: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for row in rows:
            row["limits"] = None if row.get("limits") is None else tuple(row["limits"])
        names, units = (tuple(data.get(f"proprio_{what}") or ()) for what in ("names", "units"))
        openpi = None if data.get("openpi") is None else OpenpiKeys.from_json(data["openpi"])
        return cls(float(data["control_hz"]), tuple(Action(**row) for row in rows), names, units, openpi)

    def describe(self) -> str:
        """One line per action dimension."""
        lines = [f"control rate {self.control_hz:g} Hz"]
        for i, action in enumerate(self.actions):
            text = f"{action.kind}" if action.unit == "1" else f"{action.kind} [{action.unit}]"
            if action.kind == "gripper":
                text += f", open {action.open:g}, closed {action.closed:g}"
            if action.limits is not None:
                text += f", limits {action.limits[0]:g} to {action.limits[1]:g}"
            if action.proprio is not None:
                names = self.proprio_names
                text += f", moves proprio[{action.proprio}]" + (f" {names[action.proprio]}" if names else "")
            lines.append(f"action[{i}] {action.name}: {text}")
        if self.proprio_units:
            labels = Dimensions(self.proprio_names, self.proprio_units).labels
            lines += [f"proprio[{i}] {label}" for i, label in enumerate(labels)]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Robot:
    """Everything a run must be told of a robot; see the module's example.

    Attributes:
      name: of its dataset, below `data_dir`.
      cameras: slot of the schema ("primary", "wrist", ...) -> Camera.
      actions: one entry per dimension, see `absolute`, `delta`, `velocity`, `gripper`.
      control_hz: steps per second.
      action_horizon: actions in a chunk.
      window_size: observations of history, the present one included.
      proprio: keys below `observation`, joined.
      proprio_names: one per dimension of what they give.
      proprio_units: one for each of them ("" where it is not known), or none at all.
      normalization: "normal" or "bounds"; grippers are left as they are.
      language: key of the instruction, or None.
      dataset: any other field of `octo_like.data.spec.DatasetSpec`, e.g. dict(num_demos=50, standardize="mine:f").
      surgery: parts of the pretrained model to change, replace or add, as `config.surgery`. Unless it says
        otherwise the head `action` is resized to this robot's actions and keeps everything else.
      openpi: keys of its openpi client, if it is driven by one: `scripts/serve.py --openpi` then needs no table.
    """

    name: str
    cameras: Mapping[str, Camera]
    actions: Sequence[Action]
    control_hz: float
    action_horizon: int
    window_size: int = 1
    proprio: tuple[str, ...] = ()
    proprio_names: tuple[str, ...] = ()
    proprio_units: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    normalization: str = "normal"
    language: str | None = "language_instruction"
    dataset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    surgery: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    openpi: OpenpiKeys | None = None

    def __post_init__(self):
        if bool(self.proprio) != bool(self.proprio_names):
            raise RobotError(f"{self.name}: proprio and proprio_names go together: one name for each of its dimensions")
        for field in ("action_horizon", "window_size"):
            if getattr(self, field) < 1:
                raise RobotError(f"{self.name}: {field} must be at least 1, got {getattr(self, field)}")
        for slot in self.openpi.images.values() if self.openpi else ():
            if slot not in self.cameras:
                raise RobotError(f"{self.name}: openpi names a camera {slot!r}; {suggest(slot, self.cameras)}")
        self.description()

    def description(self) -> Description:
        """What its numbers mean. Raises RobotError when that is not consistent."""
        try:
            names, units = tuple(self.proprio_names), tuple(self.proprio_units)
            return Description(float(self.control_hz), tuple(self.actions), names, units, self.openpi)
        except RobotError as error:
            raise RobotError(f"{self.name}: {error}") from None

    def dataset_fields(self) -> dict[str, Any]:
        """The fields of its `DatasetSpec`, as plain data."""
        return {
            "name": self.name,
            "image_keys": {slot: camera.key for slot, camera in self.cameras.items()},
            "bgr_slots": tuple(slot for slot, camera in self.cameras.items() if camera.bgr),
            "proprio_keys": tuple(self.proprio),
            "language_key": self.language,
            "normalization": self.normalization,
            "action_normalization_mask": tuple(action.kind != "gripper" for action in self.actions),
            "val_fraction": 0.1,
            "robot": self.description().to_json(),
            **self.dataset,
        }

    def apply(self, config: Any) -> None:
        """Sets data, sizes, window and head of a fine-tuning config (an ml_collections ConfigDict) to this robot's."""
        config.window_size = self.window_size
        config.image_sizes = {slot: tuple(camera.size) for slot, camera in self.cameras.items()}
        config.proprio_dim = len(self.proprio_names) or None
        if self.language is None:
            config.text.model = None
        config.data.datasets = {self.name: self.dataset_fields()}
        head = dict(action_horizon=self.action_horizon, action_dim=len(self.actions))
        given = {group: dict(parts) for group, parts in self.surgery.items()}
        given["heads"] = {"action": head, **given.get("heads", {})}
        config.surgery = {**config.surgery.to_dict(), **given}
        config.augmentation = {k: v for k, v in config.augmentation.to_dict().items() if k in self.cameras}


def load_robot(path: str) -> Robot:
    """The `Robot` in a Python file: its variable ROBOT. "file.py:NAME" names another.

    Raises:
      ConfigError: no such file (see `files.python_file`).
      RobotError: no such variable, a description that is not consistent.
    """
    file = path.partition(":")[0]
    try:
        with python_file(path, "a robot's description", "configs/robots") as (module, name):
            found = getattr(module, name or "ROBOT", None)
    except (RobotError, TypeError) as error:  # of what the file makes
        raise RobotError(f"{file}: {error}") from error
    if not isinstance(found, Robot):
        robots = [key for key, value in vars(module).items() if isinstance(value, Robot)]
        raise RobotError(f"{file}: no Robot called {name or 'ROBOT'}; {suggest(name or 'ROBOT', robots)}")
    return found
