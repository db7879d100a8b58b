"""Augmentation against tf.image, brute force in NumPy, and its promises: per sample, per operation, one scene."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import BatchSpec, synthetic_batch
from octo_like.training.augment import (
    Augmentation,
    adjust_contrast,
    augment_batch,
    augment_images,
    crop_nearest,
    crop_resize,
    hsv_to_rgb,
    rgb_to_hsv,
)

SPEC = BatchSpec(2, 2, 3, {"primary": (10, 12), "wrist": (6, 6)}, ("primary",), depth_sizes={"primary": (10, 12)})
FULL = Augmentation((0.3, 0.9), (0.8, 1.25), 0.2, (0.7, 1.3), (0.6, 1.4), 0.2, 0.5, 0.5)


def images(seed=0, n=2, size=(9, 11)):
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), np.uint8)


def test_colours_against_tensorflow():
    tf = pytest.importorskip("tensorflow")
    x = jnp.asarray(images(), jnp.float32) / 255
    hsv = rgb_to_hsv(x)
    np.testing.assert_allclose(hsv, tf.image.rgb_to_hsv(np.asarray(x)), atol=2e-6)
    for factor in (0.5, 1.7):
        np.testing.assert_allclose(
            adjust_contrast(x, factor), tf.image.adjust_contrast(np.asarray(x), factor), atol=1e-5
        )
        got = hsv_to_rgb(hsv.at[..., 1].set(jnp.clip(hsv[..., 1] * factor, 0, 1)))
        np.testing.assert_allclose(got, tf.image.adjust_saturation(np.asarray(x), factor), atol=1e-5)
    for shift in (-0.3, 0.05, 0.45):
        got = hsv_to_rgb(hsv.at[..., 0].set((hsv[..., 0] + shift) % 1.0))
        np.testing.assert_allclose(got, tf.image.adjust_hue(np.asarray(x), shift), atol=1e-5)


def test_hue_against_the_standard_library():
    for rgb in np.random.default_rng(1).random((20, 3)):
        np.testing.assert_allclose(rgb_to_hsv(jnp.asarray(rgb)), colorsys.rgb_to_hsv(*rgb), atol=1e-5)


def test_crops_against_tensorflow_and_brute_force():
    tf = pytest.importorskip("tensorflow")
    x = images().astype(np.float32)
    box = np.array([0.1, 0.25, 0.85, 0.95], np.float32)
    want = tf.image.crop_and_resize(x, np.stack([box, box]), [0, 1], (9, 11))
    np.testing.assert_allclose(crop_resize(jnp.asarray(x), jnp.asarray(box)), want, atol=2e-3)
    got = np.asarray(crop_nearest(jnp.asarray(x), jnp.asarray(box)))
    for i in range(9):
        for j in range(11):
            y, z = 0.1 * 8 + i * 0.75, 0.25 * 10 + j * 0.7
            np.testing.assert_array_equal(got[:, i, j], x[:, int(np.floor(y + 0.5)), int(np.floor(z + 0.5))])


def drawn(key, operation, low, high):
    """The documented draw of an operation: its own key, folded from the sample's."""
    return float(jax.random.uniform(jax.random.fold_in(key, operation), (), minval=low, maxval=high))


@pytest.mark.parametrize("seed", range(4))
def test_the_whole_against_a_numpy_twin(seed):
    """All operations on, one pixel at a time in float64 with the standard library's colours."""
    key, raw = jax.random.key(seed), images(seed, 1)
    got = np.asarray(augment_images(jnp.asarray(raw), key, FULL))[0].astype(int)
    scale = drawn(key, 0, 0.3, 0.9)
    ratio = np.exp(drawn(key, 1, np.log(0.8), np.log(1.25)))
    height, width = min(1, np.sqrt(scale / ratio)), min(1, np.sqrt(scale * ratio))
    top, left = drawn(key, 2, 0, 1) * (1 - height), drawn(key, 3, 0, 1) * (1 - width)
    x = raw[0].astype(np.float64) / 255
    h, w = x.shape[:2]
    out = np.zeros_like(x)
    for i in range(h):
        for j in range(w):
            y, z = top * (h - 1) + i * height, left * (w - 1) + j * width
            y0, z0 = min(int(y), h - 2), min(int(z), w - 2)
            a, b = y - y0, z - z0
            out[i, j] = (1 - a) * ((1 - b) * x[y0, z0] + b * x[y0, z0 + 1])
            out[i, j] += a * ((1 - b) * x[y0 + 1, z0] + b * x[y0 + 1, z0 + 1])
    out = np.clip(out + drawn(key, 4, -0.2, 0.2), 0, 1)
    out = np.clip((out - out.mean((0, 1))) * drawn(key, 5, 0.7, 1.3) + out.mean((0, 1)), 0, 1)
    factor, shift = drawn(key, 6, 0.6, 1.4), drawn(key, 7, -0.2, 0.2)
    for i in range(h):
        for j in range(w):
            hue, saturation, value = colorsys.rgb_to_hsv(*out[i, j])
            out[i, j] = colorsys.hsv_to_rgb((hue + shift) % 1, min(saturation * factor, 1), value)
    if drawn(key, 8, 0, 1) < 0.5:
        out = out[:, ::-1]
    if drawn(key, 9, 0, 1) < 0.5:
        out = out[::-1]
    want = np.floor(out * 255.5).clip(0, 255).astype(int)
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 0.02


