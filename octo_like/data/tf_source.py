"""Any tf.data.Dataset of trajectories as one dataset of a mixture: it works, but its resume is approximate.

    config.data.datasets.mine = dict(source="my_module:trajectories", image_keys=dict(primary="image"), weight=0.2)

`my_module.trajectories()` returns a `tf.data.Dataset` (a dlimp dataset is one) or a `TrajectoryDataset` of dicts of
tensors whose first axis is the step, as RLDS has them. A `standardize` function and the keys of the spec apply to it as
they do to other datasets.

Such a dataset cannot be sought: which trajectory comes next is its own affair. So samples that the order gives to it
are filled from a pool of trajectories (`octo_like.data.batches.pooled`), each of which leaves when all of its steps
have been used. Which samples these are, their goals and everything else drawn by key remain exact, and so do the
samples of all other datasets. After a resume the source begins anew. `order_spec["approximate"]` and the log name it.

Statistics come from its first `STATISTICS_TRAJECTORIES` trajectories, once at each start (they may differ between
starts when the source shuffles; give it a seed). Hosts of a run compare them at its start, and refuse to normalise the
same source differently. It has no validation episodes. Each process takes every P-th trajectory.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from octo_like.data.episode import RawEpisode, raw_episode, stored_bytes
from octo_like.data.oxe import registry
from octo_like.data.prepared import PreparedDataset, check_names, problem_of, statistics_of
from octo_like.data.rlds.index import Index
from octo_like.data.rlds.leaves import Selected, select
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf

POOL = 64  # trajectories that samples are drawn from
STATISTICS_TRAJECTORIES = 1000
# Steps of the pseudo-episode that stands for the source in the order; its numbers mean nothing.
_STEPS = 1 << 14

log = logging.getLogger(__name__)


class TrajectoryFunction(Selected):
    """Spec and source as a dataset of selected trajectories. A `octo_like.data.prepared.EpisodeFunction`.

    Raises:
      DataError: no such function, not a dataset of trajectories, a wrong key (with the valid ones).
    """

    random_ops: tuple[str, ...] = ()

    def __init__(self, spec: DatasetSpec):
        self.spec = spec
        try:
            make, code = registry.resolve(spec.source)
        except DataError as error:
            raise DataError(f"{spec.name}: {str(error).replace('standardize=', 'source=')}") from error
        assert make is not None  # a spec of a source names one
        transform, transform_code = registry.resolve(spec.standardize, compat=spec.compat, blank_text=spec.blank_text)
        self.definition = {
            **spec.transform_fields(),
            "source": spec.source,
            "source_code": code,
            "standardize_source": transform_code,
        }
        self._dataset = _trajectories(make, spec)

        def chosen(trajectory):
            return select(trajectory if transform is None else transform(trajectory), spec)

        self.dataset = self._dataset.map(chosen, num_parallel_calls=2, deterministic=True)

    @functools.cached_property
    def output(self) -> Any:
        return self.dataset.element_spec

    def read(self, path: str, offset: int, slots: Collection[str], depth_slots: Collection[str] = ()) -> RawEpisode:
        raise DataError(f"{self.spec.name}: trajectory {offset} of source={path!r} cannot be read again")


def _trajectories(make: Callable[..., Any], spec: DatasetSpec) -> tf.data.Dataset:
    if inspect.signature(make).parameters:
        raise DataError(f"{spec.name}: source={spec.source!r} must be a function without arguments")
    made = make()
    dataset = made if isinstance(made, tf.data.Dataset) else getattr(made, "dataset", None)
    if not isinstance(dataset, tf.data.Dataset) or not isinstance(dataset.element_spec, Mapping):
        raise DataError(
            f"{spec.name}: source={spec.source!r} returned a {type(made).__name__}; it must return a tf.data.Dataset "
            "whose elements are trajectories (dicts of tensors with the step first)"
        )
    if getattr(made, "is_flattened", False):
        raise DataError(f"{spec.name}: source={spec.source!r} is flattened; trajectories are needed")
    return dataset


def checked_episode(
    item: Mapping[str, Any], where: str, slots: Collection[str], depth_slots: Collection[str]
) -> RawEpisode:
    """A trajectory with the pictures of some cameras. Raises DataError when it cannot be used; `where` names it."""
    raw = raw_episode(item, 0, slots, depth_slots)
    if not len(raw.action):
        raise DataError(f"{where} has no steps; leave such out with .filter(...)")
    if (problem := problem_of(raw)) is not None:
        raise DataError(f"{where}: {problem}")
    return raw


def trajectory_name(key: str, spec: DatasetSpec, number: int) -> str:
    return f"{key}: trajectory {number} of source={spec.source!r}"


def prepare_source(key: str, spec: DatasetSpec) -> PreparedDataset:
    """A source as a dataset of a mixture; reads its first trajectories for the statistics.

    Raises:
      DataError: whatever is wrong with the source or its first trajectories, by name and number.
    """
    function = TrajectoryFunction(spec)
    check_names(key, spec, function)
    episodes: list[RawEpisode] = []
    instructions: collections.Counter = collections.Counter()
    size = 0
    for number, item in enumerate(function.dataset.take(STATISTICS_TRAJECTORIES).as_numpy_iterator()):
        raw = checked_episode(item, trajectory_name(key, spec, number), item["images"], item["depths"])
        instructions.update(set(raw.texts or ()))
        size += raw.action.nbytes + (0 if raw.proprio is None else raw.proprio.nbytes)
        size += stored_bytes(*raw.images.values(), *raw.depths.values(), *raw.extras.values())
        episodes.append(dataclasses.replace(raw, images={}, depths={}))
    if not episodes:
        raise DataError(f"{spec.name}: source={spec.source!r} gives no trajectories")
    statistics = statistics_of(key, spec, episodes)
    train = _index(function, np.array([_STEPS]), int(POOL * size / len(episodes)))
    val = _index(function, np.zeros(0, np.int64), 0)
    log.warning(
        "%s: source=%r is a tf.data.Dataset: resume is approximate for its samples, which begin anew at each start",
        key,
        spec.source,
    )
    where = (spec.source or "", "tf.data")
    return PreparedDataset(key, spec, function, train, val, statistics, dict(instructions), *where)


def _index(function: TrajectoryFunction, steps: np.ndarray, size: int) -> Index:
    """An index that lets the order draw from the source, and memory be planned for its pool."""
    zeros = np.zeros(len(steps), np.int64)
    definition = hashlib.sha256(repr(sorted(function.definition.items())).encode()).hexdigest()[:16]
    return Index(
        files=(function.spec.source or "",),
        file=zeros,
        record=zeros,
        offset=zeros,
        length=np.full(len(steps), size, np.int64),
        record_hash=zeros,
        raw_steps=steps,
        steps=steps,
        frames=steps,
        has_language=zeros.astype(bool),
        first=zeros,
        bits=None,
        definition_hash=definition,
    )
