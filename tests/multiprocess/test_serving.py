"""A server in a process of its own, under robots that ask without a pause and clients that do what no client should."""

import json
import os
import subprocess
import sys

import pytest

from tests.robot.tiny import tiny_policy_for

pytestmark = pytest.mark.multiprocess


def test_a_short_soak(tmp_path, repository):
    """No crash, no actions of others, no growth; `make soak` is the long one."""
    pytest.importorskip("websockets")
    tiny_policy_for({"arm": (3, 4), "pusher": (2, None)}).save_pretrained(tmp_path / "export")
    command = [sys.executable, str(repository / "scripts" / "bench_serving.py"), "soak", "--seconds", "20"]
    command += ["--checkpoint", str(tmp_path / "export"), "--mutated", "300", "--out", str(tmp_path / "soak.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": str(repository)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["answers"] >= 20 * 8 and not found["wrong"] and not found["problems"]
    assert found["mutated"] >= 300 and found["vanished"] and found["datasets"] == ["arm", "pusher"]
