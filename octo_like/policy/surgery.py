"""From a pretrained model to the one a new robot needs: which parts, how their weights carry over, which are trained.

`operate` and `condition` change the model's config, `carry` says which array of the pretrained model becomes which of
the new one and how an array of another size is filled, `frozen_by_mode` says what stays as it is. The weights
themselves are merged by `octo_like.policy.pretrained.merge_params`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common.checks import BOUNDED_BINS
from octo_like.common.parts import is_own
from octo_like.common.schema import BatchSpec, flatten
from octo_like.common.words import suggest
from octo_like.policy.pretrained import PretrainedError

GROUPS = ("task_tokenizers", "observation_tokenizers", "readouts", "heads", "auxiliaries")

# What every mode keeps as it is, as regexes of parameter paths. Only arrays that were loaded are ever frozen.
MODES: dict[str, tuple[str, ...]] = {
    "full": (),
    "frozen_transformer": (r"^octo_transformer/BlockTransformer_0/",),
    "head_only": (r"^octo_transformer/",),
    "head_mlp_only": (r"^octo_transformer/", r"^heads_[^/]+/map_head/(probe$|MultiHeadDotProductAttention_0/)"),
    "lora": (r"^octo_transformer/",),  # and factors beside the kernels that config.lora.targets names
}
RESIZABLE = ("diffusion", "flow", "regression", "discrete")  # kinds of heads whose entries keep what they did
SAYING = ("text", "fast", "bins", "discrete")  # kinds of parts that say numbers with a meaning
CONDITIONINGS = ("language", "goal_image", "both")


def check_word(word: str, valid: Sequence[str], what: str) -> str:
    """`word`, if it is one of `valid`.

    Raises:
      PretrainedError: it is not; the message names the valid ones.
    """
    if word not in valid:
        raise PretrainedError(f"unknown {what} {word!r}; {suggest(word, valid)}")
    return word


# --------------------------------------------------------------------------------------------------------------- config


def operate(model: Mapping[str, Any], surgery: Mapping[str, Any]) -> dict[str, Any]:
    """A model config with named parts replaced, changed, copied, added or removed.

    Args:
      model: config of the pretrained model.
      surgery: {group: {name: entry}} for the groups of parts, and optionally "max_window". An entry is
        None: the part is removed;
        a whole part (a dict with "kind", or a readout's number of tokens): it is added, or replaces the present one;
        a dict without "kind": fields to change of the present part;
        a dict with "copy_of": the part of that name in the pretrained model, its camera renamed to the new part's name,
          with the other fields changed. It also starts from that part's weights.

    Raises:
      PretrainedError: an unknown group, or a removal, change or copy of something that is not there.
    """
    result = dict(model)
    for group, entries in surgery.items():
        if group == "max_window":
            if entries is not None:
                result["max_window"] = entries
            continue
        if group not in GROUPS:
            raise PretrainedError(f"surgery: unknown group {group!r}; valid: {', '.join((*GROUPS, 'max_window'))}")
        present = dict(model.get(group) or {})
        merged = dict(present)
        for name, entry in entries.items():
            if entry is None:
                if merged.pop(name, None) is None:
                    raise PretrainedError(f"surgery removes {group}.{name}, but the model has {sorted(merged)}")
            else:
                merged[name] = _part(f"surgery.{group}.{name}", name, entry, present)
                if group == "heads":
                    merged[name] = _remembering_sizes(merged[name], _source(name, entry, present))
        result[group] = merged
    return result


def _part(where: str, name: str, entry: Any, present: Mapping[str, Any]) -> Any:
    if not isinstance(entry, Mapping) or "kind" in entry:
        return entry
    fields = dict(entry)
    source = fields.pop("copy_of", name)
    if source not in present or not isinstance(present[source], Mapping):
        how = f"copies {source!r}" if "copy_of" in entry else "changes fields (it has no 'kind')"
        raise PretrainedError(f"{where} {how}, but the pretrained model has {sorted(present)}")
    original = dict(present[source])
    for keys in ("obs_keys", "goal_keys"):
        if source != name and keys in original:
            original[keys] = tuple(key.replace(f"_{source}", f"_{name}") for key in original[keys])
    return {**original, **fields}


def _source(name: str, entry: Any, present: Mapping[str, Any]) -> Any:
    """The part of the pretrained model that an entry of the surgery starts from, or None."""
    return present.get(entry.get("copy_of", name) if isinstance(entry, Mapping) else name)


def _remembering_sizes(head: Mapping[str, Any], before: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A head with the sizes that its chunks had before, if they had others; see `octo_like.model.resized`."""
    if before is None or before.get("kind") not in RESIZABLE or before["kind"] != head.get("kind"):
        return head
    sizes = [list(size) for size in before.get("resized_from", ())]
    if (size := _size(before)) != _size(head):
        sizes.append(list(size))
    return {**head, "resized_from": sizes} if sizes else head


def _size(head: Mapping[str, Any]) -> tuple[int, int]:
    return head.get("action_horizon", 1), head.get("action_dim", 7)


def replaced(model: Mapping[str, Any], surgery: Mapping[str, Any]) -> list[str]:
    """One message for every part that `surgery` replaces by one that says less: the fields that fall back to defaults.

    A whole part (one with "kind") takes nothing over from the present one, and neither does a dict that stands in a
    field, such as a "stem".
    """
    messages = []
    for group in GROUPS:
        present = model.get(group) or {}
        for name, entry in (surgery.get(group) or {}).items():
            was = _source(name, entry, present) if isinstance(entry, Mapping) else None
            if not isinstance(was, Mapping):
                continue
            where = f"surgery.{group}.{name}"
            pairs = [(where, was, entry)] if "kind" in entry else []
            pairs += [
                (f"{where}.{field}", was[field], value)
                for field, value in entry.items()
                if isinstance(value, Mapping) and isinstance(was.get(field), Mapping)
            ]
            for place, before, after in pairs:
                if lost := {field: value for field, value in before.items() if field not in (*after, "resized_from")}:
                    fields = ", ".join(f"{field}={_shown(value)}" for field, value in lost.items())
                    messages.append(
                        f"{place} replaces the present {before.get('kind', 'entry')!r}, and with it {fields} "
                        "(now defaults of the new part). To change fields and keep the others, name these alone and "
                        f"no 'kind': --config.{where}.FIELD=VALUE"
                    )
    return messages


def _shown(value: Any) -> str:
    text = repr(_plain(value))
    return text if len(text) <= 40 else f"{text[:37]}..."


def condition(
    model: Mapping[str, Any], conditioning: str, goal_images: Sequence[str] = ()
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The model config for a way of telling the robot what to do, and the cameras that also give a goal image.

    language: no goal images; what the model reserves for them stays empty, as for samples without one in pretraining.
    goal_image: no language; its tokenizer is removed.
    both: each sample has the one or the other (`config.data.keep_goal_prob`).

    Args:
      goal_images: cameras whose image at the goal is the task; (): those the model has goal inputs for. A camera named
        here whose tokenizer takes no goal gets one, stacked onto its channels.

    Raises:
      PretrainedError: the model lacks what the conditioning needs; the message says how it is added.
    """
    check_word(conditioning, CONDITIONINGS, "conditioning")
    model = dict(model)
    tasks = dict(model.get("task_tokenizers") or {})
    for name, entry in model["observation_tokenizers"].items():
        if any(key.startswith("language") for key in entry.get("film_keys") or ()):
            raise PretrainedError(
                f"observation tokenizer {name!r} is steered by precomputed sentence embeddings "
                f"(film_keys {tuple(entry['film_keys'])}), and datasets hold texts: replace it by surgery, e.g. with "
                "film_keys ('task',), which steers by the task's tokens"
            )
    # Whether a part of the user's own reads words, only the user knows.
    if conditioning != "goal_image" and not any(
        t.get("kind") == "language" or is_own(t["kind"]) for t in tasks.values()
    ):
        raise PretrainedError(
            f"conditioning {conditioning!r} needs a language tokenizer, the model has the task tokenizers "
            f"{sorted(tasks)}; add one with --config.surgery.task_tokenizers.language=..., or use goal_image"
        )
    if conditioning == "language":
        if goal_images:
            raise PretrainedError(f"conditioning 'language' has no goal_images, got {tuple(goal_images)}; use 'both'")
        return model, ()

    tokenizers = {name: dict(entry) for name, entry in model["observation_tokenizers"].items()}
    slots = tuple(goal_images)
    for slot in slots:
        if readers(tokenizers, "goal_keys", f"image_{slot}"):
            continue
        if not (watching := readers(tokenizers, "obs_keys", f"image_{slot}")):
            raise PretrainedError(f"goal_images: no tokenizer reads image_{slot}; it could not compare it with a goal")
        tokenizers[watching[0]]["goal_keys"] = (*tokenizers[watching[0]].get("goal_keys", ()), f"image_{slot}")
    model["observation_tokenizers"] = tokenizers
    if not slots:
        keys = {key for entry in tokenizers.values() for key in entry.get("goal_keys", ())}
        slots = tuple(key.removeprefix("image_") for key in sorted(keys) if re.fullmatch(r"image_\w+", key))
        if not slots:
            raise PretrainedError(
                f"conditioning {conditioning!r}: this model has no goal inputs; name the cameras whose goal image "
                "it is to see, e.g. --config.goal_images=primary (their first convolution is resized)"
            )
    if conditioning == "goal_image":
        model["task_tokenizers"] = {name: t for name, t in tasks.items() if t.get("kind") != "language"}
        steered = [name for name, entry in tokenizers.items() if tuple(entry.get("film_keys", ())) == ("task",)]
        if steered and not model["task_tokenizers"]:
            raise PretrainedError(
                f"conditioning 'goal_image': {', '.join(steered)} is steered by task tokens (film_keys), and without "
                "language there are none; use 'both', or replace it with a stem without FiLM by surgery"
            )
    return model, slots


def readers(tokenizers: Mapping[str, Mapping], field: str, key: str) -> list[str]:
    """Names of the tokenizers of images whose "obs_keys" or "goal_keys" (`field`) match a key of a batch."""
    return [
        name
        for name, entry in tokenizers.items()
        if (entry.get("kind") == "image" or is_own(entry.get("kind")))
        and any(re.fullmatch(pattern, key) for pattern in entry.get(field, ()))
    ]


def check_inputs(model: Mapping[str, Any], spec: BatchSpec) -> None:
    """Everything a batch brings is read by some tokenizer, and the window fits.

    Raises:
      PretrainedError: a camera or the proprioception would be ignored, or the window is longer than the model's.
    """
    patterns = [pattern for entry in model["observation_tokenizers"].values() for pattern in entry.get("obs_keys", ())]
    match = re.match if model.get("octo_compat") else re.fullmatch
    for key in spec.observation()["pad_mask_dict"]:
        if not any(match(pattern, key) for pattern in patterns):
            slot = key.split("_", 1)[-1]
            like = next((n for n, e in model["observation_tokenizers"].items() if e.get("kind") == "image"), "primary")
            part = f"{{'kind': 'lowdim', 'obs_keys': ('{key}',)}}"
            entry = f"{slot}.copy_of={like}" if key.startswith("image_") else f'{slot}="{part}"'
            raise PretrainedError(
                f"no tokenizer of the model reads observation/{key} (they read {', '.join(patterns)}): leave it out of "
                f"the run's data, or add one, e.g. --config.surgery.observation_tokenizers.{entry}"
            )
    if spec.window_size > model["max_window"]:
        raise PretrainedError(
            f"window_size={spec.window_size}, but the pretrained model was built for windows of at most "
            f"{model['max_window']}; use that, or --config.surgery.max_window={spec.window_size}: position embeddings "
            "keep their rows and get new ones for the further steps"
        )


# -------------------------------------------------------------------------------------------------------------- weights

Resize = Callable[[str, np.ndarray, np.ndarray], np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Carry:
    """How weights of the pretrained model reach the new one. Made by `carry`.

    Attributes:
      copies: prefix of paths in the new model -> prefix of the paths in the pretrained one that it starts from. Such
        parts are new, wherever their weights come from: every mode trains them.
      resize: (path, pretrained array, initial array) to the array that is used, or None where the two have nothing in
        common that would make sense.
      anew: prefixes of paths whose arrays are not taken over although they fit -> why.
    """

    copies: Mapping[str, str]
    resize: Resize
    anew: Mapping[str, str] = dataclasses.field(default_factory=dict)


def carry(old: Mapping[str, Any], new: Mapping[str, Any], surgery: Mapping[str, Any]) -> Carry:
    """The rules by which weights carry over between two model configs.

    Beyond arrays of equal path and shape, and position embeddings (see `merge_params`):
    action heads of another horizon or number of dimensions keep what belongs to steps and dimensions that both have;
    first convolutions of cameras that gained or lost a goal image keep the channels that both have;
    parts that are a copy ("copy_of") start from what they are a copy of;
    where a part says its words with another vocabulary, or has other bins, its rows for each of them start anew.
    """
    copies: dict[str, str] = {}
    for group, prefixes in (
        ("observation_tokenizers", ("octo_transformer/observation_tokenizers_{}/", "octo_transformer/obs_{}_")),
        ("task_tokenizers", ("octo_transformer/task_tokenizers_{}/", "octo_transformer/task_{}_")),
        ("heads", ("heads_{}/",)),
        ("auxiliaries", ("auxiliaries_{}/",)),
    ):
        for name, entry in (surgery.get(group) or {}).items():
            if isinstance(entry, Mapping) and "copy_of" in entry:
                copies |= {prefix.format(name): prefix.format(entry["copy_of"]) for prefix in prefixes}

    def source_of(group: str, name: str) -> Mapping[str, Any] | None:
        return _source(name, (surgery.get(group) or {}).get(name), old.get(group) or {})

    def resize(path: str, was: np.ndarray, now: np.ndarray) -> np.ndarray | None:
        if found := re.match(r"heads_([^/]+)/", path):
            before, after = source_of("heads", found[1]), new["heads"].get(found[1])
            return None if before is None else _resized_head(path, was, now, before, after)
        if found := re.match(r"octo_transformer/observation_tokenizers_([^/]+)/", path):
            name = found[1]
            before, after = source_of("observation_tokenizers", name), new["observation_tokenizers"].get(name)
            return None if before is None else _resized_stem(was, now, before, after)
        return None

    anew = {
        f"{group}_{name}/{part}/": "other bins or another vocabulary: the same number means something else"
        for group in ("heads", "auxiliaries")
        for name, after in (new.get(group) or {}).items()
        if (before := source_of(group, name)) and _numbers_mean(before) != _numbers_mean(after)
        for part in ("decoder/embedding", "decoder/logits", "vocab_proj")
    }
    return Carry(copies, resize, anew)


def untaught(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the auxiliaries of `new` that have to learn something in this run: those that `old` has not, and those
    that are asked for something else, or with something else. Another weight, or to be asked with less, is nothing to
    learn."""

    def asked(part: Mapping[str, Any]) -> Any:
        return _plain({field: value for field, value in part.items() if field not in ("weight", "remembers")})

    def taught(after: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
        if before is None or asked(before) != asked(after):
            return False
        return bool(before.get("remembers")) or not after.get("remembers")

    known = old.get("auxiliaries") or {}
    return tuple(name for name, part in (new.get("auxiliaries") or {}).items() if not taught(part, known.get(name)))


def _numbers_mean(part: Mapping[str, Any]) -> Any:
    """What decides the meaning of the ids that a part says."""
    bounded = part.get("low") is not None and part.get("high") is not None or part.get("bin_type") in BOUNDED_BINS
    fields = ("vocabulary", "bin_type", "low", "high", *(() if bounded else ("max_action",)))
    return _plain([part.get(field) for field in fields]) if part.get("kind") in SAYING else None


def common_block(was: np.ndarray, now: np.ndarray) -> np.ndarray:
    """`now` with the entries whose indices exist in `was`, too, replaced by those."""
    common = tuple(slice(0, min(a, b)) for a, b in zip(was.shape, now.shape, strict=True))
    result = np.array(now)
    result[common] = was[common]
    return result


def _resized_head(
    path: str, was: np.ndarray, now: np.ndarray, before: Mapping[str, Any], after: Mapping[str, Any]
) -> np.ndarray | None:
    """An axis that runs over the entries of a chunk is a block (H, A, ...) behind a prefix of other inputs."""
    kept = ("kind", "num_bins", "bin_type", "low", "high", "token_per")
    if any(before.get(key) != after.get(key) for key in kept) or was.ndim != now.ndim or is_own(after.get("kind")):
        return None  # of a head of the user's own, names say nothing about what an axis means
    axes = [i for i in range(was.ndim) if was.shape[i] != now.shape[i]]
    if len(axes) != 1:
        return None
    axis = axes[0]
    old_chunk, new_chunk = (_chunk_of(path, entry) for entry in (before, after))
    if old_chunk is None or new_chunk is None:
        return None
    prefix = was.shape[axis] - int(np.prod(old_chunk))
    if prefix < 0 or prefix != now.shape[axis] - int(np.prod(new_chunk)):
        return None
    was, now = np.moveaxis(was, axis, 0), np.moveaxis(np.array(now), axis, 0)
    rest = was.shape[1:]
    fresh = now[prefix:]
    if re.search(r"/reverse_network/(Dense_0|given)/kernel$", path):
        fresh = np.zeros_like(fresh)  # new entries are inputs here: the old ones do not depend on them at first
    block = common_block(was[prefix:].reshape(*old_chunk, *rest), fresh.reshape(*new_chunk, *rest))
    merged = np.concatenate([was[:prefix], block.reshape(-1, *rest)])
    return np.ascontiguousarray(np.moveaxis(merged, 0, axis))


def _chunk_of(path: str, head: Mapping[str, Any]) -> tuple[int, ...] | None:
    """What the chunk axis of a head's array runs over, or None for arrays that have none."""
    chunk = _size(head)
    bins, per = head.get("num_bins", 256), head.get("token_per", "action_dim_and_action_horizon")
    if re.search(r"/(mean_proj|reverse_network/Dense_1)/(kernel|bias)$|/reverse_network/Dense_0/kernel$", path):
        return chunk
    if path.endswith("/reverse_network/given/kernel"):
        return chunk[:1]
    if path.endswith("/decoder/positions") and head.get("kind") == "bins":
        return chunk
    if re.search(r"/vocab_proj/(kernel|bias)$", path):
        return {"": (*chunk, bins), "action_horizon": (chunk[1], bins)}.get(per)
    if path.endswith("/map_head/probe") and head.get("kind") == "discrete":
        return {"action_horizon": chunk[:1], "action_dim_and_action_horizon": chunk}.get(per)
    return None


def _resized_stem(was: np.ndarray, now: np.ndarray, before: Mapping[str, Any], after: Mapping[str, Any]):
    """Goal images are stacked behind the observed ones, so a kernel's first input channels mean what they meant."""
    same = all(_plain(before.get(key)) == _plain(after.get(key)) for key in ("kind", "stem", "film_keys"))
    if not same or is_own(after.get("kind")) or len(before.get("obs_keys", ())) != len(after.get("obs_keys", ())):
        return None
    if was.ndim != 4 or now.ndim != 4 or was.shape[:2] + was.shape[3:] != now.shape[:2] + now.shape[3:]:
        return None
    return common_block(was, now)


def _plain(value: Any) -> Any:
    """Lists of a config read from JSON and tuples of one that was not are the same."""
    return json.loads(json.dumps(value, default=dict))


# ------------------------------------------------------------------------------------------------------- what is frozen


def never_trained(model: Mapping[str, Any], paths: Sequence[str]) -> frozenset[str]:
    """Parameters that no gradient reaches: pretrained language encoders that the model keeps as they are.

    Decay and averages would otherwise still touch them.
    """
    kept = [
        name
        for name, entry in (model.get("task_tokenizers") or {}).items()
        if entry.get("encoder") == "t5" and not entry.get("finetune_encoder", False)
    ]
    prefixes = tuple(f"octo_transformer/task_tokenizers_{name}/hf_model/" for name in kept)
    return frozenset(path for path in paths if path.startswith(prefixes)) if prefixes else frozenset()


def frozen_by_mode(
    mode: str,
    patterns: Sequence[str],
    loaded: Mapping[str, bool],
    untrained: Sequence[str] = (),
    copies: Sequence[str] = (),
) -> frozenset[str]:
    """Paths that keep their values.

    Only what was loaded whole is frozen: an array that is new, or has new rows, would otherwise stay the noise it was
    initialised with. Nor does a mode freeze a part that is a copy: it begins as what it was copied from, and has to
    become that of another camera or robot.

    Args:
      mode: one of `MODES`.
      patterns: further regexes, searched in paths.
      loaded: path -> whether it was loaded whole.
      untrained: "heads_NAME" and "auxiliaries_NAME" that no sample teaches; weight decay alone would change them.
      copies: prefixes of the paths of parts that are copies; only `patterns` freeze them.

    Raises:
      PretrainedError: an unknown mode, a pattern that matches nothing, or nothing is left to train.
    """
    check_word(mode, tuple(MODES), "mode")
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in loaded):
            tops = sorted({"/".join(path.split("/")[:2]) for path in loaded})
            raise PretrainedError(f"freeze pattern {pattern!r} matches no parameter; paths begin with {tops}")
    # A bias that was trained with another kernel is not worth keeping.
    kernels = {path.removesuffix("kernel") for path, whole in loaded.items() if path.endswith("/kernel") and not whole}
    loaded = {path: whole and path.rpartition("/")[0] + "/" not in kernels for path, whole in loaded.items()}
    by_user = [*patterns, *(rf"^{re.escape(name)}/" for name in untrained)]

    def is_frozen(path: str) -> bool:
        by_mode = () if path.startswith(tuple(copies)) else MODES[mode]
        return any(re.search(pattern, path) for pattern in (*by_mode, *by_user))

    frozen = {path for path, whole in loaded.items() if whole and is_frozen(path)}
    if len(frozen) == len(loaded) and mode != "lora":  # there the factors are left
        raise PretrainedError(f"mode {mode!r} with the freeze patterns {list(patterns)} leaves nothing to train")
    return frozenset(frozen)


def check_vocabulary(params: Mapping[str, Any], vocab_size: int) -> None:
    """The text tokenizer's ids exist in every language encoder.

    Raises:
      PretrainedError: an embedding has fewer rows than the tokenizer has pieces.
    """
    for path, leaf in flatten(params):
        if (
            re.search(r"/(hf_model/shared|task_tokenizers_[^/]+/embedding)/embedding$", path)
            and leaf.shape[0] < vocab_size
        ):
            raise PretrainedError(
                f"the text tokenizer has {vocab_size} pieces, but {path} has {leaf.shape[0]} rows: this is not the "
                "tokenizer the encoder was trained with (--config.text.model)"
            )
