"""What usually goes wrong with the numbers of demonstrations, found in actions and proprioception. NumPy only.

Every check returns findings: a warning is something to look into before training, a note something to know.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from octo_like.common.pages import Finding
from octo_like.common.robot import UNITS, Action, Description

FEW_DEMOS = 10
SATURATED, IDLE = 0.25, 0.3  # shares of the steps
SHORT = 0.1  # share of the episodes
OUTLIER = 20.0  # standard deviations
SURE = 0.85  # correlation that tells an absolute action or a change from noise
SIMILAR = 0.6  # correlation with which a dimension has a say in the lag
MAX_LAG_S, MIN_LAG_STEPS = 0.3, 3  # how far the motion may follow the command
LAGS = np.arange(-6, 13)  # steps
MOVING = ("absolute", "delta", "velocity")  # kinds of actions that move something
MAX_EPISODES = 300  # looked at for correlations, spread over the data


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Actions and proprioception of a dataset's episodes as training reads them, in physical units.

    Attributes:
      actions: one (T, A) array per episode.
      proprios: one (T, P) array per episode, or None.
      normalised: (A,) bool: dimensions that are normalised.
      description: what the dimensions mean, or None: unknown.
      hz: steps per second, or None.
      horizon: actions in a chunk, or None.
      names: of the action dimensions where there is no description; empty: none.
    """

    actions: Sequence[np.ndarray]
    proprios: Sequence[np.ndarray] | None
    normalised: np.ndarray
    description: Description | None = None
    hz: float | None = None
    horizon: int | None = None
    names: Sequence[str] = ()

    def name(self, d: int) -> str:
        """ "action[2] dz"."""
        names = [action.name for action in self.description.actions] if self.description else self.names
        return f"action[{d}]" + (f" {names[d]}" if names and names[d] != f"a{d}" else "")

    def kind(self, d: int) -> str | None:
        return self.description.actions[d].kind if self.description else None

    def is_gripper(self, d: int) -> bool:
        return self.kind(d) == "gripper" or (self.description is None and not self.normalised[d])


@dataclasses.dataclass(frozen=True)
class Relation:
    """How one action dimension goes with one of proprioception.

    Attributes:
      action, proprio: the dimensions.
      level: correlation of a[t] with p[t+1]: near 1 for an absolute target.
      change: correlation of a[t] with p[t+k+1] - p[t+k], largest over k: near 1 for a change or a velocity.
      curve: (len(LAGS),) correlation by lag k: of a[t] with that difference when `change` is larger than `level`, else
        of a[t] - a[t-1] with it. It is largest where the motion follows the command.
      gain: proprioception per action: slope of what `level` or `change` correlates.
    """

    action: int
    proprio: int
    level: float
    change: float
    curve: np.ndarray
    gain: float

    @property
    def looks(self) -> str | None:
        """ "absolute", "delta" (or a velocity), or None when neither is clear."""
        if self.level >= SURE and self.level > self.change + 0.05:
            return "absolute"
        if self.change >= SURE and self.change > self.level + 0.05:
            return "delta"
        return None


def spread(count: int, limit: int) -> np.ndarray:
    """Up to `limit` numbers below `count`, rising and evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int))


def check(numbers: Numbers) -> tuple[list[Finding], list[Relation]]:
    """All findings about a dataset's numbers, and the relations between actions and proprioception behind them."""
    relations = _relations(numbers)
    found = [*_episodes(numbers, relations), *_ranges(numbers)]
    found += [*_meaning(numbers, relations), *_lag(numbers, relations), *_grippers(numbers)]
    return found, relations


# ---------------------------------------------------------------- episodes and ranges


