"""What a robot keeps for its policy: the window of past observations, and what it was told last. NumPy only: a robot's
own computer needs no more."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np


class History:
    """The last W observations, stacked: W the window size.

    The first observation of an episode fills the window; the copies standing before it have timestep_pad_mask False and
    timestep 0, exactly as the first window of a training episode. What is kept is a copy: a camera may write its next
    picture into the same buffer.
    """

    def __init__(self, window_size: int):
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.window_size = window_size
        self._frames: deque[dict[str, np.ndarray]] = deque(maxlen=window_size)
        self._count = 0

    def reset(self) -> None:
        self._frames.clear()
        self._count = 0

    def append(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a frame; returns {key: (W, ...)} plus timestep (W,) int32 and timestep_pad_mask (W,) bool."""
        frame = {key: np.array(value) for key, value in observation.items()}
        if self._frames and frame.keys() != self._frames[-1].keys():
            raise ValueError(
                f"observation keys changed within an episode: had {sorted(self._frames[-1])}, got {sorted(frame)}"
            )
        self._frames.extend([frame] * (1 if self._count else self.window_size))
        self._count += 1
        stacked = {key: np.stack([f[key] for f in self._frames]) for key in frame}
        steps = np.arange(self._count - self.window_size, self._count, dtype=np.int32)
        stacked["timestep"] = np.maximum(steps, 0)
        stacked["timestep_pad_mask"] = steps >= 0
        return stacked


class LastWords:
    """What a robot was told last to do next, by itself or a person, since its episode began and of one instruction."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._instruction: str | None = None
        self._subtask: str | None = None

    def of(self, instruction: str | None) -> str | None:
        """The words; None: nothing was said of this instruction."""
        return self._subtask if instruction == self._instruction else None

    def keep(self, instruction: str | None, subtask: str | None) -> None:
        """Of a chunk that was told `subtask`: None forgets nothing, another instruction everything."""
        self._subtask = self.of(instruction) if subtask is None else subtask
        self._instruction = instruction
