"""What the modes of finetune.py cost on octo-small and octo-base: what is trained, memory, work and time of a step.

    python scripts/bench_finetune.py                                  # both sizes, batch 32: memory and FLOPs
    python scripts/bench_finetune.py --sizes small --measure 3 --batch_size 4    # and seconds per step

The step is the one that runs: augmentation, T5, model, gradient, optimizer and average, compiled for this machine.
"state" are the bytes that stay on the device (parameters, factors, optimizer, average), "work" what the compiled step
needs besides while it runs (XLA's memory analysis: activations kept for the backward pass, gradients, temporaries).
FLOPs are those of matrix products and convolutions, read off the traced program. Times of the modes alternate, so that
all meet the same machine; the median ratio to "full" is printed. The table is Markdown; the last line is JSON.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import json
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from octo_like.common.config import load_config
from octo_like.common.defaults import LORA_TARGETS, batch_spec
from octo_like.common.schema import flatten, synthetic_batch
from octo_like.model.octo import build_model
from octo_like.policy import lora, surgery
from octo_like.policy.describe import abstract_params
from octo_like.training import sharding
from octo_like.training.flops import step_flops
from octo_like.training.program import build_program

OCTO = pathlib.Path(__file__).resolve().parent.parent / "configs" / "octo_small.py"
MODES = ("full", "frozen_transformer", "head_only", "lora")


class Adaptation:
    """The train step of one mode.

    Attributes:
      trained, total: numbers of parameters.
      state_bytes, work_bytes: of a step; flops: of a step's sample.
    """

    def __init__(self, size: str, mode: str, batch_size: int, rank: int, dtype: str):
        config = ConfigDict(load_config(f"{OCTO}:{size}").to_dict())
        config.batch_size, config.window_size = batch_size, 1
        config.model.dtype = dtype
        self._mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
        self._spec, self._batch_size = batch_spec(config), batch_size
        model = build_model(config.model)
        shapes = abstract_params(model, self._spec)
        frozen = surgery.frozen_by_mode(mode, (), {path: True for path, _ in flatten(shapes)})
        frozen |= surgery.never_trained(config.model.to_dict(), [path for path, _ in flatten(shapes)])
        if mode == "lora":
            adapters = lora.LoraSpec(rank, 2.0 * rank, LORA_TARGETS)
            targets = lora.find_targets(shapes, adapters)
            shapes = jax.eval_shape(lambda p: lora.add_adapters(p, targets, adapters, jax.random.key(0)), shapes)
            model, frozen = lora.AdaptedModel(model, adapters), frozen | set(targets)
        sizes = {path: leaf.size for path, leaf in flatten(shapes)}
        self.total = sum(sizes.values())
        self.trained = sum(n for path, n in sizes.items() if path not in frozen)

        self._program = build_program(
            config, model, self._mesh, init_params=lambda params: params, init_from=shapes, frozen=frozen
        )
        self._shapes = shapes
        self.state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._program.state))
        self._host_batch = synthetic_batch(self._spec, batch_size)
        self.work_bytes, self.compile_seconds = None, 0.0
        self.flops = step_flops(model, self._spec, shapes, frozen, 1)

    def compile(self) -> None:
        start = time.perf_counter()
        batch = sharding.put_batch(self._host_batch, self._mesh)
        self._compiled = self._program.step.lower(self._program.state, batch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.work_bytes = self._compiled.memory_analysis().temp_size_in_bytes

    def start(self) -> None:
        """Parameters of the right size; their values do not matter for the time a step takes."""
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32).astype(x.dtype), self._shapes)
        self._running = self._program.place(params)
        self._batch = sharding.put_batch(self._host_batch, self._mesh)

    def seconds(self) -> float:
        """Of one step."""
        start = time.perf_counter()
        self._running, metrics = self._compiled(self._running, self._batch)
        jax.block_until_ready((self._running, metrics))
        return time.perf_counter() - start


def bench(size: str, modes: list[str], args) -> list[dict]:
    rows, steps = [], {}
    for mode in modes:
        step = Adaptation(size, mode, args.batch_size, args.rank, args.dtype)
        if args.compile:
            step.compile()
        rows.append(
            {
                "size": size,
                "mode": mode,
                "trained": step.trained,
                "total": step.total,
                "state_bytes": step.state_bytes,
                "work_bytes": step.work_bytes,
                "gflop_per_sample": step.flops / 1e9,
            }
        )
        print(f"compiled in {step.compile_seconds:.0f} s: {json.dumps(rows[-1])}", file=sys.stderr, flush=True)
        if args.measure:
            step.start()
            step.seconds()
            steps[mode] = step
    rounds = [{mode: step.seconds() for mode, step in steps.items()} for _ in range(args.measure)]
    for row in rows if rounds else []:
        row["seconds"] = statistics.median(r[row["mode"]] for r in rounds)
        row["time_ratio"] = statistics.median(r[row["mode"]] / r[modes[0]] for r in rounds)
    return rows


def table(rows: list[dict]) -> str:
    timed = "seconds" in rows[0]
    lines = [
        "| model | mode | trained | state | work | GFLOP per sample |" + (" time of a step |" if timed else ""),
        "|---|---|---|---|---|---|" + ("---|" if timed else ""),
    ]
    full = {row["size"]: row["gflop_per_sample"] for row in reversed(rows)}
    for row in rows:
        cells = [
            f"octo-{row['size']}",
            row["mode"],
            f"{row['trained'] / 1e6:.3g} M of {row['total'] / 1e6:.0f} M",
            f"{row['state_bytes'] / 1e9:.2f} GB",
            "-" if row["work_bytes"] is None else f"{row['work_bytes'] / 1e9:.2f} GB",
            f"{row['gflop_per_sample']:.1f} ({row['gflop_per_sample'] / full[row['size']]:.2f})",
        ]
        if timed:
            cells.append(f"{row['seconds']:.2f} s ({row['time_ratio']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small", "base"], choices=["small", "base"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(surgery.MODES))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="of the computation; on CPU float32 is the faster one")
    parser.add_argument("--measure", type=int, default=0, metavar="ROUNDS", help="run so many steps of every mode")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="without it: no work, no times; seconds"
    )
    args = parser.parse_args(argv)
    if args.measure and not args.compile:
        parser.error("--measure runs what --no-compile leaves out")
    rows = [row for size in args.sizes for row in bench(size, args.modes, args)]
    print(table(rows))
    print(json.dumps({"backend": jax.default_backend(), "batch_size": args.batch_size, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
