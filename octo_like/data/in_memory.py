"""Episodes that are arrays in memory, as datasets of a mixture: for machines without TensorFlow and quick experiments.

    DATA_DIR/my_robot/train/*.npz               one episode a file, in the order of their names (data.data_dir)
    data.episodes="tabletop_arm=300+20 ..."     made by the built-in world's experts, in several processes

An episode is a nested dict of arrays whose first axis is the step, in the layout of an RLDS step: "action",
"language_instruction" (one text, or one for each step), "observation/<key>" with images as (T, h, w, 3) uint8. So the
same `DatasetSpec` reads it as reads the dataset in RLDS; order, windows, goals, masks and batches are made by the same
code, and training batches are bitwise those of an RLDS dataset that holds the same episodes in the same order. (Which
episodes `val_fraction` and `num_demos` choose follows from a hash of what is stored, and differs.)
"""

import dataclasses
import hashlib
import importlib
import pathlib
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from octo_like.common.schema import flatten, unflatten
from octo_like.data.episode import RawEpisode, as_points
from octo_like.data.prepare import choose_episodes
from octo_like.data.prepared import PreparedDataset, check_names, problem_of, statistics_of
from octo_like.data.rlds import filters
from octo_like.data.rlds.index import Index, digest_of, with_usable
from octo_like.data.spec import DataError, DatasetSpec, suggest

NEEDS_TENSORFLOW = ("standardize", "filter", "relative_to", "source")
# Without a terminal a bar is a line of a log every few seconds.
QUIETLY = dict(leave=False, mininterval=0.2 if sys.stderr.isatty() else 10.0)
DEFAULT_VAL_SHARE = 20  # one episode of so many is made for validation unless a number is given


def save_episode(path: str | pathlib.Path, episode: Mapping[str, Any]) -> None:
    """Writes an episode as `load_episodes` reads it."""
    arrays: dict[str, Any] = {key: np.asarray(value) for key, value in flatten(episode)}
    np.savez_compressed(path, **arrays)


