"""An augmentation of a user's own: what it changes, what it must have, and its mistakes by name."""

import dataclasses

import jax
import numpy as np
import pytest

from octo_like.common.parts import PartError
from octo_like.common.schema import flatten, synthetic_batch
from octo_like.training.augment import augment_batch, augmentation_from_config
from tests.model.test_own_parts import SPEC, module  # noqa: F401  a fixture


def test_own_augmentation_changes_images_and_nothing_else(module):  # noqa: F811
    name = module()
    spec = dataclasses.replace(SPEC, goal_images=("primary",))
    batch = synthetic_batch(spec, 3)
    batch["observation"]["pad_mask_dict"]["image_primary"][1] = False
    keys = jax.random.split(jax.random.key(0), 3)
    changed = augment_batch(batch, {"primary": augmentation_from_config("primary", dict(kind=f"{name}:Invert"))}, keys)
    want = 255 - batch["observation"]["image_primary"]
    want[1] = batch["observation"]["image_primary"][1]
    np.testing.assert_array_equal(changed["observation"]["image_primary"], want)
    np.testing.assert_array_equal(changed["task"]["image_primary"], 255 - batch["task"]["image_primary"])
    before, after = dict(flatten(batch)), dict(flatten(changed))
    for path in before.keys() - {"observation/image_primary", "task/image_primary"}:
        np.testing.assert_array_equal(before[path], after[path], path)


@pytest.mark.parametrize(
    "source,entry,message",
    [
        (
            (),
            dict(kind="{}:Invert", amuont=1.0),
            "augmentation.primary: unknown option 'amuont'; did you mean 'amount'",
        ),
        ((), dict(kind="{}:Invret"), "has no class 'Invret'"),
        ((), dict(kind="invert"), "augmentation.primary: unknown kind 'invert'"),
        ((), dict(bright=0.1), "augmentation.primary: unknown option 'bright'; did you mean 'brightness'"),
        ((), dict(brightness=2.0), "brightness must be in"),
        ([("@dataclasses.dataclass(frozen=True)\n", "")], dict(kind="{}:Invert"), "it is no dataclass"),
        ([("def images", "def pictures")], dict(kind="{}:Invert"), "it has no method images"),
        (
            [("def images(self, images, key)", "def images(self, images)")],
            dict(kind="{}:Invert"),
            "images does not take 2",
        ),
        (
            [("255 - images", "images / 255")],
            dict(kind="{}:Invert"),
            r"Invert.images returned \(1, 16, 16, 3\) float32; expected",
        ),
        (
            [("255 - images", "images[:, :8]")],
            dict(kind="{}:Invert"),
            r"returned \(1, 8, 16, 3\) uint8; expected \(1, 16",
        ),
    ],
)
def test_mistakes_of_augmentation(module, source, entry, message):  # noqa: F811
    name = module(*source)
    entry = {key: value.format(name) if key == "kind" else value for key, value in entry.items()}
    with pytest.raises(PartError, match=message):
        augment = {"primary": augmentation_from_config("primary", entry)}
        augment_batch(synthetic_batch(SPEC, 2), augment, jax.random.split(jax.random.key(0), 2))


def test_depth_and_points_need_their_methods(module):  # noqa: F811
    augment = {"primary": augmentation_from_config("primary", dict(kind=f"{module()}:Invert"))}
    keys = jax.random.split(jax.random.key(0), 2)
    for changes, method in ((dict(depth_sizes={"primary": (8, 8)}), "depth"), (dict(points=("cup",)), "points")):
        batch = synthetic_batch(dataclasses.replace(SPEC, **changes), 2)
        with pytest.raises(PartError, match=f"Invert has no method {method}, and the batch has"):
            augment_batch(batch, augment, keys)
