"""The tabletop world: spaces, seeds, scenes, judging, words."""

import math
import re

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from octo_like.envs import EMBODIMENTS, TabletopEnv, all_instructions, language, scene

CASES = [(name, task) for name, embodiment in EMBODIMENTS.items() for task in embodiment.tasks]
GRASPING = [name for name, embodiment in EMBODIMENTS.items() if embodiment.grasps]


def stay(env):
    """An action that does nothing: absolute joint targets for arm3, zeros for the others; an open hand."""
    action = np.zeros(env.embodiment.action_dim)
    if env.embodiment.name == "arm3":
        action[:3] = env.effector.q
    if env.embodiment.grasps:
        action[-1] = 1.0
    return action


def with_gripper(env, command):
    return np.append(stay(env)[:-1], command)


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized.*:UserWarning")
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", EMBODIMENTS)
def test_gymnasium_conformance(name):
    env = gymnasium.make(f"octo_like/Tabletop-{name}-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    assert env.unwrapped.embodiment is EMBODIMENTS[name]


@pytest.mark.parametrize("name", EMBODIMENTS)
def test_embodiment_describes_its_environment(name):
    embodiment, env = EMBODIMENTS[name], TabletopEnv(name, image_size=48, wrist_size=24)
    assert env.action_space.shape == (embodiment.action_dim,) == (len(embodiment.action_units),)
    np.testing.assert_allclose(env.action_space.high, embodiment.action_high, rtol=1e-6)
    observation, _ = env.reset(seed=0)
    expected = {f"image_{slot}" for slot in embodiment.cameras} | ({"proprio"} if embodiment.proprio_dim else set())
    assert set(observation) == expected
    assert observation["image_primary"].shape == (48, 48, 3)
    if "image_wrist" in observation:
        assert observation["image_wrist"].shape == (24, 24, 3)
    if embodiment.proprio_dim:
        assert observation["proprio"].shape == (embodiment.proprio_dim,)


def test_the_embodiments_differ():
    assert [e.action_dim for e in EMBODIMENTS.values()] == [2, 7, 3, 4]
    assert [e.proprio_dim for e in EMBODIMENTS.values()] == [0, 7, 3, 4]
    assert len({e.dynamics for e in EMBODIMENTS.values()}) == 4


@pytest.mark.parametrize("name", EMBODIMENTS)
def test_a_seed_determines_the_episode(name):
    def episode(seed):
        env = TabletopEnv(name, bumps=True)
        observation, info = env.reset(seed=seed)
        expert = env.expert(np.random.default_rng(5))
        frames, done = [observation], False
        while not done:
            observation, _, terminated, truncated, info = env.step(expert.act())
            frames.append(observation)
            done = terminated or truncated
        return frames, info

    (one, info), (two, again), (other, _) = episode(11), episode(11), episode(12)
    assert info == again and len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert not np.array_equal(one[0]["image_primary"], other[0]["image_primary"])


def test_reset_without_a_seed_goes_on_to_other_scenes():
    env = TabletopEnv("gripper")
    first = env.reset(seed=3)[0]["image_primary"]
    second, third = env.reset()[0]["image_primary"], env.reset()[0]["image_primary"]
    assert not np.array_equal(first, second) and not np.array_equal(second, third)


@pytest.mark.parametrize("name,task", CASES)
def test_scenes(name, task):
    env = TabletopEnv(name, render_images=False)
    wrong = []
    for seed in range(150):
        _, info = env.reset(seed=seed, options={"task": task})
        world = env.world
        colors = [block.color for block in world.blocks]
        assert 2 <= len(colors) == len(set(colors)) <= 3
        assert len({plate.color for plate in world.plates}) == len(world.plates) <= 2
        assert info["task"] == task and info["target"] == info["original_target"] in colors
        for i, block in enumerate(world.blocks):
            assert np.abs(block.xy).max() <= scene.BLOCK_AREA
            assert all(math.dist(block.xy, other.xy) > 0.1 for other in world.blocks[:i])
            assert all(math.dist(block.xy, plate.xy) > 0.11 for plate in world.plates)
        if task == "pick_and_place":
            assert env.goal.plate in [plate.color for plate in world.plates]
        distances = {block.color: math.dist(block.xy, env.effector.tip[:2]) for block in world.blocks}
        assert info["nearest_is_wrong"] == (min(distances, key=distances.get) != info["target"])
        wrong.append(info["nearest_is_wrong"])
    assert 0.55 < np.mean(wrong) < 0.78  # two thirds, up to three standard errors


@pytest.mark.parametrize("name,task", CASES)
@pytest.mark.parametrize("wrong", [True, False])
def test_wrong_nearest_can_be_forced(name, task, wrong):
    env = TabletopEnv(name, render_images=False)
    for seed in range(30):
        assert env.reset(seed=seed, options={"task": task, "wrong_nearest": wrong})[1]["nearest_is_wrong"] is wrong


def test_a_second_plate_is_often_there():
    env = TabletopEnv("gripper", render_images=False)
    counts = []
    for seed in range(60):
        env.reset(seed=seed, options={"task": "pick_and_place"})
        counts.append(len(env.world.plates))
    assert set(counts) == {1, 2} and 15 < counts.count(2) < 45


@pytest.mark.parametrize("name,task", CASES)
def test_swapped_instruction_keeps_the_scene_and_names_another_block(name, task):
    env = TabletopEnv(name)
    for seed in range(8):
        plain, info = env.reset(seed=seed, options={"task": task})
        swapped, swapped_info = env.reset(seed=seed, options={"task": task, "swap_instruction": True})
        for key in plain:
            np.testing.assert_array_equal(plain[key], swapped[key])
        assert swapped_info["original_target"] == info["target"] != swapped_info["target"]
        assert swapped_info["target"] in [block.color for block in env.world.blocks]
        assert swapped_info["target"] in swapped_info["instruction"] and info["target"] in info["instruction"]
        # Only the block is another: same phrasing, same plate, same side.
        swapped_words, words = swapped_info["instruction"].split(), info["instruction"].split()
        assert len(words) == len(swapped_words)
        changed = [pair for pair in zip(words, swapped_words, strict=True) if pair[0] != pair[1]]
        assert changed == [(info["target"], swapped_info["target"])]


# Judging


def place_at(env, color, z=0.04):
    block = env.world.block(color)
    # A disc cannot stand on a block: it touches its near side.
    offset = np.zeros(2) if env.embodiment.grasps else np.array([0.0, block.size / 2 + 0.025])
    block.yaw = 0.0
    env.effector.place(block.xy - offset, z)


@pytest.mark.parametrize("name", EMBODIMENTS)
@pytest.mark.parametrize("right", [True, False])
def test_reach_is_decided_by_the_first_block_dwelt_on(name, right):
    env = TabletopEnv(name, render_images=False)
    _, info = env.reset(seed=4, options={"task": "reach"})
    other = next(block.color for block in env.world.blocks if block.color != info["target"])
    place_at(env, info["target"] if right else other)
    assert env.step(stay(env))[2] is False  # one step is not yet dwelling
    _, reward, terminated, truncated, info = env.step(stay(env))
    assert terminated and not truncated
    assert info["success"] is right and reward == float(right)
    assert info["reached_target"] is right


def test_reach_needs_a_low_hand():
    env = TabletopEnv("gripper", render_images=False)
    _, info = env.reset(seed=4, options={"task": "reach"})
    place_at(env, info["target"], z=0.15)
    for _ in range(4):
        assert env.step(stay(env))[2] is False


def test_passing_over_a_block_is_not_reaching_it():
    env = TabletopEnv("gripper", render_images=False)
    _, info = env.reset(seed=4, options={"task": "reach"})
    block = env.world.block(info["target"])
    env.effector.place(block.xy - (0.06, 0.0), 0.06)
    for _ in range(3):
        action = stay(env)
        action[0] = 0.04
        _, _, terminated, _, info = env.step(action)
        assert not terminated and not info["reached_target"]


def grasp(env, color):
    place_at(env, color, z=0.03)
    env.step(with_gripper(env, 0.0))
    assert env.world.held is not None and env.world.blocks[env.world.held].color == color


def carry_to(env, xy):
    env.effector.place(xy, 0.06)
    env.world.carry(env.effector.tip[:2], env.effector.yaw, 0.03)


@pytest.mark.parametrize("name", GRASPING)
def test_pick_and_place_succeeds_only_with_the_named_block_released_on_the_named_plate(name):
    env = TabletopEnv(name, render_images=False)
    seed = 0
    while True:
        _, info = env.reset(seed=seed, options={"task": "pick_and_place"})
        if len(env.world.plates) == 2:
            break
        seed += 1
    named = env.world.plate(env.goal.plate)
    unnamed = next(plate for plate in env.world.plates if plate.color != env.goal.plate)
    other = next(block.color for block in env.world.blocks if block.color != info["target"])

    grasp(env, info["target"])
    assert env._info()["reached_target"] and not env._info()["success"]
    carry_to(env, named.xy)
    _, _, terminated, _, info = env.step(with_gripper(env, 0.0))
    assert not terminated and not info["success"]  # still in the hand
    _, reward, terminated, _, info = env.step(with_gripper(env, 1.0))
    assert terminated and info["success"] and reward == 1.0
    assert env.world.block(info["target"]).z == scene.PLATE_HEIGHT

    env.reset(seed=seed, options={"task": "pick_and_place"})
    grasp(env, info["target"])
    carry_to(env, unnamed.xy)
    _, _, terminated, _, info = env.step(with_gripper(env, 1.0))
    assert not terminated and not info["success"]  # the wrong plate: it may still be put right

    env.reset(seed=seed, options={"task": "pick_and_place"})
    grasp(env, other)
    carry_to(env, named.xy)
    _, _, terminated, _, info = env.step(with_gripper(env, 1.0))
    assert terminated and not info["success"] and not info["reached_target"]  # another block


@pytest.mark.parametrize("name", GRASPING)
def test_closing_beside_a_block_takes_nothing(name):
    env = TabletopEnv(name, render_images=False)
    _, info = env.reset(seed=1, options={"task": "pick_and_place"})
    env.effector.place(env.world.block(info["target"]).xy + (0.0, 0.055), 0.03)
    env.step(with_gripper(env, 0.0))
    assert env.world.held is None
    # A hand that is closed already takes nothing either, until it opens and closes again.
    place_at(env, info["target"], z=0.03)
    env.step(with_gripper(env, 0.0))
    assert env.world.held is None
    env.step(with_gripper(env, 1.0))
    env.step(with_gripper(env, 0.0))
    assert env.world.held is not None


def test_a_high_hand_takes_nothing():
    env = TabletopEnv("gripper", render_images=False)
    _, info = env.reset(seed=1, options={"task": "pick_and_place"})
    place_at(env, info["target"], z=0.08)
    env.step(with_gripper(env, 0.0))
    assert env.world.held is None


def push_scene(direction):
    env, seed = TabletopEnv("pusher", render_images=False), 0
    while True:
        _, info = env.reset(seed=seed, options={"task": "push"})
        if env.goal.direction == direction:
            return env, info
        seed += 1


@pytest.mark.parametrize("direction", language.DIRECTIONS)
@pytest.mark.parametrize("agrees", [True, False])
def test_push_succeeds_in_the_named_direction_only(direction, agrees):
    env, info = push_scene(direction)
    sign = (1.0 if direction == "right" else -1.0) * (1 if agrees else -1)
    block = env.world.block(info["target"])
    block.yaw = 0.0
    env.effector.place(block.xy - (sign * 0.06, 0.0), 0.0)
    for _ in range(5):
        _, _, terminated, _, info = env.step(np.array([sign * 0.05, 0.0]))
        if terminated:
            break
    assert terminated and info["success"] is agrees and info["reached_target"]
    if agrees:
        assert sign * block.displacement[0] >= 0.1


def test_pushing_another_block_fails():
    env, info = push_scene("right")
    other = next(block for block in env.world.blocks if block.color != info["target"])
    other.yaw = 0.0
    env.effector.place(other.xy - (0.06, 0.0), 0.0)
    for _ in range(3):
        _, _, terminated, _, info = env.step(np.array([0.05, 0.0]))
        if terminated:
            break
    assert terminated and not info["success"] and not info["reached_target"]


def test_a_pushed_block_leaves_the_disc_and_the_others_stay():
    env, info = push_scene("right")
    block = env.world.block(info["target"])
    env.effector.place(block.xy - (0.07, 0.01), 0.0)
    for _ in range(2):
        env.step(np.array([0.04, 0.0]))
    c, s = math.cos(block.yaw), math.sin(block.yaw)
    dx, dy = env.effector.xy - block.xy
    local = np.abs([c * dx + s * dy, -s * dx + c * dy]) - block.size / 2
    assert np.hypot(*np.maximum(local, 0)) >= env.effector.radius - 1e-6
    assert block.displacement[0] > 0.02
    assert all(not other.displacement.any() for other in env.world.blocks if other is not block)


@pytest.mark.parametrize("name,task", CASES)
def test_doing_nothing_runs_out_of_time(name, task):
    env = TabletopEnv(name, render_images=False)
    env.reset(seed=2, options={"task": task})
    if name == "gripper":
        env.effector.place(np.zeros(2), 0.2)
    steps, terminated, truncated = 0, False, False
    while not truncated:
        _, reward, terminated, truncated, info = env.step(stay(env))
        steps += 1
        assert not terminated and reward == 0.0
    assert steps == env.embodiment.max_steps[task] and not info["success"]


# Bad input


@pytest.mark.parametrize("name", EMBODIMENTS)
def test_bad_actions(name):
    env = TabletopEnv(name, render_images=False)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(env.embodiment.action_dim))
    env.reset(seed=0)
    for bad in (np.nan, np.inf):
        action = stay(env)
        action[0] = bad
        with pytest.raises(ValueError, match=f"non-finite action .*{name}"):
            env.step(action)
    with pytest.raises(ValueError, match=re.escape(f"({env.embodiment.action_dim},)")):
        env.step(np.zeros(env.embodiment.action_dim + 1))
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros((1, env.embodiment.action_dim)))


