"""LeRobot's columns of texts: what is being done at every step becomes a sub-task that a policy can learn."""

import json

import numpy as np
import pytest

pytest.importorskip("av")

from octo_like.common.schema import TEXT_KINDS, BatchSpec  # noqa: E402
from octo_like.common.text import TextTokenizer  # noqa: E402
from octo_like.common.vocabularies import Targets  # noqa: E402
from octo_like.data.convert.lerobot import LeRobot  # noqa: E402
from octo_like.data.convert.write import write_rlds  # noqa: E402
from octo_like.data.spec import DataError  # noqa: E402
from tests.data import recordings  # noqa: E402
from tests.data.streams import make_train_stream  # noqa: E402

PHASES = ("reach", "lift it")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    demos = recordings.make_demos()
    return demos, recordings.write_v3(tmp_path_factory.mktemp("lerobot") / "v3", demos, images=True)


@pytest.fixture
def annotated(plain, tmp_path):
    """Gives the dataset another column, of one cell for each row: (name, dtype, cells) -> folder."""
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as pq

    demos, original = plain
    root = tmp_path / "v3"
    shutil.copytree(original, root)
    path = root / "data/chunk-000/file-000.parquet"

    def add(name, dtype, cells):
        pq.write_table(pq.read_table(path).append_column(name, pa.array(cells)), path)
        info = json.loads((root / "meta/info.json").read_text())
        info["features"][name] = {"dtype": dtype, "shape": [1], "names": None}
        (root / "meta/info.json").write_text(json.dumps(info))
        return root

    return demos, add


def with_subtasks(root, texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"subtask_index": list(range(len(texts))), "__index_level_0__": list(texts)})
    pq.write_table(table, root / "meta/subtasks.parquet")


def phase_of(demos):
    """The phase of every row: the first three steps of an episode, and the rest."""
    return [PHASES[step >= 3] for demo in demos for step in range(len(demo["action"]))]


def annotations(demos):
    """All of an episode's annotations in each of its cells, not in their order."""
    cells = []
    for demo in demos:
        rows = [
            {"role": "assistant", "content": PHASES[1], "style": "subtask", "timestamp": 3 / recordings.HZ},
            {"role": "assistant", "content": "first reach, then lift", "style": "plan", "timestamp": 0.0},
            {"role": "assistant", "content": PHASES[0], "style": "subtask", "timestamp": 0.0},
        ]
        cells += [rows] * len(demo["action"])
    return cells


@pytest.mark.parametrize("name", ["subtask", "subtask_index", "language_persistent"])
def test_texts_of_a_step_become_what_is_learned(annotated, tmp_path, name):
    demos, add = annotated
    cells = {
        "subtask": phase_of(demos),
        "subtask_index": [PHASES.index(phase) for phase in phase_of(demos)],
        "language_persistent": annotations(demos),
    }
    dtype = {"subtask": "string", "subtask_index": "int64", "language_persistent": "language"}[name]
    root = add(name, dtype, cells[name])
    if name == "subtask_index":
        with pytest.raises(DataError, match="subtasks.parquet: the file is missing"):
            LeRobot(root)
        with_subtasks(root, PHASES)
    source = LeRobot(root)
    read = [text for number in range(len(source)) for text in source.read(number).texts["subtask"]]
    assert read == phase_of(demos) and not any("subtask" in line for line in source.left_out)
    write_rlds(source, str(tmp_path / "out"), "real")
    spec = BatchSpec(1, 4, 3, {"primary": (32, 32)}, (), 3, 16, text_target=12)
    fields = dict(image_keys=dict(primary="front"), proprio_keys=("state",), text_keys=dict(subtask="subtask"))
    tokenizer = TextTokenizer.load("builtin", 12)
    options = dict(data_dir=str(tmp_path / "out"), seed=0, batch_size=16, targets=Targets(tokenizer))
    with make_train_stream({"real": fields}, spec, TextTokenizer.load(), **options) as stream:
        batch = next(stream)
    said = tokenizer.decode(batch["text_target"]["input_ids"])
    assert set(said) == set(PHASES)
    assert set(batch["text_target_kind"].tolist()) == {TEXT_KINDS.index("subtask") + 1}


def test_episodes_without_annotations_say_nothing(annotated):
    demos, add = annotated
    steps = sum(len(demo["action"]) for demo in demos)
    nothing = [None] * (steps - 1) + [[{"style": "subtask", "content": "now", "timestamp": 0.0}]]
    source = LeRobot(add("language_persistent", "language", nothing))
    texts = [source.read(number).texts["subtask"] for number in range(len(source))]
    assert set(texts[0]) == {""} and texts[-1][-2:] == ("", "now")


@pytest.mark.parametrize("kind", ["numbers", "strings for annotations", "no such sub-task", "twice"])
def test_columns_that_hold_something_else(annotated, kind):
    demos, add = annotated
    steps = len(phase_of(demos))
    if kind == "numbers":
        source, words = LeRobot(add("note", "string", np.arange(steps))), "'note' has no text at step 0, but int"
    elif kind == "no such sub-task":
        root = add("subtask_index", "int64", np.full(steps, 2))
        with_subtasks(root, PHASES)
        source, words = LeRobot(root), "subtask_index 2 is not among the sub-tasks"
    elif kind == "twice":
        add("subtask", "string", phase_of(demos))
        root = add("language_persistent", "language", annotations(demos))
        with pytest.raises(
            DataError, match="sub-tasks in more than one column: subtask, language_persistent; choose one"
        ):
            LeRobot(root)
        with pytest.raises(DataError, match="no sub-tasks in a column 'sub'; .*'subtask'"):
            LeRobot(root, subtasks="sub")
        chosen = LeRobot(root, subtasks="subtask")
        assert "language_persistent: sub-tasks, of which those of subtask were chosen" in chosen.left_out
        assert chosen.read(0) is not None
        return
    else:
        source = LeRobot(add("language_persistent", "language", phase_of(demos)))
        words = "language_persistent at step 0: expected a list of annotations"
    with pytest.raises(DataError, match=words):
        source.read(0)
