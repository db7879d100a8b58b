"""Frames of a dataset that do not decode, or of which libjpeg complains: for a look at the data before training.

Training uses every picture that its decoder returns, and that decoder returns a picture for a JPEG whose compressed
data is damaged, too: libjpeg goes on with whatever the bits say and writes a line to the error stream, where nobody
looks. Here the frames are decoded in processes of their own that watch what is written there. JPEGs are decoded at an
eighth of their size: all bits are read, few pixels are computed.
"""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from tqdm import tqdm

from octo_like.data.batches.frames import decode_reduced
from octo_like.data.check.pictures import function_of
from octo_like.data.episode import EncodedFrame
from octo_like.data.prepared import PreparedDataset
from octo_like.data.rlds import records
from octo_like.data.rlds.index import Index
from octo_like.data.tf import error_text, tf

_AHEAD = 2  # episodes per process that wait to be decoded


@dataclasses.dataclass(frozen=True)
class ImageReport:
    """What a look at all encoded frames found.

    Attributes:
      frames: frames that were decoded.
      complaints: one message per bad frame, with file, episode, step, key and what the decoder says.
    """

    frames: int
    complaints: tuple[str, ...]


def check_images(prepared: PreparedDataset, *, workers: int | None = None, progress: bool = True) -> ImageReport:
    """Decodes every frame of a dataset's cameras and depth maps, also of its validation; missing ones are passed over.

    Args:
      workers: processes that decode; None: one per core, up to 8.

    Raises:
      OSError: the storage does not answer.
    """
    indices = [index for index in (prepared.train, prepared.val) if len(index)]
    workers = workers or min(8, os.cpu_count() or 1)
    count = 0
    complaints: list[str] = []
    waiting: collections.deque[tuple[list[str], concurrent.futures.Future]] = collections.deque()
    bar = tqdm(total=sum(map(len, indices)), desc=f"images of {prepared.key}", unit="ep", disable=not progress)
    # Spawned, not forked: TensorFlow does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with bar, concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_watch_errors) as pool:

        def finish() -> None:
            where, future = waiting.popleft()
            complaints.extend(f"{where[number]}: {text}" for number, text in future.result())
            bar.update()

        for where, frames, damaged in _episodes(prepared, indices):
            complaints += damaged
            count += len(frames)
            waiting.append((where, pool.submit(_complaints, frames)))
            if len(waiting) > _AHEAD * workers:
                finish()
        while waiting:
            finish()
    return ImageReport(count, tuple(complaints))


def _episodes(
    prepared: PreparedDataset, indices: Sequence[Index]
) -> Iterator[tuple[list[str], list[bytes], list[str]]]:
    """(where, encoded frames, damage) of every episode."""
    function = function_of(prepared)
    for index in indices:
        for episode in range(len(index)):
            path, offset = index.files[index.file[episode]], int(index.offset[episode])
            try:
                raw = function.from_file(path, offset)
            except records.damage_errors() as error:
                yield [], [], [str(records.damaged(path, int(index.record[episode]), offset, error))]
                continue
            where, frames = [], []
            for kind, keys in (("images", prepared.spec.image_keys), ("depths", prepared.spec.depth_keys)):
                for slot, values in raw[kind].items():
                    if values.dtype != tf.string:
                        continue
                    for step, content in enumerate(values.numpy().tolist()):
                        if content:
                            where.append(f"{index.where(episode)}, step {step}, {keys[slot]!r} ({slot})")
                            frames.append(content)
            yield where, frames, []


# ---------------------------------------------------------------- in a process that decodes

_errors: IO[bytes] | None = None  # the file that this process's error stream goes to


def _watch_errors() -> None:
    global _errors
    tf.io.decode_image(tf.io.encode_jpeg(np.zeros((8, 8, 3), np.uint8)))  # what is said at the first use is said now
    _errors = tempfile.TemporaryFile()
    os.dup2(_errors.fileno(), 2)


def _complaints(frames: Sequence[bytes]) -> list[tuple[int, str]]:
    """(position, what the decoder says) of the frames that it does not like."""
    assert _errors is not None, "_watch_errors() comes first"
    bad = []
    for position, contents in enumerate(frames):
        _errors.seek(0)
        _errors.truncate()
        frame, text = EncodedFrame(contents), ""
        try:
            decode_reduced(frame.tensor, 8 if frame.jpeg_size else 1)
        except tf.errors.InvalidArgumentError as error:
            text = error_text(error)
        _errors.seek(0)
        lines = _errors.read().decode("utf-8", "replace").strip().splitlines()
        if text or lines:
            bad.append((position, "; ".join(filter(None, [text, *lines[:1]]))))
    return bad
