"""Other arms: Kuka, xArm, UR, Sawyer, PR2, DLR's, Fanuc, Stretch, hand-held grippers."""

from octo_like.data.oxe import columns as c
from octo_like.data.oxe import vocabulary as s
from octo_like.data.oxe.entry import (
    ACTION,
    EEF_AND_GRIPPER,
    JOINTS,
    NO_STATE,
    STATE,
    Entry,
    OpenVLA,
    from_signed,
    oxe,
)

ABSOLUTE = "its documentation calls the actions absolute poses, not changes; look at their magnitudes"
DLR = "its documentation calls the actions poses, in a text shared by three datasets; look at their magnitudes"

KUKA_POSE = s.concat(s.field("observation/ee_position"), s.field("observation/ee_orientation"))
MASK_VIT_POSE = s.field("observation/end_effector_pose")
ASU_POSE = s.field("ground_truth_states/EE")
RH20T_STATE = s.concat(s.field("observation/tcp_base"), s.expand(s.field("observation/gripper_width")))


YAW_AS_ROLL = c.eef(turns=("yaw", "unused_1", "unused_2"), last="")


def _yaw_as_roll(x: s.Expression) -> s.Expression:
    """xyz, yaw, gripper to seven columns as both projects do it: the yaw where the roll belongs."""
    return s.concat(x[0:4], s.zeros(2), x[-1:])


def _yaw(x: s.Expression, gripper: s.Expression | None = None) -> s.Expression:
    """xyz, yaw, gripper to xyz, roll 0, pitch 0, yaw, gripper."""
    return s.concat(x[0:3], s.zeros(2), x[3:4], x[-1:] if gripper is None else gripper)