def _episodes(n: Numbers, relations: Sequence[Relation]) -> Iterator[Finding]:
    lengths = np.array([len(a) for a in n.actions])
    if len(lengths) < FEW_DEMOS:
        text = f"{len(lengths)} training episodes: expect a policy that knows these only; record more"
        yield Finding("few_demos", text)
    if n.horizon is not None and (short := lengths < n.horizon).any():
        text = (
            f"{short.sum()} of {len(lengths)} episodes are shorter than the horizon of {n.horizon} actions (the "
            f"shortest has {lengths.min()}): their chunks are mostly masked. Shorten the horizon or leave them out"
        )
        yield Finding("short_demos", text, warning=bool(short.mean() > SHORT))
    idle = idle_steps(n, relations)
    if idle.mean() > IDLE:
        text = (
            f"nothing is commanded in {idle.mean():.0%} of the steps: a policy learns to wait. Cut the pauses, or set "
            "idle_threshold (docs/data.md)"
        )
        yield Finding("idle", text)


def idle_steps(n: Numbers, relations: Sequence[Relation]) -> np.ndarray:
    """(all steps,) bool: nothing is commanded: an absolute target or gripper stays, a change or velocity is 0.

    A hundredth of a dimension's range counts as nothing. A dimension that is not declared is what it looks like; when
    that is unclear, it has to stay and to be 0. The first step of an episode is never idle.
    """
    every = np.concatenate(n.actions)
    tiny = 0.01 * np.maximum(np.quantile(every, 0.99, axis=0) - np.quantile(every, 0.01, axis=0), 1e-12)
    change = np.concatenate([np.abs(np.diff(a, axis=0, prepend=np.full((1, a.shape[1]), np.inf))) for a in n.actions])
    looks = {r.action: r.looks for r in relations}
    idle = np.ones(len(every), bool)
    for d in range(every.shape[1]):
        kind = "gripper" if n.is_gripper(d) else n.kind(d) or looks.get(d)
        if kind != "delta" and kind != "velocity":
            idle &= change[:, d] <= tiny[d]
        if kind not in ("absolute", "gripper"):
            idle &= np.abs(every[:, d]) <= tiny[d]
    return idle


def _ranges(n: Numbers) -> Iterator[Finding]:
    every = np.concatenate(n.actions).astype(np.float64)
    low, high, std = every.min(0), every.max(0), every.std(0)
    for d in range(every.shape[1]):
        name, x = n.name(d), every[:, d]
        if low[d] == high[d]:
            yield Finding("constant", f"{name} is always {low[d]:g}: nothing is learned of it", warning=False)
            continue
        share, end = max(((x == low[d]).mean(), low[d]), ((x == high[d]).mean(), high[d]), key=lambda one: one[0])
        if not n.is_gripper(d) and len(np.unique(x)) > 3 and share > SATURATED:
            text = f"{name} is at its end {end:g} in {share:.0%} of the steps: it was clipped when it was recorded"
            yield Finding("saturated", text)
        far = np.abs(x - x.mean()).max() / std[d]
        if n.normalised[d] and far > OUTLIER:
            text = (
                f"{name} has a value {far:.0f} standard deviations from its mean (range {low[d]:g} to {high[d]:g}): a "
                "glitch; max_action leaves such episodes out"
            )
            yield Finding("outlier", text)
        if not n.normalised[d] and np.abs(x).max() > 3:
            text = (
                f"{name} is not normalised, but reaches {np.abs(x).max():g}: it would outweigh the others in the loss. "
                "Normalise it, or bring it to 0..1"
            )
            yield Finding("unnormalised", text)
        if n.description is not None:
            yield from _declared_range(n.description.actions[d], name, x)


def _declared_range(action: Action, name: str, x: np.ndarray) -> Iterator[Finding]:
    bound = UNITS[action.unit]
    if bound is not None and np.quantile(np.abs(x), 0.99) > bound[0]:
        text = f"{name} reaches {np.abs(x).max():g} {action.unit}: is it in {bound[1]}? Convert it, or declare its unit"
        yield Finding("units", text)
    if action.limits is not None:
        span = action.limits[1] - action.limits[0]
        beyond = (x < action.limits[0] - 1e-3 * span) | (x > action.limits[1] + 1e-3 * span)
        if beyond.any():
            text = (
                f"{name} leaves its limits {action.limits[0]:g} to {action.limits[1]:g} in {beyond.mean():.1%} of the "
                f"steps (it goes from {x.min():g} to {x.max():g})"
            )
            yield Finding("limits", text)


