"""Writes a dataset with the real lerobot package; run by test_convert_lerobot.py with the interpreter that has it.

python lerobot_writer.py DEMOS.npz ROOT FPS
"""

import inspect
import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def main(demos: str, root: str, fps: int) -> None:
    content = np.load(demos)
    names = [str(name) for name in content["names"]]
    features = {
        f"observation.images.{key}": dict(
            dtype="video", shape=content[f"{key}0"].shape[1:], names=["height", "width", "channels"]
        )
        for key in ("front", "hand")
    }
    features |= {key: dict(dtype="float32", shape=(3,), names=names) for key in ("observation.state", "action")}
    dataset = LeRobotDataset.create("test/demos", fps=fps, root=root, features=features, robot_type="toy")
    takes_task = "task" in inspect.signature(dataset.add_frame).parameters  # until 0.3
    for number in range(int(content["count"])):
        for step, action in enumerate(content[f"action{number}"]):
            frame = {"observation.state": content[f"state{number}"][step], "action": action}
            frame |= {f"observation.images.{key}": content[f"{key}{number}"][step] for key in ("front", "hand")}
            text = str(content[f"text{number}"])
            if takes_task:
                dataset.add_frame(frame, task=text)
            else:
                dataset.add_frame({**frame, "task": text})
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
