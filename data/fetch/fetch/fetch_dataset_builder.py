"""RLDS demonstrations of the Fetch robot. Built by `tfds build` here, or by data/sims/build.py."""

import pathlib
import sys

_SIMS = str(pathlib.Path(__file__).resolve().parents[2] / "sims")
if _SIMS not in sys.path:  # the builders' shared part, wherever `tfds build` is run
    sys.path.insert(0, _SIMS)

from sim_rlds import FetchBuilder  # noqa: E402


class Fetch(FetchBuilder):
    """See `SimulatorBuilder`."""

    GROUP = "fetch"
