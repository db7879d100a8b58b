"""Colours of datasets: which blocks there are, and which of them words name."""

import numpy as np
import pytest

from octo_like.envs import TabletopEnv, demonstrations
from octo_like.envs.colors import ALL_BLOCK_COLORS, Colors, parse_pair
from octo_like.envs.language import BLOCK_COLORS, HELD_OUT_PAIRS


def scene_of(env):
    world = env.world
    return [(b.size, b.yaw, *b.xy) for b in world.blocks], [(p.color, *p.xy) for p in world.plates], env.effector.tip


def test_a_palette_paints_the_scene_and_changes_nothing_else():
    env, seen = TabletopEnv("gripper", render_images=False), set()
    palette = ["pink", "cyan", "white", "orange", "red"]
    for seed in range(60):
        env.reset(seed=seed)
        before, task, index = scene_of(env), env.goal.task, env.world.blocks.index(env.world.block(env.goal.target))
        _, info = env.reset(seed=seed, options={"palette": palette})
        np.testing.assert_equal(scene_of(env), before)
        assert info["task"] == task and info["target"] == env.world.blocks[index].color
        assert info["target"] in info["instruction"].split()
        colors = [block.color for block in env.world.blocks]
        assert len(set(colors)) == len(colors) and set(colors) <= set(palette)
        seen |= set(colors)
    assert seen == set(palette)


@pytest.mark.parametrize("name", ["pusher", "gripper", "arm"])
@pytest.mark.parametrize("target", ["purple", "pink"])
def test_any_block_can_be_asked_for_in_any_scene(name, target):
    env = TabletopEnv(name, render_images=False)
    for seed in range(20):
        env.reset(seed=seed)
        before, colors, asked = scene_of(env), [b.color for b in env.world.blocks], env.goal.target
        _, info = env.reset(seed=seed, options={"target": target})
        np.testing.assert_equal(scene_of(env), before)
        assert info["target"] == target and f"{target} " in info["instruction"]
        swapped = {target: asked, asked: target}
        assert [b.color for b in env.world.blocks] == [swapped.get(color, color) for color in colors]
    expert, done = env.expert(np.random.default_rng(0)), False
    while not done:
        _, _, terminated, truncated, info = env.step(expert.act())
        done = terminated or truncated
    assert info["success"]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"palette": ["red", "green", "blue"]}, "at least 4 colours"),
        ({"palette": ["red", "green", "blue", "red"]}, "each once"),
        ({"palette": ["red", "green", "blue", "mauve"]}, "no block is 'mauve'; valid: red, green"),
        ({"target": "mauve"}, "no block is 'mauve'"),
        ({"palette": ["red", "green", "blue", "pink"], "target": "yellow"}, "no block is 'yellow'; valid: red, green"),
        ({"target": "red", "pair": "seen"}, "contradict one another"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TabletopEnv("gripper", render_images=False).reset(seed=0, options=options)


def test_words_and_pairs_that_no_demonstration_says():
    colors = Colors(unnamed=frozenset({"purple"}), unnamed_pairs=HELD_OUT_PAIRS | {("red", "white")})
    plain, limited = (
        list(demonstrations.Simulator(encode=lambda image: None, colors=c).episodes("gripper", "train", 60))
        for c in (Colors(), colors)
    )
    said = [episode["steps"][0]["language_instruction"] for episode in limited]
    assert not any("purple" in text or ("red" in text and "white" in text) for text in said)
    seeds = {episode["episode_metadata"]["seed"] for episode in plain}
    more = {episode["episode_metadata"]["seed"] for episode in limited} - seeds
    assert min(more) > max(seeds), "only scenes are left out; none is another"
    # The block is still there: it is the word that is missing.
    env = TabletopEnv("gripper", render_images=False)
    there = 0
    for episode in limited:
        env.reset(seed=episode["episode_metadata"]["seed"])
        there += any(block.color == "purple" for block in env.world.blocks)
    assert there > 5


def test_a_palette_of_a_dataset():
    colors = Colors(palette=("red", "green", "blue", "yellow"))
    words = set()
    for episode in demonstrations.Simulator(encode=lambda image: None, colors=colors).episodes("pusher", "train", 40):
        words |= set(episode["steps"][0]["language_instruction"].split())
    assert words & set(ALL_BLOCK_COLORS) == {"red", "green", "blue", "yellow"}


def test_what_is_recorded_and_what_is_refused():
    assert Colors().record() == {}
    colors = Colors(("red", "green", "blue", "pink"), frozenset({"pink"}), frozenset({("red", "white")}))
    assert colors.record() == {
        "palette": ["red", "green", "blue", "pink"],
        "unnamed": ["pink"],
        "unnamed_pairs": [["red", "white"]],
    }
    assert not colors.may_name("pink") and not colors.may_name("red", "white") and colors.may_name("red", "blue")
    with pytest.raises(ValueError, match="no colour is left"):
        Colors(unnamed=frozenset(BLOCK_COLORS))
    with pytest.raises(ValueError, match="no pair .*plates: blue, orange, white"):
        Colors(unnamed_pairs=frozenset({("red", "green")}))
    assert parse_pair("green:white") == ("green", "white")
    with pytest.raises(ValueError, match="expected BLOCK:PLATE"):
        parse_pair("green white")
