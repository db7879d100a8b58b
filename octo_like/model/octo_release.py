"""Reading the released Octo checkpoints: their msgpack files, and their configs in our vocabulary.

Format: `<step>/default/checkpoint` is one msgpack file with the whole parameter tree; `config.json` names the modules
by class, with keyword overrides of defaults; `example_batch.msgpack` tells token counts. Parameter names are the same
as ours, so only the configuration is translated. The models behave as they were trained: `octo_compat=True`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from octo_like.common.schema import BatchSpec
from octo_like.model.pretrained import PretrainedError

_ARRAY, _SCALAR, _TUPLE = 1, 3, 4


def read_msgpack(path: str | os.PathLike) -> Any:
    """A Flax msgpack file: arrays are extension 1 with payload (shape, dtype name, bytes), scalars 3, tuples 4."""

    def extension(code, data):
        if code in (_ARRAY, _SCALAR):
            shape, dtype, raw = msgpack.unpackb(data, raw=True)
            array = np.frombuffer(raw, np.dtype(dtype.decode())).reshape(shape)
            return array if code == _ARRAY else array[()]
        if code == _TUPLE:
            return tuple(msgpack.unpackb(data, ext_hook=extension, raw=False, strict_map_key=False))
        raise PretrainedError(f"{path}: unknown msgpack extension {code}")

    try:
        tree = msgpack.unpackb(Path(path).read_bytes(), ext_hook=extension, raw=False, strict_map_key=False)
    except (ValueError, msgpack.exceptions.ExtraData) as error:
        raise PretrainedError(f"{path} is not a Flax msgpack file: {error}") from error
    return _join_chunks(tree)


def _join_chunks(node: Any) -> Any:
    """Arrays over 2^30 bytes are stored as a dict of flat pieces."""
    if not isinstance(node, Mapping):
        return node
    if "__msgpack_chunked_array__" in node:
        pieces = node["chunks"]
        flat = np.concatenate(
            [pieces[key] for key in sorted(pieces, key=int)] if isinstance(pieces, Mapping) else pieces
        )
        shape = node["shape"]
        shape = [shape[key] for key in sorted(shape, key=int)] if isinstance(shape, Mapping) else shape
        return flat.reshape(shape)
    return {key: _join_chunks(value) for key, value in node.items()}


def load_release(path: str | os.PathLike, *, step: int | None = None, t5: Mapping[str, Any] | None = None):
    """Reads a released checkpoint directory.

    Args:
      step: which step; the newest when None.
      t5: sizes of the T5 encoder, for encoders that are not a standard size.

    Returns:
      (model config in our vocabulary, parameters, statistics as stored, example batch).
    """
    path = Path(path)
    steps = sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.is_dir() else []
    step = steps[-1] if step is None and steps else step
    file = path / str(step) / "default" / "checkpoint"
    if not file.is_file() or not (path / "config.json").is_file():
        raise PretrainedError(
            f"{path} is not a released Octo checkpoint: expected config.json and <step>/default/checkpoint, "
            f"found {sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else 'nothing'}"
        )
    config = json.loads((path / "config.json").read_text())
    example = read_msgpack(path / "example_batch.msgpack")
    statistics_file = path / "dataset_statistics.json"
    statistics = json.loads(statistics_file.read_text()) if statistics_file.is_file() else {}
    return translate_config(config["model"], t5=t5), read_msgpack(file), statistics, example


def translate_config(model: Mapping[str, Any], *, t5: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A release's `config["model"]` in our vocabulary (see configs/octo_small.py)."""
    transformer = {"num_heads": model["transformer_kwargs"]["num_attention_heads"]}
    for name, default in (
        ("num_layers", None),
        ("mlp_dim", None),
        ("dropout_rate", 0.1),
        ("attention_dropout_rate", 0.1),
    ):
        transformer[name] = model["transformer_kwargs"].get(name, default)
    return {
        "token_dim": model["token_embedding_size"],
        "max_window": model["max_horizon"],
        "repeat_task_tokens": model.get("repeat_task_tokens", False),
        "legacy_attention": not model.get("use_correct_attention", False),
        "octo_compat": True,
        "transformer": transformer,
        "task_tokenizers": {name: _tokenizer(spec, t5) for name, spec in model["task_tokenizers"].items()},
        "observation_tokenizers": {
            name: _tokenizer(spec, t5) for name, spec in model["observation_tokenizers"].items()
        },
        "readouts": dict(model["readouts"]),
        "heads": {name: _head(spec) for name, spec in model["heads"].items()},
    }


