"""scripts/bench_delay.py on the real tabletop and the real Meta-World, with a policy that says nothing new."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from octo_like.common.schema import BatchSpec
from octo_like.envs.sims.remote import EXTRA

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import bench_delay  # noqa: E402

H = 8


class Steady:
    """Chunks 1, 2, ... of (n, 0, 0, ...) thousandths: every takeover changes the command by one of them."""

    def __init__(self, dataset: str = "tabletop_gripper", width: int = 7):
        self.batch_spec = BatchSpec(
            window_size=1,
            action_horizon=H,
            action_dim=width,
            image_sizes={"primary": (16, 16)},
            proprio_dim=width,
            language_length=4,
        )
        self.statistics = {dataset: {"action": {"std": np.array([0.001] + [0.0] * (width - 2) + [0.4])}}}
        self.asked: list = []
        self.number = {}

    def chunk_horizon(self, unnormalize=None):
        return H

    def continuation_methods(self, unnormalize=None):
        return {"jacobian_free": H}

    def create_tasks(self, texts):
        return texts

    def sample_actions(self, observations, tasks, *, rng, unnormalize, continuing=None):
        self.asked.append(continuing)
        chunks = np.zeros((len(tasks), H, self.batch_spec.action_dim), np.float32)
        for row, key in enumerate(observations["timestep"][:, -1]):
            chunks[row, :, 0] = 0.001 * (int(key) // 4 + 1)
        return chunks


def test_delays_are_what_they_say(monkeypatch, tmp_path, capsys):
    policy = Steady()
    monkeypatch.setattr(bench_delay.Policy, "load_pretrained", lambda path: policy)
    command = ["bench", "--policy", "steady", "--out", str(tmp_path), "--per_task", "1", "--batch_size", "3"]
    command += ["--modes", "wait", "naive", "guided", "trained", "--delays", "0", "2"]
    monkeypatch.setattr(sys, "argv", command)
    bench_delay.main()
    assert "trained: no policy for it" in capsys.readouterr().out
    rows = {(row["mode"], row["delay"]): row for row in map(json.loads, (tmp_path / "delay.jsonl").open())}
    assert sorted(rows) == sorted((mode, delay) for mode in ("wait", "naive", "guided") for delay in (0, 2))
    for (mode, delay), row in rows.items():
        reach, pick = row["episodes"]
        assert [reach["task"], pick["task"]] == ["reach", "pick_and_place"]
        steps = pick["steps"]
        assert steps == 90 and not pick["success"]
        cycle = 4 + (delay if mode == "wait" else 0)
        takeovers = len(range(cycle if mode == "wait" else 4 + delay, steps, cycle))
        assert pick["held"] == (steps - 4 * -(-steps // cycle) if mode == "wait" and delay else 0)
        # Where a chunk takes over the command changes by 1 mm, or stops and begins again; nowhere else.
        assert pick["seam"][1] == takeovers * (2 if mode == "wait" and delay else 1) + (mode == "wait" and delay > 0)
        assert pick["inside"][0] == pytest.approx(0, abs=1e-6)
        if mode == "naive":
            assert pick["seam"][0] == pytest.approx(pick["seam"][1], rel=1e-4)
    asked = [one for one in policy.asked if one is not None]
    assert {int(count) for one in asked for count in np.ravel(one.executed)} == {4, H}  # H: the first chunk of a robot
    assert {int(count) for one in asked for count in np.ravel(one.delay)} == {0, 2}
    assert "| guided | 2 |" in (tmp_path / "delay.md").read_text() and (tmp_path / "delay.png").stat().st_size > 1000
    before = len(policy.asked)
    bench_delay.main()
    assert len(policy.asked) == before  # nothing is done twice


@pytest.mark.sim
@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in EXTRA), reason="needs the extra sim")
def test_a_group_of_simulated_tasks_is_a_world_like_the_tabletop(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_delay.Policy, "load_pretrained", lambda path: Steady("metaworld_pretrain", 4))
    command = ["bench", "--policy", "steady", "--out", str(tmp_path), "--per_task", "2", "--batch_size", "3"]
    command += ["--robot", "metaworld_pretrain", "--tasks", "door-open", "reach", "--time_factor", "1.5"]
    monkeypatch.setattr(sys, "argv", [*command, "--modes", "wait", "naive", "--delays", "0", "2"])
    bench_delay.main()
    rows = {(row["mode"], row["delay"]): row for row in map(json.loads, (tmp_path / "delay.jsonl").open())}
    assert sorted(rows) == [("naive", 0), ("naive", 2), ("wait", 0), ("wait", 2)]
    for (mode, delay), row in rows.items():
        assert [one["task"] for one in row["episodes"]] == ["door-open", "reach"] * 2
        for one in row["episodes"]:
            cycle = 4 + (delay if mode == "wait" else 0)
            assert one["steps"] == 60 and not one["success"]  # 1.5 times the world's limit of 40
            assert one["held"] == (60 - 4 * (60 // cycle) if cycle > 4 else 0)
            assert one["inside"][0] == pytest.approx(0, abs=1e-5)
            if mode == "naive":
                assert one["seam"][0] == pytest.approx(one["seam"][1], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--robot", "griper"), "unknown robot 'griper'; valid: pusher, gripper, .*metaworld_pretrain"),
        (("--robot", "metaworld_pretrain", "--tasks", "reach", "fly"), "metaworld_pretrain has no task fly; valid: re"),
        (("--tasks", "push"), "gripper has no task push; valid: reach, pick_and_place"),
    ],
)
def test_a_robot_or_task_that_does_not_exist_is_told_of(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["bench", "--policy", "none", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit):
        bench_delay.main()
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
