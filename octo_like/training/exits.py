"""Exit statuses of train.py and finetune.py, for launchers. Imports nothing, so that a supervisor starts at once."""

DONE = 0
ERROR = 1  # a crash: worth another attempt
USAGE = 2  # a mistake in command line, config or data: the same command fails again
PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: SIGTERM arrived, the state is saved; run the same command again
NOT_FINITE = 76  # loss or gradients were not finite for max_bad_steps steps in a row: needs a person
INTERRUPTED = 130  # Ctrl-C; from the first step on the state is saved. Whoever pressed it does not want another attempt
STALLED = 77  # no step finished for too long, the stacks were dumped: worth another attempt

# What the same command, run again, cannot get past.
FINAL = (DONE, USAGE, NOT_FINITE, INTERRUPTED)

# A file the process keeps up to date with the newest saved step, when its supervisor names one.
PROGRESS_VARIABLE = "OCTO_LIKE_PROGRESS"


def describe(status: int) -> str:
    """An exit status in words; negative ones are signals, as in `subprocess`."""
    import signal

    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    names = {
        DONE: "done",
        ERROR: "failed",
        USAGE: "mistake in command line, config or data",
        PREEMPTED: "preempted, state saved",
        NOT_FINITE: "stopped by the NaN guard",
        STALLED: "stalled",
        INTERRUPTED: "interrupted by Ctrl-C",
    }
    return names.get(status, f"failed with status {status}")
