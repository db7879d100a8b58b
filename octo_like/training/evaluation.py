"""How good a policy is, by four measures: loss on held-out data, action error in physical units, pictures, and acting.

All of them take functions and arrays, so that train.py, finetune.py and a notebook use the same code. The closed-loop
measure is the one place where training looks into the robot's room: success in the world is what the others stand for.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from octo_like.common.dimensions import grippers, of_statistics
from octo_like.common.normalization import CONSTANT, to_absolute, unnormalize
from octo_like.robot.intervals import success_interval
from octo_like.robot.planning import PredictedPlanner
from octo_like.robot.prediction import Prediction, dimensions_of
from octo_like.robot.record import annotate_all
from octo_like.robot.rollout import Episode, PolicyLike, evaluate, gym_env_maker
from octo_like.training.probe_frames import Frames, action_width

# A batch of the schema to normalised actions (B, H, A) at the last position of the window.
SampleFn = Callable[[Mapping[str, Any]], Any]

MEASURES = ("mae", "rmse", "first_mae", "mean_mae")  # of an ActionError, per dimension
EVALUATION_SEEDS = 1_000_000_000  # rollouts use seeds from here on; demonstrations are made from smaller ones


def validation_loss(terms_fn: Callable[[Mapping[str, Any]], Mapping], batches: Iterable[Mapping]) -> dict[str, float]:
    """Mean loss (and other metrics) of every head over all batches, exact for batches of unequal masks.

    Args:
      terms_fn: batch to {head: {metric: masked sum, "count": number of entries it runs over}}.
      batches: finite.

    Returns:
      {"<head>/<metric>": mean}; heads that no sample trains are left out.

    Raises:
      ValueError: no batches.
    """
    totals: dict[str, dict[str, float]] = {}
    for batch in batches:
        for head, terms in jax.device_get(terms_fn(batch)).items():
            total = totals.setdefault(head, {})
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + float(value)
    if not totals:
        raise ValueError("no validation batches")
    return {
        f"{head}/{name}": value / total["count"]
        for head, total in totals.items()
        if total["count"] > 0
        for name, value in total.items()
        if name != "count"
    }


@dataclasses.dataclass(frozen=True)
class ActionError:
    """Errors of predicted actions per dimension, in the units of the dataset; entries that no mask admits are NaN.

    Attributes:
      names, tags: of the dimensions; tags are safe in names of metrics and hold the unit, see
        `octo_like.common.dimensions`.
      mae, rmse: (A,) mean absolute and root mean squared error over all steps of the chunks.
      first_mae: (A,) mean absolute error of the first action of the chunks alone.
      mean_mae: (A,) error of always answering with the dataset's mean: what a policy must beat.
      count: (A,) entries compared.
      std: (A,) deviation of the actions that the policy learned from.
      gripper_accuracy: share of the entries of grippers at which the predicted command opens or closes as the true one
        does: both are on one side of the middle between open and closed. NaN without a known gripper.
    """

    names: tuple[str, ...]
    tags: tuple[str, ...]
    mae: np.ndarray
    rmse: np.ndarray
    first_mae: np.ndarray
    mean_mae: np.ndarray
    count: np.ndarray
    std: np.ndarray
    gripper_accuracy: float

    def in_std(self, errors: np.ndarray) -> float:
        """The mean over the dimensions of errors (A,) in standard deviations; those that are constant are left out.

        Metres and radians have no mean of their own; in standard deviations, always answering with the mean of a
        normal distribution has 0.8.
        """
        counted = (self.std > CONSTANT) & np.isfinite(errors)
        return float(np.mean(errors[counted] / self.std[counted])) if counted.any() else math.nan

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Flat finite numbers for a metrics writer: "<prefix>mae/<tag of a dimension>", ..., and over all dimensions
        "<prefix>mae_in_std", "<prefix>mean_mae_in_std" and "<prefix>gripper_accuracy"."""
        values = {
            f"{prefix}{measure}/{tag}": float(value)
            for measure in MEASURES
            for tag, value in zip(self.tags, getattr(self, measure), strict=True)
        }
        values |= {f"{prefix}{measure}_in_std": self.in_std(getattr(self, measure)) for measure in ("mae", "mean_mae")}
        values[f"{prefix}gripper_accuracy"] = self.gripper_accuracy
        return {name: value for name, value in values.items() if math.isfinite(value)}


def scalar_names(statistics: Mapping[str, Any]) -> list[str]:
    """What `ActionError.scalars` may give for a dataset of these statistics."""
    width = len(np.asarray(statistics["action"]["mean"]))
    named = of_statistics(statistics, "action", width)
    errors = [f"{measure}/{tag}" for measure in MEASURES for tag in named.tags]
    return [*errors, "mae_in_std", "mean_mae_in_std", *(["gripper_accuracy"] if grippers(statistics, width) else [])]


