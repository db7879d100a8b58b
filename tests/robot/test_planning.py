"""A policy that is told what to do next: by itself, by the environment, or by chance."""

import copy
import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image

from octo_like.policy.policy import Policy
from octo_like.robot.chunking import Plan as ChunkPlan
from octo_like.robot.client import PolicyClient, PolicyServerError
from octo_like.robot.executor import AsyncExecutor
from octo_like.robot.local import LocalPolicy
from octo_like.robot.planning import OraclePlanner, Plan, PredictedPlanner, RandomPlanner, able_to, accuracy
from octo_like.robot.record import BORDER, EVENT_COLOURS, FONT_SIZE, PATH_COLOUR, annotate_all, encode_gif
from octo_like.robot.rollout import evaluate
from octo_like.robot.safety import ActionFilter
from octo_like.robot.server import PolicyServer
from tests.model.test_text_head import policy as text_policy
from tests.robot.tiny import tiny_policy
from tests.robot.toy import SIZE, LineEnv, LinePolicy

SEEDS = [1_000_000_000 + i for i in range(9)]
TEXTS = ("go left", "go right")


class ThereAndBackEnv(LineEnv):
    """'Go left and come back' or the other way round: the sub-task is the end that is next."""

    def __init__(self):
        super().__init__(time_limit=60)

    def reset(self, *, seed=None, options=None):
        self.turned = False
        super().reset(seed=seed, options=options)
        return self._observe(), self._info()

    def _info(self):
        other = {"left": "right", "right": "left"}[self.task]
        reached = "left" if self.x <= 0 else "right" if self.x >= SIZE - 1 else None
        return {
            "instruction": f"{self.task} first, then back",
            "task": self.task,
            "success": self.turned and reached == other,
            "subtask": f"go {other if self.turned else self.task}",
        }

    def step(self, action):
        observation, reward, _, truncated, _ = super().step(action)
        self.turned |= (self.x <= 0) if self.task == "left" else (self.x >= SIZE - 1)
        self.x = float(np.clip(self.x, 0, SIZE - 1))
        info = self._info()
        return observation, reward, info["success"], truncated, info


class PlanningPolicy(LinePolicy):
    """Obeys the sub-task alone; says the end that is farther away, which is right once it has turned."""

    def create_tasks(self, texts, subtasks=None):
        self.told = subtasks
        return super().create_tasks(subtasks or [""] * len(texts))

    def predict_text(self, observations, tasks, *, rng, unnormalize, part, temperature):
        places = observations["image_primary"][:, -1].max(axis=(1, 3)).argmax(-1)
        return [TEXTS[0] if place > SIZE / 2 else TEXTS[1] for place in places]


def test_the_oracle_s_words_lead_there_and_back():
    episodes = evaluate(PlanningPolicy(), ThereAndBackEnv, SEEDS, batch_size=4, planner=OraclePlanner())
    assert all(e.success for e in episodes)
    for episode in episodes:
        said = [plan.text for plan in episode.plans]
        assert said[0] == f"go {episode.task}" and len(set(said)) == 2 and accuracy(episode.plans) == 1.0
        assert [plan.step for plan in episode.plans] == list(range(0, episode.steps, 3))
    # Without a plan, a policy that obeys nothing else stays where it is.
    assert not any(e.success or e.plans for e in evaluate(PlanningPolicy(), ThereAndBackEnv, SEEDS[:3], batch_size=3))


