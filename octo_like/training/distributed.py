"""Several processes as one run: start-up, preemption, agreement. Everything here works unchanged with one process."""

import argparse
import hashlib
import inspect
import json
import logging
import os
import pathlib
import signal
import socket
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # its client has no public name
from jax.experimental import multihost_utils

from octo_like.common import parts
from octo_like.common.normalization import to_json

log = logging.getLogger(__name__)


def initialize(
    distributed: str = "auto",
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 100,
    init_timeout: int = 300,
    shutdown_timeout: int = 300,
) -> bool:
    """Joins the other processes of the run. Call before anything touches a device.

    Args:
      distributed: "off" never does it; "on" always does, a lone process becomes its own coordinator; "auto" does it
        when an address is given (here or in JAX_COORDINATOR_ADDRESS) or JAX recognises a TPU pod, Slurm, Open MPI, GKE.
      coordinator_address, num_processes, process_id: only where JAX cannot find them out; all three or none.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
      init_timeout: seconds for all processes to arrive here; JAX aborts those that have waited longer.
      shutdown_timeout: seconds that a process which is done waits for the others.

    Returns:
      Whether jax.distributed is running.

    Raises:
      ValueError: an incomplete set of arguments, "off" together with an address, or a timeout below one second.
    """
    timeouts = {
        "heartbeat_timeout": heartbeat_timeout,
        "init_timeout": init_timeout,
        "shutdown_timeout": shutdown_timeout,
    }
    for name, seconds in timeouts.items():
        if seconds < 1:
            raise ValueError(f"--{name} must be at least 1 second, got {seconds}")
    explicit: dict[str, Any] = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    given = [name for name, value in explicit.items() if value is not None]
    if given and distributed == "off":
        raise ValueError(f"--distributed=off contradicts --{given[0]}")
    if given and len(given) < len(explicit):
        missing = [f"--{name}" for name in explicit if name not in given]
        raise ValueError(f"--{given[0]} was given, but not {', '.join(missing)}: pass all three or none")
    if distributed == "off" or jax.distributed.is_initialized():
        return jax.distributed.is_initialized()
    limits: dict[str, Any] = dict(
        heartbeat_timeout_seconds=heartbeat_timeout,
        initialization_timeout=init_timeout,
        shutdown_timeout_seconds=shutdown_timeout,
    )
    if num_processes is not None and num_processes > 1:
        words = "joining %d processes at %s, for at most %d s (--init_timeout)"
        log.info(words, num_processes, coordinator_address, init_timeout)
    try:
        jax.distributed.initialize(**explicit, **limits)
    except ValueError as error:
        if "should be defined" not in str(error):
            raise
        if distributed == "auto":
            return False
        address = f"localhost:{_free_port()}"
        jax.distributed.initialize(address, 1, 0, **limits)
    log.info("process %d of %d", jax_distributed.global_state.process_id, process_count())
    return True


def initialize_from_flags(flags: argparse.Namespace) -> bool:
    """`initialize` with the flags of `octo_like.training.arguments`."""
    return initialize(**{name: getattr(flags, name) for name in inspect.signature(initialize).parameters})


def coordination_client() -> Any:
    """JAX's client of the coordination service (key-value store, barriers), which needs no device; or None."""
    return jax_distributed.global_state.client


def process_id() -> int:
    """Index of this process. Unlike `jax.process_index` it needs no device, so that a watchdog may ask."""
    return jax_distributed.global_state.process_id


def process_count() -> int:
    """Number of processes that joined; needs no device."""
    return jax_distributed.global_state.num_processes if coordination_client() is not None else 1


def wait_for_all(name: str, seconds: float) -> None:
    """Returns when all processes have come here. `name`: unique in the life of the run's processes.

    Raises:
      jax.errors.JaxRuntimeError: not all of them came within so many seconds; names those that are missing.
    """
    if process_count() > 1:
        coordination_client().wait_at_barrier(name, int(1000 * seconds))


def from_main(name: str, value: str | None, *, seconds: float = 600.0) -> str:
    """The value that process 0 passes; the others wait for it. `name`: unique in the life of the run's processes.

    Raises:
      jax.errors.JaxRuntimeError: it did not come within so many seconds.
    """
    if process_count() == 1:
        assert value is not None  # it is process 0
        return value
    if process_id() == 0:
        assert value is not None
        coordination_client().key_value_set(name, value)
        return value
    return coordination_client().blocking_key_value_get(name, int(1000 * seconds))


