"""A config for tests: pictures with questions and answers beside a robot that says what it is doing. With
the argument "mute" the pictures are missing, and answers are all that is to be learned."""

from octo_like.common.defaults import default_config


def get_config(variant=""):
    config = default_config()
    config.num_steps = 100
    config.batch_size = 32
    config.window_size = 1
    config.image_sizes = dict(primary=(32, 32))
    config.text.max_length = 14
    images = dict(image_keys=dict(primary="image"), val_fraction=0.2)
    config.data.datasets = dict(
        questions=dict(**images, name="questions", action_key=None, text_keys=dict(answer="answer")),
        moves=dict(**images, name="moves", text_keys=dict(subtask="subtask")),
    )
    if variant == "mute":
        del config.data.datasets.questions
        config.data.datasets.silent = dict(**images, name="moves")
    config.data.episodes_mixed = 8
    words = dict(kind="language", encoder="small", dim=16, num_layers=0, max_length=14, pool=True)
    said = dict(kind="text", readout="readout_text", vocabulary="builtin", max_length=14, width=32, weight=0.5)
    said |= dict(learns=("answer",)) if variant == "mute" else {}
    config.model = dict(
        token_dim=32,
        max_window=1,
        transformer=dict(num_layers=1, num_heads=4, mlp_dim=64),
        task_tokenizers=dict(language=words, subtask=dict(**words, key="subtask")),
        observation_tokenizers=dict(
            primary=dict(kind="image", stem=dict(kind="conv", layers=((16, 16, 16),)), obs_keys=("image_primary",))
        ),
        readouts=dict(action=1, text=2),
        heads=dict(
            action=dict(kind="bins", readout="readout_action", action_horizon=2, action_dim=3, num_bins=16, width=32)
        ),
        auxiliaries=dict(text=said),
    )
    config.optimizer.update(schedule="constant", peak=3e-3, warmup_steps=5)
    config.checkpoint.every = 50
    config.eval.update(every=50, batches=1)
    config.log_every = 25
    return config
