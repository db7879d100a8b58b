"""Paraphrases, dropped tasks and cameras, relative and chunked actions, subsets of episodes; and seeks among them."""

import json
import pickle
import sys

import numpy as np
import pytest

from octo_like.common import normalization
from octo_like.common.schema import BatchSpec, flatten
from octo_like.common.text import TextTokenizer
from octo_like.data.check.replay import load_demos
from octo_like.data.order import order as order_lib
from octo_like.data.prepare import prepare_dataset
from octo_like.data.spec import DataError, DatasetSpec
from tests.data.streams import make_train_stream

SPEC = BatchSpec(2, 3, 4, {"primary": (40, 52), "wrist": (24, 24)}, ("primary",), 4, 24)


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load("builtin", 24)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def prepared(toy, cache):
    return prepare(toy, cache)


def prepare(toy, cache, **changes):
    spec = DatasetSpec.from_dict(toy.fields(**({"val_fraction": 0} | changes)))
    return prepare_dataset("toy", spec, toy.data_dir, cache, progress=False)


def stream_of(prepared, tokenizer, spec=SPEC, **options):
    options = dict(seed=3, batch_size=32, episodes_mixed=6, host_threads=2) | options
    return make_train_stream({"toy": prepared}, spec, tokenizer, **options)


def batches_of(prepared, tokenizer, count=4, **options):
    with stream_of(prepared, tokenizer, **options) as stream:
        flat = [dict(flatten(next(stream))) for _ in range(count)]
    return {key: np.concatenate([batch[key] for batch in flat]) for key in flat[0]}


@pytest.fixture(scope="module")
def plain(prepared, tokenizer):
    return batches_of(prepared, tokenizer)


def test_twenty_seeks_with_any_threads_are_bitwise(prepared, tokenizer):
    options = dict(drop_task_prob=0.1, image_dropout_prob=0.2)
    with stream_of(prepared, tokenizer, batch_size=8, **options) as stream:
        want = [dict(flatten(next(stream))) for _ in range(40)]
    numbers = np.random.default_rng(0).integers(0, 40, 20).tolist()
    for threads, prefetch, memory in ((1, 1, 1e-5), (2, 1, 2.0), (3, 3, 2.0)):
        host = dict(host_threads=threads, prefetch=prefetch, host_memory_gb=memory)
        with stream_of(prepared, tokenizer, batch_size=8, **options, **host) as stream:
            for number in numbers if threads == 2 else numbers[:5]:
                stream.seek(8 * number)
                for key, value in flatten(next(stream)):
                    np.testing.assert_array_equal(value, want[number][key], err_msg=key)


@pytest.mark.parametrize("memory", [4.0, 4e-4])
def test_prefetch_does_not_choose_the_order_of_a_fresh_run(prepared, tokenizer, memory):
    def order_of(prefetch):
        host = dict(prefetch=prefetch, host_memory_gb=memory, episodes_mixed=None)
        with stream_of(prepared, tokenizer, batch_size=1, **host) as stream:
            return stream.order_spec

    assert order_of(1) == order_of(2) == order_of(8)


# ---------------------------------------------------------------- tasks


PARAPHRASES = {
    "open the drawer": ["pull the drawer", "get the drawer open "],
    "press the red button": ["push the red one"],
    "never said": ["x"],
}


@pytest.fixture
def paraphrases(tmp_path):
    path = tmp_path / "paraphrases.json"
    path.write_text(json.dumps(PARAPHRASES))
    return str(path)


def texts_of(rows, tokenizer):
    return tokenizer.decode(rows["task/language_instruction/input_ids"])


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_paraphrases(prepared, tokenizer, paraphrases, plain, probability):
    rows = batches_of(prepared, tokenizer, paraphrases=paraphrases, paraphrase_prob=probability, host_threads=1)
    for key, value in plain.items():
        if "input_ids" not in key and "attention_mask" not in key:
            np.testing.assert_array_equal(rows[key], value)  # nothing else changes
    samples = np.arange(len(rows["sample_id"]))
    keys = order_lib.hash_key(3, "sample", samples)
    which, replaced = (order_lib.uniform(keys, name) for name in ("which paraphrase", "paraphrase"))
    said = {" ".join(k.split()): [" ".join(t.split()) for t in v] for k, v in PARAPHRASES.items()}
    found = set()
    for i, (before, after) in enumerate(zip(texts_of(plain, tokenizer), texts_of(rows, tokenizer), strict=True)):
        want = before
        if before and replaced[i] < probability:
            want = said[before][int(which[i] * len(said[before]))]
        assert after == want
        found.add(after)
    assert len(found) == {0.0: 3, 0.5: 6, 1.0: 4}[probability]  # with the empty one
    again = batches_of(prepared, tokenizer, paraphrases=paraphrases, paraphrase_prob=probability, host_threads=3)
    assert texts_of(again, tokenizer) == texts_of(rows, tokenizer)