ENTRIES: dict[str, Entry] = {
    # Positions only.
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        depth={"primary": "depth_image"},
        action=s.concat(ACTION[0:3], s.zeros(3), ACTION[-1:]),
        proprio=KUKA_POSE,
        proprio_columns=c.pose(c.QUATERNION),
        extra={"observation/depth_image": s.field("observation/depth_image")[0]},
        openvla=OpenVLA(("ee_position", "ee_orientation", None)),
    ),
    # The raw gripper is 0 open, 1 closed, in the state too.
    "nyu_rot_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        action=s.concat(ACTION[0:6], s.invert_gripper(ACTION[6:7])),
        proprio_columns=c.POSE_EULER,
        upstream=dict(action_columns=c.eef(last=""), action=ACTION[:7]),
        openvla=EEF_AND_GRIPPER,
    ),
    # The state is seven joints, without the gripper.
    "ucsd_kitchen_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        action=ACTION[:-1],
        proprio=STATE[0:7],
        action_columns=c.NO_UNITS,
        proprio_columns=c.JOINTS_7,
        openvla=OpenVLA(("joint_state", None), {"joint_state": STATE[0:7]}),
        caution=ABSOLUTE,
    ),
    # Velocities.
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        action=s.concat(ACTION[0:3], s.zeros(3), ACTION[-1:]),
        action_columns=c.columns((c.XYZ, "m/s"), (c.RPY, "rad/s"), ("gripper_torque", "")),
        proprio_columns=c.pose(c.RPY, ("gripper_distance", "")),
        openvla=EEF_AND_GRIPPER,
        caution="the last action is the gripper's torque, not its opening",
    ),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        action=ACTION[:-1],
        action_columns=c.NO_UNITS,
        proprio_columns=c.POSE_EULER,
        openvla=EEF_AND_GRIPPER,
        caution=ABSOLUTE,
    ),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        action=ACTION[:-1],
        action_columns=c.NO_UNITS,
        proprio_columns=c.POSE_EULER,
        openvla=EEF_AND_GRIPPER,
        caution=ABSOLUTE,
    ),
    # Angles are yaw, pitch, roll. The state has no gripper.
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": oxe(
        images={"primary": "image", "secondary": "image2", "wrist": "hand_image"},
        proprio=s.field("observation/end_effector_pose"),
        action_columns=c.eef("", "", turns=c.YPR),
        proprio_columns=c.pose(c.YPR),
        openvla=OpenVLA(("end_effector_pose", None, None)),
        caution=ABSOLUTE,
    ),
    # The right arm of two.
    "utokyo_xarm_bimanual_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        action=ACTION[-7:],
        proprio=s.field("observation/pose_r"),
        action_columns=c.eef("", "", turns=c.YPR),
        proprio_columns=c.pose(c.YPR),
        openvla=OpenVLA(("pose_r", None, None)),
        caution=ABSOLUTE,
    ),
    # Actions: position change (3), yaw, gripper of +-1.
    "robo_net": oxe(
        images={"primary": "image", "secondary": "image1"},
        action=_yaw(ACTION),
        proprio=_yaw(STATE),
        action_columns=c.eef(last=""),
        proprio_columns=c.POSE_EULER,
        upstream=dict(
            action=_yaw_as_roll(ACTION),
            proprio=_yaw_as_roll(STATE),
            action_columns=YAW_AS_ROLL,
            proprio_columns=YAW_AS_ROLL,
        ),
        version="1.0.0",
        openvla=OpenVLA(
            ("eef_state", None, "gripper_state"),
            {"eef_state": s.concat(STATE[0:4], s.zeros(2)), "gripper_state": STATE[-1:]},
        ),
        caution="the gripper is -1 / +1, and which of them opens depends on the robot; all texts are the same",
    ),
    # Joint changes. The state's gripper is 1 when closed.
    "berkeley_mvp_converted_externally_to_rlds": oxe(
        images={"wrist": "hand_image"},
        action=s.concat(ACTION[:-1], s.invert_gripper(ACTION[-1:])),
        proprio=s.concat(s.field("observation/pose"), s.cast(s.expand(s.field("observation/gripper")), "float32")),
        proprio_columns=c.POSE_QUATERNION,
        action_mask=JOINTS,
        openvla=OpenVLA(changes=dict(action=ACTION, action_columns=c.JOINTS_AND_GRIPPER)),
    ),
    # Actions: position change (3), yaw, gripper of -1 open, +1 closed.
    "stanford_mask_vit_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        action=_yaw(ACTION, from_signed(ACTION[-1:], opens=-1)),
        proprio=_yaw(MASK_VIT_POSE),
        proprio_columns=c.POSE_EULER,
        upstream=dict(
            action=_yaw_as_roll(ACTION),
            proprio=_yaw_as_roll(MASK_VIT_POSE),
            action_columns=YAW_AS_ROLL,
            proprio_columns=YAW_AS_ROLL,
        ),
        openvla=OpenVLA(
            ("eef_state", None, "gripper_state"),
            {"eef_state": s.concat(MASK_VIT_POSE[0:4], s.zeros(2)), "gripper_state": MASK_VIT_POSE[-1:]},
        ),
    ),
    "tokyo_u_lsmo_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        proprio=s.concat(STATE[0:6], STATE[-1:]),
        action_columns=c.NO_UNITS,
        proprio_columns=c.POSE_EULER,
        openvla=EEF_AND_GRIPPER,
        caution=ABSOLUTE,
    ),
    "dlr_sara_pour_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        action_columns=c.NO_UNITS,
        proprio_columns=c.pose(c.RPY),
        openvla=OpenVLA(("state", None, None)),
        caution=DLR,
    ),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        proprio=STATE[0:6],
        action_columns=c.NO_UNITS,
        proprio_columns=c.pose(c.RPY),
        openvla=OpenVLA(("state", None, None), {"state": STATE[0:6]}),
        caution=DLR,
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        action=s.concat(ACTION[0:6], s.invert_gripper(ACTION[-1:])),
        action_columns=c.NO_UNITS,
        proprio_columns=c.POSE_EULER,
        openvla=OpenVLA(("state", None)),
        caution=DLR,
    ),
    "asu_table_top_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        proprio=s.concat(ASU_POSE, STATE[-1:]),
        action_columns=c.Dimensions.unnamed(7),
        proprio_columns=c.POSE_EULER,
        openvla=OpenVLA(("eef_state", None, "gripper_state"), {"eef_state": ASU_POSE, "gripper_state": STATE[-1:]}),
        caution="its documentation calls the actions joint velocities (there is an `action_delta` too)",
    ),
    "imperialcollege_sawyer_wrist_cam": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        action=ACTION[:-1],
        proprio=None,
        action_columns=c.eef(turns=c.YPR),
        upstream=dict(proprio=s.zeros(1)),
        openvla=OpenVLA((*(None,) * 7, "state")),
        caution="`image` is a copy of the wrist camera",
    ),
    # Positions only; no gripper: 0.
    "uiuc_d3field": oxe(
        images={"primary": "image_1", "secondary": "image_2"},
        depth={"primary": "depth_1", "secondary": "depth_2"},
        action=s.concat(ACTION, s.zeros(3), s.zeros(1)),
        proprio=None,
        action_columns=c.eef(last=""),
        upstream=dict(proprio=s.zeros(1), depth_scale=1 / 65535),
        openvla=NO_STATE,
        caution="its raw data is reported broken; both projects leave it out of their mixtures",
    ),
    # The gripper is taken from the state of the same step.
    "berkeley_fanuc_manipulation": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        bgr=("image", "wrist_image"),
        action=s.concat(ACTION, s.invert_gripper(STATE[6:7])),
        proprio=STATE[0:7],
        action_columns=c.eef(last=""),
        proprio_columns=c.columns((c.joints(6), "rad"), (c.GRIPPER, "")),
        openvla=OpenVLA(
            ("joint_state", None, "gripper_state"), {"joint_state": STATE[0:6], "gripper_state": STATE[6:7]}
        ),
        caution="state[6] is read as 1 closed; its documentation calls it the open status",
    ),
    "cmu_stretch": oxe(
        images={"primary": "image"},
        action=ACTION[:-1],
        proprio=s.concat(STATE[0:3], s.zeros(3), STATE[-1:]),
        proprio_columns=c.POSE_EULER,
        openvla=OpenVLA(
            ("eef_state", None, "gripper_state"),
            {"eef_state": s.concat(STATE[0:3], s.zeros(3)), "gripper_state": STATE[-1:]},
        ),
    ),
    # A hand-held gripper with a camera.
    "dobbe": oxe(
        images={"wrist": "wrist_image"},
        proprio_columns=c.POSE_EULER,
        openvla=OpenVLA(("proprio",), {"proprio": STATE}, changes=dict(images={"primary": "wrist_image"})),
    ),
    # The state's gripper is its width in millimetres.
    "rh20t": oxe(
        images={"primary": "image_front", "secondary": "image_side_right", "wrist": "image_wrist"},
        action=s.concat(s.field("action/tcp_base"), s.cast(s.expand(s.field("action/gripper")), "float32")),
        proprio=RH20T_STATE,
        proprio_columns=c.pose(c.RPY, (c.GRIPPER, "mm")),
        version="1.0.0",
        openvla=OpenVLA(("proprio",), {"proprio": RH20T_STATE}),
        caution="the public converter calls the cameras image_0 ... image_2; name them in image_keys",
    ),
    # Simulated, not public. The raw gripper is 0 open, 255 closed.
    "mujoco_manip": oxe(
        images={"primary": "image"},
        action=s.concat(ACTION[0:6], s.invert_gripper(s.divide(ACTION[-1:], 255.0))),
        proprio=s.field("observation/proprio"),
        version=None,
    ),
}
