"""Index arithmetic of windows, action chunks and goals: integers in, integers out.

The same functions serve whole trajectories in TensorFlow (`xp=tf`) and batches of samples in NumPy (`xp=np`): they use
operators, `minimum`, `maximum` and nothing else. Letters: t present step, T steps in the trajectory, W window, H
horizon.
"""

from typing import Any

import numpy as np


def window_steps(t: Any, window_size: int) -> Any:
    """Steps (..., W) of the history that ends at t (...,), negative before the trajectory began."""
    return t[..., None] + np.arange(1 - window_size, 1, dtype=np.int32)


def chunk_steps(steps: Any, action_horizon: int) -> Any:
    """Steps (..., H) of the action chunk that starts at each of `steps` (...,), unclamped."""
    return steps[..., None] + np.arange(action_horizon, dtype=np.int32)


def within(steps: Any, length: Any, xp: Any = np) -> Any:
    """`steps` clamped to a trajectory of `length` steps."""
    return xp.minimum(xp.maximum(steps, 0), length - 1)


def task_completed(steps: Any, goal: Any, *, octo_compat: bool = False) -> Any:
    """True where the unclamped action index `steps` (..., W, H) is past `goal` (...,) (goal step, or the last step).

    `octo_compat` reproduces Octo: its index is two steps too small, and it counts the action at the goal as past. The
    two together keep up to two actions beyond the goal.
    """
    goal = goal[..., None, None]
    return steps - 2 >= goal if octo_compat else steps > goal


def goal_step(u: Any, t: Any, length: Any, max_distance: int | None = None, xp: Any = np) -> Any:
    """Goal step, uniform over the present and later steps of the trajectory.

    Args:
      u: draws in [0, 1), float32.
      t: present steps, int32.
      length: T, steps of the trajectory.
      max_distance: the goal is fewer than this many steps ahead (so the farthest is max_distance - 1), as in Octo.
    """
    end = length + t * 0
    if max_distance is not None:
        end = xp.minimum(t + max_distance, end)
    low, span = xp.cast(t, np.float32) if xp is not np else np.float32(t), end - t
    span = xp.cast(span, np.float32) if xp is not np else np.float32(span)
    drawn = u * span + low
    drawn = xp.cast(drawn, np.int32) if xp is not np else drawn.astype(np.int32)
    return xp.minimum(drawn, length - 1)


def kept_images(present: Any, draws: Any, probability: float, keep: Any) -> Any:
    """(..., n) bool: which of n images dropout leaves. As in Octo.

    Args:
      present: (..., n) bool, the images there are.
      draws: (..., n) uniform in [0, 1).
      probability: of each image to be dropped.
      keep: (...,) number of the image that is never dropped.
    """
    return present & ((draws > probability) | (np.arange(present.shape[-1]) == keep[..., None]))


def nth_true(flags: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Position (N,) of a True entry of each row of `flags` (N, n), each equally likely for u uniform in [0, 1)."""
    wanted = np.floor(u * flags.sum(-1)).astype(np.int64)
    return (flags.cumsum(-1) <= wanted[:, None]).sum(-1)
