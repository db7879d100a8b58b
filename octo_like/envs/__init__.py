"""The built-in tabletop world. (Simulators of other makers are in `sims` and need the extra of that name.)"""

import gymnasium

from octo_like.envs import sims
from octo_like.envs.embodiments import EMBODIMENTS, Embodiment
from octo_like.envs.language import all_instructions
from octo_like.envs.tabletop import EVALUATION_SEEDS, TabletopEnv

__all__ = ["EMBODIMENTS", "EVALUATION_SEEDS", "Embodiment", "TabletopEnv", "all_instructions", "sims"]

for _name in EMBODIMENTS:
    _id = f"octo_like/Tabletop-{_name}-v0"
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point="octo_like.envs.tabletop:TabletopEnv", kwargs={"embodiment": _name})
