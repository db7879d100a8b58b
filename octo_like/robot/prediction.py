"""Predicted actions beside those that were taken, as a picture."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from octo_like.common.dimensions import Dimensions, check_width

PLOT_COLOUR, TRUE_COLOUR = "#1f6feb", "#24292f"
CHUNKS = 60  # that a picture shows of an episode


@dataclasses.dataclass(frozen=True)
class Prediction:
    """True and predicted actions along (part of) an episode: S samples, T steps, H horizon, D dimensions.

    Attributes:
      predicted: (S, T, H, D) physical units.
      true: (T, D) the action taken at each step.
      mask: (T, D) False: not an action of this dataset.
      timestep: (T,) step within the episode; rising where the rows follow an episode.
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
    """One panel per dimension, with its name and unit.

    Of steps in the order of time: the action that was taken over the episode, and along it the chunks that every sample
    would have begun, at most `CHUNKS` of them, evenly spread. Of other steps: predicted over true.

    Args:
      names: of the dimensions; None: a0, a1, ...
      units: of them, "" where there is none.
      path: also written there, as a PNG.

    Returns:
      The picture (h, w, 3) uint8, 640 wide.

    Raises:
      ValueError: another number of names or units than of dimensions.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, width = prediction.true.shape
    named = dimensions_of(names, width, units)
    along = steps > 1 and bool((np.diff(prediction.timestep) > 0).all())
    columns = 1 if along else min(2, width)
    rows = -(-width // columns)
    # The object-oriented interface: no global state, no display, safe in a process that plots elsewhere. Small in
    # inches, so that its text is legible in a narrow window.
    figure = Figure(figsize=(6.4, 0.8 + (1.35 if along else 2.6) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=along).reshape(-1)
    for d, axis in enumerate(axes):
        if d >= width:
            axis.set_visible(False)
            continue
        (_draw_along if along else _draw_scattered)(axis, prediction, d)
        axis.set_title(named.labels[d], fontsize=9, loc="left", pad=3)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.margins(x=0.01)
        if along:
            axis.xaxis.get_major_locator().set_params(integer=True)
        # Labels of axes, since those of a figure would share their place with the legend.
        if d + columns >= width:
            axis.set_xlabel("step of the episode" if along else "true", fontsize=9)
        if not along and d % columns == 0:
            axis.set_ylabel("predicted", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10, wrap=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(buffer.getvalue())
    return np.asarray(Image.open(buffer).convert("RGB"))


def _draw_along(axis: Any, prediction: Prediction, d: int) -> None:
    """Dimension `d` over the steps of an episode."""
    samples, steps, horizon, _ = prediction.predicted.shape
    x, valid = prediction.timestep, prediction.mask[:, d]
    begun = np.unique(np.linspace(0, steps - 1, min(steps, CHUNKS)).astype(int)) if horizon > 1 else np.zeros(0, int)
    when = x[begun, None] + np.arange(horizon)
    gap = np.full((len(begun), 1), np.nan)
    for s in range(samples):
        # All chunks as one line with gaps: thousands of line objects would take seconds to draw.
        chunks = np.where(when <= x[-1], prediction.predicted[s, begun, :, d], np.nan)
        line = (np.concatenate([values, gap], axis=1).ravel() for values in (when, chunks))
        axis.plot(*line, color=PLOT_COLOUR, lw=0.8, alpha=0.45, label="predicted chunks" if s == 0 else None)
        label = f"their first actions, {samples} samples" if samples > 1 else "their first actions"
        axis.plot(
            x, prediction.predicted[s, :, 0, d], ".", color=PLOT_COLOUR, ms=3, alpha=0.7, label=None if s else label
        )
    axis.plot(x[valid], prediction.true[valid, d], color=TRUE_COLOUR, lw=1.5, label="true")


def _draw_scattered(axis: Any, prediction: Prediction, d: int) -> None:
    """Dimension `d` of single steps."""
    valid = prediction.mask[:, d]
    true = prediction.true[valid, d]
    for s, first in enumerate(prediction.predicted[:, valid, 0, d]):
        label = f"first actions, {len(prediction.predicted)} samples" if s == 0 else None
        axis.plot(true, first, ".", color=PLOT_COLOUR, ms=4, alpha=0.6, label=label)
    limits = _limits(true, prediction.predicted[:, valid, 0, d])
    axis.plot(limits, limits, color="#8c959f", lw=0.8, label="equal")
    axis.set(xlim=limits, ylim=limits)


def dimensions_of(names: Sequence[str] | None, width: int, units: Sequence[str] | None = None) -> Dimensions:
    """Names and units of `width` action dimensions; a0, a1, ... without names. Raises ValueError for another number."""
    if names is None:
        return Dimensions.unnamed(width)
    named = Dimensions(tuple(names), tuple(units or ()))
    check_width(named, width)
    return named


def _limits(*arrays: np.ndarray) -> tuple[float, float]:
    values = np.concatenate([np.ravel(array) for array in arrays])
    low, high = (float(values.min()), float(values.max())) if len(values) else (-1.0, 1.0)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin
