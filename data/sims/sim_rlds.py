"""What the datasets of the simulators share: an RLDS builder around `sim_episodes`."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sim_episodes
import tensorflow_datasets as tfds
from etils import epath

from octo_like.envs.sims import GROUPS


class SimulatorBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Expert demonstrations of one group of tasks, in RLDS.

    Args:
      train_episodes, val_episodes: successful episodes of EVERY task that each split gets. (`tfds build` uses the
        defaults.)
      demonstrator: makes the episodes; by default one process is started for it.
      on_episode: called after each episode with its number of steps, for a progress bar.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    # TFDS would look this up through `importlib_resources`, which its own dependencies do not install.
    code_path = epath.Path(__file__)
    GROUP: str
    CAMERAS: Mapping[str, int]  # slot -> pixels
    ACTION: tuple[str, ...]
    PROPRIO: tuple[str, ...]

    def __init__(
        self,
        *,
        train_episodes: int = 50,
        val_episodes: int = 5,
        demonstrator: sim_episodes.Demonstrator | None = None,
        on_episode: Callable[[int], None] | None = None,
        **kwargs: Any,
    ):
        self._episodes = {"train": train_episodes, "val": val_episodes}
        self._demonstrator = demonstrator
        self._on_episode = on_episode or (lambda steps: None)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        observation = {
            sim_episodes.image_key(slot): features.Image(shape=(size, size, 3), encoding_format="jpeg")
            for slot, size in self.CAMERAS.items()
        }
        observation["state"] = features.Tensor(
            shape=(len(self.PROPRIO),), dtype=np.float32, doc=", ".join(self.PROPRIO)
        )
        step = {
            "observation": features.FeaturesDict(observation),
            "action": features.Tensor(shape=(len(self.ACTION),), dtype=np.float32, doc=", ".join(self.ACTION)),
            "language_instruction": features.Text(),
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
            description=f"Scripted demonstrations of {self.GROUP}: {', '.join(GROUPS[self.GROUP][1])}.",
            features=features.FeaturesDict(
                {"steps": features.Dataset(step), "episode_metadata": features.FeaturesDict(metadata)}
            ),
            metadata=tfds.core.MetadataDict(failed_episodes={}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split, count) for split, count in self._episodes.items()}

    def _generate_examples(self, split: str, count: int):
        with contextlib.ExitStack() as stack:
            demonstrator = self._demonstrator or stack.enter_context(sim_episodes.Demonstrator())
            for episode in demonstrator.episodes(self.GROUP, split, count):
                yield episode["episode_metadata"]["seed"], episode
                self._on_episode(len(episode["steps"]))
            failed = {
                task: number
                for (group, task, where), number in demonstrator.failed.items()
                if (group, where) == (self.GROUP, split)
            }
        self.info.metadata["failed_episodes"][split] = failed


class MetaWorldBuilder(SimulatorBuilder, skip_registration=True):
    """The Sawyer arm of Meta-World; see `octo_like.envs.sims.metaworld`."""

    CAMERAS = {"primary": 64, "secondary": 64}
    ACTION = ("dx", "dy", "dz", "gripper effort")
    PROPRIO = ("x", "y", "z", "gripper opening")


class FetchBuilder(SimulatorBuilder, skip_registration=True):
    """The Fetch robot of Gymnasium-Robotics; see `octo_like.envs.sims.fetch`."""

    CAMERAS = {"primary": 64, "secondary": 64}
    ACTION = ("dx", "dy", "dz", "gripper")
    PROPRIO = ("x", "y", "z", "right finger", "left finger")
