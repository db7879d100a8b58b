"""The demo's machinery: stages skipped, redone and resumed; numbers, bars and page of the report; a quick real run."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from octo_like.envs import EMBODIMENTS, EVALUATION_SEEDS, TabletopEnv


@pytest.fixture
def script(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))  # as for a script that is run: demo_report's demo_bars

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


def test_the_seed_reaches_data_and_every_training_but_not_the_evaluation(script, tmp_path):
    module = script("demo")
    first, other = (module.make_stages(tmp_path, module.FULL, seed) for seed in (0, 3))
    changed = {one.name for one, two in zip(first, other, strict=True) if one.command != two.command}
    assert changed == {"data", "pretrain", "from_pretrained", "from_scratch_1x", "from_scratch_4x"}
    for stage in other:
        if stage.name == "data":
            assert stage.command[stage.command.index("--seed") + 1] == "3"
        elif stage.name in changed:
            assert "--config.seed=3" in stage.command
    assert not set(module.stage_keys(first).values()) & set(module.stage_keys(other).values())
    assert module.default_workdir(False, 0).name == "demo" and module.default_workdir(False, 3).name == "demo_seed3"
    assert module.default_workdir(True, 3).name == "demo_quick_seed3"


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("met", [False, True])
def test_a_missed_bar_is_an_exit_status_of_its_own(script, tmp_path, monkeypatch, capfd, quick, met):
    module = script("demo")
    bar = {"met": met, "sentence": "63% of these succeed (wanted: at least 70%).", "look_at": "Look at: the curve."}
    good = {"met": True, "sentence": "the other one", "look_at": ""}
    (tmp_path / "results.json").write_text(json.dumps({"bars": {"pick_and_place": bar, "good": good}}))
    monkeypatch.setattr(module.Runner, "run", lambda self: 0)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--workdir", str(tmp_path), *(["--quick"] if quick else [])])
    status, (out, err) = module.main(), capfd.readouterr()
    assert status == (0 if met or quick else module.BAR_MISSED) and module.BAR_MISSED not in (0, 1, 2)
    assert str(tmp_path / "report.html") in out, "the report is written and named in any case"
    if status:
        assert "1 of the demo's bars missed" in err and "63% of these succeed" in err and "Look at: the curve" in err
        assert "the other one" not in err


def test_the_status_of_a_failed_stage_is_passed_on(script, tmp_path, monkeypatch):
    module = script("demo")
    monkeypatch.setattr(module.Runner, "run", lambda self: 9)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--workdir", str(tmp_path)])
    assert module.main() == 9, "without results nothing is said of bars"


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
                "flags": {
                    "reached_target": outcome,
                    "reached_original": not outcome,
                    "reached_any": outcome,
                    **flags,
                },
            }
        )
    return made


def made_up_evaluations(natural=88, wrong=90, swapped=96, deaf=6, adapted=90, scratch_1x=10, scratch_4x=50):
    three = ("pusher", "gripper", "arm")

    def of(percent, robots=three):
        return episodes(robots, [(7 * i) % 100 < percent for i in range(100)])

    shares = {"natural": natural, "wrong_nearest": wrong, "swapped": swapped, "vision_blind": 3, "language_blind": deaf}
    shares |= {"unseen_phrasing": 70, "shuffled_words": 65, "absent_block": 55, "held_out_pairs": 40, "seen_pairs": 85}
    evaluations = {f"pretrain/{name}": of(share) for name, share in shares.items()}
    for name, percent in (("pretrained", adapted), ("scratch_1x", scratch_1x), ("scratch_4x", scratch_4x)):
        evaluations[f"adapt/from_{name}"] = of(percent, ("arm3",))
    return evaluations


def test_results_have_the_promised_keys(script):
    bars = script("demo_bars")
    results = bars.compute_results(made_up_evaluations(), {"data": 1.0, "pretrain": 2.5})
    pretrain, adapt = results["pretrain"], results["adapt"]
    expected = {
        "success": 0.88,
        "success_wrong_nearest": 0.90,
        "success_swapped_instruction": 0.96,
        "original_target_when_swapped": 0.04,
        "unseen_phrasing": 0.70,
        "any_block_when_absent": 0.55,
        "held_out_pairs": 0.40,
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
    assert pretrain["held_out_minus_seen"]["value"] == pytest.approx(-0.45)
    assert results["seconds"] == {"data": 1.0, "pretrain": 2.5, "total": 3.5}
    assert set(results["bars"]) == {
        *("wrong_nearest", "pick_and_place", "swapped_target", "swapped_original", "vision_blind", "language_blind"),
        *("adaptation_difference", "adaptation_pick_and_place"),
    }
    assert all({"value", "ci90", "wanted", "at_least", "met"} <= set(bar) for bar in results["bars"].values())
    json.dumps(results)


def test_bars_compare_with_the_better_of_the_two_and_own_up(script):
    bars = script("demo_bars")
    good = bars.compute_results(made_up_evaluations(), {})
    assert good["adapt"]["difference"]["against"] == "from_scratch_4x"
    assert good["adapt"]["difference"]["value"] == pytest.approx(0.4)
    assert all(bar["met"] and not bar["look_at"] for bar in good["bars"].values())
    assert "40 points better" in good["bars"]["adaptation_difference"]["sentence"]
    exact = bars.compute_results(made_up_evaluations(adapted=80), {})
    assert exact["bars"]["adaptation_difference"]["met"], "80% is 30 points more than 50%, whatever floats make of it"
    worse = bars.compute_results(made_up_evaluations(adapted=30), {})["bars"]["adaptation_difference"]
    assert not worse["met"] and "20 points WORSE" in worse["sentence"]
    low, high = worse["ci90"]
    assert f"{100 * low:+.0f} to {100 * high:+.0f} points" in worse["sentence"]
    assert "wanted: at least 30 points" in worse["sentence"]


@pytest.mark.parametrize(
    "change,name,shown",
    [
        ({"wrong": 84}, {"wrong_nearest"}, "84%"),
        ({"swapped": 79}, {"swapped_target", "swapped_original"}, "79%"),
        ({"swapped": 94}, {"swapped_original"}, "6%"),
        ({"deaf": 21}, {"language_blind"}, "21%"),
        ({"adapted": 20, "scratch_4x": 0, "scratch_1x": 0}, {"adaptation_difference", "adaptation_pick_and_place"}, ""),
        ({"natural": 60}, {"pick_and_place"}, ""),
    ],
)
def test_each_bar_is_missed_by_what_it_measures(script, change, name, shown):
    bars = script("demo_bars")
    missed = {key: bar for key, bar in bars.compute_results(made_up_evaluations(**change), {})["bars"].items()}
    missed = {key: bar for key, bar in missed.items() if not bar["met"]}
    assert set(missed) == name
    assert any(shown in bar["sentence"] for bar in missed.values())
    for bar in missed.values():
        assert "wanted: at" in bar["sentence"] and bar["ci90"][0] <= bar["value"] <= bar["ci90"][1]
        assert "Lowest: " in bar["look_at"] or "Highest: " in bar["look_at"]
        assert "failures first" in bar["look_at"]


def test_a_missed_bar_says_where_to_look(script):
    bars = script("demo_bars")
    evaluations = made_up_evaluations(natural=60, adapted=20)
    for episode in evaluations["pretrain/natural"]:
        episode["success"] &= episode["embodiment"] != "arm"
    training = {
        "pretrain": {"steps": 4800, "train_loss": 0.77, "val_loss": {"tabletop_arm": 0.8}},
        "adapt/from_pretrained": {"steps": 400, "train_loss": 0.04, "val_loss": {"tabletop_arm3": 1.78}},
    }
    results = bars.compute_results(evaluations, {}, training)
    assert results["training"] == training
    hint = results["bars"]["pick_and_place"]["look_at"]
    assert "0.77" in hint and "plateau" in hint and "Lowest: arm, pick and place, 0%" in hint
    assert "“pretrain: natural”" in hint
    hint = results["bars"]["adaptation_difference"]["look_at"]
    assert "0.04" in hint and "1.78" in hint and "by heart" in hint
    assert "The pretrained policy misses bars itself" in hint and "“adapt: from pretrained”" in hint
    only_reach = made_up_evaluations()
    only_reach["pretrain/natural"] = [e for e in only_reach["pretrain/natural"] if e["task"] == "reach"]
    bar = bars.compute_results(only_reach, {})["bars"]["pick_and_place"]
    assert not bar["met"] and bar["value"] is None and "not measured" in bar["sentence"]


def test_losses_are_read_of_the_actions(script, tmp_path):
    bars = script("demo_bars")
    (tmp_path / "pretrain").mkdir()
    rows = [
        {"step": s, "time": 1.0 * s, "train/loss": 9.0, "train/action/loss": 1 / s, "loss/tabletop_arm": 5.0}
        for s in range(1, 41)
    ]
    rows[19] |= {"val/tabletop_arm/action/loss": 0.5, "val/tabletop_arm/points/loss": 7.0}
    rows[39] |= {"val/tabletop_arm/action/loss": 0.4, "val/tabletop_pusher/action/loss": 0.3}
    (tmp_path / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = bars.read_training(tmp_path).values()
    assert found["train_loss"] == pytest.approx((1 / 39 + 1 / 40) / 2) and found["steps"] == 40
    assert found["val_loss"] == {"tabletop_arm": 0.4, "tabletop_pusher": 0.3}
    assert bars.validation_losses(rows)["tabletop_arm"] == [(20, 0.5), (40, 0.4)]
    assert bars.train_losses([{"step": 1, "train/loss": 2.0}]) == [(1, 2.0)]


def test_learning_curves_of_one_run_and_of_several(script):
    report = script("demo_report")
    rows = [{"step": s, "train/loss": 1 / s} for s in range(1, 100)]
    rows[49]["val/tabletop_arm/action/loss"] = 0.1
    for runs in ({"pretrain": rows}, {"a": rows, "b": rows[:1]}):
        assert report.learning_curve("title", runs).startswith(b"\x89PNG")
    assert report.learning_curve("title", {}) is None and report.learning_curve("title", {"a": [{"step": 1}]}) is None
    import numpy as np

    steps, losses = report.smooth(np.arange(40.0), np.arange(40.0) ** 2)
    np.testing.assert_allclose(steps, np.arange(39) + 0.5)
    np.testing.assert_allclose(losses[0], 0.5)


def test_the_page_is_self_contained(script, tmp_path):
    import numpy as np

    from octo_like.robot.record import encode_gif

    report = script("demo_report")
    evaluations = made_up_evaluations()
    shown = evaluations["pretrain/natural"]
    outcomes = [shown[i]["success"] for i in range(20)]
    for i in (outcomes.index(True), outcomes.index(False)):
        shown[i] |= {"gif": "one.gif", "steps": 70 + i}
    assert outcomes.index(True) < outcomes.index(False)
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
    assert page.index("<b>failure</b>") < page.index('<b class="met">success</b>'), "failures first, and labelled"
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert 'data-label="unseen sentences"' in page, "narrow windows name the columns in the cells"
    for text in (
        "Verdict",
        "held-out pairs",
        "-45 points",
        "Told of a block that is not there, 55%",
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
    assert page.count("data:image/png;base64") == 2, "a learning curve and the plot"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seconds"]["data"] == 61.0 and results["training"]["pretrain"]["steps"] == 20
    assert done.stdout.count("yes  ") == len(results["bars"]) == 8


def test_a_report_of_nothing_says_what_is_missing(script, tmp_path):
    report = script("demo_report")
    done = subprocess.run([sys.executable, report.__file__, "--workdir", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "episodes.json is missing" in done.stderr and "Traceback" not in done.stderr


# Evaluation


def tasks_of(evaluation, robot):
    return evaluation.tasks or EMBODIMENTS[robot].tasks


def test_the_plan_has_enough_episodes_and_the_same_seeds_for_all(script):
    evaluate = script("demo_evaluate")
    plan = evaluate.plan(["from_pretrained", "from_scratch_1x"])
    for evaluation in plan:
        tasks = sum(len(tasks_of(evaluation, robot)) for robot in evaluation.embodiments)
        assert evaluation.per_task * tasks >= 100, evaluation.name
        for robot in evaluation.embodiments:
            assert set(tasks_of(evaluation, robot)) <= set(EMBODIMENTS[robot].tasks)
    adapted = [evaluation for evaluation in plan if evaluation.name.startswith("adapt/")]
    assert len({(e.per_task, e.embodiments, tuple(e.options), e.blind) for e in adapted}) == 1
    assert [e.policy for e in adapted] == ["adapt/from_pretrained", "adapt/from_scratch_1x"]
    assert {e.blind for e in plan} == {None, "vision", "language"}


def test_the_plan_asks_for_what_no_demonstration_showed(script):
    evaluate, bars = script("demo_evaluate"), script("demo_bars")
    plan = {evaluation.name: evaluation for evaluation in evaluate.plan(["from_pretrained"])}
    assert {f"pretrain/{name}" for name, _ in bars.PRETRAIN.values()} == {n for n in plan if n.startswith("pretrain")}
    options = {name.removeprefix("pretrain/"): dict(evaluation.options) for name, evaluation in plan.items()}
    assert options["unseen_phrasing"] == {"phrasing": "unseen"}
    assert options["shuffled_words"] == {"instruction": "shuffled"}
    assert options["absent_block"] == {"instruction": "absent"}
    held_out, seen = plan["pretrain/held_out_pairs"], plan["pretrain/seen_pairs"]
    assert held_out.options == {"pair": "held_out"} and seen.options == {"pair": "seen"}
    assert held_out.tasks == seen.tasks == ("pick_and_place",) and held_out.per_task == seen.per_task
    assert held_out.embodiments == seen.embodiments == ("gripper", "arm")
    for evaluation in plan.values():  # every option is one the world knows
        robot = evaluation.embodiments[0]
        TabletopEnv(robot, render_images=False).reset(seed=EVALUATION_SEEDS, options=dict(evaluation.options))


def test_failures_are_shown_before_successes(script):
    evaluate = script("demo_evaluate")
    recorded = [SimpleNamespace(success=i % 3 != 2, frames=[i], seed=i) for i in range(9)]
    unseen = [SimpleNamespace(success=False, frames=None, seed=9)]
    assert [e.seed for e in evaluate.choose(recorded + unseen, 2)] == [2, 5, 0]
    assert [e.seed for e in evaluate.choose(recorded[:2] + unseen, 2)] == [0]
    assert evaluate.choose(unseen, 2) == []


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
    assert results["pretrain"]["success"]["episodes"] == results["pretrain"]["unseen_phrasing"]["episodes"] == 6
    assert results["pretrain"]["held_out_pairs"]["episodes"] == 2
    assert len(results["bars"]) == 8, "missed, and no failure of the demo in small"
    page = (tmp_path / "report.html").read_text()
    assert "Learning curves" in page and "data:image/gif;base64" in page and "loaded" in page
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and again.stdout.count("nothing has changed") == 7
