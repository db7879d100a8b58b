"""Decoding and resizing against reference values, PIL, and each other."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from octo_like.data.batches import frames, resample
from octo_like.data.settings import MODES
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


@pytest.mark.parametrize("mode", MODES)
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


SIZES = [
    ((256, 256), (128, 128)),
    ((48, 64), (32, 32)),
    ((45, 80), (28, 28)),
    ((48, 64), (25, 25)),  # no two sides with a short common ratio
    ((47, 61), (41, 37)),
    ((16, 12), (40, 50)),
    ((30, 20), (30, 11)),
    ((30, 20), (7, 20)),
    ((7, 5), (3, 11)),
]


@pytest.mark.parametrize("kernel", ["lanczos3", "triangle"])
def test_resampling_equals_tensorflow(kernel):
    """The banded products against tf.image.resize: float32 rounding apart, and that seldom changes a grey level."""
    tf = pytest.importorskip("tensorflow")
    method = {"lanczos3": "lanczos3", "triangle": "bilinear"}[kernel]
    differ = total = 0
    for raw, size in SIZES:
        image = np.random.default_rng(raw[0]).integers(0, 256, (*raw, 3), np.uint8)
        want = tf.image.resize(image, size, method=method, antialias=True).numpy()
        np.testing.assert_allclose(resample.resample(image, size, kernel), want, atol=2e-3, err_msg=f"{raw} {size}")
        got = frames.resize_frames(image[None], size, {"lanczos3": "parity", "triangle": "fast"}[kernel])[0]
        rounded = np.clip(np.rint(want), 0, 255).astype(int)
        assert np.abs(got - rounded).max() <= 1
        differ, total = differ + (got != rounded).sum(), total + got.size
    # The triangle's weights are short fractions, so that exact halves are common and fall either way.
    assert differ <= {"lanczos3": 2e-4, "triangle": 2e-3}[kernel] * total


def test_weights_against_their_definition():
    """The banded form against the whole matrix written out with loops, for every pair of small sizes."""
    for kernel, (function, radius) in resample.KERNELS.items():
        for n in (1, 2, 5, 8, 12):
            for m in (1, 3, 8, 12, 40):
                dense = np.zeros((m, n))
                for i in range(m):
                    for j in range(n):
                        distance = (j + 0.5 - (i + 0.5) * n / m) / max(n / m, 1)
                        dense[i, j] = float(function(np.array(distance))) if abs(distance) < radius else 0.0
                dense /= dense.sum(1, keepdims=True)
                column = np.random.default_rng(n * m).normal(size=(n, 1, 1))
                got = resample.resample(column, (m, 1), kernel)[:, 0, 0]
                np.testing.assert_allclose(got, dense @ column[:, 0, 0], atol=1e-5, err_msg=f"{kernel} {n} {m}")


def test_threads_do_not_share_buffers():
    import concurrent.futures

    images = [smooth_image(48, 64, seed) for seed in range(16)]
    alone = [frames.resize_frames(image[None], (25, 32))[0] for image in images]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda image: frames.resize_frames(image[None], (25, 32))[0], images))
            assert all((a == b).all() for a, b in zip(alone, together, strict=True))


def test_fast_png_is_antialiased():
    """Stripes one pixel wide become grey when they are made smaller; without antialiasing they would alias."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    fast = frames.decode_frames([encode(stripes, "png")], (17, 17), "fast")[0]
    assert fast[:, 1:-1].min() > 110 and fast[:, 1:-1].max() < 145


def test_the_error_of_fast_mode_on_textures():
    """The numbers in the module's docstring: mean difference to parity on pictures as sharp as a camera's."""
    from octo_like.data.bench import picture

    image = picture(480, 640, np.random.default_rng(0))
    contents = [encode(image, "jpeg", quality=92)]
    for size in ((128, 128), (224, 224), (256, 256)):
        fast, parity = (frames.decode_frames(contents, size, mode)[0].astype(int) for mode in ("fast", "parity"))
        assert np.abs(fast - parity).mean() < 2, size


# ---------------------------------------------------------------- depth


def test_nearest_against_brute_force():
    for n, m in [(7, 3), (3, 7), (480, 256), (5, 5)]:
        rows, _ = frames.nearest((n, n), (m, m))
        assert rows[:, 0].tolist() == [int(np.floor((i + 0.5) * n / m)) for i in range(m)]


def test_depth_keeps_values_and_becomes_metres():
    rng = np.random.default_rng(0)
    millimetres = rng.integers(0, 65536, (12, 20), np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(millimetres).save(buffer, "png")
    got = frames.decode_depth(buffer.getvalue(), (12, 20), None)
    assert got.shape == (12, 20, 1) and got.dtype == np.float32
    np.testing.assert_allclose(got[..., 0], millimetres / 1000.0, rtol=1e-6)
    small = frames.decode_depth(buffer.getvalue(), (5, 7), 1 / 1024)
    assert set(small.ravel()) <= set((millimetres / 1024.0).astype(np.float32).ravel())
    np.testing.assert_array_equal(small, frames.resize_depth(millimetres[..., None], (5, 7), 1 / 1024))
    # TFDS keeps a float32 image as a PNG of four bytes per number.
    metres = rng.uniform(0.1, 5, (12, 20)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(metres.view(np.uint8).reshape(12, 20, 4), "RGBA").save(buffer, "png")
    np.testing.assert_array_equal(frames.decode_depth(buffer.getvalue(), (12, 20), None)[..., 0], metres)
    metres[3, 4], metres[5, 6] = np.nan, np.inf
    raw = frames.resize_depth(metres, (12, 20), None)[..., 0]
    assert raw[3, 4] == raw[5, 6] == 0 and raw[0, 0] == metres[0, 0]
    eight = rng.integers(0, 256, (6, 6), np.uint8)
    np.testing.assert_allclose(frames.decode_depth(encode(eight, "png"), (6, 6), 0.02)[..., 0], eight * 0.02, rtol=1e-6)


def test_what_is_no_depth_map():
    with pytest.raises(frames.FrameError, match="8 bits, colour type 2; valid: grey, or float32"):
        frames.decode_depth(encode(smooth_image(8, 8), "png"), (8, 8), None)
    with pytest.raises(frames.FrameError, match="not a decodable depth map"):
        frames.decode_depth(b"garbage", (8, 8), None)


def test_no_frames():
    assert frames.decode_frames([], (8, 9)).shape == (0, 8, 9, 3)


@pytest.mark.parametrize("mode", MODES)
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


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_a_depth_png_cut_anywhere_is_one_error(kind):
    """No truncation of a PNG, however short, is another error than FrameError, or is taken for a whole image."""
    depth = np.random.default_rng(0).integers(0, 200, (5, 4))
    if kind == "float32":
        picture = Image.fromarray(depth.astype("<f4").view(np.uint8).reshape(5, 4, 4), "RGBA")
    else:
        picture = Image.fromarray(depth.astype(kind))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    whole = buffer.getvalue()
    want = frames.decode_depth(whole, (5, 4), 1.0)
    pixels_end = whole.index(b"IEND") - 4
    for length in range(len(whole)):
        try:
            got = frames.decode_depth(whole[:length], (5, 4), 1.0)
        except frames.FrameError as error:
            assert "not a d" in str(error)
        else:
            assert length >= pixels_end - 4  # all pixels are there
            np.testing.assert_array_equal(got, want)