def test_operations_draw_independently():
    """Over many samples: every pair of operations is uncorrelated, and turning one on does not move another."""
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = np.stack([jax.vmap(lambda k, i=i: jax.random.uniform(jax.random.fold_in(k, i)))(keys) for i in range(12)])
    correlation = np.corrcoef(draws) - np.eye(12)
    assert np.abs(correlation).max() < 0.07  # 4.4 standard deviations of 1/sqrt(4000)
    x, key = jnp.asarray(images()), jax.random.key(3)
    flip = Augmentation(flip_left_right=0.5)
    both = Augmentation(flip_left_right=0.5, brightness=0.0)
    np.testing.assert_array_equal(augment_images(x, key, flip), augment_images(x, key, both))


def test_flips_happen_as_often_as_told():
    x = jnp.asarray(images(0, 1, (2, 3)))
    keys = jax.random.split(jax.random.key(1), 1000)
    out = np.asarray(
        jax.vmap(lambda k: augment_images(x, k, Augmentation(flip_left_right=0.25, flip_up_down=1.0)))(keys)
    )
    raw = np.asarray(x)
    turned = (out == raw[:, ::-1, ::-1]).all((1, 2, 3, 4))
    assert (turned | (out == raw[:, ::-1]).all((1, 2, 3, 4))).all()
    assert abs(turned.mean() - 0.25) < 0.05


def test_shifts_against_brute_force():
    """Every whole number of pixels up to the limit occurs, nothing else, and depth goes along."""
    x = images(0, 2, (10, 20))
    keys = jax.random.split(jax.random.key(1), 400)
    config = Augmentation(shift=0.1)
    out = np.asarray(jax.vmap(lambda k: augment_images(jnp.asarray(x), k, config))(keys))
    depth = np.asarray(jax.vmap(lambda k: config.depth(jnp.asarray(x[..., :1], jnp.float32), k))(keys))
    wide = np.pad(x, ((0, 0), (1, 1), (2, 2), (0, 0)), mode="edge")
    expected = {(i, j): wide[:, i : i + 10, j : j + 20] for i in range(3) for j in range(5)}
    counts = dict.fromkeys(expected, 0)
    for moved, along in zip(out, depth, strict=True):
        (way,) = [way for way, picture in expected.items() if np.array_equal(picture, moved)]
        np.testing.assert_array_equal(along, moved[..., :1])
        counts[way] += 1
    assert min(counts.values()) > 8  # 27 are expected of each; 8 are 3.7 standard deviations fewer
    still = augment_images(jnp.asarray(x), keys[0], Augmentation(shift=0.0))
    np.testing.assert_array_equal(still, x)


