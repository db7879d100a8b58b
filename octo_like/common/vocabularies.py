"""Vocabularies of what a model says: words, and tokens of action chunks.

They stand in the model's config, whole: so they travel with every checkpoint and export, and a run that is resumed or
adapted says its words with the same ids.

A config may name one, `vocabulary="words"` or `vocabulary="my_actions.json"`; `resolve` puts the content in its place:

    {"kind": "words", "size": 512, "sentencepiece": base64 of the sentencepiece model}
    what `octo_like.common.fast.FastVocabulary.to_json` gives
"""

import base64
import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from octo_like.common.fast import FastVocabulary
from octo_like.common.schema import TEXT_LENGTH
from octo_like.common.text import TextTokenizer, model_file

GROUPS = ("heads", "auxiliaries")


class VocabularyError(ValueError):
    """A vocabulary that is not there, or is none."""


def resolve(model: Any, where: str = "model") -> None:
    """Replaces, in a model's config, names of vocabularies by what they hold.

    Args:
      model: nested mapping (a dict or ConfigDict), changed in place.

    Raises:
      VocabularyError: no such file, or no vocabulary in it; says which part of the model names it.
    """
    for place, entry in _entries(model):
        if isinstance(entry["vocabulary"], str):
            try:
                name = entry["vocabulary"]
                content = FastVocabulary.load(name).to_json() if name.endswith(".json") else load_words(name)
            except (ValueError, OSError) as error:
                raise VocabularyError(f"{where}.{place}.vocabulary: {error}") from error
            with getattr(entry, "ignore_type", contextlib.nullcontext)():  # of a ConfigDict: it was a text
                entry["vocabulary"] = content


def _entries(model: Any) -> Iterator[tuple[str, Any]]:
    for group in GROUPS:
        for name, entry in ((model or {}).get(group) or {}).items():
            own = hasattr(entry, "get") and ":" in str(entry.get("kind"))  # of a user's own, a field may mean anything
            if hasattr(entry, "get") and entry.get("vocabulary") is not None and not own:
                yield f"{group}.{name}", entry


def load_words(name: str) -> dict[str, Any]:
    """The content of a text vocabulary: "builtin", "words", or the path of a sentencepiece `.model` file.

    Raises:
      FileNotFoundError: no such file. ValueError: no sentencepiece model with T5's conventions.
    """
    with open(model_file(name), "rb") as file:
        content = file.read()
    size = TextTokenizer(content).vocab_size
    return {"kind": "words", "size": size, "sentencepiece": base64.b64encode(content).decode("ascii")}


def size_of(vocabulary: Any) -> int:
    """V, the number of ids. Raises VocabularyError for what has not been resolved, or holds something else."""
    if isinstance(vocabulary, str):
        raise VocabularyError(f"vocabulary {vocabulary!r} is a name; octo_like.common.vocabularies.resolve reads it")
    if not isinstance(vocabulary, Mapping) or vocabulary.get("kind") != "words" or "sentencepiece" not in vocabulary:
        raise VocabularyError("not a vocabulary of words: expected {'kind': 'words', 'size', 'sentencepiece'}")
    return int(vocabulary["size"])


def tokenizer_of(vocabulary: Mapping[str, Any], max_length: int) -> TextTokenizer:
    """The tokenizer of a resolved vocabulary, for texts of at most `max_length` ids.

    Raises:
      VocabularyError: it is damaged.
    """
    size = size_of(vocabulary)
    tokenizer = _tokenizer(vocabulary["sentencepiece"], max_length)
    if tokenizer.vocab_size != size:
        raise VocabularyError(f"a vocabulary says that it has {size} ids, but its sentencepiece model has "
                              f"{tokenizer.vocab_size}")  # fmt: skip
    return tokenizer


@functools.lru_cache(maxsize=16)
def _tokenizer(content: str, max_length: int) -> TextTokenizer:
    try:
        return TextTokenizer(base64.b64decode(content, validate=True), max_length)
    except ValueError as error:
        raise VocabularyError(f"damaged vocabulary: {error}") from error


@dataclasses.dataclass(frozen=True)
class Targets:
    """What turns texts and actions into the ids that a model learns to say.

    Attributes:
      text: tokenizer of texts; None: the model says none.
      actions: head -> vocabulary of its action chunks, of the heads that have one.
    """

    text: TextTokenizer | None = None
    actions: Mapping[str, FastVocabulary] = dataclasses.field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        """What an order spec holds of it: equal specs give equal ids. Empty for a model that says nothing."""
        text = {} if self.text is None else {"target_tokenizer": self.text.fingerprint}
        actions = {head: one.fingerprint for head, one in self.actions.items()}
        return text | ({"action_vocabularies": actions} if actions else {})


NO_TARGETS = Targets()


def targets_of(model: Any) -> Targets:
    """What a model with this (resolved) config learns to say.

    Raises:
      VocabularyError: a damaged vocabulary, or texts with different ones: a batch holds a text to learn once.
    """
    actions = {}
    for name, entry in ((model or {}).get("heads") or {}).items():
        if hasattr(entry, "get") and entry.get("kind") == "fast":
            actions[name] = action_vocabulary(entry["vocabulary"])
    return Targets(_text_tokenizer(model), actions)


def action_vocabulary(vocabulary: Any) -> FastVocabulary:
    """The vocabulary of a head of action tokens. Raises VocabularyError for what is none."""
    if isinstance(vocabulary, str):
        raise VocabularyError(f"vocabulary {vocabulary!r} is a name; octo_like.common.vocabularies.resolve reads it")
    try:
        return _action_vocabulary(json.dumps(dict(vocabulary.items()), sort_keys=True))
    except (AttributeError, ValueError) as error:
        raise VocabularyError(str(error)) from error


@functools.lru_cache(maxsize=16)
def _action_vocabulary(content: str) -> FastVocabulary:
    return FastVocabulary.from_json(json.loads(content))


def _text_tokenizer(model: Any) -> TextTokenizer | None:
    found = {
        (entry["vocabulary"]["sentencepiece"], int(entry.get("max_length", TEXT_LENGTH))): entry
        for _, entry in _entries(model)
        if entry.get("kind") == "text" and size_of(_plain(entry["vocabulary"]))
    }
    if len(found) > 1:
        raise VocabularyError("model.auxiliaries: all texts that are said must have one vocabulary and one max_length")
    for (_, length), entry in found.items():
        return tokenizer_of(_plain(entry["vocabulary"]), length)
    return None


def _plain(value: Any) -> Any:
    return dict(value.items()) if hasattr(value, "items") else value
