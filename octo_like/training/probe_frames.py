"""Labelled frames: what a policy saw, and what is known of the scene, as arrays of one row per frame. NumPy only.

They come from a world that knows where things are (`octo_like.envs.labels`) or from a file, see docs/probing.md.
"""

import dataclasses
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from octo_like.common.dimensions import of_statistics
from octo_like.common.words import suggest

TASKS = ("text", "goal", "both", "embedding")


class FrameError(ValueError):
    """Something in a file of frames is not as described. The message names file, key and what was expected."""


@dataclasses.dataclass(frozen=True)
class Frames:
    """N frames; those of an episode stand together, in the order of time.

    Attributes:
      where: the file, for messages.
      observation: key of the policy -> (N, ...), proprio in physical units.
      present: observation key -> (N,) bool, False where it is missing.
      instruction: (N,) str, or None.
      goals: "image_{slot}" -> (N, h, w, 3) uint8.
      embedding: (N, ...) float32, or None: instructions of a policy that takes precomputed embeddings.
      action: (N, H, A) in physical units, NaN where unknown or past the end; or None.
      episode: (N,) int. dataset: (N,) str. task: (N,) str, "" where there are none.
      points: name -> (N, 2), fractions of the image's width and height, NaN where unknown.
      phases: name -> (N,) bool; they may overlap.
      action_names: dataset -> ((name, unit), ...) where they are not in the policy's statistics.
    """

    where: str
    observation: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]
    instruction: np.ndarray | None
    goals: Mapping[str, np.ndarray]
    embedding: np.ndarray | None
    action: np.ndarray | None
    episode: np.ndarray
    dataset: np.ndarray
    task: np.ndarray
    points: Mapping[str, np.ndarray]
    phases: Mapping[str, np.ndarray]
    action_names: Mapping[str, tuple[tuple[str, str], ...]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.episode)

    @property
    def datasets(self) -> list[str]:
        """Names, in order of appearance."""
        return list(dict.fromkeys(self.dataset.tolist()))

    def window(self, rows_b: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `History` gives: indices of the frames (B, W), timestep (B, W) int32, timestep_pad_mask (B, W) bool."""
        first_n = np.flatnonzero(np.r_[True, self.episode[1:] != self.episode[:-1]])
        start_b = first_n[np.searchsorted(first_n, rows_b, side="right") - 1]
        step_bw = (rows_b - start_b)[:, None] + np.arange(1 - size, 1)
        return start_b[:, None] + np.maximum(step_bw, 0), np.maximum(step_bw, 0).astype(np.int32), step_bw >= 0

    def inputs(self, policy: Any, dataset: str, rows_b: np.ndarray, how: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """(observation as for `prepare_observations`, task) of frames of one dataset.

        Args:
          how: one of `TASKS`, see `ways`.

        Raises:
          FrameError: proprioception that the dataset has is NaN.
        """
        index_bw, timestep, valid = self.window(rows_b, policy.batch_spec.window_size)
        observation: dict[str, Any] = {"timestep": timestep, "timestep_pad_mask": valid}
        pads = {key: array[index_bw] for key, array in self.present.items()}
        for key, array in self.observation.items():
            if key == "proprio":
                width = _width(policy, dataset, "proprio", array.shape[-1])
                if not width:
                    continue
                array = array[:, :width]
                if not np.isfinite(array[rows_b]).all():
                    row = int(rows_b[np.argmin(np.isfinite(array[rows_b]).all(-1))])
                    raise FrameError(f"{self.where}: proprio: row {row} is not finite in the {width} of {dataset!r}")
            observation[key] = array[index_bw]
        observation["pad_mask_dict"] = {key: pad for key, pad in pads.items() if key in observation}
        given: dict[str, Any] = {}
        if how in ("text", "both"):
            assert self.instruction is not None  # `ways` says so
            given["texts"] = [str(text) for text in self.instruction[rows_b]]
        if how in ("goal", "both"):
            given["goals"] = {key: array[rows_b] for key, array in self.goals.items()}
        if how == "embedding":
            assert self.embedding is not None  # `ways` says so
            given["embeddings"] = self.embedding[rows_b]
        return observation, policy.create_tasks(**given)

    def ways(self, policy: Any) -> list[str]:
        """Which of `TASKS` the policy takes and the frames have, the usual one first."""
        spec = policy.batch_spec
        text = policy.text_tokenizer is not None and spec.language_length is not None and self.instruction is not None
        goal = any(f"image_{slot}" in self.goals for slot in spec.goal_images)
        embedding = spec.language_embedding is not None and self.embedding is not None
        available = {"text": text, "goal": goal, "both": text and goal, "embedding": embedding}
        return [name for name in TASKS if available[name]]

    def names(self, policy: Any, dataset: str, dims: int) -> list[tuple[str, str]]:
        """(name, unit) of the action dimensions, as far as they are known."""
        if dataset in self.action_names:
            return list(self.action_names[dataset])[:dims]
        named = of_statistics(policy.statistics.get(dataset, {}), "action", dims)
        return list(zip(named.names, named.shown_units, strict=True))


def batches(rows_n: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows in batches of one size, and how many of each count: the last one is filled up, so that all compile once."""
    for start in range(0, len(rows_n), size):
        rows = rows_n[start : start + size]
        yield np.concatenate([rows, np.repeat(rows[-1:], size - len(rows))]), len(rows)


def _width(policy: Any, dataset: str, key: str, default: int) -> int:
    """Dimensions of a dataset's proprio or action; 0 when it was trained without."""
    if dataset not in policy.statistics:
        return default
    entry = policy.statistics[dataset]
    return len(entry[key]["mean"]) if key in entry else 0


def action_width(policy: Any, dataset: str, default: int) -> int:
    """A of a dataset; `default` where the policy has no statistics."""
    return _width(policy, dataset, "action", default)


def read_frames(path: str | os.PathLike, policy: Any) -> Frames:
    """Reads FILE.npz.

    Raises:
      FrameError: the file is none, or its arrays are not as docs/probing.md says.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {}
            for key in file.files:
                try:
                    arrays[key] = file[key]
                except ValueError as error:
                    raise FrameError(f"{path}: {key}: {error}; strings are np.array([...], dtype=str)") from error
    except (zipfile.BadZipFile, EOFError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, FrameError):
            raise
        raise FrameError(f"{path}: no .npz archive (np.savez): {error}") from error
    return frames_from_arrays(arrays, policy, str(path))


def frames_from_arrays(arrays: Mapping[str, np.ndarray], policy: Any, where: str, **more: Any) -> Frames:
    """Checks arrays, named as in docs/probing.md, against what a policy reads.

    Args:
      more: other attributes of `Frames`.

    Raises:
      FrameError: naming every array that is missing, unknown or of another shape, and the shape expected.
    """
    episode = arrays.get("episode")
    if episode is None or np.ndim(episode) != 1 or not np.size(episode):
        raise FrameError(f"{where}: episode: expected (N,) int with N > 0, got {_describe(episode)}")
    n, spec = len(episode), policy.batch_spec
    known = {key: leaf for key, leaf in spec.observation().items() if key in spec.observation()["pad_mask_dict"]}
    expected = {key: ((n, *leaf.shape[1:]), leaf.dtype.kind) for key, leaf in known.items()}
    expected |= {f"present_{key}": ((n,), "b") for key in known}
    expected |= {f"goal_image_{slot}": ((n, *spec.image_sizes[slot], 3), "u") for slot in spec.goal_images}
    expected |= {"episode": ((n,), "i"), "instruction": ((n,), "U"), "task": ((n,), "U"), "dataset": ((n,), "U")}
    expected |= {"action": ((n, "H", "A"), "f")} | {key: ((n, 2), "f") for key in arrays if key.startswith("point_")}
    expected |= {key: ((n,), "b") for key in arrays if key.startswith("phase_")}
    if "proprio" in known:
        expected["proprio"] = ((n, "P"), "f")
    if spec.language_embedding is not None:
        expected["embedding"] = ((n, *spec.language_embedding), "f")
    arrays = dict(arrays)
    if "dataset" in arrays and np.ndim(arrays["dataset"]) == 0:
        arrays["dataset"] = np.repeat(arrays["dataset"], n)
    problems = []
    for key, array in arrays.items():
        if key not in expected:
            problems.append(f"{key}: not known; {suggest(key, expected)}, point_<name>, phase_<name>")
            continue
        shape, kind = expected[key]
        fits = len(shape) == array.ndim and all(
            isinstance(want, str) or want == got for want, got in zip(shape, array.shape, strict=True)
        )
        if not fits or (array.dtype.kind not in ("iu" if kind == "i" else kind)):
            problems.append(f"{key}: expected ({', '.join(map(str, shape))}) {_KINDS[kind]}, got {_describe(array)}")
    if not any(key in arrays for key in known):
        problems.append(f"no observation: expected one or more of {', '.join(known)}")
    if problems:
        raise FrameError("\n  ".join([f"{where}: {n} frames (of `episode`), but", *problems]))
    return _checked(arrays, known, policy, where, more)


def _checked(arrays, known, policy, where: str, more) -> Frames:
    """What the arrays say together, once each is what it should be."""
    episode, n = arrays["episode"].astype(np.int64), len(arrays["episode"])
    starts = episode[np.r_[True, episode[1:] != episode[:-1]]]
    if len(np.unique(starts)) != len(starts):
        numbers, counts = np.unique(starts, return_counts=True)
        apart = numbers[np.argmax(counts)]
        raise FrameError(f"{where}: episode: the rows of episode {apart} do not stand together, in the order of time")
    if "dataset" not in arrays:
        if len(policy.statistics) > 1:
            raise FrameError(f"{where}: dataset: is needed, one of the policy's {sorted(policy.statistics)}")
        arrays["dataset"] = np.repeat([next(iter(policy.statistics), "frames")], n)
    for name in np.unique(arrays["dataset"]):
        if policy.statistics and name not in policy.statistics:
            raise FrameError(
                f"{where}: dataset: no {str(name)!r} in the policy's statistics {sorted(policy.statistics)}"
            )
    for key, width in (("proprio", policy.batch_spec.proprio_dim), ("action", policy.batch_spec.action_dim)):
        for name in np.unique(arrays["dataset"]) if key in arrays else ():
            want, got = _width(policy, name, key, min(arrays[key].shape[-1], width)), arrays[key].shape[-1]
            if got < want:
                raise FrameError(f"{where}: {key}: {str(name)!r} has {want} dimensions, got {_describe(arrays[key])}")
    changed = (arrays["dataset"][1:] != arrays["dataset"][:-1]) & (episode[1:] == episode[:-1])
    if changed.any():
        raise FrameError(f"{where}: dataset: changes within episode {episode[1:][changed][0]}")
    goals = {key.removeprefix("goal_"): array for key, array in arrays.items() if key.startswith("goal_image_")}
    if not goals:
        # The last frame of each episode, as demonstrations are relabelled.
        ends = np.flatnonzero(np.r_[episode[1:] != episode[:-1], True])
        last = ends[np.searchsorted(ends, np.arange(n))]
        slots = [slot for slot in policy.batch_spec.goal_images if f"image_{slot}" in arrays]
        goals = {f"image_{slot}": arrays[f"image_{slot}"][last] for slot in slots}
    frames = Frames(
        where=where,
        observation={key: arrays[key] for key in known if key in arrays},
        present={key: arrays[f"present_{key}"] for key in known if f"present_{key}" in arrays},
        instruction=arrays.get("instruction"),
        goals=goals,
        embedding=arrays.get("embedding"),
        action=arrays.get("action"),
        episode=episode,
        dataset=arrays["dataset"],
        task=arrays.get("task", np.full(n, "", dtype="<U1")),
        points={key.removeprefix("point_"): array for key, array in arrays.items() if key.startswith("point_")},
        phases={key.removeprefix("phase_"): array for key, array in arrays.items() if key.startswith("phase_")},
        **more,
    )
    if not frames.ways(policy):
        spec = policy.batch_spec
        wanted = ["instruction"] * (spec.language_length is not None)
        wanted += ["embedding"] * (spec.language_embedding is not None)
        wanted += [f"goal_image_{slot}" for slot in spec.goal_images]
        unread = wanted and wanted[0] == "instruction" and policy.text_tokenizer is None
        hint = "; its text tokenizer is missing (--text-model)" if unread else ""
        raise FrameError(f"{where}: no task for the policy: expected one of {', '.join(wanted) or 'none'}{hint}")
    return frames


_KINDS = {"u": "uint8", "f": "float", "i": "int", "b": "bool", "U": "str"}


def _describe(array: np.ndarray | None) -> str:
    return "nothing" if array is None else f"({', '.join(map(str, np.shape(array)))}) {np.asarray(array).dtype}"
