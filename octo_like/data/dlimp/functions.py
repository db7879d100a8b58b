"""Functions of whole trajectories for pipelines of your own: what the training stream does to samples, in TensorFlow.

Windows, goals and masks come of the index arithmetic that the stream uses (`octo_like.data.order.windows`), the leaves
of a trajectory of the function that reads it (`octo_like.data.rlds.leaves.select`). The canonical trajectory that they
pass on (T steps, every leaf has the step first):

    observation/image_{slot}      T string (encoded) or T h w 3 uint8
    observation/proprio           T P float32
    observation/{sensor}          T ... float32, of `extra_keys`
    observation/timestep          T int32
    observation/pad_mask_dict/*   T bool, False: this modality is missing
    task/language_instruction     T string
    task/...                      goal: every observation entry at the goal step, after `relabel_goals`
    action                        T A, or T N A when actions come in chunks already
    action_pad_mask               T A bool, False: padded dimension
"""

from collections.abc import Mapping
from typing import Any

from octo_like.common import normalization
from octo_like.data.order import windows
from octo_like.data.rlds.leaves import select
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf

Trajectory = dict[str, Any]


def _steps(trajectory: Trajectory) -> tf.Tensor:
    return tf.shape(trajectory["action"])[0]


def restructure(trajectory: Trajectory, spec: DatasetSpec) -> Trajectory:
    """A (standardised) RLDS trajectory to a canonical one, by a dataset's spec."""
    chosen = select(trajectory, spec)
    observation: Trajectory = {f"image_{slot}": image for slot, image in chosen["images"].items()}
    if "proprio" in chosen:
        observation["proprio"] = chosen["proprio"]
    observation |= chosen["extras"]
    steps = _steps(chosen)
    observation["timestep"] = tf.range(steps)
    task = {"language_instruction": chosen["language"]} if "language" in chosen else {}
    return {"observation": observation, "task": task, "action": chosen["action"]}


def normalize(trajectory: Trajectory, statistics: Mapping[str, Any], kind: str = "normal") -> Trajectory:
    """Normalises `action`, `observation/proprio` and other sensors; see `octo_like.common.normalization.normalize`."""

    def apply(x: tf.Tensor, stats: Mapping[str, Any]) -> tf.Tensor:
        shift, scale, bound = normalization.coefficients(stats, kind)
        flat = tf.reshape(x, [-1, len(shift)])  # the statistics of a sensor are over its values laid flat
        return tf.reshape(tf.clip_by_value((flat - shift) * scale, -bound, bound), tf.shape(x))

    of_sensors = {"proprio": statistics.get("proprio"), **statistics.get("extra", {})}
    observation = {
        key: value if of_sensors.get(key) is None else tf.ensure_shape(apply(value, of_sensors[key]), value.shape)
        for key, value in trajectory["observation"].items()
    }
    action = trajectory["action"]
    action = tf.ensure_shape(apply(action, statistics["action"]), action.shape)
    return {**trajectory, "observation": observation, "action": action}


def add_pad_mask_dict(trajectory: Trajectory) -> Trajectory:
    """Adds `pad_mask_dict` to observation and task: an empty string is missing, everything else is there."""

    def masks(tree: Mapping[str, Any]) -> Trajectory:
        steps = _steps(trajectory)
        return {
            key: tf.strings.length(value) > 0 if value.dtype == tf.string else tf.ones([steps], tf.bool)
            for key, value in tree.items()
            if not isinstance(value, Mapping)
        }

    trajectory = dict(trajectory)
    for key in ("observation", "task"):
        if key in trajectory:
            trajectory[key] = {**trajectory[key], "pad_mask_dict": masks(trajectory[key])}
    return trajectory


def pad_actions_and_proprio(
    trajectory: Trajectory, max_action_dim: int | None = None, max_proprio_dim: int | None = None
) -> Trajectory:
    """Pads action and proprioception with zeros to a common width; `action_pad_mask` is False there.

    Raises:
      DataError: the values are wider than the maximum.
    """

    def pad(x: tf.Tensor, width: int | None, name: str) -> tf.Tensor:
        if width is None:
            return x
        if x.shape[-1] > width:
            raise DataError(f"{name} has {x.shape[-1]} dimensions, more than max_{name}_dim={width}")
        return tf.pad(x, [[0, 0]] * (x.shape.rank - 1) + [[0, width - x.shape[-1]]])

    action, observation = trajectory["action"], dict(trajectory["observation"])
    mask = pad(tf.ones_like(action), max_action_dim, "action") > 0
    if "proprio" in observation:
        observation["proprio"] = pad(observation["proprio"], max_proprio_dim, "proprio")
    return {
        **trajectory,
        "action": pad(action, max_action_dim, "action"),
        "action_pad_mask": mask,
        "observation": observation,
    }


