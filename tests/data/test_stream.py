"""The stream against the episodes that were written: contents, masks, seek, threads, processes, validation."""

import dataclasses
import io
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from octo_like.common import normalization
from octo_like.common.schema import BatchSpec, check_batch, flatten
from octo_like.common.text import TextTokenizer
from octo_like.data.order import order
from octo_like.data.prepare import prepare_datasets
from octo_like.data.spec import DataError, specs_from_config
from tests.data.streams import make_train_stream, make_val_iterators

FULL = BatchSpec(
    window_size=3,
    action_horizon=4,
    action_dim=6,
    image_sizes={"primary": (40, 52), "wrist": (24, 24), "secondary": (8, 8)},
    goal_images=("primary",),
    proprio_dim=5,
    language_length=12,
    heads=("action", "other"),
)


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load("builtin", 12)


@pytest.fixture(scope="module")
def datasets(toy, wide_toy, tmp_path_factory):
    """Two prepared datasets: one with both cameras and proprio, one with a primary camera only and another head."""
    cache = str(tmp_path_factory.mktemp("cache"))
    a = prepare_datasets(specs_from_config({"toy": toy.fields()}), toy.data_dir, cache, progress=False)
    fields = wide_toy.fields(
        image_keys={"primary": "front_rgb"},
        proprio_keys=(),
        head="other",
        weight=0.5,
        normalization="bounds",
        language_key=None,
    )
    b = prepare_datasets(specs_from_config({"wide": fields}), wide_toy.data_dir, cache, progress=False)
    return {**a, **b}


def stream_of(datasets, tokenizer, spec=FULL, **options):
    options = dict(seed=7, batch_size=32, host_threads=2, episodes_mixed=8) | options
    return make_train_stream(datasets, spec, tokenizer, **options)


def equal(a, b):
    a, b = dict(flatten(a)), dict(flatten(b))
    assert a.keys() == b.keys()
    return all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def batches(datasets, tokenizer):
    with stream_of(datasets, tokenizer) as stream:
        return [next(stream) for _ in range(6)]


@pytest.fixture(scope="module")
def samples(datasets, tokenizer):
    with stream_of(datasets, tokenizer) as stream:
        return stream.order.samples(np.arange(6 * 32))


def pooled(batches):
    flat = [dict(flatten(batch)) for batch in batches]
    return {key: np.concatenate([batch[key] for batch in flat]) for key in flat[0]}


@pytest.fixture(scope="module")
def rows(batches):
    return pooled(batches)


@pytest.fixture(scope="module")
def written(datasets, toy, wide_toy):
    """Episode that was written, for (dataset, training episode)."""
    found = {}
    for d, (prepared, source) in enumerate(zip(datasets.values(), (toy, wide_toy), strict=True)):
        by_action = {np.stack([step["control"] for step in e]).tobytes(): e for e in source.episodes}
        for i in range(len(prepared.train)):
            path = prepared.train.files[prepared.train.file[i]]
            read = prepared.function.from_file(path, int(prepared.train.offset[i]))
            found[d, i] = by_action[read["action"].numpy().tobytes()]
    return found


def test_batches_have_the_schema(batches):
    for number, batch in enumerate(batches):
        check_batch(batch, FULL)
        np.testing.assert_array_equal(batch["sample_id"], number * 32 + np.arange(32))


