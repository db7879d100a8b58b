"""Programs for machines without this package: the same actions, what they refuse, a process that has JAX alone."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from octo_like.common.normalization import compute_statistics
from octo_like.common.robot import Description, absolute, gripper
from octo_like.common.schema import BatchSpec, flatten, synthetic_batch
from octo_like.common.text import TextTokenizer
from octo_like.common.vocabularies import load_words
from octo_like.model.octo import build_model, init_params
from octo_like.policy.policy import Policy
from octo_like.policy.pretrained import PretrainedError
from octo_like.policy.program import Program, decode
from octo_like.policy.program_export import export_program
from tests.model import light, test_text_head, tiny
from tests.robot.tiny import tiny_policy

TEXTS = ["reach the red block", "push it left"]
KEY = jax.random.key(3)
# Two programs round differently, and denoising with random weights enlarges that: actions are of order 1 here.
CLOSE = dict(rtol=0, atol=5e-6)
T5 = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)


def make_policy(config, spec, statistics):
    tokenizer = TextTokenizer.load("builtin", spec.language_length) if spec.language_length else None
    model = build_model(config, vocab_size=tokenizer.vocab_size if tokenizer else 0)
    params = tiny.random_params(model, spec)
    return Policy({"model": config, "batch_spec": spec.to_json()}, params, statistics, tokenizer)


def numbers(dims):
    return compute_statistics(np.random.default_rng(dims).normal(0.1, 0.05, (100, dims)))


@pytest.fixture(scope="module")
def everything():
    """Two cameras of which one is conditioned on words and goals, a window of two, diffusion, a head for another robot,
    actions relative to the proprioception."""
    config = tiny.config()
    config["task_tokenizers"]["language"]["vocab_size"] = 0
    config["heads"]["other"] = light.FLOW
    statistics = {
        "arm": {
            "action": numbers(4),
            "proprio": numbers(5),
            "relative_to": [0, 2, None, None],
            "robot": Description(
                10.0,
                (*(absolute(f"joint{i}", "rad") for i in range(3)), gripper()),
                tuple(f"q{i}" for i in range(5)),
            ).to_json(),
        },
        "other": {"action": numbers(4), "proprio": numbers(5), "head": "other"},
    }
    return make_policy(config, tiny.SPEC, statistics)


@pytest.fixture(scope="module")
def robots():
    """Heads and statistics of several robots, no cameras."""
    config = light.config()
    config["task_tokenizers"]["language"]["vocab_size"] = 0
    discrete = dict(kind="discrete", readout="readout_action", num_bins=8, token_per="")
    config["heads"] |= {
        "flow": light.FLOW | {"action_dim": 2},
        "discrete": discrete | dict(action_horizon=2, action_dim=2),
    }
    statistics = {
        "small": {"action": numbers(2), "proprio": numbers(3), "normalization": "bounds", "head": "flow"},
        "blind": {"action": numbers(2), "head": "discrete"},
    }
    return make_policy(config, light.SPEC, statistics)


@pytest.fixture(scope="module")
def with_encoder():
    """A frozen language encoder, which is a program of its own."""
    config = light.config()
    config["task_tokenizers"]["language"] = dict(kind="language", encoder="t5", t5=T5, encoder_dtype="bfloat16")
    return make_policy(config, light.SPEC, {"arm": {"action": numbers(4), "proprio": numbers(5)}})


def given(policy, rows, dataset=None, seed=0):
    """Observations and goals of `rows` robots, with gaps in the history."""
    batch = synthetic_batch(policy.batch_spec, rows, seed=seed)
    observation = batch["observation"]
    del observation["proprio_pad_mask"], observation["pad_mask_dict"]
    entry = policy.statistics.get(dataset, {})
    if dataset is not None and "proprio" not in entry:
        del observation["proprio"]
    elif dataset is not None:
        observation["proprio"] = observation["proprio"][..., : len(entry["proprio"]["mean"])]
    observation["timestep_pad_mask"][0, 0] = False
    return observation, {key: value for key, value in batch["task"].items() if key.startswith("image_")}


@pytest.fixture(scope="module")
def program(everything, tmp_path_factory):
    """For the dataset "arm"."""
    folder = tmp_path_factory.mktemp("programs") / "arm"
    return Program(export_program(everything, folder, unnormalize="arm", instructions=TEXTS))


def compare(policy, program, observation, asked, dataset, rng=KEY):
    """Tasks and actions of both; returns the policy's actions."""
    want = policy.sample_actions(observation, policy.create_tasks(**asked), rng=rng, unnormalize=dataset)
    got = program.sample_actions(observation, program.create_tasks(**asked), rng=rng)
    np.testing.assert_allclose(got, want, **CLOSE)
    return want


