"""What every special path of octo_like/model/special.py is worth: processor time with it and without it.

    python scripts/bench_special.py                                # configs/tabletop.py
    python scripts/bench_special.py --config configs/octo_small.py --batch-size 4 --paths layers collector

A path is switched off by putting the plain thing in its place. With and without alternate in one process, so that both
meet the same machine; the first round is left out and medians are printed. The last line is JSON. A T5 encoder is left
out, as in `bench_model.py`.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import contextlib
import gc
import json
import sys
import time
from unittest import mock

import jax
import numpy as np
from bench_model import without_t5
from ml_collections import ConfigDict

from octo_like.common.config import load_config
from octo_like.common.defaults import batch_spec
from octo_like.common.schema import synthetic_batch
from octo_like.model import attention, octo, special, transformer
from octo_like.model.octo import build_model, init_params
from octo_like.training import program, sharding


def _plain_attention(uniform, q, k, v, mask):
    return attention._plain(q, k, v, mask, uniform)


# Path -> (what is measured, [(module, name, what stands in its place), ...]).
PATHS = {
    "layers": ("trace", [(transformer, "_shared_block", transformer._block)]),
    "collector": ("trace", [(special, "spare_the_collector", lambda: None)]),
    "attention": ("run", [(attention, "cpu_attention", _plain_attention)]),
    "options": ("place", [(module, "run_once_options", dict) for module in (octo, program)]),
}


class Step:
    """The training step and `sample` of a config, traced and compiled anew."""

    def __init__(self, config, model_config, spec):
        jax.clear_caches()
        gc.unfreeze()
        self._model, mesh = build_model(model_config), sharding.make_mesh(1, 1, jax.devices()[:1])
        self._spec = spec
        self._program = program.build_program(
            config,
            self._model,
            mesh,
            init_params=lambda key: init_params(self._model, spec, key),
            init_from=jax.random.key(0),
            frozen=frozenset(),
        )
        self._batch = sharding.put_batch(synthetic_batch(spec, config.batch_size), mesh)
        self._compiled = None

    def trace(self) -> dict[str, float]:
        special.spare_the_collector()
        return {"trace and lower": timed(lambda: self._program.step.trace(self._program.state, self._batch).lower())}

    def place(self) -> dict[str, float]:
        return {"first state": timed(lambda: self._program.place(jax.random.key(0)))}

    def run(self) -> dict[str, float]:
        if self._compiled is None:
            self._state = self._program.place(jax.random.key(0))
            self._compiled = self._program.step.lower(self._state, self._batch).compile()
            params, head = jax.device_get(self._state.params), next(iter(self._model.heads))

            def act(rows):
                batch, keys = synthetic_batch(self._spec, rows), jax.random.split(jax.random.key(0), rows)
                sample = jax.jit(
                    lambda p, o, t: self._model.apply({"params": p}, o, t, keys, head=head, method="sample")
                )
                compiled = sample.lower(params, batch["observation"], batch["task"]).compile()
                return lambda: compiled(params, batch["observation"], batch["task"])

            self._acting = {f"act, {rows} at a time": act(rows) for rows in (1, 20)}

        def run():
            self._state, metrics = self._compiled(self._state, self._batch)
            return self._state, metrics

        return {"step": timed(run)} | {name: timed(run) for name, run in self._acting.items()}


def timed(function) -> float:
    """Seconds of processor time of all threads until the result is there."""
    start = time.process_time()
    result = function()
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)])
    return time.process_time() - start


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tabletop.py")
    parser.add_argument("--batch-size", type=int, help="default: the config's")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    flags = parser.parse_args(argv)
    config = ConfigDict(load_config(flags.config).to_dict())
    config.batch_size = flags.batch_size or config.batch_size
    model_config, spec = without_t5(config, batch_spec(config))
    for entry in model_config["task_tokenizers"].values():
        if entry.get("encoder") == "small" and not entry.get("vocab_size"):
            entry["vocab_size"] = 100  # the batch is synthetic and needs no text tokenizer

    result = {}
    for path in flags.paths:
        measure, patches = PATHS[path]
        steps, seconds = {}, {True: {}, False: {}}
        for number in range(flags.rounds):
            for special_path in (True, False):
                with contextlib.ExitStack() as stack:
                    for patch in [] if special_path else patches:
                        stack.enter_context(mock.patch.object(*patch))
                    if measure != "run" or special_path not in steps:
                        steps[special_path] = Step(config, model_config, spec)
                    values = getattr(steps[special_path], measure)()
                for name, value in values.items() if number else ():
                    seconds[special_path].setdefault(name, []).append(value)
        for name in seconds[True]:
            ours, plain = (float(np.median(seconds[which][name])) for which in (True, False))
            result[f"{path}: {name}"] = [round(ours, 4), round(plain, 4)]
            saved = f"{1 - ours / plain:.0%} saved"
            print(f"{path:<10} {name:<20} {ours:9.4f} s, without {plain:9.4f} s: {saved}", flush=True)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