def test_contents_are_what_was_written(rows, samples, written, datasets):
    names = list(datasets)
    for i in range(len(samples.n)):
        d, t = int(samples.dataset[i]), int(samples.frame[i])
        episode = written[d, int(samples.episode[i])]
        stats, kind = datasets[names[d]].statistics, datasets[names[d]].spec.normalization
        T, width = len(episode), len(episode[0]["control"])
        assert rows["dataset_id"][i] == d
        goal = rows["task/timestep"][i]
        for w in range(3):
            unclamped = t - 2 + w
            step = max(unclamped, 0)
            assert rows["observation/timestep"][i, w] == step
            assert rows["observation/timestep_pad_mask"][i, w] == (unclamped >= 0)
            np.testing.assert_array_equal(
                rows["observation/image_primary"][i, w], episode[step]["observation"]["front_rgb"]
            )
            for h in range(4):
                control = episode[min(step + h, T - 1)]["control"]
                want = normalization.normalize(control, stats["action"], kind)
                np.testing.assert_allclose(rows["action"][i, w, h, :width], want, rtol=1e-6)
                mask = rows["action_pad_mask"][i, w, h]
                assert (mask[:width] == (unclamped + h <= goal)).all()
                assert not mask[width:].any() and not rows["action"][i, w, h, width:].any()
            proprio, proprio_mask = rows["observation/proprio"][i, w], rows["observation/proprio_pad_mask"][i, w]
            if d == 0:
                raw = np.append(episode[step]["observation"]["joints"], episode[step]["observation"]["aperture"])
                want = normalization.normalize(raw.astype(np.float32), stats["proprio"], kind)
                np.testing.assert_allclose(proprio[:4], want, rtol=1e-5, atol=1e-6)
                assert proprio_mask.tolist() == [True] * 4 + [False] and proprio[4] == 0
            else:
                assert not proprio.any() and not proprio_mask.any()
        if rows["task/pad_mask_dict/image_primary"][i]:
            assert t <= goal < T
            np.testing.assert_array_equal(rows["task/image_primary"][i], episode[goal]["observation"]["front_rgb"])
        else:
            assert goal == T - 1 and not rows["task/image_primary"][i].any()


def test_jpeg_frames_are_decoded(rows, samples, written):
    i = next(i for i in range(len(samples.n)) if samples.dataset[i] == 0)
    episode = written[0, int(samples.episode[i])]
    raw = episode[int(samples.frame[i])]["observation"]["hand_rgb"]
    buffer = io.BytesIO()
    Image.fromarray(raw).save(buffer, "JPEG", quality=95)
    lossy = np.asarray(Image.open(buffer)).astype(float)
    assert np.abs(rows["observation/image_wrist"][i, -1] - lossy).mean() < 8


def test_language_goals_and_what_is_missing(rows, samples, written, tokenizer):
    empty = tokenizer.encode([""])
    seen = set()
    for i in range(len(samples.n)):
        d = int(samples.dataset[i])
        text = written[d, int(samples.episode[i])][0]["task_text"] if d == 0 else ""
        keeps_text = rows["task/pad_mask_dict/language_instruction"][i]
        keeps_goal = rows["task/pad_mask_dict/image_primary"][i]
        assert keeps_text != keeps_goal  # exactly one way of saying what to do
        assert keeps_goal or text
        want = tokenizer.encode([text]) if keeps_text else empty
        for key in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(rows[f"task/language_instruction/{key}"][i], want[key][0])
        seen.add((bool(text), bool(keeps_text)))
        assert rows["observation/pad_mask_dict/image_primary"][i].all()
        assert rows["observation/pad_mask_dict/image_wrist"][i].all() == (d == 0)
        assert not rows["observation/pad_mask_dict/image_secondary"][i].any()
        assert rows["observation/pad_mask_dict/proprio"][i].all() == (d == 0)
        if d == 1:
            assert not rows["observation/image_wrist"][i].any()
        assert not rows["observation/image_secondary"][i].any()
        assert rows["action_head_mask/action"][i] == (d == 0) and rows["action_head_mask/other"][i] == (d == 1)
    assert seen == {(True, True), (True, False), (False, False)}


def test_mixture_follows_the_weights(datasets, tokenizer):
    with stream_of(datasets, tokenizer) as stream:
        counts = stream.order.counts(4096)
    assert abs(counts[0] - 4096 * 2 / 3) <= 2


def test_seek_gives_the_same_batches(datasets, tokenizer, batches):
    with stream_of(datasets, tokenizer, start=96) as stream:
        assert stream.position == 96
        assert equal(next(stream), batches[3])
        for number in (5, 0, 2, 2):
            stream.seek(number * 32)
            assert equal(next(stream), batches[number])
            assert stream.position == (number + 1) * 32
        assert equal(stream.batch(1), batches[1]) and stream.position == 96
        with pytest.raises(DataError, match="not the beginning of a batch of 32"):
            stream.seek(33)


@pytest.mark.parametrize("options", [dict(host_threads=1, prefetch=1), dict(host_threads=3), dict(host_memory_gb=1e-6)])
def test_host_knobs_change_nothing(datasets, tokenizer, batches, options):
    with stream_of(datasets, tokenizer, **options) as stream:
        assert all(equal(next(stream), batch) for batch in batches)


