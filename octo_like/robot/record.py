"""Turns the frames of an episode into an animation a person can judge: enlarged, captioned, framed by its outcome."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from octo_like.common import hand_paths

SUCCESS_COLOUR = (46, 160, 67)
FAILURE_COLOUR = (207, 34, 46)
INSTRUCTION_COLOUR, SUBTASK_COLOUR = (20, 20, 20), (9, 80, 190)
PATH_COLOUR, EVENT_COLOURS = (255, 221, 0), {hand_paths.CLOSE: (207, 34, 46), hand_paths.OPEN: (46, 160, 67)}
BORDER = 4
FONT_SIZE = 12
HOLD_LAST_FRAME_S = 1.0


def join_views(views: Sequence[np.ndarray]) -> np.ndarray:
    """Puts images (h, w, 3) uint8 beside each other, smaller ones enlarged (nearest pixel) to the greatest height."""
    height = max(view.shape[0] for view in views)
    return np.concatenate([_enlarge(view, height) for view in views], axis=1)


def _enlarge(view: np.ndarray, height: int) -> np.ndarray:
    width = round(view.shape[1] * height / view.shape[0])
    rows = np.arange(height) * view.shape[0] // height
    columns = np.arange(width) * view.shape[1] // width
    return view[rows[:, None], columns]


def annotate(
    frame: np.ndarray,
    caption: str,
    success: bool | None,
    scale: int,
    subtask: str = "",
    subtask_lines: int = 0,
    first_width: int | None = None,
) -> Image.Image:
    """One picture: the frame enlarged by `scale`, the captions above it, and a border: green success, red failure.

    Args:
      caption: the instruction.
      subtask: what the robot is doing of it; stands below, in another colour. A path of the hand
        (`octo_like.common.hand_paths`) is drawn into the picture instead, with a dot where the gripper closes (red) or
        opens (green). It is that of the leftmost view.
      subtask_lines: lines that are kept for it at least, so that all pictures of an episode are of one size.
      first_width: of the leftmost view, in pixels of the frame (`Episode.first_width`); None: as wide as the frame is
        high, or all of it.
    """
    height, width = frame.shape[0] * scale, frame.shape[1] * scale
    font = ImageFont.load_default(size=FONT_SIZE)
    lines = [(line, INSTRUCTION_COLOUR) for line in _wrap(caption, width)]
    path = hand_paths.decode(subtask) if hand_paths.is_path(subtask) else None
    subtask = "" if path else subtask
    below = [(line, SUBTASK_COLOUR) for line in _wrap(subtask, width)]
    lines += below + [("", SUBTASK_COLOUR)] * (subtask_lines - len(below))
    top = len(lines) * (FONT_SIZE + 3) + (4 if lines else 0)
    colour = {True: SUCCESS_COLOUR, False: FAILURE_COLOUR, None: (60, 60, 60)}[success]
    picture = Image.new("RGB", (width + 2 * BORDER, height + top + 2 * BORDER), colour)
    draw = ImageDraw.Draw(picture)
    if lines:
        draw.rectangle([BORDER, BORDER, BORDER + width - 1, BORDER + top - 1], fill=(255, 255, 255))
    for i, (line, ink) in enumerate(lines):
        draw.text((BORDER + 3, BORDER + 1 + i * (FONT_SIZE + 3)), line, fill=ink, font=font)
    enlarged = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
    if path is not None:
        _draw_path(enlarged, path, min(width, height) if first_width is None else first_width * scale)
    picture.paste(enlarged, (BORDER, BORDER + top))
    return picture


def _draw_path(picture: Image.Image, path: hand_paths.HandPath, width: int) -> None:
    """A line through the points, in the leftmost `width` pixels."""
    draw = ImageDraw.Draw(picture)
    places = [(column * width, row * picture.height) for row, column in path.points]
    thick = max(1, picture.height // 96)
    draw.line(places, fill=PATH_COLOUR, width=thick, joint="curve")
    dots = {0: PATH_COLOUR} | {number: EVENT_COLOURS[what] for number, what in path.events}
    for number, colour in dots.items():
        draw.circle(places[number], 2 * thick + 1, fill=colour, outline=(255, 255, 255))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(10, int(width / (FONT_SIZE * 0.52))))


def annotate_all(
    frames: Sequence[np.ndarray],
    caption: str,
    success: bool | None,
    scale: int,
    subtasks: Sequence[str] | None = None,
    first_width: int | None = None,
) -> list[Image.Image]:
    """`annotate` of all frames of an episode: pictures of one size.

    Args:
      subtasks: of every frame, `Episode.subtasks` for instance; None: none.
      first_width: see `annotate`.

    Raises:
      ValueError: not one sub-task for each frame.
    """
    subtasks = [""] * len(frames) if subtasks is None else subtasks
    if len(subtasks) != len(frames):
        raise ValueError(f"{len(subtasks)} sub-tasks for {len(frames)} frames: each needs one")
    pairs = list(zip([np.asarray(frame) for frame in frames], subtasks, strict=True))
    below = [(frame, text) for frame, text in pairs if not hand_paths.is_path(text)]
    lines = max((len(_wrap(text, frame.shape[1] * scale)) for frame, text in below), default=0)
    return [annotate(frame, caption, success, scale, text, lines, first_width) for frame, text in pairs]


def encode_gif(
    frames: Sequence[np.ndarray],
    caption: str = "",
    success: bool | None = None,
    scale: int = 3,
    fps: float = 8.0,
    subtasks: Sequence[str] | None = None,
    first_width: int | None = None,
) -> bytes:
    """A looping GIF of frames (h, w, 3) uint8 of one size; the last frame is held for a second.

    Args:
      subtasks: what the robot was doing in every frame, shown below the caption (`Episode.subtasks`).
      first_width: see `annotate`.

    Raises:
      ValueError: no frames, or not one sub-task for each.
    """
    if len(frames) == 0:
        raise ValueError("no frames to make an animation of")
    pictures = annotate_all(frames, caption, success, scale, subtasks, first_width)
    # One palette for all frames: smaller files, and the colours of objects do not flicker.
    palette = pictures[len(pictures) // 2].quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    duration = [int(1000 / fps)] * len(pictures)
    duration[-1] += int(1000 * HOLD_LAST_FRAME_S)
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0, disposal=1)
    return buffer.getvalue()


def write_gif(
    path: str | Path, frames: Sequence[np.ndarray], caption: str = "", success: bool | None = None, **options: Any
) -> Path:
    """Writes `encode_gif(frames, ...)` to `path`, making its folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_gif(frames, caption, success, **options))
    return path
