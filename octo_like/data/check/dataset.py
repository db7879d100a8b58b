"""A dataset before training: everything that `check_numbers` and `check_frames` find, as text, pictures and a page."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from octo_like.common import pages
from octo_like.common.pages import Finding, findings_text
from octo_like.common.robot import Description
from octo_like.data.check import frames, mixups, report
from octo_like.data.check.numbers import LAGS, Numbers, Relation, check, idle_steps
from octo_like.data.prepare import values_of, whole_split
from octo_like.data.prepared import PreparedDataset
from octo_like.data.rlds import records
from octo_like.data.rlds.index import Index
from octo_like.data.spec import DataError


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found in one dataset.

    Attributes:
      findings: warnings first.
      relations: of action dimensions with proprioception.
      facts: (name, value) lines for the summary.
      hz: steps per second: the robot's, else what the conversion recorded, else what the timestamps say; or None.
    """

    prepared: PreparedDataset
    numbers: Numbers
    findings: list[Finding]
    relations: list[Relation]
    facts: list[tuple[str, str]]
    hz: float | None

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.warning]


def check_dataset(
    prepared: PreparedDataset,
    data_dir: str,
    cache_dir: str | None = None,
    *,
    horizon: int | None = None,
    episodes: int = frames.EPISODES,
) -> Checked:
    """All checks on the training episodes of a dataset.

    Args:
      horizon: actions in a chunk, to compare with the episodes' lengths.
      episodes: whose frames are read; numbers are of all.

    Raises:
      DataError: the dataset is a tf.data source, which cannot be looked up.
    """
    spec = prepared.spec
    if not prepared.seekable:
        raise DataError(f"{prepared.key}: a tf.data source cannot be checked; only datasets on disk can")
    if spec.action_key is None:
        raise DataError(f"{prepared.key}: no actions to check; scripts/show_data.py shows pictures with their words")
    description = None if spec.robot is None else Description.from_json(spec.robot)
    split = records.open_split(spec.name, data_dir, spec.version, spec.split, max_bad_fraction=1.0)
    times = frames.timestamps(split, prepared.train, episodes=episodes)
    hz = description.control_hz if description else _recorded_hz(split) or _rate(times)
    whole = whole_split(prepared, spec.split, data_dir, cache_dir)
    actions, proprios, digests = [], [], []
    for number, action, proprio in values_of(prepared, prepared.train, whole):
        digests.append(((prepared.train, number), mixups.digest(action, proprio)))
        if len(action):
            actions.append(action[:, 0] if action.ndim == 3 else action)
            proprios.append(proprio)
    if len(prepared.val):
        val_whole = whole if spec.val_split is None else whole_split(prepared, spec.val_split, data_dir, cache_dir)
        for number, action, proprio in values_of(prepared, prepared.val, val_whole):
            digests.append(((prepared.val, number), mixups.digest(action, proprio)))
    mask = np.asarray(prepared.statistics["action"]["mask"], bool)
    names = prepared.dimensions["action"].names
    numbers = Numbers(actions, proprios if proprios[0].shape[1] else None, mask, description, hz, horizon, names)
    findings, relations = check(numbers)
    findings += mixups.check_pairing(numbers) + mixups.check_short(whole.index.raw_steps)
    cameras = [slot for slot, key in spec.image_keys.items() if key is not None]
    looks = {slot: frames.look(prepared, prepared.train, slot, episodes=episodes) for slot in cameras}
    for slot, seen in looks.items():
        findings += frames.check_camera(slot, seen)
    findings += mixups.check_cameras({slot: seen.thumbnails for slot, seen in looks.items()})
    if not cameras:
        findings.append(Finding("no_camera", "no image_keys: a policy would see nothing"))
    if times is not None:
        findings += frames.check_times(times, hz)
    labelled = np.asarray(prepared.train.has_language)
    findings += frames.check_words(prepared.instructions, labelled, spec.language_key is not None)
    findings += _copies(prepared, digests)
    findings.sort(key=lambda finding: not finding.warning)
    return Checked(
        prepared, numbers, findings, relations, _facts(prepared, numbers, relations, hz, times, labelled), hz
    )


def _copies(prepared: PreparedDataset, digests: Sequence[tuple[tuple[Index, int], str]]) -> list[Finding]:
    """Copies among the training and held-out episodes: ((index, number), digest of its numbers) of each."""
    places = [place for place, _ in digests]
    copies = mixups.find_copies(
        [key for _, key in digests],
        lambda first, second: frames.same_pictures(prepared, places[first], places[second]),
    )
    names = [index.where(number) for index, number in places]
    return mixups.check_copies(copies, names, [index is prepared.val for index, _ in places])


def _recorded_hz(split: records.RldsSplit) -> float | None:
    """What convert_demos.py wrote into the dataset's metadata."""
    import tensorflow_datasets as tfds

    metadata = tfds.builder_from_directory(split.directory).info.metadata
    value = metadata.get("control_hz") if metadata else None
    return float(value) if value else None