def test_an_animation_says_in_every_frame_which_sub_task_was_in_force():
    (episode,) = evaluate(
        PlanningPolicy(), ThereAndBackEnv, SEEDS[:1], batch_size=1, planner=OraclePlanner(), plan_every=2, record=1
    )
    # Said at steps 0, 6, 12, ...: frame t is what is seen after t actions.
    assert [plan.step for plan in episode.plans[:2]] == [0, 6] and episode.steps > 6
    assert episode.subtasks == [episode.plans[t // 6].text for t in range(episode.steps + 1)]
    assert set(episode.subtasks) == set(TEXTS)
    pictures = annotate_all(episode.frames, episode.instruction, True, 16, episode.subtasks)
    plain = annotate_all(episode.frames, episode.instruction, True, 16)
    above = plain[0].height - BORDER - 16 * SIZE  # the border and the instruction
    assert {one.height - plain[0].height for one in pictures} == {FONT_SIZE + 3}  # one more line, in all frames
    shown = {}
    for text, picture in zip(episode.subtasks, pictures, strict=True):
        line = np.asarray(picture, int)[above : above + FONT_SIZE + 3, BORDER:-BORDER]
        assert (line.max(-1) - line.min(-1)).max() > 60, "in a colour of its own"
        np.testing.assert_array_equal(line, shown.setdefault(text, line))
    assert not np.array_equal(*shown.values())
    gif = Image.open(io.BytesIO(encode_gif(episode.frames, episode.instruction, True, 16, subtasks=episode.subtasks)))
    assert gif.size == pictures[0].size
    # Without a planner nothing is kept free for it; texts of different length leave pictures of one size.
    assert evaluate(PlanningPolicy(), ThereAndBackEnv, SEEDS[:1], batch_size=1)[0].subtasks is None
    long = ["go left", "go left until the end is reached and then some more"] * len(episode.frames)
    sizes = {one.size for one in annotate_all(episode.frames, "both", None, 8, long[: len(episode.frames)])}
    assert len(sizes) == 1
    with pytest.raises(ValueError, match=r"2 sub-tasks for \d+ frames"):
        encode_gif(episode.frames, subtasks=long[:2])


def test_a_path_is_drawn_into_the_picture_and_not_written_above_it():
    frame = np.zeros((16, 32, 3), np.uint8)  # two views
    path = "<loc08><loc08><loc32><loc32> close <loc32><loc56> open"
    plain, drawn = annotate_all([frame, frame], "go", None, 10, ["", path])
    assert drawn.size == plain.size
    pixels, before = (np.asarray(picture)[-160 - BORDER : -BORDER, BORDER:-BORDER] for picture in (drawn, plain))
    assert pixels.shape == (160, 320, 3)
    bins = 160 / 64  # pixels of the first view
    assert tuple(pixels[int(32.5 * bins), int(32.5 * bins)]) == EVENT_COLOURS["close"]
    assert tuple(pixels[int(32.5 * bins), int(56.5 * bins)]) == EVENT_COLOURS["open"]
    assert tuple(pixels[int(8.5 * bins), int(8.5 * bins)]) == PATH_COLOUR
    assert tuple(pixels[int(20.5 * bins), int(20.5 * bins)]) == PATH_COLOUR
    np.testing.assert_array_equal(pixels[:, 160:], before[:, 160:])
    np.testing.assert_array_equal(np.asarray(drawn)[: -160 - BORDER], np.asarray(plain)[: -160 - BORDER])
    (wide,) = annotate_all([frame], "go", None, 10, [path], first_width=32)  # one view of 16 x 32
    pixels = np.asarray(wide)[-160 - BORDER : -BORDER, BORDER:-BORDER]
    assert tuple(pixels[int(32.5 * bins), int(56.5 * 2 * bins)]) == EVENT_COLOURS["open"]


def test_an_episode_depends_neither_on_its_company_nor_on_its_slot():
    run = lambda seeds, size: evaluate(  # noqa: E731
        PlanningPolicy(), ThereAndBackEnv, seeds, batch_size=size, planner=RandomPlanner(TEXTS), plan_every=2
    )
    reference = {e.seed: e for e in run(SEEDS, 3)}
    assert len({e.plans for e in reference.values()}) > 4
    for seeds, size in ((SEEDS[::-1], 5), (SEEDS[4:5], 1), (SEEDS, 16)):
        for episode in run(seeds, size):
            assert episode.plans == reference[episode.seed].plans
            np.testing.assert_array_equal(episode.actions, reference[episode.seed].actions)


def test_plans_are_kept_for_as_many_chunks_as_is_asked_for():
    for every in (1, 3):
        (episode,) = evaluate(
            PlanningPolicy(), ThereAndBackEnv, SEEDS[:1], batch_size=2, planner=OraclePlanner(), plan_every=every
        )
        assert [plan.step for plan in episode.plans] == list(range(0, episode.steps, 3 * every))


def test_what_the_policy_says_itself_is_handed_back_to_it_and_compared_with_the_environment():
    policy = PlanningPolicy(noise=0.0)
    episodes = evaluate(policy, ThereAndBackEnv, SEEDS, batch_size=4, planner=PredictedPlanner())
    assert set(policy.told) <= set(TEXTS)
    rates = [accuracy(e.plans) for e in episodes]
    assert 0 < np.mean(rates) < 1
    assert all(plan.wanted in TEXTS for e in episodes for plan in e.plans)


class RememberingPolicy(PlanningPolicy):
    """Says the end that the instruction names first, and at that end, told that it was going there, the other one. The
    picture alone does not say which is next."""

    def __init__(self, remembers=True):
        super().__init__(noise=0.0)
        self.config = {"model": {"auxiliaries": {"text": {"kind": "text", "remembers": remembers}}}}
        self.batch_spec = dataclasses.replace(self.batch_spec, subtask=True)

    def create_tasks(self, texts, subtasks=None):
        self.asked = list(zip(texts, subtasks or [""] * len(texts), strict=True))
        return super().create_tasks(texts, subtasks)

    def predict_text(self, observations, tasks, **_):
        places = observations["image_primary"][:, -1].max(axis=(1, 3)).argmax(-1)
        said = []
        for place, (text, last) in zip(places, self.asked, strict=True):
            end = place < 1 if last == TEXTS[0] else place > SIZE - 2
            other = TEXTS[1 - TEXTS.index(last)] if last else ""
            said.append((other if end else last) if last else f"go {text.split()[0]}")
        return said


def test_a_policy_that_remembers_is_asked_with_what_was_said_last_in_its_own_episode():
    evaluated = [
        evaluate(RememberingPolicy(), ThereAndBackEnv, SEEDS, batch_size=size, planner=PredictedPlanner())
        for size in (1, 4, 16)
    ]
    for episodes in zip(*evaluated, strict=True):
        assert all(one.success for one in episodes)
        assert len({one.plans for one in episodes}) == 1
        assert episodes[0].plans[0].text == f"go {episodes[0].task}"
    forgetful = evaluate(RememberingPolicy(False), ThereAndBackEnv, SEEDS[:3], batch_size=4, planner=PredictedPlanner())
    assert not any(one.success for one in forgetful)
    assert able_to(RememberingPolicy()) == {"reads": True, "says": True, "remembers": True}
    assert able_to(RememberingPolicy(False))["remembers"] is able_to(PlanningPolicy())["remembers"] is False


def test_accuracy_is_of_the_plans_that_can_be_judged():
    assert accuracy([Plan(0, "a", "a"), Plan(3, "b", "a"), Plan(6, "b", None)]) == 0.5
    assert math.isnan(accuracy([Plan(0, "a", None)]))


class HalfAPath:
    """A planner that says paths of the hand, and of some episodes half of one."""

    def __call__(self, policy, observations, instructions, infos, **_):
        return ["<loc01><loc02>" if info["task"] == "left" else "<loc01><loc02><loc03>" for info in infos]


def test_paths_are_not_judged_whole_or_not_and_drawn_into_the_leftmost_view():
    episodes = evaluate(PlanningPolicy(), ThereAndBackEnv, SEEDS[:4], planner=HalfAPath(), batch_size=2, record=1)
    assert {one.task for one in episodes} == {"left", "right"}
    assert {plan.wanted for one in episodes for plan in one.plans} == {None}
    assert episodes[0].first_width == episodes[0].frames[0].shape[1] and episodes[1].first_width is None


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="info has no 'subtask' to plan by; it has"):
        evaluate(PlanningPolicy(), LineEnv, SEEDS[:1], planner=OraclePlanner(), batch_size=1)
    with pytest.raises(ValueError, match="plan_every must be at least 1"):
        evaluate(PlanningPolicy(), LineEnv, SEEDS[:1], planner=OraclePlanner(), plan_every=0)
    with pytest.raises(ValueError, match="needs texts to draw from"):
        evaluate(PlanningPolicy(), LineEnv, SEEDS[:1], planner=RandomPlanner(()), batch_size=1)


# -- over the wire -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("websockets")
    silent = text_policy()
    unit = {"mean": [0.0] * 3, "std": [1.0] * 3, "mask": [True] * 3, "min": [-9.0] * 3, "max": [9.0] * 3}
    kinds = {"dimensions": {"action": {"names": ["x", "y", "z"], "kinds": ["delta"] * 3}}}
    policy = Policy(
        silent.config, silent.params, {"arm": {"action": unit, "proprio": unit, **kinds}}, silent.text_tokenizer
    )
    with PolicyServer(policy, unnormalize="arm", host="127.0.0.1", port=0).running(warm=True) as server:
        yield policy, server


def moment():
    return {"image_primary": np.full((16, 16, 3), 90, np.uint8), "proprio": np.array([0.1, 0.2, 0.3], np.float32)}


def test_a_client_can_say_what_to_do_next_or_let_the_policy_say_it(served):
    policy, server = served
    with PolicyClient("127.0.0.1", server.port, limits=False) as client:
        flat = client.act(moment(), "put it away")
        assert client.subtask is None
        client.reset()
        told = client.act(moment(), "put it away", subtask="reach for the cup")
        assert client.subtask == "reach for the cup" and np.abs(told - flat).max() > 1e-4
        client.reset()
        planned = client.act(moment(), "put it away", plan=True)
        task = policy.create_tasks(texts=["put it away"])
        window = {key: np.asarray(value)[None] for key, value in client.window.items()}
        said = client.subtask
        assert said == policy.predict_text(window, task)[0]
        client.reset()
        assert client.subtask is None
        again = client.act(moment(), "put it away", subtask=said)
        np.testing.assert_array_equal(planned, again)
        with pytest.raises(PolicyServerError, match="give 'subtask', or let the policy say it"):
            client.act(moment(), "put it away", subtask="reach", plan=True)
        for bad in (dict(subtask=3), dict(plan="yes")):
            reply = client._request  # what a client of another language may send
            with pytest.raises(
                PolicyServerError, match="'subtask' must be a text or nothing, and 'plan' true or false"
            ):
                reply({"type": "act", "observation": client.window, "instruction": "go", "step": 0, **bad})


def test_a_robot_hands_back_what_was_said_last_to_a_policy_that_remembers(served):
    """Over the wire and in this process, and what was said is whatever the robot was told: a person's words, too."""
    policy, forgetful = served[0], served[1]
    model = copy.deepcopy(policy.config["model"])
    model["auxiliaries"]["text"]["remembers"] = True
    remembering = Policy({**policy.config, "model": model}, policy.params, policy.statistics, policy.text_tokenizer)
    rng = np.random.default_rng(0)
    said = [dict(plan=True), dict(plan=True), dict(subtask="reach"), {}, dict(plan=True)]
    seen = [moment() | {"image_primary": rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)} for _ in said]
    local = LocalPolicy(remembering, "arm")
    with PolicyServer(remembering, unnormalize="arm", host="127.0.0.1", port=0).running() as server:
        with PolicyClient("127.0.0.1", server.port, limits=False) as client:
            assert client.metadata["subtasks"]["remembers"]
            last, differs = None, 0
            for observation, words in zip(seen, said, strict=True):
                client.act(observation, "put it away", unnormalize="arm", **words)
                window = {key: np.asarray(value)[None] for key, value in client.window.items()}
                local.observe(observation)
                local.executed(local.predict(local.window, "put it away", **words)[0])
                assert local.subtask == client.subtask
                if "plan" in words:
                    tasks = [
                        remembering.create_tasks(texts=["put it away"], **told)
                        for told in ({}, {} if last is None else {"subtasks": [last]})
                    ]
                    alone, expected = (remembering.predict_text(window, task)[0] for task in tasks)
                    assert client.subtask == expected
                    differs += alone != expected
                last = client.subtask or last
            assert last and differs, "what was said last makes no difference"
            for other in ("another task", "put it away"):  # it was not said of this task
                client.act(seen[0], other, unnormalize="arm", plan=True)
                local.observe(seen[0])
                local.executed(local.predict(local.window, other, plan=True)[0])
                window = {key: np.asarray(value)[None] for key, value in client.window.items()}
                expected = remembering.predict_text(window, remembering.create_tasks(texts=[other]))
                assert [client.subtask] == [local.subtask] == expected
            sent = client.window
            client.reset()
            assert client.subtask is None
            request = {"type": "act", "observation": sent, "instruction": "go", "step": 0, "plan": True}
            with pytest.raises(PolicyServerError, match="'last_subtask' must be a text or nothing"):
                client._request({**request, "last_subtask": 3})
    with PolicyClient("127.0.0.1", forgetful.port, limits=False) as client:
        assert not client.metadata["subtasks"]["remembers"]
        with pytest.raises(PolicyServerError, match="for a policy that remembers what was said last"):
            client._request({**request, "last_subtask": "reach"})


