"""Recordings to an RLDS dataset, with TFDS's own sequential writer: one episode in memory, whole or not at all."""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from octo_like.data.convert.preview import Preview
from octo_like.data.convert.recording import Frame, Recording, Source, check_lengths
from octo_like.data.spec import DataError, suggest
from octo_like.data.tf import tf  # noqa: F401  (sets TensorFlow up before TFDS imports it)

SHARD_BYTES = 128 << 20
ENCODINGS = ("jpeg", "png")
MISSING = ("error", "mask")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a dataset is written.

    Attributes:
      encoding: "jpeg" or "png" (lossless, about five times as large).
      quality: of JPEG. Frames that are JPEG (or PNG) already, and keep size and colours, are stored as they are.
      image_size: (height, width) that all frames are resized to; None: as recorded.
      bgr: cameras whose frames are recorded blue first; their channels are exchanged.
      turned: cameras whose frames are turned by 180 degrees; None: those that the source names (LIBERO's).
      missing_cameras: "error": every episode has the first one's cameras; or "mask": an episode without a camera that
        any of them has gets empty frames, which the input stream marks as missing.
      skip_broken: leave out episodes that cannot be read, and name them in `Written.broken`, instead of ending.
      control_hz: steps per second; overrides the source's.
      version: of the dataset. overwrite: replace a dataset of this name and version.
    """

    encoding: str = "jpeg"
    quality: int = 95
    image_size: tuple[int, int] | None = None
    bgr: Collection[str] = ()
    turned: Collection[str] | None = None
    missing_cameras: str = "error"
    skip_broken: bool = False
    control_hz: float | None = None
    version: str = "1.0.0"
    overwrite: bool = False

    def __post_init__(self):
        if self.encoding not in ENCODINGS:
            raise DataError(f"encoding {self.encoding!r}; valid: {', '.join(ENCODINGS)}")
        if self.missing_cameras not in MISSING:
            raise DataError(f"missing_cameras {self.missing_cameras!r}; valid: {', '.join(MISSING)}")
        if not re.fullmatch(r"\d+\.\d+\.\d+", self.version):
            raise DataError(f"version {self.version!r}: expected three numbers, e.g. 1.0.0")


@dataclasses.dataclass
class Written:
    """What was written.

    Attributes:
      directory: DATA_DIR/name/version.
      episodes, steps, bytes: of all files together.
      cameras: names below `observation`. vectors: name -> width. action_dim: width of the action.
      broken: one message per episode that was left out.
    """

    directory: str
    episodes: int = 0
    steps: int = 0
    bytes: int = 0
    cameras: tuple[str, ...] = ()
    vectors: dict[str, int] = dataclasses.field(default_factory=dict)
    action_dim: int = 0
    broken: list[str] = dataclasses.field(default_factory=list)


def write_rlds(
    source: Source,
    data_dir: str,
    name: str,
    *,
    options: Options = Options(),  # noqa: B008  (frozen)
    preview: Preview | None = None,
    advance: Callable[[int], Any] = lambda steps: None,
) -> Written:
    """Writes DATA_DIR/name/version, which appears when everything is in it.

    Args:
      preview: gets some frames of every episode.
      advance: called after each episode with its number of steps.

    Raises:
      DataError: no episodes; an episode that cannot be read or that has other cameras, keys or widths than the first;
        a dataset of this name and version that exists.
    """
    with whole_or_nothing(data_dir, name, options) as (folder, target):
        written = _Writer(source, name, folder, options).write(preview, advance)
    written.directory = str(target)
    return written


@contextlib.contextmanager
def whole_or_nothing(data_dir: str, name: str, options: Options) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A folder to write a dataset into, and DATA_DIR/name/version, which it becomes when nothing has gone wrong.

    Raises:
      DataError: a name that TFDS does not take; a dataset of this name and version that exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(f"name {name!r}: a TFDS name is lower case letters, digits and underscores, a letter first")
    root = pathlib.Path(data_dir).expanduser().resolve() / name
    target = root / options.version
    if target.exists() and not options.overwrite:
        raise DataError(f"{target} exists: give another name or version, or --overwrite")
    root.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"incomplete.{options.version}_", dir=root))
    try:
        yield folder, target
        os.chmod(folder, 0o755)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(root.iterdir()):
            root.rmdir()
        raise


def open_writer(
    folder: pathlib.Path,
    name: str,
    options: Options,
    features: Any,
    description: str,
    *,
    episodes_per_shard: int,
    metadata: Mapping[str, Any],
) -> Any:
    """TFDS's sequential writer of a split "train"."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_builder

    identity = dataset_builder.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version(options.version),
        data_dir=str(folder),
        module_name=__name__,
        release_notes={options.version: "Converted."},
    )
    info = tfds.core.DatasetInfo(
        builder=identity, description=description, features=features, metadata=tfds.core.MetadataDict(metadata)
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=episodes_per_shard)
    writer.initialize_splits(["train"])
    return writer


