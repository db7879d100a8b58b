"""What was exchanged, inverted or is there twice: dimensions, cameras, episodes. NumPy only.

Correlations of one action dimension with one of proprioception (`check_numbers`) cannot tell a swapped joint: joints of
one motion go together. Here every dimension is explained by all of proprioception at once (least squares), and what
carries the explanation is compared with what should.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from octo_like.common.pages import Finding
from octo_like.data.check.numbers import MAX_EPISODES, Numbers, spread

LAGS = range(-2, 9)  # steps from a command to its motion, of changes and velocities
EXPLAINED = 0.5  # share of an action's variance that proprioception has to explain before anything is note of it
CARRIES, OTHER = 0.6, 0.3  # standardised weights: of what an action moves, and of what it does not
RIDGE = 1e-3  # times the number of steps: shares the weight of two proprioceptions that are the same
MIN_STEPS = 50
MIN_EPISODES = 8  # from which it is seen which camera is which
UNCLEAR = 0.05  # share of the episodes that may be like none of the others
# Standard deviation over mean: at most SPREAD, and less than one in a thousand samples of |normal| numbers has
# (simulated for 8 to 48 episodes: 0.755 - 1.55 / sqrt(E) within 0.02).
SPREAD, HALF_NORMAL, QUANTILE = 0.38, 0.755, 1.55


# ---------------------------------------------------------------- dimensions


@dataclasses.dataclass(frozen=True)
class Weights:
    """How action dimensions are explained by proprioception.

    Attributes:
      pairs: (action, proprioception) dimensions that should go together, one for each row and column below.
      weight: (n, n) standardised least-squares weights of every action on all these proprioceptions.
      explained: (n,) share of the variance of an action.
    """

    pairs: Sequence[tuple[int, int]]
    weight: np.ndarray
    explained: np.ndarray

    @property
    def carried(self) -> np.ndarray:
        """(n, n) bool: the proprioception of a column explains the action of a row, and does so alone."""
        return np.array([_carried(*row) for row in zip(self.weight, self.explained, strict=True)])


def weights(n: Numbers) -> Weights | None:
    """Weights of all dimensions that move a named proprioception; without a description, that of the same number."""
    if n.proprios is None:
        return None
    width = n.proprios[0].shape[1]
    pairs = []
    for d in range(n.actions[0].shape[1]):
        p = n.description.actions[d].proprio if n.description else d
        if not n.is_gripper(d) and p is not None and p < width:
            pairs.append((d, p))
    chosen = spread(len(n.actions), MAX_EPISODES)
    actions, proprios = ([np.asarray(part[i], np.float64) for i in chosen] for part in (n.actions, n.proprios))
    columns = [p for _, p in pairs]
    if not pairs or sum(map(len, actions)) < MIN_STEPS or len(set(columns)) < len(columns):
        return None
    found = [_explain(actions, proprios, d, columns, n.kind(d)) for d, _ in pairs]
    return Weights(pairs, np.array([weight for weight, _ in found]), np.array([share for _, share in found]))


def _explain(actions, proprios, d: int, columns: list[int], kind: str | None) -> tuple[np.ndarray, float]:
    """(weights (n,), explained share) of action `d` by where proprioception is next, or by how it changes at a lag."""
    candidates = []
    for lag in LAGS:
        ys, levels, changes = [], [], []
        for a, p in zip(actions, proprios, strict=True):
            steps = np.arange(max(0, -lag), len(a) - 1 - max(0, lag))
            if len(steps):
                ys.append(a[steps, d])
                levels.append(p[steps + lag + 1][:, columns])
                changes.append(levels[-1] - p[steps + lag][:, columns])
        if ys:
            kinds = [levels] * (kind in ("absolute", None)) + [changes] * (kind in ("delta", "velocity", None))
            candidates += [_regress(np.concatenate(xs), np.concatenate(ys)) for xs in kinds]
    # One that a single proprioception carries comes before one that explains more by several.
    nothing = (np.zeros(len(columns)), 0.0)
    return max(candidates, key=lambda found: (bool(_carried(*found).any()), found[1]), default=nothing)


def _carried(weight: np.ndarray, explained: float) -> np.ndarray:
    """(n,) bool: this proprioception explains the action, and does so alone."""
    size = np.abs(weight)
    others = np.where(np.eye(len(size), dtype=bool), 0, size[None]).max(1)
    return (size >= CARRIES) & (others <= OTHER) & (explained >= EXPLAINED)


def _regress(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Standardised ridge regression of y (N,) on x (N, n): weights (n,) and R². Constants weigh nothing."""
    if len(y) < MIN_STEPS or y.std() < 1e-9:
        return np.zeros(x.shape[1]), 0.0
    moves = x.std(0) > 1e-9
    z = np.where(moves, (x - x.mean(0)) / np.where(moves, x.std(0), 1), 0)
    target = (y - y.mean()) / y.std()
    weight = np.linalg.solve(z.T @ z + RIDGE * len(y) * np.eye(x.shape[1]), z.T @ target)
    return weight, float(1 - np.mean((target - z @ weight) ** 2))


