"""Ctrl-C in a command: one line and exit status 130, also while its modules are being imported.

A script imports this before all else:

    import octo_like.common.interrupts  # noqa: F401  isort: skip

What it holds is cleaned up as always, since Ctrl-C stays a KeyboardInterrupt; only what nobody catches ends here.
Processes that multiprocessing starts import the script again: Ctrl-C, which reaches them as well, ends them without a
word.
"""

import multiprocessing
import os
import signal
import sys
import threading
from typing import NoReturn

STATUS = 130  # as shells report a program that SIGINT ended


def end(said: str = "interrupted") -> NoReturn:
    """Ends the process, and those that multiprocessing started, with one line on stderr."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for child in multiprocessing.active_children():
        child.terminate()
    try:
        sys.stdout.flush()
        print(f"\n{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass  # nobody reads any more
    os._exit(STATUS)  # threads that wait for something would keep it alive


def _hook(kind, error, trace, before=sys.excepthook) -> None:
    if issubclass(kind, KeyboardInterrupt):
        end()
    before(kind, error, trace)


def _not_raised(unraisable, before=sys.unraisablehook) -> None:
    """What a callback or a finaliser cannot raise (libraries have such ones while they are imported) comes again, when
    that has returned."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        again = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        before(unraisable)


if multiprocessing.parent_process() is not None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
else:
    sys.excepthook, sys.unraisablehook = _hook, _not_raised
