"""The doctor: as a command on healthy and ill machines, with several processes, and without TensorFlow."""

import errno
import importlib
import json
import os
import re
import socket
import subprocess
import sys

import pytest

from octo_like.common import storage
from octo_like.common.config import load_config
from tests.data.conftest import build, make_episodes
from tests.launch.clouds import ROOT

CONFIG = "tests/training/tiny_config.py"


def start(*arguments, devices=1, program=("scripts/doctor.py",), **environment):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), **environment)
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, *program, "--json", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process):
    """(exit status, {check: rows}, whether ready); JSON is the last line of the output."""
    out, err = process.communicate(timeout=500)
    assert out, err[-3000:]
    report = json.loads(out.splitlines()[-1])
    rows = {}
    for row in report["rows"]:
        rows.setdefault(row["check"], []).append(row)
    return process.returncode, rows, report["ready"]


def doctor(*arguments, **kwargs):
    return finish(start(*arguments, **kwargs))


def statuses(rows):
    return {check: [row["status"] for row in of] for check, of in rows.items()}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    build(folder, "toy_buttons", {"train": make_episodes(20)})
    return folder


@pytest.fixture
def modules(monkeypatch):
    """The doctor's files as modules, by what follows "doctor_"; "" is doctor.py itself."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    names = ("doctor", "doctor_machine", "doctor_report")
    yield {name.removeprefix("doctor").strip("_"): importlib.import_module(name) for name in names}
    for name in (*names, "doctor_devices"):
        sys.modules.pop(name, None)


def test_a_healthy_machine_with_the_runs_own_data(data_dir, tmp_path):
    """With the arguments of train.py: everything is looked at, and nothing is left behind."""
    arguments = ["--config", CONFIG, f"--config.data.data_dir={data_dir}", "--workdir", tmp_path / "run"]
    status, rows, ready = doctor(*arguments, "--seconds", "0.5", "--devices", "8", devices=8)
    assert status == 0 and ready, rows
    expected = {"python", "packages", "workdir", "clock", "data", "devices", "collectives", "matrix product"}
    expected |= {"training step", "loader, made-up", "loader, your data"}
    assert expected <= set(rows) and not {"FAIL"} & {row["status"] for of in rows.values() for row in of}
    assert "8 x cpu" in rows["devices"][0]["finding"] and "8 devices" in rows["collectives"][0]["finding"]
    assert "1 datasets: toy_buttons" in rows["data"][0]["finding"]
    assert float(re.search(r"loss (\S+)", rows["training step"][0]["finding"])[1]) > 0
    for check in ("loader, made-up", "loader, your data"):
        assert float(re.search(r"(\d+) samples/s", rows[check][0]["finding"])[1]) > 0
    assert not list(tmp_path.iterdir())


def test_an_ill_machine(tmp_path):
    """Everything wrong is listed at once, each with what to do; the table says the same as the JSON."""
    (tmp_path / "file").write_text("")
    arguments = ["--quick", "--workdir", tmp_path / "file" / "run", "--data_dir", tmp_path, "--devices", "64"]
    status, rows, ready = doctor(*arguments)
    assert status == 1 and not ready
    failed = {check: of[0] for check, of in rows.items() if of[0]["status"] == "FAIL"}
    assert set(failed) == {"workdir", "data", "devices"} and all(row["remedy"] for row in failed.values())
    assert failed["workdir"]["finding"] == f"{tmp_path / 'file'} is a file, expected a directory"
    assert str(tmp_path) in failed["data"]["finding"] and "expected 64" in failed["devices"]["finding"]
    assert "training step" not in rows

    command = [sys.executable, "scripts/doctor.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert sum(line.startswith("FAIL") for line in lines) == 3 and sum("->" in line for line in lines) >= 3
    assert lines[-1].startswith("Not ready.") and "3 failures" in lines[-1]


def test_two_processes_are_one_report(tmp_path):
    """Process 0 prints for both; where they differ, both findings are there, and the exit status is the worse one's."""
    (tmp_path / "file").write_text("")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    together = ["--quick", "--coordinator_address", address, "--num_processes", "2"]
    workdirs = (tmp_path / "good", tmp_path / "file" / "run")
    processes = [
        start(*together, "--process_id", i, "--workdir", workdirs[i], "--devices", "4", devices=2) for i in (0, 1)
    ]
    try:
        status, rows, ready = finish(processes[0])
        out, err = processes[1].communicate(timeout=500)
    finally:
        for process in processes:
            process.kill()
    assert status == 1 and processes[1].returncode == 1 and not ready, err[-2000:]
    assert statuses(rows)["workdir"] == ["OK", "FAIL"] and statuses(rows)["collectives"] == ["OK"]
    assert "all 2 hosts: 4 x cpu" in rows["devices"][0]["finding"] and "rows" not in out
    assert "4 devices of 2 process(es)" in rows["collectives"][0]["finding"]


