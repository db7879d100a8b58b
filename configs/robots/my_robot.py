r"""A robot of your own, described once: copy this file, edit it, and use it everywhere.

    python scripts/check_demos.py --data_dir DATA --robot my_robot.py
    python finetune.py --config configs/finetune.py:full,robot=my_robot.py --workdir runs/mine \
        --config.pretrained=runs/pretrain/export --config.data.data_dir=DATA
    python scripts/check_policy.py runs/mine/export --data_dir DATA --robot my_robot.py

What every field means: octo_like/common/robot.py. Dimensions are in the order of the data; `proprio` is the number of
the proprioceptive dimension that an action moves: with it check_demos.py finds wrong signs, units, meanings and lags.
"""

from octo_like.common.robot import Camera, Robot, absolute, gripper

JOINTS = ("waist", "shoulder", "elbow", "forearm", "wrist", "hand")

ROBOT = Robot(
    name="my_robot",  # the dataset DATA/my_robot, e.g. from scripts/convert_demos.py
    cameras=dict(
        primary=Camera("front", size=(256, 256)),
        wrist=Camera("wrist", size=(128, 128)),
    ),
    proprio=("state",),  # keys below `observation`, joined
    proprio_names=(*JOINTS, "gripper"),
    proprio_units=("rad",) * 6 + ("open fraction",),  # octo_like/common/dimensions.py lists what there is
    actions=(
        *(absolute(name, "rad", proprio=i, limits=(-3.14, 3.14)) for i, name in enumerate(JOINTS)),
        gripper("gripper", open=1.0, closed=0.0, proprio=6),
    ),
    control_hz=10,
    action_horizon=8,  # 0.8 s
    window_size=1,
    dataset=dict(val_fraction=0.1),  # any field of octo_like/data/spec.py
)
