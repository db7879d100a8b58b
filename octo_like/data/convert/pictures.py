"""Pictures with questions and answers, as vision-language projects keep them, to RLDS: episodes of one step.

A file of JSON lines, or one with a JSON list, and a folder of images:

    {"image": "a.jpg", "prompt": "what is on the table?", "answer": "a red block"}
    {"image": "b.jpg", "conversations": [{"from": "human", "value": "<image>\\nwhat colour is it?"},
                                         {"from": "gpt", "value": "red"}]}

Each pair of a human's and an assistant's turns of a conversation becomes a row of its own, without those before it.
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from octo_like.common import location_tokens
from octo_like.data.convert.preview import Preview
from octo_like.data.convert.write import Options, encoded_frame, open_writer, whole_or_nothing
from octo_like.data.spec import DataError, suggest

PROMPTS = ("prompt", "question", "instruction")
ANSWERS = ("answer", "response")
HUMANS, ASSISTANTS = ("human", "user"), ("gpt", "assistant")
READ = {"image", "conversations", "kind", *PROMPTS, *ANSWERS}
PLACES = ("point", "points", "box", "boxes", "bbox", "bboxes")  # fields whose numbers would be lost
IMAGE_TAG = "<image>"
ROWS_PER_SHARD = 20_000


@dataclasses.dataclass(frozen=True)
class Row:
    """A question about a picture.

    Attributes:
      where: file and line (or number in the list), for messages.
      image: file of the picture.
      prompt, answer: not empty; places are location tokens.
      kind: of question; "" when the file does not say.
    """

    where: str
    image: pathlib.Path
    prompt: str
    answer: str
    kind: str


class Pictures:
    """Rows of the .jsonl and .json files of a folder, or of one such file; images are below the folder.

    Attributes:
      broken: with `skip_broken` a message for each entry that is left out, with all its pairs.
      unread: {name of a field that means nothing here: entries that have it}.

    Raises:
      DataError: naming file and line: no such files, broken JSON, no or an empty prompt or answer, an image that is
        missing or outside of the folder, something that looks like a location token and is none, places as numbers.
        With `skip_broken` only: no rows at all, or a file that cannot be read.
    """

    description = "pictures with questions and answers"

    def __init__(self, root: str, *, skip_broken: bool = False):
        self.broken: list[str] = []
        self.unread: collections.Counter[str] = collections.Counter()
        path = pathlib.Path(root)
        self._folder = (path if path.is_dir() else path.parent).resolve()
        files = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".json")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{root}: no *.jsonl or *.json files")
        self.rows: list[Row] = []
        for where, entry in (found for file in files for found in _entries(file)):
            try:
                self.rows += list(self._of(where, entry))
                self.unread.update(set(entry) - READ)
            except DataError as error:
                if not skip_broken:
                    raise
                self.broken.append(str(error))
        if not self.rows:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{root}: no rows in {names}" + "".join(f"; {one}" for one in self.broken[:1]))

    def __len__(self) -> int:
        return len(self.rows)

    def _of(self, where: str, entry: Any) -> Iterator[Row]:
        if isinstance(entry, DataError):
            raise entry
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected an object with an image, got {type(entry).__name__}")
        if numbers := [name for name in PLACES if name in entry]:
            raise DataError(
                f"{where}: {numbers[0]!r} would be lost: say places in the answer, as location tokens "
                f"(octo_like.common.location_tokens), e.g. {location_tokens.encode_point(0.25, 0.5)!r} for the point a "
                "quarter down and half across"
            )
        image = self._image(where, entry)
        kind = _text(where, entry.get("kind", ""), "kind", empty=True)
        if "conversations" in entry:
            for number, (prompt, answer) in enumerate(_turns(where, entry["conversations"])):
                pair = f"{where}, pair {number + 1}"
                yield self._row(pair, image, prompt, answer, kind)
            return
        prompt, answer = (_field(where, entry, names) for names in (PROMPTS, ANSWERS))
        yield self._row(where, image, prompt, answer, kind)

    def _row(self, where: str, image: pathlib.Path, prompt: Any, answer: Any, kind: str) -> Row:
        texts = []
        for what, text in (("prompt", prompt), ("answer", answer)):
            text = _text(where, text, what)
            try:
                location_tokens.check(text)
            except ValueError as error:
                raise DataError(f"{where}: {what}: {error}") from error
            texts.append(text)
        return Row(where, image, texts[0], texts[1], kind)

    def _image(self, where: str, entry: dict[str, Any]) -> pathlib.Path:
        if "image" not in entry:
            raise DataError(f"{where}: no 'image'; it has {', '.join(map(repr, entry)) or 'nothing'}")
        name = _text(where, entry["image"], "image")
        path = pathlib.Path(os.path.normpath(self._folder / name))  # links are followed, .. is not
        if not path.is_relative_to(self._folder):
            raise DataError(f"{where}: the image {name!r} is outside of the folder {self._folder}")
        if not path.is_file():
            raise DataError(f"{where}: there is no image {name!r} in {self._folder}")
        return path


def _entries(file: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """(file and line, what is there) of every entry; a DataError where it is no JSON."""
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if content.lstrip().startswith("["):
        try:
            entries = json.loads(content)
        except json.JSONDecodeError as error:
            where = f"{file}, line {error.lineno}"
            yield where, DataError(f"{where}: broken JSON: {error.msg}")
            return
        yield from ((f"{file}, entry {number}", entry) for number, entry in enumerate(entries))
        return
    if file.suffix == ".json" and isinstance(one := _parsed(content), dict):  # over several lines, it may be
        yield f"{file}, line 1", one
        return
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            entry = DataError(f"{where}: broken JSON: {error.msg} (column {error.colno})")
        yield where, entry


def _parsed(content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        return None


def _field(where: str, entry: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The one field of an entry that has one of these names."""
    given = [name for name in names if name in entry]
    if len(given) != 1:
        found = f"both {given[0]!r} and {given[1]!r}" if given else f"no {names[0]!r}"
        raise DataError(f"{where}: {found}; {suggest(names[0], entry)}, or 'conversations'")
    return entry[given[0]]