WITHOUT_TENSORFLOW = """
import importlib.util, runpy, sys
real = importlib.util.find_spec

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
importlib.util.find_spec = lambda name, *rest: None if name.startswith("tensorflow") else real(name, *rest)
sys.path.insert(0, "scripts")
runpy.run_path("scripts/doctor.py", run_name="__main__")
"""


def test_without_tensorflow(tmp_path):
    """Only what reads data is missing: a machine that runs policies, or trains on synthetic data, is fine."""
    status, rows, ready = doctor("--workdir", tmp_path, program=("-c", WITHOUT_TENSORFLOW))
    assert status == 0 and ready
    assert statuses(rows)["[data]"] == ["WARN"] and statuses(rows)["loader"] == ["WARN"]
    assert statuses(rows)["training step"] == ["OK"] and "pip install" in rows["loader"][0]["remedy"]


def test_a_mistake_in_the_config_is_one_line():
    command = [sys.executable, "scripts/doctor.py", "--config", CONFIG, "--config.optimiser.peak=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2 and "optimizer" in done.stderr and "Traceback" not in done.stderr


def test_clock_that_is_off(modules, monkeypatch, tmp_path):
    doctor, report = modules["machine"], modules["report"]
    found = report.Report()
    doctor.check_workdir(found, str(tmp_path))
    assert [(row.check, row.status) for row in found.rows] == [("workdir", "OK"), ("clock", "OK")]
    real = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: real() + 400)
    found = report.Report()
    doctor.check_workdir(found, str(tmp_path))
    assert (found.rows[1].check, found.rows[1].status) == ("clock", "FAIL")
    apart = int(re.search(r"(\d+) s apart", found.rows[1].finding)[1])
    assert 395 <= apart <= 400


def test_storage_that_loses_or_refuses(modules, monkeypatch, tmp_path):
    doctor, report = modules["machine"], modules["report"]
    from etils import epath

    path = type(epath.Path(tmp_path))
    monkeypatch.setattr(path, "read_text", lambda self: "something else")
    found = report.Report()
    doctor.check_workdir(found, str(tmp_path))
    assert found.rows[0].status == "FAIL" and "give back" in found.rows[0].finding

    def refuse(self, text):
        raise PermissionError("403 storage.objects.create denied")

    monkeypatch.setattr(path, "write_text", refuse)
    found = report.Report()
    doctor.check_workdir(found, str(tmp_path))
    assert found.rows[0].status == "FAIL" and "403" in found.rows[0].finding and found.rows[0].remedy


@pytest.mark.parametrize("times,status", [(1, "OK"), (99, "FAIL")])
def test_data_on_a_storage_that_does_not_answer_is_not_absent(modules, monkeypatch, data_dir, times, status):
    doctor, found = modules["machine"], modules["report"].Report()
    monkeypatch.setattr(storage, "PAUSES", (0.0,) * 3)
    real, errors = os.listdir, [OSError(errno.EIO, "I/O error")] * times

    def listdir(path="."):
        if "toy_buttons" in str(path) and errors:
            raise errors.pop()
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    doctor.check_data(found, str(data_dir))
    assert found.rows[0].status == status
    assert status == "OK" or "does not answer" in found.rows[0].finding


def test_a_check_that_raises_is_a_finding(modules):
    report = modules["report"]

    def check(report):
        raise RuntimeError("the chip\nis on fire")

    found = report.Report()
    found.attempt("chip", check)
    assert found.rows == [report.Row("chip", "FAIL", "RuntimeError: the chip is on fire", found.rows[0].remedy)]


def test_merging_hosts(modules):
    report = modules["report"]
    good, bad = ["disk", "OK", "9 GB", ""], ["disk", "FAIL", "0 GB", "make room"]
    hosts = [{"host": f"h{i}", "rows": [["cpu", "OK", f"c{i}", ""], bad if i == 2 else good]} for i in range(4)]
    assert report.merge(hosts) == [
        report.Row("cpu", "OK", "all 4 hosts: c0"),
        report.Row("disk", "OK", "h0, h1, h3: 9 GB"),
        report.Row("disk", "FAIL", "h2: 0 GB", "make room"),
    ]


def test_compile_cache_in_a_bucket_is_not_looked_for_on_disk(modules, monkeypatch):
    doctor, report = modules["machine"], modules["report"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    found = report.Report()
    doctor.check_machine(found, None)
    assert "compile cache" not in [row.check for row in found.rows]


def test_hosts_that_cannot_share_the_lanes(modules):
    doctor, doctor_report = modules[""], modules["report"]
    config = load_config(CONFIG, [("batch_size", "48")])
    report = doctor_report.Report()
    for processes in (12, 5):
        report.attempt("lanes", doctor.check_hosts, config, processes)
    good, bad = report.rows
    assert (good.status, good.finding) == ("OK", "48; each of 12 process(es) makes the rows of 4")
    assert bad.status == "FAIL" and "5 processes do not divide 48 lanes" in bad.finding
