"""Depth end to end: from records with uint16 PNGs and float arrays to batches, and in synthetic ones."""

import dataclasses

import numpy as np
import pytest

from octo_like.common.schema import BatchSpec, check_batch, synthetic_batch
from octo_like.data.batches.frames import resize_frames
from octo_like.data.spec import DataError
from tests.data.streams import make_train_stream

SPEC = BatchSpec(2, 2, 2, {"primary": (8, 10)}, depth_sizes={"primary": (6, 5), "wrist": (4, 4), "secondary": (2, 2)})


@pytest.fixture(scope="module")
def depth_dataset(tmp_path_factory):
    """Five episodes: millimetres in a uint16 PNG for the primary camera, float metres for the wrist."""
    import tensorflow_datasets as tfds
    from etils import epath

    step = tfds.features.FeaturesDict(
        {
            "observation": {
                "rgb": tfds.features.Image(shape=(8, 10, 3), encoding_format="png"),
                "depth": tfds.features.Image(shape=(12, 10, 1), dtype=np.uint16, encoding_format="png"),
                "near": tfds.features.Tensor(shape=(4, 4), dtype=np.float32),
            },
            "action": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        }
    )
    rng = np.random.default_rng(0)
    episodes = [
        [
            {
                "observation": {
                    "rgb": rng.integers(0, 256, (8, 10, 3), np.uint8),
                    "depth": rng.integers(0, 5000, (12, 10, 1), np.uint16),
                    "near": rng.uniform(0, 2, (4, 4)).astype(np.float32),
                },
                "action": np.array([number, t], np.float32),
            }
            for t in range(4)
        ]
        for number in range(5)
    ]

    class Depth(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "depths"
        code_path = epath.Path(__file__)
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((number, {"steps": episode}) for number, episode in enumerate(episodes))

    data_dir = tmp_path_factory.mktemp("depth")
    config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
    Depth(data_dir=str(data_dir)).download_and_prepare(download_config=config)
    return str(data_dir), episodes


def fields(**changes):
    return {
        "name": "depths",
        "image_keys": {"primary": "rgb"},
        "depth_keys": {"primary": "depth", "wrist": "near", "secondary": None},
        "language_key": None,
        "normalization": "normal",
        "action_normalization_mask": (False, False),
    } | changes


def one_batch(data_dir, spec=SPEC, **changes):
    with make_train_stream(
        {"depths": fields(**changes)}, spec, None, data_dir=data_dir, seed=0, batch_size=16
    ) as stream:
        return next(stream), stream.order_spec


def test_batches_hold_the_stored_depth(depth_dataset):
    data_dir, episodes = depth_dataset
    batch, order_spec = one_batch(data_dir)
    check_batch(batch, SPEC)
    assert order_spec["batch"]["depth_sizes"] == {"primary": [6, 5], "wrist": [4, 4], "secondary": [2, 2]}
    observation = batch["observation"]
    for row in range(16):
        number, t = batch["action"][row, 1, 0].astype(int)
        for w in range(2):
            step = episodes[number][max(t - 1 + w, 0)]["observation"]
            # 12 x 10 to 6 x 5: the pixel that holds the middle of two is the second.
            want = step["depth"][1::2, 1::2].astype(np.float64) / 1000
            np.testing.assert_allclose(observation["depth_primary"][row, w], want, rtol=1e-6)
            np.testing.assert_array_equal(observation["depth_wrist"][row, w, ..., 0], step["near"])
    assert observation["pad_mask_dict"]["depth_primary"].all() and observation["pad_mask_dict"]["depth_wrist"].all()
    assert not observation["pad_mask_dict"]["depth_secondary"].any() and not observation["depth_secondary"].any()


def test_pictures_and_depth_lie_where_resize_says(depth_dataset):
    """8x10 pictures and 12x10 depth maps in square inputs, and the order of the samples as it was."""
    sizes = {"primary": (10, 10)}
    plain = dataclasses.replace(SPEC, image_sizes=sizes, depth_sizes=sizes, goal_images=("primary",))
    whole, order = one_batch(depth_dataset[0], plain)
    assert "resize" not in order["batch"]
    boxed, order = one_batch(depth_dataset[0], dataclasses.replace(plain, resize="letterbox"))
    assert order["batch"]["resize"] == "letterbox"
    cropped, _ = one_batch(depth_dataset[0], dataclasses.replace(plain, resize="crop"))
    stored = {
        (*step["action"].astype(int).tolist(),): step["observation"] for episode in depth_dataset[1] for step in episode
    }
    for row in range(16):
        number, t = boxed["action"][row, 1, 0].astype(int).tolist()
        np.testing.assert_array_equal(boxed["action"][row], whole["action"][row])
        seen, picture = boxed["observation"]["image_primary"][row, 1], stored[number, t]["rgb"]
        assert not seen[0].any() and not seen[-1].any()
        np.testing.assert_array_equal(seen[1:-1], picture)
        if boxed["task"]["pad_mask_dict"]["image_primary"][row]:
            goal = boxed["task"]["image_primary"][row]
            assert not goal[0].any() and goal[1:-1].any()
        depth = boxed["observation"]["depth_primary"][row, 1, :, :, 0]
        assert not depth[:, 0].any() and not depth[:, -1].any() and depth[:, 1:-1].any(0).all()
        want = resize_frames(picture[None, :, 1:9], (10, 10))[0]
        np.testing.assert_array_equal(cropped["observation"]["image_primary"][row, 1], want)


def test_the_scale_is_the_datasets(depth_dataset):
    batch, _ = one_batch(depth_dataset[0])
    scaled, _ = one_batch(depth_dataset[0], depth_scale=1 / 1024)
    a, b = (x["observation"]["depth_primary"] for x in (batch, scaled))
    np.testing.assert_allclose(b, a * (1000 / 1024), rtol=1e-5)


def test_mistakes_are_named(depth_dataset):
    with pytest.raises(DataError, match="no depth of camera 'primary' 'dpeth'; did you mean 'depth'"):
        one_batch(depth_dataset[0], depth_keys={"primary": "dpeth"})
    with pytest.raises(DataError, match="depth_scale must be positive"):
        one_batch(depth_dataset[0], depth_scale=0.0)


def test_swapped_channels_are_turned(depth_dataset):
    plain, _ = one_batch(depth_dataset[0])
    swapped, _ = one_batch(depth_dataset[0], bgr_slots=["primary"])
    a, b = (x["observation"]["image_primary"] for x in (plain, swapped))
    np.testing.assert_array_equal(a, b[..., ::-1])
    with pytest.raises(DataError, match="bgr_slots: no camera 'wrist'"):
        one_batch(depth_dataset[0], bgr_slots=["wrist"])


def test_synthetic_batches_and_saved_specs_have_depth():
    batch = synthetic_batch(SPEC, 3)
    check_batch(batch, SPEC)
    depth = batch["observation"]["depth_primary"]
    assert depth.shape == (3, 2, 6, 5, 1) and depth.dtype == np.float32 and 0 < depth.min() and depth.max() < 10
    assert BatchSpec.from_json(SPEC.to_json()) == SPEC
    old = {key: value for key, value in SPEC.to_json().items() if key != "depth_sizes"}
    assert BatchSpec.from_json(old).depth_sizes == {}