def _tokenizer(spec: Mapping[str, Any], t5) -> dict[str, Any]:
    kwargs = spec["kwargs"]
    if spec["name"] == "ImageTokenizer":
        encoder = kwargs["encoder"]
        stem = _stem(encoder)
        learned = kwargs.get("num_tokens", 8) if kwargs.get("use_token_learner", False) else 0
        return {
            "kind": "image",
            "stem": stem,
            "obs_keys": tuple(kwargs.get("obs_stack_keys", ("image_.*", "depth_.*"))),
            "goal_keys": tuple(kwargs.get("task_stack_keys", ())),
            "film_keys": tuple(kwargs.get("task_film_keys", ())),
            "num_learned_tokens": learned,
            "normalization": encoder["kwargs"].get("img_norm_type", "default"),
            "use_pad_mask": kwargs.get("proper_pad_mask", True),
        }
    if spec["name"] == "LanguageTokenizer":
        encoder = kwargs.get("encoder")
        entry = {"kind": "language", "use_pad_mask": kwargs.get("proper_pad_mask", True)}
        if encoder is None:
            return entry | {"encoder": "embedding"}
        size = encoder if t5 is None else dict(t5)
        return entry | {"encoder": "t5", "t5": size, "finetune_encoder": kwargs.get("finetune_encoder", False)}
    if spec["name"] == "LowdimObsTokenizer":
        return {
            "kind": "lowdim",
            "per": "scalar",
            "obs_keys": tuple(kwargs["obs_keys"]),
            "discretize": kwargs.get("discretize", False),
            "num_bins": kwargs.get("n_bins", 256),
            "bin_type": kwargs.get("bin_type", "uniform"),
            "low": kwargs.get("low", 0.0),
            "high": kwargs.get("high", 1.0),
        }
    raise PretrainedError(f"unknown tokenizer {spec['name']!r} in the release's config")


def _stem(encoder: Mapping[str, Any]) -> dict[str, Any]:
    name, kwargs = encoder["name"], encoder["kwargs"]
    stems = {
        "SmallStem": ("small", 16),
        "SmallStem16": ("small", 16),
        "SmallStem32": ("small", 32),
        "PatchEncoder": ("patch", 32),
    }
    if name not in stems:
        raise PretrainedError(f"unknown image encoder {name!r} in the release's config; known: {sorted(stems)}")
    kind, patch = stems[name]
    stem = {
        "kind": kind,
        "patch_size": kwargs.get("patch_size", patch),
        "num_features": kwargs.get("num_features", 512),
        "use_film": kwargs.get("use_film", False),
        "module_name": f"{name}_0",
    }
    if kind == "small":
        stem["features"] = tuple(kwargs.get("features", (32, 96, 192, 384)))
    return stem


_HEADS = {
    "MSEActionHead": ("regression", {"loss": "mse", "use_map": True}),
    "L1ActionHead": ("regression", {"loss": "l1", "use_map": True}),
    "ContinuousActionHead": ("regression", {"loss": "mse", "use_map": False}),
    "DiffusionActionHead": ("diffusion", {"use_map": False}),
    "DiscreteActionHead": ("discrete", {"use_map": False}),
}
_HEAD_OPTIONS = {
    "use_map": "use_map",
    "action_horizon": "action_horizon",
    "pred_horizon": "action_horizon",
    "action_dim": "action_dim",
    "max_action": "max_action",
    "loss_type": "loss",
    "time_dim": "time_dim",
    "num_blocks": "num_blocks",
    "hidden_dim": "hidden_dim",
    "use_layer_norm": "use_layer_norm",
    "dropout_rate": "dropout_rate",
    "diffusion_steps": "num_steps",
    "n_diffusion_samples": "num_samples",
    "token_per": "token_per",
    "vocab_size": "num_bins",
    "normalization_type": "bin_type",
}


def _head(spec: Mapping[str, Any]) -> dict[str, Any]:
    if spec["name"] not in _HEADS:
        raise PretrainedError(f"unknown action head {spec['name']!r} in the release's config; known: {sorted(_HEADS)}")
    kind, defaults = _HEADS[spec["name"]]
    entry = {"kind": kind, **defaults, "readout": spec["kwargs"]["readout_key"]}
    for name, value in spec["kwargs"].items():
        if name in _HEAD_OPTIONS:
            entry[_HEAD_OPTIONS[name]] = value
        elif name != "readout_key":
            raise PretrainedError(f"unknown option {name!r} of {spec['name']} in the release's config")
    return entry


def release_spec(config: Mapping[str, Any], example: Mapping[str, Any], heads: Mapping[str, Any]) -> BatchSpec:
    """The batch spec of a release, from its example batch."""
    observation, task = example["observation"], example.get("task", example.get("tasks"))
    images = {
        key.removeprefix("image_"): value.shape[2:4] for key, value in observation.items() if key.startswith("image_")
    }
    text = task.get("language_instruction")
    return BatchSpec(
        window_size=observation["timestep_pad_mask" if "timestep_pad_mask" in observation else "pad_mask"].shape[1],
        action_horizon=max(head["action_horizon"] for head in heads.values()),
        action_dim=max(head["action_dim"] for head in heads.values()),
        image_sizes=images,
        goal_images=tuple(slot for slot in images if f"image_{slot}" in task),
        proprio_dim=observation["proprio"].shape[-1] if "proprio" in observation else None,
        language_length=text["input_ids"].shape[-1] if isinstance(text, Mapping) else None,
        heads=tuple(heads),
    )
