"""Robots that drive (actions are way-points in the plane) and bimanual ones."""

from typing import Any

from octo_like.data.oxe import columns as c
from octo_like.data.oxe import vocabulary as s
from octo_like.data.oxe.entry import ACTION, ARM, BIMANUAL, BIMANUAL_BASE, PLANAR, Entry, OpenVLA, oxe

POSITION, YAW = s.field("observation/position"), s.field("observation/yaw")
# How far the first way-point is in units of the way that was driven: of the uncut trajectory.
FIRST_STEP = (
    s.field("action", before_pre_steps=True),
    s.delta(s.field("observation/position", before_pre_steps=True)),
)
DRIVEN = s.rotate_by_heading(s.delta(POSITION), s.drop_last_step(YAW))


FILLED_UP = c.columns((("x", "y"), ""), (tuple(f"unused_{i}" for i in range(1, 6)), ""))


def _gnm() -> Entry:
    """Way-points in the robot's frame, as OpenVLA's copies have them; it fills them up to an arm's seven columns."""
    padded = [s.zeros(width, "float64") for width in (2, 2, 1)]
    return oxe(
        images={"wrist": "image"},
        proprio=s.concat(POSITION, YAW),
        proprio_columns=c.POSE_2D,
        action_mask=PLANAR,
        upstream=dict(action=s.concat(ACTION, *padded), action_mask=ARM, action_columns=FILLED_UP),
        only_openvla=True,
        openvla=OpenVLA(("state", None, None), {"state": s.concat(POSITION, s.zeros(3, "float64"), YAW)}),
    )


def _aloha(**changes) -> Entry:
    """Absolute joint targets of two arms, 50 Hz to 10 Hz."""
    fields: dict[str, Any] = dict(
        images={"primary": "cam_high", "secondary": "cam_low", "wrist": "cam_right_wrist"},
        proprio_columns=c.columns(*c.two_arms("")),
        action_mask=BIMANUAL,
        action_columns=c.BIMANUAL_TARGETS,
        before=(("subsample", 5),),
        version="1.0.0",
    )
    return Entry(**fields | changes)


ENTRIES: dict[str, Entry] = {
    # Way-points from the positions that were reached, three steps ahead, in the robot's frame.
    "gnm_dataset": oxe(
        images={"primary": "image"},
        action=s.multiply(DRIVEN, s.first_step_norm_ratio(*FIRST_STEP, moving=True)),
        proprio_columns=c.POSE_2D,
        action_mask=PLANAR,
        before=(("empty_if_fewer_than", 2), ("subsample", 3)),
        shorter=True,
        version="1.0.2",
        upstream=dict(action=s.multiply(DRIVEN, s.first_step_norm_ratio(*FIRST_STEP))),
    ),
    "berkeley_gnm_recon": _gnm(),
    "berkeley_gnm_cory_hall": _gnm(),
    "berkeley_gnm_sac_son": _gnm(),
    "aloha_static_dataset": _aloha(
        caution="its converter did not swap OpenCV's channels: look at the colours, and set bgr_slots if they are blue"
    ),
    "aloha_dagger_dataset": _aloha(),
    # Two more actions drive the base.
    "aloha_mobile_dataset": _aloha(
        images={"primary": "cam_high", "wrist": "cam_right_wrist"},
        action_mask=BIMANUAL_BASE,
        action_columns=c.BIMANUAL_BASE_TARGETS,
    ),
}
