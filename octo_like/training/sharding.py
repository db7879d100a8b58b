"""Mesh and placement. The only file that says PartitionSpec; the model knows nothing of it.

    mesh axis   what is spread over it
    data        batch
    fsdp        batch, and every large enough parameter (with its optimizer state and average) along one dimension

Placement is inferred from shapes: a parameter of at least `min_size` entries is split along its largest dimension that
the fsdp axis divides; regexes of paths (config.mesh.overrides) override the inference.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octo_like.common.schema import BatchSpec, flatten, unflatten
from octo_like.model.attention import kernels_split_by

BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices; an axis of -1 takes what is left.

    Devices are ordered by slice, process and id. So process p holds the p-th block of rows of every batch (which is
    what the input stream reads for it), neighbours along fsdp are neighbours on the board, then on the next host, and
    with several TPU slices only the data axis goes over the data centre network.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or an fsdp group would reach over two TPU slices.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=_position)
    count = len(devices)
    if data == -1 and fsdp == -1:
        raise ValueError("only one of mesh.data and mesh.fsdp may be -1")
    for axis, size in (("data", data), ("fsdp", fsdp)):
        if size != -1 and not 1 <= size <= count:
            raise ValueError(f"mesh.{axis}={size}, but the number of devices is {count}; valid: -1, or a divisor of it")
    if data == -1:
        data = count // fsdp
    if fsdp == -1:
        fsdp = count // data
    if data * fsdp != count:
        raise ValueError(f"mesh data={data} x fsdp={fsdp} does not use the {count} devices; use -1 for one of them")
    slices = num_slices(devices)
    if (count // slices) % fsdp:
        raise ValueError(
            f"mesh.fsdp={fsdp} does not divide the {count // slices} devices of each of the {slices} slices: "
            f"parameters would be gathered over the data centre network; use a divisor of {count // slices}"
        )
    # Auto axes: Linen's convolutions do not run on explicitly sharded arrays.
    return Mesh(np.array(devices).reshape(data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def num_slices(devices: Sequence[jax.Device]) -> int:
    """TPU slices (pods, or parts of one, joined by the data centre network only) among the devices; 1 elsewhere."""
    return len({_slice_of(device) for device in devices})


def _slice_of(device: jax.Device) -> int:
    # GPUs have such a number as well, but any of them may share parameters with any other.
    return (getattr(device, "slice_index", 0) or 0) if device.platform == "tpu" else 0


def _position(device: jax.Device) -> tuple[int, int, int]:
    return _slice_of(device), device.process_index, device.id


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over every device."""
    return NamedSharding(mesh, P(BATCH_AXES))


def infer_sharding(
    tree: Any,
    mesh: Mesh,
    *,
    min_size: int = 2**18,
    overrides: Sequence[tuple[str, Sequence[str | None]]] = (),
    params: Mapping[str, Any] | None = None,
) -> Any:
    """Shardings for a pytree of arrays or ShapeDtypeStructs.

    A parameter, its moments in the optimizer and its average have the same shape and the same path but for a prefix: so
    they are placed alike.

    Args:
      min_size: arrays with fewer entries are replicated.
      overrides: (regex searched in a path, mesh axis or None of each dimension), the first that matches wins, e.g.
        (("embedding$", ("fsdp", None)), ("readout", ())). Scalars are never split.
      params: parameters by path. Overrides speak of arrays of their shapes: what an optimizer keeps in another one (the
        factors of Adafactor's moments) is placed by inference.

    Raises:
      ValueError: an override matches nothing, names an unknown axis, or does not fit the shape of what it matches.
    """
    fsdp = mesh.shape["fsdp"]
    unused, params = {pattern for pattern, _ in overrides}, params or {}

    def place(path, leaf):
        name, shape = "/".join(_key(entry) for entry in path), leaf.shape
        factor = path and getattr(params.get(_key(path[-1])), "shape", shape) != shape
        for pattern, axes in () if factor else overrides:
            if shape and re.search(pattern, name):
                unused.discard(pattern)
                _check_override(pattern, axes, name, shape, mesh)
                return NamedSharding(mesh, P(*axes))
        if fsdp == 1 or math.prod(shape) < min_size:
            return NamedSharding(mesh, P())
        for dim in sorted(range(len(shape)), key=lambda d: -shape[d]):
            if shape[dim] % fsdp == 0:
                return NamedSharding(mesh, P(*(("fsdp" if d == dim else None) for d in range(len(shape)))))
        return NamedSharding(mesh, P())

    placed = jax.tree_util.tree_map_with_path(place, tree)
    if unused:
        raise ValueError(f"mesh.overrides: no parameter's path matches {sorted(unused)}, or an earlier one took it")
    return placed