def _text(where: str, value: Any, what: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is {type(value).__name__}, not text")
    text = " ".join(value.replace(IMAGE_TAG, " ").split())
    if not text and not empty:
        raise DataError(f"{where}: the {what} is empty")
    return text


def _turns(where: str, turns: Any) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of a conversation in LLaVA's form."""
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise DataError(f"{where}: 'conversations' are pairs of turns, the human's first")
    for number, turn in enumerate(turns):
        speakers = HUMANS if number % 2 == 0 else ASSISTANTS
        if not isinstance(turn, dict) or turn.get("from") not in speakers or "value" not in turn:
            raise DataError(f"{where}: turn {number + 1} is {turn!r}; expected 'from' {speakers[0]!r} and a 'value'")
    for human, assistant in zip(turns[::2], turns[1::2], strict=True):
        yield human["value"], assistant["value"]


@dataclasses.dataclass
class WrittenPictures:
    """What was written: DATA_DIR/name/version, its rows, and one message for each row or entry that was left out."""

    directory: str
    rows: int = 0
    bytes: int = 0
    broken: list[str] = dataclasses.field(default_factory=list)


def write_pictures(
    source: Pictures,
    data_dir: str,
    name: str,
    *,
    options: Options = Options(),  # noqa: B008  (frozen)
    preview: Preview | None = None,
    advance: Callable[[int], Any] = lambda steps: None,
) -> WrittenPictures:
    """Writes DATA_DIR/name/version, which appears when everything is in it. The schema is that of `tabletop_words`.

    Raises:
      DataError: an image that cannot be read; a dataset of this name and version that exists.
    """
    with whole_or_nothing(data_dir, name, options) as (folder, target):
        written = WrittenPictures(str(target), broken=list(source.broken))
        writer = None
        for row in source.rows:
            try:
                image = _encoded(row, options)
            except DataError as error:
                if not options.skip_broken:
                    raise
                written.broken.append(str(error))
                continue
            if preview is not None:
                preview.watch(written.rows, "image", 1)(0, image)
                preview.caption(written.rows, f"{row.prompt}  ->  {row.answer}", 1)
            writer = writer or open_writer(
                folder,
                name,
                options,
                _features(options),
                f"Converted from {source.description}.",
                episodes_per_shard=ROWS_PER_SHARD,
                metadata={"source": source.description},
            )
            writer.add_examples({"train": [_episode(row, image, written.rows)]})
            written.rows, written.bytes = written.rows + 1, written.bytes + len(image)
            advance(1)
        if writer is None:
            raise DataError(f"no row to write ({len(written.broken)} broken): {written.broken[0]}")
        writer.close_all()
    return written


def _encoded(row: Row, options: Options) -> bytes:
    content = row.image.read_bytes()
    where = f"{row.where}, image {row.image.name!r}"
    try:
        Image.open(row.image).verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: is not an image: {error}") from error
    return encoded_frame(content, "image", options, where, 0)[0]


def _features(options: Options) -> Any:
    import tensorflow_datasets as tfds

    features = tfds.features
    step: dict[str, Any] = {
        "observation": {"image": features.Image(shape=(None, None, 3), encoding_format=options.encoding)},
        "language_instruction": features.Text(),
        "answer": features.Text(),
    }
    step |= {key: features.Scalar(dtype=np.bool_) for key in ("is_first", "is_last", "is_terminal")}
    step |= {key: features.Scalar(dtype=np.float32) for key in ("reward", "discount")}
    metadata = {"kind": features.Text(), "recording": features.Text(), "number": features.Scalar(dtype=np.int64)}
    return features.FeaturesDict({"steps": features.Dataset(step), "episode_metadata": metadata})


def _episode(row: Row, image: bytes, number: int) -> dict[str, Any]:
    step = {
        "observation": {"image": image},
        "language_instruction": row.prompt,
        "answer": row.answer,
        "is_first": True,
        "is_last": True,
        "is_terminal": True,
        "reward": 0.0,
        "discount": 0.0,
    }
    return {"steps": [step], "episode_metadata": {"kind": row.kind, "recording": row.where, "number": number}}
