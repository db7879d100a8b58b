"""Adaptation to simulated tasks: what scripts/benchmark_adaptation.py runs in every one of its cells.

    python finetune.py --config configs/adapt_sim.py:fetch,full --workdir runs/sims/try \
        --config.pretrained=runs/sims/pretrain/export --config.data.data_dir=runs/sims/data/n50

After the colon: a dataset (`metaworld_heldout` or `fetch`), and optionally a mode of configs/finetune.py (`full` is the
default). Without `config.pretrained` the same network is trained from scratch. Topology: 2 CPU cores, no accelerator.
Expected time and success: docs/adaptation.md.
"""

from configs import finetune, metaworld
from octo_like.common.config import ConfigError

# Of one robot after another: image key of each camera, and the width of proprioception.
ROBOTS = {
    "metaworld_heldout": (dict(primary="image"), 4),
    "fetch": (dict(primary="image", secondary="secondary_image"), 5),
}
LORA_PEAK = 3  # factors that begin at no change want a larger step than whole kernels


def get_config(words: str = "fetch,full"):
    robot, _, mode = words.partition(",")
    if robot not in ROBOTS:
        raise ConfigError(f"configs/adapt_sim.py: unknown dataset {robot!r}; valid: {', '.join(ROBOTS)}")
    mode = mode or "full"
    config = finetune.get_config(mode)
    cameras, proprio_dim = ROBOTS[robot]
    config.model = metaworld.model()
    config.image_sizes = {slot: (64, 64) for slot in cameras}
    config.proprio_dim = proprio_dim
    config.text.max_length = metaworld.TEXT_LENGTH
    config.data.datasets = {robot: metaworld.dataset(robot, cameras)}
    config.data.decode = "fast"
    if robot == "fetch":
        # A second camera, and a hand pose that means something else: new tokenizers. The action head is kept: its four
        # dimensions are again three directions and a gripper, of other size and sign.
        config.surgery.observation_tokenizers = dict(secondary=metaworld.camera("secondary"))
        config.reinitialize = (r"octo_transformer/obs_proprio",)
    config.num_steps = 400
    config.batch_size = 64
    config.optimizer.update(
        schedule="cosine",
        peak=1e-3 * (LORA_PEAK if mode.split(",")[0] == "lora" else 1),
        warmup_steps=50,
        weight_decay=0.02,
        b2=0.99,
    )
    config.ema_decay = 0.99
    config.checkpoint.every = 10_000
    config.eval.update(every=None, batches=2, exec_horizon=2)
    config.augmentation = dict()
    return config
