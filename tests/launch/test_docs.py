"""The shell blocks of the pages, run by bash as they stand, block after block, in a fresh clone of the repository.

Twice. In `make test` all programs are recorders: what is called is held against the real thing (scripts exist and take
their flags, train.py and finetune.py parse their configs, and so does what is sent to hosts, containers and tasks). In
`make test-docs` Python is real, with fewer steps (`LESS`) and small things in the place of what the reader brings
(`STANDS_FOR`, `ROBOTS`). A block that needs more than a computer has this line in front, and the words before it say
it to the reader as well (`this page needs` is for all blocks of a page):

    <!-- needs: a TPU -->

Its programs are recorders in both.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.data import recordings
from tests.launch.clouds import ROOT, Clouds

# Pages whose commands lead from one thing to the next.
PAGES = (
    "README.md", "docs/start.md", "docs/install.md", "docs/act.md", "docs/demos.md", "docs/finetune.md",
    "docs/pretrain.md", "docs/aot.md", "docs/scaling.md", "docs/tpu.md",
)  # fmt: skip
# Programs that are not ours: they are only recorded.
FOREIGN = ("make", "pip", "uv", "hf", "tensorboard", "jupyter", "ssh-add", "ssh-agent", "ssh-keygen")
# Interpreters of a page's own environment.
PYTHON = ("python", "python3")

# What pages speak of, and what is there when they are run for real.
STANDS_FOR = {
    "--from lerobot DATASET": "--from npz recordings --control_hz 10",
    # The demo's policy stands for a pretrained one: its pictures are smaller, and it has one camera.
    "cp configs/robots/my_robot.py my_robot.py": (
        "sed 's/(256, 256)/(64, 64)/; /wrist=/d' configs/robots/my_robot.py > my_robot.py"
    ),
    "DATA": "rlds",
    "/path/to/tfds": "rlds",
    "runs/pretrain/export": "runs/demo/pretrain/export",
    "'action_key': 'command'": "'action_key': 'action'",
    "OCTO_LIKE_TOKEN=...": "OCTO_LIKE_TOKEN=secret",
    "scripts/serve.py": "scripts/serve.py --port 0",
}
# The robot that a page speaks of: cameras, key and dimensions of proprioception, dimensions of actions.
ROBOTS = {
    "README.md": (("front_camera",), "joints", 8),
    "docs/demos.md": (("front", "wrist"), "state", 7),
    "docs/finetune.md": (("image",), "state", 7),
}
# Words behind a command that has these words among its own; the first that fit.
LESS = (
    (("train.py", "configs/octo_small.py"), (
        "--config.num_steps=1", "--config.batch_size=2", "--config.model.transformer.num_layers=1",
        "--config.image_sizes.primary=64,64", "--config.image_sizes.wrist=64,64")),
    (("train.py",), (
        "--config.num_steps=2", "--config.batch_size=4", "--config.eval.batches=1",
        "--config.optimizer.warmup_steps=1", "--config.model.transformer.num_layers=1")),
    (("finetune.py",), ("--config.num_steps=2", "--config.batch_size=2", "--config.eval.batches=1")),
    (("data/tabletop/build.py",), ("--episodes", "tabletop_pusher=12", "tabletop_gripper=12", "tabletop_arm=12")),
    (("scripts/probe_policy.py",), ("--episodes", "10")),
)  # fmt: skip

# Runs Python as the page does; a server until it serves, then Ctrl-C.
REAL_PYTHON = """
    import signal, subprocess
    words = sys.argv[1:]
    if "DOCS_NEEDS" in os.environ:
        sys.exit(0)
    for among, more in json.loads(os.environ["DOCS_LESS"]):
        if all(word in words for word in among):
            words += [] if "--help" in words else more
            break
    command = [os.environ["PYTHON_HERE"], *words]
    if "scripts/serve.py" not in words:
        sys.exit(subprocess.call(command))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        for line in server.stdout:
            if line.startswith("serving "):
                server.send_signal(signal.SIGINT)
        sys.exit(server.wait() not in (0, 130))
