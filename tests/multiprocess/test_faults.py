"""What a run survives, with train.py as it is: signals, kills, other topologies, bad batches, stalls."""

import json
import random
import signal
import sys
import time

import numpy as np
import pytest

from octo_like.training import exits
from octo_like.training.checkpoint import Checkpointer
from tests.data.conftest import build, make_episodes
from tests.multiprocess.launch import Launch, assert_same_state, batches, diary, losses, state

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(1800)]
# Even the small arrays of this model are split over the devices.
SHARDED = ("--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.mesh.min_size=64")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def two_by_four(cache, tmp_path_factory):
    """An uninterrupted run of 20 steps in two processes of four devices."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    Launch(workdir, "--config.num_steps=20", *SHARDED, cache=cache, processes=2, devices=4).wait(0)
    return workdir


def test_two_processes_train_as_one(two_by_four, cache, tmp_path):
    """2 x 4 devices and 1 x 8: the same samples, the same losses over 20 steps."""
    Launch(tmp_path / "one", "--config.num_steps=20", *SHARDED, cache=cache, devices=8).wait(0)
    assert len(losses(two_by_four)) == 20
    np.testing.assert_allclose(losses(two_by_four), losses(tmp_path / "one"), rtol=1e-5)
    left, right, whole = batches(two_by_four, 0), batches(two_by_four, 1), batches(tmp_path / "one")
    assert all(left[step]["ids"] + right[step]["ids"] == whole[step]["ids"] for step in range(1, 21))


def test_sigterm_to_one_process_stops_all_and_resume_is_bitwise(two_by_four, cache, tmp_path):
    workdir = tmp_path / "parts"
    flags = ("--config.num_steps=20", "--config.checkpoint.every=None", *SHARDED)
    first = Launch(workdir, *flags, cache=cache, processes=2, devices=4)
    assert first.until(lambda: len(diary(workdir, 1)) >= 5)
    first.signal(signal.SIGTERM, process=1)
    first.wait(exits.PREEMPTED)
    stopped = first.stopped_at()
    assert stopped[0] == stopped[1] < 20
    assert Checkpointer(workdir, read_only=True).all_steps() == [stopped[0]]
    second = Launch(workdir, *flags, cache=cache, processes=2, devices=4).wait(0)
    assert second.resumed_from() == stopped[0]
    assert_same_state(workdir, two_by_four)
    for process in (0, 1):
        assert batches(workdir, process) == batches(two_by_four, process)
    np.testing.assert_array_equal(losses(workdir), losses(two_by_four))


def test_bad_batches_are_skipped_and_many_in_a_row_stop_the_run(cache, tmp_path):
    flags = ("--config.num_steps=12", "--config.max_bad_steps=3", "--config.checkpoint.every=2")
    single = Launch(tmp_path / "single", *flags, cache=cache, fault="nan:3,6,7").wait(0)
    assert "was not finite and changed nothing" in single.log()
    arrays, _ = state(tmp_path / "single")
    assert arrays["step"] == 12 and arrays["skipped"] == 3
    assert sorted(p.name for p in (tmp_path / "single" / "bad_batches").iterdir()) == ["3.json", "6.json"]

    workdir = tmp_path / "many"
    many = Launch(workdir, *flags, cache=cache, fault="nan:5,6,7,8,9,10").wait(exits.NOT_FINITE)
    assert "3 steps in a row, up to step 7" in many.log() and "Traceback" not in many.log()
    report = json.loads((workdir / "bad_batches" / "7.json").read_text())
    assert report["bad_samples"] == [{"sample_id": 6 * 16 + 1, "dataset": "synthetic"}]
    assert report["sample_ids"] == list(range(96, 112)) and report["bad_in_a_row"] == 3
    assert "loss" in report["not_finite"] and report["samples_by_dataset"] == {"synthetic": 16}
    reader = Checkpointer(workdir, read_only=True)
    saved = reader.all_steps()
    for step in saved:
        assert reader.verify(step) == []
        assert all(np.isfinite(x).all() for x in state(workdir, step)[0].values() if x.dtype.kind == "f")
    # The same command meets the same batches; with the fault gone, the run goes on from what is saved.
    again = Launch(workdir, *flags, cache=cache).wait(0)
    assert again.resumed_from() == saved[-1]


def test_a_stalled_run_dumps_its_stacks_and_leaves(cache, tmp_path):
    flags = ("--config.num_steps=12", "--config.watchdog.minutes=0.25", "--config.checkpoint.every=2")
    # The first step may take four times as long: with a warm cache, a busy machine can do it.
    Launch(tmp_path / "warm", "--config.num_steps=2", cache=cache).wait(0)
    stalled = Launch(tmp_path / "run", *flags, cache=cache, fault="hang:9").wait(exits.STALLED)
    (stacks,) = (tmp_path / "run" / "stacks").iterdir()
    assert "diary_train.py" in stacks.read_text() and "Thread" in stacks.read_text()
    assert "no step finished" in stalled.log()
    again = Launch(tmp_path / "run", *flags, "--config.watchdog.minutes=0", cache=cache).wait(0)
    assert again.resumed_from() == 8


# ------------------------------------------------------------------------------------------------- make test-faults


@pytest.mark.slow
def test_killed_at_random_moments_ends_with_the_same_parameters(cache, tmp_path):
    """24 kills, a third of them aimed inside a save: every attempt goes on from the newest complete step."""
    flags = ("--config.num_steps=200", "--config.checkpoint.every=2", "--config.data.prefetch=1")
    Launch(tmp_path / "whole", *flags, cache=cache).wait(0)
    workdir, draw, moments = tmp_path / "killed", random.Random(0), []
    folder = workdir / "checkpoints"

    def complete():
        return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=None)

    def unfinished():
        return any("orbax-checkpoint-tmp" in p.name for p in folder.glob("*")) if folder.exists() else False

    while True:
        before, seen = complete(), len(diary(workdir))
        run = Launch(workdir, *flags, cache=cache)
        if len(moments) == 24:
            run.wait(0)
            break
        # What a killed save left is swept up by the next one: wait for a step before looking for a save.
        steps, inside = draw.randint(1, 5), len(moments) % 3 == 0
        alive = run.until(lambda n=seen + steps: len(diary(workdir)) >= n)
        if alive and inside:
            alive = run.until(lambda last=before: complete() != last and unfinished())
            time.sleep(draw.uniform(0, 0.02))
        elif alive:
            time.sleep(draw.uniform(0, 0.1))
        in_save, now = inside and unfinished(), complete()
        run.signal(signal.SIGKILL)
        run.wait()
        assert run.resumed_from() == before, run.log()[-3000:]
        moments.append({"status": run.children[0].returncode, "newest": now, "in_save": in_save})
        assert run.children[0].returncode == -signal.SIGKILL, run.log()[-3000:]
    print(json.dumps(moments))
    assert sum(moment["in_save"] for moment in moments) >= 3
    assert_same_state(workdir, tmp_path / "whole")
    assert batches(workdir) == batches(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "first,second",
    [((1, 8), (1, 4)), ((2, 4), (1, 4)), ((1, 4), (2, 4))],
    ids=["8-4-8 devices", "2-1-2 processes", "1-2-1 processes"],
)
def test_other_topologies_go_on_with_the_same_samples(cache, tmp_path, first, second):
    """Real records, three parts of eight steps: the samples of an uninterrupted run, its losses to rounding."""
    build(tmp_path / "data", "toy_buttons", {"train": make_episodes(20)}, num_shards=2)
    flags = (f"--config.data.data_dir={tmp_path / 'data'}", "--config.checkpoint.every=None")

    def part(workdir, topology, steps):
        processes, devices = topology
        mesh = ("--config.mesh.data=2", f"--config.mesh.fsdp={processes * devices // 2}")
        some = dict(cache=cache, processes=processes, devices=devices, words="")
        return Launch(workdir, *flags, *mesh, f"--config.num_steps={steps}", **some).wait(0)

    part(tmp_path / "whole", first, 24)
    part(tmp_path / "parts", first, 8)
    assert part(tmp_path / "parts", second, 16).resumed_from() == 8
    assert part(tmp_path / "parts", first, 24).resumed_from() == 16
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-4)
    np.testing.assert_allclose(losses(tmp_path / "parts")[:8], losses(tmp_path / "whole")[:8], rtol=0)
    # Of two processes each writes its own rows; of one, all of them. Rows 0 and B/2 identify the batch either way.
    whole, parts = batches(tmp_path / "whole"), batches(tmp_path / "parts")
    for step in range(1, 25):
        shared = min(len(whole[step]["ids"]), len(parts[step]["ids"]))
        assert (
            whole[step]["ids"][:shared]
            == parts[step]["ids"][:shared]
            == list(range(16 * (step - 1), 16 * step))[:shared]
        )
        if len(whole[step]["ids"]) == len(parts[step]["ids"]):
            assert whole[step]["sha"] == parts[step]["sha"]


@pytest.mark.slow
def test_one_of_two_processes_killed(two_by_four, cache, tmp_path):
    """Each under its supervisor: the survivor notices, both start again, and the end is the same bit by bit."""
    workdir = tmp_path / "run"
    flags = ("--config.num_steps=20", "--config.checkpoint.every=2", *SHARDED)
    attempts = tmp_path / "attempts.jsonl"
    wrapper = (sys.executable, "scripts/supervise.py", "--backoff=1", "--max_crashes=20", f"--log={attempts}", "--")
    run = Launch(workdir, *flags, cache=cache, processes=2, devices=4, wrapper=wrapper)
    assert run.until(lambda: len(diary(workdir, 1)) >= 7)
    run.kill_child(process=1)
    run.wait(0, timeout=600)
    statuses = [json.loads(line)["status"] for line in attempts.read_text().splitlines()]
    assert -signal.SIGKILL in statuses and statuses.count(0) == 2 and len(statuses) >= 4
    assert "resumed from step" in run.log()
    assert_same_state(workdir, two_by_four)
    np.testing.assert_array_equal(losses(workdir), losses(two_by_four))