class _Writer:
    def __init__(self, source: Source, name: str, folder: pathlib.Path, options: Options):
        self._source, self._name, self._folder = source, name, folder
        turned = getattr(source, "turned", ()) if options.turned is None else options.turned
        self._options, self._hz = dataclasses.replace(options, turned=turned), options.control_hz or source.control_hz
        self._first: Recording | None = None
        self._cameras: tuple[str, ...] | None = None  # of the dataset; None: not known yet
        self._tfds: Any = None

    def write(self, preview: Preview | None, advance: Callable[[int], Any]) -> Written:
        done = Written(str(self._folder))
        if self._options.missing_cameras == "mask":
            self._cameras = self._all_cameras()
        for number in range(len(self._source)):
            try:
                episode = self._episode(self._source.read(number), done.episodes, preview)
            except DataError as error:
                if not self._options.skip_broken:
                    raise
                done.broken.append(str(error))
                continue
            size = sum(len(f) for step in episode["steps"] for f in step["observation"].values() if type(f) is bytes)
            if self._tfds is None:
                self._tfds = self._open(max(1, SHARD_BYTES // max(1, size)))
            self._tfds.add_examples({"train": [episode]})
            done.episodes += 1
            done.steps += len(episode["steps"])
            done.bytes += size
            advance(len(episode["steps"]))
        if self._first is None:
            reasons = f": {done.broken[0]}" if done.broken else ""
            raise DataError(f"no episode to write ({len(done.broken)} broken){reasons}")
        self._tfds.close_all()
        done.cameras = self._cameras or ()
        done.vectors = {key: rows.shape[1] for key, rows in self._first.vectors.items()}
        done.action_dim = self._first.action.shape[1]
        return done

    def _all_cameras(self) -> tuple[str, ...]:
        """Cameras of any episode, in the order in which they appear; frames are not read."""
        cameras: dict[str, None] = {}
        for number in range(len(self._source)):
            try:
                cameras |= dict.fromkeys(self._source.read(number).cameras)
            except DataError:
                if not self._options.skip_broken:  # else it is left out, and listed, when it is written
                    raise
        return tuple(cameras)

    def _episode(self, recording: Recording, number: int, preview: Preview | None) -> dict[str, Any]:
        """The episode as TFDS's features want it, its frames encoded."""
        _check(recording)
        if self._first is not None:
            self._check_like_first(recording)
        cameras = tuple(recording.cameras) if self._cameras is None else self._cameras
        for option in ("bgr", "turned"):
            unknown = sorted(set(getattr(self._options, option)) - set(cameras))
            if unknown and self._first is None:
                raise DataError(f"{option}: no camera {unknown[0]!r}; {suggest(unknown[0], cameras)}")
        steps = len(recording.action)
        frames: dict[str, list[bytes]] = {}
        for camera in cameras:
            if camera not in recording.cameras:
                frames[camera] = [b""] * steps
                continue
            where = f"{recording.where}, camera {camera!r}"
            shown = preview.watch(number, camera, steps) if preview is not None else (lambda step, image: None)
            encoded = []
            for step, frame in enumerate(recording.cameras[camera]()):
                content, image = encoded_frame(frame, camera, self._options, where, step)
                encoded.append(content)
                shown(step, content if image is None else image)
            check_lengths(recording.where, steps, {camera: len(encoded)})
            frames[camera] = encoded
        if preview is not None:
            preview.caption(number, recording.instructions[0], steps)
        # Only an episode that was read to its end sets the pattern.
        self._first, self._cameras = self._first or recording, cameras
        times = recording.timestamps
        if times is None and self._hz:
            times = np.arange(steps) / self._hz
        rewards = recording.rewards
        if rewards is None:
            rewards = (np.arange(steps) == steps - 1).astype(np.float32)
        rows = []
        for t in range(steps):
            observation: dict[str, Any] = {camera: encoded[t] for camera, encoded in frames.items()}
            observation |= {key: values[t] for key, values in recording.vectors.items()}
            rows.append(
                {
                    "observation": observation,
                    "action": recording.action[t],
                    "language_instruction": recording.instructions[t],
                    **{key: texts[t] for key, texts in recording.texts.items()},
                    **({} if times is None else {"timestamp": float(times[t])}),
                    "is_first": t == 0,
                    "is_last": t == steps - 1,
                    "is_terminal": t == steps - 1,
                    "reward": float(rewards[t]),
                    "discount": float(t < steps - 1),
                }
            )
        return {"steps": rows, "episode_metadata": {"recording": recording.where, "number": number}}

    def _check_like_first(self, recording: Recording) -> None:
        first, where = self._first, recording.where
        assert first is not None and self._cameras is not None
        pattern = f"the first episode ({first.where})"
        if recording.action.shape[1] != first.action.shape[1]:
            raise DataError(
                f"{where}: actions have {recording.action.shape[1]} dimensions, in {pattern} {first.action.shape[1]}: "
                "one dataset has one action space; convert them apart"
            )
        mask = "--missing_cameras mask writes such episodes with empty frames, which training marks as missing"
        if missing := sorted(set(self._cameras) - recording.cameras.keys()):
            if self._options.missing_cameras == "error":
                raise DataError(f"{where}: no camera {missing[0]!r}, which {pattern} has. {mask}")
        if extra := sorted(recording.cameras.keys() - set(self._cameras)):
            raise DataError(f"{where}: a camera {extra[0]!r}, which {pattern} has not. For episodes without it, {mask}")
        if odd := sorted(set(recording.texts) ^ set(first.texts)):
            raise DataError(
                f"{where}: texts {odd[0]!r} are in some episodes and not in {pattern}, or the other way round"
            )
        if (recording.timestamps is None) != (first.timestamps is None):
            raise DataError(f"{where}: timestamps are in some episodes and not in {pattern}, or the other way round")
        mine, its = ({key: rows.shape[1] for key, rows in one.vectors.items()} for one in (recording, first))
        for key in sorted(mine.keys() | its.keys()):
            if mine.get(key) != its.get(key):
                here, usual = (f"{one[key]} dimensions" if key in one else "nothing" for one in (mine, its))
                raise DataError(f"{where}: {key!r} has {here}, in {pattern} {usual}")

    def _open(self, episodes_per_shard: int) -> Any:
        import tensorflow_datasets as tfds

        features, first, names = tfds.features, self._first, self._source.names
        assert first is not None and self._cameras is not None

        def numbers(key: str, rows: np.ndarray) -> Any:
            return features.Tensor(shape=rows.shape[1:], dtype=np.float32, doc=", ".join(names.get(key, ())) or None)

        observation = {
            camera: features.Image(shape=(None, None, 3), encoding_format=self._options.encoding)
            for camera in self._cameras
        }
        observation |= {key: numbers(key, rows) for key, rows in first.vectors.items()}
        step: dict[str, Any] = {
            "observation": observation,
            "action": numbers("action", first.action),
            "language_instruction": features.Text(),
            **{key: features.Text() for key in first.texts},
        }
        if first.timestamps is not None or self._hz:
            step["timestamp"] = features.Scalar(dtype=np.float64, doc="Seconds since the first step.")
        step |= {key: features.Scalar(dtype=np.bool_) for key in ("is_first", "is_last", "is_terminal")}
        step |= {key: features.Scalar(dtype=np.float32) for key in ("reward", "discount")}
        metadata = {"recording": features.Text(), "number": features.Scalar(dtype=np.int64)}
        return open_writer(
            self._folder,
            self._name,
            self._options,
            features.FeaturesDict({"steps": features.Dataset(step), "episode_metadata": metadata}),
            f"Demonstrations converted from {self._source.description}.",
            episodes_per_shard=episodes_per_shard,
            metadata={
                "control_hz": self._hz,
                "names": {key: list(value) for key, value in names.items()},
                "source": self._source.description,
            },
        )


def _check(recording: Recording) -> None:
    lengths: dict[str, int] = {key: len(rows) for key, rows in recording.vectors.items()}
    lengths |= {key: len(texts) for key, texts in recording.texts.items()}
    check_lengths(recording.where, len(recording.action), lengths)
    reserved = recording.cameras.keys() & recording.vectors.keys()
    if reserved:
        raise DataError(f"{recording.where}: {sorted(reserved)[0]!r} is both a camera and numbers")


def encoded_frame(
    frame: Frame, camera: str, options: Options, where: str, step: int
) -> tuple[bytes, np.ndarray | None]:
    """(bytes as stored, pixels if they were at hand) of one frame."""
    turned = camera in (options.turned or ())
    if isinstance(frame, bytes):
        kind = "jpeg" if frame[:2] == b"\xff\xd8" else "png" if frame[:4] == b"\x89PNG" else None
        if kind == options.encoding and options.image_size is None and camera not in options.bgr and not turned:
            return frame, None
        try:
            frame = np.asarray(Image.open(io.BytesIO(frame)).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where}: step {step} is not an image: {error}") from error
    if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
        raise DataError(f"{where}: step {step} is {frame.dtype} {frame.shape}; expected (h, w, 3) uint8")
    if camera in options.bgr:
        frame = frame[..., ::-1]
    if turned:
        frame = frame[::-1, ::-1]
    picture = Image.fromarray(np.ascontiguousarray(frame))
    if options.image_size is not None and frame.shape[:2] != tuple(options.image_size):
        height, width = options.image_size
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if options.encoding == "jpeg":
        picture.save(buffer, "JPEG", quality=options.quality)
    else:
        picture.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue(), np.asarray(picture)