def test_actions_are_those_of_the_policy(everything, program):
    """For any number of rows, with words, goals and both, one key or many, and a camera that drops out."""
    for rows in (1, 3):
        observation, goals = given(everything, rows, "arm")
        texts = [*TEXTS, ""][:rows]
        for asked in (dict(texts=texts), dict(goals=goals), dict(texts=texts, goals=goals)):
            want = compare(everything, program, observation, asked, "arm")
    assert np.ptp(np.asarray(want)) > 0.05 and want.shape == (3, 3, 4)
    out = np.ones((3, 2), bool)
    out[1] = False
    observation["pad_mask_dict"] = {"image_wrist": out}
    keys, tasks = jax.random.split(jax.random.key(5), 3), everything.create_tasks(texts=texts)
    seeing = want
    want = everything.sample_actions(observation, tasks, rng=keys, unnormalize="arm")
    assert np.abs(want - seeing).max() > 1e-3
    # The policy's own tasks fit as well, and keys of the old kind.
    got = program.sample_actions(observation, tasks, rng=keys)
    np.testing.assert_allclose(got, want, **CLOSE)
    np.testing.assert_array_equal(program.sample_actions(observation, tasks, rng=jax.random.key_data(keys)), got)


@pytest.mark.parametrize("dataset", [None, "small", "blind"])
def test_units_heads_and_sensors_of_other_datasets(robots, dataset, tmp_path):
    program = Program(export_program(robots, tmp_path / "p", unnormalize=dataset, platforms=["cpu"]))
    observation, _ = given(robots, 2, dataset)
    actions = compare(robots, program, observation, dict(texts=["", ""]), dataset)
    assert ["B", *actions.shape[1:]] == program.spec["outputs"]["actions"]["shape"]
    assert ("observation/proprio" in program.spec["inputs"]) == (dataset != "blind")


def test_a_frozen_encoder_is_a_program_of_its_own(with_encoder, tmp_path):
    policy = with_encoder
    program = Program(export_program(policy, tmp_path / "p", unnormalize="arm", instructions=TEXTS))
    observation, _ = given(policy, 2, "arm")
    compare(policy, program, observation, dict(texts=TEXTS), "arm")
    assert set(program.spec["programs"]) == {"sample_actions", "encode_language"}
    # Tokens that were made elsewhere, from the tokenizer in the folder.
    ids = TextTokenizer.load(str(tmp_path / "p" / "text")).encode(["something new", "push it left"])["input_ids"]
    other = policy.create_tasks(["something new", "push it left"])
    want = policy.sample_actions(observation, other, rng=jax.random.key(0), unnormalize="arm")
    got = program.sample_actions(observation, program.create_tasks(tokens=ids), rng=jax.random.key(0))
    np.testing.assert_allclose(got, want, **CLOSE)


