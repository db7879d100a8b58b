"""Action tokens against a twin of their own: cosines summed one by one, byte pairs merged and joined as text."""

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
import pickle
import re

import numpy as np
import pytest

from octo_like.common import fast, fast_report
from octo_like.common.fast import FastError, FastVocabulary

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
HORIZON, DIM = 8, 3


def smooth(count: int, seed: int, horizon: int = HORIZON, dim: int = DIM) -> np.ndarray:
    """Arcs with a gripper that opens or closes once; one dimension is padding."""
    rng = np.random.default_rng(seed)
    time = np.arange(horizon)[None, :, None] / horizon
    chunks = rng.normal(0, 0.4, (count, 1, dim)) + rng.normal(0, 0.6, (count, 1, dim)) * time
    chunks[..., 0] = np.where(time[..., 0] < rng.uniform(0, 2, (count, 1)), 1, -1)
    chunks[..., -1] = 0
    return chunks.astype(np.float32)


def rough(count: int, seed: int, horizon: int = HORIZON, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, (count, horizon, dim)).astype(np.float32)


@pytest.fixture(scope="module")
def chunks() -> np.ndarray:
    return np.concatenate([smooth(1500, 0), rough(500, 1)])


@pytest.fixture(scope="module")
def vocabulary(chunks) -> FastVocabulary:
    return fast.train(chunks, vocab_size=400)


# ------------------------------------------------------------------------------------------------------------- the twin


def twin_coefficients(chunk: np.ndarray) -> list[list[float]]:
    """[frequency][dimension], by the definition of the orthonormal DCT-II."""
    horizon, dim = chunk.shape
    return [
        [
            math.sqrt((1 if k == 0 else 2) / horizon)
            * sum(float(chunk[t, a]) * math.cos(math.pi / horizon * (t + 0.5) * k) for t in range(horizon))
            for a in range(dim)
        ]
        for k in range(horizon)
    ]


def twin_actions(coefficients: list[list[float]]) -> np.ndarray:
    """Inverse of `twin_coefficients`: the DCT-III."""
    horizon, dim = len(coefficients), len(coefficients[0])
    chunk = np.zeros((horizon, dim))
    for t in range(horizon):
        for a in range(dim):
            rest = sum(
                coefficients[k][a] * math.cos(math.pi / horizon * (t + 0.5) * k) * math.sqrt(2)
                for k in range(1, horizon)
            )
            chunk[t, a] = (coefficients[0][a] + rest) / math.sqrt(horizon)
    return chunk


