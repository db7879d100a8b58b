"""The notebook about released Octo checkpoints runs on a small one in the released format, without TensorFlow."""

from tests.notebooks.kernels import run


def test_the_notebook_loads_a_release(shared, tmp_path, monkeypatch):
    release = shared / "golden" / "octo_tiny_diffusion"
    text, kinds = run("import_octo", tmp_path, monkeypatch, OCTO_RELEASE=release)
    assert "samples, batch, horizon, dimensions: (32, 1, 4, 7)" in text
    assert "equal actions: True" in text and "params.safetensors" in text
    assert kinds.count("image/png") == 1
