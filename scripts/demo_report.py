"""Turns the outputs of the demo into results.json and one self-contained page, report.html:

    python scripts/demo_report.py --workdir runs/demo

Reads what the stages left below --workdir: evaluation/, the metrics of every training run, the report of what was
loaded, and the seconds of the stages.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from demo_bars import (
    ADAPTED,
    RUNS,
    Episodes,
    cell_title,
    compute_results,
    percent,
    read_training,
    section_title,
    train_losses,
    validation_losses,
)

from octo_like.training.metrics import METRICS_FILE, read_metrics
from octo_like.training.progress import format_seconds

INK, COLOURS = "#24292f", ("#1f6feb", "#cf222e", "#bf8700", "#1a7f37")

# Parts of the page


def escape(text: Any) -> str:
    return html.escape(str(text))


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def bar(value: Mapping[str, Any] | None, title: str) -> str:
    """A table cell: the number, and a bar with its interval. `title` is the column's, shown in narrow windows."""
    label = f' data-label="{escape(title)}"'
    if value is None:
        return f'<td class="none"{label}>–</td>'
    rate_, (low, high) = 100 * value["value"], (100 * x for x in value["ci90"])
    picture = (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none">'
        f'<rect y="1" width="100" height="8" class="back"/><rect y="1" width="{rate_:.1f}" height="8" class="front"/>'
        f'<rect x="{low:.1f}" y="4" width="{max(high - low, 0.5):.1f}" height="2" class="interval"/>'
        f'<rect x="{low:.1f}" width="0.6" height="10" class="interval"/>'
        f'<rect x="{min(high, 99.4):.1f}" width="0.6" height="10" class="interval"/></svg>'
    )
    interval = f"{low:.0f}–{high:.0f}% · n={value['episodes']}"
    return f'<td{label}><b>{rate_:.0f}%</b> <span class="ci">{interval}</span>{picture}</td>'


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Success pooled and per task, and folded away per robot and per combination; columns: title to a `rate`."""
    tasks = group_rows("task: ", "per_task", columns)
    robots = group_rows("robot: ", "per_embodiment", columns)
    if robots and tasks:
        robots += group_rows("", "per_embodiment_and_task", columns)
    folded = f"<details><summary>per robot</summary>{framed(columns, robots)}</details>" if robots else ""
    return framed(columns, [rate_row("all", columns, "pooled"), *tasks]) + folded


def group_rows(label: str, group: str, columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row for each member of a group of `rate`; none when there is but one, which says what the pooled row does."""
    names = dict.fromkeys(name for value in columns.values() for name in value[group])
    parts = {name: {title: value[group].get(name) for title, value in columns.items()} for name in names}
    return [rate_row(label + cell_title(name), part) for name, part in parts.items()] if len(names) > 1 else []


def framed(columns: Mapping[str, Any], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in columns)
    return f'<table class="rates"><tr class="head"><th></th>{head}</tr>{"".join(rows)}</table>'


def rate_row(name: str, columns: Mapping[str, Mapping[str, Any] | None], kind: str = "") -> str:
    cells = "".join(bar(value, title) for title, value in columns.items())
    return f'<tr class="{kind}"><th>{escape(name)}</th>{cells}</tr>'


