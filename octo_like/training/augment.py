"""Image augmentation on the device, inside the step.

Every operation draws on its own; one draw per sample and camera serves all frames of the window and the goal image, so
that they stay one scene. Missing images (pad mask False) are left alone: they mean nothing. A camera's depth map is
shifted, cropped and flipped as its images are, so that both keep showing the same place.

Order: shift, crop, brightness, contrast, saturation, hue, flips. Each colour operation clips to [0, 1].

An augmentation of your own is a dataclass with the method `images`, and with `depth` and `points` where a batch has
them; `Augmentation` is one (docs/extending.md). Other sensors are left alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from octo_like.common.parts import PartError, accepts, find_class, is_own, make, name_of

POINTS_SLOT = "primary"  # the camera in whose picture the batch's points are


class Augmenter(Protocol):
    """What is done to the pictures of one camera. Two calls with the same key make the same change."""

    def images(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """(n, h, w, 3) uint8, all images of one sample: its window, and the goal image last when there is one."""

    def depth(self, depth: jax.Array, key: jax.Array) -> jax.Array:
        """(n, h, w, 1) float32: the sample's depth maps, moved as its pixels are. Needed where a batch has them."""

    def points(
        self, points: jax.Array, known: jax.Array, key: jax.Array, size: tuple[int, int]
    ) -> tuple[jax.Array, jax.Array]:
        """Points (W, K, 2) of the primary camera, columns and rows as fractions of a picture of `size`, and whether
        they are known (W, K): moved as its pixels are. Needed where a batch has them."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Ranges of the operations of one camera; None switches one off.

    Attributes:
      crop_scale: area of the random resized crop relative to the image.
      crop_ratio: its aspect ratio.
      brightness: largest shift, in units of the full range.
      contrast, saturation: ranges of the factors.
      hue: largest shift, in turns.
      flip_left_right, flip_up_down: probabilities. A flipped scene has other right actions and other words for left and
        right: leave them None unless the data is symmetric in that.
      shift: largest shift, in units of the side, by whole pixels; the edge is repeated (Yarats et al. 2021, DrQ).
    """

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    brightness: float | None = None
    contrast: tuple[float, float] | None = None
    saturation: tuple[float, float] | None = None
    hue: float | None = None
    flip_left_right: float | None = None
    flip_up_down: float | None = None
    shift: float | None = None

    @property
    def changes_values(self) -> bool:
        """Whether pixels change, rather than only their places."""
        return any(
            value is not None for value in (self.crop_scale, self.brightness, self.contrast, self.saturation, self.hue)
        )

    def __post_init__(self):
        for field in ("crop_scale", "crop_ratio", "contrast", "saturation"):
            value = getattr(self, field)
            if value is not None and not 0 <= value[0] <= value[1]:
                raise ValueError(f"augmentation: {field} must be (low, high) with 0 <= low <= high, got {value}")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"augmentation: crop_scale must lie in (0, 1], got {self.crop_scale}")
        if self.crop_ratio[0] <= 0:
            raise ValueError(f"augmentation: crop_ratio must be positive, got {self.crop_ratio}")
        for field in ("flip_left_right", "flip_up_down", "shift", "brightness", "hue"):
            value = getattr(self, field)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"augmentation: {field} must be in [0, 1], got {value}")

    def images(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """See `augment_images`."""
        return augment_images(images, key, self)

    def depth(self, depth: jax.Array, key: jax.Array) -> jax.Array:
        """The shift, the crop and the flips of the images that are drawn by the same key."""
        draws = _Draws(key, self)
        depth = draws.shifted(depth)
        if self.crop_scale is not None:
            depth = crop_nearest(depth, draws.box())
        return draws.flipped(depth)

    def points(
        self, points: jax.Array, known: jax.Array, key: jax.Array, size: tuple[int, int]
    ) -> tuple[jax.Array, jax.Array]:
        """The same of points: one that leaves the picture is not known any more."""
        draws = _Draws(key, self)
        points, sides = jnp.asarray(points), jnp.array([size[1], size[0]], jnp.float32)
        if self.shift is not None:
            down, right = draws.moved(size)
            points = points - jnp.stack([right, down]) / sides
        if self.crop_scale is not None:
            top, left, bottom, right = draws.box()
            low, high = jnp.stack([left, top]), jnp.stack([right, bottom])
            # Of indices of pixels, whose first and last are at 0 and 1 of the box (`crop_resize`).
            points = ((points * sides - 0.5 - low * (sides - 1)) / (high - low) + 0.5) / sides
        for axis, flips in draws.flips():
            coordinate = 0 if axis == 2 else 1
            points = jnp.where(flips, points.at[..., coordinate].set(1 - points[..., coordinate]), points)
        return points, known & ((points >= 0) & (points <= 1)).all(-1)


def augmentation_from_config(slot: str, entry: Mapping[str, Any]) -> Augmenter:
    """The augmentation of a camera: fields of `Augmentation`, or "kind" = "module:Class" and its fields.

    Raises:
      PartError: an unknown field, or a class that is no augmentation; names it.
    """
    entry, where = dict(entry), f"augmentation.{slot}"
    kind = entry.pop("kind", None)
    if kind is None:
        return make(Augmentation, entry, where)
    if not is_own(kind):
        raise PartError(f"{where}: unknown kind {kind!r}; valid: 'module:Class' of your own, or none for ours")
    cls = find_class(kind, where)
    if not dataclasses.is_dataclass(cls):
        raise PartError(f"{where}: {name_of(cls)} cannot be an augmentation: it is no dataclass")
    if any(field.name == "kind" for field in dataclasses.fields(cls)):
        raise PartError(
            f"{where}: {name_of(cls)} has a field 'kind', which in a config means something else; rename it"
        )
    for method, count in (("images", 2), ("depth", 2), ("points", 4)):
        found = getattr(cls, method, None)
        if found is None and method == "images":
            raise PartError(f"{where}: {name_of(cls)} cannot be an augmentation: it has no method images")
        if found is not None and not accepts(found, *range(count)):
            raise PartError(f"{where}: {name_of(cls)}: {method} does not take {count} arguments; see docs/extending.md")
    return make(cls, entry, where)


def crop_resize(images: jax.Array, box: jax.Array) -> jax.Array:
    """Bilinear crop of (n, h, w, c) float images to the same size; box (y1, x1, y2, x2) in [0, 1].

    Sample i of a side of length n lies at y1 (n-1) + i (y2-y1): the separable form is two small matrix products.
    """

    def weights(size, low, high):
        positions = low * (size - 1) + jnp.arange(size) * (high - low)
        return jnp.maximum(0.0, 1.0 - jnp.abs(positions[:, None] - jnp.arange(size)[None]))

    rows, cols = weights(images.shape[1], box[0], box[2]), weights(images.shape[2], box[1], box[3])
    return jnp.einsum("yh,nhwc,xw->nyxc", rows, images, cols)


def adjust_contrast(images: jax.Array, factor: jax.Array) -> jax.Array:
    """(x - m) f + m with m each image's spatial mean per channel."""
    mean = images.mean((1, 2), keepdims=True)
    return (images - mean) * factor + mean


def rgb_to_hsv(rgb: jax.Array) -> jax.Array:
    """RGB in [0, 1] to hue (turns), saturation, value."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value, low = rgb.max(-1), rgb.min(-1)
    spread = value - low
    safe = jnp.where(spread > 0, spread, 1.0)
    hue = jnp.where(value == r, (g - b) / safe, jnp.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = jnp.where(spread > 0, hue / 6 % 1.0, 0.0)
    saturation = jnp.where(value > 0, spread / jnp.where(value > 0, value, 1.0), 0.0)
    return jnp.stack([hue, saturation, value], axis=-1)


def hsv_to_rgb(hsv: jax.Array) -> jax.Array:
    """Inverse of `rgb_to_hsv` (Foley et al., the piecewise linear form)."""
    hue, saturation, value = hsv[..., 0:1], hsv[..., 1:2], hsv[..., 2:3]
    k = (jnp.asarray([5.0, 3.0, 1.0]) + hue * 6.0) % 6.0
    return value - value * saturation * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)


def crop_nearest(maps: jax.Array, box: jax.Array) -> jax.Array:
    """(n, h, w, c) cropped as `crop_resize` does, but taking the nearest sample: no value is invented."""

    def positions(size, low, high):
        # Half rounds up, as on a grid of pixels; the last index keeps rounding errors inside.
        return jnp.clip(jnp.floor(low * (size - 1) + jnp.arange(size) * (high - low) + 0.5).astype(int), 0, size - 1)

    return maps[:, positions(maps.shape[1], box[0], box[2])][:, :, positions(maps.shape[2], box[1], box[3])]


@dataclasses.dataclass(frozen=True)
class _Draws:
    """Draws of one sample and camera; every operation has a key of its own."""

    key: jax.Array
    config: Augmentation

    def uniform(self, operation: int, low: jax.Array | float, high: jax.Array | float) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(self.key, operation), (), minval=low, maxval=high)

    def box(self) -> jax.Array:
        """(y1, x1, y2, x2) of the crop. A side that would be longer than the image is cut to it."""
        assert self.config.crop_scale is not None  # who does not crop draws no box
        scale = self.uniform(0, *self.config.crop_scale)
        narrow, wide = self.config.crop_ratio
        ratio = jnp.exp(self.uniform(1, jnp.log(narrow), jnp.log(wide)))
        height, width = jnp.minimum(1.0, jnp.sqrt(scale / ratio)), jnp.minimum(1.0, jnp.sqrt(scale * ratio))
        top, left = self.uniform(2, 0.0, 1.0) * (1 - height), self.uniform(3, 0.0, 1.0) * (1 - width)
        return jnp.stack([top, left, top + height, left + width])

    def shifted(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c), shifted as drawn."""
        if self.config.shift is None:
            return x

        down, right = self.moved((x.shape[1], x.shape[2]))
        rows = jnp.clip(jnp.arange(x.shape[1]) + down, 0, x.shape[1] - 1)
        columns = jnp.clip(jnp.arange(x.shape[2]) + right, 0, x.shape[2] - 1)
        return x[:, rows][:, :, columns]

    def moved(self, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """(rows, columns) by which the window on a picture of `size` moves."""

        def draw(operation, side):
            furthest = round(self.config.shift * side)
            return jax.random.randint(jax.random.fold_in(self.key, operation), (), -furthest, furthest + 1)

        return draw(10, size[0]), draw(11, size[1])

    def flipped(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c), flipped as drawn."""
        for axis, flips in self.flips():
            x = jnp.where(flips, jnp.flip(x, axis), x)
        return x

    def flips(self) -> list[tuple[int, jax.Array]]:
        """(axis of (n, h, w, c), whether it is flipped) of the flips that the config has."""
        both = ((8, self.config.flip_left_right, 2), (9, self.config.flip_up_down, 1))
        return [(axis, self.uniform(i, 0.0, 1.0) < chance) for i, chance, axis in both if chance is not None]


def augment_images(images: jax.Array, key: jax.Array, config: Augmentation) -> jax.Array:
    """All images (n, h, w, 3) uint8 of one sample and camera, with one draw per operation."""
    draws = _Draws(key, config)
    x = draws.shifted(images)
    if not config.changes_values:
        return draws.flipped(x)
    x = x.astype(jnp.float32) / 255.0
    if config.crop_scale is not None:
        x = jnp.clip(crop_resize(x, draws.box()), 0, 1)
    if config.brightness is not None:
        x = jnp.clip(x + draws.uniform(4, -config.brightness, config.brightness), 0, 1)
    if config.contrast is not None:
        x = jnp.clip(adjust_contrast(x, draws.uniform(5, *config.contrast)), 0, 1)
    if config.saturation is not None or config.hue is not None:
        hsv = rgb_to_hsv(x)
        if config.saturation is not None:
            hsv = hsv.at[..., 1].set(jnp.clip(hsv[..., 1] * draws.uniform(6, *config.saturation), 0, 1))
        if config.hue is not None:
            hsv = hsv.at[..., 0].set((hsv[..., 0] + draws.uniform(7, -config.hue, config.hue)) % 1.0)
        x = jnp.clip(hsv_to_rgb(hsv), 0, 1)
    return draws.flipped(jnp.floor(x * 255.5).clip(0, 255).astype(jnp.uint8))


def augment_batch(batch: Mapping[str, Any], augmentation: Mapping[str, Augmenter], keys_b: jax.Array) -> dict[str, Any]:
    """Augments every camera that has an augmentation; cameras are numbered in sorted order. Depth and the places of
    named things move with the pictures.

    Raises:
      ValueError: an augmentation for a camera the batch does not have, or one that gives something else than it got.
    """
    observation, task = dict(batch["observation"]), dict(batch["task"])
    cameras = sorted(key.removeprefix("image_") for key in observation if key.startswith("image_"))
    for slot, config in augmentation.items():
        if slot not in cameras:
            raise ValueError(f"augmentation for camera {slot!r}, but the batch has {cameras}")
        key = f"image_{slot}"
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_b, cameras.index(slot))
        frames, window = observation[key], observation[key].shape[1]
        valid = observation["pad_mask_dict"][key]
        if key in task:
            frames = jnp.concatenate([frames, task[key][:, None]], axis=1)
            valid = jnp.concatenate([valid, task["pad_mask_dict"][key][:, None]], axis=1)
        changed = jax.vmap(_method(config, slot, "images", key))(frames, keys)
        _check_same(changed, frames, config, slot, "images")
        frames = jnp.where(valid[..., None, None, None], changed, frames)
        observation[key] = frames[:, :window]
        if key in task:
            task[key] = frames[:, window]
        if f"depth_{slot}" in observation:
            depth = jnp.asarray(observation[f"depth_{slot}"])
            moved = jax.vmap(_method(config, slot, "depth", f"depth_{slot}"))(depth, keys)
            _check_same(moved, depth, config, slot, "depth")
            observation[f"depth_{slot}"] = moved
        if "points" in batch and slot == POINTS_SLOT:
            move = functools.partial(_method(config, slot, "points", "points"), size=frames.shape[2:4])
            points, known = jax.vmap(move)(batch["points"], batch["points_pad_mask"], keys)
            _check_same(points, jnp.asarray(batch["points"]), config, slot, "points")
            batch = {**batch, "points": points, "points_pad_mask": known}
    return {**batch, "observation": observation, "task": task}


def _method(config: Augmenter, slot: str, method: str, key: str) -> Any:
    found = getattr(config, method, None)
    if found is None:
        raise PartError(
            f"augmentation.{slot}: {name_of(config)} has no method {method}, and the batch has {key!r}: give it one "
            "that moves them as the pixels move, or returns them as they are"
        )
    return found


def _check_same(got: Any, given: jax.Array, config: Augmenter, slot: str, method: str) -> None:
    """Raises PartError when an augmentation changed the shape or dtype of what it was given."""
    if getattr(got, "shape", None) != given.shape or got.dtype != given.dtype:
        found = f"{got.shape[1:]} {got.dtype}" if hasattr(got, "dtype") else f"a {type(got).__name__}"
        raise PartError(
            f"augmentation.{slot}: {name_of(config)}.{method} returned {found}; expected {given.shape[1:]} "
            f"{given.dtype}, as it was given"
        )
