"""Sub-tasks that a policy tells itself in training: which samples, which words, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.defaults import batch_spec
from octo_like.common.schema import synthetic_batch
from octo_like.common.text import TextTokenizer
from octo_like.common.vocabularies import load_words
from octo_like.model.octo import build_model, init_params
from octo_like.policy.policy import Policy
from octo_like.training.own_words import OwnSubtasks, check, fitted, told
from octo_like.training.step import sample_keys
from tests.data import said
from tests.training import said_config
from tests.training.test_scripts import params_of, run

LENGTH = 14
TOKENIZER = TextTokenizer.load("builtin", LENGTH)
OWN = "push the block"


def test_ids_are_those_of_a_tokenizer_of_that_length():
    longer, shorter = TextTokenizer.load("builtin", 20), TextTokenizer.load("builtin", 6)
    texts = ["push the block", "", "put the red block on the blue plate then push it"]
    ids = longer.encode(texts)["input_ids"]
    np.testing.assert_array_equal(fitted(ids, 6), shorter.encode(texts)["input_ids"])
    np.testing.assert_array_equal(fitted(ids, 25), TextTokenizer.load("builtin", 25).encode(texts)["input_ids"])


class Parrot:
    """A model that always says the same, to somebody who has not been told what it will say."""

    def __init__(self, text=OWN, max_length=9):
        self.ids = TextTokenizer.load("builtin", max_length).encode([text])["input_ids"]

    def apply(self, variables, observation, task, *, part, method):
        assert method == "predict_text" and part == "text" and variables == {"params": "them"}
        rows = task["pad_mask_dict"]["subtask"].shape[0]
        blank = TOKENIZER.encode([""] * rows)
        for key, leaf in task["subtask"].items():
            np.testing.assert_array_equal(leaf, blank[key])
        return jnp.repeat(jnp.asarray(self.ids), rows, 0)


def batch_of(rows):
    """(instruction told, sub-task told) of each row."""
    texts = ["pick up the red block" if subtask else "" for _, subtask in rows]
    names = ["match" if instruction else "" for instruction, _ in rows]
    masks = {"language_instruction": [i for i, _ in rows], "subtask": [s for _, s in rows]}
    task = {
        "language_instruction": TOKENIZER.encode(names),
        "subtask": TOKENIZER.encode(texts),
        "pad_mask_dict": {key: np.array(mask) for key, mask in masks.items()},
    }
    return {"observation": {}, "task": task, "action": np.zeros(3)}


ROWS = [(True, True), (True, False), (False, True), (False, False), (True, True)]


def words(batch):
    return TOKENIZER.decode(batch["task"]["subtask"]["input_ids"])


def test_who_is_told_what():
    batch, keys = batch_of(ROWS), jax.random.split(jax.random.key(0), len(ROWS))
    own = told(OwnSubtasks(1.0, after=3), Parrot(), "them", batch, keys, jnp.int32(3))
    assert words(own) == [OWN, "", "pick up the red block", "", OWN]
    expected = TOKENIZER.encode(words(own))
    for key, leaf in own["task"]["subtask"].items():
        np.testing.assert_array_equal(leaf, expected[key])
        assert leaf.dtype == batch["task"]["subtask"][key].dtype
    np.testing.assert_array_equal(own["task"]["pad_mask_dict"]["subtask"], batch["task"]["pad_mask_dict"]["subtask"])
    assert own["task"]["language_instruction"] is batch["task"]["language_instruction"]
    assert own["action"] is batch["action"]
    early = told(OwnSubtasks(1.0, after=3), Parrot(), "them", batch, keys, jnp.int32(2))
    assert words(early) == words(batch)
    # Who is asked, and hears what was done before, is not told what to do now.
    reminded = told(
        OwnSubtasks(1.0), Parrot(), "them", batch | {"text_target_kind": np.array([2, 2, 0, 0, 0])}, keys, jnp.int32(0)
    )
    assert words(reminded) == ["pick up the red block", "", "pick up the red block", "", OWN]
    # Who says nothing is told nothing.
    silent = told(OwnSubtasks(1.0), Parrot(""), "them", batch, keys, jnp.int32(0))
    assert words(silent) == ["", "", "pick up the red block", "", ""]
    assert silent["task"]["pad_mask_dict"]["subtask"].tolist() == [False, False, True, False, False]


def test_each_sample_decides_alone():
    rows = [(True, True)] * 400
    keys = sample_keys(0, 5, np.arange(400))
    whole = words(told(OwnSubtasks(0.25), Parrot(), "them", batch_of(rows), keys, jnp.int32(5)))
    assert 70 <= whole.count(OWN) <= 130  # 100, 3.5 standard deviations
    halves = [words(told(OwnSubtasks(0.25), Parrot(), "them", batch_of(rows[i::2]), keys[i::2], 5)) for i in (0, 1)]
    assert whole[::2] == halves[0] and whole[1::2] == halves[1]


def test_a_real_model_is_told_what_its_policy_would_say():
    """Against `Policy.predict_text`, the way a planner asks it, sample by sample."""
    config = said_config.get_config()
    model_config = config.model.to_dict()
    model_config["auxiliaries"]["text"]["vocabulary"] = load_words("builtin")
    model = build_model(model_config, vocab_size=TOKENIZER.vocab_size)
    check(OwnSubtasks(0.5), model, TOKENIZER)
    spec = batch_spec(config, model_config, TOKENIZER)
    params = init_params(model, spec, jax.random.key(3), vocab_size=TOKENIZER.vocab_size)
    policy = Policy({"model": model_config, "batch_spec": spec.to_json()}, params, {}, TOKENIZER)
    batch = synthetic_batch(spec, 5, language_vocab=TOKENIZER.vocab_size)
    batch["task"] |= batch_of(ROWS)["task"] | {
        "pad_mask_dict": batch["task"]["pad_mask_dict"] | batch_of(ROWS)["task"]["pad_mask_dict"]
    }
    batch["text_target_kind"] = np.zeros(5, np.int32)
    keys = jax.random.split(jax.random.key(0), 5)
    own = jax.jit(lambda p, b: told(OwnSubtasks(1.0), model, p, b, keys, jnp.int32(0)))(params, batch)
    asked = policy.predict_text(batch["observation"], policy.create_tasks(texts=["match"] * 5))
    assert words(own) == [asked[0], "", "pick up the red block", "", asked[4]]


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"prob in 0\.\.1"):
        OwnSubtasks(1.5)
    config = said_config.get_config().model.to_dict()
    config["auxiliaries"]["text"]["vocabulary"] = load_words("words")
    model = build_model(config, vocab_size=TOKENIZER.vocab_size)
    with pytest.raises(ValueError, match="is not that of config.text.model"):
        check(OwnSubtasks(0.5), model, TOKENIZER)
    with pytest.raises(ValueError, match="model.auxiliaries.words is no part of kind 'text'"):
        check(OwnSubtasks(0.5, part="words"), model, TOKENIZER)
    check(OwnSubtasks(0.0), model, TOKENIZER)
    del config["task_tokenizers"]["subtask"]
    with pytest.raises(ValueError, match="no task tokenizer of the model has key='subtask'"):
        check(OwnSubtasks(0.5), build_model(config, vocab_size=TOKENIZER.vocab_size), TOKENIZER)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("said")
    said.build(folder, "questions", said.make_questions(60))
    return said.build(folder, "moves", said.make_moves(15))


def test_a_run_resumes_bitwise_and_begins_to_listen_to_itself_when_it_should(data_dir, tmp_path):
    """Until step `after` it is the run without own words, bit for bit; then it is another one."""

    def train(name, *arguments):
        run(
            *("train.py", "--config", "tests/training/said_config.py", "--workdir", tmp_path / name),
            *(f"--config.data.data_dir={data_dir}", "--config.eval.every=None", *arguments),
        )
        return params_of(tmp_path / name)

    own = ("--config.own_subtasks.prob=1.0", "--config.own_subtasks.after=6", "--config.checkpoint.every=4")
    whole = train("whole", "--config.num_steps=12", *own)
    train("parts", "--config.num_steps=8", *own)
    parts = train("parts", "--config.num_steps=12", *own)
    plain = train("plain", "--config.num_steps=12", "--config.checkpoint.every=4")
    same = lambda a, b: all(np.array_equal(a[path], b[path]) for path in a)  # noqa: E731
    assert same(whole, parts) and not same(whole, plain)
    assert same(train("early", "--config.num_steps=6", *own), train("early_plain", "--config.num_steps=6"))
