"""What ends the plateau (docs/experiments.md), on a small set: a policy that is told where named things are."""

import subprocess
import sys

import numpy as np
import pytest

from octo_like.envs.labels import labelled_frames
from octo_like.policy.policy import Policy
from octo_like.training import probe
from octo_like.training.probe_frames import frames_from_arrays

STEPS, READOUT = 300, "readout_action"


def knows(policy) -> float:
    """R^2 of the named block's place, read linearly from the readout, over both robots' episodes."""
    spec = policy.batch_spec
    arrays = labelled_frames(["gripper", "pusher"], 40, image_sizes=spec.image_sizes, horizon=spec.action_horizon)
    frames = frames_from_arrays(arrays, policy, "tabletop")
    features = probe.group_features(policy, frames, [READOUT], "text")
    found = probe.probe_points(frames, features, folds=5, seed=0)
    (whole,) = [one for one in found if one.point == "target" and one.scope == "all"]
    return float(np.mean(whole.probe.r2))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_told_where_the_named_block_is_the_policy_soon_knows(seed, repository, tmp_path):
    common = [
        *("--config", str(repository / "configs" / "tabletop.py"), "--config.data.kind=memory"),
        "--config.data.episodes=tabletop_gripper=300+2 tabletop_pusher=300+2 tabletop_arm=8+2",
        *(f"--config.seed={seed}", f"--config.num_steps={STEPS}", "--config.batch_size=64", "--config.eval.every=None"),
        *("--config.checkpoint.every=1000", "--config.data.workers=0", "--config.ema_decay=0.9"),
    ]
    known = {}
    for weight in (0.0, 3.0):
        workdir = tmp_path / str(weight)
        auxiliary = f"--config.model.auxiliaries.points.weight={weight}"
        command = [sys.executable, "train.py", *common, auxiliary, "--workdir", str(workdir)]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        known[weight] = knows(Policy.load_pretrained(workdir / "export"))
    assert known[3.0] > 0.7 > 0.5 > known[0.0], known
