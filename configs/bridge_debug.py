r"""Real BridgeData V2 demonstrations (a sample of 25 short episodes): shows that training on robot data works.

    python train.py --config configs/bridge_debug.py --workdir runs/bridge --config.data.data_dir=DIR \
        --config.num_steps=50

DIR is the folder that holds bridge_dataset/1.0.0. Topology: any, down to 2 CPU cores (about a second a step). The loss
falls from about 17 to 5 within 50 steps. The sample's `val` split holds the episodes of `train`, so validation is
done on a held-out share of `train`.
"""

from configs import octo_small
from octo_like.common.defaults import AUGMENTATION_PRIMARY, default_config


def get_config():
    config = default_config()
    config.num_steps = 200
    config.batch_size = 16
    config.window_size = 2
    config.image_sizes = dict(primary=(64, 64))
    config.goal_images = ("primary",)
    model = octo_small.model("small")
    model.update(token_dim=192, dtype="float32", max_window=4)
    model["transformer"].update(num_layers=4, num_heads=4, mlp_dim=768)
    model["task_tokenizers"] = dict(
        language=dict(kind="language", encoder="small", dim=96, num_layers=1, max_length=16)
    )
    del model["observation_tokenizers"]["wrist"]
    model["observation_tokenizers"]["primary"]["stem"] = dict(
        kind="small", patch_size=16, features=(32, 64, 96, 128), num_features=128
    )
    config.model = model
    config.data.datasets = dict(
        bridge_dataset=dict(
            standardize="bridge_dataset", image_keys=dict(primary="image_0"), val_split=None, val_fraction=0.1
        )
    )
    config.augmentation = dict(primary=AUGMENTATION_PRIMARY)
    config.optimizer.update(schedule="rsqrt", peak=5e-4, warmup_steps=20, timescale=1000, weight_decay=0.05)
    config.ema_decay = 0.99
    config.checkpoint.every = 50
    config.eval.update(every=0, batches=2)
    config.log_every = 5
    return config
