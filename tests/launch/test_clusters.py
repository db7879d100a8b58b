"""GKE through XPK, Slurm, and the container: commands as they are printed and as they are run."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import time

import pytest

from tests.launch.clouds import NASTY, ROOT, commands, option

TRAIN = ["python", "train.py", "--config", "configs/octo_base.py", "--workdir", "gs://bucket/run"]
XPK = [
    "--cluster", "pod", "--workload", "base-1", "--project", "lab", "--zone", "us-east5-a", "--type", "v5e-64",
    "--image", "us-docker.pkg.dev/lab/octo/octo:1",
]  # fmt: skip
WHERE = ["--project=lab", "--zone=us-east5-a"]


def dry(clouds, what, *arguments):
    return commands(clouds.run("xpk_run.sh", what, *XPK, "--dry-run", *arguments))


# ----------------------------------------------------------------------------------------------------------------- XPK


def test_xpk_commands(clouds):
    [words] = dry(clouds, "run", "--slices", "2", "--env", "A=b c", "--", *TRAIN)
    assert words == [
        "xpk", "workload", "create", "--cluster=pod", "--workload=base-1", "--tpu-type=v5litepod-64", "--num-slices=2",
        "--docker-image=us-docker.pkg.dev/lab/octo/octo:1",
        f"--command=exec python scripts/supervise.py -- {' '.join(TRAIN)}",
        "--max-restarts=100", "--restart-on-exit-codes=75", "--termination-grace-period-seconds=300",
        "--priority=medium", "--env=A=b c", *WHERE,
    ]  # fmt: skip
    build, push = dry(clouds, "build")
    assert build[:3] == ["docker", "build", "--platform=linux/amd64"] and pathlib.Path(build[-1]) == ROOT
    assert option(build, "build-arg") == "EXTRAS=data,tpu"
    assert push == ["docker", "push", option(build, "tag")]
    assert dry(clouds, "status") == [["xpk", "workload", "list", "--cluster=pod", *WHERE]]
    assert dry(clouds, "stop") == [["xpk", "workload", "delete", "--cluster=pod", "--workload=base-1", *WHERE]]
    [logs] = dry(clouds, "logs", "--follow")
    assert logs[:2] == ["kubectl", "logs"] and logs[-1] == "--follow" and "base-1" in option(logs, "selector")


@pytest.mark.parametrize("kind", ["tpu7x-8", "tpu7x-4x4x4", "v6e-64"])
def test_xpk_types(clouds, kind):
    [words] = dry(clouds, "run", "--type", kind, "--", *TRAIN)
    assert option(words, "tpu-type") == kind


@pytest.mark.parametrize("what", ["build", "run", "status", "logs", "stop"])
def test_xpk_runs_what_it_prints(clouds, what):
    arguments = ["--", *TRAIN] if what == "run" else []
    printed = dry(clouds, what, *arguments)
    assert not clouds.calls()
    assert clouds.run("xpk_run.sh", what, *XPK, *arguments).returncode == 0
    assert clouds.calls() == printed


def test_xpk_command_survives_the_containers_shell(clouds):
    [words] = dry(clouds, "run", "--", "python", *NASTY)
    assert shlex.split(option(words, "command"))[3:] == ["--", "python", *NASTY]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["go"], ["go", "build"]),
        (["run", "--", "ls"], ["no cluster", "XPK_CLUSTER"]),
        (["run", *XPK], ["no command", "after --"]),
        (["run", *XPK, "--type", "h100-8", "--", "ls"], ["h100-8", "v5p-N", "tpu7x-N"]),
        (["run", *XPK, "--type", "v6e-4x4x4", "--", "ls"], ["v6e-4x4x4", "v6e-N"]),
        (["run", *XPK, "--workload", "Base_1", "--", "ls"], ["Base_1", "lower-case"]),
        (["run", *XPK, "--priority", "urgent", "--", "ls"], ["urgent", "very-high"]),
        (["run", *XPK, "--slices", "two", "--", "ls"], ["two", "whole number"]),
        (["build"], ["no image", "XPK_IMAGE"]),
        (["build", "--imag", "x"], ["--imag", "--help"]),
    ],
)
def test_xpk_mistakes(clouds, arguments, words):
    done = clouds.run("xpk_run.sh", *arguments)
    assert done.returncode == 2 and not clouds.calls()
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


def test_the_container_copies_what_exists():
    """Every file that the Dockerfile names is there and is not kept out of the build."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {"setup.py", "requirements/cpu.lock", "."} <= set(copied)
    assert not [name for name in copied if not (ROOT / name).exists()]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ".git" in ignored and ".venv" in ignored and not set(copied) & set(ignored)
    # What setup.py reads has to be copied before it is run.
    install = next(i for i, line in enumerate(lines) if "uv pip install" in line)
    before = {word for line in lines[:install] if line.startswith("COPY") for word in line.split()[1:-1]}
    read = set(re.findall(r'HERE / "([\w.]+)"(?: / "([\w.]+)")?', (ROOT / "setup.py").read_text()))
    assert {"/".join(part for part in parts if part) for parts in read} <= before


