"""Draws episodes of datasets: frames of every camera, instruction, actions in physical units and as a model sees them.

    python scripts/show_data.py --data_dir runs/data --config configs/tabletop.py --output runs/look
    python scripts/show_data.py --data_dir runs/data my_robot --set image_keys='{"primary": "image"}' --episodes 8

Writes per dataset one PNG of episodes and one of action histograms, before and after normalisation, and index.html with
all of them, the mixture table and the ranges. Look at it before you train: wrong cameras, swapped colours, shifted
actions and missing instructions are seen at once.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import os
import sys


def main() -> int:
    from octo_like.data.arguments import add_dataset_arguments, specs_from_arguments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_dataset_arguments(parser)
    parser.add_argument("--output", default="runs/show_data", help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=4, help="episodes per dataset (default: %(default)s)")
    parser.add_argument("--val", action="store_true", help="validation episodes instead of training episodes")
    parser.add_argument(
        "--samples", type=int, help="of the run (steps x batch size), to show passes (default: config's)"
    )
    args = parser.parse_intermixed_args()  # datasets may stand behind options

    from octo_like.common.config import ConfigError, load_config
    from octo_like.common.storage import StorageError
    from octo_like.data.check import report
    from octo_like.data.prepare import prepare_dataset
    from octo_like.data.spec import DataError

    os.makedirs(args.output, exist_ok=True)
    try:
        samples = args.samples
        if samples is None and args.config:
            config = load_config(args.config)
            if config.num_steps is not None:  # else it is derived from the data when training starts
                samples = config.num_steps * config.batch_size
        datasets, files = {}, {}
        for name, spec in specs_from_arguments(args).items():
            prepared = datasets[name] = prepare_dataset(name, spec, args.data_dir, args.cache_dir)
            if not prepared.seekable:
                continue  # trajectories of a tf.data.Dataset cannot be looked up; its numbers are shown
            index = prepared.val if args.val else prepared.train
            if not len(index):
                raise DataError(f"{name}: no validation episodes (val_fraction is 0)")
            sheet, histograms = (os.path.join(args.output, f"{name}{end}.png") for end in ("", "_actions"))
            if spec.action_key is None:
                report.question_sheet(prepared, index, sheet, rows=6 * args.episodes)
                files[name] = (sheet,)
            else:
                report.contact_sheet(prepared, index, sheet, episodes=args.episodes)
                report.action_histograms(prepared, index, histograms)
                files[name] = (sheet, histograms)
            print(*files[name], sep="\n")
        page = os.path.join(args.output, "index.html")
        with open(page, "w", encoding="utf-8") as file:
            file.write(report.html_page(datasets, files, samples))
        print(page)
        print(report.mixture_table(datasets, samples))
    except (ConfigError, DataError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
