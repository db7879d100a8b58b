"""The loop that pretraining and adaptation share: resume, step, log, evaluate, save, export.

`train.py` and `finetune.py` build a `Run` and call `run_loop`. Everything that decides what a step computes is in
`step.py`; everything here is about when things happen.
"""

import contextlib
import logging

import jax

from octo_like.common.config import save as save_config
from octo_like.common.config import to_dict
from octo_like.common.schema import check_batch
from octo_like.model.special import spare_the_collector
from octo_like.training import exits, sharding
from octo_like.training.checkpoint import NonFiniteState
from octo_like.training.distributed import Preemption, check_hosts, is_main
from octo_like.training.evaluator import Evaluator
from octo_like.training.meter import StepLog
from octo_like.training.metrics import METRICS_FILE, WANDB_ID_FILE, MetricsWriter
from octo_like.training.program import Program, build_program
from octo_like.training.ranking import Ranking
from octo_like.training.resume import History, resume
from octo_like.training.run import Run
from octo_like.training.saver import Saver, open_checkpointer
from octo_like.training.state import TrainState
from octo_like.training.watch import STACKS_FOLDER, ProfileSteps, TooManyBadSteps
from octo_like.training.workdir import Workdir

log = logging.getLogger(__name__)


def run_loop(run: Run) -> int:
    """Trains to config.num_steps, from the newest checkpoint if there is one. Returns the process's exit status."""
    config, attempt = run.config, run.attempt
    ranking = Ranking.from_config(config)
    program = build_program(
        config, run.model, run.mesh, init_params=run.init_params, init_from=run.init_from, frozen=run.frozen
    )
    with contextlib.ExitStack() as stack:
        with attempt.phase("restore"):
            workdir = stack.enter_context(Workdir(run.workdir, continued=(METRICS_FILE, WANDB_ID_FILE)))
            attempt.watchdog.folder = workdir.local / STACKS_FOLDER
            attempt.before_leaving(workdir.sync)
            checkpointer = stack.enter_context(open_checkpointer(run, workdir))
            preemption = stack.enter_context(Preemption())
            state, history = resume(run, checkpointer, workdir, program)
        with attempt.phase("agreement"):
            check_hosts(run.inputs.stream.order_spec, run.inputs.statistics)
        if is_main():
            workdir.local.mkdir(parents=True, exist_ok=True)
            save_config(config, workdir.local / "config.json")
            for name, text in run.documents.items():
                (workdir.local / name).write_text(text)
        stack.callback(run.inputs.stream.close)
        wandb = dict(config.wandb) if config.wandb.project else None
        writer = stack.enter_context(MetricsWriter(workdir.local, config=to_dict(config), wandb=wandb))
        spare_the_collector()
        saver = Saver(run, workdir, checkpointer, ranking, history)
        try:
            return _train(run, program, state, history, saver, writer, preemption)
        except (TooManyBadSteps, NonFiniteState) as error:
            log.error("%s", error)
            return exits.NOT_FINITE


def _train(
    run: Run,
    program: Program,
    state: TrainState,
    history: History,
    saver: Saver,
    writer: MetricsWriter,
    preemption: Preemption,
) -> int:
    config, stream, attempt, watchdog = run.config, run.inputs.stream, run.attempt, run.attempt.watchdog
    clock, stopping, start, num_steps = history.clock, history.stopping, history.start, run.config.num_steps
    with (
        StepLog(run, writer, clock, start) as steps,
        ProfileSteps(writer.workdir, config.profile_steps) as profile,
        attempt.ends_in_time(),
    ):
        # ---------------------------------------------------------------------------------------------------- start
        watchdog.enter("steps")
        if start >= num_steps:
            log.warning("already at step %d of %d; evaluating and exporting again", start, num_steps)
        else:
            check_batch(stream.batch(start), stream.batch_spec)
            stream.seek(start * config.batch_size)
        attempt.begun = start >= num_steps
        evaluator = Evaluator(run, writer)
        if run.config.eval.every is not None:
            evaluator.check(state, saver.ranking)
        saver.catch_up(start, state)

        def evaluate() -> dict[str, float]:
            steps.drain()
            with clock.section("eval"), watchdog.longer():
                scores = evaluator(step, state)
            stopping.update(step, saver.ranking.metric(scores))
            return scores

        # ---------------------------------------------------------------------------------------------------- steps
        step, scores = start, None
        while step < num_steps and not stopping.stopped:
            with steps.meter.waiting():
                batch = sharding.put_batch(next(stream), run.mesh)
            profile.before(step + 1)
            with steps.compiling(step == start), jax.transfer_guard("disallow"):
                state, metrics = program.step(state, batch)
            if step == start:
                attempt.begun = True
                clock.switch("train")  # until here: start-up, and the compilation of the step
                steps.meter.begin(step)
            step += 1
            profile.after(step, metrics["loss"])
            steps.add(step, metrics)
            last, scores = step == num_steps, None
            if config.eval.every and step % config.eval.every == 0 and not last:
                scores = evaluate()
            if config.checkpoint.every and step % config.checkpoint.every == 0 and not last:
                saver.save(step, state, scores)
            if preemption.should_stop(step):
                # Not ranked: a run that nobody stopped would not have this step. The last one is, by the run that goes
                # on from it, when it has evaluated it.
                saver.save(step, state)
                saver.wait(step)
                steps.drain()
                log.warning("stopped at step %d as asked; run the same command to continue", step)
                return exits.INTERRUPTED if attempt.interrupted else exits.PREEMPTED
        attempt.finishing = True
        steps.drain()
        if stopping.stopped:
            log.warning("stopped early at step %d: %s; that one is in export_best", step, stopping)

        # ------------------------------------------------------------------------------------------------------ end
        evaluate_last = config.eval.every is not None and not stopping.stopped  # then it has just been evaluated
        # Saved before anything else can go wrong, unless the evaluation decides whether it is kept.
        rank = saver.ranking.enabled and evaluate_last
        if not rank:
            saver.save(step, state)
        if evaluate_last:
            scores = evaluate()
        if rank:
            saver.save(step, state, scores)  # of a step that a stopped process has saved, its rank alone
        saver.finish(step, state)
    return exits.DONE
