"""What a run leaves behind: its checkpoints and its policies."""

import logging
from collections.abc import Mapping

from octo_like.common.config import to_dict
from octo_like.common.dimensions import unknown_kinds
from octo_like.training import sharding
from octo_like.training.checkpoint import Checkpointer
from octo_like.training.distributed import is_main, wait_for_all
from octo_like.training.provenance import code_version
from octo_like.training.ranking import Ranking
from octo_like.training.resume import History
from octo_like.training.run import Run
from octo_like.training.state import TrainState
from octo_like.training.watch import report_progress
from octo_like.training.workdir import Workdir

log = logging.getLogger(__name__)


def open_checkpointer(run: Run, workdir: Workdir) -> Checkpointer:
    """The checkpoints of a run, as its config wants them kept."""
    options = run.config.checkpoint
    return Checkpointer(
        workdir.path,
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        keep_best=options.keep_best,
        best_mode=options.best_mode,
        metadata={"config": to_dict(run.config), "code": code_version()},
    )


class Saver:
    """Saves and exports the state of a run.

    Attributes:
      ranking: which of its steps are the best.
    """

    def __init__(self, run: Run, workdir: Workdir, checkpointer: Checkpointer, ranking: Ranking, history: History):
        self._run, self._workdir, self._checkpointer = run, workdir, checkpointer
        self.ranking, self._history = ranking, history
        report_progress(history.start, history.start or None)

    def save(self, step: int, state: TrainState, scores: Mapping[str, float] | None = None) -> None:
        """Starts to save a step, ranked by its evaluation if it had one; the best one is exported as well.

        A step that is saved already gets its rank.
        """
        with self._history.clock.section("checkpoint"):
            extra, score = self._history.extra(self._run.inputs), self.ranking.metric(scores)
            self._run.attempt.check_lease()
            self._checkpointer.save(step, state, extra, metric=score)
            if score is not None and self._checkpointer.best_step(besides=step) == step:
                self._export(state, "export_best")
        # This one is being written; the one before is complete.
        complete = max((s for s in self._checkpointer.all_steps() if s != step), default=None)
        report_progress(self._history.start, complete)

    def catch_up(self, start: int, state: TrainState) -> None:
        """Exports the best step again where the run goes on from it: its process may have been killed before it did."""
        if start and self.ranking.enabled and self._checkpointer.best_step() == start:
            with self._history.clock.section("export"), self._run.attempt.watchdog.longer():
                self._export(state, "export_best")

    def wait(self, step: int) -> None:
        """Blocks until the save of this step, the newest, is complete."""
        self._checkpointer.wait()
        report_progress(self._history.start, step)

    def finish(self, step: int, state: TrainState) -> None:
        """Waits for the last save and exports the policy; returns on all processes together."""
        with self._history.clock.section("export"), self._run.attempt.watchdog.longer() as seconds:
            self.wait(step)
            self._export(state, "export")
            wait_for_all("octo_like/export", 2 * seconds + 60)  # process 0 writes it; the watchdog comes first

    def _export(self, state: TrainState, name: str) -> None:
        """Writes the policy, whole or not at all: the averaged parameters or, as checkpoint.export says, the last."""
        run = self._run
        params = state.params if run.config.checkpoint.export == "raw" else state.ema_params
        params = sharding.to_host(params, run.mesh)
        if is_main():
            target = self._workdir.path / name
            policy = run.make_policy(params)
            policy.push(str(target))
            log.info("exported to %s", target)
            if name == "export" and (unknown := unknown_kinds(policy.statistics)):  # once: not for each best step
                log.warning("%s", unknown)
