"""Metrics of a run: written to disk, TensorBoard and W&B while it runs, and read again."""

import contextlib
import io
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from PIL import Image

METRICS_FILE = "metrics.jsonl"
MEDIA_FOLDER = "media"
WANDB_ID_FILE = "wandb_id.txt"

log = logging.getLogger(__name__)


@contextlib.contextmanager
def tolerated(what: str, errors: type[Exception] = OSError) -> Iterator[None]:
    """What fails inside is said and the run goes on: what a run tells is no reason to stop what it does.

    Args:
      what: what could not be written, in words.
      errors: the kind of errors.
    """
    try:
        yield
    except errors as error:
        log.warning("%s could not be written: %s: %s", what, type(error).__name__, error)


class MetricsWriter:
    """Writes to `workdir`: metrics.jsonl and media/ always, TensorBoard files in tensorboard/, W&B when asked.

    Only process 0 writes; on the others every method returns at once. What cannot be written (a full disk, a file that
    is in the way, W&B that does not answer) is said and left out.

    Args:
      workdir: the run's directory.
      config: JSON-able dict shown by W&B.
      tensorboard: whether to write TensorBoard files.
      wandb: keyword arguments of wandb.init (at least `project`), or None.

    Raises:
      ModuleNotFoundError: `wandb` is asked for and not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
    ):
        self.workdir = pathlib.Path(workdir)
        self._file: TextIO | None = None
        self._tensorboard = None
        self._wandb = None
        self._active = False
        if jax.process_index() != 0:
            return
        self._active = True
        if wandb is not None:
            _check_wandb(wandb)
            with tolerated("W&B", Exception):  # of whichever kind: there is a network behind it
                self._wandb = _start_wandb(self.workdir, config, wandb)
        with tolerated(f"metrics in {self.workdir}"):
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._file = _open_for_appending(self.workdir / METRICS_FILE)
        if tensorboard:
            import tensorboardX  # here, because it takes a second to import and robots never need it

            with tolerated("TensorBoard's files"):
                self._tensorboard = tensorboardX.SummaryWriter(str(self.workdir / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers (Python, NumPy or device scalars) of one step under names such as "train/loss"."""
        if not self._active:
            return
        # An explicit transfer: allowed under the transfer guard of the training loop.
        numbers = {name: float(value) for name, value in jax.device_get(dict(values)).items()}
        if self._file is not None:
            with tolerated(f"metrics of step {step}"):
                self._file.write(json.dumps({"step": int(step), "time": time.time(), **numbers}) + "\n")
                self._file.flush()
        for name, value in numbers.items():
            self._to_tensorboard("add_scalar", name, value, step)
        self._to_wandb(lambda _: numbers, step)

    def _to_tensorboard(self, method: str, name: str, *arguments, **options) -> None:
        if self._tensorboard is not None:
            with tolerated(f"{name} for TensorBoard"):
                getattr(self._tensorboard, method)(name, *arguments, **options)

    def _to_wandb(self, make: Callable[[Any], Mapping[str, Any]], step: int) -> None:
        """Logs what `make` makes of the module wandb."""
        if self._wandb is not None:
            with tolerated(f"step {step} for W&B", Exception):
                self._wandb.log(make(_wandb_module()), step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes (h, w, 3) uint8 images, also as media/<name>/<step>.png."""
        if not self._active:
            return
        for name, image in images.items():
            image = _checked_frames(name, image, 3)
            with tolerated(f"image {name} of step {step}"):
                Image.fromarray(image).save(self._media(name, step, "png"))
            self._to_tensorboard("add_image", name, image, step, dataformats="HWC")

            def picture(wandb: Any, name: str = name, image: np.ndarray = image) -> dict[str, Any]:
                return {name: wandb.Image(image)}

            self._to_wandb(picture, step)

    def video(self, step: int, name: str, frames: np.ndarray | Sequence[np.ndarray], *, fps: float = 10.0) -> None:
        """Writes (t, h, w, 3) uint8 frames as an animated GIF, also as media/<name>/<step>.gif."""
        if not self._active:
            return
        frames = _checked_frames(name, np.asarray(frames), 4)
        gif = _encode_gif(frames, fps=fps)
        with tolerated(f"video {name} of step {step}"):
            path = self._media(name, step, "gif")
            path.write_bytes(gif)
            self._to_wandb(lambda wandb: {name: wandb.Video(str(path))}, step)
        if self._tensorboard is not None:
            with tolerated(f"video {name} for TensorBoard"):
                _add_gif(self._tensorboard, name, gif, frames.shape, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text (Markdown in TensorBoard), also as media/<name>/<step>.txt."""
        if not self._active:
            return
        with tolerated(f"text {name}"):
            self._media(name, step, "txt").write_text(text, encoding="utf-8")
        self._to_tensorboard("add_text", name, text, step)
        self._to_wandb(lambda wandb: {name: wandb.Html(f"<pre>{text}</pre>")}, step)

    def _media(self, name: str, step: int, suffix: str) -> pathlib.Path:
        path = self.workdir / MEDIA_FOLDER / name / f"{step}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def close(self) -> None:
        """Flushes and closes everything; the writer is silent afterwards."""
        self._active = False
        if self._file is not None:
            with tolerated("metrics"):
                self._file.close()
            self._file = None
        if self._tensorboard is not None:
            with tolerated("TensorBoard's files"):
                self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            with tolerated("the end of the W&B run", Exception):
                self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The metrics of a run, one dict per step in ascending order, each with "step" and "time".

    A run that was killed and resumed from an earlier checkpoint has written some steps twice: what the resumed run
    wrote counts, and of the killed run only what lies before. A line that was cut short, or holds anything but metrics
    (bytes that a file system has mixed up), is left out.

    Raises:
      FileNotFoundError: the run has no metrics.jsonl.
    """
    path = pathlib.Path(workdir) / METRICS_FILE
    rows: list[dict[str, float]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not (isinstance(row, dict) and all(_is_number(row.get(key)) for key in ("step", "time"))):
            log.warning("%s line %d is incomplete and was left out", path, number + 1)
            continue
        while rows and rows[-1]["step"] > row["step"]:
            rows.pop()
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1].update(row)
        else:
            rows.append(row)
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def last_seen(workdir: str | os.PathLike) -> float | None:
    """time.time() of the last metrics of a run; None: there are none that can be read."""
    try:
        rows = read_metrics(workdir)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read: %s", pathlib.Path(workdir) / METRICS_FILE, error)
        return None
    return rows[-1]["time"] if rows else None


def _open_for_appending(path: pathlib.Path) -> TextIO:
    """Opens a file of lines; the unfinished last line of a killed run does not swallow the next one."""
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return open(path, "a", encoding="utf-8")


def _checked_frames(name: str, image: np.ndarray, dims: int) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != dims or image.shape[-1] != 3 or image.dtype != np.uint8 or image.shape[0] == 0:
        shape = "(h, w, 3)" if dims == 3 else "(t, h, w, 3)"
        raise ValueError(f"{name}: expected {shape} uint8, got {image.shape} {image.dtype}")
    return image


def _encode_gif(frames: np.ndarray, *, fps: float = 10.0) -> bytes:
    """(t, h, w, 3) uint8 frames as the bytes of a looping GIF."""
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, optimize=False
    )
    return buffer.getvalue()


def _add_gif(writer, name: str, gif: bytes, shape: tuple[int, ...], step: int) -> None:
    # TensorBoard plays GIFs in its images tab; the library's own add_video needs a video encoder.
    from tensorboardX.proto.summary_pb2 import Summary

    image = Summary.Image(height=shape[1], width=shape[2], colorspace=3, encoded_image_string=gif)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)


def _wandb_module():
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("logging to W&B needs the package wandb: pip install 'octo_like[wandb]'") from error
    return wandb


def _check_wandb(arguments: Mapping[str, Any]) -> None:
    _wandb_module()
    if not arguments.get("project"):
        raise ValueError("logging to W&B needs a project name")


def _start_wandb(workdir: pathlib.Path, config: Mapping[str, Any] | None, arguments: Mapping[str, Any]):
    wandb = _wandb_module()
    workdir.mkdir(parents=True, exist_ok=True)
    # The same id after a restart continues the same W&B run.
    id_file = workdir / WANDB_ID_FILE
    run_id = id_file.read_text(errors="replace").strip() if id_file.exists() else ""
    if not (run_id.isascii() and run_id.isprintable() and run_id):
        run_id = wandb.util.generate_id()
    id_file.write_text(run_id)
    return wandb.init(
        **{"id": run_id, "resume": "allow", "dir": str(workdir), "config": dict(config or {}), **arguments}
    )
