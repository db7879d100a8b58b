"""Samples to batches: gathers windows, chunks and goals from episodes, decodes the frames they use, fills the masks."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence

import numpy as np

from octo_like.common.schema import BatchSpec, Tree
from octo_like.common.text import TextTable
from octo_like.data import frames, indices
from octo_like.data.episodes import Episode, EpisodeStore
from octo_like.data.index import Index, PreparedDataset
from octo_like.data.order import uniform
from octo_like.data.spec import DataError, suggest

# A dataset may have these cameras without the run using them; any other name without a size is a mistake.
COMMON_SLOTS = ("primary", "secondary", "wrist")


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """How a sample is told what to do. All draws are keyed by the sample.

    Attributes:
      keep_goal_prob: of the samples with both an instruction and a goal image, the share whose task is the image; the
        others' task is the instruction. A sample that has only one keeps it.
      max_goal_distance: goals are drawn from fewer than this many steps ahead; None: up to the end of the episode.
      octo_compat: reproduce Octo's action mask (see `indices.task_completed`).
    """

    keep_goal_prob: float = 0.5
    max_goal_distance: int | None = None
    octo_compat: bool = False

    def __post_init__(self):
        if not 0 <= self.keep_goal_prob <= 1:
            raise DataError(f"keep_goal_prob must be in [0, 1], got {self.keep_goal_prob}")
        if self.max_goal_distance is not None and self.max_goal_distance < 1:
            raise DataError(f"max_goal_distance must be at least 1 or None, got {self.max_goal_distance}")


@dataclasses.dataclass(frozen=True)
class Request:
    """Samples to assemble: equally long arrays of N entries."""

    sample_id: np.ndarray  # int64
    dataset: np.ndarray  # int32
    episode: np.ndarray  # int64
    frame: np.ndarray  # int64
    key: np.ndarray  # uint64


def check_spec(datasets: Sequence[PreparedDataset], spec: BatchSpec) -> None:
    """Raises DataError when a dataset does not fit the batches: too wide, an unknown camera or head."""
    for prepared in datasets:
        widths = (("action", prepared.function.action_dim, spec.action_dim),)
        if prepared.function.proprio_dim is not None and spec.proprio_dim is not None:
            widths += (("proprio", prepared.function.proprio_dim, spec.proprio_dim),)
        for what, width, limit in widths:
            if width > limit:
                raise DataError(
                    f"{prepared.key}: {what} has {width} dimensions, but batches hold {limit}; set max_{what}_dim to "
                    f"at least {width}"
                )
        cameras = {slot for slot, key in prepared.spec.image_keys.items() if key is not None}
        unknown = sorted(cameras - set(spec.image_sizes) - set(COMMON_SLOTS))
        if unknown or (cameras and not cameras & set(spec.image_sizes)):
            slot = (unknown or sorted(cameras))[0]
            raise DataError(
                f"{prepared.key}: camera {slot!r} has no size in image_sizes; {suggest(slot, spec.image_sizes)}. "
                "Give it a size, or leave it out of image_keys"
            )
        if prepared.spec.head not in spec.heads:
            raise DataError(
                f"{prepared.key}: no action head {prepared.spec.head!r}; {suggest(prepared.spec.head, spec.heads)}"
            )


class Assembler:
    """Makes batches of the schema from requests. The same request always gives the same batch."""

    def __init__(
        self,
        sources: Sequence[tuple[PreparedDataset, Index]],
        spec: BatchSpec,
        store: EpisodeStore,
        table: TextTable | None,
        pool: concurrent.futures.Executor,
        *,
        task: TaskOptions,
        decode: str,
        threads: int,
    ):
        self._sources, self._spec, self._store, self._table, self._pool = sources, spec, store, table, pool
        self._task, self._decode, self._threads = task, decode, max(1, threads)
        self._has_slot = {
            slot: np.array([prepared.spec.image_keys.get(slot) is not None for prepared, _ in sources])
            for slot in spec.image_sizes
        }
        self._heads = {head: np.array([prepared.spec.head == head for prepared, _ in sources]) for head in spec.heads}

    def __call__(self, request: Request) -> Tree:
        """A batch of N samples. Raises DataError for a damaged record or frame, by name."""
        spec = self._spec
        episodes = self._store.get(list(zip(request.dataset.tolist(), request.episode.tolist(), strict=True)))
        t = request.frame.astype(np.int32)
        length = np.array([len(episode.action) for episode in episodes], np.int32)
        text = np.array([episode.text[step] for episode, step in zip(episodes, t, strict=True)], np.int32)
        use_goal, use_text = self._choose_task(request, text)

        drawn = indices.goal_step(
            uniform(request.key, "goal").astype(np.float32), t, length, self._task.max_goal_distance
        )
        goal = np.where(use_goal, drawn, length - 1).astype(np.int32)
        steps = indices.window_steps(t, spec.window_size)  # (N, W), negative before the beginning
        window = indices.within(steps, length[:, None])
        chunk = indices.chunk_steps(window, spec.action_horizon)  # (N, W, H), clamped history as in Octo
        reached = indices.chunk_steps(steps, spec.action_horizon)
        past = indices.task_completed(reached, goal, octo_compat=self._task.octo_compat)

        action, action_mask = self._actions(episodes, indices.within(chunk, length[:, None, None]), past)
        images, image_masks, goals, goal_masks = self._images(request, episodes, window, goal, use_goal)
        observation: Tree = dict(images)
        masks = dict(image_masks)
        if spec.proprio_dim is not None:
            observation |= self._proprio(episodes, window)
            masks["proprio"] = observation["proprio_pad_mask"].any(-1)
        observation["timestep"] = window.astype(np.int32)
        observation["timestep_pad_mask"] = steps >= 0
        observation["pad_mask_dict"] = masks

        task: Tree = {}
        task_masks: Tree = {}
        if spec.language_length is not None and self._table is not None:
            task["language_instruction"] = self._table.encoded(np.where(use_text, text, 0))
            task_masks["language_instruction"] = use_text
        task |= goals
        task["timestep"] = goal
        task["pad_mask_dict"] = task_masks | goal_masks
        return {
            "observation": observation,
            "task": task,
            "action": action,
            "action_pad_mask": action_mask,
            "action_head_mask": {head: mask[request.dataset] for head, mask in self._heads.items()},
            "dataset_id": request.dataset.astype(np.int32),
            "sample_id": request.sample_id.astype(np.int64),
        }

    def _choose_task(self, request: Request, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool: the task is a goal image; the task is an instruction. Never both."""
        has_text = (text != 0) & (self._spec.language_length is not None)
        has_goal = np.zeros(len(text), bool)
        for slot in self._spec.goal_images:
            has_goal |= self._has_slot[slot][request.dataset]
        use_goal = has_goal & (~has_text | (uniform(request.key, "task") < self._task.keep_goal_prob))
        return use_goal, has_text & ~use_goal

    def _actions(
        self, episodes: Sequence[Episode], chunk: np.ndarray, past: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        action = np.zeros((*chunk.shape, self._spec.action_dim), np.float32)
        mask = np.zeros(action.shape, bool)
        for i, episode in enumerate(episodes):
            width = episode.action.shape[-1]
            action[i, ..., :width] = episode.action[chunk[i]]
            mask[i, ..., :width] = ~past[i, ..., None]
        return action, mask

    def _proprio(self, episodes: Sequence[Episode], window: np.ndarray) -> Tree:
        proprio = np.zeros((*window.shape, self._spec.proprio_dim), np.float32)
        mask = np.zeros(proprio.shape, bool)
        for i, episode in enumerate(episodes):
            if episode.proprio is not None:
                width = episode.proprio.shape[-1]
                proprio[i, :, :width] = episode.proprio[window[i]]
                mask[i, :, :width] = True
        return {"proprio": proprio, "proprio_pad_mask": mask}

    # -- frames

    def _images(
        self, request: Request, episodes: Sequence[Episode], window: np.ndarray, goal: np.ndarray, use_goal: np.ndarray
    ) -> tuple[Tree, Tree, Tree, Tree]:
        """(observation images, their masks, goal images, their masks). Each distinct frame is decoded once."""
        spec, N = self._spec, len(episodes)
        images, masks, goals, goal_masks = {}, {}, {}, {}
        for slot, size in spec.image_sizes.items():
            images[f"image_{slot}"] = observed = np.zeros((*window.shape, *size, 3), np.uint8)
            masks[f"image_{slot}"] = mask = np.zeros(window.shape, bool)
            targets: dict[tuple[int, int, int], list[np.ndarray]] = {}
            sources: dict[tuple[int, int, int], Episode] = {}
            wanted_goal = slot in spec.goal_images
            if wanted_goal:
                goals[f"image_{slot}"] = goal_image = np.zeros((N, *size, 3), np.uint8)
                goal_masks[f"image_{slot}"] = goal_mask = np.zeros(N, bool)
            for i, episode in enumerate(episodes):
                if slot not in episode.images:
                    continue
                stored = episode.images[slot]
                identity = (int(request.dataset[i]), int(request.episode[i]))
                for w, step in enumerate(window[i].tolist()):
                    if len(stored[step]):
                        mask[i, w] = True
                        targets.setdefault((*identity, step), []).append(observed[i, w])
                        sources[(*identity, step)] = episode
                step = int(goal[i])
                if wanted_goal and use_goal[i] and len(stored[step]):
                    goal_mask[i] = True
                    targets.setdefault((*identity, step), []).append(goal_image[i])
                    sources[(*identity, step)] = episode
            self._fill(slot, size, targets, sources)
        return images, masks, goals, goal_masks

    def _fill(
        self, slot: str, size: tuple[int, int], targets: dict, sources: dict[tuple[int, int, int], Episode]
    ) -> None:
        """Decodes the frames named by the keys (dataset, episode, step) into all of their targets."""
        keys = list(targets)
        parts = [keys[i :: self._threads] for i in range(self._threads)]

        def work(part: list[tuple[int, int, int]]) -> None:
            encoded = [key for key in part if not isinstance(sources[key].images[slot], np.ndarray)]
            raw = [key for key in part if isinstance(sources[key].images[slot], np.ndarray)]
            if encoded:
                contents = [sources[key].images[slot][key[2]] for key in encoded]
                try:
                    decoded = frames.decode_frames(contents, size, self._decode)
                except frames.FrameError as error:
                    dataset, episode, step = encoded[error.position]
                    prepared, index = self._sources[dataset]
                    name = prepared.spec.image_keys[slot]
                    raise DataError(f"{index.where(episode)}, step {step}, {name!r} ({slot}): {error}") from error
                for key, image in zip(encoded, decoded, strict=True):
                    image = self._as_rgb(key[0], slot, image)
                    for target in targets[key]:
                        target[...] = image
            for key in raw:
                image = frames.resize_frames(sources[key].images[slot][key[2] : key[2] + 1], size, self._decode)[0]
                image = self._as_rgb(key[0], slot, image)
                for target in targets[key]:
                    target[...] = image

        # The calling thread does a part of its own, so a stream with one thread needs no pool.
        others = [self._pool.submit(work, part) for part in parts[1:] if part]
        work(parts[0])
        for future in others:
            future.result()

    def _as_rgb(self, dataset: int, slot: str, image: np.ndarray) -> np.ndarray:
        """A decoded frame (..., 3) with its channels in the order red, green, blue."""
        return image[..., ::-1] if slot in self._sources[dataset][0].spec.bgr_slots else image
