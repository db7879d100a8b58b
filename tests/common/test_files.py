"""Files that a user names: how they are found, and what they may import; what is said of words that mean nothing."""

import sys

import pytest

from octo_like.common.config import load_config
from octo_like.common.errors import ConfigError
from octo_like.common.files import python_file
from octo_like.common.robot import RobotError, load_robot
from octo_like.common.words import nearest, suggest


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder of configs and robots that build on each other; the working directory is another."""
    monkeypatch.chdir(tmp_path.parent)
    folder = tmp_path / "lab_of_files"
    folder.mkdir()
    (folder / "base.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(arg='x'):\n    return ConfigDict(dict(arg=arg))\n"
    )
    (folder / "child.py").write_text(
        "from lab_of_files import base\ndef get_config(arg=''):\n    from lab_of_files import base as again\n"
        "    config = again.get_config(arg + '!')\n    config.child = base is again\n    return config\n"
    )
    (folder / "arm.py").write_text(
        "from octo_like.common.robot import Camera, Robot, delta\n"
        "ROBOT = Robot(name='one', cameras=dict(primary=Camera('front', (8, 8))), actions=(delta('x', 'm'),), "
        "control_hz=5, action_horizon=2)\n"
    )
    (folder / "arms.py").write_text(
        "import dataclasses\nfrom lab_of_files.arm import ROBOT\nTWO = dataclasses.replace(ROBOT, name='two')\n"
    )
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab_of_files"]:
        del sys.modules[name]


def test_configs_and_robots_build_on_others(lab):
    before = list(sys.path)
    assert load_config(f"{lab / 'base.py'}").arg == "x"
    assert load_config(f"{lab / 'child.py'}:a:b").to_dict() == {"arg": "a:b!", "child": True}
    assert load_robot(str(lab / "arms.py")).name == "one" and load_robot(f"{lab / 'arms.py'}:TWO").name == "two"
    with pytest.raises(RobotError, match="arms.py: no Robot called TW; did you mean 'TWO'. valid: ROBOT, TWO"):
        load_robot(f"{lab / 'arms.py'}:TW")
    (lab / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_config(str(lab / "broken.py"))
    assert sys.path == before


@pytest.mark.parametrize("load", [load_config, load_robot])
def test_a_file_that_is_not_there(lab, load):
    with pytest.raises(
        ConfigError, match=r"'.*/bas.py' does not exist; did you mean '.*/base.py'\? valid: .*/arm.py, "
    ):
        load(f"{lab / 'bas.py'}:word")
    (lab / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="notes.txt' is not a Python file: its name must end in .py"):
        load(str(lab / "notes.txt"))


def test_the_argument_is_what_stands_behind_the_colon(lab):
    for text, argument in (("", ""), (":", ""), (":lora", "lora"), (":robot=a.py:NAME", "robot=a.py:NAME")):
        with python_file(f"{lab / 'base.py'}{text}", "config file") as (module, found):
            assert found == argument and module.get_config().arg == "x"


def test_words():
    assert suggest("primray", {"wrist", "primary"}) == "did you mean 'primary'? valid: primary, wrist"
    assert suggest("x", ()) == "valid: (none)" and suggest(3, [10, 9]) == "valid: 10, 9"
    assert suggest("zzz", map(str, range(45))).endswith(" and 5 more")
    assert nearest("abcd", ["abce", "abff", "zzzz"], 2, cutoff=0.5) == ["abce", "abff"] and nearest("q", ["abc"]) == []
