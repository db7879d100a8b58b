"""Franka arms, real and simulated."""

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
    from_closedness,
    from_signed,
    oxe,
)

# Six pose changes and a gripper whose positive commands close (robosuite's controllers).
ROBOSUITE = s.concat(ACTION[0:6], from_closedness(ACTION[-1:]))
JOINTS_AND_GRIPPER = OpenVLA(("state",), {"state": STATE[0:8]})

CARTESIAN, GRIPPER = s.field("observation/cartesian_position"), s.field("observation/gripper_position")
BINARIZED = s.concat(ACTION[0:6], s.expand(s.binarize_gripper(ACTION[-1])))
DROID_STATE = OpenVLA(
    ("EEF_state", None, "gripper_state"), {"EEF_state": CARTESIAN[0:6], "gripper_state": GRIPPER[-1:]}
)
DROID_ACTION = s.concat(
    s.field("action_dict/cartesian_velocity"), s.invert_gripper(s.field("action_dict/gripper_position"))
)
DROID_PROPRIO = s.cast(s.concat(CARTESIAN, GRIPPER), "float32")
HYDRA_EEF, HYDRA_GRIPPER = s.concat(STATE[0:3], STATE[7:10]), STATE[-3:-2]
FURNITURE_STATE = s.concat(STATE[0:7], STATE[-1:])
FMB_STATE = s.concat(s.field("observation/eef_pose"), s.expand(s.field("observation/state_gripper_pose")))


def _tdroid() -> Entry:
    """DROID-like recordings at 5 Hz. The static camera is the only one that is used."""
    return Entry(
        images={"primary": "static_image"},
        depth={"primary": "static_depth_image"},
        action=BINARIZED,
        proprio=s.concat(CARTESIAN[0:6], GRIPPER[-1:]),
        action_columns=c.eef("", "", last=""),
        proprio_columns=c.POSE_EULER,
        version="1.0.0",
        only_openvla=True,
        openvla=DROID_STATE,
        caution="the gripper action keeps its raw sign, which in DROID is 1 for closed; check it on the data",
    )


def _ppgm() -> Entry:
    """Registered without cameras."""
    return Entry(
        images={},
        action=BINARIZED,
        proprio=s.concat(CARTESIAN[0:6], GRIPPER[-1:]),
        action_columns=c.NO_UNITS,
        proprio_columns=c.POSE_EULER,
        version="1.0.0",
        only_openvla=True,
        openvla=OpenVLA((), DROID_STATE.leaves),
        caution="no camera is registered for it: name them in image_keys",
    )


def _libero() -> Entry:
    """Simulated; the state is position, axis-angle and two fingers. Frames are turned by 180 degrees, as openpi's
    client sends them and the converter of LIBERO's own files writes them (docs/demos.md)."""
    return Entry(
        images={"primary": "image", "wrist": "wrist_image"},
        action=ROBOSUITE,
        action_columns=c.COMMANDS,
        proprio_columns=c.pose(c.ROTATION_VECTOR, (("finger_1", "finger_2"), "m")),
        version="1.0.0",
        only_openvla=True,
        openvla=OpenVLA(("EEF_state", None, "gripper_state"), {"EEF_state": STATE[0:6], "gripper_state": STATE[-2:]}),
        caution="frames are stored turned by 180 degrees: turn the simulator's too; at evaluation the gripper goes "
        "back from open 1 / closed 0 to -1 / +1",
    )


