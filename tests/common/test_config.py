"""Experiment files and command lines, the latter in real processes."""

import argparse
import json
import os
import subprocess
import sys
import textwrap

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from octo_like.common import config as cfg

CONFIG_FILE = """
from ml_collections import ConfigDict


def get_config(arg=""):
    if arg not in ("", "wide"):
        raise ValueError(f"unknown variant {arg!r}; valid: wide")
    return ConfigDict(
        dict(
            seed=0,
            num_steps=100,
            width=64 if arg == "wide" else 32,
            pretrained=None,
            note="plain",
            bf16=False,
            betas=(0.9, 0.999),
            goal_images=("primary",),
            nothing=(),
            layers=[1, 2],
            image_sizes=dict(primary=(64, 64)),
            optimizer=dict(peak_lr=3e-4, warmup_steps=2000, frozen=None),
            data=dict(data_dir=None, datasets=dict(a=dict(weight=1.0, image_keys=dict(primary="image")))),
        )
    )
"""

SCRIPT = """
import argparse
from octo_like.common import config as cfg

parser = argparse.ArgumentParser(prog="train.py")
parser.add_argument("--workdir", default="w")
flags, config = cfg.parse_command_line(parser)
print(flags.workdir)
print(cfg.to_json(config, indent=None))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(textwrap.dedent(CONFIG_FILE))
    return str(path)


def load(file, *overrides):
    return cfg.load_config(file, [tuple(text.split("=", 1)) for text in overrides])


def run(file, *arguments, repository):
    command = [sys.executable, "-c", SCRIPT, *([f"--config={file}"] if file else []), *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)


class TestCommandLine:
    def test_overrides_of_every_kind(self, file, repository):
        done = run(
            f"{file}:wide",
            "--config.seed=3",
            "--config.optimizer.peak_lr",
            "1e-3",
            "--workdir",
            "elsewhere",
            "--config.bf16",
            "--config.pretrained=runs/a:b",
            "--config.betas=0,1",
            "--config.goal_images=primary,wrist",
            "--config.image_sizes.wrist=(32,32)",
            "--config.data.datasets={'mine': {'action_key': 'cmd'}}",
            "--config.data.datasets.mine.weight=2",
            repository=repository,
        )
        assert done.returncode == 0, done.stderr
        workdir, text = done.stdout.splitlines()
        assert workdir == "elsewhere"
        config = json.loads(text)
        assert (config["seed"], config["width"], config["bf16"]) == (3, 64, True)
        assert config["optimizer"] == {"peak_lr": 1e-3, "warmup_steps": 2000, "frozen": None}
        assert config["pretrained"] == "runs/a:b"
        assert config["betas"] == [0.0, 1.0]
        assert config["goal_images"] == ["primary", "wrist"]
        assert config["image_sizes"] == {"primary": [64, 64], "wrist": [32, 32]}
        assert config["data"]["datasets"] == {"mine": {"action_key": "cmd", "weight": 2}}

    @pytest.mark.parametrize(
        ("argument", "expected"),
        [
            ("--config.optimizer.peak_l=1", "Did you mean --config.optimizer.peak_lr?"),
            ("--config.num_steps=many", "expected int (now 100)"),
            ("--config.seed.deep=1", "not a group"),
        ],
    )
    def test_mistakes_end_with_status_2_and_no_traceback(self, file, repository, argument, expected):
        done = run(file, argument, repository=repository)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""

    def test_no_config_and_no_such_config(self, tmp_path, file, repository):
        done = run(None, repository=repository)
        assert done.returncode == 2 and "pass --config" in done.stderr
        done = run(str(tmp_path / "experimnt.py"), repository=repository)
        assert done.returncode == 2 and f"did you mean {file!r}?" in done.stderr

    def test_default_config(self, file):
        _, config = cfg.parse_command_line(argparse.ArgumentParser(), ["--config.seed=1"], default=file)
        assert config.seed == 1


class TestLoading:
    def test_result_is_read_only_and_typed(self, file):
        config = load(file)
        assert isinstance(config, FrozenConfigDict)
        with pytest.raises(AttributeError):
            config.seed = 1
        with pytest.raises(AttributeError):
            config.optimizer.peak_lr = 1.0
        assert config.layers == (1, 2)
        assert config.get("seed") == 0 and config.get("absent", 7) == 7
        assert config.optimizer.get("frozen", "unused") is None

    def test_argument_errors(self, file, tmp_path):
        with pytest.raises(cfg.ConfigError, match="unknown variant 'wild'; valid: wide"):
            load(f"{file}:wild")
        plain = tmp_path / "plain.py"
        plain.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n")
        with pytest.raises(cfg.ConfigError, match="takes no argument"):
            load(f"{plain}:wide")

    def test_files_that_are_no_configs(self, tmp_path):
        path = tmp_path / "x.py"
        path.write_text("a = 1\n")
        with pytest.raises(cfg.ConfigError, match="no function get_config"):
            load(str(path))
        path.write_text("def get_config():\n    return {}\n")
        with pytest.raises(cfg.ConfigError, match="returned dict, expected an ml_collections.ConfigDict"):
            load(str(path))
        path.write_text(
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict(dict(f=object()))\n"
        )
        with pytest.raises(cfg.ConfigError, match="config values are numbers"):
            load(str(path))

    def test_field_references_do_not_tie_fields_together(self, tmp_path):
        path = tmp_path / "ref.py"
        path.write_text(
            "from ml_collections import ConfigDict\n"
            "def get_config():\n"
            "    config = ConfigDict(dict(a=1))\n"
            "    config.b = config.get_ref('a')\n"
            "    return config\n"
        )
        assert load(str(path), "b=5").to_dict() == {"a": 1, "b": 5}


class TestOverride:
    @pytest.mark.parametrize(
        ("override", "key", "value"),
        [
            ("seed=3e5", "seed", 300_000),
            ("seed=1_000", "seed", 1000),
            ("seed=None", "seed", None),
            ("note=3", "note", "3"),
            ("note='3'", "note", "3"),
            ("note=a=b", "note", "a=b"),
            ("bf16=True", "bf16", True),
            ("bf16=0", "bf16", False),
            ("betas=[1, 0.5]", "betas", (1.0, 0.5)),
            ("betas=0.5", "betas", (0.5,)),
            ("betas=()", "betas", ()),
            ("goal_images=(primary, wrist)", "goal_images", ("primary", "wrist")),
            ("nothing=1,a", "nothing", (1, "a")),
            ("pretrained=3", "pretrained", 3),
            ("pretrained=0.5", "pretrained", 0.5),
            ("pretrained=a/b", "pretrained", "a/b"),
            ("pretrained=(1,'x')", "pretrained", (1, "x")),
            ("pretrained=true", "pretrained", True),
        ],
    )
    def test_values(self, file, override, key, value):
        result = load(file, override)[key]
        assert result == value and type(result) is type(value)

    def test_float_values(self, file):
        for text, value in (("1", 1.0), ("1e-5", 1e-5), ("inf", float("inf"))):
            result = load(file, f"optimizer.peak_lr={text}").optimizer.peak_lr
            assert result == value and isinstance(result, float)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("seed=1.5", "a whole number"),
            ("seed=true", "a whole number"),
            ("bf16=2", "true, false, 1 or 0"),
            ("optimizer.peak_lr=fast", "expected float"),
            ("betas=a,b", "'a' is not one"),
            ("goal_images=1,2", "a tuple of str; 1 is not one"),
            ("optimizer=3", "is a group"),
            (
                "optimizer={'peak_lr': 1}",
                "cannot be replaced as a whole; set its fields: frozen, peak_lr, warmup_steps",
            ),
            ("data.datasets=3", "give a dict literal"),
            ("data.datasets.a.weight.x=3", "not a group"),
        ],
    )
    def test_wrong_types(self, file, override, message):
        with pytest.raises(cfg.ConfigError, match=r"--config\." + override.split("=")[0]) as error:
            load(file, override)
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("key", "suggestion"),
        [
            ("sed", "seed"),
            ("optimiser.peak_lr", "optimizer.peak_lr"),
            ("optimizer.peaklr", "optimizer.peak_lr"),
            ("peak_lr", "optimizer.peak_lr"),
            ("data.dataset.a.weight", "data.datasets.a.weight"),
        ],
    )
    def test_unknown_keys_get_the_closest_valid_one(self, file, key, suggestion):
        with pytest.raises(cfg.ConfigError, match=f"unknown key --config.{key}. Did you mean --config.{suggestion}?"):
            load(file, f"{key}=1")

    def test_unknown_key_lists_its_siblings_when_nothing_is_close(self, file):
        with pytest.raises(cfg.ConfigError) as error:
            load(file, "optimizer.zzzzzz=1")
        assert "Did you mean" not in str(error.value)
        assert "Keys of config.optimizer: frozen, peak_lr, warmup_steps" in str(error.value)

    def test_open_groups(self, file):
        config = load(
            file,
            "data.datasets.mine.weight=2.5",
            "data.datasets.mine.image_keys.primary=observation/cam",
            "data.datasets.mine.mask=(True,False)",
            "data.datasets.a.image_keys.wrist=None",
            "data.datasets.a.weight=3",
        )
        assert config.data.datasets.to_dict() == {
            "a": {"weight": 3.0, "image_keys": {"primary": "image", "wrist": None}},
            "mine": {"weight": 2.5, "image_keys": {"primary": "observation/cam"}, "mask": (True, False)},
        }

    def test_a_group_can_be_opened_by_the_caller(self, file):
        with pytest.raises(cfg.ConfigError, match="unknown key"):
            cfg.load_config(file, [("optimizer.extra", "1")])
        config = cfg.load_config(file, [("optimizer.extra", "1")], open_groups=("optimizer",))
        assert config.optimizer.extra == 1

    def test_the_last_override_wins(self, file):
        assert load(file, "seed=1", "seed=2").seed == 2


class TestDiff:
    def test_json_round_trip(self, file):
        config = load(file, "optimizer.peak_lr=inf", "data.datasets.b.n=None")
        assert cfg.from_json(cfg.to_json(config)) == config
        assert cfg.diff(config, json.loads(cfg.to_json(config))) == []
        assert cfg.to_dict(config)["image_sizes"]["primary"] == (64, 64)

    def test_save(self, file, tmp_path):
        cfg.save(load(file), tmp_path / "config.json")
        assert cfg.from_json((tmp_path / "config.json").read_text()) == load(file)
        assert [p.name for p in tmp_path.glob("config*")] == ["config.json"]

    def test_changed_added_and_removed_keys(self):
        old = ConfigDict(dict(a=1, b=dict(c=(1, 2), d="x", gone=dict(e=1)), same=1.0, flag=1, empty=dict()))
        new = ConfigDict(dict(a=2, b=dict(c=(1, 3), d="x"), same=1, flag=True, empty=dict(now=1)))
        assert [str(change) for change in cfg.diff(old, new)] == [
            "a: 1 -> 2",
            "b.c: (1, 2) -> (1, 3)",
            "b.gone.e: 1 -> (absent)",
            "empty: {} -> (absent)",
            "empty.now: (absent) -> 1",
            "flag: 1 -> True",
        ]

    def test_resume_accepts_what_is_allowed(self):
        old = dict(num_steps=10, eval=dict(every=5), data=dict(host_threads=2, seed=1))
        new = dict(num_steps=20, eval=dict(every=7, videos=3), data=dict(host_threads=4, seed=1))
        accepted = cfg.check_resume(old, new)
        assert [c.key for c in accepted] == ["data.host_threads", "eval.every", "eval.videos", "num_steps"]
        assert cfg.check_resume(old, old) == []

    def test_resume_does_not_mind_a_new_group_that_is_empty(self):
        old, new = dict(surgery=dict(heads=dict(a=1))), dict(surgery=dict(heads=dict(a=1), auxiliaries={}))
        assert cfg.check_resume(old, new) == cfg.check_resume(new, old) == []
        new["surgery"]["auxiliaries"] = dict(text=None)
        with pytest.raises(cfg.ConfigMismatch, match="surgery.auxiliaries.text"):
            cfg.check_resume(old, new)

    def test_resume_goes_on_with_what_was_the_rule_before_there_was_a_key(self):
        old = dict(image_sizes=dict(primary=(8, 8)))
        assert cfg.check_resume(old, dict(old, resize="stretch")) == []
        with pytest.raises(cfg.ConfigMismatch, match="resize: .absent. -> 'letterbox'"):
            cfg.check_resume(old, dict(old, resize="letterbox"))
        with pytest.raises(cfg.ConfigMismatch, match="resize: 'crop' -> 'stretch'"):
            cfg.check_resume(dict(old, resize="crop"), dict(old, resize="stretch"))

    def test_resume_refuses_the_rest_with_a_diff(self):
        old, new = dict(num_steps=10, optimizer=dict(lr=1e-3)), dict(num_steps=20, optimizer=dict(lr=1e-4))
        with pytest.raises(cfg.ConfigMismatch, match="optimizer.lr: 0.001 -> 0.0001") as error:
            cfg.check_resume(old, new)
        assert [c.key for c in error.value.changes] == ["optimizer.lr"]
        assert "num_steps" not in str(error.value).split("A resumed run may change")[0]
        assert len(cfg.check_resume(old, new, allow=("num_steps", "optimizer.*"))) == 2


@pytest.mark.parametrize("config", ["octo_base.py", "octo_base.py:300m", "finetune.py", "adapt_sim.py", "metaworld.py"])
def test_configs_that_build_on_others_load_from_any_program(config, repository, tmp_path):
    """As in scripts/: the program's folder is on the path, the repository is not."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom octo_like.common.config import load_config\nbefore = list(sys.path)\n"
        "load_config(sys.argv[1])\nassert sys.path == before\n"
    )
    # The package itself comes from a folder of links: of the repository alone it is on no path.
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "octo_like").symlink_to(repository / "octo_like")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"}
    for cwd, path in ((repository, f"configs/{config}"), (tmp_path, f"{repository}/configs/{config}")):
        done = subprocess.run(
            [sys.executable, str(program), path], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
