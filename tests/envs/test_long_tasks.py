"""Tasks of several parts: experts do them, sub-tasks say what happens, and the judge is not fooled."""

import dataclasses
import itertools
import math

import gymnasium
import numpy as np
import pytest

from octo_like.envs import EVALUATION_SEEDS, LONG_EMBODIMENTS, LongTabletopEnv, long_demonstrations, scene
from octo_like.envs.colors import Colors
from octo_like.envs.long import LongExpert
from octo_like.envs.long_language import (
    DONE,
    LONG_PHRASINGS,
    LONG_TASKS,
    LONG_UNSEEN_PHRASINGS,
    PUT_DOWN,
    all_long_instructions,
    all_subtasks,
)
from octo_like.envs.long_tasks import Progress, next_part, sample_long_scene

CASES = list(itertools.product(LONG_EMBODIMENTS, LONG_TASKS))


def play(env, seed, task, expert=LongExpert, rng=0):
    """[(info, held, sub-task at the time)] of an episode, the last after its end, and its number of steps."""
    _, info = env.reset(seed=seed, options={"task": task})
    acting = expert(env, np.random.default_rng([seed, rng]))
    told, done = [(info, env.world.held)], False
    while not done:
        action = acting.act()
        assert action.dtype == np.float32 and env.action_space.contains(action)
        _, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        told.append((info, env.world.held))
        assert reward == float(info["success"]) and (info["progress"] == 1) == info["success"]
    return told


def state_says_done(env):
    """Whether the goal is reached, judged from positions alone; None where they do not tell (touches)."""
    world, goal = env.world, env.goal
    at = {b.color: b.xy for b in world.blocks}
    if goal.task == "touch_in_order":
        return None
    if world.held is not None:
        return False
    plates = {p.color: p for p in world.plates}

    def on(block, plate):
        return math.dist(at[block], plates[plate].xy) < plates[plate].radius

    if goal.task == "match":
        return all(on(block, block) for block in at)
    if goal.task == "clear":
        return all(math.dist(xy, plates[goal.plate].xy) >= plates[goal.plate].radius + 0.03 for xy in at.values())
    return all(on(block, goal.plate) == (block in goal.blocks) for block in at)


@pytest.mark.parametrize("name,task", CASES)
@pytest.mark.parametrize("bumps", [False, True])
def test_experts_succeed(name, task, bumps):
    env, table = LongTabletopEnv(name, bumps=bumps, render_images=False), set(all_subtasks())
    steps, wins, episodes = [], 0, 100 if bumps else 20
    for seed in range(EVALUATION_SEEDS, EVALUATION_SEEDS + episodes):
        told = play(env, seed, task)
        wins += told[-1][0]["success"]
        steps.append((len(told) - 1) / env.max_steps)
        assert {info["subtask"] for info, _ in told} <= table
        assert told[-1][0]["success"] == (told[-1][0]["subtask"] == DONE)
        assert state_says_done(env) in (None, told[-1][0]["success"])
        assert told[0][0]["progress"] == 0 and not told[0][0]["success"]
        if not bumps:
            progress = [info["progress"] for info, _ in told]
            assert progress == sorted(progress) and len(set(progress)) == len(env.goal.blocks) + 1
    assert wins >= 0.95 * episodes
    assert np.median(steps) <= 0.5, "too little time for a policy that is not an expert"


@pytest.mark.parametrize("name,task", CASES)
def test_sub_tasks_say_what_happens(name, task):
    """Who picks up has an empty hand and then the named block; who places has that block, and lays it where it says."""
    env = LongTabletopEnv(name, render_images=False)
    for seed in range(12):
        told = play(env, seed, task)
        world = env.world
        for (info, held), (_, later) in zip(told, told[1:], strict=False):
            words = info["subtask"].split()
            if words[0] == "pick":
                assert held is None and (later is None or world.blocks[later].color == words[3])
            elif words[0] in ("place", "put"):
                assert held is not None
        parts = [text for text, _ in itertools.groupby(info["subtask"] for info, _ in told)]
        count = len(env.goal.blocks)
        assert len(parts) == (count if task == "touch_in_order" else 2 * count) + 1 and parts[-1] == DONE
        order = [words.split()[-2] for words in parts if words.startswith(("pick", "touch"))]
        assert sorted(order) == sorted(env.goal.blocks)
        if task.endswith("in_order"):
            assert tuple(order) == env.goal.blocks
        if task == "clear":
            assert parts[1::2] == [PUT_DOWN] * count
        elif task == "match":
            assert [text.split()[4] for text in parts[1::2]] == order


