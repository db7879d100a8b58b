"""What finetune.py does before the loop: the run's config completed, the weights put in place, and what is trained.

Every function takes values and returns values; `finetune.py` is the order in which they are called.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from octo_like.common.config import ConfigError, freeze, to_dict
from octo_like.common.defaults import batch_spec
from octo_like.common.parts import Modules, PartError, modules_in
from octo_like.common.schema import BatchSpec, flatten
from octo_like.common.text import BUILTIN_MODELS, TextTokenizer
from octo_like.model.octo import OctoModel, init_params
from octo_like.policy import lora, surgery
from octo_like.policy.describe import abstract_params
from octo_like.policy.policy import Policy
from octo_like.policy.pretrained import LoadReport, PretrainedError, load_t5, merge_params, with_t5
from octo_like.training.augment import Augmentation, augmentation_from_config
from octo_like.training.checkpoint import FOLDER, Checkpointer
from octo_like.training.optimizer import find_optimizer
from octo_like.training.warm_start import load_params

log = logging.getLogger(__name__)

# Cameras for which configs/finetune.py brings an augmentation, whether the robot has them or not.
PRESET = ("primary", "secondary", "wrist")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What adaptation takes from a pretrained policy.

    Attributes:
      model: its model config.
      params: its parameters.
      batch_spec: what its batches looked like.
      text_tokenizer: None when it takes no language, or came without a vocabulary.
    """

    model: Mapping[str, Any]
    params: Mapping[str, Any]
    batch_spec: BatchSpec
    text_tokenizer: TextTokenizer | None


def load_pretrained(location: str, modules: Modules = ()) -> Pretrained:
    """Reads an exported policy or a released Octo checkpoint (see `Policy.load_pretrained`), or the averaged parameters
    in a pretraining run's checkpoints: WORKDIR/checkpoints (the newest) or WORKDIR/checkpoints/STEP.

    Args:
      modules: of the policy's own parts; only these are imported.

    Raises:
      PretrainedError, LocationError, CheckpointError: there is none of these, or it is damaged.
    """
    *_, parent, last = ["", "", *str(location).rstrip("/").split("/")]
    if last != FOLDER and not (last.isdigit() and parent == FOLDER):
        policy = Policy.load_pretrained(location, modules=modules)
        return Pretrained(policy.config["model"], policy.params, policy.batch_spec, policy.text_tokenizer)
    saved = Checkpointer(location, read_only=True).read().metadata["config"]
    if saved.get("pretrained"):
        raise PretrainedError(
            f"{location} belongs to an adaptation of {saved['pretrained']}; start from that run's export instead"
        )
    run = freeze(saved)
    tokenizer = TextTokenizer.load(run.text.model, run.text.max_length) if run.text.model else None
    params, source = load_params(location)
    log.info("read %s", source)
    return Pretrained(to_dict(run)["model"], params, batch_spec(run), tokenizer)


# --------------------------------------------------------------------------------------------------------------- config


def own_modules(config: Any) -> tuple[str, ...]:
    """Modules whose parts a run may import: those that its user names, by themselves (`config.modules`) or in a kind.

    A pretrained policy's own kinds are not among them: it may come from somebody else.
    """
    tree = to_dict(config)
    given = (tree["modules"],) if isinstance(tree["modules"], str) else tree["modules"]
    return (*given, *modules_in({"model": tree["model"], "surgery": tree["surgery"]}))


def check_settings(config: Any) -> None:
    """What can be said of a config before anything is read, beside `octo_like.common.checks.check_run`.

    Raises:
      ConfigError, ValueError: a word, an optimizer, factors or an augmentation that no run could use.
    """
    surgery.check_word(config.mode, tuple(surgery.MODES), "mode")
    surgery.check_word(config.conditioning, surgery.CONDITIONINGS, "conditioning")
    find_optimizer(config.optimizer.name, to_dict(config.optimizer.arguments))
    if config.mode == "lora":
        lora.LoraSpec(config.lora.rank, config.lora.alpha, tuple(config.lora.targets))
    for slot, fields in config.augmentation.items():
        _check_augmentation(slot, fields)
    if config.text.t5_weights and not any(Path(config.text.t5_weights).glob("*.safetensors")):
        raise ConfigError(f"text.t5_weights: no *.safetensors in {config.text.t5_weights!r}")