"""


def blocks(page: str) -> list[tuple[str, str]]:
    """The shell blocks of a page, in order: what it needs beyond a computer ("": nothing), code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    page_needs = re.search(r"^<!-- this page needs: (.+) -->$", text, re.MULTILINE)
    found = re.findall(r"(?:^<!-- needs: ([^\n]+) -->\n+)?^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(needs or (page_needs[1] if page_needs else ""), code) for needs, code in found]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> pathlib.Path:
    """A fresh clone with the changes of the working tree: nothing that git ignores is there."""
    folder = tmp_path_factory.mktemp("docs") / "octo_like"
    git = ["git", "-C", str(ROOT)]
    if shutil.which("git") is None or subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(folder)], check=True)
    listed = subprocess.run(
        [*git, "ls-files", "-zmo", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    for name in filter(None, set(listed.stdout.split("\0"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name) if (ROOT / name).exists() else (folder / name).unlink()
    return folder


def run_page(page: str, clouds, folder: pathlib.Path, *, real: bool) -> list[list[str]]:
    """Runs all blocks of a page as one script and returns what was called."""
    for name in FOREIGN:
        clouds.add(name)
    for name in PYTHON:
        clouds.add(name, REAL_PYTHON if real else "")
    script = "set -eu\n"
    for needs, code in blocks(page):
        if real:
            for name, stand_in in STANDS_FOR.items():
                code = re.sub(rf"(?<![A-Z/_\w]){re.escape(name)}(?![A-Z_])", stand_in, code)
        script += f"export DOCS_NEEDS={shlex.quote(needs)}\n{code}unset DOCS_NEEDS\n" if needs else code
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)  # what `make demo` and `make setup` make
    (folder / ".venv" / "bin" / "activate").touch()
    answers = clouds.folder / "answers"
    answers.write_text("none running finished")  # what `keep` sees
    settings = {"GCLOUD_PROJECT": "my-project", "TPU_ARCHIVE": str(clouds.folder / "tree.tgz"), "TPU_POLL_SECONDS": "0"}
    settings |= {"ANSWERS": str(answers), "DOCS_LESS": json.dumps(LESS), "PYTHONPATH": str(folder)}
    kept = ("JAX_PLATFORMS", "XLA_FLAGS", "TF_CPP_MIN_LOG_LEVEL", "MPLBACKEND")
    settings |= {name: os.environ[name] for name in kept if name in os.environ}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=clouds.environment | settings,
        input="yes\n" * 9,
        capture_output=True,
        text=True,
        timeout=3000 if real else 400,
    )
    assert done.returncode == 0, f"{page}: status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
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


def check_python(words: list[str], folder: pathlib.Path = ROOT) -> None:
    """`python SCRIPT ARGUMENTS...`: the script is there and takes the arguments."""
    script, arguments = words[1], words[2:]
    assert (ROOT / script).is_file(), f"{script} does not exist: {shlex.join(words)}"
    if script in ("train.py", "finetune.py"):
        parse_config(script, arguments, folder)
        return
    flags = {word.split("=")[0] for word in arguments if word.startswith("--") and not word.startswith("--config.")}
    known = set(re.findall(r"--[\w-]+", help_of(script)))
    assert flags <= known, f"{script} does not know {flags - known}: {shlex.join(words)}"


def parse_config(script: str, arguments: list[str], folder: pathlib.Path) -> None:
    """Parses a command line with the script's own parser, up to the point where it would start to work."""
    module = importlib.import_module(pathlib.Path(script).stem)

    class Parsed(Exception):
        pass

    def stop(*_):
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(module, "Attempt", stop)
        try:
            with contextlib.suppress(Parsed):
                module.main(arguments)
                raise AssertionError(f"{script} did not get to its start: {shlex.join(arguments)}")
        except (SystemExit, argparse.ArgumentError) as error:
            raise AssertionError(f"{script} refuses {shlex.join(arguments)}") from error


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_is_one(page, clouds, clone):
    calls = run_page(page, clouds, clone, real=False)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    checked = []
    for call in calls:
        for words in [call, *inner_commands(call)]:
            while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
                words = words[1:]
            if words[:3] == ["python", "scripts/supervise.py", "--"]:  # what xpk_run.sh puts in front
                words = words[3:]
            if words[0] in PYTHON:
                check_python(words, clone)
                checked.append(words[1])
            elif words[0] == "make":
                assert set(w for w in words[1:] if "=" not in w) <= targets, words
    assert page != "README.md" or {"train.py", "finetune.py", "scripts/prepare_data.py", "scripts/doctor.py"} <= set(
        checked
    )
    if page == "docs/tpu.md":
        programs = {call[0] for call in calls}
        assert {"gcloud", "xpk", "docker", "sbatch", "kubectl", "tensorboard"} <= programs
        verbs = {call[4] for call in calls if call[1:4] == ["compute", "tpus", "queued-resources"]}
        assert verbs == {"create", "describe", "scp", "ssh", "delete"}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_block_needs_is_said_to_the_reader(page):
    """The comment is for the tests; the sentences before the block, up to two, are for people."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in re.finditer(r"^<!-- (?:this page )?needs: (?:an? |the )?(.+) -->$", text, re.MULTILINE):
        before = " ".join(text[: found.start()].split())[-300:]
        assert "need" in before.lower() and found[1].lower() in before.lower(), (
            f"{page}: {before!r} names no {found[1]!r}"
        )


@pytest.fixture(scope="module")
def demo(clone, tmp_path_factory) -> pathlib.Path:
    """A clone with what `make demo` leaves, after two steps."""
    clouds = Clouds(tmp_path_factory.mktemp("demo"))
    calls = [
        "python data/tabletop/build.py --data_dir runs/demo/data",
        "python train.py --config configs/tabletop.py --config.data.data_dir=runs/demo/data --workdir runs/demo/train",
        "mkdir runs/demo/pretrain && mv runs/demo/train/export runs/demo/pretrain/",
    ]
    run_lines(calls, clouds, clone)
    return clone


def run_lines(lines: list[str], clouds, folder: pathlib.Path) -> None:
    page = folder / "lines.md"
    page.write_text("```sh\n" + "\n".join(lines) + "\n```\n")
    run_page(str(page), clouds, folder, real=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page, clouds, demo, tmp_path):
    """Each page for itself, in a copy of what was cloned and of what the demo leaves."""
    folder = tmp_path / "clone"
    shutil.copytree(demo, folder, symlinks=True)
    if page in ROBOTS:
        record(folder / "recordings", *ROBOTS[page])
        if page != "docs/demos.md":  # which converts them itself
            convert = "python scripts/convert_demos.py --from npz recordings --to rlds --name my_robot --control_hz 10"
            run_lines([convert], clouds, folder)
    run_page(page, clouds, folder, real=True)


def record(folder: pathlib.Path, cameras: tuple[str, ...], state: str, dimensions: int) -> None:
    """50 episodes of a robot: smooth motion, pictures of its own, two instructions."""
    rng = np.random.default_rng(0)
    demos = []
    for number in range(50):
        states = 0.3 * np.sin(rng.uniform(0, 6, dimensions) + np.arange(21)[:, None] * 0.2).astype(np.float32)
        pictures = rng.integers(0, 255, (4, 4, 3)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        frames = np.stack([np.roll(pictures, step, 1) for step in range(20)])
        numbers = {state: states[:-1], "action": states[1:], "text": recordings.TEXTS[number % 2]}
        demos.append(numbers | {camera: frames + np.uint8(i) for i, camera in enumerate(cameras)})
    recordings.write_npz(folder, demos)


# What people call beside the base system and what a lock installs, and the words that introduce it on its page.
INTRODUCED = {
    "docker": "docs.docker.com",
    "gcloud": "cloud.google.com/sdk",
    "hf": "extra hub|extra `hub`|octo_like\\[hub\\]|pip install huggingface_hub",
    "jupyter": "pip install jupyterlab",
    "kubectl": "gcloud components install kubectl",
    "pre-commit": "pip install pre-commit",
    "sbatch": "Slurm",
    "tensorboard": "pip install tensorboard",
    "uv": "docs.astral.sh/uv",
    "xpk": "pip install xpk",
}
BASE = (
    "awk bash cat cd cp curl echo eval export for git if ls make mkdir mv pip python python3 rm sed set sort source "
    "ssh ssh-add ssh-agent ssh-keygen tail tar test tmux"
).split()
OURS = ("octo_like", "octo-train", "octo-finetune", "octo-serve")
ALL_PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")) + [
    "CONTRIBUTING.md",
    "README.md",
]


def programs(text: str) -> set[str]:
    """First words of the commands in shell blocks, and of those in sentences that call what has to be introduced."""
    found = set()
    for code in re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        code = re.sub(r"(?m)(^|\s)#.*$", "", code.replace("\\\n", " "))
        code = re.sub(r'"[^"$]*"', '""', re.sub(r"'[^']*'", "''", code))
        for command in re.split(r"\n|&&|\|\|?|;|\$\(", code):
            words = command.split()
            while words and re.fullmatch(r"[A-Za-z_]\w*=\S*", words[0]):
                words = words[1:]
            found |= {word.strip('")') for word in words[:1]}
    inline = (code.split() for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text))
    return found | {words[0] for words in inline if len(words) > 1 and words[0] in INTRODUCED}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_programs_of_the_page_are_there_or_introduced(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for program in programs(text) - {*BASE, *OURS}:
        assert program in INTRODUCED, f"{page} calls {program}, which nothing installs: introduce it (INTRODUCED)"
        assert re.search(INTRODUCED[program], text), f"{page} calls {program} without saying where it comes from"


def test_programs_are_seen():
    text = "x `gcloud compute ls` `hf`\n```sh\nA=1 make b | sort   # tensorboard c\nd \\\n  e && f $(xpk g)\n```\n"
    assert programs(text) == {"gcloud", "make", "sort", "d", "f", "xpk"}


def test_times_of_one_command_agree():
    """`make demo` takes what README.md says, on every page."""
    numbers = {word: str(n) for n, word in enumerate("one two three four five six seven eight nine ten".split(), 1)}
    numbers |= {word: str(n) for n, word in enumerate("eleven twelve thirteen fourteen fifteen".split(), 11)}
    after = r"make (demo|test-processes|test)(?![\w-])[^.;]{0,140}[ ;](\w+) minutes"
    before = r"(\w+) minutes[^.;]{0,140}make (demo)(?![\w-])"
    said: dict[str, dict[str, str]] = {}
    for page in ALL_PAGES:
        text = (ROOT / page).read_text(encoding="utf-8").replace("before sending; ", "")
        pairs = [found.groups() for found in re.finditer(after, text)]
        for target, time in pairs + [found.groups()[::-1] for found in re.finditer(before, text)]:
            said.setdefault(target, {})[page] = numbers.get(time.lower(), time)
    assert set(said) == {"demo", "test", "test-processes"} and len(said["demo"]) > 1 and len(said["test"]) > 1
    for target, pages in said.items():
        assert len(set(pages.values())) == 1, f"make {target}: {pages}"


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


@pytest.mark.parametrize("page", ["README.md", "docs/tpu.md"])
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
