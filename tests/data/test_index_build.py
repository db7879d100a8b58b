"""Building an index: several files at a time, after a kill, once for several processes, on the command line."""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from octo_like.data import arguments
from octo_like.data import prepare as index_module
from octo_like.data.check import report
from octo_like.data.prepare import prepare_dataset
from octo_like.data.rlds import cache, lock, records, scan, stall
from octo_like.data.rlds.cache import cache_folder, load_index
from octo_like.data.rlds.records import EpisodeFunction
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import DataError, DatasetSpec


def opened(toy, **changes):
    spec = DatasetSpec.from_dict(toy.fields(**changes))
    split = records.open_split(spec.name, toy.data_dir, spec.version, spec.split)
    return split, EpisodeFunction(spec, split.features)


def files_of(folder):
    """{name: content} of a finished index (an .npz as arrays)."""
    found = {}
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                found |= {f"{path.name}/{key}": arrays[key].tobytes() for key in arrays.files}
        else:
            found[path.name] = path.read_bytes()
    return found


def test_any_number_of_workers_builds_the_same(toy, tmp_path):
    split, function = opened(toy)
    built = []
    for workers in (1, 3):
        whole = load_index(split, function, str(tmp_path / str(workers)), progress=False, workers=workers)
        built.append(files_of(whole.folder))
        assert whole.index.first.tolist() == np.concatenate([[0], np.cumsum(whole.index.steps)[:-1]]).tolist()
    assert built[0] == built[1] and set(built[0]) > {"rows.npy"}
    rows = np.load(tmp_path / "3" / "toy_buttons" / "1.0.0" / pathlib.Path(whole.folder).name / "rows.npy")
    want = [
        np.concatenate([s["control"], s["observation"]["joints"], [s["observation"]["aperture"]]]).astype(np.float32)
        for episode in toy.episodes
        for s in episode
    ]
    np.testing.assert_array_equal(rows, np.stack(want))


KILLED = """
import os, signal, sys, json
from octo_like.data.rlds import cache
from octo_like.data.prepare import prepare_dataset
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import DatasetSpec

scan_file, done = cache.scan_file, []

def scan_two_files(*args):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(args)
    return scan_file(*args)

cache.scan_file = scan_two_files
fields, data_dir, folder = json.loads(sys.argv[1])
prepare_dataset("toy", DatasetSpec.from_dict(fields), data_dir, folder, progress=False, options=IndexOptions(workers=1))
"""


