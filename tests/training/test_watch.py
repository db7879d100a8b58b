"""Finished steps, the NaN guard's reports, the watchdog, traces and workdirs elsewhere."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.training import exits, watch
from octo_like.training.watch import FinishedSteps, ProfileSteps, TooManyBadSteps, Watchdog
from octo_like.training.workdir import Workdir

NAMES = ("bridge", "kuka", "never")


def metrics(step: int, *, bad=(), backward=False, size=4):
    """As the training step gives them: dataset 0 in even rows, 1 in odd ones; rows in `bad` have no finite loss."""
    rng = np.random.default_rng(step)
    loss = rng.uniform(size=size).astype(np.float32)
    loss[list(bad)] = np.nan
    ids = np.arange(size) + size * (step - 1)
    finite = not bad and not backward
    return {
        "loss": jnp.asarray(loss.mean()),
        "grad_norm": jnp.float32(1.0 if finite else np.inf),
        "finite": jnp.asarray(finite),
        "samples": {
            "loss": jnp.asarray(loss),
            "count": jnp.asarray([3.0, 3.0, 0.0, 3.0][:size]),
            "dataset_id": jnp.arange(size) % 2,
            "sample_id": jnp.asarray(ids),
        },
    }


def test_steps_are_read_when_newer_ones_are_in_flight(tmp_path):
    seen = []
    finished = FinishedSteps(tmp_path, NAMES, lag=2, on_step=lambda step, _: seen.append(step))
    for step in range(1, 6):
        finished.add(step, metrics(step))
        assert seen == list(range(1, step - 1))
    finished.drain()
    assert seen == [1, 2, 3, 4, 5]


def test_loss_by_dataset_is_the_mean_over_the_interval(tmp_path):
    finished = FinishedSteps(tmp_path, NAMES, lag=0)
    rows = {"bridge": [], "kuka": []}
    for step in range(1, 6):
        one = metrics(step, bad=[1] if step == 3 else ())
        finished.add(step, one)
        for i in (0, 1, 3):  # row 2 has no entry that a head learns from
            if not (step == 3 and i == 1):
                rows[NAMES[i % 2]].append(float(one["samples"]["loss"][i]))
    got = finished.losses("loss/")
    assert set(got) == {"loss/bridge", "loss/kuka"}
    for name, values in rows.items():
        np.testing.assert_allclose(got[f"loss/{name}"], np.mean(values), rtol=1e-6)
    assert finished.losses() == {}


def test_bad_steps_in_a_row_stop_the_run_with_a_report(tmp_path):
    finished = FinishedSteps(tmp_path, NAMES, max_bad=3, lag=1)
    bad = {2: [1], 3: [0, 1], 5: [1], 6: [3], 7: [1]}
    with pytest.raises(TooManyBadSteps, match=r"3 steps in a row, up to step 7(?s:.*)bad_batches/7.json"):
        for step in range(1, 10):
            finished.add(step, metrics(step, bad=bad.get(step, ())))
    # The first of every row of bad steps, and the last one: 3 and 6 say nothing new.
    assert sorted(p.name for p in (tmp_path / "bad_batches").iterdir()) == ["2.json", "5.json", "7.json"]
    report = json.loads((tmp_path / "bad_batches" / "7.json").read_text())
    assert report["bad_samples"] == [{"sample_id": 25, "dataset": "kuka"}] and report["bad_in_a_row"] == 3
    assert report["not_finite"] == ["grad_norm", "loss"] and report["metrics"]["grad_norm"] == "inf"
    assert report["samples_by_dataset"] == {"bridge": 2, "kuka": 2} and report["sample_ids"] == [24, 25, 26, 27]


def test_a_bad_gradient_of_good_losses_counts_and_never_is_never(tmp_path):
    finished = FinishedSteps(tmp_path, NAMES, max_bad=None, lag=0)
    for step in range(1, 30):
        finished.add(step, metrics(step, backward=True))
    assert finished.bad_in_a_row == 29
    assert json.loads((tmp_path / "bad_batches" / "1.json").read_text())["bad_samples"] == []
    with pytest.raises(ValueError, match="max_bad_steps must be at least 1"):
        FinishedSteps(tmp_path, NAMES, max_bad=0)


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def a_function_that_hangs(condition):
    wait_for(condition)


def test_watchdog_dumps_stacks_once_for_a_stall(tmp_path, caplog):
    stacks = tmp_path / "stacks"
    with Watchdog(tmp_path, 0.2, patience=1.0, exit=False) as watchdog:
        watchdog.beat(7)
        a_function_that_hangs(lambda: stacks.exists() and list(stacks.iterdir()) and "after step 7" in caplog.text)
    (file,) = stacks.iterdir()
    assert "a_function_that_hangs" in file.read_text() and "after step 7" in file.read_text()


def test_watchdog_leaves_with_its_own_status(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(watch.os, "_exit", left.append)
    with Watchdog(tmp_path, 0.05, patience=1.0):
        wait_for(lambda: left)
    assert left[0] == exits.STALLED


def test_watchdog_is_patient_with_the_first_step_and_with_what_is_longer(tmp_path):
    now = [0.0]
    dog = Watchdog(tmp_path, 10.0, patience=4.0)
    dog_time = watch.time.monotonic
    watch.time.monotonic = lambda: now[0]
    try:
        dog.beat()
        assert dog._limit == 40.0
        dog.beat(1)
        assert dog._limit == 10.0
        with dog.longer():
            assert dog._limit == 40.0
            now[0] = 35.0
        assert dog._limit == 10.0 and dog._mark == 35.0
    finally:
        watch.time.monotonic = dog_time
    with Watchdog(tmp_path, None) as off:
        assert off._thread is None


def test_profile_of_chosen_steps(tmp_path):
    with ProfileSteps(tmp_path, "3:5") as profile:
        for step in range(1, 8):
            profile.before(step)
            assert profile._active == (step in (3, 4))
            profile.after(step, jnp.ones(3) * step)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert watch.parse_steps((100, 110)) == watch.parse_steps("100:110") == (100, 110)
    for wrong in ("5", "5:5", "0:3", "a:b", 7):
        with pytest.raises(ValueError, match="profile_steps"):
            watch.parse_steps(wrong)


def test_a_workdir_elsewhere_is_kept_up_to_date_and_continued(tmp_path, caplog):
    bucket, local = tmp_path / "bucket", tmp_path / "local"
    bucket.mkdir()
    (bucket / "metrics.jsonl").write_text("old\n")
    local.mkdir()
    with Workdir(bucket, local=local, continued=("metrics.jsonl", "absent"), interval=0.02) as workdir:
        assert (local / "metrics.jsonl").read_text() == "old\n" and not (local / "absent").exists()
        with open(local / "metrics.jsonl", "a") as file:
            file.write("new\n")
        (local / "stacks").mkdir()
        (local / "stacks" / "1.txt").write_text("x")
        wait_for(lambda: (bucket / "stacks" / "1.txt").exists())
        (local / "last").write_text("y")
    assert (bucket / "metrics.jsonl").read_text() == "old\nnew\n" and (bucket / "last").read_text() == "y"
    # What cannot be copied is said, and does not end the run.
    blocked = Workdir(bucket, local=local)
    (local / "last").write_text("z")
    (bucket / "last").unlink()
    (bucket / "last").mkdir()
    blocked.sync()
    assert "could not be copied" in caplog.text and workdir.path == bucket.absolute()


def test_logs_that_cannot_be_fetched_are_left_as_they_are(tmp_path, caplog):
    bucket, local = tmp_path / "bucket", tmp_path / "local"
    (bucket / "metrics.jsonl").mkdir(parents=True)  # reading it fails
    local.mkdir()
    with Workdir(bucket, local=local, continued=("metrics.jsonl",)) as workdir:
        (local / "metrics.jsonl").write_text("new\n")
    assert "could not be fetched" in caplog.text and (bucket / "metrics.jsonl").is_dir()
    (copy,) = bucket.glob("metrics-*.jsonl")
    assert copy.read_text() == "new\n" and workdir.path == bucket.absolute()


def test_a_full_disk_does_not_stop_the_watchdog(tmp_path, capfd):
    (tmp_path / "stacks").write_text("in the way")
    left = []
    with Watchdog(tmp_path, 0.05, patience=1.0, leave=lambda *reason: left.append(reason)):
        wait_for(lambda: left)
    assert left[0][0] == exits.STALLED and "no step finished" in left[0][1]
    assert "wait_for" in capfd.readouterr().err


def test_a_note_that_cannot_be_left_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(exits.PROGRESS_VARIABLE, str(tmp_path / "absent" / "progress.json"))
    watch.report_progress(0, None)
    assert "note to the supervisor could not be written" in caplog.text


def test_a_workdir_here_is_itself(tmp_path):
    with Workdir(tmp_path / "run") as workdir:
        assert workdir.local == tmp_path / "run" and not workdir.is_copied
