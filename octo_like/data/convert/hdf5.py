"""Episodes in HDF5: one file per episode (as ALOHA records) or many in one file (as robomimic and LIBERO do)."""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from octo_like.data.convert.recording import Frame, Recording, as_rows, check_lengths, natural, reader
from octo_like.data.spec import DataError, suggest

ENDINGS = (".hdf5", ".h5")
OBSERVATIONS = ("observations", "obs", "observation")
ACTIONS = ("action", "actions")
TEXTS = ("language_instruction", "instruction", "language_raw", "task", "lang")
REWARDS = ("rewards", "reward")
# How LIBERO's own files are known: by what they say of their task, or by the names of its cameras.
LIBERO_ATTRIBUTES = ("problem_info", "bddl_file_name")
LIBERO_CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")


class Hdf5:
    """Episodes of HDF5 files; see `octo_like.data.convert.recording.Source`.

    A file with a group `data` holds an episode in each of its groups (demo_0, demo_1, ...); any other file is one. An
    episode has `action` or `actions` (T, A) and a group `observations` or `obs`. In that, (T, h, w, 3) uint8 arrays are
    cameras, and so are rows of compressed images, (T, n) uint8 or (T,) bytes; numbers of shape (T,) or (T, D) are
    vectors. The instruction is an attribute or a dataset of the episode (`language_instruction`, `instruction`,
    `task`), or LIBERO's problem_info, or the argument.

    Attributes:
      turned: cameras whose frames everybody else has turned by 180 degrees: LIBERO's are stored as its simulator gives
        them, while OpenVLA's RLDS datasets and openpi's client have them turned.

    Args:
      root: a file, or a folder of *.hdf5 and *.h5.
      action_key: the dataset of the actions, when it has another name.
      instruction: for episodes that have none.
    """

    def __init__(self, root: str, *, action_key: str | None = None, instruction: str = ""):
        self._h5py = reader("h5py", "HDF5")
        path = pathlib.Path(root)
        if path.is_dir():
            files = sorted((p for p in path.rglob("*") if p.suffix in ENDINGS), key=lambda p: natural(str(p)))
        else:
            files = [path]
        if not files or not files[0].is_file():
            raise DataError(f"{root}: no HDF5 files (*.hdf5, *.h5)")
        self._action_key, self._instruction = action_key, instruction
        self.control_hz: float | None = None
        self.names: dict[str, tuple[str, ...]] = {}
        self._left_out: dict[str, None] = {}
        self._episodes: list[tuple[pathlib.Path, str]] = []
        turned: dict[str, None] = {}
        for file in files:
            with self._open(file) as content:
                groups = [f"data/{name}" for name in content["data"]] if self._is_collection(content) else ["/"]
                self._episodes += [(file, group) for group in sorted(groups, key=natural)]
                if self._is_collection(content):
                    self.control_hz = _control_hz(content["data"].attrs) or self.control_hz
                    turned |= dict.fromkeys(_libero_cameras(content["data"]))
        self.description = f"HDF5, {len(files)} file(s)"
        self.turned = tuple(turned)

    def __len__(self) -> int:
        return len(self._episodes)

    @property
    def left_out(self) -> list[str]:
        return list(self._left_out)

    @staticmethod
    def _is_collection(content: Any) -> bool:
        return "data" in content and hasattr(content["data"], "keys")

    def _open(self, path: pathlib.Path) -> Any:
        try:
            return self._h5py.File(path, "r")
        except OSError as error:
            raise DataError(f"{path}: cannot be read as HDF5: {error}") from error

    def read(self, number: int) -> Recording:
        """Episode `number`. Frames are read from the file one by one when they are asked for."""
        path, group = self._episodes[number]
        with self._open(path) as content:
            return self._recording(path, content, content[group], group)

    def _recording(self, path: pathlib.Path, content: Any, episode: Any, group: str) -> Recording:
        where = str(path) if group == "/" else f"{path}: {group.removeprefix('data/')}"
        key = self._action_key or next((name for name in ACTIONS if name in episode), None)
        if key is None or key not in episode:
            raise DataError(f"{where}: no actions {key or ' or '.join(ACTIONS)}; {suggest(str(key), episode)}")
        holder: Any = next((name for name in OBSERVATIONS if name in episode), None)
        if holder is None:
            raise DataError(f"{where}: no group {' or '.join(OBSERVATIONS)}; it holds: {', '.join(episode)}")
        action = as_rows(episode[key][()], where, key)
        cameras, vectors, lengths = {}, {}, {}
        for name, data in _datasets(episode[holder]):
            short = _short(name)
            kind = _kind(name, data)
            if kind is None:
                self._left_out[f"{name}: {data.dtype} of shape {('T', *data.shape[1:])}"] = None
                continue
            lengths[short] = len(data)
            if kind == "numbers":
                vectors[short] = as_rows(data[()], where, short)
            else:
                cameras[short] = functools.partial(self._frames, path, data.name, kind, f"{where}, camera {short!r}")
        rewards = next((name for name in REWARDS if name in episode), None)
        check_lengths(where, len(action), lengths)
        return Recording(
            where=where,
            action=action,
            vectors=vectors,
            cameras=cameras,
            instructions=(self._text(content, episode),) * len(action),
            rewards=None if rewards is None else as_rows(episode[rewards][()], where, rewards)[:, 0],
        )

    def _frames(self, path: pathlib.Path, name: str, kind: str, where: str) -> Iterator[Frame]:
        """The frames of one dataset, read one at a time."""
        with self._open(path) as content:
            data = content[name]
            for step in range(len(data)):
                row = data[step]
                if kind == "raw":
                    yield row
                    continue
                # Compressed frames are padded with zeros to the longest one. A JPEG ends in FF D9.
                encoded = row.tobytes() if isinstance(row, np.ndarray) else bytes(row)
                if not encoded.strip(b"\0"):
                    raise DataError(f"{where}: step {step} has no image")
                yield encoded.rstrip(b"\0") if encoded[:2] == b"\xff\xd8" else encoded

    def _text(self, content: Any, episode: Any) -> str:
        for holder in (episode, content):
            for key in TEXTS:
                for place in (holder.attrs, holder):
                    if key in place:
                        value = place[key]
                        text = _as_text(value[()] if hasattr(value, "shape") and hasattr(value, "file") else value)
                        if text:
                            return text
        if self._is_collection(content) and "problem_info" in content["data"].attrs:
            info = json.loads(_as_text(content["data"].attrs["problem_info"]) or "{}")
            text = info.get("language_instruction", "")
            return ("".join(text) if isinstance(text, list) else str(text)).strip(' "') or self._instruction
        return self._instruction


