"""Whether a policy is ready for the robot, as far as that can be known without one.

Held-out demonstrations are replayed: at every step the policy sees what the robot saw, through the same `History` and
`sample_actions` that run on a robot, and its chunk is compared with what was done. Nothing here needs TensorFlow.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from octo_like.common import normalization
from octo_like.common.demo import Demo
from octo_like.common.dimensions import of_robot, of_statistics
from octo_like.common.pages import Finding
from octo_like.common.robot import Description
from octo_like.robot.history import History

BATCH = 16  # steps predicted at once when replaying; latency is measured with one
OUTSIDE = 0.01  # share of commands that may be outside the limits
ROUGH = 3.0  # times the demonstrations' second differences
SAME_TASK = 3  # episodes of one instruction from which their first actions are compared with their mean
LOOKS = 0.9  # of that constant's error: a policy above it has not seen what differs between the scenes
DIFFERS = 0.25  # standard deviations of the actions by which first actions must differ to tell anything


@dataclasses.dataclass(frozen=True)
class Replay:
    """One demonstration and what the policy would have done at each of its steps, physical units.

    Attributes:
      predicted: (T, H, A). true: (T, H, A). valid: (T, H) bool, False past the end of the episode.
    """

    demo: Demo
    predicted: np.ndarray
    true: np.ndarray
    valid: np.ndarray

    def executed(self, exec_horizon: int) -> np.ndarray:
        """(T, A): the commands of a robot that executes `exec_horizon` actions of each chunk."""
        steps = len(self.predicted)
        start = np.arange(steps) // exec_horizon * exec_horizon
        return self.predicted[start, np.arange(steps) - start]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Mean absolute errors in physical units by step of the chunk and dimension, each (H, A).

    Attributes:
      policy: of the policy.
      mean: of always answering with the training data's mean action.
      repeat: of repeating the action before the present step.
      count: (H,) pairs compared.
    """

    policy: np.ndarray
    mean: np.ndarray
    repeat: np.ndarray
    count: np.ndarray


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds of `sample_actions` for one observation, compilation left out.

    Attributes:
      first: the first call, with compilation.
      calls: (N,) the others.
    """

    first: float
    calls: np.ndarray

    def at(self, percent: float) -> float:
        return float(np.percentile(self.calls, percent))


@dataclasses.dataclass(frozen=True)
class PolicyCheck:
    """Everything that was measured.

    Attributes:
      names: of the action dimensions. units: of them, "" where unknown.
      hz: control rate, or None. exec_horizon: actions executed of each chunk.
      outside: (A,) share of the executed commands outside `limits` (2, A).
      start: (2, A) mean absolute error of the first action of an episode, of the policy and of the mean first action of
        the episodes with that instruction; NaN where no instruction has SAME_TASK episodes.
      std: (A,) of the training actions.
      roughness: (A,) mean second difference of the executed commands over that of the demonstrations; NaN where the
        demonstrations have none.
      disagreement: (A,) mean difference of two consecutive chunks on the steps that both predict, over the standard
        deviation of the actions; NaN when chunks do not overlap.
    """

    dataset: str
    replays: list[Replay]
    errors: Errors
    latency: Latency
    names: tuple[str, ...]
    units: tuple[str, ...]
    hz: float | None
    exec_horizon: int
    limits: np.ndarray
    declared_limits: bool
    outside: np.ndarray
    start: np.ndarray
    std: np.ndarray
    roughness: np.ndarray
    disagreement: np.ndarray
    findings: list[Finding]


def observations(demo: Demo, policy: Any) -> list[dict[str, Any]]:
    """What the policy gets at each step: windows (W, ...) of frames, proprioception and masks."""
    history, rows = History(policy.batch_spec.window_size), []
    slots = [slot for slot in policy.batch_spec.image_sizes if slot in demo.images]
    for t in range(len(demo.action)):
        frame = {f"image_{slot}": demo.images[slot][t] for slot in slots}
        frame |= {f"present/{slot}": demo.present[slot][t] for slot in slots}
        if demo.proprio is not None and policy.batch_spec.proprio_dim is not None:
            frame["proprio"] = demo.proprio[t]
        frame |= {name: x[t] for name, x in demo.extras.items() if name in policy.batch_spec.extra_observations}
        window = history.append(frame)
        window["pad_mask_dict"] = {f"image_{slot}": window.pop(f"present/{slot}") for slot in slots}
        rows.append(window)
    return rows


def task_of(policy: Any, demo: Demo, batch: int) -> dict[str, Any]:
    """`batch` times the demonstration's task: its instruction, or its last images for a policy without language.

    Raises:
      ValueError: the policy takes no language, and goal images that the demonstration does not have.
    """
    spec = policy.batch_spec
    if spec.language_length is not None and policy.text_tokenizer is not None:
        return policy.create_tasks(texts=[demo.instruction] * batch)
    slots = [slot for slot in spec.goal_images if slot in demo.images]
    goals = {f"image_{slot}": np.stack([demo.images[slot][-1]] * batch) for slot in slots}
    if not goals:
        raise ValueError(
            f"{demo.where}: the policy takes no texts, and the dataset has none of its goal cameras "
            f"{', '.join(spec.goal_images) or '(it takes none)'}"
        )
    return policy.create_tasks(goals=goals)


def _stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _keys(seed: int, steps: Sequence[int]) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.asarray(steps, np.uint32))


def replay(policy: Any, demo: Demo, dataset: str, *, seed: int = 0) -> Replay:
    """Predicts a chunk at every step of a demonstration; the noise of a step depends on seed and step alone."""
    rows, tasks = observations(demo, policy), task_of(policy, demo, BATCH)
    parts = []
    for start in range(0, len(rows), BATCH):
        steps = [min(t, len(rows) - 1) for t in range(start, start + BATCH)]  # one compiled batch size
        actions = policy.sample_actions(
            _stack([rows[t] for t in steps]), tasks, rng=_keys(seed, steps), unnormalize=dataset
        )
        parts.append(np.asarray(actions)[: len(rows) - start])
    predicted = np.concatenate(parts)
    true, valid = demo.chunks(predicted.shape[1])
    horizon = true.shape[1]
    return Replay(demo, predicted[:, :horizon], true, valid)


def action_errors(replays: Sequence[Replay], mean: np.ndarray) -> Errors:
    """Errors over all steps of all replays; see `Errors`. `mean`: (A,) of the training actions."""
    horizon, width = replays[0].predicted.shape[1:]
    sums = {key: np.zeros((horizon, width)) for key in ("policy", "mean", "repeat")}
    count = np.zeros(horizon)
    for one in replays:
        valid = one.valid[..., None]
        before = np.concatenate([one.true[:1, 0], one.true[:-1, 0]])[:, None]  # the first step repeats itself
        sums["policy"] += (np.abs(one.predicted - one.true) * valid).sum(0)
        sums["mean"] += (np.abs(mean - one.true) * valid).sum(0)
        sums["repeat"] += (np.abs(before - one.true) * valid).sum(0)
        count += one.valid.sum(0)
    per = np.where(count > 0, count, np.nan)[:, None]
    return Errors(**{key: total / per for key, total in sums.items()}, count=count.astype(int))


def start_errors(replays: Sequence[Replay]) -> np.ndarray:
    """(2, A): error of the first action, of the policy and of the mean first action of the instruction's episodes.

    Before the robot has moved only the pictures tell one scene from another. Later its own motion tells where a
    demonstration is going, and a policy that reads this has a low error and fails alone (de Haan et al. 2019, causal
    confusion).
    """
    groups: dict[str, list[Replay]] = {}
    for one in replays:
        groups.setdefault(one.demo.instruction, []).append(one)
    parts = []
    for group in groups.values():
        if len(group) >= SAME_TASK:
            true = np.stack([one.true[0, 0] for one in group])
            predicted = np.stack([one.predicted[0, 0] for one in group])
            parts.append(np.stack([np.abs(predicted - true), np.abs(true.mean(0) - true)], axis=1))
    if not parts:
        return np.full((2, replays[0].true.shape[-1]), np.nan)
    return np.concatenate(parts).mean(0)


def measure_latency(policy: Any, demo: Demo, dataset: str, *, calls: int = 50) -> Latency:
    """Times `sample_actions` on one observation at a time, as on a robot: until the numbers are on the host."""
    rows, task = observations(demo, policy), task_of(policy, demo, 1)
    times = []
    for call in range(calls + 1):
        row = _stack([rows[call % len(rows)]])
        start = time.perf_counter()
        np.asarray(policy.sample_actions(row, task, rng=jax.random.key(call), unnormalize=dataset))
        times.append(1000 * (time.perf_counter() - start))
    return Latency(times[0], np.array(times[1:]))


def check_policy(
    policy: Any,
    demos: Sequence[Demo],
    dataset: str,
    *,
    description: Description | None = None,
    hz: float | None = None,
    exec_horizon: int | None = None,
    calls: int = 50,
    seed: int = 0,
) -> PolicyCheck:
    """Replays demonstrations and measures everything.

    Args:
      demos: held-out ones.
      dataset: of the policy's statistics.
      description: what the numbers mean; None: limits are the demonstrations' own, names those of the statistics.
      hz: control rate; None: the description's.
      exec_horizon: actions executed of each chunk; None: half of it, at least one.

    Raises:
      ValueError: no demonstrations, or an `exec_horizon` that the chunk does not have.
    """
    if not demos:
        raise ValueError("no demonstrations to replay")
    replays = [replay(policy, demo, dataset, seed=seed) for demo in demos]
    stats = policy.statistics[dataset]["action"]
    if policy.statistics[dataset].get("relative_to") is not None:
        # Those of training are of differences; what is compared here are the absolute actions that they become.
        stats = normalization.compute_statistics(np.concatenate([one.true[:, 0] for one in replays]))
    horizon, width = replays[0].predicted.shape[1:]
    exec_horizon = max(1, horizon // 2) if exec_horizon is None else exec_horizon
    if (
        isinstance(exec_horizon, bool)
        or not isinstance(exec_horizon, int | np.integer)
        or not 1 <= exec_horizon <= horizon
    ):
        raise ValueError(f"exec_horizon must be in 1..{horizon} (the policy's chunk), got {exec_horizon!r}")
    if description is not None and len(description.actions) != width:
        raise ValueError(
            f"the description has {len(description.actions)} action dimensions, the policy's dataset {width}"
        )
    named = of_statistics(policy.statistics[dataset], "action", width)
    if description is not None:
        named = of_robot(description.to_json()) or named
    limits = action_limits(stats, description)
    executed = np.concatenate([one.executed(exec_horizon) for one in replays])
    span = limits[1] - limits[0]
    outside = ((executed < limits[0] - 1e-3 * span) | (executed > limits[1] + 1e-3 * span)).mean(0)
    result = PolicyCheck(
        dataset=dataset,
        replays=replays,
        errors=action_errors(replays, np.asarray(stats["mean"])),
        latency=measure_latency(policy, demos[0], dataset, calls=calls),
        names=named.names,
        units=named.shown_units,
        hz=hz or (description.control_hz if description else None),
        exec_horizon=exec_horizon,
        limits=limits,
        declared_limits=description is not None and any(action.limits for action in description.actions),
        outside=outside,
        start=start_errors(replays),
        std=np.asarray(stats["std"]),
        roughness=roughness(replays, exec_horizon),
        disagreement=disagreement(replays, np.asarray(stats["std"]), exec_horizon),
        findings=[],
    )
    return dataclasses.replace(result, findings=list(findings_of(result)))


def action_limits(stats: Mapping[str, Any], description: Description | None) -> np.ndarray:
    """(2, A): declared limits; where there are none, a tenth more than the range of the training data."""
    low, high = np.asarray(stats["min"], np.float64), np.asarray(stats["max"], np.float64)
    margin = np.maximum(0.1 * (high - low), 1e-6)
    limits = np.stack([low - margin, high + margin])
    for d, action in enumerate(description.actions if description else ()):
        if action.limits is not None:
            limits[:, d] = action.limits
    return limits


def roughness(replays: Sequence[Replay], exec_horizon: int) -> np.ndarray:
    """(A,) mean |x[t+1] - 2 x[t] + x[t-1]| of the executed commands over that of the demonstrations."""

    def second(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.abs(np.diff(x, 2, axis=0)) for x in values]).mean(0)

    long = [one for one in replays if len(one.true) >= 3]
    if not long:
        return np.full(replays[0].true.shape[-1], np.nan)
    demonstrated = second([one.true[:, 0] for one in long])
    commanded = second([one.executed(exec_horizon) for one in long])
    return np.where(demonstrated > 0, commanded / np.where(demonstrated > 0, demonstrated, 1), np.nan)


def disagreement(replays: Sequence[Replay], std: np.ndarray, exec_horizon: int) -> np.ndarray:
    """(A,) mean |chunk of t at step e + j - chunk of t + e at step j| over the actions' standard deviation."""
    parts = []
    for one in replays:
        overlap = one.predicted.shape[1] - exec_horizon
        if overlap > 0 and len(one.predicted) > exec_horizon:
            difference = one.predicted[:-exec_horizon, exec_horizon:] - one.predicted[exec_horizon:, :overlap]
            both = one.valid[exec_horizon:, :overlap]
            parts.append(np.abs(difference)[both])
    if not parts:
        return np.full(len(std), np.nan)
    return np.concatenate(parts).mean(0) / np.where(std > 0, std, np.nan)


