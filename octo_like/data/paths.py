"""Paths of the hand through the image as texts of a dataset's steps, for a `standardize` function."""

import numpy as np

from octo_like.common import hand_paths
from octo_like.data.errors import DataError
from octo_like.data.tf import tf


def paths_ahead(places_t2: "tf.Tensor", closed_t: "tf.Tensor", *, points: int = 5, events: int = 2) -> "tf.Tensor":
    """(T,) texts, `octo_like.common.hand_paths.paths_ahead` of an episode: where the hand goes from every step on.

        def with_paths(trajectory):
            places = my_camera(trajectory["observation"]["state"][:, :3])  # (T, 2): row, column as fractions
            closed = trajectory["action"][:, 6] < 0.5
            return {**trajectory, "path": paths_ahead(places, closed)}

    and `text_keys=dict(subtask="path")` in the dataset's spec.

    Args:
      places_t2: (T, 2) floats, (row, column) of the hand in the primary image, as fractions of it.
      closed_t: (T,) bool, whether the gripper is told to be closed.
      points, events: see there.

    Raises:
      DataError: another rank, too few points for the events. Places that are not finite are an error of the episode.
    """
    if places_t2.shape.rank != 2 or places_t2.shape[-1] not in (2, None) or closed_t.shape.rank != 1:
        raise DataError(f"paths: expected places (T, 2) and closed (T,), got {places_t2.shape} and {closed_t.shape}")
    if events < 0 or points < 2 + events:
        raise DataError(f"paths: {points} points for {events} events; valid: at least {2 + max(events, 0)}")

    def compute(places: np.ndarray, closed: np.ndarray) -> np.ndarray:
        return np.array(hand_paths.paths_ahead(places, closed, points=points, events=events), np.object_)

    texts = tf.numpy_function(compute, [places_t2, closed_t], tf.string, stateful=False)
    return tf.ensure_shape(texts, (places_t2.shape[0],))
