"""A config for tests, as a user would write one: own dataset, own keys, own sizes.

The argument is a comma-separated list of words: "synthetic" needs no data, "finetune" adds the fields of finetune.py,
"smallest" leaves little to trace and to compile, for tests that start many processes; "tabletop" has an environment;
"points" has a part that learns places, which no dataset says.
"""

from octo_like.common.defaults import adaptation_config, default_config

POINTS = dict(kind="points", readout="readout_action", names=("target", "plate"))


def dataset(name="toy_buttons", action_dim=4):
    return dict(
        name=name,
        image_keys=dict(primary="front_rgb", wrist="hand_rgb"),
        proprio_keys=("joints", "aperture"),
        action_key="control",
        language_key="task_text",
        val_fraction=0.2,
    )


def model(action_dim=4):
    camera = lambda slot, goal: dict(  # noqa: E731
        kind="image",
        stem=dict(kind="conv", layers=((8, 8, 16),), use_film=True),
        obs_keys=(f"image_{slot}",),
        goal_keys=(f"image_{slot}",) if goal else (),
        film_keys=("task",),
    )
    return dict(
        token_dim=32,
        max_window=4,
        repeat_task_tokens=True,
        transformer=dict(num_layers=2, num_heads=4, mlp_dim=64, dropout_rate=0.1),
        task_tokenizers=dict(language=dict(kind="language", encoder="small", dim=16, num_layers=1, max_length=8)),
        observation_tokenizers=dict(
            primary=camera("primary", True),
            wrist=camera("wrist", False),
            proprio=dict(kind="lowdim", obs_keys=("proprio",)),
        ),
        readouts=dict(action=1),
        heads=dict(action=head(action_dim)),
    )


def head(action_dim):
    return dict(
        kind="diffusion",
        readout="readout_action",
        action_horizon=3,
        action_dim=action_dim,
        num_steps=5,
        hidden_dim=32,
    )


def get_config(words: str = ""):
    config = adaptation_config() if "finetune" in words.split(",") else default_config()
    config.num_steps = 8
    config.batch_size = 16
    config.window_size = 2
    config.image_sizes = dict(primary=(32, 40), wrist=(16, 16))
    config.goal_images = ("primary",)
    config.proprio_dim = 4
    config.text.max_length = 8
    config.model = model()
    config.data.datasets = dict(toy=dataset())
    config.data.episodes_mixed = 8
    config.optimizer.update(schedule="cosine", peak=1e-3, warmup_steps=2, decay_steps=40)
    config.augmentation = dict(primary=dict(crop_scale=(0.8, 1.0), brightness=0.1))
    config.mesh.fsdp = 1
    config.checkpoint.every = 4
    config.eval.update(every=0, batches=1)
    config.log_every = 1
    for word in filter(None, words.split(",")):
        if word == "synthetic":
            config.data.kind = "synthetic"
        elif word == "finetune":
            config.conditioning = "both"
            config.data.num_demos = 5
        elif word == "smallest":
            config.image_sizes, config.goal_images, config.augmentation = dict(), (), dict()
            config.text.model = None
            config.model.task_tokenizers = dict()
            config.model.observation_tokenizers = dict(proprio=dict(kind="lowdim", obs_keys=("proprio",)))
            config.model.transformer.update(num_layers=1)
            config.model.heads.action.update(hidden_dim=16)
        elif word == "points":
            config.model.auxiliaries = dict(points=POINTS)
        elif word == "tabletop":
            # Made in memory by the built-in world, where the policy also acts; it reads joints and words, no pictures.
            from configs import tabletop

            config.image_sizes, config.goal_images, config.augmentation = dict(), (), dict()
            config.model.observation_tokenizers = dict(proprio=dict(kind="lowdim", obs_keys=("proprio",)))
            config.model.transformer.update(num_layers=1)
            config.text.max_length = 16
            config.model.task_tokenizers.language.update(max_length=16)
            config.data.update(kind="memory", episodes="tabletop_arm=8+2", workers=0)
            config.data.datasets = dict(
                tabletop_arm=tabletop.dataset("tabletop_arm") | dict(image_keys={}, point_keys={})
            )
        else:
            raise ValueError(word)
    return config
