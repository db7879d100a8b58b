"""Executables that stand for gcloud, xpk and sbatch: they record their calls, and gcloud's ssh runs on this machine."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Words that a careless launcher breaks.
NASTY = [
    "a b",
    "it's",
    '"q"',
    "$HOME",
    "`id`",
    "\\",
    "*",
    "",
    "ü",
    "a;b",
    "&&",
    "--config.d={'k': {'x': (1, 2)}}",
    "#",
    "!",
]

RECORD = """
    import json, os, sys
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""

# Beside the log of calls: `.metadata`, entries of the project; `.fails.VERB`, what a verb fails with for as long as the
# file is there, or once (`.fails_once.VERB`); `.before.VERB` and `.after.VERB`, what happens elsewhere once, before and
# after the call has its effect. With TPU, a file, there is one queued resource, whose state the file holds while it
# exists, and a run, whose state `.run` holds.
GCLOUD = """
    import pathlib, re, shutil, subprocess
    words = sys.argv[1:]
    flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    beside = os.environ["CALLS"]

    def meanwhile(when, verb):
        script = pathlib.Path(f"{beside}.{when}.{verb}")
        if script.exists():
            running = script.rename(f"{script}.now")
            subprocess.run(["bash", running], check=True, stdin=subprocess.DEVNULL)
        for fails in (pathlib.Path(f"{beside}.fails{once}.{verb}") for once in ("", "_once")):
            if when == "before" and fails.exists():
                text = fails.read_text()
                if fails.match("*.fails_once.*"):
                    fails.unlink()
                sys.exit(text)

    def project_info(verb):
        file = pathlib.Path(beside + ".metadata")
        entries = json.loads(file.read_text()) if file.exists() else {}
        if verb == "describe":
            print(*(entries.get(key, "") for key in re.findall(r"items\\[(.+?)\\]", flags["--format"])), sep="\\t")
        elif verb == "add-metadata":
            key, value = flags["--metadata"].split("=", 1)
            file.write_text(json.dumps(entries | {key: value}))
        else:
            entries.pop(flags["--keys"], None)
            file.write_text(json.dumps(entries))

    def one_tpu(verb, tpu, run):
        if verb == "create":
            if tpu.exists():
                sys.exit("ERROR: (gcloud) ALREADY_EXISTS: Resource already exists")
            tpu.write_text(os.environ.get("CREATED", "ACTIVE"))
        elif not tpu.exists():
            sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
        elif verb == "describe":
            print(tpu.read_text())
        elif verb == "delete":
            tpu.unlink()
            run.unlink(missing_ok=True)
        elif verb != "scp" and tpu.read_text() != "ACTIVE":
            sys.exit("ERROR: (gcloud) there are no hosts")
        elif verb == "ask":
            print("octo_state=" + (run.read_text() if run.exists() else "none"))
        elif verb == "run":
            run.write_text("running")
        elif verb == "stop":
            run.write_text("ended")

    if words[:2] == ["config", "get-value"]:
        print(os.environ.get("GCLOUD_PROJECT", ""))
    elif words[:2] == ["compute", "project-info"]:
        meanwhile("before", "project-" + words[2])
        project_info(words[2])
        meanwhile("after", "project-" + words[2])
    elif words[:3] == ["compute", "tpus", "queued-resources"]:
        verb = words[3]
        line = flags.get("--command", "")
        if verb == "ssh" and "tpu_host.sh" in line:
            verb = "ask" if "--brief" in line else re.search("tpu_host.sh ([a-z]+)", line)[1]
        meanwhile("before", verb)
        if "TPU" in os.environ:
            one_tpu(verb, pathlib.Path(os.environ["TPU"]), pathlib.Path(beside + ".run"))
        elif verb == "describe":
            state = "ACTIVE"
            if states := os.environ.get("STATES"):
                with open(states) as file:
                    lines = file.read().split()
                state = lines[0]
                if len(lines) > 1:
                    with open(states, "w") as file:
                        file.write("\\n".join(lines[1:]))
            if state == "MISSING":
                sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
            print(state)
        elif verb == "scp" and "HOST_HOME" in os.environ:
            shutil.copy(words[4], os.path.join(os.environ["HOST_HOME"], words[5].split(":")[1]))
        elif words[3] == "ssh" and "HOST_HOME" in os.environ:
            host = dict(os.environ, HOME=os.environ["HOST_HOME"])
            sys.exit(subprocess.call(["bash", "-c", flags["--command"]], env=host, cwd=host["HOME"]))
        elif verb == "ask" and "ANSWERS" in os.environ:
            with open(os.environ["ANSWERS"]) as file:
                lines = file.read().split()
            with open(os.environ["ANSWERS"], "w") as file:
                file.write("\\n".join(lines[1:] or lines))
            for word in lines[0].split(","):
                print("octo_state=" + word)
        meanwhile("after", verb)
"""

# Gives itself rights it has.
SUDO = """
    words = [word for word in sys.argv[1:] if word != "-n"]
    os.execvp(words[0], words)
"""

UV = """
    if sys.argv[1] == "venv":
        binaries = os.path.join(sys.argv[-1], "bin")
        os.makedirs(binaries, exist_ok=True)
        for name in ("python", "python3"):
            link = os.path.join(binaries, name)
            if not os.path.lexists(link):
                # A wrapper and not a link: Python finds its packages by where it is started.
                with open(link, "w") as file:
                    file.write("#!/bin/sh\\nexec " + os.environ["PYTHON_HERE"] + ' "$@"\\n')
                os.chmod(link, 0o755)
"""


class Clouds:
    """A folder of fake executables in front of PATH and a log of how they were called."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.bin, self.log = folder / "bin", folder / "calls"
        self.bin.mkdir()
        for name in ("xpk", "docker", "kubectl", "sbatch", "srun", "scontrol"):
            self.add(name)
        self.add("gcloud", GCLOUD)
        self.add("sudo", SUDO, record=False)
        self.add("uv", UV)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "CALLS": str(self.log),
            "PYTHON_HERE": sys.executable,
            "LC_ALL": "C.UTF-8",
        }

    def add(self, name: str, body: str = "", *, record: bool = True) -> None:
        path = self.bin / name
        code = textwrap.dedent(RECORD if record else "import os, sys\n") + textwrap.dedent(body)
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, stdin: str = "", timeout: float = 400, **environment: str):
        """`bash scripts/SCRIPT ARGUMENTS...`: the finished process, its output as text."""
        return subprocess.run(
            ["bash", f"scripts/{script}", *arguments],
            cwd=ROOT,
            env=self.environment | environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def calls(self, *programs: str) -> list[list[str]]:
        """What was called, in order; only of the programs that are named."""
        if not self.log.exists():
            return []
        calls = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [call for call in calls if not programs or call[0] in programs]


def commands(done) -> list[list[str]]:
    """The printed commands of a dry run, split as a shell splits them."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def option(words: list[str], name: str) -> str:
    """The value of `--name=value` among words; there is exactly one."""
    [value] = [word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")]
    return value
