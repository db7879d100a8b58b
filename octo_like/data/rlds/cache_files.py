"""Files of an index: written as a whole or not at all, on disks and in buckets."""

import io
import os
import uuid
from typing import Any

import numpy as np

from octo_like.data.spec import DataError
from octo_like.data.tf import tf


def write_atomically(path: str, content: bytes) -> None:
    tf.io.gfile.makedirs(os.path.dirname(path))
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with tf.io.gfile.GFile(temporary, "wb") as file:
            file.write(content)
        tf.io.gfile.rename(temporary, path, overwrite=True)
    finally:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)


def save_arrays(path: str, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{f"index_{key}": value for key, value in arrays.items()})  # a key may be called "file"
    write_atomically(path, buffer.getvalue())


def load_arrays(path: str) -> dict[str, Any]:
    with tf.io.gfile.GFile(path, "rb") as file:
        content = file.read()
    try:
        with np.load(io.BytesIO(content)) as arrays:
            return {key.removeprefix("index_"): arrays[key] for key in arrays.files}
    except Exception as error:  # zipfile, NumPy and pickle raise many kinds
        raise DataError(
            f"{path}: the cached index cannot be read ({error}); delete its folder and it is built again"
        ) from error
