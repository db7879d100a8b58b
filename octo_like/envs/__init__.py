"""The built-in tabletop world. (Simulators of other makers are in `sims` and need the extra of that name.)"""

import gymnasium

from octo_like.envs import sims
from octo_like.envs.embodiments import EMBODIMENTS, Embodiment
from octo_like.envs.language import all_instructions
from octo_like.envs.long import LONG_EMBODIMENTS, LongTabletopEnv
from octo_like.envs.tabletop import EVALUATION_SEEDS, TabletopEnv

__all__ = [
    "EMBODIMENTS",
    "EVALUATION_SEEDS",
    "Embodiment",
    "LONG_EMBODIMENTS",
    "LongTabletopEnv",
    "TabletopEnv",
    "all_instructions",
    "sims",
]

_ENTRY = {
    "Tabletop": ("octo_like.envs.tabletop:TabletopEnv", EMBODIMENTS),
    "TabletopLong": ("octo_like.envs.long:LongTabletopEnv", LONG_EMBODIMENTS),
}
for _world, (_entry, _names) in _ENTRY.items():
    for _name in _names:
        _id = f"octo_like/{_world}-{_name}-v0"
        if _id not in gymnasium.registry:
            gymnasium.register(_id, entry_point=_entry, kwargs={"embodiment": _name})
