"""Questions about demonstrations: who may be asked what, by hand, and from a dataset to a dataset."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from octo_like.data.convert.questions import PROMPTS, questions
from octo_like.data.motions import Motion
from tests.data import said

UP = (Motion(0, 0.5, "up", "down"),)


def all_of(instructions, **options):
    """Every question that some seed asks."""
    return {q for seed in range(60) for q in questions(instructions, np.random.default_rng(seed), count=4, **options)}


def test_what_is_asked_about_which_step():
    instructions = ["put it there."] * 9
    places = np.concatenate([np.arange(5.0), np.arange(3, -1, -1.0)])[:, None]
    subtasks = ["go"] * 4 + [""] + ["come back"] * 4
    asked = all_of(instructions, subtasks=subtasks, places_td=places, motions=UP, steps_ahead=2)
    steps = lambda kind, answer: {q.step for q in asked if (q.kind, q.answer) == (kind, answer)}  # noqa: E731
    assert steps("task", "put it there") == {2, 3, 4, 5, 6, 7}  # from a quarter on, and not when it is done
    assert steps("done", "no") == {0, 1, 2, 3, 4} and steps("done", "yes") == {8}
    assert steps("next", "go") == {0, 1, 2, 3} and steps("next", "come back") == {5, 6, 7, 8}
    assert (
        steps("motion", "up") == {0, 1, 2}
        and steps("motion", "stay") == {3}
        and steps("motion", "down") == {4, 5, 6, 7}
    )
    assert len({(q.kind, q.answer) for q in asked}) == 8
    for q in asked:
        assert q.prompt in {prompt.format(task="put it there") for prompt in PROMPTS[q.kind]}


def test_what_cannot_be_answered_is_not_asked():
    assert all_of([""] * 5, subtasks=["go"] * 5) == set()
    only = all_of(["", "", "push", "", ""])
    assert {(q.step, q.kind, q.answer) for q in only} == {(2, "task", "push"), (2, "done", "no")}
    assert {q.kind for q in all_of(["push"] * 5)} == {"task", "done"}
    assert {q.kind for q in all_of(["push"] * 5, finished=False)} == {"task"}
    assert all_of(["push"]) == set()  # one picture: nothing goes on in it
    assert questions([], np.random.default_rng(0), count=3) == []


def test_a_question_is_asked_once_and_kinds_take_turns():
    many = questions(["push"] * 40, np.random.default_rng(0), count=20, subtasks=["go"] * 40)
    assert len({(q.kind, q.step) for q in many}) == len(many)
    kinds = [q.kind for q in many]
    assert set(kinds[:3]) == {"task", "done", "next"} and min(kinds.count(kind) for kind in set(kinds)) >= 4


def test_from_a_dataset_to_a_dataset(tmp_path, repository):
    """ask_demos, then convert_demos: what the pictures of the new dataset show is what their answers say."""
    import tensorflow_datasets as tfds

    said.build(tmp_path, "moves", said.make_moves(12))

    def run(script, *arguments, check=True):
        command = [sys.executable, repository / "scripts" / f"{script}.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=check, cwd=repository)

    ask = ("ask_demos", "moves", "--data_dir", tmp_path, "--output", tmp_path / "asked", "--image_size", 32, 32)
    chosen = ("--set", 'image_keys={"primary": "image"}', 'text_keys={"subtask": "subtask"}', "val_fraction=0")
    done = run(*ask, "--questions", 6, *chosen)
    rows = [json.loads(line) for line in (tmp_path / "asked/rows.jsonl").read_text().splitlines()]
    assert f"{len(rows)} rows in" in done.stdout and len(rows) > 20
    assert Image.open(tmp_path / "asked/sheet.png").width > 300
    assert {row["kind"] for row in rows} == {"task", "done", "next"}
    for row in rows:
        late = np.asarray(Image.open(tmp_path / "asked" / row["image"]))[..., 2].max() == 200
        if row["kind"] == "next":
            assert row["answer"] == ("push the block" if late else "reach for the block")
        if row["answer"] == "yes":
            assert late
    run("convert_demos", tmp_path / "asked", "--from", "pictures", "--to", tmp_path, "--name", "asked_moves")
    found = tfds.as_numpy(tfds.builder_from_directory(tmp_path / "asked_moves/1.0.0").as_dataset(split="train"))
    assert sorted(step["answer"].decode() for e in found for step in e["steps"]) == sorted(r["answer"] for r in rows)
    again = run(*ask, *chosen, check=False)
    assert again.returncode == 2 and "is there already" in again.stderr
    other = ("ask_demos", "moves", "--data_dir", tmp_path, "--output", tmp_path / "other")
    wrist = run(*other, *chosen, "--camera", "wrist", check=False)
    assert wrist.returncode == 1 and "moves: no camera 'wrist'; valid: primary" in wrist.stderr
    nothing = run(*other, *chosen, "--set", "language_key=None", check=False)
    assert nothing.returncode == 1 and "moves: no question can be asked" in nothing.stderr
    assert not [path for path in tmp_path.iterdir() if "other" in path.name]


@pytest.mark.parametrize("motion", ["0:0.1:up", "z:0.1:up:down"])
def test_a_motion_that_is_none(motion, repository):
    command = [
        sys.executable,
        repository / "scripts/ask_demos.py",
        "--data_dir",
        "d",
        "--output",
        "o",
        "--motion",
        motion,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert done.returncode == 2 and "expected ENTRY:THRESHOLD:MORE:LESS" in done.stderr
