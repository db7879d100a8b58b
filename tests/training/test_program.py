"""What is proven ahead of time is what train.py runs."""

import contextlib
import os
import pathlib
import subprocess
import sys
import types

import pytest

import train
from octo_like.aot import proof, report
from octo_like.common.config import ConfigError, load_config
from octo_like.training.program import network_from_config

# train.py itself, with the jitted step watched, and then the objects that the proof makes of the same command line.
WORKER = """
import sys
import jax
import train
from octo_like.common.config import load_config
from octo_like.aot import proof
from octo_like.training import program

SETTINGS = {"mesh.fsdp": 2, "mesh.min_size": 100, "accumulate": 2, "num_steps": 1, "eval.every": None}
seen = []

class Seen(Exception):
    pass

jit = program.jit_train_step

def watched(*args):
    step = jit(*args)

    class Step:
        def __call__(self, state, batch):
            seen.append((step.trace(state, batch), step.lower(state, batch).as_text()))
            raise Seen

        def __getattr__(self, name):
            return getattr(step, name)

    return Step()

program.jit_train_step = watched
config = "tests/training/tiny_config.py:synthetic"
overrides = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
try:
    train.main(["--config", config, "--workdir", sys.argv[1], *overrides])
except Seen:
    pass
program.jit_train_step = jit

config = load_config(config, [(key, str(value)) for key, value in SETTINGS.items()])
_, proven, batch = proof.training_program(config, jax.devices())
((traced, lowered),) = seen
assert proof.jaxpr_text(traced.jaxpr) == proof.jaxpr_text(proven.step.trace(proven.state, batch).jaxpr)
# With placement and donation.
assert lowered == proven.step.lower(proven.state, batch).as_text()
assert "jax.buffer_donor" in lowered or "tf.aliasing_output" in lowered

# The comparison sees a difference.
other = load_config("tests/training/tiny_config.py:synthetic", [("ema_decay", "0.5")] + list(
    (key, str(value)) for key, value in SETTINGS.items()))
_, other, batch = proof.training_program(other, jax.devices())
assert proof.jaxpr_fingerprint(other.step.trace(other.state, batch).jaxpr) != proof.jaxpr_fingerprint(traced.jaxpr)
print("equal", len(proof.jaxpr_text(traced.jaxpr)))
"""


def test_the_proof_lowers_what_train_runs(repository, tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(repository))
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", WORKER, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split("equal")[-1]) > 10_000


def test_a_config_without_a_model_says_so():
    with pytest.raises(ConfigError, match="config.model is not set"):
        network_from_config(load_config("configs/finetune.py"))


@pytest.mark.parametrize("config", ["configs/octo_small.py", "configs/octo_base.py:300m"])
def test_weights_on_disk_change_no_shape(config, monkeypatch):
    """The proof leaves T5 weights where they are: that they are asked for must not matter."""
    from octo_like.training import program

    monkeypatch.setattr(program, "load_t5", lambda path: pytest.fail("weights were read"))
    network = network_from_config(load_config(config, [("text.t5_weights", "nowhere")]), load_weights=False)
    assert any("hf_model" in path for path in network.frozen)
    with pytest.raises(pytest.fail.Exception):
        network_from_config(load_config(config, [("text.t5_weights", "nowhere")]))


def fake_report(**fields):
    values = dict(
        program="train",
        config="c",
        topology="v5e:8x8",
        slices=1,
        accelerator="v5e-64",
        chips=64,
        hosts=16,
        mesh={"data": 64, "fsdp": 1},
        batch_size=2048,
        accumulate=1,
        remat="none",
        attention="xla",
        arguments=2**30,
        outputs=0,
        temporaries=8 * 2**30,
        code=0,
        total=9 * 2**30,
        capacity=16 * 2**30,
        model_flops=int(64 * 197e12),
        loops=[],
        compiled_flops=1.0,
        memory_traffic=819e9,
        collectives={"all-reduce": {"count": 1, "bytes": 100e9, "wire_bytes": 200e9}},
        activation_gathers=[],
        compile_seconds=1.0,
        fingerprint="0",
        versions={},
        parameters=1,
        trained_parameters=1,
    )
    return report.Report(**(values | fields))


def test_times_are_calculated_from_the_data_sheet():
    fake = fake_report()
    assert fake.compute_seconds(1.0) == pytest.approx(1.0) and fake.compute_seconds(0.4) == pytest.approx(2.5)
    assert fake.memory_seconds() == pytest.approx(1.0) and fake.interconnect_seconds() == pytest.approx(1.0)
    assert fake.fits and fake.headroom == pytest.approx(7 / 16)
    assert report.Report.from_dict(fake.to_dict()) == fake
    # What goes to other slices goes over the hosts' network, 100 Gbit/s for four chips, and not over the chips' links.
    sent = fake.collectives | {"between-slices": {"count": 1, "bytes": 1e9, "wire_bytes": 6.25e9}}
    slices = fake_report(slices=2, collectives=sent)
    assert slices.interconnect_seconds() == pytest.approx(1.0) and slices.network_seconds() == pytest.approx(2.0)
    assert slices.seconds(0.5) == pytest.approx(dict(compute=2.0, memory=1.0, interconnect=1.0, network=2.0))
    assert fake.network_seconds() == 0 and "network" not in fake.seconds(0.5)
    assert "network of slices" in str(slices) and "network of slices" not in str(fake)
    assert "8, unknown, counted once" in str(fake_report(loops=[8, None])) and "loops" not in str(fake)


