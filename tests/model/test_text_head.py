"""Words out: masks of texts, absent heads, garbage where nothing is to be said, what a policy says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common import vocabularies
from octo_like.common.config import Change
from octo_like.common.schema import TEXT_KINDS, BatchSpec, flatten, synthetic_batch
from octo_like.common.text import TextTokenizer
from octo_like.model.octo import build_model, init_params, total_loss
from octo_like.policy.policy import Policy

VOCABULARY = vocabularies.load_words("builtin")
LENGTH = 10
SPEC = BatchSpec(2, 2, 3, {"primary": (16, 16)}, proprio_dim=3, language_length=6, text_target=LENGTH, subtask=True)
TEXT = dict(kind="text", readout="readout_text", vocabulary=VOCABULARY, max_length=LENGTH, width=16, num_heads=2)


def config(**changes):
    words = dict(kind="language", encoder="small", max_length=6, num_layers=0, dim=8, vocab_size=192)
    text = TEXT | changes.pop("text", {})
    stem = dict(kind="patch", patch_size=8, num_features=8)
    return dict(
        token_dim=16,
        max_window=2,
        transformer=dict(num_layers=1, num_heads=2, mlp_dim=32),
        task_tokenizers=dict(language=words, subtask=dict(**words, key="subtask")),
        observation_tokenizers=dict(
            primary=dict(kind="image", stem=stem, obs_keys=("image_primary",)),
            proprio=dict(kind="lowdim", obs_keys=("proprio",)),
        ),
        readouts=dict(action=1, text=4),
        heads=dict(action=dict(kind="regression", readout="readout_action", action_horizon=2, action_dim=3)),
        auxiliaries=dict(text=text),
    ) | changes  # fmt: skip


@functools.cache
def made(**text):
    model = build_model(config(text=dict(text)))
    params = init_params(model, SPEC, jax.random.key(0))
    batch = synthetic_batch(SPEC, 4, seed=1)
    batch["text_target_kind"] = np.array([1, 2, 0, 1], np.int32)
    batch["action_head_mask"] = {"action": np.array([False, True, True, False])}
    mask = np.arange(LENGTH) < np.array([[5], [10], [0], [3]])
    batch["text_target"] = {
        "input_ids": np.where(mask, batch["text_target"]["input_ids"], 0),
        "attention_mask": mask.astype(np.int32),
    }
    return model, params, batch


def terms_of(model, params, batch):
    keys = jax.random.split(jax.random.key(1), 4)
    apply = lambda params: model.apply(  # noqa: E731
        {"params": params}, batch, keys, False, method="loss_terms", mutable=["by_sample"]
    )[0]
    return jax.jit(apply)(params)


def test_the_loss_is_the_mean_negative_log_probability_of_the_texts():
    model, params, batch = made()
    terms = terms_of(model, params, batch)["text"]
    ids, mask = batch["text_target"]["input_ids"], batch["text_target"]["attention_mask"] > 0
    assert float(terms["count"]) == mask.sum() == 18

    def log_probs(model):
        return model.auxiliaries["text"].decoder.log_probs(ids, model.auxiliaries["text"]._read(model.groups(*inputs)))

    inputs = batch["observation"], batch["task"]
    each = np.asarray(model.apply({"params": params}, method=log_probs), np.float64)
    np.testing.assert_allclose(float(terms["loss"]), -(each * mask).sum(), rtol=1e-5)
    counts = model.apply({}, batch, method="counts")
    assert float(counts["text"]) == 18

    def logits(model):
        return model.auxiliaries["text"].decoder(ids, model.auxiliaries["text"]._read(model.groups(*inputs)))

    likeliest = np.asarray(model.apply({"params": params}, method=logits)).argmax(-1)
    taught = dict(batch, text_target={"input_ids": np.where(mask, likeliest, 0), "attention_mask": mask})
    first = mask & (np.arange(LENGTH) == 0)  # the first id depends on nothing that was said
    only_first = dict(taught, text_target={"input_ids": np.where(first, likeliest, 0), "attention_mask": first})
    assert float(terms_of(model, params, only_first)["text"]["accuracy"]) == first.sum() == 3
    right = (likeliest == ids) & mask
    assert float(terms["accuracy"]) == right.sum()
    of_text = np.where(ids == 1, 1, ids)
    of_text[np.arange(4), mask.sum(1) - 1] = 1  # each ends with its end
    whole = model.apply({"params": params}, *inputs, of_text, method="text_log_probs")
    again = np.asarray(
        model.apply(
            {"params": params},
            method=lambda model: model.auxiliaries["text"].decoder.log_probs(
                of_text, model.auxiliaries["text"]._read(model.groups(*inputs))
            ),
        )
    )
    rows = mask.any(1)
    np.testing.assert_allclose(whole[rows], (again * mask).sum(-1)[rows], rtol=1e-4, atol=1e-5)


def test_kinds_that_are_not_learned_are_masked():
    for learns, count in ((("answer",), 8), (("subtask",), 10), (TEXT_KINDS, 18)):
        model, params, batch = made(learns=learns)
        assert float(terms_of(model, params, batch)["text"]["count"]) == count


def gradients(model, params, batch):
    keys = jax.random.split(jax.random.key(1), 4)

    def loss(params):
        terms = model.apply({"params": params}, batch, keys, False, method="loss_terms", mutable=["by_sample"])[0]
        return total_loss(model, terms, model.apply({}, batch, method="counts"))

    return dict(flatten(jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))))


def test_rows_train_only_what_they_have_something_for():
    model, params, batch = made()
    words_only = batch | {"action_head_mask": {"action": np.zeros(4, bool)}}
    actions_only = batch | {"text_target_kind": np.zeros(4, np.int32)}
    for case, absent, present in (
        (words_only, "heads_action", "auxiliaries_text"),
        (actions_only, "auxiliaries_text", "heads_action"),
    ):
        found = gradients(model, params, case)
        of = lambda part, found=found: [leaf for path, leaf in found.items() if path.startswith(part)]  # noqa: E731
        assert of(absent) and not any(leaf.any() for leaf in of(absent))
        assert sum(bool(leaf.any()) for leaf in of(present)) > len(of(present)) / 2
        readout = f"octo_transformer/readout_{'action' if absent == 'heads_action' else 'text'}_pos_embedding"
        assert not found[readout].any()
        assert any(leaf.any() for leaf in of("octo_transformer/observation_tokenizers_primary"))


def test_garbage_where_nothing_is_to_be_said_changes_nothing_bitwise():
    model, params, batch = made()
    mask = batch["text_target"]["attention_mask"] > 0
    garbage = np.where(mask, batch["text_target"]["input_ids"], 10**6).astype(np.int32)
    said = batch["task"]["pad_mask_dict"] | {"subtask": np.array([True, False, True, False])}
    task = batch["task"] | {"pad_mask_dict": said}
    other = {key: leaf.copy() for key, leaf in task["subtask"].items()}
    other["input_ids"][[1, 3]], other["attention_mask"][[1, 3]] = 10**6, 1
    clean, dirty = batch | {"task": task}, batch | {"task": task | {"subtask": other}}
    dirty["text_target"] = batch["text_target"] | {"input_ids": garbage}
    want, got = gradients(model, params, clean), gradients(model, params, dirty)
    for path, leaf in want.items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def test_a_text_weighs_a_tenth_unless_said():
    for change, weight in (({}, 0.1), ({"weight": 1.0}, 1.0)):
        network = build_model(config(text=change))
        assert network.head_weights == {**dict.fromkeys(network.heads, 1.0), "text": weight}


def test_a_batch_without_texts_has_none():
    model, params, batch = made()
    batch = {key: leaf for key, leaf in batch.items() if not key.startswith("text_target")}
    terms = terms_of(model, params, batch)["text"]
    assert [float(terms[key]) for key in ("loss", "accuracy", "count")] == [0, 0, 0]


def policy(**text):
    model, params, _ = made(**text)
    tokenizer = TextTokenizer.load("builtin", 6)
    return Policy({"model": config(text=dict(text)), "batch_spec": SPEC.to_json()}, params, {}, tokenizer)


def test_a_policy_says_texts_and_is_saved_with_its_vocabulary(tmp_path):
    one = policy()
    task = one.create_tasks(texts=["what is it", "go"], subtasks=["", "reach"])
    np.testing.assert_array_equal(task["pad_mask_dict"]["subtask"], [False, True])
    observation = {key: np.repeat(leaf, 2, 0) for key, leaf in one.example_batch["observation"].items()
                   if not isinstance(leaf, dict)}  # fmt: skip
    texts = one.predict_text(observation, task)
    assert len(texts) == 2 and all(isinstance(text, str) and text for text in texts)
    drawn = [one.predict_text(observation, task, rng=jax.random.key(i), temperature=1.0) for i in range(3)]
    assert len({text for both in drawn for text in both}) > 3
    alone = jax.random.split(jax.random.key(5), 2)
    row = {key: leaf[1:] for key, leaf in observation.items()}
    of_row = one.create_tasks(texts=["go"], subtasks=["reach"])
    both = one.predict_text(observation, task, rng=alone, temperature=1.0)
    assert one.predict_text(row, of_row, rng=alone[1:], temperature=1.0) == both[1:]
    one.save_pretrained(tmp_path / "policy")
    again = Policy.load_pretrained(tmp_path / "policy")
    assert again.predict_text(observation, task) == texts
    # What is said to be next is read: the actions differ.
    key = jax.random.key(0)
    told = one.sample_actions(observation, task, rng=key)
    untold = one.sample_actions(observation, one.create_tasks(texts=["what is it", "go"]), rng=key)
    np.testing.assert_array_equal(told[0], untold[0])
    assert np.abs(told[1] - untold[1]).max() > 1e-4


def test_reading_all_tokens_says_the_same_whichever_way_the_transformer_runs():
    model, params, batch = made(reads="all")
    inputs = batch["observation"], batch["task"]
    ids = jax.jit(lambda params: model.apply({"params": params}, *inputs, method="predict_text"))(params)
    logits = model.apply(
        {"params": params},
        method=lambda model: model.auxiliaries["text"].decoder(
            ids, model.auxiliaries["text"]._read(model.groups(*inputs))
        ),
    )
    allowed = jnp.arange(VOCABULARY["size"]) > 2
    best = np.asarray(jnp.argmax(jnp.where(allowed | (jnp.arange(VOCABULARY["size"]) == 1), logits, -jnp.inf), -1))
    for row, said in zip(best, np.asarray(ids), strict=True):
        end = list(said).index(1)
        np.testing.assert_array_equal(said[: min(end, LENGTH - 1)], row[: min(end, LENGTH - 1)])


def test_given_texts_have_their_probability_and_speech_can_be_held_to_some():
    """Nothing but pieces of the texts is said, drawn or not; probabilities are the model's, of each row by itself."""
    one = policy()
    row = {key: leaf for key, leaf in one.example_batch["observation"].items() if not isinstance(leaf, dict)}
    only = ("red", "block")
    (said,) = one.predict_text(row, one.create_tasks(texts=["go"]), only=only)
    assert set(said.split()) <= set(only)  # or nothing
    drawn = [
        one.predict_text(row, one.create_tasks(texts=["go"]), only=only, temperature=2.0, rng=jax.random.key(i))[0]
        for i in range(5)
    ]
    assert all(set(text.split()) <= set(only) for text in drawn) and len(set(drawn)) > 1
    texts = ["", "red", "block", "red block", "block red", "red red block"]
    several = {key: np.repeat(leaf, len(texts), 0) for key, leaf in row.items()}
    tasks = one.create_tasks(texts=["go"] * len(texts))
    found = one.text_log_probs(several, tasks, texts)
    alone = [one.text_log_probs(row, one.create_tasks(texts=["go"]), [text])[0] for text in texts]
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert (found < 0).all() and np.exp(found).sum() < 1
    ids = one.text_tokenizer.encode(texts)["input_ids"]
    model_says = one.model.apply(
        {"params": one.params}, one.prepare_observations(several), tasks, ids, method="text_log_probs"
    )
    np.testing.assert_allclose(found, model_says, atol=1e-5)
    for wrong, message in (
        (dict(texts=["red"]), "one text for each of 6 rows is needed, got 1"),
        (dict(texts=["red block " * 9] * 6), "ids with its end, this policy says at most"),
        (dict(texts=["ol\u00e9"] * 6), "has '\u00e9', which this policy cannot say"),
    ):
        with pytest.raises(ValueError, match=message):
            one.text_log_probs(several, tasks, **wrong)
    for wrong in ("red", []):
        with pytest.raises(ValueError, match="only: a list of at least one text"):
            one.predict_text(several, tasks, only=wrong)


