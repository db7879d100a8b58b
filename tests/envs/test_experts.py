"""The scripted experts: they succeed, they follow the words, they recover; and without the words one fails."""

import math

import numpy as np
import pytest

from octo_like.envs import EMBODIMENTS, EVALUATION_SEEDS, TabletopEnv
from octo_like.envs.experts import _clear, _first_waypoint

CASES = [(name, task) for name, embodiment in EMBODIMENTS.items() for task in embodiment.tasks]
EPISODES = 100


def run(env, seed, options, target=None):
    """The final info and the number of steps of one episode of the expert (for `target`, when given)."""
    _, info = env.reset(seed=seed, options=options)
    expert = env.expert(np.random.default_rng([seed, 1]), target(env) if target else None)
    steps, done = 0, False
    while not done:
        action = expert.act()
        assert action.dtype == np.float32 and env.action_space.contains(action)
        _, _, terminated, truncated, info = env.step(action)
        steps, done = steps + 1, terminated or truncated
    return info, steps


def nearest(env):
    return min(env.world.blocks, key=lambda block: math.dist(block.xy, env.effector.tip[:2])).color


@pytest.mark.parametrize("name,task", CASES)
@pytest.mark.parametrize("bumps", [False, True])
def test_experts_succeed(name, task, bumps):
    env = TabletopEnv(name, bumps=bumps, render_images=False)
    episodes = [run(env, EVALUATION_SEEDS + seed, {"task": task}) for seed in range(EPISODES)]
    assert np.mean([info["success"] for info, _ in episodes]) >= 0.95
    median = np.median([steps for _, steps in episodes])
    assert env.embodiment.max_steps[task] >= 2 * median, "too little time for a policy that is not an expert"
    assert 4 <= median <= 20


@pytest.mark.parametrize("name,task", CASES)
def test_ignoring_the_words_fails(name, task):
    env = TabletopEnv(name, render_images=False)
    for seed in range(20):
        info, _ = run(env, seed, {"task": task, "wrong_nearest": True}, target=nearest)
        assert not info["success"] and not info["reached_target"]
        info, _ = run(env, seed, {"task": task, "wrong_nearest": False}, target=nearest)
        assert info["success"] and info["reached_target"]


@pytest.mark.parametrize("name,task", CASES)
def test_swapped_instruction_is_judged_for_the_block_it_names(name, task):
    env = TabletopEnv(name, render_images=False)
    options = {"task": task, "swap_instruction": True}
    obeys = [run(env, seed, options)[0] for seed in range(20)]
    assert np.mean([info["success"] for info in obeys]) >= 0.95
    assert all(info["reached_target"] for info in obeys if info["success"])
    assert not any(info["reached_original"] for info in obeys)
    persists = [run(env, seed, options, target=lambda env: env.original_target)[0] for seed in range(20)]
    assert all(info["reached_original"] for info in persists)
    assert not any(info["success"] or info["reached_target"] for info in persists)


@pytest.mark.parametrize("name", [name for name, embodiment in EMBODIMENTS.items() if embodiment.grasps])
def test_recovery_from_a_missed_grasp_and_from_a_lost_block(name):
    env = TabletopEnv(name, render_images=False)
    _, info = env.reset(seed=7, options={"task": "pick_and_place"})
    expert = env.expert(np.random.default_rng(0))
    block, lost, done = env.world.block(info["target"]), False, False
    env.effector.opening = 0.0  # it begins with a closed, empty hand
    assert expert.act()[-1] == 1.0
    while not done:
        if env.world.held is not None and not lost and math.dist(block.xy, block.start_xy) > 0.02:
            env.effector.slip(env.world)
            lost = True
            assert env.world.held is None
        _, _, terminated, truncated, info = env.step(expert.act())
        done = terminated or truncated
    assert lost and info["success"]


def test_experts_vary_with_their_rng():
    env = TabletopEnv("gripper", render_images=False)
    env.reset(seed=0)
    actions = {tuple(env.expert(np.random.default_rng(seed)).act()) for seed in range(10)}
    assert len(actions) == 10


def test_an_unknown_target_is_an_error():
    env = TabletopEnv("arm", render_images=False)
    env.reset(seed=0)
    absent = next(
        color for color in ("red", "green", "blue", "yellow") if color not in {b.color for b in env.world.blocks}
    )
    with pytest.raises(ValueError, match=f"no {absent} block"):
        env.expert(np.random.default_rng(0), absent)


def test_bumps_change_some_episodes_and_not_the_scenes():
    def start(bumps):
        env = TabletopEnv("gripper", bumps=bumps, render_images=False)
        scenes, tips = [], []
        for seed in range(60):
            env.reset(seed=seed)
            scenes.append([(block.color, *block.xy) for block in env.world.blocks])
            tips.append((*env.effector.tip, env.effector.opening, env._bump_at))
        return scenes, tips

    (scenes, tips), (bumped_scenes, bumped_tips) = start(False), start(True)
    assert scenes == bumped_scenes
    assert 4 <= sum(a != b for a, b in zip(tips, bumped_tips, strict=True)) <= 22  # a fifth of sixty


def test_the_way_around_a_circle():
    center, radius = np.array([[0.0, 0.0]]), np.array([0.05])
    start, goal = np.array([-0.2, 0.001]), np.array([0.2, 0.001])
    assert not _clear(start[None], goal[None], center, radius)[0]
    position, length = start, 0.0
    for _ in range(10):
        waypoint = _first_waypoint(position, goal, center, radius)
        assert _clear(position[None], waypoint[None], center, radius)[0]
        length += math.dist(position, waypoint)
        position = waypoint
        if np.array_equal(position, goal):
            break
    assert np.array_equal(position, goal)
    # Tangent, arc, tangent is the shortest way; corners of a polygon are a little longer.
    shortest = 2 * math.sqrt(0.2**2 - 0.05**2) + 0.05 * (math.pi - 2 * math.acos(0.05 / 0.2))
    assert shortest <= length + 1e-3 and length < 1.05 * shortest


def test_no_obstacle_no_detour():
    goal = np.array([0.1, 0.1])
    np.testing.assert_array_equal(_first_waypoint(np.zeros(2), goal, np.array([[0.2, -0.2]]), np.array([0.05])), goal)
