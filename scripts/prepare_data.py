"""Indexes datasets and computes their statistics; prints what is in them.

    python scripts/prepare_data.py --data_dir runs/data tabletop_pusher tabletop_arm
    python scripts/prepare_data.py --data_dir DIR --mix bridge
    python scripts/prepare_data.py --data_dir DIR --config configs/bridge_debug.py
    python scripts/prepare_data.py --data_dir DIR my_robot --set action_key=control proprio_keys='["joints"]'

Training does this by itself when it first meets a dataset; doing it beforehand finds damaged files early. The index is
cached beside the data (or in --cache_dir): a second run takes a second, and one that was killed goes on where it was.
--check_images also decodes every frame, which takes longer than all the rest: it finds pictures that cannot be decoded
and JPEGs whose compressed data is damaged, which training would use as they come out (docs/data.md, "Damaged records").
Exit status 1: something is wrong with data or arguments, named in one line, or with the images, which are listed.
"""

import argparse
import json
import sys


def main() -> int:
    from octo_like.data.arguments import add_dataset_arguments, specs_from_arguments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_dataset_arguments(parser)
    parser.add_argument("--statistics", metavar="FILE", help="also write the statistics of all datasets as JSON")
    parser.add_argument("--workers", type=int, help="files read at the same time; default: up to 8, one per core")
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.01, help="share of the records that may be damaged (default 0.01)"
    )
    parser.add_argument(
        "--check_images", action="store_true", help="decode every frame, and list those that are damaged"
    )
    args = parser.parse_args()

    from octo_like.common import normalization
    from octo_like.data import report
    from octo_like.data.image_check import check_images
    from octo_like.data.index import prepare_dataset
    from octo_like.data.spec import DataError

    try:
        datasets = {
            name: prepare_dataset(
                name,
                spec,
                args.data_dir,
                args.cache_dir,
                workers=args.workers,
                max_bad_fraction=args.max_bad_fraction,
            )
            for name, spec in specs_from_arguments(args).items()
        }
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, prepared in datasets.items():
        print(
            f"\n{name}: {prepared.directory}\n\n{report.range_table(prepared)}\n\n{report.instruction_table(prepared)}"
        )
        left_out = int(prepared.train.steps.sum()) - int(prepared.train.frames.sum())
        if left_out:
            print(f"\nfilters leave out {left_out:,} of {int(prepared.train.steps.sum()):,} training steps")
        empty, total = report.empty_episodes(prepared, args.data_dir, args.cache_dir)
        if empty:
            print(f"\n{len(empty):,} of {total:,} episodes have no steps:")
            print("\n".join(f"  {message}" for message in empty[:20]))
            if len(empty) > 20:
                print(f"  and {len(empty) - 20:,} more")
        if prepared.damaged:
            named = dict.fromkeys(prepared.damaged)  # a file that is gone says the same of each of its episodes
            print(f"\n{len(prepared.damaged)} damaged records are left out:")
            print("\n".join(f"  {message}" for message in list(named)[:20]))
    bad_images = 0
    for name, prepared in datasets.items() if args.check_images else ():
        looked = check_images(prepared, workers=args.workers)
        bad_images += len(looked.complaints)
        print(f"\n{name}: {len(looked.complaints):,} of {looked.frames:,} frames are damaged")
        print("\n".join(f"  {message}" for message in looked.complaints[:50]))
        if len(looked.complaints) > 50:
            print(f"  and {len(looked.complaints) - 50:,} more")
    print(f"\n{report.mixture_table(datasets)}")
    if args.statistics:
        with open(args.statistics, "w", encoding="utf-8") as file:
            json.dump(normalization.to_json({name: d.statistics for name, d in datasets.items()}), file, indent=1)
        print(f"\nstatistics: {args.statistics}")
    return 1 if bad_images else 0


if __name__ == "__main__":
    sys.exit(main())
