"""Mesh and placement. The only file that says PartitionSpec; the model knows nothing of it.

    mesh axis   what is spread over it
    data        batch
    fsdp        batch, and every large enough parameter (with its optimizer state and average) along one dimension

Placement is inferred from shapes: a parameter of at least `min_size` entries is split along its largest dimension that
the fsdp axis divides; regexes of paths override the inference.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices; an axis of -1 takes what is left.

    Raises:
      ValueError: when the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if data == -1 and fsdp == -1:
        raise ValueError("only one of mesh.data and mesh.fsdp may be -1")
    if data == -1:
        data = count // fsdp
    if fsdp == -1:
        fsdp = count // data
    if data * fsdp != count:
        raise ValueError(f"mesh data={data} x fsdp={fsdp} does not use the {count} devices; use -1 for one of them")
    # Auto axes: Linen's convolutions do not run on explicitly sharded arrays.
    return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over every device."""
    return NamedSharding(mesh, P(BATCH_AXES))


def infer_sharding(
    tree: Any, mesh: Mesh, *, min_size: int = 2**18, overrides: Mapping[str, Sequence[str | None]] | None = None
) -> Any:
    """Shardings for a pytree of arrays or ShapeDtypeStructs.

    Args:
      min_size: smaller arrays are replicated.
      overrides: regex of a path to the mesh axes of its dimensions, e.g. {".*embedding": ("fsdp", None)}.
    """
    fsdp = mesh.shape["fsdp"]

    def place(path, leaf):
        name = "/".join(_key(entry) for entry in path)
        for pattern, axes in (overrides or {}).items():
            if re.search(pattern, name):
                return NamedSharding(mesh, P(*axes))
        shape = leaf.shape
        if fsdp == 1 or int(np.prod(shape)) < min_size:
            return NamedSharding(mesh, P())
        for dim in sorted(range(len(shape)), key=lambda d: -shape[d]):
            if shape[dim] % fsdp == 0:
                return NamedSharding(mesh, P(*(("fsdp" if d == dim else None) for d in range(len(shape)))))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, tree)


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


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> Any:
    """Process-local NumPy rows to global device arrays.

    Ids are stored as int32 (devices have no 64-bit integers): the low 31 bits, which suffice as random keys.
    """
    sharding = batch_sharding(mesh)

    def put(leaf):
        leaf = np.asarray(leaf)
        if leaf.dtype == np.int64:
            leaf = (leaf & 0x7FFFFFFF).astype(np.int32)
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(put, batch)


def traced_on(mesh: Mesh, function):
    """`function`, traced with `mesh` as the ambient one: kernels that the compiler cannot split read from it where the
    rows of a batch are."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return wrapped
