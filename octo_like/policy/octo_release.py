"""Reading the released Octo checkpoints: their msgpack files, and their configs in our vocabulary.

Format: `<step>/default/` holds the parameters, as one msgpack file `checkpoint` with the whole tree (the releases) or
as arrays in tensorstore's formats (what newer Orbax writes); `config.json` names the modules by class, with keyword
overrides of defaults; `example_batch.msgpack` tells token counts. Parameter names are the same as ours, so only the
configuration is translated. The models behave as they were trained: `octo_compat=True`.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from octo_like.common.schema import BatchSpec, flatten
from octo_like.model.t5 import T5_CONFIGS, T5Config
from octo_like.policy.entries import BOOL, INTEGER, NUMBER, OBJECT, SIZE, SIZES, WORD, WORDS, Entry, Kind
from octo_like.policy.octo_arrays import read_msgpack, read_params
from octo_like.policy.pretrained import PARAMS_FILE, PretrainedError, check_feed_forward, read_json

CONFIG, EXAMPLE = "config.json", "example_batch.msgpack"


def is_release(path: str | os.PathLike) -> bool:
    """Whether a folder is laid out as a released Octo checkpoint, complete or not."""
    path = Path(path)
    if not path.is_dir() or (path / PARAMS_FILE).exists():
        return False
    steps = any(
        (path / str(step) / "default").is_dir() for step in release_steps(entry.name for entry in path.iterdir())
    )
    return (path / EXAMPLE).is_file() or (steps and (path / CONFIG).is_file())


def release_steps(names: Iterable[str]) -> list[int]:
    """Ascending step numbers among the first parts of file names."""
    return sorted({int(first) for first in (name.split("/", 1)[0] for name in names) if first.isdigit()})


def release_files(names: Sequence[str], step: int | None = None) -> list[str]:
    """The files of a release that loading one step (None: the newest) needs; all files when it is no release."""
    steps = release_steps(names)
    if not steps:
        return list(names)
    step = steps[-1] if step is None else step
    return [name for name in names if "/" not in name or name.startswith(f"{step}/")]


def load_release(
    path: str | os.PathLike, *, step: int | None = None, t5: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Reads a released checkpoint directory.

    Args:
      step: which step; the newest when None.
      t5: fields of `T5Config`, where the parameters do not tell: the longest distance (128) and the epsilon (1e-6).

    Returns:
      (model config in our vocabulary, parameters, statistics as stored, example batch).
    """
    path = Path(path)
    steps = release_steps(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    if not steps or not (path / CONFIG).is_file():
        raise PretrainedError(
            f"{path} is not a released Octo checkpoint: expected {CONFIG} and <step>/default/, "
            f"found {sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else 'nothing'}"
        )
    if step is not None and step not in steps:
        raise PretrainedError(f"{path} has no step {step}; valid: {steps}")
    step = steps[-1] if step is None else step
    config = Entry(read_json(path / CONFIG), path / CONFIG)
    if not (path / EXAMPLE).is_file():
        raise PretrainedError(f"{path / EXAMPLE} is missing; expected the example batch, which tells the inputs' sizes")
    example = read_msgpack(path / EXAMPLE)
    statistics_file = path / "dataset_statistics.json"
    statistics = read_json(statistics_file) if statistics_file.is_file() else {}
    for name in statistics if "action" not in statistics else ("action",):
        Entry(statistics, statistics_file).entry(name)
    params = read_params(path / str(step) / "default")
    sizes = t5_sizes(params, path / str(step) / "default")
    if sizes is not None:
        sizes |= _t5_file(path / "t5_config.json", sizes["gated"]) | _t5_fields(t5 or {})
    return translate_config(config.get("model", OBJECT), t5=sizes, file=path / CONFIG), params, statistics, example


# Hugging Face's names of what a T5 encoder's parameters do not tell.
_T5_FIELDS = {"relative_attention_max_distance": "max_distance", "layer_norm_epsilon": "epsilon"}


def _t5_file(path: Path, gated: bool) -> dict[str, Any]:
    """From a T5's own config, which a release does not bring but may have been given."""
    if not path.is_file():
        return {}
    given = Entry(read_json(path), path)
    check_feed_forward(path, given.value, gated)
    return {ours: given.get(name, NUMBER) for name, ours in _T5_FIELDS.items() if name in given.value}


def _t5_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(T5Config)}
    entry = Entry(given, "fields of the T5")
    entry.check_options(fields, "T5Config")
    kinds = {"gated": BOOL, "epsilon": NUMBER}
    return {name: entry.get(name, kinds.get(name, INTEGER)) for name in given}


