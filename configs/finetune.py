r"""Adapt a pretrained policy to your robot with a few dozen demonstrations.

    python finetune.py --config configs/finetune.py:lora,language --workdir runs/mine \
        --config.pretrained=runs/pretrain/export --config.data.data_dir=DIR --config.data.datasets.target.name=my_robot

What stands after the colon are words separated by commas, at most one of each group:

    what is trained     full (the default), frozen_transformer, head_only, head_mlp_only, lora
    what says the task  language (the default), goal_image, both
    settings            tabletop: those of `make demo`, for the held-out robot of the built-in world
    robot=FILE          your robot's description (as configs/robots/my_robot.py): data, sizes, window, head

Your robot is described by `data.datasets.target` (keys of its cameras, proprio, actions and language), `proprio_dim`
and `surgery` (which parts of the pretrained model are changed, replaced, added or removed). What each mode trains, and
how the values that are None are derived, is in docs/finetune.md. Topology: one device upwards.
"""

from configs import tabletop
from octo_like.common.config import ConfigError
from octo_like.common.defaults import AUGMENTATION_PRIMARY, AUGMENTATION_WRIST, adaptation_config
from octo_like.common.robot import load_robot

MODES = ("full", "frozen_transformer", "head_only", "head_mlp_only", "lora")
CONDITIONINGS = ("language", "goal_image", "both")
SETTINGS = ("tabletop",)


def get_config(words: str = "full"):
    chosen = [word.strip() for word in words.split(",")]
    for word in chosen:
        if word not in MODES + CONDITIONINGS + SETTINGS and not word.startswith("robot="):
            raise ConfigError(
                f"configs/finetune.py: unknown word {word!r}; valid: one of {', '.join(MODES)}; one of "
                f"{', '.join(CONDITIONINGS)}; {', '.join(SETTINGS)}; robot=FILE"
            )
    config = adaptation_config()
    config.data.datasets = dict(target=_target())
    config.augmentation = dict(primary=AUGMENTATION_PRIMARY, secondary=AUGMENTATION_PRIMARY, wrist=AUGMENTATION_WRIST)
    if "tabletop" in chosen:
        _tabletop(config)
    for word in chosen:
        if word.startswith("robot="):
            load_robot(word.removeprefix("robot=")).apply(config)
    config.mode = _one_of(chosen, MODES) or config.mode
    config.conditioning = _one_of(chosen, CONDITIONINGS) or config.conditioning
    if config.mode == "lora":
        # Factors begin at no change and their product moves slowly: they want a larger step than whole kernels.
        config.optimizer.peak *= 3
    return config


def _one_of(chosen: list[str], group: tuple[str, ...]) -> str | None:
    found = [word for word in chosen if word in group]
    if len(found) > 1:
        raise ConfigError(f"{found[0]!r} and {found[1]!r} exclude each other; give one of {', '.join(group)}")
    return found[0] if found else None


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
        action_kinds=(),  # of every action dimension: "absolute", "delta", "velocity" or "gripper"
        env=None,
    )


def _tabletop(config) -> None:
    """arm3: absolute joint targets, four of them; another proprioception; a camera at the wrist."""
    config.model = tabletop.model()
    config.surgery.heads = dict(action=tabletop.head(4))
    config.num_steps = 400
    config.batch_size = 64
    config.image_sizes = dict(primary=(64, 64), wrist=(32, 32))
    config.proprio_dim = 4
    config.text.max_length = 14
    # Absolute joint targets are learned as differences from where the joints are: their error shrinks with the motion.
    relative = dict(relative_to=(0, 1, 2, None), chunk_length=4)
    config.data.datasets = dict(tabletop_arm3=tabletop.dataset("tabletop_arm3", wrist=True) | relative)
    config.data.decode = "fast"
    config.optimizer.update(peak=1e-3, warmup_steps=50, weight_decay=0.02, b2=0.99)
    config.ema_decay = 0.99
    config.checkpoint.every = 800
    config.eval.update(every=0, batches=2, exec_horizon=2)
    config.augmentation = dict()
