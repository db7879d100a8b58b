"""Frames of an mp4 by their presentation times. The only file that imports PyAV."""

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from octo_like.data.convert.recording import reader
from octo_like.data.spec import DataError

# Presentation times and timestamps of a table may differ by the rounding of a container's clock and of float32.
TOLERANCE_S = 1e-3


def _av() -> Any:
    return reader("av", "videos")


@functools.lru_cache(maxsize=16)
def _ticks(path: str, modified: int) -> tuple[np.ndarray, float]:
    """(sorted presentation times of all frames in ticks, seconds per tick). Nothing is decoded."""
    av = _av()
    del modified  # part of the key: a file that was written anew is read anew
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise DataError(f"{path}: no video stream")
            stream = container.streams.video[0]
            ticks = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
            return np.array(ticks, np.int64), float(stream.time_base)
    except (OSError, av.error.FFmpegError) as error:
        raise DataError(f"{path}: cannot be read as a video: {error}") from error


def frame_times(path: str) -> np.ndarray:
    """Presentation times of all frames of a video, seconds, sorted (N,) float64.

    Raises:
      DataError: the file is missing or no video.
    """
    if not pathlib.Path(path).is_file():
        raise DataError(f"{path}: the video file is missing")
    ticks, unit = _ticks(path, os.stat(path).st_mtime_ns)
    return ticks * unit


def frames_at(
    path: str,
    times: np.ndarray,
    *,
    start: float | None = None,
    end: float | None = None,
    where: str = "",
    tolerance: float = TOLERANCE_S,
) -> Iterator[np.ndarray]:
    """The frames shown at `times`, chosen by presentation time and never by count.

    Args:
      path: of the video.
      times: (T,) seconds, increasing, on the video's own clock.
      start, end: the stretch of the video that belongs to the episode; None: all of it. There must be exactly one frame
        for each entry of `times` in it.
      where: names the episode and camera in messages.
      tolerance: largest difference, seconds, between a time and that of its frame.

    Yields:
      (h, w, 3) uint8, RGB.

    Raises:
      DataError: another number of frames than of times, a time without a frame, a file that cannot be decoded.
    """
    chosen = match(path, times, start=start, end=end, where=where, tolerance=tolerance)
    return _decode(path, chosen, where)


def match(
    path: str,
    times: np.ndarray,
    *,
    start: float | None,
    end: float | None,
    where: str,
    tolerance: float = TOLERANCE_S,
) -> np.ndarray:
    """(T,) int64 presentation ticks of the frames at `times`; see `frames_at`."""
    shown = frame_times(path)
    ticks, _ = _ticks(path, os.stat(path).st_mtime_ns)
    low = 0 if start is None else int(np.searchsorted(shown, start - tolerance))
    high = len(shown) if end is None else int(np.searchsorted(shown, end - tolerance))
    if high - low != len(times):
        span = "" if start is None or end is None else f" from {start:.6g} s to {end:.6g} s"
        raise DataError(f"{where}: {path} has {high - low} frames{span}, but the table has {len(times)} rows")
    apart = np.abs(shown[low:high] - times)
    worst = int(apart.argmax())
    if apart[worst] > tolerance:
        raise DataError(
            f"{where}: {path} has no frame at {times[worst]:.6g} s (row {worst}); the nearest is shown at "
            f"{shown[low + worst]:.6g} s, and at most {tolerance:g} s apart is allowed"
        )
    return ticks[low:high]


def _decode(path: str, wanted: np.ndarray, where: str) -> Iterator[np.ndarray]:
    av = _av()
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            # To the key frame at or before the first wanted one. A file whose index is poor is read from its start.
            for target in (int(wanted[0]), None):
                container.seek(0 if target is None else target, stream=stream, backward=True)
                frames = (frame for frame in container.decode(stream) if frame.pts is not None)
                first = next(frames, None)
                if first is not None and first.pts <= wanted[0]:
                    break
            position, frame = 0, first
            while frame is not None:
                if frame.pts == wanted[position]:
                    yield frame.to_ndarray(format="rgb24")
                    position += 1
                    if position == len(wanted):
                        return
                frame = next(frames, None)
    except (OSError, av.error.FFmpegError) as error:
        raise DataError(f"{where}: {path} cannot be decoded: {error}") from error
    raise DataError(f"{where}: {path} ends after {position} of {len(wanted)} frames")