def t5_sizes(params: Mapping[str, Any], where: str | os.PathLike = "the parameters") -> dict[str, Any] | None:
    """Sizes of the T5 encoder among a release's parameters, for encoders that no name stands for; None without one.

    Shapes tell all but the longest distance, which is 128 in every published T5; the relative bias has a column a head.

    Raises:
      PretrainedError: an array that tells a size is missing or has no such shape.
    """
    flat = {name: leaf.shape for name, leaf in flatten(params) if "/hf_model/" in name}
    if not flat:
        return None
    inner = {name.split("/hf_model/", 1)[1]: shape for name, shape in flat.items()}

    def table(name: str) -> tuple[int, int]:
        shape = inner.get(name, "missing")
        if len(shape) != 2 or not all(shape):
            prefix = next(iter(flat)).split("/hf_model/")[0]
            raise PretrainedError(
                f"{where}: {prefix}/hf_model/{name} is {shape}; expected an array with two axes, since the tree "
                "holds a T5 encoder"
            )
        return shape

    vocab_size, d_model = table("shared/embedding")
    num_buckets, num_heads = table("encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding")
    gated = "encoder/block/0/layer/1/DenseReluDense/wi_0/kernel" in inner
    blocks = [int(found[1]) for name in inner if (found := re.match(r"encoder/block/(\d+)/", name))]
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": table("encoder/block/0/layer/0/SelfAttention/q/kernel")[1] // num_heads,
        "d_ff": table(f"encoder/block/0/layer/1/DenseReluDense/{'wi_0' if gated else 'wi'}/kernel")[1],
        "num_layers": 1 + max(blocks),
        "num_heads": num_heads,
        "num_buckets": num_buckets,
        "gated": gated,
    }


def translate_config(
    model: Mapping[str, Any], *, t5: Mapping[str, Any] | None = None, file: str | os.PathLike = CONFIG
) -> dict[str, Any]:
    """A release's `config["model"]` in our vocabulary (see configs/octo_small.py).

    Args:
      t5: sizes of the T5 encoder, where the parameters hold one.
      file: where the config comes from, for messages.

    Raises:
      PretrainedError: the config names a class or an option that is unknown here, lacks one that has no default, or
        has a value of another kind.
    """
    whole = Entry(model, file, "model.")
    kwargs = whole.entry("transformer_kwargs")
    if not kwargs.get("add_position_embedding", BOOL, False):
        kwargs = Entry({k: v for k, v in kwargs.value.items() if k != "add_position_embedding"}, file, kwargs.path)
    rates = {"dropout_rate", "attention_dropout_rate"}
    for name, value in kwargs.value.items():
        if name not in {"num_layers", "mlp_dim", "num_attention_heads", *rates}:
            raise kwargs.error(name, f"is {value!r}, which is not supported here")
    transformer = {
        "num_heads": kwargs.get("num_attention_heads", SIZE),
        "num_layers": kwargs.get("num_layers", SIZE),
        "mlp_dim": kwargs.get("mlp_dim", SIZE),
        "dropout_rate": kwargs.get("dropout_rate", NUMBER, 0.1),
        "attention_dropout_rate": kwargs.get("attention_dropout_rate", NUMBER, 0.1),
    }
    tokenizers = {
        group: {name: _tokenizer(spec, t5) for name, spec in whole.entries(group).items()}
        for group in ("task_tokenizers", "observation_tokenizers")
    }
    readouts = whole.entry("readouts")
    groups = {"task", "obs"} | {f"readout_{name}" for name in readouts.value}
    groups |= {f"task_{name}" for name in tokenizers["task_tokenizers"]}
    groups |= {f"obs_{name}" for name in tokenizers["observation_tokenizers"]}
    return {
        "token_dim": whole.get("token_embedding_size", SIZE),
        "max_window": whole.get("max_horizon", SIZE),
        "repeat_task_tokens": whole.get("repeat_task_tokens", BOOL, False),
        # The first releases do not know the option and were trained with the look-up that is off by one.
        "legacy_attention": not whole.get("use_correct_attention", BOOL, False),
        "octo_compat": True,
        "transformer": transformer,
        **tokenizers,
        "readouts": {name: readouts.get(name, SIZE) for name in readouts.value},
        "heads": {name: _head(spec, groups) for name, spec in whole.entries("heads").items()},
    }


_TOKENIZER_OPTIONS = {
    "ImageTokenizer": {
        "encoder",
        "use_token_learner",
        "num_tokens",
        "conditioning_type",  # read by nobody
        "obs_stack_keys",
        "task_stack_keys",
        "task_film_keys",
        "proper_pad_mask",
    },
    "LanguageTokenizer": {"encoder", "finetune_encoder", "proper_pad_mask"},
    "LowdimObsTokenizer": {"obs_keys", "discretize", "n_bins", "bin_type", "low", "high", "proper_pad_mask"},
}


