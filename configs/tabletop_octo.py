"""Octo's own architecture in small, on the three robots of the built-in tabletop world.

    python train.py --config configs/tabletop_octo.py --workdir runs/tabletop_octo --config.data.data_dir=runs/data
    python train.py --config configs/tabletop_octo.py --workdir runs/tabletop_octo --config.data.kind=memory \\
        --config.data.episodes="tabletop_pusher=3000 tabletop_gripper=3000 tabletop_arm=3000"

Patch tokens of a convolutional stem, one token per word through a text encoder, goal images in the stem, a history of
two, one readout, and a diffusion head that predicts the noise in chunks of four actions. Three things are not Octo's,
each an option of configs/octo_small.py as well, and what each gives is in docs/experiments.md: the instruction also
modulates the stem (FiLM), tokens are normalised after their projection, and the places of the things that the
instruction names are an auxiliary loss.

Topology: one GPU (minutes), or one hour on one CPU core. Expected time and success: docs/experiments.md.
"""

from configs import tabletop

WIDTH = 96


def model() -> dict:
    """Octo-small's shape, for 64 x 64 pixels: 16 patches of 16, and a coarse first convolution."""
    small = dict(kind="language", encoder="small", max_length=14)
    return dict(
        token_dim=WIDTH,
        max_window=2,
        repeat_task_tokens=True,
        token_norm=True,
        position_scale=0.5,
        dtype="float32",
        octo_compat=False,
        transformer=dict(
            num_layers=3, num_heads=4, mlp_dim=4 * WIDTH, dropout_rate=0.0, attention_dropout_rate=0.0, remat="none"
        ),
        task_tokenizers=dict(
            language=dict(**small, dim=128, num_layers=1),
            sentence=dict(**small, dim=256, num_layers=0, pool="ngrams"),
        ),
        observation_tokenizers=dict(
            primary=dict(
                kind="image",
                stem=dict(
                    kind="small",
                    patch_size=16,
                    kernel_sizes=(4, 3, 3),
                    strides=(4, 2, 2),
                    padding=(0, 1, 1),
                    features=(32, 64, 96),
                    num_features=128,
                    use_film=True,
                    early_film=True,
                ),
                obs_keys=("image_primary",),
                goal_keys=("image_primary",),
                film_keys=("task_sentence",),
            ),
            proprio=dict(kind="lowdim", obs_keys=("proprio",), per="vector"),
        ),
        readouts=dict(action=1),
        heads=dict(action=dict(tabletop.head(7), prediction="noise", num_steps=20)),
        auxiliaries=dict(points=dict(kind="points", readout="readout_action", names=("target", "plate"), weight=3.0)),
    )


def get_config():
    config = tabletop.get_config()
    config.image_sizes = dict(primary=(64, 64))
    for dataset in config.data.datasets.values():
        dataset.image_keys = dict(primary="image")
    config.num_steps = 4800
    config.window_size = 2
    config.goal_images = ("primary",)
    config.data.keep_goal_prob = 0.25
    config.model = model()
    config.checkpoint.every = 1200
    config.eval.every = 600
    return config