def test_actions_out_of_range_are_clipped():
    env = TabletopEnv("pusher", render_images=False)
    env.reset(seed=0)
    before = env.effector.xy.copy()
    env.step(np.array([-9.0, 9.0]))
    assert np.abs(env.effector.xy - before).max() < 0.065


def test_bad_arguments_name_the_valid_ones():
    with pytest.raises(ValueError, match="'hand'; valid: pusher, gripper, arm, arm3"):
        TabletopEnv("hand")
    with pytest.raises(ValueError, match="rgb_array"):
        TabletopEnv("arm", render_mode="human")
    env = TabletopEnv("pusher", render_images=False)
    with pytest.raises(ValueError, match="valid: reach, push"):
        env.reset(seed=0, options={"task": "pick_and_place"})
    with pytest.raises(ValueError, match="swap.*valid: task, wrong_nearest, swap_instruction"):
        env.reset(seed=0, options={"swap": True})


def test_an_episode_ends():
    env = TabletopEnv("pusher", render_images=False)
    env.reset(seed=0, options={"task": "reach"})
    expert = env.expert(np.random.default_rng(0))
    while not env.step(expert.act())[2]:
        pass
    with pytest.raises(RuntimeError, match="over"):
        env.step(np.zeros(2))


# Words


def test_phrasings():
    sentences = all_instructions()
    assert len(sentences) == len(set(sentences))
    for task in language.TASKS:
        assert len(language.PHRASINGS[task]) >= 6
        for phrasing in language.PHRASINGS[task]:
            assert ("{plate}" in phrasing) == (task == "pick_and_place")
            assert ("{direction}" in phrasing) == (task == "push")
            assert "{target}" in phrasing


