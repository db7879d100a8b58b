"""What `probe` measured, as text, JSON and pictures."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from octo_like.common import pages
from octo_like.common.pages import Finding
from octo_like.training.probe import MEAN, Probed, Readable

KNOWN, UNKNOWN = 0.8, 0.5  # test R^2 above which a readout knows where a thing is, and below which it does not
ENOUGH = 10  # episodes, for a finding


def _number(value: float, form: str = ".2f") -> str:
    return format(value, form) if np.isfinite(value) else "-"


def _table(title: str, rows: list[list[str]]) -> str:
    return f"{title}\n{pages.text_table(rows)}"


def probe_rows(probed: Probed) -> list[list[str]]:
    """Header, and for each scope and point R^2 by group with half its interval."""
    groups = list(dict.fromkeys(one.group for one in probed.readable))
    table: dict[tuple[str, str], dict[str, Readable]] = {}
    for one in probed.readable:
        table.setdefault((one.scope, one.point), {})[one.group] = one
    rows = [["frames", "point", "episodes", *groups]]
    for (scope, point), by_group in table.items():
        cells = []
        for group in groups:
            probe = by_group[group].probe
            cells.append(f"{_number(probe.r2)} ±{_number((probe.high - probe.low) / 2)}")
        rows.append([scope, point, str(next(iter(by_group.values())).probe.episodes), *cells])
    return rows


def error_rows(probed: Probed, dataset: str) -> list[list[str]]:
    """Header, and for each action dimension its mean error over the chunk: in its unit, normalised, and by phase."""
    parts = [one for one in probed.errors if one.dataset == dataset]
    rows = [["dimension", "unit", "error", *(f"{p.phase} ({p.frames})" for p in parts), "mean action"]]
    for d, (name, unit) in enumerate(probed.names[dataset]):
        values = [_mean(part.normalised[:, d]) for part in parts]
        cells = [_number(value, ".3f") for value in [*values, _mean(parts[0].mean_normalised[:, d])]]
        rows.append([name, unit or "-", _number(_mean(parts[0].physical[:, d]), ".4g"), *cells])
    totals = [_number(_mean(part.normalised), ".3f") for part in parts]
    return [*rows, ["all", "-", "-", *totals, _number(_mean(parts[0].mean_normalised), ".3f")]]


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def attention_rows(probed: Probed) -> list[list[str]]:
    """Header, and for each dataset and layer the share of every token group."""
    attention = probed.attention
    assert attention is not None  # who calls has looked
    rows = [["dataset", "layer", *attention.groups]]
    for dataset, share in attention.share.items():
        rows += [[dataset, str(i), *(_number(value) for value in layer)] for i, layer in enumerate(share)]
    return rows


def gradient_rows(probed: Probed) -> list[list[str]]:
    """Header, the loss, and for each part of the model its gradient norm by dataset."""
    datasets = list(probed.gradients)
    parts = list(dict.fromkeys(part for norms in probed.gradients.values() for part in norms))
    return [
        ["part", *datasets],
        *([part, *(_number(probed.gradients[name].get(part, math.nan), ".3g") for name in datasets)] for part in parts),
    ]


def findings(probed: Probed) -> list[Finding]:
    """Things that a readout does not know although it knows others in the same frames."""
    found = []
    scopes = dict.fromkeys((one.scope, one.group) for one in probed.readable if one.group.startswith("readout_"))
    for scope, group in scopes:
        here = {
            one.point: one.probe.r2
            for one in probed.readable
            if (one.scope, one.group) == (scope, group) and one.probe.episodes >= ENOUGH
        }
        known = [f"{point} ({r2:.2f})" for point, r2 in here.items() if r2 > KNOWN]
        for point, r2 in here.items():
            if known and r2 < UNKNOWN:
                found.append(
                    Finding("unknown_point", f"{scope}: {group} does not tell where {point} is (R^2 {r2:.2f}), but "
                                             f"{', '.join(known)}")
                )  # fmt: skip
    return found


def summary(probed: Probed) -> str:
    """Everything as text."""
    frames = probed.frames
    episodes = len(np.unique(frames.episode))
    parts = [f"{frames.where}: {len(frames)} frames of {episodes} episodes; tasks are given as {probed.task}"]
    if probed.readable:
        what = (
            f'where things are, read off the tokens by a linear map: R^2 on held-out episodes ("{MEAN}": of their mean)'
        )
        parts.append(_table(what, probe_rows(probed)))
    for dataset in dict.fromkeys(one.dataset for one in probed.errors):
        what = f"{dataset}: mean absolute error of sampled actions, in units, and normalised in (so many) frames"
        parts.append(_table(what, error_rows(probed, dataset)))
    if probed.attention is not None:
        parts.append(_table(f"what {probed.attention.readout} attends to, mean over heads", attention_rows(probed)))
    if probed.gradients:
        parts.append(_table("norm of the loss's gradient by part of the model", gradient_rows(probed)))
    found = findings(probed)
    return "\n\n".join([*parts, *(["\n".join(map(str, found))] if found else [])])


def to_json(probed: Probed) -> dict[str, Any]:
    """All numbers as lists; null where there is none."""
    attention = probed.attention
    return _plain(
        {
            "frames": {
                "from": probed.frames.where,
                "frames": len(probed.frames),
                "episodes": len(np.unique(probed.frames.episode)),
                "task": probed.task,
            },
            "probes": [
                {"scope": one.scope, "point": one.point, "group": one.group, **vars(one.probe)}
                for one in probed.readable
            ],
            "action_errors": [vars(one) for one in probed.errors],
            "action_names": probed.names,
            "attention": None
            if attention is None
            else {"readout": attention.readout, "groups": attention.groups, "share": attention.share},
            "gradients": probed.gradients,
            "findings": [{"code": one.code, "message": one.message} for one in findings(probed)],
        }
    )


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple | np.ndarray):
        return [_plain(value) for value in node]
    if isinstance(node, float | np.floating):
        return float(node) if np.isfinite(node) else None
    return node.item() if isinstance(node, np.generic) else node


def write(probed: Probed, folder: Path) -> list[Path]:
    """probe.json, probe.txt and the pictures; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probe.json").write_text(json.dumps(to_json(probed), indent=1, allow_nan=False), encoding="utf-8")
    (folder / "probe.txt").write_text(summary(probed) + "\n", encoding="utf-8")
    written = [folder / "probe.json", folder / "probe.txt"]
    figures = {}
    if probed.readable:
        figures["r2"] = _draw_probes(probed)
    if probed.errors:
        figures["errors"] = _draw_errors(probed)
    if probed.attention is not None:
        figures["attention"] = _draw_shares(probed)
        figures |= {f"attention_{camera}": _draw_maps(probed, camera) for camera in probed.attention.maps}
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=110)
    return written


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # not needed by who only wants numbers

    return Figure(figsize=(width, height), layout="constrained")


