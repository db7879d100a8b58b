"""Programs compiled by the TPU compiler, for topologies that are not here. Needs libtpu: `make test-aot`."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from octo_like.aot import hlo, hlo_cost, proof
from octo_like.aot.chips import parse_topology
from octo_like.aot.report import WANTED_HEADROOM
from octo_like.common.config import ConfigDict, freeze, load_config, to_dict
from octo_like.training import program, sharding

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not proof.has_compiler(), reason="compiling for TPUs needs libtpu: run `make test-aot`"),
]

TINY = "tests/training/tiny_config.py:synthetic"
SETTINGS = [("model.transformer.num_layers", "1"), ("batch_size", "32"), ("mesh.fsdp", "2"), ("mesh.min_size", "1000")]


def tiny(*overrides):
    return load_config(TINY, [*SETTINGS, *overrides])


@pytest.fixture(scope="module")
def small():
    return proof.prove_training(tiny(), parse_topology("v5e:2x4"), name="tiny")


def test_small_program(small):
    assert small.fits and small.headroom > 0.9
    assert (small.chips, small.hosts, small.mesh) == (8, 1, {"data": 4, "fsdp": 2})
    assert small.loops == [] and small.network_seconds() == 0
    assert small.activation_gathers == []
    assert small.collectives["all-gather"]["count"] > 0 and small.collectives["all-reduce"]["count"] > 0
    # A step reads its arguments at least once, and multiplies matrices at least as the model says.
    assert small.memory_traffic > small.arguments > 0
    assert small.compiled_flops * small.chips > 0.8 * small.model_flops > 0


def compiled_work(function, *shapes):
    """(work, compiler's cost) of a function on one v5e chip."""
    place = SingleDeviceSharding(proof.devices_of(parse_topology("v5e:2x2"))[0])
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    return hlo_cost.work_of(hlo.parse(compiled.as_text())), compiled.cost_analysis()


def test_a_matmul_in_a_scan():
    """The TPU compiler says nothing of trips; its count of one trip, weighed by them, is 2 m n k for each."""
    matmul = lambda x, w: jnp.tanh(x @ w)  # noqa: E731

    def scan(length):
        return lambda x, w: jax.lax.scan(lambda x, _: (matmul(x, w), None), x, length=length)[0]

    shapes, product = [(512, 512)] * 2, 2 * 512**3
    for length in (3, 8):
        work, cost = compiled_work(scan(length), *shapes)
        assert work.trips == (length,) and work.flops == length * work.flops_once == length * product
        assert cost["flops"] == pytest.approx(product, rel=0.05)
        assert work.weigh_flops(cost["flops"]) == pytest.approx(length * product, rel=0.05)

    nested = lambda x, w: jax.lax.scan(lambda x, _: (scan(3)(x, w), None), x, length=5)[0]  # noqa: E731
    work, cost = compiled_work(nested, *shapes)
    assert sorted(work.trips) == [3, 5] and work.flops == 15 * product
    assert work.weigh_flops(cost["flops"]) == pytest.approx(15 * product, rel=0.05)


def test_micro_batches_against_the_same_program_unrolled():
    """Bytes within a tenth and FLOPs to rounding, where the compiler counts a third or so for the loop."""
    shapes = [(1024, 1024), (6, 2048, 1024)]

    def loss(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w).astype(jnp.float32))

    def scanned(w, batch):
        add = lambda total, x: (total + jax.grad(loss)(w, x), None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros_like(w), batch)[0]

    def unrolled(w, batch):
        return sum(jax.grad(loss)(w, batch[i]) for i in range(len(batch)))

    (loop, loop_cost), (plain, plain_cost) = compiled_work(scanned, *shapes), compiled_work(unrolled, *shapes)
    assert loop.trips == (6,) and plain.trips == () and loop.flops == plain.flops
    assert loop_cost["bytes accessed"] < 0.5 * plain_cost["bytes accessed"]
    assert loop.weigh_flops(loop_cost["flops"]) == pytest.approx(plain_cost["flops"], rel=0.03)
    assert loop.weigh_bytes(loop_cost["bytes accessed"]) == pytest.approx(plain_cost["bytes accessed"], rel=0.2)


