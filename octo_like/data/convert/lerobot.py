"""LeRobot datasets, format v3.0 (several episodes per parquet and mp4 file) and v2.0/v2.1 (one file per episode).

Read from their files: meta/info.json, the tables of tasks and episodes, parquet rows, mp4 frames by presentation time.
The lerobot package is not needed.
"""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from octo_like.data.convert import video
from octo_like.data.convert.recording import STEP_KEYS, Frame, Recording, as_rows, check_lengths, reader
from octo_like.data.spec import DataError, suggest

# Columns that say where a row belongs.
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
SUBTASK_INDEX = "subtask_index"
REWARD = "next.reward"
# The column in which annotations hold until others replace them, and the style of those that say what is being done.
PERSISTENT, SUBTASK = "language_persistent", "subtask"
ROUNDING = 1e-3  # seconds by which an annotation may begin after its frame: both are rounded


def _parquet() -> Any:
    return reader("pyarrow.parquet", "LeRobot datasets")


class LeRobot:
    """Episodes of a LeRobot dataset on disk; see `octo_like.data.convert.recording.Source`.

    `observation.state` becomes the vector `state`, `observation.images.front` the camera `front`; a frame is the one
    whose presentation time is the row's timestamp, after the offset of the episode in its file. Columns of texts stay
    texts of each step. What is being done becomes `subtask`: a column of that name, `subtask_index` with its table
    meta/subtasks, or of `language_persistent` (format v3.1) the annotations of style "subtask".

    Args:
      root: the folder that holds meta/, data/ and videos/.
      action_key: the column of the actions.
      tolerance: see `octo_like.data.convert.video.frames_at`.
      instruction: for rows whose task is empty.
      subtasks: the column of the sub-tasks, where more than one has some; None: the only one.
    """

    def __init__(
        self,
        root: str,
        *,
        action_key: str = "action",
        tolerance: float = video.TOLERANCE_S,
        instruction: str = "",
        subtasks: str | None = None,
    ):
        self._root, self._tolerance, self._instruction = pathlib.Path(root), tolerance, instruction
        path = self._root / "meta" / "info.json"
        if not path.is_file():
            raise DataError(f"{root}: not a LeRobot dataset: no meta/info.json")
        self._info = _json(path)
        version = str(self._info.get("codebase_version", "none"))
        if not version.startswith(("v2.", "v3.")):
            raise DataError(f"{path}: codebase_version is {version!r}; valid: v2.0, v2.1, v3.0")
        self._v3 = version.startswith("v3.")
        self.description = f"LeRobot {version}, robot {self._info.get('robot_type') or 'unknown'}"
        self.control_hz = float(self._info["fps"])
        self._cameras, self._vectors, self._texts, self.left_out = self._features(subtasks)
        if action_key not in self._vectors:
            numeric = [key for key in self._vectors if not key.startswith("observation")] or list(self._vectors)
            raise DataError(f"{path}: no actions {action_key!r}; {suggest(action_key, numeric)}")
        self._action = action_key
        names = {
            _short(key): _names(feature)
            for key, feature in self._info["features"].items()
            if key in self._vectors and key != action_key
        }
        names["action"] = _names(self._info["features"][action_key])
        self.names = {key: value for key, value in names.items() if value}
        self._tasks = self._read_table("tasks", "task")
        self._subtasks = self._read_table("subtasks", "subtask") if SUBTASK_INDEX in self._texts else {}
        self._episodes = self._read_episodes()
        self._cached: tuple[pathlib.Path, Any] | None = None

    def __len__(self) -> int:
        return len(self._episodes)

    def _features(self, subtasks: str | None) -> tuple[dict[str, str], list[str], list[str], list[str]]:
        """({column: "video" or "image"}, columns of numbers, columns of texts, what is left out)."""
        cameras, vectors, texts, left_out = {}, [], [], []
        for key, feature in self._info["features"].items():
            dtype, shape = feature["dtype"], tuple(feature["shape"])
            if key in INDEX_COLUMNS or key == REWARD:
                continue
            if dtype in ("video", "image"):
                about = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
                if about.get("video.is_depth_map") or about.get("is_depth_map"):
                    left_out.append(f"{key}: a depth map")
                else:
                    cameras[key] = dtype
            elif key in (PERSISTENT, SUBTASK_INDEX) or (dtype == "string" and _short(key) not in STEP_KEYS):
                texts.append(key)
            elif dtype in ("string", "language"):
                left_out.append(f"{key}: text; instructions come from the tasks")
            elif key.startswith("next."):
                left_out.append(f"{key}: belongs to the step after")
            elif len(shape) > 1:
                left_out.append(f"{key}: numbers of shape {shape}")
            else:
                vectors.append(key)
        twice = [key for key in texts if key in (PERSISTENT, SUBTASK_INDEX) or _short(key) == SUBTASK]
        if subtasks is not None and subtasks not in twice:
            raise DataError(f"{self._root}: no sub-tasks in a column {subtasks!r}; {suggest(subtasks, twice)}")
        if subtasks is None and len(twice) > 1:
            raise DataError(
                f"{self._root}: sub-tasks in more than one column: {', '.join(twice)}; choose one (--subtasks)"
            )
        others = [key for key in twice if subtasks is not None and key != subtasks]
        texts = [key for key in texts if key not in others]
        left_out += [f"{key}: sub-tasks, of which those of {subtasks} were chosen" for key in others]
        return cameras, vectors, texts, left_out

    def _read_table(self, table: str, what: str) -> dict[int, str]:
        """{number: text} of meta/tasks or meta/subtasks."""
        path = self._root / "meta" / f"{table}.parquet"
        if not self._v3 and not path.is_file():
            lines = _json_lines(path.with_suffix(".jsonl"))
            return {int(row[f"{what}_index"]): str(row[what]) for row in lines}
        rows = self._table(path).to_pylist()
        # The text is the table's index, which parquet keeps under a name of its own.
        return {int(row.pop(f"{what}_index")): str(next(v for v in row.values() if isinstance(v, str))) for row in rows}

    def _read_episodes(self) -> list[dict[str, Any]]:
        """Rows of the table of episodes, without their statistics."""
        if not self._v3:
            rows = list(_json_lines(self._root / "meta/episodes.jsonl"))
        else:
            rows = []
            files = sorted((self._root / "meta/episodes").glob("*/*.parquet"))
            if not files:
                raise DataError(f"{self._root}: no tables of episodes in meta/episodes")
            for path in files:
                columns = [c for c in self._columns(path) if not c.startswith("stats/")]
                rows += self._table(path, columns=columns).to_pylist()
        rows.sort(key=lambda row: row["episode_index"])
        total = self._info.get("total_episodes")
        if total is not None and total != len(rows):
            raise DataError(
                f"{self._root}: meta/info.json says {total} episodes, the table of episodes has {len(rows)}"
            )
        return rows

    def _columns(self, path: pathlib.Path) -> list[str]:
        return self._read(_parquet().read_schema, path).names

    def _table(self, path: pathlib.Path, **options: Any) -> Any:
        return self._read(_parquet().read_table, path, **options)

    @staticmethod
    def _read(function: Callable[..., Any], path: pathlib.Path, **options: Any) -> Any:
        import pyarrow

        try:
            return function(path, **options)
        except FileNotFoundError as error:
            raise DataError(f"{path}: the file is missing") from error
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from error

    def _data_path(self, row: dict[str, Any]) -> pathlib.Path:
        return self._root / self._info["data_path"].format(**self._place(row, "data"))

    def _place(self, row: dict[str, Any], prefix: str) -> dict[str, int]:
        """What the templates of paths are filled in with."""
        if self._v3:
            return {name: int(row[f"{prefix}/{name}"]) for name in ("chunk_index", "file_index")}
        number = int(row["episode_index"])
        return {"episode_index": number, "episode_chunk": number // int(self._info.get("chunks_size", 1000))}

    def _rows(self, row: dict[str, Any], path: pathlib.Path) -> Any:
        """The numbers of one episode; those of the last file are kept."""
        if self._cached is None or self._cached[0] != path:
            needed = [*self._vectors, *INDEX_COLUMNS, *self._texts]
            wanted = [*needed, REWARD]
            columns = set(self._columns(path))
            missing = [key for key in needed if key not in columns]
            if missing:
                raise DataError(f"{path}: no column {missing[0]!r}, which meta/info.json describes")
            self._cached = (path, self._table(path, columns=[key for key in wanted if key in columns]))
        table = self._cached[1]
        return table.filter(table["episode_index"].to_numpy() == int(row["episode_index"]))

    def read(self, number: int) -> Recording:
        """Episode `number`. Raises DataError naming the episode when it is not as its tables say."""
        row = self._episodes[number]
        path = self._data_path(row)
        where = f"{self._root}: episode {row['episode_index']}"
        table = self._rows(row, path)
        if len(table) != row["length"]:
            raise DataError(f"{where}: {path.name} has {len(table)} rows, the table of episodes says {row['length']}")
        check_lengths(where, len(table), {})
        frame_index = table["frame_index"].to_numpy().reshape(-1)
        if not np.array_equal(frame_index, np.arange(len(table))):
            raise DataError(f"{where}: frame_index is not 0, 1, 2, ...: rows are missing or out of order")
        times = table["timestamp"].to_numpy().reshape(-1).astype(np.float64)
        if (np.diff(times) <= 0).any():
            raise DataError(f"{where}: timestamps do not increase at row {int(np.argmax(np.diff(times) <= 0)) + 1}")
        unknown = set(table["task_index"].to_pylist()) - self._tasks.keys()
        if unknown:
            raise DataError(f"{where}: task_index {min(unknown)} is not among the tasks")
        vectors = {key: as_rows(_matrix(table[key], where, key), where, key) for key in self._vectors}
        for key, rows in vectors.items():
            width = int(np.prod(self._info["features"][key]["shape"]))
            if rows.shape[1] != width:
                raise DataError(f"{where}: {key!r} has {rows.shape[1]} dimensions, meta/info.json says {width}")
        return Recording(
            where=where,
            action=vectors.pop(self._action),
            vectors={_short(key): rows for key, rows in vectors.items()},
            cameras={
                _short(key): self._frames(row, key, kind, times, path, where) for key, kind in self._cameras.items()
            },
            instructions=tuple(self._tasks[i].strip() or self._instruction for i in table["task_index"].to_pylist()),
            timestamps=times - times[0],
            rewards=as_rows(_matrix(table[REWARD], where, REWARD), where, REWARD)[:, 0]
            if REWARD in table.column_names
            else None,
            texts=dict(self._text(table[key].to_pylist(), key, times, where) for key in self._texts),
        )

    def _text(self, cells: list[Any], key: str, times: np.ndarray, where: str) -> tuple[str, tuple[str, ...]]:
        """(name, T texts) of a column."""
        if key == SUBTASK_INDEX:
            if (unknown := next((i for i in cells if i is not None and i not in self._subtasks), None)) is not None:
                raise DataError(f"{where}: {key} {unknown} is not among the sub-tasks of meta/subtasks")
            return SUBTASK, tuple("" if i is None else self._subtasks[i] for i in cells)
        if key == PERSISTENT:
            return SUBTASK, tuple(
                _active(cell, time, f"{where}, {key} at step {step}")
                for step, (cell, time) in enumerate(zip(cells, times, strict=True))
            )
        texts = [cell[0] if isinstance(cell, list) and len(cell) == 1 else cell for cell in cells]
        if (odd := next((i for i, text in enumerate(texts) if not isinstance(text, str | None)), None)) is not None:
            raise DataError(f"{where}: {key!r} has no text at step {odd}, but {type(texts[odd]).__name__}")
        return _short(key), tuple(text or "" for text in texts)

    def _frames(self, row, key, kind, times, path, where):
        if kind == "image":
            return lambda: self._images(row, key, path, where)
        place = self._place(row, f"videos/{key}")
        file = str(self._root / self._info["video_path"].format(video_key=key, **place))
        start, end = (row.get(f"videos/{key}/{edge}_timestamp") for edge in ("from", "to"))
        return lambda: video.frames_at(
            file,
            times + (start or 0.0),
            start=start,
            end=end,
            where=f"{where}, camera {_short(key)!r}",
            tolerance=self._tolerance,
        )

    def _images(self, row, key, path, where) -> Iterator[Frame]:
        """Images that are stored in the table itself, or in files that it names."""
        number = int(row["episode_index"])
        column = self._table(path, columns=[key], filters=[("episode_index", "==", number)])[key]
        for step, cell in enumerate(column.to_pylist()):
            if cell and cell.get("bytes"):
                yield cell["bytes"]
            elif cell and cell.get("path") and (self._root / cell["path"]).is_file():
                yield (self._root / cell["path"]).read_bytes()
            else:
                raise DataError(f"{where}: step {step} has no image of camera {_short(key)!r}")


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _json_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: line {number} is not JSON: {error}") from error


def _short(key: str) -> str:
    """observation.images.front -> front, observation.state -> state, observation.environment_state -> ..."""
    for prefix in ("observation.images.", "observation."):
        key = key.removeprefix(prefix)
    return key.replace(".", "_")


def _active(cell: Any, time: float, where: str) -> str:
    """The newest sub-task among annotations ({"style", "content", "timestamp", ...}) that have begun; "" for none."""
    rows = cell or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "style" in row for row in rows):
        raise DataError(f"{where}: expected a list of annotations with style, content and timestamp, got {cell!r:.80}")
    begun = [row for row in rows if row["style"] == SUBTASK and (row.get("timestamp") or 0.0) <= time + ROUNDING]
    newest = max(begun, key=lambda row: row.get("timestamp") or 0.0, default=None)
    return "" if newest is None else str(newest.get("content") or "")


def _names(feature: dict[str, Any]) -> tuple[str, ...]:
    """Names of the dimensions; the format has lists, and groups of lists."""
    names = feature.get("names")
    if isinstance(names, dict):
        groups = [value for value in names.values() if isinstance(value, list)]
        names = [name for group in groups for name in group] or list(names)
    width = int(np.prod(feature["shape"]))
    return tuple(map(str, names)) if isinstance(names, list) and len(names) == width else ()


def _matrix(column: Any, where: str, key: str) -> np.ndarray:
    """A parquet column of numbers or of lists of numbers."""
    import pyarrow.compute

    values = column.combine_chunks()
    if "list" not in str(values.type):
        return values.to_numpy(zero_copy_only=False)
    widths = pyarrow.compute.list_value_length(values).to_numpy(zero_copy_only=False)
    odd = np.flatnonzero(widths != widths[0])
    if len(odd):
        raise DataError(f"{where}: {key!r} has {widths[odd[0]]} dimensions at step {odd[0]}, {widths[0]} before")
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