# --------------------------------------------------------------------------------------------------------------- Slurm

# srun that ends as the next line of a file says: a status, or "save" = wait for SIGTERM and leave with 75.
SRUN = """
    import signal, time
    with open(os.environ["PLAN"]) as file:
        lines = file.read().split()
    with open(os.environ["PLAN"], "w") as file:
        file.write("\\n".join(lines[1:]))
    if lines[0] == "save":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print("waiting", flush=True)
        while True:
            time.sleep(0.05)
    sys.exit(int(lines[0]))
"""


@pytest.fixture
def job(clouds):
    """Runs the script as Slurm would, inside of a job: job(plan) -> (finished process, calls)."""
    clouds.add("srun", SRUN)
    clouds.environment |= {
        "SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "12",
        "PLAN": str(clouds.folder / "plan"), "PAUSE_SECONDS": "0",
    }  # fmt: skip

    def run(plan, **settings):
        (clouds.folder / "plan").write_text(plan)
        done = clouds.run("slurm_train.sh", "python", "train.py", "a b", **settings)
        return done, clouds.calls("srun", "scontrol")

    return run


def test_sbatch_command(clouds):
    settings = dict(NODES="4", GPUS_PER_NODE="8", TIME="12:00:00", PARTITION="gpu", SBATCH_FLAGS="--mem=0 --exclusive")
    [words] = commands(clouds.run("slurm_train.sh", "--dry-run", "python", *NASTY, **settings))
    assert words == [
        "sbatch", "--job-name=octo_like", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=8",
        "--time=12:00:00", "--signal=TERM@300", "--requeue", "--open-mode=append", "--output=octo_like-%j.log",
        "--partition=gpu", "--mem=0", "--exclusive", "scripts/slurm_train.sh", "python", *NASTY,
    ]  # fmt: skip
    assert not clouds.calls()
    assert clouds.run("slurm_train.sh", "python", *NASTY, **settings).returncode == 0
    assert clouds.calls() == [words]


def test_slurm_job_that_finishes(job):
    done, calls = job("0")
    assert done.returncode == 0
    assert calls == [["srun", "--kill-on-bad-exit=0", "--cpus-per-task=12", "python", "train.py", "a b"]]


def test_slurm_job_is_requeued_after_saving(job):
    done, calls = job("75")
    assert done.returncode == 0 and [call[0] for call in calls] == ["srun", "scontrol"]
    assert calls[1] == ["scontrol", "requeue", "17"]


def test_slurm_job_tries_again_after_a_crash(job):
    done, calls = job("134 1 0")
    assert done.returncode == 0 and [call[0] for call in calls] == ["srun"] * 3
    assert "crash 2 of 5" in done.stdout


def test_slurm_job_gives_up(job):
    done, calls = job("1 1 9 0", MAX_CRASHES="2")
    assert done.returncode == 2 and "3 times" in done.stderr and "status 9" in done.stderr and len(calls) == 3


@pytest.mark.parametrize("status", [2, 76])
def test_slurm_job_does_not_repeat_what_cannot_get_better(job, status):
    done, calls = job(f"{status} 0")
    assert done.returncode == 2 and f"status {status}" in done.stderr and len(calls) == 1


