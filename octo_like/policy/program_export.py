"""Exports `sample_actions` as a compiled-anywhere program (StableHLO), which a machine with JAX alone can run.

A folder is written:

    program.json              format, what goes in and comes out (shapes, dtypes, units), statistics, digests of every
                              file and of itself: what was edited is refused
    sample_actions*.bin       what `jax.export` serialises: normalisation, network, sampler, physical units
    encode_language*.bin      the same for the frozen language encoder, of policies that have one
    predict_text*.bin         what the policy says, the likeliest words, of policies that speak
    params.safetensors        the parameters that these read
    text/                     the sentencepiece model, of policies that have one
    program.py                the loader, `octo_like.policy.program`

Parameters are arguments of the programs and not constants in them: a program stays below a few megabytes whatever the
model's size, which XLA compiles without folding weights, and both programs share one copy.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax import export

from octo_like.common import normalization
from octo_like.common.robot import Description
from octo_like.common.schema import Leaf, flatten, unflatten
from octo_like.common.vocabularies import tokenizer_of
from octo_like.common.words import suggest
from octo_like.model.text_head import TextHead
from octo_like.policy import program
from octo_like.policy.policy import Policy
from octo_like.policy.pretrained import PARAMS_FILE, TEXT_DIR, whole_directory

FORMAT_VERSION = 1
PROGRAM_FILE = "program.json"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
KEYS, ENCODED = "keys", "task/language_instruction/encoded"
# Of the inputs, by the first of these that is in their path; all others are numbers of sensors.
MEANINGS = {
    "pad_mask_dict/": "False: missing",
    "timestep_pad_mask": "False: before the episode began",
    "timestep": "index in the episode",
    "image_": "RGB, 0 to 255",
    "depth_": "metres, 0: no reading",
    "input_ids": "ids of the words, then 1, then 0",
    "attention_mask": "0: padding",
    "encoded": "what encode_language gives",
    "language_instruction": "embedding of the instruction",
    "keys": "data of a threefry key for each row, jax.random.key_data",
}


def export_program(
    policy: Policy,
    folder: str | os.PathLike,
    *,
    unnormalize: str | None = None,
    head: str | None = None,
    batch_sizes: Sequence[int] = (),
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    instructions: Iterable[str] = (),
    missing: Iterable[str] = (),
) -> Path:
    """Writes the program of a policy into a folder, whole or not at all, and returns the folder.

    Args:
      policy: with parts of its own too: the loader needs none of their modules.
      unnormalize, head: as for `Policy.sample_actions`; they are part of the program.
      batch_sizes: that can be run; none given: any.
      platforms: that it can run on, see `PLATFORMS`; this machine needs none of them.
      instructions: texts whose token ids go into program.json, so that they can be given as texts.
      missing: observation keys that the robot does not have ("image_wrist"): the program masks them.

    Raises:
      ValueError: what an argument can be, when it is something else; the policy cannot be traced for any batch size.
      PretrainedError: the folder exists and is no exported program.
    """
    _check_sizes(batch_sizes, platforms)
    texts = _token_ids(policy, instructions)
    inputs = input_leaves(policy, unnormalize, tuple(missing))
    functions = _functions(policy, unnormalize, head, inputs)
    with whole_directory(folder, PROGRAM_FILE, "an exported program") as staging:
        params = dict(flatten(jax.device_get(policy.params)))
        arrays = {name: np.ascontiguousarray(params[name]) for name in sorted(_read_by(functions, params))}
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in arrays.items()}
        safetensors.numpy.save_file(arrays, staging / PARAMS_FILE)
        programs: dict[str, dict[str, str]] = {name: {} for name in functions}
        exported: dict[str, export.Exported] = {}
        for name, (function, leaves) in functions.items():
            for size in batch_sizes or ("any",):
                exported[name] = _exported(function, shapes, leaves, size, platforms)
                file = programs[name][str(size)] = f"{name}.bin" if size == "any" else f"{name}_{size}.bin"
                (staging / file).write_bytes(exported[name].serialize())
        made = exported["sample_actions"]
        shutil.copyfile(program.__file__, staging / "program.py")
        if policy.text_tokenizer is not None:
            policy.text_tokenizer.save(str(staging / TEXT_DIR))
        files = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        document = {
            "format_version": FORMAT_VERSION,
            "jax_version": jax.__version__,
            "calling_convention_version": made.calling_convention_version,
            "platforms": list(platforms),
            "programs": programs,
            "unnormalize": unnormalize,
            **_description(policy, unnormalize, inputs, made.out_avals[0].shape[1:]),
            "says": _says(policy),
            "instructions": texts,
            "files": {file: hashlib.sha256((staging / file).read_bytes()).hexdigest() for file in files},
        }
        document = json.loads(json.dumps(document))
        document["sha256"] = program.digest(document)
        (staging / PROGRAM_FILE).write_text(json.dumps(document, indent=2))
    return Path(folder)


def input_leaves(policy: Policy, unnormalize: str | None, missing: Sequence[str]) -> dict[str, Leaf]:
    """What a program of the policy is given, by path; shapes without the batch dimension.

    Raises:
      ValueError: unknown statistics, a `missing` key that is none, or one that the actions are relative to.
    """
    spec, leaves = policy.batch_spec, dict(flatten(policy.batch_spec.observation()))
    sensors = [key for key in spec.observation()["pad_mask_dict"]]
    for key in missing:
        if key not in sensors:
            raise ValueError(f"missing: this policy reads no observation {key!r}; {suggest(key, sensors)}")
    if unnormalize is not None and unnormalize not in policy.statistics:
        raise ValueError(f"unknown unnormalisation {unnormalize!r}; None, or {suggest(unnormalize, policy.statistics)}")
    entry = policy.statistics[unnormalize] if unnormalize is not None else None
    absent = set(missing)
    if entry is not None:
        of_some = {key for one in policy.statistics.values() for key in one.get("extra", {})}
        absent |= {key for key in spec.extra_observations if key in of_some and key not in entry.get("extra", {})}
        if spec.proprio_dim is not None and "proprio" not in entry:
            absent.add("proprio")
        elif spec.proprio_dim is not None:
            leaves["proprio"] = Leaf((spec.window_size, len(entry["proprio"]["mean"])), np.dtype(np.float32))
    leaves.pop("proprio_pad_mask", None)  # the statistics say which dimensions there are
    for key in absent:
        leaves = {path: leaf for path, leaf in leaves.items() if path not in (key, f"pad_mask_dict/{key}")}
    if entry is not None and entry.get("relative_to") is not None:
        if "proprio" in absent:
            raise ValueError(f"the actions of {unnormalize!r} are relative to proprio: it cannot be missing")
        del leaves["pad_mask_dict/proprio"]
    task = dict(flatten(spec.task()))
    inputs = {f"observation/{path}": leaf for path, leaf in leaves.items()}
    inputs |= {f"task/{path}": leaf for path, leaf in task.items()}
    if spec.language_length is not None:
        one = {path: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype) for path, leaf in task.items()}
        encoded = jax.eval_shape(policy.language_program, policy.params, unflatten(one))
        inputs |= {f"{ENCODED}/{name}": Leaf(leaf.shape[1:], leaf.dtype) for name, leaf in encoded.items()}
    return inputs | {KEYS: Leaf((2,), np.dtype(np.uint32))}


def _functions(policy, unnormalize, head, inputs) -> dict[str, tuple[Callable, dict[str, Leaf]]]:
    """{name: (function of parameters and inputs by path, its inputs)}."""

    def sample_actions(params, given):
        traced = copy.copy(policy)  # what is exported is what `Policy.sample_actions` computes, not a second version
        traced.params = unflatten(params)
        tree = unflatten(given)
        rng = jax.random.wrap_key_data(tree[KEYS], impl="threefry2x32")
        options = dict(unnormalize=unnormalize, head=head, check_finite=False)  # `Program` looks at them
        return traced.sample_actions(tree["observation"], tree["task"], rng=rng, **options)

    def predict_text(params, given):
        tree = unflatten(given)
        observations = policy.prepare_observations(tree["observation"], unnormalize)
        options = dict(part=speaker(policy), temperature=0.0, top_k=0)
        return policy.text_program(unflatten(params), observations, tree["task"], None, None, **options)

    def encode_language(params, given):
        encoded = policy.language_program(unflatten(params), unflatten(given)["task"])
        return {f"{ENCODED}/{name}": value for name, value in encoded.items()}

    functions: dict[str, tuple[Callable, dict[str, Leaf]]] = {"sample_actions": (sample_actions, inputs)}
    if any(key.startswith(ENCODED) for key in inputs):
        texts = ("task/language_instruction/", "task/subtask/")
        words = {key: leaf for key, leaf in inputs.items() if key.startswith(texts)}
        words = {key: leaf for key, leaf in words.items() if key.endswith(("/input_ids", "/attention_mask"))}
        functions["encode_language"] = (encode_language, words)
    if speaker(policy) is not None:
        functions["predict_text"] = (predict_text, {key: leaf for key, leaf in inputs.items() if key != KEYS})
    return functions


def speaker(policy: Policy) -> str | None:
    """The part of the policy whose words a program says: "text", or the only one that speaks; None: none does."""
    parts = [name for name, part in policy.model.auxiliaries.items() if isinstance(part, TextHead)]
    return "text" if "text" in parts else parts[0] if len(parts) == 1 else None


def _says(policy: Policy) -> dict[str, Any]:
    """For program.json: "pieces" of the words, by id, the "length" of what can be told to the policy in the same ids, 0
    if nothing can, and whether it "remembers": is to be asked with what it said last, as the task's sub-task."""
    part = speaker(policy)
    if part is None:
        return {}
    entry, told = policy.config["model"]["auxiliaries"][part], policy.text_tokenizer
    words = tokenizer_of(entry["vocabulary"], told.max_length if told is not None else 1)
    same = told is not None and told.fingerprint == words.fingerprint
    says = {"part": part, "pieces": words.pieces(), "length": words.max_length if same else 0}
    head: Any = policy.model.auxiliaries[part]
    return says | {"remembers": bool(head.remembers and policy.batch_spec.subtask and "subtask" in head.learns)}


def _exported(function, params, leaves: Mapping[str, Leaf], size, platforms) -> export.Exported:
    (b,) = export.symbolic_shape("b") if size == "any" else (size,)
    inputs = {path: jax.ShapeDtypeStruct((b, *leaf.shape), leaf.dtype) for path, leaf in leaves.items()}
    try:
        return export.export(jax.jit(function), platforms=list(platforms))(params, inputs)
    except Exception as error:  # of whatever kind a model's parts raise when a size is a symbol
        if size != "any":
            raise
        hint = "a part of this policy cannot be traced for any batch size; give those that are needed, batch_sizes=(1,)"
        raise ValueError(f"{hint}: {error}") from error


def _read_by(functions, params: Mapping[str, Any]) -> set[str]:
    """Names of the parameters that the functions read: heads of other robots and auxiliary losses need not travel."""
    names, read = sorted(params), set()
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()}
    for function, leaves in functions.values():
        inputs = {path: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype) for path, leaf in leaves.items()}
        kept = export.export(jax.jit(function))(shapes, inputs).module_kept_var_idx
        read |= {names[i] for i in kept if i < len(names)}
    return read


def _token_ids(policy: Policy, instructions: Iterable[str]) -> dict[str, list[int]]:
    """{text: ids (L,)}, of "" too; none for policies that read no tokens."""
    if isinstance(instructions, str):
        raise ValueError("instructions must be a list of texts, not a single one")
    texts = list(dict.fromkeys(["", *instructions]))
    if policy.batch_spec.language_length is None:
        if texts[1:]:
            raise ValueError("this policy reads no tokens of texts: leave instructions out")
        return {}
    if policy.text_tokenizer is None:
        if texts[1:]:
            raise ValueError("this policy has no text tokenizer; load it with text_model=, or leave instructions out")
        return {"": [1] + [0] * (policy.batch_spec.language_length - 1)}
    ids = policy.text_tokenizer.encode(texts)["input_ids"].tolist()
    return dict(zip(texts, ids, strict=True))


