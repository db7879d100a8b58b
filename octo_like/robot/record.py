"""Turns the frames of an episode into an animation a person can judge: enlarged, captioned, framed by its outcome."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SUCCESS_COLOUR = (46, 160, 67)
FAILURE_COLOUR = (207, 34, 46)
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


def annotate(frame: np.ndarray, caption: str, success: bool | None, scale: int) -> Image.Image:
    """One picture: the frame enlarged by `scale`, the caption above it, and a border: green success, red failure."""
    height, width = frame.shape[0] * scale, frame.shape[1] * scale
    font = ImageFont.load_default(size=FONT_SIZE)
    lines = textwrap.wrap(caption, max(10, int(width / (FONT_SIZE * 0.52)))) if caption else []
    top = len(lines) * (FONT_SIZE + 3) + (4 if lines else 0)
    colour = {True: SUCCESS_COLOUR, False: FAILURE_COLOUR, None: (60, 60, 60)}[success]
    picture = Image.new("RGB", (width + 2 * BORDER, height + top + 2 * BORDER), colour)
    draw = ImageDraw.Draw(picture)
    if lines:
        draw.rectangle([BORDER, BORDER, BORDER + width - 1, BORDER + top - 1], fill=(255, 255, 255))
    for i, line in enumerate(lines):
        draw.text((BORDER + 3, BORDER + 1 + i * (FONT_SIZE + 3)), line, fill=(20, 20, 20), font=font)
    enlarged = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
    picture.paste(enlarged, (BORDER, BORDER + top))
    return picture


def encode_gif(
    frames: Sequence[np.ndarray], caption: str = "", success: bool | None = None, scale: int = 3, fps: float = 8.0
) -> bytes:
    """A looping GIF of frames (h, w, 3) uint8 of one size; the last frame is held for a second.

    Raises:
      ValueError: no frames.
    """
    if len(frames) == 0:
        raise ValueError("no frames to make an animation of")
    pictures = [annotate(np.asarray(frame), caption, success, scale) for frame in frames]
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
