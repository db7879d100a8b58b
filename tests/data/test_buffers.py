"""Arrays that are lent again: only when nobody can see them any more, and without a trace in the batches."""

import gc

import jax
import numpy as np
import tensorflow as tf

from octo_like.common.schema import BatchSpec, flatten
from octo_like.data.batches.buffers import Buffers
from octo_like.data.prepare import prepare_datasets
from octo_like.data.spec import specs_from_config
from tests.data.streams import make_train_stream

SHAPE = (64, 64)


def address(array):
    return array.__array_interface__["data"][0]


def test_an_array_is_lent_again_when_nobody_holds_it():
    buffers = Buffers(2)
    first = buffers.take(SHAPE, np.uint8)
    at = address(first)
    second = buffers.take(SHAPE, "uint8")
    assert address(second) != at
    del first
    assert address(buffers.take(SHAPE, np.uint8)) == at
    assert buffers.take(SHAPE, np.float32).dtype == np.float32
    assert buffers.take((4, 1), np.uint8).shape == (4, 1)


def test_what_is_lent_beyond_the_limit_is_not_kept():
    buffers = Buffers(1)
    kept, other = buffers.take(SHAPE, np.uint8), buffers.take(SHAPE, np.uint8)
    at = address(kept)
    del other
    assert address(buffers.take(SHAPE, np.uint8)) != at
    del kept
    assert address(buffers.take(SHAPE, np.uint8)) == at


def test_views_and_other_libraries_keep_an_array():
    """Everything that shares the memory holds a reference: the values stay as long as somebody can read them."""
    holders = {
        "view": lambda array: array[3:, ::2],
        "view of a view": lambda array: array[1:].T[2:],
        "memoryview": memoryview,
        "jax": jax.numpy.asarray,
        "jax on a device": lambda array: jax.device_put(array, jax.devices()[0]),
        "tensorflow": tf.convert_to_tensor,
    }
    for name, hold in holders.items():
        buffers = Buffers(4)
        array = buffers.take(SHAPE, np.float32)
        array[...] = 7.0
        held = hold(array)
        del array
        gc.collect()
        for _ in range(3):
            buffers.take(SHAPE, np.float32)[...] = -1.0
        assert np.all(np.asarray(held) == 7.0), name


def test_batches_do_not_depend_on_what_is_held(toy, wide_toy, tmp_path):
    """A consumer that drops each batch (arrays return) gets what one gets that keeps all of them (they never do), also
    where no frame is decoded: missing cameras, dropped ones, samples without a goal."""
    spec = BatchSpec(
        window_size=3,
        action_horizon=2,
        action_dim=6,
        image_sizes={"primary": (24, 24), "wrist": (16, 16)},
        goal_images=("primary", "wrist"),
        proprio_dim=None,
        language_length=None,
        heads=("action",),
    )
    fields = {
        "toy": toy.fields(language_key=None),
        "wide": wide_toy.fields(image_keys={"primary": "front_rgb"}, proprio_keys=(), language_key=None),
    }
    datasets = {}
    for name, source in (("toy", toy), ("wide", wide_toy)):
        one = specs_from_config({name: fields[name]})
        datasets |= prepare_datasets(one, source.data_dir, str(tmp_path), progress=False)
    options = dict(seed=3, batch_size=16, episodes_mixed=8, drop_task_prob=0.5, image_dropout_prob=0.5)
    with make_train_stream(datasets, spec, None, **options) as stream:
        kept = [dict(flatten(next(stream))) for _ in range(12)]
    addresses = set()
    with make_train_stream(datasets, spec, None, **options) as stream:
        for number, want in enumerate(kept):
            got = dict(flatten(next(stream)))
            addresses.add(address(got["observation/image_primary"]))
            for key in want:
                np.testing.assert_array_equal(got[key], want[key], err_msg=f"batch {number}: {key}")
            del got
    assert len(addresses) < 12, "no array was used again: the test shows nothing"
    images = [key for key in kept[0] if "/image_" in key and "pad_mask" not in key]
    assert len(images) == 4
    for key in images:
        place, name = key.split("/")
        empty = [~batch[f"{place}/pad_mask_dict/{name}"] for batch in kept]
        assert sum(mask.sum() for mask in empty) > 0, f"{key} is never missing: the test shows nothing"
        assert all((batch[key][mask] == 0).all() for batch, mask in zip(kept, empty, strict=True))
