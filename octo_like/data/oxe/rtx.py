"""Datasets of the first RT-X release: mostly an action dictionary, and the instruction inside the observation."""

from octo_like.data.oxe import columns as c
from octo_like.data.oxe import vocabulary as s
from octo_like.data.oxe.entry import ACTION, NO_STATE, STATE, Entry, OpenVLA, from_closedness, oxe

WORLD, ROTATION = s.field("action/world_vector"), s.field("action/rotation_delta")
CLOSEDNESS = s.field("action/gripper_closedness_action")
TEXT = s.field("observation/natural_language_instruction")
# Relative gripper commands (+1 closes, -1 opens, 0 keeps) to the state they lead to.
RELATIVE_GRIPPER = s.expand(s.rel_to_abs_gripper(CLOSEDNESS[0]))

KUKA_POSE = s.zlib_floats(s.field("observation/clip_function_input/base_pose_tool_reached"), 7)
KUKA_GRIPPER = s.zlib_floats(s.field("observation/gripper_closed"), 1)
TACO_STATE = s.field("observation/robot_obs")
JACO_POSE = s.field("observation/end_effector_cartesian_pos")
UR5_STATE = s.field("observation/robot_state")[6:14]

ENTRIES: dict[str, Entry] = {
    # Google's mobile manipulators. The state's gripper is 1 when closed, the action's 1 when open.
    "fractal20220817_data": oxe(
        images={"primary": "image"},
        action=s.concat(WORLD, ROTATION, RELATIVE_GRIPPER),
        proprio=s.concat(s.field("observation/base_pose_tool_reached"), s.field("observation/gripper_closed")),
        proprio_columns=c.POSE_QUATERNION,
        text=TEXT,
        openvla=OpenVLA(("base_pose_tool_reached", "gripper_closed")),
    ),
    # Bin picking. Poses are stored compressed.
    "kuka": oxe(
        images={"primary": "image"},
        action=s.concat(WORLD, ROTATION, RELATIVE_GRIPPER),
        proprio=s.concat(KUKA_POSE, KUKA_GRIPPER),
        proprio_columns=c.POSE_QUATERNION,
        text=TEXT,
        blank=True,
        unfiltered=580_392,
        openvla=OpenVLA(
            ("clip_function_input/base_pose_tool_reached", "gripper_closed"),
            {"clip_function_input/base_pose_tool_reached": KUKA_POSE, "gripper_closed": KUKA_GRIPPER},
        ),
    ),
    # WidowX in toy kitchens. Actions are the achieved pose change; the gripper is absolute, 1 open. The gripper is
    # binarised over the whole trajectory before its last step is dropped, so that step still decides an open question.
    "bridge_dataset": oxe(
        images={"primary": "image_0", "secondary": "image_1"},
        action=s.concat(s.delta(STATE[0:6]), s.drop_last_step(s.expand(s.binarize_gripper(ACTION[-1])))),
        proprio_columns=c.POSE_EULER,
        shorter=True,
        version="1.0.0",
        beware="; the copy in the Open X-Embodiment bucket is standardize='bridge_oxe'",
        openvla=OpenVLA(
            ("EEF_state", None, "gripper_state"),
            {"EEF_state": STATE[0:6], "gripper_state": STATE[-1:]},
            changes=dict(before=(("drop_first_steps", 1),)),
        ),
    ),
    # The same files as OpenVLA reads them: without the first step, whose action is all zero.
    "bridge_orig": oxe(
        images={"primary": "image_0", "secondary": "image_1"},
        action=s.concat(s.delta(STATE[0:6]), s.drop_last_step(s.expand(s.binarize_gripper(ACTION[-1])))),
        proprio_columns=c.POSE_EULER,
        before=(("drop_first_steps", 1),),
        shorter=True,
        version="1.0.0",
        beware="; the copy in the Open X-Embodiment bucket is standardize='bridge_oxe'",
        folder="bridge_dataset",
        only_openvla=True,
        openvla=OpenVLA(("EEF_state", None, "gripper_state"), {"EEF_state": STATE[0:6], "gripper_state": STATE[-1:]}),
    ),
    # The copy in the Open X-Embodiment bucket. It has one camera.
    "bridge_oxe": oxe(
        images={"primary": "image"},
        action=s.concat(
            s.delta(STATE[0:6]), s.drop_last_step(s.cast(s.expand(s.field("action/open_gripper")), "float32"))
        ),
        proprio_columns=c.POSE_EULER,
        text=TEXT,
        before=(("drop_first_steps", 1),),
        shorter=True,
        beware="; BridgeData's own copy is standardize='bridge_dataset'",
        folder="bridge",
        only_openvla=True,
        openvla=OpenVLA(("EEF_state", None, "gripper_state"), {"EEF_state": STATE[0:6], "gripper_state": STATE[-1:]}),
        caution="`bridge` 0.1.0 is out of date; its successor is bridge_dataset 1.0.0",
    ),
    # robot_obs: position (3), Euler angles (3), gripper width, 7 joints, gripper action.
    "taco_play": oxe(
        images={"primary": "rgb_static", "wrist": "rgb_gripper"},
        depth={"primary": "depth_static", "wrist": "depth_gripper"},
        action=s.concat(
            s.field("action/rel_actions_world")[0:6], s.clip(s.field("action/rel_actions_world")[-1:], 0.0, 1.0)
        ),
        proprio=TACO_STATE[0:7],
        action_columns=c.eef("", "", turns=c.YPR, last=""),
        proprio_columns=c.pose(c.RPY, (c.GRIPPER, "m")),
        text=TEXT,
        upstream=dict(proprio=s.concat(TACO_STATE[0:6], TACO_STATE[7:8])),  # the first joint in place of the gripper
        openvla=OpenVLA(
            ("state_eef", None, "state_gripper"), {"state_eef": TACO_STATE[0:6], "state_gripper": TACO_STATE[7:8]}
        ),
        caution="sources disagree on the sign of the gripper action; plot it against the gripper width",
    ),
    # The proprioception is a position and a quaternion, without the gripper. Rotations are not commanded.
    "jaco_play": oxe(
        images={"primary": "image", "wrist": "image_wrist"},
        action=s.concat(WORLD, s.zeros(3), RELATIVE_GRIPPER),
        proprio=JACO_POSE,
        proprio_columns=c.pose(c.QUATERNION),
        text=TEXT,
        openvla=OpenVLA(
            ("state_eef", None, "state_gripper"), {"state_eef": JACO_POSE[0:6], "state_gripper": JACO_POSE[-1:]}
        ),
    ),
    # Velocities; no gripper: 0.
    "berkeley_cable_routing": oxe(
        images={"primary": "image", "secondary": "top_image", "wrist": "wrist45_image"},
        action=s.concat(WORLD, ROTATION, s.zeros(1)),
        proprio=s.field("observation/robot_state"),
        action_columns=c.eef("m/s", "rad/s", last=""),
        text=TEXT,
        blank=True,
        openvla=OpenVLA(("robot_state", None)),
    ),
    "roboturk": oxe(
        images={"primary": "front_rgb"},
        action=s.concat(WORLD, ROTATION, from_closedness(CLOSEDNESS)),
        proprio=None,
        text=TEXT,
        blank=True,
        upstream=dict(proprio=s.zeros(1)),
        openvla=NO_STATE,
    ),
    # Velocities, seen from the gripper only.
    "nyu_door_opening_surprising_effectiveness": oxe(
        images={"wrist": "image"},
        action=s.concat(WORLD, ROTATION, RELATIVE_GRIPPER),
        proprio=None,
        action_columns=c.EEF_VELOCITY,
        text=TEXT,
        blank=True,
        upstream=dict(proprio=s.zeros(1)),
        openvla=NO_STATE,
    ),
    "viola": oxe(
        images={"primary": "agentview_rgb", "wrist": "eye_in_hand_rgb"},
        action=s.concat(WORLD, ROTATION, from_closedness(s.expand(CLOSEDNESS))),
        proprio=s.concat(s.field("observation/joint_states"), s.field("observation/gripper_states")),
        action_columns=c.NO_UNITS,
        proprio_columns=c.columns((c.joints(7), "rad"), (c.GRIPPER, "m")),
        text=TEXT,
        blank=True,
        openvla=OpenVLA(("joint_states", "gripper_states")),
    ),
    # The depth map is a PNG of four channels: the bytes of one float32.
    "berkeley_autolab_ur5": oxe(
        images={"primary": "image", "wrist": "hand_image"},
        depth={"primary": "depth"},
        bgr=("hand_image",),
        action=s.concat(WORLD, ROTATION, s.expand(s.rel_to_abs_gripper(CLOSEDNESS))),
        proprio=UR5_STATE,
        proprio_columns=c.POSE_QUATERNION,
        text=TEXT,
        extra={"observation/depth": s.field("observation/image_with_depth")},
        removes=("observation/image_with_depth",),
        openvla=OpenVLA(("state",), {"state": UR5_STATE}),
    ),
    # Seven joints; the gripper is not in the state.
    "toto": oxe(
        images={"primary": "image"},
        action=s.concat(WORLD, ROTATION, s.cast(s.expand(s.field("action/open_gripper")), "float32")),
        proprio_columns=c.JOINTS_7,
        text=TEXT,
        blank=True,
        openvla=OpenVLA(("state", None)),
    ),
    # A pusher in the plane: no rotation, no gripper (1). Instructions are rows of code points.
    "language_table": oxe(
        images={"primary": "rgb"},
        action=s.concat(ACTION, s.zeros(2), s.zeros(2), s.ones(1)),
        proprio=s.field("observation/effector_translation"),
        action_columns=c.eef(last=""),
        proprio_columns=c.columns((("x", "y"), "m")),
        text=s.codepoints_to_text(s.field("observation/instruction")),
        version=None,
        openvla=OpenVLA(("effector_translation", *(None,) * 6)),
    ),
    # A pusher. Its last action is a relative gripper command (+1 closes) that moves nothing.
    "columbia_cairlab_pusht_real": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        action=s.concat(WORLD, ROTATION, s.expand(CLOSEDNESS)),
        proprio=s.field("observation/robot_state"),
        action_columns=c.eef(last=""),
        proprio_columns=c.columns((("x", "y"), "m")),
        text=TEXT,
        openvla=OpenVLA(("robot_state", *(None,) * 6)),
    ),
    # The first of ten future way-points; rotations are axis-angle. The state's gripper is 1 when closed.
    "bc_z": oxe(
        images={"primary": "image"},
        action=s.concat(
            s.field("action/future/xyz_residual")[0:3],
            s.field("action/future/axis_angle_residual")[0:3],
            s.invert_gripper(s.cast(s.field("action/future/target_close")[0:1], "float32")),
        ),
        proprio=s.concat(*(s.field(f"observation/present/{key}") for key in ("xyz", "axis_angle", "sensed_close"))),
        action_columns=c.eef(turns=c.ROTATION_VECTOR),
        proprio_columns=c.pose(c.ROTATION_VECTOR, (c.GRIPPER, "")),
        text=TEXT,
        openvla=OpenVLA(("present/xyz", "present/axis_angle", None, "present/sensed_close")),
        caution="versions after 0.1.0 are reported broken",
    ),
}
