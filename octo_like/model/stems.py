"""Image encoders: (N, h, w, C) uint8 pixels to (N, h', w', F) features."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalize_images(images: jax.Array, kind: Literal["default", "imagenet"] = "default") -> jax.Array:
    """uint8 RGB (stacked along channels) to float32: [-1, 1] ("default") or standardised by ImageNet's statistics."""
    if kind == "default":
        return images.astype(jnp.float32) / 127.5 - 1.0
    if kind == "imagenet":
        stacked = images.shape[-1] // 3
        return (images.astype(jnp.float32) / 255.0 - np.tile(IMAGENET_MEAN, stacked)) / np.tile(IMAGENET_STD, stacked)
    raise ValueError(f"unknown image normalisation {kind!r}; valid: 'default', 'imagenet'")


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Cross-correlation, NHWC with an HWIO kernel, the same padding on every side.

    A patch convolution (kernel = stride, no padding) is a reshape and one matrix product: every backend runs that well.
    """
    kh, kw, cin, cout = kernel.shape
    n, h, w, _ = x.shape
    if kh == kw == stride and padding == 0 and h % stride == 0 and w % stride == 0:
        patches = x.reshape(n, h // stride, stride, w // stride, stride, cin).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(n, h // stride, w // stride, kh * kw * cin) @ kernel.reshape(-1, cout)
    pad = ((padding, padding),) * 2
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Conv(nn.Module):
    """Convolution with bias, optionally with a standardised kernel (Qiao et al. 2019, weight standardization)."""

    features: int
    kernel_size: int
    stride: int
    padding: int = 0
    standardize: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        if self.standardize:
            kernel = kernel - kernel.mean((0, 1, 2))
            kernel = kernel / (kernel.std((0, 1, 2)) + 1e-5)
        out = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        return out + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) with epsilon 1e-6, as one multiply-add per pixel.

    Per-channel sums are taken first and groups are formed on the small (N, C) result; normalising through a (C/g, g)
    reshape of the image costs ten times more on CPU.
    """

    num_groups: int = 32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        n, h, w, channels = x.shape
        if channels % self.num_groups:
            raise ValueError(
                f"{channels} channels are not divisible by {self.num_groups} groups; use multiples of them"
            )
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        per_group = channels // self.num_groups
        x32 = x.astype(jnp.float32)
        # Centring per channel first keeps E[x^2]-E[x]^2 accurate when a channel's mean is large.
        channel_mean = jax.lax.stop_gradient(x32.mean((1, 2)))
        y = x32 - channel_mean[:, None, None]

        def group_mean(per_channel):
            grouped = per_channel.reshape(n, self.num_groups, per_group).mean(-1)
            return jnp.repeat(grouped, per_group, axis=-1)

        first, second = y.mean((1, 2)), (y * y).mean((1, 2))
        mean = group_mean(first + channel_mean)
        offset = mean - channel_mean
        variance = group_mean(second - 2 * offset * first + offset**2)
        multiplier = jax.lax.rsqrt(variance + self.epsilon) * scale
        out = y * multiplier[:, None, None] + (bias - offset * multiplier)[:, None, None]
        return out.astype(x.dtype)


class Film(nn.Module):
    """Feature-wise linear modulation (Perez et al. 2018): x * (1 + a(c)) + b(c), zero at initialisation."""

    @nn.compact
    def __call__(self, x, condition):
        zero = nn.initializers.zeros_init()
        a = nn.Dense(x.shape[-1], kernel_init=zero, name="Dense_0", dtype=x.dtype)(condition)
        b = nn.Dense(x.shape[-1], kernel_init=zero, name="Dense_1", dtype=x.dtype)(condition)
        return x * (1 + a[:, None, None]) + b[:, None, None]


