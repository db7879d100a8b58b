"""Text to ids: T5's conventions, the built-in model, unseen words, saving."""

import importlib.util

import numpy as np
import pytest

from octo_like.common.location_tokens import TOKENS
from octo_like.common.text import BUILTIN, TextTable, TextTokenizer
from octo_like.envs.language import all_instructions


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load("builtin")


def test_conventions_of_t5(tokenizer):
    got = tokenizer.encode(["", "put the red block on the blue plate"])
    ids, mask = got["input_ids"], got["attention_mask"]
    assert ids.shape == mask.shape == (2, 16) and ids.dtype == mask.dtype == np.int32
    assert ids[0].tolist() == mask[0].tolist() == [1] + [0] * 15
    length = mask[1].sum()
    assert ids[1, length - 1] == 1 and (ids[1, : length - 1] > 2).all() and not ids[1, length:].any()
    assert (ids < tokenizer.vocab_size).all() and 128 <= tokenizer.vocab_size <= 256


def test_every_instruction_is_whole_and_distinct(tokenizer):
    texts = all_instructions()
    got = tokenizer.encode(texts)
    assert got["attention_mask"].sum(1).max() < 16  # nothing is cut
    assert len({row.tobytes() for row in got["input_ids"]}) == len(set(texts))
    assert not (got["input_ids"] == 2).any()
    assert tokenizer.decode(got["input_ids"]) == texts
    # Words are one piece each, so that they can be learned from few examples.
    assert tokenizer.encode(["red", "green", "blue", "yellow", "purple"])["attention_mask"].sum(1).tolist() == [2] * 5


def test_case_and_spaces_do_not_matter(tokenizer):
    a, b = tokenizer.encode(["push the red block", "  Push the RED   block "])["input_ids"]
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "text", ["zigzag quickly!", "42 × 7", "положи куб", "把红色方块放下", "a" * 1000, "\n\t", "\0"]
)
def test_unseen_text_never_fails(tokenizer, text):
    got = tokenizer.encode([text])
    assert got["input_ids"].shape == (1, 16) and (got["input_ids"] < tokenizer.vocab_size).all()
    length = got["attention_mask"].sum()
    assert got["input_ids"][0, length - 1] == 1


def test_unseen_words_are_spelled(tokenizer):
    a, b = tokenizer.encode(["lift the jug", "lift the fox"])["input_ids"]
    assert not (a == 2).any() and not np.array_equal(a, b)


def test_long_text_is_cut_keeping_its_end_mark(tokenizer):
    short = TextTokenizer.load("builtin", 5)
    text = ["put the red block on the blue plate"]
    ids = short.encode(text)["input_ids"][0]
    assert ids[-1] == 1 and len(ids) == 5
    np.testing.assert_array_equal(ids[:4], tokenizer.encode(text)["input_ids"][0, :4])


def test_save_and_load(tokenizer, tmp_path):
    short = TextTokenizer.load("builtin", 9)
    short.save(str(tmp_path / "tokenizer"))
    again = TextTokenizer.load(str(tmp_path / "tokenizer"))
    assert again.max_length == 9 and again.vocab_size == tokenizer.vocab_size
    assert again.fingerprint == short.fingerprint != tokenizer.fingerprint
    np.testing.assert_array_equal(again.encode(["go left"])["input_ids"], short.encode(["go left"])["input_ids"])
    by_path = TextTokenizer.load(str(tmp_path / "tokenizer" / "tokenizer.model"))
    assert by_path.max_length == 16


def test_table_encodes_each_text_once(tokenizer, monkeypatch):
    calls = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda texts: (calls.extend(texts), encode(texts))[1])
    table = TextTable(tokenizer)
    rows = table.rows(["b", "a", "b", ""])
    assert rows.tolist() == [1, 2, 1, 0]
    assert table.rows(["a", "c"]).tolist() == [2, 3] and len(table) == 4
    assert sorted(calls) == ["", "a", "b", "c"]
    got = table.encoded(np.array([[0, 1], [3, 2]]))
    np.testing.assert_array_equal(got["input_ids"][1, 0], encode(["c"])["input_ids"][0])


def load_script(repository):
    spec = importlib.util.spec_from_file_location("train_tokenizer", repository / "scripts" / "train_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_table_of_many_texts_copies_each_a_few_times_at_most(tokenizer):
    table = TextTable(tokenizer)
    texts = [f"push block {number}" for number in range(300)]
    sizes = {id(table._encoded["input_ids"])}
    rows = []
    for text in texts:
        rows.append(int(table.rows([text])[0]))
        sizes.add(id(table._encoded["input_ids"]))
    assert len(table) == 301 and len(sizes) < 15
    want = tokenizer.encode(["", *texts])
    for key, value in table.encoded(np.array([0, *rows])).items():
        np.testing.assert_array_equal(value, want[key])


def test_the_asset_is_what_the_script_makes(repository):
    script = load_script(repository)
    texts = all_instructions()
    model = script.train(texts, 192)
    assert model == script.train(texts[::-1] + texts[:5], 192)  # deterministic, whatever the order
    again = TextTokenizer(model).encode(texts)["input_ids"]
    with open(BUILTIN, "rb") as file:
        assert TextTokenizer(file.read()).encode(texts)["input_ids"].tolist() == again.tolist()


def test_bad_input(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="'builtin', the path of a .model file"):
        TextTokenizer.load(str(tmp_path / "missing.model"))
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        (tmp_path / "empty").mkdir()
        TextTokenizer.load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        TextTokenizer(b"something else")
    (tmp_path / "other.model").write_bytes(b"something else")
    with pytest.raises(ValueError, match="other.model: not a sentencepiece model"):
        TextTokenizer.load(str(tmp_path / "other.model"))
    with pytest.raises(ValueError, match="max_length"):
        TextTokenizer.load("builtin", -1)
    with pytest.raises(TypeError, match="list of texts"):
        tokenizer.encode("a single text")


def test_a_model_with_other_marks_is_refused(tmp_path):
    import io

    import sentencepiece

    buffer = io.BytesIO()
    texts = all_instructions()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=buffer, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="pad_id=0 and eos_id=1"):
        TextTokenizer(buffer.getvalue())


def test_the_vocabulary_of_words(repository):
    """It is what the script makes; a location token is one piece, and every text of the tabletop comes back."""
    script = load_script(repository)
    texts = script.builtin_texts("words")
    tokenizer = TextTokenizer.load("words", 64)
    again = TextTokenizer(script.train(texts[::-1], 512, TOKENS), 64)
    assert tokenizer.vocab_size == 512
    np.testing.assert_array_equal(tokenizer.encode(texts)["input_ids"], again.encode(texts)["input_ids"])
    single = [tokenizer.num_tokens(f"x{token}") - tokenizer.num_tokens("x") for token in TOKENS]
    assert single == [1] * 64
    ids = tokenizer.encode(["".join(TOKENS[5:9])])["input_ids"][0]
    assert sorted(set(np.diff(ids[1:5]))) == [1]  # ids of neighbouring bins are neighbours
    said = [*texts, "<loc07><loc40>", "what is at <loc00><loc63>?", "put the red block on the white plate. is it done?"]
    lowered = [" ".join(text.lower().split()) for text in said]
    assert tokenizer.decode(tokenizer.encode(said)["input_ids"]) == lowered
    assert max(tokenizer.num_tokens(text) for text in texts) <= 24


def test_symbols_that_lower_casing_would_split(repository, monkeypatch, capsys):
    script = load_script(repository)
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", "--symbols", "<LOC00>"])
    with pytest.raises(SystemExit):
        script.main()
    assert "give lower case" in capsys.readouterr().err