def action_error(
    sample_fn: SampleFn,
    batches: Iterable[Mapping[str, Any]],
    statistics: Mapping[str, Any],
    *,
    kind: str | None = None,
    names: Sequence[str] | None = None,
) -> ActionError:
    """Compares sampled with true actions in physical units, entries with action_pad_mask False left out.

    Args:
      sample_fn: see `SampleFn`.
      batches: of one dataset; finite.
      statistics: of that dataset.
      kind: its normalisation, "normal" or "bounds"; None: what statistics["normalization"] says, else "normal".
      names: of its action dimensions; None: the statistics', with their units.

    Raises:
      ValueError: no batches, or another number of names than of dimensions.
    """
    stats, kind = statistics["action"], kind or statistics.get("normalization", "normal")
    width = len(np.asarray(stats["mean"]))
    named = of_statistics(statistics, "action", width) if names is None else dimensions_of(names, width)
    opening = grippers(statistics, width)
    sums = {key: np.zeros(width) for key in ("absolute", "squared", "first", "constant", "count", "first_count")}
    agree = pairs = 0
    for batch in batches:
        predicted, true, mask = compare(sample_fn, batch, stats, kind)
        difference = np.where(mask, predicted - true, 0.0).astype(np.float64)
        from_mean = np.where(mask, np.asarray(stats["mean"], np.float64) - true, 0.0)
        sums["absolute"] += np.abs(difference).sum((0, 1))
        sums["squared"] += np.square(difference).sum((0, 1))
        sums["constant"] += np.abs(from_mean).sum((0, 1))
        sums["count"] += mask.sum((0, 1))
        sums["first"] += np.abs(difference[:, 0]).sum(0)
        sums["first_count"] += mask[:, 0].sum(0)
        for d, ends in opening.items():
            same = (predicted[..., d] > np.mean(ends)) == (true[..., d] > np.mean(ends))
            agree, pairs = agree + int(same[mask[..., d]].sum()), pairs + int(mask[..., d].sum())
    if not sums["count"].any():
        raise ValueError("no action to compare with: no validation batches, or every entry is masked")
    count = np.where(sums["count"] > 0, sums["count"], np.nan)
    first_count = np.where(sums["first_count"] > 0, sums["first_count"], np.nan)
    return ActionError(
        names=named.names,
        tags=named.tags,
        mae=sums["absolute"] / count,
        rmse=np.sqrt(sums["squared"] / count),
        first_mae=sums["first"] / first_count,
        mean_mae=sums["constant"] / count,
        count=sums["count"].astype(np.int64),
        std=np.asarray(stats["std"], np.float64),
        gripper_accuracy=agree / pairs if pairs else math.nan,
    )


