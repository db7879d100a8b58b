"""A stand-in for the simulators' worker (`python -m tests.sims.echo_worker FD`): the same protocol, no simulator."""

import os
import sys
from multiprocessing.connection import Connection

import numpy as np

from octo_like.envs.sims.worker import serve


class Echo:
    def add(self, a, b):
        return a + b

    def pid(self):
        return os.getpid()

    def imported(self):
        return sorted(name for name in ("tensorflow", "jax", "mujoco") if name in sys.modules)

    def fail(self, kind, message):
        raise {"ValueError": ValueError, "KeyError": KeyError, "ModuleNotFoundError": ModuleNotFoundError}[kind](
            message
        )

    def die(self):
        print("last words", file=sys.stderr, flush=True)
        os.abort()

    def chatter(self):
        print("noise on stdout")
        return np.arange(3)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), Echo())
