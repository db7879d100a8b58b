"""What the four tabletop datasets share: an RLDS builder around `octo_like.envs.demonstrations`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from octo_like.envs import EMBODIMENTS, demonstrations


class TabletopBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Expert demonstrations of one embodiment, in RLDS.

    Args:
      train_episodes, val_episodes: how many successful episodes each split gets. (`tfds build` uses the defaults.)
      simulator: where episodes are made; default: this process.
      on_episode: called after each episode with its number of steps, for a progress bar.
    """

    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES = {
        "1.0.0": "First release.",
        "1.1.0": "Points of the named things; pairs that are held out.",
        "1.2.0": "A camera at the wrist of tabletop_arm.",
    }
    # TFDS would look this up through `importlib_resources`, which its own dependencies do not install.
    code_path = epath.Path(__file__)
    EMBODIMENT: str
    STEP_TEXTS: tuple[str, ...] = ()  # of a step, besides the instruction
    STEP_POINTS: Mapping[str, str] = {  # observations, and what they are the places of
        "target_point": "the named block",
        "plate_point": "the named plate; NaN when none is named",
    }
    SIMULATOR: type[demonstrations.Simulator] = demonstrations.Simulator

    def __init__(
        self,
        *,
        train_episodes: int = 400,
        val_episodes: int = 20,
        simulator: demonstrations.Simulator | None = None,
        on_episode: Callable[[int], None] | None = None,
        **kwargs: Any,
    ):
        self._episodes = {"train": train_episodes, "val": val_episodes}
        self._simulator = simulator or self.SIMULATOR()
        self._on_episode = on_episode or (lambda steps: None)
        super().__init__(**kwargs)

    @property
    def embodiment(self):
        return EMBODIMENTS[self.EMBODIMENT]

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.embodiment.tasks

    def _info(self) -> tfds.core.DatasetInfo:
        embodiment = self.embodiment
        features = tfds.features
        size, wrist = demonstrations.IMAGE_SIZE, demonstrations.WRIST_SIZE
        observation = {"image": features.Image(shape=(size, size, 3), encoding_format="jpeg", doc="Primary camera.")}
        if "wrist" in embodiment.cameras:
            shape = (wrist, wrist, 3)
            observation["wrist_image"] = features.Image(shape=shape, encoding_format="jpeg", doc="Wrist camera.")
        if embodiment.proprio_dim:
            doc = ", ".join(embodiment.proprio_names)
            observation["state"] = features.Tensor(shape=(embodiment.proprio_dim,), dtype=np.float32, doc=doc)
        for name, what in self.STEP_POINTS.items():
            doc = f"Column and row in the primary image, as fractions of it, of {what}."
            observation[name] = features.Tensor(shape=(2,), dtype=np.float32, doc=doc)
        actions = zip(embodiment.action_names, embodiment.action_units, strict=True)
        doc = ", ".join(f"{name} [{unit}]" for name, unit in actions)
        step = {
            "observation": features.FeaturesDict(observation),
            "action": features.Tensor(shape=(embodiment.action_dim,), dtype=np.float32, doc=doc),
            "language_instruction": features.Text(),
            **{name: features.Text() for name in self.STEP_TEXTS},
            "is_first": features.Scalar(dtype=np.bool_),
            "is_last": features.Scalar(dtype=np.bool_),
            "is_terminal": features.Scalar(dtype=np.bool_),
            "reward": features.Scalar(dtype=np.float32),
            "discount": features.Scalar(dtype=np.float32),
        }
        metadata = {
            "seed": features.Scalar(dtype=np.int64),
            "task": features.Text(),
            "success": features.Scalar(dtype=np.bool_),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Scripted demonstrations of the tabletop world's {self.EMBODIMENT}: {', '.join(self.tasks)}.",
            features=features.FeaturesDict(
                {"steps": features.Dataset(step), "episode_metadata": features.FeaturesDict(metadata)}
            ),
            metadata=tfds.core.MetadataDict(
                failed_episodes={}, seed=self._simulator.seed, **self._simulator.colors.record()
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split, count) for split, count in self._episodes.items()}

    def _generate_examples(self, split: str, count: int):
        for episode in self._simulator.episodes(self.EMBODIMENT, split, count):
            yield episode["episode_metadata"]["seed"], episode
            self._on_episode(len(episode["steps"]))
        self.info.metadata["failed_episodes"][split] = self._simulator.failed[self.EMBODIMENT, split]
