"""Real files, damaged on purpose: what is left out, what is substituted, what is fatal, and what stays as it was."""

import dataclasses
import logging
import os
import pathlib
import shutil
import sys
import threading
import types

import numpy as np
import pytest

from octo_like.common import storage
from octo_like.common.schema import BatchSpec, flatten
from octo_like.common.storage import StorageError
from octo_like.common.text import TextTokenizer
from octo_like.data.batches import episodes as episodes_module
from octo_like.data.batches.frames import decode_frames
from octo_like.data.prepare import prepare_dataset
from octo_like.data.rlds import records, scan
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import error_text, tf
from tests.data.streams import make_train_stream, make_val_iterators

SPEC = BatchSpec(2, 3, 4, {"primary": (40, 52), "wrist": (24, 24)}, ("primary",), proprio_dim=4, language_length=8)


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load("builtin", 8)


def prepare(toy, fraction=0.3, cache=None, **changes):
    spec = DatasetSpec.from_dict(toy.fields(**({"val_fraction": 0} | changes)))
    return prepare_dataset("toy", spec, toy.data_dir, cache, False, IndexOptions(max_bad_fraction=fraction))


def stream_of(prepared, tokenizer, **options):
    options = dict(seed=3, batch_size=16, episodes_mixed=6, host_threads=2, max_bad_fraction=0.3) | options
    return make_train_stream({"toy": prepared}, SPEC, tokenizer, **options)


def path_of(toy, number):
    return sorted(toy.path.glob("*tfrecord*"))[number]


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(bytes(content))


