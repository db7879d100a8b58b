"""Access to the reference checkpoints and arrays (see the README beside them)."""

import json

import jax
import numpy as np

from octo_like.common.schema import unflatten
from octo_like.model.octo import build_model
from octo_like.policy.octo_release import load_release

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


class Golden:
    """One reference checkpoint: its model, parameters and arrays."""

    def __init__(self, directory):
        t5_file = directory / "t5_config.json"
        t5 = None
        if t5_file.exists():
            names = {"relative_attention_num_buckets": "num_buckets", "relative_attention_max_distance": "max_distance"}
            names |= {key: key for key in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")}
            t5 = {names[key]: value for key, value in json.loads(t5_file.read_text()).items() if key in names}
        self.directory = directory
        self.config, self.params, self.statistics, self.example = load_release(directory, t5=t5)
        self.model = build_model(self.config)

    def case(self, name="io"):
        flat = dict(np.load(self.directory / f"{name}.npz"))
        return unflatten(flat)

    def apply(self, *args, method="groups", **kwargs):
        """One compiled call: operation by operation would compile each of them."""
        return jax.jit(lambda params, *a: self.model.apply({"params": params}, *a, method=method, **kwargs))(
            self.params, *args
        )
