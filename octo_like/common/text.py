"""Text to token ids, with sentencepiece and the conventions of T5.

Ids end with </s> (1), are padded with 0 and cut to `max_length` keeping the </s>. The empty text is [1, 0, ...] with
attention mask [1, 0, ...]. Words the model has not seen become pieces, letters or <unk>; they never raise.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

PAD, EOS = 0, 1
ASSETS = {name: os.path.join(os.path.dirname(__file__), "assets", f"{name}.model") for name in ("tabletop", "words")}
BUILTIN = ASSETS["tabletop"]
# "builtin": instructions of the tabletop; "words": all that is said there, answers and location tokens too.
BUILTIN_MODELS = {"builtin": BUILTIN, "words": ASSETS["words"]}
MODEL_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json"


def check_text(text: str) -> None:
    """Raises ValueError for a text with halves of surrogate pairs, which are no characters and have no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {text[:60]!r} has no UTF-8: {error.reason} at character {error.start}") from error


def model_file(model: str) -> str:
    """The sentencepiece file that a name stands for: "builtin", "words", a `.model` file or a directory written by
    `TextTokenizer.save`.

    Raises:
      FileNotFoundError: there is none, with what would be valid.
    """
    path = BUILTIN_MODELS.get(model, model)
    path = os.path.join(path, MODEL_FILE) if pathlib.Path(path).is_dir() else path
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(
            f"no sentencepiece model at {path!r}; valid: 'words', 'builtin', the path of a .model file, or a directory "
            f"with {MODEL_FILE} and {CONFIG_FILE}"
        )
    return path


class TextTokenizer:
    """A sentencepiece model with T5's conventions.

    Attributes:
      vocab_size: number of pieces; ids are below it.
      max_length: L, the number of ids per text.
    """

    def __init__(self, model: bytes, max_length: int = 16):
        """Args: model: contents of a sentencepiece `.model` file; max_length: L."""
        import sentencepiece

        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self._model = bytes(model)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._model)
        except RuntimeError:  # its "INTERNAL: ..." is about the bytes, and no status of a storage
            raise ValueError(f"not a sentencepiece model ({len(self._model)} bytes)") from None
        pad, eos = self._processor.pad_id(), self._processor.eos_id()
        if (pad, eos) != (PAD, EOS):
            raise ValueError(
                f"the sentencepiece model must have pad_id={PAD} and eos_id={EOS} as T5's has; got {pad}, {eos}"
            )
        self.max_length = int(max_length)
        self.vocab_size = int(self._processor.get_piece_size())

    @classmethod
    def load(cls, model: str = "builtin", max_length: int | None = None) -> "TextTokenizer":
        """Loads "builtin" or "words", a `.model` file (T5's spiece.model works), or a directory written by `save`.

        Raises:
          FileNotFoundError: no such model, with what would be valid.
          ValueError: the file is no such model.
        """
        path, config = model_file(model), {}
        config_path = os.path.join(os.path.dirname(path), CONFIG_FILE)
        if pathlib.Path(model).is_dir() and pathlib.Path(config_path).is_file():
            with open(config_path, encoding="utf-8") as file:
                config = json.load(file)
        with open(path, "rb") as file:
            content = file.read()
        try:
            return cls(content, max_length or config.get("max_length", 16))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, directory: str) -> None:
        """Writes the model and its settings into `directory`, from which `load` reads them back."""
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, MODEL_FILE), "wb") as file:
            file.write(self._model)
        with open(os.path.join(directory, CONFIG_FILE), "w", encoding="utf-8") as file:
            json.dump({"kind": "sentencepiece", "max_length": self.max_length, "vocab_size": self.vocab_size}, file)

    @property
    def fingerprint(self) -> str:
        """Hash of the model and the length: equal fingerprints give equal ids."""
        import hashlib

        return hashlib.sha256(self._model + str(self.max_length).encode()).hexdigest()[:16]

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids of a list of texts.

        Returns:
          {"input_ids": (B, L) int32, "attention_mask": (B, L) int32}.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError("encode takes a list of texts; wrap a single one as [text]")
        for text in texts:
            check_text(text)
        ids = np.full((len(texts), self.max_length), PAD, np.int32)
        mask = np.zeros_like(ids)
        for row, pieces in enumerate(self._processor.encode(list(texts))):
            pieces = [*pieces[: self.max_length - 1], EOS]
            ids[row, : len(pieces)] = pieces
            mask[row, : len(pieces)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def pieces(self) -> list[str]:
        """What each id stands for, as sentencepiece writes it: U+2581 for a space, "<0x41>" for a byte; "" for the
        padding and </s>, and for an unknown word what `decode` says."""
        processor, unknown = self._processor, self._processor.unk_id()
        pieces = ["" if i in (PAD, EOS) else processor.id_to_piece(i) for i in range(self.vocab_size)]
        return [processor.decode([unknown]) if i == unknown else piece for i, piece in enumerate(pieces)]

    def num_tokens(self, text: str) -> int:
        """Tokens of a text with its </s>; beyond `max_length`, `encode` cuts them off."""
        return len(self._processor.encode(text)) + 1

    def unknown(self, text: str) -> list[str]:
        """Parts of a text that no id stands for: they become <unk>."""
        pieces, unknown = self._processor.encode(text, out_type=str), self._processor.unk_id()
        return [piece for piece in pieces if self._processor.piece_to_id(piece) == unknown]

    def decode(self, input_ids: np.ndarray) -> list[str]:
        """Texts of (B, L) ids, without padding and </s>."""
        return [self._processor.decode([int(i) for i in row if i not in (PAD, EOS)]) for row in np.asarray(input_ids)]


class TextTable:
    """Encodes each distinct text once, however often it is asked for: text to row number, row numbers to ids.

    Row 0 is the empty text. Not safe for concurrent `rows` calls; callers hold a lock.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._row_of: dict[str, int] = {"": 0}
        self._encoded = tokenizer.encode([""])

    def __len__(self) -> int:
        return len(self._row_of)

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Row numbers (N,) int32 of the texts, encoding those that are new."""
        new = [text for text in dict.fromkeys(texts) if text not in self._row_of]
        if new:
            first, encoded = len(self._row_of), self._tokenizer.encode(new)
            for key, rows in encoded.items():
                table = self._encoded[key]
                if first + len(new) > len(table):  # twice as large each time: no text is copied again and again
                    wider = np.zeros((2 * (first + len(new)), table.shape[1]), table.dtype)
                    wider[:first] = table[:first]
                    self._encoded[key] = table = wider
                table[first : first + len(new)] = rows
            self._row_of.update({text: first + i for i, text in enumerate(new)})
        return np.array([self._row_of[text] for text in texts], np.int32)

    def encoded(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask"} of the row numbers, (N, L) int32."""
        return {key: table[rows] for key, table in self._encoded.items()}