class Counting:
    """A source whose policy says how often it was asked."""

    window, subtask, asked = {"timestep": np.array([0])}, None, 0

    def reset(self, seed=0):
        self.subtask = None

    def observe(self, observation, *, unnormalize=None):
        self.window = dict(self.window)

    def predict(self, window, instruction=None, *, subtask=None, plan=False, **_):
        self.asked += 1
        self.subtask = f"{self.asked}, after {self.subtask}" if plan else subtask
        return np.full((4, 2), self.asked, np.float32)

    def chunks(self, unnormalize=None):
        return {"horizon": 4, "continues": {"jacobian_free": 4}}

    def executed(self, action, *, unnormalize=None):
        pass

    def filter_of(self, unnormalize=None):
        return ActionFilter([None] * 2, [None] * 2, kinds=["delta"] * 2)


def test_what_is_only_compiled_was_not_said():
    source = Counting()
    with AsyncExecutor(source, ChunkPlan("guided", exec_horizon=4), delay=0) as executor:
        executor.start({}, "put it away", says_subtasks=True)
        assert source.asked == 2 and executor.subtask == "1, after None"
        for _ in range(5):
            executor.step({})
        assert executor.subtask.endswith(", after 1, after None")


def test_a_policy_without_sub_tasks_says_so():
    pytest.importorskip("websockets")
    with PolicyServer(tiny_policy("arm", 3, None), unnormalize="arm", host="127.0.0.1", port=0).running() as server:
        with PolicyClient("127.0.0.1", server.port, limits=False) as client:
            image = {"image_primary": np.zeros((32, 32, 3), np.uint8)}
            with pytest.raises(ValueError, match="cannot be told a subtask"):
                client.act(image, "go", subtask="reach")
            with pytest.raises(ValueError, match="cannot plan"):
                client.act(image, "go", plan=True)


