"""Episodes to mix that follow from memory, what is frozen at the first start, and memory that really is bounded."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from octo_like.common.config import ConfigError
from octo_like.common.schema import BatchSpec, flatten
from octo_like.data import bench
from octo_like.data.batches import memory
from octo_like.data.batches.episodes import EpisodeSet, EpisodeStore
from octo_like.data.batches.texts import Texts
from octo_like.data.inputs import Inputs
from octo_like.data.order.order import DatasetFrames, Order
from octo_like.data.prepare import prepare_datasets
from octo_like.data.spec import DataError, specs_from_config
from tests.data.streams import make_train_stream

SPEC = BatchSpec(1, 2, 6, {"primary": (40, 52)}, proprio_dim=4)


@pytest.fixture(scope="module")
def datasets(toy, wide_toy, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    fields = dict(image_keys={"primary": "front_rgb"}, val_fraction=0)
    a = prepare_datasets(specs_from_config({"toy": toy.fields(**fields)}), toy.data_dir, cache, progress=False)
    wide = {"wide": wide_toy.fields(**fields, weight=3.0)}
    return a | prepare_datasets(specs_from_config(wide), wide_toy.data_dir, cache, progress=False)


def sizes(datasets):
    """Bytes of an episode: its frames of the one camera in use, 900 for each of them, and 4 for each number."""
    return {k: np.mean(each_size(d)) for k, d in datasets.items()}


def each_size(d):
    widths = 4.0 * (d.function.action_dim + (d.function.proprio_dim or 0) + 1)
    return d.train.picture_bytes[:, d.train.pictures.index("front_rgb")] + (900.0 + widths) * d.train.steps


def stream_of(datasets, spec=SPEC, **options):
    return make_train_stream(datasets, spec, None, **(dict(seed=1, batch_size=8, host_threads=1) | options))


def mixed_of(stream):
    return {data.name: data.episodes_mixed for data in stream.order.datasets}


def test_only_the_cameras_in_use_are_counted(toy, tmp_path):
    """Bytes from the index are those of the episodes in memory: of one camera, of two, of depth as well as of none."""
    fields = toy.fields(val_fraction=0)
    data = prepare_datasets(specs_from_config({"toy": fields}), toy.data_dir, str(tmp_path), progress=False)["toy"]
    slots = [slot for slot, key in fields["image_keys"].items() if key is not None]
    assert len(slots) == 2
    got = {}
    for chosen in ((), slots[:1], slots[1:], slots):
        episodes = EpisodeSet(data, data.train, Texts(None), chosen)
        store = EpisodeStore([episodes], ThreadPoolExecutor(1), 1 << 30)
        loaded = store.get([(0, e) for e in range(len(data.train))])
        got[tuple(chosen)] = memory.each_bytes(data, data.train, chosen)
        np.testing.assert_array_equal(got[tuple(chosen)], [episode.nbytes for episode in loaded])
    assert got[tuple(slots[:1])].sum() < 0.8 * got[tuple(slots)].sum()
    both, one = (memory.track_bytes(data, chosen) for chosen in (slots, slots[:1]))
    knob = 8.001 * both / memory.PLANNED / 2**30
    assert memory.plan_mixed({"toy": data}, {"toy": 1.0}, host_memory_gb=knob, slots=slots)["toy"] == 8
    assert memory.plan_mixed({"toy": data}, {"toy": 1.0}, host_memory_gb=knob, slots=slots[:1])["toy"] == int(
        8.001 * both / one
    )


def test_plenty_of_memory_mixes_all_episodes(datasets):
    with stream_of(datasets) as stream:
        assert mixed_of(stream) == {"toy": 23, "wide": 9}
        assert len(stream.order.live(5)) == 32
        assert stream.order_spec["memory"] == {"host_memory_gb": 4.0}
        assert [data["visits"] for data in stream.order_spec["order"]["datasets"]] == [1, 1]


def track_sizes(datasets):
    """Bytes that a walk holds per track, by hand: the share of time that an episode is live times its bytes."""
    result = {}
    for key, d in datasets.items():
        u = np.minimum(d.train.frames / np.mean(d.train.frames), 2)
        result[key] = np.mean(u * (1 - u / 4) * each_size(d))
    return result


def test_episodes_fill_the_budget_by_weight(datasets):
    bytes_of, tracks_of = sizes(datasets), track_sizes(datasets)
    weights = {"toy": 3.0, "wide": 1.0}
    budget = 4 * sum(bytes_of.values())  # for episodes
    knob = budget / memory.PLANNED
    mixed = memory.plan_mixed(datasets, weights, host_memory_gb=knob / 2**30, slots=["primary"])
    # A share of the budget in the ratio of the weights, but never less than two episodes.
    share = max(budget / 4, 2 * bytes_of["wide"])
    assert mixed["wide"] == int(share / tracks_of["wide"])
    assert mixed["toy"] == int(np.floor((budget - share) / tracks_of["toy"] + 1e-9))
    need = memory.expected_bytes(datasets, weights, mixed, slots=["primary"])
    assert need <= budget
    assert need == pytest.approx(sum(mixed[k] * tracks_of[k] for k in mixed), rel=1e-9)
    assert memory.expected_bytes(
        datasets, weights, mixed, {"toy": 0.5, "wide": 1.0}, slots=["primary"]
    ) == pytest.approx(mixed["toy"] * tracks_of["toy"] / 2 + mixed["wide"] * tracks_of["wide"], rel=1e-9)
    # More memory never mixes fewer.
    grown = [
        memory.plan_mixed(datasets, weights, host_memory_gb=k * knob / 2**30, slots=["primary"])
        for k in (1, 1.5, 2, 4, 100)
    ]
    assert all(a[k] <= b[k] for a, b in zip(grown, grown[1:], strict=False) for k in a)
    assert grown[-1] == {"toy": 23, "wide": 9}


@pytest.mark.parametrize("visits", [1, 4])
def test_planned_bytes_are_what_the_walks_hold(datasets, visits):
    """Episodes of very different lengths, longer ones with more bytes: planned bytes against those of live episodes."""
    steps = np.random.default_rng(0).geometric(0.02, 500) + 4
    one = datasets["toy"]
    index = one.train.take(np.zeros(500, np.int64))
    pictures = np.repeat(1000 * steps[:, None], len(index.pictures), axis=1)
    index = dataclasses.replace(index, steps=steps, frames=steps, picture_bytes=pictures)
    data = {"toy": dataclasses.replace(one, train=index)}
    mixed = {"toy": 60}
    want = memory.expected_bytes(data, {"toy": 1.0}, mixed, slots=["primary"])
    order = Order([DatasetFrames("toy", 1.0, steps, "", 60, None, visits)], seed=0, batch_size=10)
    size = 1900 + 4 * (one.function.action_dim + (one.function.proprio_dim or 0) + 1)
    held = [sum(size * steps[e] for _, e in order.live(batch)) for batch in range(0, 20000, 199)]
    assert want == pytest.approx(np.mean(held), rel=0.08)


def buffer_and_order(order, start):
    held = bench.frames_held(order, start)
    return bench.distinct_in_order(order, start=start), bench.distinct_in_buffer(order, held, start=start)


@pytest.mark.parametrize("mixed", [80, 250, 500, 1200])
def test_visits_make_up_for_little_memory(datasets, mixed):
    """With as many frames as the walk holds, the order is mixed as well as by a shuffle buffer: 0.9 and more."""
    steps = np.random.default_rng(1).integers(20, 61, 4000)
    index = dataclasses.replace(datasets["toy"].train.take(np.zeros(4000, np.int64)), steps=steps, frames=steps)
    data = {"toy": dataclasses.replace(datasets["toy"], train=index)}
    visits = memory.plan_visits(data, {"toy": 1.0}, {"toy": mixed}, max_visits=16)["toy"]
    order = Order([DatasetFrames("toy", 1.0, steps, "", mixed, None, visits)], seed=0, batch_size=10)
    distinct, buffered = buffer_and_order(order, 60_000)
    assert distinct > 0.9 * buffered
    if visits > 1:  # and no more visits than that takes
        fewer = Order([DatasetFrames("toy", 1.0, steps, "", mixed, None, visits - 2)], seed=0, batch_size=10)
        distinct, buffered = buffer_and_order(fewer, 60_000)
        assert distinct < 0.97 * buffered
    assert (visits > 1) == (mixed < 1200)
    assert memory.plan_visits(data, {"toy": 1.0}, {"toy": 4000}, max_visits=16) == {"toy": 1}  # all are held


def test_a_budget_that_holds_nothing_is_refused(datasets):
    with pytest.raises(
        DataError, match=r"host_memory_gb=1e-06 is too small: two episodes.*60% of it.*at least 0\.\d+"
    ) as error:
        stream_of(datasets, host_memory_gb=1e-6)
    enough = float(str(error.value).split("at least ")[1])
    stream_of(datasets, host_memory_gb=enough).close()


def test_batches_that_leave_no_room_are_refused(datasets):
    with pytest.raises(
        DataError, match=r"too small for 1 process\(es\).*batches 0.\d+ GB.*use more processes"
    ) as error:
        stream_of(datasets, batch_size=2048, host_memory_gb=0.01)
    enough = float(str(error.value).split("about ")[1])
    stream_of(datasets, batch_size=2048, host_memory_gb=enough).close()
    stream_of(datasets, batch_size=2048, host_memory_gb=0.01, process_count=32).close()


def test_given_blocks_win(datasets):
    with stream_of(datasets, episodes_mixed=3, host_memory_gb=1e-6) as stream:
        assert mixed_of(stream) == {"toy": 3, "wide": 3} and stream.order_spec["memory"] is None
        assert "read again and again" in stream.memory_line()
    with stream_of(datasets, episodes_mixed={"toy": 3, "wide": 4}) as stream:
        assert mixed_of(stream) == {"toy": 3, "wide": 4}
    with pytest.raises(DataError, match="episodes_mixed: 'wide' is not in both.*toy, wide"):
        stream_of(datasets, episodes_mixed={"toy": 3})


def test_more_than_the_machine_has_is_refused(datasets, monkeypatch):
    with stream_of(datasets) as stream:
        line = stream.memory_line()
        assert line.startswith("expected memory") and "of encoded episodes" in line and "again and again" not in line
        monkeypatch.setattr(memory, "machine_bytes", lambda: 10 << 20)
        with pytest.raises(DataError, match="the machine has 0.01. Lower host_memory_gb"):
            stream.memory_line()
    assert memory.resident_bytes() > 50 << 20


# ---------------------------------------------------------------- what the first start freezes


def knob_for(datasets, episodes):
    """The knob that holds this many episodes of each dataset."""
    return episodes * sum(track_sizes(datasets).values()) / memory.PLANNED / 2**30


def test_any_number_of_processes_begins_and_continues_the_same_run(datasets):
    """Lanes and episodes mixed follow from the batch size and the memory of one process: 1, 3, 12 or 48 of them."""
    small = BatchSpec(1, 2, 6, {"primary": (8, 8)}, proprio_dim=4)  # batches beside which little fits
    options = dict(spec=small, batch_size=48, host_memory_gb=knob_for(datasets, 12))
    with stream_of(datasets, **options) as first:
        saved = json.loads(json.dumps(first.order_spec))
        assert first.order.num_lanes == 48 and mixed_of(first)["toy"] < 23
        want = [dict(flatten(next(first))) for _ in range(3)]
        alone = first._plan.stored_bytes(first.order)
    for count in (1, 3, 12, 48):
        parts = []
        for index in range(count):
            with stream_of(datasets, process_index=index, process_count=count, **options) as stream:
                assert stream.order_spec == saved  # as begun by any other number
                assert stream._plan.stored_bytes(stream.order) <= alone  # whoever begins, all others fit
                Inputs(stream, {}, {}, {}).resume(saved, 48)
                assert stream.position == 48
                parts.append([dict(flatten(next(stream))) for _ in range(2)])
        for number in range(2):
            for key, value in want[number + 1].items():
                np.testing.assert_array_equal(np.concatenate([part[number][key] for part in parts]), value)


def test_a_run_keeps_the_lanes_and_episodes_that_it_began_with(datasets):
    """Where they were derived by another rule, or the lanes were given at the first start only."""
    knob = dict(host_memory_gb=knob_for(datasets, 12), spec=BatchSpec(1, 2, 6, {"primary": (8, 8)}, proprio_dim=4))
    with stream_of(datasets, num_lanes=2, **knob) as first:
        saved = json.loads(json.dumps(first.order_spec))
    saved["order"]["datasets"][0]["episodes_mixed"] -= 2
    with stream_of(datasets, **knob) as second:
        assert second.order.num_lanes == 8
        Inputs(second, {}, {}, {}).resume(saved, 8)
        assert second.order_spec == saved
        next(second)


def test_a_run_of_an_earlier_order_is_refused_by_name(datasets):
    with stream_of(datasets) as stream:
        saved = json.loads(json.dumps(stream.order_spec))
        saved["order"]["version"] = 2
        with pytest.raises(DataError, match="order version 2, this code makes version 3.*init_from"):
            Inputs(stream, {}, {}, {}).resume(saved, 8)


@pytest.mark.parametrize(
    "options,line",
    [
        (dict(seed=2), "order.seed: 1 -> 2"),
        (dict(host_memory_gb=3.0), "memory.host_memory_gb: 4.0 -> 3.0"),
        (dict(balance_weights=True), "order.datasets.toy.weight"),
        (dict(num_lanes=2), "order.num_lanes: 8 -> 2"),
        (dict(episodes_mixed=2), "memory: "),
        (dict(drop_task_prob=0.5), "task.drop_task_prob: 0.0 -> 0.5"),
        (dict(image_dropout_prob=0.5), "task.image_dropout_prob: 0.0 -> 0.5"),
    ],
)
def test_a_resume_with_other_settings_is_refused_with_a_diff(datasets, options, line):
    with stream_of(datasets) as first, stream_of(datasets, **options) as second:
        with pytest.raises(ConfigError, match=f"(?s)use a new --workdir.*{line}"):
            Inputs(second, {}, {}, {}).resume(first.order_spec, 8)


def test_a_resume_with_other_data_is_refused_with_a_diff(datasets, toy, tmp_path):
    with stream_of(datasets) as first:
        saved = first.order_spec
    heavier = dataclasses.replace(datasets["toy"], spec=dataclasses.replace(datasets["toy"].spec, weight=2.0))
    fields = toy.fields(image_keys={"primary": "front_rgb"}, val_fraction=0, frame_slice=(0, None, 2))
    filtered = prepare_datasets(specs_from_config({"toy": fields}), toy.data_dir, str(tmp_path), progress=False)
    fewer = dataclasses.replace(datasets["toy"], train=datasets["toy"].train.take(np.arange(9)))
    for change, line in (
        ({"toy": heavier}, "datasets.toy.weight: 0.25 -> 0.4"),
        (filtered, "datasets.toy.index_hash"),
        ({"toy": fewer}, "datasets.toy.episodes: 23 -> 9"),
        ({"more": heavier}, "datasets.more: added"),
    ):
        with stream_of(datasets | change) as stream:
            with pytest.raises(ConfigError, match=f"(?s)use a new --workdir.*{line}"):
                Inputs(stream, {}, {}, {}).resume(saved, 8)


def test_balanced_weights_count_frames(datasets):
    with stream_of(datasets, balance_weights=True) as stream:
        frames = [int(d.train.frames.sum()) for d in datasets.values()]
        want = np.array([1.0, 3.0]) * frames
        np.testing.assert_allclose(stream.order.mixture.given, want / want.sum(), rtol=1e-12)


# ---------------------------------------------------------------- resident memory

BOUNDED = """
import json, sys
import numpy as np
from octo_like.common.schema import BatchSpec
from octo_like.data.batches import memory
from octo_like.data.prepare import prepare_datasets
from octo_like.data.spec import specs_from_config
from tests.data.streams import make_train_stream