class OutOfOrder(LongExpert):
    """Serves the first two blocks the other way round."""

    def __init__(self, env, rng):
        super().__init__(env, rng)
        self._wrong = Progress(dataclasses.replace(env.goal, blocks=env.goal.blocks[1::-1] + env.goal.blocks[2:]))

    def act(self):
        env = self._env
        if env.goal.task == "touch_in_order":
            self._view.goal, self._skill.color = scene.Goal("reach", env.goal.blocks[1]), env.goal.blocks[1]
            return self._skill.act()
        right, env.progress = env.progress, self._wrong
        self._wrong.update(env.world)
        try:
            return super().act()
        finally:
            env.progress = right


@pytest.mark.parametrize("name", LONG_EMBODIMENTS)
@pytest.mark.parametrize("task", ["touch_in_order", "place_in_order"])
def test_the_wrong_order_is_no_success(name, task):
    env = LongTabletopEnv(name, render_images=False)
    for seed in range(20):
        told = play(env, seed, task, OutOfOrder)
        assert not told[-1][0]["success"] and env.progress.wrong and told[-1][0]["progress"] == 0
        assert len(told) - 1 < env.max_steps, "it ends when the order is broken"


def world_of(blocks, plates, held=None):
    return scene.World(
        [scene.Block(color, 0.06, 0.0, np.array(xy, float)) for color, xy in blocks.items()],
        tuple(scene.Plate(color, np.array(xy, float), radius) for color, (xy, radius) in plates.items()),
        held=held,
    )


def goal_of(task, seed=0, **wanted):
    """A goal of a task and its scene."""
    for number in itertools.count(seed):
        world, goal, _ = sample_long_scene(
            np.random.default_rng(number), LongTabletopEnv("arm").embodiment.layout, task
        )
        if all(len(goal.blocks) == value for value in wanted.values()):
            return world, goal


def lay(world, color, xy):
    """A block is let go at a place."""
    world.released = color
    world.held = None
    world.block(color).xy = np.array(xy, float)


def test_what_is_laid_again_after_another_is_out_of_order():
    world, goal = goal_of("place_in_order", count=2)
    first, second = goal.blocks
    plate, progress = world.plate(goal.plate), Progress(goal)
    lay(world, first, plate.xy + (0.04, 0))
    progress.update(world)
    assert progress.fraction(world) == 0.5 and not progress.wrong
    world.held = world.blocks.index(world.block(first))  # taken up again
    world.released = None
    progress.update(world)
    assert progress.fraction(world) == 0 and not progress.wrong
    lay(world, second, plate.xy - (0.04, 0))
    progress.update(world)
    assert progress.wrong and not progress.complete(world)
    lay(world, first, plate.xy + (0.04, 0))
    progress.update(world)
    assert not progress.complete(world) and progress.fraction(world) == 0, "both lie there, but in the wrong order"


def test_touching_the_same_block_twice_is_once_and_another_is_wrong():
    world, goal = goal_of("touch_in_order", count=2)
    first, second = goal.blocks
    third = next(b.color for b in world.blocks if b.color not in goal.blocks)
    progress = Progress(goal)
    for touched in (None, first, None, first, first):
        progress.update(world, touched)
        assert not progress.wrong
    assert progress.fraction(world) == 0.5
    progress.update(world, second)
    assert progress.complete(world)
    for wrong in (second, third):
        progress = Progress(goal)
        progress.update(world, wrong)
        progress.update(world, first)
        progress.update(world, second)
        assert progress.wrong and not progress.complete(world) and progress.fraction(world) == 0


