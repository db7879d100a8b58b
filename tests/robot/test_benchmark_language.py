"""scripts/benchmark_language.py: what its cells are, how a person contradicts, and what its tables say."""

import dataclasses
import importlib
import json
import sys

import numpy as np
import pytest

from octo_like.envs import EVALUATION_SEEDS, LongTabletopEnv


@pytest.fixture
def scripts(monkeypatch, repository):
    """Imports a script by its name."""
    monkeypatch.setattr(sys, "path", [str(repository / "scripts"), *sys.path])
    return importlib.import_module


def test_a_cell_is_keyed_by_all_that_was_asked_for(scripts):
    cells = scripts("language_cells")
    settings = cells.Settings()
    all_of_them = cells.trainings(settings, tuple(cells.STUDIES))
    assert len(all_of_them) == 3 * (4 + 3 + 6) and [t.seed for t in all_of_them] == sorted(t.seed for t in all_of_them)
    keys = {cells.key(training, settings, test) for training in all_of_them for test in cells.tests_of(training)}
    assert len(keys) == 3 * (6 + 6 + 6 + 5 + 6 + 6 + 1 + 6 * 3)
    assert [t.name for t in cells.trainings(settings, ("word", "heads"), ("robots", "fast"))] == [
        f"{name}-{seed}" for seed in range(3) for name in ("word-robots", "heads-fast")
    ]
    word = all_of_them[0]
    fewer = dataclasses.replace(settings, rows=100)
    assert cells.key(word, fewer) != cells.key(word, settings)
    heads = next(training for training in all_of_them if training.study == "heads")
    assert cells.key(heads, fewer) == cells.key(heads, settings), "pictures do not matter to it"
    more = dataclasses.replace(settings, episodes=7)
    assert cells.key(word, more) == cells.key(word, settings)
    assert cells.key(word, more, cells.WORD[0]) != cells.key(word, settings, cells.WORD[0])


def test_a_person_asks_for_another_block_and_it_counts_when_it_is_in_the_hand(scripts):
    episodes = scripts("language_episodes")
    env = episodes.Corrected(LongTabletopEnv("gripper"))
    still = np.zeros(env.action_space.shape, np.float32)
    for seed in range(3):
        _, info = env.reset(seed=EVALUATION_SEEDS + seed, options={"task": "match"})
        asked_for = info["subtask"]
        infos = [env.step(still)[-1] for _ in range(episodes.CORRECTED_AT)]
        assert all("correction" not in info for info in infos[:-1]) and not infos[-1]["success"]
        wanted = infos[-1]["correction"]
        assert wanted.startswith("pick up the ") and wanted != asked_for
        said = episodes.CorrectedPlanner(lambda *_, **__: ["a", "b"])(None, {}, ["", ""], [infos[-1], info])
        assert said == [wanted, "b"]
        world = env.unwrapped.world
        other = next(i for i, block in enumerate(world.blocks) if block.color not in wanted)
        world.held = other
        _, _, terminated, truncated, info = env.step(still)
        assert not (terminated or truncated or info["success"])
        ends = [env.step(still)[3] for _ in range(episodes.TIME_TO_OBEY - 1)]
        assert ends == [False] * (episodes.TIME_TO_OBEY - 2) + [True]
        env.reset(seed=EVALUATION_SEEDS + seed, options={"task": "match"})
        for _ in range(episodes.CORRECTED_AT):
            info = env.step(still)[-1]
        world = env.unwrapped.world
        block = next(block for block in world.blocks if block.color in info["correction"])
        env.unwrapped.effector.place(block.xy, 0.0)
        world.held = world.blocks.index(block)
        _, reward, terminated, _, info = env.step(np.where(np.arange(len(still)) == len(still) - 1, -1, still))
        if world.held is not None:  # the hand may open
            assert reward == 1 and terminated and info["success"]


def test_an_episode_that_ends_by_itself_is_a_failure(scripts):
    """An expert that does not listen finishes its own task, or breaks its order, before the time to obey is over."""
    episodes = scripts("language_episodes")
    ended = 0
    for seed in range(3):
        env = episodes.Corrected(LongTabletopEnv("gripper"))
        _, info = env.reset(seed=EVALUATION_SEEDS + seed, options={"task": "clear"})
        expert = env.unwrapped.expert(np.random.default_rng(seed))
        over, steps = False, 0
        while not over:
            *_, terminated, truncated, info = env.step(expert.act())
            over, steps = terminated or truncated, steps + 1
        assert info["success"] == terminated
        ended += steps < episodes.CORRECTED_AT + episodes.TIME_TO_OBEY and not info["success"]
    assert ended


def made_up(rates, progress=False):
    """A result for each rate, of 20 episodes on the same scenes."""
    return [
        {
            "episodes": [
                {"seed": i, "task": "reach" if i % 2 else "pick_and_place", "success": i < 20 * rate}
                | ({"progress": 0.5, "plans": 4, "agreed": 3} if progress else {})
                for i in range(20)
            ]
        }
        for rate in rates
    ]