def test_a_policy_in_this_process_says_the_same_and_an_executor_passes_it_on(served):
    """Client, local policy and executor: equal sub-tasks and actions; a person's words from the next chunk on."""
    policy, server = served
    local = LocalPolicy(policy, "arm")
    with PolicyClient("127.0.0.1", server.port, limits=False) as client:
        for words in (dict(), dict(plan=True), dict(subtask="reach for the cup")):
            client.reset()
            local.reset()
            wanted = client.act(moment(), "put it away", unnormalize="arm", **words)
            local.observe(moment())
            np.testing.assert_allclose(local.predict(local.window, "put it away", **words), wanted, atol=1e-5)
            assert local.subtask == client.subtask and (client.subtask is None) == (not words)
        own = local.policy.predict_text(
            {key: np.asarray(value)[None] for key, value in local.window.items()},
            policy.create_tasks(texts=["put it away"]),
            unnormalize="arm",
        )
    with AsyncExecutor(local, ChunkPlan("wait"), delay=0) as executor:
        executor.start(moment(), "put it away", says_subtasks=True)
        assert executor.subtask == own[0]
        executor.say("reach for the cup")
        assert executor.subtask == own[0], "the chunk that is there is executed"
        for _ in range(6):
            executor.step(moment())
        assert executor.subtask == "reach for the cup"
        executor.say(None)
        for _ in range(6):
            executor.step(moment())
        assert executor.subtask != "reach for the cup"
    with pytest.raises(ValueError, match="takes no sub-tasks"):
        LocalPolicy(tiny_policy("arm", 3, None), "arm").predict({"timestep": [0]}, "go", plan=True)
