"""What the pictures show: things are where they are, in their colours, and distinguishable."""

import math

import numpy as np
import pytest

from octo_like.envs import EMBODIMENTS, TabletopEnv, render, scene


def hue(rgb):
    """Colour without brightness, for comparing what light has changed."""
    rgb = np.asarray(rgb, np.float64)
    return (rgb - rgb.mean()) / (rgb.std() + 12.0)


def pixel(env, image, x, y, z):
    column, row = env.project(x, y, z)
    return image[int(row), int(column)]


def named(rgb, palette):
    return min(palette, key=lambda name: np.linalg.norm(hue(rgb) - hue(palette[name])))


def test_blocks_show_their_colours_where_they_stand():
    env = TabletopEnv("pusher")
    seen = 0
    for seed in range(60):
        observation, _ = env.reset(seed=seed)
        for block in env.world.blocks:
            if math.dist(block.xy, env.effector.xy) > 0.1:  # not behind the pusher
                rgb = pixel(env, observation["image_primary"], *block.xy, scene.BLOCK_HEIGHT)
                assert named(rgb, render.BLOCK_RGB) == block.color, f"seed {seed}: {block.color} looks like {rgb}"
                seen += 1
    assert seen > 100


def test_plates_show_their_colours_where_they_stand():
    env = TabletopEnv("gripper")
    seen = 0
    for seed in range(40):
        env.reset(seed=seed, options={"task": "pick_and_place"})
        env.effector.place(np.array([0.24, 0.24]), 0.2)  # out of the way
        image = env._observation()["image_primary"]
        for plate in env.world.plates:
            if math.dist(plate.xy, (0.24, 0.24)) > 0.25:
                center = pixel(env, image, *plate.xy, 0.0)
                assert named(center, render.PLATE_RGB) == plate.color
                # The rim is lighter than the inside: a plate is not a round block.
                rim = pixel(env, image, plate.xy[0] + 0.048, plate.xy[1], scene.PLATE_HEIGHT)
                assert rim.mean() > center.mean() + 5
                seen += 1
    assert seen > 30


@pytest.mark.parametrize("name", [name for name, embodiment in EMBODIMENTS.items() if embodiment.grasps])
def test_an_open_and_a_closed_hand_look_different(name):
    env = TabletopEnv(name)
    env.reset(seed=0)
    env.effector.place(np.array([-0.05, 0.0]), 0.06)
    images = []
    for opening in (0.0, 1.0):
        env.effector.opening = opening
        images.append(env._observation())
    for key in images[0]:
        if key.startswith("image"):
            difference = np.abs(images[0][key].astype(int) - images[1][key]).max(-1)
            assert (difference > 40).sum() >= 8, key


@pytest.mark.parametrize("name", [name for name, embodiment in EMBODIMENTS.items() if embodiment.grasps])
def test_a_held_block_is_seen_in_the_hand(name):
    env = TabletopEnv(name)
    _, info = env.reset(seed=1, options={"task": "pick_and_place"})
    block = env.world.block(info["target"])
    env.effector.place(block.xy, 0.03)
    action = np.zeros(env.embodiment.action_dim)
    if name == "arm3":
        action[:3] = env.effector.q
    env.step(action)
    assert env.world.held is not None
    env.effector.place(np.array([0.0, 0.0]), 0.1)
    env.world.carry(env.effector.tip[:2], env.effector.yaw, env.effector._carry_height())
    image = env._observation()["image_primary"]
    corners = [(block.xy[0] + dx, block.xy[1] + dy) for dx in (-0.02, 0, 0.02) for dy in (-0.02, 0, 0.02)]
    colors = [pixel(env, image, x, y, block.z + scene.BLOCK_HEIGHT) for x, y in corners]
    vivid = [rgb for rgb in colors if np.ptp(rgb.astype(int)) > 60]
    assert vivid and all(named(rgb, render.BLOCK_RGB) == block.color for rgb in vivid)


def test_height_is_visible():
    env = TabletopEnv("gripper")
    env.reset(seed=3)
    images = []
    for z in (0.03, 0.12):
        env.effector.place(np.array([0.0, -0.1]), z)
        images.append(env._observation()["image_primary"].astype(int))
    assert (np.abs(images[0] - images[1]).max(-1) > 40).sum() >= 20


def test_the_wrist_camera_turns_with_the_hand():
    env = TabletopEnv("arm3")
    _, info = env.reset(seed=5)
    block = env.world.block(info["target"])
    env.effector.place(block.xy, 0.0)
    camera = render.wrist_camera(env.effector.tip, env.effector.yaw)
    base = np.array(env.effector.base) - block.xy
    toward_base = block.xy + 0.05 * base / np.hypot(*base)
    (u, v), (u_back, v_back) = camera.project(*block.xy, 0.0), camera.project(*toward_base, 0.0)
    assert 0.4 < u < 0.6 and v_back > v and abs(u_back - u) < 0.01  # the base is below the image, always
    image = env._observation()["image_wrist"]
    assert named(image[int(v * 32), int(u * 32)], render.BLOCK_RGB) == block.color


def test_sizes_agree():
    """The same scene at another size is the same picture."""
    images = [TabletopEnv("arm", image_size=size).reset(seed=8)[0]["image_primary"] for size in (64, 128)]
    reduced = images[1].reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(reduced - images[0]).mean() < 8


def test_looks_vary():
    env = TabletopEnv("pusher")
    corners = np.array([env.reset(seed=seed)[0]["image_primary"][30:34, 4:8].mean((0, 1)) for seed in range(30)])
    assert corners.std(0).min() > 10


def test_render_for_people():
    env = TabletopEnv("arm", render_mode="rgb_array", render_images=False)
    observation, _ = env.reset(seed=0)
    assert not observation["image_primary"].any()
    image = env.render()
    assert image.shape == (256, 256, 3) and image.std() > 10


@pytest.mark.parametrize("name", EMBODIMENTS)
def test_goal_image_is_the_same_all_episode_long(name):
    env = TabletopEnv(name)
    observation, _ = env.reset(seed=2)
    expert = env.expert(np.random.default_rng(0))
    before = env.goal_image()
    assert {key: image.shape for key, image in before.items()} == {
        key: image.shape for key, image in observation.items() if key.startswith("image")
    }
    for _ in range(3):
        env.step(expert.act())
    after = env.goal_image()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])


def test_goal_image_shows_the_block_where_it_belongs():
    env = TabletopEnv("pusher")
    for seed in range(10):
        _, info = env.reset(seed=seed, options={"task": "push"})
        block = env.world.block(info["target"])
        sign = 1 if env.goal.direction == "right" else -1
        image = env.goal_image()["image_primary"]
        rgb = pixel(env, image, block.xy[0] + sign * 0.11, block.xy[1], scene.BLOCK_HEIGHT)
        assert named(rgb, render.BLOCK_RGB) == info["target"]


@pytest.mark.parametrize("name", EMBODIMENTS)
def test_goal_image_resembles_the_end_of_a_successful_episode(name):
    env = TabletopEnv(name)
    closer = []
    for seed in range(12):
        start, _ = env.reset(seed=seed, options={"task": env.embodiment.tasks[1]})
        goal = env.goal_image()["image_primary"].astype(int)
        expert = env.expert(np.random.default_rng(0))
        done = False
        while not done:
            observation, _, terminated, truncated, _ = env.step(expert.act())
            done = terminated or truncated
        distance = [np.abs(o["image_primary"] - goal).mean() for o in (start, observation)]
        closer.append(distance[1] < distance[0])
    assert np.mean(closer) >= 0.9
