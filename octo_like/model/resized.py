"""Chunks of a head that surgery has made larger or smaller, so that what it did before stays bitwise as it was.

Zero rows in a larger matrix are not enough: a product of another size is rounded differently, and random numbers of
another shape are other numbers. So the entries of a chunk are kept in groups, by the size at which the head got them,
and products and draws are made group by group: those of the first group have the shapes that they had before.
Each product stands behind a barrier, so that no compiler computes it in one with what makes its factors, or with
another product of the same factor. Parameters are ordinary arrays of the whole chunk.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octo_like.model.transformer import fold_in_all

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of a flat chunk, in groups.

    Attributes:
      groups: group number -> places (n,) of its entries in the flat chunk. A place of `count` is an entry that the
        chunk has no more: it is zero where it is read, and dropped where it is written.
      order: (count,) where each entry of the chunk is, in the groups one behind the other.
      count: entries of the chunk.
    """

    groups: dict[int, np.ndarray]
    order: np.ndarray
    count: int

    def split(self, x: Any, axis: int) -> list[jax.Array]:
        """One array for each group, of an array whose `axis` runs over the chunk."""
        x = jnp.asarray(x)
        zero = jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))
        padded = jnp.concatenate([x, zero], axis=axis)
        return [jnp.take(padded, group, axis=axis) for group in self.groups.values()]

    def join(self, parts: Sequence[jax.Array], axis: int) -> jax.Array:
        """The inverse of `split`."""
        return jnp.take(jnp.concatenate(parts, axis=axis), self.order, axis=axis)

    def draw(self, sampler: Callable, keys_b: jax.Array, lead: Sequence[int], last: Sequence[int] = ()) -> jax.Array:
        """(B, *lead, count, *last) random numbers, `sampler(key, shape)` with a key for each row and group."""
        parts = []
        for number, group in self.groups.items():
            keys, shape = fold_in_all(keys_b, number) if number else keys_b, (*lead, len(group), *last)
            parts.append(jax.vmap(functools.partial(sampler, shape=shape))(keys))
        return self.join(parts, axis=1 + len(lead))

    def product_in(self, prefix: int) -> Callable:
        """For `nn.Dense(dot_general=...)` that reads `prefix` other numbers and then the chunk."""

        def dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
            xs, kernels = self.split(x[..., prefix:], -1), self.split(kernel[prefix:], 0)
            xs[0] = jnp.concatenate([x[..., :prefix], xs[0]], axis=-1)
            kernels[0] = jnp.concatenate([kernel[:prefix], kernels[0]])
            first, *others = (_product(*part, dimensions, options) for part in zip(xs, kernels, strict=True))
            return sum(others, start=first)

        return dot_general

    def product_out(self, x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
        """For `nn.Dense(dot_general=...)` that gives the chunk."""
        parts = [_product(x, part, dimensions, options) for part in self.split(kernel, 1)]
        return self.join(parts, axis=-1)


def _product(x: jax.Array, kernel: jax.Array, dimensions: Any, options: Any) -> jax.Array:
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return jax.lax.dot_general(x, kernel, dimensions, **options)


@functools.lru_cache(maxsize=64)
def entries(sizes: tuple[Size, ...]) -> Entries | None:
    """Groups of a chunk whose size was `sizes`, one after the other, the last of which is the present one.

    Returns:
      None for a chunk that has always had its size, which needs none of this.

    Raises:
      ValueError: something else than pairs of positive whole numbers.
    """
    for size in sizes:
        if len(size) != 2 or any(not isinstance(n, int) or n < 1 for n in size):
            raise ValueError(f"resized_from holds the pairs (action_horizon, action_dim) of before, got {sizes[:-1]}")
    if len(sizes) <= 1:
        return None
    horizon, dim = sizes[-1]
    count, known, groups = horizon * dim, set[Size](), {}
    for number, (h, a) in enumerate(sizes):
        new = [place for place in np.ndindex(h, a) if place not in known]
        known.update(new)
        group = np.array([i * dim + j if i < horizon and j < dim else count for i, j in new], np.int32)
        if number == 0 or (group < count).any():
            groups[number] = group
    order = np.argsort(np.concatenate(list(groups.values())), kind="stable")[:count]
    return Entries(groups, order.astype(np.int32), count)
