"""What the built-in world says about the way of its robots' hands."""

import numpy as np
import pytest

from octo_like.common import hand_paths
from octo_like.envs import LongTabletopEnv, TabletopEnv
from octo_like.envs.long_demonstrations import first_long_seed, simulate_long
from octo_like.envs.paths import PathsAhead, is_closing, place


def drive(env, seed):
    """An expert's episode: what was told, where the hand was, whether it was told to close, success."""
    _, info = env.reset(seed=seed)
    expert = env.unwrapped.expert(np.random.default_rng([seed, 0xE4]))
    told, places, closed, done = [], [], [], False
    while True:
        action = expert.act()
        told.append(info["path"])
        places.append(place(env.unwrapped)[::-1])
        closed.append(is_closing(action))
        if done:
            return told, np.array(places), closed, info["success"]
        _, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated


@pytest.mark.parametrize("robot", ["gripper", "arm"])
def test_what_is_told_at_the_start_is_what_the_expert_then_does(robot):
    """The copy has the world's noise and the expert's habits, so that the first path is the one of the episode."""
    for seed in range(3):
        env = PathsAhead(LongTabletopEnv(robot, render_images=False))
        told, places, closed, success = drive(env, seed)
        assert success and told[0] == hand_paths.paths_ahead(places, closed)[0]
        assert all(hand_paths.is_path(text) for text in told)


def test_looking_ahead_changes_nothing():
    for cls in (LongTabletopEnv, TabletopEnv):
        plain, wrapped = cls("gripper"), PathsAhead(cls("gripper"))
        (seen, _), (also, _) = plain.reset(seed=5), wrapped.reset(seed=5)
        for _ in range(6):
            np.testing.assert_array_equal(seen["image_primary"], also["image_primary"])
            np.testing.assert_array_equal(seen["proprio"], also["proprio"])
            action = plain.action_space.sample() * 0.1
            seen, also = plain.step(action)[0], wrapped.step(action)[0]


def test_a_robot_without_a_hand_has_none():
    with pytest.raises(ValueError, match="'pusher' has no hand"):
        PathsAhead(TabletopEnv("pusher"))


def test_demonstrations_tell_the_way_that_was_taken():
    seed = first_long_seed("gripper", "train")
    steps = simulate_long("gripper", seed)["steps"]
    env = LongTabletopEnv("gripper", mishaps=True, render_images=False)
    env.reset(seed=seed)
    for step in steps:
        np.testing.assert_array_equal(step["observation"]["hand_point"], place(env))
        path = hand_paths.decode(step["path"])
        np.testing.assert_allclose(path.points[0], place(env)[::-1], atol=0.5 / 64 + 1e-6)
        assert len(path.points) <= 5
        if not step["is_last"]:
            env.step(step["action"])
    assert [what for _, what in hand_paths.decode(steps[0]["path"]).events] == ["close", "open"]
    assert not hand_paths.decode(steps[-1]["path"]).events or steps[-1]["path"].count("<loc") == 2
