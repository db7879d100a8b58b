"""What a policy says in words, and how likely it is to say given ones."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from octo_like.common.text import EOS, PAD, TextTokenizer, check_text
from octo_like.common.vocabularies import tokenizer_of
from octo_like.common.words import suggest, whole_number
from octo_like.policy.observations import check_tasks, row_keys


class Saying(NamedTuple):
    """How something is said; see `Policy.predict_text`."""

    part: str
    temperature: float
    top_k: int
    only: Sequence[str] | None


def say(
    policy: Any,
    observations: Mapping[str, Any],
    tasks: Mapping[str, Any],
    rng: jax.Array | None,
    unnormalize: str | None,
    how: Saying,
) -> list[str]:
    """`Policy.predict_text`."""
    tokenizer, temperature = speech(policy, how.part), how.temperature
    if not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number from 0 on, got {temperature!r:.60}")
    whole_number(how.top_k, "top_k", 0)
    if temperature > 0 and rng is None:
        raise ValueError(f"temperature {temperature} draws: give rng")
    allowed = None if how.only is None else _allowed(tokenizer, how.only)
    observations = policy.prepare_observations(observations, unnormalize)
    b = observations["timestep_pad_mask"].shape[0]
    check_tasks(tasks, policy.batch_spec, b)
    keys_b = None if temperature == 0 else row_keys(rng, b)
    options = dict(part=how.part, temperature=float(temperature), top_k=int(how.top_k))
    return tokenizer.decode(
        np.asarray(policy.text_program(policy.params, observations, tasks, keys_b, allowed, **options))
    )


def log_probs(
    policy: Any,
    observations: Mapping[str, Any],
    tasks: Mapping[str, Any],
    texts: Sequence[str],
    unnormalize: str | None,
    *,
    part: str,
) -> np.ndarray:
    """`Policy.text_log_probs`."""
    tokenizer = speech(policy, part)
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of texts; wrap a single one as [{texts[:40]!r}]")
    for text in texts:
        _check(tokenizer, text)
    observations = policy.prepare_observations(observations, unnormalize)
    b = observations["timestep_pad_mask"].shape[0]
    check_tasks(tasks, policy.batch_spec, b)
    if len(texts) != b:
        raise ValueError(f"one text for each of {b} rows is needed, got {len(texts)}")
    ids = tokenizer.encode(list(texts))["input_ids"]
    found = np.asarray(policy.score_program(policy.params, observations, tasks, ids, part=part))
    if np.isnan(found).any():
        raise FloatingPointError(f"the policy's probabilities for row {int(np.argmax(np.isnan(found)))} are no numbers")
    return found


def speech(policy: Any, part: str) -> TextTokenizer:
    """The words of a part of a policy. Raises ValueError where it has no such part that says texts."""
    parts = {
        name: entry
        for name, entry in (policy.config["model"].get("auxiliaries") or {}).items()
        if entry.get("kind") == "text"
    }
    if part not in parts:
        raise ValueError(f"this policy has no part {part!r} that says texts; {suggest(part, parts)}")
    return tokenizer_of(dict(parts[part]["vocabulary"]), policy.model.auxiliaries[part].max_length)


def _allowed(tokenizer: TextTokenizer, only: Sequence[str]) -> np.ndarray:
    """(V,) bool: the pieces of some texts."""
    if isinstance(only, str) or not only:
        raise ValueError(f"only: a list of at least one text whose pieces may be said, got {only!r}")
    for text in only:
        _check(tokenizer, text)
    allowed = np.zeros(tokenizer.vocab_size, bool)
    allowed[tokenizer.encode(list(only))["input_ids"]] = True
    allowed[[PAD, EOS]] = False
    if not allowed.any():
        raise ValueError(f"only={list(only)!r} has no piece that could be said: give at least one text with a word")
    return allowed


def _check(tokenizer: TextTokenizer, text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"texts must be strings, got {text!r:.60}")
    check_text(text)
    if strange := tokenizer.unknown(text):
        raise ValueError(f"{text[:80]!r} has {strange[0]!r}, which this policy cannot say")
    if (length := tokenizer.num_tokens(text)) > tokenizer.max_length:
        raise ValueError(
            f"{text[:80]!r} has {length} ids with its end, this policy says at most {tokenizer.max_length}"
        )
