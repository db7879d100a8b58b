"""Datasets as text and pictures, for people: what is in them, and what a model gets to see."""

import concurrent.futures
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from octo_like.common import normalization, pages
from octo_like.common.pages import text_table
from octo_like.data.check.numbers import spread
from octo_like.data.check.pictures import cameras, function_of, pictures, read_episode, read_words
from octo_like.data.prepared import PreparedDataset
from octo_like.data.rlds import records
from octo_like.data.rlds.cache import load_index
from octo_like.data.rlds.index import Index

COLUMNS = ("min", "p01", "mean", "std", "p99", "max")


def empty_episodes(prepared: PreparedDataset, data_dir: str, cache_dir: str | None = None) -> tuple[list[str], int]:
    """(one "file: episode k" per episode without steps, number of all episodes) of a prepared dataset's splits.

    Episodes of which the standardize function leaves nothing are among them, and say so. Read from the index.
    """
    spec = prepared.spec
    if not prepared.seekable:
        return [], 0
    messages, total = [], 0
    for name in dict.fromkeys([spec.split, *([spec.val_split] if spec.val_split is not None else [])]):
        split = records.open_split(spec.name, data_dir, spec.version, name, max_bad_fraction=1.0)
        index = load_index(split, function_of(prepared), cache_dir, False, max_bad_fraction=1.0).index
        total += len(index)
        for number in np.flatnonzero(index.steps == 0):
            left = f" ({index.raw_steps[number]} recorded, none after standardize)" if index.raw_steps[number] else ""
            messages.append(f"{index.files[index.file[number]]}: episode {index.record[number]}{left}")
    return messages, total


def mixture_rows(
    datasets: Mapping[str, PreparedDataset], samples: int | None = None
) -> tuple[list[str], list[list[str]]]:
    """(header, one row per dataset): weight, episodes, steps, bytes, cameras, instructions.

    Args:
      samples: of the whole run (steps x batch size), for the passes through each dataset; None: left out.
    """
    total = sum(d.spec.weight for d in datasets.values()) or 1.0
    header = ["dataset", "version", "weight", "train", "val", "steps", "length", "GB", "action", "proprio"]
    header += ["cameras", "depth", "texts", *(["passes"] if samples is not None else [])]
    rows = []
    for name, d in datasets.items():
        episodes, steps = len(d.train), int(d.train.frames.sum(dtype=np.int64))
        if not d.seekable:  # it has no files, and the numbers of its index mean nothing
            episodes, steps = d.statistics["num_trajectories"], d.statistics["num_transitions"]
        cameras, depths = (
            [slot for slot, key in keys.items() if key is not None] for keys in (d.spec.image_keys, d.spec.depth_keys)
        )
        weight = d.spec.weight / total
        row = [name, d.version, f"{weight:.3f}", f"{episodes:,}", f"{len(d.val):,}", f"{steps:,}"]
        row += [
            f"{steps / max(episodes, 1):.1f}",
            f"{d.train.length.sum(dtype=np.int64) / 1e9:.3g}" if d.seekable else "-",
        ]
        row += [str(d.function.action_dim), str(d.function.proprio_dim or "-"), ",".join(cameras) or "-"]
        row += [",".join(depths) or "-", f"{len([text for text in d.instructions if text]):,}"]
        if samples is not None:
            row.append(f"{samples * weight / max(steps, 1):.3g}" if d.seekable else "-")
        rows.append(row)
    return header, rows


def mixture_table(datasets: Mapping[str, PreparedDataset], samples: int | None = None) -> str:
    """`mixture_rows` as text."""
    header, rows = mixture_rows(datasets, samples)
    return text_table([header, *rows])


def range_table(prepared: PreparedDataset) -> str:
    """Statistics of each dimension of action, proprioception and other sensors, in physical units, over the training
    episodes."""
    rows = [["dimension", *COLUMNS, "normalised"]]
    of = {key: prepared.statistics.get(key) for key in ("action", "proprio")} | prepared.statistics.get("extra", {})
    for key, stats in of.items():
        if stats is None:
            continue
        named = prepared.dimensions.get(key)
        labels = [f"{key}[{d}]" for d in range(len(stats["mean"]))] if named is None else named.numbered(key)
        for d, label in enumerate(labels):
            how = prepared.spec.normalization if stats["mask"][d] else "no"
            how = "constant" if stats["mask"][d] and stats["min"][d] == stats["max"][d] else how
            rows.append([label, *(f"{stats[c][d]:.4g}" for c in COLUMNS), how])
    return text_table(rows)


