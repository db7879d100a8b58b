"""finetune.py: what it starts from, what it changes, what it leaves alone, and how it goes on after a SIGKILL."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

import finetune
from octo_like.common.config import ConfigError, load_config
from octo_like.common.defaults import LORA_TARGETS, adaptation_config
from octo_like.common.schema import BatchSpec, flatten, synthetic_batch
from octo_like.common.text import BUILTIN, TextTokenizer
from octo_like.model.octo import build_model
from octo_like.policy.lora import LoraSpec, is_adapter
from octo_like.policy.policy import Policy
from octo_like.policy.surgery import CONDITIONINGS, MODES
from octo_like.training import adaptation
from octo_like.training.adaptation import with_schedule
from octo_like.training.checkpoint import Checkpointer
from octo_like.training.metrics import read_metrics
from tests.data.conftest import build, make_episodes
from tests.model import tiny
from tests.model.test_loading import other  # noqa: F401  a fixture
from tests.training import tiny_config
from tests.training.test_scripts import ROOT, run

CONFIG = f"{ROOT}/tests/training/tiny_config.py:finetune"
SYNTHETIC = ("--config.data.kind=synthetic", "--config.optimizer.warmup_steps=1")
WIDER = "--config.surgery.heads.action.action_dim=6"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A pretrained policy for cameras, proprio, language and goal images, with random weights everywhere."""
    tokenizer = TextTokenizer.load("builtin", 8)
    spec = BatchSpec(
        window_size=2,
        action_horizon=3,
        action_dim=4,
        image_sizes={"primary": (32, 40), "wrist": (16, 16)},
        goal_images=("primary",),
        proprio_dim=4,
        language_length=8,
    )
    config = tiny_config.model()
    params = tiny.random_params(build_model(config, vocab_size=tokenizer.vocab_size), spec)
    path = tmp_path_factory.mktemp("pretrained") / "export"
    Policy({"model": config, "batch_spec": spec.to_json()}, params, {}, tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def prepared(monkeypatch, tmp_path):
    """Runs finetune.py up to the loop; returns what the loop was given."""
    found = {}
    alone = types.SimpleNamespace(phase=lambda name: contextlib.nullcontext(), resumes=False)
    monkeypatch.setattr(finetune, "Attempt", lambda flags, config: contextlib.nullcontext(alone))
    monkeypatch.setattr(finetune, "run_loop", lambda given: found.update(run=given) or 0)
    # Random values in place of the model's own: nothing has to be compiled.
    monkeypatch.setattr(adaptation, "init_params", lambda model, spec, rng: tiny.random_params(model, spec, seed=9))

    def call(*arguments, config=CONFIG):
        status = finetune.main(["--config", config, "--workdir", str(tmp_path / "run"), *map(str, arguments)])
        assert status == 0
        return found["run"]

    return call


def finetuned(workdir, *arguments, **kwargs):
    return run("finetune.py", "--config", CONFIG, "--workdir", workdir, *arguments, **kwargs)


def final_sums(workdir):
    """Exact checksums of every array of the newest checkpoint: parameters, factors, optimizer, average."""
    manifest = Checkpointer(workdir, read_only=True).read()
    return manifest.step, {name: leaf["sums"] for name, leaf in manifest.leaves.items()}


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    build(folder, "toy_wide", {"train": make_episodes(12, seed=5, action_dim=6)})
    return folder


@pytest.fixture(scope="module")
def lora_run(data_dir, export, tmp_path_factory):
    """(arguments, workdir) of an uninterrupted adaptation by LoRA to six action dimensions."""
    arguments = (
        f"--config.data.data_dir={data_dir}",
        "--config.data.datasets.toy.name=toy_wide",
        f"--config.pretrained={export}",
        "--config.mode=lora",
        "--config.lora.rank=4",
        WIDER,
        "--config.num_steps=60",
    )
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    finetuned(workdir, *arguments)
    return arguments, workdir


def test_lora_trains_what_it_says_and_exports_a_policy(lora_run, export):
    _, workdir = lora_run
    before = dict(flatten(Policy.load_pretrained(export).params))
    policy = Policy.load_pretrained(workdir / "export")
    after = dict(flatten(policy.params))
    assert not any(is_adapter(path) for path in after), "merged"
    moved = {path for path in before if before[path].shape != after[path].shape or np.any(before[path] != after[path])}
    kernels = {path for path in before if "BlockTransformer_0" in path and path.endswith("kernel")}
    expected = {
        p for p in kernels if any(f"/{n}/" in p for n in ("query", "key", "value", "out", "Dense_0", "Dense_1"))
    }
    assert {path for path in moved if not path.startswith("heads_")} == expected
    assert {path for path in moved if path.startswith("heads_")} == {p for p in after if p.startswith("heads_")}
    spec, sums = policy.batch_spec, final_sums(workdir)[1]
    assert spec.action_dim == 6
    of_optimizer = [name for name in sums if name.startswith("opt_state") and "BlockTransformer" in name]
    assert of_optimizer and all("lora_" in name for name in of_optimizer)
    batch = synthetic_batch(spec, 2)
    tasks = policy.create_tasks(texts=["press the red button", ""])
    actions = policy.sample_actions(batch["observation"], tasks, rng=jax.random.key(0), unnormalize="toy")
    assert actions.shape == (2, 3, 6) and np.all(np.isfinite(actions))
    report = (workdir / "weights.txt").read_text()
    assert "resized  heads_action/diffusion_model/reverse_network/Dense_1/kernel: 32x12 to 32x18" in report
    assert (workdir / "weights.json").exists()


def test_lora_continues_after_a_kill_as_if_nothing_had_been(lora_run, tmp_path):
    arguments, whole = lora_run
    workdir = tmp_path / "killed"
    command = [sys.executable, "finetune.py", "--config", CONFIG, "--workdir", str(workdir), *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while not (workdir / "checkpoints" / "8").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()[-3000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (workdir / "export").exists()
    process.stderr.close()
    done = finetuned(workdir, *arguments)
    assert "resumed from step" in done.stderr and "resumed from step 0" not in done.stderr
    assert final_sums(workdir) == final_sums(whole)
    one, two = (dict(flatten(Policy.load_pretrained(w / "export").params)) for w in (whole, workdir))
    assert all(np.array_equal(one[path], two[path]) for path in one)


@pytest.mark.slow  # two minutes; eight devices of pretraining are in test_scripts.py
def test_lora_on_eight_devices(export, tmp_path):
    """Factors, frozen kernels and batch sharded or not: the same losses."""
    losses = {}
    common = (*SYNTHETIC, f"--config.pretrained={export}", "--config.mode=lora", "--config.num_steps=12", WIDER)
    for devices in (1, 8):
        mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4") if devices == 8 else ()
        finetuned(tmp_path / str(devices), *common, *mesh, devices=devices)
        rows = read_metrics(tmp_path / str(devices))
        losses[devices] = np.array([row["train/loss"] for row in rows if "train/loss" in row])
    assert len(losses[1]) == 12 and losses[1][-1] != losses[1][0]
    np.testing.assert_allclose(losses[1], losses[8], rtol=1e-5)


def test_an_octo_release_with_t5_is_adapted(shared, tmp_path):
    """The golden release: language through a frozen T5, goal channels that stay empty, LoRA; the export acts."""
    release = shared / "golden" / "octo_tiny_diffusion"
    workdir = tmp_path / "release"
    arguments = (f"--config.pretrained={release}", f"--config.text.model={BUILTIN}", "--config.num_steps=3")
    config = f"{ROOT}/configs/finetune.py:lora,language"
    more = (
        "--config.batch_size=4",
        "--config.log_every=1",
        "--config.eval.every=None",
        "--config.checkpoint.keep_best=0",
        *SYNTHETIC,
    )
    run("finetune.py", "--config", config, "--workdir", workdir, *arguments, *more)
    before = dict(flatten(Policy.load_pretrained(release).params))
    policy = Policy.load_pretrained(workdir / "export")
    after = dict(flatten(policy.params))
    t5 = [path for path in after if "/hf_model/" in path]
    assert t5 and all(np.array_equal(before[path], after[path]) for path in t5)
    assert after.keys() == before.keys() and policy.config["model"]["octo_compat"]
    assert policy.batch_spec.goal_images == () and policy.batch_spec.image_sizes == {
        "primary": (64, 64),
        "wrist": (32, 32),
    }
    batch = synthetic_batch(policy.batch_spec, 1)
    actions = policy.sample_actions(batch["observation"], policy.create_tasks(texts=["go"]), rng=jax.random.key(0))
    assert actions.shape == (1, 4, 7) and np.all(np.isfinite(actions))


def test_a_pretraining_run_s_checkpoint(tmp_path, prepared):
    """checkpoints/STEP serves as well as an export does: averaged parameters, config and tokenizer of the run."""
    workdir = tmp_path / "pretrain"
    run("train.py", "--config", CONFIG.replace("finetune", "synthetic"), "--workdir", workdir, "--config.num_steps=5")
    exported = dict(flatten(Policy.load_pretrained(workdir / "export").params))
    for location in (workdir / "checkpoints", workdir / "checkpoints" / "5"):
        given = prepared(*SYNTHETIC, f"--config.pretrained={location}", "--config.num_steps=2")
        start = dict(flatten(given.init_from))
        assert start.keys() == exported.keys()
        assert all(np.array_equal(start[path], leaf) for path, leaf in exported.items())
    step4 = prepared(*SYNTHETIC, f"--config.pretrained={workdir / 'checkpoints' / '4'}", "--config.num_steps=2")
    assert any(not np.array_equal(leaf, exported[path]) for path, leaf in flatten(step4.init_from))


def test_early_stopping(export, tmp_path):
    """The largest loss is called the best, so none beats the first: stopped after `patience` more evaluations."""
    common = (*SYNTHETIC, f"--config.pretrained={export}", "--config.num_steps=40", "--config.mode=head_only")
    rounds = ("--config.eval.every=3", "--config.checkpoint.every=3", "--config.early_stopping.patience=2")
    done = finetuned(tmp_path / "run", *common, *rounds, "--config.checkpoint.best_mode=max")
    assert "stopped early at step 9: 2 evaluations without a better score" in done.stderr
    assert done.stderr.count("the kinds of some action dimensions are not known") == 1  # for two exports
    assert read_metrics(tmp_path / "run")[-1]["step"] == 9
    reader = Checkpointer(tmp_path / "run", read_only=True)
    assert reader.all_steps() == [3, 6, 9] and reader.read(9).extra["early_stopping"]["without"] == 2
    best, last = (dict(flatten(Policy.load_pretrained(tmp_path / "run" / e).params)) for e in ("export_best", "export"))
    average = reader.load_arrays(3, "ema/")
    assert all(np.array_equal(best[path], leaf) for path, leaf in average.items())
    assert any(not np.array_equal(best[path], last[path]) for path in average)


# ----------------------------------------------------------------------------------------------- up to the loop, no run


def test_surgery_from_the_command_line(export, prepared):
    """No wrist camera, a second scene camera that starts as a copy, a longer window, another proprioception."""
    given = prepared(
        *SYNTHETIC,
        f"--config.pretrained={export}",
        "--config.image_sizes={'primary': (32, 40), 'side': (32, 40)}",
        "--config.surgery.observation_tokenizers.side.copy_of=primary",
        "--config.surgery.max_window=6",
        "--config.window_size=5",
        "--config.proprio_dim=9",
        "--config.num_steps=2",
        "--config.mode=head_only",
    )
    params, policy = dict(flatten(given.init_from)), dict(flatten(Policy.load_pretrained(export).params))
    prefix = "octo_transformer/observation_tokenizers_{}/ConvStem_0/Conv_0/kernel"
    np.testing.assert_array_equal(params[prefix.format("side")], policy[prefix.format("primary")])
    assert prefix.format("wrist") not in params and "wrist" in given.documents["weights.txt"]
    assert params["octo_transformer/obs_primary_pos_embedding"].shape[1] == 6
    trained = {path for path in params if path not in given.frozen and not path.startswith("heads_")}
    assert trained == {
        "octo_transformer/obs_primary_pos_embedding",
        "octo_transformer/obs_side_pos_embedding",
        "octo_transformer/obs_proprio_pos_embedding",
        "octo_transformer/readout_action_pos_embedding",
        "octo_transformer/obs_proprio_projection/kernel",
        "octo_transformer/obs_proprio_projection/bias",
        *(path for path in params if re.match("octo_transformer/(observation_tokenizers|obs)_side", path)),
    }, "what is new or a copy or has new rows, and nothing else"


def test_a_part_that_speaks_from_the_command_line(export, prepared):
    part = dict(kind="text", readout="readout_text", vocabulary="builtin", max_length=8, width=16, num_heads=2)
    given = prepared(
        *SYNTHETIC,
        f"--config.pretrained={export}",
        "--config.surgery.readouts.text=2",
        f"--config.surgery.auxiliaries.text={part}",
        "--config.num_steps=2",
        "--config.mode=head_only",
    )
    params = dict(flatten(given.init_from))
    of_part = {path for path in params if path.startswith("auxiliaries_text/")}
    assert of_part and not of_part & given.frozen
    assert "octo_transformer/readout_text_pos_embedding" not in given.frozen
    batch = next(given.inputs.stream)
    assert batch["text_target"]["input_ids"].shape[-1] == 8 and "auxiliaries_text" in given.documents["weights.txt"]


def test_a_part_without_labels_is_refused_when_new_and_kept_when_pretrained(data_dir, export, prepared, tmp_path):
    files = (f"--config.data.data_dir={data_dir}", "--config.data.datasets.toy.name=toy_wide", WIDER)
    points = f"--config.surgery.auxiliaries.points={tiny_config.POINTS}"
    with pytest.raises(ConfigError, match="model.auxiliaries.points learns where things are .*: toy: none"):
        prepared(*files, f"--config.pretrained={export}", points)
    given = prepared(*SYNTHETIC, f"--config.pretrained={export}", points, "--config.num_steps=2")
    given.make_policy(given.init_from).save_pretrained(tmp_path / "told")
    kept = prepared(*files, f"--config.pretrained={tmp_path / 'told'}")
    paths = {path for path, _ in flatten(kept.init_from) if path.startswith("auxiliaries_points/")}
    assert paths and paths <= kept.frozen and not paths & given.frozen
    with pytest.raises(ConfigError, match="model.heads.nav: no dataset"):
        prepared(*files, f"--config.pretrained={export}", "--config.surgery.heads.nav.copy_of=action")


@pytest.mark.parametrize("mode", MODES)
def test_a_copied_camera_is_trained_in_every_mode(export, prepared, mode):
    """It begins as the other camera's and is this robot's to learn; only a regex of one's own keeps it as it is."""
    common = (
        *SYNTHETIC,
        f"--config.pretrained={export}",
        "--config.image_sizes={'primary': (32, 40), 'side': (32, 40)}",
        "--config.surgery.observation_tokenizers.side.copy_of=primary",
        "--config.num_steps=2",
        f"--config.mode={mode}",
        "--config.lora.rank=4",
        "--config.lora.targets=('BlockTransformer_0/.*/query/kernel','observation_tokenizers_.*/Conv_0/kernel')",
    )
    own = "octo_transformer/(observation_tokenizers|obs)_side"
    given = prepared(*common)
    paths = [path for path, _ in flatten(given.init_from) if re.match(own, path)]
    assert len(paths) >= 5 and not given.frozen & set(paths) and not any(map(is_adapter, paths))
    assert mode == "full" or any("tokenizers_primary" in path for path in given.frozen) == (
        mode != "frozen_transformer"
    )
    kept = prepared(*common, "--config.optimizer.freeze=observation_tokenizers_side/")
    assert {path for path in paths if "observation_tokenizers_side/" in path} <= kept.frozen


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_conditioning_decides_what_a_batch_holds(export, prepared, conditioning):
    stem = {"film_keys": (), "stem": {"kind": "conv", "layers": ((8, 8, 16),)}}  # not steered by words
    plain = f"--config.surgery.observation_tokenizers={dict(primary=stem, wrist=stem)}"
    given = prepared(
        *SYNTHETIC,
        f"--config.pretrained={export}",
        f"--config.conditioning={conditioning}",
        "--config.goal_images=()",
        "--config.num_steps=2",
        plain,
    )
    spec = given.inputs.stream.batch_spec
    assert spec.goal_images == (() if conditioning == "language" else ("primary",))
    assert spec.language_length == (None if conditioning == "goal_image" else 8)
    assert any("task_language" in path for path, _ in flatten(given.init_from)) == (conditioning != "goal_image")
    policy = given.make_policy(given.init_from)
    assert (policy.text_tokenizer is None) == (conditioning == "goal_image")


def test_the_other_golden_release_with_its_sentence_embeddings_replaced(shared, prepared):
    """FiLM on precomputed sentences cannot be fed by datasets; told so, one replaces it and keeps the transformer."""
    release = shared / "golden" / "octo_tiny_film_map"
    common = (*SYNTHETIC, f"--config.pretrained={release}", "--config.num_steps=2")
    config = f"{ROOT}/configs/finetune.py:head_mlp_only,language"
    with pytest.raises(ValueError, match="sentence embeddings"):
        prepared(*common, config=config)
    base = Policy.load_pretrained(release)
    cameras = {
        name: {"film_keys": ("task",)}
        for name, entry in base.config["model"]["observation_tokenizers"].items()
        if entry.get("film_keys")
    }
    given = prepared(
        *common,
        f"--config.surgery.observation_tokenizers={cameras}",
        "--config.surgery.task_tokenizers.language={'kind': 'language', 'encoder': 'small', 'dim': 16, 'pool': True}",
        f"--config.proprio_dim={base.batch_spec.proprio_dim}",
        config=config,
    )
    loaded = {path for path, _ in flatten(base.params)} & given.frozen
    assert any("BlockTransformer_0" in path for path in loaded)
    assert any("map_head/probe" in path for path in loaded) and not any("map_head/MlpBlock" in p for p in loaded)
    assert not any(path.startswith("octo_transformer/task_") for path in given.frozen), "new, so it is trained"


def test_a_made_up_release(other, prepared):  # noqa: F811
    """Other tokenizers, heads and widths; no language that datasets hold. Its transformer and heads carry over."""
    path, source = other
    given = prepared(
        *SYNTHETIC,
        f"--config.pretrained={path}",
        "--config.num_steps=2",
        "--config.window_size=2",
        "--config.proprio_dim=6",
        "--config.surgery.observation_tokenizers.front=None",
        "--config.surgery.task_tokenizers.language={'kind': 'language', 'encoder': 'small', 'dim': 16, 'pool': True}",
        config=f"{ROOT}/configs/finetune.py:frozen_transformer,both",
    )
    spec = given.inputs.stream.batch_spec
    assert spec.goal_images == ("wrist",) and spec.image_sizes == {"primary": (32, 32), "wrist": (32, 32)}
    start, source = dict(flatten(given.init_from)), dict(flatten(source))
    kept = [name for name in source if name.startswith(("heads_", "octo_transformer/BlockTransformer_0/"))]
    assert kept and all(np.array_equal(start[name], source[name]) for name in kept)
    assert given.frozen == {name for name in kept if not name.startswith("heads_")}
    assert "unused   observation_tokenizers_front" in given.documents["weights.txt"]


def test_what_is_derived_from_the_number_of_demonstrations():
    config = adaptation_config()
    config.batch_size = 50
    derived = with_schedule(config, 1200)
    assert (derived.num_steps, derived.optimizer.warmup_steps, derived.ema_decay) == (2400, 120, 0.995833)
    assert with_schedule(config, 10).num_steps == 500 and with_schedule(config, 10**7).num_steps == 50_000
    config.num_steps = 40
    short = with_schedule(config, 0)
    assert (short.num_steps, short.optimizer.warmup_steps, short.ema_decay) == (40, 2, 0.9)
    config.optimizer.warmup_steps, config.ema_decay = 0, 0.5
    assert (with_schedule(config, 0).optimizer.warmup_steps, with_schedule(config, 0).ema_decay) == (0, 0.5)
    assert with_schedule(config, 0).checkpoint.keep_best == 1
    assert with_schedule(config, 0, validated=False).checkpoint.keep_best == 0
    config.early_stopping.patience = 3
    with pytest.raises(ConfigError, match="held-out"):
        with_schedule(config, 0, validated=False)
    config.num_steps = None
    with pytest.raises(ConfigError, match="num_steps"):
        with_schedule(config, 0)


def test_words_of_the_config():
    path = f"{ROOT}/configs/finetune.py"
    config = load_config(f"{path}:lora,goal_image")
    assert (config.mode, config.conditioning) == ("lora", "goal_image")
    assert load_config(path).mode == "full" and load_config(f"{path}:tabletop").conditioning == "language"
    from configs import finetune as module

    assert module.MODES == tuple(MODES) and module.CONDITIONINGS == CONDITIONINGS
    assert LoraSpec().targets == LORA_TARGETS and LoraSpec().rank == adaptation_config().lora.rank
    for words, expected in (
        ("lora,full", "exclude each other"),
        ("language,both", "exclude each other"),
        ("lorra", "head_mlp_only.*goal_image.*tabletop"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load_config(f"{path}:{words}")


def test_settings_of_an_experiment_are_flags(export, tmp_path):
    """Augmentation, weight decay, average, frozen parts, and LoRA of transformer and image encoder, in one real run."""
    workdir = tmp_path / "run"
    finetuned(
        workdir,
        *SYNTHETIC,
        f"--config.pretrained={export}",
        "--config.mode=lora",
        "--config.lora.rank=3",
        "--config.lora.targets=('BlockTransformer_0/.*/Dense_0/kernel','observation_tokenizers_primary/.*Conv_0/kernel')",
        "--config.optimizer.freeze=('diffusion_model/time_','obs_proprio')",
        "--config.optimizer.weight_decay=0.5",
        "--config.optimizer.peak=0.01",
        "--config.ema_decay=0.5",
        "--config.augmentation.primary.shift=0.1",
        "--config.augmentation.primary.hue=None",
        "--config.augmentation.wrist.contrast=(0.8,1.2)",
        "--config.num_steps=4",
    )
    reader = Checkpointer(workdir, read_only=True)
    config = reader.read().metadata["config"]
    assert config["augmentation"]["primary"]["shift"] == 0.1 and config["augmentation"]["primary"]["crop_scale"]
    assert tuple(config["augmentation"]["wrist"]["contrast"]) == (0.8, 1.2)
    before, after = (dict(flatten(Policy.load_pretrained(p).params)) for p in (export, workdir / "export"))
    moved = {path for path in before if np.any(before[path] != after[path])}
    adapted = {
        p for p in before if re.search("BlockTransformer_0/.*/Dense_0/kernel|tokenizers_primary/.*Conv_0/kernel", p)
    }
    assert len(adapted) >= 3 and adapted <= moved
    frozen = {p for p in before if p.startswith("octo_transformer/") and p not in adapted}
    assert not moved & (frozen | {p for p in before if "diffusion_model/time_" in p})
    # The export holds the average of the factors, merged, and not the last ones.
    factors = {p: leaf for p, leaf in reader.load_arrays(4, "ema/").items() if is_adapter(p)}
    path = next(p for p in adapted if "Conv_0" in p)
    a, b = (factors[path.replace("kernel", name)] for name in ("lora_a", "lora_b"))
    np.testing.assert_allclose(after[path], before[path] + 16 / 3 * (a @ b).reshape(before[path].shape), atol=1e-6)


def test_a_replaced_head_is_warned_of_and_a_changed_one_is_not(export, prepared, caplog):
    """The command of the README changes a field; a dict with a kind drops the pretrained head's other fields."""
    common = (*SYNTHETIC, f"--config.pretrained={export}", "--config.num_steps=2")
    kept = prepared(*common, "--config.surgery.heads.action.action_dim=8")
    assert kept.model.heads["action"].hidden_dim == 32 and "replaces" not in caplog.text
    assert "lost of the checkpoint: nothing" in kept.documents["weights.txt"]
    entry = "{'kind': 'diffusion', 'readout': 'readout_action', 'action_horizon': 3, 'action_dim': 8}"
    given = prepared(*common, f"--config.surgery.heads.action={entry}")
    assert given.model.heads["action"].hidden_dim != 32
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("surgery.heads.action replaces" in message and "hidden_dim=32" in message for message in warned)
    lines = given.documents["weights.txt"].splitlines()
    assert any(line.startswith("lost of the checkpoint: ") and "heads_action" in line for line in lines)
    # In the README as in the docs, a head of the same kind is changed and not replaced.
    with open(f"{ROOT}/README.md", encoding="utf-8") as file:
        assert "surgery.heads.action=" not in file.read()