def test_tables_and_figure(scripts, tmp_path):
    report = scripts("language_report")
    answers = [
        {"kind": "colour", "question": "?", "answer": "red", "said": said, "taught": taught}
        for said, taught in (("red", False), ("blue", False), ("red", True))
    ]
    found = {
        "word": {
            "pictures": {
                "named": made_up([1.0, 0.9, 0.9]),
                "taught": made_up([0.8, 0.6]),
                "answers": [{"answers": answers}],
            },
            "robots": {"named": made_up([1.0, 0.9, 0.9]), "taught": [*made_up([0.2]), None]},
        },
        "subtasks": {"subtasks": {"predicted": made_up([0.5], progress=True)}, "flat": {"no plan": [None]}},
        "heads": {"bins": {"natural": made_up([0.95]), "speed": [{"seconds": 0.0123, "tokens": 28}]}},
    }
    text = report.tables({"studies": found})
    lines = text.splitlines()
    taught = next(line for line in lines if "alone | the colour that only pictures name" in line)
    assert "| 20% | 20% [8%, 42%] of 20 | pick_and_place 20%, reach 20% |" in taught
    difference = next(line for line in lines if line.startswith("| robots and pictures with words, the colour that"))
    assert "| +60 [" in difference and ";" not in difference, "the second has no partner"
    assert any("| +0 [+0, +0]; +0 [+0, +0]; +0 [+0, +0] | +0 [" in line for line in lines)
    without = {**found, "word": {**found["word"], "robots": {"named": made_up([1.0, 0.9])}}}
    two = report.tables({"studies": without}).splitlines()
    assert any(line.endswith("| +0 [+0, +0]; +0 [+0, +0] |  |") for line in two), "two trainings have no interval"
    assert "| colour | 100% | 50% of 2 | 100% of 1 |" in lines
    assert report.is_right("<loc03><loc60>", "<loc05><loc61>") and not report.is_right("<loc03>", "<loc03><loc04>")
    assert not report.is_right("<loc03><loc60>", "<loc06><loc60>") and not report.is_right("red", "blue")
    assert any("right words 75%, done 50%" in line for line in lines)
    assert "| bins | 12.3 ms | 28.0 |" in lines
    report.draw({"studies": found}, tmp_path / "language.png")
    assert (tmp_path / "language.png").stat().st_size > 5000
    page = tmp_path / "page.md"
    (tmp_path / "figures").mkdir()
    page.write_text("a\n<!-- results -->\nold\n<!-- end of results -->\nb\n")
    report.into_page(page, text, tmp_path / "language.png")
    assert "old" not in page.read_text() and "figures/language.png" in page.read_text()


def test_commands_name_data_steps_and_seed(scripts, monkeypatch, tmp_path):
    benchmark, cells = scripts("benchmark_language"), scripts("language_cells")
    commands = []
    monkeypatch.setattr(benchmark, "execute", lambda command, log: commands.append(" ".join(command)))
    bench = benchmark.Benchmark(tmp_path, cells.QUICK)
    for training in cells.trainings(cells.QUICK, ("word", "heads")):
        assert not (bench.train(training) / "config.json").exists()
    assert sum("--unnamed purple" in command for command in commands) == 5, (
        "robots' data of every variant, and one variant's pictures"
    )
    trained = [command for command in commands if command.startswith("train.py")]
    assert len(trained) == 10 and all("--config.num_steps=3 --config.seed=0" in command for command in trained)
    assert [command for command in trained if "vocabulary=" in command] == [trained[-1]]
    assert any("train_action_tokenizer.py" in command for command in commands)
    result = bench.result_path(cells.Training("word", "robots", 0), cells.WORD[0])
    assert bench.result(cells.Training("word", "robots", 0), cells.WORD[0]) is None
    benchmark.write_json(result, {"episodes": []})
    assert bench.run(cells.Training("word", "robots", 0), cells.WORD[0]) == {"episodes": []}
    assert json.loads(result.read_text()) == {"episodes": []}


def test_results_are_kept_in_a_file_and_not_made_again(scripts, tmp_path):
    """A workdir that is lost: what the file has counts as finished, with the tables that it gave before."""
    benchmark, cells, kept = scripts("benchmark_language"), scripts("language_cells"), scripts("language_kept")
    settings, studies = dataclasses.replace(cells.QUICK, seeds=2), ("word", "subtasks")
    first = benchmark.Benchmark(tmp_path / "first", settings, kept=kept.Kept(tmp_path / "kept" / "results.json"))
    done = [t for t in cells.trainings(settings, studies) if t.variant in ("pictures", "subtasks")]
    answers = [
        {"kind": "colour", "question": "?", "answer": "red", "said": s, "taught": s == "red"} for s in ("red", "blue")
    ]
    for training in done:
        for test in cells.tests_of(training):
            result = (
                {"answers": answers} if test.kind == "answers" else made_up([0.75], progress=test.kind != "short")[0]
            )
            benchmark.write_json(first.result_path(training, test), {"seconds": 1.0, **result})
        folder = first.folder(training)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "time": 1.0, "val/moves/text/loss": 0.5}) + "\n")
    text = benchmark.write_report(first, studies)
    again = benchmark.Benchmark(tmp_path / "second", settings, kept=kept.Kept(tmp_path / "kept" / "results.json"))
    assert all(again.result(training, test) for training in done for test in cells.tests_of(training))
    assert (
        again.curves(done[0]) == {"text": [[4, 0.5]]} and again.result(done[0], cells.WORD[0])["episodes"][3]["success"]
    )
    assert benchmark.write_report(again, studies) == text
    ran = []
    again.run = lambda training, test: ran.append((training, test))
    benchmark.run_all(again, studies)
    assert {training.variant for training, _ in ran} == {
        "pictures_unnamed",
        "pictures_words",
        "robots",
        "memory",
        "flat",
    }
    other = benchmark.Benchmark(tmp_path / "second", dataclasses.replace(settings, rows=25), kept=again.kept)
    assert other.result(done[0], cells.WORD[0]) is None