def _draw_probes(probed: Probed):
    """A panel per point; bars by group with their intervals."""
    points = list(dict.fromkeys(one.point for one in probed.readable))
    groups = list(dict.fromkeys(one.group for one in probed.readable))
    scopes = {p: list(dict.fromkeys(one.scope for one in probed.readable if one.point == p)) for p in points}
    most = max(map(len, scopes.values()))
    figure = _figure(2.5 + 0.9 * most, 2.6 * len(points))
    for axis, point in zip(figure.subplots(len(points), 1, squeeze=False)[:, 0], points, strict=True):
        width = 0.8 / len(groups)
        for i, group in enumerate(groups):
            probes = [one.probe for one in probed.readable if (one.point, one.group) == (point, group)]
            r2 = np.array([probe.r2 for probe in probes])
            reach = np.abs(np.array([[probe.low, probe.high] for probe in probes]).T - r2)
            axis.bar(
                np.arange(len(r2)) + (i + 0.5) * width - 0.4, r2, width, yerr=reach, label=group, error_kw={"lw": 0.7}
            )
        axis.set_xticks(range(len(scopes[point])), [s.replace(" ", "\n") for s in scopes[point]], fontsize=6)
        axis.set_ylim(-0.2, 1.05)
        axis.axhline(0, color="black", lw=0.5)
        axis.set_ylabel("test R²")
        axis.set_title(point, fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7)
    return figure