def load_episodes(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All episodes of a folder of .npz files.

    Raises:
      DataError: no folder, no files, or a file that is none; names it.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        others = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        raise DataError(f"{folder}: no .npz files; folders beside it: {', '.join(others) or 'none'}")
    episodes = []
    for file in tqdm(files, f"{folder.parent.name} {folder.name}", unit="ep", **QUIETLY):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                episodes.append({**unflatten({key: arrays[key] for key in arrays.files}), "where": str(file)})
        except Exception as error:  # zipfile, NumPy and pickle raise many kinds
            raise DataError(f"{file}: not an episode in .npz form: {error}") from error
    return episodes


def make_episodes(generator: str, request: str, *, seed: int, workers: int) -> dict[str, list[dict[str, Any]]]:
    """{"train", "val"} episodes that a function makes.

    Args:
      generator: "module:function"; called with (name, split, count, seed=, workers=), it gives RLDS-like episodes
        ({"steps": [step, ...]}), see `octo_like.envs.demonstrations.generate`.
      request: "NAME=TRAIN" or "NAME=TRAIN+VAL", numbers of episodes.
      seed: of the data: each gives other episodes.
      workers: processes that make them; 0: this one.
    """
    found = re.fullmatch(r"([^=]+)=(\d+)(?:\+(\d+))?", request)
    if not found or not int(found[2]):
        raise DataError(f"data.episodes: {request!r}; expected NAME=TRAIN or NAME=TRAIN+VAL, e.g. tabletop_arm=300+20")
    name, train = found[1], int(found[2])
    counts = {"train": train, "val": int(found[3] or max(1, train // DEFAULT_VAL_SHARE))}
    module, _, function = generator.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"data.generator={generator!r} is not an importable 'module:function': {error}") from error
    made: dict[str, list[dict[str, Any]]] = {}
    for split, count in counts.items():
        episodes = tqdm(
            make(name, split, count, seed=seed, workers=workers), f"{name} {split}", count, unit="ep", **QUIETLY
        )
        made[split] = [_columns(one, f"{name} {split} {number}") for number, one in enumerate(episodes)]
    return made


def _columns(episode: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An episode of steps as arrays over the steps."""
    steps = [dict(flatten(step)) for step in episode["steps"]]
    return {**unflatten({key: np.stack([step[key] for step in steps]) for key in steps[0]}), "where": where}


class MemoryFunction:
    """Number of an episode -> the parts of it that a spec names. A `octo_like.data.prepared.EpisodeFunction`."""

    random_ops: tuple[str, ...] = ()
    action_chunk: int | None = None

    def __init__(self, spec: DatasetSpec, episodes: Mapping[str, Sequence[Mapping[str, Any]]]):
        given = [field for field in NEEDS_TENSORFLOW if getattr(spec, field) is not None]
        if given:
            raise DataError(
                f"{spec.name}: {given[0]} is computed by TensorFlow when RLDS is read; with data.kind='memory' compute "
                "it before"
            )
        self.spec, self.definition = spec, {**spec.transform_fields(), "kind": "memory"}
        self.episodes = {
            split: [self._chosen(one) for one in episodes_of_split] for split, episodes_of_split in episodes.items()
        }
        shapes = {tuple((name, x.shape[1:]) for name, x in sorted(e.extras.items())) for e in self.all()}
        if len(shapes) != 1:
            raise DataError(f"{spec.name}: episodes have sensors of different shapes: {sorted(shapes)}")
        self.extra_shapes: dict[str, tuple[int, ...]] = dict(next(iter(shapes)))
        widths = {(e.action.shape[1], None if e.proprio is None else e.proprio.shape[1]) for e in self.all()}
        if len(widths) != 1:
            raise DataError(
                f"{spec.name}: episodes have different (action, proprio) dimensions: {sorted(widths, key=str)}"
            )
        self.action_dim, self.proprio_dim = next(iter(widths))

    def all(self) -> list[RawEpisode]:
        return [episode for part in self.episodes.values() for episode in part]

    def read(self, path: str, offset: int, slots: Collection[str], depth_slots: Collection[str] = ()) -> RawEpisode:
        """Episode `offset` of the split `path`."""
        whole = self.episodes[path][offset]
        images = {slot: frames for slot, frames in whole.images.items() if slot in slots}
        depths = {slot: frames for slot, frames in whole.depths.items() if slot in depth_slots}
        return dataclasses.replace(whole, images=images, depths=depths)

    def _chosen(self, episode: Mapping[str, Any]) -> RawEpisode:
        spec, where = self.spec, episode.get("where", self.spec.name)
        flat = {key: np.asarray(value) for key, value in flatten(episode) if key != "where"}

        def leaf(key: str, what: str, ranks: tuple[int, ...], kinds: str) -> np.ndarray:
            if key not in flat:
                raise DataError(f"{where}: no {what} {key!r}; {suggest(key, flat)}")
            value = flat[key]
            if value.ndim not in ranks or value.dtype.kind not in kinds:
                raise DataError(f"{where}: {key!r} cannot be the {what}: it is {value.dtype} {value.shape}")
            return value

        def observed(key: str, *arguments) -> np.ndarray:
            return leaf(f"observation/{key.removeprefix('observation/')}", *arguments)

        target = None
        if spec.text_target is not None:
            stored = leaf(spec.text_target[1], f"text to learn of kind {spec.text_target[0]!r}", (1,), "US")
            target = [_text(one) for one in stored.tolist()]
        if spec.action_key is None:
            action = np.zeros((len(target or ()), 0), np.float32)
        else:
            action = leaf(spec.action_key, "action", (2,), "fiub").astype(np.float32)
        parts = [observed(key, "proprio key", (1, 2), "fiub") for key in spec.proprio_keys]
        proprio = np.concatenate([p.reshape(len(p), -1) for p in parts], -1).astype(np.float32) if parts else None
        texts = None
        if spec.language_key is not None:
            stored = leaf(spec.language_key, "instruction", (0, 1), "US")
            texts = [_text(one) for one in np.broadcast_to(stored, (len(action),)).tolist()]
        images = {slot: observed(key, f"image of camera {slot!r}", (4,), "u") for slot, key in _given(spec.image_keys)}
        depths = {slot: observed(key, f"depth of {slot!r}", (3, 4), "fiu") for slot, key in _given(spec.depth_keys)}
        points = {n: as_points(observed(key, f"point {n!r}", (2,), "f")) for n, key in _given(spec.point_keys)}
        extras = {}
        for name, key in _given(spec.extra_keys):
            values = observed(key, f"sensor {name!r}", (1, 2, 3, 4, 5), "fiub").astype(np.float32)
            extras[name] = values[:, None] if values.ndim == 1 else values
        digest = hashlib.blake2b(digest_size=8)
        for part in (action, proprio, *images.values(), *depths.values(), *extras.values()):
            digest.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
        digest.update("\n".join(texts or ()).encode())
        digest.update("".join(f"\n{text}" for text in target or ()).encode())
        number = int.from_bytes(digest.digest(), "little") % 2**62
        raw = RawEpisode(number, action, proprio, texts, images, depths, points, extras, target)
        if (problem := problem_of(raw)) is not None:
            raise DataError(f"{where}: {problem}")
        return raw


def _text(value: str | bytes) -> str:
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else value).strip()


def _given(keys: Mapping[str, str | None]) -> list[tuple[str, str]]:
    return [(name, key) for name, key in keys.items() if key is not None]


def _index(function: MemoryFunction, split: str) -> Index:
    episodes = function.episodes[split]
    count, steps = len(episodes), np.array([len(e.action) for e in episodes], np.int32)

    def nbytes(e: RawEpisode) -> int:
        parts: tuple[Any, ...] = (*e.images.values(), *e.depths.values(), *e.extras.values())  # nothing is encoded
        return e.action.nbytes + sum(part.nbytes for part in parts)

    return Index(
        files=(split,),
        file=np.zeros(count, np.int32),
        record=np.arange(count, dtype=np.int32),
        offset=np.arange(count, dtype=np.int64),
        length=np.array([nbytes(e) for e in episodes], np.int64),
        record_hash=np.array([e.hash for e in episodes], np.int64),
        raw_steps=steps,
        steps=steps,
        frames=steps,
        has_language=np.array([any(e.texts or ()) for e in episodes], bool),
        first=np.cumsum(steps, dtype=np.int64) - steps,
        bits=None,
        definition_hash=digest_of(function.definition),
        folder="memory",
    )


def prepare_in_memory(
    key: str, spec: DatasetSpec, episodes: Mapping[str, Sequence[Mapping[str, Any]]]
) -> PreparedDataset:
    """Splits, filters and normalises as `octo_like.data.prepare.prepare_dataset` does.

    Args:
      episodes: split -> episodes; `spec.split` must be there, and `spec.val_split` where it names one.

    Raises:
      DataError: what is wrong with an episode or the spec, by name.
    """
    splits = [split for split in (spec.split, spec.val_split) if split is not None]
    for split in splits:
        if not episodes.get(split):
            raise DataError(f"{key}: no episodes of split {split!r}; {suggest(split, episodes)}")
    function = MemoryFunction(spec, {split: episodes[split] for split in splits})
    check_names(key, spec, function)
    whole = _index(function, spec.split)
    val_whole = whole if spec.val_split is None else _index(function, spec.val_split)
    chosen, validation = choose_episodes(key, spec, whole, val_whole)
    if not len(chosen):
        raise DataError(f"{key}: none of {len(whole)} episode(s) of split {spec.split!r} has a step")
    statistics = statistics_of(key, spec, [function.episodes[spec.split][i] for i in chosen])
    train = _filtered(spec, function, whole, spec.split, statistics).take(chosen)
    val = _filtered(spec, function, val_whole, spec.val_split or spec.split, statistics).take(validation)
    if not train.frames.sum():
        raise DataError(f"{key}: the filters leave no step of {len(chosen)} training episodes")
    instructions: dict[str, int] = {}
    for episode in function.all():
        for text in set(episode.texts or ()):
            instructions[text] = instructions.get(text, 0) + 1
    return PreparedDataset(key, spec, function, train, val, statistics, instructions, "memory", "memory")


def _filtered(
    spec: DatasetSpec, function: MemoryFunction, index: Index, split: str, statistics: Mapping[str, Any]
) -> Index:
    if not filters.has_filters(spec):
        return index
    usable = []
    for episode, labeled in zip(function.episodes[split], index.has_language.tolist(), strict=True):
        proprio = np.zeros((len(episode.action), 0)) if episode.proprio is None else episode.proprio
        usable.append(filters.usable_steps(spec, statistics, episode.action, proprio, labeled))
    definition = {"normalization": spec.normalization, **spec.filter_fields()}
    return with_usable(index, np.concatenate(usable), definition)


def datasets_in_memory(
    specs: Mapping[str, DatasetSpec], data_dir: str | None, requests: str, generator: str, *, seed: int, workers: int
) -> dict[str, PreparedDataset]:
    """The datasets of a mixture.

    Args:
      requests: "NAME=TRAIN[+VAL] ..." of the datasets that `generator` makes; the others are in `data_dir`.
      generator: see `make_episodes`.
      seed: see `make_episodes`.
      workers: see `make_episodes`.

    Raises:
      DataError: as `prepare_in_memory` and `load_episodes`; also for a requested dataset that the mixture has not.
    """
    made = {request.partition("=")[0]: request for request in requests.replace(",", " ").split()}
    valid = [spec.name for spec in specs.values()]
    unknown = sorted(set(made) - set(valid))
    if unknown:
        raise DataError(f"data.episodes: {unknown[0]!r} is not in the mixture; {suggest(unknown[0], valid)}")
    prepared = {}
    for key, spec in specs.items():
        if spec.name in made:
            episodes = make_episodes(generator, made[spec.name], seed=seed, workers=workers)
        elif data_dir is None:
            raise DataError(f"{key}: neither data.episodes nor data.data_dir says where its episodes are")
        else:
            splits = [split for split in (spec.split, spec.val_split) if split is not None]
            episodes = {split: load_episodes(pathlib.Path(data_dir) / spec.name / split) for split in splits}
        prepared[key] = prepare_in_memory(key, spec, episodes)
    return prepared
