"""RLDS demonstrations of the Meta-World tasks held out from pretraining.

Built by `tfds build` here, or by data/sims/build.py.
"""

import pathlib
import sys

_SIMS = str(pathlib.Path(__file__).resolve().parents[2] / "sims")
if _SIMS not in sys.path:  # the builders' shared part, wherever `tfds build` is run
    sys.path.insert(0, _SIMS)

from sim_rlds import MetaWorldBuilder  # noqa: E402


class MetaworldHeldout(MetaWorldBuilder):
    """See `SimulatorBuilder`."""

    GROUP = "metaworld_heldout"