def instruction_table(prepared: PreparedDataset, limit: int = 10) -> str:
    """The most frequent instructions and the number of episodes that have them."""
    ranked = sorted(prepared.instructions.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{count:7,}  {text or '(none)'}" for text, count in ranked[:limit]]
    return "\n".join(lines + ([f"         and {len(ranked) - limit:,} more"] if len(ranked) > limit else []))


def listed(title: str, messages: Sequence[str], limit: int) -> str:
    """A title and, below it, the first messages and how many more there are."""
    more = [f"  and {len(messages) - limit:,} more"] if len(messages) > limit else []
    return "\n".join([title, *(f"  {message}" for message in messages[:limit]), *more])


def summary(prepared: PreparedDataset, data_dir: str, cache_dir: str | None = None) -> str:
    """Where a dataset is, its ranges and instructions, and what of it is not used."""
    parts = [prepared.directory, range_table(prepared), instruction_table(prepared)]
    steps, usable = int(prepared.train.steps.sum()), int(prepared.train.frames.sum())
    if steps > usable:
        parts.append(f"filters leave out {steps - usable:,} of {steps:,} training steps")
    empty, total = empty_episodes(prepared, data_dir, cache_dir)
    if empty:
        parts.append(listed(f"{len(empty):,} of {total:,} episodes have no steps:", empty, 20))
    if prepared.damaged:
        # A file that is gone says the same of each of its episodes.
        messages = list(dict.fromkeys(prepared.damaged))
        title = f"{len(prepared.damaged)} damaged or invalid records are left out:"
        parts.append(listed(title, messages, 20))
    return "\n\n".join(parts)


def contact_sheet(
    prepared: PreparedDataset, index: Index, path: str, *, episodes: int = 4, columns: int = 6, size: int = 96
) -> None:
    """Writes a PNG: for some episodes, frames of every camera with the instruction, and the actions over time.

    Args:
      index: `prepared.train` or `prepared.val`.
      path: file to write.
      episodes: how many, spread over the index.
      columns: frames per episode and camera.
      size: height and width of a frame in the picture.

    The actions are drawn in physical units (solid) and, right of them, as the model sees them.
    """
    # A figure of its own: pyplot's state, and the back end that a notebook has chosen, stay as they are.
    from matplotlib.figure import Figure

    slots, chosen = cameras(prepared), spread(len(index), episodes)
    height = max(1, len(slots))
    figure = Figure(figsize=(17, 1.4 + len(chosen) * max(2.2, 1.7 * height)))
    axes = figure.subplots(len(chosen), 3, width_ratios=[3.2, 1.2, 1.2], squeeze=False)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(lambda number: read_words(prepared, index, number, slots), chosen))
    for row, (number, (episode, texts, said)) in enumerate(zip(chosen, loaded, strict=True)):
        steps = np.unique(np.linspace(0, len(episode.action) - 1, columns).astype(int))
        strip = np.full((height * (size + 2), columns * (size + 2), 3), 255, np.uint8)
        for r, slot in enumerate(slots):
            stored = episode.images[slot]
            for c, image in enumerate(pictures(prepared, slot, stored, steps, (size, size))):
                y, x = r * (size + 2), c * (size + 2)
                strip[y : y + size, x : x + size] = image
        shown, physical, seen = axes[row]
        shown.imshow(strip)
        shown.set_title(
            f"{texts[0] or '(no instruction)'}   [episode {number}, {len(episode.action)} steps]", fontsize=9
        )
        shown.set_ylabel(" / ".join(reversed(slots)), fontsize=8)
        labels = [f"t={s}" + (f"\n{textwrap.fill(said[s], 18)}" if said[s] else "") for s in steps]
        shown.set_xticks([(c + 0.5) * (size + 2) for c in range(len(steps))], labels, fontsize=7)
        shown.set_yticks([])
        normalised = episode.action if episode.action.ndim == 2 else episode.action[:, 0]
        raw = normalization.unnormalize(normalised, prepared.statistics["action"], prepared.spec.normalization)
        for axis, values, title in (
            (physical, raw, "action, physical units"),
            (seen, normalised, "action, normalised"),
        ):
            for d, label in enumerate(prepared.dimensions["action"].labels):
                axis.plot(values[:, d], lw=1, label=label)
            axis.tick_params(labelsize=7)
            axis.set_title(title, fontsize=8)
            axis.xaxis.get_major_locator().set_params(integer=True)
        # Beside the last panel: within one it would lie over what it explains.
        seen.legend(fontsize=6, ncols=1 + len(seen.lines) // 16, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{prepared.key}  {prepared.version}", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=90)


def question_sheet(
    prepared: PreparedDataset, index: Index, path: str, *, rows: int = 24, columns: int = 6, size: int = 160
) -> None:
    """Writes a PNG of pictures with words: questions and answers above what they are about.

    Args:
      index: `prepared.train` or `prepared.val`.
      rows: pictures, spread over the index. columns: of the sheet. size: height and width of a picture.
    """
    from matplotlib.figure import Figure

    slots, chosen = cameras(prepared), spread(len(index), rows)
    height = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.4 * columns, 0.6 + 3.1 * height))
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, number in zip(axes, chosen, strict=False):
        episode, asked, answers = read_words(prepared, index, number, slots)
        views = [pictures(prepared, slot, episode.images[slot], [0], (size, size))[0] for slot in slots]
        axis.imshow(np.concatenate(views, axis=1) if views else np.full((size, size, 3), 255, np.uint8))
        answer = "\n".join(textwrap.wrap(answers[0] or "(no answer)", 30))
        axis.set_title(f"{textwrap.fill(asked[0] or '(no question)', 30)}\n{answer}", fontsize=8)
    figure.suptitle(f"{prepared.key}  {prepared.version}", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=90)