def _draw_errors(probed: Probed):
    """A panel per dataset: normalised error by dimension and phase, and that of the mean action as a line."""
    datasets = list(dict.fromkeys(one.dataset for one in probed.errors))
    figure = _figure(8, 2.6 * len(datasets))
    for axis, dataset in zip(figure.subplots(len(datasets), 1, squeeze=False)[:, 0], datasets, strict=True):
        parts = [one for one in probed.errors if one.dataset == dataset]
        names, width = [name for name, _ in probed.names[dataset]], 0.8 / len(parts)
        for i, part in enumerate(parts):
            left = np.arange(len(names)) + (i + 0.5) * width - 0.4
            axis.bar(left, [_mean(column) for column in part.normalised.T], width, label=part.phase)
            constant = [_mean(column) for column in part.mean_normalised.T]
            axis.hlines(constant, left - width / 2, left + width / 2, color="black", lw=1)
        slanted = dict(rotation=30, ha="right") if len(" ".join(names)) > 70 else {}
        axis.set_xticks(range(len(names)), names, fontsize=7, **slanted)
        axis.set_ylabel("normalised error")
        axis.set_title(f"{dataset} (line: always the mean action)", fontsize=9)
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _draw_shares(probed: Probed):
    """A panel per dataset: layers by token groups."""
    assert probed.attention is not None  # who calls has looked
    shares, groups = probed.attention.share, probed.attention.groups
    layers = len(next(iter(shares.values())))
    figure = _figure(1.5 + (0.6 * len(groups) + 0.8) * len(shares), 2.4 + 0.3 * layers)
    for axis, (dataset, share) in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares.items(), strict=True):
        shown = axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(groups)), groups, rotation=90, fontsize=7)
        axis.set_yticks(range(layers))
        axis.set_title(dataset, fontsize=8)
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(shown, ax=figure.axes, shrink=0.8)
    return figure


def _draw_maps(probed: Probed, camera: str):
    """A row per frame: the image, the mean over layers, and the last layer; crosses where things are (primary only)."""
    frames, attention = probed.frames, probed.attention
    assert attention is not None  # who calls has looked
    figure = _figure(7.5, 2.7 * len(attention.rows))
    axes = figure.subplots(len(attention.rows), 3, squeeze=False)
    for row, index, layers in zip(axes, attention.rows, attention.maps[camera], strict=True):
        image = frames.observation.get(f"image_{camera}")
        image = np.zeros((*layers.shape[1:], 3), np.uint8) if image is None else image[index]
        extent = (0, image.shape[1], image.shape[0], 0)
        titles = (f"{frames.dataset[index]}, row {index}", "mean over layers", "last layer")
        for axis, values, title in zip(row, (None, layers.mean(0), layers[-1]), titles, strict=True):
            axis.imshow(image, extent=extent, alpha=1.0 if values is None else 0.45)
            if values is not None:
                shown = axis.imshow(values, extent=extent, alpha=0.65, vmin=0, cmap="viridis")
                figure.colorbar(shown, ax=axis, shrink=0.7).ax.tick_params(labelsize=6)
            axis.set_title(title, fontsize=7)
            axis.set_axis_off()
        for i, (point, xy) in enumerate(frames.points.items() if camera == "primary" else ()):
            if np.isfinite(xy[index]).all():
                across, down = xy[index] * (image.shape[1], image.shape[0])
                row[0].plot(across, down, "+", color=f"C{i}", label=point, markersize=9, markeredgewidth=2)
        if row[0].get_legend_handles_labels()[0]:
            row[0].legend(fontsize=5, loc="lower left")
    return figure