def findings_of(check: PolicyCheck) -> Iterator[Finding]:
    """What of the measurements speaks against running the policy, and what to know before."""
    error, constant = np.nanmean(check.errors.policy, axis=0), np.nanmean(check.errors.mean, axis=0)
    worse = [name for d, name in enumerate(check.names) if constant[d] > 1e-6 and error[d] >= constant[d]]
    if worse:
        yield Finding(
            "not_learned",
            f"{', '.join(worse)}: the error is not smaller than that of always answering with the mean action. The "
            "policy has not learned from these observations: more steps, another learning rate, or inputs that are not "
            "what it was trained on",
        )
    first, constant = check.start
    unseen = [
        name
        for d, name in enumerate(check.names)
        if constant[d] > DIFFERS * check.std[d] and first[d] >= LOOKS * constant[d]
    ]
    if unseen:
        yield Finding(
            "start",
            f"{', '.join(unseen)}: the first action of an episode, before the robot has moved, is not better than "
            "their mean. The policy does not see what differs between scenes and may follow its own motion instead, "
            "which works in replay and fails alone: leave out what tells the motion (proprioception, history; "
            "`entries` of a lowdim tokenizer), train longer, or show the scene larger",
        )
    beyond = [f"{name} ({x:.0%} of the commands)" for name, x in _pairs(check, check.outside) if x > OUTSIDE]
    if beyond:
        which = "their limits" if check.declared_limits else "what was demonstrated"
        yield Finding("limits", f"{', '.join(beyond)}: outside {which}; clip before the robot")
    rough = [f"{name} ({x:.1f} times)" for name, x in _pairs(check, check.roughness) if x > ROUGH]
    if rough:
        yield Finding(
            "rough",
            f"{', '.join(rough)}: commands change direction more than the demonstrations do: execute more of each "
            "chunk, or average overlapping chunks (TemporalEnsembleWrapper)",
        )
    yield _latency_finding(check)


