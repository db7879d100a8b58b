"""Data that is not on a disk: all files through TensorFlow's file systems, here the one in memory (ram://)."""

import os

import numpy as np
import pytest
from etils.epath import gpath, register

from octo_like.common.schema import BatchSpec, flatten
from octo_like.data.prepare import prepare_datasets
from octo_like.data.spec import DataError, specs_from_config
from octo_like.data.tf import tf
from tests.data.streams import make_train_stream

SPEC = BatchSpec(2, 2, 6, {"primary": (40, 52)}, goal_images=("primary",), proprio_dim=4)


@pytest.fixture
def bucket(toy, monkeypatch):
    """A copy of the toy dataset below ram://, which TFDS is taught to take for a kind of gs://."""
    monkeypatch.setattr(gpath, "_URI_PREFIXES", (*gpath._URI_PREFIXES, "ram://"))
    monkeypatch.setattr(gpath, "_URI_SCHEMES", gpath._URI_SCHEMES | {"ram"})
    monkeypatch.setitem(gpath._URI_MAP_ROOT, "ram://", "/ram/")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "ram", gpath._PREFIX_TO_BACKEND["gs"])
    monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, "ram://", register._URI_PREFIXES_TO_CLS["gs://"])
    # For ram:// a file exists when another one begins with its name (index.npz, once there is index.npz.lock).

    def exists(path):
        folder, name = os.path.split(str(path).rstrip("/"))
        if not str(path).startswith("ram://"):
            return real(path)
        return tf.io.gfile.isdir(folder) and name in [entry.rstrip("/") for entry in tf.io.gfile.listdir(folder)]

    real = tf.io.gfile.exists
    monkeypatch.setattr(tf.io.gfile, "exists", exists)
    target = f"ram://{toy.name}_bucket"
    folder = f"{target}/{toy.name}/1.0.0"
    tf.io.gfile.makedirs(folder)
    for path in toy.path.iterdir():
        if path.is_file():
            with tf.io.gfile.GFile(f"{folder}/{path.name}", "wb") as file:
                file.write(path.read_bytes())
    yield target
    tf.io.gfile.rmtree(target)


def batches_of(toy, data_dir, cache, count=4):
    specs = specs_from_config({"toy": toy.fields(image_keys={"primary": "front_rgb"})})
    datasets = prepare_datasets(specs, data_dir, cache, progress=False)
    with make_train_stream(datasets, SPEC, None, seed=1, batch_size=8, host_threads=1) as stream:
        return [dict(flatten(next(stream))) for _ in range(count)], stream, datasets["toy"]


def test_a_bucket_gives_the_same_batches_as_a_disk(toy, bucket, tmp_path):
    want, _, _ = batches_of(toy, toy.data_dir, str(tmp_path / "cache"))
    for attempt in range(2):  # the index is built beside the data, then read
        got, stream, prepared = batches_of(toy, bucket, None)
        assert all(path.startswith("ram://") for path in prepared.train.files)
        for a, b in zip(want, got, strict=True):
            assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        (name,) = tf.io.gfile.listdir(f"{prepared.directory}/.octo_like")
        files = tf.io.gfile.listdir(f"{prepared.directory}/.octo_like/{name.rstrip('/')}")
        assert {"index.npz", "rows.npy"} <= set(files) and not [f for f in files if f.endswith((".lock", ".tmp"))]
        if not attempt:
            stamp = tf.io.gfile.stat(f"{prepared.directory}/.octo_like/{name.rstrip('/')}/index.npz").mtime_nsec
    assert tf.io.gfile.stat(f"{prepared.directory}/.octo_like/{name.rstrip('/')}/index.npz").mtime_nsec == stamp
    assert stream._reader._readers._max_workers == 16


def test_a_missing_shard_in_a_bucket_is_named(toy, bucket):
    path = next(p for p in tf.io.gfile.glob(f"{bucket}/{toy.name}/1.0.0/*tfrecord*"))
    tf.io.gfile.remove(path)
    with pytest.raises(DataError, match=f"1 of 3 files of split 'train' are missing: {path}"):
        batches_of(toy, bucket, None)


def test_little_is_read_ahead_from_buckets():
    assert os.environ["GCS_READ_CACHE_BLOCK_SIZE_MB"] == "1"