def test_a_killed_pass_goes_on(toy, tmp_path, monkeypatch, repository):
    arguments = json.dumps([toy.fields(), toy.data_dir, str(tmp_path)])
    killed = subprocess.run([sys.executable, "-c", KILLED, arguments], cwd=repository, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert sorted(path.name for path in tmp_path.rglob("parts/*")) == ["00000.npz", "00001.npz"]
    assert len(list(tmp_path.rglob("*.lock"))) == 1  # the dead process left it; nobody waits for it
    read = []

    def counted(split, number, *rest):
        read.append(number)
        return scan.scan_file(split, number, *rest)

    monkeypatch.setattr(cache, "scan_file", counted)
    spec = DatasetSpec.from_dict(toy.fields())
    prepared = prepare_dataset("toy", spec, toy.data_dir, str(tmp_path), False, IndexOptions(workers=2))
    assert read == [2]
    assert not list(tmp_path.rglob("parts")) and not list(tmp_path.rglob("*.lock"))
    fresh = prepare_dataset("toy", spec, toy.data_dir, str(tmp_path / "fresh"), progress=False)
    assert prepared.train.hash == fresh.train.hash
    for key, value in fresh.statistics["action"].items():
        np.testing.assert_array_equal(prepared.statistics["action"][key], value)


def test_a_file_that_does_not_answer_is_named(toy, copied, tmp_path, monkeypatch, caplog):
    """A FIFO in place of a file: opening it waits until somebody writes, as a hung mount does."""
    monkeypatch.setattr(stall, "STALL_SECONDS", 0.5)
    split, function = opened(copied)
    path = pathlib.Path(split.files[1])
    kept = path.rename(tmp_path / "kept")
    os.mkfifo(path)
    options = dict(progress=False, workers=3, max_bad_fraction=1.0)
    load = threading.Thread(target=load_index, args=(split, function, str(tmp_path)), kwargs=options, daemon=True)
    load.start()

    def complaints():
        lines = [record.getMessage() for record in caplog.records if "nothing is being read from" in record.message]
        return [line for line in lines if path.name in line]

    start = time.monotonic()
    while len(complaints()) < 3 and time.monotonic() - start < 60:
        time.sleep(0.05)
    # The storage answers again. What was opened is still the FIFO, which cannot be read at an offset: damage.
    fifo = path.rename(tmp_path / "fifo")
    kept.rename(path)
    os.close(os.open(fifo, os.O_WRONLY))
    load.join(60)
    assert not load.is_alive()
    waits = [int(line.partition(f"{path} (")[2].split()[0]) for line in complaints()]
    assert "index of toy_buttons train" in complaints()[0]
    assert len(waits) >= 3 and waits[1] >= 1 and waits[2] >= 2  # after 0.5, 1 and 2 seconds, or later on a busy machine


def test_only_files_that_stand_still_are_named(monkeypatch, caplog):
    """On a clock of the test's own: one file gives a record every 0.09 s, the other none; 0.1 s are patience."""
    clock, looks = [0.0], [0]

    def monotonic():
        looks[0] += threading.current_thread().name == "octo_like-stall"
        return clock[0]

    monkeypatch.setattr(stall, "time", types.SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(stall, "STALL_SECONDS", 0.1)
    with stall.StallWatch("index of toy") as watch, watch.reading("stuck"), watch.reading("moving") as moved:
        for _ in range(20):
            moved()
            clock[0] += 0.09
            before = looks[0]
            while looks[0] < before + 2:  # the watch has looked at this time
                time.sleep(0.001)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5  # after 0.1, 0.2, 0.4, 0.8 and 1.6 s
    assert all("nothing is being read from stuck (" in line and "moving" not in line for line in lines)


# ---------------------------------------------------------------- one builder


def test_one_builds_and_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PULSE_SECONDS", 0.05)
    target, builders, started = tmp_path / "index.npz", [], threading.Event()

    def build(number):
        def write():
            builders.append(number)
            started.set()
            while len(waiting) < 3:  # until the others have looked
                time.sleep(0.01)
            target.write_text("done")

        return write

    waiting = []
    look = lock._look
    monkeypatch.setattr(lock, "_look", lambda path: waiting.append(path) or look(path))
    threads = [
        threading.Thread(target=lock.build_once, args=(str(target), build(i)), kwargs=dict(what="it")) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(builders) == 1 and not (tmp_path / "index.npz.lock").exists()


SEVERAL = """
import json, os, signal, sys, time
from octo_like.data.rlds import cache
from octo_like.data.prepare import prepare_dataset
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import DatasetSpec

fields, data_dir, folder, go, log, index, dies = json.loads(sys.argv[1])
scan_file = cache.scan_file

def noted(split, number, *rest):
    first = number not in [int(line.split()[1]) for line in open(log)]
    with open(log, "a") as file:
        file.write(f"{index} {number}\\n")
    if dies and number == 2 and first:
        os.kill(os.getpid(), signal.SIGKILL)
    return scan_file(split, number, *rest)

cache.scan_file = noted
print("ready", flush=True)
while not os.path.exists(go):
    time.sleep(0.01)
prepared = prepare_dataset(
    "toy", DatasetSpec.from_dict(fields), data_dir, folder, False, IndexOptions(workers=1)
)
print(prepared.train.hash, prepared.statistics["action"]["mean"].tolist())
"""


@pytest.mark.parametrize("dies", [False, True])
def test_four_processes_at_once(toy, tmp_path, repository, dies):
    """Real processes: exactly one reads the files and all agree; when it is killed, exactly one other goes on."""
    go, scans = tmp_path / "go", tmp_path / "scans"
    scans.touch()
    common = [toy.fields(), toy.data_dir, str(tmp_path / "cache"), str(go), str(scans)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SEVERAL, json.dumps([*common, i, dies])],
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    go.touch()
    outputs = [process.communicate(timeout=240) for process in processes]
    read = [tuple(map(int, line.split())) for line in scans.read_text().splitlines()]
    builder, other = read[0][0], read[-1][0]
    codes = [process.returncode for process in processes]
    assert codes == [-signal.SIGKILL if dies and i == builder else 0 for i in range(4)], outputs
    printed = {out for out, _ in outputs if out}
    assert len(printed) == 1 and len(printed.pop().split()) > 1
    assert read == [(builder, 0), (builder, 1), (builder, 2), *([(other, 2)] if dies else [])]
    assert (other != builder) == dies
    assert not list(tmp_path.rglob("*.lock*"))


def test_statistics_and_filters_are_computed_once(toy, tmp_path, monkeypatch):
    """Four threads in place of hosts share a cache whose index is built: one computes, the others read."""
    spec = DatasetSpec.from_dict(toy.fields(max_action=5.0))
    split, function = opened(toy)
    load_index(split, function, str(tmp_path), progress=False)
    computed, real = [], index_module.streamed_statistics
    filtered, usable = [], index_module.filters.usable_steps

    def statistics(rows):
        computed.append(threading.current_thread().name)
        time.sleep(0.3)  # the others have looked by then
        return real(rows)

    def usable_steps(*arguments):
        filtered.append(threading.current_thread().name)
        return usable(*arguments)

    monkeypatch.setattr(index_module, "streamed_statistics", statistics)
    monkeypatch.setattr(index_module.filters, "usable_steps", usable_steps)
    monkeypatch.setattr(lock, "PULSE_SECONDS", 0.1)
    prepared = {}

    def host(number):
        prepared[number] = prepare_dataset("toy", spec, toy.data_dir, str(tmp_path), progress=False)

    threads = [threading.Thread(target=host, args=(number,), name=str(number)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(computed) == 2 and len(set(computed)) == 1  # actions and proprioception
    assert len(set(filtered)) == 1
    assert len({prepared[number].train.hash for number in range(4)}) == 1
    for number in range(4):
        np.testing.assert_array_equal(
            prepared[number].statistics["action"]["mean"], prepared[0].statistics["action"]["mean"]
        )


def test_a_lock_that_has_a_new_holder_is_not_broken(tmp_path):
    path = tmp_path / "index.npz.lock"
    path.write_text("host:2:b 0")
    lock._break(str(path), "host:1:a 7")  # seen before the new holder took over
    assert path.read_text() == "host:2:b 0" and len(list(tmp_path.iterdir())) == 1
    lock._break(str(path), "host:2:b 0")
    assert not list(tmp_path.iterdir())
    lock._break(str(path), "host:2:b 0")


def test_a_silent_builder_is_replaced(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "PULSE_SECONDS", 0.05)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.2)
    target = tmp_path / "index.npz"
    (tmp_path / "index.npz.lock").write_text("another-host:17:abc 4")
    lock.build_once(str(target), lambda: target.write_text("done"), what="index of toy")
    assert target.read_text() == "done" and "another-host:17:abc is dead or has been silent" in caplog.text


def test_the_log_says_who_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "PULSE_SECONDS", 0.05)
    monkeypatch.setattr(lock, "REPORT_SECONDS", 0.1)
    target, other = tmp_path / "index.npz", tmp_path / "index.npz.lock"
    other.write_text("another-host:17:abc 4")

    def finish():
        while "index of toy: waiting for another-host:17:abc to build it" not in caplog.text:
            time.sleep(0.01)
        target.write_text("done")

    thread = threading.Thread(target=finish)
    with caplog.at_level("INFO"):
        thread.start()
        lock.build_once(str(target), lambda: pytest.fail("built twice"), what="index of toy")
        thread.join(60)


def test_hosts_that_share_no_disk_build_for_themselves_at_once(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: pytest.fail("it waited"))
    monkeypatch.setattr(lock, "time", clock)
    target = tmp_path / "new" / "index.npz"
    lock.build_once(str(target), lambda: target.write_text("done"), what="it")
    assert target.exists()


def test_of_several_that_claim_a_lock_in_a_bucket_the_last_has_it(monkeypatch):
    """There is no exclusive create: all of them find no lock, and write theirs."""
    path = "ram://bucket_of_locks/index.npz.lock"
    lock.tf.io.gfile.makedirs("ram://bucket_of_locks")
    looked, written, exists = threading.Barrier(3), threading.Barrier(3), lock.FILES.is_file
    monkeypatch.setattr(lock, "time", types.SimpleNamespace(sleep=lambda seconds: written.wait(60)))
    one_by_one, write = threading.Lock(), lock._write

    def write_whole(path, content):  # as a bucket does; ram:// appends
        with one_by_one:
            if exists(path):
                lock.tf.io.gfile.remove(path)
            write(path, content)

    def all_have_looked(path):
        found = exists(path)
        looked.wait(60)
        return found

    monkeypatch.setattr(lock, "_write", write_whole)
    monkeypatch.setattr(lock.FILES, "is_file", all_have_looked)
    claims, all_claimed = [], threading.Barrier(3)

    def claim():
        with lock.claim(path) as ours:
            claims.append(ours)
            all_claimed.wait(60)

    threads = [threading.Thread(target=claim) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(claims) == [False, False, True] and not exists(path)


def test_a_lock_in_a_folder_that_is_gone_is_nobodys(tmp_path):
    """The parts were joined, and their folder removed, by another process."""
    with lock.claim(str(tmp_path / "parts" / "00000.lock")) as ours:
        assert not ours
    with lock.claim(str(tmp_path / "index.npz.lock")) as ours:
        with lock.claim(str(tmp_path / "index.npz.lock")) as theirs:
            assert ours and not theirs
        assert (tmp_path / "index.npz.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_failing_build_frees_the_lock(tmp_path):
    def fail():
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        lock.build_once(str(tmp_path / "index.npz"), fail, what="it")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the cache's name


def test_the_folder_is_keyed_by_files_and_definition(copied, toy, tmp_path):
    split, function = opened(copied)
    folder = cache_folder(split, function, str(tmp_path))
    assert folder == cache_folder(*opened(toy), str(tmp_path))  # wherever the data lies
    others = {
        cache_folder(*opened(copied, proprio_keys=("joints",)), str(tmp_path)),
        cache_folder(*opened(copied, relative_to=(0, 1, None, None), chunk_length=3), str(tmp_path)),
    }
    assert folder == cache_folder(*opened(copied, image_keys={}, language_key=None), str(tmp_path))
    path = sorted(copied.path.glob("*tfrecord*"))[0]
    path.write_bytes(path.read_bytes() + b"x")
    others.add(cache_folder(*opened(copied), str(tmp_path)))
    assert len(others) == 3 and folder not in others
    # Filters by value need no other index.
    assert cache_folder(*opened(toy, max_action=3.0), str(tmp_path)) == folder


def test_prepare_data_on_the_command_line(toy, tmp_path, repository):
    command = [sys.executable, "scripts/prepare_data.py", "--data_dir", toy.data_dir, "--cache_dir", str(tmp_path)]
    fields = {key: value for key, value in toy.fields(idle_threshold=0.8).items() if key != "name"}
    settings = [f"{key}={json.dumps(value)}" for key, value in fields.items()]
    done = subprocess.run(
        [*command, toy.name, "--workers", "2", "--set", *settings], cwd=repository, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"filters leave out" in done.stdout and list(tmp_path.rglob("index.npz"))


def prepare_data(repository, toy, cache, *arguments):
    command = [sys.executable, "scripts/prepare_data.py", "--data_dir", toy.data_dir, "--cache_dir", str(cache)]
    fields = {key: value for key, value in toy.fields().items() if key != "name"}
    settings = ["--set", *(f"{key}={json.dumps(value)}" for key, value in fields.items())]
    done = subprocess.run([*command, *arguments, *settings], cwd=repository, capture_output=True, timeout=300)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_wrong_number_of_workers_is_one_line(toy, tmp_path, repository):
    code, _, said = prepare_data(repository, toy, tmp_path, "toy_buttons", "--workers", "-1")
    assert code == 1 and "error: workers must be at least 1, or None for up to 8, got -1" in said
    assert "Traceback" not in said
    with pytest.raises(DataError, match="workers must be at least 1"):
        prepare_dataset(
            "toy", DatasetSpec.from_dict(toy.fields()), toy.data_dir, str(tmp_path), options=IndexOptions(workers=0)
        )


@pytest.mark.parametrize(
    "given,twice", [(["toy", "other", "toy"], "toy"), (["--mix", "rtx", "--", "kuka", "toto", "kuka"], "kuka")]
)
def test_a_dataset_named_twice_is_an_error(given, twice):
    parser = argparse.ArgumentParser()
    arguments.add_dataset_arguments(parser)
    args = parser.parse_args(["--data_dir", "data", *given])
    with pytest.raises(DataError, match=f"dataset '{twice}' is named twice"):
        arguments.specs_from_arguments(args)
    args.datasets = args.datasets[:2]
    assert list(arguments.specs_from_arguments(args)) == args.datasets


def test_prepare_data_lists_episodes_without_steps(make_toy, episodes_like, tmp_path, repository):
    """Real records of no steps, in two files and both splits; and none where there is none."""
    train, val = episodes_like(12), episodes_like(4, seed=1)
    empty = [1, 5, 6, 10]
    for number in empty:
        train[number] = []
    val[2] = []
    toy = make_toy(tmp_path / "data", "holes", {"train": train, "spare": val}, num_shards=2)
    lengths = [len(episode) for episode in toy.episodes]
    # On disk, by reading the files themselves.
    want, number = [], 0
    for path in sorted(toy.path.glob("*train*tfrecord*")):
        for record, _ in enumerate(records.tf.data.TFRecordDataset(str(path))):
            if not lengths[number]:
                want.append(f"{path}: episode {record}")
            number += 1
    assert number == 12 and len(want) == 4
    code, said, errors = prepare_data(repository, toy, tmp_path / "cache", "holes")
    assert code == 0, errors
    assert "4 of 12 episodes have no steps:\n" + "\n".join(f"  {line}" for line in want) in said
    spec = DatasetSpec.from_dict(toy.fields(val_split="spare"))
    prepared = prepare_dataset("holes", spec, toy.data_dir, str(tmp_path / "cache"), progress=False)
    found, total = report.empty_episodes(prepared, toy.data_dir, str(tmp_path / "cache"))
    assert found[:4] == want and len(found) == 5 and "spare" in found[4] and total == 16


def test_episodes_that_standardize_empties_are_listed_too(make_toy, episodes_like, tmp_path, monkeypatch):
    (tmp_path / "cutting.py").write_text(
        "import tensorflow as tf\n"
        "def cut(t):\n"
        "    keep = tf.where(t['_len'][0] > 4, t['_len'][0], 0)\n"
        "    return tf.nest.map_structure(lambda x: x[:keep], t)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    toy = make_toy(tmp_path / "data", "shorts", episodes_like(12))
    short = [(k, len(e)) for k, e in enumerate(toy.episodes) if len(e) <= 4]
    assert short
    spec = DatasetSpec.from_dict(toy.fields(standardize="cutting:cut"))
    prepared = prepare_dataset("shorts", spec, toy.data_dir, str(tmp_path), progress=False)
    found, total = report.empty_episodes(prepared, toy.data_dir, str(tmp_path))
    assert [line.split(": ")[1] for line in found] == [
        f"episode {k} ({steps} recorded, none after standardize)" for k, steps in short
    ]
    assert total == 12
