"""Image encoders (stems): normalised images (N, h, w, C) float32, and a condition (N, d) or None, to (N, h', w', F)."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalize_images(images: jax.Array, kind: Literal["default", "imagenet"] = "default") -> jax.Array:
    """(..., 3 k) uint8 RGB, k images stacked along channels, to float32 of the same shape: [-1, 1] ("default") or
    standardised by ImageNet's statistics."""
    if kind == "default":
        return images.astype(jnp.float32) / 127.5 - 1.0
    if kind == "imagenet":
        stacked = images.shape[-1] // 3
        return (images.astype(jnp.float32) / 255.0 - np.tile(IMAGENET_MEAN, stacked)) / np.tile(IMAGENET_STD, stacked)
    raise ValueError(f"unknown image normalisation {kind!r}; valid: 'default', 'imagenet'")


def normalize_depth(metres: jax.Array) -> jax.Array:
    """[0, infinity) to [-1, 1), any shape: no reading (0) is -1, one metre 0, three metres a half."""
    metres = jnp.clip(metres.astype(jnp.float32), 0.0, 1e3)
    return (metres - 1.0) / (metres + 1.0)


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int | str) -> jax.Array:
    """Cross-correlation of x (N, h, w, C) with a kernel (kh, kw, C, F) to (N, h', w', F).

    `padding` on every side, or "same": ceil(size / stride) outputs.

    A patch convolution (kernel = stride, no padding) is a reshape and one matrix product: every backend runs that well.
    """
    kh, kw, cin, cout = kernel.shape
    n, h, w, _ = x.shape
    if kh == kw == stride and padding in (0, "same") and h % stride == 0 and w % stride == 0:
        patches = x.reshape(n, h // stride, stride, w // stride, stride, cin).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(n, h // stride, w // stride, kh * kw * cin) @ kernel.reshape(-1, cout)
    if isinstance(padding, int):
        pad = ((padding, padding), (padding, padding))
    else:
        pad = (_same_padding(h, kh, stride), _same_padding(w, kw, stride))
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Conv(nn.Module):
    """Convolution (N, h, w, C) to (N, h', w', features), optionally with a standardised kernel (Qiao et al. 2019)."""

    features: int
    kernel_size: int
    stride: int
    padding: int | str = 0
    standardize: bool = False
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        if self.standardize:
            kernel = kernel - kernel.mean((0, 1, 2))
            kernel = kernel / (kernel.std((0, 1, 2)) + 1e-5)
        out = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        return out if bias is None else out + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) of (N, h, w, C) with epsilon 1e-6, as one multiply-add per pixel.

    Per-channel sums are taken first and groups are formed on the small (N, C) result; normalising through a (C/g, g)
    reshape of the image costs ten times more on CPU.
    """

    num_groups: int = 32
    epsilon: float = 1e-6
    zero_scale: bool = False  # begin at zero: a residual branch that is silent at first

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, h, w, channels = x.shape
        if channels % self.num_groups:
            raise ValueError(
                f"{channels} channels are not divisible by {self.num_groups} groups; use multiples of them"
            )
        begin = nn.initializers.zeros_init() if self.zero_scale else nn.initializers.ones_init()
        scale = self.param("scale", begin, (channels,))
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
    """Feature-wise linear modulation (Perez et al. 2018) of x (N, h, w, F) by c (N, d): x * (1 + a(c)) + b(c), with a
    and b zero at initialisation."""

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None) -> jax.Array:
        if condition is None:
            raise ValueError("FiLM needs a condition, and there is none: name it in the tokenizer's film_keys")
        zero = nn.initializers.zeros_init()
        a = nn.Dense(x.shape[-1], kernel_init=zero, name="Dense_0", dtype=x.dtype)(condition)
        b = nn.Dense(x.shape[-1], kernel_init=zero, name="Dense_1", dtype=x.dtype)(condition)
        return x * (1 + a[:, None, None]) + b[:, None, None]


class SmallStem(nn.Module):
    """Stride-2 standardised convolutions and a patch embedding (early convolutions help: Xiao et al. 2021).

    (N, h, w, C) to (N, h / patch_size, w / patch_size, num_features).

    Attributes:
      patch_size: pixels per token; a multiple of the product of the strides.
      features, kernel_sizes, strides, padding: one entry per convolution.
      use_film: the condition modulates the embedded patches, as in Octo.
      early_film: it also modulates every convolution, so that features can already be about the thing that is meant.
    """

    patch_size: int = 16
    features: tuple[int, ...] = (32, 96, 192, 384)
    kernel_sizes: tuple[int, ...] | None = None  # None: 3 everywhere
    strides: tuple[int, ...] | None = None  # None: 2 everywhere
    padding: tuple[int, ...] | None = None  # None: 1 everywhere
    num_features: int = 512
    use_film: bool = False
    early_film: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        n = len(self.features)
        kernels, strides, paddings = self.kernel_sizes or (3,) * n, self.strides or (2,) * n, self.padding or (1,) * n
        if not len(kernels) == len(strides) == len(paddings) == n or self.patch_size % math.prod(strides):
            raise ValueError(
                f"small stem: {n} features need as many kernel_sizes, strides and padding, and patch_size "
                f"{self.patch_size} must be a multiple of the product of the strides {strides}"
            )
        for i, (width, kernel, stride, pad) in enumerate(zip(self.features, kernels, strides, paddings, strict=True)):
            x = Conv(width, kernel, stride, pad, standardize=True, dtype=self.dtype, name=f"StdConv_{i}")(x)
            x = GroupNorm(name=f"GroupNorm_{i}")(x)
            if self.early_film:
                x = Film(name=f"EarlyFilm_{i}")(x, condition)
            x = jax.nn.relu(x)
        patch = self.patch_size // math.prod(strides)
        x = Conv(self.num_features, patch, patch, dtype=self.dtype, name="embedding")(x)
        return Film(name="FilmConditioning_0")(x, condition) if self.use_film else x


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """What is added before and after an axis so that ceil(size / stride) windows cover it; the odd one comes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class _ResidualUnit(nn.Module):
    """1x1, 3x3, 1x1 standardised convolutions with group norms around a shortcut (He et al. 2016, bottleneck)."""

    features: int
    stride: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        def layer(h, i, width, kernel=1, stride=1):
            h = Conv(width, kernel, stride, "same", True, False, self.dtype, name=f"conv{i}")(h)
            # The last scale begins at zero: a fresh unit is its shortcut.
            zero = i == "3"
            return GroupNorm(zero_scale=zero, name=f"gn{i}")(h)

        shortcut = x
        if x.shape[-1] != 4 * self.features or self.stride != 1:
            shortcut = layer(x, "_proj", 4 * self.features, stride=self.stride)
        h = jax.nn.relu(layer(x, "1", self.features))
        h = jax.nn.relu(layer(h, "2", self.features, 3, self.stride))
        return jax.nn.relu(shortcut + layer(h, "3", 4 * self.features))


