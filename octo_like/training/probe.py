"""What a policy knows and what it does not, measured on labelled frames.

Four questions: can the positions of things be read off its tokens by a linear probe; where do its actions differ from
the demonstrated ones; what does the readout attend to; which parts of the model does the loss still pull at. A policy
that stands on a plateau has usually learned all but one thing: here one sees which. See docs/probing.md.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octo_like.common import normalization
from octo_like.common.schema import flatten
from octo_like.common.words import suggest
from octo_like.model.attention import recorded_weights
from octo_like.model.octo import total_loss
from octo_like.model.tokens import TokenGroup, masked_mean
from octo_like.policy.describe import TokenReport, token_report
from octo_like.training.linear_probe import LinearProbe, linear_probe
from octo_like.training.probe_frames import Frames, action_width, batches
from octo_like.training.step import norms_by_part, sample_keys

MEAN = ":mean"  # behind a group's name: the mean over its valid tokens, in place of all of them side by side
INPUT = ":input"  # the tokens as they enter the transformer, in which the groups read each other
BATCH = 64
GRADIENT_BATCH = 16  # a gradient keeps what a forward pass forgets
RECORDED = 8  # frames at once when attention is recorded, which no compiler helps with


@dataclasses.dataclass(frozen=True)
class Readable:
    """One probe: `point` in the frames of `scope` ("all", a dataset, a task, ...) from the tokens of `group`."""

    scope: str
    point: str
    group: str
    probe: LinearProbe


@dataclasses.dataclass(frozen=True)
class ActionErrors:
    """Mean absolute errors of sampled chunks in one phase of one dataset, by step of the chunk and dimension.

    Attributes:
      phase: "all", or one of the frames' phases.
      frames: with a demonstrated action.
      physical, normalised: (H, A). mean_normalised: (H, A), of always answering with the dataset's mean action.
    """

    dataset: str
    phase: str
    frames: int
    physical: np.ndarray
    normalised: np.ndarray
    mean_normalised: np.ndarray


@dataclasses.dataclass(frozen=True)
class Attention:
    """What the last timestep's readout attends to, mean over heads, its tokens and frames.

    Attributes:
      readout: its name.
      groups: names; "NAME (earlier)": of the window's earlier timesteps.
      share: dataset -> (layers, groups), each row sums to 1.
      rows: frames of the maps.
      maps: camera -> (frames, layers, rows, columns) weights of its patches; cameras whose tokens are no grid are not
        in it.
    """

    readout: str
    groups: tuple[str, ...]
    share: Mapping[str, np.ndarray]
    rows: np.ndarray
    maps: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Probed:
    """Everything that was measured.

    Attributes:
      names: dataset -> [(name, unit), ...] of its action dimensions.
      attention: None for a policy without readouts.
      gradients: dataset -> {"loss": mean loss, part of the model: norm of the gradient}; empty without actions.
    """

    frames: Frames
    task: str
    readable: list[Readable]
    errors: list[ActionErrors]
    names: Mapping[str, list[tuple[str, str]]]
    attention: Attention | None
    gradients: Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """At most so many frames of each dataset for gradients and for attention; attention maps that are kept."""

    gradients: int = 512
    attention: int = 64
    maps: int = 4


def probe_policy(
    policy: Any,
    frames: Frames,
    *,
    groups: Sequence[str] | None = None,
    task: str | None = None,
    folds: int = 5,
    seed: int = 0,
    limits: Limits = Limits(),
) -> Probed:
    """Measures everything.

    Args:
      groups: of tokens, see `chosen_groups`.
      task: how the policy is told what to do, one of `frames.ways(policy)`; None: the first of them.
      folds: of the probes' episodes.
      seed: of the folds, of the sampled actions and of the loss.
      limits: how many frames are looked at.

    Raises:
      ValueError: a group or a way to give tasks that the policy does not have.
    """
    ways = frames.ways(policy)
    if task not in (None, *ways):
        raise ValueError(f"{frames.where}: tasks cannot be given by {task!r}; valid: {', '.join(ways)}")
    task = task or ways[0]
    report = token_report(policy.model, policy.batch_spec)
    groups = chosen_groups(report, groups)
    widths = {name: action_width(policy, name, _last(frames.action)) for name in frames.datasets}
    return Probed(
        frames=frames,
        task=task,
        readable=probe_points(frames, group_features(policy, frames, groups, task), folds=folds, seed=seed),
        errors=action_errors(policy, frames, task, seed=seed) if frames.action is not None else [],
        names={name: frames.names(policy, name, width) for name, width in widths.items()},
        attention=attention_shares(policy, frames, task, report, limit=limits.attention, maps=limits.maps),
        gradients=gradient_norms(policy, frames, task, limit=limits.gradients, seed=seed)
        if frames.action is not None
        else {},
    )


def _last(array: np.ndarray | None) -> int:
    return 0 if array is None else array.shape[-1]


def _rows(frames: Frames, dataset: str, limit: int | None = None) -> np.ndarray:
    """Frames of a dataset; at most `limit`, spread evenly."""
    rows = np.flatnonzero(frames.dataset == dataset)
    return rows if limit is None else _spread(rows, limit)


def _spread(rows: np.ndarray, limit: int) -> np.ndarray:
    if len(rows) <= limit:
        return rows
    return rows[((np.arange(limit) + 0.5) * len(rows) / limit).astype(int)]


# -- what can be read off the tokens -----------------------------------------------------------------------------------


def chosen_groups(report: TokenReport, names: Sequence[str] | None) -> list[str]:
    """The names, checked; None: all tokens of every readout, and the mean over those of every observation group.

    "NAME" stands for all tokens of the group side by side, as they leave the transformer, "NAME:mean" for their mean,
    "NAME:input" and "NAME:input:mean" for those that enter it. "task" and "obs" are all groups of that kind together.

    Raises:
      ValueError: a group that the policy does not have, with those it has.
    """
    have = list(report.sizes())
    if names is None:
        readouts = [name for name in have if name.startswith("readout_")]
        return readouts + [name + MEAN for name in have if name.startswith("obs_")]
    valid = have + [kind for kind in ("task", "obs") if any(name.startswith(f"{kind}_") for name in have)]
    for name in names:
        group, _, _ = _parts(name)
        if group not in valid:
            ends = f"each also with {MEAN}, {INPUT}, {INPUT}{MEAN}"
            raise ValueError(f"the policy has no token group {name!r}; {suggest(group, valid)} ({ends})")
    return list(dict.fromkeys(names))


def _parts(name: str) -> tuple[str, bool, bool]:
    """(group, as it enters the transformer, its mean)."""
    stem = name.removesuffix(MEAN)
    return stem.removesuffix(INPUT), stem.endswith(INPUT), name.endswith(MEAN)


def group_features(policy: Any, frames: Frames, groups: Sequence[str], task: str) -> dict[str, np.ndarray]:
    """group -> (N, F) float32: its tokens at the window's last timestep, 0 where they are masked."""

    @jax.jit
    def program(params, observation, tasks):
        entering: dict[str, TokenGroup] = {}

        def watch(next_fun, args, kwargs, context):
            if type(context.module).__name__ == "BlockTransformer" and context.method_name == "__call__":
                entering.update(args[0] | args[1])
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(watch):
            leaving = policy.model.apply({"params": params}, observation, tasks, method="groups")
        for kind in ("task", "obs"):
            parts = [group for name, group in entering.items() if name.startswith(f"{kind}_")]
            if parts:
                entering[kind] = TokenGroup.concatenate(parts)
        chosen = {name: _parts(name) for name in groups}
        return {
            name: _feature((entering if enters else leaving)[group], mean)
            for name, (group, enters, mean) in chosen.items()
        }

    features: dict[str, np.ndarray] = {}
    for dataset in frames.datasets:
        unnormalize = dataset if policy.statistics else None
        for rows, count in batches(_rows(frames, dataset), BATCH):
            observation, tasks = frames.inputs(policy, dataset, rows, task)
            out = program(policy.params, policy.prepare_observations(observation, unnormalize), tasks)
            for name, value in out.items():
                if name not in features:
                    features[name] = np.zeros((len(frames), value.shape[-1]), np.float32)
                features[name][rows[:count]] = np.asarray(value)[:count]
    return features


def _feature(group: TokenGroup, mean: bool) -> jax.Array:
    if group.tokens.ndim == 4:  # (B, W, n, D), a task's group is (B, n, D)
        group = TokenGroup(group.tokens[:, -1], group.mask[:, -1])
    tokens = group.tokens.astype(jnp.float32)
    if mean:
        return masked_mean(TokenGroup(tokens, group.mask))
    return jnp.where(group.mask[..., None], tokens, 0).reshape(len(tokens), -1)


def scopes(frames: Frames) -> dict[str, np.ndarray]:
    """Sets of frames with a name, (N,) bool each: all, by dataset, task, both, and phase."""
    found = {"all": np.ones(len(frames), bool)}
    tasks = [name for name in dict.fromkeys(frames.task.tolist()) if name]
    found |= {name: frames.dataset == name for name in frames.datasets}
    found |= {name: frames.task == name for name in tasks}
    for dataset in frames.datasets:
        found |= {f"{dataset} {name}": (frames.dataset == dataset) & (frames.task == name) for name in tasks}
    return found | {f"phase {name}": mask for name, mask in frames.phases.items()}


def probe_points(
    frames: Frames, features: Mapping[str, np.ndarray], *, folds: int = 5, seed: int = 0
) -> list[Readable]:
    """Probes for every point in every scope. Of scopes with the same frames of a point only one is kept."""
    found: dict[tuple[str, bytes], str] = {}
    named = scopes(frames)
    known = {point: np.isfinite(target).all(1) for point, target in frames.points.items()}
    for point in frames.points:
        for scope, mask in named.items():
            key = (point, (mask & known[point]).tobytes())
            # "tabletop_arm reach" says more than "all", but "phase reach" no more than "reach".
            if not scope.startswith("phase ") or key not in found:
                found[key] = scope
    kept = {(point, scope) for (point, _), scope in found.items()}
    result = []
    for scope, mask in named.items():
        for point, target in frames.points.items():
            rows = mask & known[point]
            if (point, scope) not in kept or len(np.unique(frames.episode[rows])) < 2:
                continue
            for group, feature in features.items():
                probe = linear_probe(feature[rows], target[rows], frames.episode[rows], folds=folds, seed=seed)
                result.append(Readable(scope, point, group, probe))
    return result


# -- errors of actions -------------------------------------------------------------------------------------------------


def action_errors(policy: Any, frames: Frames, task: str, *, seed: int = 0) -> list[ActionErrors]:
    """Errors of one sampled chunk per frame, for every dataset and phase; a frame's noise depends on seed and row."""
    assert frames.action is not None  # without actions there is nothing to ask
    result = []
    for dataset in frames.datasets:
        unnormalize = dataset if policy.statistics else None
        parts = []
        for rows, count in batches(_rows(frames, dataset), BATCH):
            observation, tasks = frames.inputs(policy, dataset, rows, task)
            actions = policy.sample_actions(
                observation, tasks, rng=sample_keys(seed, 0, rows.astype(np.int32)), unnormalize=unnormalize
            )
            parts.append(np.asarray(actions)[:count])
        rows, predicted = _rows(frames, dataset), np.concatenate(parts)
        width = action_width(policy, dataset, min(predicted.shape[-1], frames.action.shape[-1]))
        true = frames.action[rows][:, : predicted.shape[1], :width]
        predicted = predicted[:, : true.shape[1], :width]
        mean, scale = np.zeros(width), np.ones(width)
        if unnormalize is not None:
            entry = policy.statistics[dataset]
            mean = np.asarray(entry["action"]["mean"], np.float64)
            if entry.get("relative_to") is not None:  # the statistics are of differences, the actions here absolute
                mean = np.nanmean(true[:, 0], axis=0, dtype=np.float64)
            # Not clipped, as `normalize` would be with bounds: errors beyond them are errors.
            _, scale, _ = normalization.coefficients(entry["action"], entry.get("normalization", "normal"))
        error = np.abs(predicted - true)
        for phase, mask in {"all": np.ones(len(frames), bool), **frames.phases}.items():
            chosen = mask[rows] & np.isfinite(true).any((1, 2))
            if chosen.any():
                physical, constant = _mean(error[chosen]), _mean(np.abs(mean - true[chosen]))
                result.append(
                    ActionErrors(dataset, phase, int(chosen.sum()), physical, physical * scale, constant * scale)
                )
    return result


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    count = np.isfinite(values).sum(0)
    return np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)


# -- attention ---------------------------------------------------------------------------------------------------------


def attention_shares(
    policy: Any, frames: Frames, task: str, report: TokenReport, *, limit: int = 64, maps: int = 4
) -> Attention | None:
    """Weights of the first readout; `maps` frames, spread over all, are shown in full."""
    readouts = [name for name in report.sizes() if name.startswith("readout_")]
    if not readouts:
        return None
    last = policy.batch_spec.window_size - 1
    starts = np.cumsum([0] + [group.size for group in report.layouts])
    spans = {(g.name, g.timestep): slice(a, a + g.size) for g, a in zip(report.layouts, starts[:-1], strict=True)}
    labels = [name if t in (-1, last) else f"{name} (earlier)" for name, t in spans]
    columns = list(dict.fromkeys(labels))
    of_column = np.zeros((report.total, len(columns)))
    for label, span in zip(labels, spans.values(), strict=True):
        of_column[span, columns.index(label)] = 1
    grids = _grids(policy, spans, last)
    share: dict[str, np.ndarray] = {}
    shown: list[int] = []
    shown_maps: dict[str, list[np.ndarray]] = {camera: [] for camera in grids}
    for i, dataset in enumerate(frames.datasets):
        rows = _rows(frames, dataset, limit)
        # As many of each dataset as can be, the rest of the first ones.
        here = _spread(rows, maps // len(frames.datasets) + (i < maps % len(frames.datasets)))
        total: Any = 0.0  # (layers, groups) after the first
        for batch, count in batches(rows, RECORDED):
            weights = _readout_weights(policy, frames, dataset, batch, task, report, spans[readouts[0], last])[:count]
            total = total + (weights @ of_column).sum(0)
            for j in np.flatnonzero(np.isin(batch[:count], here)):
                shown.append(batch[j])
                for camera, (span, grid) in grids.items():
                    shown_maps[camera].append(weights[j][:, span].reshape(-1, *grid))
        share[dataset] = total / len(rows)
    return Attention(
        readout=readouts[0],
        groups=tuple(columns),
        share=share,
        rows=np.array(shown, int),
        maps={camera: np.stack(parts) for camera, parts in shown_maps.items() if parts},
    )


def _readout_weights(policy, frames, dataset, rows, task, report, readout) -> np.ndarray:
    """(B, layers, N) float64."""
    observation, tasks = frames.inputs(policy, dataset, rows, task)
    observation = policy.prepare_observations(observation, dataset if policy.statistics else None)
    layers = recorded_weights(
        lambda: policy.model.apply({"params": policy.params}, observation, tasks, method="groups"),
        tokens=report.total,
    )
    return np.stack([np.asarray(w[:, :, readout].mean((1, 2)), np.float64) for w in layers], axis=1)


def _grids(policy, spans, last: int) -> dict[str, tuple[slice, tuple[int, int]]]:
    """camera -> (its patches in the sequence, (rows, columns)); a single token, or a token learner's, is no grid."""
    found = {}
    for camera, (height, width) in policy.batch_spec.image_sizes.items():
        span = spans.get((f"obs_{camera}", last))
        count = 0 if span is None else span.stop - span.start
        rows = round((count * height / width) ** 0.5)
        if count > 1 and rows and rows * (count // rows) == count:
            found[camera] = span, (rows, count // rows)
    return found


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradient_norms(
    policy: Any, frames: Frames, task: str, *, limit: int = 512, seed: int = 0
) -> dict[str, dict[str, float]]:
    """dataset -> {"loss": the policy's own mean loss on it, part of the model: L2 norm of that loss's gradient}.

    Without dropout and augmentation; noise and diffusion times are keyed by seed and row. Heads that do not learn from
    a dataset are left out.
    """
    model = policy.model

    @jax.jit
    def program(params, batch, keys_b, counts):
        def loss(params):
            terms = model.apply({"params": params}, batch, keys_b, False, method="loss_terms")
            return total_loss(model, terms, counts)

        return jax.value_and_grad(loss)(params)

    result = {}
    for dataset in frames.datasets:
        parts = [
            loss_batch(policy, frames, dataset, rows, count, task)
            for rows, count in batches(_rows(frames, dataset, limit), GRADIENT_BATCH)
        ]
        each = [model.counts(part, sample_keys(seed, 0, part["sample_id"])) for part in parts]
        counts = {name: sum(float(count[name]) for count in each) for name in each[0]}
        if not any(counts.values()):
            continue
        total = 0.0
        grads: Any = None
        for part in parts:
            value, grad = program(policy.params, part, sample_keys(seed, 0, part["sample_id"]), counts)
            total += float(value)
            grads = grad if grads is None else jax.tree.map(jnp.add, grads, grad)
        norms = norms_by_part("norm", dict(flatten(grads)))
        result[dataset] = {"loss": total} | {name.removeprefix("norm/"): float(x) for name, x in norms.items()}
    return result


def loss_batch(policy: Any, frames: Frames, dataset: str, rows_b: np.ndarray, count: int, task: str) -> dict[str, Any]:
    """A training batch (schema, without dataset_id) of frames of one dataset; only its first `count` rows count."""
    spec = policy.batch_spec
    statistics = policy.statistics.get(dataset)
    observation, tasks = frames.inputs(policy, dataset, rows_b, task)
    index_bw, _, _ = frames.window(rows_b, spec.window_size)
    assert frames.action is not None  # a loss needs actions
    width = action_width(policy, dataset, min(spec.action_dim, frames.action.shape[-1]))
    action = frames.action[index_bw][:, :, : spec.action_horizon, :width]
    if statistics is not None:
        action = normalization.normalize(action, statistics["action"], statistics.get("normalization", "normal"))
    pad = [(0, 0), (0, 0), (0, spec.action_horizon - action.shape[2]), (0, spec.action_dim - width)]
    action = np.pad(action, pad, constant_values=np.nan).astype(np.float32)
    valid = np.isfinite(action) & (np.arange(len(rows_b)) < count)[:, None, None, None]
    head = (statistics or {}).get("head")
    learns = [head] if head in spec.heads else spec.heads
    return {
        "observation": policy.prepare_observations(observation, dataset if statistics is not None else None),
        "task": tasks,
        "action": np.where(np.isfinite(action), action, 0.0),
        "action_pad_mask": valid,
        "action_head_mask": {name: np.full(len(rows_b), name in learns) for name in spec.heads},
        "sample_id": rows_b.astype(np.int32),
        **_batch_points(frames, spec, index_bw, count, task),
    }


def _batch_points(frames: Frames, spec: Any, index_bw: np.ndarray, count: int, task: str) -> dict[str, np.ndarray]:
    """What the auxiliary loss of a policy learns from; as in training, only where words name the things."""
    if not spec.points:
        return {}
    unknown = np.full((len(frames), 2), np.nan, np.float32)
    points = np.stack([frames.points.get(name, unknown)[index_bw] for name in spec.points], axis=2)
    known = np.isfinite(points).all(-1) & (np.arange(len(index_bw)) < count)[:, None, None] & (task in ("text", "both"))
    return {"points": np.where(known[..., None], points, 0.0).astype(np.float32), "points_pad_mask": known}