def texts_of_pieces(vocabulary: FastVocabulary) -> dict[str, int]:
    """{piece: id} of the model's own file, read without the vocabulary."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
    return {processor.id_to_piece(i): i for i in range(1, processor.get_piece_size())}


def twin_encode(integers: list[int], vocabulary: FastVocabulary, pieces: dict[str, int]) -> list[int]:
    """Byte pairs as they are defined: of all neighbours, those are joined whose pair was learned first."""
    symbols = [chr(0x4E00 + q - vocabulary.minimum) for q in integers]
    while True:
        pairs = [(pieces[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in pieces]
        if not pairs:
            return [pieces[symbol] for symbol in symbols]
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def twin_decode(ids: list[int], vocabulary: FastVocabulary, pieces: dict[str, int]) -> np.ndarray:
    names = {i: text for text, i in pieces.items()}
    text = "".join(names[i] for i in ids if i)
    flat = [(ord(letter) - 0x4E00 + vocabulary.minimum) / vocabulary.scale for letter in text]
    return twin_actions([flat[k * vocabulary.dim : (k + 1) * vocabulary.dim] for k in range(vocabulary.horizon)])


@pytest.mark.parametrize("make", [smooth, rough])
def test_ids_and_actions_are_those_of_the_twin(vocabulary, make):
    chunks, pieces = make(40, 7), texts_of_pieces(vocabulary)
    coefficients = vocabulary.coefficients(chunks)
    ids, lengths = vocabulary.encode(chunks)
    decoded, ok = vocabulary.decode(ids)
    assert ok.all() and coefficients.dtype == ids.dtype == lengths.dtype == np.int32
    for i, chunk in enumerate(chunks):
        wanted = [round(c * vocabulary.scale) for row in twin_coefficients(chunk) for c in row]
        wanted = [min(max(q, vocabulary.minimum), vocabulary.maximum) for q in wanted]
        assert coefficients[i].tolist() == wanted
        tokens = ids[i, : lengths[i]].tolist()
        assert tokens == twin_encode(wanted, vocabulary, pieces) and not ids[i, lengths[i] :].any()
        np.testing.assert_allclose(decoded[i], twin_decode(tokens, vocabulary, pieces), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ transform


@pytest.mark.parametrize("horizon", [1, 2, 5, 16])
def test_transform_is_orthonormal(horizon):
    matrix = fast.dct_matrix(horizon)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(horizon), atol=1e-12)
    chunk = np.random.default_rng(0).normal(size=(horizon, 2))
    np.testing.assert_allclose(matrix @ chunk, twin_coefficients(chunk), atol=1e-12)


def test_integer_coefficients_come_back_exactly(vocabulary):
    """Also those at both ends of the range, which no training chunk may have together."""
    rng = np.random.default_rng(3)
    integers = rng.integers(vocabulary.minimum, vocabulary.maximum + 1, (50, HORIZON * DIM))
    integers[0], integers[1], integers[2] = vocabulary.minimum, vocabulary.maximum, 0
    exact = np.stack([twin_actions((row / vocabulary.scale).reshape(HORIZON, DIM).tolist()) for row in integers])
    np.testing.assert_array_equal(vocabulary.coefficients(exact), integers)
    ids, _ = vocabulary.encode(exact)
    decoded, ok = vocabulary.decode(ids)
    assert ok.all()
    np.testing.assert_allclose(decoded, exact, atol=1e-5)
    np.testing.assert_array_equal(vocabulary.encode(decoded)[0], ids)


@pytest.mark.parametrize("scale", [5.0, 20.0])
def test_error_is_within_its_bound(chunks, scale):
    vocabulary = fast.train(chunks, vocab_size=512, scale=scale)
    for made in (smooth(300, 11), rough(300, 12)):
        kept = made[vocabulary.clipped(made) == 0]
        assert len(kept) > 250
        decoded, ok = vocabulary.decode(vocabulary.encode(kept)[0])
        error = np.linalg.norm(decoded - kept, axis=1)
        assert ok.all() and error.max() <= 0.5 * math.sqrt(HORIZON) / scale + 1e-5
        assert 0.5 / math.sqrt(12) / scale < np.sqrt(np.square(decoded - kept).mean()) < 1.1 / math.sqrt(12) / scale


def test_ties_are_rounded_alike_however_sums_are_ordered(vocabulary):
    """A constant of 0.05 k / sqrt(H) has the coefficient k / 2 exactly, but for the last bits of a sum."""
    values = 0.05 * np.arange(-9, 10, 2) / math.sqrt(HORIZON)
    exact = np.broadcast_to(values[:, None, None], (len(values), HORIZON, DIM))
    wanted = vocabulary.coefficients(exact)
    for shift in (-1e-15, 1e-15):
        np.testing.assert_array_equal(vocabulary.coefficients(exact * (1 + shift) + shift), wanted)


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_tokens_are_fewer_than_numbers(vocabulary, chunks):
    made = smooth(500, 21)
    ids, lengths = vocabulary.encode(made)
    assert ids.shape == (500, HORIZON * DIM) == (500, vocabulary.max_tokens)
    assert lengths.mean() < HORIZON * DIM / 2 and (lengths >= 1).all()
    np.testing.assert_array_equal((ids != 0).sum(1), lengths)
    np.testing.assert_array_equal(vocabulary.lengths(made), lengths)
    more = fast.train(chunks, vocab_size=800)
    assert more.lengths(made).mean() < lengths.mean() < fast.train(chunks, vocab_size=120).lengths(made).mean()


def test_tables_are_the_pieces(vocabulary):
    table, lengths = vocabulary.piece_coefficients, vocabulary.piece_lengths
    assert table.shape == (vocabulary.vocab_size, lengths.max()) and vocabulary.vocab_size == 400
    assert table.dtype == lengths.dtype == np.int32 and lengths[0] == 0 and (lengths[1:] >= 1).all()
    for text, i in texts_of_pieces(vocabulary).items():
        integers = [ord(letter) - 0x4E00 + vocabulary.minimum for letter in text]
        assert table[i, : lengths[i]].tolist() == integers and not table[i, lengths[i] :].any()
    singles = sorted(table[lengths == 1, 0].tolist())
    assert singles == list(range(vocabulary.minimum, vocabulary.maximum + 1))  # also those that no chunk has


def test_a_long_chunk_of_one_letter_is_no_longer_than_a_piece_may_be():
    """More than the 512 letters of sentencepiece's longest piece, and more than 4192 bytes of text."""
    chunks = np.zeros((40, 100, 20), np.float32)
    chunks[:, 0, 0] = np.linspace(-1, 1, 40)
    vocabulary = fast.train(chunks, vocab_size=128)
    decoded, ok = vocabulary.decode(vocabulary.encode(chunks)[0])
    assert ok.all() and vocabulary.piece_lengths.max() <= 512
    assert np.linalg.norm(decoded - chunks, axis=1).max() <= 0.5 * math.sqrt(100) / 10 + 1e-5