def _tokenizer(spec: Entry, t5: Mapping[str, Any] | None) -> dict[str, Any]:
    name, kwargs = spec.component()
    if name not in _TOKENIZER_OPTIONS:
        raise spec.error("name", f"is an unknown tokenizer {name!r}; known: {sorted(_TOKENIZER_OPTIONS)}")
    kwargs.check_options(_TOKENIZER_OPTIONS[name], name)
    if name == "ImageTokenizer":
        stem, normalization = _stem(kwargs.entry("encoder"))
        learned = kwargs.get("num_tokens", SIZE, 8) if kwargs.get("use_token_learner", BOOL, False) else 0
        return {
            "kind": "image",
            "stem": stem,
            "obs_keys": kwargs.get("obs_stack_keys", WORDS, ("image_.*", "depth_.*")),
            "goal_keys": kwargs.get("task_stack_keys", WORDS, ()),
            "film_keys": kwargs.get("task_film_keys", WORDS, ()),
            "num_learned_tokens": learned,
            "normalization": normalization,
            "use_pad_mask": kwargs.get("proper_pad_mask", BOOL, True),
        }
    if name == "LanguageTokenizer":
        encoder = kwargs.get("encoder", WORD, None)
        entry = {"kind": "language", "use_pad_mask": kwargs.get("proper_pad_mask", BOOL, True)}
        if encoder is None:
            return entry | {"encoder": "embedding"}
        # What the parameters say is right, whatever the encoder is called.
        if t5 is None and encoder not in T5_CONFIGS:
            raise kwargs.error(
                "encoder",
                f"is {encoder!r}, a size that is not known here, and the parameters hold no T5 encoder that would tell "
                f"it; expected one of {sorted(T5_CONFIGS)}",
            )
        size = encoder if t5 is None else dict(t5)
        return entry | {
            "encoder": "t5",
            "t5": size,
            "finetune_encoder": kwargs.get("finetune_encoder", BOOL, False),
        }
    return {
        "kind": "lowdim",
        "per": "scalar",
        "obs_keys": kwargs.get("obs_keys", WORDS),
        "discretize": kwargs.get("discretize", BOOL, False),
        "num_bins": kwargs.get("n_bins", SIZE, 256),
        "bin_type": kwargs.get("bin_type", WORD, "uniform"),
        "low": kwargs.get("low", NUMBER, 0.0),
        "high": kwargs.get("high", NUMBER, 1.0),
    }


_STEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmallStem": ("small", {"patch_size": 32}),
    "SmallStem16": ("small", {"patch_size": 16}),
    "SmallStem32": ("small", {"patch_size": 32}),
    "PatchEncoder": ("patch", {"patch_size": 32}),
    "ViTResnet": ("resnet", {"num_layers": ()}),
    "ResNet26FILM": ("resnet", {"use_film": True, "num_layers": (2, 2, 2, 2)}),
}
_STEM_OPTIONS = {
    "small": {
        "patch_size": SIZE,
        "num_features": SIZE,
        "use_film": BOOL,
        "features": SIZES,
        "kernel_sizes": SIZES,
        "strides": SIZES,
        "padding": SIZES,
    },
    "patch": {"patch_size": SIZE, "num_features": SIZE, "use_film": BOOL},
    "resnet": {"width": NUMBER, "num_layers": SIZES, "use_film": BOOL},
}


def _stem(encoder: Entry) -> tuple[dict[str, Any], str]:
    """The stem, and how its images are normalised."""
    name, kwargs = encoder.component()
    if name not in _STEMS:
        raise encoder.error("name", f"is an unknown image encoder {name!r}; known: {sorted(_STEMS)}")
    kind, defaults = _STEMS[name]
    stem: dict[str, Any] = {"kind": kind, "module_name": f"{name}_0", "use_film": False, **defaults}
    if kind != "resnet":
        stem["num_features"] = 512
    if kind == "small":
        stem["features"] = (32, 96, 192, 384)
    valid = _STEM_OPTIONS[kind]
    kwargs.check_options({*valid, "img_norm_type"}, name)
    stem |= {option: kwargs.get(option, valid[option]) for option in kwargs.given() if option in valid}
    if kind == "small":
        # There, the patch embedding is patch_size / 16 wide whatever came before; here, patch_size counts pixels.
        strides = stem.get("strides", (2,) * len(stem["features"]))
        stem["patch_size"] = max(1, stem["patch_size"] // 16) * math.prod(strides)
    return stem, kwargs.get("img_norm_type", WORD, "default")


_HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "MSEActionHead": ("regression", {"loss": "mse", "use_map": True}),
    "L1ActionHead": ("regression", {"loss": "l1", "use_map": True}),
    "ContinuousActionHead": ("regression", {"loss": "mse", "use_map": False}),
    "DiffusionActionHead": ("diffusion", {"use_map": False}),
    "DiscreteActionHead": ("discrete", {"use_map": False}),
}
_HEAD_OPTIONS = {
    "use_map": ("use_map", BOOL),
    "action_horizon": ("action_horizon", SIZE),
    "pred_horizon": ("action_horizon", SIZE),
    "action_dim": ("action_dim", SIZE),
    "max_action": ("max_action", NUMBER),
    "loss_type": ("loss", WORD),
    "time_dim": ("time_dim", SIZE),
    "num_blocks": ("num_blocks", INTEGER),
    "hidden_dim": ("hidden_dim", SIZE),
    "use_layer_norm": ("use_layer_norm", BOOL),
    "dropout_rate": ("dropout_rate", NUMBER),
    "diffusion_steps": ("num_steps", SIZE),
    "n_diffusion_samples": ("num_samples", SIZE),
    "token_per": ("token_per", WORD),
    "vocab_size": ("num_bins", SIZE),
    "normalization_type": ("bin_type", WORD),
}


