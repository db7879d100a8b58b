"""What a run tells while it runs: metrics on disk, TensorBoard, W&B, a progress bar; what its devices can do."""

import contextlib
import io
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
import tqdm
from PIL import Image

METRICS_FILE = "metrics.jsonl"
MEDIA_FOLDER = "media"
WANDB_ID_FILE = "wandb_id.txt"

# Dense bfloat16 FLOP/s of one device, by a part of its `device_kind`; from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}

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
            self._to_wandb(lambda wandb, name=name, image=image: {name: wandb.Image(image)}, step)

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


class Progress:
    """Progress with rate and ETA: a bar on a terminal, elsewhere one line at most every `interval` seconds.

    Args:
      total: number of steps of the whole run.
      initial: steps done before this process started.
      samples_per_step: global batch size.
      enabled: default: only on process 0.
      stream: where to write; default stderr.
      interval: seconds between lines when `stream` is no terminal.
      clock: seconds that only grow.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        samples_per_step: int = 1,
        label: str = "step",
        enabled: bool | None = None,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._samples, self._label = total, samples_per_step, label
        self._enabled = jax.process_index() == 0 if enabled is None else enabled
        self._stream = stream or sys.stderr
        self._interval, self._clock = interval, clock
        self._begun: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None
        self._step, self._metrics = initial, {}
        self._bar = None
        if self._enabled and self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=total, initial=initial, file=self._stream, dynamic_ncols=True, unit=label, smoothing=0.1
            )

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Reports that `step` steps are done. `metrics`: a few numbers to show beside it; the last ones given stay."""
        now = self._clock()
        done, self._step = step - self._step, step
        if metrics is not None:
            self._metrics = dict(metrics)
        if self._begun is None:
            # The first step compiles: it would spoil the rate.
            self._begun = self._last = (now, step)
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(self._tail(now), refresh=False)
            self._bar.update(done)
        elif now - self._last[0] >= self._interval or step >= self._total or self._begun == (now, step):
            self._print(now)
            self._last = (now, step)

    def samples_per_second(self) -> float | None:
        """Mean rate since the first step of this process, or None before the second."""
        if self._begun is None or self._step <= self._begun[1]:
            return None
        seconds = self._clock() - self._begun[0]
        return (self._step - self._begun[1]) * self._samples / seconds if seconds > 0 else None

    def _tail(self, now: float) -> str:
        parts = []
        if (rate := self.samples_per_second()) is not None:
            parts.append(f"{rate:.4g} samples/s")
        parts += [f"{name} {value:.4g}" for name, value in self._metrics.items()]
        return "  ".join(parts)

    def _print(self, now: float) -> None:
        percent = 100 * self._step / max(self._total, 1)
        line = f"{self._label} {self._step}/{self._total} ({percent:.0f}%)"
        if (rate := self.samples_per_second()) is not None:
            left = (self._total - self._step) * self._samples / rate
            line += f"  ETA {format_seconds(left)}"
        tail = self._tail(now)
        print(line + (f"  {tail}" if tail else ""), file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def format_seconds(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40", 200000 -> "2d 7:33:20"."""
    whole = max(round(seconds), 0)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    text = f"{hours}:{minutes:02d}:{secs:02d}" if hours or days else f"{minutes}:{secs:02d}"
    return f"{days}d {text}" if days else text


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of a device, or None when it is not in the table (a CPU, a new chip)."""
    # "TPU v5 lite" before "TPU v5": the longest name that fits is the right one.
    for part in sorted(PEAK_FLOPS, key=len, reverse=True):
        if part in device.device_kind:
            return PEAK_FLOPS[part]
    return None


def mfu(flops_per_step: float, seconds_per_step: float, devices: Sequence[jax.Device] | None = None) -> float | None:
    """Model FLOPs utilisation: useful FLOPs of a step / (seconds x peak FLOP/s of all devices); None without a peak.

    Args:
      flops_per_step: forward and backward FLOPs of the whole global batch, recomputation not counted.
      seconds_per_step: wall time.
      devices: default: all devices of the run.
    """
    peaks = [peak_flops(device) for device in (jax.devices() if devices is None else devices)]
    if None in peaks or seconds_per_step <= 0:
        return None
    return flops_per_step / (seconds_per_step * sum(peaks))


def memory_stats() -> dict[str, float]:
    """Memory in GiB: of the fullest local device (where the backend tells), and of this process on the host."""
    values = {}
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s]
    for name, key in (("in_use", "bytes_in_use"), ("peak", "peak_bytes_in_use"), ("limit", "bytes_limit")):
        if found := [s[key] for s in stats if key in s]:
            values[f"memory/device_{name}_gib"] = max(found) / 2**30
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return values  # not Linux
    return values | {"memory/host_gib": pages * os.sysconf("SC_PAGE_SIZE") / 2**30}
