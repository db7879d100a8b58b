"""A tiny model with every kind of part, for tests."""

import jax
import numpy as np

from octo_like.common.schema import BatchSpec, flatten, unflatten
from octo_like.model.octo import init_params

SPEC = BatchSpec(
    window_size=2,
    action_horizon=3,
    action_dim=4,
    image_sizes={"primary": (32, 32), "wrist": (16, 16)},
    goal_images=("primary",),
    proprio_dim=5,
    language_length=6,
    heads=("action",),
)

VOCAB = 50


def diffusion(**changes):
    return dict(
        kind="diffusion",
        readout="readout_action",
        action_horizon=3,
        action_dim=4,
        num_steps=5,
        hidden_dim=16,
        **changes,
    )


def config(**changes):
    tiny = dict(
        token_dim=32,
        max_window=4,
        repeat_task_tokens=True,
        transformer=dict(num_layers=2, num_heads=4, mlp_dim=64),
        task_tokenizers=dict(
            language=dict(kind="language", encoder="small", dim=16, num_layers=1, vocab_size=VOCAB, max_length=6)
        ),
        observation_tokenizers=dict(
            primary=dict(
                kind="image",
                stem=dict(kind="small", patch_size=16, features=(32, 32, 32, 32), num_features=16),
                obs_keys=("image_primary",),
                goal_keys=("image_primary",),
            ),
            wrist=dict(
                kind="image",
                stem=dict(kind="conv", layers=((4, 4, 16), (3, 2, 16)), use_film=True),
                obs_keys=("image_wrist",),
                film_keys=("task",),
            ),
            proprio=dict(kind="lowdim", obs_keys=("proprio",)),
        ),
        readouts=dict(action=1),
        heads=dict(action=diffusion()),
    )
    return tiny | changes


def random_params(model, spec=SPEC, seed=0):
    """Random values for every parameter, zero-initialised ones too: a zero would hide a leak. Compiles nothing."""
    return random_values(jax.eval_shape(lambda: init_params(model, spec, jax.random.key(0))), seed)


def random_values(shapes, seed=0):
    """Parameters of given shapes."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path.endswith(("scale", "weight")):
            return (1 + 0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
        fan_in = max(1, int(np.prod(leaf.shape[:-1]))) if path.endswith("kernel") else 25
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(leaf.dtype)

    return unflatten({path: fill(path, leaf) for path, leaf in flatten(shapes)})
