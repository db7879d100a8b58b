"""What `policy_check` measured, as text and as one HTML page with pictures."""

import os

import numpy as np

from octo_like.common import pages
from octo_like.robot.check import PolicyCheck
from octo_like.robot.prediction import Prediction, plot_prediction

PLOT_STEPS = 200  # of an episode that a replay shows


def error_rows(check: PolicyCheck) -> list[list[str]]:
    """Header, and for each dimension its errors: over the chunk, at its ends, and of answers that need no policy."""
    errors = check.errors
    rows = [["dimension", "unit", "error", "first step", "last step", "mean action", "repeat last"]]
    for d, (name, unit) in enumerate(zip(check.names, check.units, strict=True)):
        values = [np.nanmean(errors.policy[:, d]), errors.policy[0, d], errors.policy[-1, d]]
        values += [np.nanmean(errors.mean[:, d]), np.nanmean(errors.repeat[:, d])]
        rows.append([name, unit or "-", *(f"{value:.4g}" for value in values)])
    return rows


def motion_rows(check: PolicyCheck) -> list[list[str]]:
    """Header, and for each dimension limits, share of commands outside, roughness, disagreement of chunks."""
    rows = [["dimension", "lowest", "highest", "outside", "roughness", "disagreement"]]
    for d, name in enumerate(check.names):
        row = [name, *(f"{value:.4g}" for value in check.limits[:, d]), f"{check.outside[d]:.1%}"]
        for value in (check.roughness[d], check.disagreement[d]):
            row.append(f"{value:.2f}" if np.isfinite(value) else "-")
        rows.append(row)
    return rows


def latency_text(check: PolicyCheck) -> str:
    """Percentiles against the control period."""
    latency = check.latency
    line = f"p50 {latency.at(50):.1f} ms, p99 {latency.at(99):.1f} ms, largest {latency.calls.max():.1f} ms"
    line += f" over {len(latency.calls)} calls; the first, with compilation, {latency.first / 1000:.1f} s"
    if check.hz:
        period = 1000 / check.hz
        line += f"\ncontrol period {period:.1f} ms at {check.hz:g} Hz; {check.exec_horizon} actions of each chunk last "
        line += f"{check.exec_horizon * period:.0f} ms"
    return line


def summary(check: PolicyCheck) -> str:
    """Everything as text."""
    steps = sum(len(one.true) for one in check.replays)
    horizon = check.errors.policy.shape[0]
    parts = [
        f"{check.dataset}: {len(check.replays)} held-out demonstrations, {steps} steps, chunks of {horizon} actions, "
        f"{check.exec_horizon} executed",
        "mean absolute error in physical units\n" + pages.text_table(error_rows(check)),
        "commands\n" + pages.text_table(motion_rows(check)),
        latency_text(check),
        pages.findings_text(check.findings),
    ]
    return "\n\n".join(parts)


def write_page(check: PolicyCheck, folder: str, *, episodes: int = 3) -> str:
    """Writes FOLDER/index.html, which holds everything, and its pictures as PNG. Returns the page's path."""
    os.makedirs(folder, exist_ok=True)
    replays = []
    for number, one in enumerate(check.replays[:episodes]):
        path = os.path.join(folder, f"replay_{number}.png")
        shown = slice(0, PLOT_STEPS)
        prediction = Prediction(
            predicted=one.predicted[None, shown],
            true=one.true[shown, 0],
            mask=np.ones_like(one.true[shown, 0], bool),
            timestep=np.arange(len(one.true[shown])),
        )
        plot_prediction(prediction, check.names, units=check.units, path=path)
        replays.append(f"<p>{one.demo.instruction or '(no instruction)'}" + pages.html_picture(path))
    errors, latency = (os.path.join(folder, name) for name in ("errors.png", "latency.png"))
    _plot_errors(check, errors)
    _plot_latency(check, latency)
    note = (
        "Open loop: at every step the policy sees what the robot saw then and its chunk is compared with what "
        "was done. "
        "A small error is needed, and no promise: only the robot shows whether errors add up."
    )
    sections = [
        ("", pages.html_findings(check.findings)),
        ("Error in physical units", pages.html_table(error_rows(check)) + pages.html_picture(errors)),
        ("Replays", f"<p>{note}" + "".join(replays)),
        ("Commands", pages.html_table(motion_rows(check)) + pages.html_text(_MOTION)),
        ("Latency", pages.html_text(latency_text(check)) + pages.html_picture(latency)),
    ]
    path = os.path.join(folder, "index.html")
    with open(path, "w", encoding="utf-8") as file:
        file.write(pages.html_document(f"Before the hardware: {check.dataset}", sections))
    return path


_MOTION = """outside        share of the executed commands beyond the limits
roughness      second differences of the executed commands over those of the demonstrations
disagreement   difference of two consecutive chunks where both predict, in standard deviations of the actions"""


def _plot_errors(check: PolicyCheck, path: str) -> None:
    """Error by step of the chunk, one panel per dimension, with the two answers that need no policy."""
    from matplotlib.figure import Figure

    width = len(check.names)
    columns = min(2, width)  # readable on a phone
    rows = -(-width // columns)
    figure = Figure(figsize=(3.4 * columns, 0.4 + 2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    steps = np.arange(check.errors.policy.shape[0])
    for d, axis in enumerate(axes):
        if d >= width:
            axis.set_visible(False)
            continue
        axis.plot(steps, check.errors.policy[:, d], marker=".", color="#1f6feb", label="policy")
        axis.plot(steps, check.errors.repeat[:, d], color="#c8743c", lw=1, label="repeat last")
        axis.plot(steps, check.errors.mean[:, d], color="#8c959f", lw=1, ls="--", label="mean action")
        unit = f" [{check.units[d]}]" if check.units[d] else ""
        axis.set_title(f"{check.names[d]}{unit}", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=6)
    figure.supxlabel("step of the chunk", fontsize=8)
    figure.savefig(path, dpi=90)


def _plot_latency(check: PolicyCheck, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2), layout="constrained")
    axis = figure.subplots()
    axis.hist(check.latency.calls, bins=30, color="#4472a8")
    for percent in (50, 99):
        axis.axvline(check.latency.at(percent), color="#24292f", lw=1, ls="--")
    if check.hz:
        axis.axvline(1000 / check.hz, color="#d1242f", lw=1.5, label="control period")
        axis.legend(fontsize=7)
    axis.set_xlim(left=0)
    axis.set_xlabel("sample_actions [ms]; dashed: p50, p99", fontsize=8)
    axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=90)
