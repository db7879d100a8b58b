"""Low-rank adapters (LoRA, Hu et al. 2021) as a transformation of parameter trees.

An adapted kernel W gets two factors beside it, "lora_a" (fan_in, r) and "lora_b" (r, fan_out), and the model computes
with

    W + alpha / r * A B        (their equation 3; A is random, B is zero, so that training starts at W)

The network knows nothing of it: `AdaptedModel` merges and then applies the model as it is. So the train step, its
checkpoints, its placement and its exactness are those of any other parameters; W stands among the frozen ones and has
neither optimizer state nor average, and no gradient of it is kept.

The moving average of an adapted run averages A and B each by itself. The product of averages differs from the average
of products by their covariance over the averaging window, which is second order in the change within that window.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from octo_like.common.defaults import LORA_TARGETS
from octo_like.common.schema import flatten, unflatten

A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """
    Attributes:
      rank: r, the inner dimension of the factors.
      alpha: the factors' product is scaled by alpha / r, so that the learning rate need not follow the rank.
      targets: regexes, searched in parameter paths; the kernels they match are adapted.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha must be a positive number, got {self.alpha}")
        if not self.targets:
            raise ValueError("lora.targets is empty: give regexes of kernels, e.g. ('BlockTransformer_0/.*/kernel',)")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def find_targets(params: Mapping[str, Any], spec: LoraSpec) -> tuple[str, ...]:
    """Paths of the kernels that `spec` adapts, in the order of the tree.

    Raises:
      ValueError: a regex matches nothing, or only arrays that are no kernels; or the rank is larger than a kernel's
        smaller side, where factors would be no saving. The message lists what exists.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params)}
    chosen: set[str] = set()
    for pattern in spec.targets:
        hits = [path for path in shapes if re.search(pattern, path)]
        kernels = [path for path in hits if _is_kernel(path, shapes[path])]
        if not kernels:
            found = f"matches no kernel, only {_some(hits)}" if hits else "matches no parameter"
            raise ValueError(f"lora.targets: {pattern!r} {found}; kernels are at {_kernel_modules(shapes)}")
        chosen.update(kernels)
    for path in chosen:
        if spec.rank > (most := min(_fans(path, shapes[path]))):
            raise ValueError(
                f"lora.rank={spec.rank} is larger than the smaller side of {path} {shapes[path]}: at most {most}, or "
                f"leave that kernel out of lora.targets"
            )
    return tuple(path for path in shapes if path in chosen)


def add_adapters(params: Mapping[str, Any], targets: tuple[str, ...], spec: LoraSpec, rng: jax.Array) -> dict[str, Any]:
    """The tree with factors beside every target: A normal with variance 1 / fan_in, B zero, float32.

    Args:
      targets: kernels to adapt, from `find_targets`.
      rng: a kernel's A depends on this key and the kernel's path, not on what else is adapted.
    """
    flat: dict[str, Any] = {}
    wanted = set(targets)
    for path, leaf in flatten(params):
        flat[path] = leaf
        if path in wanted:
            fan_in, fan_out = _fans(path, leaf.shape)
            key = jax.random.fold_in(rng, zlib.crc32(path.encode()) & 0x7FFFFFFF)
            module = path.removesuffix("/kernel")
            flat[f"{module}/{A}"] = jax.random.normal(key, (fan_in, spec.rank)) / math.sqrt(fan_in)
            flat[f"{module}/{B}"] = jnp.zeros((spec.rank, fan_out), jnp.float32)
    return unflatten(flat)


def is_adapter(path: str) -> bool:
    """Whether a parameter path is a factor."""
    return path.rsplit("/", 1)[-1] in (A, B)


def merge(params: Mapping[str, Any], spec: LoraSpec) -> dict[str, Any]:
    """The tree of the model itself: every adapted kernel with its factors' product added, in the kernel's dtype.

    A tree without factors comes back as it is.
    """
    flat = dict(flatten(params))
    for path in [path for path in flat if path.endswith(f"/{A}")]:
        module = path.removesuffix(f"/{A}")
        a, b, kernel = flat.pop(path), flat.pop(f"{module}/{B}"), flat[f"{module}/kernel"]
        # Exact products everywhere: an accelerator's default would round them to bfloat16.
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        # Leading dimensions of a kernel are inputs and trailing ones outputs, so the product only has to be reshaped.
        flat[f"{module}/kernel"] = (kernel + spec.scale * product.reshape(kernel.shape)).astype(kernel.dtype)
    return unflatten(flat)


class AdaptedModel:
    """An `OctoModel` whose parameters may hold factors: same methods and attributes, factors merged before use."""

    def __init__(self, model: Any, spec: LoraSpec):
        self._model, self._spec = model, spec

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`model.apply` with the merged parameters."""
        return self._model.apply({**variables, "params": merge(variables["params"], self._spec)}, *args, **kwargs)

    def clone(self, **changes: Any) -> "AdaptedModel":
        """`model.clone` with the same factors."""
        return AdaptedModel(self._model.clone(**changes), self._spec)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while unpickling, before there is a model
            raise AttributeError(name)
        return getattr(self._model, name)


def _is_kernel(path: str, shape: tuple[int, ...]) -> bool:
    return path.endswith("/kernel") and len(shape) >= 2


def _fans(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan_in, fan_out) as a matrix: Dense (in, out), convolution (h, w, in, out), attention's query, key and value
    (in, heads, head_dim) and its out (heads, head_dim, out)."""
    inputs = 1 if len(shape) == 3 and not path.endswith("/out/kernel") else len(shape) - 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def _kernel_modules(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Modules with kernels, numbered siblings (encoderblock_0, encoderblock_1, ...) listed once."""
    modules = {
        re.sub(r"_\d+(?=/|$)", "_*", path.removesuffix("/kernel")) for path in shapes if _is_kernel(path, shapes[path])
    }
    return _some(sorted(modules), 40)


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
