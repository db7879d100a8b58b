"""A dataset of a mixture, ready to be read: what preparing makes, wherever the episodes come from."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from octo_like.common.dimensions import PARTS, Dimensions
from octo_like.data.episode import RawEpisode
from octo_like.data.rlds.index import Index
from octo_like.data.rlds.records import non_finite
from octo_like.data.rlds.statistics import streamed_statistics
from octo_like.data.spec import DataError, DatasetSpec


class EpisodeFunction(Protocol):
    """What is known of a dataset's episodes before one is read. Episodes are records of files
    (`octo_like.data.rlds.records`), arrays (`octo_like.data.in_memory`) or trajectories of a tf.data.Dataset
    (`octo_like.data.tf_source`).

    Attributes:
      definition: JSON-able description of what determines the content of the episodes.
      random_ops: names of stateful random operations in the user's function; empty means that it is reproducible.
      action_dim, proprio_dim: widths; proprio_dim is None without proprioception.
      action_chunk: N, when each step has a chunk of N actions; None when it has one action.
      extra_shapes: of one step's values of each other sensor.
    """

    @property
    def spec(self) -> DatasetSpec: ...

    @property
    def definition(self) -> Mapping[str, Any]: ...

    @property
    def random_ops(self) -> tuple[str, ...]: ...

    @property
    def action_dim(self) -> int: ...

    @property
    def proprio_dim(self) -> int | None: ...

    @property
    def action_chunk(self) -> int | None: ...

    @property
    def extra_shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, path: str, offset: int, slots: Collection[str], depth_slots: Collection[str] = ()) -> RawEpisode:
        """The episode at a place of an index, with the pictures of some cameras."""
        ...


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A dataset of a mixture, ready to be read: episodes of training and validation, statistics of training.

    Attributes:
      key: name in the mixture (and of its statistics).
      train, val: their episodes; `val` is empty when the spec holds none out.
      statistics: see `octo_like.common.normalization`; over all steps of the training episodes, before the filters
        that look at values, as in Octo (which need the statistics themselves).
      instructions: every instruction of the split(s) and the number of episodes that have it.
      damaged: one message per record that could not be read or used when the dataset was indexed.
      targets: every text that is to be learned, where that is known before reading.
    """

    key: str
    spec: DatasetSpec
    function: EpisodeFunction
    train: Index
    val: Index
    statistics: dict[str, Any]
    instructions: dict[str, int]
    directory: str
    version: str
    damaged: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    @property
    def seekable(self) -> bool:
        """Whether any episode can be read at any time. The trajectories of a tf.data.Dataset come as they come: its
        resume is approximate, and its `train` only tells the order how to draw from it."""
        return self.spec.source is None

    @property
    def dimensions(self) -> dict[str, Dimensions]:
        """Names and units of "action" and, if there is any, "proprio"."""
        widths = {part: len(self.statistics[part]["mean"]) for part in PARTS if part in self.statistics}
        return {part: self.spec.dimensions(part, width) for part, width in widths.items()}

    @property
    def named_statistics(self) -> dict[str, Any]:
        """The statistics with names and units of their dimensions, as they travel with a policy."""
        return {**self.statistics, "dimensions": {part: named.to_json() for part, named in self.dimensions.items()}}


def problem_of(raw: RawEpisode) -> str | None:
    """Why an episode cannot be used: parts of other lengths, or numbers that are not finite. None: it can."""
    parts: dict[str, Sequence[Any] | np.ndarray | None] = {
        "proprio": raw.proprio,
        "language": raw.texts,
        "text to learn": raw.target,
    }
    for what, named in (
        ("camera", raw.images),
        ("depth of", raw.depths),
        ("point", raw.points),
        ("sensor", raw.extras),
    ):
        parts |= {f"{what} {name}": values for name, values in named.items()}
    steps = len(raw.action)
    wrong = [f"{name} has {len(part)}" for name, part in parts.items() if part is not None and len(part) != steps]
    if wrong:
        return f"action has {steps} steps, but {', '.join(wrong)}"
    for name, values in {"action": raw.action, "proprio": raw.proprio, **raw.extras}.items():
        if values is not None and (bad := non_finite(values)) is not None:
            return f"{name} is {values[bad]} at step {bad[0]}, dimension {bad[-1]}"
    return None


def check_names(key: str, spec: DatasetSpec, function: EpisodeFunction) -> None:
    """Raises DataError when there are names for another number of dimensions than the data has."""
    for part, width in (("action", function.action_dim), ("proprio", function.proprio_dim or 0)):
        try:
            spec.dimensions(part, width)
        except DataError as error:
            raise DataError(str(error) if key == spec.name else f"{key}: {error}") from None


def check_mask(key: str, spec: DatasetSpec, width: int) -> np.ndarray | None:
    """The (width,) bool mask of normalised action dimensions. Raises DataError when it has another length."""
    mask = spec.action_normalization_mask
    if mask is not None and len(mask) != width:
        raise DataError(
            f"{key}: action_normalization_mask has {len(mask)} entries, but {spec.action_key!r} has {width} dimensions"
        )
    return None if mask is None else np.asarray(mask, bool)


def laid_flat(values: np.ndarray, width: int) -> np.ndarray:
    """(n, ...) as (rows, width), also where the width is 0."""
    return values.reshape(values.size // width if width else len(values), width)


def statistics_of(key: str, spec: DatasetSpec, episodes: Sequence[RawEpisode]) -> dict[str, Any]:
    """The statistics of episodes whose numbers are in memory, see `octo_like.common.normalization`.

    Raises:
      DataError: the spec's action_normalization_mask has another length than the actions.
    """

    def of(values: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return streamed_statistics(lambda: iter([np.concatenate(values)]))

    first = episodes[0]
    statistics: dict[str, Any] = {"action": of([laid_flat(e.action, e.action.shape[-1]) for e in episodes])}
    if first.proprio is not None:
        proprio: list[Any] = [e.proprio for e in episodes]  # all have it, or none
        statistics["proprio"] = of(proprio)
    if first.extras:
        statistics["extra"] = {
            name: of([e.extras[name].reshape(len(e.action), -1) for e in episodes]) for name in first.extras
        }
    if (mask := check_mask(key, spec, first.action.shape[-1])) is not None:
        statistics["action"]["mask"] = mask
    statistics["num_transitions"] = sum(len(e.action) for e in episodes)
    statistics["num_trajectories"] = len(episodes)
    return statistics
