r"""Adaptation to simulated tasks: what scripts/benchmark_adaptation.py runs in every one of its cells.

    python finetune.py --config configs/adapt_sim.py:fetch,full --workdir runs/sims/try \
        --config.pretrained=runs/sims/pretrain/export --config.data.data_dir=runs/sims/data/n50

After the colon: a dataset (`metaworld_heldout` or `fetch`), and optionally a mode of configs/finetune.py (`full` is the
default). Without `config.pretrained` the same network is trained from scratch. Topology: 2 CPU cores, no accelerator.
Expected time and success: docs/adaptation.md.
"""

from configs import finetune, metaworld
from octo_like.common.config import ConfigError

PROPRIO = {"metaworld_heldout": 4, "fetch": 5}  # width of each robot's proprioception
LORA_PEAK = 3  # factors that begin at no change want a larger step than whole kernels


def get_config(words: str = "fetch,full"):
    robot, _, mode = words.partition(",")
    if robot not in PROPRIO:
        raise ConfigError(f"configs/adapt_sim.py: unknown dataset {robot!r}; valid: {', '.join(PROPRIO)}")
    mode = mode or "full"
    config = finetune.get_config(mode)
    config.model = metaworld.model()
    config.image_sizes = {slot: (64, 64) for slot in metaworld.CAMERAS}
    config.proprio_dim = PROPRIO[robot]
    config.text.max_length = metaworld.TEXT_LENGTH
    config.data.datasets = {robot: metaworld.dataset(robot)}
    config.data.decode = "fast"
    if robot == "fetch":
        # Two fingers instead of one opening: a new projection. The action head is kept: its four dimensions are again
        # three directions and a gripper, of other size and sign.
        config.surgery.observation_tokenizers = dict(proprio=metaworld.proprio(entries=(3, 4)))
        config.reinitialize = (r"octo_transformer/obs_proprio",)
    config.num_steps = 800
    config.batch_size = 32
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
    config.augmentation = metaworld.augmentation()
    return config
