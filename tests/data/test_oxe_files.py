"""Registry datasets from real files: readings, mixtures from a config, warnings, channel order."""

import dataclasses
import logging
import pathlib

import numpy as np
import pytest

from octo_like.common.defaults import batch_spec, default_config
from octo_like.data.inputs import inputs_from_config
from octo_like.data.prepare import prepare_dataset
from octo_like.data.spec import DataError, DatasetSpec
from tests.data.streams import make_train_stream

FOOD = "cmu_playing_with_food"  # every frame is red in truth, stored with the channels reversed
STORED, TRUE = (10, 60, 200), (200, 60, 10)


def food_episodes(count=4, steps=6):
    rng = np.random.default_rng(0)
    image = np.full((32, 32, 3), STORED, np.uint8)
    quaternion = np.array([np.cos(0.15), 0, 0, np.sin(0.15)])  # 0.3 rad about z, w first
    return [
        [
            {
                "observation": {"image": image, "finger_vision_1": image, "state": rng.normal(size=6)},
                "action": np.concatenate([rng.normal(size=3), quaternion, [step % 2]]),
                "language_instruction": f"cut fruit {number}",
            }
            for step in range(steps)
        ]
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    import tensorflow_datasets as tfds
    from etils import epath

    def floats(n):
        return tfds.features.Tensor(shape=(n,), dtype=np.float32)

    image = tfds.features.Image(shape=(32, 32, 3), encoding_format="png")
    observation = {"image": image, "finger_vision_1": image, "state": floats(6)}
    step = {"observation": observation, "action": floats(8), "language_instruction": tfds.features.Text()}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        code_path = epath.Path(__file__)
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, episode in enumerate(food_episodes()):
                converted = [
                    {
                        **one,
                        "action": one["action"].astype(np.float32),
                        "observation": {**one["observation"], "state": one["observation"]["state"].astype(np.float32)},
                    }
                    for one in episode
                ]
                yield number, {"steps": converted}

    Builder.name = FOOD
    folder = tmp_path_factory.mktemp("oxe")
    config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
    Builder(data_dir=str(folder)).download_and_prepare(download_config=config)
    return folder


def config_for(data_dir, **data):
    config = default_config()
    config.batch_size, config.eval.batches = 4, 1
    config.image_sizes = dict(primary=(32, 32), wrist=(16, 16))
    config.goal_images = ("primary",)
    config.model = dict(heads=dict(action=dict(action_horizon=2, action_dim=7)))
    config.text.model = None
    config.proprio_dim = 6
    with config.data.ignore_type():
        config.data.update(data_dir=str(data_dir), **data)
    return config


def run_inputs(config):
    inputs = inputs_from_config(config, batch_spec(config), None)
    with inputs.stream as stream:
        return next(stream), inputs, stream.order_spec


def test_a_mixture_from_a_config_in_both_readings(data_dir):
    """A quaternion of 0.3 rad about z is that angle in our reading, a half-turn off in Octo's; nothing is mixed up."""
    seen = {}
    for compat in (False, True):
        config = config_for(data_dir, mix="octo/oxe_full", mix_only=(FOOD,), octo_compat=compat)
        batch, inputs, order_spec = run_inputs(config)
        assert list(inputs.statistics) == [FOOD]
        angles = inputs.statistics[FOOD]["action"]["mean"][3:6]
        pixel = batch["observation"]["image_primary"][0, -1, 5, 5]
        seen[compat] = (angles, pixel.tolist(), order_spec)
        goal = batch["task"]["image_primary"][batch["task"]["pad_mask_dict"]["image_primary"]]
        assert len(goal) and (goal == pixel).all()
    np.testing.assert_allclose(seen[False][0], [0, 0, 0.3], atol=1e-6)
    assert abs(abs(seen[True][0][0]) - np.pi) < 0.5  # identity read as (x, y, z, w) = (1, 0, 0, 0)
    assert seen[False][1] == list(TRUE) and seen[True][1] == list(STORED)
    # Two indices beside each other, and two orders: a run of one cannot be resumed as the other.
    assert len(list(pathlib.Path(data_dir).glob(f"{FOOD}/1.0.0/.octo_like/train-*"))) == 2
    assert seen[False][2] != seen[True][2]


def test_a_copy_that_was_repaired_is_not_swapped(data_dir):
    fields = dict(standardize=FOOD, bgr_slots=())
    config = config_for(data_dir, datasets={FOOD: fields})
    assert run_inputs(config)[0]["observation"]["image_primary"][0, -1, 5, 5].tolist() == list(STORED)


def test_channel_order_follows_the_key(data_dir):
    """Cameras named by the config are swapped by what they show, in whatever slot."""
    fields = dict(standardize=FOOD, image_keys={"primary": "finger_vision_1"})
    assert DatasetSpec.from_dict(fields, FOOD).bgr_slots == ("primary",)
    fields = dict(standardize=FOOD, image_keys={"primary": "image", "secondary": "observation/finger_vision_2"})
    assert DatasetSpec.from_dict(fields, FOOD).bgr_slots == ("primary", "secondary")
    fields = dict(standardize="berkeley_autolab_ur5", image_keys={"wrist": "image", "primary": None})
    assert DatasetSpec.from_dict(fields, "berkeley_autolab_ur5").bgr_slots == ()
    config = config_for(data_dir, datasets={FOOD: dict(standardize=FOOD)})
    batch, _, _ = run_inputs(config)
    assert batch["observation"]["image_wrist"][0, -1, 5, 5].tolist() == list(TRUE)


def test_what_is_known_about_a_copy_is_logged(data_dir, tmp_path, caplog):
    spec = DatasetSpec.from_dict(dict(standardize=FOOD), FOOD)
    with caplog.at_level(logging.WARNING):
        prepare_dataset(FOOD, spec, str(data_dir), str(tmp_path), progress=False)
    assert f"{FOOD}: actions are absolute poses" in caplog.text
    assert "channels of primary, wrist are swapped" in caplog.text and "bgr_slots=()" in caplog.text
    assert "version" not in caplog.text
    caplog.clear()
    other = dataclasses.replace(spec, bgr_slots=(), compat="octo")
    with caplog.at_level(logging.WARNING):
        prepare_dataset(FOOD, other, str(data_dir), str(tmp_path), progress=False)
    assert "are swapped" not in caplog.text
    assert "raw frames of primary, wrist are BGR, and compat='octo' does not swap them" in caplog.text
    assert "bgr_slots=('primary', 'wrist')" in caplog.text
    # The same files under the name of an entry that describes version 0.1.0, with other leaves.
    caplog.clear()
    wrong = DatasetSpec.from_dict(dict(standardize="bridge_oxe", name=FOOD), FOOD)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="version 0.1.0; .*'bridge_dataset'"):
        prepare_dataset(FOOD, wrong, str(data_dir), str(tmp_path), progress=False)
    assert "the registry describes version 0.1.0, this is 1.0.0" in caplog.text


