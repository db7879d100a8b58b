"""Reading the released Octo checkpoints: their msgpack files, and their configs in our vocabulary.

Format: `<step>/default/` holds the parameters, as one msgpack file `checkpoint` with the whole tree (the releases) or
as arrays in tensorstore's formats (what newer Orbax writes); `config.json` names the modules by class, with keyword
overrides of defaults; `example_batch.msgpack` tells token counts. Parameter names are the same as ours, so only the
configuration is translated. The models behave as they were trained: `octo_compat=True`.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgpack
import numpy as np

from octo_like.common.schema import BatchSpec, flatten, unflatten
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


_PLACEHOLDER = "PLACEHOLDER://"


def read_params(folder: str | os.PathLike) -> dict[str, Any]:
    """The parameter tree in a step's folder, whichever way it was written.

    Known: one msgpack file `checkpoint` with all arrays; the same with arrays in zarr folders beside it; zarr arrays in
    an OCDBT store (`manifest.ocdbt`), zarr version 2 or 3. Array names join the keys of the tree by dots.

    Raises:
      PretrainedError: none of these is there, or an array cannot be read.
    """
    folder = Path(folder)
    file = folder / "checkpoint"
    tree = read_msgpack(file) if file.is_file() else None
    if tree is not None and not _placeholders(tree):
        return _unwrapped(tree)
    names = _array_names(folder)
    if not names:
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "nothing"
        raise PretrainedError(f"{folder} holds no parameters: expected checkpoint or manifest.ocdbt, found {found}")
    if tree is not None:
        for path, name in _placeholders(tree).items():
            if name not in names:
                raise PretrainedError(f"{folder}: array {name!r} that checkpoint refers to is missing")
            *parents, last = path
            node = tree
            for key in parents:
                node = node[key]
            node[last] = _read_array(folder, name, names[name])
        return _unwrapped(tree)
    keys = _metadata_keys(folder)
    arrays = {"/".join(keys.get(name, name.split("."))): _read_array(folder, name, names[name]) for name in names}
    return _unwrapped(unflatten(arrays))


def _unwrapped(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["params"] if set(tree) == {"params"} else tree


def _placeholders(node: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    if isinstance(node, Mapping):
        return {k: v for key, value in node.items() for k, v in _placeholders(value, (*path, key)).items()}
    if isinstance(node, str) and node.startswith(_PLACEHOLDER):
        return {path: node.removeprefix(_PLACEHOLDER)}
    return {}


def _array_names(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Array name to (tensorstore driver, key-value store)."""
    import tensorstore

    base = f"file://{quote(str(folder.resolve()))}/"
    ocdbt = (folder / "manifest.ocdbt").is_file()
    names = {}
    if ocdbt:
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        files = [key.decode() for key in store.list().result()]
    else:
        files = [str(p.relative_to(folder)) for pattern in ("*/.zarray", "*/zarr.json") for p in folder.glob(pattern)]
    for file in files:
        name, _, last = file.rpartition("/")
        driver = {".zarray": "zarr", "zarr.json": "zarr3"}.get(last)
        if driver:
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if ocdbt else f"{base}{quote(name)}/"
            names[name] = driver, store
    return names


def _read_array(folder: Path, name: str, where: tuple[str, Any]) -> np.ndarray:
    import tensorstore

    driver, store = where
    try:
        return tensorstore.open({"driver": driver, "kvstore": store}, open=True).result().read().result()
    except ValueError as error:
        raise PretrainedError(f"{folder}: array {name!r} cannot be read: {error}") from error


def _metadata_keys(folder: Path) -> dict[str, list[str]]:
    """Array name to the keys of the tree, for trees whose keys contain dots; empty when the file does not say."""
    file = folder / "_METADATA"
    if not file.is_file():
        return {}
    entries = json.loads(file.read_text()).get("tree_metadata", {}).values()
    paths = [[str(part["key"]) for part in entry["key_metadata"]] for entry in entries]
    return {".".join(path): path for path in paths}


def is_release(path: str | os.PathLike) -> bool:
    """Whether a folder is laid out as a released Octo checkpoint."""
    path = Path(path)
    return (path / "config.json").is_file() and (path / "example_batch.msgpack").is_file()


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


