"""What the columns of actions and of proprioception are, by the encodings of Open X-Embodiment and what differs.

`action_of` derives the columns of an action from its encoding, which is told by which of them are normalised; entries
of the registry name what differs: velocities, axis-angle rotations, a torque in the gripper's place. A unit is left
empty where the data's documentation does not say it: no unit is better than a wrong one.
"""

from collections.abc import Sequence

from octo_like.common.dimensions import OPEN, Dimensions

XYZ, RPY, YPR = ("x", "y", "z"), ("roll", "pitch", "yaw"), ("yaw", "pitch", "roll")
ROTATION_VECTOR = ("rx", "ry", "rz")  # axis times angle
QUATERNION, QUATERNION_W_FIRST = ("qx", "qy", "qz", "qw"), ("qw", "qx", "qy", "qz")
GRIPPER = "gripper"


def columns(*groups: tuple[Sequence[str] | str, str]) -> Dimensions:
    """Columns of (names, unit of all of them) groups."""
    names: list[str] = []
    units: list[str] = []
    for group, unit in groups:
        of_group = [group] if isinstance(group, str) else list(group)
        names += of_group
        units += [unit] * len(of_group)
    return Dimensions(tuple(names), tuple(units))


def joints(count: int, prefix: str = "") -> tuple[str, ...]:
    return tuple(f"{prefix}joint_{i + 1}" for i in range(count))


def two_arms(unit: str = OPEN) -> tuple[tuple[Sequence[str] | str, str], ...]:
    """Six joints and a gripper on the left, the same on the right."""
    return tuple(
        group for side in ("left_", "right_") for group in ((joints(6, side), "rad"), (f"{side}{GRIPPER}", unit))
    )


def eef(position: str = "m", rotation: str = "rad", *, turns: Sequence[str] = RPY, last: str = OPEN) -> Dimensions:
    """x, y, z, three angles and a gripper, with the units of the three."""
    return columns((XYZ, position), (turns, rotation), (GRIPPER, last))


def pose(turns: Sequence[str], *more: tuple[Sequence[str] | str, str]) -> Dimensions:
    """A position in metres, an orientation (a quaternion has no unit), and what follows."""
    return columns((XYZ, "m"), (turns, "1" if len(turns) == 4 else "rad"), *more)


# Actions.
EEF_POS = eef()
EEF_VELOCITY = eef("m/s", "rad/s")
NO_UNITS = eef("", "")  # not documented: a controller may scale them
# -1 to 1, of robosuite's controller, which takes steps of the hand.
COMMANDS = eef("1", "1", turns=ROTATION_VECTOR).of_kinds(("delta",) * 6 + ("gripper",))
JOINT_POS = columns((joints(7), "rad"), (GRIPPER, OPEN))
BIMANUAL = columns(*two_arms())
BIMANUAL_BASE = columns(*two_arms(), ("base_forward", "m/s"), ("base_turn", "rad/s"))
TARGETS_OF_TWO = (("absolute",) * 6 + ("gripper",)) * 2
BIMANUAL_TARGETS = BIMANUAL.of_kinds(TARGETS_OF_TWO)
BIMANUAL_BASE_TARGETS = BIMANUAL_BASE.of_kinds((*TARGETS_OF_TWO, "velocity", "velocity"))
NAV_2D = columns((("x", "y"), ""))  # way-points, scaled by how fast the robot drives

# Proprioception. Grippers keep what they measured, whose sense and unit differ.
POSE_EULER = pose(RPY, (GRIPPER, ""))
POSE_QUATERNION = pose(QUATERNION, (GRIPPER, ""))
JOINTS_AND_GRIPPER = columns((joints(7), "rad"), (GRIPPER, ""))
POSE_2D = columns((("x", "y"), "m"), ("yaw", "rad"))
JOINTS_7 = columns((joints(7), "rad"))

_BY_MASK = {
    (True,) * 6 + (False,): EEF_POS,
    (True,) * 7 + (False,): JOINT_POS,
    ((True,) * 6 + (False,)) * 2: BIMANUAL,
    ((True,) * 6 + (False,)) * 2 + (True, True): BIMANUAL_BASE,
    (True, True): NAV_2D,
}


def action_of(mask: tuple[bool, ...] | None) -> Dimensions | None:
    """The columns of an action of which the mask's True are normalised, as Open X-Embodiment's encodings have them.

    Six and a gripper: a position, Euler angles (EEF_POS). Seven and a gripper: joints (JOINT_POS). Twice six and a
    gripper, perhaps with two for a base: two arms (JOINT_POS_BIMANUAL). Two: way-points (NAV_2D). None: another one.
    """
    return None if mask is None else _BY_MASK.get(tuple(mask))
