"""What a policy says in words."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from octo_like.common.vocabularies import tokenizer_of
from octo_like.common.words import suggest
from octo_like.policy.observations import check_rows, row_keys


def say(
    policy: Any,
    observations: Mapping[str, Any],
    tasks: Mapping[str, Any],
    rng: jax.Array | None,
    unnormalize: str | None,
    *,
    part: str,
    temperature: float,
    top_k: int,
) -> list[str]:
    """`Policy.predict_text`."""
    parts = {
        name: entry
        for name, entry in (policy.config["model"].get("auxiliaries") or {}).items()
        if entry.get("kind") == "text"
    }
    if part not in parts:
        raise ValueError(f"this policy has no part {part!r} that says texts; {suggest(part, parts)}")
    if temperature > 0 and rng is None:
        raise ValueError(f"temperature {temperature} draws: give rng")
    observations = policy.prepare_observations(observations, unnormalize)
    b = observations["timestep_pad_mask"].shape[0]
    check_rows(tasks, b)
    keys_b = None if temperature == 0 else row_keys(rng, b)
    options = dict(part=part, temperature=float(temperature), top_k=int(top_k))
    ids = policy.text_program(policy.params, observations, tasks, keys_b, **options)
    tokenizer = tokenizer_of(dict(parts[part]["vocabulary"]), int(parts[part].get("max_length", ids.shape[1])))
    return tokenizer.decode(np.asarray(ids))
