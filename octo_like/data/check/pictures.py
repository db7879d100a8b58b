"""Some episodes of a dataset for a look at them: which ones, their words, and their frames as pictures."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from octo_like.data.batches import frames
from octo_like.data.batches.episodes import Episode, load_episode
from octo_like.data.batches.texts import WordList
from octo_like.data.prepared import PreparedDataset
from octo_like.data.rlds.index import Index
from octo_like.data.rlds.records import EpisodeFunction
from octo_like.data.spec import DataError


def read_episode(
    prepared: PreparedDataset, index: Index, number: int, slots: Collection[str]
) -> tuple[Episode, list[str]]:
    """An episode as training reads it, with the frames of some cameras, and the instruction of each of its steps."""
    words = WordList()
    episode = load_episode(prepared, index, int(number), slots, words)
    return episode, [words.texts[row] for row in episode.text]


def read_words(
    prepared: PreparedDataset, index: Index, number: int, slots: Collection[str]
) -> tuple[Episode, list[str], list[str]]:
    """The same, with the text to learn of each of its steps ("" where there is none)."""
    words = WordList()
    episode = load_episode(prepared, index, int(number), slots, words)
    target = np.zeros(len(episode.action), int) if episode.target is None else episode.target
    return episode, [words.texts[row] for row in episode.text], [words.texts[row] for row in target]


def function_of(prepared: PreparedDataset) -> EpisodeFunction:
    """What reads a dataset's records. Raises DataError for a dataset that is no files."""
    if not isinstance(prepared.function, EpisodeFunction):
        raise DataError(f"{prepared.key}: only a dataset of RLDS files can be looked at record by record")
    return prepared.function


def cameras(prepared: PreparedDataset) -> list[str]:
    """Slots of the cameras that a dataset has."""
    return [slot for slot, key in prepared.spec.image_keys.items() if key is not None]


def present(stored: Sequence[Any] | np.ndarray) -> np.ndarray:
    """(T,) bool of the frames of a camera: an empty one is missing."""
    return np.array([len(frame) > 0 for frame in stored], bool)


def pictures(
    prepared: PreparedDataset,
    slot: str,
    stored: Sequence[Any] | np.ndarray,
    steps: Sequence[int] | np.ndarray,
    size: tuple[int, int],
    resize: str = "stretch",
) -> np.ndarray:
    """Frames of some steps of a camera as (N, *size, 3) uint8 RGB; missing ones are black.

    Raises:
      FrameError: one that is not an image.
    """
    if isinstance(stored, np.ndarray):
        images = frames.resize_frames(stored[list(steps)], size, resize=resize)
    else:
        images, chosen = np.zeros((len(steps), *size, 3), np.uint8), [stored[step] for step in steps]
        if (known := present(chosen)).any():
            images[known] = frames.decode_frames([frame for frame in chosen if len(frame)], size, resize=resize)
    return images[..., ::-1] if slot in prepared.spec.bgr_slots else images
