"""Bookkeeping of the adaptation benchmark: cells, keys, resuming, selection, table. Policies are made up."""

import dataclasses
import importlib.util
import json
import sys

import pytest

from octo_like.envs.sims import GROUPS


@pytest.fixture(scope="module")
def bench(repository):
    spec = importlib.util.spec_from_file_location(
        "benchmark_adaptation", repository / "scripts" / "benchmark_adaptation.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made_up(bench, tmp_path):
    """A benchmark whose training and evaluation are replaced; `log` holds what was done, `skill` decides success."""
    log = []

    def skill(cell):
        if cell.mode == "pretrained":
            return 0.2
        if cell.mode == "scratch":
            return {3e-4: 0.3, 1e-3: 0.6, 3e-3: 0.1}[cell.rate] + (0.1 if cell.steps == 3200 else 0.0)
        return 0.9

    class MadeUp(bench.Benchmark):
        def pretrain(self):
            log.append("pretrain")

        def train(self, cell):
            log.append(("train", cell))
            return self.training_path(cell) / "export"

        def evaluate(self, export, cell):
            log.append(("evaluate", cell))
            seeds = bench.seeds_of(cell)
            return [
                {"seed": seed, "task": task, "success": i < round(skill(cell) * len(seeds)), "steps": 5}
                for i, (seed, task) in enumerate(seeds)
            ]

    def make(**changes):
        return MadeUp(tmp_path, dataclasses.replace(bench.Settings(demos=(50, 10)), **changes))

    make.log = log
    return make


def trained(log):
    return [entry[1] for entry in log if entry[0] == "train"]


def test_the_plan_begins_with_what_matters_most(bench):
    units = bench.plan(bench.Settings(demos=(50, 10)), bench.TARGETS)
    told = [
        (unit[0].group, unit[0].demos, unit[0].mode, len(unit), unit[0].steps)
        for unit in units[1:]
        if unit[0].mode != "pretrained"
    ]
    assert told[:4] == [
        ("metaworld_heldout", 50, "full", 1, 800),
        ("fetch", 50, "full", 1, 800),
        ("metaworld_heldout", 50, "scratch", 6, 800),
        ("fetch", 50, "scratch", 6, 800),
    ]
    assert {mode for _, _, mode, _, _ in told[8:]} == {"full", "lora", "head_only"}, "the other modes come last"
    assert {steps for _, _, mode, _, steps in told[8:] if mode == "full"} == {3200}
    settings = bench.Settings()
    assert settings.tests * len(GROUPS["fetch"][1]) >= 100, "at least 100 paired seeds"
    assert len(settings.scratch_rates) == 3 and settings.scratch_factors == (1, 4)


def test_seeds_are_paired_and_the_grid_is_chosen_on_others(bench):
    settings = bench.Settings()
    adapted = bench.adapted_cell(settings, "fetch", 50, "full")
    grid = bench.scratch_grid(settings, "fetch", 50)
    tested = bench.best_of(grid, {cell: {"episodes": [{"success": True}]} for cell in grid}, settings)
    assert bench.seeds_of(adapted) == bench.seeds_of(tested)
    assert not set(bench.seeds_of(adapted)) & set(bench.seeds_of(grid[0]))
    assert {task for _, task in bench.seeds_of(grid[0])} == set(GROUPS["fetch"][1])


def test_the_best_of_a_grid(bench):
    settings = bench.Settings()
    grid = bench.scratch_grid(settings, "fetch", 10)

    def results(rates):
        return {c: {"episodes": [{"success": i < r} for i in range(10)]} for c, r in zip(grid, rates, strict=True)}

    best = bench.best_of(grid, results([3, 5, 1, 2, 7, 0]), settings)
    assert (best.rate, best.steps, best.purpose, best.episodes) == (1e-3, 3200, "test", settings.tests)
    equal = bench.best_of(grid, results([3, 5, 1, 2, 5, 5]), settings)
    assert (equal.rate, equal.steps) == (1e-3, 800), "among equals the one with fewer steps"


@pytest.fixture
def no_report(bench, monkeypatch):
    """Drawing fifty figures is not what these tests are about."""
    monkeypatch.setattr(bench, "write_report", lambda benchmark, groups: None)


def test_finished_cells_are_not_run_again_and_lost_ones_are(bench, made_up, no_report):
    bench.run_all(made_up(), bench.TARGETS)
    first = trained(made_up.log)
    # 2 groups x 2 numbers x (4 modes + 6 candidates + the test of the best, whose training is found by `train`)
    assert len(first) == 2 * 2 * (4 + 6 + 1)
    assert {cell.rate for cell in first if cell.purpose == "test" and cell.mode == "scratch"} == {1e-3}
    made_up.log.clear()
    again = made_up()
    bench.run_all(again, bench.TARGETS)
    assert made_up.log == []
    lost = bench.adapted_cell(again.settings, "fetch", 10, "lora")
    again.result_path(lost).unlink()
    bench.run_all(again, bench.TARGETS)
    assert trained(made_up.log) == [lost]


def test_an_interruption_costs_one_cell(bench, made_up, monkeypatch, no_report):
    benchmark = made_up()
    original, seen = type(benchmark).evaluate, []

    def evaluate(self, export, cell):
        seen.append(cell)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return original(self, export, cell)

    monkeypatch.setattr(type(benchmark), "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        bench.run_all(benchmark, bench.TARGETS)
    interrupted = seen[4]
    made_up.log.clear()
    bench.run_all(made_up(), bench.TARGETS)
    assert trained(made_up.log)[0] == interrupted and not set(seen[:4]) & set(trained(made_up.log))


def test_keys_cover_what_is_asked_for_and_no_more(bench, made_up):
    one = made_up()
    settings = one.settings
    adapted, scratch = bench.adapted_cell(settings, "fetch", 50, "full"), bench.scratch_grid(settings, "fetch", 50)[0]
    more = made_up(pretrain_steps=9)
    assert one.key(adapted) != more.key(adapted), "another base"
    assert one.key(scratch) == more.key(scratch), "from scratch there is no base"
    assert one.key(adapted) == made_up(demos=(5, 50)).key(adapted), "what else is run does not matter"
    assert one.key(scratch) != made_up(overrides=("--config.batch_size=8",)).key(scratch)
    test = dataclasses.replace(scratch, purpose="test", episodes=40)
    assert one.key(scratch) != one.key(test)
    assert one.training_path(scratch) == one.training_path(test), "what was selected is not trained again for its test"
    assert one.training_path(adapted) != one.training_path(dataclasses.replace(adapted, steps=1))


def test_the_report_has_honest_differences_and_says_what_was_not_run(bench, made_up):
    benchmark = made_up()
    units = bench.plan(benchmark.settings, bench.TARGETS)
    for unit in (*units[:2], units[3]):  # the base, and (a) with 50
        results = {cell: benchmark.run(cell) for cell in unit}
    benchmark.run(bench.best_of(list(results), results, benchmark.settings))
    bench.write_report(benchmark, bench.TARGETS)
    text = (benchmark.workdir / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| 50", "| 10"))]
    assert len(rows) == 2 * 2 * 5 and sum("not run" in row for row in rows) == len(rows) - 2
    adapted, scratch = (row for row in rows if "not run" not in row)
    # 108 of 120 succeed adapted and 84 of 120 from scratch, the same first ones: the difference is 24 of 120.
    assert "90%" in adapted and "of 120" in adapted and "+20 [+13, +28]" in adapted
    assert "70%" in scratch and "rate 0.001, 3200 steps" in scratch
    collected = json.loads((benchmark.workdir / "results.json").read_text())
    assert collected["groups"]["fetch"]["50"]["scratch"] is None
    assert len(collected["groups"]["metaworld_heldout"]["50"]["scratch"]["grid"]) == 6
    assert (benchmark.workdir / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_results_go_into_the_page_between_its_marks(bench, made_up, tmp_path, repository):
    benchmark = made_up()
    benchmark.run(bench.adapted_cell(benchmark.settings, "fetch", 10, "full"))
    gifs = (
        benchmark.workdir
        / "gifs"
        / benchmark.result_path(bench.adapted_cell(benchmark.settings, "fetch", 10, "full")).stem
    )
    gifs.mkdir(parents=True)
    (gifs / "push.gif").write_bytes(b"GIF89a")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    for _ in range(2):  # the second time it replaces its own words
        bench.write_page(benchmark, bench.TARGETS, page)
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("not run") == 21 and text.count("page/curve.png") == 1
        collected = json.dumps(bench.collect(benchmark, bench.TARGETS))
        assert (tmp_path / "page" / "results.json").read_text().strip() == collected
        assert "page/fetch_push.gif" in text and (tmp_path / "page" / "fetch_push.gif").read_bytes() == b"GIF89a"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs a line '<!-- results -->'"):
        bench.write_page(benchmark, bench.TARGETS, page)
    import adaptation_report

    assert adaptation_report.between_marks((repository / "docs" / "adaptation.md").read_text(), "x")


def test_further_training_seeds(bench, made_up, monkeypatch, tmp_path):
    """After everything with the first seed; the best from scratch is not searched again; restartable; in the report."""
    monkeypatch.setattr(bench, "write_report", lambda benchmark, groups: None)
    first = made_up(modes=("full",))
    bench.run_all(first, bench.TARGETS)
    finished = {path.name for path in (tmp_path / "results").iterdir()}
    made_up.log.clear()
    more = made_up(modes=("full",), seeds=3)
    bench.run_all(more, bench.TARGETS)
    assert finished < {path.name for path in (tmp_path / "results").iterdir()}, "first results keep their names"
    new = trained(made_up.log)
    assert [(c.group, c.demos, c.mode, c.seed) for c in new] == [
        (group, demos, mode, seed)
        for seed in (1, 2)
        for demos in (50, 10)
        for group in bench.TARGETS
        for mode in ("full", "scratch")
    ]
    assert {(c.rate, c.steps) for c in new if c.mode == "scratch"} == {(1e-3, 3200)}
    assert {c.purpose for c in new} == {"test"} and bench.seeds_of(new[0]) == bench.seeds_of(new[1])
    assert len({more.key(c, training_only=True) for c in new}) == len({more.training_path(c) for c in new}) == len(new)
    made_up.log.clear()
    more.result_path(new[3]).unlink()
    bench.run_all(more, bench.TARGETS)
    assert trained(made_up.log) == [new[3]]

    commands = []
    monkeypatch.setattr(bench, "execute", lambda command, log: commands.append(command))
    (tmp_path / "data" / "n50" / "metaworld_heldout").mkdir(parents=True)
    for cell in (new[0], dataclasses.replace(new[0], seed=0)):
        bench.Benchmark.train(more, cell)
    assert "--config.seed=1" in commands[0] and not any("config.seed" in word for word in commands[1])


def test_the_report_states_the_spread_between_trainings(bench, made_up):
    import adaptation_report

    benchmark = made_up(modes=("full",), seeds=3, demos=(50,))
    rates = {("full", 0): 0.9, ("full", 1): 0.8, ("full", 2): 0.85, ("scratch", 0): 0.7, ("scratch", 1): 0.6}
    cells = [bench.adapted_cell(benchmark.settings, "fetch", 50, "full")]
    grid = bench.scratch_grid(benchmark.settings, "fetch", 50)
    results = {cell: benchmark.run(cell) for cell in grid}
    cells.append(bench.best_of(grid, results, benchmark.settings))
    for (mode, seed), rate in rates.items():
        cell = dataclasses.replace(cells[mode == "scratch"], seed=seed)
        seeds = bench.seeds_of(cell)
        episodes = [
            {"seed": s, "task": t, "success": i < round(rate * len(seeds)), "steps": 5}
            for i, (s, t) in enumerate(seeds)
        ]
        bench.write_json(benchmark.result_path(cell), {"cell": cell.request(), "seconds": {}, "episodes": episodes})
    text = adaptation_report.table(bench.collect(benchmark, ["fetch"]))
    assert "### (b) Fetch, another robot: other training seeds" in text
    adapted, scratch = (line for line in text.split("other training seeds")[1].splitlines() if line.startswith("| 50"))
    # Welch by hand: variances 0.0025 / 3 and 0.005 / 2, 1.7 degrees of freedom, t 5.18.
    assert "| 90%, 80%, 85% | 85% | 5.0 | 10 | +20 [-10, +50] |" in adapted
    assert "| 70%, 60% | 65% | 7.1 | 10 |  |" in scratch
    assert "training seeds" not in adaptation_report.table(
        bench.collect(made_up(modes=("full",), demos=(50,)), ["fetch"])
    )
    assert adaptation_report.difference_of_trainings([0.5, 0.5], [0.25, 0.25]) == (0.25, 0.25, 0.25)


def test_policies_tested_on_other_episodes_are_not_compared(bench):
    import adaptation_report

    one = {"episodes": [{"seed": 1, "task": "push", "success": True}]}
    other = {"episodes": [{"seed": 2, "task": "push", "success": True}]}
    with pytest.raises(ValueError, match="not the same episodes: 1 and 1, 0 common"):
        adaptation_report.compare(one, other)


def test_a_failed_command_shows_itself_and_the_end_of_its_log(bench, tmp_path):
    with pytest.raises(bench.CommandFailed, match="(?s)status 3 from.*python -c .*it broke"):
        bench.execute(["-c", "print('it broke'); raise SystemExit(3)"], tmp_path / "log")
    bench.execute(["-c", "print('fine')"], tmp_path / "log")
    assert (tmp_path / "log").read_text().splitlines()[-1] == "fine"
