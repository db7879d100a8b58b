"""A policy with random weights and real parts, made in no time."""

import jax
import numpy as np

from octo_like.common.normalization import compute_statistics
from octo_like.common.schema import BatchSpec
from octo_like.common.text import TextTokenizer
from octo_like.model.octo import build_model, init_params
from octo_like.policy.policy import Policy


def tiny_policy(dataset: str, action_dim: int, proprio_dim: int | None) -> Policy:
    """Random weights, real shapes; statistics of one dataset."""
    return tiny_policy_for({dataset: (action_dim, proprio_dim)})


def tiny_policy_for(datasets: dict[str, tuple[int, int | None]], seed: int = 0) -> Policy:
    """Random weights, real shapes; `datasets`: name to (action dimensions, proprio dimensions or None)."""
    action_dim = max(dims for dims, _ in datasets.values())
    proprio_dim = max((dims for _, dims in datasets.values() if dims), default=None)
    tokenizer = TextTokenizer.load("builtin")
    spec = BatchSpec(
        window_size=1,
        action_horizon=4,
        action_dim=action_dim,
        image_sizes={"primary": (32, 32)},
        proprio_dim=proprio_dim,
        language_length=tokenizer.max_length,
    )
    model = {
        "token_dim": 32,
        "max_window": 1,
        "transformer": {"num_layers": 1, "num_heads": 2, "mlp_dim": 32},
        "task_tokenizers": {"language": {"kind": "language", "encoder": "small", "dim": 16, "num_heads": 2}},
        "observation_tokenizers": {
            "primary": {
                "kind": "image",
                "obs_keys": ["image_primary"],
                "stem": {"kind": "patch", "patch_size": 16, "num_features": 16},
            },
        },
        "readouts": {"action": 1},
        "heads": {
            "action": {
                "kind": "regression",
                "readout": "readout_action",
                "action_horizon": 4,
                "action_dim": action_dim,
            }
        },
    }
    rng = np.random.default_rng(seed)
    statistics = {}
    for name, (dims, proprio) in datasets.items():
        statistics[name] = {"action": compute_statistics(rng.normal(size=(50, dims)).astype(np.float32) * 0.01)}
        kinds = {"names": [f"a{d}" for d in range(dims)], "kinds": ["delta"] * dims}
        statistics[name]["dimensions"] = {"action": kinds}
        if proprio:
            statistics[name]["proprio"] = compute_statistics(rng.normal(size=(50, proprio)).astype(np.float32))
    built = build_model(model, vocab_size=tokenizer.vocab_size)
    # Random numbers from NumPy: compiling the initialisers takes longer than everything else here.
    shapes = jax.eval_shape(lambda: init_params(built, spec, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
    return Policy({"model": model, "batch_spec": spec.to_json()}, params, statistics, tokenizer)