# ---------------------------------------------------------------- actions and proprioception


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 for constants and for too few pairs."""
    if len(x) < 20 or x.std() < 1e-9 or y.std() < 1e-9:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def relation(actions: Sequence[np.ndarray], proprios: Sequence[np.ndarray], d: int, p: int) -> Relation:
    """How action dimension `d` goes with proprioception dimension `p`."""
    a = [x[:, d].astype(np.float64) for x in actions]
    q = [x[:, p].astype(np.float64) for x in proprios]
    commanded, reached = (np.concatenate(parts) for parts in ([x[:-1] for x in a], [x[1:] for x in q]))
    level = _correlation(commanded, reached)
    by_value, by_change, slope = [], [], []
    for lag in map(int, LAGS):
        parts: tuple[list[np.ndarray], ...] = ([], [], [])
        for x, y in zip(a, q, strict=True):
            steps = np.arange(max(1, -lag), len(x) - 1 - max(0, lag))
            if len(steps):
                moved = y[steps + lag + 1] - y[steps + lag]
                for part, one in zip(parts, (x[steps], x[steps] - x[steps - 1], moved), strict=True):
                    part.append(one)
        values, differences, moves = (np.concatenate(part or [np.zeros(0)]) for part in parts)
        by_value.append(_correlation(values, moves))
        by_change.append(_correlation(differences, moves))
        slope.append(float(values @ moves / max(values @ values, 1e-12)))
    best = int(np.argmax(by_value))
    is_change = by_value[best] > level
    spread = commanded - commanded.mean()
    gain = slope[best] if is_change else float(spread @ reached / max(spread @ spread, 1e-12))
    return Relation(d, p, level, by_value[best], np.array(by_value if is_change else by_change), gain)


def _relations(n: Numbers) -> list[Relation]:
    """Of each dimension with the proprioception that it moves; without a description, with that of the same number."""
    if n.proprios is None:
        return []
    chosen = spread(len(n.actions), MAX_EPISODES)
    actions, proprios = ([part[i] for i in chosen] for part in (n.actions, n.proprios))
    dims, width = n.actions[0].shape[1], n.proprios[0].shape[1]
    found = []
    for d in range(dims):
        p = n.description.actions[d].proprio if n.description else (d if d < width else None)
        if p is not None and p < width:
            found.append(relation(actions, proprios, d, p))
    return found


def _meaning(n: Numbers, relations: Sequence[Relation]) -> Iterator[Finding]:
    if n.description is not None:
        linked = {r.action for r in relations}
        kinds = enumerate(action.kind for action in n.description.actions)
        names = [n.description.actions[d].name for d, kind in kinds if kind in MOVING and d not in linked]
        if names:
            text = (
                f"{', '.join(names)}: no proprioception is named that they move, so whether they are absolute or "
                "changes, and their lag, cannot be checked"
            )
            yield Finding("unchecked", text, warning=False)
    for r in relations:
        if n.is_gripper(r.action) or r.looks is None:
            continue
        kind, name = n.kind(r.action), n.name(r.action)
        if kind is None:
            meaning = "an absolute target of" if r.looks == "absolute" else "a change of"
            text = f"{name} looks like {meaning} proprio[{r.proprio}] (correlation {max(r.level, r.change):.2f})"
            yield Finding("looks", text, warning=False)
        elif kind in ("delta", "velocity") and r.looks == "absolute":
            text = (
                f"{name} is declared a {kind}, but looks absolute: it correlates {r.level:.2f} with "
                f"proprio[{r.proprio}] itself, {r.change:.2f} with its change. Declare it absolute, or make it a "
                "change with `standardize` (docs/demos.md)"
            )
            yield Finding("not_delta", text)
        elif kind == "absolute" and r.looks == "delta":
            text = (
                f"{name} is declared absolute, but looks like a change: it correlates {r.change:.2f} with the change "
                f"of proprio[{r.proprio}], {r.level:.2f} with itself. Declare it delta"
            )
            yield Finding("not_absolute", text)
        elif n.description and kind in MOVING and (unit := n.description.actions[r.action].unit) != "1":
            gain = r.gain * (n.description.control_hz if kind == "velocity" else 1.0)
            if not 0.2 < gain < 5:
                text = (
                    f"{name}: one {unit} of command moves proprio[{r.proprio}] by {gain:.3g}: their units differ "
                    "(degrees, millimetres, a speed?)"
                )
                yield Finding("scale", text)


def _lag(n: Numbers, relations: Sequence[Relation]) -> Iterator[Finding]:
    """Whether motions follow commands at once: the lag at which all clear dimensions together correlate most."""
    clear = [r for r in relations if not n.is_gripper(r.action) and r.curve.max() > SIMILAR]
    if not clear:
        return
    lag = int(LAGS[np.mean([r.curve for r in clear], axis=0).argmax()])
    dims = ", ".join(n.name(r.action) for r in clear)
    if lag < 0:
        text = (
            f"the motion comes {-lag} step(s) before the command ({dims}): actions describe the past, e.g. the state "
            "of their own step. A policy would learn to stand still; shift the actions"
        )
        yield Finding("lag", text)
    elif lag > max(MIN_LAG_STEPS, MAX_LAG_S * (n.hz or 0)):
        seconds = f" ({lag / n.hz:.2f} s)" if n.hz else ""
        text = (
            f"the motion follows the command by {lag} steps{seconds} ({dims}): observations are late or actions early; "
            "check the time stamps of recorder and cameras"
        )
        yield Finding("lag", text)


def _grippers(n: Numbers) -> Iterator[Finding]:
    for d in range(n.actions[0].shape[1]):
        if not n.is_gripper(d):
            continue
        action = n.description.actions[d] if n.description else Action("gripper", "gripper", open=1.0, closed=0.0)
        assert action.open is not None and action.closed is not None, "a gripper has both"
        name, every = n.name(d), np.concatenate([a[:, d] for a in n.actions])
        assert action.open is not None and action.closed is not None, "a gripper has both"
        low, high = sorted((action.open, action.closed))
        margin = 0.05 * (high - low)
        if n.description is not None and (every.min() < low - margin or every.max() > high + margin):
            text = f"{name} goes from {every.min():g} to {every.max():g}, declared are {low:g} to {high:g}"
            yield Finding("gripper_range", text)
        elif every.max() - every.min() < 0.5 * (high - low) and every.max() > every.min():
            text = f"{name} uses {every.min():g} to {every.max():g} of {low:g} to {high:g} only"
            yield Finding("gripper_range", text)
        openness = [(a[:, d] - action.closed) / (action.open - action.closed) for a in n.actions]
        if n.proprios is not None and action.proprio is not None:
            ahead = 3
            pairs = [(o[:-ahead], p[ahead:, action.proprio]) for o, p in zip(openness, n.proprios, strict=True)]
            together = _correlation(*(np.concatenate(part) for part in zip(*pairs, strict=True)))
            if together < -0.4:
                text = (
                    f"{name} and proprio[{action.proprio}], which it moves, go in opposite directions (correlation "
                    f"{together:.2f}): `open` and `closed` are swapped, or one is inverted"
                )
                yield Finding("gripper_sign", text)
                continue
        if len(openness) >= 5:
            closed_first = np.mean([o[0] < 0.3 for o in openness])
            opens_later = np.mean([o[0] < 0.3 and (o > 0.7).any() and o[-1] < 0.3 for o in openness])
            if closed_first > 0.8 and opens_later > 0.5:
                text = (
                    f"{name}: {closed_first:.0%} of the episodes begin closed, open and end closed, which is what "
                    f"grasping looks like when the sign is wrong; expected is {action.open:g} for open"
                )
                yield Finding("gripper_sign", text)
