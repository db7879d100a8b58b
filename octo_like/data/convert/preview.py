"""A picture of what is being converted: for some episodes a strip of frames of each camera under the instruction."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

FRAME, GAP, CAPTION = 96, 2, 16


class Preview:
    """Collects small frames while episodes pass by. Memory: a few hundred kilobytes.

    Args:
      episodes: how many are shown, the first ones and then every second, fourth, ... of a long dataset.
      columns: frames per camera.
    """

    def __init__(self, episodes: int = 8, columns: int = 8):
        self._limit, self._columns, self._every = episodes, columns, 1
        self._frames: dict[int, dict[str, dict[int, np.ndarray]]] = {}
        self._captions: dict[int, str] = {}

    def watch(self, episode: int, camera: str, steps: int) -> Callable[[int, np.ndarray | bytes], None]:
        """A function that is given (step, frame) of one camera and keeps what the picture needs."""
        if episode % self._every:
            return lambda step, frame: None
        wanted = set(np.linspace(0, steps - 1, min(self._columns, steps)).round().astype(int).tolist())
        kept = self._frames.setdefault(episode, {}).setdefault(camera, {})

        def show(step: int, frame: np.ndarray | bytes) -> None:
            if step in wanted:
                picture = Image.open(io.BytesIO(frame)) if isinstance(frame, bytes) else Image.fromarray(frame)
                width = min(2 * FRAME, round(picture.width * FRAME / picture.height))
                kept[step] = np.asarray(picture.convert("RGB").resize((width, FRAME)))

        return show

    def caption(self, episode: int, instruction: str, steps: int) -> None:
        """Ends an episode. Thins out what was kept when it has become too many."""
        if episode in self._frames:
            self._captions[episode] = f"{instruction or '(no instruction)'}   [episode {episode}, {steps} steps]"
        while len(self._captions) > self._limit:
            self._every *= 2
            self._captions = {n: text for n, text in self._captions.items() if n % self._every == 0}
            self._frames = {n: frames for n, frames in self._frames.items() if n % self._every == 0}

    def save(self, path: str) -> bool:
        """Writes the picture as a PNG; False when there is nothing to see."""
        blocks = [self._block(n) for n in sorted(self._captions) if self._frames.get(n)]
        if not blocks:
            return False
        width = max(block.shape[1] for block in blocks)
        blocks = [np.pad(b, ((0, 6), (0, width - b.shape[1]), (0, 0)), constant_values=255) for b in blocks]
        Image.fromarray(np.concatenate(blocks)).save(path)
        return True

    def _block(self, episode: int) -> np.ndarray:
        rows = []
        for camera, frames in self._frames[episode].items():
            height = max(frame.shape[0] for frame in frames.values())
            strip = [
                np.pad(f, ((0, height - f.shape[0] + GAP), (0, GAP), (0, 0)), constant_values=255)
                for _, f in sorted(frames.items())
            ]
            rows.append(_labelled(np.concatenate(strip, axis=1), camera))
        width = max(row.shape[1] for row in rows)
        rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
        return np.concatenate([_text(self._captions[episode], width), *rows])


def _text(text: str, width: int) -> np.ndarray:
    canvas = Image.new("RGB", (width, CAPTION), "white")
    ImageDraw.Draw(canvas).text((4, 2), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return np.asarray(canvas)


def _labelled(strip: np.ndarray, label: str) -> np.ndarray:
    canvas = Image.fromarray(strip)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, 6 * len(label) + 6, 12), fill="white")
    draw.text((3, 1), label, fill="black")
    return np.asarray(canvas)
