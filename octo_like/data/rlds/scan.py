"""One pass over the records of one TFRecord file: a summary of every episode, and a list of those that are bad.

Bad is what cannot be read, and what can be read but not used: numbers that are not finite, leaves of unequal length. An
episode that the user's filter refuses as a whole is never bad: it is as if it were not there.

A record whose checksum fails is stepped over by the length in its header, which has a checksum of its own. When that
fails too, or the file ends early, nothing says where the next record begins: the rest of the file is lost.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from octo_like.common.storage import may_pass, persistently
from octo_like.data.rlds import columns, records
from octo_like.data.rlds.records import EpisodeFunction, RldsSplit
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf

COLUMNS = {
    "record": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "record_hash": np.int64,
    "raw_steps": np.int32,
    "steps": np.int32,
    "has_text": bool,  # (texts,) each
    "picture_bytes": np.int32,  # (pictures,) each
}
PARTS = "parts"  # folder of the summaries, below that of the index


@dataclasses.dataclass
class FileSummary:
    """What one pass over a file found.

    Attributes:
      episodes: one array per entry of COLUMNS, one value per readable episode.
      usable: (steps,) bool, of the user's filter, all episodes after each other.
      rows: (steps, width) float32, standardised values of all steps (see `columns.py`).
      instructions: key of a text -> instruction -> number of episodes that have it
        and that the user's filter does not refuse.
      damaged: one message per record that cannot be read or used.
    """

    episodes: dict[str, np.ndarray]
    usable: np.ndarray
    rows: np.ndarray
    instructions: dict[str, dict[str, int]]
    damaged: list[str]

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        text = json.dumps({"instructions": self.instructions, "damaged": self.damaged})
        episodes: dict[str, Any] = {**self.episodes}  # NumPy's stub takes named arrays for its flag `allow_pickle`
        np.savez(buffer, usable=self.usable, rows=self.rows, text=np.array(text), **episodes)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> FileSummary:
        with np.load(io.BytesIO(content)) as arrays:
            text = json.loads(str(arrays["text"]))
            return cls({key: arrays[key] for key in COLUMNS}, arrays["usable"], arrays["rows"], **text)


def part_name(number: int) -> str:
    """File of the summary of TFRecord file `number`, in `parts/`."""
    return f"{number:05d}.npz"


def bad_name(number: int) -> str:
    """In its place when some records are bad: it says that the file was read by this pass."""
    return f"{number:05d}.bad"


# ---------------------------------------------------------------- the format


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # the Castagnoli polynomial, reflected
        table.append(byte)
    return table


_CRC_TABLE = _crc32c_table()


def masked_crc32c(content: bytes) -> int:
    """Checksum of the TFRecord format: CRC-32C, rotated right by 15 bits plus a constant. For a few bytes."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record_length(path: str, offset: int, file_bytes: int) -> int | None:
    """Length of the record at a byte offset; None when its header is damaged or the file ends before its end."""

    def read() -> bytes:
        with tf.io.gfile.GFile(path, "rb") as file:
            file.seek(offset)
            return file.read(records.HEADER_BYTES)

    header = persistently(read, path)
    if len(header) < records.HEADER_BYTES or masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
        return None
    length = int.from_bytes(header[:8], "little")
    return length if offset + records.HEADER_BYTES + length + records.FOOTER_BYTES <= file_bytes else None


# ---------------------------------------------------------------- the pass


def indexed_keys(function: EpisodeFunction) -> tuple[list[str], list[str]]:
    """(keys of texts, keys of pictures), in the order in which an index has them."""
    outputs = traced_summary(function).get_concrete_function().structured_outputs
    return sorted(outputs["texts"]), sorted(outputs["picture_bytes"])


@functools.lru_cache(maxsize=64)
def traced_summary(function: EpisodeFunction) -> tf.types.experimental.PolymorphicFunction:
    """`_summary` as a graph that all files of a dataset share: tracing it takes longer than reading a small file."""
    signature = [tf.TensorSpec([], tf.string)]
    summary = tf.function(lambda record: _summary(record, function), input_signature=signature, autograph=False)
    summary.get_concrete_function()
    return summary


