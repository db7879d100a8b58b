"""Frames of expert episodes of the tabletop with what the world knows of them: where things are, what the expert does.

For `scripts/probe_policy.py`, which asks what of this a policy knows. The arrays are those of its frame files, see
docs/probing.md. Images are as rendered; those of the datasets have been through JPEG.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.envs.demonstrations import first_seed, points
from octo_like.envs.embodiments import EMBODIMENTS
from octo_like.envs.language import HELD_OUT_PAIRS
from octo_like.envs.paths import place
from octo_like.envs.tabletop import TabletopEnv

POINTS = ("target", "plate", "effector")
PHASES = ("reach", "push", "pick", "place", "switch")


def labelled_frames(
    robots: Sequence[str],
    episodes: int,
    *,
    image_sizes: Mapping[str, tuple[int, int]],
    horizon: int,
    goals: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """The first successful expert episodes of every robot's validation seeds, all their frames.

    Args:
      episodes: of each robot.
      image_sizes: camera slot to (height, width), square; slots that a robot does not have are marked missing.
      horizon: H of the action chunks.
      goals: slots of which there are goal images.

    Returns:
      N frames, those of an episode together and in order: image_{slot} (N, h, w, 3) uint8 and present_image_{slot} (N,)
      bool; proprio (N, P) and action (N, H, A) float32 in physical units, NaN beyond the robot's own dimensions and
      past the end of the episode; instruction, task, dataset (N,) str; episode (N,) int; goal_image_{slot};
      point_{name} (N, 2) float32, (column, row) in the primary image, each divided by its size, NaN where the scene
      has no such thing; phase_{name} (N,) bool. In "switch" frames the expert opens or closes the hand with the next
      action; they are also frames of "pick" (the hand is empty) or "place" (it holds).

    Raises:
      ValueError: an unknown robot, or a camera that is not square.
    """
    for robot in robots:
        if robot not in EMBODIMENTS:
            raise ValueError(f"unknown robot {robot!r}; valid: {', '.join(EMBODIMENTS)}")
    if not robots or episodes < 1:
        raise ValueError(f"need at least one robot and one episode, got {list(robots)} and {episodes}")
    for slot, (height, width) in image_sizes.items():
        if height != width:
            raise ValueError(f"the tabletop's cameras are square, the policy's {slot!r} is {height} x {width}")
    rows: list[dict[str, Any]] = []
    number = 0
    for robot in robots:
        sizes = {slot: size[0] for slot, size in image_sizes.items() if slot in EMBODIMENTS[robot].cameras}
        env = TabletopEnv(robot, sizes.get("primary", 64), sizes.get("wrist", 32), bumps=True)
        seed = first_seed(robot, "val")
        made = 0
        while made < episodes:
            frames = _episode(env, seed, sizes, [slot for slot in goals if slot in sizes])
            seed += 1
            if frames:
                rows += [frame | {"episode": number} for frame in _with_chunks(frames, horizon)]
                made, number = made + 1, number + 1
    return _stack(rows, image_sizes, goals)


def _episode(env: TabletopEnv, seed: int, sizes: Mapping[str, int], goals: Sequence[str]) -> list[dict[str, Any]]:
    """Frames of one episode; none of those that datasets leave out: the expert failed, or the pair is held out."""
    observation, info = env.reset(seed=seed)
    if (env.goal.target, env.goal.plate) in HELD_OUT_PAIRS:
        return []
    expert = env.expert(np.random.default_rng([seed, 0xE4]))
    pictures = env.goal_image() if goals else {}
    frames, done = [], False
    while True:
        action = expert.act()
        frame: dict[str, Any] = {f"image_{slot}": observation[f"image_{slot}"] for slot in sizes}
        frame |= {f"goal_image_{slot}": pictures[f"image_{slot}"] for slot in goals}
        frame |= {"dataset": f"tabletop_{env.embodiment.name}", "task": info["task"]}
        frame |= {"instruction": info["instruction"], "proprio": observation.get("proprio", np.zeros(0, np.float32))}
        frame |= {"action": action} | _points(env) | _phases(env, action)
        frames.append(frame)
        if done:
            return frames if info["success"] else []
        observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated


def _points(env: TabletopEnv) -> dict[str, np.ndarray]:
    named = {f"point_{name.removesuffix('_point')}": xy for name, xy in points(env).items()}
    return named | {"point_effector": place(env)}


def _phases(env: TabletopEnv, action: np.ndarray) -> dict[str, bool]:
    now, task, holds = dict.fromkeys(PHASES, False), env.goal.task, env.world.held is not None
    if env.success:
        pass  # The last frame: nothing is left to do.
    elif task == "pick_and_place":
        now["place" if holds else "pick"] = True
        now["switch"] = bool((action[-1] >= 0.5) != (env.effector.opening >= 0.5))
    else:
        now[task] = True
    return {f"phase_{name}": value for name, value in now.items()}


def _with_chunks(frames: list[dict[str, Any]], horizon: int) -> list[dict[str, Any]]:
    """Every frame's action becomes the chunk (H, A) from there on, NaN past the last frame."""
    actions = np.stack([frame["action"] for frame in frames])
    padded = np.concatenate([actions, np.full((horizon, actions.shape[1]), np.nan, np.float32)])
    return [frame | {"action": padded[t : t + horizon]} for t, frame in enumerate(frames)]


def _stack(rows: list[dict[str, Any]], image_sizes, goals) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for slot, size in image_sizes.items():
        key, blank = f"image_{slot}", np.zeros((*size, 3), np.uint8)
        present = np.array([key in row for row in rows])
        if not present.any():
            continue
        arrays[key] = np.stack([row.get(key, blank) for row in rows])
        arrays[f"present_{key}"] = present
        if slot in goals:
            arrays[f"goal_{key}"] = np.stack([row.get(f"goal_{key}", blank) for row in rows])
    for key in ("proprio", "action"):
        width = max(row[key].shape[-1] for row in rows)
        if width:
            pads = [[(0, 0)] * (row[key].ndim - 1) + [(0, width - row[key].shape[-1])] for row in rows]
            arrays[key] = np.stack(
                [np.pad(row[key], pad, constant_values=np.nan) for row, pad in zip(rows, pads, strict=True)]
            )
    names = [f"point_{name}" for name in POINTS] + [f"phase_{name}" for name in PHASES]
    for key in ("instruction", "task", "dataset", "episode", *names):
        arrays[key] = np.array([row[key] for row in rows])
    return arrays