def test_max_tokens(vocabulary, chunks):
    made = np.concatenate([smooth(20, 31), rough(20, 32)])
    lengths = vocabulary.lengths(made)
    limit = int(np.sort(lengths)[25])
    short = dataclasses.replace(vocabulary, max_tokens=limit)
    first = int(np.argmax(lengths > limit))
    with pytest.raises(FastError, match=f"chunk {first} takes {lengths[first]} tokens, more than max_tokens={limit}"):
        short.encode(made)
    np.testing.assert_array_equal(short.lengths(made), lengths)
    # Those that fit are what they were; of the others the low frequencies are left.
    ids, shorter = short.encode(made, low_pass=True)
    fits = lengths <= limit
    np.testing.assert_array_equal(ids[fits], vocabulary.encode(made)[0][fits, :limit])
    assert (shorter <= limit).all() and ids.shape == (40, limit)
    decoded, ok = short.decode(ids)
    again, coefficients = short.coefficients(decoded), short.coefficients(made)
    assert ok.all()
    for row in np.flatnonzero(~fits):
        kept = np.flatnonzero(again[row])[-1] // DIM + 1  # frequencies
        np.testing.assert_array_equal(again[row, : kept * DIM], coefficients[row, : kept * DIM])
        more = np.where(np.arange(HORIZON * DIM) < (kept + 1) * DIM, coefficients[row], 0)
        assert len(twin_encode(more.tolist(), vocabulary, texts_of_pieces(vocabulary))) > limit
    with pytest.raises(FastError, match=r"max_tokens=\d+, but a chunk takes \d+ tokens; allow as many"):
        fast.train(chunks, vocab_size=400, max_tokens=3)
    longest = int(vocabulary.lengths(chunks).max())
    assert fast.train(chunks, vocab_size=400, max_tokens=longest).encode(chunks)[0].shape[1] == longest