@pytest.mark.parametrize("compat", ["octo", "openvla"])
def test_readings_that_leave_bgr_frames_say_so(compat):
    from octo_like.data.oxe import registry

    (said,) = registry.cautions("utaustin_mutex", compat, "0.1.0", 1500, ())
    assert f"raw frames of primary, wrist are BGR, and compat={compat!r} does not swap them" in said
    assert "set bgr_slots=('primary', 'wrist')" in said
    (said,) = registry.cautions("utaustin_mutex", compat, "0.1.0", 1500, (), {"wrist": "observation/image"})
    assert "frames of wrist are BGR" in said
    (said,) = registry.cautions("utaustin_mutex", compat, "0.1.0", 1500, ("primary", "wrist"))
    assert "are swapped" in said  # the user chose the swap, and is told of it
    assert registry.cautions("bridge_dataset", compat, "1.0.0", 1500, ()) == []
    # In our reading `bgr_slots=()` says that the copy was repaired.
    assert registry.cautions("utaustin_mutex", None, "0.1.0", 1500, ()) == []


def test_unfiltered_copies_are_noticed():
    from octo_like.data.oxe import registry

    assert registry.cautions("kuka", None, "0.1.0", 209_880, ()) == []
    (said,) = registry.cautions("kuka", None, "0.1.0", 580_392, ())
    assert "still holds the failed ones" in said


def test_keeping_instructions_is_another_index(data_dir, tmp_path):
    found = {}
    for blank in (None, True):
        spec = DatasetSpec.from_dict(dict(standardize=FOOD, blank_text=blank), FOOD)
        found[blank] = prepare_dataset(FOOD, spec, str(data_dir), str(tmp_path), progress=False)
    assert sorted(found[None].instructions) == [f"cut fruit {n}" for n in range(4)]
    assert list(found[True].instructions) == [""]
    assert found[None].train.hash != found[True].train.hash


def test_stream_refuses_an_unknown_reading(data_dir):
    with pytest.raises(DataError, match="compat 'upstream'; valid"):
        make_train_stream(
            {FOOD: dict(standardize=FOOD, compat="upstream")},
            batch_spec(config_for(data_dir)),
            None,
            data_dir=str(data_dir),
            seed=0,
            batch_size=4,
        )
