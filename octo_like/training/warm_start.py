"""Parameters of another run as the beginning of a new one: config.init_from. Nothing else is taken over."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from octo_like.common.schema import unflatten
from octo_like.policy import locations
from octo_like.policy.pretrained import LoadReport, PretrainedError, load_directory, merge_params
from octo_like.training.checkpoint import Checkpointer, CheckpointNotFound
from octo_like.training.storage import of_first

log = logging.getLogger(__name__)


def load_params(location: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """Parameters from an exported policy or from a training run.

    Args:
      location: an export (a folder, gs:// or hf://), or a run's workdir, its checkpoints folder or one step's folder
        (local or gs://). Of a run, the newest step whose manifest is sound is taken, and its averaged parameters.

    Returns:
      (nested dict of NumPy arrays, what was read in words).

    Raises:
      PretrainedError: there is neither.
      CheckpointDamaged: the checkpoint is not what was saved.
    """
    try:
        reader = Checkpointer(location, read_only=True)
    except CheckpointNotFound as no_checkpoint:
        try:
            _, params, _, _ = load_directory(locations.fetch(location))
        except (PretrainedError, locations.LocationError) as no_export:
            raise PretrainedError(
                f"init_from={location} is neither an exported policy nor a run with checkpoints.\n"
                f"  as an export: {no_export}\n  as a run: {no_checkpoint}"
            ) from no_export
        return params, f"the exported policy {location}"
    step = of_first(lambda: reader.read().step)  # the same for all processes
    flat = {**reader.load_arrays(step, "ema/"), **_frozen(reader, step)}
    return unflatten(flat), f"the averaged parameters of step {step} in {reader.directory}"


def _frozen(reader: Checkpointer, step: int) -> Mapping[str, Any]:
    has_any = any(name.startswith("frozen/") for name in reader.read(step).leaves)
    return reader.load_arrays(step, "frozen/") if has_any else {}


def warm_start(
    initial: Mapping[str, Any], location: str | os.PathLike, *, frozen: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], LoadReport]:
    """Initial parameters with everything that fits taken from `location`; the report says what became of each.

    Raises:
      PretrainedError: nothing fits, or there is nothing at `location`.
    """
    loaded, source = load_params(location)
    params, report = merge_params(initial, loaded, frozen=frozen)
    log.info("parameters from %s\n%s", source, report)
    return params, report