def test_what_is_outside_of_the_range_is_clipped_and_counted(vocabulary):
    made = smooth(3, 41)
    assert not vocabulary.clipped(made).any()
    far = made.copy()
    far[1, :, 1], far[2, :, 1] = 1e3, -300.0
    np.testing.assert_array_equal(vocabulary.clipped(far), [0, 1, 1])
    coefficients = vocabulary.coefficients(far)
    assert coefficients[1, 1] == vocabulary.maximum and coefficients[2, 1] == vocabulary.minimum
    decoded, ok = vocabulary.decode(vocabulary.encode(far)[0])
    assert ok.all() and np.abs(decoded).max() < 10


# ------------------------------------------------------------------------------------------------------------- decoding


def test_tokens_that_are_no_chunk_are_nan_and_said(vocabulary):
    ids, lengths = vocabulary.encode(smooth(9, 51))
    single = int(np.flatnonzero(vocabulary.piece_lengths == 1)[0])
    bad = np.pad(ids, ((0, 0), (0, 2)))
    bad[0] = 0  # nothing
    bad[1, lengths[1] - 1] = 0  # too few
    bad[2, lengths[2]] = single  # too many
    bad[3, 0] = vocabulary.vocab_size  # no token
    bad[4, 0] = -1
    bad[5] = np.insert(bad[5], 1, 0)[:-1]  # padding within
    decoded, ok = vocabulary.decode(bad)
    assert ok.tolist() == [False] * 6 + [True] * 3
    assert np.isnan(decoded[:6]).all() and decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded[6:], vocabulary.decode(ids)[0][6:])
    decoded, ok = vocabulary.decode(np.zeros((2, 0), np.int64))
    assert np.isnan(decoded).all() and not ok.any()


def test_no_chunks(vocabulary):
    ids, lengths = vocabulary.encode(np.zeros((0, HORIZON, DIM)))
    assert ids.shape == (0, HORIZON * DIM) and lengths.shape == (0,)
    decoded, ok = vocabulary.decode(ids)
    assert decoded.shape == (0, HORIZON, DIM) and ok.shape == (0,)


# ------------------------------------------------------------------------------------------------------------- training


def test_training_is_deterministic(vocabulary, chunks):
    again = fast.train(chunks.astype(np.float64), vocab_size=400)
    assert again.model == vocabulary.model and again == vocabulary and again.fingerprint == vocabulary.fingerprint
    assert fast.train(chunks, vocab_size=400, scale=9.0).fingerprint != vocabulary.fingerprint


def test_a_vocabulary_is_no_larger_than_what_chunks_repeat():
    few = np.zeros((40, 2, 1), np.float32)
    few[20:] = 1
    vocabulary = fast.train(few, vocab_size=1000)
    # Padding, the integers from 0 to 14, and the pairs (0, 0) and (14, 0).
    assert vocabulary.vocab_size == 1 + 15 + 2 and vocabulary.lengths(few).max() == 1