def test_micro_batches_of_the_real_step(small):
    """Twice the batch in two micro-batches does twice the work of each; the compiler alone sees one of them."""
    report = proof.prove_training(
        tiny(("batch_size", "64"), ("accumulate", "2")), parse_topology("v5e:2x4"), name="tiny"
    )
    assert report.loops == [2] and report.model_flops == pytest.approx(2 * small.model_flops, rel=0.01)
    assert report.compiled_flops == pytest.approx(2 * small.compiled_flops, rel=0.15)


def test_what_goes_between_slices():
    """The gradient of a matrix over a batch on two slices of four chips: each chip hands its host a quarter."""
    mesh = sharding.make_mesh(-1, 1, proof.devices_of(parse_topology("v5e:2x2", 2)))
    place = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    w, x = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s)
        for shape, s in zip([(512, 256), (64, 512)], place, strict=True)
    )
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))), out_shardings=place[0])
    module = hlo.parse(gradient.lower(w, x).compile().as_text())
    found = hlo.collectives(module, hlo_cost.work_of(module).times, 2)
    assert sum(one.wire_bytes(8) for one in found if one.kind == hlo.BETWEEN_SLICES) == 512 * 256 * 4 / 4


def test_slices_of_the_real_step():
    """Parts of all gradients, small ones padded to tiles; nothing of it on one slice."""
    config = tiny(("mesh.fsdp", "1"), ("batch_size", "32"))
    one, two = (proof.prove_training(config, parse_topology("v5e:2x4", n), name="tiny") for n in (1, 2))
    assert "between-slices" not in one.collectives and two.hosts == 2
    sent = two.collectives["between-slices"]["wire_bytes"]
    assert sent > 4 * two.trained_parameters / 8 and two.network_seconds() == pytest.approx(sent / 3.125e9)


