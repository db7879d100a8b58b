"""Special paths: what is here for its speed alone, and what it is worth.

Everything would compute the same without this file. What each path saves is measured by `scripts/bench_special.py`;
docs/performance.md has the figures.
"""

import functools
import gc
from collections.abc import Callable
from typing import Any

import jax


def traced_once(function: Callable | None = None, **options: Any) -> Callable:
    """`jax.jit` for the sake of tracing: calls with equal shapes and static arguments share one traced program, which
    is differentiated and lowered once as well. Layers of a transformer differ in nothing but their parameters."""
    return functools.partial(traced_once, **options) if function is None else jax.jit(function, **options)


def run_once_options() -> dict[str, str]:
    """Compiler options of a program that runs once: on CPU, optimising takes longer than running ever will."""
    return {"xla_backend_optimization_level": "1"} if jax.default_backend() == "cpu" else {}


def spare_the_collector() -> None:
    """What exists by now stays: the garbage collector need not go through it again while a program is traced."""
    gc.collect()
    gc.freeze()
