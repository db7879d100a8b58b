"""Files of datasets and indices, on disks and in buckets: looked at patiently, written as a whole or not at all."""

import io
import os
import shutil
import uuid
from typing import Any

import numpy as np

from octo_like.common.storage import Files, Found, StorageError, persistently
from octo_like.data.errors import DataError
from octo_like.data.tf import error_text, tf


class DamagedCache(DataError):
    """A file of an index is not what was written; its folder is removed, and the index made anew."""


class _Gfile:
    """What TensorFlow's file systems say; not by `tf.io.gfile.exists` and `isdir`, where errors look like absence."""

    def stat(self, path: str) -> Found:
        found = tf.io.gfile.stat(path)
        return Found(found.is_directory, found.length, found.mtime_nsec)

    def list(self, path: str) -> list[str]:
        return tf.io.gfile.listdir(path)

    def read(self, path: str) -> bytes:
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.read()


FILES = Files(_Gfile())


def make_folder(folder: str) -> None:
    """Makes a folder and those above it, where it is not there yet. Raises StorageError."""
    if FILES.is_folder(folder):
        return
    try:
        persistently(lambda: tf.io.gfile.makedirs(folder), folder)
    except tf.errors.OpError as error:
        # It came in between; or a look of TensorFlow's failed, and it says that a file is in the way.
        if not FILES.is_folder(folder):
            if FILES.is_file(folder) or FILES.is_file(os.path.dirname(folder)):
                raise
            raise StorageError(f"{folder} cannot be made: {error_text(error)}") from error


def remove_folder(folder: str) -> None:
    """Removes a folder and what is in it, if it is there. Raises StorageError."""

    def act() -> None:
        if "://" in folder:
            tf.io.gfile.rmtree(folder)
        else:
            shutil.rmtree(folder)

    if FILES.is_folder(folder):
        persistently(act, folder)


def remove(path: str) -> None:
    """Removes a file, if it is there."""
    try:
        persistently(lambda: tf.io.gfile.remove(path), path)
    except tf.errors.NotFoundError:
        pass


def write_atomically(path: str, content: bytes) -> None:
    """Writes a file that a reader sees as a whole or not at all.

    Raises:
      StorageError: the storage does not answer, or refuses.
    """

    def write() -> None:
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            make_folder(os.path.dirname(path))
            with tf.io.gfile.GFile(temporary, "wb") as file:
                file.write(content)
            tf.io.gfile.rename(temporary, path, overwrite=True)
        except BaseException:
            try:
                tf.io.gfile.remove(temporary)
            except tf.errors.OpError:
                pass  # the first error counts
            raise

    persistently(write, path)


def save_arrays(path: str, arrays: dict[str, Any]) -> None:
    """Writes named arrays. A zip file has a checksum of each of them."""
    buffer = io.BytesIO()
    np.savez(buffer, **{f"index_{key}": value for key, value in arrays.items()})  # a key may be called "file"
    write_atomically(path, buffer.getvalue())


def load_arrays(path: str) -> dict[str, Any]:
    """The arrays of `save_arrays`.

    Raises:
      FileNotFoundError: there is no such file.
      DamagedCache: it is not what was written.
      StorageError: the storage does not answer.
    """
    content = FILES.read(path)
    if content is None:
        raise FileNotFoundError(path)
    try:
        with np.load(io.BytesIO(content)) as arrays:
            return {key.removeprefix("index_"): arrays[key] for key in arrays.files}
    except Exception as error:  # zipfile, NumPy and pickle raise many kinds
        raise DamagedCache(f"{path} is damaged: {error}") from error
