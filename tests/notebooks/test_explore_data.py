"""The notebook about data runs from top to bottom on datasets that the test writes."""

import os

from octo_like.data import bench
from tests.notebooks.kernels import run

CONFIG = """
from octo_like.common.defaults import default_config

def get_config():
    config = default_config()
    config.num_steps, config.batch_size = 100, 8
    config.image_sizes = dict(primary=(32, 32), wrist=(16, 16))
    config.goal_images = ("primary",)
    config.proprio_dim = 8
    config.model = dict(heads=dict(action=dict(action_horizon=4, action_dim=7)))
    fields = dict(image_keys=dict(primary="image", wrist="wrist_image"), proprio_keys=("state",))
    config.data.datasets = {f"bench_32x32_{i}": dict(fields, weight=1.0 + i) for i in range(2)}
    return config
"""


def test_the_notebook_runs(tmp_path, monkeypatch):
    bench.make_datasets(str(tmp_path / "data"), 2, size=(32, 32), episodes=3, steps=6)
    (tmp_path / "look.py").write_text(CONFIG)
    settings = {"OCTO_CONFIG": tmp_path / "look.py", "OCTO_DATA": tmp_path / "data", "OCTO_OUTPUT": tmp_path / "out"}
    text, kinds = run("explore_data", tmp_path, monkeypatch, tensorflow=True, **settings)
    assert kinds.count("image/png") == 5, "two sheets, two pairs of histograms, one batch"
    assert "bench_32x32_0" in text and "passes" in text and "put block 1" in text
    assert "observation/image_primary" in text and "(8, 2, 32, 32, 3)" in text and "(8, 2, 4, 7)" in text
    assert "task/language_instruction/input_ids" in text and "actions that count: 0." in text
    assert sorted(os.listdir(tmp_path / "out")) == [
        f"bench_32x32_{i}{end}.png" for i in range(2) for end in ("", "_actions")
    ]