def relabel_goals(trajectory: Trajectory, draws: tf.Tensor, max_distance: int | None = None) -> Trajectory:
    """Adds a goal to the task: every observation entry at a step drawn uniformly from the present and later ones.

    Args:
      draws: (T,) float32 uniform in [0, 1), one per step; make them stateless for a reproducible pipeline.
      max_distance: see `windows.goal_step`.

    The task keeps its own entries; `task/timestep` becomes the goal step.
    """
    steps = _steps(trajectory)
    goal = windows.goal_step(draws, tf.range(steps), steps, max_distance, xp=tf)
    reached = tf.nest.map_structure(lambda x: tf.gather(x, goal), trajectory["observation"])
    return {**trajectory, "task": _merge(reached, trajectory.get("task", {}))}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Trajectory:
    result = dict(base)
    for key, value in over.items():
        result[key] = _merge(result[key], value) if isinstance(value, Mapping) and key in result else value
    return result


def drop_task_conditioning(trajectory: Trajectory, draws: tf.Tensor, keep_goal_prob: float) -> Trajectory:
    """Leaves each step one way of saying what to do: the goal images where `draws` < keep_goal_prob or there is no
    instruction, the instruction elsewhere.

    What is dropped becomes an empty string or zero and its `pad_mask_dict` entry False; where the images are dropped
    the task's timestep becomes the last step. Without goal images or without language nothing changes.

    Args:
      draws: (T,) float32 uniform in [0, 1).
    """
    task, last = dict(trajectory["task"]), _steps(trajectory) - 1
    images = [key for key in task if key.startswith(("image_", "depth_"))]
    if "language_instruction" not in task or not images:
        return trajectory
    masks = dict(task["pad_mask_dict"])
    keep_images = (draws < keep_goal_prob) | ~masks["language_instruction"]
    for key in (*images, "language_instruction"):
        keep = keep_images if key in images else ~keep_images
        shaped = tf.reshape(keep, [-1] + [1] * (task[key].shape.rank - 1))
        empty = tf.fill(tf.shape(task[key]), "") if task[key].dtype == tf.string else tf.zeros_like(task[key])
        task[key] = tf.where(shaped, task[key], empty)
        masks[key] = masks[key] & keep
    if "timestep" in task:
        task["timestep"] = tf.where(keep_images, task["timestep"], last)
    return {**trajectory, "task": {**task, "pad_mask_dict": masks}}


def chunk(trajectory: Trajectory, window_size: int, action_horizon: int, *, octo_compat: bool = False) -> Trajectory:
    """Windows of history and chunks of actions for every step.

    Observation entries become (T, W, ...): steps t-W+1..t, clamped at the beginning, where
    `observation/timestep_pad_mask` is False. `action` becomes (T, W, H, A): window w holds the H actions from its
    (clamped) step on, clamped at the end. `action_pad_mask` (T, W, H, A) is False in padded dimensions and where the
    unclamped step is past the goal (`task/timestep`) or the last step; `observation/task_completed` (T, W, H) says the
    latter alone.

    Actions that come in chunks (T, N, A), N >= H, keep their first H.

    Args:
      octo_compat: Octo's mask instead; see `windows.task_completed`.

    Raises:
      DataError: chunks shorter than the horizon.
    """
    steps = _steps(trajectory)
    t = tf.range(steps)
    history = windows.window_steps(t, window_size)
    window = windows.within(history, steps, xp=tf)
    observation = tf.nest.map_structure(lambda x: tf.gather(x, window), trajectory["observation"])
    observation["timestep_pad_mask"] = history >= 0
    action = trajectory["action"]
    if action.shape.rank == 3:
        if action.shape[1] < action_horizon:
            raise DataError(
                f"actions come in chunks of {action.shape[1]}, shorter than action_horizon={action_horizon}"
            )
        chunks = tf.gather(action[:, :action_horizon], window)
    else:
        chunks = tf.gather(action, windows.within(windows.chunk_steps(window, action_horizon), steps, xp=tf))
    goal = trajectory.get("task", {}).get("timestep", tf.fill([steps], steps - 1))
    done = windows.task_completed(windows.chunk_steps(history, action_horizon), goal, octo_compat=octo_compat)
    observation["task_completed"] = done
    mask = trajectory.get("action_pad_mask", tf.ones_like(action, tf.bool))
    if mask.shape.rank == 3:
        mask = mask[:, None, :action_horizon]
    else:
        mask = mask[:, None, None]
    return {**trajectory, "observation": observation, "action": chunks, "action_pad_mask": mask & ~done[..., None]}
