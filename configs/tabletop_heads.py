"""The demo's policy with another action head: what does the head make of the same samples?

    python train.py --config configs/tabletop_heads.py:bins --workdir runs/bins --config.data.data_dir=runs/data
    python scripts/seed_table.py --config configs/tabletop_heads.py:flow --seeds 0 1 2 --isa native

Heads: diffusion (the demo's own), flow, l1, discrete (entries that are independent), bins (256 classes, said one after
the other), fast (tokens of a chunk's frequencies). Heads of tokens read four readout tokens. "fast" needs a vocabulary
of the demonstrations first:

    python scripts/train_action_tokenizer.py --config configs/tabletop_heads.py:fast --config.data.data_dir=runs/data \\
        --output runs/tabletop_actions.json

Topology: 2 CPU cores. Expected time and success: docs/language.md.
"""

from configs import tabletop

SIZE = dict(readout="readout_action", action_horizon=4, action_dim=7)
DECODER = dict(width=96, num_layers=2, num_heads=4)
HEADS = {
    "diffusion": tabletop.head(7),
    "flow": tabletop.head(7) | dict(kind="flow"),
    "l1": SIZE | dict(kind="regression", loss="l1"),
    "discrete": SIZE | dict(kind="discrete", token_per="", num_bins=256, low=-3.0, high=3.0),
    "bins": SIZE | DECODER | dict(kind="bins", num_bins=256, low=-3.0, high=3.0),
    "fast": SIZE | DECODER | dict(kind="fast", vocabulary="runs/tabletop_actions.json"),
}
del HEADS["flow"]["prediction"]


def get_config(head: str = "diffusion"):
    if head not in HEADS:
        raise ValueError(f"no head {head!r} in configs/tabletop_heads.py; valid: {', '.join(HEADS)}")
    config = tabletop.get_config()
    config.model.heads.action = HEADS[head]
    if head in ("bins", "fast"):
        config.model.readouts.action = 4
    return config