def check_pairing(n: Numbers) -> list[Finding]:
    """Dimensions that move their proprioception the other way, and dimensions that move each other's."""
    found = weights(n)
    if found is None:
        return []
    carried, signs = found.carried, np.sign(found.weight)
    own = np.diagonal(carried)
    # Without a description, that dimensions of equal number belong together is a guess. Most of them have to.
    known = n.description is not None or own.mean() >= 0.5
    note = "" if n.description else " (taken for what it moves, as of the same number; a robot's description names it)"
    findings = []
    for i in np.flatnonzero(own & (np.diagonal(signs) < 0)).tolist():
        d, p = found.pairs[i]
        text = (
            f"{n.name(d)} and proprio[{p}]{note} go in opposite directions: one of them has the other sign. A policy "
            "would learn it, and a controller with the right sign would run away from its target; turn the one that is "
            "wrong"
        )
        findings.append(Finding("sign", text, warning=bool(known)))
    # Rows whose explanation is another row's proprioception; a swap or a longer cycle closes in on itself.
    moves = {int(i): int(carried[i].argmax()) for i in np.flatnonzero(carried.any(1) & ~own)}
    swapped = [i for i in moves if _closes(moves, i)]
    if swapped:
        known = known or bool(own.any()) and 2 * (own.sum() + len(swapped)) >= len(own)
        pairs = ", ".join(f"{n.name(found.pairs[i][0])} moves proprio[{found.pairs[moves[i]][1]}]" for i in swapped)
        should = ", ".join(f"proprio[{found.pairs[i][1]}]" for i in swapped)
        text = (
            f"{pairs}, where {should} belong to them{note}: the order of dimensions differs between actions and "
            "proprioception. Reorder one of them, or describe the robot as it is"
        )
        findings.append(Finding("swapped", text, warning=bool(known)))
    return findings


def _closes(moves: Mapping[int, int], start: int) -> bool:
    at = start
    for _ in moves:
        at = moves.get(at, -1)
        if at == start:
            return True
    return False


# ---------------------------------------------------------------- cameras


def check_cameras(pictures: Mapping[str, np.ndarray]) -> list[Finding]:
    """Pairs of cameras that change places in some episodes.

    Args:
      pictures: slot -> (E, F) small mean picture of each episode, the same episodes for all; NaN where there is none.
    """
    findings, slots = [], sorted(pictures)
    for i, one in enumerate(slots):
        for other in slots[i + 1 :]:
            exchanged = exchanged_episodes(pictures[one], pictures[other])
            if exchanged.any():
                text = (
                    f"cameras {one!r} and {other!r} change places in {exchanged.sum()} of {len(exchanged)} episodes "
                    "that were looked at: what the one shows there, the other shows in the rest. Look at the pictures; "
                    "sort the recordings by which camera was which"
                )
                findings.append(Finding("cameras_swapped", text))
    return findings