def test_a_policy_that_speaks(tmp_path):
    """What it says, and what it does when it is told that, or what somebody else says."""
    policy = test_text_head.policy()
    program = Program(export_program(policy, tmp_path / "p", instructions=TEXTS, platforms=["cpu"]))
    assert set(program.spec["programs"]) == {"sample_actions", "predict_text"}
    observation, _ = given(policy, 3)
    texts = [*TEXTS, ""]
    said = policy.predict_text(observation, policy.create_tasks(texts=texts))
    assert program.predict_text(observation, program.create_tasks(texts=texts)) == said and len(set(said)) > 1
    heard = ["reach the red block", "push it left", ""]
    for asked in (dict(texts=texts, subtasks=heard), dict(subtasks=heard)):
        compare(policy, program, observation, asked, None)
    # What it says can be told to it, in the ids that it said (of LENGTH, cut to those that it reads, with an end).
    ids = np.array(policy.text_program(
        policy.params, policy.prepare_observations(observation), policy.create_tasks(texts=texts), None,
        part="text", temperature=0.0, top_k=0,
    ))[:, :6]  # fmt: skip
    ids[(ids != 1).all(-1), -1] = 1
    np.testing.assert_array_equal(program.create_tasks(texts=texts, subtasks=said)["subtask/input_ids"], ids)
    given_ids = program.create_tasks(texts=texts, subtasks=ids)
    np.testing.assert_array_equal(given_ids["subtask/input_ids"], ids)
    for wrong in (["dance", "", ""], "dance"):
        with pytest.raises(ValueError, match="no tokens of 'dance'; give ids|subtasks must be a list"):
            program.create_tasks(texts=texts, subtasks=wrong)
    mute = Program(export_program(make_policy(light.config(), light.SPEC, {}), tmp_path / "mute", platforms=["cpu"]))
    with pytest.raises(ValueError, match="takes no subtasks"):
        mute.create_tasks(texts=[""], subtasks=[""])
    with pytest.raises(ValueError, match="says nothing"):
        mute.predict_text({}, {})


def test_a_frozen_encoder_reads_sub_tasks_too(tmp_path):
    config = test_text_head.config()
    words = dict(kind="language", encoder="t5", t5=T5, encoder_dtype="float32")
    config["task_tokenizers"] = dict(language=words, subtask=dict(**words, key="subtask"))
    policy = make_policy(config, test_text_head.SPEC, {})
    program = Program(export_program(policy, tmp_path / "p", instructions=TEXTS, platforms=["cpu"]))
    observation, _ = given(policy, 2)
    told = compare(policy, program, observation, dict(texts=TEXTS, subtasks=TEXTS[::-1]), None)
    untold = compare(policy, program, observation, dict(texts=TEXTS), None)
    assert np.abs(np.asarray(told - untold)).max() > 1e-3


def test_what_is_said_changes_no_exported_text_and_is_not_kept_for_ever(tmp_path, monkeypatch):
    program = Program(export_program(test_text_head.policy(), tmp_path / "p", instructions=TEXTS, platforms=["cpu"]))
    before = program.create_tasks(texts=[TEXTS[0], ""])
    pieces = program.spec["says"]["pieces"]
    space = pieces.index("\u2581")  # alone it says nothing
    says = iter([np.array([[space, 1] + [0] * 8], np.int32), *(np.array([[i, 1] + [0] * 8]) for i in range(3, 103))])
    monkeypatch.setattr(program, "_call", lambda name, inputs: next(says))
    monkeypatch.setattr(program, "_inputs", lambda *_: {})
    monkeypatch.setattr("octo_like.policy.program.SAID", 10)
    assert program.predict_text({}, {}) == [""]
    for key, value in before.items():
        np.testing.assert_array_equal(program.create_tasks(texts=[TEXTS[0], ""])[key], value, err_msg=key)
    assert not program.create_tasks(texts=[TEXTS[0]], subtasks=[""])["pad_mask_dict/subtask"].any()
    for _ in range(100):
        program.predict_text({}, {})
    assert len(program._said) == 10


