"""The input benchmark and the pictures of the data, run as a user runs them, on datasets that they make themselves."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from octo_like.data import bench
from octo_like.data.order.order import DatasetFrames, Order

ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch, capsys, name, *arguments):
    """A script's output, run in this process: importing TensorFlow takes longer than all the rest."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main() == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("bench")
    bench.make_datasets(str(data_dir), 2, size=(32, 48), episodes=4, steps=8)
    return data_dir


def test_bench_input_reports_everything(made, monkeypatch, capsys):
    out = run(
        *(monkeypatch, capsys, "bench_input", "--data_dir", made, "--make", "2", "--raw", "32x48", "--episodes", "4"),
        *("--sizes", "primary=32x48", "wrist=16x16", "--decode", "fast", "--batch_size", "16"),
        *("--seconds", "0.1", "--rounds", "2", "--threads", "1", "--memory_seconds", "0.1"),
    )
    result = json.loads(out.splitlines()[-1])
    assert result["datasets"] == 2 and result["decode"] == "fast"
    for key in ("samples_per_s", "decodes_per_s", "floor_plain_per_s", "floor_own_per_s", "floor_resized_per_s"):
        assert result[key] > 0
    # Two cameras, two steps each, and a goal for half of the samples; steps before the beginning are decoded once.
    assert 3 < result["decodes_per_sample"] < 6
    assert result["rss_peak_gb"] >= result["rss_base_gb"] > 0 and result["first_batch_s"] > 0
    assert 0 < result["distinct_ratio"] < 2


def test_show_data_makes_a_page(made, tmp_path, monkeypatch, capsys):
    fields = ("--set", 'image_keys={"primary": "image"}', "action_key=action")
    out = run(
        *(monkeypatch, capsys, "show_data", "--data_dir", made, "bench_32x48_0", "bench_32x48_1", "--output", tmp_path),
        *("--episodes", "2", "--samples", "1000", *fields),
    )
    assert "passes" in out
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "put block 1 into bin" in page and "action[6]" in page
    for name in ("bench_32x48_0", "bench_32x48_1"):
        for end in ("", "_actions"):
            assert (tmp_path / f"{name}{end}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_simulated_buffer_against_extremes():
    """A buffer of one frame keeps episodes together; one that holds everything samples episodes uniformly."""
    frames = np.full(200, 50)
    order = Order([DatasetFrames("a", 1.0, frames)], seed=0, batch_size=10)
    assert bench.distinct_in_buffer(order, 1) == pytest.approx(20.5, abs=1)  # 1,000 frames touch 20 or 21 episodes
    # Balls into bins: 1,000 draws over 200 episodes leave 200 (1 - 1/200)^1000 of them out.
    want = 200 * (1 - (1 - 1 / 200) ** 1000)
    assert bench.distinct_in_buffer(order, 9000) == pytest.approx(want, rel=0.02)
    assert bench.distinct_in_order(order) == pytest.approx(want, rel=0.02)
    assert bench.frames_held(order) == 200 * 50


def test_floors_decode_what_they_say(made):
    """Each floor does run its operations: garbage among the frames stops it, in every kind."""
    import tensorflow as tf

    good = bench_frame()
    for kind in ("plain", "own", "resized"):
        assert bench.floor([(good, (16, 24))] * 3, kind, "fast", 1)() == 3
        with pytest.raises(tf.errors.InvalidArgumentError):
            bench.floor([(good, (16, 24)), (b"garbage", (16, 24))], kind, "fast", 1)()


def bench_frame():
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(bench.picture(32, 48, np.random.default_rng(0))).save(buffer, "jpeg")
    return buffer.getvalue()
