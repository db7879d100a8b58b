"""Datasets as text and pictures, for people: what is in them, and what a model gets to see."""

import concurrent.futures
import threading
from collections.abc import Mapping

import numpy as np

from octo_like.common import normalization
from octo_like.data import frames
from octo_like.data.episodes import load_episode
from octo_like.data.index import Index, PreparedDataset

COLUMNS = ("min", "p01", "mean", "std", "p99", "max")


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def mixture_table(datasets: Mapping[str, PreparedDataset]) -> str:
    """One line per dataset: weight, episodes, steps, cameras, instructions."""
    total = sum(d.spec.weight for d in datasets.values()) or 1.0
    rows = [
        ["dataset", "version", "weight", "train", "val", "steps", "length", "action", "proprio", "cameras", "texts"]
    ]
    for name, d in datasets.items():
        episodes, steps = len(d.train), int(d.train.frames.sum())
        cameras = [slot for slot, key in d.spec.image_keys.items() if key is not None]
        rows.append(
            [
                name,
                d.version,
                f"{d.spec.weight / total:.3f}",
                f"{episodes:,}",
                f"{len(d.val):,}",
                f"{steps:,}",
                f"{steps / episodes:.1f}",
                str(d.function.action_dim),
                str(d.function.proprio_dim or "-"),
                ",".join(cameras) or "-",
                f"{len([text for text in d.instructions if text]):,}",
            ]
        )
    return _table(rows)


def range_table(prepared: PreparedDataset) -> str:
    """Statistics of every action and proprioception dimension, in physical units, over the training episodes."""
    rows = [["dimension", *COLUMNS, "normalised"]]
    for key in ("action", "proprio"):
        stats = prepared.statistics.get(key)
        if stats is None:
            continue
        for d in range(len(stats["mean"])):
            how = prepared.spec.normalization if stats["mask"][d] else "no"
            how = "constant" if stats["mask"][d] and stats["min"][d] == stats["max"][d] else how
            rows.append([f"{key}[{d}]", *(f"{stats[c][d]:.4g}" for c in COLUMNS), how])
    return _table(rows)


def instruction_table(prepared: PreparedDataset, limit: int = 10) -> str:
    """The most frequent instructions and the number of episodes that have them."""
    ranked = sorted(prepared.instructions.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{count:7,}  {text or '(none)'}" for text, count in ranked[:limit]]
    return "\n".join(lines + ([f"         and {len(ranked) - limit:,} more"] if len(ranked) > limit else []))


class _Texts:
    """Keeps the words where training keeps their ids."""

    def __init__(self):
        self.texts: list[str] = []

    def rows(self, texts: list[str]) -> np.ndarray:
        rows = [self.texts.index(t) if t in self.texts else self.texts.append(t) or len(self.texts) - 1 for t in texts]
        return np.array(rows, np.int32)


def contact_sheet(
    prepared: PreparedDataset, index: Index, path: str, *, episodes: int = 4, columns: int = 6, size: int = 96
) -> None:
    """Writes a PNG: for some episodes, frames of every camera with the instruction, and the actions over time.

    Args:
      index: `prepared.train` or `prepared.val`.
      path: file to write.
      episodes: how many, spread over the index.
      columns: frames per episode and camera.
      size: height and width of a frame in the picture.

    The actions are drawn in physical units (solid) and, right of them, as the model sees them.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    slots = [slot for slot, key in prepared.spec.image_keys.items() if key is not None]
    chosen = np.unique(np.linspace(0, len(index) - 1, min(episodes, len(index))).astype(int))
    texts, lock = _Texts(), threading.Lock()
    height = max(1, len(slots))
    figure, axes = plt.subplots(
        len(chosen),
        3,
        figsize=(17, 1.4 + len(chosen) * max(2.2, 1.7 * height)),
        width_ratios=[3.2, 1.2, 1.2],
        squeeze=False,
    )
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(lambda e: load_episode(prepared, index, int(e), slots, texts, lock), chosen))
    for row, (number, episode) in enumerate(zip(chosen, loaded, strict=True)):
        steps = np.unique(np.linspace(0, len(episode.action) - 1, columns).astype(int))
        strip = np.full((height * (size + 2), columns * (size + 2), 3), 255, np.uint8)
        for r, slot in enumerate(slots):
            stored = episode.images[slot]
            if isinstance(stored, np.ndarray):
                images = frames.resize_frames(stored[steps], (size, size))
            else:
                present = [bool(stored[s]) for s in steps]
                images = np.zeros((len(steps), size, size, 3), np.uint8)
                images[present] = frames.decode_frames([stored[s] for s in steps[present]], (size, size))
            if slot in prepared.spec.bgr_slots:
                images = images[..., ::-1]
            for c, image in enumerate(images):
                y, x = r * (size + 2), c * (size + 2)
                strip[y : y + size, x : x + size] = image
        text = texts.texts[episode.text[0]] if texts.texts else ""
        pictures, physical, seen = axes[row]
        pictures.imshow(strip)
        pictures.set_title(
            f"{text or '(no instruction)'}   [episode {number}, {len(episode.action)} steps]", fontsize=9
        )
        pictures.set_ylabel(" / ".join(reversed(slots)), fontsize=8)
        pictures.set_xticks([(c + 0.5) * (size + 2) for c in range(len(steps))], [f"t={s}" for s in steps], fontsize=7)
        pictures.set_yticks([])
        raw = normalization.unnormalize(episode.action, prepared.statistics["action"], prepared.spec.normalization)
        for axis, values, title in (
            (physical, raw, "action, physical units"),
            (seen, episode.action, "action, normalised"),
        ):
            for d in range(values.shape[1]):
                axis.plot(values[:, d], lw=1, label=str(d))
            axis.tick_params(labelsize=7)
            axis.set_title(title, fontsize=8)
        physical.legend(fontsize=6, ncols=4, loc="upper right", framealpha=0.4)
    figure.suptitle(f"{prepared.key}  {prepared.version}", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=90)
    plt.close(figure)
