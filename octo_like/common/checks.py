"""What can be said of a run's config before anything is read: `check_run`, beside the defaults it is about.

A key that is added to `octo_like.common.defaults` gets its line here, unless any value of its type will do.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octo_like.common.config import ConfigError, to_dict
from octo_like.common.storage import Files, Kind, StorageError, kind_of
from octo_like.common.words import suggest

TEXT_LENGTH = 16  # of a language tokenizer that does not say its own

Rule = tuple[str, Callable[[Any], bool]]  # what is valid, in words; whether a value is


def _whole(least: int, *, or_none: bool = False) -> Rule:
    words = f"a whole number of at least {least}{', or None' if or_none else ''}"
    return words, lambda x: (x is None and or_none) or (_is_whole(x) and x >= least)


def _number(words: str, holds: Callable[[float], bool], *, or_none: bool = False) -> Rule:
    return words + (", or None" if or_none else ""), lambda x: (x is None and or_none) or (_is_number(x) and holds(x))


def _word(*valid: str) -> Rule:
    return f"one of {', '.join(map(repr, valid))}", lambda x: x in valid


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e300


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


_TEXT: Rule = ("a text, or None", lambda x: x is None or isinstance(x, str))
_FLAG: Rule = ("True or False", lambda x: isinstance(x, bool))
_SHARE = _number("a number from 0 to 1", lambda x: 0 <= x <= 1)
_POSITIVE = _number("a positive number", lambda x: x > 0)
_NOT_NEGATIVE = _number("a number of at least 0", lambda x: x >= 0)
_MINUTES = _number("a number of minutes, 0 for none", lambda x: x >= 0, or_none=True)
_DECAY = _number("at least 0 and less than 1", lambda x: 0 <= x < 1)

RULES: dict[str, Rule] = {
    "seed": ("a whole number of 64 bits", lambda x: _is_whole(x) and abs(x) < 2**63),
    "num_steps": _whole(1),
    "batch_size": _whole(1),
    "accumulate": _whole(1),
    "window_size": _whole(1),
    "resize": _word("stretch", "letterbox", "crop"),
    "proprio_dim": _whole(1, or_none=True),
    "ema_decay": _DECAY,
    "log_every": _whole(1),
    "max_bad_steps": _whole(1, or_none=True),
    "init_from": _TEXT,
    "text.model": _TEXT,
    "text.t5_weights": _TEXT,
    "text.max_length": _whole(1),
    "data.kind": _word("rlds", "memory", "synthetic"),
    "data.data_dir": _TEXT,
    "data.cache_dir": _TEXT,
    "data.mix": _TEXT,
    "data.workers": _whole(0),
    "data.index_workers": _whole(1, or_none=True),
    "data.index_processes": _whole(1, or_none=True),
    "data.num_demos": _whole(1, or_none=True),
    "data.num_demos_of": _word("all", "training"),
    "data.num_lanes": _whole(1, or_none=True),
    "data.max_visits": _whole(1),
    "data.balance_weights": _FLAG,
    "data.decode": _word("parity", "fast"),
    "data.max_goal_distance": _whole(1, or_none=True),
    "data.last_subtask_steps": _whole(1),
    "data.octo_compat": _FLAG,
    **{
        f"data.{name}": _SHARE
        for name in (
            *("keep_goal_prob", "drop_task_prob", "paraphrase_prob", "drop_subtask_prob", "subtask_alone_prob"),
            *("last_subtask_prob", "image_dropout_prob", "max_bad_fraction"),
        )
    },
    "data.host_threads": _whole(1),
    "data.host_memory_gb": _POSITIVE,
    "data.prefetch": _whole(1),
    "own_subtasks.prob": _SHARE,
    "own_subtasks.after": _whole(0),
    "optimizer.schedule": _word("constant", "rsqrt", "cosine"),
    "optimizer.peak": _POSITIVE,
    "optimizer.warmup_steps": _whole(0),
    "optimizer.timescale": _POSITIVE,
    "optimizer.decay_steps": _whole(1, or_none=True),
    "optimizer.end": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _number("a positive number", lambda x: x > 0, or_none=True),
    "optimizer.b2": _DECAY,
    "mesh.data": (
        "a whole number of at least 1, or -1 for what is left",
        lambda x: _is_whole(x) and (x == -1 or x > 0),
    ),
    "mesh.fsdp": _whole(1),
    "mesh.min_size": _whole(0),
    "checkpoint.every": _whole(0, or_none=True),
    "checkpoint.keep_last": _whole(1),
    "checkpoint.keep_every": _whole(1, or_none=True),
    "checkpoint.keep_best": _whole(0),
    "checkpoint.best_metric": (
        "a pattern of names of metrics",
        lambda x: isinstance(x, str) and bool(x),
    ),
    "checkpoint.best_mode": _word("min", "max"),
    "checkpoint.export": _word("ema", "raw"),
    "eval.every": _whole(0, or_none=True),
    "eval.batch_size": _whole(1, or_none=True),
    "eval.batches": _whole(1),
    "eval.rollouts": _whole(0),
    "eval.exec_horizon": _whole(1, or_none=True),
    "eval.plan_every": _whole(1, or_none=True),
    "early_stopping.patience": _whole(1, or_none=True),
    **{
        f"watchdog.{name}": _MINUTES
        for name in ("minutes", "startup_minutes", "data_minutes", "restore_minutes", "agreement_minutes")
    },
    "watchdog.exit": _FLAG,
    "wandb.project": _TEXT,
    "wandb.name": _TEXT,
}
# Of finetune.py, where None is derived when the run starts.
ADAPTATION_RULES: dict[str, Rule] = {
    "pretrained": _TEXT,
    "resize": ("'stretch', 'letterbox', 'crop', or None", lambda x: x in ("stretch", "letterbox", "crop", None)),
    "num_steps": _whole(1, or_none=True),
    "ema_decay": _number("at least 0 and less than 1", lambda x: 0 <= x < 1, or_none=True),
    "optimizer.warmup_steps": _whole(0, or_none=True),
    "recipe.passes": _POSITIVE,
    "recipe.min_steps": _whole(1),
    "recipe.max_steps": _whole(1),
}
SCHEMES = ("gs", "s3")  # of buckets that checkpoints can be written to
MESH_AXES = ("data", "fsdp")
DTYPES = ("float32", "bfloat16", "float16")
BIN_TYPES = ("uniform", "normal", "openvla", "rt1", "rt2")  # of heads that choose among bins
BOUNDED_BINS = ("openvla", "rt1", "rt2")  # those whose range is -1 to 1 unless a head says another
# Fields of the model's parts that are sizes or numbers of something, and those that are shares which are dropped.
SIZES = (
    *("token_dim", "max_window", "num_heads", "mlp_dim", "hidden_dim", "time_dim", "dim", "vocab_size"),
    *("action_dim", "action_horizon", "num_probes", "num_steps", "sample_steps", "num_samples", "num_bins"),
    *("num_tokens", "num_features", "num_keypoints", "num_groups", "patch_size", "max_length"),
)
RATES = ("dropout_rate", "attention_dropout_rate")


def check_run(config: Any, *, adapts: bool = False) -> None:
    """Checks a whole config. Keys that it lacks, as configs of earlier versions may, are not looked at.

    Args:
      adapts: it is for finetune.py.

    Raises:
      ConfigError: a config of the other program, a value that no run could use, keys that contradict each other, or
        something the run needs that is not installed.
    """
    tree = to_dict(config)
    if adapts != ("pretrained" in tree):
        here, there = ("finetune.py", "train.py") if adapts else ("train.py", "finetune.py")
        made = "default_config()" if adapts else "adaptation_config()"
        raise ConfigError(f"this config is for {there} (it begins with {made}): run python {there}, not {here}")
    for key, (valid, holds) in (RULES | (ADAPTATION_RULES if adapts else {})).items():
        node: Any = tree
        for part in key.split("."):
            node = node.get(part, _ABSENT) if isinstance(node, Mapping) else _ABSENT
        if node is not _ABSENT and not holds(node):
            words = re.findall(r"'(\w+)'", valid)
            near = f" ({suggest(node, words)})" if words and isinstance(node, str) else ""
            raise ConfigError(f"{key} must be {valid}; got {node!r}{near}")
    _check_shapes(tree)
    _check_contradictions(tree, adapts)
    _check_installed(tree)


class _Absent:
    pass


_ABSENT = _Absent()


def _check_shapes(tree: Mapping[str, Any]) -> None:
    for group in ("image_sizes", "depth_sizes"):
        for slot, size in (tree.get(group) or {}).items():
            if not (isinstance(size, Sequence) and len(size) == 2 and all(_is_whole(x) and x > 0 for x in size)):
                raise ConfigError(
                    f"{group}.{slot} must be a height and a width in pixels, as --config.{group}.{slot}=64,64; "
                    f"got {size!r}"
                )
    for key, shape in (tree.get("extra_observations") or {}).items():
        sizes = (shape,) if _is_whole(shape) else shape
        if not (isinstance(sizes, Sequence) and sizes and all(_is_whole(x) and x > 0 for x in sizes)):
            raise ConfigError(f"extra_observations.{key} must be a number of entries or a shape; got {shape!r}")
    episodes = tree["data"].get("episodes_mixed")
    for name, value in (episodes or {}).items() if isinstance(episodes, Mapping) else [("", episodes)]:
        if not (_is_whole(value) and value > 0) and episodes is not None:
            where = f"data.episodes_mixed{'.' if name else ''}{name}"
            raise ConfigError(f"{where} must be a whole number of at least 1, or None; got {value!r}")
    if (model := tree.get("model")) is not None:
        if not isinstance(model, Mapping):
            raise ConfigError(f"model must be a group of fields; got {model!r}")
        if (dtype := model.get("dtype", "float32")) not in DTYPES:
            raise ConfigError(f"model.dtype must be one of {', '.join(map(repr, DTYPES))}; got {dtype!r}")
        _check_model(model, tree)
        _check_parts(model, "model")
    _check_parts(tree.get("surgery"), "surgery")
    overrides = (tree.get("mesh") or {}).get("overrides", ())
    if not isinstance(overrides, Sequence) or any(
        isinstance(one, str) or not isinstance(one, Sequence) or len(one) != 2 or not isinstance(one[0], str)
        for one in overrides
    ):
        raise ConfigError(
            f"mesh.overrides must hold pairs of a regex of paths and the mesh axis, or None, of each dimension, as "
            f"(('.*/kernel', (None, 'fsdp')),); got {overrides!r}"
        )
    traced, steps = parse_steps(tree.get("profile_steps")), tree["num_steps"]
    if traced is not None and steps is not None and traced[0] > steps:
        raise ConfigError(f"profile_steps {traced[0]}:{traced[1]} begin after the run's last step, num_steps={steps}")
    for pattern, axes in overrides:
        if not _compiles(pattern):
            raise ConfigError(f"mesh.overrides: {pattern!r} is not a regular expression")
        named = [axes] if isinstance(axes, str) or not isinstance(axes, Sequence) else axes
        if named is not axes or any(axis not in (*MESH_AXES, None) for axis in named):
            raise ConfigError(
                f"mesh.overrides: {pattern!r} is placed by {axes!r}; expected the mesh axis of each dimension, "
                f"{', '.join(map(repr, MESH_AXES))} or None, as (None, 'fsdp')"
            )
    for key in ("optimizer.freeze", "reinitialize", "lora.targets"):
        group, _, name = key.rpartition(".")
        patterns = (tree.get(group) or {}).get(name, ()) if group else tree.get(name, ())
        for pattern in (patterns,) if isinstance(patterns, str) else patterns or ():
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(f"{key}: {pattern!r} is not a regular expression: {error}") from error


def _check_sizes(where: str, group: Mapping[str, Any]) -> None:
    if ":" in str(group.get("kind", "")):  # a part of the user's own, whose fields are its own
        return
    for name, value in group.items():
        if isinstance(value, Mapping):
            _check_sizes(f"{where}.{name}", value)
        elif value is None:
            continue
        elif name in SIZES and not (_is_whole(value) and value > 0):
            raise ConfigError(f"{where}.{name} must be a whole number of at least 1; got {value!r}")
        elif name == "num_layers" and not (_is_whole(value) and value >= (least := 0 if "tokenizers" in where else 1)):
            raise ConfigError(f"{where}.{name} must be a whole number of at least {least}; got {value!r}")
        elif name in RATES and not (_is_number(value) and 0 <= value < 1):
            raise ConfigError(f"{where}.{name} must be {_DECAY[0]}; got {value!r}")


def _check_keys(model: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    """Every tokenizer of observations finds a key of a batch, and every camera and sensor a tokenizer."""
    entries = model.get("observation_tokenizers") or {}
    if not all(isinstance(entry, Mapping) for entry in entries.values()):
        return
    keys = [f"image_{slot}" for slot in tree["image_sizes"]]
    keys += [f"depth_{slot}" for slot in tree.get("depth_sizes") or {}]
    keys += ["proprio"] if tree.get("proprio_dim") is not None else []
    keys += list(tree.get("extra_observations") or {})
    match = re.match if model.get("octo_compat") else re.fullmatch
    read: set[str] = set()
    for name, entry in entries.items():
        patterns = entry.get("obs_keys", ())
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        found = {key for pattern in patterns for key in keys if match(pattern, key)}
        if patterns and not found:
            raise ConfigError(
                f"model.observation_tokenizers.{name}.obs_keys: the run has no {', '.join(patterns)}; "
                f"{suggest(patterns[0], keys)}"
            )
        read |= found
    own = any(":" in str(entry.get("kind", "")) for entry in entries.values())
    if entries and not own and (unread := [key for key in keys if key not in read]):
        raise ConfigError(
            f"no tokenizer reads observation/{unread[0]}: add one to model.observation_tokenizers, or leave it out of "
            "the run"
        )


def _check_model(model: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    _check_sizes("model", model)
    if "pretrained" not in tree:  # finetune.py looks at the pretrained policy's model, after surgery
        _check_keys(model, tree)
    for name, count in (model.get("readouts") or {}).items():
        if not (_is_whole(count) and count > 0):
            raise ConfigError(f"model.readouts.{name} must be a whole number of tokens, at least 1; got {count!r}")
    length = tree["text"]["max_length"]
    for name, entry in (model.get("task_tokenizers") or {}).items():
        longest = entry.get("max_length", TEXT_LENGTH) if isinstance(entry, Mapping) else None
        if longest is None or entry.get("encoder", "small") != "small" or entry.get("kind") != "language":
            continue
        if tree["text"]["model"] is not None and length > longest:
            raise ConfigError(
                f"text.max_length={length}, but model.task_tokenizers.{name} has positions for {longest} words: set "
                f"model.task_tokenizers.{name}.max_length to the same"
            )


def _check_parts(group: Any, where: str) -> None:
    for kind in ("heads", "auxiliaries") if isinstance(group, Mapping) else ():
        for name, entry in (group.get(kind) or {}).items():
            weight = entry.get("weight", 1.0) if isinstance(entry, Mapping) else 1.0
            if not _is_number(weight) or weight < 0:
                raise ConfigError(f"{where}.{kind}.{name}.weight must be a number of at least 0; got {weight!r}")
    heads = group.get("heads") if isinstance(group, Mapping) else None
    for name, entry in (heads or {}).items():
        if not isinstance(entry, Mapping) or entry.get("kind") not in ("discrete", "bins"):
            continue  # a field of a user's own part may mean anything
        kind, number = entry.get("bin_type", "uniform"), entry.get("num_bins", 256)
        if kind not in BIN_TYPES:
            valid = ", ".join(map(repr, BIN_TYPES))
            raise ConfigError(f"{where}.heads.{name}.bin_type must be one of {valid}; got {kind!r}")
        least = 2 if kind in BOUNDED_BINS else 1
        if not _is_whole(number) or number < least:
            raise ConfigError(
                f"{where}.heads.{name}.num_bins must be a whole number of at least {least} with bin_type={kind!r}; got "
                f"{number!r}"
            )


def parse_steps(steps: Sequence[int] | str | None) -> tuple[int, int] | None:
    """(first, stop) of `profile_steps`: "100:110" or (100, 110).

    Raises:
      ConfigError: anything else.
    """
    if steps is None:
        return None
    try:
        first, stop = (int(x) for x in (steps.split(":") if isinstance(steps, str) else steps))
    except (ValueError, TypeError):
        raise ConfigError(f'profile_steps is {steps!r}; expected "100:110" or (100, 110), stop excluded') from None
    if not 1 <= first < stop:
        raise ConfigError(f"profile_steps {first}:{stop} holds no step; steps count from 1 and the stop is excluded")
    return first, stop


def _check_contradictions(tree: Mapping[str, Any], adapts: bool) -> None:
    size, parts = tree["batch_size"], tree.get("accumulate", 1)
    if size % parts:
        raise ConfigError(
            f"batch_size {size} does not split into {parts} micro-batches (accumulate): it must be a multiple"
        )
    opt, steps = tree["optimizer"], tree["num_steps"]
    decay = opt.get("decay_steps") or steps
    if opt["schedule"] == "cosine" and None not in (decay, opt["warmup_steps"]) and decay <= opt["warmup_steps"]:
        said = "optimizer.decay_steps" if opt.get("decay_steps") else "num_steps"
        raise ConfigError(
            f"a cosine schedule needs more steps than its warm-up: {said}={decay}, "
            f"optimizer.warmup_steps={opt['warmup_steps']}"
        )
    if adapts and tree["recipe"]["min_steps"] > tree["recipe"]["max_steps"]:
        recipe = tree["recipe"]
        raise ConfigError(f"recipe.min_steps={recipe['min_steps']} is more than max_steps={recipe['max_steps']}")
    check_ranking(tree, adapts=adapts)
    evaluation = tree["eval"]
    if evaluation.get("rollouts"):
        if evaluation["every"] is None:
            raise ConfigError(f"eval.rollouts={evaluation['rollouts']}, but eval.every is None: nothing is evaluated")
        if tree["data"]["kind"] == "synthetic":
            raise ConfigError(f"eval.rollouts={evaluation['rollouts']}: random batches have no environment to act in")
    elif tree["checkpoint"].get("keep_best") and tree["checkpoint"]["best_metric"].startswith("rollout/"):
        raise ConfigError(
            f"checkpoint.best_metric={tree['checkpoint']['best_metric']!r} is measured in rollouts, and eval.rollouts "
            "is 0: set the number of episodes, e.g. --config.eval.rollouts=20"
        )
    unknown = [
        slot for slot in tree.get("goal_images") or () if tree["image_sizes"] and slot not in tree["image_sizes"]
    ]
    for slot, fields in (tree.get("augmentation") or {}).items():
        if fields is not None and not adapts and slot not in tree["image_sizes"]:
            cameras = ", ".join(tree["image_sizes"]) or "none"
            raise ConfigError(f"augmentation.{slot}: the run has no such camera; image_sizes has {cameras}")
    if unknown and not adapts:
        cameras = ", ".join(tree["image_sizes"]) or "none"
        raise ConfigError(f"goal_images has {unknown[0]!r}, but image_sizes only {cameras}")


def check_ranking(tree: Mapping[str, Any], *, adapts: bool = False) -> None:
    """Checks that the best checkpoints can be known.

    Args:
      tree: a config.
      adapts: without evaluations finetune.py keeps the newest checkpoints, with a warning.

    Raises:
      ConfigError: no step, or hardly any, would ever be both evaluated and saved.
    """
    options, every = tree["checkpoint"], tree["eval"]["every"]
    best, saved = options.get("keep_best", 0), options["every"]
    if best and every is None and not adapts:
        raise ConfigError("checkpoint.keep_best needs evaluations, but eval.every is None")
    if best and every and saved and every % saved and saved % every:
        raise ConfigError(
            f"checkpoint.keep_best: evaluation every {every} steps and checkpoints every {saved} seldom meet; make one "
            "a multiple of the other"
        )
    patience = (tree.get("early_stopping") or {}).get("patience")
    if patience is not None and not (best and every):
        raise ConfigError(
            "early_stopping.patience counts evaluations and leaves the best policy behind: it needs eval.every of at "
            f"least 1 (now {every}) and checkpoint.keep_best of at least 1 (now {best})"
        )


def _check_installed(tree: Mapping[str, Any]) -> None:
    wanted = [("wandb.project", "wandb", "wandb")] if (tree.get("wandb") or {}).get("project") else []
    if tree["data"]["kind"] == "rlds":
        wanted += [("data.kind='rlds'", module, "data") for module in ("tensorflow", "tensorflow_datasets")]
    for key, module, extra in wanted:
        if importlib.util.find_spec(module) is None:
            ways = "; data.kind='memory' and 'synthetic' do without" if extra == "data" else ""
            raise ConfigError(f"{key} needs {module}, which is not installed: pip install 'octo_like[{extra}]'{ways}")


def check_workdir(workdir: str) -> None:
    """Looks at a workdir on this machine, or at what it will lie in.

    Raises:
      ConfigError: it cannot be a folder.
      StorageError: the disk does not answer, so nothing is known about it.
    """
    if scheme := re.match(r"(\w+):/", workdir):
        if scheme[1] not in SCHEMES or not re.match(r"\w+://[^/]", workdir):
            places = " or ".join(f"{name}://bucket/folder" for name in SCHEMES)
            raise ConfigError(f"--workdir {workdir}: expected a folder of this machine, or {places}")
        return
    if not workdir:
        raise ConfigError("--workdir is empty: give the folder of the run")
    path = os.path.abspath(os.path.expanduser(workdir))
    disk = Files()
    try:
        while (found := disk.look(path)) is None:
            path = os.path.dirname(path)
    except StorageError as error:
        if kind_of(error.__cause__ or error) is Kind.DENIED:
            raise ConfigError(f"--workdir {workdir} cannot be used: {error}; use another one") from None
        raise
    except (OSError, ValueError) as error:  # a name that no folder can have
        raise ConfigError(f"--workdir {workdir} cannot be a folder: {error}") from None
    if not found.is_directory:
        raise ConfigError(f"--workdir {workdir}: {path} is a file; give a folder, which is made if it is not there")
