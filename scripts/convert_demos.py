"""Converts demonstrations to an RLDS dataset that training reads.

    python scripts/convert_demos.py --from lerobot DATASET  --to DATA_DIR --name my_robot
    python scripts/convert_demos.py --from hdf5    FOLDER   --to DATA_DIR --name my_robot --instruction "fold the towel"
    python scripts/convert_demos.py --from npz     FOLDER   --to DATA_DIR --name my_robot --control_hz 10
    python scripts/convert_demos.py --from pictures FOLDER  --to DATA_DIR --name my_pictures

Sources: `lerobot` a LeRobot dataset on disk (v3.0, v2.1, v2.0); `hdf5` a file or folder as ALOHA, robomimic and LIBERO
write them; `npz` a folder with one archive per episode. What is expected of each, and what becomes of it:
docs/demos.md. `pictures` is no recording but JSON lines (or LLaVA's JSON) beside images, with questions and answers:
docs/language.md.

Writes DATA_DIR/NAME/VERSION, whole or not at all, and beside it NAME_preview.png, a strip of frames per
episode. Memory: one episode of encoded frames. Exit status 1: something is wrong with the
recordings, named in one line.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import os
import sys

FORMATS = ("lerobot", "hdf5", "npz", "pictures")


def make_source(args):
    """The source that the arguments name."""
    if not os.path.exists(args.source):
        from octo_like.data.spec import DataError

        raise DataError(f"{args.source} does not exist")
    if args.subtasks is not None and args.format != "lerobot":
        from octo_like.data.spec import DataError

        raise DataError(
            f"--subtasks names a column of a LeRobot dataset; {args.format} recordings have one field, 'subtask'"
        )
    options = dict(instruction=args.instruction or "", **({"action_key": args.action_key} if args.action_key else {}))
    if args.format == "pictures":
        from octo_like.data.convert.pictures import Pictures

        if args.instruction or args.action_key or args.control_hz:
            from octo_like.data.spec import DataError

            raise DataError(
                "pictures have prompts, and no actions: --instruction, --action_key and --control_hz do not apply"
            )
        return Pictures(args.source, skip_broken=args.skip_broken)
    if args.format == "lerobot":
        from octo_like.data.convert.lerobot import LeRobot

        return LeRobot(args.source, tolerance=args.tolerance_s, subtasks=args.subtasks, **options)
    if args.format == "hdf5":
        from octo_like.data.convert.hdf5 import Hdf5

        return Hdf5(args.source, **options)
    from octo_like.data.convert.npz import Npz

    return Npz(args.source, **options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or file of the recordings")
    parser.add_argument("--from", dest="format", required=True, choices=FORMATS, help="their format")
    parser.add_argument("--to", dest="data_dir", required=True, metavar="DATA_DIR", help="folder of your TFDS datasets")
    parser.add_argument("--name", help="of the dataset (default: the source's, in lower case)")
    parser.add_argument("--version", default="1.0.0", help="of the dataset (default: %(default)s)")
    parser.add_argument("--instruction", help="for episodes that have none")
    parser.add_argument("--action_key", help="where the actions are, if not in action or actions")
    parser.add_argument("--control_hz", type=float, help="steps per second, where the recordings do not say it")
    parser.add_argument("--encoding", choices=("jpeg", "png"), default="jpeg", help="of frames (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG frames (default: %(default)s)")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="resize all frames")
    parser.add_argument("--bgr", nargs="*", default=[], metavar="CAMERA", help="cameras recorded blue first")
    parser.add_argument(
        "--turned",
        nargs="*",
        metavar="CAMERA",
        help="cameras whose frames are turned by 180 degrees; default: all of LIBERO's HDF5 files, no others",
    )
    parser.add_argument(
        "--missing_cameras",
        choices=("error", "mask"),
        default="error",
        help="an episode lacks a camera: end (default), or write empty frames, which training marks as missing",
    )
    parser.add_argument("--subtasks", metavar="COLUMN", help="of a LeRobot dataset that has sub-tasks in several")
    parser.add_argument(
        "--tolerance_s", type=float, default=1e-3, help="between a timestamp and its video frame (default: %(default)s)"
    )
    parser.add_argument("--skip_broken", action="store_true", help="leave out, and list, what cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of this name and version")
    return parser.parse_args()


def report_pictures(source, written, preview, picture: str) -> int:
    """Says what was written. Returns the exit status."""
    for name, count in source.unread.most_common():
        print(f"not read: the field {name!r} of {count:,} rows")
    for line in written.broken:
        print(f"left out: {line}")
    print(f"{written.directory}: {written.rows:,} rows, {written.bytes / 1e6:.1f} MB of pictures")
    if preview.save(picture):
        print(f"preview: {picture}")
    return 0


def main() -> int:
    args = arguments()

    from tqdm import tqdm

    from octo_like.data.convert.pictures import write_pictures
    from octo_like.data.convert.preview import Preview
    from octo_like.data.convert.write import Options, write_rlds
    from octo_like.data.spec import DataError

    stem = os.path.splitext(os.path.basename(os.path.normpath(args.source)))[0]
    name = args.name or "".join(c if c.isalnum() else "_" for c in stem.lower())
    preview = Preview()
    try:
        options = Options(
            encoding=args.encoding,
            quality=args.quality,
            image_size=args.image_size,
            bgr=tuple(args.bgr),
            turned=None if args.turned is None else tuple(args.turned),
            missing_cameras=args.missing_cameras,
            skip_broken=args.skip_broken,
            control_hz=args.control_hz,
            version=args.version,
            overwrite=args.overwrite,
        )
        source = make_source(args)
        print(f"{args.source}: {source.description}, {len(source)} episode(s)")
        with tqdm(total=len(source), unit="episode", disable=None) as bar:
            frames = 0

            def advance(steps: int) -> None:
                nonlocal frames
                frames += steps
                bar.set_postfix_str(f"{frames:,} steps", refresh=False)
                bar.update()

            if args.format == "pictures":
                return report_pictures(
                    source,
                    write_pictures(source, args.data_dir, name, options=options, preview=preview, advance=advance),
                    preview,
                    os.path.join(args.data_dir, f"{name}_preview.png"),
                )
            written = write_rlds(source, args.data_dir, name, options=options, preview=preview, advance=advance)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in source.left_out:
        print(f"not converted: {line}")
    for line in written.broken:
        print(f"left out: {line}")
    hz = args.control_hz or source.control_hz
    print(
        f"{written.directory}: {written.episodes} episodes, {written.steps:,} steps, "
        f"{written.bytes / 1e6:.1f} MB of frames"
    )
    print(f"cameras: {', '.join(written.cameras) or 'none'}")
    turned: tuple[str, ...] = getattr(source, "turned", ())
    if args.turned is None and turned:
        print(f"turned by 180 degrees, as LIBERO's: {', '.join(turned)} (--turned without a name: none)")
    print(f"vectors: {', '.join(f'{key} ({width})' for key, width in written.vectors.items()) or 'none'}")
    print(f"action: {written.action_dim} dimensions{'' if hz is None else f' at {hz:g} Hz'}")
    picture = os.path.join(args.data_dir, f"{name}_preview.png")
    if preview.save(picture):
        print(f"preview: {picture}")
    print(f"next: python scripts/check_demos.py --data_dir {args.data_dir} {name}  (docs/demos.md)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