def _summary(serialized: tf.Tensor, function: EpisodeFunction) -> dict[str, Any]:
    episode, texts, pictures = function.indexed(serialized)
    return {
        "length": tf.strings.length(serialized),
        "hash": episode["hash"],
        "raw_steps": episode["raw_steps"],
        "usable": episode["usable"],
        "action": episode["action"],
        "proprio": episode.get("proprio", tf.zeros([tf.shape(episode["action"])[0], 0])),
        "extras": episode["extras"],
        "texts": {key: tf.unique(text)[0] for key, text in texts.items()},
        "picture_bytes": pictures,
        # Leaves that a user's function cut differently are found by these, before training starts.
        "lengths": {
            **{f"camera {slot}": tf.shape(image)[0] for slot, image in episode["images"].items()},
            **{f"depth of {slot}": tf.shape(depth)[0] for slot, depth in episode["depths"].items()},
            **{f"sensor {name}": tf.shape(values)[0] for name, values in episode["extras"].items()},
            **{key: tf.shape(episode[key])[0] for key in ("proprio", "language", "target", "usable") if key in episode},
        },
    }


class _Cursor:
    """The summaries of a file's records in turn: streamed, and record by record from the first bad one on."""

    def __init__(self, path: str, file_bytes: int, function: EpisodeFunction):
        self._path, self._bytes, self._function = path, file_bytes, function
        self._offset = 0
        self._stream: Any = None
        self._single: Any = None

    def next(self) -> dict[str, Any]:
        """The summary of the next record, with its "offset". StopIteration at the end; tf.errors.* when it is bad."""
        if self._single is not None:
            return self._taken(self._single(self._path, tf.constant(self._offset, tf.int64)))
        if self._stream is None:
            records = tf.data.TFRecordDataset(self._path, buffer_size=8 << 20)
            summary = traced_summary(self._function)
            call = tf.autograph.experimental.do_not_convert(lambda record: summary(record))
            self._stream = iter(records.map(call).prefetch(2))
        return self._taken(next(self._stream))

    def _taken(self, item: dict[str, Any]) -> dict[str, Any]:
        item = tf.nest.map_structure(lambda x: x.numpy(), item) | {"offset": self._offset}
        self._offset += int(item["length"]) + records.HEADER_BYTES + records.FOOTER_BYTES
        return item

    @property
    def offset(self) -> int:
        """Byte at which the next record begins."""
        return self._offset

    def retry(self) -> None:
        """Goes on with the same record, now by itself."""
        summary = traced_summary(self._function)
        self._single = tf.function(
            lambda path, offset: summary(records.read_record(path, offset)),
            input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int64)],
            autograph=False,
        )

    def skip(self) -> bool:
        """Steps over the next record, if there is a way to know where it ends."""
        length = record_length(self._path, self._offset, self._bytes)
        if length is None:
            return False
        self.retry()
        self._offset += length + records.HEADER_BYTES + records.FOOTER_BYTES
        return True

    def at_end(self) -> bool:
        return self._single is not None and self._offset == self._bytes