def test_the_spec_knows_the_paraphrases(prepared, tokenizer, paraphrases, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(PARAPHRASES | {"open the drawer": ["pull"]}))
    with (
        stream_of(prepared, tokenizer) as none,
        stream_of(prepared, tokenizer, paraphrases=paraphrases) as one,
        stream_of(prepared, tokenizer, paraphrases=str(other)) as two,
    ):
        assert none.order_spec["paraphrases"] is None
        (line,) = order_lib.spec_differences(one.order_spec, two.order_spec)
        assert line.startswith("paraphrases: '")


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "does not exist"),
        (pickle.dumps({"open the drawer": ["pull"]}), "is not a JSON file"),
        (b'["open"]', "holds a list"),
        (b'{"open the drawer": "pull"}', "'open the drawer' needs a list of at least one string"),
        (b'{"open the drawer": []}', "needs a list"),
        (b'{"open the drawer": ["  "]}', "that is not empty"),
        (b'{"fly": ["soar"]}', "has none of the 2 instructions.*'open the drawer'.*'fly'"),
    ],
)
def test_bad_paraphrases(prepared, tokenizer, tmp_path, content, message):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"(?s)paraphrases: .*{message}"):
        stream_of(prepared, tokenizer, paraphrases=str(path))


def test_dropped_tasks(prepared, tokenizer, plain):
    rows = batches_of(prepared, tokenizer, drop_task_prob=0.4)
    keys = order_lib.hash_key(3, "sample", rows["sample_id"])
    told = order_lib.uniform(keys, "drop task") >= 0.4
    assert 0.45 < told.mean() < 0.75
    for name in ("language_instruction", "image_primary"):
        mask = f"task/pad_mask_dict/{name}"
        np.testing.assert_array_equal(rows[mask], plain[mask] & told)
    assert not rows["task/image_primary"][~told].any()
    assert all(text == "" for text, t in zip(texts_of(rows, tokenizer), told, strict=True) if not t)
    np.testing.assert_array_equal(rows["action"], plain["action"])


# ---------------------------------------------------------------- cameras


@pytest.mark.parametrize("keep", ["wrist", None])
def test_dropped_cameras(prepared, tokenizer, plain, keep):
    rows = batches_of(prepared, tokenizer, image_dropout_prob=0.5, image_dropout_keep=keep)
    masks = np.stack([rows[f"observation/pad_mask_dict/image_{slot}"] for slot in ("primary", "wrist")])
    assert (masks == masks[..., :1]).all()  # the whole window or nothing
    assert masks[:, :, 0].any(0).all()  # one camera is always there
    assert masks[1].all() == (keep == "wrist")
    share = masks[..., 0].mean(1)
    want = (0.5, 1.0) if keep else (0.75, 0.75)
    np.testing.assert_allclose(share, want, atol=0.12)
    for i, slot in enumerate(("primary", "wrist")):
        shown = masks[i, :, 0]
        np.testing.assert_array_equal(
            rows[f"observation/image_{slot}"][shown], plain[f"observation/image_{slot}"][shown]
        )
        assert not rows[f"observation/image_{slot}"][~shown].any()
    np.testing.assert_array_equal(rows["task/image_primary"], plain["task/image_primary"])  # goals stay


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(image_dropout_keep="wirst"), "image_dropout_keep: no camera 'wirst'; did you mean 'wrist'"),
        (dict(image_dropout_prob=1.1), "image_dropout_prob must be in"),
        (dict(drop_task_prob=-1), "drop_task_prob must be in"),
        (dict(paraphrases="x", paraphrase_prob=0.5), "does not exist"),
    ],
)
def test_bad_options(prepared, tokenizer, options, message):
    with pytest.raises(DataError, match=message):
        stream_of(prepared, tokenizer, **options)


def test_weights_that_are_all_zero_name_the_datasets(toy, prepared, cache, tokenizer):
    """With balancing and without; a zero beside another weight is fine."""
    none = {"a": prepare(toy, cache, weight=0.0), "b": prepare(toy, cache, weight=0)}
    options = dict(seed=3, batch_size=32, episodes_mixed=6, host_threads=2)
    with pytest.raises(DataError, match=r"weight of every dataset is 0 \(a, b\); at least one must be positive"):
        make_train_stream(none, SPEC, tokenizer, balance_weights=False, **options)
    with pytest.raises(DataError, match=r"balance_weights: .* is 0 for all datasets \(a: 0 x \d+, b: 0 x \d+\)"):
        make_train_stream(none, SPEC, tokenizer, balance_weights=True, **options)
    for balance in (False, True):
        make_train_stream(none | {"c": prepared}, SPEC, tokenizer, balance_weights=balance, **options).close()


