"""Streamed statistics against NumPy's on the whole array, in float64."""

import numpy as np
import pytest

from octo_like.common.normalization import compute_statistics
from octo_like.data.rlds import statistics
from octo_like.data.rlds.cache_files import DamagedCache
from octo_like.data.rlds.statistics import RowWriter, read_rows, streamed_statistics


def awkward(rng, count):
    """Columns that break simple methods: constant, two-valued, large offset, tiny, signed zeros, heavy tails, ties."""
    return np.stack(
        [
            np.full(count, 0.1),
            np.arange(count) % 2,
            1e6 + rng.normal(size=count),
            1e-30 * rng.normal(size=count),
            np.where(np.arange(count) % 3, 0.0, -0.0),
            rng.standard_cauchy(count),
            rng.integers(-3, 4, count) / 7,
            -(rng.random(count) ** 9),
        ],
        axis=1,
    ).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 99, 100, 101, 201, 5000])
def test_equals_numpy_in_float64(count):
    rng = np.random.default_rng(count)
    values = awkward(rng, count)
    cuts = np.sort(rng.integers(0, count + 1, 7))
    got = streamed_statistics(lambda: np.split(values, cuts))
    wide = values.astype(np.float64)
    for q, key in ((0.01, "p01"), (0.99, "p99")):
        np.testing.assert_array_equal(got[key], np.quantile(wide, q, axis=0).astype(np.float32), err_msg=key)
    np.testing.assert_array_equal(got["min"], values.min(0))
    np.testing.assert_array_equal(got["max"], values.max(0))
    np.testing.assert_allclose(got["mean"], wide.mean(0), rtol=1e-6, atol=1e-35)
    np.testing.assert_allclose(got["std"], wide.std(0), rtol=1e-6, atol=1e-35)
    assert got["std"][0] == 0 and got["mean"][0] == np.float32(0.1)
    want = compute_statistics(values)
    assert {k: (v.dtype, v.shape) for k, v in got.items()} == {k: (v.dtype, v.shape) for k, v in want.items()}


def test_mask_and_nothing():
    values = np.ones((4, 2), np.float32)
    assert streamed_statistics(lambda: [values], [True, False])["mask"].tolist() == [True, False]
    with pytest.raises(ValueError, match="3 entries.*2 dimensions"):
        streamed_statistics(lambda: [values], [True] * 3)
    with pytest.raises(ValueError, match="at least one row"):
        streamed_statistics(lambda: [values[:0]])


def test_bits_sort_like_numbers():
    rng = np.random.default_rng(0)
    values = np.concatenate([awkward(rng, 500).ravel(), np.float32([np.inf, -np.inf, 1e-45, -1e-45])])
    keys = statistics._sortable(values)
    assert [statistics._value(int(k)) for k in keys] == values.tolist()
    np.testing.assert_array_equal(values[np.argsort(keys, kind="stable")], np.sort(values))


def test_rows_on_disk(tmp_path):
    values = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32)
    path = str(tmp_path / "rows.npy")
    writer = RowWriter(path, 1000, 7)
    for part in np.split(values, [3, 3, 700]):
        writer.write(part)
    digest = writer.close()
    np.testing.assert_array_equal(np.load(path), values)  # an ordinary .npy file
    parts = list(read_rows(path, digest, chunk_bytes=7 * 4 * 64))
    assert [first for first, _ in parts] == list(range(0, 1000, 64))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in parts]), values)
    with open(path, "rb+") as file:
        file.truncate(1000)
    with pytest.raises(DamagedCache, match="rows.npy is damaged: shorter than its header"):
        list(read_rows(path))
    with open(path, "rb+") as file:
        file.truncate(0)
    with pytest.raises(DamagedCache, match="rows.npy is damaged, expected an .npy file"):
        list(read_rows(path))
