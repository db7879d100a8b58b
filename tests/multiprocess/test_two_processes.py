"""Two real processes with four devices each: start-up, agreement, a shared checkpoint, preemption."""

import os
import socket
import subprocess
import sys

import pytest

WORKER = """
import os, pathlib, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from octo_like.training import checkpoint, distributed, exits, metrics

port, process, workdir = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
assert distributed.initialize(
    coordinator_address=f"localhost:{port}", num_processes=2, process_id=process, heartbeat_timeout=10
)
assert jax.process_count() == 2 and jax.device_count() == 8

# Agreement.
distributed.fingerprint_across_hosts({"same": 1})
try:
    distributed.fingerprint_across_hosts({"process": process}, "the code")
except RuntimeError as error:
    assert "the code differs between hosts: processes [1]" in str(error), error
else:
    raise AssertionError("a difference between hosts was not noticed")
statistics = {"mine": {"action": {"mean": np.full(2, process, np.float32)}}}
try:
    distributed.check_hosts({"approximate": ["mine"]}, statistics)
except RuntimeError as error:
    assert "the statistics of 'mine' (a source must" in str(error) and "processes [1]" in str(error), error
else:
    raise AssertionError("other statistics on each host were not noticed")

# A checkpoint of arrays that no process holds as a whole.
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
sharding = NamedSharding(mesh, P(("data", "fsdp")))
make = jax.jit(lambda s: jnp.arange(64.0).reshape(16, 4) + s, out_shardings=sharding)
abstract = {"x": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)}
with checkpoint.Checkpointer(workdir) as saver:
    for step in (1, 2):
        saver.save(step, {"x": make(step)}, {"position": step})
    saver.wait()
    try:
        saver.save(3, {"x": make(jnp.where(jnp.arange(4) == 3, jnp.inf, 0.0))})
    except checkpoint.NonFiniteState:
        pass
    else:
        raise AssertionError("infinity was saved")
    # Damage that process 0 finds; process 1 has to follow it to the older step.
    if process == 0:
        file = max((workdir / "checkpoints" / "2" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    multihost_utils.sync_global_devices("damaged")
    restored, extra = saver.restore(None, abstract)
    assert extra == {"position": 1}, extra
    for shard in restored["x"].addressable_shards:
        np.testing.assert_array_equal(shard.data, (np.arange(64.0).reshape(16, 4) + 1)[shard.index])
    assert saver.all_steps() == [1]

# Only process 0 writes metrics.
with metrics.MetricsWriter(workdir / f"metrics_{process}", tensorboard=False) as writer:
    writer.scalars(1, {"loss": 1.0})

# SIGTERM to process 1 stops both at the same step.
add = jax.jit(lambda x: x.sum())
with distributed.Preemption() as preemption:
    for step in range(5000):
        add(restored["x"]).block_until_ready()
        if step == 3 and process == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if preemption.should_stop(step):
            print("stopped at", step)
            sys.exit(exits.PREEMPTED)
        time.sleep(0.01)
"""


@pytest.mark.multiprocess
def test_two_processes(tmp_path, repository):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(process), str(tmp_path)],
            cwd=repository,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        results = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [75, 75], "\n".join(errors[-3000:] for _, errors in results)
    # Gloo reports its connections on stdout as well.
    stopped = [[line for line in output.splitlines() if line.startswith("stopped at")] for output, _ in results]
    assert stopped[0] == stopped[1] and len(stopped[0]) == 1
    assert "is damaged" in results[0][1]
    assert (tmp_path / "metrics_0" / "metrics.jsonl").exists() and not (tmp_path / "metrics_1").exists()


ONE_CANNOT_READ = """
import errno, logging, os, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from octo_like.common import storage
from octo_like.training import checkpoint, distributed

port, process, workdir = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
assert distributed.initialize(
    coordinator_address=f"localhost:{port}", num_processes=2, process_id=process, heartbeat_timeout=10
)
storage.PAUSES = (0.1,) * 4
sharding = NamedSharding(Mesh(np.array(jax.devices()), "x"), P("x"))
make = jax.jit(lambda s: jnp.arange(64.0).reshape(16, 4) + s, out_shardings=sharding)
abstract = {"x": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)}
with checkpoint.Checkpointer(workdir) as saver:
    for step in (1, 2):
        saver.save(step, {"x": make(step)}, {"position": step})
real, left = os.stat, [0]

def stat(path, *arguments, **named):
    if not isinstance(path, int) and "/checkpoints/2" in os.fspath(path) and left[0]:
        left[0] -= 1
        raise OSError(errno.EIO, "I/O error")
    return real(path, *arguments, **named)

os.stat = stat
for times in (1, 3):
    for who in (0, 1):
        left[0] = times if process == who else 0
        with checkpoint.Checkpointer(workdir) as saver:
            state, extra = saver.restore(None, abstract)
            assert saver.all_steps() == [1, 2] and extra == {"position": 2}, (saver.all_steps(), extra)
assert not (workdir / "checkpoints" / "damaged").exists()
print("agreed", flush=True)
"""


@pytest.mark.multiprocess
def test_an_error_of_one_host_makes_no_difference(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    arguments = [[sys.executable, "-c", ONE_CANNOT_READ, str(port), str(i), str(tmp_path / "run")] for i in range(2)]
    options = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes = [subprocess.Popen(command, **options) for command in arguments]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("agreed" in output for output in outputs), "\n".join(output[-3000:] for output in outputs)
