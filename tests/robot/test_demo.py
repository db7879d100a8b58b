"""The demo's machinery: stages skipped, redone and resumed; numbers and page of the report; one quick real run."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from octo_like.envs import EMBODIMENTS, EVALUATION_SEEDS


@pytest.fixture(scope="module")
def script(repository):
    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, repository / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


# Stages

WRITE = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text((p.read_text() if p.exists() else '') + 'x')"


@pytest.fixture
def demo(script, tmp_path, monkeypatch):
    module = script("demo")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "other.py").write_text("1")
    return module


def toy_stages(demo, work, first=WRITE):
    def stage(name, code, source, needs=()):
        command = ("-c", code, str(work / name))
        return demo.Stage(name, name, command, (source,), owns=(name,), proof=name, needs=needs)

    return [stage("a", first, "code.py"), stage("b", WRITE, "other.py", ("a",)), stage("c", WRITE, "other.py")]


def contents(work):
    return {name: (work / name).read_text() if (work / name).exists() else None for name in "abc"}


def test_finished_stages_are_skipped_until_what_they_depend_on_changes(demo, tmp_path, capfd):
    work = tmp_path / "work"
    assert demo.Runner(work, toy_stages(demo, work)).run() == 0
    assert contents(work) == {"a": "x", "b": "x", "c": "x"}
    marks = {name: (work / name).stat().st_mtime_ns for name in "abc"}

    def redone():
        assert demo.Runner(work, toy_stages(demo, work)).run() == 0
        changed = {name for name in "abc" if (work / name).stat().st_mtime_ns != marks[name]}
        marks.update({name: (work / name).stat().st_mtime_ns for name in "abc"})
        assert contents(work) == {"a": "x", "b": "x", "c": "x"}, "a stage that starts anew finds its output cleared"
        return changed

    assert redone() == set()
    assert "nothing has changed" in capfd.readouterr().out
    (tmp_path / "other.py").write_text("2")
    assert redone() == {"b", "c"}
    (tmp_path / "code.py").write_text("2")
    assert redone() == {"a", "b"}, "b reads what a makes"
    (work / "c").unlink()
    assert redone() == {"c"}, "lost output is made again"


def test_a_failed_stage_stops_the_demo_and_is_continued_not_restarted(demo, tmp_path, capfd):
    work = tmp_path / "work"
    fails_once = WRITE + "; sys.exit(0 if p.read_text() == 'xx' else 3)"
    assert demo.Runner(work, toy_stages(demo, work, fails_once)).run() == 3
    assert contents(work) == {"a": "x", "b": None, "c": None}
    assert "stage a failed with status 3" in capfd.readouterr().err
    assert demo.Runner(work, toy_stages(demo, work, fails_once)).run() == 0
    assert contents(work) == {"a": "xx", "b": "x", "c": "x"}, "the second run found what the first had left"
    seconds = json.loads((work / "stages" / "a.json").read_text())["seconds"]
    assert seconds > 0


def test_a_stage_that_makes_nothing_is_a_failure(demo, tmp_path, capfd):
    work = tmp_path / "work"
    assert demo.Runner(work, toy_stages(demo, work, "pass")).run() == 1
    assert "without making" in capfd.readouterr().err


def test_the_real_stages_name_files_that_exist(script, tmp_path):
    module = script("demo")
    for settings in (module.FULL, module.QUICK):
        stages = module.make_stages(tmp_path, settings)
        keys = module.stage_keys(stages)
        assert len(set(keys.values())) == len(stages) == 7
        assert [s.name for s in stages][:2] == ["data", "pretrain"] and stages[-1].name == "report"
        for stage in stages:
            assert (module.ROOT / stage.command[0]).is_file(), stage.command[0]
        scratch = next(s for s in stages if s.name == "from_scratch_4x")
        same = next(s for s in stages if s.name == "from_scratch_1x")
        steps = [int(re.search(r"num_steps=(\d+)", " ".join(s.command))[1]) for s in (same, scratch)]
        assert steps[1] == 4 * steps[0]


# Report


def episodes(robots, outcomes, **flags):
    made = []
    for i, outcome in enumerate(outcomes):
        robot = robots[i % len(robots)]
        task = EMBODIMENTS[robot].tasks[i // len(robots) % 2]
        made.append(
            {
                "embodiment": robot,
                "task": task,
                "seed": EVALUATION_SEEDS + i,
                "instruction": "do <it>",
                "steps": 9,
                "success": outcome,
                "flags": {"reached_target": outcome, "reached_original": not outcome, **flags},
            }
        )
    return made


def made_up_evaluations(adapted=90, scratch_1x=10, scratch_4x=50, wrong=80):
    three = ("pusher", "gripper", "arm")

    def of(percent, robots=three):
        return episodes(robots, [(7 * i) % 100 < percent for i in range(100)])

    evaluations = {"pretrain/natural": of(85), "pretrain/wrong_nearest": of(wrong), "pretrain/swapped": of(95)}
    evaluations |= {"pretrain/vision_blind": of(3), "pretrain/language_blind": of(30)}
    for name, percent in (("pretrained", adapted), ("scratch_1x", scratch_1x), ("scratch_4x", scratch_4x)):
        evaluations[f"adapt/from_{name}"] = of(percent, ("arm3",))
    return evaluations


def test_results_have_the_promised_keys(script):
    report = script("demo_report")
    results = report.compute_results(made_up_evaluations(), {"data": 1.0, "pretrain": 2.5})
    pretrain, adapt = results["pretrain"], results["adapt"]
    expected = {
        "success": 0.85,
        "success_wrong_nearest": 0.80,
        "success_swapped_instruction": 0.95,
        "original_target_when_swapped": 0.05,
    }
    for key, value in expected.items():
        assert pretrain[key]["value"] == pytest.approx(value)
        assert pretrain[key]["episodes"] == 100
        low, high = pretrain[key]["ci90"]
        assert low < value < high and high - low < 0.2
        assert set(pretrain[key]["per_task"]) == {"reach", "push", "pick_and_place"}
        assert set(pretrain[key]["per_embodiment"]) == {"pusher", "gripper", "arm"}
        assert sum(v["episodes"] for v in pretrain[key]["per_embodiment_and_task"].values()) == 100
    values = [adapt[name]["success"]["value"] for name in ("from_pretrained", "from_scratch_1x", "from_scratch_4x")]
    assert values == pytest.approx([0.9, 0.1, 0.5])
    assert results["seconds"] == {"data": 1.0, "pretrain": 2.5, "total": 3.5}
    json.dumps(results)


def test_the_verdict_compares_with_the_better_of_the_two_and_owns_up(script):
    report = script("demo_report")
    good = report.compute_results(made_up_evaluations(), {})
    assert good["adapt"]["difference"]["against"] == "from_scratch_4x"
    assert good["adapt"]["difference"]["value"] == pytest.approx(0.4)
    assert all(met for met, _ in report.verdict(good))
    assert "40 points better" in report.verdict(good)[-1][1]
    close = report.compute_results(made_up_evaluations(adapted=60, wrong=60), {})
    met, text = report.verdict(close)[-1]
    assert not met and "10 points better" in text and "falls short by 10" in text
    assert not report.verdict(close)[0][0]
    worse = report.compute_results(made_up_evaluations(adapted=30), {})
    met, text = report.verdict(worse)[-1]
    assert not met and "20 points WORSE" in text and "falls short by 40" in text


def test_the_page_is_self_contained(script, tmp_path):
    import numpy as np

    from octo_like.robot.record import encode_gif

    report = script("demo_report")
    evaluations = made_up_evaluations()
    evaluations["pretrain/natural"][0]["gif"] = "one.gif"
    folder = tmp_path / "evaluation"
    for name in ("gifs", "plots"):
        (folder / name).mkdir(parents=True)
    gif = encode_gif([np.zeros((8, 8, 3), np.uint8)])
    (folder / "gifs" / "one.gif").write_bytes(gif)
    (folder / "plots" / "p.png").write_bytes(b"png")
    (folder / "plots.json").write_text(json.dumps({"p.png": "the plot"}))
    (folder / "episodes.json").write_text(json.dumps(evaluations))
    (tmp_path / "seconds.json").write_text(json.dumps({"data": 61.0}))
    for run in report.RUNS.values():
        (tmp_path / run).mkdir()
    with (tmp_path / "pretrain" / "metrics.jsonl").open("w") as file:
        for step in range(1, 20):
            file.write(json.dumps({"step": step, "time": 0, "train/loss": 1 / step}) + "\n")
        errors = {f"val/tabletop_arm/{kind}/dq1": value for kind, value in (("mae", 0.03), ("mean_mae", 0.2))}
        file.write(json.dumps({"step": 20, "time": 0, "val/tabletop_arm/first_mae/dq1": 0.0123, **errors}) + "\n")
    (tmp_path / "adapt_from_pretrained" / "weights.txt").write_text("loaded 12 <arrays>")
    done = subprocess.run(
        [sys.executable, report.__file__, "--workdir", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(report.__file__))},
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    for text in (
        "Verdict",
        "vision-blind",
        "the plot",
        "loaded 12 &lt;arrays&gt;",
        "do &lt;it&gt;",
        "40 points better",
        "0.0123",
    ):
        assert text in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page), "nothing is fetched from elsewhere"
    assert "<script" not in page and "data:image/gif;base64" in page
    assert page.count("data:image/png;base64") == 2, "learning curves and the plot"
    assert json.loads((tmp_path / "results.json").read_text())["seconds"]["data"] == 61.0


def test_a_report_of_nothing_says_what_is_missing(script, tmp_path):
    report = script("demo_report")
    done = subprocess.run([sys.executable, report.__file__, "--workdir", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "episodes.json is missing" in done.stderr and "Traceback" not in done.stderr


# Evaluation


def test_the_plan_has_enough_episodes_and_the_same_seeds_for_all(script):
    evaluate = script("demo_evaluate")
    plan = evaluate.plan(["from_pretrained", "from_scratch_1x"])
    for evaluation in plan:
        tasks = sum(len(EMBODIMENTS[robot].tasks) for robot in evaluation.embodiments)
        assert evaluation.per_task * tasks >= 100, evaluation.name
    adapted = [evaluation for evaluation in plan if evaluation.name.startswith("adapt/")]
    assert len({(e.per_task, e.embodiments, tuple(e.options), e.blind) for e in adapted}) == 1
    assert [e.policy for e in adapted] == ["adapt/from_pretrained", "adapt/from_scratch_1x"]
    assert {e.blind for e in plan} == {None, "vision", "language"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_demo_in_small(script, tmp_path, repository):
    command = [sys.executable, str(repository / "scripts" / "demo.py"), "--quick", "--workdir", str(tmp_path)]
    # Almost all of the time goes into compiling, and nothing here has to run fast.
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["seconds"]) == {
        *("data", "pretrain", "from_pretrained", "from_scratch_1x", "from_scratch_4x", "evaluate", "total")
    }
    assert results["pretrain"]["success"]["episodes"] == 6
    page = (tmp_path / "report.html").read_text()
    assert "Learning curves" in page and "data:image/gif;base64" in page and "loaded" in page
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and again.stdout.count("nothing has changed") == 7
