"""Predicted actions beside those that were taken, as a picture."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

PLOT_COLOUR, TRUE_COLOUR = "#1f6feb", "#24292f"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """True and predicted actions along (part of) an episode: S samples, T steps, H horizon, D dimensions.

    Attributes:
      predicted: (S, T, H, D) physical units.
      true: (T, D) the action taken at each step.
      mask: (T, D) False: not an action of this dataset.
      timestep: (T,) step within the episode.
    """

    predicted: np.ndarray
    true: np.ndarray
    mask: np.ndarray
    timestep: np.ndarray


def plot_prediction(
    prediction: Prediction,
    names: Sequence[str] | None = None,
    *,
    title: str = "",
    units: Sequence[str] | None = None,
    path: str | Path | None = None,
) -> np.ndarray:
    """One row per dimension: left the actions over time (true, and every sample), right predicted against true.

    Returns:
      The picture (h, w, 3) uint8, also written to `path` as a PNG when that is given.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samples, steps, horizon, width = prediction.predicted.shape
    names = dimension_names(names, width)
    units = [""] * width if units is None else list(units)
    # The object-oriented interface: no global state, no display, safe in a process that plots elsewhere.
    figure = Figure(figsize=(9, 0.5 + 1.45 * width), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(width, 2, squeeze=False, width_ratios=(4, 1))
    for row in axes[:-1]:
        row[0].sharex(axes[-1, 0])
        row[0].tick_params(labelbottom=False)
    consecutive = steps > 1 and (np.diff(prediction.timestep) == 1).all()
    x = prediction.timestep if consecutive else np.arange(steps)
    for d in range(width):
        over_time, scatter = axes[d]
        valid = prediction.mask[:, d]
        for s in range(samples):
            if consecutive and horizon > 1:
                # All chunks as one line with gaps: thousands of line objects would take seconds to draw.
                gap = np.full((steps, 1), np.nan)
                chunks = np.concatenate([prediction.predicted[s, :, :, d], gap], axis=1)
                when = np.concatenate([x[:, None] + np.arange(horizon), gap], axis=1)
                over_time.plot(when.ravel(), chunks.ravel(), color=PLOT_COLOUR, lw=0.6, alpha=0.25)
            first = prediction.predicted[s, :, 0, d]
            label = f"predicted, {samples} samples" if s == 0 else None
            over_time.plot(x, first, ".", color=PLOT_COLOUR, ms=4, alpha=0.8, label=label)
            scatter.plot(prediction.true[valid, d], first[valid], ".", color=PLOT_COLOUR, ms=3, alpha=0.5)
        style = "-" if consecutive else "_"
        over_time.plot(x[valid], prediction.true[valid, d], style, color=TRUE_COLOUR, lw=1.6, label="true")
        unit = f"\n[{units[d]}]" if units[d] else ""
        over_time.set_ylabel(f"{names[d]}{unit}", fontsize=8)
        limits = _limits(prediction.true[valid, d], prediction.predicted[:, valid, 0, d])
        scatter.plot(limits, limits, color="#8c959f", lw=0.8)
        scatter.set(xlim=limits, ylim=limits)
        scatter.locator_params(axis="x", nbins=3)  # it is narrow, and its labels are not to overlap
        for axis in (over_time, scatter):
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=7, loc="best")
    axes[-1, 0].set_xlabel("step of the episode" if consecutive else "sample", fontsize=8)
    axes[-1, 1].set_xlabel("predicted over true", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(buffer.getvalue())
    return np.asarray(Image.open(buffer).convert("RGB"))


def dimension_names(names: Sequence[str] | None, width: int) -> tuple[str, ...]:
    names = tuple(f"dim{i}" for i in range(width)) if names is None else tuple(names)
    if len(names) != width:
        raise ValueError(f"{len(names)} names for {width} action dimensions: {', '.join(names)}")
    return names


def _limits(*arrays: np.ndarray) -> tuple[float, float]:
    values = np.concatenate([np.ravel(array) for array in arrays])
    low, high = (float(values.min()), float(values.max())) if len(values) else (-1.0, 1.0)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin
