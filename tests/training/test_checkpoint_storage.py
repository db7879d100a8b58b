"""Checkpoints when the process is killed, the device count changes, a write fails, or the disk is full."""

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.training import checkpoint
from tests.training.test_checkpoint import abstract, assert_same, make_state, save

KILLED = """
import os, signal, sys
import jax, jax.numpy as jnp
from octo_like.training import checkpoint

saver = checkpoint.Checkpointer(sys.argv[1])
saver.save(1, {"x": jnp.arange(1000.0)}, {"position": 1})
saver.wait()
if sys.argv[2] == "before the manifest":
    # Orbax has written and closed everything; only the final name is missing.
    saver._write_manifest = None
    checkpoint.write_manifest = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
    saver.save(2, {"x": jnp.arange(1000.0) + 1})
    saver.wait()
else:
    saver.save(2, {"x": jnp.arange(1000.0) + 1})
    os.kill(os.getpid(), signal.SIGKILL)
"""

RESHARD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from octo_like.training import checkpoint

devices = jax.devices()
assert len(devices) == 8
mesh = Mesh(np.array(devices).reshape(4, 2), ("data", "fsdp"))
split, whole = NamedSharding(mesh, P("fsdp", "data")), NamedSharding(mesh, P())
abstract = {
    "w": jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=split),
    "b": jax.ShapeDtypeStruct((24,), jnp.bfloat16, sharding=whole),
    "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole),
}
with checkpoint.Checkpointer(sys.argv[1]) as saver:
    restored, _ = saver.restore(None, abstract)
    assert restored["w"].sharding == split, restored["w"].sharding
    assert {s.data.shape for s in restored["w"].addressable_shards} == {(8, 6)}
    assert len(restored["key"].sharding.device_set) == 8
    restored["w"] = jax.jit(lambda w: 2 * w)(restored["w"])
    saver.save(2, restored)
"""


def run_python(source, *arguments, repository, devices=1):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize("moment", ["before the manifest", "right after save returned"])
def test_a_kill_in_the_middle_of_a_save_leaves_nothing_half_written(tmp_path, repository, moment):
    done = run_python(KILLED, tmp_path, moment, repository=repository)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if moment == "before the manifest":
        left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert left == ["1", "2.orbax-checkpoint-tmp"]
    with checkpoint.Checkpointer(tmp_path) as saver:
        # The save may have been quick enough; what counts is that a listed step is a good one.
        steps = saver.all_steps()
        assert steps in ([1], [1, 2])
        for step in steps:
            assert saver.verify(step) == []
        restored, _ = saver.restore(None, {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)})
        np.testing.assert_array_equal(restored["x"], np.arange(1000.0) + steps[-1] - 1)
        assert saver.save(3, restored)
    # The next save has swept up what the killed one left.
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [str(s) for s in [*steps, 3]]


# As on gs://: a step is written under its final name, and a file says in the end that it is complete.
AS_IN_A_BUCKET = """
from orbax.checkpoint._src.path import atomicity, atomicity_defaults
atomicity_defaults.get_default_temporary_path_class = lambda *_, **__: atomicity.CommitFileTemporaryPath
"""
KILLED_IN_A_BUCKET = """
saver = checkpoint.Checkpointer(sys.argv[1])
kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
write = checkpoint.write_manifest
checkpoint.write_manifest = kill if sys.argv[2] == "before the manifest" else lambda *a, **k: (write(*a, **k), kill())
saver.save(1, {"x": jnp.arange(1000.0)}, {"position": 1})
saver.wait()
"""
NEXT_START = """
print("would resume:", checkpoint.has_checkpoint(sys.argv[1]))
with checkpoint.Checkpointer(sys.argv[1]) as saver:
    print("steps:", saver.all_steps())
    if saver.all_steps():
        restored, extra = saver.restore(None, {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)})
        assert (restored["x"] == jnp.arange(1000.0)).all() and extra == {"position": 1}