def test_words_that_cannot_be_told_are_still_said(tmp_path):
    """The ids of what is said are those of another vocabulary than the ids of what is read."""
    config = test_text_head.config(text=dict(vocabulary=load_words("words")))
    params = init_params(build_model(config), test_text_head.SPEC, KEY)
    described = {"model": config, "batch_spec": test_text_head.SPEC.to_json()}
    policy = Policy(described, params, {}, TextTokenizer.load("builtin", 6))
    program = Program(export_program(policy, tmp_path / "p", platforms=["cpu"]))
    observation, _ = given(policy, 2)
    said = program.predict_text(observation, program.create_tasks(texts=["", ""]))
    assert said == policy.predict_text(observation, policy.create_tasks(texts=["", ""]))
    with pytest.raises(ValueError, match="no tokens of"):
        program.create_tasks(subtasks=said)


@pytest.mark.parametrize("name", ["builtin", "words"])
def test_ids_are_decoded_as_sentencepiece_does(name):
    tokenizer = TextTokenizer.load(name, 40)
    sentences = ["put the red block on the white plate", "<loc21><loc40> close <loc03><loc63> open", "it is done", ""]
    rng = np.random.default_rng(0)
    rows = [row for row in tokenizer.encode(sentences)["input_ids"]]
    rows += [np.append(rng.integers(3, tokenizer.vocab_size, 9), [1, 0, 0]) for _ in range(50)]
    for row in rows:
        assert decode(tokenizer.pieces(), row) == tokenizer.decode(row[None])[0]
    assert decode(["", "", "?", "\u2581caf", "<0xC3>", "<0xA9>"], [3, 4, 5, 1, 3]) == "café"


def test_embeddings_in_place_of_words(tmp_path):
    spec = BatchSpec(1, 3, 4, image_sizes={}, proprio_dim=5, language_embedding=(7,))
    config = light.config(max_window=1)
    config["task_tokenizers"] = dict(language=dict(kind="language", encoder="embedding"))
    policy = make_policy(config, spec, {})
    program = Program(export_program(policy, tmp_path / "p"))
    observation, _ = given(policy, 2)
    embeddings = np.random.default_rng(0).normal(size=(2, 7)).astype(np.float32)
    compare(policy, program, observation, dict(embeddings=embeddings), None)


def test_what_a_robot_does_not_have_is_masked_and_only_that(everything, tmp_path):
    program = Program(export_program(everything, tmp_path / "p", unnormalize="arm", missing=["image_wrist"]))
    observation, _ = given(everything, 2, "arm")
    del observation["image_wrist"]
    tasks, rng = everything.create_tasks(TEXTS), jax.random.key(0)
    want = everything.sample_actions(observation, tasks, rng=rng, unnormalize="arm")
    np.testing.assert_allclose(program.sample_actions(observation, tasks, rng=rng), want, **CLOSE)
    # Heads of other robots stay behind.
    assert set(program._params) < {name for name, _ in flatten(everything.params)}
    assert not [name for name in program._params if "heads_other" in name]
    with pytest.raises(ValueError, match="unknown: image_wrist"):
        program.sample_actions({**observation, "image_wrist": np.zeros((2, 2, 16, 16, 3), np.uint8)}, tasks, rng=rng)


def test_the_description_says_what_goes_in_and_out(program):
    spec, folder = program.spec, program.folder
    assert spec["inputs"]["observation/image_primary"]["shape"] == ["B", 2, 32, 32, 3]
    assert spec["inputs"]["observation/proprio"]["names"] == [f"q{i}" for i in range(5)]
    assert spec["outputs"]["actions"]["names"] == ["joint0", "joint1", "joint2", "gripper"]
    assert spec["outputs"]["actions"]["units"] == ["rad", "rad", "rad", "1"]
    assert set(spec["statistics"]) == {"arm"} and set(spec["instructions"]) == {"", *TEXTS}
    assert "observation/pad_mask_dict/proprio" not in spec["inputs"]  # the actions are relative to it
    assert folder.stat().st_mode & 0o777 == 0o755
    assert len({file.stat().st_mode & 0o777 for file in folder.iterdir() if file.is_file()}) == 1


