"""FAST: chunks of actions to few tokens and back (Pertsch et al., 2025, arXiv:2501.09747).

A chunk is turned into its frequencies (a discrete cosine transform along time), which are rounded to integers; the
integers, all dimensions of the lowest frequency first, are written as one text in which each integer is a letter; and
byte-pair encoding makes tokens of what often stands side by side, above all of the zeros of the high frequencies.

    vocabulary = train(chunks)                  # (N, H, A) normalised actions; scripts/train_action_tokenizer.py
    ids, lengths = vocabulary.encode(chunks)    # (N, M) int32, 0 behind the last token
    chunks, ok = vocabulary.decode(ids)         # where not ok, NaN: tokens that are no chunk

Letters: N chunks, H steps of a chunk, A action dimensions, M tokens at most, V tokens of the vocabulary.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common.files import write_whole

PAD = 0
FORMAT, VERSION = "octo_like action vocabulary", 1
MIN_CHUNKS = 32
# Integers are written as the ideographs from here on, which sentencepiece neither normalises nor splits.
FIRST_LETTER, MOST_LETTERS = 0x4E00, 20_000
LONGEST_PIECE = 512  # that sentencepiece allows
# Two machines may add in another order: what is a tie but for that is rounded alike on both.
TIE_DECIMALS = 6


class FastError(ValueError):
    """Chunks that do not fit an action vocabulary, or a vocabulary that is none; says what would be valid."""


def dct_matrix(horizon: int) -> np.ndarray:
    """The orthonormal DCT-II as a (H, H) float64 matrix D: D @ x are the coefficients of x (H,), and D.T @ D = 1.

    D[k, t] = sqrt(2 / H) cos(pi (2 t + 1) k / (2 H)), its first row divided by sqrt(2).
    """
    k, t = np.arange(horizon)[:, None], np.arange(horizon)[None]
    matrix = np.sqrt(2 / horizon) * np.cos(np.pi * (2 * t + 1) * k / (2 * horizon))
    matrix[0] /= np.sqrt(2)
    return matrix


@dataclasses.dataclass(frozen=True)
class FastVocabulary:
    """Tokens for chunks of H steps of A normalised actions.

    Ids: 0 is padding and stands only behind the last token; 1 to V - 1 are pieces, each of one or more coefficients.
    There is no end token: a chunk is complete exactly when its pieces hold H * A coefficients.

    A coefficient that is not clipped is off by at most 0.5 / scale. As the transform is orthonormal, the actions of
    one dimension (H,) then are off by at most 0.5 sqrt(H) / scale in the L2 norm, and so is each of them; evenly
    spread, the errors have an rms of 1 / (sqrt(12) scale).

    Attributes:
      horizon: H.
      dim: A.
      scale: coefficients are multiplied by it before they are rounded.
      minimum, maximum: range of the rounded coefficients; those outside are clipped. 0 is within.
      model: a serialised sentencepiece model, see `train`.
      max_tokens: M, the width of `encode`'s ids; 0 becomes H * A, which every chunk fits into.

    Raises:
      FastError: a field that cannot be, or a model that is none of these coefficients.
    """

    horizon: int
    dim: int
    scale: float
    minimum: int
    maximum: int
    model: bytes = dataclasses.field(repr=False)
    max_tokens: int = 0

    def __post_init__(self):
        if self.horizon < 1 or self.dim < 1:
            raise FastError(f"horizon and dim must be at least 1, got {self.horizon} and {self.dim}")
        if not 0 < self.scale < float("inf"):
            raise FastError(f"scale must be a positive number, got {self.scale}")
        if not self.minimum <= 0 <= self.maximum or self.letters > MOST_LETTERS:
            raise FastError(
                f"the coefficients from minimum={self.minimum} to maximum={self.maximum} must contain 0 and be at most "
                f"{MOST_LETTERS:,}"
            )
        if self.max_tokens == 0:
            object.__setattr__(self, "max_tokens", self.num_coefficients)
        if not 1 <= self.max_tokens <= self.num_coefficients:
            raise FastError(f"max_tokens must be from 1 to H * A = {self.num_coefficients}, got {self.max_tokens}")
        self._check_model()

    # -- sizes and tables

    @property
    def num_coefficients(self) -> int:
        """H * A: the coefficients of a chunk, and the most tokens that it can take."""
        return self.horizon * self.dim

    @property
    def letters(self) -> int:
        """Size of the alphabet: the integers from minimum to maximum."""
        return self.maximum - self.minimum + 1

    @property
    def vocab_size(self) -> int:
        """V: padding and all pieces."""
        return self._processor.get_piece_size()

    @functools.cached_property
    def piece_lengths(self) -> np.ndarray:
        """(V,) int32: coefficients that each token stands for; 0 of padding."""
        return np.array([len(piece) for piece in self._pieces], np.int32)

    @functools.cached_property
    def piece_coefficients(self) -> np.ndarray:
        """(V, longest piece) int32: the rounded coefficients of each token, 0 behind its `piece_lengths`."""
        table = np.zeros((self.vocab_size, int(self.piece_lengths.max())), np.int32)
        for row, piece in zip(table, self._pieces, strict=True):
            row[: len(piece)] = piece
        return table

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all fields: equal fingerprints give equal ids."""
        fields = [self.horizon, self.dim, float(self.scale), self.minimum, self.maximum, self.max_tokens]
        return hashlib.sha256(json.dumps(fields).encode() + self.model).hexdigest()[:16]

    @functools.cached_property
    def _dct(self) -> np.ndarray:
        return dct_matrix(self.horizon)

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(self.model)
        except (RuntimeError, TypeError) as error:
            raise FastError(f"the action vocabulary's model is not one of sentencepiece: {error}") from error
        return processor

    @functools.cached_property
    def _pieces(self) -> list[np.ndarray]:
        """The coefficients of each id."""
        texts = [""] + [self._processor.id_to_piece(i) for i in range(1, self.vocab_size)]
        return [np.array([ord(c) for c in text], np.int64) - FIRST_LETTER + self.minimum for text in texts]

    def _check_model(self) -> None:
        """Raises FastError when the model is not one of this range, or would change what it is given."""
        processor = self._processor
        special = (processor.unk_id(), processor.pad_id(), processor.bos_id(), processor.eos_id())
        outside = [i for i, piece in enumerate(self._pieces) if ((piece < self.minimum) | (piece > self.maximum)).any()]
        single = {int(piece[0]) for piece in self._pieces if len(piece) == 1}
        missing = sorted(set(range(self.minimum, self.maximum + 1)) - single)
        alphabet = "".join(_alphabet(self.minimum, self.maximum))
        whole = "".join(processor.id_to_piece(i) for i in processor.encode(alphabet))
        why = None
        if special != (PAD, -1, -1, -1):
            why = f"its special ids (unknown, pad, begin, end) are {special}, expected {(PAD, -1, -1, -1)}"
        elif outside:
            why = f"its piece {outside[0]} is not of coefficients from {self.minimum} to {self.maximum}"
        elif missing:
            why = f"it has no piece for the coefficient {missing[0]}"
        elif whole != alphabet or self.piece_lengths.max() > self.num_coefficients:
            why = "it changes the text that it is given, or its pieces are longer than a chunk"
        if why:
            raise FastError(f"the sentencepiece model is not an action vocabulary's: {why}")

    # -- encoding

    def coefficients(self, chunks: np.ndarray) -> np.ndarray:
        """The rounded coefficients (N, H * A) int32 of chunks (N, H, A), clipped to [minimum, maximum].

        All dimensions of frequency 0 come first, then those of frequency 1, and so on.

        Raises:
          FastError: another shape, or a number that is not finite.
        """
        return np.clip(self._rounded(chunks), self.minimum, self.maximum).astype(np.int32)

    def clipped(self, chunks: np.ndarray) -> np.ndarray:
        """(N,) int32: coefficients of each chunk outside of [minimum, maximum], which encoding would clip."""
        rounded = self._rounded(chunks)
        return ((rounded < self.minimum) | (rounded > self.maximum)).sum(1, dtype=np.int32)

    def encode(self, chunks: np.ndarray, *, low_pass: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of chunks.

        Args:
          chunks: (N, H, A) normalised actions; padded dimensions are 0.
          low_pass: a chunk that takes more than `max_tokens` loses as many of its highest frequencies as it must, in
            place of an error. `lengths` says which ones these are.

        Returns:
          ids (N, M) int32, 0 behind the last token, and the number of tokens (N,) int32.

        Raises:
          FastError: as `coefficients`, or a chunk takes more than `max_tokens`.
        """
        tokens = self._tokens(coefficients := self.coefficients(chunks))
        for row in [row for row, one in enumerate(tokens) if len(one) > self.max_tokens]:
            if not low_pass:
                raise FastError(
                    f"chunk {row} takes {len(tokens[row])} tokens, more than max_tokens={self.max_tokens}; allow as "
                    f"many (up to H * A = {self.num_coefficients}), or train a vocabulary on chunks like this one"
                )
            tokens[row] = self._low_passed(coefficients[row], row)
        lengths = np.fromiter(map(len, tokens), np.int32, len(tokens))
        ids = np.full((len(tokens), self.max_tokens), PAD, np.int32)
        flat = np.fromiter(itertools.chain.from_iterable(tokens), np.int32, int(lengths.sum()))
        ids[np.arange(self.max_tokens) < lengths[:, None]] = flat
        return ids, lengths

    def lengths(self, chunks: np.ndarray) -> np.ndarray:
        """(N,) int32: tokens that each chunk takes, also where they are more than `max_tokens`."""
        tokens = self._tokens(self.coefficients(chunks))
        return np.fromiter(map(len, tokens), np.int32, len(tokens))

    def _rounded(self, chunks: np.ndarray) -> np.ndarray:
        """(N, H * A) float64, not clipped."""
        return _rounded(_checked(chunks, self.horizon, self.dim), self._dct, self.scale)

    def _tokens(self, coefficients: np.ndarray) -> list[list[int]]:
        """Ids of rows of coefficients. One thread: batches are made by several."""
        return self._processor.encode(_texts(coefficients, self.minimum), num_threads=1)

    def _low_passed(self, coefficients: np.ndarray, row: int) -> list[int]:
        """Ids of a chunk's lowest frequencies, as many as `max_tokens` has room for; the others become 0."""
        kept = np.arange(self.horizon)[::-1]  # frequencies; the most come first
        frequency = np.arange(self.num_coefficients) // self.dim
        for one in self._tokens(np.where(frequency < kept[:, None], coefficients, 0).astype(np.int32)):
            if len(one) <= self.max_tokens:
                return one
        raise FastError(f"chunk {row}: max_tokens={self.max_tokens} is too few for any chunk")

    # -- decoding

    def decode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chunks of token ids.

        Args:
          ids: (N, M') integers of any width, 0 behind the last token.

        Returns:
          chunks (N, H, A) float32 and ok (N,) bool. A row is not ok, and its chunk is NaN, unless its pieces have
          H * A coefficients together: the caller holds the robot and says so.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise FastError(f"ids are integers of the shape (N, M), got {ids.dtype} {ids.shape}")
        known = (ids >= 0) & (ids < self.vocab_size)
        ids = np.where(known, ids, PAD)
        lengths = self.piece_lengths[ids]
        after_padding = (ids[:, 1:] != PAD) & (ids[:, :-1] == PAD)
        ok = known.all(1) & ~after_padding.any(1) & (lengths.sum(1) == self.num_coefficients)
        chunks = np.full((len(ids), self.horizon, self.dim), np.nan, np.float32)
        # Places in a row of all pieces, one behind the other.
        first = np.cumsum(self.piece_lengths) - self.piece_lengths
        size = lengths[ok].ravel()
        place = np.repeat(first[ids[ok].ravel()] - (np.cumsum(size) - size), size) + np.arange(size.sum())
        found = np.concatenate(self._pieces)[place].reshape(-1, self.horizon, self.dim)
        chunks[ok] = self._dct.T @ (found / self.scale)
        return chunks, ok

    # -- files

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and text, from which `from_json` makes the vocabulary again."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "format": FORMAT,
            "version": VERSION,
            **fields,
            "model": base64.b64encode(self.model).decode("ascii"),
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FastVocabulary":
        """Inverse of `to_json`.

        Raises:
          FastError: something else, of a later version, or changed since it was written.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise FastError(f'not an action vocabulary: it does not say "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise FastError(f"an action vocabulary of version {data.get('version')!r}; this code reads {VERSION}")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in (*names, "vocab_size", "fingerprint") if name not in data]
        if missing:
            raise FastError(f"the action vocabulary is damaged: it has no {missing[0]!r}")
        numbers = {name: data[name] for name in names if name != "model"}
        for name, value in numbers.items():
            valid = (int, float) if name == "scale" else int
            if isinstance(value, bool) or not isinstance(value, valid):
                raise FastError(f"the action vocabulary is damaged: {name} is {value!r}")
        try:
            model = base64.b64decode(data["model"], validate=True)
        except (TypeError, ValueError) as error:
            raise FastError(f"the action vocabulary is damaged: its model is not base64: {error}") from error
        vocabulary = cls(**numbers, model=model)
        for name in ("vocab_size", "fingerprint"):
            if data[name] != getattr(vocabulary, name):
                raise FastError(
                    f"the action vocabulary was changed after it was written: {name} is {data[name]!r}, its content "
                    f"gives {getattr(vocabulary, name)!r}; train it again"
                )
        return vocabulary

    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_json` into a file, from which `load` reads it back."""
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_whole(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FastVocabulary":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          FastError: it is none, with its name.
        """
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(
                f"no action vocabulary at {str(path)!r}; scripts/train_action_tokenizer.py makes one"
            )
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_json(json.load(file))
        except ValueError as error:  # also text that is no JSON
            raise FastError(f"{path}: {error}") from error


# ------------------------------------------------------------------------------------------------------------- training


def train(
    chunks: np.ndarray,
    vocab_size: int = 1024,
    scale: float = 10.0,
    *,
    max_tokens: int | None = None,
    clip_share: float = 0.0,
) -> FastVocabulary:
    """A vocabulary for chunks like these. The same chunks give the same bytes.

    Args:
      chunks: (N, H, A) normalised actions as a head learns them, padded dimensions 0.
      vocab_size: V at most, padding included; fewer when the chunks have no more pairs to merge.
      scale: larger is finer, and takes more tokens.
      max_tokens: M of the vocabulary; None: H * A.
      clip_share: share of the coefficients that may be clipped at each end of the range, so that a few wild actions
        do not fill the vocabulary with integers that are never seen again.

    Raises:
      FastError: another shape, too few chunks, NaN, more integers than `vocab_size` has room for, or a chunk that
        takes more than `max_tokens`.
    """
    chunks = np.asarray(chunks)
    if chunks.ndim != 3 or not chunks.shape[1] or not chunks.shape[2]:
        raise FastError(f"chunks are numbers of the shape (N, horizon, dim), got {chunks.shape}")
    if len(chunks) < MIN_CHUNKS:
        raise FastError(f"{len(chunks)} chunks are too few to train an action vocabulary; give {MIN_CHUNKS} or more")
    if not 0 < scale < float("inf") or not 0 <= clip_share < 0.5:
        raise FastError(f"scale must be positive and clip_share in [0, 0.5), got {scale} and {clip_share}")
    if not 2 <= vocab_size <= MOST_LETTERS:
        raise FastError(f"vocab_size must be from 2 to {MOST_LETTERS:,}, got {vocab_size}")
    _, horizon, dim = chunks.shape
    rounded = _rounded(_checked(chunks, horizon, dim), dct_matrix(horizon), scale)
    minimum, maximum = _range(rounded, clip_share)
    letters = maximum - minimum + 1
    if letters > vocab_size - 1:
        fits = scale * (vocab_size - 3) / letters
        outliers = "" if clip_share else "; clip_share=0.0001 leaves out what is seldom"
        raise FastError(
            f"at scale {scale:g} the coefficients are from {minimum:.0f} to {maximum:.0f}: {letters:,.0f} integers, "
            f"more than the {vocab_size - 1:,} tokens of vocab_size={vocab_size}. "
            f"A scale of {_rounded_down(fits):g} would fit{outliers}"
        )
    texts = _texts(np.clip(rounded, minimum, maximum).astype(np.int32), minimum)
    model = _trained_model(texts, _alphabet(minimum, maximum), vocab_size)
    vocabulary = FastVocabulary(horizon, dim, float(scale), minimum, maximum, model, max_tokens or 0)
    longest = int(vocabulary.lengths(chunks).max())
    if longest > vocabulary.max_tokens:
        raise FastError(f"max_tokens={max_tokens}, but a chunk takes {longest} tokens; allow as many, or more")
    return vocabulary


def _trained_model(texts: Sequence[str], alphabet: Sequence[str], vocab_size: int) -> bytes:
    """A serialised sentencepiece model of equally long texts, with a piece for each letter of the alphabet."""
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Each letter once by itself: it has a piece, then, although no chunk may have it.
        sentence_iterator=iter([*texts, *alphabet]),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # fewer, where there are no more pairs
        # A piece is any run of letters: nothing is added, dropped or kept apart.
        character_coverage=1.0,
        required_chars="".join(alphabet),
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
        split_by_whitespace=False,
        split_digits=False,
        max_sentencepiece_length=min(len(texts[0]), LONGEST_PIECE),
        max_sentence_length=4 * len(texts[0]) + 16,  # bytes; longer ones would be left out
        unk_id=PAD,  # never met, as coefficients are clipped
        pad_id=-1,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return buffer.getvalue()


def _range(rounded: np.ndarray, clip_share: float) -> tuple[int, int]:
    """The smallest and the largest coefficient of the vocabulary."""
    ordered = np.sort(rounded, axis=None)
    left_out = int(clip_share * ordered.size)
    return int(min(ordered[left_out], 0)), int(max(ordered[-1 - left_out], 0))


def _rounded_down(value: float) -> float:
    """To two significant digits."""
    step = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(np.floor(value / step + 1e-9) * step)


def _checked(chunks: np.ndarray, horizon: int, dim: int) -> np.ndarray:
    """Chunks as float64. Raises FastError for others than (N, horizon, dim) finite numbers."""
    chunks = np.asarray(chunks)
    if chunks.ndim != 3 or chunks.shape[1:] != (horizon, dim) or chunks.dtype.kind not in "fiu":
        raise FastError(
            f"the action vocabulary is of chunks of {horizon} steps of {dim} dimensions, (N, {horizon}, {dim}); got "
            f"{chunks.dtype} {chunks.shape}. Train one for this head: scripts/train_action_tokenizer.py"
        )
    bad = ~np.isfinite(chunks).all((1, 2))
    if bad.any():
        raise FastError(
            f"chunk {int(bad.argmax())} has actions that are not finite ({int(bad.sum())} of {len(chunks)})"
        )
    return chunks.astype(np.float64)


def _rounded(chunks: np.ndarray, dct: np.ndarray, scale: float) -> np.ndarray:
    """The coefficients (N, H * A) of chunks (N, H, A), times the scale and rounded; float64, not clipped."""
    transformed = dct @ chunks * scale
    return np.rint(np.round(transformed, TIE_DECIMALS)).reshape(len(chunks), chunks.shape[1] * chunks.shape[2])


def _texts(coefficients: np.ndarray, minimum: int) -> Sequence[str]:
    """Rows of coefficients (N, n) int32 as N texts of n letters."""
    letters = np.ascontiguousarray(coefficients - minimum + FIRST_LETTER, np.uint32)
    return letters.view(f"U{letters.shape[1]}").ravel().tolist()


def _alphabet(minimum: int, maximum: int) -> Sequence[str]:
    """The letter of each integer."""
    return _texts(np.arange(minimum, maximum + 1)[:, None], minimum)
