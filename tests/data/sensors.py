"""A dataset with sensors that the schema has no names for: forces, a contact and a patch of taxels."""

import numpy as np


def make_episodes(count, seed=0):
    """Episodes of 3 to 8 steps: [{"observation", "action", "language_instruction"}, ...]."""
    rng = np.random.default_rng(seed)

    def step(number, t):
        return {
            "observation": {
                "image": np.full((32, 32, 3), (number * 9 + t) % 256, np.uint8),
                "force_torque": rng.normal(3.0, [1, 2, 3, 4, 5, 0.1]).astype(np.float32),
                "contact": np.float32(rng.integers(0, 2)),
                "taxels": rng.integers(0, 1000, (2, 3)).astype(np.int32),
            },
            "action": np.array([number, t, rng.normal()], np.float32),
            "language_instruction": "push",
        }

    return [[step(number, t) for t in range(int(rng.integers(3, 9)))] for number in range(count)]


def build(data_dir, name, episodes):
    """Writes them with a TFDS builder, in the order of `in_order`."""
    import tensorflow_datasets as tfds
    from etils import epath

    steps = tfds.features.FeaturesDict(
        {
            "observation": {
                "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
                "force_torque": tfds.features.Tensor(shape=(6,), dtype=np.float32),
                "contact": tfds.features.Scalar(dtype=np.float32),
                "taxels": tfds.features.Tensor(shape=(2, 3), dtype=np.int32),
            },
            "action": tfds.features.Tensor(shape=(3,), dtype=np.float32),
            "language_instruction": tfds.features.Text(),
        }
    )

    class Sensors(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        code_path = epath.Path(__file__)
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(steps)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((number, {"steps": episode}) for number, episode in enumerate(episodes))

    Sensors.name = name
    config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
    Sensors(data_dir=str(data_dir)).download_and_prepare(download_config=config)
    return str(data_dir)


def of(episodes, batch, key):
    """What the stored `key` says at each (row, window step) of a batch: (B, W, ...). The action tells which it is."""
    window = batch["observation"]["timestep"]
    numbers = batch["action"][:, -1, 0, 0].astype(int)
    rows = [[episodes[n][t]["observation"][key] for t in steps] for n, steps in zip(numbers, window, strict=True)]
    return np.array(rows, np.float32)