data_dir, cache, fields, count, knob = json.loads(sys.argv[1])
one = prepare_datasets(specs_from_config({"one": fields}), data_dir, cache, progress=False)["one"]
datasets = {f"d{i}": one for i in range(count)}
spec = BatchSpec(1, 2, 4, {"primary": (16, 16)})
options = dict(seed=1, batch_size=16, host_threads=1, prefetch=1, decode="fast")
with make_train_stream(datasets, spec, None, host_memory_gb=1e3, episodes_mixed=1, **options) as stream:
    next(stream)  # TensorFlow has loaded what it loads
base = memory.resident_bytes()
with make_train_stream(datasets, spec, None, host_memory_gb=knob, **options) as stream:
    whole = memory.expected_bytes(
        datasets, dict.fromkeys(datasets, 1.0), dict.fromkeys(datasets, 10**6), slots=["primary"]
    )
    peak, stored = 0, 0
    for number in range(30):
        stream.seek(16 * 37 * number)  # into other blocks each time: the worst case
        next(stream)
        peak = max(peak, memory.resident_bytes())
        stored = max(stored, stream._reader.store.nbytes)
print(json.dumps({"base": base, "peak": peak, "stored": stored, "whole": whole}))
"""


@pytest.mark.slow
def test_resident_memory_is_bounded_with_many_datasets(make_toy, tmp_path, repository):
    """25 datasets of 5 MB each, and memory for a third of them."""
    rng = np.random.default_rng(0)
    steps = dict(is_first=False, is_last=False, is_terminal=False, task_text="go")
    noise = rng.integers(0, 256, (8, 150, 150, 3), np.uint8)  # noise does not compress: 67 KB a frame

    def episode(number):
        observation = dict(hand_rgb=np.zeros((24, 24, 3), np.uint8), joints=np.zeros(3, np.float32), aperture=0.5)
        control = np.full(4, number, np.float32)
        return [
            {"observation": observation | {"front_rgb": noise[(number + t) % 8]}, "control": control + t} | steps
            for t in range(4)
        ]

    toy = make_toy(tmp_path, "toy_noise", [episode(number) for number in range(20)])
    fields = toy.fields(image_keys={"primary": "front_rgb"}, proprio_keys=(), val_fraction=0)
    knob = 50 / 1024
    arguments = json.dumps([toy.data_dir, str(tmp_path / "cache"), fields, 25, knob])
    done = subprocess.run([sys.executable, "-c", BOUNDED, arguments], cwd=repository, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr.decode()
    got = json.loads(done.stdout)
    assert got["whole"] > 100 << 20  # without a bound there would be this much
    assert got["stored"] <= 60 << 20  # the limit, and the episodes of one batch
    # Measured 41 to 47 MB of 52: the episodes are within the knob, the rest is a batch and what malloc keeps.
    assert got["peak"] <= got["base"] + 1.15 * knob * 2**30 + (4 << 20), got