def _rate(times: Sequence[np.ndarray] | None) -> float | None:
    steps = np.concatenate([np.diff(t) for t in times]) if times else np.zeros(0)
    return float(1 / np.median(steps)) if len(steps) and np.median(steps) > 0 else None


def _facts(prepared, numbers, relations, hz, times, labelled) -> list[tuple[str, str]]:
    lengths = np.array([len(a) for a in numbers.actions])
    idle = idle_steps(numbers, relations)
    seconds = f", {lengths.min() / hz:.1f} to {lengths.max() / hz:.1f} s" if hz else ""
    texts = len([text for text in prepared.instructions if text.strip()])
    facts = [
        ("training episodes", f"{len(prepared.train)} ({len(prepared.val)} held out)"),
        ("steps", f"{lengths.sum():,}; {lengths.min()} to {lengths.max()} per episode{seconds}"),
        ("control rate", f"{hz:.4g} Hz" if hz else "unknown"),
        ("idle steps", f"{idle.mean():.1%}"),
        ("instructions", f"{texts} different; {labelled.mean():.0%} of the episodes have one"),
    ]
    if times is not None:
        steps = np.concatenate([np.diff(t) for t in times])
        if len(steps):
            facts.append(("time between steps", f"{np.median(steps):.4f} s (largest {steps.max():.4f} s)"))
    return facts


# ---------------------------------------------------------------- as text, picture and page


def relation_table(checked: Checked) -> str:
    """What each action dimension looks like, beside what it is declared to be."""
    n = checked.numbers
    rows = [["action", "declared", "moves", "level", "change", "lag", "looks"]]
    for r in checked.relations:
        lag = str(LAGS[r.curve.argmax()]) if r.curve.max() > 0.5 else "-"
        kind = n.kind(r.action) or "-"
        looks = "-" if n.is_gripper(r.action) else r.looks or "unclear"
        rows.append([n.name(r.action), kind, f"proprio[{r.proprio}]", f"{r.level:.2f}", f"{r.change:.2f}", lag, looks])
    return pages.text_table(rows)


def summary(checked: Checked) -> str:
    """Everything as text: facts, ranges, relations, instructions, findings."""
    prepared = checked.prepared
    parts = [f"{prepared.key}: {prepared.directory}"]
    parts.append("\n".join(f"{name:<20}{value}" for name, value in checked.facts))
    if prepared.spec.robot is not None:
        parts.append(Description.from_json(prepared.spec.robot).describe())
    parts.append(report.range_table(prepared))
    if checked.relations:
        parts.append(relation_table(checked))
    parts.append(report.instruction_table(prepared))
    parts.append(findings_text(checked.findings))
    return "\n\n".join(parts)


def lag_plot(checked: Checked, path: str) -> bool:
    """Writes a PNG of the correlation of actions with motion by lag; False when there is nothing to draw."""
    from matplotlib.figure import Figure

    drawn = [r for r in checked.relations if r.curve.max() > 0.3 and not checked.numbers.is_gripper(r.action)]
    if not drawn:
        return False
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.subplots()
    for r in drawn:
        axis.plot(LAGS, r.curve, marker=".", label=checked.numbers.name(r.action))
    axis.axvline(0, color="#888", lw=0.8)
    axis.set(xlabel="steps from command to motion", ylabel="correlation", xticks=LAGS)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=90)
    return True


def write_page(checked: Checked, folder: str, *, episodes: int = 6) -> str:
    """Writes FOLDER/NAME.html, which holds everything, and its pictures as PNG. Returns the page's path."""
    os.makedirs(folder, exist_ok=True)
    prepared = checked.prepared
    stem = os.path.join(folder, prepared.key)
    pictures = [f"{stem}.png", f"{stem}_actions.png"]
    report.contact_sheet(prepared, prepared.train, pictures[0], episodes=episodes)
    report.action_histograms(prepared, prepared.train, pictures[1])
    if lag_plot(checked, f"{stem}_lag.png"):
        pictures.append(f"{stem}_lag.png")
    sections = [("", pages.html_findings(checked.findings))]
    sections.append(("What it is", pages.html_table([["", ""], *map(list, checked.facts)])))
    if prepared.spec.robot is not None:
        text = Description.from_json(prepared.spec.robot).describe()
        sections.append(("What its numbers mean", pages.html_text(text)))
    sections.append(("Episodes", pages.html_picture(pictures[0])))
    sections.append(("Ranges", pages.html_text(report.range_table(prepared)) + pages.html_picture(pictures[1])))
    if checked.relations:
        body = pages.html_text(relation_table(checked)) + "".join(map(pages.html_picture, pictures[2:]))
        sections.append(("Actions and what they move", body))
    sections.append(("Instructions", pages.html_text(report.instruction_table(prepared, limit=50))))
    path = f"{stem}.html"
    with open(path, "w", encoding="utf-8") as file:
        file.write(pages.html_document(f"Demonstrations: {prepared.key} {prepared.version}", sections))
    return path
