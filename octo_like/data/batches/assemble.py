"""Samples to batches: gathers windows, chunks and goals from episodes, decodes the frames they use, fills the masks."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from octo_like.common.fast import FastVocabulary
from octo_like.common.schema import TEXT_KINDS, BatchSpec, Tree
from octo_like.data.batches.damage import DamageLog
from octo_like.data.batches.episodes import Episode, EpisodeSet, EpisodeStore
from octo_like.data.batches.gather import FrameGatherer
from octo_like.data.batches.texts import Texts
from octo_like.data.order import windows
from octo_like.data.order.order import uniform
from octo_like.data.prepared import PreparedDataset
from octo_like.data.rlds.records import DamagedRecord, LostRecord
from octo_like.data.settings import TaskOptions
from octo_like.data.spec import DataError, suggest

MAX_CLIPPED = 0.05  # of the coefficients of a dataset's first chunks, by a vocabulary of action tokens
JUDGED_CHUNKS = 256  # so many
# A dataset may have these cameras without the run using them; any other name without a size is a mistake.
COMMON_SLOTS = ("primary", "secondary", "wrist")


class Request(NamedTuple):
    """Samples to assemble, as the order gives them: equally long arrays of N entries."""

    sample_id: np.ndarray  # int64
    dataset: np.ndarray  # int32
    episode: np.ndarray  # int64
    frame: np.ndarray  # int64, number of the usable frame within the episode
    key: np.ndarray  # uint64


# (row of the request, attempt) -> (episode, frame) that takes the place of a damaged sample, of the same dataset.
Substitute = Callable[[int, int], tuple[int, int]]
MAX_SUBSTITUTES = 64


def _check_vocabulary(head: str, dataset: str, clipped: float) -> None:
    """Raises DataError when a vocabulary cuts a share `clipped` of the first chunks that it is given of a dataset: it
    was trained on other actions, or on these with another normalisation."""
    if clipped > MAX_CLIPPED:
        raise DataError(
            f"{dataset}: {clipped:.0%} of what its actions consist of is outside the range of the vocabulary of "
            f"model.heads.{head} (more than {MAX_CLIPPED:.0%}): it was trained on other actions or another "
            "normalization; train one with scripts/train_action_tokenizer.py"
        )


def _check_texts(prepared: PreparedDataset, spec: BatchSpec) -> None:
    """Raises DataError for texts to learn, and nothing that would learn them."""
    if prepared.spec.text_target is not None and spec.text_target is None and prepared.spec.action_key is None:
        raise DataError(
            f"{prepared.key}: text_keys: the model learns no texts, and there is nothing else to learn; give it "
            "model.auxiliaries.text=dict(kind='text', readout='readout_text', vocabulary='words') and a readout 'text'"
        )
    if prepared.spec.action_key is None and spec.language_length is None:
        raise DataError(f"{prepared.key}: pictures with words need a model that reads words: batches have no language")


def check_spec(datasets: Sequence[PreparedDataset], spec: BatchSpec) -> None:
    """Raises DataError when a dataset does not fit the batches: too wide, an unknown camera or head."""
    for prepared in datasets:
        width, head = prepared.function.action_dim, prepared.spec.head
        if width > spec.action_dim:
            raise DataError(
                f"{prepared.key}: action has {width} dimensions, but batches hold {spec.action_dim}; widen its head, "
                f"model.heads.{head}.action_dim={width} (adapting: --config.surgery.heads.{head}.action_dim={width}, "
                "which keeps what the head knows of the first ones)"
            )
        proprio = prepared.function.proprio_dim
        if proprio is not None and spec.proprio_dim is not None and proprio > spec.proprio_dim:
            raise DataError(
                f"{prepared.key}: observation/proprio has {proprio} dimensions, but batches hold {spec.proprio_dim}; "
                f"set --config.proprio_dim to at least {proprio}"
            )
        cameras = {slot for slot, key in prepared.spec.image_keys.items() if key is not None}
        unknown = sorted(cameras - set(spec.image_sizes) - set(COMMON_SLOTS))
        if unknown or (cameras and not cameras & set(spec.image_sizes)):
            slot = (unknown or sorted(cameras))[0]
            raise DataError(
                f"{prepared.key}: camera {slot!r} has no size in image_sizes; {suggest(slot, spec.image_sizes)}. "
                "Give it a size, or leave it out of image_keys"
            )
        points = {name for name, key in prepared.spec.point_keys.items() if key is not None}
        if spec.points and points and spec.resize != "stretch":
            raise DataError(
                f"{prepared.key}: point_keys: places are fractions of the stored picture, which resize={spec.resize!r} "
                "moves; set resize='stretch', or leave the points out"
            )
        if spec.points and points - set(spec.points):
            name = min(points - set(spec.points))
            raise DataError(
                f"{prepared.key}: point_keys: model.auxiliaries learn no point {name!r}; {suggest(name, spec.points)}"
            )
        for name, shape in prepared.function.extra_shapes.items():
            wanted = spec.extra_observations.get(name)
            if wanted != shape:
                expected = f"they hold {wanted}" if wanted else suggest(name, spec.extra_observations)
                raise DataError(
                    f"{prepared.key}: sensor {name!r} (extra_keys) has the shape {shape} at a step, which is not that "
                    f"of batches; {expected}. Set --config.extra_observations.{name}={','.join(map(str, shape))}, or "
                    "leave it out of extra_keys"
                )
        if prepared.spec.head not in spec.heads and prepared.spec.action_key is not None:
            raise DataError(
                f"{prepared.key}: no action head {prepared.spec.head!r}; {suggest(prepared.spec.head, spec.heads)}"
            )
        _check_texts(prepared, spec)
        chunk = prepared.function.action_chunk
        if chunk is not None and chunk < spec.action_horizon:
            raise DataError(
                f"{prepared.key}: actions come in chunks of {chunk}, shorter than action_horizon={spec.action_horizon}"
            )


class Assembler:
    """Makes batches of the schema from requests. The same request always gives the same batch."""

    def __init__(
        self,
        sets: Sequence[EpisodeSet],
        spec: BatchSpec,
        task: TaskOptions,
        store: EpisodeStore,
        texts: Texts,
        damage: DamageLog,
        frames: FrameGatherer,
    ):
        self._sets, self._spec, self._task, self._store = sets, spec, task, store
        self._texts, self._damage, self._frames = texts, damage, frames
        if task.image_dropout_keep is not None and task.image_dropout_keep not in spec.image_sizes:
            keep = task.image_dropout_keep
            raise DataError(f"image_dropout_keep: no camera {keep!r}; {suggest(keep, spec.image_sizes)}")
        specs = [of.prepared.spec for of in sets]
        self._has_slot = {
            slot: np.array([one.image_keys.get(slot) is not None for one in specs]) for slot in spec.image_sizes
        }
        self._heads = {
            head: np.array([one.head == head and one.action_key is not None for one in specs]) for head in spec.heads
        }
        # Of the first chunks, by head and dataset: coefficients that the vocabulary would cut, and chunks.
        self._fitting: dict[tuple[str, int], tuple[int, int]] = {}
        self._judging = threading.Lock()  # several batches are made at a time
        self._has_actions = np.array([one.action_key is not None for one in specs])
        kinds = [None if one.text_target is None else one.text_target[0] for one in specs]
        self._text_kind = np.array([0 if kind is None else 1 + TEXT_KINDS.index(kind) for kind in kinds], np.int32)

    def __call__(self, request: Request, substitute: Substitute) -> Tree:
        """A batch of N samples. One that needs a damaged record or frame is made from its substitute, keeping its own
        number and key; no other sample changes.

        Raises:
          DataError: too much damage (see `DamageLog`), or anything else that is wrong, by name.
        """
        attempts = np.zeros(len(request.sample_id), np.int64)
        episode, step, loaded = self._located(request)
        while True:
            found = self._found(request.dataset, episode, loaded)
            bad = {row: str(error) for row, error in enumerate(found) if isinstance(error, DamagedRecord)}
            batch: Tree = {}
            if not bad:
                good = [one for one in found if isinstance(one, Episode)]
                batch, bad = self._batch(request, episode, step.astype(np.int32), good)
            for row, reason in bad.items():
                if row in loaded:
                    raise DataError(f"{reason}; leave such trajectories out in the source itself")
                gone = isinstance(found[row], LostRecord)
                self._damage.report(int(request.dataset[row]), int(episode[row]), reason, file_gone=gone)
            if not bad:
                return batch
            for row, reason in bad.items():
                of = self._sets[request.dataset[row]]
                if attempts[row] == MAX_SUBSTITUTES:
                    raise DataError(
                        f"{of.prepared.key}: sample {int(request.sample_id[row])}: {MAX_SUBSTITUTES} substitutes are "
                        f"all damaged; the last one: {reason}"
                    )
                number, frame = substitute(row, int(attempts[row]))
                located = of.locate(np.array([number]), np.array([frame]), request.key[row : row + 1])
                episode[row], step[row] = located.episode[0], located.step[0]
                attempts[row] += 1

    def _located(self, request: Request) -> tuple[np.ndarray, np.ndarray, dict[int, Episode]]:
        """(episodes, steps, {row: its episode, where it cannot be read again})."""
        episode, step = np.empty_like(request.episode), np.empty_like(request.episode)
        loaded: dict[int, Episode] = {}
        for dataset in np.unique(request.dataset).tolist():
            rows = np.flatnonzero(request.dataset == dataset)
            found = self._sets[dataset].locate(request.episode[rows], request.frame[rows], request.key[rows])
            episode[rows], step[rows] = found.episode, found.step
            if found.loaded:
                loaded |= dict(zip(rows.tolist(), found.loaded, strict=True))
        return episode, step, loaded

    def _found(
        self, dataset: np.ndarray, episode: np.ndarray, loaded: Mapping[int, Episode]
    ) -> list[Episode | DamagedRecord]:
        """The episodes of all rows, or what is wrong with them."""
        rows = [row for row in range(len(episode)) if row not in loaded]
        read = self._store.get([(int(dataset[row]), int(episode[row])) for row in rows])
        found: dict[int, Episode | DamagedRecord] = {**loaded, **dict(zip(rows, read, strict=True))}
        return [found[row] for row in range(len(episode))]

    def _batch(
        self, request: Request, episode: np.ndarray, t: np.ndarray, episodes: list[Episode]
    ) -> tuple[Tree, dict[int, str]]:
        """(batch, {row: reason} of samples that use a frame that cannot be decoded), at steps t (N,) int32."""
        spec = self._spec
        length = np.array([len(one.action) for one in episodes], np.int32)
        text = np.array([one.text[step] for one, step in zip(episodes, t, strict=True)], np.int32)
        use_goal, use_words = self._choose_task(request, text, self._labelled(episodes, t))
        use_text = use_words & (text != 0)
        # The task is an instruction, said or, beside a sub-task, left out; of a picture without a question, to say it.
        named = use_text | (~self._has_actions[request.dataset] & (text == 0))
        asked = use_words | ((text == 0) & ~use_goal)  # what has no words of its own is learned where nothing is asked
        told, acts = np.zeros(len(t), bool), np.ones(len(t), bool)  # told what to do next; learns its actions

        drawn = windows.goal_step(
            uniform(request.key, "goal").astype(np.float32), t, length, self._task.max_goal_distance
        )
        goal = np.where(use_goal, drawn, length - 1).astype(np.int32)
        steps = windows.window_steps(t, spec.window_size)  # (N, W), negative before the beginning
        window = windows.within(steps, length[:, None])
        chunk = windows.chunk_steps(window, spec.action_horizon)  # (N, W, H), clamped history as in Octo
        reached = windows.chunk_steps(steps, spec.action_horizon)
        past = windows.task_completed(reached, goal, octo_compat=self._task.octo_compat)

        action, action_mask = self._actions(episodes, windows.within(chunk, length[:, None, None]), past)
        seen = self._frames(request.dataset, episode, episodes, window, goal, use_goal, self._kept_cameras(request))
        observation: Tree = dict(seen.observed)
        masks = dict(seen.masks)
        if spec.proprio_dim is not None:
            observation |= self._proprio(episodes, window)
            masks["proprio"] = observation["proprio_pad_mask"].any(-1)
        for name, shape in spec.extra_observations.items():
            observation[name], masks[name] = self._extra(name, shape, episodes, window)
        observation["timestep"] = window.astype(np.int32)
        observation["timestep_pad_mask"] = steps >= 0
        observation["pad_mask_dict"] = masks

        task: Tree = {}
        task_masks: Tree = {}
        if spec.language_length is not None:
            rows = self._texts.paraphrased(np.where(use_text, text, 0), request.key)
            task["language_instruction"] = self._texts.encoded(rows)
            task_masks["language_instruction"] = use_text
            if spec.subtask:
                use_text, told, subtask = self._subtask(request, episodes, t, use_text, use_words)
                task["subtask"] = self._texts.encoded(subtask)
                task_masks |= {"language_instruction": use_text, "subtask": subtask != 0}
                acts = told | (subtask == 0)  # what was done before is nothing to act on
        task |= seen.goals
        task["timestep"] = goal
        task["pad_mask_dict"] = task_masks | seen.goal_masks
        batch = {
            "observation": observation,
            "task": task,
            "action": action,
            "action_pad_mask": action_mask,
            **self._points(episodes, window, named),
            **self._text_target(request.dataset, episodes, t, asked & ~told),
            **self._action_tokens(request.dataset, action, action_mask),
            "action_head_mask": {head: mask[request.dataset] & acts for head, mask in self._heads.items()},
            "dataset_id": request.dataset.astype(np.int32),
            "sample_id": request.sample_id.astype(np.int64),
        }
        return batch, seen.bad

    def _labelled(self, episodes: Sequence[Episode], t: np.ndarray) -> np.ndarray:
        """(N,) bool: steps t (N,) have a sub-task, and some samples are told theirs: in validation none is."""
        if not self._spec.subtask or self._task.drop_subtask_prob == 1:
            return np.zeros(len(t), bool)
        return np.array([e.subtask is not None and e.subtask[i] != 0 for e, i in zip(episodes, t, strict=True)], bool)

    def _choose_task(self, request: Request, text: np.ndarray, labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool: the task is a goal image; the task is words: an instruction, or, where there is none, a sub-task.
        Never both, and with drop_task_prob none."""
        has_task = uniform(request.key, "drop task") >= self._task.drop_task_prob
        has_text = ((text != 0) & (self._spec.language_length is not None)) | labelled
        has_goal = np.zeros(len(text), bool)
        for slot in self._spec.goal_images:
            has_goal |= self._has_slot[slot][request.dataset]
        use_goal = has_goal & (~has_text | (uniform(request.key, "task") < self._task.keep_goal_prob))
        use_goal &= self._has_actions[request.dataset]  # a picture with words is there for its words
        return use_goal & has_task, has_text & ~use_goal & has_task

    def _actions(
        self, episodes: Sequence[Episode], chunk: np.ndarray, past: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        action = np.zeros((*chunk.shape, self._spec.action_dim), np.float32)
        mask = np.zeros(action.shape, bool)
        for i, episode in enumerate(episodes):
            width = episode.action.shape[-1]
            if episode.action.ndim == 3:  # each step has a chunk of its own: that of the window's step
                action[i, ..., :width] = episode.action[chunk[i, :, 0], : chunk.shape[-1]]
            else:
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

    def _extra(
        self, name: str, shape: tuple[int, ...], episodes: Sequence[Episode], window: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(values (N, W, *shape) of another sensor, (N, W) bool): zeros and False for datasets that have none."""
        values, mask = np.zeros((*window.shape, *shape), np.float32), np.zeros(window.shape, bool)
        for i, episode in enumerate(episodes):
            if name in episode.extras:
                values[i], mask[i] = episode.extras[name][window[i]], True
        return values, mask

    def _points(self, episodes: Sequence[Episode], window: np.ndarray, named: np.ndarray) -> Tree:
        """Places of the things that the instruction names; unknown where the task is a goal image."""
        if not self._spec.points:
            return {}
        points = np.full((*window.shape, len(self._spec.points), 2), np.nan, np.float32)
        for i, episode in enumerate(episodes):
            for k, name in enumerate(self._spec.points):
                if name in episode.points:
                    points[i, :, k] = episode.points[name][window[i]]
        known = np.isfinite(points).all(-1) & named[:, None, None]
        return {"points": np.where(known[..., None], points, np.float32(0)), "points_pad_mask": known}

    def _subtask(
        self, request: Request, episodes: Sequence[Episode], t: np.ndarray, use_text: np.ndarray, use_words: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(whether the instruction is said, whether the sub-task is, rows of the sub-tasks that are heard), (N,) each:
        for a share of the samples the one or the other, so that a policy acts on either and on both. A share of those
        that are not told what to do next hears what was done a little before."""

        def rows(steps: np.ndarray) -> np.ndarray:
            known = [0 if e.subtask is None or s < 0 else e.subtask[s] for e, s in zip(episodes, steps, strict=True)]
            return np.array(known, np.int32)

        now, options = rows(t), self._task
        there = use_words & (now != 0)
        told = there & (uniform(request.key, "subtask") >= options.drop_subtask_prob)
        alone = told & (uniform(request.key, "subtask alone") < options.subtask_alone_prob)
        heard = np.where(told, now, 0)
        if options.last_subtask_prob:
            reminded = there & ~told & (uniform(request.key, "last subtask") < options.last_subtask_prob)
            ago = 1 + (uniform(request.key, "steps since") * options.last_subtask_steps).astype(np.int64)
            heard = np.where(reminded, rows(t - ago), heard)
        return use_text & ~alone, told, heard

    def _text_target(self, dataset: np.ndarray, episodes: Sequence[Episode], t: np.ndarray, asked: np.ndarray) -> Tree:
        """What the model learns to say at steps t (N,), where it is asked (N,): the task says what to do, and does not
        say what to do next, which would only be repeated."""
        if self._spec.text_target is None:
            return {}
        rows = np.array(
            [0 if e.target is None else e.target[step] for e, step in zip(episodes, t, strict=True)], np.int32
        )
        rows = np.where(asked, rows, 0)
        kind = np.where(rows != 0, self._text_kind[dataset], 0).astype(np.int32)
        return {"text_target": self._texts.encoded_targets(rows), "text_target_kind": kind}

    def _action_tokens(self, dataset: np.ndarray, action: np.ndarray, mask: np.ndarray) -> Tree:
        """The chunks (N, W, H, A) as ids of each head that has a vocabulary and learns from them; none of a chunk that
        is not whole: what comes after the end is not known, and the ids of a chunk stand for all of it."""
        if not self._spec.action_tokens:
            return {}
        tokens: Tree = {}
        for head, vocabulary in self._texts.targets.actions.items():
            size = (slice(None), slice(None), slice(vocabulary.horizon), slice(vocabulary.dim))
            chunks, known = action[size], mask[size]
            whole = known.any((2, 3)) & (known == known[:, :, :1]).all((2, 3)) & self._heads[head][dataset][:, None]
            ids = np.zeros((*whole.shape, vocabulary.max_tokens), np.int32)
            if whole.any():
                wanted = np.where(known, chunks, 0.0)[whole]
                self._check_fit(head, vocabulary, np.broadcast_to(dataset[:, None], whole.shape)[whole], wanted)
                ids[whole] = vocabulary.encode(wanted, low_pass=True)[0]
            tokens[head] = ids
        return {"action_tokens": tokens}

    def _check_fit(self, head: str, vocabulary: FastVocabulary, dataset_n: np.ndarray, chunks_n: np.ndarray) -> None:
        """Counts what would be cut of the first chunks (N, H, A) of each dataset (N,), and then judges it."""
        for number in np.unique(dataset_n).tolist():
            with self._judging:
                cut, seen = self._fitting.get((head, number), (0, 0))
                if seen < JUDGED_CHUNKS:
                    mine = chunks_n[dataset_n == number]
                    cut, seen = cut + int(vocabulary.clipped(mine).sum()), seen + len(mine)
                    self._fitting[head, number] = cut, seen
            if seen >= JUDGED_CHUNKS:  # also later: a vocabulary that does not fit never does
                share = cut / (seen * vocabulary.num_coefficients)
                _check_vocabulary(head, self._sets[number].prepared.key, share)

    # -- frames

    def _kept_cameras(self, request: Request) -> dict[str, np.ndarray]:
        """{slot: (N,) bool}, False where dropout takes a camera of a sample."""
        slots, probability = sorted(self._spec.image_sizes), self._task.image_dropout_prob
        if probability == 0:
            return {slot: np.ones(len(request.key), bool) for slot in slots}
        present = np.stack([self._has_slot[slot][request.dataset] for slot in slots], axis=-1)  # (N, slots)
        if self._task.image_dropout_keep is not None:
            keep = np.full(len(request.key), slots.index(self._task.image_dropout_keep))
        else:
            keep = windows.nth_true(present, uniform(request.key, "camera that is kept"))
        draws = np.stack([uniform(request.key, f"drop camera {slot}") for slot in slots], axis=-1)
        kept = windows.kept_images(present, draws, probability, keep)
        return {slot: kept[:, i] for i, slot in enumerate(slots)}
