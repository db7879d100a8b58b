r"""One small policy for three robots of the built-in tabletop world: the embedded default, trained by `make demo`.

The auxiliary loss says where the things are that the instruction names; without it, learning waits on a plateau for as
long as its seed wants (docs/experiments.md).

    python data/tabletop/build.py --data_dir runs/data \
        --episodes tabletop_pusher=3000 tabletop_gripper=3000 tabletop_arm=3000
    python train.py --config configs/tabletop.py --workdir runs/tabletop --config.data.data_dir=runs/data

Topology: 2 CPU cores, no accelerator. Expected time and success: docs/experiments.md.
"""

from octo_like.common.defaults import default_config
from octo_like.envs.embodiments import EMBODIMENTS

ROBOTS = {
    # The pusher has two of the twelve dimensions that share the loss: it comes oftener.
    "tabletop_pusher": dict(weight=1.5, proprio=False),
    "tabletop_gripper": dict(weight=1.2),
    "tabletop_arm": dict(weight=1.2, wrist=True),
}


def dataset(name: str, *, weight: float = 1.0, proprio: bool = True, wrist: bool = False) -> dict:
    """DatasetSpec fields of one tabletop dataset."""
    robot = EMBODIMENTS[name.removeprefix("tabletop_")]
    return dict(
        weight=weight,
        image_keys=dict(primary="image", wrist="wrist_image") if wrist else dict(primary="image"),
        proprio_keys=("state",) if proprio else (),
        point_keys=dict(target="target_point", plate="plate_point"),
        val_split="val",
        action_names=robot.action_names,
        action_units=robot.action_units,
        action_kinds=robot.action_kinds,
        **(dict(proprio_names=robot.proprio_names, proprio_units=robot.proprio_units) if proprio else {}),
        env=f"octo_like.envs:octo_like/Tabletop-{name.removeprefix('tabletop_')}-v0",
    )


def model(action_dim: int = 7) -> dict:
    """A small Octo: a sentence steers what the key points look for, then everything meets in the transformer."""
    return dict(
        token_dim=96,
        max_window=2,
        repeat_task_tokens=False,
        dtype="float32",
        octo_compat=False,
        transformer=dict(
            num_layers=2, num_heads=4, mlp_dim=384, dropout_rate=0.0, attention_dropout_rate=0.0, remat="none"
        ),
        task_tokenizers=dict(
            language=dict(kind="language", encoder="small", dim=256, num_layers=0, max_length=14, pool="ngrams")
        ),
        observation_tokenizers=dict(
            primary=dict(
                kind="image",
                stem=dict(kind="keypoints", layers=((4, 4, 32), (3, 2, 64)), num_keypoints=48, use_film=True),
                obs_keys=("image_primary",),
                film_keys=("task",),
            ),
            wrist=dict(
                kind="image",
                stem=dict(kind="keypoints", layers=((4, 4, 32), (3, 1, 32)), num_keypoints=16, use_film=True),
                obs_keys=("image_wrist",),
                film_keys=("task",),
            ),
            proprio=dict(kind="lowdim", obs_keys=("proprio",), per="vector"),
        ),
        readouts=dict(action=1),
        heads=dict(action=head(action_dim)),
        auxiliaries=dict(points=dict(kind="points", readout="readout_action", names=("target", "plate"), weight=3.0)),
    )


def head(action_dim: int) -> dict:
    """Diffusion over chunks of four actions; four noise draws per sample share one transformer pass."""
    return dict(
        kind="diffusion",
        readout="readout_action",
        action_horizon=4,
        action_dim=action_dim,
        prediction="action",
        num_samples=4,
        hidden_dim=128,
    )


def get_config():
    config = default_config()
    config.num_steps = 3200
    config.batch_size = 128
    config.window_size = 1
    config.image_sizes = dict(primary=(64, 64), wrist=(32, 32))
    config.proprio_dim = 7
    config.text.max_length = 14
    config.data.datasets = {name: dataset(name, **settings) for name, settings in ROBOTS.items()}
    config.data.decode = "fast"
    config.data.episodes_mixed = 512
    config.model = model()
    config.optimizer.update(schedule="cosine", peak=2e-3, warmup_steps=100, weight_decay=0.02, b2=0.99)
    config.ema_decay = 0.998
    config.checkpoint.every = 1600
    config.eval.update(every=400, batches=2, rollouts=0, exec_horizon=2)
    return config
