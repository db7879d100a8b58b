r"""Octo-small: 27M parameters and a frozen T5-base, trained on Open X-Embodiment.

    hf download google-t5/t5-base spiece.model model.safetensors --local-dir t5-base    # on a machine with a network
    python train.py --config configs/octo_small.py --workdir gs://... --config.data.data_dir=gs://... \
        --config.text.model=t5-base/spiece.model --config.text.t5_weights=t5-base
    python train.py --config configs/octo_small.py:small,learned_text --workdir gs://... --config.data.data_dir=gs://...
    python train.py --config configs/octo_small.py --workdir runs/smoke --config.data.kind=synthetic \
        --config.batch_size=4 --config.num_steps=2

What stands after the colon are words separated by commas: a size (small, base, 300m, 1b), and then any of "listen" and
"learned_text".

T5 is not trained, so a run without its two files is refused; on random batches (the last command) it only warns. With
"learned_text" a small text encoder is trained with the policy in its place, and nothing has to be downloaded. It begins
with no notion of words: what it learns are the words of the demonstrations. Its vocabulary is that of the built-in
world, which spells other words; `scripts/train_tokenizer.py --texts FILE --output my.model` makes one of your
instructions, for --config.text.model=my.model.

With "listen" the instruction modulates the stem of every camera (FiLM) and tokens are normalised: what a small Octo
needed to choose among things by a word (docs/experiments.md, "Octo's own tokens"). Such a run cannot begin from a
release of Octo, which has no such weights. Where data says which things an instruction names, `model.auxiliaries`
(docs/model.md) does the rest.

Topology: TPU v4-128 (64 chips, 4x4x4), batch 2048. The published Octo-small took about 8 hours for 300k steps there.
"""

from octo_like.common.defaults import AUGMENTATION_PRIMARY, AUGMENTATION_WRIST, default_config

TEXT_LENGTH = 32  # of "learned_text": words that its vocabulary has not are spelled

SIZES = {
    # name: (layers, width, heads, MLP width)
    "small": (12, 384, 6, 1536),
    "base": (12, 768, 12, 3072),
    # Larger ones with heads of 128, the width of a TPU's registers.
    "300m": (24, 1024, 8, 4096),
    "1b": (20, 2048, 16, 8192),
}


def model(size: str = "small") -> dict:
    """The Octo-1.5 architecture with correct masks."""
    layers, width, heads, mlp = SIZES[size]

    def camera(slot):
        return dict(
            kind="image",
            stem=dict(kind="small", patch_size=16),
            obs_keys=(f"image_{slot}",),
            goal_keys=(f"image_{slot}",),
        )

    return dict(
        token_dim=width,
        max_window=10,
        repeat_task_tokens=True,
        octo_compat=False,
        dtype="bfloat16",
        transformer=dict(
            num_layers=layers,
            num_heads=heads,
            mlp_dim=mlp,
            dropout_rate=0.0,
            attention_dropout_rate=0.0,
            remat="none",
            attention="xla",
        ),
        task_tokenizers=dict(language=dict(kind="language", encoder="t5", t5="t5-base", finetune_encoder=False)),
        observation_tokenizers=dict(primary=camera("primary"), wrist=camera("wrist")),
        readouts=dict(action=1),
        heads=dict(
            action=dict(kind="diffusion", readout="readout_action", action_horizon=4, action_dim=7, num_steps=20)
        ),
    )


def listen(model: dict) -> dict:
    """Changes a model so that the instruction reaches its cameras early: FiLM in every convolution of their stems."""
    for camera in model["observation_tokenizers"].values():
        camera["stem"].update(use_film=True, early_film=True)
        camera["film_keys"] = ("task_language",)
    return model | dict(token_norm=True, position_scale=0.5)


def learned_text(model: dict) -> dict:
    """Changes a model so that it reads words with an encoder that is trained with it, in place of a frozen T5."""
    encoder = dict(kind="language", encoder="small", dim=256, num_layers=4, num_heads=4, max_length=TEXT_LENGTH)
    return model | dict(task_tokenizers=dict(language=encoder))


def get_config(words: str = "small"):
    size, *variants = words.split(",")
    if size not in SIZES or not set(variants) <= {"listen", "learned_text"} or len(set(variants)) < len(variants):
        raise ValueError(
            f"no variant {words!r} of configs/octo_small.py; valid: {', '.join(SIZES)}, each with ,listen or "
            ",learned_text or both"
        )
    config = default_config()
    config.num_steps = 300_000
    config.batch_size = 2048
    config.window_size = 2
    config.image_sizes = dict(primary=(256, 256), wrist=(128, 128))
    config.goal_images = ("primary", "wrist")
    config.model = model(size)
    if "listen" in variants:
        config.model = listen(config.model.to_dict())
    config.optimizer.update(
        schedule="rsqrt", peak=3e-4, warmup_steps=2000, timescale=10_000, weight_decay=0.1, clip_norm=1.0
    )
    if "learned_text" in variants:
        config.model = learned_text(config.model.to_dict())
        config.text.update(model="words", max_length=TEXT_LENGTH)
    else:
        config.optimizer.freeze = ("hf_model",)
    config.augmentation = dict(primary=AUGMENTATION_PRIMARY, wrist=AUGMENTATION_WRIST)
    config.eval.update(every=5000, batches=16)
    return config