def test_slurm_job_that_fails_at_the_time_limit_is_requeued(job):
    done, calls = job("134", SLURM_JOB_END_TIME=str(int(time.time()) + 200))
    assert done.returncode == 0 and [call[0] for call in calls] == ["srun", "scontrol"]


def test_slurm_job_that_is_cancelled_is_not_requeued(clouds, job):
    """scancel and preemption send SIGTERM to the tasks and to the script."""
    (clouds.folder / "plan").write_text("save")
    process = subprocess.Popen(
        ["bash", "scripts/slurm_train.sh", "python", "train.py"],
        cwd=ROOT, env=clouds.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        lines = []
        while "waiting" not in "".join(lines):
            line = process.stdout.readline()
            assert line, f"ended early: {lines}"
            lines.append(line)
        os.killpg(process.pid, signal.SIGTERM)
        rest, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75 and "stopped by Slurm" in rest
    assert [call[0] for call in clouds.calls("srun", "scontrol")] == ["srun"]


def test_slurm_job_that_is_cancelled_in_a_pause_does_not_start_again(clouds, job):
    (clouds.folder / "plan").write_text("1 0")
    process = subprocess.Popen(
        ["bash", "scripts/slurm_train.sh", "python", "train.py"],
        cwd=ROOT, env=clouds.environment | {"PAUSE_SECONDS": "100"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while "trying again" not in (line := process.stdout.readline()):
            assert line, "ended early"
        process.terminate()
        assert "stopped by Slurm" in process.stdout.readline()
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
    assert [call[0] for call in clouds.calls("srun", "scontrol")] == ["srun"]


def test_slurm_job_is_requeued_when_its_time_ends_in_a_pause(job):
    done, calls = job("1 0", SLURM_JOB_END_TIME=str(int(time.time()) + 303), PAUSE_SECONDS="4")
    assert done.returncode == 0 and [call[0] for call in calls] == ["srun", "scontrol"]


@pytest.mark.parametrize(
    "arguments,settings,words",
    [
        ([], {}, ["no command"]),
        (["--nodes", "4"], {}, ["--nodes", "environment"]),
        (["ls"], {"NODES": "two"}, ["NODES=two", "whole number"]),
        (["ls"], {"GPUS_PER_NODE": "0"}, ["GPUS_PER_NODE=0"]),
    ],
)
def test_slurm_mistakes(clouds, arguments, settings, words):
    done = clouds.run("slurm_train.sh", *arguments, **settings)
    assert done.returncode == 2 and not clouds.calls()
    for word in words:
        assert word in done.stderr


def test_jax_reads_the_job_that_is_asked_for(monkeypatch):
    """One task per GPU: JAX's own detection turns Slurm's variables into one device per process."""
    from jax._src.clusters import ClusterEnv
    from jax._src.clusters.slurm_cluster import SlurmCluster

    nodes, gpus = 2, 4
    seen = []
    for task in range(nodes * gpus):
        variables = {
            "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NTASKS": str(nodes * gpus),
            "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % gpus), "SLURM_STEP_NUM_NODES": str(nodes),
        }  # fmt: skip
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert SlurmCluster.is_env_present()
        address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, "slurm", 10
        )
        seen.append((address, count, number, devices))
    assert [(count, number) for _, count, number, _ in seen] == [(8, task) for task in range(8)]
    assert [devices for *_, devices in seen] == [[task % gpus] for task in range(8)]
    assert len({address for address, *_ in seen}) == 1 and seen[0][0].startswith("gpu07:")


def test_exit_statuses_are_those_of_the_code():
    code = "\n".join(path.read_text() for path in sorted((ROOT / "octo_like" / "training").glob("*.py")))
    [status] = set(re.findall(r"^(?:EXIT_)?PREEMPTED = (\d+)", code, re.MULTILINE))
    assert f"preempted={status}\n" in (ROOT / "scripts" / "slurm_train.sh").read_text()
    assert f"--restart-on-exit-codes={status} " in (ROOT / "scripts" / "xpk_run.sh").read_text()
    assert f"{status}) echo stopped" in (ROOT / "scripts" / "tpu_host.sh").read_text()
