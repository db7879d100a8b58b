"""An index holds what was read for it: which pictures, texts and depth a run looks at does not read the data again."""

import dataclasses

import numpy as np
import pytest

from octo_like.common.config import ConfigError
from octo_like.common.schema import BatchSpec
from octo_like.data.inputs import Inputs
from octo_like.data.prepare import prepare_datasets
from octo_like.data.rlds import cache
from octo_like.data.spec import DataError, specs_from_config
from tests.data.streams import make_train_stream

BOTH = {"primary": "front_rgb", "wrist": "hand_rgb"}


@pytest.fixture
def prepare(toy, tmp_path, monkeypatch):
    """Prepares the dataset with changed fields, in one cache; `prepare.scanned` counts files that are read whole."""
    scan_file = cache.scan_file

    def counted(*args):
        prepare.scanned += 1
        return scan_file(*args)

    def prepare(cache="cache", **fields):
        specs = specs_from_config({"toy": toy.fields(**fields)})
        return prepare_datasets(specs, toy.data_dir, str(tmp_path / cache), progress=False)["toy"]

    prepare.scanned = 0
    monkeypatch.setattr(cache, "scan_file", counted)
    return prepare


@pytest.mark.parametrize(
    "change",
    [
        dict(image_keys={"primary": "front_rgb"}),
        dict(image_keys={"primary": "hand_rgb", "wrist": None}),
        dict(image_keys={}),
        dict(bgr_slots=["wrist"]),
        dict(language_key=None),
        dict(depth_keys={"primary": "hand_rgb"}, depth_scale=0.5),
    ],
)
def test_other_pictures_texts_and_depth_read_nothing_again(prepare, change):
    prepare()
    files = prepare.scanned
    assert files > 0
    got = prepare(**change)
    assert prepare.scanned == files
    fresh = prepare(cache="another", **change)
    assert prepare.scanned == 2 * files
    assert got.train.hash == fresh.train.hash and got.instructions == fresh.instructions
    np.testing.assert_array_equal(got.train.has_language, fresh.train.has_language)
    np.testing.assert_array_equal(got.train.picture_bytes, fresh.train.picture_bytes)


def test_a_text_that_was_not_wanted_is_known(prepare):
    without = prepare(language_key=None)
    assert not without.train.has_language.any() and without.instructions == {}
    files = prepare.scanned
    with_text = prepare(skip_unlabeled=True)
    assert prepare.scanned == files
    assert "open the drawer" in with_text.instructions and 0 < with_text.train.has_language.mean() < 1
    assert (with_text.train.frames[~with_text.train.has_language] == 0).all()


def test_other_numbers_are_read_again(prepare):
    prepare()
    files = prepare.scanned
    prepare(proprio_keys=("joints",))
    assert prepare.scanned == 2 * files


def shorter(trajectory):
    """A camera that misses the last frame of the longest episodes, and a text under a name of its own."""
    frames = trajectory["observation"]["hand_rgb"]
    trajectory["observation"]["hand_rgb"] = frames[: len_at_most(frames)]
    return {**trajectory, "said": trajectory["task_text"]}


def len_at_most(frames):
    from octo_like.data.tf import tf

    return tf.minimum(tf.shape(frames)[0], 11)


def test_pictures_of_another_number_are_found_without_reading_again(prepare):
    fields = dict(standardize=f"{__name__}:shorter")
    prepare(**fields, image_keys={"primary": "front_rgb"})
    files = prepare.scanned
    with pytest.raises(DataError, match=r"episode \d+: camera wrist \('hand_rgb'\) has another number of steps"):
        prepare(**fields, image_keys=BOTH)
    assert prepare.scanned == files
    # A text that only the function knows is found when it is asked for, with a scan.
    assert "open the drawer" in prepare(**fields, image_keys={}, language_key="said").instructions
    assert prepare.scanned == 2 * files


def test_a_run_is_not_resumed_with_other_pictures(prepare):
    """They are not in the hash of the index, but in what shapes a batch."""
    options = dict(seed=1, batch_size=8, host_threads=1)
    spec = BatchSpec(1, 2, 4, {"primary": (16, 16)}, proprio_dim=4)
    one = prepare(image_keys={"primary": "front_rgb"})
    two = dataclasses.replace(one, spec=dataclasses.replace(one.spec, bgr_slots=("primary",)))
    with make_train_stream({"toy": one}, spec, None, **options) as first:
        saved = first.order_spec
    with make_train_stream({"toy": two}, spec, None, **options) as second:
        with pytest.raises(ConfigError, match=r"views.toy.bgr_slots: added"):
            Inputs(second, {}, {}, {}).resume(saved, 8)


def test_bytes_are_no_texts():
    """Pictures in plain string features must not fill the index as if they were instructions."""
    import tensorflow as tf

    from octo_like.data.rlds.leaves import MAX_TEXT, texts_of

    picture = tf.io.encode_png(np.zeros((2, 2, 3), np.uint8)).numpy()
    jpeg = tf.io.encode_jpeg(np.zeros((8, 8, 3), np.uint8)).numpy()
    texts = ["öffne die Tür".encode(), "ouvre l'évier".encode("latin-1"), b"two\nlines", b"", b"x" * MAX_TEXT]
    other = [picture, jpeg, b"x" * (MAX_TEXT + 1), np.float32(1).tobytes(), b"a\nb\x00c"]
    found = texts_of({"a": {"b": tf.constant(texts + other)}, "c": tf.constant([1.0])}, ["a/b", "c", "d"])
    assert list(found) == ["a/b"]
    assert found["a/b"].numpy().tolist() == texts + [b""] * len(other)
