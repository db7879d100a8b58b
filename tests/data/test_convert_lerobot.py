"""Datasets that the real lerobot package writes. `make test-lerobot` installs it (about 8 GB) and runs these."""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

pytest.importorskip("av")

from octo_like.common.schema import BatchSpec, check_batch  # noqa: E402
from octo_like.common.text import TextTokenizer  # noqa: E402
from octo_like.data.convert.lerobot import LeRobot  # noqa: E402
from octo_like.data.convert.write import Options, write_rlds  # noqa: E402
from tests.data import recordings  # noqa: E402
from tests.data.streams import make_train_stream  # noqa: E402
from tests.data.test_convert import read_back  # noqa: E402

PYTHON = os.environ.get("OCTO_LEROBOT_PYTHON")  # an interpreter that has lerobot; several, separated by colons

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="OCTO_LEROBOT_PYTHON names no interpreter with lerobot: make test-lerobot"),
]


@pytest.fixture(scope="module", params=(PYTHON or "").split(":"))
def written(request, tmp_path_factory):
    """(folder that lerobot wrote, the demos in it)."""
    folder = tmp_path_factory.mktemp("lerobot")
    demos = recordings.make_demos(lengths=(19, 8, 31, 12))
    arrays = {f"{key}{n}": value for n, demo in enumerate(demos) for key, value in demo.items()}
    np.savez(folder / "demos.npz", count=len(demos), names=recordings.NAMES, **arrays)
    script = pathlib.Path(__file__).with_name("lerobot_writer.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "PYTHON"))}
    command = [request.param, str(script), str(folder / "demos.npz"), str(folder / "root"), str(recordings.HZ)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "root", demos


def test_actions_are_equal_and_frames_are_of_their_time(written, tmp_path):
    root, demos = written
    directory = write_rlds(LeRobot(root), str(tmp_path), "real", options=Options(encoding="png")).directory
    _, episodes = read_back(directory)
    assert len(episodes) == len(demos)
    for demo, steps in zip(demos, episodes, strict=True):
        np.testing.assert_array_equal([step["action"] for step in steps], demo["action"])
        np.testing.assert_array_equal([step["observation"]["state"] for step in steps], demo["state"])
        assert {step["language_instruction"].decode() for step in steps} == {demo["text"]}
        for key in ("front", "hand"):
            frames = np.stack([step["observation"][key] for step in steps]).astype(int)
            error = np.abs(frames[:, None] - demo[key][None].astype(int)).mean((2, 3, 4))
            assert (error.argmin(1) == np.arange(len(steps))).all(), error.round(1)  # of no other step
            assert np.diag(error).max() < 6  # AV1 at lerobot's own quality


def test_it_trains(written, tmp_path):
    root, _ = written
    write_rlds(LeRobot(root), str(tmp_path), "real")
    spec = BatchSpec(1, 4, 3, {"primary": (32, 32), "wrist": (16, 16)}, (), 3, 16)
    fields = dict(image_keys=dict(primary="front", wrist="hand"), proprio_keys=("state",))
    options = dict(data_dir=str(tmp_path), seed=0, batch_size=8)
    with make_train_stream({"real": fields}, spec, TextTokenizer.load(), **options) as stream:
        check_batch(next(stream), spec)


def test_our_writer_has_its_layout(written, tmp_path):
    """The files that the quick tests write have the paths, columns and types of the package's."""
    import pyarrow.parquet as pq

    root, demos = written
    version = json.loads((root / "meta/info.json").read_text())["codebase_version"]
    ours = tmp_path / "ours"
    (recordings.write_v3 if version.startswith("v3") else recordings.write_v21)(ours, demos)
    mine, its = (json.loads((folder / "meta/info.json").read_text()) for folder in (ours, root))
    for key in ("codebase_version", "data_path", "video_path", "fps", "total_episodes", "total_frames", "chunks_size"):
        assert mine[key] == its[key], key
    for key, feature in its["features"].items():
        assert all(list(mine["features"][key][part] or []) == list(feature[part] or []) for part in ("shape", "names"))
        assert mine["features"][key]["dtype"] == feature["dtype"]
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.suffix in (".parquet", ".mp4", ".jsonl"))
             for f in (ours, root)]  # fmt: skip
    assert set(files[0]) == {path for path in files[1] if "stats" not in path.name}
    for path in (p for p in files[0] if p.suffix == ".parquet"):
        schemas = [{field.name: str(field.type) for field in pq.read_schema(folder / path)} for folder in (ours, root)]
        for name, kind in schemas[0].items():
            assert name in schemas[1], (path, name)
            text = {"string", "large_string"}
            same = kind == schemas[1][name] or {kind, schemas[1][name]} <= text or "list" in kind
            assert same, (path, name, kind, schemas[1][name])