@pytest.mark.parametrize("name,task", CASES)
def test_every_instruction_is_in_the_list(name, task):
    env, sentences, seen = TabletopEnv(name, render_images=False), set(all_instructions()), set()
    for seed in range(60):
        _, info = env.reset(seed=seed, options={"task": task})
        assert info["instruction"] in sentences
        assert f" {info['target']} " in f" {info['instruction']} "
        assert not env.goal.direction or env.goal.direction in info["instruction"]
        assert not env.goal.plate or re.search(f"{env.goal.plate} (plate|dish)", info["instruction"])
        seen.add(info["instruction"])
    assert len(seen) > 25


# Kinematics


@pytest.mark.parametrize("name", ["arm", "arm3"])
def test_inverse_kinematics_covers_the_table_without_wrapping(name):
    effector = EMBODIMENTS[name].dynamics()
    side = np.linspace(-scene.BLOCK_AREA, scene.BLOCK_AREA, 25)
    angles = np.zeros((25, 25, len(effector.links)))
    for i, x in enumerate(side):
        for j, y in enumerate(side):
            angles[i, j] = effector.inverse(np.array([x, y]))
            effector.place(np.array([x, y]), 0.0)
            np.testing.assert_allclose(effector.tip[:2], (x, y), atol=1e-6)
    assert np.abs(angles).max() < effector.joint_limit
    assert max(np.abs(np.diff(angles, axis=axis)).max() for axis in (0, 1)) < 0.35
    assert (angles[..., 1] > 0).all()  # the elbow stays on its side


def test_arm3_points_away_from_its_base():
    effector = EMBODIMENTS["arm3"].dynamics()
    for xy in ((-0.1, 0.1), (0.12, -0.15), (-0.18, -0.18)):
        effector.place(np.array(xy), 0.0)
        (bx, by), (wx, wy), (tx, ty) = effector.joints()[0], effector.joints()[-2], effector.joints()[-1]
        assert math.isclose(math.atan2(wy - by, wx - bx), math.atan2(ty - wy, tx - wx), abs_tol=1e-6)


def test_the_servo_is_rate_limited_and_reaches_its_target():
    env = TabletopEnv("arm3", render_images=False)
    env.reset(seed=0, options={"task": "pick_and_place"})
    target = env.effector.q + 0.5
    before = env.effector.q.copy()
    env.step(np.append(target, 1.0))
    assert np.abs(env.effector.q - before).max() < 0.15 * 1.2
    for _ in range(6):
        env.step(np.append(target, 1.0))
    np.testing.assert_allclose(env.effector.q, target, atol=0.02)