def from_all(name: str, value: Any, *, seconds: float = 3600.0) -> list[Any]:
    """The JSON-able values that all processes pass, in their order; each waits for the others, without a device.

    Args:
      name: unique in the life of the run's processes.

    Raises:
      jax.errors.JaxRuntimeError: one did not come within so many seconds.
    """
    if process_count() == 1:
        return [value]
    coordination_client().key_value_set(f"{name}/{process_id()}", json.dumps(value))
    names = [f"{name}/{process}" for process in range(process_count())]
    return [json.loads(coordination_client().blocking_key_value_get(one, int(1000 * seconds))) for one in names]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return jax.process_index() == 0


class Preemption:
    """Turns SIGTERM into a step at which all processes stop.

        with Preemption() as preemption:
            for step in ...:
                ...
                if preemption.should_stop(step):
                    checkpointer.save(step, ...)
                    checkpointer.close()
                    sys.exit(exits.PREEMPTED)  # octo_like.training.exits

    With jax.distributed, its preemption service spreads the notice and agrees on a step that no process has passed yet;
    alone, a signal handler sets a flag. A second SIGTERM to a lone process has the default effect.
    """

    def __init__(self):
        self._received = False
        self._previous = None

    def __enter__(self) -> "Preemption":
        if not jax.distributed.is_initialized():
            # None: a handler that was not installed from Python, and cannot be put back from it.
            self._previous = signal.signal(signal.SIGTERM, self._on_signal) or signal.SIG_DFL
        return self

    def __exit__(self, *exc_info) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _on_signal(self, number, frame) -> None:
        self._received = True
        signal.signal(signal.SIGTERM, self._previous)

    def should_stop(self, step: int) -> bool:
        """True at the step at which every process saves and leaves. Call it on every process at every step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received


def setup_compilation_cache(directory: str | os.PathLike | None = None, *, min_seconds: float = 1.0) -> str | None:
    """Keeps compiled programs on disk, so that a restart does not compile again.

    Args:
      directory: where; default: JAX_COMPILATION_CACHE_DIR, and without it ~/.cache/octo_like/xla. "off" turns it off.
      min_seconds: programs that compile faster are not kept.

    Returns:
      The directory in use, or None.
    """
    if directory == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if directory is None:
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or pathlib.Path.home() / ".cache" / "octo_like" / "xla"
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
    return os.fspath(directory)


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value; the order of dict keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint_across_hosts(value: Any, what: str = "config") -> str:
    """The fingerprint of a JSON-able value that has to be the same on all processes.

    Raises:
      RuntimeError: it is not; names the processes that differ from process 0.
    """
    mine = fingerprint(value)
    if jax.process_count() == 1:
        return mine
    words = np.frombuffer(bytes.fromhex(mine), np.uint32)
    everyone = multihost_utils.process_allgather(words)
    differing = np.flatnonzero((everyone != everyone[0]).any(axis=1))
    if differing.size:
        raise RuntimeError(
            f"{what} differs between hosts: processes {differing.tolist()} have another fingerprint than process 0 "
            f"(this is process {jax.process_index()}, {mine[:12]}). All hosts need the same code, command and files."
        )
    return mine


def check_hosts(order_spec: Mapping[str, Any], statistics: Mapping[str, Any]) -> None:
    """Compares data, order and statistics of all processes.

    Hosts that index other files, or derive other blocks, would make batches that do not belong together; with other
    statistics (of a tf.data source that shuffles without a seed) the same action would mean something else on each.

    Raises:
      RuntimeError: they differ; names what, and the processes that differ from process 0.
    """
    fingerprint_across_hosts(json.loads(json.dumps(order_spec)), "the data or its order")
    approximate = order_spec.get("approximate", ())
    fingerprint_across_hosts(parts.used(), "the source of parts of your own")
    for name, of_dataset in sorted(to_json(statistics).items()):
        hint = " (a source must begin with the same trajectories on all hosts: give what it shuffles a seed)"
        fingerprint_across_hosts(of_dataset, f"the statistics of {name!r}{hint if name in approximate else ''}")