ENTRIES: dict[str, Entry] = {
    "stanford_hydra_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        bgr=("image", "wrist_image"),
        action=s.concat(ACTION[0:6], s.invert_gripper(ACTION[-1:])),
        proprio=s.concat(HYDRA_EEF, HYDRA_GRIPPER),
        proprio_columns=c.POSE_EULER,
        blank=True,
        openvla=OpenVLA(("eef_state", None, "gripper_state"), {"eef_state": HYDRA_EEF, "gripper_state": HYDRA_GRIPPER}),
    ),
    "austin_buds_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        action=ROBOSUITE,
        proprio=STATE[0:8],
        action_columns=c.NO_UNITS,
        proprio_columns=c.JOINTS_AND_GRIPPER,
        blank=True,
        openvla=JOINTS_AND_GRIPPER,
    ),
    # Absolute gripper, +1 open. The state has no gripper.
    "nyu_franka_play_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image", "secondary": "image_additional_view"},
        depth={"primary": "depth", "secondary": "depth_additional_view"},
        action=s.concat(ACTION[-8:-2], s.clip(ACTION[-2:-1], 0.0, 1.0)),
        proprio=STATE[-6:],
        proprio_columns=c.pose(c.RPY),
        blank=True,
        extra={
            f"observation/{key}": s.cast(s.field(f"observation/{key}")[0], "float32")
            for key in ("depth", "depth_additional_view")
        },
        openvla=OpenVLA(("eef_state", None, None), {"eef_state": STATE[-6:]}),
    ),
    # Simulated. Rotations are axis-angle, the state's quaternion has w first. The gripper is +1 open, -1 closed; depth
    # is in 1/1024 m.
    "maniskill_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        depth={"primary": "depth", "wrist": "wrist_depth"},
        depth_scale=1 / 1024,
        action=s.concat(ACTION[0:6], from_signed(ACTION[6:7], opens=1)),
        proprio=s.concat(s.field("observation/tcp_pose"), STATE[7:8]),
        action_columns=c.eef("1", "1", turns=c.ROTATION_VECTOR),
        proprio_columns=c.pose(c.QUATERNION_W_FIRST, (c.GRIPPER, "")),
        upstream=dict(
            action_columns=c.eef("1", "1", turns=c.ROTATION_VECTOR, last=""), action=ACTION, depth_scale=1 / 65535
        ),
        openvla=OpenVLA(("tcp_pose", "gripper_state"), {"gripper_state": STATE[7:8]}),
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        action=s.concat(ACTION[0:3], s.euler_from_quat(ACTION[3:7]), from_closedness(ACTION[-1:])),
        proprio=FURNITURE_STATE,
        action_columns=c.NO_UNITS,
        proprio_columns=c.pose(c.QUATERNION, (c.GRIPPER, "m")),
        openvla=OpenVLA(("state",), {"state": FURNITURE_STATE}),
    ),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "highres_image"},
        action=ACTION[:-1],
        proprio=None,
        action_columns=c.NO_UNITS,
        upstream=dict(proprio=s.zeros(1)),
        openvla=NO_STATE,
        caution="its documentation calls the actions absolute poses, not changes; look at their magnitudes",
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        action=ROBOSUITE,
        action_columns=c.NO_UNITS,
        proprio_columns=c.POSE_QUATERNION,
        blank=True,
        openvla=OpenVLA(("state",)),
    ),
    # The state is seven joints and the gripper.
    "austin_sirius_dataset_converted_externally_to_rlds": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        action=ROBOSUITE,
        action_columns=c.NO_UNITS,
        proprio_columns=c.JOINTS_AND_GRIPPER,
        blank=True,
        openvla=OpenVLA(("state",)),
    ),
    # Joint changes over three steps: 30 Hz to 10 Hz.
    "berkeley_rpt_converted_externally_to_rlds": oxe(
        images={"wrist": "hand_image"},
        action=s.concat(
            s.delta(s.field("observation/joint_pos")[0:7]), s.invert_gripper(s.drop_last_step(ACTION[-1:]))
        ),
        proprio=s.concat(s.field("observation/joint_pos"), s.cast(s.expand(s.field("observation/gripper")), "float32")),
        proprio_columns=c.JOINTS_AND_GRIPPER,
        action_mask=JOINTS,
        before=(("subsample", 3),),
        shorter=True,
        openvla=OpenVLA(changes=dict(action=ACTION, action_columns=c.JOINTS_AND_GRIPPER, before=(), shorter=False)),
    ),
    # Pose changes with axis-angle rotations; no gripper: 0.
    "kaist_nonprehensile_converted_externally_to_rlds": oxe(
        images={"primary": "image"},
        action=s.concat(ACTION[0:6], s.zeros(1)),
        proprio=STATE[-7:],
        action_columns=c.eef(turns=c.ROTATION_VECTOR, last=""),
        proprio_columns=c.pose(c.QUATERNION),
        openvla=OpenVLA(("state", None), {"state": STATE[-7:]}),
    ),
    # Velocities, the gripper's too.
    "stanford_robocook_converted_externally_to_rlds": oxe(
        images={"primary": "image_1", "secondary": "image_2"},
        depth={"primary": "depth_1", "secondary": "depth_2"},
        action_columns=c.columns((c.XYZ, "m/s"), (c.RPY, "rad/s"), ("gripper_velocity", "")),
        proprio_columns=c.POSE_EULER,
        openvla=EEF_AND_GRIPPER,
        caution="the last action is the gripper's velocity, not its opening",
    ),
    # The quaternion has w first.
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        action=s.concat(ACTION[0:3], s.euler_from_quat(ACTION[3:7], "wxyz"), ACTION[7:8]),
        proprio=STATE[0:8],
        proprio_columns=c.JOINTS_AND_GRIPPER,
        upstream=dict(action=s.concat(ACTION[0:3], s.euler_from_quat(ACTION[3:7], "xyzw"), ACTION[7:8])),
        openvla=OpenVLA(("joint_state", "gripper_state"), {"joint_state": STATE[0:7], "gripper_state": STATE[7:8]}),
        caution="actions are the absolute pose of the next step, not a change",
    ),
    "utaustin_mutex": oxe(
        images={"primary": "image", "wrist": "wrist_image"},
        bgr=("image", "wrist_image"),
        action=ROBOSUITE,
        proprio=STATE[0:8],
        action_columns=c.NO_UNITS,
        proprio_columns=c.JOINTS_AND_GRIPPER,
        blank=True,
        openvla=JOINTS_AND_GRIPPER,
    ),
    # The quaternion has w first. The state is forces and torques.
    "cmu_playing_with_food": oxe(
        images={"primary": "image", "wrist": "finger_vision_1"},
        bgr=("image", "finger_vision_1", "finger_vision_2"),
        action=s.concat(ACTION[0:3], s.euler_from_quat(ACTION[3:7], "wxyz"), ACTION[-1:]),
        action_columns=c.eef(last=""),
        proprio_columns=c.columns((("fx", "fy", "fz"), "N"), (("tx", "ty", "tz"), "Nm")),
        upstream=dict(action=s.concat(ACTION[0:3], s.euler_from_quat(ACTION[3:7], "xyzw"), ACTION[-1:])),
        version="1.0.0",
        openvla=OpenVLA(("state", None, None)),
        caution="actions are absolute poses, every orientation the identity, and the state is forces and torques",
    ),
    # Actions: position change (3), quaternion change (4), gripper, end of episode.
    "cmu_play_fusion": oxe(
        images={"primary": "image"},
        action=s.concat(ACTION[0:3], s.euler_from_quat(ACTION[3:7], "xyzw"), ACTION[7:8]),
        proprio_columns=c.JOINTS_AND_GRIPPER,
        upstream=dict(action_columns=c.Dimensions.unnamed(7), action=s.concat(ACTION[0:3], ACTION[-4:])),
        openvla=OpenVLA(("state",)),
        caution="the order of its quaternions is not documented; x, y, z, w is assumed",
    ),
    "fmb_dataset": oxe(
        images={"primary": "image_side_1", "secondary": "image_side_2", "wrist": "image_wrist_1"},
        depth={
            "primary": "image_side_1_depth",
            "secondary": "image_side_2_depth",
            "wrist": "image_wrist_1_depth",
        },
        proprio=FMB_STATE,
        action_columns=c.eef("", "", last=""),
        proprio_columns=c.POSE_QUATERNION,
        openvla=OpenVLA(("proprio",), {"proprio": FMB_STATE}),
        caution="the copy called `fmb` in the Open X-Embodiment bucket was a partial upload (name='fmb' reads it)",
    ),
    "roboset": oxe(
        images={"primary": "image_left", "secondary": "image_right", "wrist": "image_wrist"},
        action=s.concat(ACTION[0:7], from_closedness(ACTION[-1:])),
        proprio_columns=c.JOINTS_AND_GRIPPER,
        action_mask=JOINTS,
        openvla=OpenVLA(("proprio",), {"proprio": STATE}),
        caution="it is called `robo_set` in the Open X-Embodiment bucket (name='robo_set' reads it)",
    ),
    "ppgm": _ppgm(),
    "ppgm_static": _ppgm(),
    "ppgm_wrist": _ppgm(),
    "tdroid_carrot_in_bowl": _tdroid(),
    "tdroid_pour_corn_in_pot": _tdroid(),
    "tdroid_flip_pot_upright": _tdroid(),
    "tdroid_move_object_onto_plate": _tdroid(),
    "tdroid_knock_object_over": _tdroid(),
    "tdroid_cover_object_with_towel": _tdroid(),
    # Velocities; the state's gripper is 1 when closed.
    "droid": oxe(
        images={
            "primary": "exterior_image_1_left",
            "secondary": "exterior_image_2_left",
            "wrist": "wrist_image_left",
        },
        action=DROID_ACTION,
        proprio=DROID_PROPRIO,
        action_columns=c.NO_UNITS,
        proprio_columns=c.POSE_EULER,
        upstream=dict(swap=("observation/exterior_image_1_left", "observation/exterior_image_2_left", 0.5)),
        version="1.0.0",
        only_openvla=True,
        openvla=OpenVLA(("proprio",), {"proprio": DROID_PROPRIO}),
        caution="failed episodes and idle frames are in it; filter them (docs/data.md)",
    ),
    "droid_wipe": oxe(
        images={"primary": "exterior_image_2_left", "wrist": "wrist_image_left"},
        action=DROID_ACTION,
        proprio=DROID_PROPRIO,
        action_columns=c.NO_UNITS,
        proprio_columns=c.POSE_EULER,
        version="1.0.0",
        only_openvla=True,
        openvla=OpenVLA(("proprio",), {"proprio": DROID_PROPRIO}),
    ),
    "libero_spatial_no_noops": _libero(),
    "libero_object_no_noops": _libero(),
    "libero_goal_no_noops": _libero(),
    "libero_10_no_noops": _libero(),
}
