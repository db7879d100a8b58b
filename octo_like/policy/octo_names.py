"""`Policy` with the names and argument names of Octo's `OctoModel`, for code that was written for it.

    from octo_like import OctoModel
    model = OctoModel.load_pretrained("hf://rail-berkeley/octo-small-1.5", text_model="spiece.model")
    task = model.create_tasks(texts=["pick up the fork"])
    actions = model.sample_actions(
        observation, task, unnormalization_statistics=model.dataset_statistics["bridge_dataset"]["action"],
        rng=jax.random.PRNGKey(0),
    )

What it does not have, an error names: the place where it is here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from octo_like.common import normalization
from octo_like.policy.policy import Policy

# Octo's attributes that are something else here.
_HINTS = {
    "module": "OctoModel.policy.model is the Flax module",
    "text_processor": "OctoModel.policy.text_tokenizer encodes texts",
    "run_transformer": "OctoModel.policy.model.apply runs the network; octo_like probe_policy reads what it knows",
    "from_config": "train.py makes models from configs: docs/training.md",
    "load_config": "OctoModel.config is the config of a loaded policy",
    "replace": "finetune.py changes the parts of a model: docs/finetune.md",
}


class OctoModel:
    """A loaded policy, called as in Octo.

    Attributes:
      policy: the `Policy` behind it.
      config, params, example_batch: of the policy.
      dataset_statistics: normalisation statistics by dataset name, also where Octo has those of its only dataset.
    """

    def __init__(self, policy: Policy):
        self.policy = policy

    @classmethod
    def load_pretrained(
        cls, checkpoint_path: str | os.PathLike, step: int | None = None, *, text_model: str | os.PathLike | None = None
    ) -> OctoModel:
        """Arguments as of `Policy.load_pretrained`; a released Octo needs `text_model` to understand texts."""
        return cls(Policy.load_pretrained(checkpoint_path, step=step, text_model=text_model))

    def save_pretrained(self, checkpoint_path: str | os.PathLike) -> None:
        """Writes the policy (of the present parameters: there are no steps in an export)."""
        self.policy.save_pretrained(checkpoint_path)

    config = property(lambda self: self.policy.config)
    params = property(lambda self: self.policy.params)
    example_batch = property(lambda self: self.policy.example_batch)
    dataset_statistics = property(lambda self: self.policy.statistics)

    def get_pretty_spec(self) -> str:
        return self.policy.get_pretty_spec()

    def create_tasks(
        self, goals: Mapping[str, np.ndarray] | None = None, texts: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """See `Policy.create_tasks`."""
        return self.policy.create_tasks(texts=texts, goals=goals)

    def sample_actions(
        self,
        observations: Mapping[str, Any],
        tasks: Mapping[str, Any],
        unnormalization_statistics: Mapping[str, Any] | None = None,
        *,
        rng: jax.Array | None = None,
        sample_shape: tuple[int, ...] = (),
        timestep_pad_mask: np.ndarray | None = None,
        **others: Any,
    ) -> jax.Array:
        """Action chunks (*sample_shape, B, H, A), see `Policy.sample_actions`.

        Args:
          observations: as there, but proprioception is normalised, as Octo's wrapper `NormalizeProprio` makes it.
          unnormalization_statistics: `dataset_statistics[name]["action"]` of one of the policy's datasets; None gives
            normalised actions.
          timestep_pad_mask: (B, W), in place of the one in the observations.
          others: Octo's further arguments, when they are what happens here anyway: `train=False`, `argmax=False`,
            `temperature=1.0`, and the dataset's own `normalization_type`.

        Raises:
          ValueError: what `Policy.sample_actions` refuses, no `rng`, statistics of none of the datasets.
          TypeError: an argument that Octo has and that means nothing here.
        """
        if rng is None:
            raise ValueError("sample_actions needs rng=jax.random.PRNGKey(seed), another one for every call")
        if "pad_mask" in observations:
            raise ValueError("observation/pad_mask was renamed in Octo 1.5: call it timestep_pad_mask")
        if timestep_pad_mask is not None:
            observations = {**observations, "timestep_pad_mask": timestep_pad_mask}
        name = None
        if unnormalization_statistics is not None:
            name = self._dataset_of(unnormalization_statistics)
            observations = self._in_units(observations, name)
        self._check_others(others, name)
        return self.policy.sample_actions(observations, tasks, rng=rng, unnormalize=name, sample_shape=sample_shape)

    def _dataset_of(self, statistics: Mapping[str, Any]) -> str:
        """The dataset whose action statistics these are."""
        valid = [f"dataset_statistics[{name!r}]['action']" for name in self.policy.statistics]
        if isinstance(statistics, str):
            raise ValueError(f"unnormalization_statistics takes statistics, not a name; valid: {', '.join(valid)}")
        if "action" in statistics:
            raise ValueError("unnormalization_statistics takes those of the actions: add ['action']")
        for name, entry in self.policy.statistics.items():
            known = entry["action"]
            if all(
                field in statistics and np.array_equal(statistics[field], known[field]) for field in ("mean", "std")
            ):
                return name
        raise ValueError(f"unnormalization_statistics are of none of this policy's datasets; valid: {', '.join(valid)}")

    def _in_units(self, observations: Mapping[str, Any], name: str) -> dict[str, Any]:
        """`Policy` takes proprioception in the robot's units, Octo takes it normalised."""
        entry = self.policy.statistics[name]
        if "proprio" not in observations or "proprio" not in entry:
            return dict(observations)
        kind = entry.get("normalization", "normal")
        proprio = np.asarray(observations["proprio"], np.float32)
        return {**observations, "proprio": normalization.unnormalize(proprio, entry["proprio"], kind)}

    def _check_others(self, others: Mapping[str, Any], name: str | None) -> None:
        kind = self.policy.statistics[name].get("normalization", "normal") if name else None
        same = {"train": (False,), "argmax": (False,), "temperature": (1, None), "embodiment_action_dim": (None,)}
        hints = {
            "argmax": "a discrete head with temperature=0 in its config takes the most likely class",
            "temperature": "it is a setting of a discrete head: config.model.heads.NAME.temperature",
            "embodiment_action_dim": "the statistics say how many dimensions the robot has",
            "normalization_type": f"the policy was trained with {kind!r} for {name!r}",
        }
        for key, value in others.items():
            if key == "normalization_type":
                fine = kind is None or getattr(value, "value", value) == kind
            elif key in same:
                fine = value in same[key]
            else:
                raise TypeError(f"sample_actions takes no argument {key!r}")
            if not fine:
                raise TypeError(f"{key}={value!r} means nothing here; {hints.get(key, 'dropout is for training')}")

    def __getattr__(self, name: str) -> Any:
        hint = f": {_HINTS[name]}" if name in _HINTS else f"; OctoModel.policy has {', '.join(_public(Policy))}"
        raise AttributeError(f"OctoModel has no attribute {name!r} here{hint}")


def _public(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]
