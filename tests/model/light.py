"""For tests of heads: a head alone, and a model without cameras. Both compile many times faster than `tiny`."""

import jax
import numpy as np

from octo_like.common.schema import BatchSpec
from octo_like.model.heads import head_batch
from octo_like.model.octo import HEADS
from octo_like.model.tokens import TokenGroup
from tests.model import tiny

SPEC = BatchSpec(
    window_size=2,
    action_horizon=3,
    action_dim=4,
    image_sizes={},
    proprio_dim=5,
    language_length=6,
    heads=("action",),
)


def config(**changes):
    """Proprio and pooled words; everything else as in `tiny`."""
    language = tiny.config()["task_tokenizers"]["language"] | dict(encoder="small", pool=True)
    return (
        tiny.config(
            token_dim=16,
            transformer=dict(num_layers=1, num_heads=2, mlp_dim=32),
            task_tokenizers=dict(language=language),
            observation_tokenizers=dict(proprio=dict(kind="lowdim", obs_keys=("proprio",))),
        )
        | changes
    )


def groups(rows=4, window=2, tokens=1, dim=16, seed=0):
    """What a transformer could have said: {"readout_action": (B, W, n, D), "obs": two tokens more}, all valid."""
    rng = np.random.default_rng(seed)

    def group(n):
        return TokenGroup(rng.normal(size=(rows, window, n, dim)).astype(np.float32), np.ones((rows, window, n), bool))

    return {"readout_action": group(tokens), "obs": group(tokens + 2)}


FLOW = dict(kind="flow", readout="readout_action", action_horizon=3, action_dim=4, hidden_dim=16, sample_steps=4)


class HeadAlone:
    """A head without a transformer, with random parameters.

    Attributes:
      module, params: of the head.
      groups: what it reads.
    """

    def __init__(self, entry, *, rows=4, window=2, seed=0):
        entry = dict(entry)
        self.module = HEADS[entry.pop("kind")](**entry)
        alone = self.module.num_probes if not self.module.use_map else 1
        self.groups = groups(rows, window, alone)
        chunk = (rows, window, self.module.action_horizon, self.module.action_dim)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        zeros = jax.ShapeDtypeStruct(chunk, np.float32)
        shapes = jax.eval_shape(
            lambda keys, zeros: self.module.init(
                jax.random.key(0), self.groups, zeros, zeros, keys, method="loss_terms"
            )["params"],
            keys,
            zeros,
        )
        self.params = tiny.random_values(shapes, seed)

    def apply(self, *args, method, params=None, **kwargs):
        return self.module.apply({"params": self.params if params is None else params}, *args, method=method, **kwargs)

    def terms(self, batch, keys, groups=None):
        """As `OctoModel.loss_terms` makes them."""
        action, mask = head_batch(batch, "action", self.module)
        groups = self.groups if groups is None else groups
        terms = self.apply(groups, action, mask.astype(np.float32), keys, method="loss_terms")
        return terms | {"count": mask.sum()}


def batch(entry, rows=4, window=2, seed=0):
    """Actions and masks for a head: {"action", "action_pad_mask", "observation": {"timestep_pad_mask"}}."""
    rng = np.random.default_rng(seed)
    chunk = (rows, window, entry["action_horizon"], entry["action_dim"])
    return {
        "action": rng.normal(size=chunk).astype(np.float32),
        "action_pad_mask": np.ones(chunk, bool),
        "observation": {"timestep_pad_mask": np.ones((rows, window), bool)},
    }
