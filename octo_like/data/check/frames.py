"""What usually goes wrong with the frames, times and words of demonstrations."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from octo_like.common.pages import Finding
from octo_like.data.check.numbers import spread
from octo_like.data.check.pictures import cameras, pictures, present, read_episode
from octo_like.data.prepared import PreparedDataset
from octo_like.data.rlds import records
from octo_like.data.rlds.index import Index
from octo_like.data.rlds.records import RldsSplit
from octo_like.data.tf import tf

EPISODES = 64  # whose frames are looked at, spread over the data
DROPPED, REPEATED = 0.01, 0.05  # shares of the steps
MOVING = 0.05  # of a dimension's standard deviation: a change of proprioception in which the picture should change
LOOKED_AT = (64, 64)  # size of the frames
THUMBNAIL = 8 * 8 * 3
SAME_PICTURE = 4.0  # mean difference in grey levels of frames that were encoded again
DARK = 3.0  # mean grey level of a black image


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen in the frames of one camera.

    Attributes:
      missing: (E,) share of an episode's frames that are empty.
      black: (E,) whether an episode's frames are black.
      repeated: equal to the frame before although the robot moves; `moving`: steps in which it moves.
      warm, cold: shares of pixels that are coloured like wood, skin and cardboard, and like these with red and blue
        exchanged.
      reddish: (E,) share of red pixels minus share of blue ones.
      texts: (E,) instructions.
      thumbnails: (E, 192) mean picture of an episode, 8 x 8 RGB in 0..255; NaN where there is none.
    """

    missing: np.ndarray
    black: np.ndarray
    repeated: int
    moving: int
    warm: float
    cold: float
    reddish: np.ndarray
    texts: Sequence[str]
    thumbnails: np.ndarray


