"""Table and figure of scripts/benchmark_adaptation.py, from what it collected; see `collect` there for the format."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octo_like.robot.intervals import difference_interval, success_interval, success_rate

LEVEL = 0.95
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
NAMES = {
    "full": "adapted: full",
    "full_long": "adapted: full, long",
    "lora": "adapted: LoRA",
    "head_only": "adapted: head only",
    "scratch": "from scratch, best of its grid",
}
COLOURS = {"full": "#1f6feb", "full_long": "#79b8ff", "lora": "#8250df", "head_only": "#bf8700", "scratch": "#57606a"}
TITLES = {
    "metaworld_pretrain": "Meta-World, pretraining tasks",
    "metaworld_heldout": "(a) Meta-World, held-out tasks",
    "fetch": "(b) Fetch, another robot",
}


def outcomes(result: Mapping[str, Any]) -> dict[tuple[int, str], bool]:
    """(seed, task) -> success of a result's episodes."""
    return {(episode["seed"], episode["task"]): bool(episode["success"]) for episode in result["episodes"]}


def compare(adapted: Mapping[str, Any], scratch: Mapping[str, Any]) -> tuple[float, float, float, int]:
    """Difference of success, its bootstrap interval and the number of pairs, over the same seeds and tasks.

    Raises:
      ValueError: the two were not tested on the same episodes.
    """
    first, second = outcomes(adapted), outcomes(scratch)
    if first.keys() != second.keys():
        raise ValueError(f"not the same episodes: {len(first)} and {len(second)}, {len(first.keys() & second)} common")
    a, b = [first[key] for key in first], [second[key] for key in first]
    low, high = difference_interval(a, b, LEVEL)
    return success_rate(a) - success_rate(b), low, high, len(a)


def per_task(result: Mapping[str, Any]) -> dict[str, float]:
    """Success of each task."""
    tasks: dict[str, list[bool]] = {}
    for episode in result["episodes"]:
        tasks.setdefault(episode["task"], []).append(bool(episode["success"]))
    return {task: success_rate(successes) for task, successes in tasks.items()}


def table(collected: Mapping[str, Any]) -> str:
    """The results in Markdown; what was not run says so."""
    modes = [*collected["settings"]["modes"], "scratch"]
    parts = [_base_table(collected["base"])]
    for group, numbers in collected["groups"].items():
        parts.append(f"### {TITLES[group]}\n")
        tasks = _tasks(numbers)
        head = ["demonstrations a task", "policy", "success (95%)", "adapted - scratch (95%)", *tasks]
        rows = []
        for number, row in numbers.items():
            for mode in modes:
                rows.append([number, NAMES.get(mode, mode), *_cells(mode, row, tasks)])
        parts.append(_markdown(head, rows))
        if repeats := collected.get("repeats", {}).get(group):
            parts.append(_repeats_table(group, numbers, repeats, modes))
    return "\n".join(parts)


def _repeats_table(group: str, numbers: Mapping[str, Mapping], repeats: Mapping[str, Mapping], modes) -> str:
    """How much another training of the same cell changes, and how sure a difference is with that taken into account."""
    rows = []
    for number, more in repeats.items():
        trainings = {mode: _trainings(numbers[number].get(mode), more.get(mode, ())) for mode in modes}
        scratch = trainings["scratch"]
        for mode, rates in trainings.items():
            if len(rates) < 2:
                continue
            difference = ""
            if mode != "scratch" and len(scratch) >= 2:
                value, low, high = difference_of_trainings(rates, scratch)
                difference = f"{100 * value:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"
            listed = ", ".join(f"{rate:.0%}" for rate in rates)
            spread = f"{100 * (max(rates) - min(rates)):.0f}"
            rows.append([number, NAMES.get(mode, mode), listed, f"{statistics.mean(rates):.0%}",
                         f"{100 * statistics.stdev(rates):.1f}", spread, difference])  # fmt: skip
    head = ["demonstrations a task", "policy", "success of each training", "mean", "standard deviation (points)",
            "largest - smallest", "adapted - scratch (95%, of trainings)"]  # fmt: skip
    return f"### {TITLES[group]}: other training seeds\n\n" + _markdown(head, rows)


