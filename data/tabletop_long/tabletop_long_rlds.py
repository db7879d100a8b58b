"""The long tasks' datasets: those of the short tasks with a sub-task in every step."""

import pathlib
import sys

import tensorflow_datasets as tfds
from etils import epath

_TABLETOP = str(pathlib.Path(__file__).resolve().parent.parent / "tabletop")
if _TABLETOP not in sys.path:
    sys.path.append(_TABLETOP)

from tabletop_rlds import TabletopBuilder  # noqa: E402

from octo_like.envs.long_demonstrations import LongSimulator  # noqa: E402
from octo_like.envs.long_language import LONG_TASKS  # noqa: E402


class TabletopLongBuilder(TabletopBuilder, skip_registration=True):
    """Expert demonstrations of the long tasks of one embodiment. Arguments as for `TabletopBuilder`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    code_path = epath.Path(__file__)
    STEP_TEXTS = ("subtask",)
    SIMULATOR = LongSimulator

    @property
    def tasks(self) -> tuple[str, ...]:
        return LONG_TASKS
