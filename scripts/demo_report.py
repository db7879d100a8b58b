"""Turns the outputs of the demo into results.json and one self-contained page, report.html:

    python scripts/demo_report.py --workdir runs/demo

Reads what the stages left below --workdir: evaluation/, the metrics of every training run, the report of what was
loaded, and the seconds of the stages.
"""

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from octo_like.robot.intervals import difference_interval, success_interval, success_rate
from octo_like.training.metrics import METRICS_FILE, format_seconds, read_metrics

LEVEL = 0.9
WANTED_DIFFERENCE = 0.20
ADAPTED = {
    "from_pretrained": "adapted from the pretrained policy",
    "from_scratch_1x": "from scratch, as many steps",
    "from_scratch_4x": "from scratch, four times the steps",
}
RUNS = {"pretrain": "pretrain", **{f"adapt/{name}": f"adapt_{name}" for name in ADAPTED}}  # evaluation to folder

Episodes = Sequence[Mapping[str, Any]]


# Numbers


def rate(episodes: Episodes, outcome: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
    """{"value", "episodes", "ci90"} and the same per task, embodiment, and both."""

    def summary(part: Episodes) -> dict[str, Any]:
        outcomes = [bool(outcome(episode)) for episode in part]
        return {
            "value": success_rate(outcomes),
            "episodes": len(outcomes),
            "ci90": list(success_interval(outcomes, LEVEL)),
        }

    def by(key: Callable[[Mapping[str, Any]], str]) -> dict[str, Any]:
        names = dict.fromkeys(key(episode) for episode in episodes)
        return {name: summary([episode for episode in episodes if key(episode) == name]) for name in names}

    return {
        **summary(episodes),
        "per_task": by(lambda e: e["task"]),
        "per_embodiment": by(lambda e: e["embodiment"]),
        "per_embodiment_and_task": by(lambda e: f"{e['embodiment']}/{e['task']}"),
    }


def compute_results(evaluations: Mapping[str, Episodes], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The contents of results.json.

    {"pretrain": {"success", "success_wrong_nearest", "success_swapped_instruction", "original_target_when_swapped"},
     "adapt": {"from_pretrained": {"success"}, "from_scratch_1x": ..., "from_scratch_4x": ..., "difference": {...}},
     "seconds": {stage: seconds, "total"}}, every rate as `rate` gives it.
    """

    def success(episode):
        return episode["success"]

    pretrain = {
        "success": rate(evaluations["pretrain/natural"], success),
        "success_wrong_nearest": rate(evaluations["pretrain/wrong_nearest"], success),
        "success_swapped_instruction": rate(evaluations["pretrain/swapped"], lambda e: e["flags"]["reached_target"]),
        "original_target_when_swapped": rate(evaluations["pretrain/swapped"], lambda e: e["flags"]["reached_original"]),
        "whole_task_when_swapped": rate(evaluations["pretrain/swapped"], success),
        "vision_blind": rate(evaluations["pretrain/vision_blind"], success),
        "language_blind": rate(evaluations["pretrain/language_blind"], success),
    }
    adapt = {name: {"success": rate(evaluations[f"adapt/{name}"], success)} for name in ADAPTED}
    scratch = max(("from_scratch_1x", "from_scratch_4x"), key=lambda name: adapt[name]["success"]["value"])
    ours, theirs = ([e["success"] for e in evaluations[f"adapt/{name}"]] for name in ("from_pretrained", scratch))
    adapt["difference"] = {
        "value": success_rate(ours) - success_rate(theirs),
        "against": scratch,
        "ci90": list(difference_interval(ours, theirs, LEVEL)),
        "wanted": WANTED_DIFFERENCE,
    }
    return {
        "pretrain": pretrain,
        "adapt": adapt,
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def verdict(results: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """(met, sentence) for each thing the demo sets out to show."""
    pretrain, difference = results["pretrain"], results["adapt"]["difference"]
    wrong = pretrain["success_wrong_nearest"]
    goals = [(wrong, "of the episodes in which another block is nearest succeed", 0.70, True)]
    if "pick_and_place" in wrong["per_task"]:
        goals.append((wrong["per_task"]["pick_and_place"], "of these do when the task is pick-and-place", 0.50, True))
    goals += [
        (pretrain["success_swapped_instruction"], "reach the block that a swapped instruction names", 0.60, True),
        (pretrain["original_target_when_swapped"], "still reach the block of the original instruction", 0.10, False),
    ]
    lines = []
    for value, what, bound, at_least in goals:
        met = value["value"] >= bound if at_least else value["value"] <= bound
        sign = "at least" if at_least else "at most"
        lines.append((met, f"{percent(value)} {what} (wanted: {sign} {bound:.0%})."))
    points, (low, high) = 100 * difference["value"], (100 * x for x in difference["ci90"])
    other = ADAPTED[difference["against"]]
    met = difference["value"] >= WANTED_DIFFERENCE
    sentence = (
        f"On the held-out robot the policy adapted from the pretrained one is {abs(points):.0f} points "
        f"{'better' if points >= 0 else 'WORSE'} than the better of the policies trained from scratch ({other}); "
        f"90% interval of the difference {low:+.0f} to {high:+.0f} points. "
    )
    if met:
        sentence += f"That is the {100 * WANTED_DIFFERENCE:.0f} points that were wanted, or more."
    else:
        short = 100 * WANTED_DIFFERENCE - points
        sentence += f"{100 * WANTED_DIFFERENCE:.0f} points were wanted: it falls short by {short:.0f}."
    return [*lines, (met, sentence)]


def percent(value: Mapping[str, Any]) -> str:
    low, high = value["ci90"]
    return f"{value['value']:.0%} ({low:.0%}–{high:.0%}, {value['episodes']} episodes)"


# Parts of the page


def escape(text: Any) -> str:
    return html.escape(str(text))


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def bar(value: Mapping[str, Any] | None) -> str:
    """A table cell: the number, and a bar with its interval."""
    if value is None:
        return '<td class="none">–</td>'
    rate_, (low, high) = value["value"], value["ci90"]
    picture = (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none">'
        f'<rect width="100" height="10" class="back"/><rect width="{100 * rate_:.1f}" height="10" class="front"/>'
        f'<rect x="{100 * low:.1f}" y="4" width="{max(100 * (high - low), 0.5):.1f}" height="2" class="interval"/>'
        "</svg>"
    )
    title = f"90% interval {low:.0%} to {high:.0%}, {value['episodes']} episodes"
    return (
        f'<td title="{title}"><b>{rate_:.0%}</b> <span class="ci">{low:.0%}–{high:.0%} · n={value["episodes"]}</span>'
        f"{picture}</td>"
    )


def table(columns: Mapping[str, Mapping[str, Any]], combinations: bool = True) -> str:
    """Rows: everything pooled, per task, per robot, and each combination; columns: title to a result of `rate`."""
    head = "".join(f"<th>{escape(title)}</th>" for title in columns)
    rows = [f'<tr class="pooled"><th>all</th>{"".join(bar(value) for value in columns.values())}</tr>']
    groups = [("per_task", "task"), ("per_embodiment", "robot")]
    robots = {name for value in columns.values() for name in value["per_embodiment"]}
    if combinations and len(robots) > 1:
        groups.append(("per_embodiment_and_task", ""))
    for group, label in groups:
        names = dict.fromkeys(name for value in columns.values() for name in value[group])
        if len(names) < 2:
            continue
        for name in names:
            cells = "".join(bar(value[group].get(name)) for value in columns.values())
            shown = f"{label}: {name}" if label else name.replace("/", " · ")
            rows.append(f"<tr><th>{escape(shown.replace('_', ' '))}</th>{cells}</tr>")
    return f'<table class="rates"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def learning_curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes | None:
    """A PNG: training and validation loss of every run over its steps; None when no run has metrics."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    drawn = False
    for (name, rows), colour in zip(runs.items(), ("#24292f", "#1f6feb", "#cf222e", "#bf8700"), strict=False):
        for axis, wanted in zip(axes, (is_train_loss, is_validation_loss), strict=True):
            keys = sorted({key for row in rows for key in row if wanted(key)}, key=lambda key: (len(key), key))
            for i, key in enumerate(keys if wanted is is_validation_loss else keys[:1]):
                points = [(row["step"], row[key]) for row in rows if key in row]
                style = {"lw": 1.2, "marker": "o" if len(points) < 30 else None, "ms": 3, "alpha": 1 / (1 + 0.35 * i)}
                axis.plot(*zip(*points, strict=True), color=colour, label=name if i == 0 else None, **style)
                drawn = True
    if not drawn:
        return None
    for axis, title in zip(axes, ("training loss", "validation loss, per dataset"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.set_yscale("log")
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.25, which="both")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def is_train_loss(key: str) -> bool:
    return key.endswith("loss") and not is_validation_loss(key)


def is_validation_loss(key: str) -> bool:
    return key.startswith("val") and "loss" in key


CSS = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --blue: #1f6feb; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1080px; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.sub, figcaption, .ci { color: var(--soft); } .ci { font-size: .78rem; white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: .8rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.card b { font-size: 1.7rem; display: block; line-height: 1.2; }
.verdict { border-left: 4px solid var(--line); padding: .1rem 1rem; list-style: none; }
.verdict li { margin: .35rem 0; } .met::before { content: "✓ "; color: #1a7f37; font-weight: 700; }
.missed::before { content: "✗ "; color: #cf222e; font-weight: 700; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
table.rates { table-layout: fixed; } table.rates th:first-child { width: 21%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tr th:first-child { font-weight: 500; white-space: nowrap; } .pooled th, .pooled td { background: #f6f8fa; }
td svg { width: 100%; height: 7px; display: block; margin-top: 2px; } .none { color: var(--soft); }
.back { fill: #eaeef2; } .front { fill: var(--blue); } .interval { fill: #0b2e66; }
.gallery { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; } figcaption { font-size: .8rem; }
.gallery img { max-width: 100%; } img.wide { width: 100%; max-width: 900px; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .78rem; line-height: 1.35; border-radius: 6px; }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""


def page(results: Mapping[str, Any], workdir: Path, evaluations: Mapping[str, Episodes]) -> str:
    """The whole report."""
    pretrain, adapt = results["pretrain"], results["adapt"]
    cards = {
        "pretrained policy succeeds": pretrain["success"],
        "when the nearest block is the wrong one": pretrain["success_wrong_nearest"],
        "reach the block of a swapped instruction": pretrain["success_swapped_instruction"],
        "adapted to the held-out robot, 50 demonstrations": adapt["from_pretrained"]["success"],
        "the same demonstrations, from scratch": adapt[adapt["difference"]["against"]]["success"],
    }
    parts = [
        "<h1>From demonstrations to a robot that listens</h1>",
        '<p class="sub">One policy pretrained on three simulated robots, adapted to a fourth with 50 demonstrations, '
        f"and evaluated in closed loop. The whole run took {format_seconds(results['seconds']['total'])}. "
        "Intervals are 90% (Wilson); all policies meet the same scenes.</p>",
        '<div class="cards">',
        *(
            f'<div class="card"><b>{value["value"]:.0%}</b>{escape(title)}<br><span class="ci">'
            f"{value['ci90'][0]:.0%}–{value['ci90'][1]:.0%} · n={value['episodes']}</span></div>"
            for title, value in cards.items()
        ),
        "</div><h2>Verdict</h2>",
        '<ul class="verdict">',
        *(f'<li class="{"met" if met else "missed"}">{escape(text)}</li>' for met, text in verdict(results)),
        "</ul>",
        "<h2>The pretrained policy</h2>",
        "<p>The last two columns share their episodes: the scene stays as it was and the instruction names another "
        "block. A policy that ignores the words would go for the original one.</p>",
        table(
            {
                "success": pretrain["success"],
                "success, nearest block is wrong": pretrain["success_wrong_nearest"],
                "swapped instruction: its block reached": pretrain["success_swapped_instruction"],
                "swapped instruction: original block reached": pretrain["original_target_when_swapped"],
            }
        ),
        "<h2>What the policy would do blindfolded or deaf</h2>",
        "<p>Blind to vision: every image is black and marked missing, the words and the robot's own joints remain. "
        "Blind to language: no instruction. What these still achieve needs no eyes, or no ears.</p>",
        table(
            {
                "sees and hears": pretrain["success"],
                "vision-blind": pretrain["vision_blind"],
                "language-blind": pretrain["language_blind"],
            },
            combinations=False,
        ),
        "<h2>Adaptation to the held-out robot</h2>",
        "<p>Another number of joints, absolute instead of relative commands, another body and a camera on the wrist; "
        "none of it was in pretraining. All three policies learn from the same 50 demonstrations.</p>",
        table({title: adapt[name]["success"] for name, title in ADAPTED.items()}),
        *curves_section(workdir),
        *error_section(workdir),
        *plots_section(workdir / "evaluation"),
        *gallery_section(workdir / "evaluation", evaluations),
        *loading_section(workdir),
        "<h2>Where the time went</h2>",
        '<table style="max-width: 480px">',
        *(
            f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{format_seconds(value)}</td></tr>"
            for name, value in results["seconds"].items()
        ),
        "</table>",
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>octo_like demo</title><style>{CSS}</style></head><body>{body}</body></html>"
    )


def curves_section(workdir: Path) -> list[str]:
    runs = {}
    for name, folder in RUNS.items():
        try:
            runs[name] = read_metrics(workdir / folder)
        except FileNotFoundError:
            print(f"note: {workdir / folder} has no metrics; its learning curve is left out", file=sys.stderr)
    picture = learning_curves(runs)
    if picture is None:
        return []
    return ["<h2>Learning curves</h2>", f'<img class="wide" src="{data_uri(picture, "png")}" alt="learning curves">']


def error_section(workdir: Path) -> list[str]:
    """The last action errors that each run measured on its held-out demonstrations."""
    rows = []
    for name, folder in RUNS.items():
        last: dict[str, float] = {}
        for row in read_metrics(workdir / folder) if (workdir / folder / METRICS_FILE).exists() else []:
            last |= {key: value for key, value in row.items() if key.startswith("val/")}
        for key in (key for key in last if key.split("/")[-2] == "mae"):
            dataset, dimension = key.split("/")[1], key.split("/")[-1]
            mean = last[f"val/{dataset}/mean_mae/{dimension}"]
            first = last[f"val/{dataset}/first_mae/{dimension}"]
            cells = (name, dataset, dimension, f"{first:.4f}", f"{last[key]:.4f}", f"{mean:.4f}")
            rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    if not rows:
        return []
    head = ("policy", "dataset", "action dimension", "first action", "whole chunk", "answering with the mean")
    return [
        "<h2>Action error on held-out demonstrations</h2>",
        "<p>Mean absolute error in physical units (metres, radians, opening 0 to 1). Demonstrators vary, so it never "
        "gets to zero; the last column is what a policy must beat.</p>",
        f"<details><summary>{len(rows)} action dimensions</summary><table><tr>"
        f"{''.join(f'<th>{title}</th>' for title in head)}</tr>{''.join(rows)}</table></details>",
    ]


def plots_section(folder: Path) -> list[str]:
    captions = json.loads((folder / "plots.json").read_text())
    figures = [
        f"<details{' open' if i == 0 else ''}><summary>{escape(caption)}</summary>"
        f'<img class="wide" src="{data_uri((folder / "plots" / file).read_bytes(), "png")}" alt="{escape(caption)}">'
        "</details>"
        for i, (file, caption) in enumerate(captions.items())
    ]
    return [
        "<h2>Predicted and true actions</h2>",
        "<p>Along episodes of the scripted expert: black what it did, blue what the policy would have done there "
        "(several samples; the faint lines are whole chunks).</p>",
        *figures,
    ]


def gallery_section(folder: Path, evaluations: Mapping[str, Episodes]) -> list[str]:
    parts = [
        "<h2>Rollouts</h2>",
        "<p>Green frame: success; red: failure. These are the first seeds, not chosen ones.</p>",
    ]
    for name, episodes in evaluations.items():
        shown = [episode for episode in episodes if "gif" in episode]
        if not shown:
            continue
        parts.append(f"<h3>{escape(name.replace('/', ': ').replace('_', ' '))}</h3><div class='gallery'>")
        for episode in shown:
            gif = data_uri((folder / "gifs" / episode["gif"]).read_bytes(), "gif")
            caption = f"{episode['embodiment']}, {episode['task'].replace('_', ' ')}, {episode['steps']} steps"
            image = f'<img src="{gif}" alt="{escape(episode["instruction"])}">'
            parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
        parts.append("</div>")
    return parts


def loading_section(workdir: Path) -> list[str]:
    file = workdir / RUNS["adapt/from_pretrained"] / "weights.txt"
    return [
        "<h2>What the adapted policy took from the pretrained one</h2>",
        f"<pre>{escape(file.read_text().rstrip())}</pre>",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of the demo")
    args = parser.parse_args()
    try:
        evaluations = json.loads((args.workdir / "evaluation" / "episodes.json").read_text())
        stamps = json.loads((args.workdir / "seconds.json").read_text())
        results = compute_results(evaluations, stamps)
        document = page(results, args.workdir, evaluations)
    except FileNotFoundError as error:
        print(f"error: {error.filename} is missing: run scripts/demo.py, which makes it", file=sys.stderr)
        return 2
    (args.workdir / "results.json").write_text(json.dumps(results, indent=1))
    (args.workdir / "report.html").write_text(document, encoding="utf-8")
    for met, text in verdict(results):
        print(f"  {'yes' if met else 'NO ':>4}  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
