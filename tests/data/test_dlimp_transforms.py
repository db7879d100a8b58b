"""Functions on frames and trajectories under dlimp's names: they do what dlimp's do, or raise an error."""

import pathlib

import numpy as np
import pytest

from octo_like.data import dlimp as dl
from octo_like.data.spec import DataError
from octo_like.data.tf import tf


def test_transforms_have_the_names_of_dlimp(toy):
    """`dl.transforms`: decode, resize, augment, and functions on nested dicts."""
    image = toy.episodes[0][0]["observation"]["front_rgb"]
    frame = {"observation": {"image_front": tf.io.encode_png(image), "text": tf.constant("x")}, "_traj_index": 3}
    decoded = dl.transforms.decode_images(frame)
    np.testing.assert_array_equal(decoded["observation"]["image_front"], image)
    assert decoded["observation"]["text"].numpy() == b"x" and decoded["_traj_index"] == 3
    frame = {"observation": {"image_front": tf.constant(image), "depth": tf.ones([8, 6]), "image_mask": tf.ones([4])}}
    resized = dl.transforms.resize_images(frame, size=(20, 26))["observation"]
    whole = tf.image.resize(image, (20, 26), method="lanczos3", antialias=True)
    assert np.abs(resized["image_front"].numpy() - np.clip(whole, 0, 255)).max() <= 0.5
    assert resized["image_mask"].shape == (4,)
    assert dl.transforms.resize_depth_images(frame, size=(4, 3))["observation"]["depth"].shape == (4, 3)
    assert dl.transforms.resize_depth_image(tf.ones([8, 6, 1]), (4, 3)).shape == (4, 3, 1)
    with pytest.raises(DataError, match="resize_image needs uint8, got float32"):
        dl.transforms.resize_image(tf.ones([2, 2, 3]), size=(1, 1))

    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    assert dl.transforms.flatten_dict(tree) == {"a/b": 1, "a/c": 2, "d": 3}
    assert dl.transforms.unflatten_dict({"a/b": 1, "a/c": 2, "d": 3}) == tree
    assert dl.transforms.selective_tree_map(tree, ["a/b", "d"], str) == {"a": {"b": "1", "c": 2}, "d": "3"}
    assert dl.transforms.selective_tree_map(tree, "*c", str) == {"a": {"b": 1, "c": "2"}, "d": 3}
    assert dl.transforms.selective_tree_map(tree, "c", str) == tree  # a pattern of the whole path
    assert dl.transforms.selective_tree_map(tree, tree.keys(), str)["d"] == "3"
    assert dl.transforms.unflatten_dict({"a/b/c": 1}) == {"a": {"b": {"c": 1}}}
    with pytest.raises(DataError, match=r"match is 3; valid: a string or several"):
        dl.transforms.selective_tree_map(tree, 3, str)
    assert dl.transforms.selective_tree_map(tree, lambda path, x: x > 1, str)["a"] == {"b": 1, "c": "2"}
    assert dl.parallel_vmap(lambda x: x + 1)(tf.range(3)).numpy().tolist() == [1, 2, 3]


def test_depth_is_resized_like_the_reference(shared):
    golden = np.load(shared / "golden" / "pipeline.npz")
    got = dl.transforms.resize_depth_image(golden["resize_depth/in/depth"], (12, 24))
    np.testing.assert_allclose(got, golden["resize_depth/upstream/bilinear_antialias_12x24"], rtol=1e-5, atol=1e-5)


# Every name that a script written for dlimp may use; docs/data.md lists them.
NAMES = {
    "": "DLataset vmap parallel_vmap transforms utils augmentations",
    "DLataset": "from_rlds from_tfrecords map traj_map frame_map flatten iterator with_ram_budget choose_from_datasets "
    "sample_from_datasets zip",
    "transforms": "selective_tree_map flatten_dict unflatten_dict decode_images resize_images resize_depth_images "
    "augment add_next_obs resize_image resize_depth_image augment_image",
    "utils": "tensor_feature resize_image resize_depth_image read_resize_encode_image vmap parallel_vmap",
    "augmentations": "random_resized_crop random_rot90 AUGMENT_OPS augment_image",
}


def test_every_name_of_dlimp_is_here_and_in_the_docs():
    docs = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for place, names in NAMES.items():
        for name in names.split():
            assert hasattr(getattr(dl, place) if place else dl, name), f"{place}.{name}"
            assert f"`{name}`" in docs, name
    for name in dl.augmentations.AUGMENT_OPS:
        assert f"`{name}`" in docs, name


