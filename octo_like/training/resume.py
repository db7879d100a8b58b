"""How a run goes on from its newest checkpoint, and what it carries from process to process besides its state."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from octo_like.common.config import check_resume, freeze, to_dict
from octo_like.common.defaults import default_config
from octo_like.training import provenance
from octo_like.training.checkpoint import Checkpointer, CheckpointError, has_checkpoint
from octo_like.training.clock import Clock
from octo_like.training.early_stopping import EarlyStopping
from octo_like.training.metrics import last_seen
from octo_like.training.program import Program
from octo_like.training.run import Run
from octo_like.training.state import TrainState
from octo_like.training.workdir import Workdir

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class History:
    """What every checkpoint keeps of a run besides its state and its config.

    Attributes:
      start: the step that this process starts at.
      began: "loaded_from", where the parameters of step 0 came from, and "init_from", where they should.
      clock: where the wall time went.
      stopping: how many evaluations brought no better score.
    """

    start: int
    began: Mapping[str, str | None]
    clock: Clock
    stopping: EarlyStopping

    def extra(self, inputs: Any) -> dict[str, Any]:
        """JSON-able: all of this, and the position in the data of `octo_like.data.inputs.Inputs`."""
        return {
            "position": inputs.stream.position,
            "order_spec": json.loads(json.dumps(inputs.stream.order_spec)),
            "versions": dict(inputs.versions),
            "clock": self.clock.state(),
            "early_stopping": self.stopping.state(),
            "began": self.began,
        }


def resume(run: Run, checkpointer: Checkpointer, workdir: Workdir, program: Program) -> tuple[TrainState, History]:
    """State and history of the newest good checkpoint, or those of a new run. The log says which.

    Raises:
      ConfigMismatch, CheckpointError: the checkpoint is of another run, or it is in doubt whether the run begins with
        the parameters that it should begin with.
    """
    options = run.config
    patience, mode, wanted = options.early_stopping.patience, options.checkpoint.best_mode, options.get("init_from")
    if checkpointer.latest_step() is None:
        if run.attempt.resumes or (wanted and not run.loaded_from):
            raise CheckpointError(
                f"{checkpointer.directory} held a checkpoint when this process started and holds none now: what the "
                f"run should go on from is in doubt{f', and init_from={wanted} was not loaded' if wanted else ''}. See "
                "who else writes there, then run the command again"
            )
        made = f"new ones (seed {options.seed})"
        log.info("starts at step 0; parameters: %s", f"loaded from {run.loaded_from}" if run.loaded_from else made)
        began = {"loaded_from": run.loaded_from, "init_from": wanted}
        return program.place(run.init_from), History(0, began, Clock.resume(None), EarlyStopping(patience, mode))
    saved = checkpointer.read()
    for change in check_resume(comparable(saved.metadata["config"]), comparable(to_dict(options))):
        log.warning("resumed with %s", change)
    for difference in provenance.differences(saved.metadata.get("code"), provenance.code_version()):
        log.warning("resumed by other code: %s", difference)
    state, extra = checkpointer.restore(None, program.state)
    run.inputs.resume(extra["order_spec"], extra["position"], extra.get("versions"))
    began = extra.get("began", {"loaded_from": "unknown", "init_from": wanted})  # older checkpoints do not say
    if wanted and began["loaded_from"] is None:
        raise CheckpointError(
            f"this run has init_from={wanted}, but its checkpoints in {checkpointer.directory} say that it began with "
            "new parameters. Train in another --workdir"
        )
    start = int(jax.device_get(state.step))
    source = f"loaded from {began['loaded_from']}" if began["loaded_from"] else "new ones"
    log.info("resumed from step %d; parameters at step 0: %s", start, source)
    clock = Clock.resume(extra.get("clock"), last_seen=last_seen(workdir.local))
    return state, History(start, began, clock, EarlyStopping(patience, mode, extra.get("early_stopping")))


def as_begun(config: FrozenConfigDict, workdir: str) -> FrozenConfigDict:
    """The config of a run that continues, with `data.num_demos_of` as the run began. Before there was this key,
    `num_demos` were training episodes alone; such a run has "training" in all steps that it saves since."""
    if not has_checkpoint(workdir):  # it is gone since this process began: `resume` refuses to go on from nothing
        return config
    saved = Checkpointer(workdir, read_only=True).read().metadata["config"]["data"]
    if saved.get("num_demos_of", "training") != "training":
        return config
    tree = to_dict(config)
    tree["data"]["num_demos_of"] = "training"
    return freeze(tree)


def kept_since_begun(parts: Sequence[str], workdir: str) -> tuple[str, ...]:
    """Those of some parts that a run has kept as they are: of heads all, of auxiliaries those that are frozen in its
    checkpoint, since in runs of earlier versions weight decay acted on them."""
    if not has_checkpoint(workdir):
        return tuple(parts)
    leaves = Checkpointer(workdir, read_only=True).read().leaves
    frozen = {leaf.split("/")[1] for leaf in leaves if leaf.startswith("frozen/")}
    return tuple(part for part in parts if part.startswith("heads_") or part in frozen)


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config as resumes compare it.

    - Keys that came into being after it was saved have their default.
    - A cosine schedule ends at a step that is said (decay_steps) or is num_steps: the step itself is compared, so that
      more steps, which a resume may ask for, do not silently stretch the schedule of a run that is under way.
    """
    config = {**default_config().to_dict(), **config}
    if "num_demos_of" not in config["data"]:
        config["data"] = {**config["data"], "num_demos_of": "training"}
    for group in ("checkpoint", "early_stopping", "eval", "optimizer", "watchdog", "data", "mesh"):
        config[group] = {**default_config()[group].to_dict(), **config[group]}
    model = config.get("model") or {}
    if "transformer" in model:
        config["model"] = {**model, "transformer": {"attention": "xla", **model["transformer"]}}
    opt = config["optimizer"]
    decay = (opt["decay_steps"] or config["num_steps"]) if opt["schedule"] == "cosine" else None
    return {**config, "optimizer": {**opt, "decay_steps": decay}}