def _check_augmentation(slot: str, fields: Any) -> None:
    if fields is None:
        return
    if not isinstance(fields, Mapping | FrozenConfigDict):
        valid = ", ".join(field.name for field in dataclasses.fields(Augmentation))
        raise ConfigError(f"augmentation.{slot} is {fields!r}; give its fields ({valid}), or None for none")
    try:
        augmentation_from_config(slot, dict(fields))
    except PartError as error:
        raise ConfigError(str(error)) from error
    except IndexError as error:
        raise ConfigError(f"augmentation.{slot}: {error}") from error


def with_inputs(
    config: Any, model: Mapping[str, Any], goal_images: tuple[str, ...], pretrained: BatchSpec | None
) -> FrozenConfigDict:
    """The config with the cameras, their sizes and the kind of task that the run is going to have.

    Args:
      model: config of the model after surgery.
      goal_images: from `surgery.condition`.
      pretrained: spec of the pretrained policy.

    Raises:
      ConfigError: a camera of unknown size, or of a size its pretrained tokenizer was not trained at.
    """
    tree = to_dict(config)
    known = dict(pretrained.image_sizes) if pretrained else {}
    if not tree["image_sizes"]:
        slots = _cameras(tree["data"])
        slots = tuple(known) if slots is None else slots
        if unknown := [slot for slot in slots if slot not in known]:
            has = f"the pretrained policy has {sorted(known)}" if pretrained else "there is no pretrained policy"
            raise ConfigError(
                f"image_sizes is empty and {has}: give the size of camera {unknown[0]!r}, and of all others, e.g. "
                f"--config.image_sizes.{unknown[0]}=128,128"
            )
        tree["image_sizes"] = {slot: tuple(known[slot]) for slot in slots}
    if pretrained and tree.get("resize") not in (None, pretrained.resize):
        log.warning("resize=%r: the pretrained policy has seen pictures by %r", tree["resize"], pretrained.resize)
    tree["resize"] = tree.get("resize") or (pretrained.resize if pretrained else "stretch")
    if tree["proprio_dim"] is None and tree["data"]["kind"] == "rlds":
        datasets = tree["data"]["datasets"].items()
        if reading := {name: tuple(fields["proprio_keys"]) for name, fields in datasets if fields.get("proprio_keys")}:
            keys = "; ".join(f"data.datasets.{name}.proprio_keys is {keys}" for name, keys in reading.items())
            raise ConfigError(
                f"{keys}; but proprio_dim is None: set --config.proprio_dim to the number of their entries (of the "
                "dataset with most), or proprio_keys to ()"
            )
    tree["extra_observations"] = _extra_observations(tree, dict(pretrained.extra_observations) if pretrained else {})
    replaced = {
        name
        for name, entry in tree["surgery"].get("observation_tokenizers", {}).items()
        if isinstance(entry, Mapping) and ("kind" in entry or "stem" in entry)
    }
    for slot, size in tree["image_sizes"].items():
        readers = surgery.readers(model["observation_tokenizers"], "obs_keys", f"image_{slot}")
        if slot in known and tuple(size) != tuple(known[slot]) and set(readers) - replaced:
            raise ConfigError(
                f"image_sizes.{slot} is {tuple(size)}, but the pretrained tokenizer {readers[0]!r} was trained at "
                f"{tuple(known[slot])}. Stored images are resized when they are read, whatever their size: leave "
                f"image_sizes.{slot} out, or replace the tokenizer by surgery"
            )
    tree["goal_images"] = goal_images
    if unknown := [slot for slot in tree["augmentation"] if slot not in tree["image_sizes"] and slot not in PRESET]:
        raise ConfigError(f"augmentation.{unknown[0]}: the run has no such camera, but {sorted(tree['image_sizes'])}")
    tree["augmentation"] = {
        slot: entry for slot, entry in tree["augmentation"].items() if slot in tree["image_sizes"] and entry is not None
    }
    if config.conditioning == "goal_image":
        tree["text"]["model"] = None
    elif tree["text"]["model"] is None:
        tree["text"]["model"] = "builtin"  # and with it the pretrained policy's own, see `text_tokenizer`
    return freeze(tree)