def look(prepared: PreparedDataset, index: Index, slot: str, *, episodes: int = EPISODES) -> Look:
    """Reads some episodes and looks at the frames of one camera: all of them as bytes, three of each as pixels."""
    missing, black, reddish, colours, texts, thumbnails = [], [], [], [], [], []
    repeated = moving = 0
    for number in spread(len(index), episodes):
        episode, words = read_episode(prepared, index, number, [slot])
        stored = episode.images[slot]
        known = present(stored)
        missing.append(1 - known.mean())
        texts.append(words[0])
        # Normalised proprioception has deviation 1; without it, an action that is not the mean moves something.
        numbers = episode.proprio if episode.proprio is not None else episode.action.reshape(len(known), -1)
        moves = np.abs(np.diff(numbers, axis=0)).max(1) > MOVING
        same = np.array([_equal(a, b) for a, b in zip(stored[:-1], stored[1:], strict=True)], bool)
        steps = [s for s in np.unique([0, len(known) // 2, len(known) - 1]) if known[s]]
        if not steps:
            black.append(False)
            reddish.append(0.0)
            thumbnails.append(np.full(THUMBNAIL, np.nan))
            continue
        pixels = pictures(prepared, slot, stored, steps, LOOKED_AT)
        black.append(bool(pixels.mean() < DARK))
        if not black[-1]:
            repeated += int((same & moves & known[1:]).sum())
            moving += int((moves & known[1:]).sum())
        thumbnails.append(np.full(THUMBNAIL, np.nan) if black[-1] else _thumbnail(pixels))
        reddish.append(_reddish(pixels))
        colours.append(warm_and_cold(pixels))
    warm, cold = np.mean(colours, axis=0) if colours else (0.0, 0.0)
    return Look(
        np.array(missing),
        np.array(black),
        repeated,
        moving,
        float(warm),
        float(cold),
        np.array(reddish),
        texts,
        np.array(thumbnails),
    )


def _equal(a, b) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bytes(a) == bytes(b)


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    """(192,) mean over frames (N, 64, 64, 3), in blocks of 8 x 8 pixels."""
    return pixels.mean(0).reshape(8, 8, 8, 8, 3).mean((1, 3)).reshape(-1)


def same_pictures(prepared: PreparedDataset, one: tuple[Index, int], other: tuple[Index, int]) -> bool:
    """Whether two (index, number) episodes of equal length show the same in all cameras: first, middle, last frame."""
    slots = cameras(prepared)
    first, second = (read_episode(prepared, *place, slots)[0] for place in (one, other))
    for slot in slots:
        a, b = first.images[slot], second.images[slot]
        steps = [s for s in np.unique([0, len(a) // 2, len(a) - 1]) if s < len(b)]
        both = [s for s in steps if len(a[s]) and len(b[s])]
        if any(bool(len(a[s])) != bool(len(b[s])) for s in steps):
            return False
        if both:
            one_look, other_look = (pictures(prepared, slot, x, both, LOOKED_AT).astype(float) for x in (a, b))
            if np.abs(one_look - other_look).mean() > SAME_PICTURE:
                return False
    return True


def _reddish(pixels: np.ndarray) -> float:
    r, g, b = np.moveaxis(pixels.astype(int), -1, 0)
    return float((r - np.maximum(g, b) > 50).mean() - (b - np.maximum(r, g) > 50).mean())


def warm_and_cold(pixels: np.ndarray) -> tuple[float, float]:
    """Shares of pixels with hues of 10 to 50 degrees (wood, skin, cardboard), and of these with channels exchanged.

    Exchanging red and blue maps a hue h to 240 - h.
    """

    def share(image: np.ndarray) -> float:
        r, g, b = np.moveaxis(image.astype(np.float32), -1, 0)
        high, low = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
        chroma = high - low
        hue = 60 * (g - b) / np.maximum(chroma, 1)
        return float(((r == high) & (hue > 10) & (hue < 50) & (chroma > 0.2 * high) & (high > 60)).mean())

    return share(pixels), share(pixels[..., ::-1])


def check_camera(slot: str, seen: Look) -> list[Finding]:
    """Findings about one camera."""
    return list(_camera_findings(f"camera {slot!r}", slot, seen))


def _camera_findings(camera: str, slot: str, seen: Look) -> Iterator[Finding]:
    missing, episodes = seen.missing == 1, len(seen.missing)
    if missing.any():
        yield Finding(
            "camera_missing",
            f"{camera} is missing in {missing.sum()} of {episodes} episodes that were looked at: they are trained with "
            "that camera masked",
        )
    partly = (seen.missing > 0) & ~missing
    if partly.any():
        yield Finding("camera_missing", f"{camera} misses frames in {partly.sum()} of {episodes} episodes")
    if seen.black.any():
        yield Finding("camera_black", f"{camera} is black in {seen.black.sum()} of {episodes} episodes")
    if seen.moving and seen.repeated > REPEATED * seen.moving:
        yield Finding(
            "repeated_frames",
            f"{camera} shows the same frame again in {seen.repeated / seen.moving:.0%} of the steps in which the robot "
            "moves: it is slower than the recording, or frames were dropped",
        )
    words = _colour_words(seen)
    if (words is None or words < 2) and seen.cold > 0.05 and seen.cold > 2 * seen.warm or (words or 0) < -4:
        yield Finding(
            "bgr",
            f"{camera} looks as if red and blue were exchanged: {seen.cold:.0%} of the pixels have the colours of wood "
            f"or skin after exchanging them, {seen.warm:.0%} before"
            f"{'' if words is None else ', and what is called red or blue is not'}. Look at the pictures; "
            f"bgr_slots=({slot!r},) turns them",
        )


def _colour_words(seen: Look) -> float | None:
    """Welch's t of red minus blue pixels: of episodes that speak of red against those of blue. None: too few."""
    red = seen.reddish[[("red" in t.split()) and ("blue" not in t.split()) for t in seen.texts]]
    blue = seen.reddish[[("blue" in t.split()) and ("red" not in t.split()) for t in seen.texts]]
    if min(len(red), len(blue)) < 4:
        return None
    spread = np.sqrt(red.var(ddof=1) / len(red) + blue.var(ddof=1) / len(blue))
    return float((red.mean() - blue.mean()) / max(spread, 1e-9))


# ---------------------------------------------------------------- times and words


def timestamps(split: RldsSplit, index: Index, *, episodes: int = EPISODES) -> list[np.ndarray] | None:
    """The `timestamp` (T,) of some episodes, seconds; None when steps have none."""
    features = split.features["steps"].feature if hasattr(split.features["steps"], "feature") else None
    if features is None or "timestamp" not in features:
        return None
    found = []
    for number in spread(len(index), episodes):
        record = records.read_record(
            tf.constant(index.files[index.file[number]]), tf.constant(int(index.offset[number]), tf.int64)
        )
        times = records.parse_episode(record, split.features)["timestamp"].numpy()
        found.append(np.asarray(times, np.float64).reshape(-1))
    return found


def check_times(times: Sequence[np.ndarray], hz: float | None) -> list[Finding]:
    """Gaps between steps, and a rate that is not the declared one."""
    steps = np.concatenate([np.diff(t) for t in times]) if times else np.zeros(0)
    if not len(steps):
        return []
    usual = float(np.median(steps))
    if usual <= 0:
        return [Finding("timestamps", "timestamps do not increase")]
    found, dropped = [], (steps > 1.5 * usual) | (steps <= 0)
    if dropped.mean() > DROPPED:
        text = (
            f"{dropped.mean():.1%} of the steps come after a gap (up to {steps.max():.2f} s, usually {usual:.3f} s): "
            "frames were dropped; actions there are larger than they seem"
        )
        found.append(Finding("dropped_frames", text))
    if hz is not None and not 0.8 < usual * hz < 1.25:
        text = f"steps are {usual:.4g} s apart, {1 / usual:.3g} Hz, but {hz:g} Hz are declared"
        found.append(Finding("control_rate", text))
    return found


def check_words(instructions: Mapping[str, int], labelled: np.ndarray, wanted: bool) -> list[Finding]:
    """Language coverage.

    Args:
      instructions: text -> number of episodes. labelled: (E,) bool. wanted: whether the run uses instructions.
    """
    if not wanted:
        return []
    if not any(text.strip() for text in instructions):
        text = (
            "no episode has an instruction: set language_key=None and use goal images, or write instructions "
            "(convert_demos.py --instruction)"
        )
        return [Finding("no_language", text)]
    if not labelled.all():
        text = f"{(~labelled).sum()} of {len(labelled)} episodes have no instruction; skip_unlabeled leaves them out"
        return [Finding("language_gaps", text)]
    return []
