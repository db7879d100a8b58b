"""How long a model takes to trace, to compile, to train one step and to act; and how close that is to the machine.

    python scripts/bench_model.py                       # octo-small without T5, float32, batch 4
    python scripts/bench_model.py --size base --batch-size 8 --dtype bfloat16
    python scripts/bench_model.py --config configs/tabletop.py

The step is the one train.py runs (same functions, same jit options), `sample_actions` is Policy's. Rounds of the matrix
product of largest rate and of what is measured alternate, so that both meet the same machine; every ratio is taken
within a round, and their median is reported. On a CPU that others use as well, the shares by processor time are the
ones to look at: FLOPs per second that the cores spent on this process, against the same of the product. FLOPs are
those of matrix products and convolutions, read off the traced program. "Without T5" means that the batch holds the
16 x 768 features that T5 would have given. The last line is JSON.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from octo_like import Policy
from octo_like.common.config import load_config
from octo_like.common.defaults import batch_spec
from octo_like.common.schema import BatchSpec, synthetic_batch
from octo_like.model.octo import build_model, init_params
from octo_like.model.special import spare_the_collector
from octo_like.policy.describe import matmul_flops, parameter_counts, token_report
from octo_like.training import sharding
from octo_like.training.program import build_program

T5_FEATURES = (16, 768)


def without_t5(config, spec: BatchSpec):
    """(model config, batch spec) with the language encoder's features in the batch."""
    model = dict(config.model.to_dict())
    tasks = dict(model["task_tokenizers"])
    for name, entry in tasks.items():
        if entry.get("encoder") == "t5":
            tasks[name] = dict(kind="language", encoder="embedding")
            spec = dataclasses.replace(spec, language_length=None, language_embedding=T5_FEATURES)
    return {**model, "task_tokenizers": tasks}, spec


def timed(function) -> np.ndarray:
    """[seconds, seconds of processor time of all threads] until the result is there."""
    start = np.array([time.perf_counter(), time.process_time()])
    jax.block_until_ready(function())
    return np.array([time.perf_counter(), time.process_time()]) - start


class Ceiling:
    """The best rate a float32 product of three sizes reaches here, measured anew in every round."""

    def __init__(self, dtype, sizes=(512, 1024, 2048)):
        self._products = []
        for n in sizes if jax.default_backend() == "cpu" else (4096, 8192):
            a = jax.random.normal(jax.random.key(n), (n, n), dtype)
            product = jax.jit(jnp.matmul)
            jax.block_until_ready(product(a, a))
            self._products.append((2 * n**3, lambda f=product, a=a: f(a, a)))

    def flops_per_second(self, seconds: float) -> np.ndarray:
        """[by the clock, by processor time]: the best of the repetitions that fit into `seconds` for each size."""
        best = np.zeros(2)
        for flops, product in self._products:
            end = time.perf_counter() + seconds / len(self._products)
            while True:
                best = np.maximum(best, flops / np.maximum(timed(product), 1e-9))
                if time.perf_counter() > end:
                    break
        return best


def significant(value: float) -> float:
    """Three significant digits: shares of tiny programs are small, not nothing."""
    return float(f"{value:.3g}")


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "base"), default="small", help="of Octo, when no --config is given")
    parser.add_argument("--config", help="a config file whose model is measured")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--attention", help="xla, cudnn or splash; default: the config's")
    parser.add_argument("--with-t5", action="store_true", help="keep the T5 encoder (randomly initialised)")
    parser.add_argument("--rounds", type=int, default=5, help="of alternating measurements")
    parser.add_argument("--samples-per-round", type=int, default=10, help="sample_actions calls in a round")
    return parser.parse_args(argv)


def model_of(flags: argparse.Namespace) -> tuple[ConfigDict, dict, BatchSpec]:
    """(config, config of the model that is measured, batch spec)."""
    octo = pathlib.Path(__file__).resolve().parent.parent / "configs" / "octo_small.py"
    config = ConfigDict(load_config(flags.config or f"{octo}:{flags.size}").to_dict())
    with config.unlocked():
        config.batch_size, config.model.dtype = flags.batch_size, flags.dtype
        if flags.attention:
            config.model.transformer.attention = flags.attention
    spec = batch_spec(config)
    model_config, spec = (config.model.to_dict(), spec) if flags.with_t5 else without_t5(config, spec)
    for entry in model_config["task_tokenizers"].values():
        if entry.get("encoder") == "small" and not entry.get("vocab_size"):
            entry["vocab_size"] = 100  # the batch is synthetic and needs no text tokenizer
    return config, model_config, spec


