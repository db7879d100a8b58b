"""One small policy for fourteen Meta-World tasks, told in words which one: the base of the adaptation benchmark.

    pip install -e '.[data,sim]'
    python data/sims/build.py --data_dir runs/sims/data --episodes metaworld_pretrain=200+2
    python train.py --config configs/metaworld.py --workdir runs/sims/pretrain --config.data.data_dir=runs/sims/data

Topology: 2 CPU cores, no accelerator. Expected time and success: docs/adaptation.md.
"""

from octo_like.common.defaults import default_config
from octo_like.envs.sims import ACTION_KINDS, ENVIRONMENTS

ACTION_DIM = 4
CAMERAS = dict(primary="image", secondary="secondary_image")
TEXT_LENGTH = 20


def dataset(group: str) -> dict:
    """DatasetSpec fields of a group of simulated tasks (see data/sims)."""
    hand, fingers = ("x", "y", "z"), ("finger_right", "finger_left")
    fetch = group.startswith("fetch")
    return dict(
        image_keys=CAMERAS,
        proprio_keys=("state",),
        action_names=(*hand, "gripper"),
        action_units=("1",) * 4,  # -1 to 1, of the simulator's controller
        action_kinds=ACTION_KINDS,
        proprio_names=(*hand, *fingers) if fetch else (*hand, "gripper"),
        proprio_units=("m",) * 5 if fetch else (*("m",) * 3, "open fraction"),
        val_split="val",
        env=ENVIRONMENTS[group],
    )


def camera(slot: str) -> dict:
    """One token of the whole picture, steered by the instruction.

    The camera travels with the hand, so a place in the picture is a way to go, and the last convolution, as large as
    its map, weighs every place by itself. (Key points took much longer to find a puck; docs/experiments.md.)
    """
    return dict(
        kind="image",
        stem=dict(kind="conv", layers=((4, 4, 16), (3, 2, 32), (3, 2, 64), (4, 4, 256)), use_film=True),
        obs_keys=(f"image_{slot}",),
        film_keys=("task",),
    )


def augmentation() -> dict:
    """Shifts by up to 2 of the 64 pixels. The hand moves along, so what is where, seen from it, stays."""
    return {slot: dict(shift=0.03) for slot in CAMERAS}


def proprio(entries: tuple[int, ...]) -> dict:
    """The fingers alone. Where the hand is, is in the pictures; told in numbers, it is all that is learned from.

    Experts go straight, so the hand's place tells where they are going: a policy that knew it had a low loss and never
    looked (its first action, before the hand had moved, was the same for every scene; docs/experiments.md).
    """
    return dict(kind="lowdim", obs_keys=("proprio",), per="vector", entries=entries)


def model() -> dict:
    """A transformer of two layers over one token per camera, the fingers and the sentence, and a diffusion head."""
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
            language=dict(kind="language", encoder="small", dim=256, num_layers=0, max_length=TEXT_LENGTH, pool=True)
        ),
        observation_tokenizers=dict(
            **{slot: camera(slot) for slot in CAMERAS},
            proprio=proprio(entries=(3,)),
        ),
        readouts=dict(action=1),
        heads=dict(
            action=dict(
                kind="diffusion",
                readout="readout_action",
                action_horizon=4,
                action_dim=ACTION_DIM,
                prediction="action",
                num_samples=4,
                hidden_dim=128,
            )
        ),
    )


def get_config():
    config = default_config()
    config.num_steps = 12000
    config.batch_size = 64
    config.window_size = 1
    config.image_sizes = {slot: (64, 64) for slot in CAMERAS}
    config.proprio_dim = 4
    config.text.max_length = TEXT_LENGTH
    config.data.datasets = dict(metaworld_pretrain=dataset("metaworld_pretrain"))
    config.data.decode = "fast"
    config.data.episodes_mixed = 512
    config.model = model()
    config.optimizer.update(schedule="cosine", peak=1.5e-3, warmup_steps=200, weight_decay=0.02, b2=0.99)
    config.ema_decay = 0.998
    config.augmentation = augmentation()
    config.checkpoint.every = 2000
    config.eval.update(every=0, batches=2, rollouts=0, exec_horizon=2)
    return config