def test_recommendation():
    big, small, tight = dict(batch_size=4096), dict(batch_size=1024), dict(total=15 * 2**30)
    assert report.recommend([fake_report(**small), fake_report(**big)]).batch_size == 4096
    assert report.recommend([fake_report(**big, **tight), fake_report(**small)]).batch_size == 1024
    # Recomputing costs FLOPs, accumulation only smaller products.
    assert report.recommend([fake_report(remat="full"), fake_report(accumulate=2)]).accumulate == 2
    assert report.recommend([fake_report(accumulate=4), fake_report(accumulate=2)]).accumulate == 2
    assert report.recommend([fake_report(error="no memory", **big), fake_report()]).batch_size == 2048
    assert report.recommend([fake_report(**tight)]) is None


def test_sweep_has_every_combination():
    config = load_config("configs/octo_small.py")
    found = proof.variants(config, batch_sizes=(512, 1024), remats=("full", "none"), fsdps=(4, 1))
    seen = [(one.batch_size, one.model.transformer.remat, one.accumulate, one.mesh.fsdp) for one in found]
    assert len(seen) == 8 and seen[0] == (1024, "none", 1, 1) and seen[-1] == (512, "full", 1, 4)
    (alone,) = proof.variants(config)
    assert alone == config


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("total memory required for HLO temporaries (384.00G) exceeds available HBM (30.75G).", 384 * 2**30),
        ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded by 1.75G.", 17.5 * 2**30),
        ("Ran out of memory in memory space hbm. Used 900.0M of 15.75G hbm.", 900 * 2**20),
    ],
)
def test_what_the_compiler_says_it_needs(message, needed):
    assert proof._needed_bytes(message) == needed


def test_tables_say_whether_it_fits():
    assert "44%" not in str(fake_report()) and "headroom" in str(fake_report())
    assert "fits, but with less than 15%" in str(fake_report(total=15 * 2**30))
    text = str(fake_report(total=20 * 2**30, error="E1000: Ran out of memory"))
    assert "DOES NOT FIT" in text and "-25.0%" in text and "Ran out of memory" in text
    gathers = str(fake_report(activation_gathers=["all-gather bf16[2048, 16] of x"]))
    assert "gathers of activations" in gathers and "bf16[2048, 16] of x" in gathers


def test_the_compiler_that_make_aot_keeps_beside_the_environment_is_found(tmp_path):
    """Its stand-in ends the process when JAX imports it. Where libtpu is installed, that one is taken."""
    (tmp_path / "aot" / "libtpu").mkdir(parents=True)
    (tmp_path / "aot" / "libtpu" / "__init__.py").write_text("import os; os._exit(73)")
    code = "import runpy, sys; sys.prefix = sys.argv.pop(1); sys.path.insert(0, 'scripts')\n"
    code += "sys.argv[0] = 'aot_compile.py'; runpy.run_path('scripts/aot_compile.py', run_name='__main__')"
    words = ["--config", "configs/tabletop.py", "--topology", "v5e-8"]
    root = pathlib.Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *words], cwd=root, capture_output=True, text=True
    )
    assert found.returncode == 73 or proof.has_compiler(), found.stderr
    absent = [sys.executable, "-c", code, str(tmp_path / "none"), *words]
    done = subprocess.run(absent, cwd=root, capture_output=True, text=True)
    assert (done.returncode == 2 and "make aot" in done.stderr) or proof.has_compiler(), done.stderr


@pytest.mark.parametrize(
    "key,value,words",
    [
        ("observation_tokenizers.primary.stem.layers", "8", ["in octo_transformer/observation_tokenizers_primary"]),
        ("heads.action.hidden_dim", "0", ["in heads_action", "division by zero"]),
        ("heads.action.num_steps", "0", ["in heads_action (DiffusionHead)"]),
        ("transformer.num_heads", "5", ["token width 32 is not divisible by 5 attention heads"]),
    ],
)
def test_a_model_that_cannot_be_traced_is_a_mistake_of_the_config_in_one_line(key, value, words):
    config = load_config("tests/training/tiny_config.py:synthetic", [(f"model.{key}", value)])
    with pytest.raises(ConfigError, match="the model of the config cannot be built") as caught:
        network_from_config(config)
    assert all(one in str(caught.value) for one in words) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize(
    "overrides,words",
    [
        ("(('nonsense', (None, 'fsdp')),)", "no parameter's path matches"),
        ("(('reverse_network/Dense_0/kernel', ('fsdp', None, None, None)),)", "4 entries for 2 dimensions"),
    ],
)
def test_what_does_not_fit_the_mesh_is_found_before_the_data_is_read(overrides, words, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "inputs_from_config", lambda *args, **kwargs: pytest.fail("data was read"))
    config = load_config("tests/training/tiny_config.py:synthetic,smallest", [("mesh.overrides", overrides)])
    attempt = types.SimpleNamespace(resumes=False, phase=lambda name: contextlib.nullcontext())
    with pytest.raises(ConfigError, match=words):
        train.pretrain(types.SimpleNamespace(workdir=str(tmp_path)), config, attempt)
