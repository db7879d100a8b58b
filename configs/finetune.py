"""Adapt a pretrained policy to your robot with a few dozen demonstrations.

    python finetune.py --config configs/finetune.py --workdir runs/mine --config.pretrained=runs/pretrain/export \
        --config.data.data_dir=DIR --config.data.datasets.target.name=my_robot

What stands after the colon are words separated by commas:

    full       train everything (the default)
    head_only  train the action head and whatever is new; the rest is frozen
    tabletop   the settings of `make demo`: the held-out robot of the built-in world
    robot=FILE your robot's description (configs/robots/my_robot.py is an example): data, sizes, window and head from it

Your robot is described by `data.datasets.target` (keys of its cameras, proprio, actions and language), `image_sizes`,
`proprio_dim` and `surgery` (which tokenizers and heads are replaced or added). Topology: one device upwards.
"""

from configs import tabletop
from octo_like.common.config import ConfigError
from octo_like.common.defaults import AUGMENTATION_PRIMARY, default_config
from octo_like.common.robot import load_robot

MODES = ("full", "head_only", "tabletop")


def get_config(words: str = "full"):
    chosen = words.split(",")
    for word in chosen:
        if word not in MODES and not word.startswith("robot="):
            raise ConfigError(f"configs/finetune.py: unknown word {word!r}; valid: {', '.join(MODES)}, robot=FILE")
    config = default_config()
    config.pretrained = None  # directory of an exported policy
    config.model = None  # without `pretrained`: the model to train from scratch
    # Parts that replace those of the pretrained model, by name; None removes one. New names are added.
    config.surgery = dict(task_tokenizers=dict(), observation_tokenizers=dict(), readouts=dict(), heads=dict())
    config.reinitialize = ()  # regexes of parameter paths that are not loaded although they would fit
    config.num_steps = 5000
    config.batch_size = 64
    config.window_size = 1
    config.data.datasets = dict(target=_target())
    config.optimizer.update(schedule="cosine", peak=3e-4, warmup_steps=200, weight_decay=0.01)
    config.checkpoint.update(every=1000)
    config.eval.update(every=1000, batches=4)
    config.augmentation = dict(primary=AUGMENTATION_PRIMARY)
    if "tabletop" in chosen:
        _tabletop(config)
    for word in chosen:
        if word.startswith("robot="):
            load_robot(word.removeprefix("robot=")).apply(config)
    if "head_only" in chosen:
        config.optimizer.freeze = (r"^octo_transformer/(?!obs_proprio|.*wrist)",)
    return config


def _target() -> dict:
    """One dataset, to be described on the command line or in a config of your own."""
    return dict(
        name="",
        version=None,
        split="train",
        val_split=None,
        val_fraction=0.1,
        standardize=None,
        image_keys=dict(primary="image"),
        proprio_keys=(),
        action_key="action",
        language_key="language_instruction",
        normalization="normal",
        action_normalization_mask=None,
        env=None,
    )


def _tabletop(config) -> None:
    """arm3: absolute joint targets, four of them; another proprioception; a wrist camera."""
    config.model = tabletop.model()
    config.surgery.observation_tokenizers = dict(
        wrist=dict(
            kind="image",
            stem=dict(kind="keypoints", layers=((4, 4, 32), (3, 1, 32)), num_keypoints=16, use_film=True),
            obs_keys=("image_wrist",),
            film_keys=("task",),
        )
    )
    config.surgery.heads = dict(action=tabletop.head(4))
    config.num_steps = 400
    config.batch_size = 64
    config.image_sizes = dict(primary=(64, 64), wrist=(32, 32))
    config.proprio_dim = 4
    config.text.max_length = 14
    config.data.datasets = dict(tabletop_arm3=tabletop.dataset("tabletop_arm3", wrist=True))
    config.data.decode = "fast"
    config.optimizer.update(peak=1e-3, warmup_steps=50, weight_decay=0.02, b2=0.99)
    config.ema_decay = 0.99
    config.checkpoint.every = 800
    config.eval.update(every=0, batches=2, exec_horizon=2)
    config.augmentation = dict()
