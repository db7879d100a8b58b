"""How long it takes to find samples: the first batch anywhere in a run, and the batches after it. No data is read.

Processor time, which another load on the machine hardly changes: everything is done in one thread.

    python scripts/bench_order.py --datasets 60 --episodes 2300000 --lanes 256 --batch_size 2048
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import time

import numpy as np

from octo_like.data.order.order import DatasetFrames, Order


def mixture(datasets: int, episodes: int, mixed: int, visits: int) -> list[DatasetFrames]:
    """Datasets of very different sizes and weights: the largest has about 1,000 times the episodes of the smallest."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(1000), datasets))
    sizes = np.maximum(1, sizes / sizes.sum() * episodes).astype(int)
    return [
        DatasetFrames(f"d{i}", float(size) ** 0.5, rng.integers(30, 200, size), "", mixed, None, visits)
        for i, size in enumerate(sizes)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=int, default=60)
    parser.add_argument("--episodes", type=int, default=2_300_000)
    parser.add_argument("--lanes", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--mixed", type=int, default=2048, help="episodes mixed of each dataset, by all lanes")
    parser.add_argument("--visits", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--position", type=int, nargs="+", default=[0, 300_000, 3_000_000], help="batches to start at")
    parser.add_argument("--batches", type=int, default=100)
    args = parser.parse_args()
    datasets = mixture(args.datasets, args.episodes, args.mixed, args.visits)
    for position in args.position:
        start = time.process_time()
        order = Order(datasets, seed=0, batch_size=args.batch_size, num_lanes=args.lanes)
        order.samples(order.batch_rows(position, 0, args.processes))
        first = time.process_time() - start
        times = []
        for batch in range(position + 1, position + 1 + args.batches):
            start = time.process_time()
            order.samples(order.batch_rows(batch, 0, args.processes))
            times.append(time.process_time() - start)
        start = time.process_time()
        live = len(order.live(position, 0, args.processes))
        live_seconds = time.process_time() - start
        times = 1000 * np.array(times)
        print(
            f"batch {position:,}: first {first:.2f} s, then {np.median(times):.1f} ms a batch (slowest "
            f"{times.max():.0f}); {live:,} live episodes in {1000 * live_seconds:.0f} ms"
        )


if __name__ == "__main__":
    main()
