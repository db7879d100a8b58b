"""Decoding and resizing against reference values, PIL, and each other."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from octo_like.data import frames
from octo_like.data.spec import DataError

EXCERPT = pathlib.Path(__file__).resolve().parent.parent / "golden" / "pipeline_excerpt.npz"


def encode(image, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def smooth_image(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def test_lanczos_matches_the_reference():
    golden = np.load(EXCERPT)
    cases = [key for key in golden.files if "/upstream/lanczos3_" in key and "float" not in key]
    assert len(cases) >= 4
    for key in cases:
        image = golden[key.split("/upstream")[0] + "/in/image"]
        size = tuple(int(n) for n in key.rsplit("_", 1)[1].split("x"))
        got = frames.resize_frames(image[None], size, "parity")[0].astype(int)
        assert np.abs(got - golden[key].astype(int)).max() <= 1, key


def test_decoding_matches_the_reference(shared):
    golden = np.load(shared / "golden" / "pipeline.npz")
    contents = golden["bridge/train/record0/image_0_step0_jpeg"].tobytes()
    decoded = frames.decode_frames([contents], (64, 64))[0]
    np.testing.assert_array_equal(decoded, golden["bridge/train/record0/image_0_step0_decoded/upstream"])
    small = frames.decode_frames([contents], (48, 40))[0].astype(int)
    want = golden["bridge/train/record0/image_0_step0_resized_48x40/upstream"].astype(int)
    assert np.abs(small - want).max() <= 1


@pytest.mark.parametrize("mode", frames.MODES)
def test_png_is_exact_and_formats_mix_in_one_call(mode):
    a, b = smooth_image(30, 50), smooth_image(64, 48, 1)
    grey = a[..., 0]
    got = frames.decode_frames([encode(a, "png"), encode(grey, "png"), encode(b, "jpeg", quality=95)], (30, 50), mode)
    assert got.shape == (3, 30, 50, 3) and got.dtype == np.uint8
    np.testing.assert_array_equal(got[0], a)
    np.testing.assert_array_equal(got[1], np.repeat(grey[..., None], 3, -1))
    want = np.asarray(Image.fromarray(b).resize((50, 30), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(got[2] - want).mean() < 4


def test_fast_is_close_to_parity():
    image = smooth_image(480, 640)
    contents = [encode(image, "jpeg", quality=95)]
    for size in ((128, 128), (240, 320), (256, 256), (480, 640), (500, 700)):
        fast, parity = (frames.decode_frames(contents, size, mode)[0].astype(int) for mode in ("fast", "parity"))
        assert np.abs(fast - parity).mean() < 2, size


def test_no_frames():
    assert frames.decode_frames([], (8, 9)).shape == (0, 8, 9, 3)


@pytest.mark.parametrize("mode", frames.MODES)
@pytest.mark.parametrize("garbage", [b"", b"garbage", b"\xff\xd8\xff\xe0 cut"])
def test_garbage_is_found(mode, garbage):
    good = encode(smooth_image(16, 16), "jpeg")
    with pytest.raises(frames.FrameError, match="not a decodable image") as caught:
        frames.decode_frames([good, good, garbage, good], (16, 16), mode)
    assert caught.value.position == 2


def test_a_truncated_jpeg_is_found():
    good = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "jpeg", quality=95)
    with pytest.raises(frames.FrameError) as caught:
        frames.decode_frames([good, good[: len(good) // 2]], (64, 64))
    assert caught.value.position == 1


def test_unknown_mode():
    with pytest.raises(DataError, match="'quick'.*fast, parity"):
        frames.decode_frames([], (8, 8), "quick")
