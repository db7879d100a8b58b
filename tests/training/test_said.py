"""Robot data and pictures with words in one run: what is learned from which row, resume, export, what is logged."""

import json

import numpy as np
import pytest

from octo_like.common.errors import ConfigError
from octo_like.common.vocabularies import load_words
from octo_like.model.octo import build_model
from octo_like.policy.policy import Policy
from octo_like.training.metrics import read_metrics
from octo_like.training.run import check_words
from tests.data import said
from tests.training import said_config
from tests.training.test_scripts import params_of, run

CONFIG = "tests/training/said_config.py"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("said")
    said.build(folder, "questions", said.make_questions(60))
    return said.build(folder, "moves", said.make_moves(15))


def train(workdir, data_dir, *arguments, **kwargs):
    return run(
        "train.py", "--config", CONFIG, "--workdir", workdir, f"--config.data.data_dir={data_dir}", *arguments, **kwargs
    )


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(workdir, data_dir)
    return workdir


def test_it_answers_and_says_what_it_does(trained):
    policy = Policy.load_pretrained(trained / "export")
    images = np.zeros((3, 1, 32, 32, 3), np.uint8)
    images[[0, 1, 2], ..., [0, 1, 2]] = 255
    observation = dict(image_primary=images, timestep_pad_mask=np.ones((3, 1), bool))
    questions = policy.create_tasks(texts=["what colour is it?"] * 3)
    assert policy.predict_text(observation, questions) == [f"it is {colour}" for colour in said.COLOURS]
    pictures = np.full((2, 1, 32, 32, 3), 9, np.uint8)
    pictures[..., 2] = 0
    pictures[1, ..., 2] = 200
    observation = dict(image_primary=pictures, timestep_pad_mask=np.ones((2, 1), bool))
    task = policy.create_tasks(texts=["move the block"] * 2)
    assert policy.predict_text(observation, task) == ["reach for the block", "push the block"]


def test_what_is_logged_and_what_travels(trained):
    last = [entry for entry in read_metrics(trained) if "val/moves/text/accuracy" in entry][-1]
    assert last["val/moves/text/accuracy"] > 0.9 and last["val/questions/text/accuracy"] > 0.9
    # Nothing is said of what a dataset has nothing to learn for: its mean over no entry would be a zero.
    assert "val/questions/action/loss" not in last and np.isfinite(last["val/moves/action/loss"])
    policy = Policy.load_pretrained(trained / "export")
    assert set(policy.statistics) == {"moves"}
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["auxiliaries"]["text"]["vocabulary"]["size"] == 192


def test_resume_is_bitwise(trained, data_dir, tmp_path):
    train(tmp_path / "parts", data_dir, "--config.num_steps=50")
    train(tmp_path / "parts", data_dir)
    whole, parts = params_of(trained), params_of(tmp_path / "parts")
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf, parts[path], err_msg=path)


def test_a_vocabulary_that_is_not_there_is_named(data_dir, tmp_path):
    named = "--config.model.auxiliaries.text.vocabulary=no.model"
    done = train(tmp_path / "none", data_dir, named, check=False)
    assert done.returncode == 2 and "no sentencepiece model at 'no.model'; valid: 'words'" in done.stderr


def test_a_part_that_no_dataset_has_words_for_is_named(data_dir, tmp_path):
    command = ["train.py", "--config", f"{CONFIG}:mute", "--workdir", tmp_path, f"--config.data.data_dir={data_dir}"]
    done = run(*command, check=False)
    assert done.returncode == 2, done.stderr
    assert "model.auxiliaries.text learns texts (answer), and no dataset has any of these" in done.stderr
    assert "moves: subtask; silent: none" in done.stderr


def test_who_hears_what_was_done_before_must_be_asked_so_and_the_other_way_round(caplog):
    def model(**fields):
        config = said_config.get_config().model.to_dict()
        config["auxiliaries"]["text"] |= {"vocabulary": load_words("builtin"), **fields.pop("text", {})}
        config["auxiliaries"] |= fields
        return build_model(config, vocab_size=192)

    spec = {"views": {"moves": {"text_keys": {"subtask": "subtask"}}}}
    forgetful, remembering = model(), model(text={"remembers": True})
    check_words(forgetful, spec, new=("text",))
    check_words(remembering, spec, new=("text",), last_subtask=0.5)
    assert not caplog.records
    check_words(remembering, spec, new=())  # it has learned it before
    assert "data.last_subtask_prob is 0: it does not learn from this run's data" in caplog.text
    other = {"text": {"learns": ("answer",)}, "second": {**said_config.get_config().model.auxiliaries.text}}
    other["second"] |= {"vocabulary": load_words("builtin"), "remembers": True}
    for network, shares, message in (
        (forgetful, dict(last_subtask=0.5), "no part of model.auxiliaries is asked so at run time; give 'text'"),
        (remembering, {}, "text has remembers=True, and data.last_subtask_prob is 0"),
        (
            model(text={"remembers": True, "learns": ("answer",)}),
            dict(last_subtask=0.5),
            "must learn sub-tasks; this one",
        ),
        (model(**other), dict(last_subtask=0.5), "second has remembers=True: only the part named 'text'"),
        (remembering, dict(last_subtask=0.5, own_subtasks=0.2), "own_subtasks.prob=0.2: .* use one of the two"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_words(network, spec, new=("text",), **shares)
    check_words(forgetful, spec, new=("text",), plan_every=2)
    for network, every in ((forgetful, 0), (model(text={"learns": ("answer",)}), 1)):
        with pytest.raises(ConfigError, match=f"eval.plan_every={every}: a number of chunks, for a model that hears"):
            check_words(network, spec, new=(), plan_every=every)
    with pytest.raises(ConfigError, match="last_subtask_prob=0.5, but no dataset has sub-tasks .*: answers: answer"):
        check_words(
            remembering, {"views": {"answers": {"text_keys": {"answer": "a"}}}}, new=("text",), last_subtask=0.5
        )
    deaf = said_config.get_config().model.to_dict()
    deaf["auxiliaries"]["text"] |= {"vocabulary": load_words("builtin"), "remembers": True}
    del deaf["task_tokenizers"]["subtask"]
    with pytest.raises(
        ConfigError, match="no task tokenizer of the model has key='subtask', to hear what was said last"
    ):
        check_words(build_model(deaf, vocab_size=192), spec, new=("text",), last_subtask=0.5)