class _ResNetBlock(nn.Module):
    """A run of residual units, of which the first changes the resolution."""

    num_units: int
    features: int
    stride: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i in range(self.num_units):
            x = _ResidualUnit(self.features, self.stride if i == 0 else 1, self.dtype, name=f"unit{i + 1}")(x)
        return x


class ResNetStem(nn.Module):
    """A ResNet with group norm and standardised convolutions ("BiT", Kolesnikov et al. 2020), as before a hybrid ViT.

    2 + 3 sum(num_layers) convolution layers deep: (2, 2, 2, 2) is ResNet-26, (3, 4, 6, 3) ResNet-50. (N, 256, 256, C)
    becomes (N, 8, 8, F). FiLM follows every block but the first (and the root when there are no blocks), as in Octo.

    Attributes:
      num_layers: residual units per block; block i has 64 * width * 2^i (times 4) channels.
    """

    num_layers: tuple[int, ...] = (2, 2, 2, 2)
    width: float = 1
    use_film: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        width = int(64 * self.width)
        x = Conv(width, 7, 2, "same", True, False, self.dtype, name="conv_root")(x)
        x = nn.max_pool(jax.nn.relu(GroupNorm(name="gn_root")(x)), (3, 3), (2, 2), "SAME")
        films = 0
        for i, units in enumerate(self.num_layers):
            x = _ResNetBlock(units, width * 2**i, 1 if i == 0 else 2, self.dtype, name=f"block{i + 1}")(x)
            if self.use_film and i > 0:
                x = Film(name=f"FilmConditioning_{films}")(x, condition)
                films += 1
        if self.use_film and not self.num_layers:
            x = Film(name="FilmConditioning_0")(x, condition)
        return x


class PatchStem(nn.Module):
    """One convolution with kernel = stride = patch size (ViT, Dosovitskiy et al. 2021).

    (N, h, w, C) to (N, h / patch_size, w / patch_size, num_features).
    """

    patch_size: int = 32
    num_features: int = 512
    use_film: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        x = Conv(self.num_features, self.patch_size, self.patch_size, dtype=self.dtype, name="embedding")(x)
        return Film(name="FilmConditioning_0")(x, condition) if self.use_film else x


def with_coordinates(x: jax.Array) -> jax.Array:
    """(N, h, w, C) to (N, h, w, C + 2): appends the row and column of every pixel, in [-1, 1]."""
    n, h, w, _ = x.shape
    rows = jnp.broadcast_to(jnp.linspace(-1, 1, h)[None, :, None, None], (n, h, w, 1))
    cols = jnp.broadcast_to(jnp.linspace(-1, 1, w)[None, None, :, None], (n, h, w, 1))
    return jnp.concatenate([x, rows.astype(x.dtype), cols.astype(x.dtype)], axis=-1)


class ConvStem(nn.Module):
    """A stack of (kernel, stride, features) convolutions, each with group norm, FiLM and ReLU: small images, few FLOPs.

    (N, h, w, C) to (N, h', w', F), F being the last features and h / h' the product of the strides.

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
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
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
    With FiLM the words choose what the maps look for. The whole image becomes one token, (N, 1, 1, 3 * num_keypoints):
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
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        x = ConvStem(self.layers, self.use_film, False, self.num_groups, self.dtype, name="ConvStem_0")(x, condition)
        maps = Conv(self.num_keypoints, 1, 1, dtype=self.dtype, name="maps")(x).astype(jnp.float32)
        n, h, w, k = maps.shape
        maps = maps.reshape(n, h * w, k)
        weights = jax.nn.softmax(maps, axis=1)
        self.sow("intermediates", "keypoint_weights", weights.reshape(n, h, w, k))  # for looking at; else nothing
        rows, cols = jnp.meshgrid(jnp.linspace(-1, 1, h), jnp.linspace(-1, 1, w), indexing="ij")
        values = jnp.stack([rows.reshape(-1), cols.reshape(-1)], axis=-1)
        points = jnp.einsum("npk,pc->nkc", weights, values)
        strength = jnp.tanh(jnp.sum(weights * maps, axis=1) / 4.0)
        out = jnp.concatenate([points.reshape(n, 2 * k), strength], axis=-1)
        return out.astype(self.dtype)[:, None, None]
