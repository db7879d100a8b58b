"""Datasets with texts to learn: pictures with questions and answers, and a robot that says what it is doing."""

import numpy as np

COLOURS = ("red", "green", "blue")


def make_questions(count, seed=0):
    """Episodes of one step without actions: what colour is the picture?"""
    rng = np.random.default_rng(seed)

    def one(number):
        colour = int(rng.integers(3))
        image = np.zeros((32, 32, 3), np.uint8)
        image[..., colour] = 255
        image[0, 0] = number % 256
        return {
            "observation": {"image": image},
            "language_instruction": "what colour is it?",
            "answer": f"it is {COLOURS[colour]}" if number % 7 else "",
        }

    return [[one(number)] for number in range(count)]


def make_moves(count, seed=0):
    """Episodes of 4 to 8 steps: the robot first reaches, then pushes; the picture says which by its blue."""
    rng = np.random.default_rng(seed)
    episodes = []
    for number in range(count):
        steps = int(rng.integers(4, 9))
        image = np.full((32, 32, 3), number % 256, np.uint8)
        episodes.append(
            [
                {
                    "observation": {"image": np.where([False, False, True], 200 * (t >= steps // 2), image)},
                    "action": np.array([number, t, float(t >= steps // 2)], np.float32),
                    "language_instruction": "move the block" if number % 3 else "",
                    "subtask": "push the block" if t >= steps // 2 else "reach for the block",
                }
                for t in range(steps)
            ]
        )
        for step in episodes[-1]:
            step["observation"]["image"] = step["observation"]["image"].astype(np.uint8)
    return episodes


def build(data_dir, name, episodes):
    """Writes them with a TFDS builder; features follow the first step. Returns the folder."""
    import tensorflow_datasets as tfds
    from etils import epath

    first = episodes[0][0]
    texts = {key: tfds.features.Text() for key, value in first.items() if isinstance(value, str)}
    observation = {"image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png")}
    action = {"action": tfds.features.Tensor(shape=(3,), dtype=np.float32)} if "action" in first else {}
    steps = tfds.features.FeaturesDict({"observation": observation, **action, **texts})

    class Said(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        code_path = epath.Path(__file__)
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(steps)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((number, {"steps": episode}) for number, episode in enumerate(episodes))

    Said.name = name
    config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
    Said(data_dir=str(data_dir)).download_and_prepare(download_config=config)
    return str(data_dir)
