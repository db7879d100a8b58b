"""Words and colours that demonstrations never have: unseen phrasings, held-out pairs, instructions that say nothing."""

import itertools
import math
import re

import numpy as np
import pytest

from octo_like.common.text import EOS, TextTokenizer
from octo_like.envs import EMBODIMENTS, TabletopEnv, all_instructions, language, scene

CASES = [(name, task) for name, embodiment in EMBODIMENTS.items() for task in embodiment.tasks]
GRASPING = [name for name, embodiment in EMBODIMENTS.items() if embodiment.grasps]
COLORS = list(itertools.product(language.BLOCK_COLORS, language.PLATE_COLORS, language.DIRECTIONS))
UNSEEN = {
    task: {p.format(target=c, plate=q, direction=d) for p in phrasings for c, q, d in COLORS}
    for task, phrasings in language.UNSEEN_PHRASINGS.items()
}


def words(sentence):
    return re.findall(r"\w+", sentence)


def poses(env):
    """Where everything stands, without its colour."""
    blocks = [(*block.xy, block.yaw, block.size) for block in env.world.blocks]
    return blocks, [tuple(plate.xy) for plate in env.world.plates], tuple(env.effector.tip)


def colors(env):
    return [block.color for block in env.world.blocks], [plate.color for plate in env.world.plates]


# Tables


def test_unseen_phrasings_are_other_sentences_of_known_words():
    known = {word for sentence in all_instructions() for word in words(sentence)}
    for task in language.TASKS:
        assert len(language.UNSEEN_PHRASINGS[task]) >= 4
        for phrasing in language.UNSEEN_PHRASINGS[task]:
            assert ("{plate}" in phrasing) == (task == "pick_and_place")
            assert ("{direction}" in phrasing) == (task == "push")
            sentence = language.instruction(
                task, 0, "red", plate="white", direction="left", phrasings={task: [phrasing]}
            )
            assert "red" in sentence and set(words(sentence)) <= known
    assert not set().union(*UNSEEN.values()) & set(all_instructions())


def test_every_sentence_fits_the_builtin_tokenizer():
    tokenizer = TextTokenizer.load("builtin", max_length=40)
    ids = tokenizer.encode([*all_instructions(), *sorted(set().union(*UNSEEN.values()))])
    assert ids["attention_mask"].sum(axis=1).max() <= 14  # the configuration's max_length: 13 pieces and the end
    assert (ids["input_ids"] == EOS).sum(axis=1).max() == 1


def test_held_out_pairs_leave_every_colour_in_others():
    seen, held_out = language.pairs(held_out=False), language.pairs(held_out=True)
    assert set(held_out) == language.HELD_OUT_PAIRS and len(held_out) == 3 and len(seen) == 12
    for part in (seen, held_out):
        assert {plate for _, plate in part} == set(language.PLATE_COLORS)
    assert {block for block, _ in seen} == set(language.BLOCK_COLORS)


# Phrasings


@pytest.mark.parametrize("name,task", CASES)
def test_an_unseen_phrasing_keeps_the_scene(name, task):
    env, templates = TabletopEnv(name), set()
    for seed in range(12):
        plain, info = env.reset(seed=seed, options={"task": task})
        other, unseen = env.reset(seed=seed, options={"task": task, "phrasing": "unseen"})
        for key in plain:
            np.testing.assert_array_equal(plain[key], other[key])
        assert unseen["target"] == info["target"] and unseen["instruction"] != info["instruction"]
        names = {"target": env.goal.target, "plate": env.goal.plate, "direction": env.goal.direction}
        said = [p for p in language.UNSEEN_PHRASINGS[task] if p.format(**names) == unseen["instruction"]]
        assert len(said) == 1
        templates.update(said)
        assert env.reset(seed=seed, options={"task": task, "phrasing": "unseen"})[1] == unseen
        assert env.reset(seed=seed, options={"task": task, "phrasing": "seen"})[1] == info
    assert len(templates) > 1


# Pairs


@pytest.mark.parametrize("name", GRASPING)
def test_pairs_change_colours_and_nothing_else(name):
    env, asked = TabletopEnv(name, render_images=False), {"seen": set(), "held_out": set()}
    for seed in range(40):
        _, plain = env.reset(seed=seed, options={"task": "pick_and_place"})
        place, tint, pair = poses(env), colors(env), (env.goal.target, env.goal.plate)
        for kind in asked:
            options = {"task": "pick_and_place", "pair": kind}
            _, info = env.reset(seed=seed, options=options)
            new = (env.goal.target, env.goal.plate)
            assert (new in language.HELD_OUT_PAIRS) == (kind == "held_out")
            assert new[0] in info["instruction"] and new[1] in info["instruction"]
            assert info["target"] == info["original_target"] == new[0]
            assert poses(env) == place and info["nearest_is_wrong"] == plain["nearest_is_wrong"]
            assert all(len(set(part)) == len(part) for part in colors(env)), "no colour occurs twice"
            if (pair in language.HELD_OUT_PAIRS) == (kind == "held_out"):
                assert colors(env) == tint and info == plain, "a scene that is as asked for stays"
            assert env.reset(seed=seed, options=options)[1] == info
            asked[kind].add(new)
    assert asked["held_out"] == language.HELD_OUT_PAIRS and len(asked["seen"]) > 6


