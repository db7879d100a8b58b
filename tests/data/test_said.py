"""Texts that are learned, from records to batches: whose rows have any, and what is told with them."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from octo_like.common.schema import TEXT_KINDS, BatchSpec, check_batch, flatten
from octo_like.common.text import TextTokenizer
from octo_like.common.vocabularies import NO_TARGETS, Targets
from octo_like.data.batches.texts import Texts
from octo_like.data.in_memory import _columns, prepare_in_memory
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf
from tests.data import said
from tests.data.streams import make_train_stream, make_val_iterators

SPEC = BatchSpec(2, 2, 3, {"primary": (32, 32)}, language_length=14, text_target=14, goal_images=("primary",))
WITH_SUBTASK = dataclasses.replace(SPEC, subtask=True)
TOKENIZER, TARGETS = TextTokenizer.load("builtin", 14), TextTokenizer.load("builtin", 14)
ANSWER, SUBTASK = (1 + TEXT_KINDS.index(kind) for kind in ("answer", "subtask"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("said")
    said.build(data_dir, "questions", said.make_questions(60))
    return said.build(data_dir, "moves", said.make_moves(15))


def questions(**changes):
    image = dict(image_keys={"primary": "image"}, val_fraction=0.2)
    return dict(name="questions", action_key=None, text_keys={"answer": "answer"}, **image) | changes


def moves(**changes):
    image = dict(image_keys={"primary": "image"}, val_fraction=0.2)
    return dict(name="moves", text_keys={"subtask": "subtask"}, **image) | changes


def stream_of(data_dir, spec=SPEC, datasets=None, **options):
    datasets = dict(questions=questions(), moves=moves()) if datasets is None else datasets
    settings = dict(data_dir=data_dir, seed=0, batch_size=32, episodes_mixed=8, num_lanes=2)
    targets = NO_TARGETS if spec.text_target is None else Targets(TARGETS)
    return make_train_stream(datasets, spec, TOKENIZER, targets=targets, **(settings | options))


def texts(leaf):
    return TARGETS.decode(leaf["input_ids"])


def test_rows_have_the_text_of_their_own_step_or_none(folder):
    with stream_of(folder) as stream:
        batches = [next(stream) for _ in range(12)]
    seen = set()
    for batch in batches:
        check_batch(batch, SPEC)
        told = batch["task"]["pad_mask_dict"]["language_instruction"]
        said_here, kinds = texts(batch["text_target"]), batch["text_target_kind"]
        pixels = batch["observation"]["image_primary"][:, -1, 16, 16]
        for row in range(32):
            text, kind, mask = said_here[row], kinds[row], batch["text_target"]["attention_mask"][row]
            assert (kind != 0) == bool(text) == bool(mask.any())
            assert not batch["text_target"]["input_ids"][row][mask == 0].any()
            if batch["dataset_id"][row] == 0:
                assert not batch["action_pad_mask"][row].any() and not batch["action_head_mask"]["action"][row]
                if text:
                    assert kind == ANSWER and told[row]
                    assert text == f"it is {said.COLOURS[pixels[row].argmax()]}"
            else:
                assert batch["action_head_mask"]["action"][row] and batch["action_pad_mask"][row, -1, 0].all()
                if text:
                    assert kind == SUBTASK and told[row]
                    assert text == ("push the block" if pixels[row, 2] == 200 else "reach for the block")
                else:  # a goal image says what to do, or nothing does
                    assert not told[row]
            seen.add((int(batch["dataset_id"][row]), text))
    assert {text for dataset, text in seen if dataset == 0} == {"", *(f"it is {c}" for c in said.COLOURS)}
    assert {text for dataset, text in seen if dataset == 1} == {"", "push the block", "reach for the block"}


def test_a_dataset_without_instructions_learns_its_sub_tasks_and_is_told_them(folder):
    """Half of the samples with a goal image as their task, as with instructions; of the others, all that is known."""
    moving = moves(language_key=None)
    for goals in ((), ("primary",)):
        spec = dataclasses.replace(WITH_SUBTASK, goal_images=goals)
        with stream_of(folder, spec, dict(moves=moving), drop_task_prob=0.2) as stream:
            batches = [next(stream) for _ in range(20)]
        told, learns, by_goal = 0, 0, 0
        for batch in batches:
            masks = batch["task"]["pad_mask_dict"]
            assert not masks["language_instruction"].any()
            heard, said_here = TOKENIZER.decode(batch["task"]["subtask"]["input_ids"]), texts(batch["text_target"])
            goal = masks["image_primary"] if goals else np.zeros(32, bool)
            for row, blue in enumerate(batch["observation"]["image_primary"][:, -1, 16, 16, 2]):
                now = "push the block" if blue == 200 else "reach for the block"
                assert (heard[row], said_here[row]) in ((now, ""), ("", now), ("", ""))
                assert not (goal[row] and (heard[row] or said_here[row]))
            told, learns, by_goal = (
                told + masks["subtask"].mean(),
                learns + (batch["text_target_kind"] != 0).mean(),
                by_goal + goal.mean(),
            )
        words = 0.4 if goals else 0.8  # keep_goal_prob, and drop_task_prob
        np.testing.assert_allclose(
            np.array([told, learns, by_goal]) / 20, [0.7 * words, 0.3 * words + 0.2, 0.8 - words], atol=0.05
        )


def test_a_share_of_the_samples_is_told_the_sub_task_too_and_a_share_nothing_else(folder):
    with stream_of(folder, WITH_SUBTASK, dict(moves=moves(skip_unlabeled=True)), keep_goal_prob=0.0) as stream:
        batches = [next(stream) for _ in range(60)]
    count = np.zeros((2, 2))
    for batch in batches:
        check_batch(batch, WITH_SUBTASK)
        masks = batch["task"]["pad_mask_dict"]
        told, subtask = masks["language_instruction"], masks["subtask"]
        said_there = TOKENIZER.decode(batch["task"]["subtask"]["input_ids"])
        pixels = batch["observation"]["image_primary"][:, -1, 16, 16, 2]
        for row in np.flatnonzero(told | subtask):
            count[int(told[row]), int(subtask[row])] += 1
            now = "push the block" if pixels[row] == 200 else "reach for the block"
            assert said_there[row] == (now if subtask[row] else "")
            # What is told is not learned: it could be repeated without a look.
            assert texts(batch["text_target"])[row] == ("" if subtask[row] else now)
    share = count / count.sum()
    assert count.sum() > 1000 and count[0, 0] == 0  # something says what to do
    np.testing.assert_allclose([share[1, 0], share[0, 1]], [0.3, 0.7 * 0.2], atol=0.04)


def test_a_share_of_those_who_are_asked_hears_what_was_done_a_little_before(folder):
    options = dict(keep_goal_prob=0.0, drop_subtask_prob=0.6)
    reminding = dict(last_subtask_prob=0.5, last_subtask_steps=3)
    with (
        stream_of(folder, WITH_SUBTASK, dict(moves=moves()), **options) as without,
        stream_of(folder, WITH_SUBTASK, dict(moves=moves()), **options, **reminding) as stream,
    ):
        assert "last_subtask_prob" not in without.order_spec["task"]
        assert stream.order_spec["task"]["last_subtask_steps"] == 3
        batches, twins = ([next(each) for _ in range(60)] for each in (stream, without))
    made = said.make_moves(15)
    reminded_rows = asked_rows = expected = 0
    ago = {1: 0, 2: 0, 3: 0}
    for batch, twin in zip(batches, twins, strict=True):
        check_batch(batch, WITH_SUBTASK)
        asked = batch["text_target_kind"] != 0
        heard = TOKENIZER.decode(batch["task"]["subtask"]["input_ids"])
        reminded = asked & batch["task"]["pad_mask_dict"]["subtask"]
        told = ~asked & batch["task"]["pad_mask_dict"]["subtask"]
        # Who hears what was done before does not learn its actions; all else is as without: masks, words to say, told.
        np.testing.assert_array_equal(batch["action_head_mask"]["action"], ~reminded)
        np.testing.assert_array_equal(told, twin["task"]["pad_mask_dict"]["subtask"])
        for (path, a), (_, b) in zip(flatten(batch), flatten(twin), strict=True):
            if "subtask" not in path and "action_head_mask" not in path:
                np.testing.assert_array_equal(a, b, err_msg=path)
        for row in np.flatnonzero(asked):
            asked_rows += 1
            t = int(batch["observation"]["timestep"][row, -1])
            reminded_rows += bool(reminded[row])
            expected += 0.5 * min(t, 3) / 3  # before the beginning there was nothing
            if reminded[row]:
                number = int(batch["observation"]["image_primary"][row, -1, 16, 16, 0])
                possible = [n for n in ago if t >= n and made[number][t - n]["subtask"] == heard[row]]
                assert possible, (t, heard[row])
                for n in possible:
                    ago[n] += len(possible) == 1
    assert asked_rows > 600
    np.testing.assert_allclose(reminded_rows, expected, rtol=0.1)
    assert ago[3]


def test_a_run_without_texts_to_learn_has_the_batches_it_had(folder):
    plain = BatchSpec(2, 2, 3, {"primary": (32, 32)}, language_length=14, goal_images=("primary",))
    with (
        stream_of(folder, SPEC, dict(moves=moves())) as with_texts,
        stream_of(folder, plain, dict(moves=moves(text_keys={}))) as without,
    ):
        for _ in range(3):
            want, got = next(without), next(with_texts)
            del got["text_target"], got["text_target_kind"]
            for (path, a), (other, b) in zip(flatten(want), flatten(got), strict=True):
                assert path == other
                np.testing.assert_array_equal(a, b, err_msg=path)
        assert "target_tokenizer" not in without.order_spec and "text_target" not in without.order_spec["batch"]
        assert "drop_subtask_prob" not in with_texts.order_spec["task"]
        assert with_texts.order_spec["target_tokenizer"] == TARGETS.fingerprint


def test_seeking_and_lanes(folder):
    with stream_of(folder, WITH_SUBTASK, last_subtask_prob=0.5) as stream:
        batches = [next(stream) for _ in range(4)]
        stream.seek(64)
        again = next(stream)
    for (path, a), (_, b) in zip(flatten(batches[2]), flatten(again), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_batches_from_memory_are_those_of_files(folder):
    import tensorflow_datasets as tfds

    held = {}
    specs = dict(questions=questions(val_fraction=0), moves=moves(val_fraction=0))
    for name, fields in specs.items():
        builder = tfds.builder_from_directory(f"{folder}/{name}/1.0.0")
        found = tfds.as_numpy(builder.as_dataset(split="train", read_config=tfds.ReadConfig(interleave_cycle_length=1)))
        episodes = [_columns({"steps": list(e["steps"])}, name) for e in found]
        held[name] = prepare_in_memory(name, DatasetSpec.from_dict(fields), {"train": episodes})
    options = dict(decode="fast", keep_goal_prob=0.3, last_subtask_prob=0.5)
    with (
        stream_of(folder, WITH_SUBTASK, specs, **options) as files,
        stream_of(None, WITH_SUBTASK, held, **options) as memory,
    ):
        for _ in range(5):
            for (path, a), (_, b) in zip(flatten(next(files)), flatten(next(memory)), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=path)


def test_goal_images_are_for_robots_and_a_picture_without_a_question_has_something_to_say(folder):
    with stream_of(folder, SPEC, dict(questions=questions()), keep_goal_prob=1.0) as stream:
        batch = next(stream)
        assert not batch["task"]["pad_mask_dict"]["image_primary"].any()
        learned = batch["text_target_kind"] != 0
        assert learned.mean() > 0.7  # every seventh has no answer
    unasked = dict(questions=questions(language_key=None))
    with stream_of(folder, SPEC, unasked) as stream:
        batch = next(stream)
        assert (batch["text_target_kind"] != 0).mean() > 0.7
        assert not batch["task"]["pad_mask_dict"]["language_instruction"].any()


def test_validation_has_texts(folder):
    datasets = dict(questions=questions(), moves=moves())
    found = make_val_iterators(
        datasets, SPEC, TOKENIZER, data_dir=folder, seed=0, batch_size=8, keep_goal_prob=0.0, targets=Targets(TARGETS)
    )
    assert all(batch["text_target_kind"].any() for iterator in found.values() for batch in iterator)
    found = make_val_iterators(
        dict(moves=moves()),
        WITH_SUBTASK,
        TOKENIZER,
        data_dir=folder,
        seed=0,
        batch_size=8,
        keep_goal_prob=0.0,
        targets=Targets(TARGETS),
    )
    for batch in found["moves"]:  # nothing is told that is to be said
        assert batch["text_target_kind"].any() and not batch["task"]["pad_mask_dict"]["subtask"].any()


@pytest.mark.parametrize(
    "fields, message",
    [
        (questions(text_keys={}), "questions: action_key=None: without actions there is nothing to learn"),
        (questions(text_keys={"reply": "answer"}), "text_keys: .*not 'reply'"),
        (questions(text_keys={"answer": "reply"}), "no text to learn of kind 'answer' .* 'reply'"),
        (moves(text_keys={"subtask": "action"}), "'action' cannot be the text to learn"),
        (moves(text_keys={"subtask": "subtask", "answer": "subtask"}), "a step has one text to learn, not subtask and"),
        (questions(max_action=3.0), "max_action is about actions, and action_key=None says that there are none"),
    ],
)
def test_bad_specs(folder, fields, message):
    with pytest.raises(DataError, match=message):
        stream_of(folder, SPEC, dict(one=fields))


def made_up(trajectory):
    """A `standardize` function: texts that no file holds."""
    return {**trajectory, "made_up": trajectory["subtask"]}


def test_texts_that_are_too_long_are_named(folder):
    """Before anything is read, where files hold them; else with the first one."""
    spec, options = dataclasses.replace(SPEC, text_target=4), dict(data_dir=folder, seed=0, batch_size=8)
    options["targets"] = Targets(TextTokenizer.load("builtin", 4))
    with pytest.raises(DataError, match=r"moves: 1 of 2 texts to learn are longer than .* 4 ids; .* 5 with its end"):
        make_train_stream(dict(moves=moves()), spec, TOKENIZER, **options)
    fields = moves() | dict(standardize="tests.data.test_said:made_up", text_keys=dict(subtask="made_up"))
    with make_train_stream(dict(moves=fields), spec, TOKENIZER, **options) as stream:
        with pytest.raises(DataError, match="episode .* ids with its end, the model's texts at most 4: '(reach|push)"):
            next(stream)


def strange(trajectory):
    return {**trajectory, "made_up": tf.strings.join([trajectory["subtask"], " \u00e9"])}


def longer(trajectory):
    return {**trajectory, "made_up": tf.strings.join([trajectory["subtask"], " block"])}


def test_a_sub_task_of_which_only_a_part_would_be_heard_is_named(folder):
    """At once where the index knows the texts, else when it is read; not by a model that only says them."""
    heard = TextTokenizer.load("builtin", 4)
    short = dataclasses.replace(WITH_SUBTASK, language_length=4)
    message = (
        "1 of 2 sub-tasks are longer than what the model hears, which has 4 ids; the longest has 5 with its end: 'reach"
    )
    targets = Targets(TARGETS)

    def stream(spec, tokenizer, **changes):
        options = dict(targets=targets, data_dir=folder, batch_size=8, episodes_mixed=4)
        return make_train_stream(dict(moves=moves(**changes)), spec, tokenizer, **options)

    with pytest.raises(DataError, match=f"moves.*: {message}"):
        stream(short, heard)
    with stream(dataclasses.replace(short, subtask=False), heard) as quiet:
        next(quiet)
    with stream(short, heard, standardize="tests.data.test_said:longer", text_keys=dict(subtask="made_up")) as late:
        with pytest.raises(DataError, match="a sub-task: 1 of 1 sub-tasks"):
            next(late)
    texts_of = Texts(TOKENIZER, targets=targets)
    texts_of.check(WITH_SUBTASK, ())
    with pytest.raises(
        DataError, match="moves: 1 of 2 sub-tasks that the model says, and would not hear: '<loc01>' has '<"
    ):
        texts_of.check_subtasks("moves", ["reach", "<loc01>"])


def test_what_the_vocabulary_cannot_say_is_named(folder):
    said_so = r"'ol\u00e9' has '\u00e9', which the vocabulary of model.auxiliaries' text has no words for"
    with pytest.raises(DataError, match=f"moves: 1 of 2 texts to learn: {said_so}"):
        Texts(TOKENIZER, targets=Targets(TARGETS)).check_targets("moves", ["it is red", "ol\u00e9"])
    fields = moves() | dict(standardize="tests.data.test_said:strange", text_keys=dict(subtask="made_up"))
    with stream_of(folder, datasets=dict(moves=fields)) as stream:
        with pytest.raises(DataError, match="episode .* '(reach|push).*\u00e9' has '\u00e9', which"):
            next(stream)


def test_pictures_with_words_need_a_model_that_reads_and_says_words(folder):
    with pytest.raises(DataError, match="questions: text_keys: the model learns no texts"):
        stream_of(folder, dataclasses.replace(SPEC, text_target=None), dict(questions=questions()))
    with pytest.raises(DataError, match="questions: pictures with words need a model that reads words"):
        spec = dataclasses.replace(SPEC, language_length=None)
        stream_of(folder, spec, dict(questions=questions()))


def test_show_data_draws_questions_and_sub_tasks(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/show_data.py", "--data_dir", folder, "--output", tmp_path, "questions", "--set",
         "action_key=None", "text_keys={'answer': 'answer'}", "image_keys={'primary': 'image'}"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "questions.png").stat().st_size > 5000 and not (tmp_path / "questions_actions.png").exists()
    assert "questions" in (tmp_path / "index.html").read_text()