def test_mistakes_are_named():
    one = policy()
    observation = {key: leaf for key, leaf in one.example_batch["observation"].items() if not isinstance(leaf, dict)}
    task = one.create_tasks(texts=["go"])
    with pytest.raises(ValueError, match="no part 'texts' that says texts; .*'text'"):
        one.predict_text(observation, task, part="texts")
    with pytest.raises(ValueError, match="temperature 1.0 draws: give rng"):
        one.predict_text(observation, task, temperature=1.0)
    with pytest.raises(ValueError, match="subtasks must be a list of sub-tasks"):
        one.create_tasks(texts=["go"], subtasks="reach")
    plain = config()
    del plain["task_tokenizers"]["subtask"]
    spec = BatchSpec.from_json({key: value for key, value in SPEC.to_json().items() if key != "subtask"})
    flat = Policy({"model": plain, "batch_spec": spec.to_json()}, one.params, {}, one.text_tokenizer)
    with pytest.raises(ValueError, match="takes no subtasks: no task tokenizer"):
        flat.create_tasks(texts=["go"], subtasks=["reach"])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(learns=("poems",)), "kinds of texts are answer, subtask"),
        (dict(reads="everything"), "unknown reads 'everything'"),
        (dict(vocabulary="builtin"), "vocabulary 'builtin' is a name"),
        (dict(vocabulary={"size": 3}), "not a vocabulary of words"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        init_params(build_model(config(text=change)), SPEC, jax.random.key(0))


def test_vocabularies_that_are_not_there_or_damaged():
    with pytest.raises(vocabularies.VocabularyError, match="model.auxiliaries.text.vocabulary: no sentencepiece model"):
        vocabularies.resolve({"auxiliaries": {"text": {"vocabulary": "nowhere.model"}}})
    damaged = VOCABULARY | {"sentencepiece": VOCABULARY["sentencepiece"][:400]}
    with pytest.raises(vocabularies.VocabularyError, match="damaged vocabulary"):
        vocabularies.tokenizer_of(damaged, 8)
    with pytest.raises(vocabularies.VocabularyError, match="says that it has 7 ids"):
        vocabularies.tokenizer_of(VOCABULARY | {"size": 7}, 8)
    line = str(Change("model.vocabulary", VOCABULARY["sentencepiece"], "none"))
    assert len(line) < 200 and "characters" in line