def test_a_recoloured_scene_looks_its_colours():
    env = TabletopEnv("gripper")
    seed = next(
        seed
        for seed in range(50)
        if env.reset(seed=seed, options={"task": "pick_and_place"})
        and (env.goal.target, env.goal.plate) not in language.HELD_OUT_PAIRS
    )
    plain, _ = env.reset(seed=seed, options={"task": "pick_and_place"})
    other, _ = env.reset(seed=seed, options={"task": "pick_and_place", "pair": "held_out"})
    assert not np.array_equal(plain["image_primary"], other["image_primary"])
    expert, done = env.expert(np.random.default_rng(0)), False
    while not done:
        _, _, terminated, truncated, info = env.step(expert.act())
        done = terminated or truncated
    assert info["success"]


def test_pairs_are_no_matter_of_other_tasks():
    env = TabletopEnv("gripper", render_images=False)
    plain = env.reset(seed=0, options={"task": "reach"})[1]
    assert env.reset(seed=0, options={"task": "reach", "pair": "held_out"})[1] == plain


# Instructions that say less


@pytest.mark.parametrize("name,task", CASES)
def test_shuffled_and_empty_instructions_keep_scene_and_goal(name, task):
    env = TabletopEnv(name, render_images=False)
    for seed in range(10):
        _, plain = env.reset(seed=seed, options={"task": task})
        place, goal = (poses(env), colors(env)), env.goal
        for kind in ("shuffled", "empty"):
            _, info = env.reset(seed=seed, options={"task": task, "instruction": kind})
            assert (poses(env), colors(env)) == place and env.goal == goal
            assert env.reset(seed=seed, options={"task": task, "instruction": kind})[1] == info
            said, expected = info["instruction"].split(), plain["instruction"].split()
            assert said == [] if kind == "empty" else (said != expected and sorted(said) == sorted(expected))


def act_on(env, block):
    """Does to this block whatever counts as reaching it."""
    block.yaw = 0.0
    still = np.zeros(env.embodiment.action_dim)
    if env.goal.task == "push":
        env.effector.place(block.xy - (0.06, 0.0), 0.0)
        return [np.array([0.05, 0.0])] * 3
    offset = np.zeros(2) if env.embodiment.grasps else np.array([0.0, block.size / 2 + 0.025])
    env.effector.place(block.xy - offset, 0.03)
    if env.embodiment.name == "arm3":
        still[:3] = env.effector.q
    return [still] * 2


@pytest.mark.parametrize("name,task", CASES)
def test_who_is_told_of_an_absent_block_cannot_succeed(name, task):
    env = TabletopEnv(name, render_images=False)
    for seed in range(6):
        env.reset(seed=seed, options={"task": task})
        place = poses(env), colors(env)
        _, info = env.reset(seed=seed, options={"task": task, "instruction": "absent"})
        assert (poses(env), colors(env)) == place
        assert info["target"] in info["instruction"] and info["target"] not in colors(env)[0]
        assert info["original_target"] in colors(env)[0] and not info["reached_any"]
        for action in act_on(env, env.world.blocks[0]):
            _, reward, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                break
        assert info["reached_any"] and not info["reached_target"] and not info["success"] and reward == 0.0
        with pytest.raises(ValueError, match=f"no {env.goal.target} block"):
            env.goal_image()


def test_any_block_reached_is_told_of_ordinary_episodes_too():
    env = TabletopEnv("gripper", render_images=False)
    env.reset(seed=4, options={"task": "reach"})
    other = next(block for block in env.world.blocks if block.color != env.goal.target)
    for action in act_on(env, other):
        info = env.step(action)[-1]
    assert info["reached_any"] and not info["reached_target"]


# Bad values


def test_bad_values_name_the_valid_ones():
    env = TabletopEnv("gripper", render_images=False)
    for option, valid in {
        "phrasing": "seen, unseen",
        "pair": "seen, held_out",
        "instruction": "shuffled, empty, absent",
    }.items():
        with pytest.raises(ValueError, match=f"'odd' of the reset option '{option}'; valid: {valid}"):
            env.reset(seed=0, options={option: "odd"})
    for one, other in itertools.combinations(
        ({"swap_instruction": True}, {"pair": "seen"}, {"instruction": "absent"}), 2
    ):
        with pytest.raises(ValueError, match="contradict"):
            env.reset(seed=0, options={**one, **other})
    with pytest.raises(ValueError, match="no pink block.*there are"):
        env.reset(seed=0)
        env.world.block("pink")


def test_recolouring_swaps_colours():
    blocks = [scene.Block(color, 0.06, 0.0, np.array([x, 0.0])) for color, x in (("red", 0.0), ("blue", 0.1))]
    plates = (scene.Plate("blue", np.array([0.0, 0.1])), scene.Plate("white", np.array([0.1, 0.1])))
    world = scene.World(blocks, plates)
    goal = scene.recolor(world, scene.Goal("pick_and_place", "red", plate="blue"), "blue", "orange")
    assert (goal.target, goal.plate) == ("blue", "orange")
    assert [block.color for block in world.blocks] == ["blue", "red"]
    assert [plate.color for plate in world.plates] == ["orange", "white"]
    assert math.dist(world.block("blue").xy, (0.0, 0.0)) == 0.0