"""
IMPORTS = "import os, signal, sys\nimport jax, jax.numpy as jnp\nfrom octo_like.training import checkpoint\n"


@pytest.mark.parametrize("moment,complete", [("before the manifest", False), ("before the mark", True)])
def test_a_step_in_a_bucket_counts_when_it_is_complete(tmp_path, repository, moment, complete):
    """The first save is killed. Whether the run would resume and what it would resume from are one question."""
    source = AS_IN_A_BUCKET + IMPORTS
    done = run_python(source + KILLED_IN_A_BUCKET, tmp_path, moment, repository=repository)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "checkpoints" / "1").is_dir()  # complete or not, the name is there
    again = run_python(source + NEXT_START, tmp_path, repository=repository)
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"would resume: {complete}\nsteps: {[1] if complete else []}\n"
    assert ("marked now" in again.stderr) == complete


def test_restores_onto_another_number_of_devices(tmp_path, repository):
    """1 device -> 4 x 2 devices (sharded both ways) -> 1 device."""
    w = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    state = {"w": jnp.asarray(w), "b": jnp.asarray(w[0], jnp.bfloat16), "key": jax.random.key(3)}
    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(1, state)
    done = run_python(RESHARD, tmp_path, repository=repository, devices=8)
    assert done.returncode == 0, done.stderr
    with checkpoint.Checkpointer(tmp_path) as saver:
        assert saver.all_steps() == [1, 2]
        restored, _ = saver.restore(2, abstract(state))
    assert_same(restored, {**state, "w": 2 * state["w"]})


def test_a_failed_background_save_is_reported_and_leaves_the_old_step(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    saver = checkpoint.Checkpointer(tmp_path)
    monkeypatch.setattr(checkpoint, "write_manifest", disk_full)
    saver.save(2, make_state(2))
    with pytest.raises(checkpoint.CheckpointError, match="saving step 2 to .* failed: .*No space left on device"):
        saver.wait()
    monkeypatch.undo()
    with checkpoint.Checkpointer(tmp_path) as again:
        assert again.all_steps() == [1]
        assert_same(again.restore(None, abstract(make_state(0)))[0], make_state(1))
        assert again.save(2, make_state(2))


FULL = """
import resource, signal, sys
import jax.numpy as jnp, numpy as np
from octo_like.training import checkpoint

state = {"x": jnp.asarray(np.random.default_rng(0).random((512, 1024), np.float32))}  # 2 MiB that hardly compress
saver = checkpoint.Checkpointer(sys.argv[1])
saver.save(1, state, {"position": 1})
saver.wait()
if sys.argv[2] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    saver.save(2, {"x": state["x"] + 1})
    saver.wait()
except checkpoint.CheckpointError as error:
    print("refused:", error)
else:
    sys.exit("nothing was refused")
"""


@pytest.mark.parametrize("how", ["limit", "tmpfs"])
def test_a_full_disk_leaves_the_old_step_usable(tmp_path, repository, how):
    """A limit on the size of files, and (where mounting is permitted) a file system with room for one step only."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    mounted = False
    if how == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(workdir)]
        try:
            mounted = subprocess.run(mount, capture_output=True).returncode == 0
        except FileNotFoundError:
            pass
        if not mounted:
            pytest.skip("mounting a file system is not permitted here")
    try:
        done = run_python(FULL, workdir, how, repository=repository)
        assert done.returncode == 0 and "refused: saving step 2" in done.stdout, done.stderr[-3000:]
        expected = np.random.default_rng(0).random((512, 1024), np.float32)
        with checkpoint.Checkpointer(workdir) as saver:
            assert saver.all_steps() == [1] and saver.verify(1) == []
            restored, extra = saver.restore(None, {"x": jax.ShapeDtypeStruct((512, 1024), jnp.float32)})
            np.testing.assert_array_equal(restored["x"], expected)
            assert extra == {"position": 1}
            if not mounted:
                assert saver.save(2, restored)
    finally:
        if mounted:
            subprocess.run(["umount", str(workdir)], check=True)
