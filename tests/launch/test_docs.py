"""The commands of README.md and docs/tpu.md, run by bash as they stand, with recorders in the place of programs.

What is called is then held against the real thing: scripts exist and know their flags, train.py and finetune.py parse
their configs, and what is sent to hosts, containers and tasks is checked in the same way.
"""

import argparse
import contextlib
import functools
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests.launch.clouds import ROOT

PAGES = ("README.md", "docs/tpu.md")
# Programs that are not ours: they are only recorded.
FOREIGN = ("make", "pip", "uv", "hf", "tensorboard", "ssh-add", "ssh-agent", "ssh-keygen")
# Interpreters of a page's own environment.
PYTHON = ("python", "python3")


def blocks(page: str) -> list[str]:
    """The shell blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_page(page: str, clouds) -> list[list[str]]:
    """Runs all blocks of a page as one script and returns what was called."""
    for name in (*FOREIGN, *PYTHON):
        clouds.add(name)
    script = "set -eu\n" + "\n".join(blocks(page))
    answers = clouds.folder / "answers"
    answers.write_text("none running finished")  # what `keep` sees
    settings = {"GCLOUD_PROJECT": "my-project", "TPU_ARCHIVE": str(clouds.folder / "tree.tgz"), "TPU_POLL_SECONDS": "0"}
    environment = clouds.environment | settings | {"ANSWERS": str(answers)}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=environment,
        input="yes\n" * 9,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return clouds.calls()


def inner_commands(call: list[str]) -> list[list[str]]:
    """Commands that a call hands on: to hosts (gcloud ssh), to containers (xpk), to tasks (sbatch)."""
    found = []
    for word in call:
        if word.startswith("--command="):
            words = shlex.split(word.removeprefix("--command="))
            found += [words[i + 1 :] for i, w in enumerate(words) if w == "--" and words[i + 1 :]][:1]
    if call[0] == "sbatch":
        found.append(call[call.index("scripts/slurm_train.sh") + 1 :])
    return found


@functools.cache
def help_of(script: str) -> str:
    command = [sys.executable, script, "--help"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{script} --help: {done.stderr[-2000:]}"
    return done.stdout


def check_python(words: list[str]) -> None:
    """`python SCRIPT ARGUMENTS...`: the script is there and takes the arguments."""
    script, arguments = words[1], words[2:]
    assert (ROOT / script).is_file(), f"{script} does not exist: {shlex.join(words)}"
    if script in ("train.py", "finetune.py"):
        parse_config(script, arguments)
        return
    flags = {word.split("=")[0] for word in arguments if word.startswith("--") and not word.startswith("--config.")}
    known = set(re.findall(r"--[\w-]+", help_of(script)))
    assert flags <= known, f"{script} does not know {flags - known}: {shlex.join(words)}"


def parse_config(script: str, arguments: list[str]) -> None:
    """Parses a command line with the script's own parser, up to the point where it would start to work."""
    module = importlib.import_module(pathlib.Path(script).stem)

    class Parsed(Exception):
        pass

    def stop(*_):
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(module, "Attempt", stop)
        try:
            with contextlib.suppress(Parsed):
                module.main(arguments)
                raise AssertionError(f"{script} did not get to its start: {shlex.join(arguments)}")
        except (SystemExit, argparse.ArgumentError) as error:
            raise AssertionError(f"{script} refuses {shlex.join(arguments)}") from error


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_works(page, clouds):
    calls = run_page(page, clouds)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    checked = []
    for call in calls:
        for words in [call, *inner_commands(call)]:
            while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
                words = words[1:]
            if words[:3] == ["python", "scripts/supervise.py", "--"]:  # what xpk_run.sh puts in front
                words = words[3:]
            if words[0] in PYTHON:
                check_python(words)
                checked.append(words[1])
            elif words[0] == "make":
                assert set(w for w in words[1:] if "=" not in w) <= targets, words
    assert "train.py" in checked and "scripts/prepare_data.py" in checked and "scripts/doctor.py" in checked
    if page == "docs/tpu.md":
        programs = {call[0] for call in calls}
        assert {"gcloud", "xpk", "docker", "sbatch", "kubectl", "tensorboard"} <= programs
        verbs = {call[4] for call in calls if call[1:4] == ["compute", "tpus", "queued-resources"]}
        assert verbs == {"create", "describe", "scp", "ssh", "delete"}


def test_the_checks_see_mistakes():
    """A page with a wrong flag, a wrong key or a script that is gone would not pass."""
    for words in (
        ["python", "train.py", "--config", "configs/octo_base.py", "--workdir", "x", "--config.data.mixx=rtx"],
        ["python", "train.py", "--config", "configs/octo_bass.py", "--workdir", "x"],
        ["python", "train.py", "--config", "configs/octo_base.py"],
        ["python", "finetune.py", "--workdir", "x", "--worker", "3"],
        ["python", "scripts/doctor.py", "--device", "8"],
        ["python", "scripts/gone.py"],
    ):
        with pytest.raises(AssertionError):
            check_python(words)
    check_python(["python", "train.py", "--config", "configs/octo_base.py", "--workdir", "x", "--config.data.mix=rtx"])


@pytest.mark.parametrize("page", PAGES)
def test_table_of_types(page, clouds):
    """The types of the tables exist, and chips are what their names say: cores of two per chip, or chips."""
    rows = [line.strip("| ").split(" | ") for line in (ROOT / page).read_text().splitlines() if line.startswith("| `v")]
    assert len(rows) >= 4
    for row in rows:
        kinds = re.findall(r"`([\w-]+)`", row[0])
        chips, hosts = ([int(n) for n in column.split(", ")] for column in row[1:3])
        assert len(kinds) == len(chips) == len(hosts)
        for kind, count, machines in zip(kinds, chips, hosts, strict=True):
            settings = ["--name", "a", "--project", "p", "--zone", "us-central2-b", "--type", kind, "--dry-run"]
            assert clouds.run("tpu_pod.sh", "create", *settings).returncode == 0
            family, number = kind.split("-")
            assert count == int(number) // (2 if family in ("v4", "v5p") else 1)
            assert machines == (1 if count <= 8 and family in ("v5e", "v6e") else count // 4)


def test_symptoms_name_flags_and_scripts_that_exist(clouds):
    """Inline code of the page that looks like ours: scripts, their subcommands, flags and config fields."""
    text = (ROOT / "docs" / "tpu.md").read_text()
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    usage = clouds.run("tpu_pod.sh", "--help").stdout
    for words in (code.split() for code in inline if code.startswith(("tpu_pod.sh ", "xpk_run.sh "))):
        shown = usage if words[0] == "tpu_pod.sh" else clouds.run("xpk_run.sh", "--help").stdout
        assert f" {words[1]} " in shown, words
    from octo_like.common.config import load_config

    config = load_config(str(ROOT / "configs" / "octo_small.py"))
    for field in set(re.findall(r"`(?:--)?config\.([\w.]+)", text)):
        node = config
        for part in field.split("."):
            assert part in node, f"config.{field} does not exist"
            node = node[part]
