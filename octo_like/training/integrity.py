"""What was saved: checksums of arrays, hashes of files, and the manifest of a checkpoint that holds them.

Two independent checks, because Orbax alone restores flipped bytes without a word:

- *Array checksums*, computed on device before the save and again on the restored arrays. Every 32-bit word of an array
  is xor-ed with a hash of its position, mixed by a bijection and summed mod 2^32; two such sums with different seeds.
  The sums are exact, depend neither on the order of summation nor on the sharding, and change with certainty when a
  single word changes.
- *File hashes* (SHA-256) of all that was written. They name the damaged file and keep damaged bytes away from the
  decompressor.
"""

import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from octo_like.common.files import write_whole
from octo_like.common.storage import is_gone, persistently
from octo_like.training.storage import FILES, CheckpointDamaged, CheckpointError, StorageError, settled

MANIFEST = "manifest.json"
FORMAT = 1

# Written or rewritten by Orbax while it gives the directory its final name, after the hashes were taken.
_NOT_HASHED = ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says about one step.

    Attributes:
      step: the training step.
      leaves: array name to {"shape", "dtype", "sums", "key_impl"}.
      files: path relative to the step's directory to {"bytes", "sha256"}; None where files were not hashed.
      extra: the caller's dict, as JSON gives it back (tuples are lists, keys are strings).
      metadata: the `metadata` of the Checkpointer that wrote it.
      metric: what the step is ranked by when the best ones are kept; None: it was not measured.
    """

    step: int
    leaves: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]] | None
    extra: dict[str, Any]
    metadata: dict[str, Any]
    metric: float | None = None


def checked_json(value: dict[str, Any], what: str) -> dict[str, Any]:
    """The value as it will be read back. Arrays and other objects are refused, with a path to the first."""

    def walk(node: Any, path: str) -> Any:
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if isinstance(node, dict):
            return {str(key): walk(child, f"{path}/{key}") for key, child in node.items()}
        if isinstance(node, (list, tuple)):
            return [walk(child, f"{path}/{i}") for i, child in enumerate(node)]
        raise CheckpointError(f"{path} is a {type(node).__name__}, expected JSON (numbers, strings, lists, dicts)")

    return walk(value, what)


def write_manifest(folder: epath.Path, body: dict[str, Any], *, hash_files: bool) -> None:
    """Hashes the files below `folder` and writes its manifest; `body` holds the fields of Manifest except `files`."""
    files = None
    if hash_files:
        names = persistently(lambda: _files_below(folder), folder)
        files = {name: persistently(functools.partial(_hash_file, folder / name), folder / name) for name in names}
    body = {"format": FORMAT, **body, "files": files}
    text = _manifest_text(body)
    persistently(lambda: (folder / MANIFEST).write_text(text), folder / MANIFEST)


def note_metric(folder: epath.Path, metric: float) -> None:
    """Gives a step that was saved without one the metric of a later evaluation; its manifest is replaced whole.

    Raises:
      CheckpointDamaged, StorageError: as `read_manifest`.
    """
    if read_manifest(folder).metric == metric:
        return
    path = folder / MANIFEST
    body = json.loads(persistently(path.read_text, path))["body"]
    text = _manifest_text({**body, "metric": metric})
    # Buckets replace objects whole.
    write = path.write_text if "://" in os.fspath(path) else functools.partial(write_whole, path)
    persistently(lambda: write(text), path)


def _manifest_text(body: dict[str, Any]) -> str:
    return json.dumps({"sha256": _digest(body), "body": body}, indent=1)


def read_manifest(folder: epath.Path) -> Manifest:
    """Reads and checks the manifest of one step's directory, whose name is the step.

    Raises:
      CheckpointDamaged: missing, no JSON, of an unknown format or another step, or its own SHA-256 does not match.
      CheckpointUnreadable: the storage does not answer.
    """
    return settled(lambda: _read_manifest(folder), folder / MANIFEST)


def _read_manifest(folder: epath.Path) -> Manifest:
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except Exception as error:  # every storage has kinds of its own
        if not is_gone(error):
            raise
        reason = "is a directory" if isinstance(error, IsADirectoryError) else "is missing"
        raise CheckpointDamaged(f"{path} {reason}; the directory holds {contents(folder)}") from error
    try:
        outer = json.loads(content)
        body = outer["body"]
        sound = _digest(body) == outer["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{path} is not readable: {error}") from error
    if not sound:
        raise CheckpointDamaged(f"{path} was altered: its SHA-256 does not match")
    if body["format"] != FORMAT:
        raise CheckpointDamaged(f"{path} has format {body['format']}, this version reads {FORMAT}")
    if str(body["step"]) != folder.name:
        raise CheckpointDamaged(f"{path} is that of step {body['step']}: a step's folder was copied or renamed")
    # `metric` came later than format 1.
    return Manifest(**{field.name: body[field.name] for field in dataclasses.fields(Manifest) if field.name in body})


def verify_files(folder: epath.Path, manifest: Manifest) -> None:
    """Compares the files of a step with their hashes.

    Raises:
      CheckpointDamaged: names files that are missing, cut short or altered.
      CheckpointUnreadable: the storage does not answer.
    """
    left = dict(manifest.files or {})

    def look() -> None:
        """Looks at the files that were not found to be good before."""
        problems, errors = [], []
        for name in list(left):
            try:
                problem = _difference(folder / name, left[name])
            except OSError as error:
                errors.append(error)
                continue
            if problem is None:
                del left[name]
            else:
                problems.append(f"{name} {problem}")
        if problems:
            more = f"; and {len(problems) - 4} more" if problems[4:] else ""
            raise CheckpointDamaged("; ".join(problems[:4]) + more)
        if errors:
            raise errors[0]

    settled(look, folder)


def verify_arrays(arrays: dict[str, jax.Array], manifest: Manifest) -> None:
    """Raises CheckpointDamaged naming arrays whose checksums are not those in the manifest."""
    sums, _ = checksums(arrays)
    wrong = [name for name in arrays if list(sums[name]) != manifest.leaves[name]["sums"]]
    if wrong:
        raise CheckpointDamaged(f"the values of {some(wrong)} are not those that were saved")


def _difference(path: epath.Path, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file; None: nothing. Raises OSError when it cannot be read."""
    try:
        found = _hash_file(path)
    except OSError as error:
        if not is_gone(error):
            raise
        return "is a directory" if isinstance(error, IsADirectoryError) else "is missing"
    if found["bytes"] != expected["bytes"]:
        return f"has {found['bytes']} bytes instead of {expected['bytes']}"
    return None if found["sha256"] == expected["sha256"] else "was altered (SHA-256 differs)"


def _files_below(folder: epath.Path) -> list[str]:
    found = []

    def fail(error: OSError) -> None:
        raise error

    for directory, _, names in os.walk(folder, onerror=fail):
        relative = os.path.relpath(directory, folder)
        found += [os.path.normpath(os.path.join(relative, name)).replace(os.sep, "/") for name in names]
    return sorted(name for name in found if name not in _NOT_HASHED)


def _hash_file(path: epath.Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def checksums(leaves: dict[str, jax.Array]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """({name: two checksums}, names of arrays with NaN or infinity). Every process gets the same answer.

    Takes plain arrays of any sharding; of typed PRNG keys, their data.
    """
    # All in one program: several programs in flight could block each other on CPU devices, which share their threads.
    on_device = _checksums(dict(leaves))
    # The scalars are replicated, so that each process can read its own copy.
    local = jax.tree.map(lambda x: x.addressable_data(0), on_device)
    host = jax.device_get(local)
    sums = {name: (int(first), int(second)) for name, (first, second, _) in host.items()}
    return sums, [name for name, (_, _, finite) in host.items() if not finite]


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """One program for all arrays: one by one, every shape would be compiled and launched on its own."""
    return {name: _checksum(leaf) for name, leaf in leaves.items()}


@jax.jit  # so that it is traced once for each shape, of which there are few
def _checksum(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Two checksums of the bits of x (uint32) and whether all of it is finite."""
    finite = jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)
    if x.dtype == jnp.bool_:
        words = x.astype(jnp.uint32)
    elif x.dtype.itemsize <= 4:
        words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    else:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)  # one more axis, of the two halves
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    seeds = (np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15))
    first, second = (jnp.sum(_mix(words ^ _mix(position + seed)), dtype=jnp.uint32) for seed in seeds)
    return first, second, finite


def _mix(h: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: a bijection of 32-bit words in which every bit depends on every other."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def some(names: list[str], limit: int = 6) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def contents(folder: epath.Path, limit: int = 8) -> str:
    """What a directory holds, for error messages."""
    try:
        found = FILES.names(folder)
        if found is None:
            return "nothing (it does not exist)"
        names = [name + ("/" if FILES.is_folder(folder / name) else "") for name in found[: limit + 1]]
    except StorageError as error:
        return f"what cannot be listed ({error})"
    return (", ".join(names[:limit]) + (", …" if len(names) > limit else "")) or "an empty directory"
