"""A folder of .npz files, one per episode: the format for recordings that have none."""

import functools
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np

from octo_like.data.convert.recording import Frame, Recording, as_rows, check_lengths, natural
from octo_like.data.spec import DataError, suggest

ACTIONS = ("action", "actions")
TEXTS = ("instruction", "language_instruction", "task")
TIMES = ("timestamp", "timestamps")
REWARDS = ("reward", "rewards")


class Npz:
    """Episodes of .npz files; see `octo_like.data.convert.recording.Source`.

    `action` (T, A); any (T, h, w, 3) uint8 array is a camera, any other numbers of T rows are a vector; `instruction`
    is a text or one per step, `timestamp` (T,) seconds. Scalars are left out, other lengths than T are errors.

    Args:
      root: the folder.
      action_key: the array of the actions, when it has another name.
      instruction: for episodes that have none.
    """

    description = "NumPy archives"

    def __init__(self, root: str, *, action_key: str | None = None, instruction: str = ""):
        path = pathlib.Path(root)
        self._files = sorted(path.glob("*.npz"), key=lambda p: natural(p.name)) if path.is_dir() else [path]
        if not self._files or not self._files[0].is_file():
            raise DataError(f"{root}: no *.npz files")
        self._action_key, self._instruction = action_key, instruction
        self.control_hz = None
        self.names: dict[str, tuple[str, ...]] = {}
        self._left_out: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._files)

    @property
    def left_out(self) -> list[str]:
        return list(self._left_out)

    def read(self, number: int) -> Recording:
        """Episode `number`. Frames are read when they are asked for, one camera at a time."""
        path = self._files[number]
        try:
            with np.load(path, allow_pickle=False) as content:
                return self._recording(str(path), content)
        except DataError:
            raise
        except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error

    def _recording(self, where: str, content: np.lib.npyio.NpzFile) -> Recording:
        key = self._action_key or next((name for name in ACTIONS if name in content), None)
        if key is None or key not in content:
            raise DataError(f"{where}: no actions {key or ' or '.join(ACTIONS)}; {suggest(str(key), content.files)}")
        action = as_rows(content[key], where, key)
        special = {name: next((k for k in keys if k in content), None)
                   for name, keys in (("text", TEXTS), ("time", TIMES), ("reward", REWARDS))}  # fmt: skip
        cameras, vectors, lengths = {}, {}, {}
        for name in content.files:
            if name == key or name in special.values():
                continue
            shape, dtype = _header(content, name)
            if not shape:
                self._left_out[f"{name}: a single value"] = None
            elif dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3:
                cameras[name] = functools.partial(_frames, where, name)
                lengths[name] = shape[0]
            elif len(shape) <= 2 and dtype.kind in "fiub":
                lengths[name] = shape[0]
                if shape[0] == len(action):
                    vectors[name] = as_rows(content[name], where, name)
            else:
                self._left_out[f"{name}: {dtype} of shape {('T', *shape[1:])}"] = None
        check_lengths(where, len(action), lengths)
        texts = self._texts(where, content, special["text"], len(action))
        times = rewards = None
        if special["time"] is not None:
            times = np.asarray(content[special["time"]], np.float64).reshape(-1)
            check_lengths(where, len(action), {special["time"]: len(times)})
            if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
                raise DataError(f"{where}: {special['time']!r} does not increase")
            times = times - times[0]
        if special["reward"] is not None:
            rewards = as_rows(content[special["reward"]], where, special["reward"])[:, 0]
        return Recording(where, action, vectors, cameras, texts, times, rewards)

    def _texts(self, where: str, content, key: str | None, steps: int) -> tuple[str, ...]:
        given = np.array(self._instruction) if key is None else content[key]
        if given.dtype.kind not in "US":
            raise DataError(f"{where}: {key!r} is {given.dtype}, not text")
        texts = [t.decode("utf-8") if isinstance(t, bytes) else str(t) for t in given.reshape(-1).tolist()]
        if len(texts) == 1:
            texts *= steps
        check_lengths(where, steps, {str(key): len(texts)})
        return tuple(text.strip() or self._instruction for text in texts)


def _header(content: np.lib.npyio.NpzFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an array without reading it."""
    assert content.zip is not None, "the archive is open"
    with content.zip.open(name if name.endswith(".npy") else f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def _frames(path: str, name: str) -> Iterator[Frame]:
    with np.load(path, allow_pickle=False) as content:
        yield from content[name]