def _trainings(first: Mapping[str, Any] | None, others: Sequence[Mapping[str, Any]]) -> list[float]:
    """Success rates of the trainings of a cell."""
    results = [result for result in (first, *others) if result is not None]
    return [success_rate([episode["success"] for episode in result["episodes"]]) for result in results]


def difference_of_trainings(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Difference of the mean rates of two settings and its interval by Welch's t (1947), trainings as the sample.

    All are tested on the same scenes, which are taken as given. Equal rates throughout have an interval of no width.
    """
    from scipy import stats

    value = statistics.mean(first) - statistics.mean(second)
    parts = [statistics.variance(rates) / len(rates) for rates in (first, second)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return value, value, value
    pairs = zip(parts, (first, second), strict=True)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(rates) - 1) for part, rates in pairs)
    width = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return value, value - width, value + width


def between_marks(page: str, text: str) -> str:
    """The page with what stands between the lines BEGIN and END replaced by `text`.

    Raises:
      ValueError: it lacks one of them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs a line {BEGIN!r} and, below it, a line {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _base_table(base: Mapping[str, Any]) -> str:
    rows = []
    for group, result in base.items():
        if result is None:
            rows.append([TITLES[group], "not run", ""])
            continue
        tasks = ", ".join(f"{task} {rate:.0%}" for task, rate in per_task(result).items())
        rows.append([TITLES[group], _rate(result), tasks])
    return "### The pretrained policy as it is\n\n" + _markdown(["tasks", "success (95%)", "of each task"], rows)


def _tasks(numbers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    for row in numbers.values():
        for result in row.values():
            if result is not None:
                return list(per_task(result))
    return []


def _cells(mode: str, row: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    result = row.get(mode)
    if result is None:
        return ["not run", "", *("" for _ in tasks)]
    difference = ""
    if mode != "scratch" and row.get("scratch") is not None:
        value, low, high, _ = compare(result, row["scratch"])
        difference = f"{100 * value:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"
    elif mode == "scratch":
        best = result["cell"]
        difference = f"rate {best['rate']:g}, {best['steps']} steps"
    rates = per_task(result)
    return [_rate(result), difference, *(f"{rates[task]:.0%}" for task in tasks)]


def _rate(result: Mapping[str, Any]) -> str:
    successes = [episode["success"] for episode in result["episodes"]]
    low, high = success_interval(successes, LEVEL)
    return f"{success_rate(successes):.0%} [{low:.0%}, {high:.0%}] of {len(successes)}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


def draw_curve(collected: Mapping[str, Any], path: Path) -> None:
    """Success over the number of demonstrations, one panel for each group, with 95% intervals, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = collected["groups"]
    figure = Figure(figsize=(4.4 * max(1, len(groups)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(groups)), squeeze=False, sharey=True)[0]
    modes = [*collected["settings"]["modes"], "scratch"]
    for axis, (group, numbers) in zip(panels, groups.items(), strict=True):
        for shift, mode in enumerate(modes):
            points = [(int(n), row[mode]) for n, row in numbers.items() if row.get(mode) is not None]
            if not points:
                continue
            # A little beside each other, so that the intervals can be told apart.
            x = [n * (1 + 0.03 * (shift - len(modes) / 2)) for n, _ in points]
            lists = [[episode["success"] for episode in result["episodes"]] for _, result in points]
            y = [success_rate(successes) for successes in lists]
            low, high = zip(*(success_interval(successes, LEVEL) for successes in lists), strict=True)
            errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            axis.errorbar(
                x,
                y,
                yerr=errors,
                marker="o",
                ms=4,
                lw=1.6,
                capsize=2.5,
                color=COLOURS.get(mode, "#cf222e"),
                ls="--" if mode == "scratch" else "-",
                label=NAMES.get(mode, mode),
            )
        base = collected["base"].get(group)
        if base is not None:
            rate = success_rate([episode["success"] for episode in base["episodes"]])
            axis.axhline(rate, color="#2da44e", lw=1.2, ls=":", label="pretrained, not adapted")
        axis.set_xscale("log")
        axis.set_xticks([int(n) for n in numbers], [str(n) for n in numbers])
        axis.minorticks_off()
        axis.set(title=TITLES[group], xlabel="demonstrations of each task", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="best")
    panels[0].set_ylabel("success (95% interval)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
