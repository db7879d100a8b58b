"""The long tasks' datasets: those of the short tasks with a sub-task and the hand's path in every step."""

import pathlib
import sys

import tensorflow_datasets as tfds
from etils import epath

_TABLETOP = str(pathlib.Path(__file__).resolve().parent.parent / "tabletop")
if _TABLETOP not in sys.path:
    sys.path.append(_TABLETOP)

from tabletop_rlds import TabletopBuilder  # noqa: E402

from octo_like.envs.language import BLOCK_COLORS  # noqa: E402
from octo_like.envs.long_demonstrations import LongSimulator  # noqa: E402
from octo_like.envs.long_language import LONG_PLATE_COLORS, LONG_TASKS  # noqa: E402


class TabletopLongBuilder(TabletopBuilder, skip_registration=True):
    """Expert demonstrations of the long tasks of one embodiment. Arguments as for `TabletopBuilder`."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.0.0": "First release.", "1.1.0": "The way of the hand, and the places of all things."}
    code_path = epath.Path(__file__)
    STEP_TEXTS = ("subtask", "path")
    STEP_POINTS = {
        **TabletopBuilder.STEP_POINTS,
        "hand_point": "the hand",
        **{f"{color}_block_point": f"the {color} block; NaN when there is none" for color in BLOCK_COLORS},
        **{f"{color}_plate_point": f"the {color} plate; NaN when there is none" for color in LONG_PLATE_COLORS},
    }
    SIMULATOR = LongSimulator

    @property
    def tasks(self) -> tuple[str, ...]:
        return LONG_TASKS
