"""Meshes, placement, and what the partitioner makes of the step on eight devices."""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from octo_like.training import sharding

# Everything that needs eight devices, in one process: the session itself has one.
WORKER = """
import json
import jax, jax.numpy as jnp, numpy as np
from octo_like.common.config import load_config
from octo_like.common.schema import flatten, synthetic_batch
from octo_like.aot import hlo, hlo_cost, proof
from octo_like.training import sharding

CONFIG = "tests/training/tiny_config.py:synthetic"
BATCH = 32

def program(*overrides):
    layers = ("model.transformer.num_layers", "1")
    settings = [("batch_size", str(BATCH)), ("mesh.min_size", "100"), layers, *overrides]
    return proof.training_program(load_config(CONFIG, settings), jax.devices())

out = {}

# A parameter, its moments and its average lie alike; large ones are split.
_, fsdp, batch = program(("mesh.fsdp", "4"))
placed = {path: s.spec for path, s in fsdp.shardings.trained.items()}
moments = fsdp.shardings.opt_state[1][0]
for path, spec in placed.items():
    for other in (fsdp.shardings.ema, moments.mu, moments.nu):
        assert other[path].spec == spec, path
out["split"] = sum("fsdp" in spec for spec in placed.values())
out["whole"] = sum("fsdp" not in spec for spec in placed.values())
state = fsdp.place(jax.random.key(0))
for path, leaf in state.trained.items():
    split = "fsdp" in placed[path]
    assert leaf.addressable_shards[0].data.size * (4 if split else 1) == leaf.size, path

# Overrides win over the inference and reach optimizer and average.
block = "octo_transformer/BlockTransformer_0/Transformer_0/encoderblock_0/"
kernel = block + "MlpBlock_0/Dense_0/kernel"
rules = "((r'Block.*/encoderblock_0/.*Dense_0/kernel$', ('fsdp', None)), ('Block.*/encoderblock_0', ()))"
_, other, _ = program(("mesh.fsdp", "4"), ("mesh.overrides", rules))
moments = other.shardings.opt_state[1][0]
for tree in (other.shardings.trained, other.shardings.ema, moments.mu, moments.nu):
    for path, s in tree.items():
        if path == kernel:
            assert tuple(s.spec) == ("fsdp", None), (path, s.spec)
        elif path.startswith(block):
            assert s.is_fully_replicated, path
        else:
            assert s.spec == placed[path], path

def collectives(compiled):
    module = hlo.parse(compiled.as_text())
    return hlo.collectives(module, hlo_cost.work_of(module).times)

# What goes between devices: no activation is gathered, neither for micro-batches nor for split parameters.
compiled = {}
for name, settings in {"data, accumulate": (("accumulate", "2"),), "fsdp": (("mesh.fsdp", "4"),)}.items():
    network, one, batch = program(*settings)
    compiled[name] = one.step.lower(one.state, batch).compile()
    found = collectives(compiled[name])
    shapes = [leaf.shape for leaf in {**one.state.trained, **one.state.frozen}.values()]
    kinds, reports = {}, 0
    for c in found:
        if c.kind == "all-gather" and c.bytes <= 4 * BATCH:
            reports += 1  # a number per sample, so that every host can say which samples it saw
        else:
            kinds[c.kind] = kinds.get(c.kind, 0) + 1
    gathers = [str(g) for g in hlo.activation_gathers(found, shapes, BATCH)]
    out[name] = {"kinds": kinds, "reports": reports, "activations": gathers, "large": [
        str(c) for c in found if c.kind in ("all-to-all", "collective-permute") and c.bytes > 4096
    ]}

# The same mathematics: a step with split parameters is a step of two micro-batches with whole ones.
network, plain, batch = program(("accumulate", "2"))
values = sharding.put_batch(synthetic_batch(network.spec, BATCH), plain.mesh)
_, metrics = compiled["data, accumulate"](plain.place(jax.random.key(0)), values)
_, split_metrics = compiled["fsdp"](state, sharding.put_batch(synthetic_batch(network.spec, BATCH), fsdp.mesh))
np.testing.assert_allclose(metrics["loss"], split_metrics["loss"], rtol=1e-5)
np.testing.assert_allclose(metrics["grad_norm"], split_metrics["grad_norm"], rtol=1e-4)

# Rows of a batch in device order, whatever the mesh.
for fsdp_size in (1, 2, 4, 8):
    mesh = sharding.make_mesh(-1, fsdp_size)
    rows = sharding.put_batch({"x": np.arange(16)}, mesh)["x"]
    starts = [shard.data[0] for shard in sorted(rows.addressable_shards, key=lambda s: s.device.id)]
    assert [int(s) for s in starts] == list(range(0, 16, 2)), starts

# Something sharded against the grain is noticed: the detector can say yes.
mesh = sharding.make_mesh(1, 8)
batched = sharding.batch_sharding(mesh)
shape = jax.ShapeDtypeStruct((BATCH, 64, 48), jnp.float32, sharding=batched)
gathering = jax.jit(lambda x: jnp.sort(x, axis=0), out_shardings=sharding.replicated(mesh))
found = collectives(gathering.lower(shape).compile())
out["detected"] = len(hlo.activation_gathers(found, [(64, 48)], BATCH))

# What stands in a loop counts as often as the loop runs.
def power(x, v):
    return jax.lax.scan(lambda v, _: (x.T @ (x @ v), None), v, length=5)[0]
x = jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=batched)
v = jax.ShapeDtypeStruct((48,), jnp.float32, sharding=sharding.replicated(mesh))
found = collectives(jax.jit(power, out_shardings=sharding.replicated(mesh)).lower(x, v).compile())
out["loop"] = [[c.kind, c.times, c.bytes, c.group] for c in found]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight(repository):
    environment = dict(os.environ, PYTHONPATH=str(repository))
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", WORKER]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_large_parameters_are_split_and_small_ones_whole(eight):
    assert eight["split"] > 10 and eight["whole"] > 10


@pytest.mark.parametrize("name", ["data, accumulate", "fsdp"])
def test_no_activation_travels(eight, name):
    assert eight[name]["activations"] == [] and eight[name]["large"] == []
    kinds = eight[name]["kinds"]
    assert kinds.get("all-reduce", 0) > 0
    assert (kinds.get("all-gather", 0) > 0) == name.startswith("fsdp")
    assert eight[name]["reports"] <= 4
    assert eight["detected"] > 0


def test_data_parallel_steps_only_reduce(eight):
    """Splitting a batch into micro-batches moves no row from one device to another."""
    assert set(eight["data, accumulate"]["kinds"]) == {"all-reduce"}


def test_collectives_in_loops_are_multiplied(eight):
    assert eight["loop"] == [["all-reduce", 5, 48 * 4, 8]]


def device(number, process, slice_index=None, platform="tpu"):
    fields = {} if slice_index is None else {"slice_index": slice_index}
    return types.SimpleNamespace(id=number, process_index=process, platform=platform, **fields)


def make_fake(monkeypatch, data, fsdp, devices):
    monkeypatch.setattr(sharding, "Mesh", lambda array, names, axis_types: array)
    return sharding.make_mesh(data, fsdp, devices)


def test_rows_follow_processes(monkeypatch):
    """A 4x4 slice of hosts of 2x2 chips: ids run along the axes, and so through several hosts."""
    devices = [device(4 * y + x, 2 * (y // 2) + x // 2) for y in range(4) for x in range(4)]
    mesh = make_fake(monkeypatch, -1, 4, devices)
    assert [[d.process_index for d in row] for row in mesh] == [[p] * 4 for p in range(4)]
    assert [d.process_index for d in make_fake(monkeypatch, -1, 2, devices[::-1]).flat] == sorted([0, 1, 2, 3] * 4)


def test_slices_are_joined_by_the_data_axis_alone(monkeypatch):
    devices = [device(i, i // 4, slice_index=i // 8) for i in range(16)]
    mesh = make_fake(monkeypatch, -1, 4, devices[8:] + devices[:8])
    assert mesh.shape == (4, 4)
    assert all(len({d.slice_index for d in row}) == 1 for row in mesh)
    with pytest.raises(ValueError, match="does not divide the 8 devices of each of the 2 slices"):
        make_fake(monkeypatch, -1, 16, devices)
    # GPUs have numbers of that kind too, and may gather over all of them.
    gpus = [device(i, i // 4, slice_index=i // 8, platform="gpu") for i in range(16)]
    assert make_fake(monkeypatch, -1, 16, gpus).shape == (1, 16)


def one_device_mesh():
    return sharding.make_mesh(1, 1, jax.devices()[:1])


TREE = {"embedding": jax.ShapeDtypeStruct((64, 128), jnp.float32), "scale": jax.ShapeDtypeStruct((), jnp.float32)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((("kernel", ("fsdp", None)),), r"no parameter's path matches \['kernel'\]"),
        ((("embedding", ("model", None)),), "no mesh axis 'model'; valid: data, fsdp, None"),
        ((("embedding", ("fsdp", "fsdp")),), "one dimension only"),
        ((("embedding", ("fsdp", None, None)),), "3 entries for 2 dimensions"),
        ((("e", ()), ("embedding", ())), "or an earlier one took it"),
    ],
)
def test_overrides_that_make_no_sense(overrides, message):
    with pytest.raises(ValueError, match=message):
        sharding.infer_sharding(TREE, one_device_mesh(), overrides=overrides)


def test_scalars_are_never_split():
    placed = sharding.infer_sharding(TREE, one_device_mesh(), overrides=((".", ("fsdp",)),))
    assert placed["scale"].is_fully_replicated and tuple(placed["embedding"].spec) == ("fsdp",)


@pytest.mark.parametrize(
    ("data", "fsdp", "message"),
    [
        (-1, -1, "only one of"),
        (7, 3, "mesh.data=7, but the number"),
        (-1, 3, "mesh.fsdp=3, but the number of devices is 1"),
    ],
)
def test_meshes_that_do_not_exist(data, fsdp, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(data, fsdp, jax.devices()[:1])