def _check_sizes(batch_sizes: Sequence[int], platforms: Sequence[str]) -> None:
    for size in batch_sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_sizes must be whole numbers from 1 on, got {size!r}")
    if not platforms or isinstance(platforms, str):
        raise ValueError(f"platforms must be a list, at least one of {', '.join(PLATFORMS)}; got {platforms!r}")
    for name in platforms:
        if name not in PLATFORMS:
            raise ValueError(f"unknown platform {name!r}; {suggest(name, PLATFORMS)}")


def _description(policy: Policy, unnormalize: str | None, inputs: Mapping[str, Leaf], shape) -> dict[str, Any]:
    """Inputs, outputs and statistics for program.json."""
    statistics = {n: e for n, e in policy.statistics.items() if unnormalize in (None, n)}
    robot = policy.statistics[unnormalize].get("robot") if unnormalize is not None else None
    described = Description.from_json(robot) if robot else None
    units = "physical units of the dataset" if unnormalize is not None else "normalised"
    listed = {}
    for path, leaf in inputs.items():
        meaning = _meaning(path, units)
        if leaf.dtype == np.uint8 and policy.batch_spec.resize != "stretch":
            meaning += f"; of a camera by {policy.batch_spec.resize!r} (octo_like.common.geometry)"
        listed[path] = {"shape": ["B", *leaf.shape], "dtype": str(leaf.dtype), "meaning": meaning}
    actions: dict[str, Any] = {"shape": ["B", *shape], "dtype": "float32", "meaning": units}
    if described is not None:
        actions |= {"names": [a.name for a in described.actions], "units": [a.unit for a in described.actions]}
        actions["control_hz"] = described.control_hz
        if described.proprio_names and "observation/proprio" in listed:
            listed["observation/proprio"]["names"] = list(described.proprio_names)
    return {"inputs": listed, "outputs": {"actions": actions}, "statistics": normalization.to_json(statistics)}


def _meaning(path: str, units: str) -> str:
    for of, meaning in MEANINGS.items():
        if of in path:
            return meaning
    return units
