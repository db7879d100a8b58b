"""Instructions as rows of a table of token ids, and their paraphrases."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common import location_tokens
from octo_like.common.schema import BatchSpec
from octo_like.common.text import TextTable, TextTokenizer
from octo_like.common.vocabularies import NO_TARGETS, Targets
from octo_like.data.order.order import uniform
from octo_like.data.rlds.cache_files import FILES
from octo_like.data.spec import DataError


@dataclasses.dataclass(frozen=True)
class Paraphrases:
    """Other ways of saying an instruction.

    Attributes:
      variants: instruction (stripped) -> at least one paraphrase.
      hash: of the file's content.
    """

    variants: Mapping[str, tuple[str, ...]]
    hash: str


def load_paraphrases(path: str) -> Paraphrases:
    """Reads a JSON file {"instruction": ["paraphrase", ...], ...}. No pickles: a pickle runs code when it is read.

    Raises:
      DataError: no such file, not JSON, or not of this form; names the instruction.
    """
    content = FILES.read(path)
    if content is None:
        raise DataError(f"paraphrases: {path!r} does not exist")
    try:
        data = json.loads(content)
    except ValueError as error:  # also UnicodeDecodeError
        raise DataError(
            f'paraphrases: {path!r} is not a JSON file of the form {{"instruction": ["paraphrase", ...]}}: {error}'
        ) from error
    if not isinstance(data, dict):
        raise DataError(f"paraphrases: {path!r} holds a {type(data).__name__}; valid: an object of lists of strings")
    variants = {}
    for text, others in data.items():
        if not isinstance(others, list) or not others or not all(isinstance(t, str) and t.strip() for t in others):
            raise DataError(f"paraphrases: {path!r}: {text!r} needs a list of at least one string that is not empty")
        variants[text.strip()] = tuple(t.strip() for t in others)
    return Paraphrases(variants, hashlib.sha256(content).hexdigest()[:16])


class Texts:
    """The table of a run's texts: text -> row when an episode is read, row -> ids when a batch is made.

    Args:
      tokenizer: None for a run without language; every text is row 0 then.
      paraphrases, probability: with this probability a sample's instruction is replaced by one of its paraphrases, each
        equally likely.
      targets: what makes ids of the texts and actions that a model learns to say.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        paraphrases: Paraphrases | None = None,
        probability: float = 0.0,
        *,
        targets: Targets = NO_TARGETS,
    ):
        self.targets = targets
        self._target_table = None if targets.text is None else TextTable(targets.text)
        self._tokenizer = tokenizer
        self._table = TextTable(tokenizer) if tokenizer is not None else None
        self._paraphrases, self._probability = paraphrases, probability
        self._variants: dict[int, np.ndarray] = {}
        self._checked: set[str] = {""}  # texts to learn that are short enough
        self._heard: set[str] = {""}  # sub-tasks that are
        self._hears_subtasks = self._moves_places = False
        self._lock = threading.Lock()

    @property
    def spec(self) -> dict[str, Any]:
        """What an order spec holds of it."""
        return {
            "tokenizer": None if self._tokenizer is None else self._tokenizer.fingerprint,
            "paraphrases": None if self._paraphrases is None else self._paraphrases.hash,
            **self.targets.spec,
        }

    def check(self, spec: BatchSpec, instructions: Iterable[str]) -> None:
        """Checks that it fits the batches and the datasets.

        Raises:
          DataError: batches have language and there is no tokenizer or one of another length, or none of the datasets'
            instructions has a paraphrase: it is another dataset's file.
        """
        language_length, text = spec.language_length, self.targets.text
        self._hears_subtasks, self._moves_places = spec.subtask, spec.resize != "stretch"
        if spec.text_target != (None if text is None else text.max_length):
            raise DataError(
                f"batches have texts to learn of {spec.text_target} ids, the vocabulary's have "
                f"{None if text is None else text.max_length}"
            )
        if {head: one.max_tokens for head, one in self.targets.actions.items()} != dict(spec.action_tokens):
            raise DataError(
                f"batches have action tokens for {dict(spec.action_tokens)}, the vocabularies are of "
                f"{sorted(self.targets.actions)}"
            )
        if language_length is not None:
            if self._tokenizer is None:
                raise DataError("batches have language, but no text tokenizer was given")
            if self._tokenizer.max_length != language_length:
                raise DataError(
                    f"the tokenizer makes {self._tokenizer.max_length} ids, but batches hold language_length="
                    f"{language_length}"
                )
        if self._paraphrases is None:
            return
        known = {text.strip() for text in instructions} - {""}
        if known and not known & set(self._paraphrases.variants):
            raise DataError(
                f"paraphrases: the file has none of the {len(known)} instructions of the mixture, e.g. "
                f"{min(known)!r}; it has {min(self._paraphrases.variants, default='nothing')!r} ..."
            )

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Row numbers (N,) int32 of texts. Safe to call from several threads."""
        if self._table is None:
            return np.zeros(len(texts), np.int32)
        self._refuse_places(texts)
        with self._lock:
            if self._paraphrases is not None:
                for text in set(texts) & set(self._paraphrases.variants):
                    row = int(self._table.rows([text])[0])
                    if row not in self._variants:
                        self._variants[row] = self._table.rows(self._paraphrases.variants[text])
            return self._table.rows(texts)

    def target_rows(self, texts: Sequence[str]) -> np.ndarray:
        """Row numbers (N,) int32 of texts that are learned; 0 is none. Safe to call from several threads.

        Raises:
          DataError: one is longer than the batches' `text_target`: what the model said would end in its middle; or one
            has what no word of the model stands for.
        """
        if self._target_table is None:
            return np.zeros(len(texts), np.int32)
        self._refuse_places(texts)
        with self._lock:
            for text in dict.fromkeys(texts):
                if text not in self._checked:
                    self._check_target(text)
            return self._target_table.rows(texts)

    def subtask_rows(self, texts: Sequence[str]) -> np.ndarray:
        """`rows` of what is to be done next.

        Raises:
          DataError: the model hears sub-tasks, and would hear only a part of one.
        """
        if self._hears_subtasks:
            for text in dict.fromkeys(texts):
                if text not in self._heard:
                    self.check_subtasks("a sub-task", [text])
                    self._heard.add(text)
        return self.rows(texts)

    def _refuse_places(self, texts: Sequence[str]) -> None:
        """Raises DataError for a text with places in the picture (`<loc21>`), where resizing moves them."""
        if self._moves_places:
            for text in dict.fromkeys(texts):
                if location_tokens.has_any(text):
                    raise DataError(
                        f"the text {text[:80]!r} has places, fractions of the stored picture, which the run's resize "
                        "moves; set resize='stretch', or leave such texts out"
                    )

    def check_subtasks(self, dataset: str, texts: Sequence[str]) -> None:
        """Checks the sub-tasks of a dataset: a policy that said one would not hear itself.

        Raises:
          DataError: some are longer than what the model hears, or, where it says them too, have what the vocabulary of
            what it hears has no id for; says how many, and names one.
        """
        tokenizer = self._tokenizer
        if tokenizer is None or not self._hears_subtasks or not texts:
            return
        if self.targets.text and (strange := [text for text in texts if tokenizer.unknown(text)]):
            raise DataError(
                f"{dataset}: {len(strange)} of {len(texts)} sub-tasks that the model says, and would not hear: "
                f"{_strange(tokenizer, strange[0], 'config.text.model')}"
            )
        if found := _too_long(tokenizer, texts):
            long, longest, length = found
            raise DataError(
                f"{dataset}: {long} of {len(texts)} sub-tasks are longer than what the model hears, which has "
                f"{tokenizer.max_length} ids; the longest has {length} with its end: {longest[:80]!r}. Set "
                f"config.text.max_length to at least {length}, and max_length of the language tokenizers with it, or "
                "shorten the texts"
            )

    def check_targets(self, dataset: str, texts: Sequence[str]) -> None:
        """Checks the texts that a dataset is to teach, before anything is read.

        Raises:
          DataError: some are longer than the batches' `text_target`, or have what no word of the model stands for; says
            how many, and names one.
        """
        tokenizer = self.targets.text
        if tokenizer is None or not texts:
            return
        if strange := [text for text in texts if tokenizer.unknown(text)]:
            raise DataError(
                f"{dataset}: {len(strange)} of {len(texts)} texts to learn: {_strange(tokenizer, strange[0])}"
            )
        if found := _too_long(tokenizer, texts):
            long, longest, length = found
            raise DataError(
                f"{dataset}: {long} of {len(texts)} texts to learn are longer than the model's texts, which have "
                f"{tokenizer.max_length} ids; the longest has {length} with its end: {longest[:80]!r}. Set "
                f"max_length of model.auxiliaries' text to at least {length}, or shorten the texts"
            )

    def _check_target(self, text: str) -> None:
        tokenizer = self.targets.text
        assert tokenizer is not None
        if tokenizer.unknown(text):
            raise DataError(f"a text to learn: {_strange(tokenizer, text)}")
        length = tokenizer.num_tokens(text)
        if length > tokenizer.max_length:
            raise DataError(
                f"a text to learn has {length} ids with its end, the model's texts at most {tokenizer.max_length}: "
                f"{text[:80]!r}; set max_length of model.auxiliaries' text to at least {length}, or shorten the text"
            )
        self._checked.add(text)

    def encoded_targets(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask"} (N, M) int32 of row numbers (N,); all zero where nothing is to be said."""
        assert self._target_table is not None
        said = rows[:, None] != 0
        return {key: np.where(said, ids, 0) for key, ids in self._target_table.encoded(rows).items()}

    def paraphrased(self, rows: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Rows (N,) with some replaced by a paraphrase, by the samples' keys (N,). Which row a text has is an accident
        of what was read first; which text is taken is not."""
        if not self._variants or self._probability == 0:
            return rows
        replaced = uniform(key, "paraphrase") < self._probability
        which = uniform(key, "which paraphrase")
        rows = rows.copy()
        for i in np.flatnonzero(replaced):
            others = self._variants.get(int(rows[i]))
            if others is not None:
                rows[i] = others[int(which[i] * len(others))]
        return rows

    def encoded(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask"} (N, L) int32 of row numbers (N,)."""
        assert self._table is not None
        return self._table.encoded(rows)


class WordList:
    """Keeps texts as they are where `Texts` keeps their ids. Row 0 is no instruction."""

    def __init__(self):
        self.texts = [""]
        self._lock = threading.Lock()

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Row numbers (N,) int32 of texts."""
        with self._lock:
            self.texts += [text for text in dict.fromkeys(texts) if text not in self.texts]
            return np.array([self.texts.index(text) for text in texts], np.int32)

    target_rows = subtask_rows = rows  # texts that are learned and heard, in the same list


def _too_long(tokenizer: TextTokenizer, texts: Sequence[str]) -> tuple[int, str, int] | None:
    """(texts that have too many ids, the longest, its ids with its end); None: all fit."""
    lengths = {text: tokenizer.num_tokens(text) for text in texts}
    longest = max(lengths, key=lambda text: lengths[text])
    if lengths[longest] <= tokenizer.max_length:
        return None
    return sum(length > tokenizer.max_length for length in lengths.values()), longest, lengths[longest]


def _strange(tokenizer: TextTokenizer, text: str, where: str = "model.auxiliaries' text") -> str:
    parts = ", ".join(map(repr, dict.fromkeys(tokenizer.unknown(text))))
    return (
        f"{text[:80]!r} has {parts}, which the vocabulary of {where} has no words for. Use 'words', which has places, "
        "train one on these texts (scripts/train_tokenizer.py), or leave them out"
    )