def _head(spec: Entry, groups: Iterable[str]) -> dict[str, Any]:
    name, kwargs = spec.component()
    if name not in _HEADS:
        raise spec.error("name", f"is an unknown action head {name!r}; known: {sorted(_HEADS)}")
    kwargs.check_options({"readout_key", *_HEAD_OPTIONS}, name)
    kind, defaults = _HEADS[name]
    readout = kwargs.get("readout_key", WORD)
    if readout not in groups:
        raise kwargs.error("readout_key", f"is {readout!r}; expected one of {sorted(groups)}")
    entry = {"kind": kind, **defaults, "readout": readout}
    for option in kwargs.given():
        if option in _HEAD_OPTIONS:
            ours, expected = _HEAD_OPTIONS[option]
            entry[ours] = kwargs.get(option, expected)
    return entry


def release_spec(
    config: Mapping[str, Any],
    example: Mapping[str, Any],
    heads: Mapping[str, Any],
    file: str | os.PathLike = EXAMPLE,
) -> BatchSpec:
    """The batch spec of a release, from its example batch.

    Args:
      file: where the example batch comes from, for messages.

    Raises:
      PretrainedError: the example batch lacks a part, or one has not the axes that it should have.
    """
    whole = Entry(example, file)
    observation = whole.entry("observation")
    task = whole.entry("task" if "task" in example else "tasks", {})
    pad_mask = "timestep_pad_mask" if "timestep_pad_mask" in observation.value else "pad_mask"

    def sizes(prefix: str) -> dict[str, tuple[int, int]]:
        found = {}
        for key in observation.value:
            if key.startswith(prefix):
                _, _, height, width, _ = _shape(observation, key, "B W h w channels")
                found[key.removeprefix(prefix)] = height, width
        return found

    images = sizes("image_")
    # Whether the task is done stands among Octo's observations, and is none.
    others = (
        key
        for key in observation.value
        if key not in ("proprio", "task_completed") and not key.startswith(("image_", "depth_"))
    )
    text = task.value.get("language_instruction")
    tokens = isinstance(text, Mapping)
    embedded = None if tokens or text is None else _shape(task, "language_instruction", "B ... d")[1:]
    return BatchSpec(
        window_size=_shape(observation, pad_mask, "B W")[1],
        action_horizon=max((head.get("action_horizon", 1) for head in heads.values()), default=1),
        action_dim=max((head.get("action_dim", 7) for head in heads.values()), default=7),
        image_sizes=images,
        depth_sizes=sizes("depth_"),
        goal_images=tuple(slot for slot in images if f"image_{slot}" in task.value),
        proprio_dim=_shape(observation, "proprio", "B W P")[-1] if "proprio" in observation.value else None,
        language_length=_shape(task.entry("language_instruction"), "input_ids", "B L")[-1] if tokens else None,
        heads=tuple(heads),
        extra_observations={
            key: tuple(map(int, observation.value[key].shape[2:]))
            for key in others
            if np.ndim(observation.value[key]) > 2
        },
        language_embedding=embedded,
    )


def _shape(batch: Entry, key: str, axes: str) -> tuple[int, ...]:
    """Shape of an array of the example batch. `axes`: their names; "..." for any number."""
    kind = Kind(f"an array ({axes.replace(' ', ', ')})", lambda value: isinstance(value, np.ndarray))
    shape, names = batch.get(key, kind).shape, axes.split()
    if len(shape) < len(names) - 1 if "..." in names else len(shape) != len(names):
        raise batch.error(key, f"has shape {shape}; expected {kind.name}")
    return tuple(map(int, shape))


def name_statistics(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics by dataset name: a pretraining release has them so, a finetuned one holds its only entry bare.

    The bare entry is called "default". Actions of the releases are normalised by mean and deviation.
    """
    named = {"default": statistics} if "action" in statistics else dict(statistics)
    return {name: {"normalization": "normal", **entry} for name, entry in named.items()}
