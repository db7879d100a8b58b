"""The leaves of a training state as a checkpoint names, describes and checks them; `checkpoint` stores them."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from octo_like.training.integrity import Manifest, some
from octo_like.training.storage import CheckpointError


class StateMismatch(CheckpointError):
    """The checkpoint is sound, but holds other arrays than the state to be filled."""


def leaf_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "state"


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """({array name: leaf}, treedef). Names are pytree paths: params/head/kernel, opt_state/0/mu/head/kernel."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    counts = collections.Counter(leaf_name(path) for path, _ in paths)
    double = [name for name, count in counts.items() if count > 1]
    if double:
        raise CheckpointError(f"two leaves of the state have the same name: {some(double)}")
    return {leaf_name(path): leaf for path, leaf in paths}, treedef


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe_state(state: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """({name: array}, {name: plain array to write}); refuses what would not come back as it was."""
    leaves, _ = named_leaves(state)
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise CheckpointError(f"{name} is a {type(leaf).__name__}; the state must consist of jax.Arrays")
        if leaf.size == 0:
            raise CheckpointError(f"{name} has shape {leaf.shape}: arrays without elements cannot be saved")
    return leaves, {name: jax.random.key_data(x) if is_key(x) else x for name, x in leaves.items()}


def from_data(array: jax.Array, entry: dict[str, Any]) -> jax.Array:
    return jax.random.wrap_key_data(array, impl=entry["key_impl"]) if entry["key_impl"] else array


def leaf_entry(leaf: jax.Array, data: jax.Array, sums: tuple[int, int]) -> dict[str, Any]:
    impl = str(jax.random.key_impl(leaf)) if is_key(leaf) else None
    return {"shape": list(data.shape), "dtype": data.dtype.name, "key_impl": impl, "sums": list(sums)}


def data_struct(entry: dict[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))


def abstract_data(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of the plain array behind a leaf; a key array's sharding holds for its data too."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        if jax.process_count() > 1:
            raise CheckpointError("restore needs shardings in abstract_state when there is more than one process")
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    data = jax.eval_shape(jax.random.key_data, struct) if is_key(leaf) else struct
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def cast_to(array: jax.Array, wanted: Any) -> jax.Array:
    same = is_key(wanted) or array.dtype == wanted.dtype
    return array if same else jax.jit(lambda x: x.astype(wanted.dtype), out_shardings=array.sharding)(array)


def check_structure(names: dict[str, Any], manifest: Manifest, where: epath.Path, cast: bool) -> None:
    problems = []
    missing = [name for name in names if name not in manifest.leaves]
    extra = [name for name in manifest.leaves if name not in names]
    if missing:
        problems.append(f"not in the checkpoint: {some(missing)}")
    if extra:
        problems.append(f"only in the checkpoint: {some(extra)}")
    differing = []
    for name in sorted(names.keys() & manifest.leaves.keys()):
        want, have = abstract_data(names[name]), data_struct(manifest.leaves[name])
        floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (want, have))
        if want.shape != have.shape or (want.dtype != have.dtype and not (cast and floats)):
            differing.append(
                f"{name} is {have.dtype.name}{list(have.shape)}, expected {want.dtype.name}{list(want.shape)}"
            )
    if differing:
        problems.append(f"of another shape or dtype: {some(differing)}")
    if problems:
        raise StateMismatch(
            f"{where} holds another state than this run's model and optimizer:\n  " + "\n  ".join(problems)
        )