def scan_file(split: RldsSplit, number: int, function: EpisodeFunction, advance: Callable[[int], Any]) -> FileSummary:
    """Summary of file `number` of a split. `advance(1)` is called for every record.

    Raises:
      DataError: more episodes than the dataset says.
      StorageError: the storage does not answer.
    """
    path, expected = split.files[number], split.shard_lengths[number]
    if split.file_bytes[number] < 0:
        advance(expected)
        return _collect([], [f"{path}: the file is missing, with episodes 0 to {expected - 1}"] * expected, function)
    episodes: list[dict[str, Any]] = []
    damaged: list[str] = []
    record = 0
    cursor = _Cursor(path, split.file_bytes[number], function)

    def following() -> dict[str, Any] | None:
        """The next record, None at the end."""
        try:
            return cursor.next()
        except StopIteration:
            return None
        except Exception as error:
            if may_pass(error):
                cursor.retry()
            raise

    while not cursor.at_end():
        try:
            item = persistently(following, f"{path} (byte {cursor.offset})")
        except records.damage_errors() as error:
            damaged.append(str(records.damaged(path, record, cursor.offset, error)))
            if cursor.skip():
                record += 1
                advance(1)
                continue
            lost = max(1, expected - record)
            damaged += [f"{path}: episode {record + i} is lost behind it" for i in range(1, lost)]
            record += lost
            advance(lost)
            break
        if item is None:
            break
        item["record"] = record
        problem = None if _refused(item) else _problem(item, function.spec)
        if problem is None:
            episodes.append(item)
        else:
            damaged.append(f"{path}: episode {record}: {problem}")
        record += 1
        advance(1)
    says = f"{path}: {record} episodes, but {records.INFO_FILE} says {expected}"
    if record > expected:
        raise DataError(f"{says}: not from this build")
    damaged += [f"{says}: truncated, or not from this build"] * (expected - record)
    return _collect(episodes, damaged, function)


def _refused(item: dict[str, Any]) -> bool:
    """Whether the user's filter leaves no step of an episode that has some."""
    return len(item["usable"]) > 0 and not item["usable"].any()


def _problem(item: dict[str, Any], spec: DatasetSpec) -> str | None:
    """Why an episode cannot be used; None: it can."""
    steps = len(item["action"])
    wrong = [f"{key} has {count}" for key, count in item["lengths"].items() if count != steps]
    if wrong:
        return f"action has {steps} steps, but {', '.join(wrong)}"
    checked: list[tuple[str, str | None, np.ndarray]] = [
        ("action", spec.action_key, item["action"]),
        ("proprio", ", ".join(spec.proprio_keys), item["proprio"]),
    ]
    checked += [(key, spec.extra_keys[key], values) for key, values in item["extras"].items()]
    for key, name, values in checked:
        bad = records.non_finite(values)
        if bad is not None:
            return f"{key} ({name!r}) is {values[bad]} at step {bad[0]}, dimension {bad[-1]}"
    return None


def _collect(episodes: list[dict[str, Any]], damaged: list[str], function: EpisodeFunction) -> FileSummary:
    values: dict[str, list] = {key: [] for key in COLUMNS}
    rows, usable = [np.zeros((0, columns.width(function)), np.float32)], [np.zeros(0, bool)]
    text_keys, picture_keys = indexed_keys(function)
    instructions: dict[str, collections.Counter[str]] = {key: collections.Counter() for key in text_keys}
    for item in episodes:
        steps = len(item["action"])
        texts = {key: item["texts"][key].tolist() for key in text_keys}
        values["steps"].append(steps)
        values["record_hash"].append(item["hash"])
        values["has_text"].append([any(text.strip() for text in texts[key]) for key in text_keys])
        values["picture_bytes"].append([item["picture_bytes"][key] for key in picture_keys])
        for key in ("record", "offset", "length", "raw_steps"):
            values[key].append(item[key])
        if _refused(item):  # its leaves may be of any length, and its numbers anything
            rows.append(np.zeros((steps, columns.width(function)), np.float32))
            usable.append(np.zeros(steps, bool))
            continue
        rows.append(columns.to_rows(item, function))
        usable.append(item["usable"])
        for key in text_keys:
            instructions[key].update(text.decode("utf-8", "replace") for text in texts[key])
    widths = {"has_text": (len(text_keys),), "picture_bytes": (len(picture_keys),)}
    return FileSummary(
        {
            key: np.array(values[key], dtype).reshape(len(episodes), *widths.get(key, ()))
            for key, dtype in COLUMNS.items()
        },
        np.concatenate(usable),
        np.concatenate(rows),
        {key: dict(counts) for key, counts in instructions.items()},
        damaged,
    )
