"""Parameters of the released Octo checkpoints: msgpack files, and arrays in tensorstore's formats."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgpack
import numpy as np

from octo_like.common.schema import flatten, unflatten
from octo_like.policy.pretrained import PretrainedError, read_json

_ARRAY, _SCALAR, _TUPLE = 1, 3, 4


def read_msgpack(path: str | os.PathLike) -> dict[str, Any]:
    """The tree in a Flax msgpack file: arrays are extension 1 with payload (shape, dtype name, bytes), scalars 3,
    tuples 4.

    Raises:
      PretrainedError: no such file, or not such a tree.
    """

    def extension(code, data):
        if code in (_ARRAY, _SCALAR):
            shape, dtype, raw = msgpack.unpackb(data, raw=True)
            array = np.frombuffer(raw, np.dtype(dtype.decode())).reshape(shape)
            return array if code == _ARRAY else array[()]
        if code == _TUPLE:
            return tuple(msgpack.unpackb(data, ext_hook=extension, raw=False, strict_map_key=False))
        raise PretrainedError(f"{path}: unknown msgpack extension {code}")

    if not Path(path).is_file():
        raise PretrainedError(f"{path} is missing; expected a Flax msgpack file")
    try:
        tree = msgpack.unpackb(Path(path).read_bytes(), ext_hook=extension, raw=False, strict_map_key=False)
        tree = _join_chunks(tree)
    except PretrainedError:
        raise
    except (ValueError, TypeError, KeyError) as error:  # msgpack's own are ValueErrors
        raise PretrainedError(f"{path} is not a Flax msgpack file, or damaged: {error}") from error
    if not isinstance(tree, Mapping):
        raise PretrainedError(f"{path} holds a {type(tree).__name__}; expected a nested dict of arrays")
    return dict(tree)


def _join_chunks(node: Any) -> Any:
    """Arrays over 2^30 bytes are stored as a dict of flat pieces."""
    if not isinstance(node, Mapping):
        return node
    if "__msgpack_chunked_array__" in node:
        pieces = node["chunks"]
        flat = np.concatenate(
            [pieces[key] for key in sorted(pieces, key=int)] if isinstance(pieces, Mapping) else pieces
        )
        shape = node["shape"]
        shape = [shape[key] for key in sorted(shape, key=int)] if isinstance(shape, Mapping) else shape
        return flat.reshape(shape)
    return {key: _join_chunks(value) for key, value in node.items()}


_PLACEHOLDER = "PLACEHOLDER://"


def read_params(folder: str | os.PathLike) -> dict[str, Any]:
    """The parameter tree in a step's folder, in float32, whichever way it was written.

    Known: one msgpack file `checkpoint` with all arrays; the same with arrays in zarr folders beside it; zarr arrays in
    an OCDBT store (`manifest.ocdbt`), zarr version 2 or 3. Array names join the keys of the tree by dots.

    Raises:
      PretrainedError: none of these is there, an array cannot be read, or a leaf is no array.
    """
    folder = Path(folder)
    file = folder / "checkpoint"
    tree = read_msgpack(file) if file.is_file() else None
    if tree is not None and not _placeholders(tree):
        return _unwrapped(tree, folder)
    names = _array_names(folder)
    if not names:
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "nothing"
        raise PretrainedError(f"{folder} holds no parameters: expected checkpoint or manifest.ocdbt, found {found}")
    if tree is not None:
        for path, name in _placeholders(tree).items():
            if name not in names:
                raise PretrainedError(f"{folder}: array {name!r} that checkpoint refers to is missing")
            *parents, last = path
            node = tree
            for key in parents:
                node = node[key]
            node[last] = _read_array(folder, name, names[name])
        return _unwrapped(tree, folder)
    keys = _metadata_keys(folder)
    arrays = {"/".join(keys.get(name, name.split("."))): _read_array(folder, name, names[name]) for name in names}
    return _unwrapped(unflatten(arrays), folder)


def _unwrapped(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The parameters, in float32: a release may be stored in half precision; it was trained in float32."""
    whole = tree["params"] if set(tree) == {"params"} and isinstance(tree["params"], Mapping) else tree
    arrays = {}
    for name, leaf in flatten(whole):
        if not isinstance(leaf, np.ndarray | np.generic):
            raise PretrainedError(f"{folder}: parameter {name!r} is {leaf!r:.60}; expected an array of numbers")
        arrays[name] = np.asarray(leaf, np.float32)
    return unflatten(arrays)


def _placeholders(node: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    if isinstance(node, Mapping):
        return {k: v for key, value in node.items() for k, v in _placeholders(value, (*path, key)).items()}
    if isinstance(node, str) and node.startswith(_PLACEHOLDER):
        return {path: node.removeprefix(_PLACEHOLDER)}
    return {}


def _array_names(folder: Path) -> dict[str, tuple[str, Any]]:
    """Array name to (tensorstore driver, key-value store)."""
    import tensorstore

    base = f"file://{quote(str(folder.resolve()))}/"
    ocdbt = (folder / "manifest.ocdbt").is_file()
    names: dict[str, tuple[str, Any]] = {}
    if ocdbt:
        database = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        files = [key.decode() for key in database.list().result()]
    else:
        files = [str(p.relative_to(folder)) for pattern in ("*/.zarray", "*/zarr.json") for p in folder.glob(pattern)]
    for file in files:
        name, _, last = file.rpartition("/")
        driver = {".zarray": "zarr", "zarr.json": "zarr3"}.get(last)
        if driver:
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if ocdbt else f"{base}{quote(name)}/"
            names[name] = driver, store
    return names


def _read_array(folder: Path, name: str, where: tuple[str, Any]) -> np.ndarray:
    import tensorstore

    driver, store = where
    try:
        return tensorstore.open({"driver": driver, "kvstore": store}, open=True).result().read().result()
    except ValueError as error:
        raise PretrainedError(f"{folder}: array {name!r} cannot be read: {error}") from error


def _metadata_keys(folder: Path) -> dict[str, list[str]]:
    """Array name to the keys of the tree, for trees whose keys contain dots; empty when the file does not say."""
    file = folder / "_METADATA"
    if not file.is_file():
        return {}
    try:
        entries = read_json(file).get("tree_metadata", {}).values()
        paths = [[str(part["key"]) for part in entry["key_metadata"]] for entry in entries]
    except (KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(
            f"{file}: expected tree_metadata to hold entries with key_metadata, a list of {{'key': ...}} ({error!r})"
        ) from error
    return {".".join(path): path for path in paths}
