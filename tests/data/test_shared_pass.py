"""Worker processes and Beam read the files of datasets that have no index; the index is that of one process.

Hosts that do so together: tests/multiprocess/test_shared_index.py.
"""

import os
import pathlib
import sys
import time

import pytest

from octo_like.common.lanes import Processes
from octo_like.data.prepare import prepare_datasets
from octo_like.data.rlds import cache, lock, records, shared_pass
from octo_like.data.rlds.cache import cache_folder
from octo_like.data.settings import IndexOptions
from octo_like.data.spec import DataError, DatasetSpec, specs_from_config


@pytest.fixture(scope="module")
def pair(make_toy, episodes_like, tmp_path_factory):
    """Two datasets of six and two files, one with a validation split of its own."""
    folder = tmp_path_factory.mktemp("pair")
    many = make_toy(folder, "many", episodes_like(18, seed=5), num_shards=6)
    few = make_toy(folder, "few", {"train": episodes_like(4, seed=6), "spare": episodes_like(2, seed=7)}, num_shards=2)
    return {"many": many.fields(), "few": few.fields(val_split="spare")}, str(folder)


def prepare(pair, cache, **options):
    fields, data_dir = pair
    return prepare_datasets(specs_from_config(fields), data_dir, str(cache), False, IndexOptions(**options))


def files_below(folder):
    """{path: bytes} of all that a cache holds."""
    folder = pathlib.Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """The caches as one process makes them, with one thread."""
    cache = tmp_path_factory.mktemp("alone")
    prepare(pair, cache, workers=1, processes=1)
    return files_below(cache)


def test_worker_processes_make_the_same_index(pair, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_pass, "PIECE_FILES", 1)
    started, start = [], shared_pass._start_worker
    monkeypatch.setattr(shared_pass, "_start_worker", lambda *args: started.append(start(*args)) or started[-1])
    prepare(pair, tmp_path, workers=1, processes=3)
    assert len(started) == 2 and all(worker.returncode == 0 for worker in started)
    assert files_below(tmp_path) == alone


def test_a_worker_that_is_killed_is_replaced(pair, alone, tmp_path, monkeypatch, caplog):
    """It holds a piece when it dies: the lock it leaves names a process that is no more."""
    monkeypatch.setattr(shared_pass, "PIECE_FILES", 1)
    monkeypatch.setattr(shared_pass, "POLL_SECONDS", 0.05)
    start = shared_pass._start_worker

    def start_and_kill(jobs, threads, index, count):
        worker = start(jobs, threads, index, count)
        worker.kill()
        worker.wait()
        (piece,) = jobs[0].pieces()[3:4]
        name = f"{lock.socket.gethostname()}:{worker.pid}:abc:1"
        pathlib.Path(jobs[0].parts, f"{piece[0]:05d}.lock").write_text(name)
        return worker

    monkeypatch.setattr(shared_pass, "_start_worker", start_and_kill)
    prepare(pair, tmp_path, workers=1, processes=2)
    assert "is dead or has been silent" in caplog.text and "ended with status -9" in caplog.text
    assert files_below(tmp_path) == alone


def test_workers_end_with_their_parent(pair, tmp_path, repository):
    """A worker whose parent was killed does not go on alone."""
    fields, data_dir = pair
    spec = DatasetSpec.from_dict(fields["many"])
    split = records.open_split(spec.name, data_dir)
    job = shared_pass.Job(spec, split, str(tmp_path / "index"))
    os.makedirs(job.parts)
    for number in range(6):  # held by somebody who lives: the worker would wait for ever
        pathlib.Path(job.parts, f"{number:05d}.lock").write_text(f"{lock.socket.gethostname()}:{os.getpid()}:abc:0")
    worker = shared_pass._start_worker([job], 1, 1, 2)
    time.sleep(0.5)
    assert worker.poll() is None
    worker.stdin.close()
    assert worker.wait(120) == 0 and not list(tmp_path.rglob("*.npz"))