def test_memory_is_bounded(datasets, tokenizer):
    with stream_of(datasets, tokenizer, host_memory_gb=2e-5) as stream:
        for _ in range(12):
            next(stream)
        everything = sum(len(d.train) for d in datasets.values())
        kept = len(stream._reader.store._entries)
        assert kept < everything
    with stream_of(datasets, tokenizer) as stream:
        for _ in range(12):
            next(stream)
        assert len(stream._reader.store._entries) == everything  # a small dataset stays in memory whole


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_their_rows_of_the_same_batches(datasets, tokenizer, processes):
    with stream_of(datasets, tokenizer, num_lanes=4) as stream:
        whole = [next(stream) for _ in range(3)]
    parts = []
    for index in range(processes):
        options = dict(num_lanes=4, process_index=index, process_count=processes)
        with stream_of(datasets, tokenizer, **options) as stream:
            parts.append([next(stream) for _ in range(3)])
    for number in range(3):
        joined = pooled([part[number] for part in parts])
        assert equal(joined, dict(flatten(whole[number])))


def test_order_spec(datasets, tokenizer):
    with stream_of(datasets, tokenizer) as a, stream_of(datasets, tokenizer, host_threads=1, host_memory_gb=1) as b:
        assert order.spec_differences(a.order_spec, b.order_spec) == []
    for change, line in {
        ("seed", 8): "order.seed: 7 -> 8",
        ("batch_size", 64): "order.batch_size: 32 -> 64",
        ("episodes_mixed", 4): "order.datasets.toy.episodes_mixed: 8 -> 4",
        ("decode", "fast"): "decode: 'parity' -> 'fast'",
        ("keep_goal_prob", 0.1): "task.keep_goal_prob: 0.5 -> 0.1",
    }.items():
        with stream_of(datasets, tokenizer, **dict([change])) as b:
            assert order.spec_differences(a.order_spec, b.order_spec)[0] == line
    fewer = {"toy": dataclasses.replace(datasets["toy"], train=datasets["toy"].train.take(np.arange(9)))}
    with stream_of(datasets | fewer, tokenizer) as b:
        changed = order.spec_differences(a.order_spec, b.order_spec)
        assert [line.split(":")[0] for line in changed] == [
            f"order.datasets.toy.{key}" for key in ("episodes", "frames", "index_hash")
        ]
    assert json.loads(json.dumps(a.order_spec)) == a.order_spec


def test_without_language_goals_and_proprio(datasets):
    spec = BatchSpec(1, 2, 6, {"primary": (20, 26)})
    datasets = {"toy": datasets["toy"]}
    with make_train_stream(datasets, spec, None, seed=0, batch_size=8, host_threads=1) as stream:
        batch = next(stream)
    check_batch(batch, spec.__class__(1, 2, 6, {"primary": (20, 26)}))
    assert batch["action_pad_mask"].any()


def test_keep_goal_prob_and_distance(datasets, tokenizer):
    for prob, share in ((0.0, 0.0), (1.0, 1.0)):
        with stream_of({"toy": datasets["toy"]}, tokenizer, keep_goal_prob=prob, batch_size=256) as stream:
            batch = next(stream)
        masks = batch["task"]["pad_mask_dict"]
        has_text = masks["language_instruction"] | (prob == 1.0)
        assert masks["image_primary"][has_text].mean() == share
        assert (masks["image_primary"] | masks["language_instruction"]).all()
    with stream_of(
        {"toy": datasets["toy"]}, tokenizer, keep_goal_prob=1.0, max_goal_distance=2, batch_size=256
    ) as stream:
        batch = next(stream)
    ahead = batch["task"]["timestep"] - batch["observation"]["timestep"][:, -1]
    assert ahead.min() == 0 and ahead.max() == 1


# ---------------------------------------------------------------- validation


def test_validation_is_finite_repeatable_and_apart(datasets, tokenizer):
    with stream_of(datasets, tokenizer) as stream:
        first = next(stream)
        iterators = make_val_iterators(datasets, FULL, tokenizer, batch_size=8, host_threads=1)
        assert list(iterators) == ["toy", "wide"]
        for number, iterator in enumerate(iterators.values()):
            once, again = list(iterator), list(iterator)
            assert len(once) == len(iterator) >= 1
            for a, b in zip(once, again, strict=True):
                check_batch(a, FULL)
                assert equal(a, b)
                assert (a["dataset_id"] == number).all()
        assert stream.position == 32
        second = next(stream)
    with stream_of(datasets, tokenizer) as stream:
        assert equal(next(stream), first) and equal(next(stream), second)