class SmallStem(nn.Module):
    """Four stride-2 standardised convolutions and a patch embedding (early convolutions help: Xiao et al. 2021)."""

    patch_size: int = 16
    features: tuple[int, ...] = (32, 96, 192, 384)
    num_features: int = 512
    use_film: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, condition=None):
        for i, width in enumerate(self.features):
            x = Conv(width, 3, 2, 1, standardize=True, dtype=self.dtype, name=f"StdConv_{i}")(x)
            x = jax.nn.relu(GroupNorm(name=f"GroupNorm_{i}")(x))
        patch = self.patch_size // 2 ** len(self.features)
        x = Conv(self.num_features, patch, patch, dtype=self.dtype, name="embedding")(x)
        return Film(name="FilmConditioning_0")(x, condition) if self.use_film else x


class PatchStem(nn.Module):
    """One convolution with kernel = stride = patch size (ViT, Dosovitskiy et al. 2021)."""

    patch_size: int = 32
    num_features: int = 512
    use_film: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, condition=None):
        x = Conv(self.num_features, self.patch_size, self.patch_size, dtype=self.dtype, name="embedding")(x)
        return Film(name="FilmConditioning_0")(x, condition) if self.use_film else x


def with_coordinates(x: jax.Array) -> jax.Array:
    """Appends two channels with the row and column of every pixel, in [-1, 1]."""
    n, h, w, _ = x.shape
    rows = jnp.broadcast_to(jnp.linspace(-1, 1, h)[None, :, None, None], (n, h, w, 1))
    cols = jnp.broadcast_to(jnp.linspace(-1, 1, w)[None, None, :, None], (n, h, w, 1))
    return jnp.concatenate([x, rows.astype(x.dtype), cols.astype(x.dtype)], axis=-1)


class ConvStem(nn.Module):
    """A stack of (kernel, stride, features) convolutions, each with group norm, FiLM and ReLU: small images, few FLOPs.

    The language enters after every convolution, so that a feature map can already be about the object that is meant.

    Attributes:
      coordinates: every convolution also sees where it is (CoordConv, Liu et al. 2018), which makes "where is the green
        block" a linear question.
    """

    layers: tuple[tuple[int, int, int], ...]
    use_film: bool = False
    coordinates: bool = False
    num_groups: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, condition=None):
        for i, (kernel, stride, width) in enumerate(self.layers):
            padding = 0 if kernel == stride else kernel // 2
            if self.coordinates:
                x = with_coordinates(x)
            x = Conv(width, kernel, stride, padding, dtype=self.dtype, name=f"Conv_{i}")(x)
            x = GroupNorm(self.num_groups, name=f"GroupNorm_{i}")(x)
            if self.use_film:
                x = Film(name=f"Film_{i}")(x, condition)
            x = jax.nn.relu(x)
        return x


class KeypointStem(nn.Module):
    """Convolutions and a spatial softmax: where things are, as coordinates (Levine et al. 2016; Finn et al. 2016).

    Every one of `num_keypoints` maps becomes the expected (row, column) of its softmax and its expected value.
    With FiLM the words choose what the maps look for. The whole image becomes one token of 3 * num_keypoints features:
    the cheapest way to learn to point, and too narrow for scenes that cannot be told in points.

    Attributes:
      layers: (kernel, stride, features) of the convolutions.
    """

    layers: tuple[tuple[int, int, int], ...]
    num_keypoints: int = 32
    use_film: bool = False
    num_groups: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, condition=None):
        x = ConvStem(self.layers, self.use_film, False, self.num_groups, self.dtype, name="ConvStem_0")(x, condition)
        maps = Conv(self.num_keypoints, 1, 1, dtype=self.dtype, name="maps")(x).astype(jnp.float32)
        n, h, w, k = maps.shape
        maps = maps.reshape(n, h * w, k)
        weights = jax.nn.softmax(maps, axis=1)
        rows, cols = jnp.meshgrid(jnp.linspace(-1, 1, h), jnp.linspace(-1, 1, w), indexing="ij")
        values = jnp.stack([rows.reshape(-1), cols.reshape(-1)], axis=-1)
        points = jnp.einsum("npk,pc->nkc", weights, values)
        strength = jnp.tanh(jnp.sum(weights * maps, axis=1) / 4.0)
        out = jnp.concatenate([points.reshape(n, 2 * k), strength], axis=-1)
        return out.astype(self.dtype)[:, None, None]