def _pairs(check: PolicyCheck, values: np.ndarray) -> list[tuple[str, float]]:
    return list(zip(check.names, values.tolist(), strict=True))


def _latency_finding(check: PolicyCheck) -> Finding:
    if check.hz is None:
        hint = "unknown: give --control_hz or a robot's description to judge the latency"
        return Finding("control_rate", hint, warning=False)
    period, slow = 1000 / check.hz, check.latency.at(99)
    horizon = check.errors.policy.shape[0]
    late = int(np.ceil(slow / period))  # steps that pass while the policy thinks
    needed = check.exec_horizon + late
    measured = f"p99 {slow:.0f} ms, period {period:.0f} ms at {check.hz:g} Hz"
    if slow <= period:
        return Finding("latency", f"{measured}: the policy answers within one step", warning=False)
    measured += f": an answer takes {late} steps"
    if late > check.exec_horizon:
        return Finding(
            "latency",
            f"{measured}, but only {check.exec_horizon} are executed of each chunk: the robot waits for its policy. "
            "Execute more of each chunk, use fewer denoising steps, or a faster machine",
        )
    if needed > horizon:
        return Finding(
            "latency",
            f"{measured}. Asked for while the last chunk is executed, chunks would need {needed} actions and have "
            f"{horizon}: the robot stands still {late} of every {needed} steps, or executes fewer than "
            f"{check.exec_horizon} of each",
        )
    return Finding(
        "latency",
        f"{measured}; ask for the next chunk while the last one is executed, {check.exec_horizon} + {late} of its "
        f"{horizon} actions are enough",
        warning=False,
    )