def exchanged_episodes(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(E,) bool: episodes in which two cameras (E, F) are exchanged, the smaller part; none unless it is clear.

    With D the difference of an episode's two pictures, exchanging an episode's cameras turns the sign of its D, and
    |a_i - b_j|² + |b_i - a_j|² - |a_i - a_j|² - |b_i - b_j|² = 2 D_i . D_j. So the labels under which pictures of a
    camera are most alike are the signs of the leading eigenvector of D D'.

    Such labels exist for any two cameras. They mean something when the signed differences agree about their length
    along what they have in common: where nothing tells the cameras apart, their projections are like normal numbers,
    which pile up at 0 (the standard deviation of |x| is 0.76 of its mean); two places of a camera are far from it.
    """
    exchanged = np.zeros(len(one), bool)
    known = np.isfinite(one).all(1) & np.isfinite(other).all(1)
    total = int(known.sum())
    if total < MIN_EPISODES:
        return exchanged
    a, b = (x[known] - x[known].mean(1, keepdims=True) for x in (one, other))  # light is not the place
    difference = a - b
    turned = np.linalg.eigh(difference @ difference.T)[1][:, -1] < 0
    if turned.sum() * 2 > total:
        turned = ~turned
    if not turned.any():
        return exchanged
    signed = np.where(turned[:, None], -difference, difference)
    # Along the mean of the other episodes: an episode is not its own witness.
    along = (signed @ signed.sum(0) - (signed**2).sum(1)) / (total - 1)
    if along.mean() <= 0 or (along <= 0).mean() > UNCLEAR:
        return exchanged
    if along.std() <= min(SPREAD, HALF_NORMAL - QUANTILE / np.sqrt(total)) * along.mean():
        exchanged[np.flatnonzero(known)[turned]] = True
    return exchanged


# ---------------------------------------------------------------- episodes


def digest(action: np.ndarray, proprio: np.ndarray) -> str:
    """Of an episode's numbers alone: what a recorder or converter writes beside them (a path, a date) is left out."""
    content = hashlib.sha256(repr((action.shape, proprio.shape)).encode())
    for values in (action, proprio):
        content.update(np.ascontiguousarray(values, np.float32).tobytes())
    return content.hexdigest()


def find_copies(
    digests: Sequence[str], same_pictures: Callable[[int, int], bool] = lambda first, second: True
) -> list[tuple[int, int]]:
    """(first, copy) numbers of episodes with the same numbers and, where there are any, the same pictures.

    A script that repeats a motion in front of other objects makes equal numbers, and no copies.
    """
    groups: dict[str, list[int]] = {}
    copies = []
    for number, key in enumerate(digests):
        originals = groups.setdefault(key, [])
        first = next((first for first in originals if same_pictures(first, number)), None)
        if first is None:
            originals.append(number)
        else:
            copies.append((first, number))
    return copies


def check_copies(copies: Sequence[tuple[int, int]], names: Sequence[str], held_out: Sequence[bool]) -> list[Finding]:
    """Episodes that are there more than once.

    Args:
      copies: from `find_copies`. names: of the episodes. held_out: whether an episode is one for validation.
    """
    if not copies:
        return []
    first, second = copies[0]
    across = sum(held_out[i] != held_out[j] for i, j in copies)
    note = f", {across} of them between training and held-out episodes: held-out errors are too small" if across else ""
    text = (
        f"{len(copies)} of {len(names)} episodes are copies of others{note}. The first: {names[second]} of "
        f"{names[first]}. Leave them out, or they count twice"
    )
    return [Finding("duplicates", text)]


def check_short(steps: np.ndarray) -> list[Finding]:
    """Episodes without motion: `steps` (E,) of all recorded episodes, as they are stored."""
    short = int((steps <= 1).sum())
    if not short:
        return []
    text = (
        f"{short} of {len(steps)} episodes have a single step: the recorder was started and stopped. Delete them, or "
        "record them again"
    )
    return [Finding("one_step", text)]
