"""Measures the input stream against the cost of decoding alone, interleaved in one run.

    python scripts/bench_input.py --data_dir runs/bench --make 8                      # writes datasets and uses them
    python scripts/bench_input.py --data_dir runs/bench --make 8 --raw 480x640 --decode fast
    python scripts/bench_input.py --data_dir DIR --mix bridge
    python scripts/bench_input.py --data_dir DIR --config configs/octo_small.py

The stream is what train.py builds (`inputs_from_config`). A round runs the stream for `--seconds`, then each floor
for as long; ratios are medians over the rounds, so a busy machine slows both sides of each. The floors are bare tf.data
loops over frames that the stream itself decoded, with the same number of threads; they throw the pixels away:

    plain     full decoding only, no resizing: the floor of parity mode (aim: 0.60)
    own       the decode operations of the mode only, reduced JPEG decoding in fast mode, no resizing (aim: 0.85)
    resized   those operations and tf.image.resize to the wanted sizes

The last line is JSON.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import json
import logging
import sys
import time

import numpy as np


def main() -> int:
    from octo_like.common.config import ConfigError
    from octo_like.common.storage import StorageError
    from octo_like.data import bench
    from octo_like.data.arguments import add_dataset_arguments, specs_from_arguments
    from octo_like.data.spec import DataError, specs_from_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_dataset_arguments(parser)
    parser.add_argument("--make", type=int, metavar="N", help="write N synthetic datasets to DATA_DIR and use them")
    parser.add_argument("--raw", type=_size, default=(256, 256), help="their frames, HxW (default: 256x256)")
    parser.add_argument("--episodes", type=int, default=16, help="of the smallest; number i has i times as many")
    parser.add_argument(
        "--sizes", nargs="*", default=["primary=256x256", "wrist=128x128"], help="of cameras in batches"
    )
    parser.add_argument("--decode", default="parity", help="parity or fast (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of the stream and of each floor")
    parser.add_argument("--memory_gb", type=float, default=2.0, help="config.data.host_memory_gb")
    parser.add_argument("--seconds", type=float, default=6.0, help="per measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_seconds", type=float, default=10.0, help="of the stream alone, for its peak memory")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)

    try:
        if args.make:
            names = bench.make_datasets(args.data_dir, args.make, size=args.raw, episodes=args.episodes)
            specs = specs_from_config({name: bench.bench_fields(name) for name in names})
        else:
            specs = specs_from_arguments(args)
        result = measure(args, specs)
    except (ConfigError, DataError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


def _size(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def measure(args: argparse.Namespace, specs: dict) -> dict:
    """Runs stream and floors in turns and prints what they did; the numbers of the last line."""
    from octo_like.common.text import TextTokenizer
    from octo_like.common.vocabularies import targets_of
    from octo_like.data import bench, inputs
    from octo_like.data.prepare import prepare_datasets

    # Indexing is done once per dataset, not once per run: it is not part of what is measured.
    prepared = prepare_datasets(specs, args.data_dir, args.cache_dir)
    config, spec = run_config(args, specs, prepared)
    tokenizer = TextTokenizer.load(config.text.model, config.text.max_length)
    base = bench.resident_bytes()
    watch = bench.Decodes(keep=2048)
    # Memory first, of the stream alone: the floors hold frames of their own.
    with bench.PeakMemory() as memory:
        start = time.perf_counter()
        run = inputs.inputs_from_config(config, spec, tokenizer, targets=targets_of(config.model))
        stream = run.stream
        next(stream)
        first = time.perf_counter() - start
        bench.timed(lambda: len(next(stream)["sample_id"]), args.memory_seconds)
    with watch.watching():
        stream.seek(stream.position)
        while len(watch.kept) < 2048:
            next(stream)
        rates = rounds(args, stream, watch)
        order = stream.order
        stream.close()
    ratio = {kind: [s / f for s, f in zip(rates["decodes"], rates[kind], strict=True)] for kind in FLOORS}
    # Far from the start, where neither a buffer nor the order is fresh.
    later = 3 * bench.frames_held(order) // order.batch_size * order.batch_size
    memory_frames = bench.frames_held(order, later)
    distinct = bench.distinct_in_order(order, start=later)
    buffered = bench.distinct_in_buffer(order, memory_frames, start=later)
    # A buffer's sample carries its window and its goal: as many frames in memory are fewer samples.
    in_memory = bench.distinct_in_buffer(
        order, memory_frames // (spec.window_size + bool(spec.goal_images)), start=later
    )
    result = {
        "decode": args.decode,
        "datasets": len(specs),
        "episodes": int(sum(len(d.train) for d in prepared.values())),
        "threads": args.threads,
        "samples_per_s": float(np.median(rates["samples"])),
        "decodes_per_s": float(np.median(rates["decodes"])),
        "decodes_per_sample": float(np.sum(rates["decodes"]) / np.sum(rates["samples"])),
        **{f"floor_{kind}_per_s": float(np.median(rates[kind])) for kind in FLOORS},
        **{f"ratio_{kind}": float(np.median(ratio[kind])) for kind in FLOORS},
        "first_batch_s": first,
        "rss_base_gb": base / 2**30,
        "rss_declared_gb": args.memory_gb,
        "rss_peak_gb": memory.peak / 2**30,
        "frames_held": memory_frames,
        "distinct_episodes_per_1000": distinct,
        "distinct_in_shuffle_buffer": buffered,
        "distinct_ratio": distinct / buffered,
        "distinct_ratio_same_memory": distinct / in_memory,
        "visits": [data.visits for data in order.datasets],
    }
    print(f"{len(specs)} datasets, {result['episodes']:,} episodes, decode={args.decode}, {args.threads} threads")
    print(f"stream   {result['samples_per_s']:9.1f} samples/s {result['decodes_per_s']:9.1f} decodes/s", end="")
    print(f"   ({result['decodes_per_sample']:.2f} decodes per sample)")
    for kind in FLOORS:
        spread = f"{min(ratio[kind]):.2f} to {max(ratio[kind]):.2f}"
        print(f"floor {kind:8s} {result[f'floor_{kind}_per_s']:26.1f} decodes/s   ratio ", end="")
        print(f"{result[f'ratio_{kind}']:.3f} ({spread} over {args.rounds} rounds)")
    print(f"first batch {first:.2f} s once indexed (tracing included)")
    print(
        f"memory      base {base / 2**30:.2f} GB, declared {args.memory_gb:.2f} GB, peak {result['rss_peak_gb']:.2f} GB"
    )
    print(
        f"mixing      {distinct:.0f} distinct episodes per 1,000 samples; a shuffle buffer of as many samples as ",
        end="",
    )
    print(f"{memory_frames:,} frames gives {buffered:.0f} (ratio {distinct / buffered:.3f}),")
    print(f"            one of as many frames, windows and goals included, {in_memory:.0f} ", end="")
    print(f"(ratio {distinct / in_memory:.3f}); up to {max(result['visits'])} visits per pass")
    return result


FLOORS = ("plain", "own", "resized")


def rounds(args: argparse.Namespace, stream, watch) -> dict[str, list[float]]:
    """Rates per second of each round: samples, decodes, and each floor's decodes."""
    from octo_like.data import bench

    kept = list(watch.kept)
    floors = {kind: bench.floor(kept, kind, args.decode, args.threads) for kind in FLOORS}
    for run in floors.values():
        run()  # traced once
    rates: dict[str, list[float]] = {key: [] for key in ("samples", "decodes", *FLOORS)}
    for _ in range(args.rounds):
        # From a standing start: batches made ahead while a floor was measured would be free.
        stream.seek(stream.position)
        next(stream)
        before, made = watch.count, stream.position
        samples, seconds = bench.timed(lambda: len(next(stream)["sample_id"]), args.seconds)
        at = stream.position
        stream.seek(at)  # stops the threads; what they had made ahead is counted out below
        per_sample = decodes_per_sample(stream, made, at)
        rates["samples"].append(samples / seconds)
        rates["decodes"].append(samples * per_sample / seconds)
        assert watch.count > before
        for kind, run in floors.items():
            count, seconds = bench.timed(run, args.seconds)
            rates[kind].append(count / seconds)
    return rates


