"""What a policy looks at: the attention of a readout over a camera's patches, as maps to lay over the picture."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from octo_like.common.schema import flatten
from octo_like.model.attention import recorded_weights
from octo_like.policy import describe


def attention_over_image(
    policy: Any,
    observation: Mapping[str, Any],
    instruction: str,
    camera: str,
    readout: str,
    unnormalize: str | None = None,
) -> np.ndarray:
    """How much the last timestep's readout attends to every patch of a camera; for a keypoint stem, where they are.

    Args:
      observation: one, as for `Policy.sample_actions` (a batch of one row); the first row is shown.
      instruction: what the policy is told.
      camera: slot, "primary" for instance.
      readout: the token group that attends, "readout_action" for instance.
      unnormalize: dataset in whose units the proprio and other sensors are, as for `Policy.sample_actions`.

    Returns:
      (layers, rows, columns), the mean over attention heads; or (keypoints, rows, columns), each summing to 1.

    Raises:
      ValueError: no such group, or its tokens are no grid (a token learner, a keypoint stem).
    """
    tasks = policy.create_tasks(texts=[instruction])
    observation = policy.prepare_observations(observation, unnormalize)
    report = describe.token_report(policy.model, policy.batch_spec)
    last = policy.batch_spec.window_size - 1
    keypoints = _keypoints(policy, observation, tasks, camera)
    if keypoints is not None:
        return keypoints
    starts = np.cumsum([0] + [group.size for group in report.layouts])
    spans = {(g.name, g.timestep): slice(a, a + g.size) for g, a in zip(report.layouts, starts[:-1], strict=True)}
    for name in (f"obs_{camera}", readout):
        if (name, last) not in spans:
            valid = sorted({g.name for g in report.layouts})
            raise ValueError(f"the model has no token group {name!r}; valid: {valid}")
    patches = spans[f"obs_{camera}", last]
    height, width = policy.batch_spec.image_sizes[camera] if camera in policy.batch_spec.image_sizes else (1, 1)
    count = patches.stop - patches.start
    rows = round((count * height / width) ** 0.5)
    if rows * (count // max(rows, 1)) != count or count == 1:
        raise ValueError(f"the {count} tokens of obs_{camera} are no grid over its image of {height} x {width}")
    layers = recorded_weights(
        lambda: policy.model.apply({"params": policy.params}, observation, tasks, method="groups"),
        tokens=report.total,
    )
    weights = np.stack([np.asarray(w[0].mean(0)[spans[readout, last], patches].mean(0)) for w in layers])
    return weights.reshape(len(layers), rows, count // rows)


def _keypoints(policy: Any, observation: Mapping[str, Any], tasks: Any, camera: str) -> np.ndarray | None:
    """(keypoints, rows, columns) softmax weights of the last frame; None when the camera has no keypoint stem."""
    _, seen = policy.model.apply(
        {"params": policy.params}, observation, tasks, method="groups", mutable=["intermediates"]
    )
    for path, leaf in flatten(seen.get("intermediates", {})):
        if path.split("/")[1] == f"observation_tokenizers_{camera}" and path.endswith("keypoint_weights"):
            return np.moveaxis(np.asarray(leaf[0][-1]), -1, 0)
    return None
