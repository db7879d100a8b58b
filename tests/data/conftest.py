"""Datasets that the tests write themselves: real TFDS builders, real TFRecord files."""

import dataclasses
import pathlib

import numpy as np
import pytest

TEXTS = ("press the red button", "open the drawer", "")


@dataclasses.dataclass(frozen=True)
class Toy:
    """A dataset on disk and what was written into it, episode by episode, in the order on disk."""

    name: str
    data_dir: str
    path: pathlib.Path
    episodes: list

    def fields(self, **changes):
        """Fields of a DatasetSpec that reads it."""
        return {
            "name": self.name,
            "image_keys": {"primary": "front_rgb", "wrist": "hand_rgb"},
            "proprio_keys": ("joints", "aperture"),
            "action_key": "control",
            "language_key": "task_text",
            "val_fraction": 0.2,
        } | changes


def make_episodes(count, seed=0, action_dim=4, min_steps=3, max_steps=12):
    """Random episodes of variable length; images tell their episode and step by their colour."""
    rng = np.random.default_rng(seed)
    episodes = []
    for number in range(count):
        steps = int(rng.integers(min_steps, max_steps + 1))
        text = TEXTS[number % len(TEXTS)]
        episode = []
        for step in range(steps):
            front = np.zeros((40, 52, 3), np.uint8)
            front[..., 0], front[..., 1] = number * 7 % 256, step * 11 % 256
            front[:20, :26, 2] = 200
            hand = rng.integers(0, 256, (3, 3, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            episode.append(
                {
                    "observation": {
                        "front_rgb": front,
                        "hand_rgb": hand,
                        "joints": rng.normal(2.0, [1.0, 0.1, 30.0]).astype(np.float32),
                        "aperture": np.float32(rng.random()),
                    },
                    "control": np.append(rng.normal(size=action_dim - 1), step % 2).astype(np.float32),
                    "task_text": text,
                    "is_first": step == 0,
                    "is_last": step == steps - 1,
                    "is_terminal": step == steps - 1,
                }
            )
        episodes.append(episode)
    return episodes


def build(data_dir, name, splits, *, num_shards=1, rlds=True):
    """Writes {split: episodes} with a TFDS builder of its own. Returns the version's folder."""
    import tensorflow_datasets as tfds
    from etils import epath

    from octo_like.data.tf import tf

    assert not tf.config.get_visible_devices("GPU")  # TensorFlow is set up as the package does it
    first = next(episodes for episodes in splits.values() if episodes)[0][0]
    step = tfds.features.FeaturesDict(
        {
            "observation": {
                "front_rgb": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "hand_rgb": tfds.features.Image(shape=(24, 24, 3), encoding_format="jpeg"),
                "joints": tfds.features.Tensor(shape=(3,), dtype=np.float32),
                "aperture": tfds.features.Scalar(dtype=np.float32),
            },
            "control": tfds.features.Tensor(shape=first["control"].shape, dtype=np.float32),
            "task_text": tfds.features.Text(),
            "is_first": tfds.features.Scalar(dtype=np.bool_),
            "is_last": tfds.features.Scalar(dtype=np.bool_),
            "is_terminal": tfds.features.Scalar(dtype=np.bool_),
        }
    )
    metadata = {"number": tfds.features.Scalar(dtype=np.int32)}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        code_path = epath.Path(__file__)
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            key = "steps" if rlds else "moves"
            features = {key: tfds.features.Dataset(step), "episode_metadata": metadata}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate(episodes) for split, episodes in splits.items()}

        def _generate(self, episodes):
            key = "steps" if rlds else "moves"
            for number, episode in enumerate(episodes):
                yield number, {key: episode, "episode_metadata": {"number": number}}

        def _generate_examples(self):
            raise AssertionError("unused")

    Builder.name = name
    builder = Builder(data_dir=str(data_dir))
    config = tfds.download.DownloadConfig(num_shards=num_shards, compute_stats=tfds.download.ComputeStatsMode.SKIP)
    builder.download_and_prepare(download_config=config)
    return pathlib.Path(builder.data_path)


def order_on_disk(path, split, episodes):
    """`episodes` in the order of the files (TFDS shuffles them when writing)."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(path))
    decoders = {"steps": tfds.decode.SkipDecoding()}
    config = tfds.ReadConfig(interleave_cycle_length=1)
    dataset = builder.as_dataset(split=split, decoders=decoders, read_config=config)
    return [episodes[int(item["episode_metadata"]["number"])] for item in dataset]


@pytest.fixture(scope="session")
def make_toy():
    """Function that writes a toy dataset: (folder, name, episodes or {split: episodes}, **options) -> Toy."""

    def make(data_dir, name, episodes, **options):
        splits = episodes if isinstance(episodes, dict) else {"train": episodes}
        path = build(data_dir, name, splits, **options)
        ordered = order_on_disk(path, "train", splits["train"]) if options.get("rlds", True) else splits["train"]
        return Toy(name, str(data_dir), path, ordered)

    return make


@pytest.fixture(scope="session")
def toy(make_toy, tmp_path_factory):
    """23 episodes in three files. Tests must not change its files."""
    return make_toy(tmp_path_factory.mktemp("toy"), "toy_buttons", make_episodes(23), num_shards=3)


@pytest.fixture(scope="session")
def wide_toy(make_toy, tmp_path_factory):
    """A second dataset: more action dimensions."""
    return make_toy(tmp_path_factory.mktemp("wide"), "toy_wide", make_episodes(9, seed=5, action_dim=6))


@pytest.fixture(scope="session")
def episodes_like():
    """`make_episodes`, for tests that write datasets with something wrong in them."""
    return make_episodes


@pytest.fixture
def copied(toy, tmp_path):
    """A private copy of `toy`, to be damaged."""
    import shutil

    target = tmp_path / "data"
    shutil.copytree(
        pathlib.Path(toy.data_dir) / toy.name, target / toy.name, ignore=shutil.ignore_patterns(".octo_like")
    )
    return dataclasses.replace(toy, data_dir=str(target), path=target / toy.name / "1.0.0")
