"""The gripper of the tabletop world with chunks of eight actions: what scripts/bench_delay.py lets act with delays.

    python train.py --config configs/tabletop_delay.py --workdir runs/delay/plain
    python train.py --config configs/tabletop_delay.py:trained --workdir runs/delay/trained

`trained` also learns to continue a chunk whose first actions are given (`max_delay` of the head, docs/deployment.md).
Demonstrations are made in memory. Topology: 2 CPU cores, no accelerator. Expected success: docs/deployment.md.
"""

from configs import tabletop


def get_config(variant: str = ""):
    if variant not in ("", "trained"):
        raise ValueError(f"unknown variant {variant!r}; valid: none, or 'trained'")
    config = tabletop.get_config()
    config.data.datasets = dict(tabletop_gripper=tabletop.dataset("tabletop_gripper"))
    config.data.update(kind="memory", episodes="tabletop_gripper=3000")
    config.model.heads.action.action_horizon = 8
    if variant:
        config.model.heads.action.max_delay = 4
    return config
