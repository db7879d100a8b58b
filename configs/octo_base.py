r"""Octo-base: 93M parameters and a frozen T5-base, trained on Open X-Embodiment.

    hf download google-t5/t5-base spiece.model model.safetensors --local-dir t5-base    # on a machine with a network
    python train.py --config configs/octo_base.py --workdir gs://... --config.data.data_dir=gs://... \
        --config.text.model=t5-base/spiece.model --config.text.t5_weights=t5-base
    python train.py --config configs/octo_base.py:base,learned_text --workdir gs://... --config.data.data_dir=gs://...

Topology: TPU v4-128 (64 chips, 4x4x4), batch 2048. The published Octo-base took about 14 hours for 300k steps there.
Everything else is as in octo_small.py, also the words `learned_text` (no T5) and `listen`.

`configs/octo_base.py:300m` and `:1b` are larger: 24 blocks of width 1024, 20 blocks of width 2048. docs/scaling.md says
what they need, docs/aot.md which settings fit which topology.
"""

from configs import octo_small


def get_config(words: str = "base"):
    return octo_small.get_config(words)
