"""Template: what your actions mean, when the recordings do not say it the way you want to train.

Named in a config as `standardize="transform:standardize"` (any importable "module:function"). It gets a whole episode:
a dict of TensorFlow tensors whose first axis is the step, images still encoded; it returns such a dict.
"""

import tensorflow as tf


def standardize(trajectory: dict) -> dict:
    """Absolute joint targets to changes from the present joints; the gripper stays absolute. One step is lost."""
    state, action = trajectory["observation"]["state"], trajectory["action"]
    trajectory = tf.nest.map_structure(lambda x: x[:-1], trajectory)
    trajectory["action"] = tf.concat([state[1:, :7] - state[:-1, :7], action[:-1, 7:]], axis=-1)
    return trajectory