def test_all_but_one():
    world, goal = goal_of("all_but_one")
    plate, progress = world.plate(goal.plate), Progress(goal)
    for number, color in enumerate(goal.blocks):
        lay(world, color, plate.xy + (0.05 * (-1) ** number, 0))
    progress.update(world)
    assert progress.complete(world)
    world.held = world.blocks.index(world.block(goal.blocks[0]))  # held over the plate it is not on it
    assert not progress.complete(world) and progress.fraction(world) == 0.5
    world.held = None
    world.block(goal.spared).xy = plate.xy.copy()
    assert not progress.complete(world) and progress.fraction(world) == 0.5
    part = next_part(world, progress, np.zeros(3))
    assert part.text == f"pick up the {goal.spared} block", "the mistake is put right"
    world.held = world.blocks.index(world.block(goal.spared))
    part = next_part(world, progress, np.zeros(3))
    assert part.text == PUT_DOWN and math.dist(part.goal.spot, plate.xy) >= plate.radius + 0.03
    lay(world, goal.spared, part.goal.spot)
    assert progress.complete(world)


def test_matching_knows_colours_and_the_edge_of_a_plate():
    world = world_of({"red": (0, 0), "blue": (0.1, 0.1)}, {"red": ((-0.1, 0), 0.055), "blue": ((0.1, 0), 0.055)})
    _, goal = goal_of("match", count=2)
    progress = Progress(dataclasses.replace(goal, blocks=("red", "blue")))
    lay(world, "red", (0.1, 0))
    lay(world, "blue", (-0.1, 0))
    assert progress.fraction(world) == 0 and not progress.complete(world), "each on the other's plate"
    lay(world, "red", (-0.1, 0))
    lay(world, "blue", (0.1, 0.0551))
    assert progress.fraction(world) == 0.5
    lay(world, "blue", (0.1, 0.0549))
    assert progress.complete(world)


def test_clearing_needs_room_between_block_and_plate():
    world, goal = goal_of("clear", count=1)
    plate, progress = world.plate(goal.plate), Progress(goal)
    lay(world, goal.blocks[0], plate.xy + (plate.radius + 0.02, 0))
    assert not progress.complete(world), "it still lies on the rim"
    lay(world, goal.blocks[0], plate.xy + (plate.radius + 0.031, 0))
    assert progress.complete(world)
    other = next(b for b in world.blocks if b.color not in goal.blocks)
    other.xy = plate.xy.copy()
    assert not progress.complete(world), "another one in its place"


@pytest.mark.parametrize("name,task", CASES)
def test_chance_and_idleness_do_not_succeed(name, task):
    env = LongTabletopEnv(name, render_images=False)
    for seed in range(6):
        env.reset(seed=seed, options={"task": task})
        rng, done = np.random.default_rng(seed), False
        while not done:
            action = np.zeros(env.embodiment.action_dim) if seed % 2 else rng.uniform(-1, 1, env.embodiment.action_dim)
            if name == "arm3" and seed % 2:
                action[:3] = env.effector.q
            _, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            assert not info["success"]
        assert env._steps == env.max_steps or env.progress.wrong


@pytest.mark.parametrize("name", LONG_EMBODIMENTS)
def test_a_disturbed_expert_finishes(name):
    """Its hand is led astray, and blocks are put where they do not belong."""
    env, wins = LongTabletopEnv(name, render_images=False), 0
    for seed in range(20):
        env.reset(seed=seed, options={"task": ("match", "all_but_one", "clear")[seed % 3]})
        expert, rng, done = env.expert(np.random.default_rng(seed)), np.random.default_rng(seed), False
        while not done:
            action = expert.act() if env._steps % 7 else env.action_space.sample() * 0 + rng.uniform(-0.1, 0.1)
            _, _, terminated, truncated, info = env.step(action)
            if env._steps == 25 and env.goal.task == "all_but_one" and env.world.held is None:
                env.world.block(env.goal.spared).xy = env.world.plate(env.goal.plate).xy.copy()
            done = terminated or truncated
        wins += info["success"]
    assert wins >= 18


def test_the_goal_image_does_not_change_the_episode():
    env = LongTabletopEnv("arm", image_size=64)
    for seed, task in enumerate(LONG_TASKS):
        first, _ = env.reset(seed=seed, options={"task": task})
        goal = env.goal_image()
        assert set(goal) == {"image_primary", "image_wrist"} and env.progress.fraction(env.world) == 0
        np.testing.assert_array_equal(env._observation()["image_primary"], first["image_primary"])
        play_on, done = env.expert(np.random.default_rng(0)), False
        while not done:
            _, _, terminated, truncated, info = env.step(play_on.act())
            done = terminated or truncated
        assert info["success"]
        np.testing.assert_array_equal(env.goal_image()["image_primary"], goal["image_primary"])


