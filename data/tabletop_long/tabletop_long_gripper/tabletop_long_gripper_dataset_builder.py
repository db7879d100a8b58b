"""RLDS demonstrations of long tasks of the tabletop world's gripper. Built by `tfds build` here, or by ../build.py."""

import pathlib
import sys

_HERE = str(pathlib.Path(__file__).resolve().parent.parent)
if _HERE not in sys.path:  # the builder's shared part is beside its folder, wherever `tfds build` is run
    sys.path.insert(0, _HERE)

from tabletop_long_rlds import TabletopLongBuilder  # noqa: E402


class TabletopLongGripper(TabletopLongBuilder):
    """See `TabletopLongBuilder`."""

    EMBODIMENT = "gripper"
