"""From recordings of every kind to a policy that runs, with one description of the robot, as docs/demos.md says it."""

import logging
import runpy
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("av")

import finetune  # noqa: E402
from octo_like.common.schema import synthetic_batch  # noqa: E402
from octo_like.policy.policy import Policy  # noqa: E402
from octo_like.training import distributed  # noqa: E402
from tests.data import recordings  # noqa: E402
from tests.training.test_adaptation import export  # noqa: E402, F401  a fixture
from tests.training.test_scripts import ROOT  # noqa: E402

ROBOT = """
from octo_like.common.robot import Camera, Robot, absolute, gripper

ROBOT = Robot(
    name="mine",
    cameras=dict({cameras}),
    proprio=("{state}",),
    proprio_names=("shoulder", "elbow", "gripper"),
    actions=(
        absolute("shoulder", "rad", proprio=0),
        absolute("elbow", "rad", proprio=1),
        gripper("gripper", open=1.0, closed=0.0, proprio=2),
    ),
    control_hz=10,
    action_horizon=3,
    window_size=2,
    dataset=dict(val_fraction=0.34),
)
"""

BOTH = 'primary=Camera("front", size=(32, 40)), wrist=Camera("hand", size=(16, 16))'
ONE = 'primary=Camera("agentview_image", size=(32, 40))'

# --from, what writes the recordings, further arguments of convert_demos.py, cameras, state.
FORMATS = {
    "LeRobot v3": ("lerobot", recordings.write_v3, (), BOTH, "state"),
    "LeRobot v2.1": ("lerobot", recordings.write_v21, (), BOTH, "state"),
    "ALOHA": ("hdf5", recordings.write_aloha, ("--instruction", "lift"), BOTH, "qpos"),
    "robomimic": ("hdf5", recordings.write_robomimic, ("--instruction", "lift"), ONE, "robot0_joint_pos"),
    "npz": ("npz", recordings.write_npz, ("--control_hz", "10"), BOTH, "state"),
}


# Each costs as much as all of test_convert.py; the slow ones share their reader with a quick one.
SLOW = ("LeRobot v2.1", "ALOHA")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FORMATS])
def test_a_policy_from_recordings(name, export, tmp_path, monkeypatch):  # noqa: F811
    kind, write, more, cameras, state = FORMATS[name]
    source = tmp_path / ("recordings.hdf5" if name == "robomimic" else "recordings")
    write(source, recordings.make_demos())
    data = tmp_path / "data"
    monkeypatch.setattr(sys, "argv", ["", str(source), "--from", kind, "--to", str(data), "--name", "mine", *more])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(f"{ROOT}/scripts/convert_demos.py", run_name="__main__")
    assert not ended.value.code
    robot = tmp_path / "mine.py"
    robot.write_text(ROBOT.format(cameras=cameras, state=state))

    # JAX has been started, and the logs and the compilation cache are those of the tests.
    for function in ("initialize_from_flags", "setup_compilation_cache"):
        monkeypatch.setattr(distributed, function, lambda *_: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    arguments = [
        *("--config", f"{ROOT}/configs/finetune.py:lora,language,robot={robot}", "--workdir", str(tmp_path / "run")),
        f"--config.pretrained={export}",
        f"--config.data.data_dir={data}",
        *("--config.num_steps=2", "--config.batch_size=4", "--config.optimizer.warmup_steps=1"),
    ]
    assert finetune.main(arguments) == 0

    policy = Policy.load_pretrained(tmp_path / "run" / "export")
    spec = policy.batch_spec
    assert (spec.action_dim, spec.action_horizon, spec.proprio_dim) == (3, 3, 3)
    assert set(spec.image_sizes) == ({"primary"} if name == "robomimic" else {"primary", "wrist"})
    assert "mine" in policy.statistics
    batch = synthetic_batch(spec, 2)
    tasks = policy.create_tasks(texts=["pick up the red cube", "lift"])
    actions = policy.sample_actions(batch["observation"], tasks, rng=jax.random.key(0), unnormalize="mine")
    assert actions.shape == (2, 3, 3) and np.all(np.isfinite(actions))