def test_alphabet_that_does_not_fit_says_which_scale_does(chunks):
    with pytest.raises(FastError, match=r"at scale 100 .* more than the 99 tokens of vocab_size=100") as error:
        fast.train(chunks, vocab_size=100, scale=100.0)
    assert "clip_share" in str(error.value)
    scale = float(str(error.value).split("A scale of ")[1].split()[0])
    assert 1 < scale < 100
    fitting = fast.train(chunks, vocab_size=100, scale=scale)
    assert fitting.letters > 80
    # One wild chunk need not take all the room.
    wild = np.concatenate([chunks, np.full((1, HORIZON, DIM), 500, np.float32)])
    with pytest.raises(FastError, match="integers"):
        fast.train(wild, vocab_size=400)
    vocabulary = fast.train(wild, vocab_size=400, clip_share=1e-4)
    assert vocabulary.letters < 200 and vocabulary.clipped(wild).sum() < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(chunks=np.zeros((50, 8))), r"shape \(N, horizon, dim\), got \(50, 8\)"),
        (dict(chunks=np.zeros((50, 0, 3))), r"shape \(N, horizon, dim\)"),
        (dict(chunks=np.zeros((5, 8, 3))), "5 chunks are too few to train an action vocabulary; give 32 or more"),
        (dict(chunks=np.full((50, 8, 3), np.nan)), r"chunk 0 has actions that are not finite \(50 of 50\)"),
        (dict(chunks=np.full((50, 8, 3), "a")), "<U1"),
        (dict(scale=0.0), "scale must be positive"),
        (dict(scale=float("nan")), "scale must be positive"),
        (dict(clip_share=0.5), r"clip_share in \[0, 0.5\)"),
        (dict(vocab_size=1), "vocab_size must be from 2 to 20,000"),
        (dict(vocab_size=20_001), "vocab_size must be from 2 to 20,000"),
        (dict(max_tokens=25), "max_tokens must be from 1 to H . A = 24, got 25"),
    ],
)
def test_bad_training(chunks, change, message):
    with pytest.raises(FastError, match=message):
        fast.train(**{"chunks": chunks, "vocab_size": 400, **change})


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros((2, 8, 4)), r"chunks of 8 steps of 3 dimensions, \(N, 8, 3\); got float64 \(2, 8, 4\)"),
        (np.zeros((2, 4, 3)), r"got float64 \(2, 4, 3\)"),
        (np.zeros((8, 3)), r"got float64 \(8, 3\)"),
        (np.array([np.zeros((8, 3)), np.full((8, 3), np.inf)]), r"chunk 1 has actions that are not finite \(1 of 2\)"),
    ],
)
def test_chunks_of_another_action_space(vocabulary, chunk, message):
    for function in (vocabulary.encode, vocabulary.coefficients, vocabulary.clipped, vocabulary.lengths):
        with pytest.raises(FastError, match=message):
            function(chunk)


def test_ids_that_are_none(vocabulary):
    for ids in (np.zeros((2, 3)), np.zeros(3, np.int32)):
        with pytest.raises(FastError, match=r"integers of the shape \(N, M\)"):
            vocabulary.decode(ids)


# ---------------------------------------------------------------------------------------------------------------- files


def test_it_travels(vocabulary, tmp_path):
    made = smooth(20, 61)
    path = tmp_path / "new" / "actions.json"
    vocabulary.save(path)
    copies = [
        FastVocabulary.load(path),
        FastVocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))),
        pickle.loads(pickle.dumps(vocabulary)),
        copy.deepcopy(vocabulary),
    ]
    for other in copies:
        assert other == vocabulary and hash(other) == hash(vocabulary) and other.fingerprint == vocabulary.fingerprint
        for one, two in zip(other.encode(made), vocabulary.encode(made), strict=True):
            np.testing.assert_array_equal(one, two)


def damaged_models(vocabulary, chunks) -> dict[str, object]:
    """Models that sentencepiece reads, and that are not this vocabulary's."""
    import base64

    def text(model: bytes) -> str:
        return base64.b64encode(model).decode()

    builtin = (ROOT / "octo_like" / "common" / "assets" / "tabletop.model").read_bytes()
    narrow = fast.train(chunks, vocab_size=400, scale=2.0)
    return {
        "special ids": dict(model=text(builtin)),
        "no piece for the coefficient": dict(model=text(narrow.model)),
        "not of coefficients from": dict(minimum=vocabulary.minimum, maximum=vocabulary.maximum - 1),
        "pieces are longer than a chunk": dict(horizon=1, max_tokens=0),
        "not one of sentencepiece": dict(model=text(b"\xff\x00nothing")),
        "not base64": dict(model="&&"),
    }