def compare(
    sample_fn: SampleFn, batch: Mapping[str, Any], stats: Mapping[str, Any], kind: str = "normal"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predicted, true, mask), each (B, H, D): physical units, last window position, D dimensions of the dataset.

    H is the shorter of the batch's chunk and the predicted one.
    """
    width = len(np.asarray(stats["mean"]))
    predicted = np.asarray(sample_fn(batch), np.float32)
    true, mask = (np.asarray(batch[key])[:, -1] for key in ("action", "action_pad_mask"))
    horizon = min(predicted.shape[-2], true.shape[-2])
    predicted, true, mask = (x[:, :horizon, :width] for x in (predicted, true, mask))
    return unnormalize(predicted, stats, kind), unnormalize(true, stats, kind), mask


def predict_rows(
    sample_fns: Sequence[SampleFn],
    batches: Iterable[Mapping[str, Any]],
    statistics: Mapping[str, Any],
    *,
    kind: str | None = None,
    limit: int | None = 64,
) -> Prediction:
    """Predictions for the first rows of the batches, one sample per function (e.g. one sampler with several seeds).

    Rows are taken in order up to `limit` (None: all), and no further than the first episode when the batches hold whole
    episodes one after the other (the second row follows the first, and the timestep does not rise where the next one
    begins, or where a last batch is filled up). Actions that are learned relative to the proprioception
    (`statistics["relative_to"]`) are made absolute, so that a chunk lies along the actions that it predicts.
    """
    stats, kind = statistics["action"], kind or statistics.get("normalization", "normal")
    limit = sys.maxsize if limit is None else limit
    parts, taken = [], 0
    for batch in batches:
        compared = [compare(fn, batch, stats, kind) for fn in sample_fns]
        timestep = np.asarray(batch["observation"]["timestep"])[:, -1]
        predicted, true, mask = np.stack([one[0] for one in compared]), compared[0][1], compared[0][2]
        if statistics.get("relative_to") is not None:
            place = _physical_proprio(batch, statistics, kind)[:, None]
            predicted, true = (to_absolute(x, place, statistics["relative_to"]) for x in (predicted, true))
        parts.append((predicted, true[:, 0], mask[:, 0], timestep))
        taken += len(timestep)
        if taken >= limit:
            break
    if not parts:
        raise ValueError("no batches to predict")
    predicted = np.concatenate([part[0] for part in parts], axis=1)
    true, mask, timestep = (np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))
    end = min(limit, len(timestep))
    if end > 1 and timestep[1] > timestep[0]:
        breaks = np.flatnonzero(np.diff(timestep[:end]) <= 0)
        end = int(breaks[0]) + 1 if len(breaks) else end
    return Prediction(predicted[:, :end], true[:end], mask[:end], timestep[:end])


def _physical_proprio(batch: Mapping[str, Any], statistics: Mapping[str, Any], kind: str) -> np.ndarray:
    """(B, P) of the last window position, without padding; values that normalisation has clipped stay clipped."""
    width = len(np.asarray(statistics["proprio"]["mean"]))
    normalised = np.asarray(batch["observation"]["proprio"], np.float32)[:, -1, :width]
    return unnormalize(normalised, statistics["proprio"], kind)


def predict_episode(policy: Any, frames: Frames, episode: int, *, samples: int = 4, seed: int = 0) -> Prediction:
    """Samples chunks at every frame of an episode, from its own observations, as `plot_prediction` draws them.

    The policy sees what the demonstrator saw, not where its own actions would have led: this shows what it predicts,
    and not whether it succeeds.

    Args:
      policy: a `Policy`, with statistics of the episode's dataset.
      frames: with actions; from `frames_from_arrays`, for instance of `octo_like.envs.labels.labelled_frames`.
      episode: its number in `frames.episode`.
      samples: S, chunks of each frame.
      seed: of the sampling noise.

    Raises:
      ValueError: no such episode, or frames without actions.
    """
    rows = np.flatnonzero(frames.episode == episode)
    if not len(rows) or frames.action is None:
        raise ValueError(f"no episode {episode} with actions; there are {sorted(set(frames.episode.tolist()))[:20]}")
    dataset = str(frames.dataset[rows[0]])
    observation, tasks = frames.inputs(policy, dataset, rows, frames.ways(policy)[0])
    keys = jax.random.split(jax.random.key(seed), len(rows))
    predicted = policy.sample_actions(observation, tasks, rng=keys, unnormalize=dataset, sample_shape=(samples,))
    width = action_width(policy, dataset, min(predicted.shape[-1], frames.action.shape[-1]))
    true = frames.action[rows, 0, :width]
    return Prediction(
        predicted=np.asarray(predicted)[..., :width],
        true=np.nan_to_num(true),
        mask=np.isfinite(true),
        timestep=np.arange(len(rows)),
    )


@dataclasses.dataclass(frozen=True)
class ClosedLoop:
    """Rollouts of one policy in one environment.

    Attributes:
      episodes: their outcomes.
      scalars: "success", "success/<task>", "success_low", "success_high" (90% interval), "steps".
      videos: name to frames (t, h, w, 3) uint8, captioned, of the recorded episodes.
    """

    episodes: list[Episode]
    scalars: dict[str, float]
    videos: dict[str, np.ndarray]


def closed_loop(
    policy: PolicyLike,
    env: str,
    dataset: str | None,
    *,
    episodes: int = 20,
    seed: int = EVALUATION_SEEDS,
    record: int = 2,
    plan_every: int | None = None,
    **options: Any,
) -> ClosedLoop:
    """Success of the policy in a registered gymnasium environment; the episodes' seeds are seed, seed + 1, ...

    Args:
      policy: e.g. made from the parameters of the moment.
      env: id of the environment ("module:id" imports a module first).
      dataset: name of the statistics that give actions their units.
      plan_every: the policy says what it does next, anew after so many chunks, and acts on it; None: it does not.
      options: of `evaluate`, as `exec_horizon`; `batch_size` is 20.
    """
    options = {"batch_size": min(20, episodes), **options}
    if plan_every is not None:
        options |= {"planner": PredictedPlanner(), "plan_every": plan_every}
    outcomes = evaluate(
        policy,
        gym_env_maker(env),
        range(seed, seed + episodes),
        unnormalize=dataset,
        record=record,
        **options,
    )
    videos = {
        f"{episode.seed - seed}": np.stack(
            [
                np.asarray(picture)
                for picture in annotate_all(
                    episode.frames, episode.instruction, episode.success, 2, episode.subtasks, episode.first_width
                )
            ]
        )
        for episode in outcomes
        if episode.frames is not None
    }
    return ClosedLoop(outcomes, success_scalars([episode.summary() for episode in outcomes]), videos)


def success_scalars(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The scalars of `ClosedLoop` from `Episode.summary` of all its episodes, on whichever host they ran."""
    successes = [one["success"] for one in outcomes]
    low, high = success_interval(successes)
    scalars = {"success": float(np.mean(successes)), "success_low": low, "success_high": high}
    scalars["steps"] = float(np.mean([one["steps"] for one in outcomes]))
    for task in sorted({one["task"] for one in outcomes} - {""}):
        scalars[f"success/{task}"] = float(np.mean([one["success"] for one in outcomes if one["task"] == task]))
    return scalars


def share(episodes: int, index: int, count: int) -> range:
    """Numbers of the episodes that process `index` of `count` runs: consecutive ones, equal parts but for one."""
    return range(index * episodes // count, (index + 1) * episodes // count)
