"""Tables and figure of scripts/benchmark_language.py, from what it collected; see `collect` there for the format."""

import re
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import adaptation_report
import numpy as np

from octo_like.robot.intervals import difference_interval, success_interval, success_rate

LEVEL = 0.95
TITLES = {
    "word": "A word that only pictures taught",
    "subtasks": "Sub-tasks",
    "heads": "Heads of tokens beside the others",
}
VARIANTS = {
    "pictures": "robots and pictures with words",
    "pictures_unnamed": "the same without the word",
    "pictures_words": "the same without the places",
    "robots": "robots alone",
    "subtasks": "reads sub-tasks",
    "memory": "is asked with its last words",
    "flat": "knows no sub-tasks",
}
TESTS = {
    "named": "a colour that demonstrations name",
    "taught": "the colour that only pictures name",
    "new": "a colour that nothing in demonstrations has",
    "seen_pairs": "block and plate that demonstrations name together",
    "new_pairs": "never named together in demonstrations",
    "no plan": "nobody says what is next",
    "predicted": "its own words",
    "oracle": "the right words",
    "random": "random words",
    "corrected": "a person names another block: it is taken",
    "not corrected": "the same block, not named",
    "natural": "scenes as they come",
    "wrong_nearest": "another block is nearest",
}
# What a study compares: (variant, test) minus (variant, test), on the same scenes.
COMPARED = {
    "word": [
        (("pictures", name), (other, name))
        for other in ("pictures_unnamed", "pictures_words", "robots")
        for name in ("named", "taught", "new", "new_pairs")
    ],
    "subtasks": [
        *((("subtasks", name), ("flat", "no plan")) for name in ("no plan", "predicted", "oracle", "random")),
        (("subtasks", "corrected"), ("subtasks", "not corrected")),
        *((("memory", name), ("flat", "no plan")) for name in ("no plan", "predicted", "oracle", "random")),
        (("memory", "predicted"), ("subtasks", "predicted")),
        (("memory", "corrected"), ("memory", "not corrected")),
    ],
}


def tables(collected: Mapping[str, Any]) -> str:
    """The results in Markdown; what was not run is left out."""
    return "\n".join(
        f"### {TITLES[study]}\n\n{_of_study(study, variants)}" for study, variants in collected["studies"].items()
    )


def _of_study(study: str, variants: Mapping[str, Mapping[str, Sequence]]) -> str:
    rows, speeds = [], []
    for variant, tests in variants.items():
        for test, results in tests.items():
            there = [result for result in results if result is not None]
            if not there:
                continue
            if "episodes" in there[0]:
                rows.append([VARIANTS.get(variant, variant), TESTS.get(test, test), *_rates(there)])
            elif "seconds" in there[0] and test == "speed":
                waits = statistics.median(result["seconds"] for result in there)
                tokens = [result["tokens"] for result in there if result["tokens"] is not None]
                said = f"{statistics.mean(tokens):.1f}" if tokens else ""
                speeds.append([variant, f"{1000 * waits:.1f} ms", said])
    head = ["policy", "test", "success of each training", "mean (95%, of scenes)", "of each task", "besides"]
    parts = [_markdown(head, rows)] if rows else ["Not run yet.\n"]
    if speeds:
        head = ["head", "one robot waits for a chunk (median of trainings)", "tokens of a chunk"]
        parts.append(_markdown(head, speeds))
    parts += [_compared(study, variants), _answers(variants)]
    return "\n".join(part for part in parts if part)