def test_damage_is_found(vocabulary, chunks, tmp_path):
    good = vocabulary.to_json()
    for message, change in {
        "was changed after it was written: fingerprint": dict(scale=11.0),
        "was changed after it was written: vocab_size": dict(vocab_size=401),
        "scale must be a positive number": dict(scale=-1.0),
        "must contain 0": dict(minimum=1),
        "horizon and dim must be at least 1": dict(dim=0),
        "max_tokens must be from 1 to": dict(max_tokens=999),
        "damaged: horizon is '8'": dict(horizon="8"),
        "damaged: dim is 3.0": dict(dim=3.0),
        "of version 2; this code reads 1": dict(version=2),
        "not an action vocabulary": dict(format="statistics"),
        **damaged_models(vocabulary, chunks),
    }.items():
        with pytest.raises(FastError, match=message):
            FastVocabulary.from_json({**good, **change})
    for name in ("horizon", "model", "fingerprint"):
        with pytest.raises(FastError, match=f"damaged: it has no '{name}'"):
            FastVocabulary.from_json({key: value for key, value in good.items() if key != name})
    with pytest.raises(FastError, match="not an action vocabulary"):
        FastVocabulary.from_json([1])
    path = tmp_path / "actions.json"
    with pytest.raises(FileNotFoundError, match=r"no action vocabulary at .*train_action_tokenizer"):
        FastVocabulary.load(path)
    vocabulary.save(path)
    path.write_text(path.read_text()[:-100])
    with pytest.raises(FastError, match=r"actions\.json: "):
        FastVocabulary.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FastError, match=r"actions\.json: "):
        FastVocabulary.load(path)


# --------------------------------------------------------------------------------------------------------------- report


def test_report(vocabulary, chunks):
    made = smooth(200, 71)
    ids, lengths = vocabulary.encode(made)
    error = np.abs(vocabulary.decode(ids)[0].astype(np.float64) - made)
    got = fast_report.measure(
        fast.train(chunks, vocab_size=400, max_tokens=int(vocabulary.lengths(chunks).max())), made
    )
    assert (got.chunks, got.max_tokens, got.clipped) == (200, lengths.max(), 0)
    assert got.median_tokens == np.sort(lengths)[99] and got.p99_tokens == np.sort(lengths)[197]
    np.testing.assert_allclose(got.mean_tokens, lengths.mean())
    np.testing.assert_allclose(got.compression, HORIZON * DIM / lengths.mean())
    np.testing.assert_allclose([got.rms_error, got.max_error], [np.sqrt((error**2).mean()), error.max()])
    far = made.copy()
    far[:2, :, 1] = 1e6
    assert fast_report.measure(vocabulary, far).clipped == 2 / (200 * HORIZON * DIM)
    with pytest.raises(FastError, match="no chunks"):
        fast_report.measure(vocabulary, made[:0])
    text = fast_report.describe(vocabulary)
    assert "400 tokens" in text and "within 0.141" in text
    lines = fast_report.table({"training": got, "held out of robot": got}).splitlines()
    assert len(lines) == 3 and len(set(map(len, lines))) == 1 and lines[2].startswith("held out of robot ")


# --------------------------------------------------------------------------------------------------------------- script


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("_action_tokenizer", ROOT / "scripts" / "train_action_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MEMORY = (
    *("--config", str(ROOT / "configs" / "tabletop.py"), "--config.data.kind=memory", "--config.data.workers=0"),
    "--config.data.episodes=tabletop_pusher=6 tabletop_gripper=2 tabletop_arm=4",
    "--config.batch_size=64",
)


