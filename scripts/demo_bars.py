"""The numbers of `make demo` and the bars they must clear; scripts/demo_report.py writes both into results.json.

A bar is met when the measured rate itself is on the right side of it; the 90% interval beside it says how sure that is.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from octo_like.robot.intervals import difference_interval, success_interval, success_rate
from octo_like.training.metrics import read_metrics

LEVEL = 0.9
ADAPTED = {
    "from_pretrained": "adapted from the pretrained policy",
    "from_scratch_1x": "from scratch (as many steps)",
    "from_scratch_4x": "from scratch (four times the steps)",
}
RUNS = {"pretrain": "pretrain", **{f"adapt/{name}": f"adapt_{name}" for name in ADAPTED}}  # evaluation to folder
# Pretraining that met its bars ended at 0.34, pretraining that missed them at 0.77 (docs/experiments.md).
LEARNED_LOSS = 0.5

Episodes = Sequence[Mapping[str, Any]]


# Rates


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


def success(episode: Mapping[str, Any]) -> bool:
    return episode["success"]


def flag(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda episode: episode["flags"][name]


# Key in results["pretrain"] to the evaluation and what is counted of it.
PRETRAIN = {
    "success": ("natural", success),
    "success_wrong_nearest": ("wrong_nearest", success),
    "success_swapped_instruction": ("swapped", flag("reached_target")),
    "original_target_when_swapped": ("swapped", flag("reached_original")),
    "whole_task_when_swapped": ("swapped", success),
    "vision_blind": ("vision_blind", success),
    "language_blind": ("language_blind", success),
    "unseen_phrasing": ("unseen_phrasing", success),
    "shuffled_words": ("shuffled_words", success),
    "any_block_when_absent": ("absent_block", flag("reached_any")),
    "held_out_pairs": ("held_out_pairs", success),
    "seen_pairs": ("seen_pairs", success),
}


def difference(ours: Episodes, theirs: Episodes) -> dict[str, Any]:
    """{"value", "ci90"}: by how much more of `ours` succeed than of `theirs`, the same scenes in the same order."""
    a, b = [success(e) for e in ours], [success(e) for e in theirs]
    return {"value": success_rate(a) - success_rate(b), "ci90": list(difference_interval(a, b, LEVEL))}


def compute_results(
    evaluations: Mapping[str, Episodes],
    seconds: Mapping[str, float],
    training: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The contents of results.json.

    {"pretrain": {name of PRETRAIN: rate, "held_out_minus_seen": difference},
     "adapt": {"from_pretrained": {"success": rate}, "from_scratch_1x": ..., "from_scratch_4x": ..., "difference": ...},
     "training": what `read_training` found, "seconds": {stage: seconds, "total"},
     "bars": {name: {"value", "ci90", "wanted", "at_least", "met", "sentence", "look_at"}}},
    every rate as `rate` gives it.
    """
    pretrain = {key: rate(evaluations[f"pretrain/{name}"], what) for key, (name, what) in PRETRAIN.items()}
    pretrain["held_out_minus_seen"] = difference(
        evaluations["pretrain/held_out_pairs"], evaluations["pretrain/seen_pairs"]
    )
    adapt = {name: {"success": rate(evaluations[f"adapt/{name}"], success)} for name in ADAPTED}
    scratch = max(("from_scratch_1x", "from_scratch_4x"), key=lambda name: adapt[name]["success"]["value"])
    adapt["difference"] = {
        **difference(evaluations["adapt/from_pretrained"], evaluations[f"adapt/{scratch}"]),
        "against": scratch,
    }
    results = {
        "pretrain": pretrain,
        "adapt": adapt,
        "training": dict(training or {}),
        "seconds": {**seconds, "total": sum(seconds.values())},
    }
    return {**results, "bars": {bar.name: bar.check(results) for bar in BARS}}