def damage(index, episode):
    """Flips a byte in the middle of a record."""
    path = index.files[index.file[episode]]
    with open(path, "rb+") as file:
        file.seek(int(index.offset[episode]) + 12 + int(index.length[episode]) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def rewrite(path, change):
    """Writes a file anew with `change(number, tf.train.Example)` applied; checksums are right."""
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number, record in enumerate(records):
            example = tf.train.Example.FromString(record)
            content = change(number, example)
            writer.write(example.SerializeToString() if content is None else content)


def equal_rows(a, b):
    """(N,) bool: rows of two batches that are bitwise equal."""
    a, b = dict(flatten(a)), dict(flatten(b))
    assert a.keys() == b.keys()
    same = [(a[k] == b[k]).reshape(len(a[k]), -1).all(1) for k in a]
    return np.all(same, axis=0)


# ---------------------------------------------------------------- when it is indexed


def test_the_checksum_is_that_of_the_format(toy):
    assert scan.masked_crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
    content = path_of(toy, 0).read_bytes()
    assert scan.masked_crc32c(content[:8]) == int.from_bytes(content[8:12], "little")


@pytest.mark.parametrize("where", ["data", "footer"])
def test_a_record_with_a_flipped_byte_is_left_out_alone(copied, original, where, caplog):
    whole = original.train
    victim = int(np.flatnonzero(whole.file == 1)[2])
    inside = 12 + int(whole.length[victim]) + (2 if where == "footer" else -5)
    flip(path_of(copied, 1), int(whole.offset[victim]) + inside)
    with pytest.raises(
        DataError, match=r"(?s)episode 2 \(byte \d+\) is damaged.*1 of 23 records.*max_bad_fraction=0.01"
    ):
        prepare(copied, 0.01)
    with caplog.at_level(logging.WARNING):
        left = prepare(copied)
    others = np.delete(np.arange(23), victim)
    for name in ("offset", "length", "record_hash", "record", "file", "frames"):
        np.testing.assert_array_equal(getattr(left.train, name), getattr(whole, name)[others])
    assert len(left.damaged) == 1 and f"{path_of(copied, 1).name}: episode 2 " in left.damaged[0]
    assert "1 of 23 records were damaged" in caplog.text and "delete" in caplog.text
    # The limit counts for an index from the cache as well.
    with pytest.raises(DataError, match="1 of 23 records are damaged"):
        prepare(copied, 0.01)


def test_behind_a_damaged_header_nothing_can_be_found(copied, original):
    whole = original.train
    flip(path_of(copied, 2), int(whole.offset[np.flatnonzero(whole.file == 2)[3]]))
    left = prepare(copied)
    lost = int((whole.file == 2).sum()) - 3
    assert len(left.train) == 23 - lost and len(left.damaged) == lost
    assert "episode 3" in left.damaged[0] and "episode 4 is lost behind it" in left.damaged[1]


@pytest.mark.parametrize("cut", ["inside", "between"])
def test_a_truncated_file(copied, original, cut):
    whole = original.train
    last = int(np.flatnonzero(whole.file == 0)[-1])
    with open(path_of(copied, 0), "rb+") as file:
        file.truncate(int(whole.offset[last]) + (0 if cut == "between" else 40))
    left = prepare(copied)
    assert len(left.train) == 22 and len(left.damaged) == 1
    assert left.damaged[0].startswith(str(path_of(copied, 0))) and "truncated" in left.damaged[0]


def test_a_missing_file(copied, original, caplog):
    whole = original.train
    path_of(copied, 1).unlink()
    left = prepare(copied, 0.5)
    assert caplog.text.count("00001-of-00003") == 1  # not once an episode
    assert len(left.damaged) == (whole.file == 1).sum() and set(left.train.file) == {0, 2}
    assert "00001-of-00003: the file is missing" in left.damaged[0]
    with pytest.raises(DataError, match="1 of 3 files.*are missing.*00001-of-00003"):
        prepare(copied, 0.1)


def test_a_record_that_is_no_episode_and_one_of_another_shape(copied):
    def change(number, example):
        if number == 1:
            return b"certainly not a protocol buffer"
        if number == 4:
            del example.features.feature["steps/observation/joints"].float_list.value[-1]

    rewrite(path_of(copied, 0), change)
    left = prepare(copied)
    assert [message.split(":")[1].split("(")[0] for message in left.damaged] == [" episode 1 ", " episode 4 "]
    assert len(left.train) == 21


def test_zero_length_episodes_and_empty_instructions(make_toy, episodes_like, tmp_path, tokenizer):
    def without_first_steps(trajectory):
        return tf.nest.map_structure(lambda x: x[4:], trajectory)

    sys.modules["cutting"] = module = type(sys)("cutting")
    module.cut = without_first_steps
    toy = make_toy(tmp_path, "toy_short", episodes_like(12, min_steps=2, max_steps=8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inspect.getsource", lambda module: "cut")
        prepared = prepare(toy, standardize="cutting:cut", skip_unlabeled=True)
    del sys.modules["cutting"]
    steps = [max(0, len(episode) - 4) for episode in toy.episodes]
    assert 0 in steps
    np.testing.assert_array_equal(prepared.train.steps, [n for n in steps if n])  # empty ones are as if not there
    labeled = [bool(e[0]["task_text"]) for e, n in zip(toy.episodes, steps, strict=True) if n]
    np.testing.assert_array_equal(prepared.train.frames > 0, labeled)
    with stream_of(prepared, tokenizer, batch_size=8) as stream:
        batch = next(stream)
        assert set(stream.order.samples(np.arange(200)).episode) == set(np.flatnonzero(labeled))
    assert (
        batch["task"]["pad_mask_dict"]["language_instruction"] ^ batch["task"]["pad_mask_dict"]["image_primary"]
    ).all()


def test_empty_episodes_take_no_place(make_toy, episodes_like, tmp_path, monkeypatch):
    """Of 12 episodes two have steps left: validation gets one of these, whatever the keys of the empty ones are."""

    def without_first_steps(trajectory):
        return tf.nest.map_structure(lambda x: x[4:], trajectory)

    module = types.ModuleType("cutting_most")
    module.cut = without_first_steps
    monkeypatch.setitem(sys.modules, "cutting_most", module)
    monkeypatch.setattr("inspect.getsource", lambda module: "cut most")
    long, short = episodes_like(2, min_steps=8), episodes_like(10, seed=1, min_steps=2, max_steps=4)
    toy = make_toy(tmp_path, "toy_mostly_short", long + short)
    cut = "cutting_most:cut"
    prepared = prepare(toy, standardize=cut, val_fraction=0.05)
    assert len(prepared.train) == len(prepared.val) == 1 and prepared.val.frames.min() > 0
    assert prepared.statistics["num_trajectories"] == 1
    assert prepare(toy, standardize=cut, num_demos=2).train.frames.min() > 0
    with pytest.raises(DataError, match="num_demos=3, but only 2 episodes"):
        prepare(toy, standardize=cut, num_demos=3)


# ---------------------------------------------------------------- while training


BATCHES = 14  # more than one pass


@pytest.fixture(scope="module")
def original(toy, tmp_path_factory):
    """The undamaged dataset. Its files are not to be changed."""
    return prepare(toy, cache=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def prepared(original, tmp_path):
    """The same, in files of its own; nothing is indexed or traced again."""
    files = tuple(str(shutil.copy(path, tmp_path)) for path in original.train.files)
    return dataclasses.replace(original, train=dataclasses.replace(original.train, files=files))


@pytest.fixture(scope="module")
def clean(original, tokenizer):
    """Batches of the undamaged dataset, and where their samples come from."""
    with stream_of(original, tokenizer) as stream:
        return [next(stream) for _ in range(BATCHES)], stream.order.samples(np.arange(16 * BATCHES))


def test_damage_changes_the_samples_of_that_record_only(prepared, clean, tokenizer, caplog):
    batches, samples = clean
    victims = (3, 17)
    for victim in victims:
        damage(prepared.train, victim)
    with stream_of(prepared, tokenizer) as stream, caplog.at_level(logging.WARNING):
        got = [next(stream) for _ in range(BATCHES)]
        assert stream.bad_counts == {"toy": 2}
    for number, (a, b) in enumerate(zip(batches, got, strict=True)):
        rows = slice(16 * number, 16 * number + 16)
        np.testing.assert_array_equal(equal_rows(a, b), ~np.isin(samples.episode[rows], victims))
        np.testing.assert_array_equal(a["sample_id"], b["sample_id"])
    for victim in victims:  # named once each
        assert caplog.text.count(prepared.train.where(victim) + " (byte") == 1
    assert "damaged records met: toy 2 of 23" in caplog.text
    # The same at any position, with other threads, and when episodes are read in another order.
    with stream_of(prepared, tokenizer, host_threads=1, prefetch=1, host_memory_gb=1e-5) as stream:
        for number in np.random.default_rng(0).permutation(BATCHES)[:6].tolist():
            stream.seek(16 * number)
            assert equal_rows(next(stream), got[number]).all()
    # Substitutes come from episodes that are in memory at the time.
    order, n = stream.order, int(samples.n[np.isin(samples.episode, victims)][0])
    assert order.substitute(n, 0)[0] in order.walks(0).live(samples.walk[n : n + 1], samples.position[n : n + 1])


@pytest.mark.parametrize("how", ["gone", "truncated"])
def test_a_file_that_is_lost_while_training(prepared, clean, tokenizer, how, caplog):
    batches, samples = clean
    with stream_of(prepared, tokenizer, max_bad_fraction=0.5) as stream:
        if how == "gone":
            pathlib.Path(prepared.train.files[1]).unlink()
            victims = np.flatnonzero(prepared.train.file == 1)
        else:
            victims = np.flatnonzero(prepared.train.file == 1)[2:]
            with open(prepared.train.files[1], "rb+") as file:
                file.truncate(int(prepared.train.offset[victims[0]]) + 20)
        for number in range(BATCHES):
            rows = slice(16 * number, 16 * number + 16)
            good = equal_rows(batches[number], next(stream))
            np.testing.assert_array_equal(good, ~np.isin(samples.episode[rows], victims))
        assert stream.bad_counts == {"toy": len(victims)}
    told = [record.getMessage() for record in caplog.records if "others take its place" in record.getMessage()]
    if how == "gone":  # named once, not for each of its episodes
        assert len(victims) > 1 and len(told) == 1
        assert f"{prepared.train.files[1]} is gone, and with it {len(victims)} of 23 episodes" in told[0]
    else:
        assert len(told) == len(victims)
        reasons = sorted(message.rpartition("truncated: ")[2] for message in told)
        assert reasons[0] == "the file ends before it" and reasons[-1].startswith("truncated record at")


def test_too_much_damage_is_fatal_and_names_the_first(prepared, tokenizer):
    for victim in range(4):
        damage(prepared.train, victim)
    with stream_of(prepared, tokenizer, max_bad_fraction=0.1) as stream:
        with pytest.raises(DataError, match=r"(?s)episode \d+ \(byte \d+\) is damaged.*toy: 3 of 23 records.*=0.1"):
            for _ in range(BATCHES):
                next(stream)


def test_when_nothing_good_is_left(prepared, tokenizer):
    for victim in range(23):
        damage(prepared.train, victim)
    with stream_of(prepared, tokenizer, max_bad_fraction=1.0) as stream:
        with pytest.raises(
            DataError, match=r"toy: sample \d+: 64 substitutes are all damaged; the last one: .*tfrecord"
        ):
            next(stream)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_garbage_frame_changes_the_samples_that_use_it_only(copied, original, clean, tokenizer, threads):
    batches, samples = clean
    whole = original.train
    victim = int(np.flatnonzero(whole.file == 1)[4])
    bad_step = 1

    def change(number, example):
        if number == 4:
            frames = example.features.feature["steps/observation/hand_rgb"].bytes_list.value
            frames[bad_step] = frames[bad_step][:20] + b"garbage"

    rewrite(path_of(copied, 1), change)
    prepared = prepare(copied)
    assert not prepared.damaged  # no image is decoded when indexing
    with stream_of(prepared, tokenizer, host_threads=threads) as stream:
        got = [next(stream) for _ in range(BATCHES)]
        assert stream.bad_counts == {"toy": 1}
        again = [stream.batch(number) for number in range(BATCHES)]
    affected = 0
    for number, (a, b) in enumerate(zip(batches, got, strict=True)):
        rows = slice(16 * number, 16 * number + 16)
        uses = (samples.episode[rows] == victim) & np.isin(samples.frame[rows], (bad_step, bad_step + 1))  # window of 2
        np.testing.assert_array_equal(equal_rows(a, b), ~uses)
        assert equal_rows(b, again[number]).all()
        affected += uses.sum()
    assert affected
    with stream_of(prepared, tokenizer, max_bad_fraction=0.0) as stream:
        with pytest.raises(DataError, match=rf"(?s)episode 4, step {bad_step}, 'hand_rgb' \(wrist\): not a decodable"):
            for _ in range(BATCHES):
                next(stream)


def test_validation_substitutes_too(copied, tokenizer):
    prepared = prepare(copied, val_fraction=0.3)
    options = dict(batch_size=4, host_threads=1, max_bad_fraction=0.3)
    (iterator,) = make_val_iterators({"toy": prepared}, SPEC, tokenizer, **options).values()
    before = list(iterator)
    damage(prepared.val, 1)
    (iterator,) = make_val_iterators({"toy": prepared}, SPEC, tokenizer, **options).values()
    after, again = list(iterator), list(iterator)
    same = np.concatenate([equal_rows(a, b) for a, b in zip(before, after, strict=True)])
    assert 0 < (~same).sum() <= prepared.val.frames[1]
    assert all(equal_rows(a, b).all() for a, b in zip(after, again, strict=True))


# ---------------------------------------------------------------- slow and unwilling storage


def test_a_slow_read_is_named(prepared, tokenizer, monkeypatch):
    monkeypatch.setattr(episodes_module, "SLOW_SECONDS", 0.05)
    real, named = episodes_module.load_episode, threading.Event()

    class Watch(logging.Handler):
        def emit(self, record):
            if f"{prepared.train.where(5)}: batches have been waiting for this read" in record.getMessage():
                named.set()

    def slow(prepared, index, episode, *rest):
        if episode == 5:
            assert named.wait(60)  # until somebody complains
        return real(prepared, index, episode, *rest)

    monkeypatch.setattr(episodes_module, "load_episode", slow)
    episodes_module.log.addHandler(handler := Watch())
    try:
        with stream_of(prepared, tokenizer, episodes_mixed=23) as stream:
            for _ in range(3):
                next(stream)
    finally:
        episodes_module.log.removeHandler(handler)
    assert named.is_set()


def test_a_storage_that_refuses_is_asked_again(prepared, tokenizer, monkeypatch, clean):
    real, refused = prepared.function.from_file, []
    monkeypatch.setattr(episodes_module.time, "sleep", lambda seconds: None)

    def unwilling(path, offset):
        if len(refused) < 2:
            refused.append(path)
            raise tf.errors.UnavailableError(None, None, "try later")
        return real(path, offset)

    monkeypatch.setattr(prepared.function, "from_file", unwilling)
    with stream_of(prepared, tokenizer) as stream:
        assert equal_rows(next(stream), clean[0][0]).all()
        assert stream.bad_counts == {"toy": 0} and len(refused) == 2

    def never(path, offset):
        raise tf.errors.UnavailableError(None, None, "try later")

    monkeypatch.setattr(prepared.function, "from_file", never)
    with stream_of(prepared, tokenizer) as stream:
        with pytest.raises(StorageError, match=r"episode \d+: the storage .*: try later"):
            next(stream)


def test_after_an_outage_a_seek_helps(prepared, tokenizer, monkeypatch, clean):
    """The storage fails for a while, for what is needed and for what is read ahead; then it works again."""
    real, out = prepared.function.from_file, threading.Event()
    monkeypatch.setattr(episodes_module.time, "sleep", lambda seconds: None)

    def failing(path, offset):
        if out.is_set():
            raise tf.errors.UnavailableError(None, None, "try later")
        return real(path, offset)

    monkeypatch.setattr(prepared.function, "from_file", failing)
    with stream_of(prepared, tokenizer) as stream:
        out.set()
        with pytest.raises(StorageError, match=r"episode \d+: the storage .*: try later"):
            next(stream)
        with pytest.raises(RuntimeError, match="seek"):
            next(stream)
        out.clear()
        stream.seek(0)
        for number in range(BATCHES):
            assert equal_rows(next(stream), clean[0][number]).all()
        assert stream.bad_counts == {"toy": 0}


def test_a_read_that_began_during_an_outage_is_done_again(prepared, tokenizer, monkeypatch, clean):
    """The seek finds a read under way that asked the storage for the last time before it worked again."""
    real, asked, answer = prepared.function.from_file, threading.Event(), threading.Event()
    monkeypatch.setattr(episodes_module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(storage, "PAUSES", ())
    held = []

    def slow_to_fail(path, offset):
        if not asked.is_set():
            held.append((path, offset))
            asked.set()
            answer.wait(timeout=60)
            raise tf.errors.UnavailableError(None, None, "try later")
        return real(path, offset)

    monkeypatch.setattr(prepared.function, "from_file", slow_to_fail)
    with stream_of(prepared, tokenizer) as stream:
        store = stream._reader.store
        samples = stream._samples_of(0)
        key = (int(samples.dataset[0]), int(samples.episode[0]))
        store.request_ahead([key])
        assert asked.wait(timeout=60)
        threading.Timer(0.2, answer.set).start()
        (episode,) = store.get([key])
        assert len(episode.action) == prepared.train.steps[key[1]] and len(held) == 1
        for number in range(BATCHES):
            assert equal_rows(next(stream), clean[0][number]).all()


def test_what_tensorflow_says_is_kept(copied, original):
    """Since 2.21 the name of the function comes before the message, which went with it."""
    path, whole = path_of(copied, 0), original.train
    said = {}
    changes = {"flipped": lambda: flip(path, 40), "cut": lambda: os.truncate(path, 30), "gone": path.unlink}
    for name, change in changes.items():
        change()
        with pytest.raises(records.damage_errors()) as found:
            original.function.from_file(str(path), int(whole.offset[0]))
        said[name] = str(records.damaged(str(path), 0, 0, found.value))
    where = f"{path}: episode 0 (byte 0) is damaged or truncated: "
    assert said["flipped"] == where + "corrupted record at 12"
    assert said["cut"].startswith(where + "truncated record at 0")
    assert said["gone"] == f"{path}: the file is gone, with episode 0"
    with pytest.raises(tf.errors.InvalidArgumentError) as found:
        tf.io.decode_png(b"certainly not")
    assert "{{" not in error_text(found.value) and "[Op" not in error_text(found.value) and error_text(found.value)
    old = "corrupted record at 12\n\t [[{{node ReadDataset}}]] [Op:IteratorGetNext] name: "
    assert error_text(tf.errors.DataLossError(None, None, old)) == "corrupted record at 12"
    assert error_text(tf.errors.DataLossError(None, None, "[[{{node x}}]]")) == "DataLossError"
    with pytest.raises(DataError, match=r"starts with b'garbage'\): Unknown image file format"):
        decode_frames([b"garbage"], (8, 8))


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_bad_fractions(copied, fraction):
    with pytest.raises(DataError, match=r"max_bad_fraction must be in \[0, 1\]"):
        prepare(copied, fraction)
