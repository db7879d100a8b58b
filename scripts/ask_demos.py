"""Asks questions about the demonstrations of any dataset: pictures with words from robots' own episodes.

    python scripts/ask_demos.py fetch --data_dir DATA --output fetch_words --episodes 150 --questions 6 \\
        --set image_keys='{"primary": "image"}' proprio_keys='["state"]' \\
        --motion "0:0.04:away from the base:towards the base" --motion 1:0.04:left:right --motion 2:0.04:up:down
    python scripts/convert_demos.py fetch_words --from pictures --to DATA --name fetch_words

Writes OUTPUT/rows.jsonl, the pictures beside it and OUTPUT/sheet.png to look at; convert_demos makes a dataset of them.
Kinds: task (what is being done), done (is it done?), next (which sub-task, where the dataset's `text_keys` have one)
and motion (which way the hand goes, where --motion says what of the proprioception that is). Prompts have the words of
the instructions: train a vocabulary that knows them (scripts/train_tokenizer.py), or use one of general English.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import json
import pathlib
import sys


def parse_motion(text: str):
    """ "ENTRY:THRESHOLD:MORE:LESS" as a Motion."""
    from octo_like.data.motions import Motion

    parts = text.split(":")
    try:
        entry, threshold, more, less = parts
        return Motion(int(entry), float(threshold), more.strip(), less.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected ENTRY:THRESHOLD:MORE:LESS, e.g. 2:0.03:up:down"
        ) from error


def rows_of(prepared, args):
    """(picture (h, w, 3) uint8, name of it, question) of a dataset, episode by episode."""
    import numpy as np

    from octo_like.common import normalization
    from octo_like.data.check.numbers import spread
    from octo_like.data.check.pictures import cameras, pictures, present, read_words
    from octo_like.data.convert.questions import questions
    from octo_like.data.spec import DataError, suggest

    if args.camera not in cameras(prepared):
        raise DataError(f"{prepared.key}: no camera {args.camera!r}; {suggest(args.camera, cameras(prepared))}")
    if args.motion and not prepared.spec.proprio_keys:
        raise DataError(f"{prepared.key}: --motion is about the proprioception, and its spec has no proprio_keys")
    for number in spread(len(prepared.train), args.episodes):
        episode, texts, targets = read_words(prepared, prepared.train, number, [args.camera])
        places = None
        if args.motion:
            kind = prepared.spec.normalization
            places = normalization.unnormalize(episode.proprio, prepared.statistics["proprio"], kind)
        asked = questions(
            texts,
            np.random.default_rng([args.seed, int(number)]),
            count=args.questions,
            subtasks=targets if "subtask" in prepared.spec.text_keys else (),
            places_td=places,
            motions=args.motion,
            steps_ahead=args.steps_ahead,
            finished=not args.unfinished,
        )
        stored = episode.images[args.camera]
        asked = [one for one in asked if present(stored)[one.step]]
        if asked:
            steps = [one.step for one in asked]
            images = pictures(prepared, args.camera, stored, steps, tuple(args.image_size))
            for image, one in zip(images, asked, strict=True):
                yield image, f"{prepared.key}/{number:06}_{one.step:04}.png", one


def write(datasets, args, folder: pathlib.Path) -> int:
    """Writes the rows of all datasets into a folder; returns how many."""
    from PIL import Image
    from tqdm import tqdm

    from octo_like.data.spec import DataError

    shown, count = [], 0
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for prepared in datasets.values():
            (folder / prepared.key).mkdir()
            total = min(args.episodes, len(prepared.train)) * args.questions
            for image, name, one in tqdm(rows_of(prepared, args), total=total, desc=prepared.key, unit="row"):
                Image.fromarray(image).save(folder / name)
                row = {"image": name, "prompt": one.prompt, "answer": one.answer, "kind": one.kind}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
                if count % max(1, total // 12) == 0 and len(shown) < 24:
                    shown.append((image, one))
    if not count:
        raise DataError(f"{', '.join(datasets)}: no question can be asked: no step has an instruction and a picture")
    _sheet(shown, folder / "sheet.png")
    return count


def _sheet(shown, path: pathlib.Path, columns: int = 6) -> None:
    import textwrap

    from matplotlib.figure import Figure

    if not shown:
        return
    height = -(-len(shown) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.2 * height))
    for axis in (axes := figure.subplots(height, columns, squeeze=False).ravel()):
        axis.axis("off")
    for axis, (image, one) in zip(axes, shown, strict=False):
        axis.imshow(image)
        axis.set_title(f"{textwrap.fill(one.prompt, 32)}\n> {textwrap.fill(one.answer, 30)}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> int:
    from octo_like.data.arguments import add_dataset_arguments, specs_from_arguments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_dataset_arguments(parser)
    parser.add_argument("--output", required=True, type=pathlib.Path, help="a folder that is not there yet")
    parser.add_argument("--episodes", type=int, default=200, help="of each dataset, at most (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=4, help="about each episode (default: %(default)s)")
    parser.add_argument("--camera", default="primary", help="whose pictures (default: %(default)s)")
    parser.add_argument("--image_size", type=int, nargs=2, default=(128, 128), metavar=("H", "W"))
    parser.add_argument(
        "--motion",
        type=parse_motion,
        action="append",
        default=[],
        metavar="ENTRY:THRESHOLD:MORE:LESS",
        help="of the proprioception, in its units; once for each direction",
    )
    parser.add_argument("--steps_ahead", type=int, default=8, help="that a motion is about (default: %(default)s)")
    parser.add_argument(
        "--unfinished", action="store_true", help="the last step does not show that it is done: that is not asked"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    if min(args.episodes, args.questions, args.steps_ahead, *args.image_size) < 1:
        parser.error("--episodes, --questions, --steps_ahead and --image_size must be at least 1")

    from octo_like.common.config import ConfigError
    from octo_like.common.files import whole_folder
    from octo_like.common.storage import StorageError
    from octo_like.data.prepare import prepare_dataset
    from octo_like.data.spec import DataError

    if args.output.exists():
        parser.error(f"{args.output} is there already: name another folder, or remove it")
    try:
        specs = specs_from_arguments(args)
        datasets = {name: prepare_dataset(name, spec, args.data_dir, args.cache_dir) for name, spec in specs.items()}
        if mute := [name for name, prepared in datasets.items() if not prepared.seekable]:
            raise DataError(f"{mute[0]}: only datasets of files can be asked about")
        with whole_folder(args.output) as folder:
            count = write(datasets, args, folder)
    except (ConfigError, DataError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} rows in {args.output / 'rows.jsonl'}")
    print(f"next: python scripts/convert_demos.py {args.output} --from pictures --to {args.data_dir} --name NAME")
    return 0


if __name__ == "__main__":
    sys.exit(main())
