"""The robots of the tabletop world: what each senses and commands, and what it may be asked to do."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from octo_like.envs import dynamics
from octo_like.envs.scene import Layout


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """One robot.

    Attributes:
      tasks: what it may be asked to do.
      action_names, action_units, action_kinds, action_low, action_high: one entry for each action dimension; limits in
        these units, kinds as in `octo_like.common.dimensions.KINDS`.
      proprio_names, proprio_units: one entry for each proprioceptive dimension; may be empty.
      cameras: slots of its cameras.
      max_steps: steps after which an episode of each task is cut off.
      reach_radius: the effector has reached a block within this distance (metres, between centres, in x and y).
      layout: distances its scenes keep.
      dynamics: makes the effector.
    """

    name: str
    tasks: tuple[str, ...]
    action_names: tuple[str, ...]
    action_units: tuple[str, ...]
    action_kinds: tuple[str, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    proprio_names: tuple[str, ...]
    proprio_units: tuple[str, ...]
    cameras: tuple[str, ...]
    max_steps: Mapping[str, int]
    reach_radius: float
    layout: Layout
    dynamics: Callable[[], Any]

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @property
    def proprio_dim(self) -> int:
        return len(self.proprio_names)

    @property
    def grasps(self) -> bool:
        return "pick_and_place" in self.tasks

    def clip(self, action: np.ndarray) -> np.ndarray:
        return np.clip(action, self.action_low, self.action_high)


_ABOVE = Layout(block_block=0.11, effector_block=0.06, max_yaw=math.pi / 4, effector_area=0.19)

PUSHER = Embodiment(
    name="pusher",
    tasks=("reach", "push"),
    action_names=("dx", "dy"),
    action_units=("m", "m"),
    action_kinds=("delta", "delta"),
    action_low=(-0.05, -0.05),
    action_high=(0.05, 0.05),
    proprio_names=(),
    proprio_units=(),
    cameras=("primary",),
    max_steps={"reach": 20, "push": 32},
    reach_radius=0.07,
    layout=Layout(block_block=0.15, effector_block=0.085, max_yaw=0.25, effector_area=0.21),
    dynamics=dynamics.Pusher,
)

GRIPPER = Embodiment(
    name="gripper",
    tasks=("reach", "pick_and_place"),
    action_names=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),
    action_units=("m", "m", "m", "rad", "rad", "rad", "open fraction"),
    action_kinds=("delta",) * 6 + ("gripper",),
    action_low=(-0.05, -0.05, -0.05, -0.25, -0.25, -0.25, 0.0),
    action_high=(0.05, 0.05, 0.05, 0.25, 0.25, 0.25, 1.0),
    proprio_names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    proprio_units=("m", "m", "m", "rad", "rad", "rad", "open fraction"),
    cameras=("primary",),
    max_steps={"reach": 20, "pick_and_place": 45},
    reach_radius=0.04,
    layout=_ABOVE,
    dynamics=dynamics.CartesianGripper,
)

ARM = Embodiment(
    name="arm",
    tasks=("reach", "pick_and_place"),
    action_names=("dq1", "dq2", "gripper"),
    action_units=("rad", "rad", "open fraction"),
    action_kinds=("delta", "delta", "gripper"),
    action_low=(-0.12, -0.12, 0.0),
    action_high=(0.12, 0.12, 1.0),
    proprio_names=("q1", "q2", "gripper"),
    proprio_units=("rad", "rad", "open fraction"),
    cameras=("primary", "wrist"),
    max_steps={"reach": 20, "pick_and_place": 45},
    reach_radius=0.04,
    layout=_ABOVE,
    dynamics=dynamics.DeltaArm,
)

ARM3 = Embodiment(
    name="arm3",
    tasks=("reach", "pick_and_place"),
    action_names=("q1", "q2", "q3", "gripper"),
    action_units=("rad", "rad", "rad", "open fraction"),
    action_kinds=("absolute",) * 3 + ("gripper",),
    action_low=(-3.1, -3.1, -3.1, 0.0),
    action_high=(3.1, 3.1, 3.1, 1.0),
    proprio_names=("q1", "q2", "q3", "gripper"),
    proprio_units=("rad", "rad", "rad", "open fraction"),
    cameras=("primary", "wrist"),
    max_steps={"reach": 20, "pick_and_place": 45},
    reach_radius=0.04,
    layout=_ABOVE,
    dynamics=dynamics.ServoArm,
)

EMBODIMENTS: dict[str, Embodiment] = {e.name: e for e in (PUSHER, GRIPPER, ARM, ARM3)}