def test_sizes_and_devices(tmp_path):
    policy = tiny_policy("arm", 3, 4)
    program = Program(export_program(policy, tmp_path / "p", batch_sizes=[1, 2], platforms=["cpu"]))
    for rows in (1, 2):
        compare(policy, program, given(policy, rows)[0], dict(texts=[""] * rows), None)
    observation, _ = given(policy, 3)
    with pytest.raises(ValueError, match=r"\[3\]; expected one number of \['1', '2'\]"):
        program.sample_actions(observation, program.create_tasks([""] * 3), rng=KEY)
    with pytest.raises(ValueError, match=r"keys: \[1, 3\]"):
        program.sample_actions(observation, program.create_tasks([""]), rng=KEY)
    elsewhere = export_program(policy, tmp_path / "tpu", platforms=["tpu", "cuda"])
    with pytest.raises(ValueError, match="is for tpu, cuda; JAX runs on cpu"):
        Program(elsewhere)


def test_bad_inputs_are_named(everything, program):
    observation, goals = given(everything, 2, "arm")
    tasks = program.create_tasks(TEXTS)

    def refused(message, tasks=tasks, rng=KEY, **changes):
        changed = {key: value for key, value in {**observation, **changes}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            program.sample_actions(changed, tasks, rng=rng)

    refused("missing: image_wrist", image_wrist=None)
    refused("missing: timestep_pad_mask", timestep_pad_mask=None)
    refused("unknown: image_wrst", image_wrst=observation["image_wrist"])
    refused(
        r"image_primary: expected \(B, 2, 32, 32, 3\) uint8, got \(2, 32, 32, 3\) uint8",
        image_primary=observation["image_primary"][:, 0],
    )
    refused("image_primary: expected .* got .* float64", image_primary=observation["image_primary"] / 255.0)
    refused("proprio: NaN", proprio=observation["proprio"] * np.nan)
    refused("rng must be a threefry key", rng=0)
    refused("rng must be a threefry key", rng=jax.random.key(0, impl="rbg"))
    refused("missing: timestep", tasks={})
    for message, arguments in {
        "no tokens of 'dance'; give tokens=.*'push it left'": dict(texts=["dance"]),
        "texts must be a list": dict(texts="push it left"),
        "a task needs": {},
        "unknown: image_wrist": dict(goals={"image_wrist": goals["image_primary"]}),
        r"input_ids: expected \(B, 6\) int32, got \(1, 3\)": dict(tokens=[[3, 1, 0]]),
        "input_ids: expected .* float64": dict(tokens=np.ones((1, 6))),
    }.items():
        with pytest.raises(ValueError, match=message):
            program.create_tasks(**arguments)


def test_bad_exports_are_named(everything, tmp_path):
    def refused(message, **arguments):
        with pytest.raises(ValueError, match=message):
            export_program(everything, tmp_path / "p", **arguments)

    refused("unknown platform 'gpu'; did you mean|valid", platforms=["gpu"])
    refused("platforms must be a list", platforms="cpu")
    refused("at least one", platforms=[])
    refused("whole numbers from 1", batch_sizes=[0])
    refused("unknown unnormalisation 'amr'", unnormalize="amr")
    refused("unknown head 'acton'", head="acton")
    refused("no observation 'image_wrst'", missing=["image_wrst"])
    refused("are relative to proprio", unnormalize="arm", missing=["proprio"])
    refused("instructions must be a list", instructions="push it")
    assert not list(tmp_path.iterdir())
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("precious")
    with pytest.raises(PretrainedError, match="is not an exported program; it is not overwritten"):
        export_program(everything, tmp_path / "p")


def test_a_damaged_program_is_refused(tmp_path):
    folder = export_program(tiny_policy("arm", 3, 4), tmp_path / "p", platforms=["cpu"])
    data = bytearray((folder / "params.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "params.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="params.safetensors is damaged"):
        Program(folder)
    document = json.loads((folder / "program.json").read_text())
    (folder / "program.json").write_text(json.dumps({**document, "format_version": 2}))
    with pytest.raises(ValueError, match="format version 2, this file reads 1"):
        Program(folder)


def test_an_edited_program_is_refused(tmp_path):
    """Any file, program.json included, and what is missing or not its own. Older exports have fewer digests."""
    folder = export_program(tiny_policy("arm", 3, 4), tmp_path / "p", platforms=["cpu"])
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"program.json", "program.py", "text/tokenizer.model"} <= names
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "program.pyc").write_bytes(b"x")
    for name in names:
        data = (folder / name).read_bytes()
        if name == "program.json":
            changed = json.loads(data)
            changed["outputs"]["actions"]["meaning"] = "centimetres"
            (folder / name).write_text(json.dumps(changed))
        else:
            (folder / name).write_bytes(data + b" ")
        with pytest.raises(ValueError, match=f"{name} (is damaged|was edited): its SHA-256"):
            Program(folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match="is missing or cannot be read|it has no program.json"):
            Program(folder)
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="notes.txt is no file of this export"):
        Program(folder)
    (folder / "program.json").write_text("{")
    with pytest.raises(ValueError, match="program.json is damaged"):
        Program(folder)
    older = export_program(tiny_policy("arm", 3, 4), tmp_path / "q", platforms=["cpu"]) / "program.json"
    document = json.loads(older.read_text())
    del document["sha256"]
    document["files"] = {n: d for n, d in document["files"].items() if n.endswith((".bin", ".safetensors"))}
    older.write_text(json.dumps(document))
    assert Program(tmp_path / "q").spec["platforms"] == ["cpu"]


