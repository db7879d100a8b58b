"""Pictures of the tabletop with questions and answers, in RLDS. Built by `tfds build` here, or by ../build.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from octo_like.envs.demonstrations import IMAGE_SIZE
from octo_like.envs.picture_rows import PictureSimulator


class TabletopWords(tfds.core.GeneratorBasedBuilder):
    """Episodes of one step without an action: a picture, what is asked about it, and the answer.

    Args:
      train_episodes, val_episodes: how many rows each split gets. (`tfds build` uses the defaults.)
      simulator: where rows are made; default: this process.
      on_episode: called after each row with 1, for a progress bar.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.0.0": "First release.", "1.1.0": "Points of the things that are asked about."}
    # TFDS would look this up through `importlib_resources`, which its own dependencies do not install.
    code_path = epath.Path(__file__)

    def __init__(
        self,
        *,
        train_episodes: int = 4000,
        val_episodes: int = 200,
        simulator: PictureSimulator | None = None,
        on_episode: Callable[[int], None] | None = None,
        **kwargs: Any,
    ):
        self._rows = {"train": train_episodes, "val": val_episodes}
        self._simulator = simulator or PictureSimulator()
        self._on_episode = on_episode or (lambda steps: None)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        image = features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="jpeg", doc="Primary camera.")
        points = {
            f"{name}_point": features.Tensor(
                shape=(2,),
                dtype=np.float32,
                doc=f"Column and row in the image, as fractions of it, of the {thing} asked about; NaN: none is.",
            )
            for name, thing in (("target", "block"), ("plate", "plate"))
        }
        step = {
            "observation": features.FeaturesDict({"image": image, **points}),
            "language_instruction": features.Text(doc="What is asked."),
            "answer": features.Text(doc="Short, lower case; places as location tokens."),
            "is_first": features.Scalar(dtype=np.bool_),
            "is_last": features.Scalar(dtype=np.bool_),
            "is_terminal": features.Scalar(dtype=np.bool_),
            "reward": features.Scalar(dtype=np.float32),
            "discount": features.Scalar(dtype=np.float32),
        }
        metadata = {"kind": features.Text(), "seed": features.Scalar(dtype=np.int64)}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures of the tabletop world with questions and answers.",
            features=features.FeaturesDict(
                {"steps": features.Dataset(step), "episode_metadata": features.FeaturesDict(metadata)}
            ),
            metadata=tfds.core.MetadataDict(passed_over={}, **self._simulator.record()),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split, count) for split, count in self._rows.items()}

    def _generate_examples(self, split: str, count: int):
        for row in self._simulator.rows(split, count):
            yield row["episode_metadata"]["seed"], row
            self._on_episode(1)
        self.info.metadata["passed_over"][split] = self._simulator.passed_over[split]