def alternate(flags: argparse.Namespace, train, act, flops: tuple[int, int]) -> dict:
    """Medians of steps, calls and the ceiling, measured in turns; `flops` of a step and of a call."""
    ceiling = Ceiling(jnp.dtype(flags.dtype))
    # The first calls touch the memory that the others find in place; the product's warm up its threads.
    train(), act(), ceiling.flops_per_second(0.5)
    steps, samples, ceilings, step_shares, sample_shares = [], [], [], [], []
    for _ in range(flags.rounds):
        before = ceiling.flops_per_second(1.0)
        steps.append(timed(train))
        between = ceiling.flops_per_second(0.5)
        calls = [timed(act) for _ in range(flags.samples_per_round)]
        samples += calls
        after = ceiling.flops_per_second(0.5)
        ceilings += [before, between, after]
        step_shares.append(flops[0] / steps[-1] / np.maximum(before, between))
        sample_shares.append(flops[1] / np.median(calls, axis=0) / np.maximum(between, after))
    ceiling_now, step_s, step_share, sample_share = (
        np.median(x, axis=0) for x in (ceilings, steps, step_shares, sample_shares)
    )
    calls_s = np.array(samples)[:, 0]
    result = {
        "ceiling_gflop_per_s": round(ceiling_now[0] / 1e9, 1),
        "step_s": round(step_s[0], 4),
        "step_share_of_ceiling": significant(step_share[0]),
        "sample_p50_s": round(np.quantile(calls_s, 0.5), 4),
        "sample_p99_s": round(np.quantile(calls_s, 0.99), 4),
        "sample_share_of_ceiling": significant(sample_share[0]),
    }
    if jax.default_backend() == "cpu":
        result |= {
            "ceiling_gflop_per_cpu_s": round(ceiling_now[1] / 1e9, 1),
            "step_share_by_cpu_time": significant(step_share[1]),
            "sample_share_by_cpu_time": significant(sample_share[1]),
        }
    return result


def main(argv=None) -> int:
    flags = arguments(argv)
    config, model_config, spec = model_of(flags)
    model = build_model(model_config)

    # -- one step: trace, compile, run
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    program = build_program(
        config,
        model,
        mesh,
        init_params=lambda key: init_params(model, spec, key),
        init_from=jax.random.key(0),
        frozen=frozenset(),
    )
    state, step = program.place(jax.random.key(0)), program.step
    batch = sharding.put_batch(synthetic_batch(spec, flags.batch_size), mesh)
    spare_the_collector()
    start, start_cpu = time.perf_counter(), time.process_time()
    traced = step.trace(state, batch)
    trace_s, trace_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    start = time.perf_counter()
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - start
    step_flops = matmul_flops(program.train_step, state, batch)
    params_host = jax.device_get(state.params)

    # -- acting
    policy = Policy({"model": model_config, "batch_spec": spec.to_json()}, params_host, {})
    one = synthetic_batch(spec, 1)
    keys = jax.random.split(jax.random.key(0), 1)
    head = next(iter(model.heads))

    def act():
        return policy.sample_actions(one["observation"], one["task"], rng=keys, head=head)

    start = time.perf_counter()
    jax.block_until_ready(act())
    sample_compile_s = time.perf_counter() - start
    act_flops = matmul_flops(
        lambda p: model.apply({"params": p}, one["observation"], one["task"], keys, head=head, method="sample"),
        params_host,
    )

    # -- rounds
    def train():
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    measured = alternate(flags, train, act, (step_flops, act_flops))
    counts = parameter_counts(params_host)
    without_encoder = sum(size for part, size in counts.items() if not part.endswith("/hf_model"))
    result = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "dtype": flags.dtype,
        "batch_size": flags.batch_size,
        "tokens": token_report(model, spec).total,
        "parameters": sum(counts.values()),
        "parameters_without_t5": without_encoder,
        "step_gflop": round(step_flops / 1e9, 2),
        "sample_gflop": round(act_flops / 1e9, 2),
        "trace_s": round(trace_s, 2),
        "compile_s": round(compile_s, 2),
        "sample_trace_and_compile_s": round(sample_compile_s, 2),
        **measured,
    }
    if jax.default_backend() == "cpu":
        result["trace_cpu_s"] = round(trace_cpu_s, 2)
    for name, value in result.items():
        print(f"{name:<28}{value}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
