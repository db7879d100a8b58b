"""Building an index: several files at a time, after a kill, once for several processes, on the command line."""

import argparse
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from octo_like.common.lanes import Processes
from octo_like.data import arguments
from octo_like.data.check import report
from octo_like.data.rlds import index, lock, records, scan, stall
from octo_like.data.rlds import prepare as index_module
from octo_like.data.rlds.index import cache_folder, load_index
from octo_like.data.rlds.prepare import prepare_dataset
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
from octo_like.data.rlds import index
from octo_like.data.rlds.prepare import prepare_dataset
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import DatasetSpec

scan_file, done = index.scan_file, []

def scan_two_files(*args):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(args)
    return scan_file(*args)

index.scan_file = scan_two_files
fields, data_dir, cache = json.loads(sys.argv[1])
prepare_dataset("toy", DatasetSpec.from_dict(fields), data_dir, cache, progress=False, options=IndexOptions(workers=1))
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

    monkeypatch.setattr(index, "scan_file", counted)
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
    waits = [float(line.rpartition("(")[2].split()[0]) for line in complaints()]
    assert len(waits) >= 3 and "index of toy_buttons train" in complaints()[0]
    other = pathlib.Path(split.files[0]).name
    assert not any(other in line for line in complaints())
    times = [record.created for record in caplog.records if record.getMessage() in complaints()]
    assert times[2] - times[1] > 1.5 * (times[1] - times[0])


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
        threading.Thread(target=lock.build_once, args=(str(target), build(i)), kwargs=dict(what="it", process_index=i))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert builders == [0] and not (tmp_path / "index.npz.lock").exists()


SEVERAL = """
import json, os, signal, sys, time
from octo_like.common.lanes import Processes
from octo_like.data.rlds import index
from octo_like.data.rlds.prepare import prepare_dataset
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import DatasetSpec

fields, data_dir, cache, go, log, number_of_process, dies = json.loads(sys.argv[1])
scan_file = index.scan_file

def noted(split, number, *rest):
    with open(log, "a") as file:
        file.write(f"{number_of_process} {number}\\n")
    if dies and number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return scan_file(split, number, *rest)

index.scan_file = noted
print("ready", flush=True)
while not os.path.exists(go):
    time.sleep(0.01)
prepared = prepare_dataset(
    "toy", DatasetSpec.from_dict(fields), data_dir, cache, False, IndexOptions(workers=1), Processes(number_of_process)
)
print(prepared.train.hash, prepared.statistics["action"]["mean"].tolist())
"""


@pytest.mark.parametrize("dies", [False, True])
def test_four_processes_at_once(toy, tmp_path, repository, dies):
    """Real processes: exactly one reads the files and all agree; when it is killed, exactly one other goes on."""
    go, scans = tmp_path / "go", tmp_path / "scans"
    common = [toy.fields(), toy.data_dir, str(tmp_path / "cache"), str(go), str(scans)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SEVERAL, json.dumps([*common, i, dies and i == 0])],
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
    codes = [process.returncode for process in processes]
    assert codes == [-signal.SIGKILL if dies else 0, 0, 0, 0], outputs
    said = {out for out, _ in outputs[dies:]}
    assert len(said) == 1 and len(said.pop().split()) > 1
    read = [tuple(map(int, line.split())) for line in scans.read_text().splitlines()]
    if dies:
        builder = read[-1][0]
        assert read == [(0, 0), (0, 1), (0, 2), (builder, 2)] and builder > 0
    else:
        assert read == [(0, 0), (0, 1), (0, 2)]
    assert not list(tmp_path.rglob("*.lock*"))


def test_statistics_and_filters_are_computed_once(toy, tmp_path, monkeypatch):
    """Four threads in place of hosts share a cache whose index is built: process 0 computes, the others read."""
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
        options = dict(progress=False, hosts=Processes(number))
        prepared[number] = prepare_dataset("toy", spec, toy.data_dir, str(tmp_path), **options)

    threads = [threading.Thread(target=host, args=(number,), name=str(number)) for number in (3, 2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert computed == ["0", "0"] and set(filtered) == {"0"}  # actions and proprioception
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
    lock.build_once(str(target), lambda: target.write_text("done"), what="index of toy", process_index=1)
    assert target.read_text() == "done" and "another-host:17:abc is dead or has been silent" in caplog.text


def test_waiting_ends_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PULSE_SECONDS", 0.05)
    (tmp_path / "index.npz.lock").write_text("another-host:17:abc 4")
    with pytest.raises(DataError, match=r"index of toy: waited 0 s for another-host:17:abc.*delete .*lock"):
        lock.build_once(str(tmp_path / "index.npz"), lambda: None, what="index of toy", wait_seconds=0.1)


def test_hosts_that_share_no_disk_build_for_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PULSE_SECONDS", 0.05)
    monkeypatch.setattr(lock, "HOLDER_SECONDS", 0.2)
    target = tmp_path / "index.npz"
    lock.build_once(str(target), lambda: target.write_text("done"), what="it", process_index=3)
    assert target.exists()


def test_hosts_without_process_0_wait_once(tmp_path, monkeypatch):
    """Of three splits on a disk of its own, a process waits for process 0 at the first."""
    monkeypatch.setattr(lock, "PULSE_SECONDS", 0.05)
    monkeypatch.setattr(lock, "HOLDER_SECONDS", 1.0)
    start = time.monotonic()
    for number in range(3):
        target = tmp_path / f"{number}.npz"
        build = functools.partial(target.write_text, "done")
        lock.build_once(str(target), build, what="it", process_index=3, root=str(tmp_path / "disk"))
        assert target.exists()
    assert 1.0 < time.monotonic() - start < 2.0
    # Elsewhere process 0 may well be seen.
    start, target = time.monotonic(), tmp_path / "else.npz"
    lock.build_once(str(target), lambda: target.write_text("done"), what="it", process_index=3, root="elsewhere")
    assert time.monotonic() - start > 1.0


def test_process_0_that_turns_up_late_is_waited_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PULSE_SECONDS", 0.05)
    root = str(tmp_path)
    monkeypatch.setattr(lock, "_without_process_0", {root})
    target, started = tmp_path / "index.npz", threading.Event()

    def build():
        started.set()
        while not looked:
            time.sleep(0.01)
        target.write_text("by process 0")

    looked = []
    look = lock._look
    monkeypatch.setattr(lock, "_look", lambda path: looked.append(path) or look(path))
    zero = threading.Thread(target=lock.build_once, args=(str(target), build), kwargs=dict(what="it", root=root))
    zero.start()
    assert started.wait(60)
    lock.build_once(str(target), lambda: target.write_text("by process 3"), what="it", process_index=3, root=root)
    zero.join(60)
    assert target.read_text() == "by process 0" and lock._without_process_0 == set()


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