def learning_curve(title: str, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes | None:
    """A PNG of (run: rows of its metrics): training loss, smoothed, and validation loss where it was measured.

    One run shows its datasets in colours; several are told apart by colour themselves. None without any loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(6.2, 4.0), layout="constrained")  # small, so that its text is legible in a narrow window
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for (name, rows), run_colour in zip(runs.items(), (INK, *COLOURS) if len(runs) == 1 else COLOURS, strict=False):
        if points := train_losses(rows):
            steps, losses = np.array(points, np.float64).T
            smooth_steps, smoothed = smooth(steps, losses)
            axis.plot(steps, losses, color=run_colour, lw=0.6, alpha=0.3)
            axis.plot(smooth_steps, smoothed, color=run_colour, lw=1.8, label=f"{name}: training")
        for i, (dataset, points) in enumerate(validation_losses(rows).items()):
            colour = COLOURS[i % len(COLOURS)] if len(runs) == 1 else run_colour
            axis.plot(
                *zip(*points, strict=True), "o--", color=colour, ms=4, lw=0.9, label=f"{name}: held out, {dataset}"
            )
    if not axis.lines:
        return None
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("step")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def smooth(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of a twentieth of the run, in the middle of their steps."""
    window = max(1, len(losses) // 20)
    weights = np.ones(window) / window
    return np.convolve(steps, weights, "valid"), np.convolve(losses, weights, "valid")


CSS = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --blue: #1f6feb; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1080px; margin: 2rem auto;
  padding: 0 1.2rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p.sub, figcaption, .ci, .hint { color: var(--soft); } .ci { font-size: .78rem; white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.card b { font-size: 1.7rem; display: block; line-height: 1.2; }
.verdict { border-left: 4px solid var(--line); padding: .1rem 1rem; list-style: none; }
.verdict li { margin: .45rem 0; } .met::before { content: "✓ "; color: #1a7f37; font-weight: 700; }
.missed::before { content: "✗ "; color: #cf222e; font-weight: 700; } .hint { display: block; font-size: .88rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
table.rates { table-layout: fixed; } table.rates th:first-child { width: 21%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tr th:first-child { font-weight: 500; } .pooled th, .pooled td { background: #f6f8fa; }
td svg { width: 100%; height: 9px; display: block; margin-top: 2px; } .none { color: var(--soft); }
.back { fill: #eaeef2; } .front { fill: #79b0ff; } .interval { fill: #0b2e66; }
.gallery { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-start; } figure { margin: 0; }
figcaption { font-size: .8rem; max-width: 200px; } figcaption b { color: #cf222e; } figcaption b.met { color: #1a7f37; }
figcaption b::before { content: none; } img { max-width: 100%; } .curves img { width: 510px; }
.scroll { overflow-x: auto; } .scroll img { width: min(100%, 640px); }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .78rem; line-height: 1.35; border-radius: 6px; }
details { margin: .6rem 0; } summary { cursor: pointer; }
@media (max-width: 700px) {
  body { margin: 1rem auto; padding: 0 .8rem; }
  table.rates, table.rates tbody, table.rates tr { display: block; } table.rates tr.head { display: none; }
  table.rates tr { padding: .3rem 0; border-bottom: 1px solid var(--line); }
  table.rates th:first-child { display: block; width: auto; font-weight: 700; padding: .2rem .4rem; border: 0; }
  table.rates td { display: grid; grid-template-columns: 1fr 3rem 8rem; gap: 0 .4rem;
    padding: .15rem .4rem; border: 0; }
  table.rates td::before { content: attr(data-label); } table.rates td svg { grid-column: 1 / -1; margin: 0 0 .2rem; }
}
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
        *(
            f'<li class="{"met" if bar_["met"] else "missed"}">{escape(bar_["sentence"])}'
            f'<span class="hint">{escape(bar_["look_at"])}</span></li>'
            for bar_ in results["bars"].values()
        ),
        "</ul>",
        "<h2>The pretrained policy</h2>",
        "<p>Success as scenes come, and where a block that is not the target is nearest. Swapped: the scene stays as "
        "it was and the instruction names another block; a policy that ignores the words would go for the old one.</p>",
        table(
            {
                "success": pretrain["success"],
                "nearest block is wrong": pretrain["success_wrong_nearest"],
                "swapped: new block reached": pretrain["success_swapped_instruction"],
                "swapped: old block reached": pretrain["original_target_when_swapped"],
            }
        ),
        *curves_section(workdir),
        *words_section(pretrain),
        "<h2>What the policy would do blindfolded or deaf</h2>",
        "<p>Blind to vision: every image is black and marked missing, the words and the robot's own joints remain. "
        "Blind to language: no instruction. What these still achieve needs no eyes, or no ears.</p>",
        table(
            {
                "sees and hears": pretrain["success"],
                "vision-blind": pretrain["vision_blind"],
                "language-blind": pretrain["language_blind"],
            }
        ),
        "<h2>Adaptation to the held-out robot</h2>",
        "<p>Another number of joints, absolute instead of relative commands and another body: none of it was in "
        "pretraining. All three policies learn from the same 50 demonstrations.</p>",
        table({title: adapt[name]["success"] for name, title in ADAPTED.items()}),
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
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>octo_like demo</title><style>{CSS}</style></head><body>{body}</body></html>"
    )


def curves_section(workdir: Path) -> list[str]:
    runs = {}
    for name, folder in RUNS.items():
        try:
            runs[name] = read_metrics(workdir / folder)
        except FileNotFoundError:
            print(f"note: {workdir / folder} has no metrics; its learning curve is left out", file=sys.stderr)
    adapted = {name.removeprefix("adapt/"): rows for name, rows in runs.items() if name != "pretrain"}
    pictures = [
        learning_curve("pretraining", {"pretrain": runs["pretrain"]} if "pretrain" in runs else {}),
        learning_curve("adaptation to the held-out robot", adapted),
    ]
    images = [f'<img src="{data_uri(png, "png")}" alt="learning curves">' for png in pictures if png is not None]
    if not images:
        return []
    return [
        "<h2>Learning curves</h2>",
        "<p>Loss of the actions: each batch faint, the mean of a twentieth of the run solid; dots are demonstrations "
        "that are not trained on. A pretrained policy hears the words once its curve has left the first plateau.</p>",
        f'<div class="gallery curves">{"".join(images)}</div>',
    ]


def words_section(pretrain: Mapping[str, Any]) -> list[str]:
    """What happens with sentences, and pairs of colours, that no demonstration had."""
    absent, points = pretrain["any_block_when_absent"], pretrain["held_out_minus_seen"]
    low, high = points["ci90"]
    return [
        "<h2>What no demonstration showed</h2>",
        "<p>Sentences of known words that no demonstration says, and known sentences with their words in random order "
        "(which then no longer tell the block's colour from the plate's).</p>",
        table(
            {
                "as demonstrated": pretrain["success"],
                "unseen sentences": pretrain["unseen_phrasing"],
                "words shuffled": pretrain["shuffled_words"],
            }
        ),
        "<p>Blocks and plates in pairs of colours that no demonstration asks for, and the same scenes in colours that "
        f"demonstrations do ask for: a difference of {100 * points['value']:+.0f} points "
        f"({100 * low:+.0f} to {100 * high:+.0f}).</p>",
        table({"held-out pairs": pretrain["held_out_pairs"], "demonstrated pairs": pretrain["seen_pairs"]}),
        f"<p>Told of a block that is not there, {escape(percent(absent))} reach some block all the same.</p>",
        table({"some block reached": absent}),
    ]


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
        f"<details><summary>{len(rows)} action dimensions</summary><div class='scroll'><table><tr>"
        f"{''.join(f'<th>{title}</th>' for title in head)}</tr>{''.join(rows)}</table></div></details>",
    ]


def plots_section(folder: Path) -> list[str]:
    captions = json.loads((folder / "plots.json").read_text())
    figures = [
        f"<details{' open' if i == 0 else ''}><summary>{escape(caption)}</summary>"
        f'<div class="scroll"><img src="{data_uri((folder / "plots" / file).read_bytes(), "png")}" '
        f'alt="{escape(caption)}"></div></details>'
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
        "<p>Of the first scenes of each robot and task: failures first, then successes. How often each happens is in "
        "the tables above. Green frame: success; red: failure. Where there is a camera on the wrist, its view is on "
        "the right, enlarged.</p>",
    ]
    for name, episodes in evaluations.items():
        shown = sorted((episode for episode in episodes if "gif" in episode), key=lambda e: e["success"])
        if shown:
            failed = sum(not episode["success"] for episode in shown)
            parts.append(f"<h3>{escape(section_title(name))}</h3>")
            parts.append(f"<p>Failed: {failed}, succeeded: {len(shown) - failed}.</p><div class='gallery'>")
            parts += [animation(folder, episode) for episode in shown]
            parts.append("</div>")
    return parts


def animation(folder: Path, episode: Mapping[str, Any]) -> str:
    gif = data_uri((folder / "gifs" / episode["gif"]).read_bytes(), "gif")
    outcome = '<b class="met">success</b>' if episode["success"] else "<b>failure</b>"
    what = f"{episode['embodiment']}, {episode['task'].replace('_', ' ')}, {episode['steps']} steps"
    return (
        f'<figure><img src="{gif}" alt="{escape(episode["instruction"])}">'
        f"<figcaption>{outcome} · {escape(what)}</figcaption></figure>"
    )


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
        results = compute_results(evaluations, stamps, read_training(args.workdir))
        document = page(results, args.workdir, evaluations)
    except FileNotFoundError as error:
        print(f"error: {error.filename} is missing: run scripts/demo.py, which makes it", file=sys.stderr)
        return 2
    (args.workdir / "results.json").write_text(json.dumps(results, indent=1))
    (args.workdir / "report.html").write_text(document, encoding="utf-8")
    for one in results["bars"].values():
        print(f"  {'yes' if one['met'] else 'NO ':>4}  {one['sentence']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
