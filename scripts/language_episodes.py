"""The tests of scripts/benchmark_language.py: episodes, questions about pictures, and how long a robot waits."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import numpy as np
from language_cells import ROBOTS, TAUGHT, Test

from octo_like import Policy
from octo_like.common import normalization
from octo_like.common.fast import FastVocabulary
from octo_like.envs import EMBODIMENTS, EVALUATION_SEEDS, LongTabletopEnv, TabletopEnv, picture_rows
from octo_like.envs.long_language import PICK, all_subtasks
from octo_like.robot import rollout
from octo_like.robot.planning import OraclePlanner, Planner, PredictedPlanner, RandomPlanner
from octo_like.robot.record import write_gif
from octo_like.robot.wrappers import HistoryWrapper

BATCH_SIZE = 30
EXEC_HORIZON = 2
SHOWN = 2  # animations of a test
QUESTIONS = 5  # times `episodes`

CORRECTED_AT = 4  # steps after which a person says something else
TIME_TO_OBEY = 40  # steps


class Corrected(gym.Wrapper):
    """A long task in which a person changes their mind: after a few steps another block is to be picked up, one that
    nothing else asks for now. `info["correction"]` says which; success is that it is in the hand within a while. The
    episode fails when the long task ends before that, because it is done or its order is broken."""

    def reset(self, **arguments):
        observation, info = self.env.reset(**arguments)
        self.steps, self.wanted = 0, None
        return observation, {**info, "success": False}

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        world = self.env.world
        if self.wanted is None and self.steps >= CORRECTED_AT:
            taken = {self.env.part().block} | ({world.blocks[world.held].color} if world.held is not None else set())
            free = sorted(block.color for block in world.blocks if block.color not in taken)
            self.wanted = free[self.env.episode_seed % len(free)]
        if self.wanted is not None:
            info = {**info, "correction": PICK.format(block=self.wanted)}
        held = None if world.held is None else world.blocks[world.held].color
        success = self.wanted is not None and held == self.wanted
        over = terminated or truncated or self.steps >= CORRECTED_AT + TIME_TO_OBEY
        return observation, float(success), success, over and not success, {**info, "success": success}


@dataclasses.dataclass(frozen=True)
class CorrectedPlanner:
    """The policy's own words, until a person says something else."""

    own: Planner = PredictedPlanner()

    def __call__(
        self, policy: Any, observations: Mapping[str, Any], instructions: Sequence[str], infos: Sequence[Mapping], **how
    ) -> list[str]:
        said = self.own(policy, observations, instructions, infos, **how)
        return [info.get("correction", text) for info, text in zip(infos, said, strict=True)]


PLANNERS: dict[str | None, Planner | None] = {
    None: None,
    "predicted": PredictedPlanner(),
    "oracle": OraclePlanner(),
    "random": RandomPlanner(tuple(all_subtasks())),
    "corrected": CorrectedPlanner(),
}


def run(export: Path, study: str, test: Test, episodes: int, gifs: Path) -> dict[str, Any]:
    """The result of a test of a policy, ready for JSON."""
    policy = Policy.load_pretrained(export)
    if test.kind == "answers":
        return {"answers": list(answers(policy, QUESTIONS * episodes))}
    if test.kind == "speed":
        return speed(policy, ROBOTS[study][-1])
    return {
        "episodes": [one for robot in ROBOTS[study] for one in _of_robot(policy, robot, study, test, episodes, gifs)]
    }