def test_a_batch_is_one_scene_per_sample():
    """Same draw across window and goal and depth; other draws for other samples; missing images left alone."""
    batch = synthetic_batch(SPEC, 4)
    frame = batch["observation"]["image_primary"][:, :1]
    batch["observation"]["image_primary"] = np.repeat(frame, 2, axis=1)
    batch["task"]["image_primary"] = frame[:, 0].copy()
    # Depth that repeats the red channel: it must move as the image does.
    batch["observation"]["depth_primary"] = np.repeat(frame[..., :1], 2, axis=1).astype(np.float32)
    batch["observation"]["pad_mask_dict"]["image_primary"][1, 0] = False
    batch["task"]["pad_mask_dict"]["image_primary"][2] = False
    keys = jax.random.split(jax.random.key(0), 4)
    config = {"primary": FULL}
    augment = jax.jit(lambda b, k: augment_batch(b, config, jax.random.wrap_key_data(k)))
    out = augment(batch, jax.random.key_data(keys))
    seen, goal = np.asarray(out["observation"]["image_primary"]), np.asarray(out["task"]["image_primary"])
    np.testing.assert_array_equal(seen[0, 0], seen[0, 1])
    np.testing.assert_array_equal(seen[0, 0], goal[0])
    np.testing.assert_array_equal(seen[1, 0], frame[1, 0])
    np.testing.assert_array_equal(goal[2], frame[2, 0])
    assert (seen[1, 1] != frame[1, 0]).any() and (seen[0] != seen[3]).any()
    np.testing.assert_array_equal(out["observation"]["image_wrist"], batch["observation"]["image_wrist"])
    # A sample's result does not depend on its neighbours or its row.
    rolled = augment(*jax.tree.map(lambda x: np.roll(x, 1, axis=0), (batch, jax.random.key_data(keys))))
    np.testing.assert_array_equal(np.roll(rolled["observation"]["image_primary"], -1, axis=0), seen)
    # Geometry only: with colours off, depth equals the nearest-neighbour crop and flip of the image.
    geometry = Augmentation(shift=0.2, crop_scale=(1.0, 1.0), flip_left_right=0.5, flip_up_down=0.5)
    moved = augment_batch(batch, {"primary": geometry}, keys)["observation"]
    red = np.asarray(moved["image_primary"])[..., :1].astype(np.float32)
    rows = batch["observation"]["pad_mask_dict"]["image_primary"].all(1)
    np.testing.assert_array_equal(np.asarray(moved["depth_primary"])[rows], red[rows])


def test_depth_only_takes_values_it_had():
    depth = jnp.asarray(np.random.default_rng(0).uniform(0.3, 3, (2, 10, 12, 1)), jnp.float32)
    out = np.asarray(FULL.depth(depth, jax.random.key(5)))
    assert set(out.ravel().tolist()) <= set(np.asarray(depth).ravel().tolist())
    assert out.shape == depth.shape and (out != depth).any()


@pytest.mark.parametrize(
    "wrong",
    [dict(crop_scale=(0.0, 1.0)), dict(contrast=(1.2, 0.8)), dict(flip_up_down=2.0), dict(crop_scale=(0.5, 1.5)),
     dict(brightness=-0.1), dict(shift=1.5)],
)  # fmt: skip
def test_ranges_are_checked(wrong):
    with pytest.raises(ValueError, match=f"augmentation: {next(iter(wrong))} must"):
        Augmentation(**wrong)


@pytest.mark.parametrize(
    "options",
    [
        dict(shift=0.2),
        dict(crop_scale=(0.4, 0.9), crop_ratio=(0.8, 1.25)),
        dict(flip_left_right=0.5, flip_up_down=0.5),
        dict(shift=0.1, crop_scale=(0.5, 0.8), flip_left_right=0.5),
    ],
)
def test_points_move_with_the_pixels(options):
    """A bright spot in a dark picture is where the point is, as long as it is in the picture."""
    config, height, width, seen = Augmentation(**options), 40, 60, 0
    rng = np.random.default_rng(0)
    for number in range(40):
        row, column = int(rng.integers(2, height - 2)), int(rng.integers(2, width - 2))
        image = np.zeros((1, height, width, 3), np.uint8)
        image[0, row - 1 : row + 2, column - 1 : column + 2] = 255
        point = np.array([[(column + 0.5) / width, (row + 0.5) / height]], np.float32)
        key = jax.random.key(number)
        moved, known = config.points(point, np.array([True]), key, (height, width))
        after = np.asarray(augment_images(image, key, config))[0, ..., 0].astype(np.float64)
        x, y = float(moved[0, 0]) * width - 0.5, float(moved[0, 1]) * height - 0.5
        if 3 < x < width - 4 and 3 < y < height - 4:
            assert known[0]
            rows, columns = np.nonzero(after > 0)
            weight = after[rows, columns]
            centre = (columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()
            np.testing.assert_allclose(centre, (x, y), atol=0.25)
            seen += 1
        elif not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            assert not known[0]
    assert seen > 15


def test_points_of_a_batch_move_with_the_primary_camera():
    spec = BatchSpec(2, 1, 2, {"primary": (16, 16), "wrist": (16, 16)}, points=("cup",))
    batch = synthetic_batch(spec, 3)
    batch["points"] = np.full((3, 2, 1, 2), 0.3, np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    flips = {"primary": Augmentation(flip_left_right=1.0)}
    np.testing.assert_allclose(augment_batch(batch, flips, keys)["points"][..., 0], 0.7, atol=1e-6)
    other = augment_batch(batch, {"wrist": flips["primary"]}, keys)
    np.testing.assert_array_equal(other["points"], batch["points"])