def test_damage_is_counted_as_by_one_process(pair, tmp_path, monkeypatch, make_toy, episodes_like):
    toy = make_toy(tmp_path / "data", "hurt", episodes_like(30, seed=8), num_shards=3)
    path = sorted(toy.path.glob("*tfrecord*"))[1]
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)
    monkeypatch.setattr(shared_pass, "PIECE_FILES", 1)
    pair = ({"hurt": toy.fields()}, toy.data_dir)
    with pytest.raises(DataError, match=r"(?s)episode 0 \(byte 0\).*1 of 30 records are damaged"):
        prepare(pair, tmp_path / "a", processes=2)
    content[200] ^= 0xFF
    path.write_bytes(content)  # repaired: the file is read again, the others are not
    read, scan_file = [], shared_pass.scan.scan_file
    for module in (shared_pass.scan, cache):
        monkeypatch.setattr(module, "scan_file", lambda *args: read.append(args[1]) or scan_file(*args))
    prepared = prepare(pair, tmp_path / "a", processes=2)
    assert read == [1] and len(prepared["hurt"].train) + len(prepared["hurt"].val) == 30
    prepare(pair, tmp_path / "b")
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def test_what_will_be_read_is_said_before(pair, tmp_path, caplog):
    fields, data_dir = pair
    specs = specs_from_config(fields)
    total = sum(path.stat().st_size for name in fields for path in pathlib.Path(data_dir, name).rglob("*.tfrecord*"))
    with caplog.at_level("INFO"):
        prepare_datasets(specs, data_dir, str(tmp_path), progress=False)
    (said,) = [record.getMessage() for record in caplog.records if "no index yet" in record.getMessage()]
    size = shared_pass._size(total)
    assert f"{size} in 10 files with 24 episodes of 2 datasets will be read once (many " in said
    caplog.clear()
    with caplog.at_level("INFO"):
        prepare_datasets(specs, data_dir, str(tmp_path), progress=False)
    assert "no index yet" not in caplog.text


def test_pieces_cover_the_files_once(pair, monkeypatch):
    fields, data_dir = pair
    split = records.open_split("many", data_dir)
    job = shared_pass.Job(DatasetSpec.from_dict(fields["many"]), split, "nowhere")
    for size, files in ((1, 99), (2 * max(split.file_bytes), 99), (1 << 40, 2), (1 << 40, 99)):
        monkeypatch.setattr(shared_pass, "PIECE_BYTES", size)
        monkeypatch.setattr(shared_pass, "PIECE_FILES", files)
        pieces = job.pieces()
        assert [number for piece in pieces for number in piece] == list(range(6))
        assert all(len(p) == 1 or (len(p) <= files and sum(split.file_bytes[n] for n in p) <= size) for p in pieces)
    assert len(pieces) == 1


def test_hosts_with_read_only_data_share_the_runs_folder(copied, tmp_path, monkeypatch):
    """Without it each would read everything into a cache of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    copied.path.chmod(0o555)
    try:
        specs, pod = specs_from_config({"toy": copied.fields()}), str(tmp_path / "run")
        prepare_datasets(specs, copied.data_dir, None, False, IndexOptions(processes=1, pod_dir=pod), Processes(0, 2))
        assert list((tmp_path / "run").rglob("index.npz")) and not (tmp_path / "home").exists()
        prepare_datasets(specs, copied.data_dir, options=IndexOptions(pod_dir=pod))  # a host by itself uses its own
        assert list((tmp_path / "home").rglob("index.npz"))
    finally:
        copied.path.chmod(0o755)


def test_sizes_of_files_on_a_disk_are_those_of_stat(copied):
    paths = [str(path) for path in sorted(copied.path.iterdir())]
    link = copied.path / "link.tfrecord"
    link.symlink_to(paths[0])
    (copied.path / "broken.tfrecord").symlink_to("nowhere")
    paths += [str(link), str(copied.path / "broken.tfrecord"), str(copied.path / "gone"), str(copied.path / "no" / "x")]
    want = [os.path.getsize(path) if os.path.exists(path) else -1 for path in paths]
    assert records._sizes(paths) == want and want[-3:] == [-1] * 3


# ---------------------------------------------------------------- Apache Beam


def test_beam_makes_the_same_index(pair, alone, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="the extra `beam` is not installed")
    monkeypatch.setattr(shared_pass, "PIECE_FILES", 1)
    prepare(pair, tmp_path / "threads", beam=["--runner=DirectRunner"])
    assert files_below(tmp_path / "threads") == alone
    options = ["--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    prepare(pair, tmp_path / "processes", beam=options)
    assert files_below(tmp_path / "processes") == alone


def test_without_beam_the_error_says_what_to_do(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(DataError, match=r"pip install 'octo_like\[beam\]', or leave out --beam and let --processes"):
        prepare(pair, tmp_path, beam=[])
    assert not list(tmp_path.rglob("index.npz"))


def test_a_pass_that_was_stopped_costs_one_look(pair, tmp_path, monkeypatch):
    """Finished files are found by one listing, not by a look at each."""
    fields, data_dir = pair
    specs = specs_from_config({"many": fields["many"]})
    split = records.open_split("many", data_dir)
    job = shared_pass.Job(
        specs["many"],
        split,
        cache_folder(split, shared_pass.EpisodeFunction(specs["many"], split.features), str(tmp_path)),
    )
    for piece in job.pieces():
        shared_pass.scan_piece(job, piece)
    looks, names, is_file = [], shared_pass.FILES.names, shared_pass.FILES.is_file
    monkeypatch.setattr(shared_pass.FILES, "names", lambda path: looks.append("list") or names(path))
    monkeypatch.setattr(shared_pass.FILES, "is_file", lambda path: looks.append(path) or is_file(path))
    assert shared_pass.unfinished([job]) == [] and looks.count("list") == 1 and len(looks) == 2
