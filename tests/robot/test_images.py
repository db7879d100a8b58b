"""The robot resizes with Pillow what training resizes with its own Lanczos filter: how far the pictures differ."""

import numpy as np
import pytest
from PIL import Image

from octo_like.data.batches import frames
from octo_like.robot.images import resize_image

SIZES = ((256, 256), (224, 224), (128, 128), (64, 64), (97, 131), (640, 800))


def scene(seed: int = 0) -> np.ndarray:
    """A picture (480, 640, 3) like a camera's: smooth shading, objects with sharp edges, a little noise."""
    random = np.random.default_rng(seed)
    shading = random.integers(40, 216, (6, 8, 3), np.uint8)
    image = np.asarray(Image.fromarray(shading).resize((640, 480), Image.Resampling.BICUBIC)).astype(int)
    for _ in range(40):
        y, x, h, w = random.integers(0, (440, 600, 120, 120))
        image[y : y + h, x : x + w] = random.integers(0, 256, 3)
    return np.clip(image + random.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def difference(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    want = frames.resize_frames(image[None], size, "parity")[0]
    return np.abs(resize_image(image, size).astype(int) - want)


@pytest.mark.parametrize("size", SIZES)
def test_a_scene_looks_as_in_training(size):
    """One level for nearly all pixels; more at the corners of saturated objects, most of all when enlarging."""
    levels = difference(scene(), size)
    print(f"480x640 -> {size}: max {levels.max()}, mean {levels.mean():.3f}, above one {(levels > 1).mean():.1e}")
    assert levels.max() <= 24
    assert levels.mean() < 0.3 and (levels > 1).mean() < 2e-3


@pytest.mark.parametrize("size", SIZES)
def test_noise_is_the_worst_case(size):
    """Between black and white pixels the filter overshoots, and Pillow cuts that off after the first axis already."""
    levels = difference(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8), size)
    print(f"noise 480x640 -> {size}: max {levels.max()}, mean {levels.mean():.3f} of 255")
    assert levels.max() <= 48
    assert levels.mean() < 0.6


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_are_resized_independently(channels):
    image = scene()[..., [0, 1, 2, 0][:channels]]
    got = resize_image(image, (60, 80))
    assert got.shape == (60, 80, channels) and got.dtype == np.uint8
    for c in range(channels):
        np.testing.assert_array_equal(got[..., c], resize_image(image[..., [c, c, c]], (60, 80))[..., 0])


def test_views_of_other_arrays_are_resized_too():
    """Cameras give BGR, flipped or cut-out pictures as views without a copy."""
    image = scene()
    for view in (image[..., ::-1], image[::-1], image[:, ::-1], image[100:300, 50:450], image.transpose(1, 0, 2)):
        np.testing.assert_array_equal(resize_image(view, (64, 48)), resize_image(view.copy(), (64, 48)))


def test_a_centre_crop_is_the_middle_of_the_resized_image():
    """Area 0.25 is half of each side; the picture's own middle, stretched, is close to it."""
    image = np.asarray(Image.fromarray(scene()).resize((64, 64), Image.Resampling.BOX))
    cropped = resize_image(image, (64, 64), crop_area=0.25).astype(int)
    rows = 0.25 * 63 + np.arange(64) * 0.5 * 63 / 63  # source positions, corners on corners
    low = np.floor(rows).astype(int)
    part = (rows - low)[:, None]
    vertical = image[low] * (1 - part[..., None]) + image[low + 1] * part[..., None]
    want = vertical[:, low] * (1 - part) + vertical[:, low + 1] * part
    assert np.abs(cropped - want).max() <= 0.51
