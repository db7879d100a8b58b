"""Rollouts and server with a real policy (random weights) in the real tabletop world."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from octo_like.envs import EMBODIMENTS, TabletopEnv
from octo_like.robot.client import PolicyClient
from octo_like.robot.rollout import evaluate
from tests.robot.tiny import tiny_policy

ROBOT = EMBODIMENTS["arm3"]
SEEDS = [1_000_000_000 + i for i in range(5)]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy("tabletop_arm3", ROBOT.action_dim, ROBOT.proprio_dim)


def make_env():
    return TabletopEnv("arm3", image_size=48, wrist_size=16)


def test_rollouts_do_not_depend_on_the_order_of_episodes(policy):
    options = {"wrong_nearest": True}
    arguments = {"options": options, "unnormalize": "tabletop_arm3", "batch_size": 3, "exec_horizon": 2}
    episodes = evaluate(policy, make_env, SEEDS, record=1, **arguments)
    assert [e.seed for e in episodes] == SEEDS
    assert all(e.flags["nearest_is_wrong"] and e.actions.shape == (e.steps, ROBOT.action_dim) for e in episodes)
    assert {e.task for e in episodes} <= set(ROBOT.tasks)
    # Both cameras are recorded, though the policy reads one; the smaller one is enlarged to the height of the other.
    assert episodes[0].frames[0].shape == (48, 48 + 48, 3)
    again = {e.seed: e for e in evaluate(policy, make_env, SEEDS[::-1], **arguments)}
    for e in episodes:
        np.testing.assert_allclose(again[e.seed].actions[:2], e.actions[:2], rtol=1e-4, atol=1e-5)


def test_blindness_reaches_the_model(policy):
    """With the images hidden, what is in them does not matter: other scenes, same proprio, same actions."""
    arguments = {"unnormalize": "tabletop_arm3", "batch_size": 2, "exec_horizon": 1, "max_steps": 1}

    def first_actions(blind, image_fill):
        class Filled(TabletopEnv):
            def _image(self, slot, size):
                return np.full((size, size, 3), image_fill, np.uint8)

        make = lambda: Filled("arm3", image_size=32)  # noqa: E731
        return np.stack([e.actions for e in evaluate(policy, make, SEEDS[:2], blind=blind, **arguments)])

    np.testing.assert_array_equal(first_actions("vision", 20), first_actions("vision", 200))
    assert np.abs(first_actions(None, 20) - first_actions(None, 200)).max() > 1e-6


def test_the_serve_script_serves_an_exported_policy(policy, tmp_path, repository):
    policy.save_pretrained(tmp_path / "export")
    command = [sys.executable, str(repository / "scripts" / "serve.py"), "--checkpoint", str(tmp_path / "export")]
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONUNBUFFERED": "1"}
    wrong = subprocess.run(
        [*command, "--unnormalize", "bridge"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert wrong.returncode == 2 and "valid: tabletop_arm3" in wrong.stderr and "Traceback" not in wrong.stderr
    nowhere = {**environment, "JAX_PLATFORMS": "rocm"}
    wrong = subprocess.run(command, capture_output=True, text=True, env=nowhere, timeout=300)
    assert wrong.returncode == 2 and "JAX finds no device of rocm" in wrong.stderr, wrong.stderr
    assert "Traceback" not in wrong.stderr
    names = ["--action_names", *ROBOT.action_names]
    process = subprocess.Popen(
        [*command, "--unnormalize", "tabletop_arm3", "--port", "0", *names],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        port = next(int(m[1]) for line in process.stdout if (m := re.search(r"ws://127.0.0.1:([0-9]+)", line)))
        observation, info = make_env().reset(seed=SEEDS[0])
        del observation["image_wrist"]
        with PolicyClient(port=port) as client:
            assert client.metadata["statistics"] == ["tabletop_arm3"]
            assert tuple(client.metadata["action_names"]) == ROBOT.action_names
            actions = client.act(observation, info["instruction"])
            assert actions.shape == (4, ROBOT.action_dim) and np.isfinite(actions).all()
            client.reset()
            np.testing.assert_array_equal(client.act(observation, info["instruction"]), actions)
            with pytest.raises(ValueError, match=r"observation/proprio: expected one moment of shape .* got \(9,\)"):
                client.reset()
                client.act({**observation, "proprio": np.zeros(9, np.float32)}, info["instruction"])
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