def _check_override(pattern: str, axes: Sequence[str | None], name: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    problem = None
    named = [axis for axis in axes if axis is not None]
    if unknown := [axis for axis in named if axis not in mesh.axis_names]:
        problem = f"no mesh axis {unknown[0]!r}; valid: {', '.join(mesh.axis_names)}, None"
    elif len(set(named)) < len(named):
        problem = "an axis can split one dimension only"
    elif len(axes) > len(shape):
        problem = f"{len(axes)} entries for {len(shape)} dimensions"
    else:
        for size, axis in zip(shape, axes, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                problem = f"a dimension of {size} does not split over the {mesh.shape[axis]} devices of {axis!r}"
    if problem:
        raise ValueError(f"mesh.overrides: {pattern!r} -> {tuple(axes)} for {name} {shape}: {problem}")


def gather(params: Any, shardings: Any) -> Any:
    """Whole parameters of split ones, for the forward pass; their gradients come back split (ZeRO-3, Rajbhandari 2020).

    Without it the partitioner is free to leave weights where they are and gather activations instead, which it does as
    soon as a weight is larger than what it is multiplied with. What is not split is returned as it is.
    """
    return jax.tree.map(_gather_leaf, params, shardings)


def _gather_leaf(leaf: jax.Array, split: NamedSharding) -> jax.Array:
    if split.is_fully_replicated:
        return leaf

    @jax.custom_vjp
    def whole(x):
        return jax.lax.with_sharding_constraint(x, replicated(split.mesh))

    whole.defvjp(
        lambda x: (whole(x), None),
        lambda _, cotangent: (jax.lax.with_sharding_constraint(cotangent, split),),
    )
    return whole(leaf)


def _key(entry) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Every micro-batch must divide over the devices."""
    devices = mesh.size
    if batch_size % accumulate or (batch_size // accumulate) % devices:
        lower = max(1, batch_size // (devices * accumulate)) * devices * accumulate
        raise ValueError(
            f"batch_size {batch_size} does not split into {accumulate} micro-batches over {devices} devices; "
            f"use a multiple of {devices * accumulate}, e.g. {lower}"
        )


def abstract_batch(spec: BatchSpec, batch_size: int, mesh: Mesh) -> Any:
    """Shapes, dtypes and placement of what `put_batch` makes of a global batch."""
    sharding = batch_sharding(mesh)
    return unflatten(
        {
            path: jax.ShapeDtypeStruct((batch_size, *leaf.shape), _device_dtype(leaf.dtype), sharding=sharding)
            for path, leaf in flatten(spec.batch())
        }
    )


def _device_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.int32) if dtype == np.int64 else dtype


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> Any:
    """Process-local NumPy rows to global device arrays.

    Ids are stored as int32 (devices have no 64-bit integers): the low 31 bits, which suffice as random keys.
    """
    sharding = batch_sharding(mesh)

    def put(leaf):
        leaf = np.asarray(leaf)
        if leaf.dtype == np.int64:
            leaf = (leaf & 0x7FFFFFFF).astype(_device_dtype(leaf.dtype))
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(put, batch)


def to_local(tree: Any, mesh: Mesh) -> Any:
    """The tree as whole arrays on the first device of every process, wherever its shards are; alone, as it is.

    Every process has to call it.
    """
    if jax.process_count() == 1:
        return tree
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), whole)


def to_host(tree: Any, mesh: Mesh) -> Any:
    """The tree as NumPy arrays on every process, wherever its shards are. Every process has to call it."""
    return jax.device_get(to_local(tree, mesh))


def traced_on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced so that kernels which the compiler cannot divide run on every device's own rows."""
    rows = P(BATCH_AXES)

    def by_rows(kernel):
        return jax.shard_map(kernel, in_specs=rows, out_specs=rows, check_vma=False)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        # The ambient mesh also keeps apart what inner jitted functions trace for one mesh and for another.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), kernels_split_by(by_rows if mesh.size > 1 else None):
            return function(*args, **kwargs)

    return wrapped