def test_decoding_and_resizing_look_for_a_part_of_the_path(toy):
    image = toy.episodes[0][0]["observation"]["front_rgb"]
    frame = {"observation": {"wrist_image_left": image, "other": image}, "image": {"inside": image}}
    resized = dl.transforms.resize_images(frame, match=["image"], size=(4, 4))
    assert resized["observation"]["wrist_image_left"].shape == resized["image"]["inside"].shape == (4, 4, 3)
    assert resized["observation"]["other"].shape == image.shape
    assert dl.transforms.resize_images(frame["observation"], frame["observation"].keys(), (4, 4))["other"].shape[0] == 4
    for function in (dl.transforms.decode_images, dl.transforms.resize_images, dl.transforms.resize_depth_images):
        with pytest.raises(DataError, match=rf"{function.__name__}: match='\*image' is a pattern, .*e.g. 'image'"):
            function(frame, match="*image")


def test_next_observations():
    trajectory = {"obs": {"x": tf.range(3)}, "action": tf.range(3)}
    padded, cut = dl.transforms.add_next_obs(trajectory), dl.transforms.add_next_obs(trajectory, pad=False)
    assert padded["next_obs"]["x"].numpy().tolist() == [1, 2, 2]
    assert padded["action"].numpy().tolist() == padded["obs"]["x"].numpy().tolist() == [0, 1, 2]
    assert cut["next_obs"]["x"].numpy().tolist() == [1, 2]
    assert cut["action"].numpy().tolist() == cut["obs"]["x"].numpy().tolist() == [0, 1]
    assert "next_obs" not in trajectory
    with pytest.raises(DataError, match="add_next_obs: the trajectory has no 'obs'; did you mean 'obsv'"):
        dl.transforms.add_next_obs({"obsv": tf.range(3)})