HEADS = {
    "diffusion": {},
    "flow": dict(hidden_dim=32),
    "discrete": dict(use_map=True, num_bins=16, bin_type="uniform", low=-3.0, high=3.0),
    "regression": dict(loss="mse"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_every_head(kind):
    """Training and sampling of each kind compile for a TPU, and no loop is of unknown length."""
    config = ConfigDict(to_dict(tiny(("mesh.fsdp", "1"))))
    if kind != "diffusion":
        head = dict(kind=kind, readout="readout_action", action_horizon=3, action_dim=4)
        with config.ignore_type():
            config.model.heads = dict(action=head | HEADS[kind])
    config, topology = freeze(config), parse_topology("v6e:2x2")
    train = proof.prove_training(config, topology, name=kind)
    sample = proof.prove_sampling(config, topology, name=kind)
    for report in (train, sample):
        assert report.fits and report.activation_gathers == [] and None not in report.loops


def test_a_language_encoder_that_is_trained():
    """T5 with its gradient, and everything else in small."""
    config = ConfigDict(to_dict(tiny(("mesh.fsdp", "1"))))
    with config.ignore_type():
        config.model.task_tokenizers = dict(
            language=dict(kind="language", encoder="t5", t5="t5-small", finetune_encoder=True)
        )
        config.optimizer.freeze = ()
    report = proof.prove_training(freeze(config), parse_topology("v6e:2x2"), name="t5")
    assert report.fits and report.trained_parameters == report.parameters > 30e6


def test_it_is_the_program_of_any_other_device():
    """The traced program does not depend on the machine: on CPU devices it has the same fingerprint."""
    config = tiny(("mesh.fsdp", "1"))
    (tpu, cpu) = (
        proof.training_program(config, devices)
        for devices in (proof.devices_of(parse_topology("v5e:2x2"))[:1], jax.devices()[:1])
    )
    fingerprints = {proof.jaxpr_fingerprint(one.step.trace(one.state, batch).jaxpr) for _, one, batch in (tpu, cpu)}
    assert len(fingerprints) == 1


def with_buffer(monkeypatch, gib):
    """The step, with a buffer of its own on every chip: sorted, so that the compiler has to make it."""
    make = program.make_train_step

    def making(*args):
        step = make(*args)

        def larger(state, batch):
            state, metrics = step(state, batch)
            seeds = jnp.arange(gib * 2**20, dtype=jnp.float32)[:, None] * metrics["loss"] + jnp.arange(256.0)
            return state, metrics | {"buffer": jnp.sort(jnp.sin(seeds), axis=0)[-1].sum()}

        return larger

    monkeypatch.setattr(program, "make_train_step", making)


def test_a_larger_step_changes_the_table(small, monkeypatch):
    with_buffer(monkeypatch, 2)
    larger = proof.prove_training(tiny(), parse_topology("v5e:2x4"), name="tiny")
    assert larger.temporaries > small.temporaries + 1.9 * 2**30
    assert larger.headroom < small.headroom - 0.1 and larger.fits
    assert larger.fingerprint != small.fingerprint and str(larger) != str(small)


SCRIPT = """
import sys
import pytest
from tests.aot.test_compile import with_buffer
from scripts import aot_compile

with_buffer(pytest.MonkeyPatch(), 40)
sys.exit(aot_compile.main(sys.argv[1:]))
"""


def run(*arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else ["scripts/aot_compile.py"]), *arguments]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_what_does_not_fit_is_exit_status_1_and_the_table():
    settings = [f"--config.{key}={value}" for key, value in SETTINGS]
    done = run("--config", TINY, "--topology", "v5e-8", *settings, code=SCRIPT)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "DOES NOT FIT" in done.stdout and "15.75 GiB" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["fits"] is False and report["total"] > report["capacity"] and report["headroom"] < 0


def test_inference_program():
    done = run("--config", TINY, "--topology", "v6e:2x2", "--inference", "--config.model.transformer.num_layers=1")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["program"] == "sample" and report["fits"] and report["batch_size"] == report["chips"] == 1
    assert report["collectives"] == {} and report["model_flops"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v5e:3x5"], ["v5e:3x5", "8x8"]),
        (["--topology", "v9-64"], ["v4, v5e, v5p, v6e"]),
        (["--topology", "v5e-8", "--batch_size", "30"], ["30", "multiple of 8"]),
        (["--topology", "v5e:2x2", "--num_slices", "2", "--config.mesh.fsdp=8"], ["fsdp=8", "2 slices"]),
    ],
)
def test_bad_input_is_one_clear_error(arguments, words):
    done = run("--config", TINY, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("text", ["v4:4x4x4", "v5e:8x8", "v5e:16x16", "v5p:4x4x4", "v6e:8x8"])
def test_rows_of_the_batch_follow_hosts(text):
    """On the real coordinates: hosts hold consecutive rows, in order, for every fsdp that divides."""
    devices = proof.devices_of(parse_topology(text))
    for fsdp in (1, 2, 4, 16):
        processes = [device.process_index for device in sharding.make_mesh(-1, fsdp, devices).devices.flat]
        assert processes == sorted(processes) and len(set(processes)) == len(devices) // 4


def test_a_single_chip():
    assert len(proof.devices_of(parse_topology("v5e:1x1"))) == len(proof.devices_of(parse_topology("v6e:1x1"))) == 1


@pytest.mark.parametrize("text", ["v5e-8", "v6e-8", "v6e:4x8", "v5p:2x2x2", "v4-8"])
def test_hosts_are_those_of_the_compiler(text):
    topology = parse_topology(text)
    devices = proof.devices_of(topology)
    assert len(devices) == topology.chips and len({one.process_index for one in devices}) == topology.hosts


def test_slices_are_joined_along_data():
    devices = proof.devices_of(parse_topology("v5e:4x4", 2))
    mesh = sharding.make_mesh(-1, 8, devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 8}
    assert [{device.slice_index for device in row} for row in mesh.devices] == [{0}, {0}, {1}, {1}]


def test_real_program():
    """Octo-small with T5, as published, for the smallest of the recommended topologies' hosts: four chips."""
    config = load_config("configs/octo_small.py", [("batch_size", "64")])
    report = proof.prove_training(config, parse_topology("v5e:2x2"), name="octo_small")
    assert report.fits and report.headroom > WANTED_HEADROOM
    assert report.activation_gathers == []
    assert 25e6 < report.trained_parameters < 30e6 and report.parameters - report.trained_parameters > 100e6
    # Two frames and a goal of 256x256 and 128x128, 12 blocks of 384: about 0.1 TFLOP a sample.
    assert 0.08e12 < report.model_flops / 64 < 0.2e12


def test_robots_beside_pictures_with_words():
    """A mixed run whose decoder reads sub-tasks and says them: one program for all rows."""
    report = proof.prove_training(load_config("configs/tabletop_words.py", []), parse_topology("v5e:2x2"), name="words")
    assert report.fits and report.chips == 4 and report.loops == []
    assert report.activation_gathers == []
    assert 1e6 < report.parameters == report.trained_parameters < 3e6
    assert report.collectives["all-reduce"]["count"] > 0
