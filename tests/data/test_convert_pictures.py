"""Pictures with questions and answers become RLDS; what is wrong is named with file and line."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorflow_datasets", reason="needs the [data] extra")

from octo_like.data.convert.pictures import Pictures, write_pictures  # noqa: E402
from octo_like.data.convert.write import Options  # noqa: E402
from octo_like.data.spec import DataError  # noqa: E402


def picture(path, color, size=(40, 30)):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    picture(root / "img" / "a.jpg", (200, 30, 30))
    picture(root / "img" / "b.png", (30, 30, 200), (24, 24))
    return root


def write(folder, *entries, name="rows.jsonl"):
    (folder / name).write_text("".join(f"{e if isinstance(e, str) else json.dumps(e)}\n" for e in entries))
    return str(folder)


GOOD = {"image": "img/a.jpg", "prompt": "point to the red block", "answer": "<loc21><loc40>", "kind": "point"}
TALK = {
    "id": 7,
    "image": "img/b.png",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat colour\u2028is it?"},
        {"from": "gpt", "value": "blue"},
        {"from": "human", "value": "sure?"},
        {"from": "gpt", "value": "yes "},
    ],
}


def read_back(directory):
    import tensorflow_datasets as tfds

    dataset = tfds.builder_from_directory(directory).as_dataset(split="train")
    rows = [(e["episode_metadata"], list(e["steps"])) for e in tfds.as_numpy(dataset)]
    return sorted(rows, key=lambda row: row[0]["number"])


def test_both_forms_become_rows(folder, tmp_path):
    path = write(folder, GOOD, "", TALK)
    (folder / "more.json").write_text(
        json.dumps([{"image": "img/a.jpg", "question": "what?", "answer": "red"}], indent=1)
    )
    source = Pictures(path)
    written = write_pictures(source, str(tmp_path / "data"), "mine")
    assert written.rows == len(source) == 4 and written.directory == str(tmp_path / "data" / "mine" / "1.0.0")
    rows = read_back(written.directory)
    said = [(s["language_instruction"].decode(), s["answer"].decode()) for _, (s,) in rows]
    assert said == [
        ("what?", "red"),
        ("point to the red block", "<loc21><loc40>"),
        ("what colour is it?", "blue"),
        ("sure?", "yes"),
    ]
    assert [m["kind"] for m, _ in rows] == [b"", b"point", b"", b""]
    assert rows[1][0]["recording"].decode().endswith("rows.jsonl, line 1")
    assert rows[3][0]["recording"].decode().endswith("rows.jsonl, line 3, pair 2")
    images = [s["observation"]["image"] for _, (s,) in rows]
    assert [image.shape for image in images] == [(30, 40, 3)] * 2 + [(24, 24, 3)] * 2
    assert np.abs(images[2].astype(int) - (30, 30, 200)).max() < 4
    for _, (step,) in rows:
        assert step["is_first"] and step["is_last"] and step["is_terminal"] and "action" not in step


def test_pictures_of_one_size(folder, tmp_path):
    written = write_pictures(
        Pictures(write(folder, GOOD, TALK)), str(tmp_path / "data"), "mine", options=Options(image_size=(16, 20))
    )
    assert {s["observation"]["image"].shape for _, (s,) in read_back(written.directory)} == {(16, 20, 3)}


@pytest.mark.parametrize(
    "entry,message",
    [
        ('{"image": "img/a.jpg", ', "rows.jsonl, line 2: broken JSON"),
        ('"text"', "line 2: expected an object with an image, got str"),
        (GOOD | {"image": "img/none.jpg"}, "line 2: there is no image 'img/none.jpg'"),
        (GOOD | {"image": "../secret.jpg"}, "line 2: the image '../secret.jpg' is outside of the folder"),
        (GOOD | {"image": "/etc/passwd"}, "line 2: the image '/etc/passwd' is outside of the folder"),
        (GOOD | {"image": "img"}, "line 2: there is no image 'img'"),
        (GOOD | {"image": 3}, "line 2: image is int, not text"),
        ({"prompt": "a", "answer": "b"}, "line 2: no 'image'; it has 'prompt', 'answer'"),
        (GOOD | {"answer": ""}, "line 2: the answer is empty"),
        (GOOD | {"answer": " <image> "}, "line 2: the answer is empty"),
        (GOOD | {"answer": ["red"]}, "line 2: answer is list, not text"),
        (
            GOOD | {"answer": "<loc21><loc64>"},
            "line 2: answer: '<loc64>' is no location token; valid: <loc00> to <loc63>",
        ),
        (GOOD | {"prompt": "at <loc-1>?"}, "line 2: prompt: '<loc-1>' is no location token"),
        (GOOD | {"question": "what?"}, "line 2: both 'prompt' and 'question'"),
        ({"image": "img/a.jpg", "promt": "a", "answer": "b"}, "line 2: no 'prompt'; did you mean 'promt'"),
        ({"image": "img/a.jpg", "prompt": "a"}, "line 2: no 'answer'"),
        (TALK | {"conversations": TALK["conversations"][:1]}, "line 2: 'conversations' are pairs of turns"),
        (TALK | {"conversations": []}, "line 2: 'conversations' are pairs of turns"),
        (TALK | {"conversations": TALK["conversations"][1:3]}, "line 2: turn 1 is .*expected 'from' 'human'"),
        (
            TALK | {"conversations": [TALK["conversations"][0], {"from": "gpt", "value": ""}]},
            "pair 1: the answer is empty",
        ),
    ],
)
def test_what_is_wrong_is_named(folder, entry, message):
    (folder.parent / "secret.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=message) as error:
        Pictures(write(folder, GOOD, entry))
    assert "rows.jsonl" in str(error.value)


def test_a_broken_list_and_nothing_at_all(folder):
    with pytest.raises(DataError, match=r"no \*.jsonl or \*.json files"):
        Pictures(str(folder))
    with pytest.raises(DataError, match="no rows in rows.jsonl"):
        Pictures(write(folder, ""))
    with pytest.raises(DataError, match="rows.jsonl, line 3: broken JSON"):
        Pictures(write(folder, "[", json.dumps(GOOD), "oops]"))
    with pytest.raises(DataError, match="rows.jsonl, entry 1: no 'image'"):
        Pictures(write(folder, json.dumps([GOOD, {}])))
    (folder / "rows.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="rows.jsonl: cannot be read"):
        Pictures(str(folder))


def test_a_broken_image_is_an_error_or_left_out(folder, tmp_path):
    (folder / "img" / "bad.jpg").write_bytes((folder / "img" / "a.jpg").read_bytes()[:100])
    (folder / "img" / "text.jpg").write_text("no image")
    source = Pictures(write(folder, GOOD, GOOD | {"image": "img/text.jpg"}, GOOD | {"image": "img/bad.jpg"}))
    with pytest.raises(DataError, match="line 2, image 'text.jpg': is not an image"):
        write_pictures(source, str(tmp_path / "data"), "mine")
    assert not (tmp_path / "data" / "mine").exists(), "whole or not at all"
    written = write_pictures(source, str(tmp_path / "data"), "mine", options=Options(skip_broken=True))
    assert written.rows == 1 and ["line 2" in written.broken[0], "line 3" in written.broken[1]] == [True, True]
    with pytest.raises(DataError, match="exists: give another name"):
        write_pictures(source, str(tmp_path / "data"), "mine")


def test_rows_that_cannot_be_read_are_left_out_and_fields_that_mean_nothing_counted(folder, tmp_path):
    """As LLaVA's file: rows without a picture, numbers of rows, models' names; beside it a file that is no list."""
    (folder / "about.json").write_text('{\n "made": "today"\n}')
    bare = {"conversations": TALK["conversations"], "id": 2}
    write(folder, GOOD | {"id": 1}, bare, "{oops", GOOD | {"boxes": [[0, 0, 1, 1]]}, TALK | {"id": 3})
    with pytest.raises(DataError, match="about.json, line 1: no 'image'; it has 'made'"):
        Pictures(str(folder))
    source = Pictures(str(folder), skip_broken=True)
    assert len(source) == 3 and source.unread == {"id": 2}
    what = ("about.json, line 1: no", "line 2: no 'image'", "line 3: broken JSON", "line 4: 'boxes' would be lost: say")
    for message, wanted in zip(source.broken, what, strict=True):
        assert wanted in message
    written = write_pictures(source, str(tmp_path / "data"), "mine", options=Options(skip_broken=True))
    assert written.rows == 3 and written.broken == source.broken
    with pytest.raises(DataError, match="no rows in only.jsonl; .*only.jsonl, line 1: no 'image'"):
        (folder / "only.jsonl").write_text("{}")
        Pictures(str(folder / "only.jsonl"), skip_broken=True)


def test_the_command(folder, tmp_path, repository, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("convert_demos", repository / "scripts" / "convert_demos.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_demos.py", *map(str, arguments)])
        return script.main()

    write(folder, GOOD, TALK)
    assert run("--from", "pictures", folder, "--to", tmp_path / "data") == 0
    out = capsys.readouterr().out
    assert "3 rows" in out and (tmp_path / "data" / "pictures_preview.png").is_file()
    assert len(read_back(tmp_path / "data" / "pictures" / "1.0.0")) == 3
    assert run("--from", "pictures", folder, "--to", tmp_path / "data", "--control_hz", 5) == 1
    assert "--control_hz do not apply" in capsys.readouterr().err
    write(folder, GOOD | {"answer": ""})
    assert run("--from", "pictures", folder, "--to", tmp_path / "data", "--overwrite") == 1
    assert "line 1: the answer is empty" in capsys.readouterr().err
