"""What every source of demonstrations is read as: one `Recording` per episode, frames only when they are asked for."""

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from octo_like.data.spec import DataError

# What every step of a written dataset has, whatever the recordings call theirs.
_OF_AN_EPISODE = ("timestamp", "is_first", "is_last", "is_terminal", "reward", "discount")
STEP_KEYS = ("observation", "action", "language_instruction", "task", *_OF_AN_EPISODE)

# A frame is an (h, w, 3) uint8 array in RGB, or the bytes of a JPEG or PNG.
Frame = np.ndarray | bytes


@dataclasses.dataclass(frozen=True)
class Recording:
    """One episode of T steps; the action of a step is what was commanded after its observation.

    Attributes:
      where: file and episode, for messages.
      action: (T, A) float32.
      vectors: key -> (T, D) float32: proprioception and whatever else was observed as numbers.
      cameras: camera -> function that gives its T frames, one after the other.
      instructions: T texts; "" where nothing was said.
      timestamps: (T,) float64 seconds since the first step, or None when the source has none.
      rewards: (T,) float32, or None.
      texts: key -> T texts beside the instruction, such as what is being done ("subtask"); "" where nothing is said.
    """

    where: str
    action: np.ndarray
    vectors: Mapping[str, np.ndarray]
    cameras: Mapping[str, Callable[[], Iterator[Frame]]]
    instructions: tuple[str, ...]
    timestamps: np.ndarray | None = None
    rewards: np.ndarray | None = None
    texts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """Recordings on disk.

    Attributes:
      description: what it is, for the dataset's info.
      control_hz: steps per second, or None where the recordings do not say.
      names: key ("action" or a vector's) -> names of its dimensions, where they are known.
      left_out: what of the recordings is not converted, and why: one line each.
    """

    description: str
    control_hz: float | None
    names: Mapping[str, tuple[str, ...]]
    left_out: list[str]

    def __len__(self) -> int: ...

    def read(self, number: int) -> Recording:
        """Episode `number` of `len(self)`. Raises DataError naming what is wrong with it."""


def reader(module: str, what: str) -> Any:
    """A module of the extra `demos`. Raises DataError, which says what reads `what`, when it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        needed = {"av": "PyAV"}.get(module, module.partition(".")[0])
        raise DataError(f"reading {what} needs {needed}: pip install 'octo_like[demos]'") from error


def as_rows(values: np.ndarray, where: str, key: str) -> np.ndarray:
    """Numbers of shape (T,) or (T, D) as (T, D) float32.

    Raises:
      DataError: NaN or infinite values, with step and dimension; another rank; numbers that float32 cannot hold.
    """
    values = np.asarray(values)
    if not len(values):
        raise DataError(f"{where}: the episode has no steps: {key!r} is empty")
    if values.ndim not in (1, 2) or not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
        raise DataError(f"{where}: {key!r} is {values.dtype} {values.shape}; expected numbers of shape (T,) or (T, D)")
    with np.errstate(over="ignore"):
        rows = values.reshape(len(values), -1).astype(np.float32)
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        step, dimension = bad[0]
        value = values.reshape(len(values), -1)[step, dimension]
        raise DataError(f"{where}: {key!r} is {value} at step {step}, dimension {dimension}")
    return rows


def check_lengths(where: str, steps: int, lengths: Mapping[str, int]) -> None:
    """Raises DataError when a leaf has another number of steps than the actions."""
    if steps == 0:
        raise DataError(f"{where}: the episode has no steps")
    wrong = [f"{count} of {key!r}" for key, count in lengths.items() if count != steps]
    if wrong:
        raise DataError(f"{where}: {steps} actions, but {', '.join(wrong)}")


def natural(name: str) -> tuple:
    """Sorting key: demo_2 before demo_10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))