ALONE = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("flax", "octo_like", "tensorflow", "orbax", "safetensors", "sentencepiece"):
                raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

    sys.meta_path.insert(0, Blocker())
    folder, data = sys.argv[1:]
    sys.path.insert(0, folder)
    import jax, numpy as np
    from program import Program

    given = dict(np.load(data))
    program = Program(folder)
    tasks = program.create_tasks(texts=["push it left", "reach the red block"])
    actions = program.sample_actions(given, tasks, rng=jax.random.key(7))
    np.save(data.replace("given.npz", "actions.npy"), actions)
    known = {name.split(".")[0] for name in sys.modules}
    assert not known & {"flax", "octo_like", "tensorflow", "orbax", "safetensors"}, known
"""


def test_a_process_with_jax_alone(tmp_path, repository):
    """The script writes the program of an exported policy; a process that has no other package of ours runs it."""
    config = light.config()
    config["task_tokenizers"]["language"]["vocab_size"] = 0
    policy = make_policy(config, light.SPEC, {"arm": {"action": numbers(4), "proprio": numbers(5)}})
    policy.save_pretrained(tmp_path / "export")
    script, environment = repository / "scripts" / "export_program.py", {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, str(script), "--checkpoint", str(tmp_path / "export")]
    command += ["--output", str(tmp_path / "program"), "--instructions", *TEXTS, "--platforms", "cpu", "cuda"]
    run = dict(capture_output=True, text=True, timeout=300)
    wrong = subprocess.run([*command, "--unnormalize", "amr"], env=environment, **run)
    assert wrong.returncode == 2 and "did you mean" in wrong.stderr and "Traceback" not in wrong.stderr
    done = subprocess.run([*command, "--unnormalize", "arm"], env=environment, **run)
    assert done.returncode == 0, done.stderr
    assert "actions" in done.stdout and "(B, 3, 4) float32" in done.stdout
    observation, _ = given(policy, 2, "arm")
    np.savez(tmp_path / "given.npz", **observation)
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", textwrap.dedent(ALONE), str(tmp_path / "program"), str(tmp_path / "given.npz")]
    done = subprocess.run(command, env=alone, cwd=tmp_path, **run)
    assert done.returncode == 0, done.stderr
    tasks = policy.create_tasks(texts=["push it left", "reach the red block"])
    want = policy.sample_actions(observation, tasks, rng=jax.random.key(7), unnormalize="arm")
    np.testing.assert_allclose(np.load(tmp_path / "actions.npy"), want, **CLOSE)