def test_registered_for_closed_loop():
    for name in LONG_EMBODIMENTS:
        env = gymnasium.make(f"octo_like/TabletopLong-{name}-v0", render_images=False)
        observation, info = env.reset(seed=0, options={"task": "match"})
        assert env.observation_space.contains(observation) and info["task"] == "match"
        assert {"instruction", "success", "progress", "subtask", "reached_target"} <= set(info)
        again = env.reset(seed=0, options={"task": "match"})[1]
        assert again == info
        env.close()


def test_words_of_the_long_tasks():
    env, said = LongTabletopEnv("gripper", render_images=False), {}
    for seed in range(150):
        info = env.reset(seed=seed)[1]
        said.setdefault(info["task"], set()).add(info["instruction"])
        unseen = env.reset(seed=seed, options={"phrasing": "unseen"})[1]
        assert unseen["task"] == info["task"] and unseen["instruction"] != info["instruction"]
        assert all(color in info["instruction"] for color in env.goal.blocks if info["task"].endswith("in_order"))
        assert env.goal.spared is None or env.goal.spared in info["instruction"]
    assert set(said) == set(LONG_TASKS) == set(LONG_PHRASINGS) == set(LONG_UNSEEN_PHRASINGS)
    known = {word.strip(",:") for text in all_long_instructions() for word in text.split()}
    assert {word.strip(",:") for texts in said.values() for text in texts for word in text.split()} <= known
    assert env.reset(seed=0, options={"instruction": "empty"})[1]["instruction"] == ""
    plain, mixed = (env.reset(seed=0, options=o)[1]["instruction"] for o in ({}, {"instruction": "shuffled"}))
    assert sorted(plain.split()) == sorted(mixed.split()) and plain != mixed


@pytest.mark.parametrize(
    "options,message",
    [
        ({"task": "push"}, "unknown value 'push' of the reset option 'task'; valid: match"),
        ({"palette": ["red"]}, r"unknown reset options \['palette'\]; valid: task, phrasing, instruction"),
        ({"instruction": "absent"}, "unknown value 'absent'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LongTabletopEnv("arm", render_images=False).reset(seed=0, options=options)
    with pytest.raises(ValueError, match="embodiment 'pusher' has no long tasks; valid: gripper, arm, arm3"):
        LongTabletopEnv("pusher")


def test_scenes_that_demonstrations_leave_out():
    colors = Colors(unnamed=frozenset({"purple"}), unnamed_pairs=frozenset({("green", "white"), ("blue", "blue")}))
    simulator = long_demonstrations.LongSimulator(encode=lambda image: None, colors=colors)
    for episode in simulator.episodes("arm", "train", 40):
        steps = episode["steps"]
        said = " ".join([steps[0]["language_instruction"], *(step["subtask"] for step in steps)])
        assert "purple" not in said
        pairs = set()
        for step in steps:
            if step["subtask"].startswith("pick"):
                block = step["subtask"].split()[3]
            elif step["subtask"].startswith("place"):
                pairs.add((block, step["subtask"].split()[4]))
        assert not pairs & colors.unnamed_pairs
    with pytest.raises(ValueError, match="no other palette"):
        long_demonstrations.LongSimulator(colors=Colors(palette=("red", "green", "blue", "yellow")))


@pytest.mark.parametrize("embodiment", LONG_EMBODIMENTS[:2])
def test_things_go_wrong_in_many_demonstrations_and_experts_put_them_right(embodiment, monkeypatch):
    befell = []
    bump = LongTabletopEnv._bump
    monkeypatch.setattr(LongTabletopEnv, "_bump", lambda env: (befell.append(env.episode_seed), bump(env))[1])
    env = LongTabletopEnv(embodiment, mishaps=True, render_images=False)
    frames = empty = 0
    for seed in range(100):
        env.reset(seed=seed)
        expert, done = env.expert(np.random.default_rng(seed)), False
        while not done:
            *_, terminated, truncated, info = env.step(expert.act())
            done = terminated or truncated
            frames += 1
            empty += env.world.held is None and env.effector.opening < 0.5
        assert info["success"], seed
    times = [befell.count(seed) for seed in range(100)]
    assert 35 <= sum(count > 0 for count in times) <= 55 and sum(count > 1 for count in times) >= 15
    assert 0.008 < empty / frames < 0.02, "a closed hand with nothing in it is seen, and opened"