def test_script_uses_the_chunks_that_training_sees(script, tmp_path, capsys):
    from octo_like.common.config import load_config
    from octo_like.common.defaults import batch_spec
    from octo_like.common.text import TextTokenizer
    from octo_like.data.inputs import inputs_from_config

    path = tmp_path / "actions.json"
    assert script.main([*MEMORY, "--chunks=600", "--vocab_size=160", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert "chunks of 4 steps of 7 dimensions" in out and "held out of tabletop_arm" in out and "warning: " in out
    vocabulary = FastVocabulary.load(path)
    assert (vocabulary.horizon, vocabulary.dim, vocabulary.max_tokens) == (4, 7, 28) and vocabulary.fingerprint in out

    # All chunks of the few episodes, drawn with pictures and without: the same ones.
    overrides = [tuple(word.removeprefix("--config.").split("=", 1)) for word in MEMORY[2:]]
    config = load_config(MEMORY[1], overrides)
    tokenizer = TextTokenizer.load(config.text.model, config.text.max_length)
    found = {}
    for pictures in (True, False):
        of, spec, size = config, batch_spec(config), (4, 7)
        if not pictures:
            of, spec, size = script.without_pictures(config, "action")
        inputs = inputs_from_config(of, spec, tokenizer if pictures else None)
        with inputs.stream as stream:
            assert ("image_primary" in next(stream)["observation"]) is pictures
            found[pictures] = {one.tobytes() for one in script.some_chunks(stream, 1500, "action", size)}
    assert found[True] == found[False] and len(found[True]) > 50


TWO_HEADS = """
from configs import tabletop

def get_config():
    config = tabletop.get_config()
    config.model.heads.second = dict(action_horizon=2, action_dim=2)
    config.model.heads.third = dict(action_dim=2)
    config.data.datasets.tabletop_pusher.head = "second"
    return config
"""


def test_script_takes_the_datasets_of_the_head(script, tmp_path, capsys):
    config, path = tmp_path / "two_heads.py", tmp_path / "actions.json"
    config.write_text(TWO_HEADS)
    words = [*("--config", str(config)), *MEMORY[2:], "--chunks=100", "--output", str(path)]
    knobs = ["--head=second", "--vocab_size=64", "--scale=5", "--max_tokens=4", "--clip_share=0.01"]
    assert script.main([*words, *knobs]) == 0
    out = capsys.readouterr().out
    assert "held out of tabletop_pusher" in out and "tabletop_arm" not in out
    vocabulary = FastVocabulary.load(path)
    assert (vocabulary.horizon, vocabulary.dim, vocabulary.max_tokens, vocabulary.scale) == (2, 2, 4, 5.0)
    for head, message in {
        "third": "does not give its action_horizon and action_dim",
        "fourth": "the config has no such head; valid: action, second, third",
    }.items():
        assert script.main([*words, f"--head={head}"]) == 1
        assert message in capsys.readouterr().err
    config.write_text(TWO_HEADS.replace("dict(action_dim=2)", "dict(action_dim=2, action_horizon=2)"))
    assert script.main([*words, "--head=third"]) == 1
    assert "--head third: no dataset of the config trains it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--head=hand"], "the config has no such head; valid: action"),
        (["--chunks=5"], "5 chunks are too few"),
        (["--chunks=50", "--config.model.heads.action.action_horizon=80"], r"only 0 of [\d,]+ samples have 80 steps"),
        (["--chunks=50", "--vocab_size=20"], "more than the 19 tokens of vocab_size=20"),
    ],
)
def test_scripts_mistakes(script, tmp_path, capsys, words, message):
    path = tmp_path / "actions.json"
    assert script.main([*MEMORY, *words, "--output", str(path)]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and "error: " in error and not path.exists()


def test_script_on_an_adaptations_config(script, tmp_path, capsys):
    config = ("--config", str(ROOT / "configs" / "finetune.py"))
    assert script.main([*config, "--output", str(tmp_path / "a.json")]) == 1
    assert "those in config.surgery.heads" in capsys.readouterr().err
    words = [
        "--config.data.kind=memory",
        "--config.data.workers=0",
        "--config.data.datasets.target.name=tabletop_arm",
        "--config.data.episodes=tabletop_arm=3",
        "--config.surgery.heads.action={'action_horizon': 4, 'action_dim': 7}",
    ]
    assert script.main([*config, *words, "--chunks=64", "--vocab_size=160", "--output", str(tmp_path / "a.json")]) == 0
    assert FastVocabulary.load(tmp_path / "a.json").dim == 7
