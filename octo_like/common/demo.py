"""A demonstration as arrays, as a policy on a robot would meet it: decoded frames and physical units. NumPy only."""

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Demo:
    """One episode of T steps.

    Attributes:
      where: file and episode.
      images: slot -> (T, h, w, 3) uint8.
      present: slot -> (T,) bool, False where a frame is missing (and black).
      proprio: (T, P) float32, physical units, or None.
      action: (T, A) float32, physical units, or (T, N, A) when each step has a chunk.
      instruction: "" when there is none.
      extras: other sensors by name -> (T, ...) float32, physical units.
    """

    where: str
    images: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]
    proprio: np.ndarray | None
    action: np.ndarray
    instruction: str
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def chunks(self, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """The actions that a policy should predict at each step: (T, H, A), and (T, H) bool, False past the end."""
        steps = len(self.action)
        if self.action.ndim == 3:
            taken = self.action[:, :horizon]
            ends = np.arange(steps)[:, None] + np.arange(taken.shape[1])
            return taken, ends < steps
        index = np.arange(steps)[:, None] + np.arange(horizon)
        return self.action[np.minimum(index, steps - 1)], index < steps
