"""What a policy would do at each step of an episode that is known: its chunks beside the actions that were taken."""

from typing import Any

import jax
import numpy as np

from octo_like.robot.prediction import Prediction
from octo_like.training.probe_frames import Frames, action_width


def predict_episode(policy: Any, frames: Frames, episode: int, *, samples: int = 4, seed: int = 0) -> Prediction:
    """Samples chunks at every frame of an episode, from its own observations, as `plot_prediction` draws them.

    The policy sees what the demonstrator saw, not where its own actions would have led: this shows what it predicts,
    and not whether it succeeds.

    Args:
      policy: a `Policy`, with statistics of the episode's dataset.
      frames: with actions; from `frames_from_arrays`, for instance of `octo_like.envs.labels.labelled_frames`.
      episode: its number in `frames.episode`.
      samples: S, chunks of each frame.
      seed: of the sampling noise.

    Raises:
      ValueError: no such episode, or frames without actions.
    """
    rows = np.flatnonzero(frames.episode == episode)
    if not len(rows) or frames.action is None:
        raise ValueError(f"no episode {episode} with actions; there are {sorted(set(frames.episode.tolist()))[:20]}")
    dataset = str(frames.dataset[rows[0]])
    observation, tasks = frames.inputs(policy, dataset, rows, frames.ways(policy)[0])
    keys = jax.random.split(jax.random.key(seed), len(rows))
    predicted = policy.sample_actions(observation, tasks, rng=keys, unnormalize=dataset, sample_shape=(samples,))
    width = action_width(policy, dataset, min(predicted.shape[-1], frames.action.shape[-1]))
    true = frames.action[rows, 0, :width]
    return Prediction(
        predicted=np.asarray(predicted)[..., :width],
        true=np.nan_to_num(true),
        mask=np.isfinite(true),
        timestep=np.arange(len(rows)),
    )
