"""Chunks as ids of a head's vocabulary, in batches."""

import dataclasses

import numpy as np
import pytest

from octo_like.common import fast
from octo_like.common.normalization import compute_statistics, normalize
from octo_like.common.schema import BatchSpec, check_batch
from octo_like.common.vocabularies import Targets
from octo_like.data.batches import assemble
from octo_like.data.spec import DataError
from tests.data.streams import make_train_stream

H = 5


def test_batches_have_the_ids_of_their_own_whole_chunks(toy):
    words = _words_of(toy)
    spec = BatchSpec(
        2, H, 4, {"primary": (20, 26)}, proprio_dim=4, heads=("action",), action_tokens={"action": words.max_tokens}
    )
    options = dict(data_dir=toy.data_dir, seed=0, batch_size=16)
    with make_train_stream(
        {"toy": toy.fields()}, spec, None, targets=Targets(None, {"action": words}), **options
    ) as stream:
        batches = [next(stream) for _ in range(5)]
        assert stream.order_spec["action_vocabularies"] == {"action": words.fingerprint}
    seen = {True: 0, False: 0}
    for batch in batches:
        check_batch(batch, spec)
        ids, mask = batch["action_tokens"]["action"], batch["action_pad_mask"]
        rows = ids.reshape(32, -1), mask.reshape(32, H, 4), batch["action"].reshape(32, H, 4)
        for row, known, action in zip(*rows, strict=True):
            whole = known.all()
            seen[bool(whole)] += 1
            assert row.any() == whole
            if whole:
                np.testing.assert_array_equal(row, words.encode(action[None])[0][0])
    assert min(seen.values()) > 20
    other = _words_of(toy, scale=0.1)  # as of another robot, or another normalisation
    sizes = dataclasses.replace(spec, action_tokens={"action": other.max_tokens})
    targets = Targets(None, {"action": other})
    with make_train_stream({"toy": toy.fields()}, sizes, None, targets=targets, **options) as stream:
        with pytest.raises(
            ValueError, match=r"toy.*: \d+% of what its actions consist of is outside the range .*heads.action"
        ):
            for _ in range(40):
                next(stream)
    with pytest.raises(ValueError, match="batches have action tokens for"):
        make_train_stream({"toy": toy.fields()}, spec, None, **options)


def test_a_vocabulary_is_for_its_own_head_s_rows(toy):
    """Rows of another head, whose numbers the vocabulary could not say, are neither judged by it nor encoded."""
    words = _words_of(toy, kind="bounds")
    sizes = dict(heads=("action", "other"), action_tokens={"action": words.max_tokens})
    spec = BatchSpec(1, H, 4, {"primary": (20, 26)}, proprio_dim=4, **sizes)
    datasets = {
        "own": toy.fields(normalization="bounds"),
        "other": toy.fields(head="other", weight=7.0),
    }
    options = dict(targets=Targets(None, {"action": words}), data_dir=toy.data_dir, seed=0, batch_size=32)
    with make_train_stream(datasets, spec, None, **options) as stream:
        batch = next(stream)
    own = batch["action_head_mask"]["action"]
    assert 0 < own.sum() < 12 and not batch["action_tokens"]["action"][~own].any()
    assert batch["action_tokens"]["action"][own].any()


def test_each_dataset_is_judged_however_seldom_it_comes(toy, monkeypatch):
    """Beside one that fits, on average hardly anything would be cut."""
    words = _words_of(toy, kind="bounds")
    share = {kind: _cut(toy, words, kind) for kind in ("bounds", "normal")}
    monkeypatch.setattr(assemble, "MAX_CLIPPED", 0.01)
    assert share["bounds"] < 0.002 and share["normal"] > 0.02
    sizes = dict(heads=("action",), action_tokens={"action": words.max_tokens})
    spec = BatchSpec(1, H, 4, {"primary": (20, 26)}, proprio_dim=4, **sizes)
    fits = toy.fields(normalization="bounds", weight=8.0)
    options = dict(targets=Targets(None, {"action": words}), data_dir=toy.data_dir, seed=0, batch_size=128)
    with make_train_stream({"fits": fits, "seldom": toy.fields()}, spec, None, **options) as stream:
        with pytest.raises(DataError, match="of what its actions consist of is outside"):
            for _ in range(80):
                next(stream)
    with make_train_stream({"fits": fits}, spec, None, **options) as stream:
        for _ in range(5):
            next(stream)


def _chunks_of(toy, kind):
    actions = np.concatenate([[step["control"] for step in episode] for episode in toy.episodes])
    normal = normalize(actions, compute_statistics(actions), kind)
    return np.stack([normal[i : i + H] for i in range(len(normal) - H)])


def _cut(toy, words, kind):
    return words.clipped(_chunks_of(toy, kind)).mean() / words.num_coefficients


def _words_of(toy, scale=1.0, kind="normal"):
    return fast.train(scale * _chunks_of(toy, kind), vocab_size=120, scale=4.0, clip_share=0.001)