def test_validation_shows_each_frame_once(datasets, tokenizer):
    (iterator,) = make_val_iterators({"toy": datasets["toy"]}, FULL, tokenizer, batch_size=4, host_threads=1).values()
    rows = pooled(list(iterator))
    shown = {rows["observation/image_primary"][i, -1].tobytes() for i in range(len(rows["sample_id"]))}
    assert len(shown) == len(rows["sample_id"]) == len(iterator) * 4 >= iterator.num_frames - 3
    few = make_val_iterators({"toy": datasets["toy"]}, FULL, tokenizer, batch_size=4, max_batches=2, host_threads=1)
    assert len(list(few["toy"])) == 2


def test_validation_frames_are_not_trained_on(datasets, tokenizer):
    (iterator,) = make_val_iterators({"toy": datasets["toy"]}, FULL, tokenizer, batch_size=4, host_threads=1).values()
    held = {image.tobytes() for image in pooled(list(iterator))["observation/image_primary"][:, -1]}
    frames = int(datasets["toy"].train.frames.sum())
    with stream_of({"toy": datasets["toy"]}, tokenizer) as stream:
        rows = pooled([next(stream) for _ in range(-(-2 * frames // 32))])
    trained = {image.tobytes() for image in rows["observation/image_primary"][:, -1]}
    assert not held & trained
    assert len(trained) == frames  # the whole of the training set was seen


def test_validation_rows_of_processes(datasets, tokenizer):
    options = dict(batch_size=8, host_threads=1)
    whole = pooled(list(make_val_iterators(datasets, FULL, tokenizer, **options)["toy"]))
    parts = [
        list(make_val_iterators(datasets, FULL, tokenizer, **options, process_index=i, process_count=2)["toy"])
        for i in range(2)
    ]
    joined = pooled([part[n] for n in range(len(parts[0])) for part in parts])
    assert equal(joined, whole)
    with pytest.raises(DataError, match="3 processes do not divide"):
        make_val_iterators(datasets, FULL, tokenizer, **options, process_count=3)


def test_datasets_without_validation_are_left_out(toy, tokenizer, tmp_path):
    specs = {"toy": toy.fields(val_fraction=0)}
    options = dict(data_dir=toy.data_dir, cache_dir=str(tmp_path), batch_size=4)
    assert make_val_iterators(specs, FULL, tokenizer, **options) == {}


# ---------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    "change,options,message",
    [
        (
            dict(action_dim=3),
            {},
            "toy: action has 4 dimensions, but batches hold 3; widen its head, model.heads.action.action_dim=4",
        ),
        (dict(proprio_dim=3), {}, "toy: observation/proprio has 4 dimensions, but batches hold 3"),
        (dict(heads=("action",)), {}, "wide: no action head 'other'.*valid: action"),
        (dict(image_sizes={"overhead": (8, 8)}, goal_images=()), {}, "camera 'primary' has no size.*overhead"),
        (dict(language_length=16), {}, "12 ids, but batches hold language_length=16"),
        ({}, dict(decode="quick"), "decode mode 'quick'.*fast, parity"),
        ({}, dict(keep_goal_prob=1.5), "keep_goal_prob"),
        ({}, dict(max_goal_distance=0), "max_goal_distance"),
        ({}, dict(num_lanes=3), "must divide the batch size.*allows 1, 2, 4, 8, 16, 32"),
        (
            {},
            dict(num_lanes=1, process_count=2),
            "2 processes do not divide 1 lanes; possible numbers of processes: 1\\.",
        ),
        (
            {},
            dict(process_count=3),
            r"3 processes do not divide 32 lanes; possible numbers of processes: 1, 2, 4, 8, 16, 32\.",
        ),
        ({}, dict(host_threads=0), "threads"),
    ],
)
def test_bad_settings(datasets, tokenizer, change, options, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        stream_of(datasets, tokenizer, dataclasses.replace(FULL, **change), **options)


def test_missing_tokenizer_and_folder(datasets, toy):
    with pytest.raises(DataError, match="no text tokenizer"):
        stream_of(datasets, None)
    with pytest.raises(DataError, match="data_dir is needed"):
        make_train_stream({"toy": toy.fields()}, FULL, None, seed=0, batch_size=4)


def test_an_unknown_camera_name_is_an_error(toy, tokenizer, tmp_path):
    fields = toy.fields(image_keys={"primary": "front_rgb", "wirst": "hand_rgb"})
    with pytest.raises(DataError, match="camera 'wirst'.*did you mean 'wrist'"):
        make_train_stream(
            {"toy": fields},
            FULL,
            tokenizer,
            data_dir=toy.data_dir,
            cache_dir=str(tmp_path),
            seed=0,
            batch_size=4,
        )


def test_a_record_damaged_after_indexing_is_named(copied, tokenizer):
    make = dict(data_dir=copied.data_dir, seed=0, batch_size=8, host_threads=1)
    make_train_stream({"toy": copied.fields()}, FULL, tokenizer, **make).close()
    path = sorted(copied.path.glob("*tfrecord*"))[0]
    content = bytearray(path.read_bytes())
    for position in range(50, len(content), 400):
        content[position] ^= 0xFF
    path.write_bytes(bytes(content))
    with make_train_stream({"toy": copied.fields()}, FULL, tokenizer, **make) as stream:
        with pytest.raises(DataError, match=rf"{path.name}: episode \d+ \(byte \d+\) is damaged"):
            for _ in range(20):
                next(stream)


def test_a_replaced_file_is_noticed(copied, make_toy, episodes_like, tokenizer, tmp_path):
    make = dict(data_dir=copied.data_dir, seed=0, batch_size=8, host_threads=1)
    stream = make_train_stream({"toy": copied.fields()}, FULL, tokenizer, **make)
    paths = sorted(copied.path.glob("*tfrecord*"))
    other = make_toy(tmp_path / "other", "toy_buttons", episodes_like(23, seed=1, min_steps=12), num_shards=3)
    for path, new in zip(paths, sorted(other.path.glob("*tfrecord*")), strict=True):
        shutil.copyfile(new, path)
    with stream, pytest.raises(DataError, match="not the one that was indexed|damaged or truncated"):
        for _ in range(20):
            next(stream)


def test_a_garbage_image_is_named(make_toy, episodes_like, tokenizer, tmp_path, monkeypatch):
    toy = make_toy(tmp_path, "toy_garbage", episodes_like(4))
    (path,) = toy.path.glob("*tfrecord*")
    # Valid record, broken image: damaged by the reader's own function, so that the CRC is right.
    import tensorflow as tf

    def spoil(trajectory):
        frames = trajectory["observation"]["front_rgb"]
        spoiled = tf.tensor_scatter_nd_update(frames, [[1]], ["garbage"])
        return {**trajectory, "observation": {**trajectory["observation"], "front_rgb": spoiled}}

    module = type(sys)("spoiling")
    module.spoil = spoil
    monkeypatch.setitem(sys.modules, "spoiling", module)
    monkeypatch.setattr("inspect.getsource", lambda module: "spoil")
    make = dict(data_dir=toy.data_dir, seed=0, batch_size=16, host_threads=1)
    fields = toy.fields(standardize="spoiling:spoil")
    with make_train_stream({"toy": fields}, FULL, tokenizer, **make) as stream:
        with pytest.raises(
            DataError, match=rf"{path.name}: episode \d, step 1, 'front_rgb' \(primary\): not a decodable"
        ):
            for _ in range(10):
                next(stream)


def test_a_function_with_stateful_randomness_is_refused(toy, tokenizer, tmp_path, monkeypatch):
    import tensorflow as tf

    module = type(sys)("noisy")
    module.jitter = lambda t: {**t, "control": t["control"] + tf.random.normal([4])}
    monkeypatch.setitem(sys.modules, "noisy", module)
    monkeypatch.setattr("inspect.getsource", lambda module: "jitter")
    make = dict(data_dir=toy.data_dir, cache_dir=str(tmp_path), seed=0, batch_size=4, host_threads=1)
    specs = {"toy": toy.fields(standardize="noisy:jitter")}
    with pytest.raises(DataError, match="toy: standardize='noisy:jitter' uses RandomStandardNormal.*exact=False"):
        make_train_stream(specs, FULL, tokenizer, **make)
    with make_train_stream(specs, FULL, tokenizer, exact=False, **make) as stream:
        assert stream.order_spec["approximate"] == ["toy"]