def action_histograms(prepared: PreparedDataset, index: Index, path: str, *, episodes: int = 64) -> None:
    """Writes a PNG: for each action dimension the histogram in physical units and, below it, as a model sees it.

    Args:
      index: `prepared.train` or `prepared.val`.
      episodes: read for it, spread over the index; their frames are not decoded.
    """
    # A figure of its own: pyplot's state, and the back end that a notebook has chosen, stay as they are.
    from matplotlib.figure import Figure

    chosen = spread(len(index), episodes)
    read = [read_episode(prepared, index, number, ())[0].action for number in chosen]
    normalised = np.concatenate([action.reshape(-1, prepared.function.action_dim) for action in read])
    statistics = prepared.statistics["action"]
    physical = normalization.unnormalize(normalised, statistics, prepared.spec.normalization)
    width = normalised.shape[1]
    figure = Figure(figsize=(1.2 + 1.9 * width, 3.6))
    axes = figure.subplots(2, width, squeeze=False)
    for row, (values, label) in enumerate(((physical, "physical units"), (normalised, "normalised"))):
        for d in range(width):
            axis = axes[row, d]
            axis.hist(values[:, d], bins=40, color=("#4472a8", "#c8743c")[row])
            axis.tick_params(labelsize=6)
            axis.set_yticks([])
            if row == 0:
                title = prepared.dimensions["action"].numbered("action")[d].replace(" ", "\n", 1)
                axis.set_title(title + ("" if statistics["mask"][d] else "\n(not normalised)"), fontsize=7)
        axes[row, 0].set_ylabel(label, fontsize=8)
    figure.suptitle(f"{prepared.key}: {len(normalised):,} actions of {len(chosen)} episodes", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=90)


def html_page(
    datasets: Mapping[str, PreparedDataset], files: Mapping[str, Sequence[str]], samples: int | None = None
) -> str:
    """One self-contained HTML page: the mixture, and for each dataset its pictures, ranges and instructions.

    Args:
      files: dataset -> PNG files, which are put into the page.
      samples: see `mixture_rows`.
    """
    header, rows = mixture_rows(datasets, samples)
    note = f"<p>passes: in a run of {samples:,} samples</p>" if samples is not None else ""
    sections = [("", pages.html_table([header, *rows]) + note)]
    for name, prepared in datasets.items():
        shown = [pages.html_picture(path) for path in files.get(name, ())]
        shown += [pages.html_text(range_table(prepared)), pages.html_text(instruction_table(prepared))]
        sections.append((name, "".join(shown)))
    return pages.html_document("Mixture", sections)