def _of_robot(policy: Policy, robot: str, study: str, test: Test, episodes: int, gifs: Path) -> Iterator[dict]:
    tasks = test.tasks or EMBODIMENTS[robot].tasks
    seeds, options = [], []
    for i in range(max(1, episodes // len(ROBOTS[study]))):
        scene, task = divmod(i, len(tasks))
        seeds.append(EVALUATION_SEEDS + scene)
        target = {"target": test.targets[scene % len(test.targets)]} if test.targets else {}
        options.append({**test.options, **target, "task": tasks[task]})
    found = rollout.evaluate(
        policy,
        functools.partial(make_env, robot, test.kind, policy),
        seeds,
        options=options,
        unnormalize=f"tabletop_{robot}" if test.kind == "short" else f"tabletop_long_{robot}",
        exec_horizon=EXEC_HORIZON,
        batch_size=min(BATCH_SIZE, len(seeds)),
        planner=PLANNERS[test.planner],
        record=SHOWN * len(tasks),
    )
    for episode in found:
        if episode.frames is not None:
            name = f"{robot}-{episode.task}-{episode.seed - EVALUATION_SEEDS}.gif"
            caption = dict(scale=2, subtasks=episode.subtasks, first_width=episode.first_width)
            write_gif(gifs / name, episode.frames, episode.instruction, episode.success, **caption)
        # A person's words are not what the environment would have said.
        judged = [plan.text == plan.wanted for plan in episode.plans] if test.kind == "long" else []
        plans = {"plans": len(judged), "agreed": sum(judged)} if judged else {}
        yield {"robot": robot, **episode.summary(), **plans}


def make_env(robot: str, kind: str, policy: Policy) -> gym.Env:
    sizes = policy.batch_spec.image_sizes
    views = dict(image_size=sizes["primary"][0], wrist_size=sizes.get("wrist", (32, 32))[0])
    if kind == "short":
        return TabletopEnv(robot, **views)
    return Corrected(LongTabletopEnv(robot, **views)) if kind == "corrected" else LongTabletopEnv(robot, **views)


def answers(policy: Policy, count: int) -> Iterator[dict[str, Any]]:
    """What the policy answers to questions about pictures that no dataset has: kind, question, answer, what was said,
    and whether the taught word is in the question or in the answer."""
    seed, rows = picture_rows.first_seed("val", picture_rows.RUNS - 1), []
    while len(rows) < count:
        if (found := picture_rows.row(seed)) is not None:
            rows.append(found)
        seed += 1
    for start in range(0, count, BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        batch += batch[:1] * (BATCH_SIZE - len(batch))
        images = np.stack([picture.image for picture, _ in batch])[:, None]
        window = {"image_primary": images, "timestep_pad_mask": np.ones((BATCH_SIZE, 1), bool)}
        said = policy.predict_text(window, policy.create_tasks(texts=[asked.prompt for _, asked in batch]))
        for (_, asked), text in list(zip(batch, said, strict=True))[: count - start]:
            yield {
                "kind": asked.kind,
                "question": asked.prompt,
                "answer": asked.answer,
                "said": text,
                "taught": TAUGHT in f"{asked.prompt} {asked.answer}",
            }


def speed(policy: Policy, robot: str, calls: int = 40) -> dict[str, Any]:
    """Seconds until one robot has a chunk (median), and how many tokens it takes where it is said in tokens."""
    dataset = f"tabletop_{robot}"
    env = HistoryWrapper(make_env(robot, "short", policy), policy.batch_spec.window_size)
    observation, info = env.reset(seed=EVALUATION_SEEDS)
    read = {"timestep_pad_mask", "proprio", *(f"image_{slot}" for slot in policy.batch_spec.image_sizes)}
    observations = {key: np.asarray(value)[None] for key, value in observation.items() if key in read}
    tasks = policy.create_tasks(texts=[info["instruction"]])
    seconds, chunks = [], []
    for i in range(calls + 3):
        begun = time.perf_counter()
        chunk = policy.sample_actions(observations, tasks, rng=jax.random.key(i), unnormalize=dataset)
        chunks.append(np.asarray(chunk)[0])
        seconds.append(time.perf_counter() - begun)
    head = policy.config["model"]["heads"]["action"]
    tokens = None
    if head["kind"] in ("bins", "discrete"):
        tokens = head["action_horizon"] * head["action_dim"]
    elif head["kind"] == "fast":
        vocabulary = FastVocabulary.from_json(head["vocabulary"])
        drawn = normalization.normalize(np.stack(chunks), policy.statistics[dataset]["action"], "normal")
        width = vocabulary.dim - drawn.shape[-1]
        tokens = float(vocabulary.lengths(np.pad(drawn, ((0, 0), (0, 0), (0, width)))).mean())
    return {"seconds": float(np.median(seconds[3:])), "tokens": tokens}