# ---------------------------------------------------------------- actions that are relative, or come in chunks


def test_relative_actions_through_the_stream(toy, cache, tokenizer):
    relative_to, length = (1, None, 3, None), 4
    prepared = prepare(toy, cache, relative_to=relative_to, chunk_length=length)
    controls = [np.stack([step["control"] for step in e]) for e in toy.episodes]
    joints = [
        np.stack([[*s["observation"]["joints"], s["observation"]["aperture"]] for s in e]).astype(np.float32)
        for e in toy.episodes
    ]

    def chunk(e, t):
        steps = np.minimum(t + np.arange(length), len(controls[e]) - 1)
        base = np.array([joints[e][t, 1], 0, joints[e][t, 3], 0], np.float32)
        return controls[e][steps] - base

    every = np.concatenate([chunk(e, t) for e in range(23) for t in range(len(controls[e]))])
    stats = prepared.statistics["action"]
    want = normalization.compute_statistics(every)
    for field in normalization.FIELDS:
        np.testing.assert_allclose(stats[field], want[field], rtol=1e-6, atol=1e-7, err_msg=field)
    assert prepared.statistics["num_transitions"] == sum(map(len, controls))
    with stream_of(prepared, tokenizer) as stream:
        batch, samples = next(stream), stream.order.samples(np.arange(32))
    for i in range(32):
        e, t, T = int(samples.episode[i]), int(samples.frame[i]), len(controls[samples.episode[i]])
        for w in range(2):
            u = max(t - 1 + w, 0)
            np.testing.assert_allclose(
                batch["action"][i, w], normalization.normalize(chunk(e, u)[:3], stats), rtol=1e-5, atol=1e-6
            )
            past = t - 1 + w + np.arange(3) > min(T - 1, batch["task"]["timestep"][i])
            np.testing.assert_array_equal(batch["action_pad_mask"][i, w], np.repeat(~past[:, None], 4, 1))
    # A policy's answers are absolute, and so is what they are compared with.
    for demo in load_demos(prepared, prepared.train, {}, 2):
        same = [c for c in controls if c.shape == demo.action.shape and np.allclose(c, demo.action, atol=1e-5)]
        assert len(same) == 1, demo.where
    with pytest.raises(DataError, match="chunks of 4, shorter than action_horizon=5"):
        stream_of(prepared, tokenizer, BatchSpec(2, 5, 4, {"primary": (40, 52)}, (), 4, 24))


def chunked(trajectory):
    """A user's function whose actions come in chunks of two: the present and the next one, doubled."""
    import tensorflow as tf

    control = trajectory["control"]
    following = tf.concat([control[1:], control[-1:]], axis=0)
    return {**trajectory, "control": tf.stack([control, 2 * following], axis=1)}


def test_actions_that_come_in_chunks(toy, cache, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "user_chunks", sys.modules[__name__])
    prepared = prepare(toy, cache, standardize="user_chunks:chunked")
    assert (prepared.function.action_chunk, prepared.function.action_dim) == (2, 4)
    spec = BatchSpec(2, 2, 4, {"primary": (40, 52)}, (), 4, 24)
    with stream_of(prepared, tokenizer, spec) as stream:
        batch, samples = next(stream), stream.order.samples(np.arange(32))
    for i in range(32):
        episode, t = toy.episodes[samples.episode[i]], int(samples.frame[i])
        after = episode[min(t + 1, len(episode) - 1)]["control"]
        want = np.stack([episode[t]["control"], 2 * after])
        got = batch["action"][i, -1]
        np.testing.assert_allclose(
            got, normalization.normalize(want, prepared.statistics["action"]), rtol=1e-5, atol=1e-6
        )


def test_subsampled_episodes_through_the_stream(toy, cache, tokenizer):
    prepared = prepare(toy, cache, subsample_length=2)
    with stream_of(prepared, tokenizer) as stream:
        frames = int(np.minimum(prepared.train.frames, 2).sum())
        assert stream.order.walks(0).frames_per_pass[0] == frames
        batch, samples = next(stream), stream.order.samples(np.arange(32))
        assert stream.order_spec["order"]["datasets"][0]["subsample"] == 2
    np.testing.assert_array_equal(batch["observation"]["timestep"][:, -1], samples.frame)
    assert samples.frame.max() > 1  # others than the first two