def decodes_per_sample(stream, start: int, stop: int) -> float:
    """Frames that the batches from sample `start` on decode: made again, a few of them, and counted."""
    from octo_like.data import bench

    size = stream.order.batch_size
    numbers = range(start // size, min(stop // size, start // size + 4))
    watch = bench.Decodes(keep=0)
    with watch.watching():
        for number in numbers:
            stream.batch(number)
    return watch.count / (len(numbers) * size)


def run_config(args: argparse.Namespace, specs: dict, prepared: dict) -> tuple:
    """(config, batch spec) of a run on these datasets: the config file's, or defaults as wide as the data."""
    import dataclasses

    from ml_collections import ConfigDict

    from octo_like.common.config import load_config
    from octo_like.common.defaults import batch_spec, default_config

    if args.config:
        config = ConfigDict(load_config(args.config).to_dict())
        config.data.data_dir = args.data_dir
        config.data.cache_dir = args.cache_dir
    else:
        config = default_config()
        config.window_size = args.window
        config.image_sizes = {slot: _size(size) for slot, size in (item.split("=") for item in args.sizes)}
        cameras = {slot for one in specs.values() for slot, key in one.image_keys.items() if key is not None}
        config.goal_images = tuple(slot for slot in config.image_sizes if slot in cameras)
        widths = [d.function.proprio_dim for d in prepared.values()]
        config.proprio_dim = max([w for w in widths if w is not None], default=None)
        width = max(d.function.action_dim for d in prepared.values())
        heads = {one.head: dict(action_horizon=4, action_dim=width) for one in specs.values()}
        config.model = dict(heads=heads)
        config.data.datasets = {name: dataclasses.asdict(one) for name, one in specs.items()}
        config.data.data_dir, config.data.cache_dir = args.data_dir, args.cache_dir
    config.batch_size = args.batch_size
    config.data.decode, config.data.host_threads = args.decode, args.threads
    config.data.host_memory_gb = args.memory_gb
    return config, batch_spec(config)


if __name__ == "__main__":
    sys.exit(main())
