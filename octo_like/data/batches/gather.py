"""The frames of a batch: which ones its windows and goals need, decoded once each into their places."""

import concurrent.futures
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from octo_like.common.schema import BatchSpec, Tree
from octo_like.data.batches import frames
from octo_like.data.batches.buffers import Buffers
from octo_like.data.batches.episodes import Episode, EpisodeSet
from octo_like.data.episode import EncodedFrame
from octo_like.data.settings import Settings


@dataclasses.dataclass(slots=True)
class _Job:
    """One stored frame and where it goes."""

    slot: str
    depth: bool
    dataset: int
    episode: int
    step: int
    stored: EncodedFrame | np.ndarray
    targets: list[np.ndarray]  # (h, w, 3) uint8, or (h, w, 1) float32 metres
    rows: list[int]  # of the batch


class Gathered(NamedTuple):
    """Images and depth of a batch, as the schema names them, and {row: reason} of samples with a bad frame."""

    observed: Tree
    masks: Tree
    goals: Tree
    goal_masks: Tree
    bad: dict[int, str]


class FrameGatherer:
    """Fills the images and depth maps of batches. Decoding runs in the pool; the calling thread waits."""

    def __init__(
        self, sets: Sequence[EpisodeSet], spec: BatchSpec, settings: Settings, pool: concurrent.futures.Executor
    ):
        self._sets, self._spec, self._pool, self._decode = sets, spec, pool, settings.decode
        self._threads = settings.host.host_threads
        self._buffers = Buffers(settings.host.prefetch + 2)  # made ahead, being made, and in use
        # Frames that cannot be decoded, {(slot, depth, dataset, episode, step): why}: known ones are not tried again.
        self._bad: dict[tuple[str, bool, int, int, int], str] = {}

    def __call__(
        self,
        dataset: np.ndarray,
        episode: np.ndarray,
        episodes: Sequence[Episode],
        window: np.ndarray,
        goal: np.ndarray,
        use_goal: np.ndarray,
        kept: Mapping[str, np.ndarray],
    ) -> Gathered:
        """Frames of N samples.

        Args:
          dataset, episode: (N,) numbers; episodes: what they stand for.
          window: (N, W) steps. goal: (N,) steps, needed where `use_goal` (N,).
          kept: camera -> (N,) bool, False where its observations (and its depth) are dropped.
        """
        spec, N = self._spec, len(episodes)
        result = Gathered({}, {}, {}, {}, {})
        jobs: dict[tuple[str, bool, int, int, int], _Job] = {}
        identities = list(zip(dataset.tolist(), episode.tolist(), strict=True))
        views = [(slot, False, size) for slot, size in spec.image_sizes.items()]
        views += [(slot, True, size) for slot, size in spec.depth_sizes.items()]
        for slot, depth, size in views:
            name = f"depth_{slot}" if depth else f"image_{slot}"
            shape, dtype = ((*size, 1), np.float32) if depth else ((*size, 3), np.uint8)
            result.observed[name] = observed = self._buffers.take((*window.shape, *shape), dtype)
            result.masks[name] = mask = np.zeros(window.shape, bool)
            with_goal = slot in spec.goal_images and not depth
            if with_goal:
                result.goals[name] = goal_image = self._buffers.take((N, *shape), dtype)
                result.goal_masks[name] = goal_mask = np.zeros(N, bool)
            for row, one in enumerate(episodes):
                stored = (one.depths if depth else one.images).get(slot)
                if stored is None:
                    continue
                watched = slot not in kept or bool(kept[slot][row])
                if self._is_ready(stored, shape, int(dataset[row]), slot):
                    if watched:
                        observed[row], mask[row] = stored[window[row]], True
                    if with_goal and use_goal[row]:
                        goal_image[row], goal_mask[row] = stored[goal[row]], True
                    continue
                used = []
                if watched:
                    for w, step in enumerate(window[row].tolist()):
                        if len(stored[step]):  # an empty frame is missing
                            mask[row, w] = True
                            used.append((step, observed[row, w]))
                if with_goal and use_goal[row] and len(stored[step := int(goal[row])]):
                    goal_mask[row] = True
                    used.append((step, goal_image[row]))
                for step, target in used:
                    key = (slot, depth, *identities[row], step)
                    if key not in jobs:
                        jobs[key] = _Job(*key, stored[step], [], [])
                    jobs[key].targets.append(target)
                    jobs[key].rows.append(row)
            # What no frame is decoded into.
            observed[~mask] = 0
            if with_goal:
                goal_image[~goal_mask] = 0
        for key in self._bad.keys() & jobs.keys():
            result.bad.update(dict.fromkeys(jobs.pop(key).rows, self._bad[key]))
        for job in self._run(list(jobs.values())):
            key = (job.slot, job.depth, job.dataset, job.episode, job.step)
            result.bad.update(dict.fromkeys(job.rows, self._bad[key]))
        return result

    def _is_ready(self, stored: object, shape: tuple[int, ...], dataset: int, slot: str) -> bool:
        """Whether frames are stored as batches hold them: they are copied, without a thread's help."""
        if not isinstance(stored, np.ndarray) or stored.shape[1:] != shape or stored.dtype != np.uint8:
            return False
        return slot not in self._sets[dataset].prepared.spec.bgr_slots

    def _run(self, jobs: list[_Job]) -> list[_Job]:
        """Does the jobs, in any order, in all threads. Returns those whose frames cannot be decoded."""
        # One iterator for all threads: who is done takes the next. (Taking from a list's iterator is atomic.)
        rest = iter(jobs)

        def work() -> list[_Job]:
            return [job for job in rest if not self._done(job)]

        futures = [self._pool.submit(work) for _ in range(min(self._threads, len(jobs)))]
        return [job for future in futures for job in future.result()]

    def _done(self, job: _Job) -> bool:
        spec, resize = self._sets[job.dataset].prepared.spec, self._spec.resize
        first, *others = job.targets
        try:
            if job.depth:
                if isinstance(job.stored, np.ndarray):
                    first[...] = frames.resize_depth(job.stored, first.shape[:2], spec.depth_scale, resize)
                else:
                    first[...] = frames.decode_depth(job.stored, first.shape[:2], spec.depth_scale, resize)
            elif isinstance(job.stored, np.ndarray):
                frames.resize_frame(job.stored, first.shape[:2], self._decode, first, resize)
            else:
                frames.decode_frame(job.stored, first.shape[:2], self._decode, first, resize)
        except frames.FrameError as error:
            name = (spec.depth_keys if job.depth else spec.image_keys)[job.slot]
            what = f"depth of {job.slot}" if job.depth else job.slot
            where = f"{self._sets[job.dataset].where(job.episode)}, step {job.step}, {name!r} ({what})"
            self._bad[job.slot, job.depth, job.dataset, job.episode, job.step] = f"{where}: {error}"
            return False
        if not job.depth and job.slot in spec.bgr_slots:
            first[...] = first[..., ::-1].copy()
        for target in others:
            target[...] = first
        return True