def load_release(path: str | os.PathLike, *, step: int | None = None, t5: Mapping[str, Any] | None = None):
    """Reads a released checkpoint directory.

    Args:
      step: which step; the newest when None.
      t5: fields of `T5Config`, where the parameters do not tell: the longest distance (128) and the epsilon (1e-6).

    Returns:
      (model config in our vocabulary, parameters, statistics as stored, example batch).
    """
    path = Path(path)
    steps = release_steps(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    if not steps or not (path / "config.json").is_file():
        raise PretrainedError(
            f"{path} is not a released Octo checkpoint: expected config.json and <step>/default/, "
            f"found {sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else 'nothing'}"
        )
    if step is not None and step not in steps:
        raise PretrainedError(f"{path} has no step {step}; valid: {steps}")
    step = steps[-1] if step is None else step
    config = json.loads((path / "config.json").read_text())
    example = read_msgpack(path / "example_batch.msgpack")
    statistics_file = path / "dataset_statistics.json"
    statistics = json.loads(statistics_file.read_text()) if statistics_file.is_file() else {}
    params = _in_float32(read_params(path / str(step) / "default"))
    sizes = t5_sizes(params)
    if sizes is not None:
        sizes |= _t5_file(path / "t5_config.json") | dict(t5 or {})
    return translate_config(config["model"], t5=sizes), params, statistics, example


def _in_float32(params: Mapping[str, Any]) -> dict[str, Any]:
    """A release may have been stored in half precision; it was trained in float32 and is computed so."""
    return unflatten({name: np.asarray(leaf, np.float32) for name, leaf in flatten(params)})


# Hugging Face's names of what a T5 encoder's parameters do not tell.
_T5_FIELDS = {"relative_attention_max_distance": "max_distance", "layer_norm_epsilon": "epsilon"}


def _t5_file(path: Path) -> dict[str, Any]:
    """From a T5's own config, which a release does not bring but may have been given."""
    if not path.is_file():
        return {}
    given = json.loads(path.read_text())
    return {ours: given[name] for name, ours in _T5_FIELDS.items() if name in given}


def t5_sizes(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sizes of the T5 encoder among a release's parameters, for encoders that no name stands for; None without one.

    Shapes tell all but the longest distance, which is 128 in every published T5; the relative bias has a column a head.
    """
    flat = {name: leaf.shape for name, leaf in flatten(params) if "/hf_model/" in name}
    if not flat:
        return None
    inner = {name.split("/hf_model/", 1)[1]: shape for name, shape in flat.items()}
    vocab_size, d_model = inner["shared/embedding"]
    num_buckets, num_heads = inner["encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding"]
    gated = "encoder/block/0/layer/1/DenseReluDense/wi_0/kernel" in inner
    feed_forward = inner[f"encoder/block/0/layer/1/DenseReluDense/{'wi_0' if gated else 'wi'}/kernel"][1]
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": inner["encoder/block/0/layer/0/SelfAttention/q/kernel"][1] // num_heads,
        "d_ff": feed_forward,
        "num_layers": 1 + max(int(name.split("/")[2]) for name in inner if name.startswith("encoder/block/")),
        "num_heads": num_heads,
        "num_buckets": num_buckets,
        "gated": gated,
    }


def translate_config(model: Mapping[str, Any], *, t5: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A release's `config["model"]` in our vocabulary (see configs/octo_small.py).

    Raises:
      PretrainedError: the config names a class or an option that is unknown here, or lacks one that has no default.
    """
    required = ("token_embedding_size", "max_horizon", "transformer_kwargs", "readouts", "heads")
    missing = [name for name in (*required, "task_tokenizers", "observation_tokenizers") if model.get(name) is None]
    missing += [
        n for n in ("num_layers", "mlp_dim", "num_attention_heads") if n not in model.get("transformer_kwargs", {})
    ]
    if missing:
        raise PretrainedError(f"the release's config lacks model.{', model.'.join(missing)}; it has {sorted(model)}")
    known = {"num_layers", "mlp_dim", "num_attention_heads", "dropout_rate", "attention_dropout_rate"}
    for name, value in model["transformer_kwargs"].items():
        if name not in known and not (name == "add_position_embedding" and not value):
            raise PretrainedError(f"transformer_kwargs.{name}={value!r} in the release's config is not supported here")
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


def _kwargs(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keyword arguments of a component; positional ones would be lost silently."""
    if spec.get("args"):
        raise PretrainedError(f"{spec['name']} has positional arguments {spec['args']} in the release's config")
    return spec.get("kwargs") or {}


def _tokenizer(spec: Mapping[str, Any], t5) -> dict[str, Any]:
    kwargs = _kwargs(spec)
    for option in kwargs:
        valid = _TOKENIZER_OPTIONS.get(spec["name"])
        if valid is not None and option not in valid:
            raise PretrainedError(
                f"unknown option {option!r} of {spec['name']} in the release's config; known: {sorted(valid)}"
            )
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
            "normalization": _kwargs(encoder).get("img_norm_type", "default"),
            "use_pad_mask": kwargs.get("proper_pad_mask", True),
        }
    if spec["name"] == "LanguageTokenizer":
        encoder = kwargs.get("encoder")
        entry = {"kind": "language", "use_pad_mask": kwargs.get("proper_pad_mask", True)}
        if encoder is None:
            return entry | {"encoder": "embedding"}
        # What the parameters say is right, whatever the encoder is called.
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
    raise PretrainedError(
        f"unknown tokenizer {spec['name']!r} in the release's config; known: {sorted(_TOKENIZER_OPTIONS)}"
    )


def _stem(encoder: Mapping[str, Any]) -> dict[str, Any]:
    name, kwargs = encoder["name"], dict(_kwargs(encoder))
    stems = {
        "SmallStem": ("small", {"patch_size": 32}),
        "SmallStem16": ("small", {"patch_size": 16}),
        "SmallStem32": ("small", {"patch_size": 32}),
        "PatchEncoder": ("patch", {"patch_size": 32}),
        "ViTResnet": ("resnet", {"num_layers": ()}),
        "ResNet26FILM": ("resnet", {"use_film": True, "num_layers": (2, 2, 2, 2)}),
    }
    if name not in stems:
        raise PretrainedError(f"unknown image encoder {name!r} in the release's config; known: {sorted(stems)}")
    kind, defaults = stems[name]
    kwargs.pop("img_norm_type", None)
    stem = {"kind": kind, "module_name": f"{name}_0", "use_film": False, **defaults}
    if kind != "resnet":
        stem["num_features"] = 512
    if kind == "small":
        stem["features"] = (32, 96, 192, 384)
    valid = {
        "small": {"patch_size", "num_features", "use_film", "features", "kernel_sizes", "strides", "padding"},
        "patch": {"patch_size", "num_features", "use_film"},
        "resnet": {"width", "num_layers", "use_film"},
    }[kind]
    for option, value in kwargs.items():
        if option not in valid:
            raise PretrainedError(
                f"unknown option {option!r} of {name} in the release's config; known: {sorted(valid)}"
            )
        stem[option] = tuple(value) if isinstance(value, list) else value
    if kind == "small":
        # There, the patch embedding is patch_size / 16 wide whatever came before; here, patch_size counts pixels.
        strides = stem.get("strides", (2,) * len(stem["features"]))
        stem["patch_size"] = max(1, stem["patch_size"] // 16) * math.prod(strides)
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
    kwargs = _kwargs(spec)
    entry = {"kind": kind, **defaults, "readout": kwargs["readout_key"]}
    for name, value in kwargs.items():
        if name in _HEAD_OPTIONS:
            entry[_HEAD_OPTIONS[name]] = value
        elif name != "readout_key":
            raise PretrainedError(f"unknown option {name!r} of {spec['name']} in the release's config")
    return entry


def release_spec(config: Mapping[str, Any], example: Mapping[str, Any], heads: Mapping[str, Any]) -> BatchSpec:
    """The batch spec of a release, from its example batch."""
    observation, task = example["observation"], example.get("task", example.get("tasks", {}))
    images = {
        key.removeprefix("image_"): tuple(map(int, value.shape[2:4]))
        for key, value in observation.items()
        if key.startswith("image_")
    }
    depths = {
        key.removeprefix("depth_"): tuple(map(int, value.shape[2:4]))
        for key, value in observation.items()
        if key.startswith("depth_")
    }
    extras = {
        key: tuple(map(int, value.shape[2:]))
        for key, value in observation.items()
        if np.ndim(value) > 2 and key != "proprio" and not key.startswith(("image_", "depth_"))
    }
    text = task.get("language_instruction")
    embedded = text is not None and not isinstance(text, Mapping)
    return BatchSpec(
        window_size=observation["timestep_pad_mask" if "timestep_pad_mask" in observation else "pad_mask"].shape[1],
        action_horizon=max(head.get("action_horizon", 1) for head in heads.values()),
        action_dim=max(head.get("action_dim", 7) for head in heads.values()),
        image_sizes=images,
        depth_sizes=depths,
        goal_images=tuple(slot for slot in images if f"image_{slot}" in task),
        proprio_dim=observation["proprio"].shape[-1] if "proprio" in observation else None,
        language_length=text["input_ids"].shape[-1] if isinstance(text, Mapping) else None,
        heads=tuple(heads),
        extra_observations=extras,
        language_embedding=tuple(map(int, text.shape[1:])) if embedded else None,
    )


def name_statistics(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics by dataset name: a pretraining release has them so, a finetuned one holds its only entry bare.

    The bare entry is called "default". Actions of the releases are normalised by mean and deviation.
    """
    named = {"default": statistics} if "action" in statistics else dict(statistics)
    return {name: {"normalization": "normal", **entry} for name, entry in named.items()}
