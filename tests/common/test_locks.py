import select
import subprocess
import sys

from octo_like.common.locks import exclusive

HOLDER = """
import sys
from octo_like.common.locks import exclusive
with exclusive(sys.argv[1]):
    print("inside", flush=True)
    sys.stdin.read()
"""


def start(path):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", HOLDER, path], **pipes)


def hold(path):
    """A process that is inside until its stdin closes, or it dies."""
    process = start(path)
    assert process.stdout.readline() == "inside\n"
    return process


def test_one_waits_for_the_other(tmp_path, caplog):
    path = tmp_path / "folder" / "lock"
    first = hold(path)
    second = start(path)
    assert "waiting" in second.stderr.readline()
    assert select.select([second.stdout], [], [], 0.5)[0] == []
    first.communicate()
    assert second.stdout.readline() == "inside\n"
    second.communicate()
    with exclusive(path):
        pass
    assert not caplog.records


def test_a_killed_holder_leaves_the_lock(tmp_path):
    holder = hold(tmp_path / "lock")
    holder.kill()
    holder.communicate()
    with exclusive(tmp_path / "lock"):
        pass
