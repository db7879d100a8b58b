"""scripts/seed_table.py: what a run is told, what is not repeated, what is said when a run fails, and a whole one."""

import importlib.util
import json

import pytest

LINE = dict(
    config="configs/tabletop.py",
    wrong_nearest=0.9,
    pick_and_place=0.8,
    reach=1.0,
    push=0.7,
    swapped_target=0.95,
    swapped_original=0.01,
    loss=0.34,
    seconds=500,
)


@pytest.fixture
def script(repository, monkeypatch):
    spec = importlib.util.spec_from_file_location("seed_table", repository / "scripts" / "seed_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["seed_table.py", *map(str, arguments)])
        return module.main()

    module.run = run
    return module


def test_an_older_processor_is_told_to_xla_and_other_flags_stay(script, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    flags = script.environment(script.Run("configs/tabletop.py", 0, "AVX2"))["XLA_FLAGS"]
    assert flags == "--xla_force_host_platform_device_count=2 --xla_cpu_max_isa=AVX2"
    assert "max_isa" not in script.environment(script.Run("configs/tabletop.py", 0, "native"))["XLA_FLAGS"]


def test_finished_runs_are_not_repeated(script, tmp_path, capsys):
    for seed in (0, 1):
        folder = tmp_path / f"tabletop-native-{seed}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(LINE | dict(seed=seed, isa="native")))
    assert script.run("--seeds", 0, 1, "--out", tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    assert "| tabletop | native | 1 | 0.34 | 90% | 80% | 100% | 70% | 95% | 1% | 500 |" in capsys.readouterr().out


def test_a_run_with_other_settings_is_not_taken_for_this_one(script, tmp_path, capsys):
    folder = tmp_path / "tabletop-native-0"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(LINE | dict(seed=0, isa="native")))
    (folder / "settings.json").write_text(json.dumps({"episodes": "few", "per_task": 50, "set": []}))
    assert script.run("--seeds", 0, "--out", tmp_path) == 1
    assert "was begun with {'episodes': 'few'" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_log(script, tmp_path, capsys):
    out = tmp_path / "table"
    assert script.run("--seeds", 0, "--out", out, "--set", "no_such_key=1") == 1
    assert "tabletop-native-0: train.py ended with status 2; see" in capsys.readouterr().err
    assert "unknown key --config.no_such_key" in (out / "tabletop-native-0" / "log.txt").read_text()


@pytest.mark.slow
def test_a_whole_run_in_small(script, tmp_path):
    small = ["num_steps=4", "batch_size=8", "optimizer.warmup_steps=1", "log_every=2", "eval.every=None"]
    episodes = "tabletop_pusher=3+1 tabletop_gripper=3+1 tabletop_arm=3+1"
    common = ["--seeds", 0, "--out", tmp_path, "--episodes", episodes, "--per_task", 1, "--set", *small]
    assert script.run(*common, "--isa", "AVX2") == 0
    (line,) = map(json.loads, (tmp_path / "table.jsonl").read_text().splitlines())
    assert (line["isa"], line["steps"], line["episodes"]) == ("AVX2", 4, 6)
    assert 0 <= line["wrong_nearest"] <= 1 and line["processor"] and line["loss"] > 0
