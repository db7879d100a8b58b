"""Template: your own recordings as an RLDS dataset. Copy this folder, rename it and the class, edit three places.

    python data/template/my_robot/my_robot_dataset_builder.py --raw RECORDINGS --data_dir DATA

(or, in this folder, `tfds build --manual_dir RECORDINGS --data_dir DATA`). The recordings are read by `read_episode`
below; as it stands, one .npz file per episode with

    image         (T, h, w, 3) uint8     what the camera saw before each action
    wrist_image   (T, h, w, 3) uint8
    state         (T, 8) float32         7 joint angles [rad], gripper opening [0 closed .. 1 open]
    action        (T, 8) float32         7 joint targets [rad], gripper (0 close, 1 open)
    instruction   str                    what the episode shows, e.g. "put the cup on the shelf"
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

STATE_DIM = ACTION_DIM = 8


# 1. How one of your recordings is read. Return one dict per step; keep the rate at which actions were sent.
def read_episode(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Steps of one recording, with the features declared in `MyRobot._info`."""
    with np.load(path) as episode:
        arrays = {key: episode[key] for key in episode.files}
    missing = [key for key in ("image", "wrist_image", "state", "action", "instruction") if key not in arrays]
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)}; it holds: {', '.join(arrays)}")
    steps = len(arrays["action"])
    for key in ("image", "wrist_image", "state"):
        if len(arrays[key]) != steps:
            raise ValueError(f"{path}: {steps} actions, but {len(arrays[key])} of {key!r}")
    if not np.isfinite(arrays["action"]).all():
        raise ValueError(f"{path}: actions are not finite")
    for t in range(steps):
        yield {
            "observation": {
                "image": arrays["image"][t],
                "wrist_image": arrays["wrist_image"][t],
                "state": arrays["state"][t].astype(np.float32),
            },
            "action": arrays["action"][t].astype(np.float32),
            "language_instruction": str(arrays["instruction"]),
            "is_first": t == 0,
            "is_last": t == steps - 1,
            "is_terminal": t == steps - 1,
            "reward": float(t == steps - 1),
            "discount": 1.0,
        }


# 2. The dataset's name is the class's: MyRobot is my_robot. Raise VERSION whenever the data changes.
class MyRobot(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Demonstrations on my robot."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First recordings."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the recordings (*.npz) into the folder given as --manual_dir."
    code_path = epath.Path(__file__)

    def __init__(self, *, raw_dir: str | None = None, **kwargs: Any):
        self._raw_dir = raw_dir
        super().__init__(**kwargs)

    # 3. What a step holds. JPEG keeps the files small; store images at the size you train on, or larger.
    def _info(self) -> tfds.core.DatasetInfo:
        step = {
            "observation": {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg", doc="fixed camera"),
                "wrist_image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg", doc="wrist camera"),
                "state": tfds.features.Tensor(shape=(STATE_DIM,), dtype=np.float32, doc="joints [rad], gripper 0..1"),
            },
            "action": tfds.features.Tensor(shape=(ACTION_DIM,), dtype=np.float32, doc="joint targets [rad], gripper"),
            "language_instruction": tfds.features.Text(),
            "is_first": tfds.features.Scalar(dtype=np.bool_),
            "is_last": tfds.features.Scalar(dtype=np.bool_),
            "is_terminal": tfds.features.Scalar(dtype=np.bool_),
            "reward": tfds.features.Scalar(dtype=np.float32),
            "discount": tfds.features.Scalar(dtype=np.float32),
        }
        features = {"steps": tfds.features.Dataset(step), "episode_metadata": {"recording": tfds.features.Text()}}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        # No validation split is needed: training holds a fixed share of the episodes out.
        folder = pathlib.Path(self._raw_dir or dl_manager.manual_dir)
        recordings = sorted(folder.glob("*.npz"))
        if not recordings:
            raise FileNotFoundError(f"no *.npz recordings in {folder}")
        return {"train": self._generate_examples(recordings)}

    def _generate_examples(self, recordings: list[pathlib.Path]) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in recordings:
            yield path.name, {"steps": list(read_episode(path)), "episode_metadata": {"recording": path.name}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", required=True, help="folder of the recordings")
    parser.add_argument("--data_dir", required=True, help="folder of your TFDS datasets")
    args = parser.parse_args()
    builder = MyRobot(raw_dir=args.raw, data_dir=args.data_dir)
    builder.download_and_prepare()
    print(builder.data_path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