def _rates(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells of a row: rates of trainings, their mean with an interval, tasks, agreement of plans and progress."""
    episodes = [episode for result in results for episode in result["episodes"]]
    rate, low, high, scenes = _mean(results)
    tasks = ", ".join(
        f"{task} {success_rate([e['success'] for e in episodes if e['task'] == task]):.0%}"
        for task in dict.fromkeys(e["task"] for e in episodes)
    )
    besides = []
    if plans := sum(episode.get("plans", 0) for episode in episodes):
        besides.append(f"right words {sum(episode.get('agreed', 0) for episode in episodes) / plans:.0%}")
    if "progress" in episodes[0]:
        besides.append(f"done {statistics.mean(episode['progress'] for episode in episodes):.0%}")
    each = ", ".join(f"{success_rate([e['success'] for e in result['episodes']]):.0%}" for result in results)
    mean = f"{rate:.0%} [{low:.0%}, {high:.0%}] of {scenes}"
    return [
        each,
        mean,
        tasks,
        ", ".join(besides),
    ]


def _mean(results: Sequence[Mapping[str, Any]]) -> tuple[float, float, float, int]:
    """(mean success, its interval over scenes, number of scenes); trainings of a scene are averaged first: they are not
    scenes more."""
    by_scene = np.array([[episode["success"] for episode in result["episodes"]] for result in results], float).mean(0)
    if len(results) == 1:
        return float(by_scene.mean()), *success_interval(by_scene > 0, LEVEL), len(by_scene)
    drawn = np.random.default_rng(0).integers(0, len(by_scene), (4000, len(by_scene)))
    low, high = np.quantile(by_scene[drawn].mean(1), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(by_scene.mean()), float(low), float(high), len(by_scene)


def _compared(study: str, variants: Mapping[str, Mapping[str, Sequence]]) -> str:
    """Differences: of every training on the same scenes, and of the trainings as a sample."""
    rows = []
    for (first, one), (second, other) in COMPARED.get(study, ()):
        pairs = [
            (a, b)
            for a, b in zip(variants.get(first, {}).get(one, ()), variants.get(second, {}).get(other, ()), strict=False)
            if a is not None and b is not None
        ]
        if not pairs:
            continue
        shown, rates = [], ([], [])
        for pair in pairs:
            successes = [[episode["success"] for episode in result["episodes"]] for result in pair]
            low, high = difference_interval(*successes, LEVEL)
            for values, of_training in zip(rates, successes, strict=True):
                values.append(success_rate(of_training))
            shown.append(f"{100 * (rates[0][-1] - rates[1][-1]):+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]")
        spread = ""
        if len(pairs) > 2:  # two say next to nothing of their spread
            value, low, high = adaptation_report.difference_of_trainings(*rates)
            spread = f"{100 * value:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"
        what = f"{VARIANTS[first]}, {TESTS[one]}"
        against = f"{VARIANTS[second]}, {TESTS[other]}"
        rows.append([what, against, "; ".join(shown), spread])
    head = ["", "minus", "points of each training (95%, of scenes)", "mean (95%, of trainings)"]
    return _markdown(head, rows) if rows else ""


def _answers(variants: Mapping[str, Mapping[str, Sequence]]) -> str:
    """Questions about pictures, by kind: what the commonest answer would get, and every variant, with the taught word
    and without. Places are right within `NEAR` bins of each axis; other answers when they are the same text."""
    by_variant = {
        variant: [answer for result in tests["answers"] if result is not None for answer in result["answers"]]
        for variant, tests in variants.items()
        if any(tests.get("answers", ()))
    }
    if not by_variant:
        return ""
    rows, first = [], next(iter(by_variant.values()))
    for kind in dict.fromkeys(answer["kind"] for answer in first):
        wanted = [answer["answer"] for answer in first if answer["kind"] == kind]
        row = [kind, f"{max(wanted.count(one) for one in set(wanted)) / len(wanted):.0%}"]
        for answers in by_variant.values():
            for taught in (False, True):
                right = [
                    is_right(a["said"], a["answer"]) for a in answers if (a["kind"], a["taught"]) == (kind, taught)
                ]
                row.append(f"{success_rate(right):.0%} of {len(right)}" if right else "")
        rows.append(row)
    head = [
        f"{VARIANTS.get(name, name)}, {words}" for name in by_variant for words in ("other words", "the taught word")
    ]
    return _markdown(["questions", "the commonest answer", *head], rows)


NEAR = 2  # bins of 64


def is_right(said: str, wanted: str) -> bool:
    """Whether an answer is the wanted one; of places, whether every number of it is within `NEAR` bins."""
    places, found = (re.findall(r"<loc(\d+)>", text) for text in (wanted, said))
    if not places:
        return said == wanted
    return len(places) == len(found) and all(abs(int(a) - int(b)) <= NEAR for a, b in zip(places, found, strict=True))


COLORS = ("#1f6feb", "#bf8700", "#57606a", "#8250df", "#1a7f37", "#cf222e")


def draw(collected: Mapping[str, Any], path: Path) -> None:
    """Success of every test: a bar for the mean, a dot for each training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    studies = {study: _finished(variants) for study, variants in collected["studies"].items()}
    studies = {study: variants for study, variants in studies.items() if variants} or collected["studies"]
    figure, axes = plt.subplots(
        len(studies), 3, figsize=(13, 3.2 * len(studies)), width_ratios=[3, 1, 1], squeeze=False
    )
    for row, (study, variants) in zip(axes, studies.items(), strict=True):
        _draw_study(row[0], variants)
        row[0].set_title(TITLES[study], fontsize=10, loc="left")
        for axis, what, unit in zip(
            row[1:], ("action", "text"), ("MSE of noise or actions", "nats an id"), strict=True
        ):
            if study == "heads":  # nats, squares and absolute values have no axis in common
                axis.axis("off")
                continue
            _draw_losses(axis, what, list(variants), collected.get("losses", {}).get(study, {}))
            axis.set_title(f"validation loss, {what} ({unit})", fontsize=8, loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _finished(variants: Mapping[str, Mapping[str, Sequence]]) -> dict[str, Mapping[str, Sequence]]:
    """Variants of which a test has been run."""
    return {name: tests for name, tests in variants.items() if any(map(any, tests.values()))}


def _draw_study(axis: Any, variants: Mapping[str, Mapping[str, Sequence]]) -> None:
    names = dict.fromkeys(test for tests in variants.values() for test in tests)
    names = [name for name in names if name not in ("answers", "speed")]
    width = 0.8 / len(variants)
    for i, ((variant, tests), color) in enumerate(zip(variants.items(), COLORS, strict=False)):
        axis.bar(0, 0, color=color, alpha=0.6, label=VARIANTS.get(variant, variant))
        for j, name in enumerate(names):
            there = [result["episodes"] for result in tests.get(name, ()) if result is not None]
            rates = [100 * success_rate([episode["success"] for episode in episodes]) for episodes in there]
            if rates:
                x = j + (i - (len(variants) - 1) / 2) * width
                axis.bar(x, statistics.mean(rates), width * 0.9, color=color, alpha=0.6, zorder=1)
                axis.plot([x] * len(rates), rates, "o", color=color, markersize=4, zorder=2)
    axis.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set_ylim(0, 100)
    axis.set_ylabel("success (%)")
    axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)


def _draw_losses(axis: Any, what: str, variants: Sequence[str], losses: Mapping[str, Sequence[Mapping]]) -> None:
    """A line for each training, in the variant's colour."""
    drawn = False
    for variant, color in zip(variants, COLORS, strict=False):
        for curves in losses.get(variant, ()):
            if curves.get(what):
                axis.plot(*zip(*curves[what], strict=True), color=color, alpha=0.8)
                drawn = True
    if drawn:
        axis.set_yscale("log")
        axis.set_xlabel("step", fontsize=8)
    else:
        axis.axis("off")


def into_page(page: Path, text: str, figure: Path) -> None:
    """Puts tables and figure between the page's marks; the figure goes into the folder "figures" beside it.

    Raises:
      ValueError: the page has no marks.
    """
    shutil.copy(figure, page.parent / "figures" / "language.png")
    text = f"{text.strip()}\n\n![Success of every test and training](figures/language.png)"
    page.write_text(adaptation_report.between_marks(page.read_text(), text))


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return adaptation_report._markdown(head, rows)
