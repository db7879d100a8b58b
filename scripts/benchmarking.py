"""What the benchmarks of this folder share: commands in processes of their own, files written whole, short hashes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from octo_like.common.files import write_whole  # noqa: E402


def digest(value: Any) -> str:
    """Short hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


class CommandFailed(RuntimeError):
    """A stage of a cell ended with an error; the message holds the command and the end of its log."""


def execute(command: Sequence[str], log: Path) -> None:
    """Runs a Python script of the repository in a process of its own, its output in `log`.

    Raises:
      CommandFailed: it ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("a") as file:
        status = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if status:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise CommandFailed(f"status {status} from\n  python {' '.join(command)}\nThe end of {log}:\n{end}")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1))
