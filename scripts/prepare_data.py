"""Indexes datasets and computes their statistics; prints what is in them.

    python scripts/prepare_data.py --data_dir runs/data tabletop_pusher tabletop_arm
    python scripts/prepare_data.py --data_dir DIR --mix bridge
    python scripts/prepare_data.py --data_dir DIR --config configs/bridge_debug.py
    python scripts/prepare_data.py --data_dir DIR my_robot --set action_key=control proprio_keys='["joints"]'

Training does this by itself when it first meets a dataset; doing it beforehand finds damaged files early. The index is
cached beside the data (or in --cache_dir): a second run takes a second, and one that was killed goes on where it was.
What will be read is said before. Several of these commands at once, on machines that share the cache, read other files
each: --host 0/4 to --host 3/4.
--check_images also decodes every frame, which takes longer than all the rest: it finds pictures that cannot be decoded
and JPEGs whose compressed data is damaged, which training would use as they come out (docs/data.md, "Damaged records").
Exit status 1: something is wrong with data or arguments, named in one line, or with the images, which are listed; or
the storage does not answer, after it was asked again for five minutes.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import json
import logging
import shlex
import sys


def arguments() -> argparse.Namespace:
    from octo_like.data.arguments import add_dataset_arguments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_dataset_arguments(parser)
    parser.add_argument("--statistics", metavar="FILE", help="also write the statistics of all datasets as JSON")
    parser.add_argument(
        "--workers", type=int, help="files that each process reads at the same time; default: up to 8, one per core"
    )
    parser.add_argument(
        "--processes", type=int, help="processes that read; default: by bytes and cores (one below 8 GB)"
    )
    parser.add_argument(
        "--beam",
        metavar="OPTIONS",
        help="read with Apache Beam (the extra `beam`) instead; options of the pipeline, e.g. "
        "'--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=8' (docs/data.md)",
    )
    parser.add_argument("--host", metavar="I/N", default="0/1", help="this is machine I of N that do the same now")
    parser.add_argument(
        "--max_bad_fraction",
        type=float,
        default=0.01,
        help="share of the records that may be damaged or invalid (default 0.01)",
    )
    parser.add_argument(
        "--check_images", action="store_true", help="decode every frame, and list those that are damaged"
    )
    given = sys.argv[1:]
    if "--beam" in given[:-1]:  # what follows it begins with dashes, and would be taken for another option
        place = given.index("--beam")
        given[place : place + 2] = [f"--beam={given[place + 1]}"]
    return parser.parse_intermixed_args(given)  # datasets may stand behind options


def main() -> int:
    args = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("octo_like").setLevel(logging.INFO)

    from octo_like.common import normalization
    from octo_like.common.config import ConfigError
    from octo_like.common.lanes import Processes
    from octo_like.common.storage import StorageError
    from octo_like.data.arguments import specs_from_arguments
    from octo_like.data.check import report
    from octo_like.data.check.images import check_images
    from octo_like.data.prepare import prepare_datasets
    from octo_like.data.settings import IndexOptions
    from octo_like.data.spec import DataError

    try:
        host, _, hosts = args.host.partition("/")
        if not (host.isdigit() and hosts.isdigit() and int(host) < int(hosts)):
            raise DataError(f"--host is I/N with I below N, e.g. 0/4, got {args.host!r}")
        options = IndexOptions(
            workers=args.workers,
            processes=args.processes,
            beam=None if args.beam is None else shlex.split(args.beam),
            max_bad_fraction=args.max_bad_fraction,
        )
        specs, these = specs_from_arguments(args), Processes(int(host), int(hosts))
        datasets = prepare_datasets(specs, args.data_dir, args.cache_dir, options=options, hosts=these)
    except (ConfigError, DataError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, prepared in datasets.items():
        print(f"\n{name}: {report.summary(prepared, args.data_dir, args.cache_dir)}")
    bad_images = 0
    for name, prepared in datasets.items() if args.check_images else ():
        found = check_images(prepared, workers=args.workers)
        bad_images += len(found.complaints)
        title = f"{name}: {len(found.complaints):,} of {found.frames:,} frames are damaged"
        print("\n" + report.listed(title, found.complaints, 50))
    print(f"\n{report.mixture_table(datasets)}")
    if args.statistics:
        with open(args.statistics, "w", encoding="utf-8") as file:
            json.dump(normalization.to_json({name: d.named_statistics for name, d in datasets.items()}), file, indent=1)
        print(f"\nstatistics: {args.statistics}")
    return 1 if bad_images else 0


if __name__ == "__main__":
    sys.exit(main())