def read_training(workdir: Path) -> dict[str, dict[str, Any]]:
    """Run to {"steps", "train_loss", "val_loss": {dataset: loss}} at its end; runs without metrics are left out."""
    found = {}
    for name, folder in RUNS.items():
        try:
            rows = read_metrics(workdir / folder)
        except FileNotFoundError:
            continue
        if losses := [value for _, value in train_losses(rows)]:
            last = losses[-max(1, len(losses) // 20) :]  # one batch says little
            validation = {dataset: points[-1][1] for dataset, points in validation_losses(rows).items()}
            found[name] = {"steps": rows[-1]["step"], "train_loss": sum(last) / len(last), "val_loss": validation}
    return found


def train_losses(rows: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """(step, loss) of training: that of the actions, where a run measures it apart from auxiliary losses."""
    key = "train/action/loss" if any("train/action/loss" in row for row in rows) else "train/loss"
    return [(row["step"], row[key]) for row in rows if key in row]


def validation_losses(rows: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Dataset to (step, loss of the actions), as measured during training and at its end."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("val/") and key.endswith("/action/loss"):
                found.setdefault(key.split("/")[1], []).append((row["step"], value))
    return found


# Bars


@dataclasses.dataclass(frozen=True)
class Bar:
    """One thing the demo sets out to show.

    Attributes:
      name: in results.json.
      path: of the measured value in the results.
      wanted: the bound, a lower one if `at_least`.
      what: continues a sentence that begins with the measured rate.
      evaluation: the section of the report's animations that shows it.
    """

    name: str
    path: tuple[str, ...]
    wanted: float
    what: str
    evaluation: str
    at_least: bool = True

    def measured(self, results: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """A rate or a difference; None when there were no such episodes."""
        value: Any = results
        for key in self.path:
            value = value.get(key, {})
        return value or None

    def met(self, results: Mapping[str, Any]) -> bool:
        """Whether the measured value is on the right side; what was not measured is not."""
        if (value := self.measured(results)) is None:
            return False
        # Rates are fractions of episodes: a bar that is hit exactly must not fail for the last bit of a float.
        over = value["value"] - self.wanted
        return over >= -1e-9 if self.at_least else over <= 1e-9

    def check(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The bar's entry of results.json."""
        value, met = self.measured(results) or {}, self.met(results)
        unit = " points" if "against" in value else "%"
        measured = self._sentence(value) if value else f"{self.name}: not measured"
        bound = f"wanted: at {'least' if self.at_least else 'most'} {100 * self.wanted:.0f}{unit}"
        return {
            "value": value.get("value"),
            "ci90": value.get("ci90"),
            "wanted": self.wanted,
            "at_least": self.at_least,
            "met": met,
            "sentence": f"{measured} ({bound}).",
            "look_at": "" if met else look_at(self, results),
        }

    def _sentence(self, value: Mapping[str, Any]) -> str:
        if "against" not in value:
            return f"{percent(value)} {self.what}"
        points, (low, high) = 100 * value["value"], (100 * x for x in value["ci90"])
        return (
            f"{self.what} {abs(points):.0f} points {'better' if points >= 0 else 'WORSE'} than the better of the "
            f"policies trained {ADAPTED[value['against']]}; 90% interval {low:+.0f} to {high:+.0f} points"
        )


BARS = (
    Bar(
        "wrong_nearest",
        ("pretrain", "success_wrong_nearest"),
        0.85,
        "of the episodes in which another block is nearest succeed",
        "pretrain/natural",
    ),
    Bar(
        "pick_and_place",
        ("pretrain", "success", "per_task", "pick_and_place"),
        0.70,
        "of the pick-and-place episodes succeed",
        "pretrain/natural",
    ),
    Bar(
        "swapped_target",
        ("pretrain", "success_swapped_instruction"),
        0.80,
        "reach the block that a swapped instruction names",
        "pretrain/swapped",
    ),
    Bar(
        "swapped_original",
        ("pretrain", "original_target_when_swapped"),
        0.05,
        "still reach the block of the original instruction",
        "pretrain/swapped",
        at_least=False,
    ),
    Bar(
        "vision_blind",
        ("pretrain", "vision_blind"),
        0.10,
        "succeed without seeing anything",
        "pretrain/natural",
        at_least=False,
    ),
    Bar(
        "language_blind",
        ("pretrain", "language_blind"),
        0.20,
        "succeed without an instruction",
        "pretrain/natural",
        at_least=False,
    ),
    Bar(
        "adaptation_difference",
        ("adapt", "difference"),
        0.30,
        "On the held-out robot the policy adapted from the pretrained one is",
        "adapt/from_pretrained",
    ),
    Bar(
        "adaptation_pick_and_place",
        ("adapt", "from_pretrained", "success", "per_task", "pick_and_place"),
        0.30,
        "of the held-out robot's pick-and-place episodes succeed after adaptation",
        "adapt/from_pretrained",
    ),
)


def percent(value: Mapping[str, Any]) -> str:
    """A rate for people: with its 90% interval."""
    low, high = value["ci90"]
    return f"{value['value']:.0%} ({low:.0%}–{high:.0%}, {value['episodes']} episodes)"


def look_at(bar: Bar, results: Mapping[str, Any]) -> str:
    """Where to begin when a bar is missed: training, the robot and task that pull the rate, their animations."""
    adapted = bar.path[0] == "adapt"
    run = "adapt/from_pretrained" if adapted else "pretrain"
    parts = [training_hint(results["training"][run], run)] if run in results["training"] else []
    whole = results["adapt"]["from_pretrained"]["success"] if adapted else results["pretrain"][bar.path[1]]
    task = bar.path[-1] if "per_task" in bar.path else ""
    if cells := {name: cell for name, cell in whole["per_embodiment_and_task"].items() if name.endswith(task)}:
        name = (min if bar.at_least else max)(cells, key=lambda cell: cells[cell]["value"])
        parts.append(f"{'Lowest' if bar.at_least else 'Highest'}: {cell_title(name)}, {percent(cells[name])}.")
    if adapted and not all(other.met(results) for other in BARS if other.path[0] == "pretrain"):
        parts.append("The pretrained policy misses bars itself: begin there.")
    parts.append(f"Animations: “{section_title(bar.evaluation)}” in report.html, failures first.")
    return "Look at: " + " ".join(parts)


def training_hint(run: Mapping[str, Any], name: str) -> str:
    """What the losses at the end of a run say."""
    loss, validation = run["train_loss"], run["val_loss"]
    text = f"The training loss of {name} ended at {loss:.2f}"
    if validation:
        worst = max(validation, key=lambda dataset: validation[dataset])
        text += f", on held-out demonstrations at {validation[worst]:.2f} ({worst})"
        if validation[worst] > 3 * loss:
            return f"{text}: demonstrations were learned by heart."
    if name == "pretrain" and loss > LEARNED_LOSS:
        text += (
            f"; policies that meet the bars end below {LEARNED_LOSS}: see in the learning curve whether it ever "
            "left its first plateau, then train longer or with another seed"
        )
    return text + "."


def cell_title(name: str) -> str:
    """ "arm/pick_and_place" for people."""
    return name.replace("/", ", ").replace("_", " ")


def section_title(evaluation: str) -> str:
    """The heading of an evaluation's animations in the report."""
    return evaluation.replace("/", ": ").replace("_", " ")