def _extra_observations(tree: Mapping[str, Any], known: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Shapes of the other sensors: those that the config gives, and of those that the datasets bring the pretrained
    policy's. Raises ConfigError for one of unknown shape."""
    shapes = dict(tree["extra_observations"])
    for name, fields in tree["data"]["datasets"].items() if tree["data"]["kind"] != "synthetic" else ():
        for key in [key for key, stored in (fields.get("extra_keys") or {}).items() if stored is not None]:
            if key not in shapes and key not in known:
                raise ConfigError(
                    f"data.datasets.{name}.extra_keys has {key!r}, but extra_observations does not say its shape: set "
                    f"--config.extra_observations.{key} to the number of its entries, e.g. 6 or (2,16)"
                )
            shapes.setdefault(key, known.get(key))
    for key, shape in shapes.items():
        own = (shape,) if isinstance(shape, int) else tuple(shape)
        if key in known and own != tuple(known[key]):
            raise ConfigError(
                f"extra_observations.{key} is {own}, but the pretrained policy has {tuple(known[key])}: give the "
                "sensor another name, and a tokenizer of its own by surgery"
            )
    return shapes


def _cameras(data: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Camera slots that the datasets of a run name; None when they are not said here (mixtures, synthetic data)."""
    if data["kind"] != "rlds" or data["mix"] or not data["datasets"]:
        return None
    entries = [fields.get("image_keys") for fields in data["datasets"].values()]
    if not all(isinstance(keys, Mapping) and keys for keys in entries):
        return None
    return tuple(dict.fromkeys(slot for keys in entries for slot, key in keys.items() if key is not None))


def text_tokenizer(config: Any, model: Mapping[str, Any], pretrained: Pretrained | None) -> TextTokenizer | None:
    """The text tokenizer of the run: the pretrained policy's own, unless the config names the file of another one.

    Raises:
      ConfigError: a T5 encoder came without its vocabulary and none is named.
      PretrainedError: the model takes precomputed sentence embeddings, which the data do not hold.
    """
    tasks = (model.get("task_tokenizers") or {}).items()
    embedded = [name for name, entry in tasks if entry.get("encoder") == "embedding"]
    if embedded and config.text.model is not None:
        raise PretrainedError(
            f"task tokenizer {embedded[0]!r} takes precomputed sentence embeddings, and datasets hold texts: replace "
            f"it (--config.surgery.task_tokenizers.{embedded[0]}=...) or use conditioning 'goal_image'"
        )
    if config.text.model is None:
        return None
    if config.text.model == "builtin" and pretrained is not None and pretrained.text_tokenizer is not None:
        return pretrained.text_tokenizer
    if config.text.model in BUILTIN_MODELS and any(entry.get("encoder") == "t5" for _, entry in tasks):
        raise ConfigError(
            f"the language encoder is T5, and text.model={config.text.model!r} is not its vocabulary, which the "
            "checkpoint does not bring: set --config.text.model=PATH of T5's spiece.model"
        )
    length = config.text.max_length
    if pretrained is not None and pretrained.batch_spec.language_length is not None:
        length = pretrained.batch_spec.language_length  # position embeddings of words have this length
    return TextTokenizer.load(config.text.model, length)


def with_schedule(config: Any, transitions: int, *, validated: bool = True) -> FrozenConfigDict:
    """The config with the numbers of steps that follow from the amount of data.

    num_steps = passes * transitions / batch_size, within min_steps and max_steps: every step of every demonstration is
    seen `passes` times. warmup_steps = num_steps / 20. ema_decay = 1 - 10 / num_steps, within 0.9 and 0.9999: an
    average over the last tenth of the run or so. What the config gives is left as it is.

    Args:
      transitions: steps of all training demonstrations.
      validated: whether any demonstration is held out; without, there is nothing to rank checkpoints by.

    Raises:
      ConfigError: num_steps is to be derived and there is nothing to derive it from; early stopping without held-out
        demonstrations.
    """
    tree = to_dict(config)
    steps = tree["num_steps"]
    if steps is None:
        recipe = tree["recipe"]
        if not transitions:
            raise ConfigError("num_steps is None and there are no demonstrations to derive it from: set it")
        wanted = round(recipe["passes"] * transitions / tree["batch_size"])
        steps = tree["num_steps"] = min(max(wanted, recipe["min_steps"]), recipe["max_steps"])
        log.info(
            "num_steps %d: %g passes over %d transitions in batches of %d, within %d and %d",
            *(steps, recipe["passes"], transitions, tree["batch_size"], recipe["min_steps"], recipe["max_steps"]),
        )
    if tree["optimizer"]["warmup_steps"] is None:
        tree["optimizer"]["warmup_steps"] = steps // 20
    if tree["ema_decay"] is None:
        tree["ema_decay"] = round(min(max(1 - 10 / steps, 0.9), 0.9999), 6)
    by_rollouts = tree["checkpoint"]["best_metric"].startswith("rollout/") and tree["eval"]["rollouts"]
    if tree["eval"]["every"] is None or not (validated or by_rollouts):
        if tree["early_stopping"]["patience"] is not None:
            raise ConfigError(
                "early_stopping.patience needs evaluations on held-out demonstrations: set val_fraction or val_split "
                "of a dataset, and eval.every"
            )
        if tree["checkpoint"]["keep_best"]:
            log.warning(
                "nothing is evaluated on held-out demonstrations: the newest checkpoints are kept, not the best"
            )
            tree["checkpoint"]["keep_best"] = 0
    return freeze(tree)


def check_actions(model: OctoModel, statistics: Mapping[str, Mapping[str, Any]]) -> None:
    """A part of `check_datasets`, with the flags of finetune.py that help.

    Raises:
      ConfigError: a dataset has more action dimensions than its head.
    """
    for dataset, entry in statistics.items():
        head, width = entry.get("head"), len(entry["action"]["mean"])
        if head is not None and head in model.heads and width > model.heads[head].action_dim:
            raise ConfigError(
                f"{dataset}: its actions have {width} dimensions, but its head {head!r} has "
                f"{model.heads[head].action_dim}. Widen it, which keeps what it knows of the first ones: "
                f"--config.surgery.heads.{head}.action_dim={width}; or give the dataset a head of its own "
                f"(--config.surgery.heads.NAME.copy_of={head} and --config.data.datasets.{dataset}.head=NAME)"
            )


# -------------------------------------------------------------------------------------------------------------- weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """Where training starts, and what it may change.

    Attributes:
      params: the whole tree, NumPy; in mode "lora" with factors beside adapted kernels.
      frozen: paths that keep their values.
      report: what became of every parameter; None from scratch.
      adapters: of mode "lora", else None.
    """

    params: dict[str, Any]
    frozen: frozenset[str]
    report: LoadReport | None
    adapters: lora.LoraSpec | None = None

    def model(self, model: OctoModel) -> Any:
        """The model that computes with `params`."""
        return model if self.adapters is None else lora.AdaptedModel(model, self.adapters)

    def merged(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Parameters as `model` itself knows them, for export."""
        return params if self.adapters is None else _merge(params, self.adapters)

    def documents(self) -> dict[str, str]:
        """The report as files of the run's directory."""
        if self.report is None:
            return {}
        return {"weights.json": json.dumps(self.report.to_dict(), indent=1), "weights.txt": f"{self.report}\n"}


_merge = jax.jit(lora.merge, static_argnums=1)


def make_weights(
    config: Any,
    model: OctoModel,
    model_config: Mapping[str, Any],
    spec: BatchSpec,
    pretrained: Pretrained | None,
    *,
    vocab_size: int = 0,
    untrained: Sequence[str] = (),
) -> Weights:
    """Initial parameters, with those of the pretrained policy where they fit, and what is frozen of them.

    Raises:
      PretrainedError, ConfigError, ValueError: nothing fits, a regex matches nothing, or nothing is left to train.
    """
    rng = jax.random.key(config.seed)
    params = jax.tree.map(np.asarray, jax.device_get(init_params(model, spec, rng)))
    if config.text.t5_weights:
        params = with_t5(params, load_t5(config.text.t5_weights))
    weights, targets = _weights(config, params, model_config, pretrained, vocab_size, untrained)
    if weights.adapters is None:
        return weights
    assert weights.report is not None  # factors are for loaded kernels only
    adapted = lora.add_adapters(weights.params, targets, weights.adapters, jax.random.fold_in(rng, 1))
    params = jax.tree.map(np.asarray, adapted)
    return dataclasses.replace(weights, params=params, report=weights.report.with_adapters(params))


def check_weights(
    config: Any,
    model: OctoModel,
    model_config: Mapping[str, Any],
    spec: BatchSpec,
    pretrained: Pretrained | None,
    *,
    vocab_size: int = 0,
) -> None:
    """Raises what `make_weights` would, from shapes alone: nothing is initialised, copied or compiled."""
    # A stand-in has one entry, seen as many times as its shape asks for.
    shapes = abstract_params(model, spec)
    stand_ins = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes)
    _weights(config, stand_ins, model_config, pretrained, vocab_size, ())


def _weights(
    config: Any,
    params: Any,
    model_config: Mapping[str, Any],
    pretrained: Pretrained | None,
    vocab_size: int,
    untrained: Sequence[str],
) -> tuple[Weights, tuple[str, ...]]:
    """Weights without factors, from initial parameters, and the kernels that get factors."""
    patterns = tuple(config.optimizer.freeze)
    paths = [path for path, _ in flatten(params)]
    encoders = surgery.never_trained(model_config, paths)
    if pretrained is None:
        if config.mode != "full":
            raise ConfigError(f"mode {config.mode!r} keeps pretrained weights, but config.pretrained is not set")
        frozen = surgery.frozen_by_mode("full", patterns, dict.fromkeys(paths, True), untrained)
        _check_encoders(encoders, (), config.text.t5_weights)
        if random := sorted(path for path in frozen - encoders if any(re.search(one, path) for one in patterns)):
            raise ConfigError(
                f"optimizer.freeze={patterns} keeps {random[0]} and {len(random) - 1} more as they are initialised, at "
                "random: train them, or set config.pretrained to a policy that has them"
            )
        return Weights(params, frozen | encoders, None), ()

    rules = surgery.carry(pretrained.model, model_config, to_dict(config)["surgery"])
    source = dict(flatten(jax.device_get(pretrained.params)))
    if config.text.t5_weights:
        source |= {path: leaf for path, leaf in flatten(params) if path in encoders}
    params, report = merge_params(
        params,
        source,
        reinitialize=tuple(config.reinitialize),
        copies=rules.copies,
        resize=rules.resize,
        anew=rules.anew,
    )
    if vocab_size:
        surgery.check_vocabulary(params, vocab_size)
    loaded = {path: status == "loaded" for path, status in report.status.items()}
    _check_encoders(encoders, report.paths("loaded"), None)
    copies = tuple(rules.copies)
    frozen = surgery.frozen_by_mode(config.mode, patterns, loaded, untrained, copies) | encoders
    report = dataclasses.replace(report, frozen=frozen)
    if config.mode != "lora":
        return Weights(params, frozen, report), ()

    adapters = lora.LoraSpec(config.lora.rank, config.lora.alpha, tuple(config.lora.targets))
    targets = lora.find_targets(params, adapters)
    if unreached := [path for path in targets if path in encoders]:
        raise ConfigError(f"lora.targets match {unreached[0]}, but no gradient reaches a frozen language encoder")
    # A kernel that is new, or a copy, is trained itself; a loaded one keeps its values and learns through its factors.
    targets = tuple(path for path in targets if loaded[path] and not path.startswith(copies))
    if not targets:
        raise ConfigError("lora.targets match only kernels that are new in this model; these are trained whole anyway")
    report = dataclasses.replace(report, frozen=frozen | set(targets))
    return Weights(params, report.frozen, report, adapters), targets


def _check_encoders(encoders: frozenset[str], loaded, t5_weights) -> None:
    if not t5_weights and (missing := sorted(encoders - set(loaded))):
        raise ConfigError(
            f"{missing[0]} belongs to a language encoder that is not trained, and it is not in the checkpoint: set "
            "--config.text.t5_weights to a folder with its safetensors"
        )