def test_what_converters_write(tmp_path):
    features = {"x": dl.utils.tensor_feature(tf.range(4)), "name": dl.utils.tensor_feature(tf.constant("a"))}
    example = tf.train.Example(features=tf.train.Features(feature=features))
    with tf.io.TFRecordWriter(str(tmp_path / "a.tfrecord")) as writer:
        writer.write(example.SerializeToString())
    (item,) = dl.DLataset.from_tfrecords(str(tmp_path)).iterator()
    assert item["x"].tolist() == [0, 1, 2, 3] and item["name"].tolist() == [b"a"] * 4
    picture = np.repeat(np.linspace(0, 255, 40, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(40, axis=1)
    tf.io.write_file(str(tmp_path / "a.jpg"), tf.io.encode_jpeg(picture, quality=95))
    small = tf.io.decode_jpeg(dl.utils.read_resize_encode_image(str(tmp_path / "a.jpg"), (10, 12)))
    assert small.shape == (10, 12, 3) and (np.diff(small.numpy()[:, 0, 0].astype(int)) > 0).all()


def image_of(height=32, width=24):
    return tf.cast(tf.random.stateless_uniform([height, width, 3], [1, 2], 0, 256, tf.int32), tf.uint8)


def crop_by_hand(image, box):
    """Bilinear values at the rows and columns that a box spans, ends included; (h, w, channels) float64."""
    height, width, _ = image.shape
    rows, columns = np.linspace(box[0], box[2], height) * (height - 1), np.linspace(box[1], box[3], width) * (width - 1)
    y, x = np.minimum(rows.astype(int), height - 2), np.minimum(columns.astype(int), width - 2)
    a, b = (rows - y)[:, None, None], (columns - x)[None, :, None]
    upper = image[y][:, x] * (1 - b) + image[y][:, x + 1] * b
    lower = image[y + 1][:, x] * (1 - b) + image[y + 1][:, x + 1] * b
    return upper * (1 - a) + lower * a


def test_augmentation_draws_what_dlimp_draws():
    """Each operation has a seed that is drawn from the one before; a crop has one number; bytes are cut off."""
    image, seed = image_of(), tf.constant([7, 11])
    arguments = dict(
        augment_order=["random_resized_crop", "random_brightness"],
        random_resized_crop=dict(scale=[0.4, 0.9], ratio=[0.7, 1.4]),
        random_brightness=[0.3],
    )
    got = dl.transforms.augment_image(image, seed=seed, **arguments).numpy()
    first = tf.random.stateless_uniform([2], seed, maxval=2**31 - 1, dtype=tf.int32)
    second = tf.random.stateless_uniform([2], first, maxval=2**31 - 1, dtype=tf.int32)
    draw = float(tf.random.stateless_uniform([1], first)[0])
    area, aspect = 0.4 + 0.5 * draw, 0.7 * 2**draw
    height, width = min(1, np.sqrt(area / aspect)), min(1, np.sqrt(area * aspect))
    box = np.array([draw * (1 - height), draw * (1 - width)])
    cropped = crop_by_hand(image.numpy() / 255, [*box, *(box + [height, width])])
    bright = np.clip(cropped + float(tf.random.stateless_uniform([], second, -0.3, 0.3)), 0, 1)
    assert np.abs(got - np.minimum(np.floor(bright * 255.5), 255)).max() <= 1
    assert (got == np.minimum(np.floor(bright * 255.5), 255)).mean() > 0.99
    # A float image stays one, and every image of a batch has a number of its own.
    same = dl.transforms.augment_image(tf.cast(image, tf.float32) / 255, seed=seed, **arguments)
    assert same.dtype == tf.float32 and np.abs(same - bright).max() < 1e-4
    batch = dl.augmentations.random_resized_crop(tf.stack([same, same]), [0.4, 0.9], [0.7, 1.4], first)
    assert batch.shape == (2, 32, 24, 3) and (batch[0].numpy() != batch[1].numpy()).any()
    with pytest.raises(DataError, match=r"random_resized_crop needs \(h, w, channels\) or a batch"):
        dl.augmentations.random_resized_crop(same[0], [0.4, 0.9], [0.7, 1.4], first)


def test_augment_image():
    image = image_of()
    arguments = dict(
        random_resized_crop=dict(scale=[0.5, 0.9], ratio=[0.9, 1.1]),
        random_brightness=[0.2],
        random_contrast=[0.8, 1.2],
        random_saturation=[0.8, 1.2],
        random_hue=[0.1],
    )
    arguments["augment_order"] = list(arguments)
    one, again, other = (dl.transforms.augment_image(image, seed=[5, n], **arguments).numpy() for n in (1, 1, 2))
    assert one.shape == (32, 24, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.5 and (one != image.numpy()).mean() > 0.5
    np.testing.assert_array_equal(dl.transforms.augment_image(image, augment_order=[]), image)
    whole = dict(augment_order=["random_resized_crop"], random_resized_crop=dict(scale=[1, 1], ratio=[1, 1]))
    np.testing.assert_array_equal(dl.transforms.augment_image(image, seed=[0, 0], **whole), image)
    with pytest.raises(DataError, match="augment_image needs augment_order, .*random_hue"):
        dl.transforms.augment_image(image)
    with pytest.raises(DataError, match="no operation 'random_huge'; did you mean 'random_hue'"):
        dl.transforms.augment_image(image, augment_order=["random_huge"])
    with pytest.raises(DataError, match="'random_hue' is not in augment_order"):
        dl.transforms.augment_image(image, random_hue=[0.1], augment_order=[])


def test_augment_in_a_pipeline():
    """Alike for the frames of a trajectory; of the leaves whose path ends as the pattern says."""
    image, arguments = image_of(8, 8), dict(augment_order=["random_brightness"], random_brightness=[0.5])
    tree = {"image": image, "left": {"image": image, "image_mask": image}}
    frames = dl.DLataset.from_tensor_slices(tf.nest.map_structure(lambda x: tf.stack([[x] * 2] * 3), tree)).enumerate()
    frames = frames.map(lambda n, x: {**x, "_traj_index": tf.repeat(n, 2)})
    items = list(frames.frame_map(lambda x: dl.transforms.augment(x, augment_kwargs=arguments)).iterator())
    for number, item in enumerate(items):
        np.testing.assert_array_equal(item["image"][0], item["image"][1])
        np.testing.assert_array_equal(item["image"], item["left"]["image"])
        np.testing.assert_array_equal(item["left"]["image_mask"][0], image)
        alone = dl.transforms.augment_image(image, seed=[number, number], **arguments)
        np.testing.assert_array_equal(item["image"][0], alone)
    assert (items[0]["image"] != items[1]["image"]).any()
    apart = frames.frame_map(lambda x: dl.transforms.augment(x, "*image", False, False, arguments))
    item = next(apart.iterator())
    assert (item["image"][0] != item["image"][1]).any() and (item["image"] != item["left"]["image"]).any()
    with pytest.raises(DataError, match="the frame has no '_traj_index', which traj_identical=True needs"):
        dl.transforms.augment({"image": image}, augment_kwargs=arguments)
    with pytest.raises(DataError, match="needs augment_order"):
        dl.transforms.augment({"image": image, "_traj_index": 0})