def _as_text(value: Any) -> str:
    """A string however HDF5 holds it: bytes, str, or an array with one of these; "" for anything else."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size else ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value.strip() if isinstance(value, str) else ""


def _control_hz(attributes: Any) -> float | None:
    """robomimic writes the arguments of its environment as JSON."""
    try:
        arguments = json.loads(_as_text(attributes.get("env_args", "")) or "{}")
        return float(arguments["env_kwargs"]["control_freq"])
    except (KeyError, TypeError, ValueError):
        return None


def _libero_cameras(data: Any) -> list[str]:
    """Cameras of a file's first episode, if LIBERO wrote it."""
    episode = data[min(data, key=natural)] if len(data) else {}
    holder: Any = next((episode[name] for name in OBSERVATIONS if name in episode), {})
    cameras = [_short(name) for name, item in _datasets(holder) if _kind(name, item) in ("raw", "compressed")]
    known = any(key in data.attrs for key in LIBERO_ATTRIBUTES) or any(camera in LIBERO_CAMERAS for camera in cameras)
    return cameras if known else []


def _short(name: str) -> str:
    """What a dataset of observations is called in the written one."""
    return name.removeprefix("images/").replace("/", "_")


def _datasets(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in group.items():
        if hasattr(item, "keys"):
            yield from _datasets(item, f"{prefix}{name}/")
        else:
            yield prefix + name, item


def _kind(name: str, data: Any) -> str | None:
    """How a dataset of observations is read: "raw" or "compressed" frames, "numbers", or not at all (None)."""
    named_image = "image" in name or "rgb" in name
    if data.dtype == np.uint8 and data.ndim == 4 and data.shape[-1] == 3:
        return "raw"
    if named_image and (data.dtype == np.uint8 and data.ndim == 2 or data.dtype.kind in "OSV" and data.ndim == 1):
        return "compressed"
    if data.ndim in (1, 2) and data.dtype.kind in "fiub":
        return "numbers"
    return None
